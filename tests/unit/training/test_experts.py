"""What masking experts does is measured on pictures looked at once, and must be what whole runs of the model say."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from mllm_demo.moe_lora import MoeLoraRouter
from mllm_demo.routing.controls import masked_experts
from mllm_demo.training.conversations import IGNORED, Sample
from mllm_demo.training.experts import batches_of, interval, losses
from tests.unit.chat.tiny import IMAGE_TOKENS, tiny_loaded


@pytest.fixture(scope="module")
def loaded():
    return tiny_loaded(routed=True)


def sample(loaded, length: int, answer: int) -> Sample:
    """A picture, `length` letters, and labels at the last `answer` positions."""
    draw = torch.Generator().manual_seed(length)
    letters = torch.randint(10, 200, (length,), generator=draw)
    ids = torch.cat([torch.full((IMAGE_TOKENS,), loaded.processor.image_token_id), letters])
    labels = torch.full_like(ids, IGNORED)
    labels[-answer:] = torch.randint(10, 200, (answer,), generator=draw)
    pixels = torch.randn(3, 28, 28, generator=draw)
    return Sample(ids, labels, torch.ones(len(ids)), pixels, torch.zeros(len(ids), 6, dtype=torch.long))


@torch.inference_mode()
def alone(loaded, one: Sample) -> float:
    """The loss of one sample, run whole and unpadded."""
    logits = loaded.model(input_ids=one.input_ids[None], pixel_values=one.pixels[None], use_cache=False).logits[0]
    return functional.cross_entropy(logits, one.labels, ignore_index=IGNORED).item()


def test_losses_are_those_of_whole_runs_with_and_without_masked_experts(loaded):
    made = [sample(loaded, 9, 3), sample(loaded, 5, 1), sample(loaded, 12, 4)]
    batches = batches_of(loaded, made, pad=loaded.processor.tokenizer.pad_token_id)
    plain = losses(loaded, batches)
    np.testing.assert_allclose(plain, [alone(loaded, one) for one in made], rtol=1e-4)
    sites = [module.site_name for module in loaded.model.modules() if isinstance(module, MoeLoraRouter)]
    with masked_experts(loaded.model, {site: [0] for site in sites}):
        masked = losses(loaded, batches)
        np.testing.assert_allclose(masked, [alone(loaded, one) for one in made], rtol=1e-4)
    assert np.abs(masked - plain).max() > 1e-3


def test_intervals_resample_questions_in_their_task():
    """Tasks that differ widen nothing, as every task is in every draw; questions that differ do."""
    assert interval([np.full(20, 0.5), np.full(20, -0.1)], seed=0) == [0.2, 0.2, 0.2]
    draws = np.random.default_rng(0).normal(0.3, 1.0, (4, 100))
    mean, low, high = interval(list(draws), seed=0)
    assert mean == pytest.approx(draws.mean(), abs=1e-3)
    half = 1.96 * np.sqrt(draws.var(1).sum() / 100) / 4  # of a mean of four means of 100
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
