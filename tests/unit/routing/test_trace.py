"""A RoutingTrace holds no hole, comes back from its file unchanged, and a file that is not one says why."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mllm_demo.errors import TraceError
from mllm_demo.routing.trace import RoutingTrace, Site, Token, TraceImage

SITES = (
    Site("layers.0.attention", 0, "attention", 4, 1),
    Site("layers.1.mlp", 1, "mlp", 3, 2, granularity="sequence", has_shared_expert=True),
    Site("layers.0.mlp", 0, "mlp", 3, 2),
)
TOKENS = (
    Token(5, "<s>", "special", "system", "prefill"),
    Token(9, "<image>", "image", "user", "prefill", image_index=0, box=(0.0, 0.0, 10.5, 20.25)),
    Token(9, "<image>", "image", "user", "prefill", image_index=0),
    Token(11, " caf\u00e9 \ud83d", "text", "user", "prefill"),
    Token(12, "\u65e5", "text", "assistant", "decode"),
)


def make(**changes) -> RoutingTrace:
    generator = np.random.default_rng(0)
    probs, selected, weights = {}, {}, {}
    for site in SITES:
        raw = generator.random((len(TOKENS), site.num_experts))
        probs[site.name] = (raw / raw.sum(1, keepdims=True)).astype(np.float16)
        order = np.argsort(-probs[site.name], axis=1)[:, : site.num_experts_per_tok]
        selected[site.name] = order.astype(np.int16)
        weights[site.name] = np.take_along_axis(probs[site.name], order, axis=1)
    values = {
        "tokens": TOKENS,
        "sites": SITES,
        "router_probs": probs,
        "selected_experts": selected,
        "routing_weights": weights,
        "images": (TraceImage(b"\x89PNG bytes", 21, 40),),
        "provenance": {"base": "a/b", "sampling": {"seed": 3, "temperature": 0.5}, "messages": ["hi", None]},
    }
    return RoutingTrace(**{**values, **changes})


@pytest.fixture
def file(tmp_path):
    return make().save(tmp_path / "trace.safetensors")


def rewrite(file, header_changes=(), arrays=(), drop=()):
    """The same file with other header entries or arrays."""
    with safe_open(file, framework="np") as opened:
        header = {**opened.metadata(), **dict(header_changes)}
        kept = {key: opened.get_tensor(key) for key in opened.keys() if key not in drop}
    header = {key: value for key, value in header.items() if value is not None}
    save_file({**kept, **dict(arrays)}, file, metadata=header)
    return file


def test_a_trace_comes_back_from_its_file_unchanged(file):
    loaded = RoutingTrace.load(file)
    assert loaded.equals(make())
    assert loaded.tokens == TOKENS and loaded.sites == SITES and loaded.images == make().images
    assert loaded.provenance == make().provenance
    for site in SITES:
        assert np.array_equal(loaded.router_probs[site.name], make().router_probs[site.name])
    assert loaded.save(file).read_bytes() == file.read_bytes()


def test_which_frame_of_a_moving_picture_an_image_is_comes_back_too(tmp_path):
    image = TraceImage(b"\x89PNG bytes", 21, 40, "frame 2 of 4, 0.8 s")
    assert RoutingTrace.load(make(images=(image,)).save(tmp_path / "t.safetensors")).images == (image,)


def test_a_file_from_before_images_had_labels_is_read(file):
    with safe_open(file, framework="np") as opened:
        header = dict(opened.metadata())
        arrays = {key: opened.get_tensor(key) for key in opened.keys()}
    del header["image_labels"]
    save_file(arrays, file, metadata=header)
    assert RoutingTrace.load(file).equals(make())


def test_a_difference_of_one_bit_is_noticed():
    other = {name: array.copy() for name, array in make().router_probs.items()}
    array = other["layers.1.mlp"]
    array[4, 2] = np.nextafter(array[4, 2], np.float16(0))
    assert make().equals(make())
    assert not make(router_probs=other).equals(make())
    assert not make(provenance={}).equals(make())


def test_saving_replaces_a_file_whole_and_leaves_nothing_beside_it(file):
    make(provenance={"second": True}).save(file)
    assert RoutingTrace.load(file).provenance == {"second": True}
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_trace_that_cannot_be_written_says_so_and_leaves_nothing(tmp_path):
    with pytest.raises(TraceError, match="could not be written"):
        make().save(tmp_path / "no such folder" / "trace.safetensors")
    with pytest.raises(TraceError, match=r"provenance .* cannot be written as JSON"):
        make(provenance={"when": object()}).save(tmp_path / "trace.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_arrays_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        make().router_probs["layers.0.mlp"][0, 0] = 0


def test_questions_a_figure_asks():
    trace = make()
    assert trace.num_layers == 2
    assert trace.site("layers.1.mlp") == SITES[1]
    assert [site.name for site in trace.sites_of_block("mlp")] == ["layers.0.mlp", "layers.1.mlp"]
    assert trace.sites_of_block("vision") == ()
    assert trace.token_indices("image").tolist() == [1, 2]
    with pytest.raises(TraceError, match="no router 'x'"):
        trace.site("x")


def changed(kind, position, value):
    arrays = {name: array.copy() for name, array in getattr(make(), kind).items()}
    arrays["layers.1.mlp"][position] = value
    return {kind: arrays}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            changed("router_probs", 3, np.nan),
            "router_probs of router 'layers.1.mlp' has a hole at position 3",
        ),
        (changed("router_probs", 3, -0.5), "hole at position 3"),
        (changed("router_probs", 3, 1.5), "hole at position 3"),
        (changed("selected_experts", 2, -1), "selected_experts .* 'layers.1.mlp' has a hole at position 2"),
        (changed("selected_experts", 2, 3), "hole at position 2"),
        (changed("routing_weights", 4, np.inf), "hole at position 4"),
        ({"tokens": TOKENS[:-1]}, r"is float16 \[5, 4\], expected float16 \[4, 4\]"),
        ({"sites": SITES[:2]}, "not a router of this trace"),
        ({"sites": SITES + SITES[:1]}, "two routers of the same name"),
        ({"sites": ()}, "at least one router"),
        ({"images": ()}, "token 1 is of image 0, the trace has 0 images"),
        ({"routing_weights": {}}, "routing_weights of router 'layers.0.attention' is missing"),
        (
            {"router_probs": {name: array.astype(np.float32) for name, array in make().router_probs.items()}},
            r"is float32 .* expected float16",
        ),
    ],
)
def test_a_trace_with_a_hole_cannot_be_made(changes, message):
    with pytest.raises(TraceError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"modality": "sound"},
        {"role": "robot"},
        {"phase": "later"},
        {"id": -1},
        {"text": None},
        {"box": (0, 0, 5, 5)},
        {"modality": "image", "image_index": 0, "box": (5, 0, 5, 5)},
        {"modality": "image", "image_index": 0, "box": (0, 0, float("nan"), 5)},
    ],
)
def test_a_token_that_makes_no_sense_cannot_be_made(wrong):
    with pytest.raises(TraceError):
        dataclasses.replace(TOKENS[3], **wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"block": "head"}, {"num_experts": 0}, {"num_experts_per_tok": 5}, {"name": ""}, {"layer_idx": -2}],
)
def test_a_site_that_makes_no_sense_cannot_be_made(wrong):
    with pytest.raises(TraceError):
        dataclasses.replace(SITES[0], **wrong)


def truncated(file):
    file.write_bytes(file.read_bytes()[:-10])


def noise(file):
    file.write_bytes(np.random.default_rng(1).bytes(4000))


def foreign(file):
    save_file({"weight": np.zeros(3)}, file)


def sparse_giant(file):
    with file.open("r+b") as opened:
        opened.truncate(2 << 30)


def long_tokens(file):
    with safe_open(file, framework="np") as opened:
        tokens = json.loads(opened.metadata()["tokens"])
    rewrite(file, {"tokens": json.dumps(tokens * 2)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "not a readable routing trace"),
        (noise, "not a readable routing trace"),
        (lambda file: file.write_bytes(b""), "not a readable routing trace"),
        (foreign, "not a routing trace"),
        (sparse_giant, "larger than 1024 MiB"),
        (lambda file: file.unlink(), "there is no file"),
        (lambda file: (file.unlink(), file.mkdir()), "is not a file"),
        (lambda file: rewrite(file, {"version": "2"}), "of version 2; this program reads 1"),
        (lambda file: rewrite(file, {"tokens": None}), "not a readable routing trace"),
        (lambda file: rewrite(file, {"tokens": "[" * 200_000}), "not a readable routing trace"),
        (lambda file: rewrite(file, {"tokens": "[[1, 2]]"}), "not a readable routing trace"),
        (lambda file: rewrite(file, {"sites": '{"a": 1}'}), "not a readable routing trace"),
        (lambda file: rewrite(file, {"images": "[[0, 4]]"}), "cannot be 0 x 4 pixels"),
        (lambda file: rewrite(file, {"provenance": "[]"}), "provenance is not a table"),
        (lambda file: rewrite(file, {"image_labels": '["", ""]'}), "not a readable routing trace"),
        (lambda file: rewrite(file, {"image_labels": "[7]"}), "label must be a string, not 7"),
        (long_tokens, r"expected float16 \[10, 4\]"),
        (lambda file: rewrite(file, drop=["router_probs/layers.0.mlp"]), "lacks 'router_probs/layers.0.mlp'"),
        (lambda file: rewrite(file, arrays={"x": np.zeros(1)}), "holds an unknown entry 'x'"),
        (lambda file: rewrite(file, arrays={"images/0": np.zeros(4)}), "image 0 is not stored as bytes"),
        (
            lambda file: rewrite(file, arrays={"router_probs/layers.0.mlp": np.zeros((5, 2), np.float16)}),
            r"router_probs of router 'layers.0.mlp' is float16 \[5, 2\], expected float16 \[5, 3\]",
        ),
    ],
)
def test_a_file_that_is_not_a_trace_says_what_is_wrong(file, damage, message):
    damage(file)
    with pytest.raises(TraceError, match=message) as caught:
        RoutingTrace.load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_trace_is_read_without_torch():
    code = "import sys, mllm_demo.routing.trace, mllm_demo.routing.stats; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
