"""Fetches the free art and fonts that the training pictures are made of, and rasterizes them once.

    python -m mllm_demo.training.art

Sets and licences (pinned): Noto Emoji (Apache-2.0), Twemoji (CC-BY-4.0), Fluent Emoji 3D (MIT), Fontsource
fonts (OFL-1.1). OpenMoji (CC-BY-SA-4.0) is the test style: it is rasterized for the evaluation only and its
picture is never trained on. It knows nothing of scenes or questions.
"""

import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from mllm_demo.errors import DownloadError

SPRITE_SIZE = 160
TRAIN_STYLES = ("noto", "twemoji", "fluent")
TEST_STYLES = ("openmoji",)
PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "openmoji": "@iconify-json/openmoji@1.2.29",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
}
TRAIN_FONTS = ("roboto", "open-sans", "lora", "nunito", "playfair-display", "oswald", "merriweather", "fira-sans")
TEST_FONTS = ("raleway", "ubuntu")

# Unicode code point → the everyday name that the model learns.
OBJECTS = {
    "1f34e": "apple", "1f34c": "banana", "1f347": "grapes", "1f353": "strawberry", "1f349": "watermelon",
    "1f34d": "pineapple", "1f352": "cherry", "1f34b": "lemon", "1f955": "carrot", "1f344": "mushroom",
    "1f355": "pizza", "1f354": "burger", "1f370": "cake", "1f35e": "bread", "1f9c0": "cheese",
    "1f436": "dog", "1f431": "cat", "1f434": "horse", "1f42e": "cow", "1f437": "pig",
    "1f430": "rabbit", "1f43b": "bear", "1f981": "lion", "1f42f": "tiger", "1f418": "elephant",
    "1f412": "monkey", "1f427": "penguin", "1f989": "owl", "1f986": "duck", "1f41f": "fish",
    "1f40d": "snake", "1f422": "turtle", "1f98b": "butterfly", "1f41d": "bee", "1f338": "flower",
    "1f335": "cactus", "1f333": "tree", "1f697": "car", "1f68c": "bus", "1f682": "train",
    "2708": "plane", "1f6b2": "bicycle", "26f5": "boat", "1f680": "rocket", "1f3e0": "house",
    "2602": "umbrella", "1f511": "key", "1f528": "hammer", "2702": "scissors", "1f4d6": "book",
    "23f0": "clock", "260e": "phone", "1f4bb": "laptop", "1f3b8": "guitar", "26bd": "ball",
    "1f381": "gift", "1f451": "crown", "1f453": "glasses", "1f45f": "shoe", "1f455": "shirt",
}  # fmt: skip
OBJECT_NAMES = tuple(OBJECTS.values())


@dataclass(frozen=True)
class Art:
    """`sprites[style]`: uint8 `[objects, SPRITE_SIZE, SPRITE_SIZE, 4]` RGBA; `fonts[name]`: font file bytes."""

    sprites: dict[str, np.ndarray]
    fonts: dict[str, bytes]


def _npm_pack(package: str, folder: Path) -> dict[str, bytes]:
    """The files of one npm package, read from its tarball without unpacking it to disk."""
    stem = package.lstrip("@").replace("/", "-").replace("@", "-")
    tarball = next(iter(folder.glob(f"{stem}*.tgz")), None)
    if tarball is None:
        try:
            run = subprocess.run(
                ["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise DownloadError(
                f"Could not fetch {package} with npm ({error}); install npm and check the network connection."
            ) from error
        tarball = folder / run.stdout.strip().splitlines()[-1]
        tarball = tarball.rename(folder / f"{stem}.tgz")
    with tarfile.open(tarball) as archive:
        return {m.name.removeprefix("package/"): archive.extractfile(m).read() for m in archive if m.isfile()}


def _fit(image: Image.Image) -> np.ndarray:
    """Crops to the visible part and centres it in a SPRITE_SIZE square."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
    image.thumbnail((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE))
    canvas.paste(image, ((SPRITE_SIZE - image.width) // 2, (SPRITE_SIZE - image.height) // 2))
    return np.asarray(canvas)


def _rasterize_iconify(files: dict[str, bytes]) -> np.ndarray:
    icons, chars = json.loads(files["icons.json"]), json.loads(files["chars.json"])
    sprites = []
    for code in OBJECTS:
        slug = chars.get(code) or chars[f"{code}-fe0f"]
        icon = icons["icons"].get(slug) or icons["icons"][icons["aliases"][slug]["parent"]]
        width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
        body = icon["body"].replace("currentColor", "#000")
        names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        svg = f'<svg {names} viewBox="0 0 {width} {height}" width="{width}" height="{height}">{body}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SPRITE_SIZE)
        sprites.append(_fit(Image.open(io.BytesIO(bytes(png)))))
    return np.stack(sprites)


def _rasterize_fluent(files: dict[str, bytes]) -> np.ndarray:
    def picture(code: str) -> bytes:
        return files.get(f"assets/{code}.webp") or files[f"assets/{code}-fe0f.webp"]

    return np.stack([_fit(Image.open(io.BytesIO(picture(code)))) for code in OBJECTS])


def prepare(cache: Path) -> Path:
    """Fetches and rasterizes everything into `cache/art.npz`; a second call only returns its path."""
    target = cache / "art.npz"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for style, package in PACKAGES.items():
        print(f"art: {package}", flush=True)
        files = _npm_pack(package, cache)
        arrays[f"sprite-{style}"] = _rasterize_fluent(files) if style == "fluent" else _rasterize_iconify(files)
    for font in TRAIN_FONTS + TEST_FONTS:
        print(f"font: {font}", flush=True)
        files = _npm_pack(f"@fontsource/{font}@5", cache)
        arrays[f"font-{font}"] = np.frombuffer(files[f"files/{font}-latin-700-normal.woff"], np.uint8)
    partial = target.with_suffix(".part.npz")
    np.savez_compressed(partial, **arrays)
    partial.rename(target)
    return target


@lru_cache(maxsize=2)
def load(cache: Path) -> Art:
    with np.load(prepare(cache), allow_pickle=False) as arrays:
        return Art(
            sprites={k.removeprefix("sprite-"): arrays[k] for k in arrays.files if k.startswith("sprite-")},
            fonts={k.removeprefix("font-"): arrays[k].tobytes() for k in arrays.files if k.startswith("font-")},
        )


if __name__ == "__main__":
    print(prepare(Path("runs/art")))
