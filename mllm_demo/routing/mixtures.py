"""How the routing of PEFT's own mixtures of LoRA adapters is read: Arrow and X-LoRA.

Arrow (arXiv 2405.11157) chooses among adapters in every module by |x · prototype|, and returns only the sum, so its
choice is computed here once more, by the same operations. X-LoRA (arXiv 2402.07148) first runs the model without
adapters, then hands each module the scalings that its classifier made of that; the first of the two passes decides
nothing and is not read. Routers outside the text decoder see no positions of the sequence and are not recorded.
It knows nothing of files or of how adapters are put on a model.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import nn

from mllm_demo.routing.native import native_site
from mllm_demo.routing.readers import RouterReader, Routing
from mllm_demo.routing.trace import Site

# The one decision of an X-LoRA classifier that serves all modules alike.
SHARED_SCALINGS = "internal_xlora_classifier"


def _arrow_site(path: str, router: ArrowLoraLinearLayer, root: nn.Module) -> Site | None:
    module_path, _, adapter_name = path.rsplit(".", 2)  # <module>.lora_arrow.<adapter>
    layer = root.get_submodule(module_path)
    if layer.disable_adapters or adapter_name not in layer.active_adapters:
        return None
    return _site(module_path, root, len(router.task_adapter_names), router.top_k)


def _arrow(router: ArrowLoraLinearLayer, args: tuple, kwargs: Mapping, output: object) -> Routing:
    """PEFT: softmax over the `top_k` largest similarities; the probabilities before that choice are over all."""
    x = args[0] if args else kwargs["x"]
    tokens = x.reshape(-1, x.shape[-1]).to(router.prototypes.dtype)  # (T, in)
    similarity = torch.abs(tokens @ router.prototypes.T)  # (T, E)
    top, selected = torch.topk(similarity, router.top_k, dim=1)
    kept = torch.full_like(similarity, float("-inf")).scatter_(1, selected, top)
    coefficients = torch.softmax(kept / router.temperature, dim=1)
    probs = torch.softmax(similarity.float() / router.temperature, dim=1)
    return Routing(probs, selected, coefficients.gather(1, selected))


def _xlora_site(path: str, layer: LoraLayer, root: nn.Module) -> Site | None:
    mixture = _xlora_layer(layer)
    if mixture is None or mixture.adapters_disabled:
        return None
    num_experts = len(mixture.config.adapters)
    site = _site(path, root, num_experts, mixture.config.top_k_lora or num_experts)
    if mixture.config.layerwise_scalings or site is None:
        return site
    # All modules are handed the same scalings: that is one decision, heard at the first of them.
    if mixture.layer_number > 0:
        return None
    return replace(site, name=SHARED_SCALINGS, layer_idx=-1, block="model")


def _xlora(layer: LoraLayer, args: tuple, kwargs: Mapping, output: object) -> Routing | None:
    """Scalings [1, T, modules, E] come with the call; None in the pass that only feeds the classifier.

    Without its softmax X-LoRA has no probabilities; the softmax of its scalings stands for them.
    """
    if layer.disable_adapters:
        return None
    mixture = _xlora_layer(layer)
    config = mixture.config
    scalings = kwargs["scalings"]
    used = mixture.get_maybe_topk_scalings(scalings)  # (1, T, E)
    given = scalings[:, :, mixture.layer_number]
    selected = given.topk(config.top_k_lora or given.shape[-1], dim=-1).indices
    probs = given.float()
    if not config.enable_softmax:
        probs = probs.softmax(dim=-1)
    return Routing(probs, selected, used.gather(-1, selected) * config.global_scaling_weight)


def _xlora_layer(layer: LoraLayer) -> XLoraLinearLayer | None:
    """What X-LoRA put in the place of the module's own forward."""
    owner = getattr(layer.forward, "__self__", None)
    return owner if isinstance(owner, XLoraLinearLayer) else None


def _site(path: str, root: nn.Module, num_experts: int, num_experts_per_tok: int) -> Site | None:
    """The router of the module at `path`; None outside the text decoder."""
    decoder = root.get_decoder() if hasattr(root, "get_decoder") else root
    module, inside = root, decoder is root
    for part in path.split("."):
        module = getattr(module, part)
        inside = inside or module is decoder
    if not inside:
        return None
    parent_path = path.rpartition(".")[0]
    parent = f"{parent_path.rpartition('.')[2]} {type(root.get_submodule(parent_path)).__name__}".lower()
    block = "attention" if "attn" in parent or "attention" in parent else "mlp"
    return replace(native_site(path, root, num_experts, num_experts_per_tok, shared=False), block=block)


READERS = (
    RouterReader(ArrowLoraLinearLayer, _arrow_site, _arrow),
    RouterReader(LoraLayer, _xlora_site, _xlora),
)
