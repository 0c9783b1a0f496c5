"""Any picture a person may have becomes plain upright RGB; anything else is refused in one sentence."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from mllm_demo.chat.images import MAX_SIDE, read_picture
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
    refused(b"x" * 2_097_153, "limit of 2 MB", max_bytes=2**21)
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
