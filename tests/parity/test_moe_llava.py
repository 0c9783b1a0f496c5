"""MoE-LLaVA against recordings of the original, from files in its layout through our reader to a decoding model.

float32: router logits and combine weights within 1e-5, logits within 1e-4 (an order of magnitude above the difference
between two orders of summation), choices, what was dropped and greedy tokens exactly. Every case found is taken; what
one has not recorded is not compared.
"""

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from mllm_demo.models.moe_llava import checkpoint
from mllm_demo.models.moe_llava.config import mixture
from mllm_demo.models.moe_llava.experts import MoeLlavaRouter, RouterDecision, set_draw
from mllm_demo.models.moe_llava.model import MoeLlavaForConditionalGeneration
from tests.parity.cases import Case, find_cases

CASES = find_cases("moe_llava")
ROUTING = {"atol": 1e-5, "rtol": 0}
LOGITS = {"atol": 1e-4, "rtol": 0}
IMAGE = -200  # the original's mark of a picture's place
TOWER = "image_tower.image_tower."

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Loaded:
    """A case, the model read from it, and how many tokens stand for a picture."""

    case: Case
    model: PreTrainedModel
    inputs: Tensors
    expected: Tensors
    image_tokens: int

    def prompt(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Tensors:
        """`ids` [B, T] of the original as ours: each mark repeated, padding taken off and put back at the side that
        the configuration names."""
        config = self.model.config
        mark = [config.image_token_id] * self.image_tokens
        kept = ids.new_ones(ids.shape) if mask is None else mask
        rows = [
            [new for old, keep in zip(*pair, strict=True) if keep for new in (mark if old == IMAGE else [old])]
            for pair in zip(ids.tolist(), kept.tolist(), strict=True)
        ]
        length = max(len(row) for row in rows)
        pad = config.text_config.pad_token_id or 0
        left = self.case.config.get("tokenizer_padding_side") == "left"

        def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
            fillers = [[filler] * (length - len(row)) for row in rows]
            pairs = zip(fillers, rows, strict=True) if left else zip(rows, fillers, strict=True)
            return torch.tensor([first + second for first, second in pairs])

        return {"input_ids": padded(rows, pad), "attention_mask": padded([[1] * len(row) for row in rows], 0)}

    @contextmanager
    def drawn(self, prefix: str):
        """Inside the `with`, routers draw what was recorded for the run `prefix`, where anything was."""

        def draw(router: MoeLlavaRouter, logits: torch.Tensor) -> torch.Tensor | None:
            of = f"{prefix}moe.{router.layer_idx}."
            found = next((value for name, value in self.inputs.items() if name.startswith(of)), None)
            return found if found is not None and found.shape == logits.shape else None

        set_draw(self.model, draw)
        try:
            yield
        finally:
            set_draw(self.model, None)

    def vocabulary(self, logits: torch.Tensor) -> torch.Tensor:
        assert torch.isneginf(logits[..., self.model.config.image_token_id]).all(), "an image token could be drawn"
        return logits[..., : self.model.config.text_config.vocab_size]


def lay_out(case: Case, folder: Path) -> tuple[Path, Path]:
    """Folders as the original and its tower are published: a pickled state and the tower's own repository."""
    model, tower = folder / "model", folder / "tower"
    model.mkdir()
    tower.mkdir()
    state = case.tensors("state")
    (model / "config.json").write_text(json.dumps(case.config), encoding="utf-8")
    torch.save(state, model / "pytorch_model.bin")
    seen = {key.partition(TOWER)[2]: value for key, value in state.items() if TOWER in key}
    save_file(seen, tower / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        (tower / name).write_bytes((case.folder / f"vision_{name}").read_bytes())
    return model, tower


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def loaded(request, tmp_path_factory) -> Loaded:
    case = request.param
    folder = tmp_path_factory.mktemp("case")
    original, tower = lay_out(case, folder)
    config = checkpoint.read_config(original, tower, case.name)
    ours = folder / "ours"
    ours.mkdir()
    checkpoint.convert_weights(original, tower, config, ours, case.name, lambda share: None)
    config.save_pretrained(ours)
    model, info = AutoModelForImageTextToText.from_pretrained(ours, dtype=torch.float32, output_loading_info=True)
    assert isinstance(model, MoeLlavaForConditionalGeneration)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model.generation_config.eos_token_id = None
    expected = case.tensors("expected")
    return Loaded(case, model.eval(), case.tensors("inputs"), expected, expected["image_embeds"].shape[1])


def record(model: PreTrainedModel, call) -> tuple[object, dict[int, list[RouterDecision]], dict[int, Tensors]]:
    """What `call()` returns, every router's decisions by layer, and the last input and output of every block."""
    decisions: dict[int, list[RouterDecision]] = {}
    blocks: dict[int, Tensors] = {}
    handles = []
    for layer_idx, layer in enumerate(model.model.language_model.layers):
        if isinstance(getattr(layer.mlp, "router", None), MoeLlavaRouter):
            chosen = decisions.setdefault(layer_idx, [])
            handles.append(layer.mlp.router.register_forward_hook(lambda m, a, out, chosen=chosen: chosen.append(out)))
            seen = blocks.setdefault(layer_idx, {})
            handles.append(
                layer.mlp.register_forward_hook(lambda m, a, out, seen=seen: seen.update(input=a[0], output=out))
            )
    try:
        with torch.no_grad():
            return call(), decisions, blocks
    finally:
        for handle in handles:
            handle.remove()


def combine_weights(decision: RouterDecision) -> torch.Tensor:
    dense = torch.zeros_like(decision.router_logits)
    return dense.scatter_add_(1, decision.selected_experts, decision.gate_weights)


def check_routing(loaded: Loaded, prefix: str, decisions: dict[int, list[RouterDecision]]) -> None:
    expected, loss = loaded.expected, 0.0
    assert decisions.keys() == mixture(loaded.model.config.text_config).experts.keys()
    for layer_idx, (decision,) in decisions.items():
        of = f"{prefix}moe.{layer_idx}."
        torch.testing.assert_close(decision.router_logits, expected[f"{of}router_logits"], **ROUTING)
        torch.testing.assert_close(combine_weights(decision), expected[f"{of}combine_weights"], **ROUTING)
        assert torch.equal(decision.selected_experts, expected[f"{of}expert_idx"])
        assert torch.equal(decision.kept, expected[f"{of}kept"])
        experts = decision.router_logits.shape[1]
        first = torch.nn.functional.one_hot(decision.selected_experts[:, 0], experts)
        assert torch.equal(first.sum(0), expected[f"{of}exp_counts"])
        auxiliary = (decision.router_probs.mean(0) * first.float().mean(0)).sum() * experts
        torch.testing.assert_close(auxiliary, expected[f"{of}l_aux"].squeeze(), **ROUTING)
        loss += auxiliary
    if f"{prefix}moe_loss" in expected:
        scale = loaded.case.config["moe"]["router_aux_loss_coef"]
        torch.testing.assert_close(scale * loss, expected[f"{prefix}moe_loss"].squeeze(), **ROUTING)


def test_cases_were_found():
    assert CASES, "no case of MoE-LLaVA under the folder of MLLM_PARITY_CASES"


def test_picture_and_text(loaded):
    model, inputs, expected = loaded.model, loaded.inputs, loaded.expected
    prompt = loaded.prompt(inputs["input_ids"])
    pixels = inputs["pixel_values"]
    with torch.no_grad():
        seen = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = seen[model.config.vision_feature_layer]
    if model.config.vision_feature_select_strategy == "default":
        features = features[:, 1:]
    torch.testing.assert_close(features, expected["vision_features"], **LOGITS)

    with loaded.drawn(""):
        out, decisions, blocks = record(model, lambda: model(**prompt, pixel_values=pixels, output_hidden_states=True))
    embeds = out.image_hidden_states.view_as(expected["image_embeds"])
    torch.testing.assert_close(embeds, expected["image_embeds"], **LOGITS)
    torch.testing.assert_close(out.hidden_states[0], expected["inputs_embeds"], **LOGITS)
    torch.testing.assert_close(torch.stack(out.hidden_states), expected["hidden_states"], **LOGITS)
    torch.testing.assert_close(loaded.vocabulary(out.logits), expected["prefill_logits"], **LOGITS)
    check_routing(loaded, "", decisions)
    for layer_idx, block in blocks.items():
        for name in ("input", "output"):
            torch.testing.assert_close(block[name], expected[f"moe.{layer_idx}.{name}"], **LOGITS)


def test_text_alone(loaded):
    if "text.input_ids" not in loaded.inputs:
        pytest.skip("the case has no text without a picture")
    prompt = loaded.prompt(loaded.inputs["text.input_ids"])
    with loaded.drawn("text."):
        out, decisions, _ = record(loaded.model, lambda: loaded.model(**prompt))
        new = generate(loaded, prompt, len(loaded.expected["text.greedy_ids"]))
    torch.testing.assert_close(loaded.vocabulary(out.logits), loaded.expected["text.prefill_logits"], **LOGITS)
    check_routing(loaded, "text.", decisions)
    assert torch.equal(new.sequences[0, prompt["input_ids"].shape[1] :], loaded.expected["text.greedy_ids"])


def test_a_batch_whose_padding_is_routed_too(loaded):
    if "batch.input_ids" not in loaded.inputs:
        pytest.skip("the case has no batch")
    inputs, expected = loaded.inputs, loaded.expected
    prompt = loaded.prompt(inputs["batch.input_ids"], inputs["batch.attention_mask"])
    assert torch.equal(prompt["attention_mask"], expected["batch.merged_attention_mask"])
    pixels = inputs["batch.pixel_values"]
    with loaded.drawn("batch."):
        out, decisions, _ = record(loaded.model, lambda: loaded.model(**prompt, pixel_values=pixels))
    told = prompt["attention_mask"].bool()
    torch.testing.assert_close(loaded.vocabulary(out.logits)[told], expected["batch.logits"][told], **LOGITS)
    check_routing(loaded, "batch.", decisions)


def test_the_noise_of_the_original_when_it_is_the_recorded_one(loaded):
    if not any(name.startswith("noisy.moe.") for name in loaded.inputs):
        pytest.skip("the case has no recorded noise")
    prompt = loaded.prompt(loaded.inputs["input_ids"])
    pixels = loaded.inputs["pixel_values"]
    with loaded.drawn("noisy."):
        out, decisions, _ = record(loaded.model, lambda: loaded.model(**prompt, pixel_values=pixels))
    torch.testing.assert_close(loaded.vocabulary(out.logits), loaded.expected["noisy.prefill_logits"], **LOGITS)
    check_routing(loaded, "noisy.", decisions)


def generate(loaded: Loaded, prompt: Tensors, tokens: int, use_cache: bool = True, **more: torch.Tensor):
    return loaded.model.generate(
        **prompt,
        **more,
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize(("prefix", "use_cache"), [("", True), ("nocache.", False)], ids=["cache", "no cache"])
def test_greedy_answer(loaded, prefix, use_cache):
    if f"{prefix}greedy_ids" not in loaded.expected:
        pytest.skip("the case has no such answer")
    ids, logits = (loaded.expected[f"{prefix}greedy_{kind}"] for kind in ("ids", "logits"))
    prompt = loaded.prompt(loaded.inputs["input_ids"])
    pixels = loaded.inputs["pixel_values"]
    with loaded.drawn(""):
        made, decisions, _ = record(
            loaded.model, lambda: generate(loaded, prompt, len(ids), use_cache, pixel_values=pixels)
        )
    assert torch.equal(made.sequences[0, prompt["input_ids"].shape[1] :], ids)
    torch.testing.assert_close(loaded.vocabulary(torch.cat(made.logits)), logits, **LOGITS)
    if not use_cache:
        return
    for layer_idx, (_, *steps) in decisions.items():
        of = f"decode.moe.{layer_idx}."
        found = torch.cat([step.router_logits for step in steps])
        torch.testing.assert_close(found, loaded.expected[f"{of}router_logits"], **ROUTING)
        found = torch.cat([combine_weights(step) for step in steps])
        torch.testing.assert_close(found, loaded.expected[f"{of}combine_weights"], **ROUTING)


def test_more_places_than_pictures(loaded):
    prompt = loaded.prompt(loaded.inputs["input_ids"])
    with pytest.raises(ValueError, match="asks for"):
        loaded.model(**prompt)


def test_a_picture_that_nothing_asks_for(loaded):
    prompt = loaded.prompt(torch.tensor([[5, 6, 7]]))
    with torch.no_grad():
        alone = loaded.model(**prompt).logits
        beside = loaded.model(**prompt, pixel_values=loaded.inputs["pixel_values"]).logits
    assert torch.equal(alone, beside)
