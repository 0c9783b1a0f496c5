"""Numbers of a `RoutingTrace`: how loaded, how specialised and how decided its experts are.

Numpy only, no loop over tokens. It knows nothing of models, colours or pages. Shares are float64, 0 to 1; a
share of no tokens at all is 0. Expert 2 of one router and expert 2 of another are different experts: nothing
here adds up experts of two routers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mllm_demo.routing.trace import MODALITIES, RoutingTrace, Site


@dataclass(frozen=True)
class LayerTable:
    """What each token met at each of some routers; columns follow `sites`, which go by layer.

    layer_idx  int64   [sites]
    expert     int16   [tokens, sites]   the first selected expert
    weight     float32 [tokens, sites]   its routing weight
    entropy    float32 [tokens, sites]   normalised routing entropy, 0 (certain) to 1 (undecided)
    """

    sites: tuple[Site, ...]
    layer_idx: np.ndarray
    expert: np.ndarray
    weight: np.ndarray
    entropy: np.ndarray


def site_groups(trace: RoutingTrace) -> dict[str, tuple[Site, ...]]:
    """Routers that are the same part of different layers, by layer: at most one router of a layer per group.

    Keys are module paths with the layer's number replaced by `*`, in model order; a router that serves no
    single layer stands alone.
    """
    groups: dict[str, list[Site]] = {}
    for site in trace.sites:
        groups.setdefault(_without_layer(site), []).append(site)
    return {name: tuple(sorted(sites, key=lambda site: site.layer_idx)) for name, sites in groups.items()}


def _without_layer(site: Site) -> str:
    parts = site.name.split(".")
    number = str(site.layer_idx)
    if number in parts:
        parts[parts.index(number)] = "*"
    return ".".join(parts)


def layer_table(trace: RoutingTrace, sites: str | Sequence[Site]) -> LayerTable:
    """The table behind a tokens-by-layers picture.

    `sites`: a block ("attention", "mlp", ...) or routers, such as one group of `site_groups`. With several
    routers in one layer each has a column of its own.
    """
    chosen = trace.sites_of_block(sites) if isinstance(sites, str) else tuple(sites)
    chosen = tuple(sorted(chosen, key=lambda site: site.layer_idx))
    shape = (len(trace.tokens), len(chosen))
    expert, weight, certainty = (
        np.empty(shape, np.int16),
        np.empty(shape, np.float32),
        np.empty(shape, np.float32),
    )
    for column, site in enumerate(chosen):
        expert[:, column] = trace.selected_experts[site.name][:, 0]
        weight[:, column] = trace.routing_weights[site.name][:, 0]
        certainty[:, column] = entropy(trace, site)
    layers = np.array([site.layer_idx for site in chosen], dtype=np.int64)
    return LayerTable(chosen, layers, expert, weight, certainty)


def entropy(trace: RoutingTrace, site: Site) -> np.ndarray:
    """float32 [tokens]: -sum p log p / log num_experts of the router's probabilities; 0 with one expert."""
    if site.num_experts == 1:
        return np.zeros(len(trace.tokens), dtype=np.float32)
    probs = trace.router_probs[site.name].astype(np.float32)
    # Half precision leaves a sum slightly off one, which would push a uniform row's entropy past its bound.
    probs /= np.maximum(probs.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    terms = probs * np.log(np.where(probs > 0, probs, 1))
    return np.clip(-terms.sum(axis=1) / np.log(site.num_experts), 0, 1).astype(np.float32)


def expert_load(trace: RoutingTrace, site: Site, positions: np.ndarray | None = None) -> np.ndarray:
    """float64 [num_experts]: the share of the selections that fell on each expert; sums to 1.

    `positions`: the positions to count, all when None. With one expert per token this is the share of tokens;
    with k of them a token counts 1/k for each expert it selected.
    """
    selected = trace.selected_experts[site.name]
    selected = selected if positions is None else selected[positions]
    return _shares(np.bincount(selected.ravel(), minlength=site.num_experts))


def load_by_modality(trace: RoutingTrace, site: Site) -> dict[str, np.ndarray]:
    """`expert_load` of the tokens of each modality: float64 [num_experts] each."""
    return {name: expert_load(trace, site, trace.token_indices(name)) for name in MODALITIES}


def modality_share(trace: RoutingTrace, site: Site) -> np.ndarray:
    """float64 [num_experts, 3]: of the selections of each expert, the share that image, text and special
    tokens (the order of `MODALITIES`) made; a row of zeros for an expert that nothing selected."""
    selected = trace.selected_experts[site.name]
    counts = np.stack(
        [
            np.bincount(selected[trace.token_indices(name)].ravel(), minlength=site.num_experts)
            for name in MODALITIES
        ],
        axis=1,
    )  # (num_experts, modalities)
    return _shares(counts)


def load_table(trace: RoutingTrace, sites: Sequence[Site], positions: np.ndarray | None = None) -> np.ndarray:
    """float64 [sites, experts]: `expert_load` of several routers; NaN where a router has fewer experts."""
    table = np.full((len(sites), max((site.num_experts for site in sites), default=0)), np.nan)
    for row, site in enumerate(sites):
        table[row, : site.num_experts] = expert_load(trace, site, positions)
    return table


def _shares(counts: np.ndarray) -> np.ndarray:
    """Counts divided by their sum along the last axis; zeros where the sum is zero."""
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)


@dataclass(frozen=True)
class Pathways:
    """The experts that tokens met from layer to layer: of each router the chosen one that weighed most.

    paths        int16 [distinct, sites]       different pathways, the most frequent first
    counts       int64 [distinct]              tokens that took each
    image_share  float64 [distinct]            the share of those that are image tokens
    flows        int64 [sites - 1, E, E]       tokens that went from one expert to another of the next router
    nodes        int64 [sites, E]              tokens at each expert; E is the largest number of experts
    """

    paths: np.ndarray
    counts: np.ndarray
    image_share: np.ndarray
    flows: np.ndarray
    nodes: np.ndarray


def token_pathways(trace: RoutingTrace, sites: Sequence[Site], positions: np.ndarray | None = None) -> Pathways:
    """Counts the pathways of `positions` (all when None) through `sites`, which go by layer.

    MoE-LLaVA (arXiv:2401.15947, figure 6) draws components of expert numbers instead; nothing is projected here.
    """
    positions = np.arange(len(trace.tokens)) if positions is None else positions
    steps = _heaviest(trace, sites)[positions]  # (tokens, sites)
    paths, which, counts = np.unique(steps, axis=0, return_inverse=True, return_counts=True)
    image = np.isin(positions, trace.token_indices("image"))
    images = np.bincount(which.ravel(), weights=image, minlength=len(paths))
    order = np.argsort(-counts, kind="stable")
    experts = max((site.num_experts for site in sites), default=1)
    layer = np.arange(len(sites))
    nodes = np.bincount((layer * experts + steps).ravel(), minlength=len(sites) * experts)
    pairs = (layer[:-1] * experts + steps[:, :-1]) * experts + steps[:, 1:]
    flows = np.bincount(pairs.ravel(), minlength=max(len(sites) - 1, 0) * experts**2)
    return Pathways(
        paths[order],
        counts[order],
        images[order] / counts[order],
        flows.reshape(-1, experts, experts),
        nodes.reshape(len(sites), experts),
    )


def _heaviest(trace: RoutingTrace, sites: Sequence[Site]) -> np.ndarray:
    """int64 [tokens, sites]: the chosen expert with the largest routing weight, the first of equals."""
    table = np.empty((len(trace.tokens), len(sites)), np.int64)
    for column, site in enumerate(sites):
        best = trace.routing_weights[site.name].argmax(axis=1)[:, None]
        table[:, column] = np.take_along_axis(trace.selected_experts[site.name], best, axis=1)[:, 0]
    return table
