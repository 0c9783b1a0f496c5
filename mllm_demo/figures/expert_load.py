"""Figure: how the tokens were shared out among the experts, layer by layer; it knows nothing of the page."""

from collections.abc import Sequence

import numpy as np
from plotly import graph_objects as go

from mllm_demo.figures.palette import CIVIDIS, MANY_EXPERTS, expert_colors
from mllm_demo.figures.style import TALLEST, few, names, places, styled
from mllm_demo.routing.stats import load_table
from mllm_demo.routing.trace import RoutingTrace, Site

SUBTITLE_MANY = "share of the choices that fell on each expert"
SUBTITLE = "share of the tokens that each expert served"


def expert_load_figure(trace: RoutingTrace, sites: Sequence[Site], label: str) -> go.Figure:
    """Stacked bars of `stats.load_table` [sites, experts], a heat map if experts are many; `label`: routers ("mlp")."""
    table = load_table(trace, sites)
    layers = [site.layer_idx for site in sites]
    if table.shape[1] > MANY_EXPERTS:
        return _heat(table, sites, label)
    table = np.nan_to_num(table)
    bars = [
        go.Bar(
            name=f"expert {expert}",
            x=layers,
            y=table[:, expert] * 100,
            marker={"color": color},
            customdata=places(sites),
            hovertemplate=f"%{{customdata}}, expert {expert}: %{{y:.0f}} %<extra></extra>",
        )
        for expert, color in enumerate(expert_colors(table.shape[1]))
    ]
    figure = styled(go.Figure(bars), title=f"Expert load · {label}", subtitle=SUBTITLE, height=372)
    figure.update_layout(margin_t=118)  # the legend takes two rows on a telephone
    figure.update_xaxes(title="layer", tickvals=few(layers), ticktext=few(names(sites)))
    figure.update_yaxes(title="% of tokens", range=[0, 100])
    return figure


def _heat(table: np.ndarray, sites: Sequence[Site], label: str) -> go.Figure:
    layers = [site.layer_idx for site in sites]
    heat = go.Heatmap(
        x=layers,
        y=[f"expert {expert}" for expert in range(table.shape[1])],
        z=table.T * 100,
        zmin=0,
        colorscale=[[stop / (len(CIVIDIS) - 1), color] for stop, color in enumerate(CIVIDIS)],
        colorbar={"ticksuffix": " %", "thickness": 12, "outlinewidth": 0},
        xgap=1,
        customdata=[places(sites)] * table.shape[1],
        hovertemplate="%{customdata}, %{y}: %{z:.1f} %<extra></extra>",
    )
    figure = styled(go.Figure(heat), title=f"Expert load · {label}", subtitle=SUBTITLE_MANY, height=124 + TALLEST)
    figure.update_xaxes(title="layer", showgrid=False, tickvals=few(layers), ticktext=few(names(sites)))
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure
