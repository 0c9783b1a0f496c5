"""Mixture-of-experts models, from a checkpoint's files to a streamed answer whose routing is complete and theirs.

The folders, chats and checks are those of `test_families`; no adapter is involved.
"""

import numpy as np
import pytest
from transformers import (
    AriaConfig,
    AriaImageProcessorPil,
    AriaProcessor,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeImageProcessorPil,
    Gemma4Config,
    Gemma4ImageProcessorPil,
    Glm4vImageProcessorPil,
    Glm4vMoeConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    Qwen3_5MoeConfig,
    Qwen3VLMoeConfig,
)

from mllm_demo.chat.layout import image_token_id
from mllm_demo.chat.prompt import make_prompt
from tests.unit.models.test_families import (
    MROPE,
    NEW_TOKENS,
    QWEN_TEMPLATE,
    TALL,
    WIDE,
    WIDTH,
    Family,
    check_stream,
    qwen,
    ready,
    talk,
    text,
    tokenizer,
    untapped,
)

EXPERTS = 8
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": WIDTH,
    "num_position_embeddings": 16,
}
MOE = {"num_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def qwen3_vl() -> Family:
    rope = {**MROPE, "mrope_interleaved": True}
    vision = {**QWEN_VISION, "deepstack_visual_indexes": [0]}
    kinds = ("Qwen2VLImageProcessorFast", "Qwen3VLProcessor")
    return qwen(Qwen3VLMoeConfig, vision, *kinds, video=True, rope_parameters=rope, head_dim=32, **MOE)


def qwen3_5() -> Family:
    rope = {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0}
    more = {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 64}
    more |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16}
    more |= {"linear_value_head_dim": 32, "head_dim": 32, "rope_parameters": rope, **MOE}
    return qwen(Qwen3_5MoeConfig, QWEN_VISION, "Qwen2VLImageProcessorFast", "Qwen3VLProcessor", video=True, **more)


def marked(images: str) -> str:
    """The template with other marks of a picture."""
    return QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", images)


def glm4v() -> Family:
    marks = ["<|im_start|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]
    words = tokenizer("<|im_end|>", [*marks, "<|image|>", "<|video|>"])
    ids = dict(
        zip(
            ("image_start", "image_end", "video_start", "video_end", "image", "video"),
            [words.convert_tokens_to_ids(mark) for mark in [*marks[1:], "<|image|>", "<|video|>"]],
            strict=True,
        )
    )
    grouped = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "n_group": 2}
    grouped |= {"topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "head_dim": 32}
    vision = {**QWEN_VISION, "image_size": 32, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision.pop("num_position_embeddings")
    return Family(
        Glm4vMoeConfig(
            text_config=text(words, rope_parameters={**MROPE, "partial_rotary_factor": 1.0}, **grouped),
            vision_config=vision,
            **{f"{name}_token_id": number for name, number in ids.items()},
        ),
        words,
        Glm4vImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 128, "longest_edge": 32 * 32 * 2}),
        "Glm4vImageProcessor",
        "Glm4vProcessor",
        marked("<|begin_of_image|><|image|><|end_of_image|>"),
        video=True,
    )


def ernie() -> Family:
    names = {
        "image_token": "<|IMAGE_PLACEHOLDER|>",
        "image_start_token": "<|IMAGE_START|>",
        "image_end_token": "<|IMAGE_END|>",
        "video_token": "<|VIDEO_PLACEHOLDER|>",
        "video_start_token": "<|VIDEO_START|>",
        "video_end_token": "<|VIDEO_END|>",
    }
    words = tokenizer("<|im_end|>", ["<|im_start|>", *names.values()])
    words._set_model_specific_special_tokens(names)
    experts = {"moe_num_experts": EXPERTS, "moe_k": 3, "moe_intermediate_size": [64, 32], "moe_num_shared_experts": 1}
    experts |= {"mlp_layer_types": ["dense", "sparse"], "rope_parameters": {**MROPE, "mrope_section": [6, 6, 4]}}
    return Family(
        Ernie4_5_VLMoeConfig(
            text_config=text(words, **experts),
            vision_config={"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "patch_size": 8},
            **{f"{name}_id": words.convert_tokens_to_ids(mark) for name, mark in names.items()},
        ),
        words,
        Ernie4_5_VLMoeImageProcessorPil(
            patch_size=8, merge_size=2, size={"shortest_edge": 256, "longest_edge": 64 * 64}
        ),
        "Ernie4_5_VLMoeImageProcessor",
        "Ernie4_5_VLMoeProcessor",
        marked("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"),
        video=True,
    )


def aria() -> Family:
    words = tokenizer("<|im_end|>", ["<|im_start|>", "<|img|>"])
    words._set_model_specific_special_tokens({"image_token": "<|img|>"})
    experts = {"moe_num_experts": EXPERTS, "moe_topk": 3, "moe_num_shared_experts": 1, "intermediate_size": 64}
    return Family(
        AriaConfig(
            text_config=text(words) | experts,
            vision_config={**TOWER, "model_type": "idefics3_vision", "image_size": 490, "patch_size": 70},
            projector_patch_to_query_dict={49: 4, 196: 8},
            image_token_index=words.convert_tokens_to_ids("<|img|>"),
        ),
        words,
        AriaImageProcessorPil(max_image_size=490, min_image_size=140),
        "AriaImageProcessor",
        "AriaProcessor",
        marked("<|img|>"),
        {"size_conversion": {490: 4, 980: 8}},
    )


def internvl() -> Family:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer("<|im_end|>", ["<|im_start|>", *names.values()])
    words._set_model_specific_special_tokens(names)
    side = {"height": 32, "width": 32}
    return Family(
        InternVLConfig(
            text_config={"model_type": "qwen3_moe", **text(words), **MOE, "head_dim": 32},
            vision_config={**TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
            image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        ),
        words,
        GotOcr2ImageProcessorPil(size=side, crop_to_patches=True, min_patches=1, max_patches=6),
        "GotOcr2ImageProcessor",
        "InternVLProcessor",
        marked("<IMG_CONTEXT>\n"),
        {"image_seq_length": 4},
        video=True,
    )


def gemma4() -> Family:
    names = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    names |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    words = tokenizer("<|im_end|>", ["<|im_start|>", *names.values(), "<|video|>"])
    words._set_model_specific_special_tokens(names)
    experts = {"num_experts": EXPERTS, "top_k_experts": 3, "moe_intermediate_size": 64, "enable_moe_block": True}
    experts |= {
        "hidden_size_per_layer_input": 0,
        "head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    vision = {**TOWER, "num_key_value_heads": 2, "head_dim": 32, "pooling_kernel_size": 2, "patch_size": 4}
    return Family(
        Gemma4Config(
            text_config=text(words, **experts),
            vision_config={**vision, "position_embedding_size": 64},
            audio_config=None,
            **{f"{name}_id": words.convert_tokens_to_ids(mark) for name, mark in names.items() if name != "eoa_token"},
        ),
        words,
        Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70),
        "Gemma4ImageProcessor",
        "Gemma4Processor",
        marked("<|image|>"),
        {"feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"}},
        video=True,
    )


FAMILIES = {
    "aria": aria,
    "ernie-4.5-vl": ernie,
    "gemma-4": gemma4,
    "glm-4.5v": glm4v,
    "internvl with qwen3-moe": internvl,
    "qwen3-vl": qwen3_vl,
    "qwen3.5": qwen3_5,
}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    return FAMILIES[request.param]().save(tmp_path_factory.mktemp("native"))


def test_the_model_s_own_experts_are_traced_for_every_token_of_two_pictures(checkpoint):
    engine, loaded = ready(checkpoint, None)
    assert engine.status().has_routing and engine.status().unread_experts == ()
    messages, events = talk(engine)
    check_stream(events)
    trace = events[-1].trace
    prompt = make_prompt(loaded, messages, NEW_TOKENS)
    assert [token.id for token in trace.tokens if token.phase == "prefill"] == list(prompt.ids)
    assert [token.id for token in trace.tokens if token.phase == "decode"] == untapped(loaded, messages)
    for site in trace.sites:
        assert site.block == "mlp" and site.num_experts in (EXPERTS, 2 * EXPERTS)
        assert site.num_experts_per_tok == 3
        assert np.isfinite(trace.routing_weights[site.name]).all()
    drawn = [token for token in trace.tokens if token.modality == "image"]
    assert len(drawn) == events[0].image_tokens
    assert {token.id for token in drawn} == {image_token_id(loaded.processor, loaded.model.config)}
    assert sorted({token.image_index for token in drawn}) == [0, 1]
    for token in drawn:
        width, height = (WIDE, TALL)[token.image_index]
        # Aria's tokens are learned queries over a whole tile.
        assert (token.box is None) == isinstance(loaded.processor, AriaProcessor)
        if token.box is not None:
            left, top, right, bottom = token.box
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
