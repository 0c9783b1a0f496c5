"""Figure: the ways that tokens take through the experts, layer by layer; it knows nothing of the page.

Every pathway is counted, none is estimated: pale lines are the steps from an expert to one of the next layer, bright
lines whole pathways that several tokens share.
"""

from collections.abc import Sequence

import numpy as np
from plotly import graph_objects as go
from plotly.colors import sample_colorscale

from mllm_demo.figures.palette import MANY_EXPERTS, expert_colors
from mllm_demo.figures.style import TALLEST, few, names, places, sentence_figure, styled
from mllm_demo.routing.stats import Pathways, token_pathways
from mllm_demo.routing.trace import RoutingTrace, Site

MOST = 8
ONE_LAYER = "one layer has such routers, so no way leads on"
TEXT, IMAGE = "#0072B2", "#D55E00"
# Share of a modality's tokens from which on a step is drawn, and how wide: one trace of the figure for each.
_WIDTHS = ((0.05, 1.2), (0.1, 2.4), (0.2, 4.5), (0.4, 8.0))
_PALE = 0.3
_TEXT_TO_IMAGE = [[0, TEXT], [0.5, "#8C8C8C"], [1, IMAGE]]
_SPREAD = 0.3  # how far pathways through one expert lie apart, of the distance between two experts


def pathways_figure(trace: RoutingTrace, sites: Sequence[Site], label: str) -> go.Figure:
    """Parallel lines over the layers of `sites`; a sentence when there is no second layer to go to.

    Pale, by width: the share of the image tokens (orange) and of the text tokens (blue) that made a step, from 5 % on.
    Bright: the `MOST` most frequent whole pathways that two tokens or more took, in the colour of those tokens, grey
    where both kinds did.
    """
    title = f"Pathways · {label}"
    if len(sites) < 2 or not trace.tokens:
        return sentence_figure(title, ONE_LAYER)
    ways = token_pathways(trace, sites)
    tokens = int(ways.counts.sum())
    shared = int(min(MOST, (ways.counts > 1).sum()))
    steps = [
        line
        for modality, color, offset in (("text", TEXT, -0.05), ("image", IMAGE, 0.05))
        if len(of := trace.token_indices(modality))
        for line in _steps(token_pathways(trace, sites, of), color, offset)
    ]
    figure = styled(
        go.Figure([*steps, *_shared(ways, shared, tokens), _experts(ways, sites, tokens)]),
        title=title,
        subtitle=(
            f"{tokens} tokens, {len(ways.counts)} ways, at most {ways.counts[0]} alike · "
            f"<span style='color:{TEXT}'>text</span> <span style='color:{IMAGE}'>image</span>"
        ),
        height=136 + min(62 * ways.nodes.shape[1], TALLEST),
    )
    experts = ways.nodes.shape[1]
    ticks = few(range(len(sites)))
    rows = list(range(experts)) if experts <= MANY_EXPERTS else few(range(experts))
    figure.update_xaxes(
        title="layer",
        tickvals=ticks,
        ticktext=names([sites[tick] for tick in ticks]),
        range=[-0.5, len(sites) - 0.5],
        showgrid=False,
    )
    figure.update_yaxes(
        tickvals=rows,
        ticktext=[f"expert {expert}" for expert in rows],
        range=[experts - 0.5, -0.5],
        showgrid=False,
    )
    return figure


def _steps(ways: Pathways, color: str, offset: float) -> list[go.Scatter]:
    """Lines between experts of neighbouring layers, one trace for each width."""
    bins = np.digitize(ways.flows / ways.counts.sum(), [least for least, _ in _WIDTHS])
    lines = []
    for number, (_, width) in enumerate(_WIDTHS, start=1):
        layer, start, end = np.nonzero(bins == number)
        gap = np.full(len(layer), np.nan)
        lines.append(
            go.Scatter(
                x=np.stack((layer, layer + 1, gap), axis=1).ravel(),
                y=np.stack((start + offset, end + offset, gap), axis=1).ravel(),
                mode="lines",
                line={"color": color, "width": width},
                opacity=_PALE,
                hoverinfo="skip",
                showlegend=False,
            )
        )
    return lines


def _shared(ways: Pathways, shared: int, tokens: int) -> list[go.Scatter]:
    """The most frequent pathways, beside each other where they meet."""
    colors = sample_colorscale(_TEXT_TO_IMAGE, ways.image_share[:shared].tolist()) if shared else []
    offsets = np.linspace(-_SPREAD / 2, _SPREAD / 2, shared) if shared > 1 else [0.0]
    drawn = []
    for rank in range(shared):
        share, image = ways.counts[rank] / tokens, ways.image_share[rank]
        said = (
            f"{ways.counts[rank]} tokens ({share:.0%}) took this way, {image:.0%} of them image<br>experts "
            f"{_wrapped(ways.paths[rank])}<extra></extra>"
        )
        drawn.append(
            go.Scatter(
                x=np.arange(ways.paths.shape[1]),
                y=ways.paths[rank] + offsets[rank],
                mode="lines",
                line={"color": colors[rank], "width": 1.5 + 14 * share},
                hovertemplate=said,
                showlegend=False,
            )
        )
    return drawn


def _wrapped(path: np.ndarray) -> str:
    rows = [path[start : start + 12] for start in range(0, len(path), 12)]
    return "<br>".join(" ".join(str(expert) for expert in row) for row in rows)


def _experts(ways: Pathways, sites: Sequence[Site], tokens: int) -> go.Scatter:
    """A dot for each expert of each layer, as large as its share of the tokens; of many, for those that have one."""
    there = np.array([[expert < site.num_experts for expert in range(ways.nodes.shape[1])] for site in sites])
    if ways.nodes.shape[1] > MANY_EXPERTS:
        there &= ways.nodes > 0
    layer, expert = np.nonzero(there)
    said = places(sites)
    share = ways.nodes[layer, expert] / tokens
    colors = np.array(expert_colors(ways.nodes.shape[1]))
    return go.Scatter(
        x=layer,
        y=expert,
        mode="markers",
        marker={"color": colors[expert], "size": 3 + 11 * np.sqrt(share), "line": {"width": 0}},
        customdata=list(zip([said[n] for n in layer], expert.tolist(), (100 * share).tolist(), strict=True)),
        hovertemplate="%{customdata[0]}, expert %{customdata[1]}: %{customdata[2]:.0f} %<extra></extra>",
        showlegend=False,
    )
