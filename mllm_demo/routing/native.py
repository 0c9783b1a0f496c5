"""Routers that a model brings itself (mixture-of-experts models of transformers), found by what its classes declare.

transformers' model classes name their router class and the place of its logits in its output, in
`_can_record_outputs["router_logits"]`. Whether the logits become probabilities by softmax or by sigmoid is not
declared, so each kind of router is asked once, with numbers of our own, and the answer is believed only if the
weights it returns are such probabilities up to one factor per token. What does not fit is not read, and said to be so
(`unread`). Classes whose output has another form have a reader in `families`. It knows nothing of traces or text.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from mllm_demo.routing.readers import Listener, Routing, has_reader
from mllm_demo.routing.trace import Site

# Attributes of a block's expert that every token passes, as transformers' classes call it.
_SHARED = ("shared_expert", "shared_experts", "shared_mlp")
# How many experts a model has, by the names that configurations of transformers give it.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ASKED_ROWS = 32
_ASKED_STD = 2.0
# Weights may be bfloat16, whose rounding moves a ratio by 2^-8; softmax and sigmoid differ by a factor.
_ALIKE = 0.05


class Contract(NamedTuple):
    """What a router's output is: `logits`: its index in the output; `scores`: "softmax" or "sigmoid"."""

    logits: int
    scores: str
    num_experts: int
    num_experts_per_tok: int


def is_beside_the_sequence(path: str, root: nn.Module) -> bool:
    """Whether the module at `path` belongs to a model of pictures or sounds inside `root`, by the configurations."""
    if not isinstance(root, PreTrainedModel):
        return False
    owner = root
    module = root
    for part in path.split(".") if path else ():
        module = getattr(module, part)
        if isinstance(module, PreTrainedModel):
            owner = module
    return not isinstance(owner.config, (type(root.config), type(root.config.get_text_config())))


def declared(root: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """(path, module, index of the logits in its output) of every module that `root` says returns router logits.

    As transformers does, a model inside the model declares for itself and for what is inside it.
    """
    seen: set[int] = set()

    def visit(path: str, module: nn.Module, recorders: list[OutputRecorder]) -> Iterator[tuple[str, nn.Module, int]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, PreTrainedModel):
            recorders = _recorders(module)
        for recorder in recorders:
            if _matches(recorder, path, module):
                yield path, module, recorder.index
                break
        for name, child in module.named_children():
            yield from visit(f"{path}.{name}" if path else name, child, recorders)

    yield from visit("", root, [])


def _recorders(model: PreTrainedModel) -> list[OutputRecorder]:
    found = model.can_record_outputs.get("router_logits") or []
    found = found if isinstance(found, list) else [found]
    return [
        one
        if isinstance(one, OutputRecorder)
        else OutputRecorder(None, index=1, class_name=one)
        if isinstance(one, str)
        else OutputRecorder(one, index=1)
        for one in found
    ]


def _matches(recorder: OutputRecorder, path: str, module: nn.Module) -> bool:
    """The rule of `transformers.utils.output_capturing`."""
    by_class = recorder.target_class is not None and isinstance(module, recorder.target_class)
    if not by_class and not (recorder.class_name is not None and path.endswith(recorder.class_name)):
        return False
    return recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f".{path}."


def declared_listeners(root: nn.Module) -> Iterator[Listener]:
    """Every declared router of `root` without a reader of its own that serves positions of the sequence and answers
    as described above."""
    known: dict[tuple, Contract | None] = {}
    for path, module, index in declared(root):
        if has_reader(module) or is_beside_the_sequence(path, root):
            continue
        shapes = tuple(tuple(parameter.shape) for parameter in module.parameters())
        kind = (type(module), index, getattr(module, "top_k", None), shapes)
        if kind not in known:
            known[kind] = ask(module, index, root.config.get_text_config().hidden_size)
        contract = known[kind]
        if contract is not None:
            site = native_site(path, root, contract.num_experts, contract.num_experts_per_tok)
            yield Listener(site, module, NativeReader(contract, _scale_of_block(path, root, module)))


def native_site(
    path: str, root: nn.Module, num_experts: int, num_experts_per_tok: int, shared: bool | None = None
) -> Site:
    """`path`: of the router. Its layer is the first numbered part of the path that lies in a list of modules."""
    parent = root.get_submodule(path.rpartition(".")[0])
    return Site(
        name=path,
        layer_idx=_layer_idx(path, root),
        block="mlp",
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        has_shared_expert=has_shared_expert(parent) if shared is None else shared,
    )


def has_shared_expert(block: nn.Module) -> bool:
    return any(getattr(block, name, None) is not None for name in _SHARED)


def _layer_idx(path: str, root: nn.Module) -> int:
    module = root
    for part in path.split("."):
        if isinstance(module, nn.ModuleList) and part.isdigit():
            return int(part)
        module = getattr(module, part)
    return -1


def _scale_of_block(path: str, root: nn.Module, router: nn.Module) -> float:
    """The factor by which a block multiplies the sum of its experts, where the router has not done it."""
    if hasattr(router, "routed_scaling_factor"):
        return 1.0
    block = root.get_submodule(path.rpartition(".")[0])
    return float(getattr(block, "routed_scaling_factor", 1.0))


class NativeReader:
    """Reads (logits, weights, indices, ...) of one router; the three are told apart by `parts`.

    router_probs are the softmax or sigmoid of all logits (so sigmoid gates do not sum to one), before any bias that
    only serves the selection; routing_weights are what the model multiplied by, renormalised and scaled as it does,
    times `scale`; experts are put in descending order of weight, since some routers leave them in no order.
    """

    def __init__(self, contract: Contract, scale: float = 1.0) -> None:
        self.contract = contract
        self.scale = scale

    def __call__(self, args: tuple, kwargs: Mapping, output: object) -> Routing:
        logits, weights, selected = parts(output, self.contract.logits)
        weights, order = (weights.float() * self.scale).sort(dim=-1, descending=True, stable=True)
        return Routing(_SCORES[self.contract.scores](logits.float()), selected.gather(-1, order), weights)


_SCORES = {"softmax": lambda logits: logits.softmax(dim=-1), "sigmoid": torch.sigmoid}


def parts(output: object, logits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(logits [.., E], weights [.., k], indices [.., k]) of a router's output, or None where they are not there.

    The indices are the only whole numbers; the weights the first other tensor of their shape.
    """
    if not isinstance(output, tuple) or len(output) <= logits:
        return None
    tensors = [value for value in output if isinstance(value, torch.Tensor)]
    whole = [value for value in tensors if not value.is_floating_point()]
    scores = output[logits]
    if len(whole) != 1 or not isinstance(scores, torch.Tensor) or not scores.is_floating_point():
        return None
    weights = [v for v in tensors if v.is_floating_point() and v is not scores and v.shape == whole[0].shape]
    if not weights or scores.shape[:-1] != whole[0].shape[:-1] or scores.shape[-1] < whole[0].shape[-1]:
        return None
    return scores, weights[0], whole[0]


@torch.no_grad()
def ask(module: nn.Module, index: int, hidden_size: int) -> Contract | None:
    """What the output of the router `module` is, from its answer to rows of noise; None: not what is described.

    Its `forward` is called, so no hook hears it. The noise is stretched until the logits differ enough to tell
    softmax from sigmoid. A router that gives all its weight to one expert however sure it is leaves that open;
    softmax is then assumed.
    """
    parameter = next(module.parameters(), None)
    if parameter is None or not parameter.is_floating_point() or parameter.is_meta:
        return None
    noise = torch.randn(_ASKED_ROWS, hidden_size, generator=torch.Generator().manual_seed(0)).to(parameter)
    try:
        found = parts(module.forward(noise), index)
        spread = found[0].float().std(dim=-1).mean() if found else 0.0
        if found and 0.0 < spread < float("inf"):
            found = parts(module.forward(noise * (_ASKED_STD / spread).to(noise)), index)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return None
    if found is None:
        return None
    logits, weights, selected = found
    unlike = {
        name: _unlike(weights.float(), score(logits.float()).gather(-1, selected)) for name, score in _SCORES.items()
    }
    best = min(unlike, key=unlike.get)
    if not unlike[best] < _ALIKE:
        return None
    return Contract(index, best, logits.shape[-1], selected.shape[-1])


def _unlike(weights: torch.Tensor, scores: torch.Tensor) -> float:
    """How far `weights` are from a multiple of `scores`, both [rows, k]: of one row; over all rows where k is 1."""
    ratio = weights / scores.clamp_min(torch.finfo(torch.float32).tiny)
    dim = 0 if ratio.shape[-1] == 1 else -1
    spread = float((ratio / ratio.mean(dim=dim, keepdim=True) - 1).abs().max())
    if ratio.shape[-1] == 1 and float((weights - weights[0]).abs().max()) < _ALIKE * float(weights[0].abs().max()):
        return 0.0
    return spread


def unread(root: nn.Module, listeners: Sequence[Listener]) -> tuple[str, ...]:
    """Names of the classes of `root` that hold experts of the sequence and whose router none of `listeners` hears.

    Experts are modules that transformers' decorator marks as such, or that have weights of three dimensions, one
    matrix per expert; a model whose configuration counts experts although nothing at all is heard is named itself.
    """
    count = _count(root) if isinstance(root, PreTrainedModel) else 0
    if count < 2:
        return ()
    modules = {listener.module for listener in listeners}
    heard = [path for path, module in root.named_modules() if module in modules]
    names = []
    for path, module in root.named_modules():
        fused = any(p.dim() == 3 and p.shape[0] == count for p in module.parameters(recurse=False))
        marked = hasattr(module, "is_transposed") and hasattr(module, "has_gate")
        if not (fused or marked) or is_beside_the_sequence(path, root):
            continue
        block = path.rpartition(".")[0]
        if not any(f"{one}.".startswith(f"{block}.") or f"{path}.".startswith(f"{one}.") for one in heard):
            names.append(type(root.get_submodule(block)).__name__)
    if not names and not heard:
        names.append(type(root).__name__)
    return tuple(dict.fromkeys(names))


def _count(root: PreTrainedModel) -> int:
    """Experts per block, by the text configuration; 0 for a model without."""
    config = root.config.get_text_config()
    counts = (getattr(config, name, None) for name in _COUNTS)
    return next((count for count in counts if isinstance(count, int)), 0)
