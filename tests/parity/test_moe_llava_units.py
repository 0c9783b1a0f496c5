"""MoE-LLaVA's smaller parts against recordings of the original: gating, prompts, `<image>`, preprocessing.

Tables of floats agree to 1e-6 (one order of summation), pictures to one of 256 grey levels (releases of Pillow round
differently between the two passes of a resize), integers and texts exactly. Every folder of such recordings that is
found is taken.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoProcessor, CLIPVisionConfig, LlavaProcessor, PreTrainedTokenizerFast, SiglipVisionConfig

from mllm_demo.models.moe_llava.config import MoeLlavaPhiConfig
from mllm_demo.models.moe_llava.gating import gate
from mllm_demo.models.moe_llava.processor import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    load_image_processor,
    make_processor,
)
from tests.parity.cases import CASES_VARIABLE, DEFAULT_CASES

# The conversation templates of the families that are read here; the original has more.
VERSIONS = ("phi", "stablelm", "qwen")
MARK = -200
FIRST = 100  # the recorded character tokenizer: id = 100 + code point
BOS = 1


def folders(file: str) -> list[Path]:
    root = Path(os.environ.get(CASES_VARIABLE) or DEFAULT_CASES)
    return sorted(path.parent for path in root.rglob(file))


def entries(file: str, of=lambda content: content) -> list:
    """(folder, entry) for each entry of each `file` found."""
    return [
        pytest.param(folder, entry, id=f"{folder.name}-{number}")
        for folder in folders(file)
        for number, entry in enumerate(of(json.loads((folder / file).read_text(encoding="utf-8"))))
    ]


@pytest.mark.parametrize(("folder", "case"), entries("gating.json"))
def test_gating(folder, case):
    recorded = load_file(folder / "gating.safetensors")

    def of(name: str) -> torch.Tensor | None:
        return recorded.get(f"{case['id']}.{name}")

    draws = of("gumbel_noise") if case["k"] == 2 else of("rts_uniform")
    gating = gate(of("router_logits"), case["k"], case["capacity_factor"], case["min_capacity"], draws)
    dense = torch.zeros_like(of("router_logits")).scatter_add_(1, gating.chosen, gating.weights)
    torch.testing.assert_close(dense, of("combine_weights"), atol=1e-6, rtol=0)
    assert gating.capacity == case["capacity"]
    assert int((~gating.kept).sum()) == case["dropped_choices"]
    dispatched = torch.zeros_like(dense, dtype=torch.bool).scatter_(1, gating.chosen, gating.kept)
    assert torch.equal(dispatched, of("slot") >= 0)
    first = torch.nn.functional.one_hot(gating.chosen[:, 0], case["experts"])
    assert torch.equal(first.sum(0), of("exp_counts").to(first.dtype))


def characters(bos: bool) -> PreTrainedTokenizerFast:
    """The recorded tokenizer: one token a character."""
    vocab = {"<s>": BOS, "</s>": 2} | {chr(code): FIRST + code for code in range(1, 256)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    words = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token="</s>", bos_token="<s>" if bos else None
    )
    words.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    return words


def tower(folder: Path, described: dict) -> tuple[Path, MoeLlavaPhiConfig]:
    """A tower's folder and configuration for a recorded preprocessor."""
    (folder / "preprocessor_config.json").write_text(json.dumps(described), encoding="utf-8")
    size = described["size"]
    side = size.get("shortest_edge") or size["height"]
    kind = SiglipVisionConfig if "Siglip" in described["image_processor_type"] else CLIPVisionConfig
    return folder, MoeLlavaPhiConfig(vision_config=kind(image_size=side, patch_size=14))


@pytest.mark.parametrize(
    ("folder", "name"), entries("prompts.json", lambda content: [name for name in content["messages"]])
)
def test_prompts(folder, name, tmp_path):
    content = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    turns = content["messages"][name]
    messages = [
        {
            "role": {"u": "user", "a": "assistant"}[role],
            "content": [{"type": "image"}] * text.count("<image>\n")
            + [{"type": "text", "text": text.replace("<image>\n", "")}],
        }
        for role, text in turns
        if text is not None
    ]
    described = json.loads((folder / "preprocess.json").read_text(encoding="utf-8"))["clip"]
    parts = tower(tmp_path, described)
    processor = make_processor(characters(False), load_image_processor(*parts, "Tiny"), parts[1])
    prompt = processor.apply_chat_template(messages, add_generation_prompt=turns[-1][1] is None, tokenize=False)
    assert {prompt} == {content["prompts"][version][name] for version in VERSIONS}


def test_the_template_takes_plain_text_and_a_system_message():
    words = characters(False)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    prompt = words.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATE, add_generation_prompt=True, tokenize=False
    )
    assert prompt == "Be brief. USER: Hello ASSISTANT:"


@pytest.mark.parametrize(
    ("folder", "case"), entries("tokenizer_image_token.json", lambda content: content["cases"])
)
def test_image_marks_in_text(folder, case):
    words = characters(case["bos"])
    mark = words.convert_tokens_to_ids(IMAGE_TOKEN)
    ids = words(case["prompt"])["input_ids"]
    assert [MARK if number == mark else number for number in ids] == case["ids"]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("padded", [True, False], ids=["pad", "square"])
@pytest.mark.parametrize("folder", folders("preprocess.json"), ids=lambda folder: folder.name)
def test_preprocessing(folder, padded, kind, tmp_path):
    recorded = load_file(folder / "preprocess.safetensors")
    described = json.loads((folder / "preprocess.json").read_text(encoding="utf-8"))[kind]
    images = load_image_processor(*tower(tmp_path, described), "Tiny")
    images.do_pad = padded
    step = 1.01 / 255 / min(described["image_std"])
    names = [name for name in recorded if "." not in name]
    assert names
    for name in names:
        found = images(Image.fromarray(recorded[name].numpy()), return_tensors="pt")["pixel_values"]
        expected = recorded[f"{name}.{kind}.{'pad' if padded else 'square'}"]
        torch.testing.assert_close(found, expected, atol=step, rtol=0)


def test_a_saved_processor_is_the_same(tmp_path):
    folder = next(DEFAULT_CASES.rglob("preprocess.json")).parent  # whatever other cases are named
    described = json.loads((folder / "preprocess.json").read_text(encoding="utf-8"))["siglip"]
    parts = tower(tmp_path, described)
    processor = make_processor(characters(False), load_image_processor(*parts, "Tiny"), parts[1])
    processor.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert isinstance(again, LlavaProcessor) and not again.image_processor.do_pad
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8))
    one, two = (p(text="a<image>b", images=picture, return_tensors="pt") for p in (processor, again))
    assert torch.equal(one["input_ids"], two["input_ids"]) and torch.equal(one["pixel_values"], two["pixel_values"])
