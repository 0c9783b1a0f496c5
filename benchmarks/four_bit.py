"""What 4-bit weights cost and save: prefill, decoding and memory in NF4, float32 and bfloat16 on one device.

    python -m benchmarks.four_bit --layers 4 --repeats 3

NF4 is made and computed as the program does it: double quantization, embeddings left alone, products in the
dtype that suits the device. Memory is counted from the tensors. It knows nothing of adapters or chats.
"""

import sys
from collections.abc import Sequence
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.timing import Options, measure, options, random_llama, random_prompt, read_and_write, setup, table
from mllm_demo.cli import run
from mllm_demo.models.memory import measure as footprint
from mllm_demo.models.quantize import bnb_config, compute_dtype


def held_in(folder: str, quantization: str, dtype: torch.dtype, chosen: Options) -> nn.Module:
    """The model saved in `folder`, computing in `dtype`."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": chosen.device},
        quantization_config=bnb_config(quantization, dtype),
    ).eval()


def main(argv: Sequence[str] | None = None) -> None:
    chosen = options("four_bit", "Speed and memory of NF4 against float32 and bfloat16.", argv)
    prompt = random_prompt(chosen)
    dtype = compute_dtype(chosen.device)
    short = str(dtype).removeprefix("torch.")
    with TemporaryDirectory() as folder:
        random_llama(chosen).to(torch.bfloat16).save_pretrained(folder)
        models = {
            "float32": held_in(folder, "none", torch.float32, chosen),
            "bfloat16": held_in(folder, "none", torch.bfloat16, chosen),
            f"NF4, {short} products": held_in(folder, "nf4", dtype, chosen),
        }
        cases = {
            name: lambda model=model: read_and_write(model, prompt, chosen.new_tokens)
            for name, model in models.items()
        }
        seconds = measure(cases, chosen.repeats)
    held = [footprint(model) for model in models.values()]
    more = {
        "memory MB": [f"{each.memory_bytes / 1e6:.0f}" for each in held],
        "ratio": [f"{each.memory_bytes / held[0].memory_bytes:.2f}" for each in held],
        "in 4 bit": [f"{each.four_bit_share:.0%}" for each in held],
    }
    print(setup(chosen, "The same weights held in float32, bfloat16 and NF4 (bitsandbytes, double quantization)."))
    print(table(seconds, {"prefill": 1, "decode/token": chosen.new_tokens}, more))


if __name__ == "__main__":
    sys.exit(run(main))
