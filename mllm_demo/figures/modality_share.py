"""Figure: which experts serve the picture and which the text, layer by layer; it knows nothing of the page."""

import math
from collections.abc import Sequence

import numpy as np
from plotly import graph_objects as go

from mllm_demo.figures.palette import MANY_EXPERTS
from mllm_demo.figures.style import INK, LINE, TALLEST, few, heading, names, places, styled
from mllm_demo.routing.stats import load_by_modality
from mllm_demo.routing.trace import RoutingTrace, Site

SMALLEST_SCALE = 20
SUBTITLE = "share of the image minus share of the text"
SUBTITLE_WITHIN = "what an expert serves, image and text counting alike"


def modality_share_figure(trace: RoutingTrace, sites: Sequence[Site], label: str) -> go.Figure:
    """Heat map [experts, sites] with two views to switch between; blue: text, orange: picture, pale: both alike.

    First the share of the image tokens minus the share of the text tokens that went to an expert, -100 to 100 points;
    then, within an expert, the image's part of both shares, 0 to 100 % (nothing where it served neither).
    """
    experts = max((site.num_experts for site in sites), default=0)
    image, text = np.full((2, experts, len(sites)), np.nan)
    for column, site in enumerate(sites):
        load = load_by_modality(trace, site)
        image[: site.num_experts, column] = load["image"] * 100
        text[: site.num_experts, column] = load["text"] * 100
    between = image - text
    both = image + text
    within = np.divide(image, both, out=np.full_like(both, np.nan), where=both > 0) * 100
    # A scale that fits what is there, but never one that blows up differences of a few points.
    most = max(SMALLEST_SCALE, 10 * math.ceil(np.nanmax(np.abs(between), initial=0) / 10))
    heat = go.Heatmap(
        x=[site.layer_idx for site in sites],
        y=[f"expert {expert}" for expert in range(experts)],
        z=between,
        customdata=np.stack((image, text, within), axis=-1),
        text=[places(sites)] * experts,
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
        ygap=1 if experts <= MANY_EXPERTS else 0,
        hovertemplate=(
            "%{text}, %{y}: %{customdata[0]:.0f} % of the image, %{customdata[1]:.0f} % of the text"
            "<br>within it %{customdata[2]:.0f} % image<extra></extra>"
        ),
    )
    title = f"Picture or text? · {label}"
    height = 178 + min(44 * experts, TALLEST)
    figure = styled(go.Figure(heat), title=title, subtitle=SUBTITLE, height=height)
    layers = [site.layer_idx for site in sites]
    figure.update_xaxes(title="layer", showgrid=False, tickvals=few(layers), ticktext=few(names(sites)))
    figure.update_yaxes(autorange="reversed", showgrid=False)
    views = (("between", between, -most, most, SUBTITLE), ("within", within, 0, 100, SUBTITLE_WITHIN))
    figure.update_layout(
        margin_t=118,  # for the buttons
        updatemenus=[
            {
                "type": "buttons",
                "direction": "right",
                "buttons": [
                    {
                        "label": name,
                        "method": "update",
                        "args": [
                            {"z": [z], "zmin": low, "zmax": high, "colorbar.tickvals": [[low, (low + high) / 2, high]]},
                            {"title.text": heading(title, subtitle)},
                        ],
                    }
                    for name, z, low, high, subtitle in views
                ],
                "x": 1,
                "xanchor": "right",
                "y": 1,
                "yanchor": "bottom",
                "pad": {"b": 8},
                "font": {"size": 11, "color": INK},
                "bgcolor": "rgba(0,0,0,0)",
                "bordercolor": LINE,
                "borderwidth": 1,
                "showactive": False,
            }
        ]
    )
    return figure
