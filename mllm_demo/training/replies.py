"""Asks a model many things at once and takes its likeliest words: what it is measured by.

It knows nothing of what is right.
"""

import torch
from PIL import Image

from mllm_demo.models.loading import LoadedModel

LONGEST = 48  # tokens of a reply: six words of six letters, spelled, and what stands around them
BATCH = 100
PICTURE = {"type": "image"}  # where a conversation shows it


def turn(role: str, text: str, *before: dict) -> dict:
    """One message of plain `text`, after other content such as `PICTURE`."""
    return {"role": role, "content": [*before, {"type": "text", "text": text}]}


@torch.inference_mode()
def replies(loaded: LoadedModel, talks: list[list[dict]], pictures: list[Image.Image] | None = None) -> list[str]:
    """Greedy replies to conversations, each of which shows its one of `pictures`, or none of them any."""
    said, processor = [], loaded.processor
    for start in range(0, len(talks), BATCH):
        batch = slice(start, start + BATCH)
        texts = [processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks[batch]]
        images = {"images": pictures[batch]} if pictures else {}
        inputs = processor(text=texts, **images, return_tensors="pt", padding=True, padding_side="left")
        made = loaded.model.generate(**inputs.to(loaded.device), max_new_tokens=LONGEST, do_sample=False)
        said += processor.batch_decode(made[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return said
