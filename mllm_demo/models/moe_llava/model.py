"""MoE-LLaVA as transformers models: decoders with mixtures of MLPs, and the whole with tower and connector.

Decoders are transformers' own (Phi, StableLM, Qwen2) and the small one of `qwen`, with MLPs replaced; tower,
connector and the merging of picture and text follow transformers' LLaVA. It knows nothing of files or chats.
"""

import re

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    LlavaModel,
    PhiModel,
    Qwen2Model,
    StableLmModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast

from mllm_demo.errors import CheckpointError
from mllm_demo.models.moe_llava.config import (
    MoeLlavaConfig,
    MoeLlavaPhiConfig,
    MoeLlavaQwen2Config,
    MoeLlavaQwenConfig,
    MoeLlavaStableLmConfig,
    MoePhiConfig,
    MoeQwen2Config,
    MoeQwenConfig,
    MoeStableLmConfig,
    mixture,
)
from mllm_demo.models.moe_llava.experts import init_weights, original_draw, put_in_place, set_draw
from mllm_demo.models.moe_llava.qwen import QwenModel


class _Mixed:
    """Mixin of a decoder: its MLPs are replaced where the configuration's `moe` table says so."""

    # transformers looks for its decorator in the source of this module; the experts stand in another.
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config):
        super().__init__(config)
        self._mix(config.intermediate_size)

    def _mix(self, width: int) -> None:
        put_in_place(self, mixture(self.config), width)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not init_weights(module, self.config.initializer_range):
            super()._init_weights(module)


class MoePhiModel(_Mixed, PhiModel):
    """Phi with mixtures."""

    config: MoePhiConfig


class MoeStableLmModel(_Mixed, StableLmModel):
    """StableLM with mixtures."""

    config: MoeStableLmConfig


class MoeQwen2Model(_Mixed, Qwen2Model):
    """Qwen1.5 with mixtures."""

    config: MoeQwen2Config


class MoeQwenModel(_Mixed, QwenModel):
    """Qwen with mixtures."""

    config: MoeQwenConfig

    def _mix(self, width: int) -> None:
        super()._mix(width // 2)


def _projector(config: MoeLlavaConfig) -> nn.Module:
    """From the tower's width to the decoder's; the original's names of its layers are kept."""
    seen, read = config.vision_config.hidden_size, config.text_config.hidden_size
    if config.image_projector_type == "identity":
        return nn.Identity()
    if config.image_projector_type == "linear":
        return nn.Linear(seen, read)
    depth = re.fullmatch(r"mlp([1-9]\d*)x_gelu", config.image_projector_type)
    if depth is None:
        raise CheckpointError(
            f"The checkpoint's connector is of kind {config.image_projector_type!r}, which this program does not "
            "have; it has identity, linear and mlp<N>x_gelu."
        )
    layers: list[nn.Module] = [nn.Linear(seen, read)]
    for _ in range(1, int(depth[1])):
        layers += [nn.GELU(), nn.Linear(read, read)]
    return nn.Sequential(*layers)


class MoeLlavaModel(LlavaModel):
    """Pictures and text to hidden states.

    A picture's place is marked by as many tokens `image_token_id` as it has features. As in the original, pictures
    that no token asks for are ignored, and padding of a prompt is read as zeros.
    """

    config: MoeLlavaConfig
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config: MoeLlavaConfig):
        super().__init__(config)
        self.multi_modal_projector = _projector(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> LlavaModelOutputWithPast:
        features = None
        if inputs_embeds is None:
            pictured = input_ids == self.config.image_token_id
            # The placeholder has no embedding of its own: its id lies just beyond the vocabulary.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(pictured, 0))
            seen = (mm_encoder_outputs or {}).get("image")
            if seen is None and pixel_values is not None:
                seen = self.get_image_features(pixel_values, return_dict=True)
            if seen is not None:
                features = torch.cat(list(seen.pooler_output), dim=0).to(inputs_embeds)  # (pictures * patches, H)
                inputs_embeds = self._merged(inputs_embeds, pictured, features)
            elif past_key_values is None or past_key_values.get_seq_length() == 0:
                self._merged(inputs_embeds, pictured, inputs_embeds.new_zeros(0, inputs_embeds.shape[-1]))
            if attention_mask is not None and attention_mask.shape == input_ids.shape:
                inputs_embeds = inputs_embeds * attention_mask[..., None].to(inputs_embeds.dtype)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
        )

    @staticmethod
    def _merged(embeds: torch.Tensor, pictured: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        wanted = int(pictured.sum())
        if wanted > len(features):
            raise ValueError(f"The text asks for {wanted} image tokens, and the pictures have {len(features)}.")
        return embeds.masked_scatter(pictured[..., None], features[:wanted])


class MoeLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """The whole model, with an output head without bias; base of the four families.

    Logits are [B, S, vocab_size + 1]: the last column stands for the image token, which is never drawn.
    """

    config: MoeLlavaConfig
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config: MoeLlavaConfig):
        # Past transformers' own constructor, which would make all of its model first.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = MoeLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> LlavaCausalLMOutputWithPast:
        output = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            logits_to_keep=logits_to_keep,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        output.logits = functional.pad(output.logits, (0, 1), value=float("-inf"))
        return output


class MoeLlavaPhiForConditionalGeneration(MoeLlavaForConditionalGeneration):
    """MoE-LLaVA on Phi-2."""

    config: MoeLlavaPhiConfig


class MoeLlavaStableLmForConditionalGeneration(MoeLlavaForConditionalGeneration):
    """MoE-LLaVA on StableLM 2."""

    config: MoeLlavaStableLmConfig


class MoeLlavaQwenForConditionalGeneration(MoeLlavaForConditionalGeneration):
    """MoE-LLaVA on Qwen-1.8B."""

    config: MoeLlavaQwenConfig


class MoeLlavaQwen2ForConditionalGeneration(MoeLlavaForConditionalGeneration):
    """MoE-LLaVA on Qwen1.5."""

    config: MoeLlavaQwen2Config


def shapes(config: MoeLlavaConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of `config`'s model by name, in order; nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}


def set_noise(model: nn.Module, noisy: bool) -> str:
    """Switches the original's noise on or off; a sentence for the page that says which, "" for another model."""
    if not set_draw(model, original_draw if noisy else None):
        return ""
    if noisy:
        return "The second expert of every token is drawn with noise, as in the original; the seed repeats an answer."
    return (
        "The second expert is the second most probable one; the original draws it with noise at every step "
        "(--moe-llava-noise)."
    )


for _decoder in (MoePhiModel, MoeStableLmModel, MoeQwenModel, MoeQwen2Model):
    AutoModel.register(_decoder.config_class, _decoder, exist_ok=True)
for _whole in (
    MoeLlavaPhiForConditionalGeneration,
    MoeLlavaStableLmForConditionalGeneration,
    MoeLlavaQwenForConditionalGeneration,
    MoeLlavaQwen2ForConditionalGeneration,
):
    AutoModelForImageTextToText.register(_whole.config_class, _whole, exist_ok=True)
