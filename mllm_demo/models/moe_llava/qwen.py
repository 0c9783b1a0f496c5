"""The decoder of Qwen's first generation, for which transformers has no class.

Facts from the published model ("Qwen Technical Report", arXiv:2309.16609, section 2.3; QwenLM/Qwen): fused qkv with
bias, no other bias, RMSNorm before attention and MLP, rotary positions by halves. Beyond the trained length two
things change: rotary angles are stretched by a factor fixed at the prompt (NTK-aware interpolation), and queries
are scaled by log(position) / log(trained length). It knows nothing of pictures or experts.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2MLP,
    Qwen2RMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.output_capturing import capture_outputs

from mllm_demo.models.moe_llava.config import MoeQwenConfig


class _HalfWidth:
    """A configuration that says half the intermediate size, which is what one half of Qwen's MLP has."""

    def __init__(self, config: MoeQwenConfig) -> None:
        self.hidden_size, self.hidden_act = config.hidden_size, config.hidden_act
        self.intermediate_size = config.intermediate_size // 2


class QwenAttention(nn.Module):
    """Multi-head attention with one projection for queries, keys and values."""

    def __init__(self, config: MoeQwenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = 0.0
        self.is_causal = True
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=not config.no_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        query_scale: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, _ = hidden_states.shape
        heads = self.c_attn(hidden_states).view(batch, length, 3, -1, self.head_dim)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, heads, S, head_dim)
        cos, sin = position_embeddings
        turned = cos.shape[-1]
        rotated = apply_rotary_pos_emb(query[..., :turned], key[..., :turned], cos, sin)
        query, key = (
            torch.cat((front, whole[..., turned:]), dim=-1) for front, whole in zip(rotated, (query, key), strict=True)
        )
        if query_scale is not None:
            query = query * query_scale
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.c_proj(output.reshape(batch, length, -1)), weights


class QwenDecoderLayer(GradientCheckpointingLayer):
    """Attention, then the MLP, each behind its norm."""

    def __init__(self, config: MoeQwenConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = QwenAttention(config, layer_idx)
        self.ln_2 = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Qwen2MLP(_HalfWidth(config))

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class QwenPreTrainedModel(PreTrainedModel):
    """What transformers asks of every model class."""

    config: MoeQwenConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QwenDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": QwenDecoderLayer, "attentions": QwenAttention}


class QwenModel(QwenPreTrainedModel):
    """Embeddings [B, S] to hidden states [B, S, H]. Positions are places in the cache, padding included."""

    def __init__(self, config: MoeQwenConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [QwenDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = past + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        stretch = self._stretch(past, attention_mask, inputs_embeds, past_key_values)
        common = {
            "attention_mask": create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=positions[None],
            ),
            "position_embeddings": self._angles(positions, stretch, inputs_embeds.dtype),
            "query_scale": self._query_scale(positions, past + inputs_embeds.shape[1], inputs_embeds.dtype),
            "past_key_values": past_key_values,
            **kwargs,
        }
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, **common)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _stretch(
        self, past: int, attention_mask: torch.Tensor | None, embeds: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor:
        """float32 [B or 1]: what the rotary base is multiplied by before its exponent; fixed when the prompt is read.

        It is remembered on the cache, whose keys were turned with it.
        """
        if past and cache is not None:
            known = getattr(cache, "rotary_stretch", None)
            return torch.ones(1, device=embeds.device) if known is None else known
        length = embeds.shape[1]
        stretch = torch.ones(1, device=embeds.device)
        if self.config.use_dynamic_ntk and length > self.config.seq_length:
            lengths = torch.tensor([length], device=embeds.device)
            if attention_mask is not None and attention_mask.dim() == 2:
                lengths = attention_mask.sum(-1)
            steps = torch.log2(lengths.double() / self.config.seq_length) + 1
            stretch = (2 ** steps.ceil() - 1).clamp_min(1).float()
        if cache is not None:
            cache.rotary_stretch = stretch
        return stretch

    def _angles(
        self, positions: torch.Tensor, stretch: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B or 1, S, turned dimensions]."""
        turned = int(self.config.hidden_size // self.config.num_attention_heads * self.config.rotary_pct)
        base = self.config.rope_theta * stretch ** (turned / (turned - 2))  # (B or 1,)
        powers = torch.arange(0, turned, 2, device=positions.device).float() / turned
        frequencies = positions[None, :, None].float() / base[:, None, None] ** powers
        angles = torch.cat((frequencies, frequencies), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _query_scale(self, positions: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor | None:
        """[S, 1], or None while nothing is longer than the model was trained for."""
        if not self.config.use_logn_attn or length <= self.config.seq_length:
            return None
        scale = torch.log((positions + 1).double()) / math.log(self.config.seq_length)
        return scale.clamp_min(1)[:, None].to(dtype)
