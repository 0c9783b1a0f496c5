"""MoE-LoRA equals a naive mixture, one token and one expert at a time, for every combination of its choices.

The reference shares no code with the method: it wraps the linear layers of a plain Llama, reads the adapter's
saved tensors, and knows which module of a Llama runs first. Tolerance 1e-5 in float32: sums in another order;
gradients, which pass through both layers and add up over all tokens, 1e-4.
"""

import itertools
from functools import partial

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from mllm_demo.moe_lora import MoeLoraConfig

TARGETS = ["o_proj", "gate_proj", "up_proj", "down_proj"]
PLAIN = ["q_proj", "k_proj", "v_proj"]
NUM_EXPERTS, R, PLAIN_R, ALPHA = 3, 2, 3, 5.0
BATCH, TOKENS, VOCAB = 2, 5, 32
COMBINATIONS = list(
    itertools.product(
        ("hidden", "prompt_mean"),
        ("module", "block", "layer", "model"),
        ("token", "sequence", "modality"),
        (1, 2),
        ("none", "constant", "complement"),
        (False, True),
    )
)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        initializer_range=0.3,  # a residual stream near 1, so that its norm does not amplify rounding
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def moe_llama(plain=None, **choices):
    config = MoeLoraConfig(
        r=R,
        lora_alpha=ALPHA,
        plain_r=PLAIN_R,
        num_experts=NUM_EXPERTS,
        target_modules=TARGETS,
        plain_target_modules=plain,
        router_temperature=0.7,
        **choices,
    )
    model = get_peft_model(llama(), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # big enough that another choice of experts cannot hide below the tolerance
                parameter.normal_(std=1.0 if "router" in name else 0.2)
    return model


def batch():
    generator = torch.Generator().manual_seed(2)
    return {
        "input_ids": torch.randint(VOCAB, (BATCH, TOKENS), generator=generator),
        "attention_mask": torch.tensor([[1] * TOKENS, [0] + [1] * (TOKENS - 1)]),
        "modality_ids": torch.randint(2, (BATCH, TOKENS), generator=generator),
        "prompt_mask": torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0]]),
    }


class NaiveMixture:
    """Runs a plain Llama whose linear layers add the adapter's experts in Python loops."""

    base = llama()

    def __init__(self, config, tensors):
        self.config, self.model = config, self.base
        self.tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
        for name, module in self.model.named_modules():
            if f"{name}.lora_A" in self.tensors:
                module.forward = self.wrap(name, partial(torch.nn.Linear.forward, module))

    def __call__(self, input_ids, attention_mask, modality_ids, prompt_mask):
        self.modality_ids, self.prompt_mask = modality_ids, prompt_mask
        embeds = self.model.model.embed_tokens(input_ids)
        self.prompt_mean = [self.mean_of_prompt(embeds, row) for row in range(BATCH)]
        self.decisions = {}
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    def mean_of_prompt(self, x, row):
        return torch.stack([x[row, t] for t in range(TOKENS) if self.prompt_mask[row, t]]).mean(0)

    def wrap(self, name, base_forward):
        def forward(x):
            delta = torch.stack(
                [torch.stack([self.delta(name, x, row, t) for t in range(TOKENS)]) for row in range(BATCH)]
            )
            return base_forward(x) + delta

        return forward

    def delta(self, name, x, row, t):
        lora_A, lora_B = self.tensors[f"{name}.lora_A"], self.tensors[f"{name}.lora_B"]
        if name.rpartition(".")[2] in PLAIN:
            return ALPHA / PLAIN_R * (lora_B @ (lora_A @ x[row, t]))
        weights, shared = self.weights_of(name, x)[row][t]
        experts = [
            lora_B[:, e * R : (e + 1) * R] @ (lora_A[e * R : (e + 1) * R] @ x[row, t])
            for e in range(NUM_EXPERTS)
        ]
        mixture = sum(weight * experts[e] for e, weight in weights.items())
        if shared is not None:
            first = NUM_EXPERTS * R
            mixture = mixture + shared * (lora_B[:, first:] @ (lora_A[first:] @ x[row, t]))
        return ALPHA / R * mixture

    def weights_of(self, name, x):
        parts = name.split(".")  # model.layers.0.mlp.gate_proj
        depth = {"module": 5, "block": 4, "layer": 3, "model": 2}[self.config.router_scope]
        site = ".".join(parts[:depth])
        if site not in self.decisions:
            self.decisions[site] = [
                [self.decide(site, x, row, t) for t in range(TOKENS)] for row in range(BATCH)
            ]
        return self.decisions[site]

    def decide(self, site, x, row, t):
        (weight,) = [
            v
            for k, v in self.tensors.items()
            if k.startswith(site + ".") and k.endswith("lora_router.weight")
        ]
        if self.config.granularity == "modality":
            logits = weight[self.modality_ids[row, t]]
        else:
            if self.config.router_input == "prompt_mean":
                z = self.prompt_mean[row]
            elif self.config.granularity == "sequence":
                z = self.mean_of_prompt(x, row)
            else:
                z = x[row, t]
            logits = weight @ (z / torch.sqrt(sum(v**2 for v in z) / len(z)))
        probs = torch.softmax(logits / self.config.router_temperature, dim=-1)
        chosen = sorted(range(NUM_EXPERTS), key=lambda e: -probs[e])[: self.config.num_experts_per_tok]
        total = sum(probs[e] for e in chosen) if self.config.norm_topk_prob else 1.0
        weights = {e: probs[e] / total for e in chosen}
        if not self.config.use_shared_expert:
            return weights, None
        if self.config.shared_expert_weighting == "constant":
            return weights, 1.0
        top = max(weights.values())
        return {e: weight * top for e, weight in weights.items()}, 1.0 - top


def choices_of(router_input, router_scope, granularity, k, shared, norm):
    return {
        "router_input": router_input,
        "router_scope": router_scope,
        "granularity": granularity,
        "num_experts_per_tok": k,
        "use_shared_expert": shared != "none",
        "shared_expert_weighting": "constant" if shared == "none" else shared,
        "norm_topk_prob": norm,
    }


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: "-".join(map(str, c)))
@torch.no_grad()
def test_equals_naive_mixture(combination):
    model = moe_llama(**choices_of(*combination))
    inputs = batch()
    naive = NaiveMixture(model.peft_config["default"], get_peft_model_state_dict(model))
    expected = naive(**inputs)

    context = {name: inputs.pop(name) for name in ("modality_ids", "prompt_mask")}
    with model.base_model.routing_context(**context):
        logits = model(**inputs).logits

    real = inputs["attention_mask"].bool()  # the logits of padding mean nothing
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert (model(**inputs).logits - logits)[real].abs().max() > 1e-2


@pytest.mark.parametrize("scope", ("module", "block", "layer", "model"))
@pytest.mark.parametrize("shared", ("constant", "complement"))
def test_gradients_equal_naive_mixture(scope, shared):
    model = moe_llama(PLAIN, **choices_of("hidden", scope, "token", 2, shared, False))
    inputs = batch()
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    tensors = {
        name.replace(".default", ""): parameter.detach().clone().requires_grad_()
        for name, parameter in trained.items()
    }
    real = inputs["attention_mask"].bool()
    naive = NaiveMixture(model.peft_config["default"], tensors)
    naive(**inputs)[real].square().sum().backward()
    model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[
        real
    ].square().sum().backward()

    for name, parameter in trained.items():
        expected = tensors[name.replace(".default", "")].grad
        assert expected.abs().max() > 1e-3, name
        torch.testing.assert_close(
            parameter.grad, expected, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
