"""What one image token should say: a table of concepts and the language model's own input embedding of each.

A cell that holds the centre of an object should look, to the language model, like the word for it; of a
coloured shape, like the sum of its colour and its shape; of a letter, like that letter; anything else is "empty".
It knows nothing of towers or optimizers.
"""

import numpy as np
import torch

from mllm_demo.training.art import OBJECT_NAMES
from mllm_demo.training.scenes import COLOURS, LETTERS, SHAPES, Scene, Thing

EMPTY = " empty"
CONCEPTS: tuple[tuple[str, ...], ...] = (
    (EMPTY,),
    *((f" {name}",) for name in OBJECT_NAMES),
    *((f" {colour}", f" {shape}") for colour in COLOURS for shape in SHAPES),
    *((f" {letter}",) for letter in LETTERS),
)
_INDEX = {words: index for index, words in enumerate(CONCEPTS)}


def concept_of(thing: Thing) -> int:
    return _INDEX[(f" {thing.colour}", f" {thing.name}") if thing.colour else (f" {thing.name}",)]


def concept_embeddings(embeddings: torch.Tensor, tokenizer) -> torch.Tensor:
    """`embeddings [vocab, hidden]` → `[concepts, hidden]`: mean over a word's pieces, sum over its words."""

    def word(text: str) -> torch.Tensor:
        return embeddings[tokenizer(text, add_special_tokens=False).input_ids].float().mean(0)

    return torch.stack([torch.stack([word(text) for text in words]).sum(0) for words in CONCEPTS])


def cell_targets(scene: Scene, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """(concept of the thing centred in each cell, concept of the thing that covers its middle); int64 `[cells]`."""
    height, width = scene.image.shape[:2]
    centred, covered = np.zeros((2, rows, columns), np.int64)
    middles_y, middles_x = (np.arange(rows) + 0.5) * height / rows, (np.arange(columns) + 0.5) * width / columns
    for thing in scene.things:
        concept, (x0, y0, x1, y1) = concept_of(thing), thing.box
        inside = ((middles_y >= y0) & (middles_y < y1))[:, None] & ((middles_x >= x0) & (middles_x < x1))[None, :]
        covered[inside] = concept
        x, y = thing.centre
        centred[min(int(y * rows / height), rows - 1), min(int(x * columns / width), columns - 1)] = concept
    return centred.ravel(), covered.ravel()
