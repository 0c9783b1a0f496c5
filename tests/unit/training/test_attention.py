"""Attention in pieces is torch's causal attention, forwards and backwards; to a compiler it is one operation."""

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from mllm_demo.training.attention import NAME, PIECE, causal_attention

HEADS, HELD, WIDTH = 6, 2, 8
SCALING = WIDTH**-0.5


def tensors(length: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(length)
    made = [torch.randn(2, length, heads, WIDTH, dtype=dtype).transpose(1, 2) for heads in (HEADS, HELD, HELD)]
    return [array.requires_grad_() for array in made]


def in_pieces(query, key, value):
    return causal_attention(None, query, key, value, None, SCALING)[0].transpose(1, 2)


def whole(query, key, value):
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALING, enable_gqa=True)


@pytest.mark.parametrize("length", [1, 2, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5])
def test_output_and_gradients_are_those_of_attention_made_whole(length):
    inputs = tensors(length)
    ours, theirs = in_pieces(*inputs), whole(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    asked = torch.randn_like(theirs)
    for own, other in zip(*(torch.autograd.grad(o, inputs, asked) for o in (ours, theirs)), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_scores_are_rounded_once_more_than_by_torch_and_no_more():
    narrow = tensors(2 * PIECE + 3, torch.bfloat16)
    wide = whole(*(array.float() for array in narrow))
    ours, theirs = ((f(*narrow).float() - wide).abs().mean() for f in (in_pieces, whole))
    assert ours < 3 * theirs


def test_a_compiler_is_told_the_right_shapes_and_strides():
    operation = torch.ops.mllm_demo.causal_attention.default
    torch.library.opcheck(operation, (*tensors(2 * PIECE), SCALING))
    # What is kept of a last piece that is not whole ends in memory that nobody wrote, so values cannot be compared.
    torch.library.opcheck(operation, (*tensors(PIECE + 7), SCALING), test_utils=("test_schema", "test_faketensor"))


def test_a_padded_batch_answers_as_the_language_model_does_with_a_mask():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 90}
    torch.manual_seed(0)
    tiny_llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    ids = torch.randint(0, 90, (2, PIECE + 9))
    mask = torch.ones_like(ids)
    mask[0, PIECE:] = 0
    tiny_llama.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = tiny_llama(input_ids=ids, attention_mask=mask).logits
        tiny_llama.set_attn_implementation(NAME)
        found = tiny_llama(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)
