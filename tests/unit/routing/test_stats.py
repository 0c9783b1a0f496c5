"""Numbers of a trace equal what counting by hand gives."""

import numpy as np
import pytest

from mllm_demo.routing import stats
from mllm_demo.routing.trace import RoutingTrace, Site, Token, TraceImage

ATTENTION = tuple(Site(f"layers.{layer}.attn.o", layer, "attention", 4, 1) for layer in (0, 1))
MLP = tuple(
    Site(f"layers.{layer}.mlp.{name}", layer, "mlp", 3, 2) for layer in (1, 0) for name in ("up", "down")
)
MODEL = Site("router", -1, "model", 1, 1)
MODALITIES = ("special", "image", "image", "image", "text", "text")


@pytest.fixture
def trace() -> RoutingTrace:
    generator = np.random.default_rng(7)
    sites = (*ATTENTION, *MLP, MODEL)
    probs, selected, weights = {}, {}, {}
    for site in sites:
        raw = generator.dirichlet(np.ones(site.num_experts), len(MODALITIES)).astype(np.float16)
        order = np.argsort(-raw, axis=1)[:, : site.num_experts_per_tok]
        probs[site.name], selected[site.name] = raw, order.astype(np.int16)
        weights[site.name] = np.take_along_axis(raw, order, 1)
    name = ATTENTION[0].name
    probs[name][:] = [[1, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    selected[name][:, 0] = [0, 0, 0, 1, 3, 3]
    weights[name][:, 0] = [1, 0.25, 0.5, 1, 1, 1]
    tokens = [
        Token(1, "x", modality, "user", "prefill", image_index=0 if modality == "image" else None)
        for modality in MODALITIES
    ]
    return RoutingTrace(tokens, sites, probs, selected, weights, images=(TraceImage(b"x", 1, 1),))


def test_load_is_the_share_of_tokens(trace):
    assert stats.expert_load(trace, ATTENTION[0]).tolist() == pytest.approx([3 / 6, 1 / 6, 0, 2 / 6])
    assert stats.expert_load(trace, ATTENTION[0], np.array([], dtype=int)).tolist() == [0, 0, 0, 0]


def test_load_by_modality_counts_only_that_modality(trace):
    load = stats.load_by_modality(trace, ATTENTION[0])
    assert load["image"].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert load["text"].tolist() == [0, 0, 0, 1]
    assert load["special"].tolist() == [1, 0, 0, 0]


def test_modality_share_within_each_expert(trace):
    share = stats.modality_share(trace, ATTENTION[0])
    assert share.tolist() == [
        pytest.approx(row) for row in ([2 / 3, 0, 1 / 3], [1, 0, 0], [0, 0, 0], [0, 1, 0])
    ]


def test_load_with_two_experts_per_token_still_sums_to_one(trace):
    expected = np.zeros(3)
    for row in trace.selected_experts[MLP[0].name]:
        for expert in row:
            expected[expert] += 1 / (2 * len(MODALITIES))
    assert stats.expert_load(trace, MLP[0]) == pytest.approx(expected)


def test_entropy_is_zero_when_certain_and_one_when_uniform(trace):
    assert stats.entropy(trace, ATTENTION[0]).tolist() == pytest.approx([0, 1, 0.5, 0, 0, 0])
    assert stats.entropy(trace, MODEL).tolist() == [0] * 6
    probs = trace.router_probs[MLP[0].name].astype(float)
    by_hand = [-sum(p * np.log(p) for p in row / row.sum() if p > 0) / np.log(3) for row in probs]
    assert stats.entropy(trace, MLP[0]) == pytest.approx(by_hand, abs=1e-5)


def test_a_block_becomes_a_table_of_tokens_by_layers(trace):
    table = stats.layer_table(trace, "attention")
    assert table.layer_idx.tolist() == [0, 1] and table.sites == ATTENTION
    assert table.expert[:, 0].tolist() == [0, 0, 0, 1, 3, 3]
    assert table.weight[:, 0].tolist() == [1, 0.25, 0.5, 1, 1, 1]
    assert table.entropy[:, 1] == pytest.approx(stats.entropy(trace, ATTENTION[1]))
    assert table.expert[:, 1].tolist() == trace.selected_experts[ATTENTION[1].name][:, 0].tolist()


def test_several_routers_of_a_layer_have_columns_of_their_own(trace):
    assert stats.layer_table(trace, "mlp").layer_idx.tolist() == [0, 0, 1, 1]
    assert stats.layer_table(trace, "vision").expert.shape == (6, 0)


def test_groups_hold_the_same_part_of_every_layer(trace):
    groups = stats.site_groups(trace)
    assert list(groups) == ["layers.*.attn.o", "layers.*.mlp.up", "layers.*.mlp.down", "router"]
    assert [site.layer_idx for site in groups["layers.*.mlp.up"]] == [0, 1]
    assert groups["router"] == (MODEL,)


def test_loads_of_several_routers_stand_side_by_side(trace):
    table = stats.load_table(trace, (ATTENTION[0], MLP[0]))
    assert table.shape == (2, 4)
    assert table[0] == pytest.approx(stats.expert_load(trace, ATTENTION[0]))
    assert np.isnan(table[1, 3]) and table[1, :3].sum() == pytest.approx(1)


def routed(choices: list[list[int]], weights: list[list[float]] | None = None, experts: int = 3) -> RoutingTrace:
    """`choices`: [tokens][routers], one expert each, or with two weights the two experts 0 and 1 of every router."""
    k = 2 if weights else 1
    sites = tuple(Site(f"l.{layer}.mlp", layer, "mlp", experts, k) for layer in range(len(choices[0])))
    tokens = [Token(1, "x", m, "user", "prefill", 0 if m == "image" else None) for m in MODALITIES[: len(choices)]]
    selected, weighed = {}, {}
    for column, site in enumerate(sites):
        first = np.array([row[column] for row in choices], np.int16)[:, None]
        selected[site.name] = np.concatenate((first, 1 - first), 1) if weights else first
        weighed[site.name] = np.array(weights, np.float16) if weights else np.ones((len(choices), 1), np.float16)
    probs = {site.name: np.full((len(tokens), experts), 1 / experts, np.float16) for site in sites}
    return RoutingTrace(tokens, sites, probs, selected, weighed, images=(TraceImage(b"x", 1, 1),))


def test_pathways_are_counted():
    trace = routed([[0, 1, 2], [2, 1, 0], [2, 1, 0], [0, 1, 2], [2, 1, 0], [0, 0, 0]])
    ways = stats.token_pathways(trace, trace.sites)
    assert ways.paths.tolist() == [[2, 1, 0], [0, 1, 2], [0, 0, 0]]
    assert ways.counts.tolist() == [3, 2, 1]
    # MODALITIES: special, three image, two text.
    assert ways.image_share.tolist() == pytest.approx([2 / 3, 1 / 2, 0])
    assert ways.nodes.tolist() == [[3, 0, 3], [1, 5, 0], [4, 0, 2]]
    assert ways.flows.tolist() == [[[1, 2, 0], [0, 0, 0], [0, 3, 0]], [[1, 0, 0], [3, 0, 2], [0, 0, 0]]]


def test_pathways_of_some_tokens():
    trace = routed([[0, 1], [2, 1], [2, 1], [0, 1]])
    ways = stats.token_pathways(trace, trace.sites, np.array([1, 3]))
    assert sorted(map(tuple, ways.paths.tolist())) == [(0, 1), (2, 1)] and ways.counts.tolist() == [1, 1]
    assert ways.image_share.tolist() == [1, 1] and ways.flows.sum() == 2
    nothing = stats.token_pathways(trace, trace.sites, np.array([], dtype=int))
    assert nothing.counts.tolist() == [] and nothing.flows.sum() == 0


def test_a_pathway_goes_by_the_expert_that_weighed_most():
    """A first choice that was dropped weighs nothing: the second one served the token."""
    trace = routed([[0, 1], [0, 1]], weights=[[0.7, 0.3], [0.0, 1.0]], experts=2)
    ways = stats.token_pathways(trace, trace.sites)
    assert sorted(map(tuple, ways.paths.tolist())) == [(0, 1), (1, 0)]
