"""What experts in 4 bit cost: one block of fused experts in NF4 beside transformers' own experts in bfloat16.

    python -m benchmarks.experts_four_bit --repeats 5 --threads 1

Experts and routing are random, of the shape of Qwen3-VL-30B-A3B, and other experts are chosen every time; a block
of them is larger than a CPU's cache. It knows nothing of attention, pictures or chats.
"""

import copy
import sys
from collections.abc import Sequence

import torch
from torch import nn
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

from benchmarks.timing import Options, measure, now, options, table
from mllm_demo.cli import run
from mllm_demo.models.experts import ExpertWeights4bit
from mllm_demo.models.experts_quantizer import compute_in_four_bit, fused_weights

SHAPE = {"num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048, "moe_intermediate_size": 768}
PROMPT_TOKENS = 512


def random_experts(device: torch.device) -> nn.Module:
    """One block of experts in bfloat16, computed as transformers does by default."""
    config = Qwen3VLMoeTextConfig(**SHAPE)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = Qwen3VLMoeTextExperts(config)
    experts = experts.to(torch.bfloat16).to_empty(device=device)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    return experts.eval()


def in_four_bit(experts: nn.Module) -> nn.Module:
    """The same in NF4, quantized as a checkpoint is while it loads."""
    shared = {id(parameter): parameter for parameter in experts.parameters()}
    quantized = copy.deepcopy(experts, shared)
    for name, fused in fused_weights(quantized, []):
        fused.replace(ExpertWeights4bit.quantize(getattr(experts, name).data, is_transposed=fused.is_transposed))
    compute_in_four_bit(quantized)
    return quantized


class Routed:
    """One case: a prompt, then single tokens; every call with other tokens and other experts, the same in all cases."""

    def __init__(self, experts: nn.Module, chosen: Options) -> None:
        self._experts, self._chosen = experts, chosen
        self._generator = torch.Generator().manual_seed(0)

    def _seconds(self, tokens: int) -> float:
        scores = torch.randn(tokens, SHAPE["num_experts"], generator=self._generator)
        hidden = torch.randn(tokens, SHAPE["hidden_size"], generator=self._generator)
        weights, selected = scores.softmax(-1).topk(SHAPE["num_experts_per_tok"])
        device = self._chosen.device
        given = hidden.bfloat16().to(device), selected.to(device), weights.bfloat16().to(device)
        started = now(device)
        self._experts(*given)
        return now(device) - started

    @torch.inference_mode()
    def __call__(self) -> tuple[float, float]:
        read = self._seconds(self._chosen.prompt_tokens)
        return read, sum(self._seconds(1) for _ in range(self._chosen.new_tokens))


def main(argv: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if argv is None else argv)
    if not any(word.split("=")[0] == "--prompt-tokens" for word in given):
        given += ["--prompt-tokens", str(PROMPT_TOKENS)]
    chosen = options("experts_four_bit", "Speed and memory of a block of experts in NF4 against bfloat16.", given)
    experts = random_experts(chosen.device)
    quantized = in_four_bit(experts)
    cases = {"bfloat16, transformers": Routed(experts, chosen), "NF4": Routed(quantized, chosen)}
    seconds = measure(cases, chosen.repeats)
    held = [sum(parameter.nbytes for parameter in experts.parameters())]
    held.append(sum(buffer.nbytes for buffer in quantized.buffers()))
    print(
        "One block of random fused experts, {num_experts} of which {num_experts_per_tok} a token, {hidden_size} wide, "
        "{moe_intermediate_size} inside; ".format(**SHAPE)
        + f"{chosen.prompt_tokens} prompt tokens, {chosen.new_tokens} single ones; {chosen.device.type}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; median of {chosen.repeats} interleaved rounds."
    )
    more = {"memory MB": [f"{each / 1e6:.0f}" for each in held]}
    print(table(seconds, {f"{chosen.prompt_tokens} tokens": 1, "one token": chosen.new_tokens}, more))


if __name__ == "__main__":
    sys.exit(run(main))
