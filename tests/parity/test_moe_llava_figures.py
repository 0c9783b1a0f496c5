"""The numbers behind MoE-LLaVA's figures, counted from our traces, against what the original's scripts computed.

Its scripts leave out the first text token after a picture, so the comparison leaves it out too (ours do not). They
count first choices alone, and average over the samples that have a picture. Shares agree to 1e-6.
"""

import numpy as np
import pytest
import torch

from mllm_demo.routing import stats
from mllm_demo.routing.trace import RoutingTrace, Site, Token, TraceImage
from tests.parity.cases import Case, find_cases
from tests.parity.test_moe_llava_units import folders, load_file

CASES = [case for case in find_cases("moe_llava") if (case.folder / "expected_vis.safetensors").is_file()]
IMAGE = -200


def trace_of(gating_logits: torch.Tensor, output_ids: torch.Tensor, image_tokens: int) -> RoutingTrace:
    """A trace of first choices. `gating_logits` [layers, tokens, E]; `output_ids` with one mark per picture."""
    layers, length, experts = gating_logits.shape
    tokens = []
    for number in output_ids.flatten().tolist():
        if number == IMAGE:
            tokens += [Token(0, "", "image", "user", "prefill", 0)] * image_tokens
        else:
            tokens.append(Token(number, "", "text", "user", "prefill"))
    probs = gating_logits.softmax(-1).numpy().astype(np.float16)
    chosen = gating_logits.argmax(-1, keepdim=True).numpy().astype(np.int16)
    sites = tuple(Site(f"layers.{layer}.mlp", layer, "mlp", experts, 1) for layer in range(layers))
    return RoutingTrace(
        tokens[:length],  # the last generated token was never read
        sites,
        {site.name: probs[site.layer_idx] for site in sites},
        {site.name: chosen[site.layer_idx] for site in sites},
        {site.name: np.ones((length, 1), np.float16) for site in sites},
        (TraceImage(b"x", 1, 1),),
    )


def as_the_scripts_count(trace: RoutingTrace) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the image tokens, and of the text tokens but for the first after the picture."""
    image, text = trace.token_indices("image"), trace.token_indices("text")
    return image, text[text != image[-1] + 1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loads_and_modalities(case: Case):
    inputs, expected = case.tensors("vis_inputs"), case.tensors("expected_vis")
    image_tokens = int(inputs["num_image_tokens"])
    names = [name for name in sorted(inputs) if name.endswith(".has_image") and int(inputs[name])]
    samples = [name.removesuffix(".has_image") for name in names]
    assert len(samples) == len(expected["vis2.image_counts"])
    shares = {"image": [], "text": []}
    for number, sample in enumerate(samples):
        trace = trace_of(inputs[f"{sample}.gating_logits"], inputs[f"{sample}.output_ids"], image_tokens)
        image, text = as_the_scripts_count(trace)
        for modality, positions in (("image", image), ("text", text)):
            table = stats.load_table(trace, trace.sites, positions)
            np.testing.assert_allclose(
                table * len(positions), expected[f"vis2.{modality}_counts"][number], atol=1e-6, err_msg=sample
            )
            shares[modality].append(table)
    for modality, tables in shares.items():
        np.testing.assert_allclose(
            np.mean(tables, axis=0), expected[f"vis2.{modality}_expert_share"], atol=1e-6, err_msg=modality
        )


@pytest.mark.parametrize("folder", folders("vis3_inputs.safetensors"), ids=lambda folder: folder.name)
def test_pathways_are_those_of_the_tokens(folder):
    """The original goes on from these paths to components of their numbers; ours counts them."""
    inputs, expected = (load_file(folder / f"{name}.safetensors") for name in ("vis3_inputs", "expected_vis3"))
    samples = sorted(name.partition(".")[0] for name in inputs if name.endswith(".gating_logits"))
    found = {"img": [], "text": []}
    for sample in samples:
        logits, ids = inputs[f"{sample}.gating_logits"], inputs[f"{sample}.output_ids"]
        trace = trace_of(logits, ids, int(inputs["num_image_tokens"]))
        for name, positions in zip(found, as_the_scripts_count(trace), strict=True):
            ways = stats.token_pathways(trace, trace.sites, positions)
            found[name].append(np.repeat(ways.paths, ways.counts, axis=0))
    for name, paths in found.items():
        ours = np.concatenate(paths)
        theirs = expected[f"{name}_token_paths"].int()
        assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))
