"""Fetches the free art and fonts that the training pictures are made of, and rasterizes them once.

    python -m mllm_demo.training.art

Sets and licences (pinned): Noto Emoji, also its first version, and FxEmojis (Apache-2.0), Twemoji and Emoji One
(CC-BY-4.0), Fluent Emoji in 3D and flat (MIT), Fontsource fonts (OFL-1.1). OpenMoji (CC-BY-SA-4.0) is the test style:
it is rasterized for the evaluation only and its pictures are never trained on. It knows nothing of scenes or questions.
"""

import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from mllm_demo.errors import DownloadError

SPRITE_SIZE = 224
TRAIN_STYLES = ("noto", "twemoji", "fluent", "fluent-flat", "noto-v1", "emojione", "fxemoji")
TEST_STYLES = ("openmoji",)
PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "openmoji": "@iconify-json/openmoji@1.2.29",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
}
TRAIN_FONTS = (
    "roboto", "open-sans", "lora", "nunito", "playfair-display", "oswald", "merriweather", "fira-sans", "inter",
    "poppins", "montserrat", "source-serif-4", "ibm-plex-mono", "bitter", "comfortaa", "josefin-sans",
)  # fmt: skip
TEST_FONTS = ("raleway", "ubuntu", "pt-serif", "work-sans")

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
    "1f345": "tomato", "1f33d": "corn", "1f346": "eggplant", "1f366": "ice cream", "1f369": "donut",
    "1f36a": "cookie", "1f95a": "egg", "2615": "coffee", "1f414": "chicken", "1f438": "frog",
    "1f42d": "mouse", "1f43a": "wolf", "1f98a": "fox", "1f43c": "panda", "1f428": "koala",
    "1f433": "whale", "1f988": "shark", "1f419": "octopus", "1f980": "crab", "1f40c": "snail",
    "1f577": "spider", "1f41c": "ant", "1f987": "bat", "1f42b": "camel", "1f992": "giraffe",
    "1f993": "zebra", "1f411": "sheep", "1f410": "goat", "1f69a": "truck", "1f3cd": "motorcycle",
    "1f681": "helicopter", "26fa": "tent", "1f3f0": "castle", "26ea": "church", "1f6aa": "door",
    "1f4a1": "light bulb", "1f56f": "candle", "1f4fa": "television", "1f4f7": "camera", "1f514": "bell",
    "1f941": "drum", "1f3ba": "trumpet", "1f3bb": "violin", "1f452": "hat", "1f9e6": "sock",
    "1f457": "dress", "1f48d": "ring", "1f392": "backpack", "270f": "pencil", "2709": "envelope",
    "1f388": "balloon", "1f3c6": "trophy", "1f9f8": "teddy bear", "1f916": "robot", "1f47b": "ghost",
    "1f52d": "telescope", "1f9f2": "magnet", "2744": "snowflake", "1f308": "rainbow", "2600": "sun",
    "1f319": "moon", "2601": "cloud", "26c4": "snowman", "1f525": "fire", "1f339": "rose",
}  # fmt: skip
OBJECT_NAMES = tuple(OBJECTS.values())
# Every object is withheld in one training style, so that held-out pictures show drawings never trained on.
HELD_OUT_STYLE = {name: TRAIN_STYLES[(3 * i + i // 7) % len(TRAIN_STYLES)] for i, name in enumerate(OBJECT_NAMES)}


@dataclass(frozen=True)
class Art:
    """`sprites[style]`: uint8 `[objects, SPRITE_SIZE, SPRITE_SIZE, 4]` RGBA; `fonts[name]`: font file bytes.

    `drawn[name]`: the styles that have a drawing of the object; the others' sprites are empty.
    """

    sprites: dict[str, np.ndarray]
    fonts: dict[str, bytes]

    @cached_property
    def drawn(self) -> dict[str, frozenset[str]]:
        has = {style: sprites[..., 3].any((1, 2)) for style, sprites in self.sprites.items()}
        return {name: frozenset(s for s in has if has[s][i]) for i, name in enumerate(OBJECT_NAMES)}


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


def _rasterize_iconify(files: dict[str, bytes], slugs: dict[str, str]) -> np.ndarray:
    """`slugs`: code point → icon name, for sets that do not tell it themselves; they share their names."""
    icons, chars = json.loads(files["icons.json"]), slugs | json.loads(files.get("chars.json", b"{}"))
    sprites = []
    for code in OBJECTS:
        slug = chars.get(code) or chars.get(f"{code}-fe0f")
        if slug not in icons["icons"] and slug not in icons.get("aliases", {}):
            sprites.append(np.zeros((SPRITE_SIZE, SPRITE_SIZE, 4), np.uint8))
            continue
        icon = icons["icons"].get(slug) or icons["icons"][icons["aliases"][slug]["parent"]]
        width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
        body = icon["body"].replace("currentColor", "#000")
        names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        svg = f'<svg {names} viewBox="0 0 {width} {height}" width="{width}" height="{height}">{body}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SPRITE_SIZE)
        sprites.append(_fit(Image.open(io.BytesIO(bytes(png)))))
    return np.stack(sprites)


def _rasterize_fluent(files: dict[str, bytes]) -> np.ndarray:
    def sprite(code: str) -> np.ndarray:
        picture = files.get(f"assets/{code}.webp") or files.get(f"assets/{code}-fe0f.webp")
        if picture is None:
            return np.zeros((SPRITE_SIZE, SPRITE_SIZE, 4), np.uint8)
        return _fit(Image.open(io.BytesIO(picture)))

    return np.stack([sprite(code) for code in OBJECTS])


def prepare(cache: Path) -> Path:
    """Fetches and rasterizes everything into `cache/art.npz`; a second call only returns its path."""
    names = repr((sorted(PACKAGES.items()), TRAIN_FONTS, TEST_FONTS, sorted(OBJECTS), SPRITE_SIZE))
    target = cache / f"art-{hashlib.sha256(names.encode()).hexdigest()[:8]}.npz"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    arrays, slugs = {}, {}
    for style, package in PACKAGES.items():
        print(f"art: {package}", flush=True)
        files = _npm_pack(package, cache)
        if style == "fluent":
            arrays[f"sprite-{style}"] = _rasterize_fluent(files)
            continue
        arrays[f"sprite-{style}"] = _rasterize_iconify(files, slugs)
        slugs = slugs or json.loads(files["chars.json"])
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
