"""What the routers of MoE-LoRA need beyond a layer's input: masks, modalities, the prompt's mean embedding.

`RoutingState` is one model's, filled by `MoeLoraModel` around each forward and read by the router sites. It knows
nothing of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .config import MoeLoraConfig

# Convention of the ids that `granularity="modality"` routes by.
TEXT_MODALITY, IMAGE_MODALITY = 0, 1
NO_PROMPT = "no prompt was seen: its decoder did not run a prefill before it"
NO_REGION = "the tokens of the first user turn are unknown; pass prompt_mask to routing_context"
_IMAGE_IDS = ("image_token_id", "image_token_index")
_VIDEO_IDS = ("video_token_id", "video_token_index")


@dataclass
class RoutingState:
    """
    What the routers of one model need during one forward of T tokens; all of it is optional.

    given           what the caller stated through `MoeLoraModel.routing_context`, by name
    attention_mask  [batch, T], 0 at padding
    prompt_mask     [batch, T], 0 at tokens that a sequence-level choice must not see (an answer trained on)
    modality_ids    int64 [batch, T]
    input_ids       int64 [batch, T], None where the caller gave embeddings
    prompt_mean     [batch, 1, hidden], from the last prefill, in float32 or the embeddings' own dtype
    token_mean      the same of the token embeddings alone, nothing scattered in
    why_no_mean     what to tell who needs a mean that is missing
    is_prefill      whether sequence-level choices are made in this forward, or kept from an earlier one
    cached          whether this forward has a KV cache
    in_forward      whether a forward of the whole model is running (a recomputation in backward is none)
    """

    given: dict[str, torch.Tensor | None] = field(default_factory=dict)
    attention_mask: torch.Tensor | None = None
    prompt_mask: torch.Tensor | None = None
    modality_ids: torch.Tensor | None = None
    input_ids: torch.Tensor | None = None
    prompt_mean: torch.Tensor | None = None
    token_mean: torch.Tensor | None = None
    why_no_mean: str = NO_PROMPT
    is_prefill: bool = True
    cached: bool = False
    in_forward: bool = False

    def begin(self, args: tuple, kwargs: dict[str, Any], configs: Sequence[MoeLoraConfig], model_config: Any) -> None:
        """Reads what the arguments of a forward say; `configs`: of the active adapters."""
        tokens = model_input(args, kwargs)
        num_tokens = tokens.shape[1] if tokens is not None and tokens.dim() > 1 else 0
        granularities = {config.effective_granularity for config in configs}
        cache, past = kwargs.get("past_key_values"), 0
        if granularities - {"token"} and hasattr(cache, "get_seq_length"):
            past = int(cache.get_seq_length())
        self.is_prefill = num_tokens != 1 or past == 0
        self.cached = cache is not None
        self.in_forward = True
        self.input_ids = tokens if tokens is not None and not tokens.is_floating_point() else None
        self.prompt_mask = self.given.get("prompt_mask") if self.is_prefill else None
        mask = self.given.get("attention_mask", kwargs.get("attention_mask"))
        mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        self.attention_mask = mask if mask is None or not num_tokens else mask[:, -num_tokens:]
        self.modality_ids = None
        if "modality" in granularities:
            self.modality_ids = self._modality_ids(tokens, past, num_tokens, model_config)
        if self.is_prefill:
            self.prompt_mean = self.token_mean = None
            self.why_no_mean = NO_PROMPT

    def mean_for(self, decode_choice: str) -> torch.Tensor | None:
        """What a router that reads the prompt's mean reads in this forward; None where it is not known."""
        recomputed = decode_choice == "recomputed" and not self.is_prefill
        return self.token_mean if recomputed and self.token_mean is not None else self.prompt_mean

    def capture_prompt(
        self,
        embeds: torch.Tensor,
        configs: Sequence[MoeLoraConfig],
        embedding: Callable[[torch.Tensor], torch.Tensor],
        model_config: Any,
    ) -> None:
        """Takes the means of a prefill whose decoder is given `embeds` [batch, T, hidden].

        `configs`: of the active adapters whose routers read a mean; `embedding`: the model's own, of tokens.
        """
        mask = self.prompt_mask if self.prompt_mask is not None else self.attention_mask
        if any(config.prompt_region == "first_user_turn" for config in configs):
            if self.prompt_mask is None:
                self.why_no_mean = NO_REGION
                return
            mask = _region(mask, *embeds.shape[:-1])
        if mask is not None and mask.shape != embeds.shape[:-1]:
            raise ValueError(f"The prompt's mask must have shape {tuple(embeds.shape[:-1])}, got {tuple(mask.shape)}.")
        # A weighted norm rounds as the decoder's own does, and so does what it is given.
        native = all(config.router_norm == "rms_weighted" or config.adapter_dtype == "model" for config in configs)
        dtype = embeds.dtype if native else torch.float32
        if self.input_ids is not None and any(config.decode_choice == "recomputed" for config in configs):
            raw = embedding(self.input_ids)
            self.token_mean = masked_mean(raw, mask, dtype)
            if self.cached:
                video = token_mask(self.input_ids, model_config, _VIDEO_IDS)
                embeds = torch.where(video.unsqueeze(-1), raw, embeds)
        self.prompt_mean = masked_mean(embeds, mask, dtype)

    def _modality_ids(
        self, tokens: torch.Tensor | None, past: int, num_tokens: int, model_config: Any
    ) -> torch.Tensor | None:
        """int64 [batch, T] of this forward; None if it cannot be known."""
        if tokens is None:
            return None
        given = self.given.get("modality_ids")
        if given is not None:
            missing = max(0, past + num_tokens - given.shape[1])
            padded = nn.functional.pad(given, (0, missing), value=TEXT_MODALITY)
            return padded[:, past : past + num_tokens]
        names = (*_IMAGE_IDS, *_VIDEO_IDS)
        if not tokens.is_floating_point():
            return token_mask(tokens, model_config, names).long() * IMAGE_MODALITY
        if self.is_prefill and any(getattr(model_config, name, None) is not None for name in names):
            return None
        return torch.full(tokens.shape[:2], TEXT_MODALITY, dtype=torch.long, device=tokens.device)


def model_input(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """What a forward of a language model was given: ids [batch, T] or embeddings [batch, T, hidden]."""
    for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
        if isinstance(value, torch.Tensor):
            return value
    return None


def token_mask(ids: torch.Tensor, model_config: Any, names: Sequence[str]) -> torch.Tensor:
    """bool, of the shape of `ids`: which of them are the ids that the model's configuration has under `names`."""
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for name in names:
        number = getattr(model_config, name, None)
        if number is not None:
            mask |= ids == number
    return mask


def masked_mean(x: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Mean over tokens, summed in float32 and rounded once to `dtype`: `x` [.., T, n], `mask` [.., T]; [.., 1, n]."""
    x = x.float()
    if mask is None:
        return x.mean(dim=-2, keepdim=True).to(dtype)
    mask = mask.to(x).unsqueeze(-1)  # (batch, T, 1)
    mean = (x * mask).sum(dim=-2, keepdim=True) / mask.sum(dim=-2, keepdim=True).clamp_min(1.0)
    return mean.to(dtype)


def _region(mask: torch.Tensor, batch: int, num_tokens: int) -> torch.Tensor:
    """A region's `mask` for `batch` rows (beams repeat a row) and tokens that came after it, which are outside."""
    if mask.shape[0] != batch and batch % mask.shape[0] == 0:
        mask = mask.repeat_interleave(batch // mask.shape[0], dim=0)
    return nn.functional.pad(mask, (0, max(0, num_tokens - mask.shape[1])))
