"""Joins a SmolLM2 language model, our tower and a connector into one LLaVA, and makes its processor.

It knows nothing of downloads, caches, quantization or adapters.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mllm_demo.errors import CheckpointError
from mllm_demo.models.bundled.tower import FIRST_LAYERS, TesseraVisionConfig

IMAGE_TOKEN = "<image>"
VISION_CONFIG = "vision_config.json"
DETAIL = ".context.detail."
# In names of what vision files may not hold: the fifth layer, residual blocks, and parts from before 0.10 and 0.8.
BRANCHES = (f".context.layers.{FIRST_LAYERS}.", f"{DETAIL}refine.", f"{DETAIL}strokes.", DETAIL)
VISION_PARTS = ("model.vision_tower.", "model.multi_modal_projector.")
# ImageNet statistics, which the tower's published weights expect.
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE_TOKEN + "' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def vision_config(path: Path | None) -> TesseraVisionConfig:
    """The tower's shape as recorded beside the vision weights in `path`; None: the shape that is trained today."""
    if path is None:
        return TesseraVisionConfig(detail_residuals=True, num_hidden_layers=FIRST_LAYERS + 1)
    try:
        return TesseraVisionConfig(**json.loads(path.with_name(VISION_CONFIG).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{VISION_CONFIG} of the bundled model is missing or damaged; get the whole repository again."
        ) from error


def make_processor(gguf: Path, vision: TesseraVisionConfig) -> LlavaProcessor:
    """Tokenizer from the language model's own file, one new image token, and a square resize of the picture."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    side = {"height": vision.image_size, "width": vision.image_size}
    image_processor = CLIPImageProcessorPil(
        size=side, do_center_crop=False, crop_size=side, image_mean=IMAGE_MEAN, image_std=IMAGE_STD
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )


def assemble(gguf: Path, processor: LlavaProcessor, vision_file: Path | None = None) -> LlavaForConditionalGeneration:
    """The whole model in float32; without `vision_file` the tower and connector are untrained.

    Raises `CheckpointError` if the vision weights do not fit.
    """
    language = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    language.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    del language.config.quantization_config
    vision = vision_config(vision_file)
    config = LlavaConfig(
        vision_config=vision,
        text_config=language.config,
        image_token_index=processor.image_token_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config).float()
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=language.config.bos_token_id,
        eos_token_id=language.config.eos_token_id,
        pad_token_id=language.config.pad_token_id,
        suppress_tokens=[processor.image_token_id],
    )
    if vision_file is not None:
        load_vision(model, vision_file)
    return model.eval()


def vision_state(model) -> dict[str, torch.Tensor]:
    """Tower and connector of `model`, by their names in it."""
    return {k: v.contiguous() for k, v in model.state_dict().items() if k.startswith(VISION_PARTS)}


def save_vision(model, path: Path) -> None:
    """Weights in float16, batch-norm statistics as they are; the tower's configuration goes beside them."""

    def stored(name: str, value: torch.Tensor) -> torch.Tensor:
        return value.half() if value.is_floating_point() and "running_" not in name else value

    state = {name: stored(name, value) for name, value in vision_state(model).items()}
    save_file(state, path, metadata={"format": "pt"})
    path.with_name(VISION_CONFIG).write_text(model.model.vision_tower.config.to_json_string())


def put_vision(model, state: Mapping[str, torch.Tensor]) -> None:
    """Gives `model` a tower and connector named as `vision_state` does, also those from before its last layer, or
    the tower's branch for detail or a part of that, which then tell nothing; raises `CheckpointError` if others are
    missing or unexpected."""
    needed = vision_state(model).keys()
    for branch in BRANCHES:
        if not any(branch in name for name in state):
            needed = {name for name in needed if branch not in name}
    if odd_keys := state.keys() ^ needed:
        raise CheckpointError(f"{min(odd_keys)} is missing or unexpected.")
    model.load_state_dict(state, strict=False)


def load_vision(model, path: Path) -> None:
    try:
        put_vision(model, load_file(path))
    except CheckpointError as error:
        raise CheckpointError(f"{path.name} is not the bundled model's vision file: {error}") from error
