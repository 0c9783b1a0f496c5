"""Each image token knows its picture and its part of it; each position knows its text and whose it is.

The strongest check paints one bright spot into the box that a token claims and looks where the processor put
the brightness. Processors are the real ones, with a byte tokenizer and small sizes.
"""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)
from transformers.models.smolvlm import processing_smolvlm

from mllm_demo.chat.layout import decoded_tokens, prompt_tokens
from mllm_demo.chat.messages import Message, Picture, pictures, to_chat_template

CHAT = (
    "{% if messages and messages[0].role != 'system' %}<|s|>system:Be kind.<|e|>\n{% endif %}"
    "{% for m in messages %}<|s|>{{ m.role }}:{% for c in m.content %}"
    "{% if c.type == 'image' %}{{ IMAGE }}{% else %}{{ c.text }}{% endif %}{% endfor %}<|e|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant:{% endif %}"
)
SPECIAL = [
    "<|s|>",
    "<|e|>",
    "<image>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TILE_TAGS = ["<fake_token_around_image>", "<global-img>"] + [
    f"<row_{r}_col_{c}>" for r in (1, 2, 3) for c in (1, 2, 3)
]


def tokenizer(special=SPECIAL):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(["<pad>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", additional_special_tokens=list(special)
    )


def chat(image: str) -> str:
    return CHAT.replace("{{ IMAGE }}", image)


def without_video(kind):
    """`kind` with pictures only, since its video part needs torchvision."""

    class PictureProcessor(kind):
        # Read while a chat is rendered, even one without video.
        video_processor = SimpleNamespace(num_frames=1, fps=1)

        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

    return PictureProcessor


def qwen(kind):
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 64 * 64}, do_normalize=False
    )
    template = chat("<|vision_start|><|image_pad|><|vision_end|>")
    return without_video(kind)(images, tokenizer(), None, chat_template=template)


def tiled(kind, images, *, split=True, tags=TILE_TAGS):
    images = images(
        size={"longest_edge": 96},
        max_image_size={"longest_edge": 32},
        do_image_splitting=split,
        do_normalize=False,
    )
    words = tokenizer([*SPECIAL, *tags, "<end_of_utterance>"])
    declared = {"image_seq_len": 16, "chat_template": chat("<image>")}
    if kind is SmolVLMProcessor:
        return without_video(kind)(images, words, None, **declared)
    return kind(images, words, **declared)


def llava(images=None, **changes):
    images = images or CLIPImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}, do_normalize=False
    )
    declared = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, **changes}
    return LlavaProcessor(images, tokenizer(), patch_size=8, chat_template=chat("<image>"), **declared)


def stretched():
    side = {"height": 40, "width": 40}
    images = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False, do_normalize=False)
    return llava(images, vision_feature_select_strategy="full", num_additional_image_tokens=0)


def padded():
    side = {"height": 40, "width": 40}
    return llava(
        LlavaImageProcessorPil(size=side, crop_size=side, do_pad=True, do_normalize=False, image_mean=[0] * 3)
    )


PROCESSORS = {
    "qwen2": lambda: qwen(Qwen2VLProcessor),
    "qwen2.5": lambda: qwen(Qwen2_5_VLProcessor),
    "qwen3": lambda: qwen(Qwen3VLProcessor),
    "idefics3": lambda: tiled(Idefics3Processor, Idefics3ImageProcessorPil),
    "idefics3 without tag tokens": lambda: tiled(
        Idefics3Processor, Idefics3ImageProcessorPil, tags=TILE_TAGS[:1]
    ),
    "smolvlm": lambda: tiled(SmolVLMProcessor, SmolVLMImageProcessorPil),
    "smolvlm in one piece": lambda: tiled(SmolVLMProcessor, SmolVLMImageProcessorPil, split=False),
    "llava": llava,
    "llava with class token": lambda: llava(vision_feature_select_strategy="full"),
    "llava padded": padded,
    "llava stretched": stretched,
}
CONFIG = SimpleNamespace(image_token_id=None)
SIZES = ((300, 170), (130, 260), (96, 96))


@pytest.fixture(autouse=True)
def _no_number_words(monkeypatch):
    """SmolVLM's processor asks for a package that only writes out the times of video frames."""
    monkeypatch.setattr(processing_smolvlm, "num2words", str)


@pytest.fixture(params=PROCESSORS)
def processor(request):
    return PROCESSORS[request.param]()


def picture(width, height, spot=None) -> Picture:
    """Nearly black, and white in `spot`."""
    image = Image.new("RGB", (width, height), (8, 8, 8))
    if spot:
        image.paste((255, 255, 255), spot)
    data = io.BytesIO()
    image.save(data, "PNG")
    return Picture(data.getvalue(), width, height)


def read(processor, *messages: Message):
    text = processor.apply_chat_template(
        to_chat_template(messages), add_generation_prompt=True, tokenize=False
    )
    images = [picture.to_pil() for picture in pictures(messages)]
    inputs = processor(text=[text], images=images or None, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    return ids, inputs, prompt_tokens(processor, CONFIG, messages, ids, inputs)


def brightness(processor, inputs) -> np.ndarray:
    """[image tokens]: how bright the input is behind each token that stands for patches, in token order."""
    pixels = inputs["pixel_values"].float().numpy()
    if "image_grid_thw" in inputs:
        return pixels.reshape(-1, processor.image_processor.merge_size**2 * pixels.shape[1]).mean(axis=1)
    pixels = pixels.reshape(-1, *pixels.shape[-3:])
    count, channels, height, width = pixels.shape
    if hasattr(processor, "image_seq_len"):
        rows = cols = int(processor.image_seq_len**0.5)
    else:
        rows, cols = height // processor.patch_size, width // processor.patch_size
    cells = pixels.reshape(count, channels, rows, height // rows, cols, width // cols)
    return cells.mean(axis=(1, 3, 5)).ravel()


def inner(box) -> tuple[int, int, int, int]:
    """The middle of a box in whole pixels, so that what resizing smears stays inside."""
    x0, y0, x1, y1 = box
    dx, dy = (x1 - x0) / 4, (y1 - y0) / 4
    return (
        round(x0 + dx),
        round(y0 + dy),
        max(round(x1 - dx), round(x0 + dx) + 1),
        max(round(y1 - dy), round(y0 + dy) + 1),
    )


@pytest.mark.parametrize("size", SIZES)
def test_a_bright_spot_in_a_token_s_box_lights_up_that_token(processor, size):
    _, inputs, tokens = read(processor, Message("user", (picture(*size), "what?")))
    behind = [token for token in tokens if token.modality == "image"]
    if (
        getattr(processor, "num_additional_image_tokens", 0)
        and processor.vision_feature_select_strategy == "full"
    ):
        assert behind.pop(0).box is None
    assert len(behind) == brightness(processor, inputs).size
    # A tile of Idefics3 and the small whole picture show the same spot; only tokens of one box size compete.
    areas = np.array([(t.box[2] - t.box[0]) * (t.box[3] - t.box[1]) if t.box else 0 for t in behind])
    checked = 0
    for number in range(0, len(behind), max(1, len(behind) // 12)):
        if areas[number] < 0.5 * areas[areas > 0].min() or areas[number] < 20:
            continue
        spot = inner(behind[number].box)
        _, lit, _ = read(processor, Message("user", (picture(*size, spot), "what?")))
        shine = np.where(np.abs(areas - areas[number]) <= 0.7 * areas[number], brightness(processor, lit), -1)
        assert int(shine.argmax()) == number, (number, spot)
        checked += 1
    assert checked >= 4


def test_every_position_of_the_prompt_has_its_token(processor):
    ids, _, tokens = read(
        processor,
        Message("user", ("two: ", picture(300, 170), picture(96, 96), " same?")),
        Message("assistant", ("no",)),
        Message("user", ("and ", picture(130, 260))),
    )
    assert [token.id for token in tokens] == ids
    assert all(token.phase == "prefill" for token in tokens)
    images = [token for token in tokens if token.modality == "image"]
    assert {token.id for token in images} == {processor.image_token_id}
    order = [token.image_index for token in images]
    assert order == sorted(order) and set(order) == {0, 1, 2}
    assert all(
        token.image_index is None and token.box is None for token in tokens if token.modality != "image"
    )


def cover(tokens, size) -> np.ndarray:
    """[height, width]: how many boxes hold the middle of each pixel."""
    ys, xs = np.mgrid[: size[1], : size[0]] + 0.5
    counts = np.zeros((size[1], size[0]), dtype=int)
    for token in tokens:
        if token.box:
            x0, y0, x1, y1 = token.box
            assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]
            counts += (xs >= x0) & (xs < x1) & (ys >= y0) & (ys < y1)
    return counts


def seen(processor, *sizes):
    """Per picture, the tokens of a prompt that shows pictures of these sizes."""
    _, _, tokens = read(processor, Message("user", (*(picture(*size) for size in sizes), "?")))
    return [[token for token in tokens if token.image_index == index] for index in range(len(sizes))]


@pytest.mark.parametrize(
    "name", ["qwen2", "qwen2.5", "qwen3", "smolvlm in one piece", "llava padded", "llava stretched"]
)
def test_boxes_cover_each_picture_exactly_once(name):
    for tokens, size in zip(seen(PROCESSORS[name](), *SIZES), SIZES, strict=True):
        assert (cover(tokens, size) == 1).all()


@pytest.mark.parametrize("name", ["idefics3", "idefics3 without tag tokens", "smolvlm"])
def test_tiles_and_the_whole_picture_cover_it_twice(name):
    for tokens, size in zip(seen(PROCESSORS[name](), *SIZES), SIZES, strict=True):
        assert (cover(tokens, size) == 2).all()
        whole = tokens[-16:]
        assert whole[0].box[:2] == (0, 0) and whole[-1].box[2:] == size
        assert whole[0].box[2] == pytest.approx(size[0] / 4)


def test_a_crop_leaves_out_what_the_model_does_not_see():
    wide, high = SIZES[:2]
    seen_wide, seen_high = seen(llava(), wide, high)
    columns = cover(seen_wide, wide).max(axis=0)
    assert set(columns.tolist()) == {0, 1} and columns[65:235].all() and not columns[:64].any()
    assert cover(seen_high, high)[65:195].all() and not cover(seen_high, high)[:64].any()


def unknown():
    words = tokenizer()
    processor = SimpleNamespace(tokenizer=words, apply_chat_template=stretched().apply_chat_template)
    return processor, SimpleNamespace(image_token_index=words.convert_tokens_to_ids("<image>")), words


def test_an_unknown_processor_gets_pictures_by_runs_and_no_boxes():
    processor, config, words = unknown()
    text = "<|s|>system:Be kind.<|e|>\n<|s|>user:<image><image>and<image>?<|e|>\n<|s|>assistant:"
    messages = (Message("user", (picture(30, 20), "and", picture(60, 40), "?")),)
    tokens = prompt_tokens(processor, config, messages, words(text)["input_ids"], {})
    assert [token.image_index for token in tokens if token.modality == "image"] == [0, 0, 1]
    assert not any(token.box for token in tokens)
    assert roles_of(tokens)[1] == ("user", "<|s|>user:and?<|e|>\n")


def test_an_unknown_processor_does_not_guess_between_pictures_that_touch():
    processor, config, words = unknown()
    ids = words("<|s|>user:<image><image><image>?<|e|>\n")["input_ids"]
    messages = (Message("user", (picture(30, 20), picture(60, 40), "?")),)
    tokens = prompt_tokens(processor, config, messages, ids, {})
    assert [token.image_index for token in tokens if token.modality == "image"] == [None] * 3
    one = prompt_tokens(processor, config, (Message("user", (picture(30, 20), "?")),), ids, {})
    assert [token.image_index for token in one if token.modality == "image"] == [0] * 3


def test_rows_between_tiles_are_not_the_person_s_words():
    _, _, tokens = read(PROCESSORS["smolvlm"](), Message("user", (picture(300, 170), "a\nb")))
    written = "".join(token.text for token in tokens if token.modality == "text")
    assert written == "a\nb"


def roles_of(tokens) -> list[tuple[str, str]]:
    """Neighbouring tokens of one role joined, image tokens left out."""
    stretches = []
    for token in tokens:
        text = "" if token.modality == "image" else token.text
        if stretches and stretches[-1][0] == token.role:
            stretches[-1][1].append(text)
        else:
            stretches.append((token.role, [text]))
    return [(role, "".join(texts)) for role, texts in stretches]


def test_each_position_belongs_to_its_message(processor):
    _, _, tokens = read(
        processor,
        Message("user", ("same?", picture(96, 96), picture(96, 96))),
        Message("assistant", ("same?",)),
        Message("user", ("same?", picture(300, 170), " s\u00fcre")),
    )
    stretches = roles_of(tokens)
    assert [role for role, _ in stretches] == ["system", "user", "assistant", "user", "assistant"]
    texts = [text for _, text in stretches]
    assert texts[0] == "<|s|>system:Be kind.<|e|>\n"
    assert texts[1].startswith("<|s|>user:same?") and texts[1].endswith("<|e|>\n")
    assert texts[2] == "<|s|>assistant:same?<|e|>\n"
    assert texts[3].startswith("<|s|>user:same?") and texts[3].endswith(" s\u00b7\u00fcre<|e|>\n")
    assert texts[4] == "<|s|>assistant:"
    owners = {token.image_index: token.role for token in tokens if token.image_index is not None}
    assert owners == {0: "user", 1: "user", 2: "user"}


def test_a_system_message_of_the_chat_is_the_system_s(processor):
    _, _, tokens = read(processor, Message("system", ("Short.",)), Message("user", ("hi",)))
    assert roles_of(tokens) == [
        ("system", "<|s|>system:Short.<|e|>\n"),
        ("user", "<|s|>user:hi<|e|>\n"),
        ("assistant", "<|s|>assistant:"),
    ]


def test_a_template_that_refuses_a_lone_system_message_still_tells_roles_apart():
    processor = llava()
    refusal = (
        "{% if messages|length == 1 and messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    )
    processor.chat_template = refusal + processor.chat_template
    _, _, tokens = read(processor, Message("system", ("Short.",)), Message("user", ("hi",)))
    assert roles_of(tokens) == [
        ("system", "<|s|>system:Short.<|e|>\n<|s|>user:"),
        ("user", "hi<|e|>\n"),
        ("assistant", "<|s|>assistant:"),
    ]


def test_without_a_template_everything_is_the_user_s():
    processor, config, words = unknown()
    processor.apply_chat_template = llava().tokenizer.apply_chat_template
    tokens = prompt_tokens(processor, config, (Message("user", ("hi",)),), words("hi")["input_ids"], {})
    assert [token.role for token in tokens] == ["user", "user"]


def test_an_answer_s_tokens_are_the_assistant_s():
    processor = llava()
    ids = processor.tokenizer("a \u20ac<|e|>")["input_ids"]
    tokens = decoded_tokens(processor, ids)
    assert [token.text for token in tokens] == ["a", " ", "\u00b7", "\u00b7", "\u20ac", "<|e|>"]
    assert [token.modality for token in tokens] == ["text"] * 5 + ["special"]
    assert {(token.role, token.phase) for token in tokens} == {("assistant", "decode")}
    assert decoded_tokens(processor, []) == ()
