"""An Awaker2.5-VL checkpoint as its authors publish it, small and random: one state dict under the original's names.

The base is a Qwen2-VL of two layers; its tokenizer and processor stand beside the weights unless left out.
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from tests.unit.models.test_families import qwen2

PLAIN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("self_attn.o_proj", "mlp.gate_proj")
EXPERTS = (*GATED, "mlp.up_proj", "mlp.down_proj")


def state_dict(experts: int = 4, shared: bool = True, r: int = 4, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """All tensors, in the original's names and order."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(qwen2().config)
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        tensors[f"base_model.model.{name}"] = tensor.to(dtype)
    names = [*map(str, range(experts)), *(["g"] if shared else [])]
    for layer in range(qwen2().config.text_config.num_hidden_layers):
        for module in (*PLAIN, *EXPERTS):
            path = f"base_model.model.model.layers.{layer}.{module}"
            out_features, in_features = tensors[f"{path}.weight"].shape
            kind, adapters, kept = (
                ("lora", ["default"], torch.float32) if module in PLAIN else ("lora_moe", names, dtype)
            )
            for name in adapters:
                tensors[f"{path}.{kind}_A.{name}.weight"] = torch.randn(r, in_features).to(kept) * 0.2
                tensors[f"{path}.{kind}_B.{name}.weight"] = torch.randn(out_features, r).to(kept) * 0.2
            if module in GATED:
                hidden = tensors["base_model.model.model.embed_tokens.weight"].shape[1]
                tensors[f"{path}.w_gate.weight"] = torch.randn(experts, hidden).to(dtype) * 0.2
                tensors[f"{path}.w_gate.bias"] = torch.randn(experts).to(dtype)
                tensors[f"{path}.ln.weight"] = torch.rand(hidden).to(dtype) + 0.5
    return tensors


def describe(folder: Path) -> Path:
    """Writes configuration, tokenizer and processor of the base model, as its folder on the hub has them."""
    folder.mkdir(parents=True, exist_ok=True)
    qwen2().save(folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    return folder


def save(folder: Path, **options) -> Path:
    """The whole folder: what describes the base model, and `pytorch_model.bin`."""
    torch.save(state_dict(**options), describe(folder) / "pytorch_model.bin")
    return folder
