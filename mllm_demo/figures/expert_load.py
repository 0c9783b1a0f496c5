"""Figure: how the tokens were shared out among the experts, one bar a layer; it knows nothing of the page."""

from collections.abc import Sequence

import numpy as np
from plotly import graph_objects as go

from mllm_demo.figures.palette import expert_colors
from mllm_demo.figures.style import few, styled
from mllm_demo.routing.stats import load_table
from mllm_demo.routing.trace import RoutingTrace, Site

SUBTITLE = "share of the tokens that each expert served"


def expert_load_figure(trace: RoutingTrace, sites: Sequence[Site], label: str) -> go.Figure:
    """Stacked bars of `stats.load_table` [sites, experts]; `label` names the routers ("mlp")."""
    table = np.nan_to_num(load_table(trace, sites))
    layers = [site.layer_idx for site in sites]
    bars = [
        go.Bar(
            name=f"expert {expert}",
            x=layers,
            y=table[:, expert] * 100,
            marker={"color": color},
            hovertemplate=f"layer %{{x}}, expert {expert}: %{{y:.0f}} %<extra></extra>",
        )
        for expert, color in enumerate(expert_colors(table.shape[1]))
    ]
    figure = styled(go.Figure(bars), title=f"Expert load · {label}", subtitle=SUBTITLE, height=372)
    figure.update_layout(margin_t=118)  # the legend takes two rows on a telephone
    figure.update_xaxes(title="layer", tickvals=few(layers))
    figure.update_yaxes(title="% of tokens", range=[0, 100])
    return figure
