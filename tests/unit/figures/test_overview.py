"""The overview figures show the shares that `routing.stats` counts."""

from dataclasses import replace

import numpy as np
import pytest

from mllm_demo.figures.expert_load import expert_load_figure
from mllm_demo.figures.modality_share import modality_share_figure
from mllm_demo.figures.pathways import pathways_figure
from mllm_demo.routing.stats import load_table
from mllm_demo.routing.trace import RoutingTrace, Site, Token, TraceImage
from tests.large_trace import large_trace


@pytest.fixture
def trace():
    """Layer 0: all image tokens to expert 1, all text to expert 0; layer 1: everything to expert 2 of three."""
    tokens = [Token(9, "", "image", "user", "prefill", 0) for _ in range(3)]
    tokens += [Token(1, "a", "text", "user", "prefill")]
    sites = (Site("l.0.mlp", 0, "mlp", 2, 1), Site("l.1.mlp", 1, "mlp", 3, 1))
    chosen = {"l.0.mlp": [1, 1, 1, 0], "l.1.mlp": [2, 2, 2, 2]}
    return RoutingTrace(
        tuple(tokens),
        sites,
        {s.name: np.full((4, s.num_experts), 1 / s.num_experts, np.float16) for s in sites},
        {name: np.array(values, np.int16)[:, None] for name, values in chosen.items()},
        {s.name: np.ones((4, 1), np.float16) for s in sites},
        (TraceImage(b"x", 1, 1),),
    )


def test_load_bars_of_a_layer_sum_to_all_tokens(trace):
    figure = expert_load_figure(trace, trace.sites, "mlp")
    heights = np.array([bar.y for bar in figure.data])
    np.testing.assert_allclose(heights.sum(axis=0), 100)
    np.testing.assert_allclose(heights[:, 0], [25, 75, 0])


def test_modality_map_says_who_serves_the_picture(trace):
    heat = modality_share_figure(trace, trace.sites, "mlp").data[0]
    z = np.array(heat.z, float)
    np.testing.assert_allclose(z[:2, 0], [-100, 100])
    assert np.isnan(z[2, 0]), "an expert that the layer does not have is no square"
    np.testing.assert_allclose(z[:, 1], 0)


def test_a_map_of_small_differences_is_not_blown_up(trace):
    heat = modality_share_figure(trace, trace.sites[1:], "mlp").data[0]
    assert (heat.zmin, heat.zmax) == (-20, 20)


def test_the_second_view_of_the_map_is_within_an_expert(trace):
    within = modality_share_figure(trace, trace.sites, "mlp").layout.updatemenus[0].buttons[1].args[0]
    z = np.array(within["z"][0], float)
    np.testing.assert_allclose(z[:2, 0], [0, 100])
    assert z[2, 1] == 50, "all of the image and all of the text"
    assert np.isnan(z[0, 1]), "an expert that served nothing"
    assert (within["zmin"], within["zmax"]) == (0, 100)


def test_pathways_show_counted_steps_and_shared_ways(trace):
    figure = pathways_figure(trace, trace.sites, "mlp")
    assert "4 tokens, 2 ways, at most 3 alike" in figure.layout.title.text
    ways = [line for line in figure.data if line.hovertemplate and "took this way" in line.hovertemplate]
    assert len(ways) == 1, "the way of one token alone is not a shared one"
    assert list(ways[0].y) == [1, 2] and ways[0].line.color.lower() in ("#d55e00", "rgb(213, 94, 0)")
    assert "3 tokens (75%)" in ways[0].hovertemplate
    steps = {line.line.color: line for line in figure.data if line.mode == "lines" and line.opacity and len(line.x)}
    assert np.round(steps["#0072B2"].y[:2]).tolist() == [0, 2] and np.round(steps["#D55E00"].y[:2]).tolist() == [1, 2]
    dots = figure.data[-1]
    assert len(dots.x) == 2 + 3, "no dot for an expert that the layer does not have"


def test_one_layer_has_no_pathways_and_says_so(trace):
    figure = pathways_figure(trace, trace.sites[:1], "mlp")
    assert not figure.data and figure.layout.title.text.startswith("Pathways · mlp<br>")
    assert figure.layout.title.text.count("one layer has such routers")
    assert figure.layout.xaxis.visible is False and figure.layout.yaxis.visible is False


def test_layers_between_the_routers_are_not_named(trace):
    sparse = [replace(site, layer_idx=4 * site.layer_idx) for site in trace.sites]
    for draw in (expert_load_figure, modality_share_figure):
        assert draw(trace, sparse, "mlp").layout.xaxis.tickvals == (0, 4)
    assert pathways_figure(trace, sparse, "mlp").layout.xaxis.ticktext == ("0", "4")


@pytest.mark.parametrize("draw", [expert_load_figure, modality_share_figure, pathways_figure])
def test_many_experts_neither_grow_a_figure_nor_fill_it_with_names(draw):
    trace = large_trace(experts=128, layers=4, grid=4, words=40)
    figure = draw(trace, trace.sites, "mlp")
    assert figure.layout.height < 800
    assert sum(one.showlegend is not False for one in figure.data if one.name) == 0
    assert len(figure.layout.yaxis.tickvals or ()) < 16


def test_the_load_of_many_experts_is_a_map_of_the_same_shares():
    trace = large_trace(experts=128, layers=4, grid=4, words=40)
    (heat,) = expert_load_figure(trace, trace.sites, "mlp").data
    np.testing.assert_allclose(np.asarray(heat.z, float), 100 * load_table(trace, trace.sites).T)


def hovers(figure) -> set[str]:
    """Where the figure says that something is, wherever one points at it."""
    said = [one.text if one.text is not None else one.customdata for one in figure.data if "%{" in one.hovertemplate]
    return {str(place) for places in said for place in np.ravel(np.asarray(places, dtype=object))}


@pytest.mark.parametrize("draw", [expert_load_figure, modality_share_figure])
@pytest.mark.parametrize(
    ("block", "tick", "hover"),
    [("model", "all", "whole model"), ("connector", "connector", "connector"), ("vision", "vision", "vision")],
)
def test_a_router_beside_the_layers_is_no_layer_below_zero(trace, draw, block, tick, hover):
    beside = [replace(trace.sites[0], layer_idx=-1, block=block)]
    figure = draw(trace, beside, block)
    assert figure.layout.xaxis.ticktext == (tick,) and hovers(figure) == {hover}
    assert not any("layer" in (one.hovertemplate or "") for one in figure.data)


@pytest.mark.parametrize("draw", [expert_load_figure, modality_share_figure])
def test_a_hover_names_the_layer(trace, draw):
    assert hovers(draw(trace, trace.sites, "mlp")) == {"layer 0", "layer 1"}


def test_the_hover_of_many_experts_and_of_pathways_names_where_a_router_stands():
    trace = large_trace(experts=128, layers=2, grid=2, words=20)
    beside = [replace(trace.sites[0], layer_idx=-1, block="model"), trace.sites[1]]
    assert hovers(expert_load_figure(trace, beside, "mlp")) == {"whole model", "layer 1"}
    dots = pathways_figure(trace, beside, "mlp").data[-1]
    assert {place for place, *_ in dots.customdata} == {"whole model", "layer 1"}
    assert dots.hovertemplate.startswith("%{customdata[0]}, expert")
