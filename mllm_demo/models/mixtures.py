"""PEFT's own mixtures of LoRA adapters on a loaded model: Arrow over several adapters, and X-LoRA.

Both are PEFT's code; here stands what it leaves to its caller. Arrow's router is put on exactly the modules that the
adapters adapt (`create_arrow_model` takes the last part of a module's name, which a vision tower may share). X-LoRA's
experts are found beside its classifier whatever they were called, and its layers are exchanged on a 4-bit base too.
It knows nothing of hubs, of devices or of how routing is recorded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import ArrowConfig, LoraConfig, PeftConfig, PeftModel, PeftModelForCausalLM, PeftType, XLoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import Linear4bit, Linear8bitLt, LoraLayer
from peft.tuners.xlora import model as peft_xlora
from peft.tuners.xlora.layer import XLoraLinearLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from mllm_demo.errors import AdapterError
from mllm_demo.models.fetching import ADAPTER_CONFIG, ADAPTER_WEIGHTS

# PEFT's default of `ArrowConfig.top_k`; with fewer adapters all of them are chosen, each with its own weight.
ARROW_TOP_K = 3
# The name by which PEFT tells the router from the adapters that it chooses among.
ARROW_ROUTER = "arrow_router"
_CLASSIFIER = "base_model.internal_xlora_classifier."
# What a LoRA configuration can ask for beyond A and B, which a mixture would drop without a word.
_BEYOND_PLAIN = {
    "use_dora": "DoRA",
    "modules_to_save": "modules that were trained whole",
    "alora_invocation_tokens": "invocation tokens",
    "target_parameters": "adapted parameters that are no linear layers",
    "layer_replication": "replicated layers",
}


# Arrow


def check_arrow(folders: Sequence[Path], names: Sequence[str], configs: Sequence[PeftConfig]) -> None:
    """Raises `AdapterError` unless all are plain LoRA adapters of one rank on the same modules; reads headers only."""
    for name, config in zip(names, configs, strict=True):
        _check_plain(name, config)
    first = _shapes(folders[0], names[0])
    for folder, name in zip(folders[1:], names[1:], strict=True):
        _check_alike(names[0], first, name, _shapes(folder, name))


def attach_arrow(model: PreTrainedModel, folders: Sequence[Path], names: Sequence[str]) -> PeftModel:
    """Returns `model` with the adapters in `folders` as experts of an Arrow router in every module that they adapt.

    The prototypes are computed at once, from a fixed seed. Raises `AdapterError` when the adapters do not fit.
    """
    experts = [f"task_{index}" for index in range(len(folders))]
    device = str(model.device)
    try:
        adapted = PeftModel.from_pretrained(model, str(folders[0]), adapter_name=experts[0], torch_device=device)
        for folder, expert in zip(folders[1:], experts[1:], strict=True):
            adapted.load_adapter(str(folder), adapter_name=expert, torch_device=device)
    except torch.cuda.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"Adapters {' and '.join(names)} do not fit this base model; load the base they were trained on."
        ) from error
    layers = {
        path: module
        for path, module in adapted.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and experts[0] in module.lora_A
    }
    missing = {path for path, _ in _shapes(folders[0], names[0])} - {f"base_model.model.{path}" for path in layers}
    if missing:
        raise AdapterError(
            f"The base model under adapter {names[0]} has no place for {len(missing)} of its modules, the first being "
            f"{min(missing)}; load the base it was trained on."
        )
    arrow = ArrowConfig(top_k=min(ARROW_TOP_K, len(experts)), rng_seed=0)
    arrow.task_adapter_names, arrow.gks_adapter_names = experts, []
    # The router's own A and B are never used, so they are as small as can be.
    adapted.add_adapter(ARROW_ROUTER, LoraConfig(r=1, arrow_config=arrow, target_modules=list(layers)))
    adapted.set_adapter(ARROW_ROUTER)
    for layer in layers.values():
        layer.lora_arrow[ARROW_ROUTER].build_prototypes(layer.lora_A, layer.lora_B)
    return adapted.requires_grad_(False)


def describe_arrow(names: Sequence[str], model: PeftModel) -> str:
    """One line for the page."""
    arrow = model.peft_config[ARROW_ROUTER].arrow_config
    rank = model.peft_config[arrow.task_adapter_names[0]].r
    return f"{' + '.join(names)} (Arrow, {len(names)} LoRA experts, top-{arrow.top_k}, r={rank})"


def _check_plain(name: str, config: PeftConfig) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != PeftType.LORA.value or getattr(config, "arrow_config", None) is not None:
        raise AdapterError(f"Adapter {name} is of type {kind}, not LoRA; only LoRA adapters mix, so give it alone.")
    more = [words for field, words in _BEYOND_PLAIN.items() if getattr(config, field, None)]
    more += ["trained biases"] if config.bias != "none" or config.lora_bias else []
    if more:
        raise AdapterError(f"Adapter {name} has {' and '.join(more)}; only plain LoRA adapters mix, so give it alone.")


def _shapes(folder: Path, name: str) -> dict[tuple[str, str], tuple[int, ...]]:
    """(module path, "A" or "B") -> shape of every tensor of a LoRA file."""
    found = {}
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
            for key in weights.keys():
                module, mark, part = key.partition(".lora_")
                if not mark or part not in ("A.weight", "B.weight"):
                    raise AdapterError(
                        f"Adapter {name} holds {key}, which no plain LoRA on linear layers has; it cannot mix."
                    )
                found[module, part[0]] = tuple(weights.get_slice(key).get_shape())
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{ADAPTER_WEIGHTS} of {name} is damaged; fetch or save the adapter again.") from error
    return found


def _check_alike(first: str, expected: dict, other: str, found: dict) -> None:
    both = f"Adapters {first} and {other}"
    apart = sorted({module for module, _ in expected.keys() ^ found.keys()})
    if apart:
        raise AdapterError(
            f"{both} adapt different modules ({apart[0]} is in one of them only); a mixture needs adapters of the "
            "same target modules."
        )
    for key, shape in expected.items():
        rank, width = (0, 1) if key[1] == "A" else (1, 0)
        if found[key][rank] != shape[rank]:
            raise AdapterError(
                f"{both} have ranks {shape[rank]} and {found[key][rank]} in {key[0]}; a mixture needs adapters of one "
                "rank."
            )
        if found[key][width] != shape[width]:
            raise AdapterError(f"{both} differ in the width of {key[0]}; they were trained on different base models.")


# X-LoRA


def xlora_experts(folder: Path, name: str, config: XLoraConfig) -> list[Path]:
    """The folders of an X-LoRA adapter's experts, in the order of its scalings; raises `AdapterError`.

    `PeftModel.save_pretrained` keeps them in subfolders called 0, 1, ...; where there is none, the subfolder or the
    place on this machine that the configuration names is taken.
    """
    if not config.adapters:
        raise AdapterError(f"X-LoRA adapter {name} names no LoRA experts; save it again.")
    experts = []
    for index, (key, place) in enumerate(config.adapters.items()):
        places = (folder / str(index), folder / key, Path(place))
        expert = next((path for path in places if (path / ADAPTER_CONFIG).is_file()), None)
        if expert is None:
            raise AdapterError(f"Expert {key} of X-LoRA adapter {name} is not in its folder; copy it to {places[0]}.")
        if not (expert / ADAPTER_WEIGHTS).is_file():
            raise AdapterError(f"Expert {key} of X-LoRA adapter {name} has no {ADAPTER_WEIGHTS}; save it again.")
        experts.append(expert)
    return experts


def attach_xlora(model: PreTrainedModel, folder: Path, name: str, config: XLoraConfig) -> PeftModel:
    """Returns `model` with the X-LoRA adapter in `folder`; raises `AdapterError` when it does not fit or lacks a part.

    X-LoRA reads the whole sequence twice for every token, without the KV cache: PEFT's implementation has none.
    """
    # PEFT loads experts as "0", "1", ... and switches on those named here, so any other name would switch on nothing.
    paths = xlora_experts(folder, name, config)
    for path in paths:
        _shapes(path, f"{name}/{path.name}")  # PEFT never returns from a file with other tensors in it
    config.adapters = {str(index): str(path) for index, path in enumerate(paths)}
    config.inference_mode = True
    model.config.use_cache = False
    try:
        with _exchanging_four_bit_layers():
            # The plain PeftModel generates without the scalings.
            adapted = PeftModelForCausalLM(model, config)
    except torch.cuda.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200].rstrip(".: ")
        raise AdapterError(
            f"X-LoRA adapter {name} does not fit this base model: {reason}; load the base it was trained on."
        ) from error
    _check_experts(adapted, name, paths)
    classifier = adapted.base_model.internal_xlora_classifier
    stored = load_file(folder / ADAPTER_WEIGHTS)
    expected = {f"{_CLASSIFIER}{key}": value.shape for key, value in classifier.state_dict().items()}
    for key, shape in expected.items():
        if key not in stored:
            raise AdapterError(
                f"{ADAPTER_WEIGHTS} of X-LoRA adapter {name} lacks {key}; some versions of PEFT (0.21 is one) do not "
                "save it, so save the classifier's state yourself."
            )
        if stored[key].shape != shape:
            raise AdapterError(
                f"{key} of X-LoRA adapter {name} is {list(stored[key].shape)}, this base model needs {list(shape)}; "
                "load the base it was trained on."
            )
    classifier.load_state_dict({key.removeprefix(_CLASSIFIER): stored[key] for key in expected})
    return adapted.requires_grad_(False)


def _check_experts(adapted: PeftModel, name: str, paths: Sequence[Path]) -> None:
    """PEFT accepts an expert that lacks tensors or sits on other modules than the first; here it is refused."""
    modules = {path for path, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    expected = {(f"base_model.model.{path}", part) for path in modules for part in "AB"}
    for path in paths:
        apart = sorted(module for module, _ in expected ^ _shapes(path, f"{name}/{path.name}").keys())
        if apart:
            raise AdapterError(
                f"Expert {path.name} of X-LoRA adapter {name} does not adapt the same modules as the others "
                f"({apart[0]}), or lacks a tensor there; save it again."
            )


@contextmanager
def _exchanging_four_bit_layers() -> Iterator[None]:
    """Inside the `with`, X-LoRA also takes over LoRA layers on quantized linear layers, which PEFT passes over."""
    original = peft_xlora.convert_layers_to_xlora

    def convert(base: nn.Module, xlora: nn.Module, config: XLoraConfig) -> tuple[int, torch.device | None]:
        layers = [module for module in base.modules() if isinstance(module, LoraLayer)]
        if not any(isinstance(layer, (Linear4bit, Linear8bitLt)) for layer in layers):
            return original(base, xlora, config)
        for number, layer in enumerate(layers):
            if not isinstance(layer, (LoraLinear, Linear4bit, Linear8bitLt)):
                raise TypeError(f"X-LoRA on a quantized base adapts linear layers only, not {type(layer).__name__}")
            mixture = XLoraLinearLayer(xlora, layer, layer.forward, number, config)
            layer.forward = mixture.forward
        return len(layers), next(iter(layers[0].lora_A.values())).weight.device

    peft_xlora.convert_layers_to_xlora = convert
    try:
        yield
    finally:
        peft_xlora.convert_layers_to_xlora = original
