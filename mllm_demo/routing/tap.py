"""Records what every router of a model decides, while the model reads and answers.

It hears the routers that `readers` finds and only listens: the tokens that come out are the same with and without
it, and the KV cache stays in use. It knows nothing of text, pictures or pages; `trace` is given the tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mllm_demo.errors import TraceError
from mllm_demo.routing.families import all_listeners
from mllm_demo.routing.native import unread
from mllm_demo.routing.readers import Decision, Listener
from mllm_demo.routing.trace import RoutingTrace, Site, Token, TraceImage

_FIRST_CAPACITY = 256


class RoutingTap:
    """Context manager around any number of forwards of `model`, a transformers or PEFT model.

        with RoutingTap(model) as tap:
            model.generate(**inputs)
            trace = tap.trace(tokens)

    `sites`: the model's own routers and those of the adapters active when the `with` was entered (at first, when the
    tap was made); empty for a model without routers. `unread`: names of classes that hold experts whose router
    nothing here can read. `positions`: rows recorded so far, which after `generate` are
    the prompt plus every new token but the last, since the last one is never read. Entering again starts
    afresh.

    A forward with `use_cache=False` reads the sequence from its start, and only positions that are new get rows; any
    other goes on where the last one ended.

    Raises `TraceError` inside a forward when the batch holds more than one sequence. A forward that fails
    midway leaves no rows. Routing of one forward is copied from the device once, when the forward ends.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._root = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._reset()

    def _reset(self) -> None:
        self._listeners = all_listeners(self._root)
        self.sites: tuple[Site, ...] = tuple(listener.site for listener in self._listeners)
        self.unread = unread(self._root, self._listeners)
        self.positions = 0
        self._groups = _groups(self.sites)
        self._pending: dict[str, Decision] = {}
        self._length: int | None = None
        self._from_start = False
        self._hole: str | None = None

    def __enter__(self) -> "RoutingTap":
        if self._handles:
            raise TraceError("this tap is already recording; make a second one to record twice.")
        self._reset()
        try:
            self._handles.append(self._root.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._handles.append(self._root.register_forward_hook(self._end))
            for listener in self._listeners:
                hook = self._hook(listener)
                self._handles.append(listener.module.register_forward_hook(hook, with_kwargs=True))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._pending.clear()

    def _begin(self, module: nn.Module, args: tuple, kwargs: Mapping) -> None:
        self._pending.clear()
        self._length = None
        self._from_start = kwargs.get("use_cache") is False
        for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
            if isinstance(value, torch.Tensor):
                if value.shape[0] != 1:
                    raise TraceError(
                        f"routing is recorded for one sequence, not for a batch of {value.shape[0]}."
                    )
                self._length = value.shape[1]
                return

    def _hook(self, listener: Listener):
        name = listener.site.name

        def listen(module: nn.Module, args: tuple, kwargs: Mapping, output: object) -> None:
            decision = listener.read(args, kwargs, output)
            if decision is None:
                return
            if name in self._pending:
                self._miss(f"router {name!r} reported twice for position {self.positions}.")
            self._pending[name] = decision

        return listen

    def _miss(self, message: str) -> None:
        self._hole = self._hole or message

    def _end(self, module: nn.Module, args: tuple, output: object) -> None:
        pending, self._pending = self._pending, {}
        rows = {name: output.router_probs.shape[:-1].numel() for name, output in pending.items()}
        length = self._length or max(rows.values(), default=0)
        for site in self.sites:
            if site.name not in rows:
                self._miss(f"router {site.name!r} has reported nothing for position {self.positions}.")
            elif rows[site.name] != length and (rows[site.name] != 1 or site.granularity != "sequence"):
                where = f"{length} positions from {self.positions} on"
                self._miss(f"router {site.name!r} reported {rows[site.name]} choices for {where}.")
        # Without a cache every forward reads all positions again; the rows that are there already stay.
        start = min(self.positions, length) if self._from_start else 0
        if self._hole is None:
            for group in self._groups:
                group.append([pending[site.name] for site in group.sites], length, self.positions, start)
        self.positions += length - start

    def trace(
        self,
        tokens: Sequence[Token],
        images: Sequence[TraceImage] = (),
        provenance: Mapping[str, object] | None = None,
    ) -> RoutingTrace:
        """Everything recorded so far, one row for each of `tokens`; cheap enough to call while answering.

        Raises `TraceError` when the model has no router, when a router missed a position, or when the tokens
        are not as many as the positions.
        """
        if not self.sites:
            if self.unread:
                raise TraceError(
                    f"this model has experts, but nothing here can read the routers of {' and '.join(self.unread)}, "
                    "so there is no routing to show."
                )
            raise TraceError("this model has no router, so there is no routing to show.")
        if self._hole is not None:
            raise TraceError(self._hole)
        if len(tokens) != self.positions:
            raise TraceError(f"{len(tokens)} tokens were given for {self.positions} recorded positions.")
        arrays: tuple[dict[str, np.ndarray], ...] = ({}, {}, {})
        for group in self._groups:
            for row, site in enumerate(group.sites):
                for kind, values in zip(arrays, group.values, strict=True):
                    kind[site.name] = values[row, : self.positions]
        return RoutingTrace(
            tuple(tokens), self.sites, *arrays, images=tuple(images), provenance=provenance or {}
        )


@dataclass
class _Group:
    """Sites of the same width, in arrays that grow by doubling.

    values: router_probs float16 [sites, capacity, E], selected_experts int16 [sites, capacity, k],
    routing_weights float16 [sites, capacity, k]. Rows once written never change, so traces may share them.
    """

    sites: list[Site]
    values: list[np.ndarray]

    def append(self, outputs: Sequence[Decision], length: int, start: int, known: int = 0) -> None:
        """`outputs`: one per site, each for `length` positions or for one that stands for them all.

        The first `known` of them are in the rows up to `start` already.
        """

        def stacked(name: str) -> torch.Tensor:
            kind = [getattr(output, name) for output in outputs]
            width = kind[0].shape[-1]
            if any(rows.numel() != length * width for rows in kind):
                kind = [rows.reshape(-1, width).expand(length, width) for rows in kind]
            # A model spread over several devices routes on each of them.
            device = kind[0].device
            return torch.stack([rows.reshape(length, width)[known:].to(device) for rows in kind]).detach()

        # Bits of the halves travel as int16 beside the indices, so that one copy leaves the device.
        probs, weights = (
            stacked(name).half().view(torch.int16) for name in ("router_probs", "routing_weights")
        )
        selected = stacked("selected_experts").to(torch.int16)
        packed = torch.cat([probs, selected, weights], dim=-1)  # (sites, length, E + 2k)
        packed = packed.cpu().numpy()
        experts, chosen = self.sites[0].num_experts, self.sites[0].num_experts_per_tok
        parts = np.split(packed, [experts, experts + chosen], axis=-1)
        stop = start + length - known
        for index, part in enumerate(parts):
            held = self.values[index]
            if held.shape[1] < stop:
                grown = np.empty((held.shape[0], max(stop, 2 * held.shape[1]), held.shape[2]), held.dtype)
                grown[:, :start] = held[:, :start]
                self.values[index] = held = grown
            held.view(np.int16)[:, start:stop] = part


def _groups(sites: Sequence[Site]) -> list[_Group]:
    by_width: dict[tuple[int, int], list[Site]] = {}
    for site in sites:
        by_width.setdefault((site.num_experts, site.num_experts_per_tok), []).append(site)
    return [
        _Group(
            members,
            [
                np.empty((len(members), _FIRST_CAPACITY, width), dtype)
                for width, dtype in ((experts, np.float16), (chosen, np.int16), (chosen, np.float16))
            ],
        )
        for (experts, chosen), members in by_width.items()
    ]
