"""Experts in 4 bit: one projection of all experts of a block in NF4 or FP4, and how a block computes with it.

bitsandbytes quantizes `nn.Linear` only, so it leaves experts that are fused into one 3-D parameter in 16 bit
(its issue 1849). `ExpertWeights4bit` stands in for such a parameter, each expert quantized on its own, and
`experts_forward`, registered with transformers' experts interface, multiplies with no other experts than a step
selects. It knows nothing of checkpoints or of how a model is loaded.
"""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from bitsandbytes import functional as bnb
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from mllm_demo.models import kernels

IMPLEMENTATION = "experts_4bit"
# QLoRA, section 3: one maximum for 64 weights, themselves in 8 bit with one maximum for 256 of them.
BLOCK, NESTED_BLOCK = 64, 256
# Rows of one expert up to which the fused CPU kernel is faster than unpacking the expert and multiplying: for 3.1
# million weights it took 0.8 ms for one row and 0.2 ms for each more, the other way 1.3 ms (one thread, AVX512-BF16).
FUSED_ROWS = 3
# Selected experts (tokens x experts a token) up to which a GPU copies them out instead of asking which they are,
# and the bytes that their unpacked weights may take meanwhile.
GATHERED, GATHERED_BYTES = 64, 2**27
# The fused CPU kernel reads tiles of this many rows.
TILE = 16
# Experts whose maxima a CPU unpacks at once: of the shape above, what its cache holds.
TOGETHER = 8


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
        self.halved = False
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

    def dequantize(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """The weights of one expert, [out_features, in_features]."""
        codes = self.weight[expert]
        if self.halved:
            codes = self._regrouped(codes, 2)
        return self._values(codes, self._block_maxima(slice(expert, expert + 1)), self.out_features, dtype)

    def grouped(self, inputs: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """`inputs` [rows, in_features] sorted by expert, `counts` rows for each: products [rows, out_features]."""
        room = Room(self, inputs, counts)
        groups = [(expert, rows) for expert, rows in enumerate(inputs.split(counts)) if len(rows)]
        return torch.cat([self.linear(expert, rows, room) for expert, rows in groups])

    def linear(self, expert: int, inputs: torch.Tensor, room: "Room | None" = None) -> torch.Tensor:
        """`inputs` [rows, in_features] times one expert: [rows, out_features]. `room`: where to unpack it."""
        room = room or Room(self, inputs)
        maxima = room.maxima(expert)
        if inputs.device.type != "cpu":
            weights = self._values(self.weight[expert], maxima, self.out_features, inputs.dtype)
            return nn.functional.linear(inputs, weights)
        if len(inputs) <= FUSED_ROWS and self._fuses(inputs):
            self._halve()
            return self._fused(expert, inputs, maxima)
        block, columns = BLOCK, inputs.t()
        if self.halved:
            block, columns, maxima = BLOCK // 2, _halves_of(inputs), room.twice(maxima)
        codes, where = self.weight[expert], room.weights(inputs)
        weights = self._values(codes, maxima, self.out_features, inputs.dtype, block, where)
        # In this order oneDNN rearranges the few inputs instead of all weights, the other way being half as slow again.
        return torch.mm(weights, columns).t()

    def each(self, experts: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Row by row: `inputs` [rows, in_features] times the expert of the same row of `experts` int64 [rows].

        Nothing waits for the device; [rows, out_features, in_features] floats exist meanwhile.
        """
        self._restore()
        rows = len(experts)
        steps = self.nested_absmax[experts].repeat_interleave(NESTED_BLOCK, dim=1)[:, : self.absmax.shape[1]]
        maxima = self.nested_code[self.absmax[experts].int()] * steps + self.offset[experts, None]
        weights = self._values(self.weight[experts], maxima.flatten(), rows * self.out_features, inputs.dtype)
        weights = weights.view(rows, self.out_features, self.in_features)
        return torch.bmm(weights, inputs[:, :, None])[:, :, 0]

    def _block_maxima(self, experts: slice) -> torch.Tensor:
        """The maxima of the blocks of several experts, float32 [experts, blocks]; of more than one only where no block
        of maxima reaches into the next expert."""
        codes, steps = self.absmax[experts], self.nested_absmax[experts].flatten()
        if codes.device.type == "cpu":
            maxima = torch.empty(codes.shape)
            kernels.dequantize_8bit(codes, steps, self.nested_code, NESTED_BLOCK, maxima)
        else:
            maxima = bnb.dequantize_blockwise(codes, absmax=steps, code=self.nested_code, blocksize=NESTED_BLOCK)
        return maxima.add_(self.offset[experts, None])

    def _values(
        self,
        codes: torch.Tensor,
        maxima: torch.Tensor,
        rows: int,
        dtype: torch.dtype,
        block: int = BLOCK,
        room: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `codes` stand for, [rows, in_features], with the `maxima` of their blocks; in `room`, if any."""
        if codes.device.type != "cpu":
            shape = (rows, self.in_features)
            return torch.ops.bitsandbytes.dequantize_4bit(codes.flatten(), maxima, block, self.quant_type, shape, dtype)
        values = torch.empty(rows, self.in_features, dtype=dtype) if room is None else room
        kernels.dequantize_4bit(codes.flatten(), maxima, block, self.quant_type, values)
        return values

    # The fused CPU kernel (AVX512-BF16) reads bytes of two rows, low and high, in tiles of 32 rows and 2 columns. Ours
    # hold two columns of one row. So it is shown a matrix of twice the rows and half the columns, one row for the odd
    # and one for the even columns of each of ours, and given odd and even inputs as two rows; of the four products two
    # are wanted. Which bytes of a block stand side by side in a tile is free: here one of its first and one of its
    # second half. So once a block of experts was asked for few rows it is kept halved: in every row all first and then
    # all second halves, which unpack to what many inputs in that order are multiplied with, and whose tiles are the
    # bytes of 16 rows transposed.

    def _fuses(self, inputs: torch.Tensor) -> bool:
        fits = self.out_features % TILE == 0 and self.in_features % BLOCK == 0
        inference = not (torch.is_grad_enabled() and inputs.requires_grad)
        return fits and inference and kernels.multiplies(self.quant_type, inputs)

    def _fused(self, expert: int, inputs: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
        tiles, blocks = self.out_features // TILE, self.in_features // BLOCK
        halves = inputs.view(len(inputs), blocks, 2, BLOCK // 4, 2).permute(0, 4, 1, 3, 2)  # (.., parity, .., half)
        of_tiles = _transposed(maxima, self.out_features, blocks).bfloat16().view(blocks, tiles, TILE)
        products = kernels.gemv_4bit(
            halves.reshape(2 * len(inputs), -1).contiguous(),
            _transposed(self.weight[expert], 2 * TILE, self.in_features // 4),
            torch.cat((of_tiles, of_tiles), dim=2),
            BLOCK // 2,
            self.quant_type,
            2 * self.out_features,
        ).view(len(inputs), 2, tiles, 2, TILE)  # (row, even or odd input, tile, odd or even column, row of the tile)
        return (products[:, 0, :, 1] + products[:, 1, :, 0]).flatten(1)

    def _regrouped(self, codes: torch.Tensor, groups: int) -> torch.Tensor:
        """In every row of one expert, half blocks in `groups` groups, one of each in turn: as many groups of others."""
        pieces = codes.view(torch.complex128).view(self.out_features, groups, -1)  # as wide as half a block
        return pieces.transpose(1, 2).flatten().view(torch.uint8)

    def _halve(self) -> None:
        if not self.halved:
            for codes in self.weight:
                codes.copy_(self._regrouped(codes, self.in_features // BLOCK))
            self.halved = True

    def _restore(self) -> None:
        """Codes in bitsandbytes' order."""
        if self.halved:
            for codes in self.weight:
                codes.copy_(self._regrouped(codes, 2))
            self.halved = False

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self._restore()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn, recurse=True):
        self._restore()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_experts}, {self.out_features}, {self.in_features}, {self.quant_type}"


class Room:
    """Memory that the experts of one projection share while they are unpacked one after the other.

    `counts` says how many rows of `inputs` [rows, in_features] each of them will be multiplied with.
    """

    def __init__(self, held: ExpertWeights4bit, inputs: torch.Tensor, counts: Sequence[int] = ()) -> None:
        # Maxima of several experts at once take half as long as of each of them alone.
        several = 2 * sum(map(bool, counts)) > held.num_experts and held.absmax.shape[1] % NESTED_BLOCK == 0
        together = TOGETHER if inputs.device.type == "cpu" else held.num_experts
        self._window = together if several else 1
        self._held, self._inputs, self._first = held, inputs, -1

    def maxima(self, expert: int) -> torch.Tensor:
        """The maxima of the blocks of an expert, float32 [blocks]."""
        first = expert - expert % self._window
        if first != self._first:
            self._first, self._maxima = first, self._held._block_maxima(slice(first, first + self._window))
        return self._maxima[expert - first]

    def twice(self, maxima: torch.Tensor) -> torch.Tensor:
        """`maxima` of one expert for half blocks in halved order, [out_features, half blocks], until the next call."""
        of_rows = maxima.view(self._held.out_features, -1)
        return torch.cat((of_rows, of_rows), dim=1, out=self._twice)

    @cached_property
    def _twice(self) -> torch.Tensor:
        return torch.empty(self._held.out_features, 2 * self._held.in_features // BLOCK)

    def weights(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """[out_features, in_features] for one expert's weights; None where a gradient of `inputs` needs them kept."""
        return None if torch.is_grad_enabled() and inputs.requires_grad else self._weights

    @cached_property
    def _weights(self) -> torch.Tensor:
        return self._inputs.new_empty(self._held.out_features, self._held.in_features)


def _transposed(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Every matrix [rows, columns] of those that `values` are one after the other, transposed; flat."""
    # PyTorch transposes bytes with vectors in this operator alone.
    channels = values.view(-1, 1, 1, rows * columns).permute(0, 3, 1, 2)
    return torch.channel_shuffle(channels, rows).permute(0, 2, 3, 1).flatten()


def _halves_of(inputs: torch.Tensor) -> torch.Tensor:
    """`inputs` [rows, in_features] as columns [in_features, rows], all first halves of blocks before all second."""
    columns, rows = inputs.t(), len(inputs)
    if columns.is_contiguous():
        return columns.view(-1, 2, BLOCK // 2, rows).transpose(0, 1).flatten(0, 2)
    return inputs.view(rows, -1, 2, BLOCK // 2).transpose(1, 2).flatten(1).t()


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
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj

    def activated(inner: torch.Tensor, of: torch.Tensor | int) -> torch.Tensor:
        inner = inner + getattr(module, f"{name}_bias")[of] if module.has_bias else inner
        return module._apply_gate(inner) if module.has_gate else module.act_fn(inner)

    if counts is None:
        outputs = down.each(experts, activated(up.each(experts, inputs), experts))
    else:
        made: list[torch.Tensor] = []
        for_up, for_down = Room(up, inputs, counts), Room(down, inputs, counts)
        # Expert by expert: what is between two products stays in the cache.
        for expert, rows in enumerate(inputs.split(counts)):
            if len(rows):
                inner = activated(up.linear(expert, rows, for_up), expert)
                made.append(down.linear(expert, inner, for_down))
        outputs = torch.cat(made)
    if module.has_bias:
        outputs = outputs + module.down_proj_bias[experts]
    return module.post_expert_norm(outputs) if module.has_post_expert_norm else outputs


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
