"""Every family of the catalogue, from a checkpoint's files to a streamed answer whose routing is complete.

Models are random and tiny; their classes, processors and the layout of their folders are those of the hub's
checkpoints, and chats are rendered as their templates render them. None of it needs torchvision.
"""

import io
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    LlamaConfig,
    LlavaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
)
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE as SMOLVLM_TEMPLATE

from mllm_demo.chat.engine import ChatEngine
from mllm_demo.chat.events import Finished, Started, TextDelta
from mllm_demo.chat.images import read_picture
from mllm_demo.chat.messages import Message
from mllm_demo.chat.prompt import make_prompt
from mllm_demo.models import loading
from mllm_demo.moe_lora import MoeLoraConfig
from mllm_demo.settings import ModelChoice, Sampling, Settings

WIDE, TALL = (80, 40), (30, 70)
NEW_TOKENS = 4
WIDTH, LAYERS = 128, 2
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}

QWEN_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A message's pictures come first, whatever their place in it; a space follows every text.
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}"
    "{% for c in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ c.text + ' ' }}{% endgeneration %}"
    "{% else %}{{ c.text + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """How a checkpoint of the family is published.

    `image_processor`: its type as the hub's file names it; `declared`: processor_config.json, None where the
    family has none; `video`: whether the folder describes a video processor, too.
    """

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    images: object
    image_processor: str
    processor: str
    template: str
    declared: dict | None = None
    video: bool = False

    def save(self, folder: Path) -> Path:
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(self.config)
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        described = {
            **self.images.to_dict(),
            "image_processor_type": self.image_processor,
            "processor_class": self.processor,
        }
        described.pop("_processor_class", None)
        write(folder / "preprocessor_config.json", described)
        write(folder / "chat_template.json", {"chat_template": self.template})
        if self.declared is not None:
            write(folder / "processor_config.json", {"processor_class": self.processor, **self.declared})
        if self.video:
            write(folder / "video_preprocessor_config.json", {"video_processor_type": "Qwen3VLVideoProcessor"})
        return folder


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def tokenizer(end: str, special: list[str]) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(["<pad>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token=end, additional_special_tokens=special
    )


def text(words: PreTrainedTokenizerFast, **more) -> dict:
    return {
        "vocab_size": len(words),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "pad_token_id": words.pad_token_id,
        "eos_token_id": words.eos_token_id,
        "bos_token_id": None,
        **more,
    }


def tiled(config: type, images: type, image_processor: str, processor: str) -> Family:
    tags = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    marks = ["<|im_start|>", "<image>", "<fake_token_around_image>", "<global-img>", *tags]
    words = tokenizer("<end_of_utterance>", marks)
    vision = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    return Family(
        config(
            text_config={"model_type": "llama", **text(words)},
            vision_config=vision,
            scale_factor=2,
            image_token_id=words.convert_tokens_to_ids("<image>"),
            pad_token_id=words.pad_token_id,
        ),
        words,
        images(size={"longest_edge": 96}, max_image_size={"longest_edge": 32}),
        image_processor,
        processor,
        SMOLVLM_TEMPLATE,
        {"image_seq_len": 4},
    )


def qwen(config: type, vision: dict, image_processor: str, processor: str, *, video=False, **more) -> Family:
    marks = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = tokenizer("<|im_end|>", marks)
    ids = {
        f"{name}_token_id": words.convert_tokens_to_ids(token)
        for name, token in zip(("vision_start", "vision_end", "image", "video"), marks[1:], strict=True)
    }
    return Family(
        config(
            text_config=text(words, **more),
            vision_config={"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision},
            **ids,
        ),
        words,
        Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 32 * 32}
        ),
        image_processor,
        processor,
        QWEN_TEMPLATE,
        video=video,
    )


def qwen2() -> Family:
    vision = {"depth": LAYERS, "embed_dim": 64, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 1}
    return qwen(Qwen2VLConfig, vision, "Qwen2VLImageProcessor", "Qwen2VLProcessor", rope_parameters=MROPE)


def qwen2_5() -> Family:
    vision = {
        "depth": LAYERS,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    kinds = ("Qwen2VLImageProcessor", "Qwen2_5_VLProcessor")
    return qwen(Qwen2_5_VLConfig, vision, *kinds, rope_parameters=MROPE)


def qwen3() -> Family:
    vision = {
        "depth": LAYERS,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    kinds = ("Qwen2VLImageProcessorFast", "Qwen3VLProcessor")
    rope = {**MROPE, "mrope_interleaved": True}
    return qwen(Qwen3VLConfig, vision, *kinds, video=True, rope_parameters=rope, head_dim=32)


def llava() -> Family:
    words = tokenizer("</s>", ["<s>", "<image>"])
    tower = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    side = {"height": 32, "width": 32}
    return Family(
        LlavaConfig(
            vision_config=tower,
            text_config=LlamaConfig(**text(words)),
            image_token_index=words.convert_tokens_to_ids("<image>"),
        ),
        words,
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side),
        "CLIPImageProcessor",
        "LlavaProcessor",
        LLAVA_TEMPLATE,
        {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    )


FAMILIES = {
    "idefics3": lambda: tiled(
        Idefics3Config, Idefics3ImageProcessorPil, "Idefics3ImageProcessor", "Idefics3Processor"
    ),
    "smolvlm": lambda: tiled(
        SmolVLMConfig, SmolVLMImageProcessorPil, "SmolVLMImageProcessor", "SmolVLMProcessor"
    ),
    "qwen2-vl": qwen2,
    "qwen2.5-vl": qwen2_5,
    "qwen3-vl": qwen3,
    "llava": llava,
}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory) -> Path:
    return FAMILIES[request.param]().save(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory) -> Path:
    config = MoeLoraConfig(
        r=2,
        num_experts=4,
        target_modules=r".*(language_model|text_model).*\.(o_proj|gate_proj|up_proj|down_proj)",
        init_lora_weights=False,
    )
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(AutoModelForImageTextToText.from_pretrained(checkpoint), config).save_pretrained(folder)
    return folder


def picture(size: tuple[int, int]):
    """Noise: a plain picture would make every patch the same."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path := io.BytesIO(), "PNG")
    return read_picture(path.getvalue(), max_bytes=10**6, max_pixels=10**6)


def ready(checkpoint: Path, adapter: Path | None) -> tuple[ChatEngine, loading.LoadedModel]:
    """An engine with the model loaded, and the very model that it holds."""
    held = []

    def load(*arguments):
        held.append(loading.load(*arguments))
        # A random model may end at once; every answer shall have the length asked for.
        held[0].model.generation_config.eos_token_id = []
        return held[0]

    engine = ChatEngine(Settings(), load=load)
    choice = ModelChoice(str(checkpoint), str(adapter) if adapter else None, "nf4", "cpu")
    assert [step.fraction for step in engine.load(choice)][-1] == 1
    return engine, held[0]


def talk(engine: ChatEngine):
    """Two turns with a picture each: the conversation that was answered last, and its events."""
    first = (Message("user", (picture(WIDE), "What is this?")),)
    settings = Sampling(max_new_tokens=NEW_TOKENS)
    answered = list(engine.answer(first, settings))[-1].text
    second = (*first, Message("assistant", (answered or "?",)), Message("user", ("And this? ", picture(TALL))))
    return second, list(engine.answer(second, settings))


def untapped(loaded: loading.LoadedModel, messages) -> list[int]:
    """New ids as plain greedy `generate` draws them."""
    prompt = make_prompt(loaded, messages, NEW_TOKENS)
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return loaded.model.generate(**prompt.inputs, generation_config=config)[0, len(prompt.ids) :].tolist()


def check_stream(events: list) -> None:
    deltas = [event for event in events if isinstance(event, TextDelta)]
    assert isinstance(events[0], Started) and isinstance(events[-1], Finished)
    assert events[0].image_tokens >= 2
    assert [event.new_tokens for event in deltas] == sorted(event.new_tokens for event in deltas) != []
    assert all(later.text.startswith(earlier.text) for earlier, later in pairwise(deltas))
    assert (events[-1].reason, events[-1].new_tokens) == ("length", NEW_TOKENS)


def test_a_bare_model_answers_about_two_pictures(checkpoint):
    engine, loaded = ready(checkpoint, None)
    messages, events = talk(engine)
    check_stream(events)
    assert events[-1].trace is None
    expected = loaded.processor.tokenizer.decode(untapped(loaded, messages), skip_special_tokens=True)
    assert events[-1].text == expected
    assert loaded.four_bit_share > 0


def test_experts_are_traced_for_every_token_of_two_pictures(checkpoint, adapter):
    engine, loaded = ready(checkpoint, adapter)
    messages, events = talk(engine)
    check_stream(events)
    trace = events[-1].trace
    prompt = make_prompt(loaded, messages, NEW_TOKENS)
    assert [token.id for token in trace.tokens if token.phase == "prefill"] == list(prompt.ids)
    assert [token.id for token in trace.tokens if token.phase == "decode"] == untapped(loaded, messages)
    assert {(site.layer_idx, site.block) for site in trace.sites} == {
        (layer, block) for layer in range(LAYERS) for block in ("attention", "mlp")
    }
    for site in trace.sites:
        assert trace.router_probs[site.name].shape == (len(trace.tokens), 4)
        assert np.isfinite(trace.router_probs[site.name]).all()

    drawn = [token for token in trace.tokens if token.modality == "image"]
    assert len(drawn) == events[0].image_tokens
    assert sorted({token.image_index for token in drawn}) == [0, 1]
    for token in drawn:
        width, height = (WIDE, TALL)[token.image_index]
        left, top, right, bottom = token.box
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
    texts = ("What is this?", "And this?")
    users = "".join(token.text for token in trace.tokens if (token.role, token.modality) == ("user", "text"))
    assert all(words in users for words in texts)
