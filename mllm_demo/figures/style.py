"""The look that all plotly figures share; it knows nothing of what they show.

Backgrounds are transparent and inks are mid-grey, so that one figure reads on the light and on the dark page.
"""

from collections.abc import Sequence

from plotly import graph_objects as go

from mllm_demo.routing.trace import Site

INK = "#7d828c"
LINE = "rgba(125, 130, 140, 0.25)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
# Pixels of a plot with a row for each expert, however many there are.
TALLEST = 560


def styled(figure: go.Figure, *, title: str, subtitle: str, height: int) -> go.Figure:
    """Both lines must fit a telephone: about 30 characters for `title`, 55 for `subtitle`."""
    figure.update_layout(
        title={
            "text": heading(title, subtitle),
            "font": {"size": 15},
            "x": 0.01,
            "xanchor": "left",
            "xref": "container",
            "y": 1,
            "yanchor": "top",
            "yref": "container",
            "pad": {"t": 12},
        },
        height=height,
        margin={"l": 54, "r": 12, "t": 80, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 12, "color": INK},
        legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 1, "xanchor": "right", "traceorder": "normal"},
        barmode="stack",
        bargap=0.14,
        hoverlabel={"font": {"family": FONT}},
        dragmode=False,
    )
    figure.update_xaxes(gridcolor=LINE, zeroline=False)
    figure.update_yaxes(gridcolor=LINE, zeroline=False)
    return figure


def heading(title: str, subtitle: str) -> str:
    """Two lines. Plotly's own subtitle would lie on the title in a figure that is drawn while its tab is hidden."""
    return f"{title}<br><span style='font-size:12px'>{subtitle}</span>"


def sentence_figure(title: str, sentence: str) -> go.Figure:
    """In the place of a figure that there is nothing to draw for: the same title, and why."""
    figure = styled(go.Figure(), title=title, subtitle=sentence, height=72)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def few(layers: Sequence) -> list:
    """Those of `layers` that an axis has room to name: ten or so, evenly apart, the first among them."""
    return list(layers[:: max(1, len(layers) // 10)])


def names(sites: Sequence[Site]) -> list[str]:
    """What an axis of layers calls each of `sites`; one that stands in no layer serves all or is beside them."""
    return [str(s.layer_idx) if s.layer_idx >= 0 else "all" if s.block == "model" else s.block for s in sites]


def places(sites: Sequence[Site]) -> list[str]:
    """The same in words, for a hover."""
    return [
        f"layer {s.layer_idx}" if s.layer_idx >= 0 else "whole model" if s.block == "model" else s.block for s in sites
    ]
