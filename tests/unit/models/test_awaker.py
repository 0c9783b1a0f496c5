"""An original Awaker2.5-VL checkpoint becomes base and adapter: whole, resumable, or refused by a tensor's name."""

import json
import math
import re
import shutil
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLConfig

from mllm_demo import ask, cli
from mllm_demo.errors import CheckpointError, DemoError
from mllm_demo.models import catalog, fetching, loading
from mllm_demo.models import sizes as foreseen
from mllm_demo.models.checkpoints import awaker, streaming
from mllm_demo.models.checkpoints.awaker_layout import Mixture, expected_keys
from mllm_demo.models.checkpoints.source import Source
from mllm_demo.moe_lora.four_bit import is_four_bit
from mllm_demo.routing.trace import RoutingTrace
from mllm_demo.settings import ModelChoice
from tests.unit.models import tiny_awaker

PATTERNS = Path(__file__).parents[2] / "parity" / "cases" / "awaker" / "real_key_patterns.json"


def quiet(step) -> None:
    pass


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return tiny_awaker.save(tmp_path_factory.mktemp("original") / "Awaker")


@pytest.fixture
def another(original, tmp_path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(original, tmp_path / "Another"))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def published() -> tuple[Qwen2VLConfig, dict]:
    """The 7B base by the shapes that were recorded from it, and the recorded key patterns."""
    recorded = json.loads(PATTERNS.read_text())
    shapes = {name.removeprefix("base_model.model."): about["shape"] for name, about in recorded["patterns"].items()}
    layer = "model.layers.{i}."
    hidden = shapes["model.norm.weight"][0]
    head = 128
    vision = {
        "depth": recorded["patterns"]["base_model.model.visual.blocks.{i}.norm1.weight"]["count"],
        "embed_dim": shapes["visual.merger.ln_q.weight"][0],
        "hidden_size": hidden,
        "mlp_ratio": shapes["visual.blocks.{i}.mlp.fc1.weight"][0] // shapes["visual.merger.ln_q.weight"][0],
    }
    config = Qwen2VLConfig(
        vocab_size=shapes["lm_head.weight"][0],
        hidden_size=hidden,
        intermediate_size=shapes[f"{layer}mlp.gate_proj.weight"][0],
        num_hidden_layers=recorded["patterns"][f"base_model.model.{layer}input_layernorm.weight"]["count"],
        num_attention_heads=hidden // head,
        num_key_value_heads=shapes[f"{layer}self_attn.k_proj.weight"][0] // head,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        vision_config=vision,
    )
    return config, recorded


def test_the_published_checkpoint_has_exactly_the_expected_keys():
    config, recorded = published()
    mixture = Mixture(num_experts=4, shared=True, r=256, plain_r=256, lora_alpha=512, topk=1, temperature=1.0)
    expected = expected_keys(config, mixture)
    assert len(expected) == recorded["tensors"]
    assert sum(map(math.prod, expected.values())) == recorded["parameters"]

    def pattern(name: str) -> str:
        return re.sub(r"(layers|blocks)\.\d+\.", r"\1.{i}.", name)

    counts = Counter(map(pattern, expected))
    assert counts == {name: about["count"] for name, about in recorded["patterns"].items()}
    assert all(list(shape) == recorded["patterns"][pattern(name)]["shape"] for name, shape in expected.items())


@pytest.mark.parametrize(
    ("quantization", "expert_bytes", "expected_gb"),
    [
        ("nf4", catalog.NF4_BYTES_PER_WEIGHT, 7.7),
        ("nf4", 2, 11.7),
        ("int8", catalog.NF4_BYTES_PER_WEIGHT, 11.2),
        ("none", catalog.NF4_BYTES_PER_WEIGHT, 18.4),
        ("none", 2, 22.4),
    ],
)
def test_what_the_published_model_takes(quantization, expert_bytes, expected_gb):
    """GB of weights from shapes: base as estimated before loading, experts as held, plain LoRA in float32."""
    config, _ = published()
    mixture = Mixture(num_experts=4, shared=True, r=256, plain_r=256, lora_alpha=512, topk=1, temperature=1.0)
    sizes = {name: math.prod(shape) for name, shape in expected_keys(config, mixture).items()}
    experts = sum(size for name, size in sizes.items() if ".lora_moe_" in name)
    plain = sum(size for name, size in sizes.items() if ".lora_A." in name or ".lora_B." in name)
    shapes = foreseen.without_memory(config, torch.bfloat16)
    base = sum(part.bytes_held for part in foreseen.parts(shapes, quantization))
    weights_gb = (base + experts * expert_bytes + plain * 4) / 1e9
    assert weights_gb == pytest.approx(expected_gb, abs=0.05)
    if quantization == "nf4" and expert_bytes < 1:
        assert catalog.AWAKER.needs_gb == pytest.approx(catalog.needed(weights_gb * 1e9, 57e6) / 1e9, abs=0.5)


def test_base_and_adapter_hold_every_tensor_of_the_original(original, tmp_path):
    written = awaker.convert(original, tmp_path, quiet)
    source, base, adapter = Source(original), tensors_of(written.base), tensors_of(written.adapter)
    for name, tensor in base.items():
        assert torch.equal(tensor, source[f"base_model.model.{name}"].load())
    config = PeftConfig.from_pretrained(str(written.adapter))
    assert (config.num_experts, config.num_experts_per_tok, config.r, config.plain_r) == (4, 1, 4, 4)
    assert (config.lora_alpha, config.use_shared_expert, config.adapter_dtype) == (8, True, "model")
    theirs = "base_model.model.model.layers.1.mlp.down_proj.lora_moe_"
    ours = "base_model.model.model.language_model.layers.1.mlp.down_proj.lora_"
    for index, name in enumerate(("0", "1", "2", "3", "g")):
        block = slice(4 * index, 4 * index + 4)
        assert torch.equal(adapter[f"{ours}A"][block], source[f"{theirs}A.{name}.weight"].load())
        assert torch.equal(adapter[f"{ours}B"][:, block], source[f"{theirs}B.{name}.weight"].load())
    assert sum(t.numel() for t in (*base.values(), *adapter.values())) == sum(
        math.prod(entry.shape) for entry in source.values()
    )
    awaker.verify(tmp_path, quiet)


@pytest.mark.parametrize(("experts", "shared"), [(1, True), (1, False), (6, True), (3, False)])
def test_experts_are_counted_in_the_weights(experts, shared, tmp_path):
    folder = tiny_awaker.save(tmp_path / "Awaker", experts=experts, shared=shared, r=2, dtype=torch.bfloat16)
    written = awaker.convert(folder, tmp_path / "out", quiet)
    config = PeftConfig.from_pretrained(str(written.adapter))
    assert (config.num_experts, config.use_shared_expert, config.r) == (experts, shared, 2)
    # The original leaves a single adapter in float32.
    assert config.adapter_dtype == ("model" if experts + shared > 1 else "float32")
    dtypes = {name.rpartition(".")[2]: t.dtype for name, t in tensors_of(written.adapter).items() if "q_proj" in name}
    assert dtypes == {"lora_A": torch.float32, "lora_B": torch.float32}


def test_what_the_configuration_declares_is_kept(another, tmp_path):
    config = json.loads((another / "config.json").read_text())
    config["moe"] = {"lora_alpha": 24, "topk": 9, "gates_tmp": 0.5, "num_experts": 4}
    (another / "config.json").write_text(json.dumps(config))
    method = PeftConfig.from_pretrained(str(awaker.convert(another, tmp_path / "out", quiet).adapter))
    assert (method.lora_alpha, method.num_experts_per_tok, method.router_temperature) == (24, 4, 0.5)
    assert "moe" not in json.loads((tmp_path / "out" / "base" / "config.json").read_text())


def test_safetensors_in_shards_are_read_and_the_base_is_written_in_shards(original, tmp_path, monkeypatch):
    state = tiny_awaker.state_dict()
    folder = tiny_awaker.describe(tmp_path / "Sharded")
    names = sorted(state)
    half = len(names) // 2
    parts = {"model-1.safetensors": names[:half], "model-2.safetensors": names[half:]}
    for file, part in parts.items():
        save_file({name: state[name].contiguous() for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    monkeypatch.setattr(awaker, "SHARD_BYTES", 10**6)
    written = awaker.convert(folder, tmp_path / "out", quiet)
    assert len(list(written.base.glob("*.safetensors"))) > 1
    whole = awaker.convert(original, tmp_path / "whole", quiet)
    for ours, theirs in ((written.base, whole.base), (written.adapter, whole.adapter)):
        first, second = tensors_of(ours), tensors_of(theirs)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    loaded = loading.load(ModelChoice(str(written.base), str(written.adapter), "none", "cpu"), tmp_path, quiet)
    assert loaded.adapter_title == "adapter (MoE-LoRA, 4 experts, top-1, r=4)"


def test_a_base_that_is_already_there_is_not_written_again(original, another, tmp_path):
    whole = awaker.convert(original, tmp_path / "whole", quiet)
    written = awaker.convert(original, tmp_path / "out", quiet, base=whole.base, descriptions=whole.base)
    assert written.base is None and not (tmp_path / "out" / "base").exists()
    assert written.adapter_sha256 == whole.adapter_sha256
    other = tensors_of(whole.base)
    other["model.norm.weight"] = other["model.norm.weight"] + 1
    save_file(other, another / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds another model\.norm\.weight than the checkpoint"):
        awaker.convert(original, tmp_path / "third", quiet, base=another, descriptions=whole.base)


class Killed(BaseException):
    """Ends a run as a signal would: nothing is tidied up."""


@pytest.mark.parametrize("after", [1, 20, 58, 59, 60, 80])
def test_a_killed_run_goes_on_where_it_stopped(original, tmp_path, after):
    """58 tensors of the base, then the adapter's."""
    count = 0

    def kill(step) -> None:
        nonlocal count
        count += "Converting" in step.note
        if count == after:
            raise Killed

    with pytest.raises(Killed):
        awaker.convert(original, tmp_path / "killed", kill)
    assert not (tmp_path / "killed" / awaker.MANIFEST).exists()
    made = []
    entries = Source.__getitem__

    def counted(self, name):
        entry = entries(self, name)
        return type(entry)(entry.shape, entry.dtype, lambda: made.append(name) or entry.load())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "__getitem__", counted)
        resumed = awaker.convert(original, tmp_path / "killed", quiet)
    assert len(made) < len(Source(original)) - after + 6  # a stack of experts is one tensor made of five
    whole = awaker.convert(original, tmp_path / "whole", quiet)
    for ours, theirs in ((resumed.base, whole.base), (resumed.adapter, whole.adapter)):
        assert {f.name for f in ours.iterdir()} == {f.name for f in theirs.iterdir()}
        for file in theirs.iterdir():
            assert (ours / file.name).read_bytes() == file.read_bytes()
    awaker.verify(tmp_path / "killed", quiet)


def test_what_a_killed_run_left_is_checked_before_it_is_kept(original, tmp_path):
    def kill(step) -> None:
        if "Converting" in step.note and step.fraction > 0.3:
            raise Killed

    with pytest.raises(Killed):
        awaker.convert(original, tmp_path / "out", kill)
    part = next((tmp_path / "out" / "base").glob("*.part"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    awaker.convert(original, tmp_path / "out", quiet)
    whole = awaker.convert(original, tmp_path / "whole", quiet)
    assert (tmp_path / "out/base/model.safetensors").read_bytes() == (whole.base / "model.safetensors").read_bytes()


def test_a_changed_file_is_named(original, tmp_path):
    written = awaker.convert(original, tmp_path, quiet)
    file = written.adapter / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is not what was written"):
        awaker.verify(tmp_path, quiet)


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    alive: weakref.WeakSet = weakref.WeakSet()

    def load() -> torch.Tensor:
        assert not alive, "the tensor before is still held"
        tensor = torch.ones(1000)
        alive.add(tensor)
        return tensor

    pieces = [streaming.Piece(str(index), (1000,), torch.float32, load) for index in range(5)]
    streaming.write(tmp_path / "out.safetensors", pieces, lambda count: None)
    streaming.finish(tmp_path / "out.safetensors")
    assert all(torch.equal(tensor, torch.ones(1000)) for tensor in load_file(tmp_path / "out.safetensors").values())


# What is refused, and by which name


def spoil(folder: Path, change) -> None:
    state = tiny_awaker.state_dict()
    change(state)
    torch.save(state, folder / "pytorch_model.bin")


EXPERT = "base_model.model.model.layers.1.mlp.up_proj.lora_moe_B.2.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop(EXPERT), f"it lacks {EXPERT}"),
        (lambda state: state.update(foreign=torch.ones(1)), "no place for foreign"),
        (lambda state: state.update({EXPERT: torch.ones(2, 4)}), rf"{EXPERT} has shape \[2, 4\] where \[128, 4\]"),
        (lambda state: state.update(number=3), "number is no tensor"),
    ],
)
def test_a_foreign_checkpoint_is_refused_by_its_first_wrong_key(another, tmp_path, change, words):
    spoil(another, change)
    with pytest.raises(CheckpointError, match=words):
        awaker.convert(another, tmp_path / "out", quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.2, 0.6, 0.999])
@pytest.mark.parametrize("format", ["pickle", "safetensors"])
def test_a_cut_off_file_is_refused_by_the_first_tensor_that_is_not_whole(another, share, format):
    state = tiny_awaker.state_dict()
    file = another / "pytorch_model.bin"
    if format == "safetensors":
        file.unlink()
        file = another / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"is cut off: (base_model\.\S+) is not all there") as refused:
        Source(another)
    cut = re.search(r"cut off: (\S+)", str(refused.value))[1]
    assert cut in state
    if format == "pickle":  # written in the order of the state dict
        before = sum(tensor.nbytes for tensor in list(state.values())[: list(state).index(cut)])
        assert before <= len(data) * share <= before + state[cut].nbytes + len(data) * 0.05


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(100)])
def test_a_file_of_another_kind(another, content):
    (another / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a file of tensors"):
        awaker.convert(another, another / "out", quiet)


def test_a_pickle_that_would_run_code_is_refused(another):
    torch.save({"weight": Path("x")}, another / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is not a file of tensors"):
        Source(another)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"moe": {"num_experts": 5}}, "declares 5 experts, but the weights hold 4"),
        ({"model_type": "llava"}, "is of a llava model"),
        ({"vision_config": 3}, "cannot be used"),
    ],
)
def test_a_configuration_of_something_else(another, tmp_path, change, words):
    config = json.loads((another / "config.json").read_text())
    (another / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=words):
        awaker.convert(another, tmp_path / "out", quiet)


def test_a_disk_without_room(original, tmp_path, monkeypatch):
    monkeypatch.setattr(awaker.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(CheckpointError, match=r"Converting needs 0\.0 GB .* 0\.0 GB is free"):
        awaker.convert(original, tmp_path / "out", quiet)


# Loading by name


def choice(model: Path | str, **options) -> ModelChoice:
    return ModelChoice(str(model), quantization="none", device="cpu", **options)


def test_a_folder_is_converted_once(original, tmp_path):
    first = loading.load(choice(original), tmp_path, quiet)
    assert first.adapter_title == "Awaker experts (MoE-LoRA, 4 experts, top-1, r=4)"
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert len(times) == 2
    second = loading.load(choice(original), tmp_path, quiet)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == times
    assert second.adapter_revision == first.adapter_revision


def test_weights_alone_borrow_what_describes_the_base(original, tmp_path, monkeypatch):
    alone = tmp_path / "Awaker"
    alone.mkdir()
    shutil.copy(original / "pytorch_model.bin", alone)
    asked = []

    def fetch(name, cache_dir, progress):
        asked.append(name)
        return fetching.Files(original, "r")

    monkeypatch.setattr(fetching, "fetch_descriptions", fetch)
    assert loading.load(choice(alone), tmp_path / "cache", quiet).processor is not None
    assert asked == [catalog.AWAKER.described_by]


def test_the_preset_is_fetched_with_its_pickle(original, tmp_path, monkeypatch):
    asked = {}

    def download(name, allow_patterns, **options):
        asked[name] = allow_patterns
        return str(original)

    monkeypatch.setattr(fetching, "snapshot_download", download)
    loaded = loading.load(choice(catalog.AWAKER.name), tmp_path, quiet)
    assert loaded.title == catalog.AWAKER.title
    assert "pytorch_model*.bin" in asked[catalog.AWAKER.hub_id]
    assert "pytorch_model*.bin" not in asked[catalog.AWAKER.described_by]


def test_an_ordinary_pickled_checkpoint_is_still_refused(another):
    torch.save({"weight": torch.ones(1)}, another / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights are not read"):
        loading.load(choice(another), another, quiet)


def test_steady_keeps_the_prompts_gate(original, tmp_path):
    for gate, kept in (("original", "recomputed"), ("steady", "kept")):
        loaded = loading.load(choice(original, awaker_gate=gate), tmp_path, quiet)
        assert {router.decode_choice for router in loaded.model.base_model.routers()} == {kept}


@pytest.mark.parametrize(
    ("quantization", "wanted", "large", "packed"),
    [
        ("nf4", "auto", 1, True),
        ("nf4", "auto", 10**9, False),
        ("nf4", "none", 1, False),
        ("none", "auto", 1, False),
        ("none", "nf4", 10**9, True),
    ],
)
def test_large_experts_are_held_in_4_bit_beside_an_nf4_base(
    original, tmp_path, monkeypatch, quantization, wanted, large, packed
):
    monkeypatch.setattr(loading, "LARGE_EXPERTS_BYTES", large)
    asked = ModelChoice(str(original), None, quantization, "cpu", expert_quantization=wanted)
    loaded = loading.load(asked, tmp_path, quiet)
    held = [p for name, p in loaded.model.named_parameters() if re.search(r"o_proj\.lora_[AB]", name)]
    assert held and all(is_four_bit(parameter) == packed for parameter in held)
    plain = [p for name, p in loaded.model.named_parameters() if re.search(r"q_proj\.lora_[AB]", name)]
    assert plain and all(parameter.dtype == torch.float32 for parameter in plain)


# The commands of the README


@pytest.fixture
def start(monkeypatch, capsys):
    def start(main, *flags: str):
        monkeypatch.setattr(sys, "argv", ["program", *flags])
        status = cli.run(main)
        return status, *capsys.readouterr()

    return start


def test_one_command_answers_from_the_original(start, original, tmp_path):
    """python -m mllm_demo.ask --model FOLDER --image photo.png "What is in the picture?" """
    Image.effect_noise((80, 40), 80).convert("RGB").save(tmp_path / "photo.png")
    flags = ("--model", str(original), "--image", str(tmp_path / "photo.png"), "--cache-dir", str(tmp_path / "cache"))
    short = ("--device", "cpu", "--max-new-tokens", "3", "--trace", str(tmp_path / "t.safetensors"))
    status, out, err = start(ask.main, *flags, *short, "What is in the picture?")
    assert status == 0 and out and "tokens/s" in err, err
    trace = RoutingTrace.load(tmp_path / "t.safetensors")
    assert {site.granularity for site in trace.sites} == {"sequence"}
    prompt = sum(token.phase == "prefill" for token in trace.tokens)
    for site in trace.sites:
        rows = trace.router_probs[site.name]
        assert (rows[:prompt] == rows[0]).all() and (rows[prompt:] == rows[-1]).all()
    assert any((trace.router_probs[site.name][0] != trace.router_probs[site.name][-1]).any() for site in trace.sites)


def test_one_command_converts_and_says_how_to_load(start, original, tmp_path):
    """python -m mllm_demo.models.checkpoints.awaker FOLDER --out CONVERTED --verify"""
    status, out, err = start(awaker.main, str(original), "--out", str(tmp_path / "out"), "--verify")
    assert status == 0, err
    found = re.fullmatch(r"Load it with: --model (\S+) --adapter (\S+)\n", out)
    status, out, err = start(
        ask.main, "--model", found[1], "--adapter", found[2], "--device", "cpu", "--max-new-tokens", "2", "Hi?"
    )
    assert status == 0 and "tokens/s" in err, err
    status, out, err = start(awaker.main, str(tmp_path / "nothing"), "--out", str(tmp_path / "out"))
    assert (status, out) == (2, "") and "does not exist; check the path." in err


def test_a_refusal_is_one_sentence(another, tmp_path):
    spoil(another, lambda state: state.pop(EXPERT))
    with pytest.raises(DemoError) as refused:
        loading.load(choice(another), tmp_path, quiet)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value) and EXPERT in str(refused.value)
