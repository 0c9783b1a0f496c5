"""bitsandbytes' CPU kernels for 4 bit, called without its Python operators.

An operator costs 30 to 50 microseconds a call and new memory for its result, which a block of 128 experts pays some
hundreds of times; a kernel itself is told where to write. Where bitsandbytes came without its library, or has no
kernel for a case, its operator is asked. It knows nothing of experts.
"""

import ctypes
from functools import cache

import torch
from bitsandbytes import functional as bnb

SUFFIXES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
POINTER, NUMBER = ctypes.c_void_p, ctypes.c_longlong
# What each takes: pointers and numbers.
DEQUANTIZE_8BIT = "cdequantize_blockwise_cpu", (*4 * (POINTER,), *2 * (NUMBER,))
DEQUANTIZE_4BIT = "cdequantize_blockwise_cpu", (*3 * (POINTER,), *3 * (NUMBER,))
GEMV_4BIT = "gemv_4bit_inference_cpu", (*3 * (NUMBER,), *4 * (POINTER,), *3 * (NUMBER,))


@cache
def _kernel(kernel: tuple[str, tuple], *variant: str | torch.dtype):
    """A kernel of bitsandbytes' library for a type of codes and one of values, None if it lacks it."""
    prefix, takes = kernel
    name = "_".join([prefix, *(SUFFIXES.get(of, str(of)) for of in variant)])
    library = getattr(bnb.lib, "_lib", None)
    if not hasattr(library, name):
        return None
    found = library[name]  # another object than bitsandbytes calls, so its types are ours
    found.argtypes, found.restype = takes, None
    return found


def dequantize_4bit(codes: torch.Tensor, maxima: torch.Tensor, block: int, quant_type: str, out: torch.Tensor) -> None:
    """Writes what `codes` (uint8, two values a byte) stand for to `out` [rows, columns], contiguous; `maxima`
    float32, one for `block` values."""
    rows, columns = out.shape
    kernel = _kernel(DEQUANTIZE_4BIT, quant_type, out.dtype)
    if kernel is None or columns % 2:
        out.copy_(torch.ops.bitsandbytes.dequantize_4bit(codes, maxima, block, quant_type, out.shape, out.dtype))
    else:
        kernel(codes.data_ptr(), maxima.data_ptr(), out.data_ptr(), block, rows, columns)


def dequantize_8bit(
    codes: torch.Tensor, maxima: torch.Tensor, values: torch.Tensor, block: int, out: torch.Tensor
) -> None:
    """Writes what `codes` (uint8) stand for among `values` float32 [256] to `out`, of as many; `maxima` as above."""
    kernel = _kernel(DEQUANTIZE_8BIT, out.dtype)
    if kernel is None:
        out.copy_(torch.ops.bitsandbytes.dequantize_blockwise(codes, maxima, values, block, out.dtype))
    else:
        kernel(values.data_ptr(), codes.data_ptr(), maxima.data_ptr(), out.data_ptr(), block, codes.numel())


def multiplies(quant_type: str, inputs: torch.Tensor) -> bool:
    """Whether `gemv_4bit` can be had on this machine for such inputs."""
    return _kernel(GEMV_4BIT, quant_type, inputs.dtype) is not None and bool(bnb.has_avx512bf16())


def gemv_4bit(
    inputs: torch.Tensor, codes: torch.Tensor, maxima: torch.Tensor, block: int, quant_type: str, rows: int
) -> torch.Tensor:
    """`inputs` bfloat16 [few, columns] times the matrix [rows, columns] that `codes` are in the kernel's own order,
    with `maxima` bfloat16 [blocks of columns, rows]: bfloat16 [few, rows]. AVX512-BF16 only."""
    products = inputs.new_empty(len(inputs), rows)
    kernel = _kernel(GEMV_4BIT, quant_type, inputs.dtype)
    given = inputs.data_ptr(), codes.data_ptr(), maxima.data_ptr(), products.data_ptr()
    kernel(*products.shape, inputs.shape[1], *given, block, inputs.stride(0), products.stride(0))
    return products
