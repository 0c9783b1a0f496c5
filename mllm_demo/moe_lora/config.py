"""The configuration of MoE-LoRA: what the published systems choose differently, validated where it is made.

It knows nothing of torch modules.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from peft.config import PeftConfig

SHARED_EXPERT_WEIGHTINGS = ("constant", "complement")
ROUTER_INPUTS = ("hidden", "prompt_mean")
ROUTER_SCOPES = ("module", "block", "layer", "model")
GRANULARITIES = ("token", "sequence", "modality")
ROUTER_NORMS = ("rms", "rms_weighted", "none")
SOFTMAX_DTYPES = ("float32", "float16")
ADAPTER_DTYPES = ("float32", "model")
DECODE_CHOICES = ("kept", "recomputed")
PROMPT_REGIONS = ("prompt", "first_user_turn")


class MoeLoraType(str, enum.Enum):
    """The key of this method in PEFT's mappings; compares and hashes as its string, as `PeftType` does."""

    MOE_LORA = "MOE_LORA"


@dataclass
class MoeLoraConfig(PeftConfig):
    """
    Configuration of a [`MoeLoraModel`]: several LoRA experts and a router on frozen linear layers.

        y = W0 x + s * sum_e g_e * B_e A_e x  (+ s * g_shared * B_shared A_shared x),   s = lora_alpha / r
        g = topk( softmax( (W_g * norm(z)) / router_temperature + noise ) )

    Args:
        r (`int`): Rank of each expert.
        lora_alpha (`float`): Scale of all experts; s = lora_alpha / r (plain modules: / plain_r).
        lora_dropout (`float`): Dropout on the input of the experts, in [0, 1).
        num_experts (`int`): Number of routed experts per target module, without the shared one.
        num_experts_per_tok (`int`): k of the top-k choice, at most `num_experts`.
        use_shared_expert (`bool`): Whether one more expert serves every token.
        shared_expert_weighting (`str`):
            "constant": the shared expert is weighted 1. "complement" (Awaker2.5-VL): with w = max_e g_e the
            adapter's output is w * sum_e g_e E_e(x) + (1 - w) * E_shared(x); with k = 1 that is g^2 E_e(x).
        norm_topk_prob (`bool`):
            Whether the k chosen weights are divided by their sum. With k = 1 this makes the weight 1, so that
            only the balance loss trains the router.
        target_modules (`Union[List[str], str]`): Modules that get experts; list or regex as in PEFT.
        plain_target_modules (`Union[List[str], str]`):
            Modules that get one ordinary LoRA, always on, in the same adapter.
        plain_r (`int`): Rank of the plain LoRA; None: `r`.
        exclude_modules, layers_to_transform, layers_pattern, modules_to_save: As in [`LoraConfig`].
        router_input (`str`):
            What the router reads. "hidden": the input of the first-executed module that shares it.
            "prompt_mean": the mean of the prompt's input embeddings; every choice is then one per sequence.
        prompt_region (`str`):
            Whose embeddings that mean is of. "prompt": every token of the prompt. "first_user_turn"
            (Awaker2.5-VL): only those that `routing_context(prompt_mask=...)` names, which must be stated.
        decode_choice (`str`):
            With "prompt_mean", what serves the tokens decoded with a KV cache. "kept": the prompt's choice.
            "recomputed" (Awaker2.5-VL): a choice from the token embeddings alone, in which pictures and
            videos are the embeddings of their placeholders; and at prefill videos are that already.
        router_scope (`str`):
            What shares one router: each "module", the "block" (modules of one parent module: attention, MLP),
            the decoder "layer", or the whole "model" (one router per stack of layers).
        granularity (`str`):
            "token": each token chooses. "sequence": one choice per sequence, made at prefill, kept while
            decoding. "modality": the choice depends on the token's modality id only (0 text, 1 image).
        num_modalities (`int`): Number of modality ids.
        router_temperature (`float`): Divides the logits; above 0.
        router_noise_std (`float`): Standard deviation of gaussian noise on the logits, in training mode only.
        router_norm (`str`):
            Applied to the router's input: "rms" (no weights), "rms_weighted" (weights, eps 1e-6) or "none".
        router_bias (`bool`): Whether the router has a bias.
        router_softmax_dtype (`str`):
            "float32" or "float16" (Awaker2.5-VL): what the logits are cast to, softmax, top-k and 1 - w are
            computed in.
        router_aux_loss_coef (`float`): What the caller multiplies `MoeLoraModel.router_aux_loss()` by.
        adapter_dtype (`str`):
            What experts and routers are kept and multiplied in: "float32", or the "model"'s own. Plain LoRA
            is float32 either way.
        experts_in_4bit (`bool`):
            Packs the experts' weights as NF4 while an adapter is loaded, which must be with
            `low_cpu_mem_usage=True`; they then serve inference only and unpack to the model's dtype.
        init_lora_weights (`bool`): True: A as in LoRA, B zeros. False: B small and random (for tests).
    """

    r: int = field(default=8, metadata={"help": "Rank of each expert."})
    lora_alpha: float = field(default=16, metadata={"help": "Scale: s = lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the experts' input."})
    num_experts: int = field(default=4, metadata={"help": "Routed experts per target module."})
    num_experts_per_tok: int = field(default=1, metadata={"help": "Experts chosen per token (k)."})
    use_shared_expert: bool = field(default=True, metadata={"help": "Add an expert that serves every token."})
    shared_expert_weighting: str = field(default="constant", metadata={"help": "'constant' or 'complement'."})
    norm_topk_prob: bool = field(default=False, metadata={"help": "Divide the chosen weights by their sum."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules that get experts."}
    )
    plain_target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules that get one ordinary LoRA."}
    )
    plain_r: int | None = field(default=None, metadata={"help": "Rank of the ordinary LoRA; None: r."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules left alone."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Layer indices to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layers' list."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole."}
    )
    router_input: str = field(default="hidden", metadata={"help": "'hidden' or 'prompt_mean'."})
    prompt_region: str = field(default="prompt", metadata={"help": "'prompt' or 'first_user_turn'."})
    decode_choice: str = field(default="kept", metadata={"help": "'kept' or 'recomputed'."})
    router_scope: str = field(default="module", metadata={"help": "'module', 'block', 'layer' or 'model'."})
    granularity: str = field(default="token", metadata={"help": "'token', 'sequence' or 'modality'."})
    num_modalities: int = field(default=2, metadata={"help": "Number of modality ids."})
    router_temperature: float = field(default=1.0, metadata={"help": "Divides the router's logits."})
    router_noise_std: float = field(default=0.0, metadata={"help": "Noise on the logits while training."})
    router_norm: str = field(default="rms", metadata={"help": "'rms', 'rms_weighted' or 'none'."})
    router_bias: bool = field(default=False, metadata={"help": "Give the router a bias."})
    router_softmax_dtype: str = field(default="float32", metadata={"help": "'float32' or 'float16'."})
    adapter_dtype: str = field(default="float32", metadata={"help": "'float32' or 'model'."})
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "Weight of the balance loss."})
    experts_in_4bit: bool = field(default=False, metadata={"help": "Hold loaded experts as NF4."})
    init_lora_weights: bool = field(
        default=True, metadata={"help": "B zeros (True) or small random (False)."}
    )

    @property
    def effective_granularity(self) -> str:
        """The granularity at which choices really differ: a prompt's mean chooses once per sequence."""
        if self.router_input == "prompt_mean" and self.granularity == "token":
            return "sequence"
        return self.granularity

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = MoeLoraType.MOE_LORA
        for name in ("target_modules", "plain_target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)

        for name in ("r", "num_experts", "num_experts_per_tok", "num_modalities"):
            self._require(
                _is_int(getattr(self, name)) and getattr(self, name) > 0, name, "an integer above 0"
            )
        self._require(
            self.plain_r is None or (_is_int(self.plain_r) and self.plain_r > 0),
            "plain_r",
            "None or an integer above 0",
        )
        self._require(
            self.num_experts_per_tok <= self.num_experts,
            "num_experts_per_tok",
            f"at most num_experts ({self.num_experts})",
        )
        self._require(self.lora_alpha > 0, "lora_alpha", "a number above 0")
        self._require(0.0 <= self.lora_dropout < 1.0, "lora_dropout", "a number in [0, 1)")
        self._require(self.router_temperature > 0, "router_temperature", "a number above 0")
        self._require(self.router_noise_std >= 0, "router_noise_std", "a number of at least 0")
        self._require(self.router_aux_loss_coef >= 0, "router_aux_loss_coef", "a number of at least 0")
        for name, allowed in (
            ("shared_expert_weighting", SHARED_EXPERT_WEIGHTINGS),
            ("router_input", ROUTER_INPUTS),
            ("router_scope", ROUTER_SCOPES),
            ("granularity", GRANULARITIES),
            ("router_norm", ROUTER_NORMS),
            ("router_softmax_dtype", SOFTMAX_DTYPES),
            ("adapter_dtype", ADAPTER_DTYPES),
            ("decode_choice", DECODE_CHOICES),
            ("prompt_region", PROMPT_REGIONS),
        ):
            self._require(getattr(self, name) in allowed, name, "one of " + ", ".join(map(repr, allowed)))
        if self.router_input != "prompt_mean":
            for name in ("decode_choice", "prompt_region"):
                default = type(self).__dataclass_fields__[name].default
                self._require(getattr(self, name) == default, name, f"{default!r} unless router_input='prompt_mean'")
        if self.granularity == "modality":
            self._require(
                self.num_modalities >= 2, "num_modalities", "at least 2 with granularity='modality'"
            )
            self._require(
                not self.router_bias, "router_bias", "False with granularity='modality', which has no input"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform`, which is None.")
        for modules in ("target_modules", "plain_target_modules"):
            if isinstance(getattr(self, modules), str) and self.layers_to_transform is not None:
                raise ValueError(f"`layers_to_transform` cannot be used when `{modules}` is a regex (str).")

    def _require(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"`{name}` must be {expected}, got {getattr(self, name)!r}.")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
