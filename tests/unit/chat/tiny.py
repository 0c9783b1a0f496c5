"""A vision-language model small enough to be made anew for a test: random LLaVA, a byte tokenizer, 4 image tokens."""

from collections.abc import Callable

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mllm_demo.chat.messages import Message, Picture
from mllm_demo.models.loading import LoadedModel
from mllm_demo.moe_lora import MoeLoraConfig
from mllm_demo.settings import ModelChoice

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}:"
    "{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant:{% endif %}"
)
SPECIAL = ["<pad>", "<|start|>", "<|end|>", "<image>"]
IMAGE_TOKENS = 4


def tiny_processor() -> LlavaProcessor:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<|end|>",
        additional_special_tokens=["<|start|>", "<image>"],
    )
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    )


def tiny_model(processor: LlavaProcessor, *, routed: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.4,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=IMAGE_TOKENS,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    if routed:
        experts = MoeLoraConfig(
            r=2, num_experts=3, target_modules=r".*language_model.*\.(o_proj|down_proj)", init_lora_weights=False
        )
        model = get_peft_model(model, experts)
    return model.eval()


def tiny_loaded(*, routed: bool = False, context_length: int = 512, title: str = "Tiny") -> LoadedModel:
    processor = tiny_processor()
    model = tiny_model(processor, routed=routed)
    return LoadedModel(
        model=model,
        processor=processor,
        choice=ModelChoice("tiny", "tiny-adapter" if routed else None, "none", "cpu"),
        device=torch.device("cpu"),
        title=title,
        adapter_title="Tiny experts" if routed else None,
        base_revision="r0",
        adapter_revision="a0" if routed else None,
        quantization="none",
        dtype="float32",
        context_length=context_length,
        four_bit_share=0.0,
        memory_bytes=1,
        parameters=1,
    )


def question(text: str, *images: Picture) -> tuple[Message, ...]:
    return (Message("user", (*images, text)),)


def never_ending(loaded: LoadedModel) -> LoadedModel:
    """`loaded` without an end-of-sequence token, so that every answer has the length asked for."""
    loaded.model.generation_config.eos_token_id = []
    return loaded


def on_forward(loaded: LoadedModel, hook: Callable[[int, torch.Tensor], None]) -> None:
    """Calls `hook(n, logits)` after the n-th forward (from 1) of each answer; logits [1, positions, vocabulary]."""
    count = 0

    def listen(module: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        nonlocal count
        prefill = kwargs["input_ids"].shape[1] > 1
        count = 1 if prefill else count + 1
        hook(count, output.logits)

    root = loaded.model.get_base_model() if hasattr(loaded.model, "get_base_model") else loaded.model
    root.register_forward_hook(listen, with_kwargs=True)
