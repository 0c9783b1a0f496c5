"""Interventions: what a model does when a router may not choose some of its experts.

Hooks in a context manager, on routers matched by type. It knows nothing of traces, text or pages.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mllm_demo.errors import RoutingError
from mllm_demo.moe_lora import MoeLoraRouter, RouterOutput


@contextmanager
def masked_experts(model: nn.Module, masks: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Inside the `with`, the MoE-LoRA router named by each key never chooses the experts in its value.

    The probabilities of the others are those of a softmax over them alone. Raises `RoutingError` for a site that the
    model does not have, an expert that its router does not have, or a mask that leaves fewer experts than it chooses.
    """
    routers = {m.site_name: m for m in model.modules() if isinstance(m, MoeLoraRouter)}
    handles = []
    try:
        for site, experts in masks.items():
            if site not in routers:
                raise RoutingError(f"There is no router called {site!r}; this model has {len(routers)}.")
            handles.append(routers[site].register_forward_hook(_masker(routers[site], site, experts)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _masker(router: MoeLoraRouter, site: str, experts: Sequence[int]):
    if not set(experts) <= set(range(router.num_experts)):
        raise RoutingError(f"Router {site!r} has experts 0 to {router.num_experts - 1}, not {list(experts)}.")
    if router.num_experts - len(set(experts)) < router.num_experts_per_tok:
        raise RoutingError(f"Router {site!r} chooses {router.num_experts_per_tok}; the mask leaves it too few.")
    banned = torch.zeros(router.num_experts, dtype=torch.bool, device=router.weight.device)
    banned[list(experts)] = True

    def mask(module: MoeLoraRouter, args: tuple, output: RouterOutput) -> RouterOutput:
        return module.decide(output.router_logits.masked_fill(banned, float("-inf")))

    return mask
