"""What routed experts cost: a bare model, plain LoRA, MoE-LoRA, and the two ways it could be slower.

    python -m benchmarks.moe_lora_overhead --layers 4 --repeats 3

All share one base. "expert by expert" has the very experts and routers of MoE-LoRA (checked before timing: the
same logits) but runs each expert on the tokens that chose it, in a Python loop, as published code does; "a router
for each module" differs from MoE-LoRA in that choice alone. It knows nothing of pictures or chats.
"""

import sys
import warnings
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.timing import measure, options, random_llama, random_prompt, read_and_write, setup, table, twin
from mllm_demo.cli import run
from mllm_demo.moe_lora import MoeLoraConfig, MoeLoraLayer, MoeLoraRouter, RouterOutput

# PEFT asks transformers for an attribute under its old name.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

ROUTED = ["o_proj", "gate_proj", "up_proj", "down_proj"]
PLAIN = ["q_proj", "k_proj", "v_proj"]
RANK, EXPERTS = 8, 4
ADAPTER = "default"
# Float32 sums of the same products in another order, through all layers.
TOLERANCE = 1e-3


def moe_lora(model: nn.Module, scope: str) -> nn.Module:
    """Experts that do something, as after training."""
    torch.manual_seed(2)
    config = MoeLoraConfig(
        r=RANK,
        num_experts=EXPERTS,
        use_shared_expert=True,
        target_modules=ROUTED,
        plain_target_modules=PLAIN,
        router_scope=scope,
        init_lora_weights=False,
    )
    return get_peft_model(model, config).eval()


def plain_lora(model: nn.Module, rank: int) -> nn.Module:
    """PEFT's LoRA on the same modules: `rank` where experts would be, RANK on the others."""
    config = LoraConfig(r=RANK, rank_pattern=dict.fromkeys(ROUTED, rank), target_modules=[*ROUTED, *PLAIN])
    return get_peft_model(model, config).eval()


class _SharedDecision:
    """One router's decision, made by the module that runs first and used by the others of its block."""

    def __init__(self, router: MoeLoraRouter) -> None:
        self._router = router
        self._leader: nn.Module | None = None
        self._decision: RouterOutput | None = None

    def decide(self, x: torch.Tensor, module: nn.Module) -> RouterOutput:
        if self._leader in (None, module):
            self._leader, self._decision = module, self._router(x)
        return self._decision


class ExpertByExpert(nn.Module):
    """The experts of `layer`, one after the other, each on the tokens that chose it."""

    def __init__(self, layer: MoeLoraLayer, shared: _SharedDecision) -> None:
        super().__init__()
        self.base_layer = layer.base_layer
        self.scaling = layer.scaling[ADAPTER]
        self.lora_A = [block.contiguous() for block in layer.lora_A[ADAPTER].detach().split(RANK, dim=0)]
        self.lora_B = [block.contiguous() for block in layer.lora_B[ADAPTER].detach().split(RANK, dim=1)]
        self._shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x`: [.., in_features]; returns [.., out_features]."""
        decision = self._shared.decide(x, self)
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        selected = decision.selected_experts.reshape(flat.shape[0], -1)  # (tokens, k)
        weights = decision.routing_weights.reshape(flat.shape[0], -1)
        *experts, always = range(len(self.lora_A))
        delta = (flat @ self.lora_A[always].T) @ self.lora_B[always].T
        for expert in experts:
            rows, place = torch.where(selected == expert)
            if rows.numel():
                output = (flat[rows] @ self.lora_A[expert].T) @ self.lora_B[expert].T
                delta.index_add_(0, rows, output * weights[rows, place, None])
        return self.base_layer(x) + self.scaling * delta.reshape(*x.shape[:-1], -1)


def expert_by_expert(model: nn.Module) -> nn.Module:
    """`model` with MoE-LoRA on it, its routed layers replaced by loops; changes and returns it."""
    shared: dict[int, _SharedDecision] = {}
    routed = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, MoeLoraLayer) and ADAPTER in module.router_sites
    ]
    for name, layer in routed:
        router = layer.router_sites[ADAPTER].router
        decision = shared.setdefault(id(router), _SharedDecision(router))
        model.set_submodule(name, ExpertByExpert(layer, decision))
    return model


@torch.inference_mode()
def check_equal(one: nn.Module, other: nn.Module, prompt: torch.Tensor) -> None:
    """Raises `AssertionError` when two models that must answer alike do not."""
    expected, found = (model(input_ids=prompt).logits for model in (one, other))
    torch.testing.assert_close(found, expected, atol=TOLERANCE * expected.abs().max().item(), rtol=0)


def main(argv: Sequence[str] | None = None) -> None:
    chosen = options("moe_lora_overhead", "What routed experts cost in prefill and decoding.", argv)
    base, prompt = random_llama(chosen), random_prompt(chosen)
    models = {
        "base": base,
        f"plain LoRA, r={RANK}": plain_lora(twin(base), RANK),
        f"plain LoRA, r={RANK * (EXPERTS + 1)} (as large)": plain_lora(twin(base), RANK * (EXPERTS + 1)),
        "MoE-LoRA": (ours := moe_lora(twin(base), "block")),
        "MoE-LoRA, a router for each module": moe_lora(twin(base), "module"),
        "MoE-LoRA, expert by expert": (looped := expert_by_expert(moe_lora(twin(base), "block"))),
    }
    check_equal(ours, looped, prompt)
    cases = {
        name: lambda model=model: read_and_write(model, prompt, chosen.new_tokens) for name, model in models.items()
    }
    seconds = measure(cases, chosen.repeats)
    what = (
        f"MoE-LoRA of {EXPERTS} experts and a shared one, r={RANK}, top-1, on {', '.join(ROUTED)}, a router for each "
        f"block, plain LoRA on {', '.join(PLAIN)}; against the bare model, PEFT's LoRA, and slower ways of routing. "
        "float32."
    )
    print(setup(chosen, what))
    print(table(seconds, {"prefill": 1, "decode/token": chosen.new_tokens}))


if __name__ == "__main__":
    sys.exit(run(main))
