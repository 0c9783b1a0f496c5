"""Figure: which experts serve the picture and which the text, layer by layer; it knows nothing of the page."""

import math
from collections.abc import Sequence

import numpy as np
from plotly import graph_objects as go

from mllm_demo.figures.style import styled
from mllm_demo.routing.stats import load_by_modality
from mllm_demo.routing.trace import RoutingTrace, Site

SMALLEST_SCALE = 20


def modality_share_figure(trace: RoutingTrace, sites: Sequence[Site], label: str) -> go.Figure:
    """Heat map [experts, sites]: share of image tokens minus share of text tokens that went to an expert, -1 to 1.

    Blue: the expert serves more of the text; orange: more of the picture; pale: both alike.
    """
    experts = max((site.num_experts for site in sites), default=0)
    table = np.full((experts, len(sites)), np.nan)
    for column, site in enumerate(sites):
        load = load_by_modality(trace, site)
        table[: site.num_experts, column] = load["image"] - load["text"]
    # A scale that fits what is there, but never one that blows up differences of a few points.
    most = max(SMALLEST_SCALE, 10 * math.ceil(np.nanmax(np.abs(table), initial=0) * 10))
    heat = go.Heatmap(
        x=[site.layer_idx for site in sites],
        y=[f"expert {expert}" for expert in range(experts)],
        z=table * 100,
        zmin=-most,
        zmax=most,
        colorscale=[[0, "#0072B2"], [0.5, "rgba(140, 145, 155, 0.12)"], [1, "#D55E00"]],
        colorbar={
            "tickvals": [-most, 0, most],
            "ticktext": ["text", "alike", "image"],
            "thickness": 12,
            "outlinewidth": 0,
        },
        xgap=1,
        ygap=1,
        hovertemplate="layer %{x}, %{y}: %{z:+.0f} points<extra></extra>",
    )
    title = f"Picture or text? Image share minus text share · {label}"
    figure = styled(go.Figure(heat), title=title, height=120 + 44 * experts)
    figure.update_xaxes(title="layer", showgrid=False, dtick=max(1, len(sites) // 10))
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure
