"""The payload carries a trace to the page without loss that a person could see, and grows by what is new."""

import base64
import json

import numpy as np
import pytest

from mllm_demo.figures.payload import NEXT_BEST, PayloadStream, empty_payload, router_kinds
from mllm_demo.routing.trace import RoutingTrace, Site, Token, TraceImage
from tests.large_trace import large_trace

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def make_trace(words, *, granularity="token", image=True, experts=4, k=2, png=PNG):
    tokens = [Token(1, "<s>", "special", "system", "prefill")]
    if image:
        tokens.append(Token(9, "<image>", "image", "user", "prefill", 0, (0.0, 0.0, 4.0, 4.0)))
        tokens.append(Token(9, "<row>", "image", "user", "prefill", 0, None))
    tokens += [Token(2, word, "text", "assistant", "decode") for word in words]
    sites = [Site(f"m.layers.{i}.mlp", i, "mlp", experts, k, granularity) for i in (0, 1)]
    rng = np.random.default_rng(3)
    # Drawn position by position, so that a longer trace begins like a shorter one.
    probs = {s.name: np.array([rng.dirichlet(np.ones(experts)) for _ in range(64)])[: len(tokens)] for s in sites}
    order = {name: np.argsort(-p, axis=1)[:, :k] for name, p in probs.items()}
    return RoutingTrace(
        tuple(tokens),
        tuple(sites),
        {name: p.astype(np.float16) for name, p in probs.items()},
        {name: o.astype(np.int16) for name, o in order.items()},
        {name: np.take_along_axis(p, order[name], 1).astype(np.float16) for name, p in probs.items()},
        (TraceImage(png, 4, 4),) if image else (),
    )


def decoded(payload, site, column, dtype, width):
    rows = [np.frombuffer(base64.b64decode(part[column][site]), dtype) for part in payload["parts"]]
    return np.concatenate(rows).reshape(-1, width)


def test_every_number_arrives_within_what_eyes_can_tell():
    trace = make_trace([" a", " b"])
    payload = json.loads(json.dumps(PayloadStream().update(trace, live=False)))
    for index, site in enumerate(trace.sites):
        np.testing.assert_allclose(
            decoded(payload, index, "probs", "<u2", 4) / 65535, trace.router_probs[site.name], atol=1e-5
        )
        np.testing.assert_array_equal(decoded(payload, index, "selected", "<u2", 2), trace.selected_experts[site.name])
        np.testing.assert_array_equal(
            decoded(payload, index, "weights", "<f4", 2), trace.routing_weights[site.name].astype(np.float32)
        )


def test_tokens_keep_text_kind_and_place():
    (part,) = PayloadStream().update(make_trace([" cat"]), live=False)["parts"]
    assert part["text"] == ["<s>", "<image>", "<row>", " cat"]
    assert (part["modality"], part["role"], part["phase"]) == ("siit", "yuua", "pppd")
    assert part["places"] == [[1, 0, 0.0, 0.0, 4.0, 4.0], [2, 0]]


def test_a_growing_trace_only_appends():
    stream = PayloadStream()
    first = stream.update(make_trace([" a"]), live=True)
    second = stream.update(make_trace([" a", " b", " c"]), live=True)
    assert second["key"] == first["key"]
    assert second["parts"][: len(first["parts"])] == first["parts"]
    assert second["parts"][-1]["text"] == [" b", " c"]


def test_nothing_new_adds_nothing():
    stream = PayloadStream()
    first = stream.update(make_trace([" a"]), live=True)
    assert stream.update(make_trace([" a"]), live=False)["parts"] == first["parts"]


def test_text_that_changes_at_the_end_is_sent_again_under_the_same_key():
    stream = PayloadStream()
    stream.update(make_trace([" a"]), live=True)
    before = stream.update(make_trace([" a", "\ufffd"]), live=True)
    after = stream.update(make_trace([" a", "é", " c"]), live=True)
    assert after["key"] == before["key"]
    assert [word for part in after["parts"] for word in part["text"]][-3:] == [" a", "é", " c"]
    assert after["parts"][-1]["id"] != before["parts"][-1]["id"]


def test_another_conversation_starts_over():
    stream = PayloadStream()
    first = stream.update(make_trace([" a"]), live=False)
    second = stream.update(make_trace([" a"], image=False), live=False)
    assert second["key"] != first["key"]
    assert len(second["parts"]) == 1


def test_a_choice_for_the_whole_sequence_is_a_row_for_the_prompt_and_one_for_the_answer():
    stream = PayloadStream()
    prompt = make_trace([], granularity="sequence")
    assert decoded(stream.update(prompt, live=True), 0, "probs", "<u2", 4).shape == (1, 4)
    stream.update(make_trace([" a"], granularity="sequence"), live=True)
    whole = make_trace([" a", " b"], granularity="sequence")
    payload = stream.update(whole, live=False)
    assert payload["sites"][0]["granularity"] == "sequence"
    rows = decoded(payload, 0, "probs", "<u2", 4)
    expected = whole.router_probs[whole.sites[0].name].astype(np.float32)
    first = next(index for index, token in enumerate(whole.tokens) if token.phase == "decode")
    assert rows.shape == (2, 4)
    np.testing.assert_allclose(rows / 65535, expected[[0, first]], atol=1e-3)


def test_a_picture_that_cannot_be_read_becomes_a_blank_of_its_size():
    payload = PayloadStream("file").update(make_trace([" a"], png=b"not a picture"), live=False)
    assert payload["images"] == [{"src": "", "width": 4, "height": 4, "label": ""}]


def test_a_picture_travels_as_a_data_url():
    payload = PayloadStream().update(make_trace([" a"]), live=False)
    assert payload["images"][0]["src"].startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["m.layers.{}.mlp", "m.layers.{}.self_attn"], ["mlp", "attention"]),
        (["m.layers.{}.mlp.up_proj", "m.layers.{}.mlp.down_proj"], ["mlp · up_proj", "mlp · down_proj"]),
    ],
)
def test_routers_of_one_job_are_offered_once_with_their_layers_in_order(names, labels):
    blocks = ["attention" if "attn" in name else "mlp" for name in names]
    sites = [Site(name.format(i), i, block, 2, 1) for i in (1, 0) for name, block in zip(names, blocks, strict=True)]
    token = (Token(1, "a", "text", "user", "prefill"),)
    half = {s.name: np.full((1, 2), 0.5, np.float16) for s in sites}
    trace = RoutingTrace(
        token,
        tuple(sites),
        half,
        {s.name: np.zeros((1, 1), np.int16) for s in sites},
        {s.name: np.ones((1, 1), np.float16) for s in sites},
    )
    kinds = router_kinds(trace)
    assert [kind["label"] for kind in kinds] == labels
    assert all([sites[i].layer_idx for i in kind["sites"]] == [0, 1] for kind in kinds)


def test_no_routing_is_a_sentence():
    assert empty_payload("why") == {"empty": "why"}


def test_of_many_experts_the_chosen_and_the_next_best_are_named_and_the_rest_is_summed():
    trace = make_trace([" a", " b"], experts=128, k=8)
    payload = json.loads(json.dumps(PayloadStream().update(trace, live=False)))
    for index, site in enumerate(trace.sites):
        listed = payload["sites"][index]["listed"]
        assert listed == 8 + NEXT_BEST
        probs = trace.router_probs[site.name].astype(np.float32)
        numbers = decoded(payload, index, "selected", "<u2", listed)
        named = decoded(payload, index, "probs", "<u2", listed) / 65535
        rest, entropy = decoded(payload, index, "rest", "<f4", 2).T
        np.testing.assert_array_equal(numbers[:, :8], trace.selected_experts[site.name])
        assert all(len(set(row)) == listed for row in numbers.tolist())
        np.testing.assert_allclose(named, np.take_along_axis(probs, numbers.astype(int), 1), atol=1e-5)
        for row, chosen in zip(probs, numbers, strict=True):
            assert row[chosen[8:]].min() >= np.delete(row, chosen).max(), "a stronger one was left out"
        np.testing.assert_allclose(named.sum(1) + rest, probs.sum(1), atol=1e-4)
        share = probs / probs.sum(1, keepdims=True)
        nats = -np.where(share > 0, share * np.log(np.maximum(share, 1e-12)), 0).sum(1)
        np.testing.assert_allclose(entropy, nats / np.log(128), atol=1e-4)


def test_a_thousand_tokens_of_a_large_mixture_weigh_less_than_six_megabytes():
    trace = large_trace(experts=128, k=8, layers=48)
    stream = PayloadStream("file")
    weight = len(json.dumps(stream.update(trace, live=False)))
    assert len(trace.tokens) > 1000
    assert weight < 6e6
    assert stream.num_bytes < weight
