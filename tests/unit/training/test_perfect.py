"""Tokens are given the letters of their own picture, however many pictures are seen at a time."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mllm_demo.training import perfect
from mllm_demo.training.concepts import LETTER_SLOTS, cell_targets
from mllm_demo.training.lettering import CHARACTERS
from mllm_demo.training.perfect import perfect_letters
from mllm_demo.training.scenes import SPLITS, render
from mllm_demo.training.tokens import Letters
from mllm_demo.training.tower import DenseHeads
from tests.unit.training.test_conversations import Processor

SIDE, WIDTH = 12, 96


@pytest.fixture
def seeing(monkeypatch) -> SimpleNamespace:
    """What is loaded, as far as it sees: a connector that says of every cell what it is given."""
    torch.manual_seed(0)
    processor = Processor()
    embeddings = nn.Embedding(len(processor.tokenizer) + 1, WIDTH)
    vision = SimpleNamespace(
        model=SimpleNamespace(multi_modal_projector=nn.Identity()), device=torch.device("cpu"),
        config=SimpleNamespace(vision_config=SimpleNamespace(side=SIDE)), get_input_embeddings=lambda: embeddings,
    )  # fmt: skip
    monkeypatch.setattr(perfect, "read_heads", lambda folder: {"dense": None})
    # Heads that tell nothing: every letter stays in the cell that holds its centre.
    shape = (SIDE**2, LETTER_SLOTS, 1 + len(CHARACTERS))
    monkeypatch.setattr(DenseHeads, "letters", lambda heads, tokens: torch.zeros(len(tokens), *shape))
    return SimpleNamespace(model=SimpleNamespace(base_model=SimpleNamespace(model=vision)), processor=processor)


def test_cells_hold_the_letters_of_their_own_picture_and_others_stay_what_they_were(seeing, art):
    scenes = [render(art, SPLITS["train"], 1, number, kind="text") for number in range(3)]
    connector = seeing.model.base_model.model.model.multi_modal_projector
    tokens = torch.randn(3, SIDE**2, WIDTH)
    with perfect_letters(seeing, scenes):
        said = torch.cat([connector(tokens[:2]), connector(tokens[2:])])
    assert torch.equal(connector(tokens), tokens)  # and not any more
    table = perfect.dense_heads(seeing.model.base_model.model, seeing.processor, torch.device("cpu")).table
    letters = Letters(table[-len(CHARACTERS) :])
    for scene, was, now in zip(scenes, tokens, said, strict=True):
        held = torch.from_numpy(cell_targets(scene, SIDE).letters)
        single = (held > 0).sum(-1) == 1
        away = ~torch.nn.functional.max_pool2d(
            (held > 0).any(-1).float().view(1, SIDE, SIDE), 3, stride=1, padding=1
        ).bool().flatten()
        assert torch.equal(now[away], was[away])
        told = letters.read(now[single])[:, 0]
        assert torch.equal(told, held[single, 0] - 1)
