"""Configurations of MoE-LLaVA models, read from the original's flat `config.json` or from one saved here.

The original keeps language model, connector, vision tower and experts in one flat table; here the language model
and the tower have tables of their own, as transformers has it. It knows nothing of weights or of files.
"""

from dataclasses import dataclass
from typing import ClassVar

from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlavaConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
    StableLmConfig,
)

from mllm_demo.errors import CheckpointError

# Where the original's names of a value differ from those of transformers.
_STABLELM_NAMES = {"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"}
_QWEN_NAMES = {"layer_norm_epsilon": "rms_norm_eps", "rotary_emb_base": "rope_theta"}
# Layers that are mixtures, when the configuration names a pattern and no layers.
_MODES = {
    "sparse": lambda layers: range(0, layers, 2),
    "dense": lambda layers: range(layers),
    "first_half": lambda layers: range(layers // 2),
    "second_half": lambda layers: range(layers // 2, layers),
}


@dataclass(frozen=True)
class Mixture:
    """What the `moe` table says. `experts`: number of experts by layer index; the rest holds for all layers."""

    experts: dict[int, int]
    top_k: int
    capacity_factor: float
    min_capacity: int
    use_residual: bool


def mixture(config: PretrainedConfig) -> Mixture:
    """The mixture layers of a text configuration; raises `CheckpointError` when the table contradicts itself."""
    moe = config.moe or {}
    layers = moe.get("moe_layers_idx")
    if layers is None:
        layers = list(_MODES.get(moe.get("moe_mode"), _MODES["sparse"])(config.num_hidden_layers))
    counts = moe.get("num_experts") or []
    counts = [counts] if isinstance(counts, int) else list(counts)
    if len(counts) == 1:
        counts *= len(layers)
    if not moe.get("moe_enable", bool(counts)):
        layers, counts = [], []
    top_k = moe.get("top_k_experts", 2)
    sound = len(counts) == len(layers) == len(set(layers)) and top_k in (1, 2)
    if not sound or not all(0 <= layer < config.num_hidden_layers for layer in layers):
        raise CheckpointError(
            f"The mixture described in config.json cannot be: {len(counts)} numbers of experts for the layers {layers} "
            f"of {config.num_hidden_layers}, top-{top_k}; get the configuration again."
        )
    return Mixture(
        experts=dict(zip(layers, counts, strict=True)),
        top_k=top_k,
        capacity_factor=float(moe.get("eval_capacity_factor", 1.0)),
        min_capacity=int(moe.get("min_capacity", 4)),
        use_residual=bool(moe.get("use_residual", False)),
    )


class MoePhiConfig(PhiConfig):
    """Phi with `moe`, the original's table of mixture layers."""

    model_type = "moe_llava_phi_text"
    moe: dict | None = None


class MoeStableLmConfig(StableLmConfig):
    """StableLM with `moe`."""

    model_type = "moe_llava_stablelm_text"
    moe: dict | None = None


class MoeQwen2Config(Qwen2Config):
    """Qwen2, which Qwen1.5 is, with `moe`."""

    model_type = "moe_llava_qwen1_5_text"
    moe: dict | None = None


class MoeQwenConfig(PretrainedConfig):
    """Qwen (the first generation), which transformers has no class for, with `moe`.

    `intermediate_size` is that of the two halves of the MLP together, as the original counts; `seq_length`: the
    length from which on attention is rescaled (`use_logn_attn`) and rotary angles are stretched
    (`use_dynamic_ntk`).
    """

    model_type = "moe_llava_qwen_text"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    max_position_embeddings: int = 8192
    seq_length: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rotary_pct: float = 1.0
    no_bias: bool = True
    use_logn_attn: bool = True
    use_dynamic_ntk: bool = True
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    moe: dict | None = None


class MoeLlavaConfig(LlavaConfig):
    """Base of the four families: `text_config` with its mixtures, `vision_config`, and how they are joined.

    `image_projector_type`: "identity", "linear" or "mlp<N>x_gelu"; `image_aspect_ratio`: how the model was trained
    to see pictures that are no squares, "pad" or anything else; `mm_image_tower`: the repository of the tower.
    """

    family_config: ClassVar[type[PretrainedConfig]] = PretrainedConfig
    names: ClassVar[dict[str, str]] = {}
    defaults: ClassVar[dict[str, object]] = {}

    image_projector_type: str = "linear"
    image_aspect_ratio: str | None = None
    mm_image_tower: str | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.text_config, dict):
            self.text_config = self.family_config(**self.text_config)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As transformers has it, from either form."""
        if "text_config" not in config_dict and "hidden_size" in config_dict:
            config_dict = cls.from_original(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_original(cls, flat: dict) -> dict:
        """The nested table for the original's flat one; the tower's shape is that of its name until it is known."""
        text = {cls.names.get(name, name): value for name, value in flat.items()}
        known = {*cls.family_config.__dataclass_fields__, "rope_theta", "rope_scaling", "partial_rotary_factor"}
        text = {**cls.defaults, **{name: value for name, value in text.items() if name in known}}
        for about_the_whole in ("model_type", "architectures", "transformers_version"):
            text.pop(about_the_whole, None)
        strategy = "full" if flat.get("mm_vision_select_feature", "patch") == "cls_patch" else "default"
        tower = flat.get("mm_image_tower") or ""
        kept = ("torch_dtype", "dtype", "image_aspect_ratio", "mm_image_tower")
        return {
            **{name: flat[name] for name in kept if flat.get(name) is not None},
            "model_type": cls.model_type,
            "text_config": text,
            "vision_config": _likely_tower(tower),
            "image_token_index": text["vocab_size"],
            "vision_feature_layer": flat.get("mm_vision_select_layer", -2),
            "vision_feature_select_strategy": strategy,
            "image_projector_type": flat.get("image_projector_type", "linear"),
            "tie_word_embeddings": flat.get("tie_word_embeddings", False),
        }


def _likely_tower(name: str) -> dict:
    """The tower that published checkpoints of that name have; replaced by the real one's when that is fetched."""
    if "siglip" in name:
        return SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
        ).to_dict()
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    ).to_dict()


class MoeLlavaPhiConfig(MoeLlavaConfig):
    """MoE-LLaVA on Phi-2."""

    model_type = "moe_llava_phi"
    family_config = MoePhiConfig


class MoeLlavaStableLmConfig(MoeLlavaConfig):
    """MoE-LLaVA on StableLM 2."""

    model_type = "moe_llava_stablelm"
    family_config = MoeStableLmConfig
    names = _STABLELM_NAMES
    defaults = {"use_qkv_bias": True}


class MoeLlavaQwenConfig(MoeLlavaConfig):
    """MoE-LLaVA on Qwen-1.8B."""

    model_type = "moe_llava_qwen"
    family_config = MoeQwenConfig
    names = _QWEN_NAMES


class MoeLlavaQwen2Config(MoeLlavaConfig):
    """MoE-LLaVA on Qwen1.5."""

    model_type = "moe_llava_qwen1_5"
    family_config = MoeQwen2Config


FAMILIES = (MoeLlavaPhiConfig, MoeLlavaStableLmConfig, MoeLlavaQwenConfig, MoeLlavaQwen2Config)
for _family in FAMILIES:
    AutoConfig.register(_family.model_type, _family, exist_ok=True)
    AutoConfig.register(_family.family_config.model_type, _family.family_config, exist_ok=True)
