"""A routing trace as the compact JSON value that the page's routing view draws from, whole or growing.

It knows nothing of Gradio or of how the view draws. Positions travel in `parts`; while an answer streams,
parts are only ever appended, so that each update sends what is new.
"""

import base64
import io
import secrets

import numpy as np

from mllm_demo.chat.images import read_picture
from mllm_demo.errors import ImageError
from mllm_demo.figures.palette import CIVIDIS, expert_colors
from mllm_demo.routing.stats import site_groups
from mllm_demo.routing.trace import RoutingTrace, Site, Token, TraceImage

DISPLAY_PIXELS = 640
MAX_SOURCE_PIXELS = 100_000_000
MAX_SOURCE_BYTES = 1 << 28
_CODES = {"image": "i", "text": "t", "special": "s", "system": "y", "user": "u", "assistant": "a"}


def router_kinds(trace: RoutingTrace) -> list[dict]:
    """Routers that do the same job in different layers: what the page offers as "router".

    Returns dicts `label`, `block`, `sites` (indices into `trace.sites`, by layer). Where one block of a layer
    has several routers, the label says the part of their module path that follows the layer's number.
    """
    index = {site.name: position for position, site in enumerate(trace.sites)}
    groups = site_groups(trace)
    blocks = [sites[0].block for sites in groups.values()]
    return [
        {
            "label": block
            if blocks.count(block) == 1
            else f"{block} · {path.rpartition('*.')[2].removeprefix(f'{block}.')}",
            "block": block,
            "sites": [index[site.name] for site in sites],
        }
        for block, (path, sites) in zip(blocks, groups.items(), strict=True)
    ]


class PayloadStream:
    """Builds the payload of one answer again and again while its trace grows.

    `kind` says where the trace comes from: "answer", "sample" or "file".
    """

    def __init__(self, kind: str = "answer") -> None:
        self._kind = kind
        self._restart()

    @property
    def num_bytes(self) -> int:
        """About what the payload weighs, pictures left out; a heavy one should not be sent often."""
        columns = ("probs", "selected", "weights")
        return sum(len(text) for part in self._parts for column in columns for text in part[column])

    def _restart(self) -> None:
        self._key = secrets.token_hex(6)
        self._tokens: tuple[Token, ...] = ()
        self._parts: list[dict] = []
        self._starts: list[int] = []
        self._made = 0
        self._images: list[dict] | None = None

    def _forget_from(self, position: int) -> None:
        """Drops the parts that hold `position` and later: the text of half a character may still change."""
        if position == 0 or len(self._starts) < 2 or position < self._starts[1]:
            return self._restart()
        keep = sum(start <= position for start in self._starts) - 1
        self._tokens = self._tokens[: self._starts[keep]]
        del self._parts[keep:], self._starts[keep:]

    def update(self, trace: RoutingTrace, *, live: bool, note: str = "") -> dict:
        """The JSON-able value for `trace`; `note` is a line of text about its origin."""
        known = len(self._tokens)
        if trace.tokens[:known] != self._tokens:
            pairs = zip(trace.tokens, self._tokens, strict=False)
            changed = (position for position, (new, old) in enumerate(pairs) if new != old)
            self._forget_from(next(changed, len(trace.tokens)))
            known = len(self._tokens)
        if len(trace.tokens) > known:
            self._made += 1
            self._parts.append({"id": self._made, **_part(trace, known)})
            self._starts.append(known)
            self._tokens = trace.tokens
        if self._images is None:
            self._images = [_image(image) for image in trace.images]
        most = max((site.num_experts for site in trace.sites), default=0)
        return {
            "key": self._key,
            "kind": self._kind,
            "live": live,
            "note": note,
            "colors": list(expert_colors(most)),
            "scale": list(CIVIDIS),
            "sites": [_site(site) for site in trace.sites],
            "kinds": router_kinds(trace),
            "images": self._images,
            "parts": list(self._parts),
        }


def empty_payload(message: str) -> dict:
    """What the view shows when there is no routing to draw: one sentence that says why."""
    return {"empty": message}


def _site(site: Site) -> dict:
    return {
        "name": site.name,
        "layer": site.layer_idx,
        "block": site.block,
        "experts": site.num_experts,
        "k": site.num_experts_per_tok,
        "granularity": site.granularity,
        "shared": site.has_shared_expert,
    }


def _part(trace: RoutingTrace, start: int) -> dict:
    """Positions `start`.. as columns; per site base64 of uint16 probs (65535 is one) and selected, float32 weights."""
    tokens = trace.tokens[start:]
    places = [
        [offset, token.image_index, *(round(float(edge), 1) for edge in token.box or ())]
        for offset, token in enumerate(tokens)
        if token.image_index is not None
    ]
    columns: dict[str, list[str]] = {"probs": [], "selected": [], "weights": []}
    # A choice for a whole sequence is one row for the prompt and one for the answer, which may have got its own.
    answer = next((position for position, token in enumerate(trace.tokens) if token.phase == "decode"), 0)
    whole = [position for position in sorted({0, answer}) if position >= start]
    for site in trace.sites:
        rows = whole if site.granularity == "sequence" else slice(start, len(trace.tokens))
        probs = np.asarray(trace.router_probs[site.name][rows], np.float32)
        columns["probs"].append(_b64(np.rint(np.clip(probs, 0, 1) * 65535).astype("<u2")))
        columns["selected"].append(_b64(np.asarray(trace.selected_experts[site.name][rows]).astype("<u2")))
        columns["weights"].append(_b64(np.asarray(trace.routing_weights[site.name][rows]).astype("<f4")))
    return {
        "text": [token.text for token in tokens],
        "modality": "".join(_CODES[token.modality] for token in tokens),
        "role": "".join(_CODES[token.role] for token in tokens),
        "phase": "".join(token.phase[0] for token in tokens),
        "places": places,
        **columns,
    }


def _b64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def _image(image: TraceImage) -> dict:
    """A small data URL of a picture; an unreadable one (a file may come from anybody) is drawn as a blank."""
    size = {"width": image.width, "height": image.height}
    try:
        picture = read_picture(image.data, max_bytes=MAX_SOURCE_BYTES, max_pixels=MAX_SOURCE_PIXELS)
    except ImageError:
        return {"src": "", **size}
    small = picture.to_pil()
    small.thumbnail((DISPLAY_PIXELS, DISPLAY_PIXELS))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85)
    return {"src": "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii"), **size}
