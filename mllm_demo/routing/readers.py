"""How the decision of any router is read: which class of module decides, where it stands, what its output means.

A package that brings a router type of its own calls `register` once, when it is imported; the tap asks
`listeners` for every router of a model. It knows nothing of traces that grow, of text or of pages.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, singledispatch
from typing import NamedTuple, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mllm_demo.moe_lora import MoeLoraRouter, RouterOutput
from mllm_demo.routing.trace import Site

# Their routers see patches of pictures, not positions of the sequence, and are called for the prompt only.
_BESIDE_THE_SEQUENCE = ("vision", "connector")


class Decision(Protocol):
    """What `read` returns; `mllm_demo.moe_lora.RouterOutput` is one, `Routing` is the smallest.

    router_probs      [.., E]  scores of all experts in [0, 1]; softmax before top-k, or sigmoid gates
    selected_experts  [.., k]  integers, the highest score first
    routing_weights   [.., k]  what the chosen experts' outputs are multiplied by

    The leading dimensions hold one row per position, or a single row that stands for all of them.
    """

    router_probs: torch.Tensor
    selected_experts: torch.Tensor
    routing_weights: torch.Tensor


class Routing(NamedTuple):
    """A `Decision` with nothing else in it."""

    router_probs: torch.Tensor
    selected_experts: torch.Tensor
    routing_weights: torch.Tensor


@dataclass(frozen=True)
class RouterReader:
    """How the routers of one class are read.

    module_type  matched by `isinstance`, the most derived registered class first, never by name
    site         (module path, module, root model) -> its `Site`, None where it is not to be recorded (a router of
                 a vision tower, an adapter that is switched off). The root is the model inside a PEFT wrapper.
    read         (module, args, kwargs, output) of one forward of the module -> `Decision`, None where this forward
                 decides nothing (a pass that only prepares); called in a forward hook, so it may not wait for the
                 device
    """

    module_type: type[nn.Module]
    site: Callable[[str, nn.Module, nn.Module], Site | None]
    read: Callable[[nn.Module, tuple, Mapping, object], Decision | None]


class Listener(NamedTuple):
    """One router of one model: `read` turns (args, kwargs, output) of a forward of `module` into a `Decision`."""

    site: Site
    module: nn.Module
    read: Callable[[tuple, Mapping, object], Decision | None]


@singledispatch
def _reader(module: nn.Module) -> RouterReader | None:
    """The reader registered for the class of `module` or the nearest of its bases."""
    return None


def has_reader(module: nn.Module) -> bool:
    return _reader(module) is not None


def register(reader: RouterReader) -> None:
    """From now on routers of `reader.module_type` are read by it; a later reader of the same class replaces it."""
    _reader.register(reader.module_type, lambda module: reader)


def listeners(root: nn.Module) -> list[Listener]:
    """Every router of `root` that serves positions of the sequence, in model order."""
    found = []
    for path, module in root.named_modules():
        reader = _reader(module)
        site = reader.site(path, module, root) if reader else None
        if site is not None:
            found.append(Listener(site, module, partial(reader.read, module)))
    return found


def _moe_lora_site(path: str, router: MoeLoraRouter, root: nn.Module) -> Site | None:
    """Only of active adapters; only when several are active at once does the name end in the adapter's."""
    layer = next((module for module in root.modules() if isinstance(module, BaseTunerLayer)), None)
    if layer is None or layer.disable_adapters or router.adapter_name not in layer.active_adapters:
        return None
    if router.block in _BESIDE_THE_SEQUENCE:
        return None
    several = len(layer.active_adapters) > 1
    return Site(
        name=f"{router.site_name}.{router.adapter_name}" if several else router.site_name,
        layer_idx=router.layer_idx,
        block=router.block,
        num_experts=router.num_experts,
        num_experts_per_tok=router.num_experts_per_tok,
        granularity=router.granularity,
        has_shared_expert=router.has_shared_expert,
    )


def _moe_lora_decision(module: nn.Module, args: tuple, kwargs: Mapping, output: RouterOutput) -> RouterOutput:
    return output


register(RouterReader(MoeLoraRouter, _moe_lora_site, _moe_lora_decision))
