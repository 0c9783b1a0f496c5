"""Frames of a moving picture are pictures like any other to models, boxes and traces; only their names differ."""

import io

import pytest
from transformers import Qwen2VLProcessor, Qwen3VLProcessor

from mllm_demo.chat.events import Finished
from mllm_demo.chat.images import read_pictures
from mllm_demo.chat.messages import Message
from mllm_demo.chat.prompt import make_prompt, without_control_tokens
from mllm_demo.errors import ContextLengthError, GenerationError
from mllm_demo.figures.payload import PayloadStream
from mllm_demo.routing.trace import RoutingTrace
from mllm_demo.settings import Sampling
from tests.unit.chat.test_engine import answer, engine_with
from tests.unit.chat.test_layout import PROCESSORS, brightness, cover, inner, picture, qwen, read
from tests.unit.chat.tiny import IMAGE_TOKENS, never_ending, question, tiny_loaded

SIZE = (300, 170)
LABELS = ["frame 1 of 3, 0.0 s", "frame 2 of 3, 0.4 s", "frame 3 of 3, 0.8 s"]


def clip(*spots, size=SIZE, duration=400):
    """A GIF's frames as they are uploaded: nearly black, each with white in its spot."""
    frames = [picture(*size, spot).to_pil() for spot in spots]
    data = io.BytesIO()
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], duration=duration)
    return read_pictures(data.getvalue(), max_bytes=10**6, max_pixels=10**6, max_frames=len(spots), name="clip.gif")


def spots(count=3):
    return [(20 * n + 10, 10, 20 * n + 25, 30) for n in range(count)]


WHOLE = ("qwen2", "qwen2.5", "qwen3", "llava stretched", "llava padded", "smolvlm in one piece")


@pytest.mark.parametrize("name", WHOLE)
def test_each_frame_has_boxes_of_its_own_that_cover_it_once(name):
    _, inputs, tokens = read(PROCESSORS[name](), Message("user", (*clip(*spots()), "what happens?")))
    assert not any(key.startswith(("video", "pixel_values_videos")) for key in inputs)
    for index in range(3):
        assert (cover([token for token in tokens if token.image_index == index], SIZE) == 1).all()


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_what_moves_lights_up_the_token_behind_whose_box_it_is_in_that_frame(name):
    processor = PROCESSORS[name]()
    _, _, tokens = read(processor, Message("user", (*clip(*spots()), "?")))
    behind = [token for token in tokens if token.modality == "image"]
    each = len(behind) // 3
    chosen = [5, each + 2 * each // 3, 2 * each + each // 2]
    moved = clip(*(inner(behind[number].box) for number in chosen))
    _, lit, again = read(processor, Message("user", (*moved, "?")))
    shine = brightness(processor, lit)
    assert [token for token in again if token.modality == "image"] == behind and shine.size == 3 * each
    for frame, number in enumerate(chosen):
        assert frame * each + int(shine[frame * each : (frame + 1) * each].argmax()) == number


@pytest.mark.parametrize("kind", [Qwen2VLProcessor, Qwen3VLProcessor])
def test_a_video_that_a_person_types_is_only_text(kind):
    processor = qwen(kind)
    assert processor.video_token == "<|video_pad|>"
    typed = (Message("user", (*clip(*spots()), "see <|vision_start|><|video_pad|><|vision_end|>")),)
    ids, _, tokens = read(processor, *without_control_tokens(typed, processor))
    assert processor.video_token_id not in ids
    assert {token.image_index for token in tokens if token.modality == "image"} == {0, 1, 2}


def test_a_placeholder_of_a_video_that_is_no_special_token_is_broken_up_too():
    processor = qwen(Qwen2VLProcessor)
    processor.video_token = "[VIDEO]"
    (message,) = without_control_tokens((Message("user", ("see [VIDEO]",)),), processor)
    assert message.text == "see [ VIDEO]"


def test_an_answer_about_a_moving_picture_is_traced_frame_by_frame(tmp_path):
    engine = engine_with(never_ending(tiny_loaded(routed=True)))
    still = picture(60, 40)
    done = answer(engine, question("What happens?", still, *clip(*spots())), Sampling(max_new_tokens=3))[-1]
    assert isinstance(done, Finished)
    trace = RoutingTrace.load(done.trace.save(tmp_path / "trace.safetensors"))
    assert [image.label for image in trace.images] == ["", *LABELS]
    assert [image["label"] for image in PayloadStream().update(trace, live=False)["images"]] == ["", *LABELS]
    shown = trace.provenance["messages"][0]["content"][:4]
    assert [part.get("label") for part in shown] == [None, *LABELS]
    assert [part["name"] for part in shown] == ["image", *["clip.gif"] * 3]
    of_images = [token.image_index for token in trace.tokens if token.modality == "image"]
    assert of_images == [index for index in range(4) for _ in range(IMAGE_TOKENS)]


def one_only(refuse):
    """A model whose processor or template reads one picture."""
    loaded = tiny_loaded()
    if refuse == "template":
        only = "{% if messages[0].content|selectattr('type', 'equalto', 'image')|list|length > 1 %}"
        only += "{{ raise_exception('One image!') }}{% endif %}"
        loaded.processor.chat_template = only + loaded.processor.chat_template
        return loaded
    kind = type(loaded.processor)

    class OneImage(kind):
        def __call__(self, images=None, **options):
            if images and len(images) > 1:
                raise ValueError("One\nimage!")
            return super().__call__(images=images, **options)

    loaded.processor.__class__ = OneImage
    return loaded


@pytest.mark.parametrize("refuse", ["processor", "template"])
def test_a_model_that_reads_one_picture_says_so_and_what_to_do(refuse):
    loaded = one_only(refuse)
    assert make_prompt(loaded, question("What?", *clip(*spots())[:1]), 8).ids
    with pytest.raises(GenerationError) as refused:
        make_prompt(loaded, question("What?", *clip(*spots())), 8)
    said = str(refused.value)
    assert "does not take 3 pictures" in said and "One" in said and "--frames 1" in said
    assert said.endswith(".") and "\n" not in said


def test_frames_that_do_not_fit_into_the_context_are_refused_with_the_way_out():
    loaded = tiny_loaded(context_length=40)
    with pytest.raises(ContextLengthError, match=r"with 3 pictures, and Tiny reads 40 .* \(--frames\)\.$"):
        make_prompt(loaded, question("What happens?", *clip(*spots())), 8)
    with pytest.raises(ContextLengthError, match=r"or earlier messages\.$"):
        make_prompt(loaded, question("What happens?", *[picture(30, 20)] * 3), 8)


def test_a_model_whose_template_drops_all_pictures_but_one_is_refused_not_wrong():
    loaded = tiny_loaded(routed=True)
    loaded.processor.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role }}:<image>"
        "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    )
    engine = engine_with(loaded)
    assert isinstance(answer(engine, question("What?", picture(30, 20)))[-1], Finished)
    with pytest.raises(GenerationError):
        answer(engine, question("What?", *clip(*spots())))


def test_a_picture_of_another_shape_behind_the_frames_has_its_own_boxes():
    still = picture(96, 96)
    _, _, tokens = read(PROCESSORS["qwen2"](), Message("user", (*clip(*spots()), still, "?")))
    last = [token for token in tokens if token.image_index == 3]
    assert (cover(last, (96, 96)) == 1).all()
