"""Every router of a model, and readers of those of transformers whose output is not (logits, weights, indices).

Each reader says what its family does otherwise; all other declared routers are read by `native`. It knows nothing of
traces or text.
"""

from collections.abc import Mapping

import torch
from torch import nn
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeMoeBlock
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router

from mllm_demo.routing.mixtures import READERS as MIXTURE_READERS
from mllm_demo.routing.native import (
    declared,
    declared_listeners,
    has_shared_expert,
    is_beside_the_sequence,
    native_site,
)
from mllm_demo.routing.readers import Listener, RouterReader, Routing, has_reader, listeners, register
from mllm_demo.routing.trace import Site


def _gemma4_site(path: str, router: Gemma4TextRouter, root: nn.Module) -> Site | None:
    """The layer's dense MLP runs beside the experts for every token, which makes it a shared expert."""
    if is_beside_the_sequence(path, root):
        return None
    return native_site(path, root, router.config.num_experts, router.config.top_k_experts, shared=True)


def _gemma4(router: Gemma4TextRouter, args: tuple, kwargs: Mapping, output: tuple) -> Routing:
    """Returns probabilities where others return logits; a learned scale per expert makes weights exceed them."""
    probs, weights, selected = output
    return Routing(probs.float(), selected, weights.float())


def _llama4_site(path: str, router: Llama4Router, root: nn.Module) -> Site | None:
    return None if is_beside_the_sequence(path, root) else native_site(path, root, router.num_experts, router.top_k)


def _llama4(router: Llama4Router, args: tuple, kwargs: Mapping, output: tuple) -> Routing:
    """Sigmoid gates [tokens, E], 0 where not chosen. They multiply what goes into an expert, not what comes out."""
    gates, logits = output
    weights, selected = gates.float().topk(router.top_k, dim=-1)
    return Routing(logits.float().sigmoid(), selected, weights)


def _ernie_site(path: str, block: Ernie4_5_VLMoeMoeBlock, root: nn.Module) -> Site | None:
    """One site for both routers of a layer: E experts of text are 0 to E - 1, E of pictures E to 2 E - 1."""
    if is_beside_the_sequence(path, root):
        return None
    return native_site(path, root, 2 * block.num_experts, block.text_moe.top_k, shared=has_shared_expert(block))


def _ernie(block: Ernie4_5_VLMoeMoeBlock, args: tuple, kwargs: Mapping, output: tuple) -> Routing:
    """A position is routed among the experts of its own modality only; the other half has probability 0.

    The block returns each position's logits from its own router. Selection is by probability plus that router's
    correction bias, weights are the probabilities of the selected, renormalised; the class does the same.
    """
    hidden_states, kinds = (
        (*args, kwargs.get("moe_mm_token_type_ids"))[:2]
        if args
        else (
            kwargs["hidden_states"],
            kwargs.get("moe_mm_token_type_ids"),
        )
    )
    probs = output[1].float().softmax(dim=-1)  # (T, E)
    if kinds is None:
        picture = torch.zeros(probs.shape[0], 1, dtype=torch.bool, device=probs.device)
    else:
        picture = kinds.reshape(-1, 1).bool()
    bias = [moe.gate.moe_statics.e_score_correction_bias.reshape(-1) for moe in (block.text_moe, block.vision_moe)]
    gate = block.text_moe.gate
    selected = (probs + torch.where(picture, bias[1], bias[0])).topk(gate.top_k, dim=-1).indices
    weights = probs.gather(-1, selected)
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(gate.norm_min)
    weights, order = weights.to(hidden_states.dtype).float().sort(dim=-1, descending=True, stable=True)
    both = torch.cat([probs.masked_fill(picture, 0.0), probs.masked_fill(~picture, 0.0)], dim=-1)  # (T, 2 E)
    return Routing(both, selected.gather(-1, order) + picture * block.num_experts, weights)


for _reader in (
    RouterReader(Gemma4TextRouter, _gemma4_site, _gemma4),
    RouterReader(Llama4Router, _llama4_site, _llama4),
    RouterReader(Ernie4_5_VLMoeMoeBlock, _ernie_site, _ernie),
    *MIXTURE_READERS,
):
    register(_reader)


def router_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of every module that decides, known or only declared, in whatever part of `root`."""
    own = [(path, module) for path, module in root.named_modules() if has_reader(module)]
    return own + [(path, module) for path, module, _ in declared(root)]


def all_listeners(root: nn.Module) -> list[Listener]:
    """The routers of `root` that have a registered reader, and all others that its classes declare."""
    return [*listeners(root), *declared_listeners(root)]
