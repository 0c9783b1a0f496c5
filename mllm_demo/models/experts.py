"""Experts in 4 bit: one projection of all experts of a block in NF4 or FP4, and how a block computes with it.

bitsandbytes quantizes `nn.Linear` only, so it leaves experts that are fused into one 3-D parameter in 16 bit
(its issue 1849). `ExpertWeights4bit` stands in for such a parameter, each expert quantized on its own, and
`experts_forward`, registered with transformers' experts interface, multiplies with no other experts than a step
selects. It knows nothing of checkpoints or of how a model is loaded.
"""

import math

import numpy as np
import torch
from bitsandbytes import functional as bnb
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

IMPLEMENTATION = "experts_4bit"
# QLoRA, section 3: one maximum for 64 weights, themselves in 8 bit with one maximum for 256 of them.
BLOCK, NESTED_BLOCK = 64, 256
# Rows of one expert up to which the fused CPU kernel is faster than unpacking the expert and multiplying: for 3.1
# million weights it took 0.29 ms and 0.15 ms a row, the other way 1.2 ms whatever the rows (one thread, AVX512-BF16).
FUSED_ROWS = 6
# Selected experts (tokens x experts a token) up to which a GPU copies them out instead of asking which they are,
# and the bytes that their unpacked weights may take meanwhile.
GATHERED, GATHERED_BYTES = 64, 2**27
# The fused CPU kernel reads tiles of this many rows.
TILE = 16


class ExpertWeights4bit(nn.Module):
    """The weights [num_experts, out_features, in_features] of one projection, in 4 bit with double quantization.

    Every expert is what `bitsandbytes.functional.quantize_4bit` makes of its own [out_features, in_features]:
    `weight` uint8 [num_experts, bytes], two codes a byte; `absmax` uint8 [num_experts, blocks of 64];
    `nested_absmax` float32 [num_experts, blocks of 256 of those]; `offset` float32 [num_experts]; `code` float32
    [16] and `nested_code` float32 [256], the values that codes stand for. All are buffers, so saving is plain.
    """

    def __init__(self, num_experts: int, out_features: int, in_features: int, quant_type: str = "nf4") -> None:
        super().__init__()
        self.num_experts, self.out_features, self.in_features = num_experts, out_features, in_features
        self.quant_type = quant_type
        self.packed = False
        values = out_features * in_features
        blocks = math.ceil(values / BLOCK)
        shapes = {"weight": math.ceil(values / 2), "absmax": blocks}
        for name, length in shapes.items():
            self.register_buffer(name, torch.zeros(num_experts, length, dtype=torch.uint8))
        statistics = {"nested_absmax": (num_experts, math.ceil(blocks / NESTED_BLOCK)), "offset": (num_experts,)}
        # Whatever the default dtype, which is the model's while it is made.
        for name, shape in (statistics | {"code": (16,), "nested_code": (256,)}).items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))

    @classmethod
    def quantize(
        cls, values: torch.Tensor, quant_type: str = "nf4", *, is_transposed: bool = False
    ) -> "ExpertWeights4bit":
        """`values`: floats [num_experts, out_features, in_features], the last two swapped if `is_transposed`.

        A transposed projection is stored turned, so that a block of 64 always lies along the input as in a linear
        layer, which is what the kernels multiply with. One expert at a time: the copy in work is that small.
        """
        turned = values.transpose(1, 2) if is_transposed else values
        with torch.device(values.device):
            held = cls(*turned.shape, quant_type)
        for expert, weights in enumerate(turned):
            codes, state = bnb.quantize_4bit(
                weights.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type=quant_type
            )
            held.weight[expert] = codes.flatten()
            held.absmax[expert] = state.absmax
            held.nested_absmax[expert] = state.state2.absmax
            held.offset[expert] = state.offset
        held.code.copy_(state.code)
        held.nested_code.copy_(state.state2.code)
        return held

    @property
    def weights(self) -> int:
        """Values held, all experts together."""
        return self.num_experts * self.out_features * self.in_features

    def dequantize(
        self,
        expert: int,
        dtype: torch.dtype,
        room: torch.Tensor | None = None,
        maxima: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weights of one expert, [out_features, in_features]. `room`: uint8 [bytes] to work in, `maxima`: float32
        [num_experts, blocks], those of all experts; where there are any."""
        codes = self.weight[expert]
        if self.packed:
            codes = _turn(codes, self.in_features // 4, TILE, room)
        maxima = self._block_maxima(expert) if maxima is None else maxima[expert]
        return self._values(codes, maxima, self.out_features, dtype)

    def grouped(self, inputs: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """`inputs` [rows, in_features] sorted by expert, `counts` rows for each: products [rows, out_features]."""
        groups = [(expert, rows) for expert, rows in enumerate(inputs.split(counts)) if len(rows)]
        room = torch.empty_like(self.weight[0])
        # Most experts at once take half as long as each of them alone; a block must not reach into the next expert.
        together = 2 * len(groups) > self.num_experts and self.absmax.shape[1] % NESTED_BLOCK == 0
        maxima = self._block_maxima(slice(None)) if together else None
        return torch.cat([self.linear(expert, rows, room, maxima) for expert, rows in groups])

    def linear(
        self,
        expert: int,
        inputs: torch.Tensor,
        room: torch.Tensor | None = None,
        maxima: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`inputs` [rows, in_features] times one expert: [rows, out_features]; the rest as in `dequantize`."""
        if inputs.device.type != "cpu":
            return nn.functional.linear(inputs, self.dequantize(expert, inputs.dtype, maxima=maxima))
        if len(inputs) <= FUSED_ROWS and self._fuses(inputs):
            self._pack()
            return self._fused(expert, inputs)
        # In this order oneDNN rearranges the few inputs instead of all weights, the other way being half as slow again.
        return torch.mm(self.dequantize(expert, inputs.dtype, room, maxima), inputs.t()).t()

    def each(self, experts: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Row by row: `inputs` [rows, in_features] times the expert of the same row of `experts` int64 [rows].

        Nothing waits for the device; [rows, out_features, in_features] floats exist meanwhile.
        """
        self._unpack()
        rows = len(experts)
        steps = self.nested_absmax[experts].repeat_interleave(NESTED_BLOCK, dim=1)[:, : self.absmax.shape[1]]
        maxima = self.nested_code[self.absmax[experts].int()] * steps + self.offset[experts, None]
        weights = self._values(self.weight[experts], maxima.flatten(), rows * self.out_features, inputs.dtype)
        weights = weights.view(rows, self.out_features, self.in_features)
        return torch.bmm(weights, inputs[:, :, None])[:, :, 0]

    def _block_maxima(self, experts: int | slice) -> torch.Tensor:
        """The maximum of every block of one expert, float32 [blocks], or of several, [experts, blocks]."""
        steps, code = self.nested_absmax[experts].flatten(), self.nested_code
        return bnb.dequantize_blockwise(
            self.absmax[experts], absmax=steps, code=code, blocksize=NESTED_BLOCK
        ).add_(self.offset[experts, None])

    def _values(self, codes: torch.Tensor, maxima: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """What `codes` stand for, [rows, in_features], with the `maxima` of their blocks."""
        return torch.ops.bitsandbytes.dequantize_4bit(
            codes.flatten(), maxima, BLOCK, self.quant_type, (rows, self.in_features), dtype
        )

    # The fused CPU kernel (AVX512-BF16) reads bytes of two rows, low and high, in tiles of 32 rows and 2 columns. Ours
    # hold two columns of one row. So it is shown a matrix of twice the rows and half the columns, one row for the odd
    # and one for the even columns of each of ours, and given odd and even inputs as two rows; of the four products two
    # are wanted. Then its layout differs from the usual one by a transposition of 16-bit words, which is cheap to undo
    # when many rows make unpacking the better way.

    def _fuses(self, inputs: torch.Tensor) -> bool:
        fits = self.out_features % TILE == 0 and self.in_features % BLOCK == 0
        inference = not (torch.is_grad_enabled() and inputs.requires_grad)
        return fits and inference and inputs.dtype == torch.bfloat16 and bool(bnb.has_avx512bf16())

    def _fused(self, expert: int, inputs: torch.Tensor) -> torch.Tensor:
        tiles = self.out_features // TILE
        halves = inputs.view(len(inputs), -1, 2).mT.contiguous().flatten(0, 1)  # (even, odd .., half)
        maxima = self._block_maxima(expert).bfloat16().view(tiles, 1, TILE, -1).expand(-1, 2, -1, -1)
        products = torch.ops.bitsandbytes.gemv_4bit(
            halves,
            self.weight[expert],
            (2 * self.out_features, self.in_features // 2),
            maxima.reshape(2 * self.out_features, -1).t().contiguous(),
            self.code,
            BLOCK // 2,
        ).view(len(inputs), 2, tiles, 2, TILE)  # (row, even or odd input, tile, odd or even column, row of the tile)
        return (products[:, 0, :, 1] + products[:, 1, :, 0]).flatten(1)

    def _pack(self) -> None:
        if not self.packed:
            for codes in self.weight:
                codes.copy_(_turn(codes, TILE, self.in_features // 4))
            self.packed = True

    def _unpack(self) -> None:
        if self.packed:
            for codes in self.weight:
                codes.copy_(_turn(codes, self.in_features // 4, TILE))
            self.packed = False

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self._unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn, recurse=True):
        self._unpack()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_experts}, {self.out_features}, {self.in_features}, {self.quant_type}"


def _turn(codes: torch.Tensor, rows: int, columns: int, room: torch.Tensor | None = None) -> torch.Tensor:
    """Transposes every [rows, columns] of 16-bit words in the bytes `codes`, on the CPU and into `room` if given."""
    words = codes.view(torch.int16).view(-1, rows, columns).transpose(1, 2).numpy()
    turned = torch.empty_like(codes) if room is None else room
    # NumPy moves single words a sixth faster than PyTorch.
    np.copyto(turned.view(torch.int16).numpy().reshape(words.shape), words)
    return turned


def experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What a fused experts module of transformers computes, on projections in 4 bit.

    `self`: the module, which says whether it has a gate, biases, a norm; `hidden_states` [tokens, hidden],
    `top_k_index` int64 and `top_k_weights` [tokens, k]. Returns [tokens, hidden].
    """
    up = self.gate_up_proj if self.has_gate else self.up_proj
    if not isinstance(up, ExpertWeights4bit):
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    tokens, k = top_k_index.shape
    experts = top_k_index.flatten()
    copied = len(experts) * up.out_features * up.in_features * hidden_states.element_size()
    if hidden_states.device.type != "cpu" and len(experts) <= GATHERED and copied <= GATHERED_BYTES:
        outputs = _project(self, hidden_states.repeat_interleave(k, dim=0), experts, None)
    else:
        order = experts.argsort(stable=True)
        counts = experts.bincount(minlength=self.num_experts).tolist()
        outputs = _project(self, hidden_states.index_select(0, order // k), experts[order], counts)
        outputs = outputs.index_select(0, order.argsort())
    weights = top_k_weights[:, None].to(outputs.dtype)
    return torch.bmm(weights, outputs.view(tokens, k, -1))[:, 0].to(hidden_states.dtype)


def _project(
    module: nn.Module, inputs: torch.Tensor, experts: torch.Tensor, counts: list[int] | None
) -> torch.Tensor:
    """Up, gate and down of `inputs` [rows, hidden], each row by its expert; sorted, with `counts` rows for each."""

    def multiply(weights: ExpertWeights4bit, rows: torch.Tensor) -> torch.Tensor:
        return weights.each(experts, rows) if counts is None else weights.grouped(rows, counts)

    name = "gate_up_proj" if module.has_gate else "up_proj"
    inner = multiply(getattr(module, name), inputs)
    if module.has_bias:
        inner = inner + getattr(module, f"{name}_bias")[experts]
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outputs = multiply(module.down_proj, inner)
    if module.has_bias:
        outputs = outputs + module.down_proj_bias[experts]
    return module.post_expert_norm(outputs) if module.has_post_expert_norm else outputs


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
