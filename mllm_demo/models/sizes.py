"""What a model takes, from its configuration alone: bytes by part, its KV cache, the tokens of a picture.

The model is built without memory (PyTorch's meta device), and its own forward says how large the KV cache gets.
`memory.py` counts the same on a loaded model. It knows nothing of files or of what a person chose.
"""

import math
from collections.abc import Iterator

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText, DynamicCache, PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from mllm_demo.chat.events import FootprintPart
from mllm_demo.errors import AdapterError, CheckpointError
from mllm_demo.models.experts import BLOCK, NESTED_BLOCK
from mllm_demo.models.experts_quantizer import fused_weights, is_experts
from mllm_demo.routing.families import router_modules

PARTS = ("vision", "attention", "experts", "embeddings", "rest")
CACHE_TOKENS = 1000
FOUR_BIT = ("nf4", "fp4")
# The values that codes stand for (16 and 256 in float32) and one offset, which bitsandbytes keeps for every layer.
CODE_BOOKS = 4 * (16 + 256)
OFFSET = 4
_SHAPES_ONLY = "shapes_only"
# PEFT keeps the adapters of 16-bit models in float32.
ADAPTER_BYTES = 4


def four_bit_bytes(weights: int) -> int:
    """Bytes of `weights` values quantized together: codes, block maxima in 8 bit and theirs (QLoRA, section 3)."""
    blocks = math.ceil(weights / BLOCK)
    return math.ceil(weights / 2) + blocks + 4 * math.ceil(blocks / NESTED_BLOCK)


def without_memory(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config` with shapes but no weights; raises `CheckpointError` where it makes none."""
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"The configuration ({config.model_type}) does not make a model: {str(error).splitlines()[0].rstrip('.')}; "
            "fetch or save it again."
        ) from error


def _vision_tower(model: PreTrainedModel) -> nn.Module | None:
    tower = model.get_encoder(modality="image")
    return None if tower is model or tower is model.base_model else tower


def _declared_attention(model: PreTrainedModel) -> tuple[type[nn.Module], ...]:
    """The classes that the model's own classes name as its attention."""
    declared = (module._can_record_outputs or {} for module in model.modules() if isinstance(module, PreTrainedModel))
    named = [found for each in declared for found in _as_list(each.get("attentions"))]
    return tuple({getattr(found, "target_class", found) for found in named})


def _as_list(found: object) -> list:
    return list(found) if isinstance(found, list | tuple) else [found] if found is not None else []


def _walk(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, str]]:
    """Every module with its path and the part of the model that it belongs to."""
    tower, attention = _vision_tower(model), _declared_attention(model)
    embeddings = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    routers = {id(module) for _, module in router_modules(model)}
    blocks = (module for module in model.modules() if any(id(child) in routers for child in module.children()))
    # Experts that are not fused: the list of modules beside a router.
    lists = {id(child) for block in blocks for child in block.children() if isinstance(child, nn.ModuleList)}

    def part_of(module: nn.Module, above: str) -> str:
        if above != "rest":
            return above
        if module is tower:
            return "vision"
        if is_experts(module) or id(module) in lists:
            return "experts"
        if id(module) in embeddings or isinstance(module, nn.Embedding):
            return "embeddings"
        return "attention" if isinstance(module, attention) else "rest"

    def walk(module: nn.Module, path: str, above: str) -> Iterator[tuple[str, nn.Module, str]]:
        part = part_of(module, above)
        yield path, module, part
        for name, child in module.named_children():
            yield from walk(child, f"{path}.{name}" if path else name, part)

    return walk(model, "", "rest")


def parts(
    model: PreTrainedModel, quantization: str, *, fused: bool = True, skipped: list[str] | None = None
) -> tuple[FootprintPart, ...]:
    """What each part of `model`, built by `without_memory`, takes when loaded in `quantization`.

    `fused`: whether experts fused into one parameter are quantized, which plain bitsandbytes does not do;
    `skipped`: modules that a stored checkpoint has left alone in the place of those usually left alone.
    """
    skipped = get_keys_to_not_convert(model) if skipped is None else skipped
    kept = [*skipped, *(model._keep_in_fp32_modules or ())]
    experts = {}
    if fused and quantization in FOUR_BIT:
        experts = {id(getattr(each.module, each.name)): each.shape for _, each in fused_weights(model, kept)}
    sums = {name: [0, 0, 0, 0, 0] for name in PARTS}
    seen: set[int] = set()
    for path, module, part in _walk(model):
        linear = type(module) is nn.Linear and should_convert_module(path, kept)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            weights = tensor.numel() if name in module._parameters else 0
            held, four_bit = tensor.nbytes, 0
            if id(tensor) in experts:
                number, *sides = experts[id(tensor)]
                held = number * (four_bit_bytes(math.prod(sides)) + OFFSET) + CODE_BOOKS
                four_bit = weights
            elif linear and name == "weight" and quantization in FOUR_BIT:
                held, four_bit = four_bit_bytes(weights) + CODE_BOOKS + OFFSET, weights
            elif linear and name == "weight" and quantization == "int8":
                held = weights + 4 * module.out_features
            for place, value in enumerate((weights, four_bit, 2 * weights, held, math.ceil(four_bit / 2))):
                sums[part][place] += value
    return tuple(FootprintPart(name, *values) for name, values in sums.items() if values[3])


def adapter_part(model: PreTrainedModel, config: PeftConfig, name: str) -> FootprintPart:
    """What the adapter described by `config` adds; `model`, built by `without_memory`, keeps it."""
    before = {id(parameter) for parameter in model.parameters()}
    try:
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"Adapter {name} does not fit this base model; load the base it was trained on.") from error
    added = sum(parameter.numel() for parameter in adapted.parameters() if id(parameter) not in before)
    return FootprintPart("adapter", added, 0, 2 * added, ADAPTER_BYTES * added, 0)


def cache_bytes(model: PreTrainedModel, tokens: int = CACHE_TOKENS) -> int:
    """Bytes of the KV cache (and of any other state) after `tokens` tokens, as `model`'s own forward lays it out.

    `model`, built by `without_memory`, computes with experts that return what they get, as others look at values.
    Where a model does not run without values, its attention is taken to keep a key and a value per head.
    """
    config = model.config.get_text_config()
    before = config._experts_implementation
    cache = DynamicCache(config=config)
    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    config._experts_implementation = _SHAPES_ONLY
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, logits_to_keep=1)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        layers = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
        values = sum(_key_width(layers[index]) for index in range(config.num_hidden_layers))
        return 2 * tokens * values * model.dtype.itemsize
    finally:
        config._experts_implementation = before
    held = (tensor for layer in cache.layers for tensor in vars(layer).values() if isinstance(tensor, torch.Tensor))
    return sum(tensor.nbytes for tensor in held)


def _key_width(layer) -> int:
    """Numbers in the keys of one token, by the configuration of one layer."""
    heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
    return heads * (getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)


ALL_EXPERTS_FUNCTIONS.register(_SHAPES_ONLY, lambda module, hidden_states, *selection: torch.empty_like(hidden_states))


def image_tokens(processor: ProcessorMixin, width: int, height: int) -> int:
    """Positions that a picture of this size takes in the prompt."""
    return processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens[0]
