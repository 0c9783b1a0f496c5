"""Any checkpoint of the kind loads in any quantization; whatever is wrong with it is said in one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from mllm_demo.errors import AdapterError, CheckpointError, DownloadError, LoadError, OutOfMemoryError
from mllm_demo.models import fetching, loading, memory
from mllm_demo.moe_lora import MoeLoraRouter
from mllm_demo.settings import ModelChoice


def choose(model, adapter=None, quantization="none", device="cpu") -> ModelChoice:
    return ModelChoice(str(model), str(adapter) if adapter else None, quantization, device)


def load(model, adapter=None, quantization="none", **options) -> loading.LoadedModel:
    return loading.load(choose(model, adapter, quantization, **options), None, lambda step: None)


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def ids(loaded) -> torch.Tensor:
    return loaded.processor.tokenizer("what is this", return_tensors="pt")["input_ids"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches for the hub fails, so what passes here works offline."""

    def refuse(*args, local_files_only=False, **kwargs):
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        raise ConnectionError("no network")

    monkeypatch.setattr(fetching, "snapshot_download", refuse)


# What loads


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
def test_every_quantization_loads_on_a_cpu_and_answers(checkpoint, quantization):
    loaded = load(checkpoint, quantization=quantization)
    with torch.inference_mode():
        logits = loaded.model(input_ids=ids(loaded)).logits
    assert torch.isfinite(logits).all()
    assert loaded.quantization == quantization
    assert (loaded.four_bit_share > 0) == (quantization in ("nf4", "fp4"))
    assert not loaded.model.training


def test_four_bit_weights_give_nearly_the_same_answer(checkpoint):
    exact, quantized = load(checkpoint), load(checkpoint, quantization="nf4")
    with torch.inference_mode():
        difference = exact.model(input_ids=ids(exact)).logits - quantized.model(input_ids=ids(quantized)).logits
        scale = exact.model(input_ids=ids(exact)).logits.std()
    # NF4 rounds a normal weight by about 9 % of its size; a few layers of it stay well below the signal.
    assert 0 < difference.std() < 0.5 * scale


def test_the_loaded_model_tells_the_truth_about_itself(checkpoint, lora):
    loaded = load(checkpoint, lora, "nf4")
    footprint = memory.measure(loaded.model)
    assert loaded.four_bit_share == 2 * footprint.four_bit_bytes / footprint.parameters
    assert 0 < loaded.four_bit_share < 1
    assert (loaded.memory_bytes, loaded.parameters) == (footprint.memory_bytes, footprint.parameters)
    assert loaded.context_length == loaded.model.config.text_config.max_position_embeddings
    assert loaded.device == torch.device("cpu") and loaded.dtype in ("float32", "bfloat16")
    assert loaded.title == checkpoint.name
    assert loaded.adapter_title.startswith(f"{lora.name} (LoRA, r=4)")
    assert loaded.base_revision.startswith("sha256:") and loaded.adapter_revision.startswith("sha256:")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_plain_lora_changes_the_answer_and_is_frozen(checkpoint, lora, quantization):
    plain, adapted = load(checkpoint, quantization=quantization), load(checkpoint, lora, quantization)
    with torch.inference_mode():
        assert not torch.allclose(
            plain.model(input_ids=ids(plain)).logits, adapted.model(input_ids=ids(adapted)).logits
        )
    assert not any(parameter.requires_grad for parameter in adapted.model.parameters())


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_moe_lora_loads_with_its_routers(checkpoint, moe_lora, quantization):
    loaded = load(checkpoint, moe_lora, quantization)
    routers = [module for module in loaded.model.modules() if isinstance(module, MoeLoraRouter)]
    assert routers and all(router.num_experts == 4 for router in routers)
    assert "MoE-LoRA, 4 experts, top-1" in loaded.adapter_title
    with torch.inference_mode():
        assert torch.isfinite(loaded.model(input_ids=ids(loaded)).logits).all()


def test_a_checkpoint_that_is_stored_in_four_bit_stays_so(checkpoint, tmp_path):
    first = load(checkpoint, quantization="nf4")
    first.model.save_pretrained(tmp_path / "stored")
    first.processor.save_pretrained(tmp_path / "stored")
    again = load(tmp_path / "stored", quantization="none")
    assert again.quantization == "nf4"
    assert again.four_bit_share == pytest.approx(first.four_bit_share)
    with torch.inference_mode():
        expected = first.model(input_ids=ids(first)).logits
        torch.testing.assert_close(again.model(input_ids=ids(again)).logits, expected)


def test_progress_never_goes_back_and_ends_at_one(checkpoint, moe_lora):
    steps = []
    loading.load(choose(checkpoint, moe_lora, "nf4"), None, steps.append)
    fractions = [step.fraction for step in steps]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0 and fractions[-1] == 1
    assert len(set(fractions)) > 10
    assert all(step.note for step in steps)


def test_nothing_is_printed_while_loading(checkpoint, lora, capfd):
    load(checkpoint, lora, "nf4")
    assert capfd.readouterr() == ("", "")


def test_loading_the_same_files_gives_the_same_revision_and_other_files_another(checkpoint, lora, moe_lora):
    def resolve(adapter):
        return loading.fetch(choose(checkpoint, adapter), None, lambda step: None)

    assert resolve(lora) == resolve(lora)
    assert resolve(lora).adapter_revision != resolve(moe_lora).adapter_revision


# What does not


def fails(error: type[Exception], words: str, *arguments, **options) -> None:
    """`load` raises `error` with one sentence that has `words` in it."""
    with pytest.raises(error, match=words) as caught:
        load(*arguments, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".") and "Traceback" not in sentence


def test_a_missing_folder(tmp_path):
    fails(CheckpointError, "does not exist", tmp_path / "nowhere")


def test_a_name_that_means_nothing():
    fails(CheckpointError, "no preset, no folder and no hub id", "nonsense")


def test_a_file_instead_of_a_folder(checkpoint):
    fails(CheckpointError, "is a file", checkpoint / "config.json")


def test_a_folder_that_is_not_a_model(tmp_path):
    fails(CheckpointError, "not a model", tmp_path)


def test_a_text_only_model(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    fails(CheckpointError, "does not read pictures", tmp_path)


def test_a_model_that_wants_to_run_its_own_code(tmp_path):
    config = {"model_type": "unheard_of", "auto_map": {"AutoConfig": "configuration.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration.py").write_text("raise SystemExit('this must never run')")
    fails(CheckpointError, "never done", tmp_path)


def test_pickled_weights_are_refused(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path / "pickled")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    fails(CheckpointError, "pickled weights are not read", folder)


def test_damaged_weights(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    fails(CheckpointError, "damaged", folder)


def test_weights_that_lack_a_tensor(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path / "partial")
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if "q_proj" in name)]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fails(CheckpointError, "lack 1 tensors", folder)


def test_weights_of_another_shape(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path / "shape")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = tensors[name][:7].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fails(CheckpointError, "do not fit", folder)


def test_a_missing_processor(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path / "bare")
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    fails(CheckpointError, "processor", folder)


def test_a_model_without_a_chat_template(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    fails(CheckpointError, "no chat template", folder)


def test_an_adapter_folder_that_does_not_exist(checkpoint, tmp_path):
    fails(AdapterError, "does not exist", checkpoint, tmp_path / "nowhere")


def test_a_folder_that_is_not_an_adapter(checkpoint):
    fails(AdapterError, "not a PEFT adapter", checkpoint, checkpoint)


def test_a_pickled_adapter_is_refused(checkpoint, lora, tmp_path):
    folder = copy(lora, tmp_path / "pickled")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")
    fails(AdapterError, "pickled adapters are not read", checkpoint, folder)


def test_a_damaged_adapter(checkpoint, lora, tmp_path):
    folder = copy(lora, tmp_path / "damaged")
    (folder / "adapter_model.safetensors").write_bytes(b"not a safetensors file")
    fails(AdapterError, "damaged", checkpoint, folder)


def test_an_adapter_of_an_unknown_method(checkpoint, lora, tmp_path):
    folder = copy(lora, tmp_path / "unknown")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "UNHEARD_OF"}))
    fails(AdapterError, "configuration of adapter", checkpoint, folder)


def test_an_adapter_whose_targets_are_not_in_the_model(checkpoint, lora, tmp_path):
    folder = copy(lora, tmp_path / "targets")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["no_such_layer"]}))
    fails(AdapterError, "does not fit this base model", checkpoint, folder)


@pytest.mark.parametrize("adapter", ["lora", "moe_lora"])
def test_an_adapter_of_another_shape(checkpoint, adapter, tmp_path, request):
    folder = copy(request.getfixturevalue(adapter), tmp_path / "shape")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][..., :7].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    fails(AdapterError, "does not fit this base model", checkpoint, folder)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # PEFT's own word for what is an error here
@pytest.mark.parametrize("adapter", ["lora", "moe_lora"])
def test_an_adapter_that_lacks_a_tensor_is_never_loaded_in_silence(checkpoint, adapter, tmp_path, request):
    folder = copy(request.getfixturevalue(adapter), tmp_path / "partial")
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, folder / "adapter_model.safetensors")
    fails(AdapterError, "lacks 1 of", checkpoint, folder)


@pytest.mark.parametrize("adapter", ["lora", "moe_lora"])
def test_an_adapter_with_tensors_for_layers_that_the_model_lacks(checkpoint, adapter, tmp_path, request):
    folder = copy(request.getfixturevalue(adapter), tmp_path / "more")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if ".layers.1." in name)
    tensors[name.replace(".layers.1.", ".layers.9.")] = tensors[name].clone()
    save_file(tensors, folder / "adapter_model.safetensors")
    fails(AdapterError, "no place for 1 of", checkpoint, folder)


def test_a_gpu_that_is_not_there(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fails(LoadError, "use --device cpu", checkpoint, device="cuda")


def test_too_little_memory_is_known_before_the_weights_are_fetched(checkpoint, tmp_path, monkeypatch):
    folder = copy(checkpoint, tmp_path / "described")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    fails(OutOfMemoryError, "GB is free; choose a smaller model", folder)


def test_memory_that_runs_out_while_loading(checkpoint, monkeypatch):
    def exhaust(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", exhaust)
    fails(OutOfMemoryError, "ran out", checkpoint)


# The hub


def test_an_unreachable_hub_says_what_to_do():
    fails(DownloadError, "check the network, or give a local folder", "owner/name")


def test_an_unknown_repository(monkeypatch):
    class Missing(RepositoryNotFoundError):
        def __init__(self):
            pass

    def refuse(*args, local_files_only=False, **kwargs):
        raise LocalEntryNotFoundError("") if local_files_only else Missing()

    monkeypatch.setattr(fetching, "snapshot_download", refuse)
    fails(DownloadError, "no owner/name", "owner/name")


def test_what_is_cached_is_never_asked_for_again(checkpoint, lora, tmp_path, monkeypatch):
    """A hub that holds the tiny model: the first load fetches with progress in bytes, the second is offline."""
    cache, fetched = {}, []

    def hub(name, local_files_only=False, allow_patterns=(), tqdm_class=None, cache_dir=None, **kwargs):
        assert cache_dir == tmp_path / "hub"
        key = (name, *allow_patterns)
        if local_files_only and key not in cache:
            raise LocalEntryNotFoundError("not cached")
        if not local_files_only:
            fetched.append(key)
            bar = tqdm_class(desc="Reconstructing", total=0, initial=0, unit="B", unit_scale=True)
            bar.total += 4_000_000
            bar.update(1_000_000)
            bar.update(3_000_000)
            bar.close()
            cache[key] = lora if "adapter" in name else checkpoint
        return str(cache[key])

    monkeypatch.setattr(fetching, "snapshot_download", hub)
    choice, notes = choose("owner/model", "owner/adapter"), []
    loaded = loading.load(choice, tmp_path, lambda step: notes.append(step.note))
    assert loaded.title == "model" and loaded.base_revision == checkpoint.name
    assert "Fetching owner/model: 1 of 4 MB" in notes
    first = len(fetched)
    loading.load(choice, tmp_path, lambda step: None)
    assert first == len(fetched) == 3


def test_the_cache_follows_the_desktop_convention(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetching.default_cache_dir() == tmp_path / "mllm_demo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetching.default_cache_dir() == Path.home() / ".cache" / "mllm_demo"
