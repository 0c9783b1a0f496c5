"""What an Awaker2.5-VL checkpoint holds, key by key, and where each tensor goes: base model or MoE-LoRA adapter.

The original is a whole state dict of Qwen2-VL under the names of its own PEFT fork: ordinary LoRA `default` on q, k
and v; experts `0`, `1`, ... and the shared one `g` on o, gate, up and down; `ln` and `w_gate` where a gate is. What
must be there is computed from the configuration, so that a foreign key is named. It knows nothing of files.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from transformers import PretrainedConfig, Qwen2VLForConditionalGeneration

from mllm_demo.errors import CheckpointError
from mllm_demo.models.checkpoints.source import Entry
from mllm_demo.models.checkpoints.streaming import Piece
from mllm_demo.moe_lora import MoeLoraConfig

PREFIX = "base_model.model."
PLAIN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("self_attn.o_proj", "mlp.gate_proj")
EXPERTS = (*GATED, "mlp.up_proj", "mlp.down_proj")
SHARED = "g"
MARK = ".lora_moe_A."
_EXPERT = re.compile(r"\.lora_moe_A\.(\d+|g)\.weight$")
# (in the original, in this version of transformers)
_RENAMED = (("model.", "model.language_model."), ("visual.", "model.visual."))


@dataclass(frozen=True)
class Mixture:
    """The method's numbers: `num_experts` without the shared one, ranks, scale, k and temperature."""

    num_experts: int
    shared: bool
    r: int
    plain_r: int
    lora_alpha: float
    topk: int
    temperature: float

    @property
    def names(self) -> tuple[str, ...]:
        """The experts as the original calls them, the shared one last."""
        return (*map(str, range(self.num_experts)), *([SHARED] if self.shared else []))

    @classmethod
    def read(cls, tensors: Mapping[str, Entry], declared: Mapping) -> "Mixture":
        """Counts experts and ranks in `tensors`; `declared`: what the folder's configuration says under "moe".

        Scale, k and temperature leave no trace in the weights: undeclared they are those of the published model,
        lora_alpha = 2 r, k = 1 and temperature 1.
        """
        names = {match[1] for match in map(_EXPERT.search, tensors) if match}
        numbers = [name for name in names if name != SHARED]
        ranks = [_rank(tensors, key) for key in (f"{MARK}0.weight", ".lora_A.default.weight")]
        r, plain_r = (rank or 1 for rank in ranks)
        count = max(len(numbers), 1)
        if declared.get("num_experts", count) != count:
            raise CheckpointError(
                f"The configuration declares {declared['num_experts']} experts, but the weights hold {count}; "
                "give the configuration that was saved with them."
            )
        return cls(
            num_experts=count,
            shared=SHARED in names,
            r=r,
            plain_r=plain_r,
            lora_alpha=declared.get("lora_alpha", 2 * r),
            # The original's top-k of more than there are is all of them.
            topk=min(int(declared.get("topk", 1)), count),
            temperature=float(declared.get("gates_tmp", 1.0)),
        )

    def config(self) -> MoeLoraConfig:
        """The same method as ours."""

        def pattern(modules: Iterable[str]) -> str:
            return r"model\.language_model\.layers\.\d+\.(" + "|".join(map(re.escape, modules)) + ")"

        return MoeLoraConfig(
            task_type="CAUSAL_LM",
            inference_mode=True,
            r=self.r,
            plain_r=self.plain_r,
            lora_alpha=self.lora_alpha,
            num_experts=self.num_experts,
            num_experts_per_tok=self.topk,
            use_shared_expert=self.shared,
            shared_expert_weighting="complement" if self.shared else "constant",
            target_modules=pattern(EXPERTS),
            plain_target_modules=pattern(PLAIN),
            router_input="prompt_mean",
            prompt_region="first_user_turn",
            decode_choice="recomputed",
            router_scope="block",
            granularity="sequence",
            router_temperature=self.temperature,
            router_norm="rms_weighted",
            router_bias=True,
            router_softmax_dtype="float16",
            # The original casts adapters to the model's dtype when it adds the second; a single one stays float32.
            adapter_dtype="model" if len(self.names) > 1 else "float32",
        )


def expected_keys(config: PretrainedConfig, mixture: Mixture) -> dict[str, tuple[int, ...]]:
    """Every key that the original saves for this model, with its shape; `lm_head` also where it is tied."""
    shapes = base_shapes(config)
    keys = {PREFIX + name: shape for name, shape in shapes.items()}
    for layer in range(config.get_text_config().num_hidden_layers):
        for module in (*PLAIN, *EXPERTS):
            path = f"model.layers.{layer}.{module}"
            out_features, in_features = shapes[f"{path}.weight"]
            if module in PLAIN:
                keys[f"{PREFIX}{path}.lora_A.default.weight"] = (mixture.plain_r, in_features)
                keys[f"{PREFIX}{path}.lora_B.default.weight"] = (out_features, mixture.plain_r)
                continue
            for name in mixture.names:
                keys[f"{PREFIX}{path}.lora_moe_A.{name}.weight"] = (mixture.r, in_features)
                keys[f"{PREFIX}{path}.lora_moe_B.{name}.weight"] = (out_features, mixture.r)
            if module in GATED:
                hidden = config.get_text_config().hidden_size
                keys[f"{PREFIX}{path}.w_gate.weight"] = (mixture.num_experts, hidden)
                keys[f"{PREFIX}{path}.w_gate.bias"] = (mixture.num_experts,)
                keys[f"{PREFIX}{path}.ln.weight"] = (hidden,)
    return keys


def base_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the bare model under the names it is published with; nothing is allocated."""
    with init_empty_weights():
        model = Qwen2VLForConditionalGeneration(config)
    shapes = {}
    for name, tensor in model.state_dict().items():
        for published, ours in _RENAMED:
            if name.startswith(ours):
                name = published + name.removeprefix(ours)
                break
        shapes[name] = tuple(tensor.shape)
    return shapes


def check(tensors: Mapping[str, Entry], expected: Mapping[str, tuple[int, ...]], tied: bool, title: str) -> None:
    """Raises `CheckpointError` naming the first key of `tensors` that is wrong, or the first that is missing."""
    for name, entry in tensors.items():
        if name not in expected:
            raise CheckpointError(
                f"{title} is not an Awaker checkpoint of this configuration: it has no place for {name}; "
                "give the original's state dict and the configuration of its base model."
            )
        if entry.shape != expected[name]:
            raise CheckpointError(
                f"{title} does not fit its configuration: {name} has shape {list(entry.shape)} where "
                f"{list(expected[name])} belongs; give the configuration of its base model."
            )
    optional = {f"{PREFIX}lm_head.weight"} if tied else set()
    missing = next((name for name in expected if name not in tensors and name not in optional), None)
    if missing is not None:
        raise CheckpointError(
            f"{title} is incomplete or not an Awaker checkpoint: it lacks {missing}; fetch it again."
        )


def base_pieces(tensors: Mapping[str, Entry], config: PretrainedConfig) -> list[Piece]:
    """The bare model's tensors under the names it is published with."""
    return [
        Piece(name, entry.shape, entry.dtype, entry.load)
        for name in base_shapes(config)
        if not (config.tie_word_embeddings and name == "lm_head.weight")
        for entry in [tensors[PREFIX + name]]
    ]


def adapter_pieces(tensors: Mapping[str, Entry], config: PretrainedConfig, mixture: Mixture) -> list[Piece]:
    """The adapter's tensors as our method names and stacks them."""
    return [
        piece
        for layer in range(config.get_text_config().num_hidden_layers)
        for module in (*PLAIN, *EXPERTS)
        for piece in _module_pieces(tensors, mixture, f"layers.{layer}.{module}", module)
    ]


def _module_pieces(tensors: Mapping[str, Entry], mixture: Mixture, path: str, module: str) -> Iterator[Piece]:
    source, target = f"{PREFIX}model.{path}", f"{PREFIX}model.language_model.{path}"
    if module in PLAIN:
        for part in ("lora_A", "lora_B"):
            yield _renamed(tensors[f"{source}.{part}.default.weight"], f"{target}.{part}")
        return
    for dim, (part, original) in enumerate((("lora_A", "lora_moe_A"), ("lora_B", "lora_moe_B"))):
        stack = [tensors[f"{source}.{original}.{name}.weight"] for name in mixture.names]
        shape = list(stack[0].shape)
        shape[dim] *= len(stack)
        yield Piece(
            f"{target}.{part}",
            tuple(shape),
            stack[0].dtype,
            lambda stack=stack, dim=dim: torch.cat([entry.load() for entry in stack], dim=dim),
        )
    if module in GATED:
        for original, ours in (("w_gate.weight", "weight"), ("w_gate.bias", "bias"), ("ln.weight", "norm_weight")):
            yield _renamed(tensors[f"{source}.{original}"], f"{target}.lora_router.{ours}")


def _renamed(entry: Entry, name: str) -> Piece:
    return Piece(name, entry.shape, entry.dtype, entry.load)


def _rank(tensors: Mapping[str, Entry], ending: str) -> int | None:
    return next((entry.shape[0] for name, entry in tensors.items() if name.endswith(ending) and entry.shape), None)
