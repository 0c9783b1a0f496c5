"""A LLaVA of two layers with its processor, saved as any checkpoint is; and adapters for it."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mllm_demo.moe_lora import MoeLoraConfig

WORDS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "what", "is", "this", "a", "cat")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Folder of the tiny model: 128 wide, so that 4-bit blocks of 64 fit its rows."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=320,
        ),
        image_token_index=WORDS.index("<image>"),
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def _save_adapter(checkpoint: Path, config, folder: Path) -> Path:
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(checkpoint), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lora(checkpoint, tmp_path_factory) -> Path:
    """Folder of a plain LoRA on the language model's attention."""
    targets = r".*language_model.*\.(q_proj|v_proj)"
    return _save_adapter(checkpoint, LoraConfig(r=4, target_modules=targets), tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="session")
def moe_lora(checkpoint, tmp_path_factory) -> Path:
    """Folder of a MoE-LoRA with four experts on the language model's feed-forward layers."""
    targets = r".*language_model.*\.(gate_proj|up_proj|down_proj)"
    config = MoeLoraConfig(r=4, num_experts=4, num_experts_per_tok=1, target_modules=targets)
    return _save_adapter(checkpoint, config, tmp_path_factory.mktemp("moe_lora"))
