"""How far two traces differ equals counting token by token, and a trace does not differ from itself."""

import numpy as np
import pytest

from mllm_demo.errors import TraceError
from mllm_demo.routing.divergence import divergence, merged
from mllm_demo.routing.trace import RoutingTrace, Site, Token

SITES = (Site("layers.0.mlp", 0, "mlp", 4, 2), Site("layers.1.mlp", 1, "mlp", 3, 1))


def trace(seed: int, tokens: int = 40, first_id: int = 0, sites=SITES) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    probs, selected, weights = {}, {}, {}
    for site in sites:
        rows = rng.dirichlet(np.ones(site.num_experts), tokens).astype(np.float16)
        order = np.argsort(-rows, axis=1)[:, : site.num_experts_per_tok]
        probs[site.name], selected[site.name] = rows, order.astype(np.int16)
        weights[site.name] = np.take_along_axis(rows, order, 1)
    said = [Token(first_id + i, "x", "text", "user", "prefill") for i in range(tokens)]
    return RoutingTrace(said, sites, probs, selected, weights)


def test_it_equals_counting_token_by_token():
    before, after = trace(0), trace(1)
    for row in divergence(before, after):
        name, distances, first, sets = row.site.name, [], 0, 0
        for t in range(40):
            p, q = before.router_probs[name][t], after.router_probs[name][t]
            distances.append(sum(abs(float(a) - float(b)) for a, b in zip(p, q, strict=True)) / 2)
            old, new = before.selected_experts[name][t].tolist(), after.selected_experts[name][t].tolist()
            first, sets = first + (old[0] != new[0]), sets + (set(old) != set(new))
        assert (row.first_changed, row.set_changed) == (first / 40, sets / 40) and 0 < first < 40
        assert row.variation == pytest.approx(np.mean(distances)) and row.largest == pytest.approx(max(distances))


def test_nothing_differs_from_itself():
    for row in divergence(trace(0), trace(0)):
        assert row[2:] == (0, 0, 0, 0)


def test_prompts_are_put_together_by_their_tokens():
    pairs = [divergence(trace(0), trace(1)), divergence(trace(2, 10), trace(3, 10))]
    for row, long, short in zip(merged(pairs), *pairs, strict=True):
        assert row.tokens == 50 and row.largest == max(long.largest, short.largest)
        assert row.variation == pytest.approx(0.8 * long.variation + 0.2 * short.variation)


def test_other_tokens_or_routers_are_refused_in_a_sentence():
    with pytest.raises(TraceError, match="different tokens"):
        divergence(trace(0), trace(0, first_id=5))
    with pytest.raises(TraceError, match="different routers"):
        divergence(trace(0), trace(0, sites=SITES[:1]))
