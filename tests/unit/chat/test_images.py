"""Any picture a person may have becomes plain upright RGB; anything else is refused in one sentence."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from mllm_demo.chat.images import MAX_FRAMES_READ, MAX_SIDE, evenly_spaced, read_picture, read_pictures
from mllm_demo.errors import ImageError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def read(data, max_bytes=10**7, max_pixels=10**6, name=None):
    return read_picture(data, max_bytes=max_bytes, max_pixels=max_pixels, name=name)


def pixel(picture, x=0, y=0):
    return picture.to_pil().getpixel((x, y))


def near(actual, expected, tolerance=6):
    return all(abs(a - e) <= tolerance for a, e in zip(actual, expected, strict=True))


def refused(data, *words, **limits):
    with pytest.raises(ImageError) as caught:
        read(data, name="cat.png", **limits)
    sentence = str(caught.value)
    assert "cat.png" in sentence and sentence.endswith(".") and "\n" not in sentence
    for word in words:
        assert word in sentence, sentence


def png_header(width: int, height: int) -> bytes:
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b""
    for kind, data in ((b"IHDR", body), (b"IDAT", zlib.compress(b"\0" * 9)), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_promised_format_is_read(kind):
    picture = read(encoded(Image.new("RGB", (30, 20), RED), kind))
    assert (picture.width, picture.height) == (30, 20)
    assert near(pixel(picture), RED)
    assert Image.open(io.BytesIO(picture.png)).mode == "RGB"


def test_other_formats_are_refused_even_though_pillow_reads_them():
    refused(encoded(Image.new("RGB", (8, 8)), "PPM"), "JPEG, PNG, WebP")
    refused(encoded(Image.new("RGB", (16, 16)), "ICO"), "JPEG, PNG, WebP")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_taken_sideways_is_turned_upright(kind):
    image = Image.new("RGB", (40, 20), WHITE)
    image.paste(RED, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    picture = read(encoded(image, kind, exif=exif))
    assert (picture.width, picture.height) == (20, 40)
    assert near(pixel(picture, 10, 5), RED) and near(pixel(picture, 10, 35), WHITE)


def test_cmyk_becomes_rgb():
    assert near(pixel(read(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))), RED, 12)
    assert near(pixel(read(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))), RED)


def test_transparency_is_laid_on_white():
    assert pixel(read(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0))))) == WHITE
    assert near(pixel(read(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 128))))), (255, 127, 127))
    assert pixel(read(encoded(Image.new("LA", (8, 8), (0, 0))))) == WHITE
    assert pixel(read(encoded(Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3)))) == WHITE
    assert near(pixel(read(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "WEBP"))), WHITE)


def test_a_palette_keeps_its_colours_and_its_transparent_entry():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((0, 0), 0)
    for kind in ("PNG", "GIF"):
        picture = read(encoded(image, kind, transparency=0))
        assert pixel(picture) == WHITE and pixel(picture, 5, 5) == RED


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    picture = read(encoded(Image.fromarray(ramp), kind))
    assert [pixel(picture, x)[0] for x in (0, 128, 255)] == [0, 128, 255]


def test_whole_numbers_of_32_bits_and_floats_become_visible_greys():
    values = np.array([[0, 70000, 140000, 140000]], dtype=np.int32).repeat(4, 0)
    assert near(pixel(read(encoded(Image.fromarray(values), "TIFF")), 1), (128,) * 3)
    unit = np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32).repeat(4, 0)
    picture = read(encoded(Image.fromarray(unit), "TIFF"))
    assert near(pixel(picture, 1), (128,) * 3) and near(pixel(picture, 2), WHITE) and pixel(picture, 3) == (0, 0, 0)
    depth = np.array([[-5.0, 0.0, 5.0, 5.0]], dtype=np.float32).repeat(4, 0)
    assert near(pixel(read(encoded(Image.fromarray(depth), "TIFF")), 1), (128,) * 3)


def test_one_bit_and_lab_pictures_are_read():
    assert pixel(read(encoded(Image.new("1", (8, 8), 1)))) == WHITE
    assert near(pixel(read(encoded(Image.new("LAB", (8, 8), (255, 128, 128)), "TIFF"))), WHITE)


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    picture = read(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert near(pixel(picture), RED)


def test_nothing_but_pixels_is_kept():
    exif = Image.Exif()
    exif[0x010E] = "the street where I live"
    data = encoded(
        Image.new("RGB", (8, 8)), "JPEG", exif=exif, comment=b"the street where I live", icc_profile=b"street"
    )
    stored = Image.open(io.BytesIO(read(data).png))
    stored.load()
    assert stored.info == {} and b"street" not in read(data).png


def test_a_huge_picture_is_scaled_down_and_says_its_new_size():
    picture = read(encoded(Image.new("L", (2 * MAX_SIDE, 100))))
    assert (picture.width, picture.height) == picture.to_pil().size == (MAX_SIDE, 50)


def test_a_path_gives_its_name_to_the_picture_and_to_errors(tmp_path):
    (tmp_path / "dog.png").write_bytes(encoded(Image.new("RGB", (8, 8))))
    assert read(tmp_path / "dog.png").name == "dog.png"
    assert read(str(tmp_path / "dog.png")).png == read((tmp_path / "dog.png").read_bytes()).png
    with pytest.raises(ImageError, match=r"nowhere\.png cannot be opened"):
        read(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="cannot be opened"):
        read(tmp_path)


def test_a_file_over_the_limit_is_refused_before_it_is_looked_at(tmp_path):
    refused(b"x" * 2_000_001, "limit of 2 MB", max_bytes=2 * 10**6)
    (tmp_path / "big").write_bytes(b"x" * 11)
    with pytest.raises(ImageError, match="big is larger"):
        read(tmp_path / "big", max_bytes=10)


@pytest.mark.parametrize("side", [2_000, 10_000, 60_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_from_its_header(side):
    refused(png_header(side, side), "megapixels", "scale it down")


def test_a_bomb_in_every_format_gets_the_same_sentence():
    big = Image.new("1", (1500, 1500))
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        refused(encoded(big, kind), "1500 x 1500", "megapixels")
    for kind in ("JPEG", "WEBP"):
        refused(encoded(big.convert("RGB"), kind), "1500 x 1500", "megapixels")


def test_a_gif_frame_larger_than_its_header_says_is_refused():
    data = bytearray(encoded(Image.new("P", (1500, 1500)), "GIF"))
    data[6:10] = struct.pack("<HH", 8, 8)
    refused(bytes(data), "megapixels")


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1), (300, 2)])
def test_a_strip_is_refused_with_its_size(size):
    refused(encoded(Image.new("L", size)), f"{size[0]} x {size[1]}", "strip", "crop")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_refused_wherever_it_was_cut(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    for cut in (20, 60, len(data) // 2, len(data) * 9 // 10):
        refused(data[:cut])


def test_damaged_bytes_never_raise_anything_else():
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = encoded(image, kind)
        for _ in range(60):
            broken = np.frombuffer(data, np.uint8).copy()
            spots = rng.integers(0, len(broken), 4)
            broken[spots] = rng.integers(0, 256, 4)
            try:
                read(broken.tobytes())
            except ImageError:
                pass


@pytest.mark.parametrize("data", [b"hello, this is no picture", b"<svg xmlns='x'/>", b"%PDF-1.7", b"\x00" * 100])
def test_something_else_is_not_a_picture(data):
    refused(data, "not a picture", "JPEG, PNG")


def test_an_empty_file_and_a_picture_without_pixels_say_so():
    refused(b"", "empty")
    with pytest.raises(ImageError):
        read(png_header(0, 10))
    flat = bytearray(encoded(Image.new("RGB", (8, 8)), "BMP"))
    flat[18:26] = struct.pack("<ii", 0, 8)
    with pytest.raises(ImageError):
        read(bytes(flat))


def test_pillows_own_limits_are_left_as_they_were():
    before = (Image.MAX_IMAGE_PIXELS, Image.WARN_POSSIBLE_FORMATS)
    refused(png_header(60_000, 60_000), "megapixels")
    assert (Image.MAX_IMAGE_PIXELS, Image.WARN_POSSIBLE_FORMATS) == before


def test_reading_a_picture_needs_no_torch():
    code = "import sys, mllm_demo.chat.images, mllm_demo.chat.messages; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Moving pictures


def moving(kind="GIF", colours=("red", "lime", "blue", "yellow", "cyan"), durations=100, **options) -> bytes:
    """One frame per colour, each with a black corner and a stripe of its own, so that none is merged with another."""
    frames = [Image.new("RGB", (40, 30), colour) for colour in colours]
    for number, frame in enumerate(frames):
        frame.paste("black", (0, 0, 5, 5))
        frame.paste("white", (number, 28, number + 1, 30))
    options |= {"lossless": True} if kind == "WEBP" else {}
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=durations, **options)


def frames_of(data, max_frames=4, max_bytes=10**7, max_pixels=10**6, name="clip.gif"):
    return read_pictures(data, max_bytes=max_bytes, max_pixels=max_pixels, max_frames=max_frames, name=name)


def refused_frames(data, *words, **limits):
    with pytest.raises(ImageError) as caught:
        frames_of(data, **limits)
    sentence = str(caught.value)
    assert "clip.gif" in sentence and sentence.endswith(".") and "\n" not in sentence
    for word in words:
        assert word in sentence, sentence


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_a_moving_picture_is_read_as_evenly_spaced_frames_that_say_when_they_are_shown(kind):
    shown = frames_of(moving(kind, durations=[100, 200, 300, 400, 500]), 3)
    assert [frame.label for frame in shown] == ["frame 1 of 3, 0.0 s", "frame 2 of 3, 0.3 s", "frame 3 of 3, 1.0 s"]
    assert [pixel(frame, 20, 15) for frame in shown] == [RED, (0, 0, 255), (0, 255, 255)]
    assert all(pixel(frame, 2, 2) == (0, 0, 0) and frame.name == "clip.gif" for frame in shown)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_a_short_one_shows_all_its_frames_once(kind):
    shown = frames_of(moving(kind), 8)
    assert [frame.label[:12] for frame in shown] == [f"frame {n} of 5" for n in range(1, 6)]
    assert len({frame.digest for frame in shown}) == 5


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_with_one_frame_it_is_its_first_picture_and_no_more_is_decoded(kind):
    (only,) = frames_of(moving(kind), 1, max_pixels=40 * 30)
    assert only == read(moving(kind), name="clip.gif") and only.label == "" and pixel(only, 20, 15) == RED


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_that_does_not_move_is_one_ordinary_picture(kind):
    data = encoded(Image.new("RGB", (30, 20), RED), kind)
    assert frames_of(data) == (read(data, name="clip.gif"),)


def test_an_animation_of_one_frame_is_an_ordinary_picture():
    (only,) = frames_of(moving(colours=["red"]))
    assert only.label == "" and pixel(only, 20, 15) == RED


def test_pages_of_a_tiff_are_no_moving_picture():
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert len(frames_of(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]))) == 1


def test_the_still_picture_in_front_of_an_animated_png_is_not_one_of_its_frames():
    shown = frames_of(moving("PNG", default_image=True), 8)
    assert [pixel(frame, 20, 15) for frame in shown][:2] == [(0, 255, 0), (0, 0, 255)] and len(shown) == 4


def test_frames_that_ask_for_no_time_are_timed_as_browsers_show_them():
    first, last = frames_of(moving(durations=0), 2)
    assert (first.label, last.label) == ("frame 1 of 2, 0.0 s", "frame 2 of 2, 0.4 s")


@pytest.mark.parametrize("most", range(1, 12))
@pytest.mark.parametrize("durations", [[0.1] * 9, [5, 0.1, 0.1, 0.1, 7, 0.2], [0.1, 9], [0.011] * 5, [3], [0.3] * 31])
def test_frames_are_chosen_once_each_in_order_with_both_ends(durations, most):
    begins = np.cumsum([0, *durations[:-1]]).tolist()
    chosen = evenly_spaced(begins, most)
    assert len(chosen) == min(most, len(begins)) and chosen == sorted(set(chosen)) and chosen[0] == 0
    assert most == 1 or chosen[-1] == len(begins) - 1


def test_equal_durations_give_equal_steps():
    assert evenly_spaced(np.cumsum([0] + [0.1] * 12).tolist(), 4) == [0, 4, 8, 12]
    assert evenly_spaced(np.cumsum([0] + [0.1] * 30).tolist(), 4) == [0, 10, 20, 30]


def test_frames_are_as_far_apart_in_time_as_they_can_be_not_in_number():
    assert evenly_spaced([0, 0.1, 0.2, 0.3, 10, 20, 30], 4) == [0, 4, 5, 6]
    # The first frame stays for so long that it would be seen three times.
    assert evenly_spaced([0, 100, 101, 102, 103], 4) == [0, 1, 2, 4]


def test_parts_of_frames_are_laid_over_what_stood_there_before():
    """A GIF stores of a later frame only what changed; what is shown is the whole picture."""
    frames = [Image.new("RGB", (40, 30), "white") for _ in range(3)]
    for number, frame in enumerate(frames):
        frame.paste("red", (10 * number, 10, 10 * number + 8, 18))
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)
    for shown, drawn in zip(frames_of(data), frames, strict=True):
        np.testing.assert_array_equal(np.asarray(shown.to_pil()), np.asarray(drawn))


def test_transparent_frames_are_laid_on_white():
    frames = [Image.new("RGBA", (40, 30), (255, 0, 0, 0)) for _ in range(2)]
    frames[1].paste((255, 0, 0, 255), (0, 0, 20, 30))
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, disposal=2)
        first, second = frames_of(data)
        assert near(pixel(first, 5, 5), WHITE) and near(pixel(second, 30, 5), WHITE) and near(pixel(second, 5, 5), RED)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_more_pixels_over_all_frames_than_four_pictures_have_are_refused(kind):
    assert len(frames_of(moving(kind), 2, max_pixels=1500)) == 2  # 5 frames of 1,200
    refused_frames(moving(kind), "0.005", "megapixels", "shorten", max_pixels=1499 - 249)


def test_too_many_frames_are_refused_after_that_many():
    frames = [Image.new("P", (2, 2), number % 7) for number in range(MAX_FRAMES_READ + 1)]
    colours = [part for number in range(7) for part in (30 * number, 0, 0)]
    for frame in frames:
        frame.putpalette(colours)
    refused_frames(
        encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=20), str(MAX_FRAMES_READ), "shorten"
    )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_a_later_frame_that_is_broken_or_missing_is_one_sentence(kind):
    noise = np.random.default_rng(3).integers(0, 255, (4, 40, 40, 3), dtype=np.uint8)
    images = [Image.fromarray(frame) for frame in noise]
    data = encoded(images[0], kind, save_all=True, append_images=images[1:], duration=100)
    assert len(frames_of(data)) == 4
    for share in (0.4, 0.6, 0.95):
        refused_frames(data[: int(share * len(data))], "save it again")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_damaged_animations_never_raise_anything_else(kind):
    rng = np.random.default_rng(4)
    data = moving(kind)
    for _ in range(150):
        broken = np.frombuffer(data, np.uint8).copy()
        broken[rng.integers(0, len(broken), 3)] = rng.integers(0, 256, 3)
        try:
            assert 1 <= len(frames_of(broken.tobytes())) <= 4
        except ImageError as error:
            assert str(error).endswith(".")


def test_a_later_gif_frame_larger_than_the_header_says_is_refused():
    data = moving(colours=["red", "lime"])
    at = data.rindex(b",\0\0\0\0")  # where the second frame lies
    refused_frames(data[: at + 5] + struct.pack("<HH", 60_000, 60_000) + data[at + 9 :])


VIDEOS = {
    "mp4": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41",
    "mov": b"\0\0\0\x14ftypqt  \0\0\2\0qt  ",
    "old mov": b"\0\0\0\x08wide\0\0\0\0mdat",
    "webm": b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01",
    "avi": b"RIFF\0\0\0\0AVI LIST",
    "ogv": b"OggS\0\2\0\0\0\0\0\0",
    "mpg": b"\0\0\x01\xba\x44\0\4\0",
}


@pytest.mark.parametrize("data", VIDEOS.values(), ids=VIDEOS)
def test_a_video_file_is_told_from_a_picture_and_says_what_to_do(data):
    refused_frames(data + b"\0" * 100, "video file", "animated GIF", "single frames")
    refused_frames(data + b"\0" * 100, "video file", max_bytes=20)


@pytest.mark.parametrize("brand", [b"heic", b"avif"])
def test_a_picture_in_the_container_of_a_video_is_no_video(brand):
    refused_frames(b"\0\0\0\x20ftyp" + brand + b"\0" * 100, "not a picture this program reads")
