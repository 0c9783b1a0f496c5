"""A checkpoint is quantized while it loads: the process never holds nearly as much as the file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, Qwen3VLMoeConfig

ROOT = Path(__file__).resolve().parents[3]
LAYERS = 20
LOADING = """
import json, resource, sys
import torch
from transformers import AutoModelForImageTextToText
from mllm_demo.models import memory, quantize
from mllm_demo.models.reading import unmapped

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

config = quantize.bnb_config("nf4", torch.bfloat16)
before = peak()
with unmapped():
    model = AutoModelForImageTextToText.from_pretrained(
        sys.argv[1], dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=config
    )
held = memory.measure(model)
print(json.dumps([peak() - before, held.memory_bytes, held.four_bit_share]))
"""


@pytest.fixture
def gigabyte(tmp_path) -> Path:
    """A random mixture of experts of more than 1 GB in bfloat16, one file a layer; gone after the test."""
    config = Qwen3VLMoeConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 512,
            "intermediate_size": 512,
            "moe_intermediate_size": 512,
            "num_experts": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 512,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path)
    layers = {id(p): i for i, layer in enumerate(model.model.language_model.layers) for p in layer.parameters()}
    files, places = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        files.setdefault(f"model-{layers.get(id(tensor), LAYERS):02}.safetensors", {})[name] = tensor
    for file, tensors in files.items():
        random = {name: torch.empty(t.shape, dtype=torch.bfloat16).normal_(std=0.02) for name, t in tensors.items()}
        save_file(random, tmp_path / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(random, file))
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return tmp_path


def test_loading_takes_less_than_half_of_the_checkpoint(gigabyte):
    size = sum(file.stat().st_size for file in gigabyte.glob("*.safetensors"))
    assert size >= 10**9
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADING, str(gigabyte)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    peak, held, share = json.loads(done.stdout.splitlines()[-1])
    for file in gigabyte.glob("*.safetensors"):
        file.unlink()
    assert share > 0.99 and held < 0.27 * size
    assert peak < 0.45 * size
