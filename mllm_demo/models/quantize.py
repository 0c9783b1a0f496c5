"""Which device, which dtype and which bitsandbytes configuration a choice means on this machine.

It knows nothing of checkpoints, hubs or adapters.
"""

import logging
import warnings

import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Params4bit
from torch import nn
from transformers import BitsAndBytesConfig

from mllm_demo.errors import LoadError
from mllm_demo.models.experts_quantizer import METHOD as FOUR_BIT_WITH_EXPERTS
from mllm_demo.models.experts_quantizer import ExpertsBitsAndBytesConfig

# LLM.int8 reports the cast of its inputs once per layer and token, which would drown every other message.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")


def resolve_device(wanted: str) -> torch.device:
    """`wanted` is auto, cuda or cpu; raises `LoadError` when cuda was asked for and is not there."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LoadError(
            "No CUDA GPU is visible to PyTorch; use --device cpu, or install a CUDA build of torch."
        )
    return torch.device("cuda", torch.cuda.current_device())


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which products are computed and unquantized weights are kept.

    CUDA: bfloat16 where the GPU has it, else float16. CPU: bfloat16 only with AVX512-BF16, where bitsandbytes has
    a fused 4-bit kernel; elsewhere bfloat16 products are emulated, and float32 reads a prompt about four times
    as fast (a 135M Llama in NF4 on two AVX2 cores, 120 tokens: 0.4 s against 1.5 s).
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if has_avx512bf16() else torch.float32


def bnb_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The bitsandbytes configuration of nf4, fp4 or int8 computing in `dtype`; None for "none".

    Its default skips hold: the output head, tied embeddings and whatever the model keeps in float32 stay
    unquantized, as do convolutions and embeddings, which are not linear layers. In 4 bit, experts that are fused
    into one parameter are quantized as well; in 8 bit they are not.
    """
    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return ExpertsBitsAndBytesConfig(bnb_4bit_quant_type=quantization, bnb_4bit_compute_dtype=dtype)


def _stored(config) -> dict | None:
    stored = getattr(config, "quantization_config", None)
    return stored if stored is None or isinstance(stored, dict) else stored.to_dict()


def stored_quantization(config) -> str | None:
    """How a checkpoint says it is quantized on disk: nf4, fp4, int8, another method's name, or None if it is not."""
    stored = _stored(config)
    if stored is None:
        return None
    if stored.get("load_in_8bit"):
        return "int8"
    if stored.get("load_in_4bit") or stored.get("quant_method") == FOUR_BIT_WITH_EXPERTS:
        return stored.get("bnb_4bit_quant_type", "fp4")
    return str(stored.get("quant_method", "unknown"))


def stored_exceptions(config) -> dict:
    """What a stored checkpoint has left out, as `sizes.parts` takes it; nothing for one that is not quantized yet."""
    stored = _stored(config)
    if stored is None:
        return {}
    return {
        # bitsandbytes itself leaves experts alone that are fused into one parameter.
        "fused": stored.get("quant_method") == FOUR_BIT_WITH_EXPERTS,
        "skipped": stored.get("llm_int8_skip_modules"),
    }


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Brings a checkpoint that was stored quantized to `dtype`, which loading does for other checkpoints only.

    What is not quantized is cast. 4-bit weights will unpack straight to `dtype`: they remember the dtype that they
    were quantized from, and unpacking to that one and casting would cost a second pass over every weight at every
    token. Buffers keep their own precision.
    """
    for parameter in model.parameters():
        if isinstance(parameter, Params4bit) and parameter.quant_state is not None:
            parameter.quant_state.dtype = dtype
        elif parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
