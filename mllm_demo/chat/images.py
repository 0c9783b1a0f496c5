"""Turns untrusted bytes into a safe `Picture`: upright, plain RGB, no metadata, of bounded size.

Everything is checked before it costs anything: the weight before opening, the pixels before decoding. It knows
nothing of models or pages, and leaves Pillow's global settings alone, since other code of the process uses them.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from mllm_demo.chat.messages import Picture
from mllm_demo.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP or TIFF"
MAX_SIDE = 4096
MAX_ASPECT_RATIO = 100


def read_picture(source: bytes | str | Path, *, max_bytes: int, max_pixels: int, name: str | None = None) -> Picture:
    """Decodes `source` (the bytes of a file, or its path) into an RGB PNG.

    EXIF rotation is applied, transparency is laid on white, 16-bit and float greys are scaled to 8 bits, of
    an animation the first frame is taken. A side longer than 4096 pixels is scaled down to it;
    `Picture.width` and `Picture.height` are the size of the stored PNG, which is what the model is shown.
    `name` is what error messages call the picture (default: the file's name, or "image").

    Raises `ImageError` with one sentence that names the picture and says what to do instead.
    """
    name = name or (Path(source).name if isinstance(source, str | Path) else "image")
    data = _read(source, max_bytes, name)
    try:
        opened = _open(data)
    except Exception as error:  # decoders answer hostile bytes with any exception there is
        raise ImageError(f"{name} starts like a picture but is damaged; save it again and upload that.") from error
    if opened is None:
        raise ImageError(f"{name} is not a picture this program reads; upload a {FORMAT_NAMES} file.")
    with opened:
        _check_size(opened.size, max_pixels, name)
        try:
            opened.load()
            # A GIF's frame and a TIFF's tile may be larger than what the header declared.
            _check_size(opened.size, max_pixels, name)
            rgb = _to_rgb(_upright(opened))
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(
                f"{name} is damaged or cut off and cannot be decoded; save it again and upload that."
            ) from error
    rgb.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    rgb.info.clear()
    png = io.BytesIO()
    rgb.save(png, format="PNG", compress_level=1)
    return Picture(png.getvalue(), rgb.width, rgb.height, name)


def _read(source: bytes | str | Path, max_bytes: int, name: str) -> bytes:
    too_large = ImageError(
        f"{name} is larger than the limit of {max_bytes / 2**20:g} MB; make it smaller and upload it again."
    )
    if isinstance(source, bytes):
        data = source
    else:
        try:
            with Path(source).open("rb") as file:
                data = file.read(max_bytes + 1)
        except (OSError, ValueError) as error:
            raise ImageError(f"{name} cannot be opened; check that the file exists and may be read.") from error
    if len(data) > max_bytes:
        raise too_large
    if not data:
        raise ImageError(f"{name} is empty; upload the picture again.")
    return data


def _open(data: bytes) -> Image.Image | None:
    """The picture with its header read and its pixels not; None when no allowed format claims the bytes.

    `Image.open` would first compare the size with Pillow's own global limit and warn; here only ours counts.
    """
    Image.init()
    for name in FORMATS:
        factory, accepts = Image.OPEN[name]
        if accepts is not None and accepts(data[:16]) is True:
            return factory(io.BytesIO(data), "")
    return None


def _check_size(size: tuple[int, int], max_pixels: int, name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width} x {height}); upload another picture.")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} pixels, more than the limit of {max_pixels / 1e6:g} megapixels; "
            "scale it down and upload it again."
        )
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise ImageError(
            f"{name} is a strip of {width} x {height} pixels; its longer side may be at most {MAX_ASPECT_RATIO} "
            "times its shorter one, so crop it and upload it again."
        )


def _upright(image: Image.Image) -> Image.Image:
    """`image` turned as its EXIF orientation says; unreadable EXIF turns nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.float64), 65535.0)
    if image.mode == "F":
        return _grey(np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0), 1.0)
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    return image.convert("RGB")


def _grey(values: np.ndarray, full: float) -> Image.Image:
    """[height, width] of any range as 8-bit RGB.

    Black is 0 and white is `full` where the values fit; floats up to 255 are taken as 8 bits; others are stretched.
    """
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > max(full, 255.0):
        values, full = values - low, max(high - low, 1e-12)
    elif high > full:
        full = 255.0
    return Image.fromarray(np.rint(values * (255.0 / full)).astype(np.uint8)).convert("RGB")
