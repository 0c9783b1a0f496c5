"""How far two traces of the same tokens differ: which choices changed, and by how much probabilities moved.

Numpy only, no loop over tokens. It knows nothing of why the traces differ.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mllm_demo.errors import TraceError
from mllm_demo.routing.trace import RoutingTrace, Site


class Divergence(NamedTuple):
    """One router, over all tokens.

    first_changed  share of tokens whose first choice is another expert
    set_changed    share of tokens whose set of k chosen experts differs
    variation      mean total-variation distance of the router's probabilities, half the sum of |p - q|; at most 1
                   where they sum to one
    largest        the largest such distance of any token
    """

    site: Site
    tokens: int
    first_changed: float
    set_changed: float
    variation: float
    largest: float


class Summary(NamedTuple):
    """Several routers as one: means of what a `Divergence` holds, and the largest distance of any."""

    routers: int
    first_changed: float
    set_changed: float
    variation: float
    largest: float


def divergence(before: RoutingTrace, after: RoutingTrace) -> tuple[Divergence, ...]:
    """One row per router, in model order; raises `TraceError` unless both traces are of the same tokens and routers."""
    if before.sites != after.sites:
        raise TraceError("these two traces are of different routers; compare traces of one model.")
    if [token.id for token in before.tokens] != [token.id for token in after.tokens]:
        raise TraceError("these two traces are of different tokens; let both models read the same sequence.")
    rows = []
    for site in before.sites:
        first, second = (trace.selected_experts[site.name] for trace in (before, after))
        p, q = (trace.router_probs[site.name].astype(np.float64) for trace in (before, after))
        distance = 0.5 * np.abs(p - q).sum(-1)
        changed = (np.sort(first, -1) != np.sort(second, -1)).any(-1)
        moved = first[:, 0] != second[:, 0]
        rows.append(
            Divergence(
                site, len(before.tokens), *(float(v) for v in (moved.mean(), changed.mean(), distance.mean())),
                float(distance.max()),
            )
        )  # fmt: skip
    return tuple(rows)


def merged(parts: list[tuple[Divergence, ...]]) -> tuple[Divergence, ...]:
    """The rows of several pairs of traces of one model as one, each weighted by its tokens."""
    rows = []
    for same in zip(*parts, strict=True):
        weights = np.array([row.tokens for row in same], np.float64)
        means = np.average([row[2:5] for row in same], axis=0, weights=weights)
        rows.append(Divergence(same[0].site, int(weights.sum()), *map(float, means), max(row.largest for row in same)))
    return tuple(rows)


def summary(rows: Iterable[Divergence]) -> Summary:
    """Routers that have read the same tokens, each counted once."""
    rows = list(rows)
    means = np.mean([row[2:5] for row in rows], axis=0)
    return Summary(len(rows), *map(float, means), max(row.largest for row in rows))


def by_block(rows: Iterable[Divergence]) -> dict[str, Summary]:
    """One summary for each kind of block, in the order in which the model has them."""
    rows = list(rows)
    kinds = dict.fromkeys(row.site.block for row in rows)
    return {kind: summary(row for row in rows if row.site.block == kind) for kind in kinds}
