"""Tiny random MoE-LLaVA checkpoints in the layout in which the original is published, pickled weights and all."""

import base64
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from mllm_demo.models.moe_llava.config import mixture
from mllm_demo.models.moe_llava.model import MoeLlavaForConditionalGeneration
from mllm_demo.models.moe_llava.naming import VISION_TOWER, Naming

TOWER = "tiny-tower"
SIDE, PATCH = 28, 7
FEATURES = {"clip": (SIDE // PATCH) ** 2, "siglip": (SIDE // PATCH) ** 2 - 1}
WIDTH = 128  # 4-bit blocks of 64 fit its rows
_SHARED = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "mm_hidden_size": 64,
    "image_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad",
}
_FAMILIES = {
    "moe_llava_phi": {"intermediate_size": 192, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5},
    "moe_llava_stablelm": {"intermediate_size": 128, "norm_eps": 1e-5, "rope_pct": 0.25, "use_qkv_bias": True},
    "moe_llava_qwen": {"intermediate_size": 256, "layer_norm_epsilon": 1e-6, "seq_length": 512, "no_bias": True},
    "moe_llava_qwen1_5": {"intermediate_size": 128, "rms_norm_eps": 1e-6, "use_sliding_window": False},
}
FAMILIES = tuple(_FAMILIES)


def moe(**changes: object) -> dict:
    """The published recipe's table, on the layers that a model of three has."""
    return {
        "moe_enable": True,
        "moe_mode": "sparse",
        "moe_layers_idx": [0, 2],
        "num_experts": [4, 4],
        "top_k_experts": 2,
        "capacity_factor": 1.5,
        "eval_capacity_factor": 2.0,
        "min_capacity": 0,
        "use_residual": False,
        **changes,
    }


def tower_description(kind: str) -> tuple[dict, dict]:
    """config.json and preprocessor_config.json of a vision tower."""
    config = {
        "model_type": {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}[kind],
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    square = {"height": SIDE, "width": SIDE}
    pictures = {"clip": {"size": SIDE, "crop_size": SIDE, "do_center_crop": True}, "siglip": {"size": square}}
    return config, {"do_resize": True, "do_normalize": True, "resample": 3, **pictures[kind]}


def save_original(
    folder: Path, family: str = "moe_llava_phi", tower: str = "clip", *, tiktoken: str | None = None, **changes: object
) -> Path:
    """Writes a checkpoint to `folder`, its tower inside it; `changes`: entries of config.json.

    `tiktoken`: the name of a vocabulary file to write instead of tokenizer.json.
    """
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    tokens = save_tokenizer(folder, tiktoken)
    rows = -(-tokens // 64) * 64  # more than are used, as published models have
    flat = {"model_type": family, "vocab_size": rows, "mm_image_tower": f"openai/{TOWER}", "moe": moe()}
    flat |= {**_SHARED, **_FAMILIES[family], **changes}
    write(folder / "config.json", flat)
    seen, pictures = tower_description(tower)
    (folder / TOWER).mkdir(exist_ok=True)
    write(folder / TOWER / "config.json", seen)
    write(folder / TOWER / "preprocessor_config.json", pictures)
    config = AutoConfig.from_pretrained(folder)
    config.vision_config = AutoConfig.from_pretrained(folder / TOWER)
    model = AutoModelForImageTextToText.from_config(config)
    assert isinstance(model, MoeLlavaForConditionalGeneration)
    state, towers = {}, {}
    naming, counts = Naming(config.text_config.model_type), mixture(config.text_config).experts
    for name, value in model.state_dict().items():
        if name.startswith(VISION_TOWER):
            towers[f"vision_model.{name.removeprefix(VISION_TOWER)}"] = value
            continue
        layer = name.partition(".layers.")[2].partition(".")[0]
        sources = naming.sources(name, counts.get(int(layer), 0) if layer else 0)
        for keys, part in zip(sources, value if ".mlp.experts." in name else [value], strict=True):
            state |= {key: half.clone() for key, half in zip(keys, part.chunk(len(keys)), strict=True)}
    torch.save(state, folder / "pytorch_model.bin")
    torch.save(towers, folder / TOWER / "pytorch_model.bin")
    return folder


def change_state(folder: Path, change) -> None:
    """Rewrites the pickled weights after `change(state)`."""
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(state)
    torch.save(state, folder / "pytorch_model.bin")


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def save_tokenizer(folder: Path, tiktoken: str | None) -> int:
    """Writes a tokenizer of bytes and returns how many tokens it has."""
    if tiktoken is not None:
        ranks = [bytes([byte]) for byte in range(256)] + [b"in", b"ing", b" what"[:3], b"th", b"the"]
        lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks)]
        (folder / tiktoken).write_text("\n".join(lines) + "\n", encoding="ascii")
        return len(ranks) + {"qwen.tiktoken": 208, "arcade100k.tiktoken": 33}[tiktoken]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    words.save_pretrained(folder)
    return len(words)
