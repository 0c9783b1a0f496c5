"""The adapters of the training stages: a single LoRA first, then experts that start as copies of it.

It knows nothing of data or optimizers.
"""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from mllm_demo.moe_lora import MoeLoraConfig
from mllm_demo.moe_lora.layer import MoeLoraLayer

RANK, ALPHA = 8, 16
EXPERT_MODULES = ["o_proj", "gate_proj", "up_proj", "down_proj"]
PLAIN_MODULES = ["q_proj", "k_proj", "v_proj"]
COPY_NOISE = 0.01  # on the A matrices of the copies, so that no two experts stay the same


def _in_decoder(names: list[str]) -> str:
    """A pattern of the decoder's modules called so; the tower's layers have some of the same names."""
    return rf".*language_model.*\.({'|'.join(names)})"


def single_lora(model: nn.Module) -> PeftModel:
    """Stage I: one ordinary LoRA on every linear layer of the decoder."""
    modules = _in_decoder(EXPERT_MODULES + PLAIN_MODULES)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def mixture(model: nn.Module, num_experts: int, lora: dict[str, torch.Tensor]) -> PeftModel:
    """Stages II and III: `num_experts` copies of the LoRA in `lora`, a shared expert and a router per block.

    The shared expert starts as the LoRA times 1 - 1/E, and a router that has not learned anything yet weights the
    chosen copy by about 1/E: the mixture starts where the LoRA ended. With one expert the router weights it by 1, and
    what comes out is a LoRA of the same active rank: the single LoRA that a mixture is compared with.
    """
    config = MoeLoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        num_experts=num_experts,
        num_experts_per_tok=1,
        use_shared_expert=True,
        router_scope="block",
        granularity="token",
        router_noise_std=0.1,
        router_aux_loss_coef=0.02,
        target_modules=_in_decoder(EXPERT_MODULES),
        plain_target_modules=_in_decoder(PLAIN_MODULES),
        task_type="CAUSAL_LM",
    )
    mixed = get_peft_model(model, config)
    layers = {n: m for n, m in mixed.base_model.model.named_modules() if isinstance(m, MoeLoraLayer)}
    with torch.no_grad():
        for name, layer in layers.items():
            r = layer.r["default"]
            layer.lora_A["default"][-r:] = lora[f"{name}.lora_A.weight"]
            layer.lora_B["default"][:, -r:] = lora[f"{name}.lora_B.weight"]
        mixed.base_model.copy_experts_from_shared(noise_std=COPY_NOISE)
        for layer in layers.values():
            if layer.num_experts["default"]:
                r = layer.r["default"]
                layer.lora_B["default"][:, -r:] *= 1 - 1 / num_experts
                if num_experts == 1:
                    nn.init.kaiming_uniform_(layer.lora_A["default"][-r:], a=5**0.5)
    return mixed


def lora_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The trained LoRA matrices of a stage I model, in float32, by the path of their module."""
    named = model.base_model.model.named_parameters()
    return {n.replace(".default", ""): p.detach().float() for n, p in named if "lora_" in n}
