"""Awaker2.5-VL against recordings of the original: each case goes from its state dict through our reader, the folders
that it writes and PEFT's loading to a model that decodes with its KV cache.

float32: logits within 1e-4 and gate logits within 1e-5, ten times the noise between float32 and float64 runs of the
original; gates, which are float16, within one unit in the last place; the same tokens.

bfloat16: with the vision tower's attention in the kernel that the original's call gets, the recorded case is
bit-identical with the cache, and without it in 10 of 12 steps. Where a kernel sums in another order single values
round the other way: a logit moves by up to 0.1, the mean by up to 0.015. Both are bounded here; that no dtype is
wrong is seen on modules alone, where a mistake moves more values than one in 500.
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForImageTextToText, Qwen2VLConfig

from mllm_demo.chat.region import Markers, first_user_turn
from mllm_demo.models import adapters
from mllm_demo.models.checkpoints import awaker
from mllm_demo.routing.tap import RoutingTap
from mllm_demo.routing.trace import Token
from tests.parity.cases import Case, find_cases

CASES = find_cases("awaker")
FLOAT32, BFLOAT16 = {"atol": 1e-4, "rtol": 0}, {"atol": 0.15, "rtol": 0}
BFLOAT16_MEAN = 0.02
GATE_TOLERANCE = {"float32": {"atol": 1e-5, "rtol": 0}, "bfloat16": {"atol": 2**-7, "rtol": 2**-7}}


@dataclass(frozen=True)
class Loaded:
    """A case, its model from the converted folders, and what `generate` is given."""

    case: Case
    model: torch.nn.Module

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        return self.case.tensors("inputs")

    @cached_property
    def expected(self) -> dict[str, torch.Tensor]:
        return self.case.tensors("expected")

    @property
    def dtype(self) -> str:
        return self.case.config["dtype"]

    @property
    def region(self) -> torch.Tensor:
        start, end = self.inputs["prompt_pos"].unsqueeze(-1).unbind(1)
        position = torch.arange(self.inputs["input_ids"].shape[1])
        return ((position >= start) & (position < end)).long()

    @property
    def arguments(self) -> dict[str, torch.Tensor]:
        names = ("input_ids", "attention_mask", "pixel_values", "pixel_values_videos", "image_grid_thw")
        given = {name: self.inputs[name] for name in (*names, "video_grid_thw") if name in self.inputs}
        ids, model = self.inputs["input_ids"], self.case.config["model"]
        kinds = (ids == model["image_token_id"]).int() + 2 * (ids == model["video_token_id"]).int()
        return {**given, "mm_token_type_ids": kinds}

    def generate(self, **options):
        """Greedy, every logit kept."""
        wanted = self.case.config["generation"]["max_new_tokens"]
        with self.model.base_model.routing_context(prompt_mask=self.region):
            return self.model.generate(
                **self.arguments,
                max_new_tokens=wanted,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=self.case.config["generation"]["pad_token_id"],
                output_logits=True,
                return_dict_in_generate=True,
                **options,
            )


def convert(case: Case, folder, dtype: str) -> torch.nn.Module:
    config = Qwen2VLConfig(**case.config["model"]).to_dict() | {"moe": case.config["moe"]}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    torch.save(case.tensors("state"), folder / "pytorch_model.bin")
    written = awaker.convert(folder, folder / "converted", lambda step: None)
    model = AutoModelForImageTextToText.from_pretrained(written.base, dtype=getattr(torch, dtype))
    return adapters.attach(model, written.adapter, case.name).eval()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def loaded(request, tmp_path_factory):
    case = request.param
    yield Loaded(case, convert(case, tmp_path_factory.mktemp(case.name), case.config["dtype"]))


@pytest.fixture
def like_the_original(loaded):
    """In bfloat16, gives the vision tower the attention kernel that the original's call gets."""
    if loaded.dtype == "float32":
        yield
        return
    tower, stack = loaded.model.get_base_model().model.visual, ExitStack()


    def enter(*_) -> None:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))

    handles = [
        tower.register_forward_pre_hook(enter),
        tower.register_forward_hook(lambda *_: stack.close()),
    ]
    yield
    for handle in handles:
        handle.remove()


@pytest.fixture
def decisions(loaded):
    """Every decision of every router, by the original's name of its module, in order."""
    heard: dict[str, list] = {"o_proj": [], "gate_proj": []}
    handles = []
    for router in loaded.model.base_model.routers():
        kept = heard["o_proj" if router.site_name.endswith("self_attn") else "gate_proj"]
        handles.append(router.register_forward_hook(lambda m, args, out, kept=kept: kept.append((args[0], out))))
    yield heard
    for handle in handles:
        handle.remove()


def close(ours: torch.Tensor, theirs: torch.Tensor, dtype: str, what: str = "values") -> None:
    """Compares activations or logits of a model computing in `dtype`."""
    tolerance = FLOAT32 if dtype == "float32" else BFLOAT16
    torch.testing.assert_close(ours.float(), theirs.float(), msg=lambda text: f"{what}: {text}", **tolerance)
    if dtype != "float32":
        assert (ours.float() - theirs.float()).abs().mean() <= BFLOAT16_MEAN, what


def close_gates(ours: torch.Tensor, theirs: torch.Tensor, dtype: str) -> None:
    """float16 probabilities: one unit in the last place, which non-negative halves count by their bits; in bfloat16
    what one unit of a logit makes of them."""
    if dtype != "float32":
        torch.testing.assert_close(ours.float(), theirs.float(), atol=2**-7, rtol=2**-7)
        return
    steps = (ours.half().contiguous().view(torch.int16).int() - theirs.contiguous().view(torch.int16).int()).abs()
    assert steps.max() <= 1


def check_decisions(loaded: Loaded, decisions: dict, expected: dict, prefix: str, calls: int) -> None:
    """Compares calls x layers decisions of each gated module with what was recorded under `prefix`."""
    layers = loaded.case.config["model"]["num_hidden_layers"]
    for module, heard in decisions.items():
        assert len(heard) == calls * layers

        def stacked(read, heard=heard):
            rows = torch.stack([read(given, out) for given, out in heard])  # (calls * layers, batch, n)
            return rows.unflatten(0, (calls, layers)).squeeze(0) if calls == 1 else rows.unflatten(0, (calls, layers))

        logits = stacked(lambda _, out: out.router_logits[:, 0]) * loaded.case.config["moe"]["gates_tmp"]
        theirs = expected[f"{prefix}.{module}.logits"].float()
        torch.testing.assert_close(logits, theirs, **GATE_TOLERANCE[loaded.dtype])
        probs = stacked(lambda _, out: out.router_probs[:, 0])
        close_gates(probs, expected[f"{prefix}.{module}.probs"], loaded.dtype)
        selected = stacked(lambda _, out: out.selected_experts[:, 0])
        gates = torch.zeros_like(probs).scatter(-1, selected, probs.gather(-1, selected))
        close_gates(gates, expected[f"{prefix}.{module}.gates"], loaded.dtype)
        weights = stacked(lambda _, out: out.routing_weights[:, 0])
        chosen = probs.gather(-1, selected)
        if loaded.case.config["moe"]["g_enable"]:
            chosen = chosen * chosen.amax(-1, keepdim=True)
        torch.testing.assert_close(weights, chosen, atol=1e-7, rtol=0)


def test_there_are_cases():
    assert CASES


@torch.no_grad()
def test_a_whole_forward(loaded, like_the_original, decisions):
    expected, keep = loaded.expected, loaded.inputs["attention_mask"].bool()
    layers = loaded.model.get_base_model().model.language_model.layers
    heard, handles = {}, []
    for block in ("self_attn", "mlp"):
        for name, module in getattr(layers[0], block).named_children():
            handles.append(
                module.register_forward_hook(lambda m, args, out, name=name: heard.update({name: (args[0], out)}))
            )
    with loaded.model.base_model.routing_context(prompt_mask=loaded.region):
        output = loaded.model(
            **loaded.arguments,
            position_ids=loaded.inputs["position_ids"],
            use_cache=False,
            output_hidden_states=True,
        )
    for handle in handles:
        handle.remove()
    dtype = loaded.dtype
    close(output.logits[keep], expected["prefill.logits"][keep], dtype, "logits")
    recorded = expected["prefill.hidden_states"]
    for layer, (ours, theirs) in enumerate(zip(output.hidden_states, recorded, strict=True)):
        close(ours[keep], theirs[keep], dtype, f"hidden states {layer}")
    check_decisions(loaded, decisions, expected, "prefill.gate", calls=1)
    for given, _ in (*decisions["o_proj"], *decisions["gate_proj"]):
        theirs = expected["prefill.gate.input"].float()
        torch.testing.assert_close(given[:, 0].float(), theirs, **GATE_TOLERANCE[dtype])
    for name in [key.split(".")[2] for key in expected if key.startswith("prefill.layer0.") and key.endswith(".out")]:
        close(heard[name][1][keep], expected[f"prefill.layer0.{name}.out"][keep], dtype, name)


@torch.no_grad()
def test_decoding_with_the_cache(loaded, like_the_original, decisions):
    expected = loaded.expected
    output = loaded.generate(use_cache=True)
    assert torch.equal(output.sequences[:, loaded.inputs["input_ids"].shape[1] :], expected["generate.new_ids"])
    close(torch.stack(output.logits, dim=1), expected["generate.logits"], loaded.dtype)
    check_decisions(loaded, decisions, expected, "gate", calls=len(output.logits))


@torch.no_grad()
def test_decoding_without_the_cache(loaded, like_the_original, decisions):
    expected = loaded.expected
    output = loaded.generate(use_cache=False)
    assert torch.equal(output.sequences[:, loaded.inputs["input_ids"].shape[1] :], expected["nocache.new_ids"])
    close(torch.stack(output.logits, dim=1), expected["nocache.logits"], loaded.dtype)


@torch.no_grad()
def test_keeping_the_prompts_gate_is_the_original_without_its_cache(loaded, like_the_original, decisions, monkeypatch):
    for router in loaded.model.base_model.routers():
        monkeypatch.setattr(router, "decode_choice", "kept")
    monkeypatch.setattr(loaded.model.active_peft_config, "decode_choice", "kept")
    output = loaded.generate(use_cache=True)
    for heard in decisions.values():
        layers = len(heard) // len(output.logits)
        for index, (_, out) in enumerate(heard):
            assert torch.equal(out.gate, heard[index % layers][1].gate)
    if loaded.dtype == "float32":  # in bfloat16 cached and uncached attention round differently
        assert torch.equal(
            output.sequences[:, loaded.inputs["input_ids"].shape[1] :], loaded.expected["nocache.new_ids"]
        )
        close(torch.stack(output.logits, dim=1), loaded.expected["nocache.logits"], loaded.dtype)


@torch.no_grad()
def test_modules_alone_round_as_the_original_does(loaded):
    """Each adapted module of layer 0 on recorded inputs and the recorded gate input: no other rounding between."""
    expected, base = loaded.expected, loaded.model.get_base_model().model.language_model.layers[0]
    state = loaded.model.base_model._state
    recorded = [key.split(".")[2] for key in expected if key.startswith("prefill.layer0.") and key.endswith(".out")]
    inputs = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    for name in recorded:
        module = getattr(base.self_attn if hasattr(base.self_attn, name) else base.mlp, name)
        state.is_prefill, state.prompt_mean = True, expected["prefill.gate.input"].unsqueeze(1)
        for site in module.router_sites.values():
            site.end_forward()
        ours = module(expected[f"prefill.layer0.{inputs.get(name, name)}.in"]).float()
        theirs = expected[f"prefill.layer0.{name}.out"].float()
        if loaded.dtype == "float32":
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        else:
            # A value may round the other way where a kernel sums in another order; dtype mistakes move many.
            torch.testing.assert_close(ours, theirs, atol=2**-8, rtol=2**-7)
            assert (ours != theirs).float().mean() <= 0.002


def test_the_region_is_found_by_its_tokens(loaded):
    marks = loaded.case.config["special_token_ids"]
    found = first_user_turn(
        loaded.inputs["input_ids"],
        Markers(marks["im_start"], marks["im_end"], marks["vision_start"], marks["image_pad"]),
    )
    assert torch.equal(found, loaded.region)


@torch.no_grad()
def test_a_trace_holds_both_decisions(loaded, like_the_original):
    ids = loaded.inputs["input_ids"]
    if len(ids) > 1:
        pytest.skip("a trace is of one sequence")
    with RoutingTap(loaded.model) as tap:
        output = loaded.generate(use_cache=True)
    phases = ["prefill"] * ids.shape[1] + ["decode"] * (len(output.logits) - 1)
    trace = tap.trace([Token(1, "a", "text", "user", phase) for phase in phases])
    for site in trace.sites:
        assert site.granularity == "sequence" and site.has_shared_expert == loaded.case.config["moe"]["g_enable"]
        module = "o_proj" if site.block == "attention" else "gate_proj"
        gates = loaded.expected[f"gate.{module}.probs"][:, site.layer_idx, 0].numpy()
        recorded = trace.router_probs[site.name]
        prompt = ids.shape[1]
        unit = 2**-11 if loaded.dtype == "float32" else 2**-7
        assert abs(recorded[:prompt] - gates[0]).max() <= unit
        assert abs(recorded[prompt:] - gates[1:]).max() <= unit
