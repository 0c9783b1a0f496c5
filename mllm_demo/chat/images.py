"""Turns untrusted bytes into safe `Picture`s: upright, plain RGB, no metadata, of bounded size.

A moving picture (animated GIF, WebP or PNG) becomes some of its frames. Everything is checked before it costs
anything: the weight before opening, the pixels before decoding. It knows nothing of models or pages, decodes no video
files, and leaves Pillow's global settings alone, since other code of the process uses them.
"""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from mllm_demo.chat.messages import Picture
from mllm_demo.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP or TIFF"
# Pages of a TIFF and second views of a JPEG are no moving pictures.
MOVING_FORMATS = ("GIF", "WEBP", "PNG")
_STILL_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis")
MAX_SIDE = 4096
MAX_ASPECT_RATIO = 100
# All frames of a moving picture are decoded to know when each is shown: this many, of so many times a picture's pixels.
MAX_FRAMES_READ = 2000
MOVING_PIXELS = 4
# Browsers show a frame that asks for less than 11 ms for 100 ms.
SHORTEST_MS, INSTEAD_MS = 11, 100


def read_picture(source: bytes | str | Path, *, max_bytes: int, max_pixels: int, name: str | None = None) -> Picture:
    """The picture in `source`, of a moving one the first frame; see `read_pictures`."""
    return read_pictures(source, max_bytes=max_bytes, max_pixels=max_pixels, max_frames=1, name=name)[0]


def read_pictures(
    source: bytes | str | Path, *, max_bytes: int, max_pixels: int, max_frames: int, name: str | None = None
) -> tuple[Picture, ...]:
    """Decodes `source` (the bytes of a file, or its path) into RGB PNGs: one, or `max_frames` of a moving picture.

    EXIF rotation is applied, transparency is laid on white, 16-bit and float greys are scaled to 8 bits. A side longer
    than 4096 pixels is scaled down to it; `Picture.width` and `Picture.height` are the size of the stored PNG, which is
    what the model is shown. `name` is what error messages call the picture (default: the file's name, or "image").

    Frames are evenly spaced in time, the first and the last among them, and `Picture.label` says which one it is and
    when it is shown ("frame 2 of 4, 0.8 s"). With `max_frames` 1, later frames are not even looked at.

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
            begins = _begins(opened, max_pixels, name) if max_frames > 1 and opened.format in MOVING_FORMATS else {}
            if len(begins) < 2:
                return (_picture(opened, 0, max_pixels, name),)
            frames, times = list(begins), list(begins.values())
            shown = evenly_spaced(times, max_frames)
            return tuple(
                _picture(opened, frames[n], max_pixels, name, f"frame {count} of {len(shown)}, {times[n]:.1f} s")
                for count, n in enumerate(shown, start=1)
            )
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(
                f"{name} is damaged or cut off and cannot be decoded; save it again and upload that."
            ) from error


def evenly_spaced(begins: Sequence[float], most: int) -> list[int]:
    """Which of the frames that begin at `begins` (seconds, over a millisecond apart) to show: all, or `most` of them.

    The first and the last are among them; those between are the ones to be seen at evenly spaced times. Where one frame
    stays so long that it would be taken twice, the next takes its place.
    """
    order = np.arange(min(most, len(begins)))
    times = np.linspace(begins[0], begins[-1], len(order))
    # Sums of decimal durations miss their mark by a rounding error.
    seen = np.searchsorted(np.asarray(begins), times + 1e-6, side="right") - 1
    seen = np.maximum.accumulate(seen - order) + order
    return np.minimum(seen, len(begins) - len(order) + order).tolist()


def _begins(opened: Image.Image, max_pixels: int, name: str) -> dict[int, float]:
    """Number of each frame of `opened`, and when it begins, in seconds; decodes every one."""
    begins: dict[int, float] = {}
    seconds = pixels = 0.0
    # The first picture of an animated PNG may be for viewers that know no animation, and not part of it.
    for number in itertools.count(1 if opened.info.get("default_image") else 0):
        try:
            opened.seek(number)
        except EOFError:
            break
        pixels += opened.width * opened.height
        if len(begins) == MAX_FRAMES_READ or pixels > MOVING_PIXELS * max_pixels:
            raise ImageError(
                f"{name} is too long: a moving picture may have {MAX_FRAMES_READ} frames and, over all of them, "
                f"{MOVING_PIXELS * max_pixels / 1e6:g} megapixels; shorten it or scale it down and upload it again."
            )
        _load(opened, max_pixels, name, f"frame {len(begins) + 1} of ")
        begins[number] = seconds
        asked = float(opened.info.get("duration") or 0)
        seconds += (asked if asked >= SHORTEST_MS else INSTEAD_MS) / 1000
    # A GIF does not say how many frames it has; the others do.
    if opened.format != "GIF" and number < opened.n_frames:
        raise ImageError(f"{name} is cut off after {len(begins)} frames; save it again and upload that.")
    return begins


def _load(opened: Image.Image, max_pixels: int, name: str, which: str = "") -> None:
    try:
        # A GIF's frame and a TIFF's tile may be larger than what the header declared.
        _check_size(opened.size, max_pixels, name)
        opened.load()
        _check_size(opened.size, max_pixels, name)
    except ImageError:
        raise
    except Exception as error:  # decoders answer hostile bytes with any exception there is
        raise ImageError(
            f"{which}{name} is damaged or cut off and cannot be decoded; save it again and upload that."
        ) from error


def _picture(opened: Image.Image, frame: int, max_pixels: int, name: str, label: str = "") -> Picture:
    opened.seek(frame)
    _load(opened, max_pixels, name)
    rgb = _to_rgb(_upright(opened))
    rgb.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    rgb.info.clear()
    png = io.BytesIO()
    rgb.save(png, format="PNG", compress_level=1)
    return Picture(png.getvalue(), rgb.width, rgb.height, name, label)


def _is_video(data: bytes) -> bool:
    """By the first bytes: MP4, MOV (not HEIC and AVIF pictures, which begin alike), WebM, MKV, AVI, Ogg, FLV, MPEG."""
    if data[4:8] == b"ftyp":
        return data[8:12] not in _STILL_BRANDS
    return (
        data[4:8] in (b"moov", b"mdat", b"wide")
        or data.startswith((b"\x1a\x45\xdf\xa3", b"OggS", b"FLV\x01", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3"))
        or (data[:4] == b"RIFF" and data[8:12] == b"AVI ")
    )


def _read(source: bytes | str | Path, max_bytes: int, name: str) -> bytes:
    too_large = ImageError(
        f"{name} is larger than the limit of {max_bytes / 1e6:g} MB; make it smaller and upload it again."
    )
    if isinstance(source, bytes):
        data = source
    else:
        try:
            with Path(source).open("rb") as file:
                data = file.read(max_bytes + 1)
        except (OSError, ValueError) as error:
            raise ImageError(f"{name} cannot be opened; check that the file exists and may be read.") from error
    if _is_video(data):
        raise ImageError(
            f"{name} is a video file, which is not read; save it as an animated GIF or WebP, or upload single frames "
            "as pictures."
        )
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
