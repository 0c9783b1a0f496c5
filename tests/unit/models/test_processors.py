"""A processor that also reads video serves pictures on a machine without torchvision."""

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from mllm_demo.errors import CheckpointError
from mllm_demo.models import processors

WORDS = ("<unk>", "<|image_pad|>", "<|video_pad|>", "what")


@pytest.fixture
def folder(tmp_path):
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        pad_token="<unk>",
        additional_special_tokens=list(WORDS[1:3]),
        chat_template="{{ messages }}",
    )
    tokenizer.save_pretrained(tmp_path)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56).save_pretrained(tmp_path)
    Qwen2VLConfig().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision the full processor is used")
def test_pictures_are_read_without_the_video_part(folder):
    processor = processors.load_processor(folder, Qwen2VLConfig(), "Model")
    inputs = processor(images=Image.new("RGB", (56, 28)), text="<|image_pad|> what", return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 4]]
    assert (inputs["input_ids"] == WORDS.index("<|image_pad|>")).sum() == 2
    assert type(processor).__name__ == "Qwen2VLProcessor"


def test_a_package_that_is_missing_is_named(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise ImportError("Package `num2words` is required;\n  install it with `pip install num2words`.")

    monkeypatch.setattr(processors.AutoProcessor, "from_pretrained", refuse)
    monkeypatch.setattr(processors, "_without_video", lambda kind: processors.AutoProcessor)
    with pytest.raises(CheckpointError, match="needs a package that is missing: Package `num2words` is required"):
        processors.load_processor(folder, Qwen2VLConfig(), "Model")
