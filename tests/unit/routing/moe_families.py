"""Tiny random models of every family of MoE vision-language models that the tap reads, built from their configs."""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import (
    AriaConfig,
    AutoConfig,
    AutoModelForImageTextToText,
    Ernie4_5_VLMoeConfig,
    Gemma4Config,
    Glm4vMoeConfig,
    InternVLConfig,
    Llama4Config,
    PretrainedConfig,
    Qwen3_5MoeConfig,
    Qwen3VLMoeConfig,
)

WIDTH, LAYERS, EXPERTS = 32, 3, 8
TEXT = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
# DeepSeek's: groups of experts, sigmoid or softmax, a factor on the weights, a first dense layer.
GROUPED = {
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": WIDTH,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
}
CLIP_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Family:
    """scores: what its routers make of logits; shared: an expert every token passes; sites: routers of the text."""

    config: PretrainedConfig
    scores: str = "softmax"
    shared: bool = True
    sites: int = LAYERS
    experts: int = EXPERTS
    inputs: dict = field(default_factory=dict)

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(self.config, attn_implementation="eager").eval()
        with torch.no_grad():
            # Corrections and scales start as nothing in a random model; real checkpoints have them.
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith(("e_score_correction_bias", "per_expert_scale", "global_scale")):
                    tensor.add_(torch.rand_like(tensor) * 0.3)
        model.generation_config.eos_token_id = None
        return model


def auto(model_type: str, **more) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **more)


def aria() -> Family:
    text = {**TEXT, "moe_num_experts": EXPERTS, "moe_topk": 3, "moe_num_shared_experts": 2}
    vision = {**CLIP_VISION, "model_type": "idefics3_vision"}
    patches = {16: 4}
    return Family(
        AriaConfig(text_config=text, vision_config=vision, projector_patch_to_query_dict=patches, image_token_index=5)
    )


def qwen3_vl() -> Family:
    text = {**TEXT, "num_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
    text |= {"rope_parameters": {**MROPE, "mrope_interleaved": True}, "decoder_sparse_step": 1}
    vision = {**QWEN_VISION, "deepstack_visual_indexes": [0]}
    return Family(Qwen3VLMoeConfig(text_config=text, vision_config=vision, image_token_id=5), shared=False)


def qwen3_5() -> Family:
    text = {**TEXT, "num_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
    text |= {"shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"] * 2}
    text |= {"num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
    text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    text |= {"rope_parameters": {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0}}
    return Family(Qwen3_5MoeConfig(text_config=text, vision_config=QWEN_VISION, image_token_id=5), sites=4)


def ernie() -> Family:
    text = {**TEXT, "moe_num_experts": EXPERTS, "moe_k": 3, "moe_intermediate_size": [16, 12]}
    text |= {"moe_num_shared_experts": 2, "mlp_layer_types": ["dense", "sparse", "sparse"]}
    text |= {"rope_parameters": MROPE}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
    return Family(
        Ernie4_5_VLMoeConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=5,
            image_start_token_id=6,
            image_end_token_id=7,
            video_token_id=8,
            video_start_token_id=9,
            video_end_token_id=10,
        ),
        sites=2,
        experts=2 * EXPERTS,
        inputs={"moe_mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 2, 0, 0, 1, 0]])},
    )


def glm4v() -> Family:
    text = {**TEXT, **GROUPED, "first_k_dense_replace": 1}
    text |= {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}
    vision = {**QWEN_VISION, "image_size": 16}
    vision.pop("num_position_embeddings")
    config = Glm4vMoeConfig(text_config=text, vision_config=vision, image_token_id=5)
    return Family(config, scores="sigmoid", sites=LAYERS - 1)


def llama4() -> Family:
    text = {**TEXT, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size_mlp": 48}
    text |= {"interleave_moe_layer_step": 1, "attention_chunk_size": 64}
    vision = {**CLIP_VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    return Family(Llama4Config(text_config=text, vision_config=vision, image_token_index=5), scores="sigmoid")


def gemma4() -> Family:
    text = {**TEXT, "num_experts": EXPERTS, "top_k_experts": 3, "moe_intermediate_size": 16, "enable_moe_block": True}
    text |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 64, "sliding_window": 16}
    text |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    vision = {**CLIP_VISION, "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2}
    vision |= {"position_embedding_size": 64}
    return Family(Gemma4Config(text_config=text, vision_config=vision, audio_config=None, image_token_id=5))


def kimi() -> Family:
    text = {**TEXT, **GROUPED, **LATENT, "model_type": "deepseek_v3", "first_k_dense_replace": 1}
    vision = {"patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4, "hidden_size": 32, "intermediate_size": 32}
    vision |= {"num_attention_heads": 2, "num_hidden_layers": 1}
    config = auto("kimi_k25", text_config=text, vision_config=vision, projection_hidden_size=32, image_token_id=5)
    return Family(config, scores="sigmoid", sites=LAYERS - 1)


def internvl(text_type: str, **text) -> InternVLConfig:
    """A composite that takes any language model."""
    vision = {**CLIP_VISION, "image_size": [16, 16], "patch_size": [4, 4]}
    text = {**TEXT, "model_type": text_type, **text}
    return InternVLConfig(text_config=text, vision_config=vision, image_token_id=5)


def internvl_qwen3() -> Family:
    config = internvl("qwen3_moe", num_experts=EXPERTS, num_experts_per_tok=3, moe_intermediate_size=16)
    return Family(config, shared=False)


def mistral3() -> Family:
    text = {**TEXT, **GROUPED, **LATENT, "model_type": "mistral4", "first_k_dense_replace": 1}
    text.pop("head_dim")
    vision = {**CLIP_VISION, "model_type": "pixtral", "head_dim": 16}
    config = auto("mistral3", text_config=text, vision_config=vision, image_token_index=5)
    return Family(config, sites=LAYERS - 1)


def minimax() -> Family:
    text = {**TEXT, "num_local_experts": EXPERTS, "num_experts_per_tok": 3, "routed_scaling_factor": 2.0}
    text |= {"dense_intermediate_size": 48, "shared_intermediate_size": 16, "rotary_dim": 4, "intermediate_size": 16}
    text |= {"mlp_layer_types": ["dense", "sparse", "sparse"], "index_n_heads": 2, "index_head_dim": 8}
    vision = {**CLIP_VISION}
    config = auto(
        "minimax_m3_vl",
        text_config=text,
        vision_config=vision,
        image_token_index=5,
        video_token_index=6,
        projector_hidden_size=32,
    )
    return Family(config, scores="sigmoid", sites=LAYERS - 1)


def step3p7() -> Family:
    text = {**TEXT, "n_routed_experts": EXPERTS, "num_local_experts": EXPERTS, "num_experts_per_tok": 3}
    text |= {"moe_intermediate_size": 16, "share_expert_dim": 16, "moe_router_scaling_factor": 3.0}
    text |= {"mlp_layer_types": ["dense", "sparse", "sparse"]}
    text |= {"layer_types": ["full_attention"] * 3, "sliding_window": 8}
    config = auto("step3p7", text_config=text, vision_config={**CLIP_VISION}, image_token_id=5)
    return Family(config, scores="sigmoid", sites=LAYERS - 1)


def muse() -> Family:
    text = {**TEXT, "num_local_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
    text |= {"moe_hidden_size": 24, "routed_scaling_factor": 1.5, "mlp_layer_types": ["dense", "sparse", "sparse"]}
    vision = {"patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4, "hidden_size": 32, "intermediate_size": 32}
    vision |= {"num_attention_heads": 2, "num_hidden_layers": 1}
    audio = {"out_hidden_size": WIDTH, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    config = auto(
        "muse_spark",
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        image_token_id=5,
        out_hidden_size=32,
        projector_hidden_size=32,
    )
    return Family(config, scores="sigmoid", shared=False, sites=LAYERS - 1)


def deepseek_ocr2() -> Family:
    text = {**TEXT, **GROUPED, "topk_method": "group_limited_greedy", "mlp_layer_types": ["dense", "sparse", "sparse"]}
    sam = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sam |= {"image_size": 64, "patch_size": 8, "global_attn_indexes": [0], "downsample_channels": [16, 32]}
    encoder = {**TEXT, "num_hidden_layers": 1}
    config = auto(
        "deepseek_ocr2",
        text_config=text,
        vision_config={"sam_config": sam, "encoder_config": encoder},
        image_token_id=5,
    )
    return Family(config, sites=LAYERS - 1)


def qwen3_omni() -> Family:
    text = {**TEXT, "num_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
    text |= {"rope_parameters": {**MROPE, "mrope_interleaved": True}, "decoder_sparse_step": 1}
    vision = {**QWEN_VISION, "deepstack_visual_indexes": [0]}
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "output_dim": 32}
    config = auto(
        "qwen3_omni_moe_thinker",
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        image_token_id=5,
        vision_start_token_id=6,
        audio_start_token_id=7,
    )
    return Family(config, shared=False)


FAMILIES = {
    "aria": aria,
    "deepseek-ocr-2": deepseek_ocr2,
    "ernie-4.5-vl": ernie,
    "gemma-4": gemma4,
    "glm-4.5v": glm4v,
    "internvl with qwen3-moe": internvl_qwen3,
    "kimi-k2.5": kimi,
    "llama-4": llama4,
    "minimax-m3-vl": minimax,
    "mistral-3 with mistral-4": mistral3,
    "muse-spark": muse,
    "qwen3-omni": qwen3_omni,
    "qwen3-vl": qwen3_vl,
    "qwen3.5": qwen3_5,
    "step-3.7": step3p7,
}
