"""A routing trace as the compact JSON value that the page's routing view draws from, whole or growing.

It knows nothing of Gradio or of how the view draws. Positions travel in `parts`; while an answer streams,
parts are only ever appended, so that each update sends what is new. Of a router with many experts, only the
experts that were selected and the strongest of the others are named; of the rest goes the sum.
"""

import base64
import io
import secrets

import numpy as np

from mllm_demo.chat.images import read_picture
from mllm_demo.errors import ImageError
from mllm_demo.figures.palette import CIVIDIS, MANY_EXPERTS, expert_colors
from mllm_demo.routing.stats import site_groups
from mllm_demo.routing.trace import RoutingTrace, Site, Token, TraceImage

DISPLAY_PIXELS = 640
NEXT_BEST = 4
MAX_SOURCE_PIXELS = 100_000_000
MAX_SOURCE_BYTES = 1 << 28
COLUMNS = ("probs", "selected", "weights", "rest")
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
        return sum(len(text) for part in self._parts for column in COLUMNS for text in part[column])

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


def num_listed(site: Site) -> int:
    """How many experts of one choice travel by name: all where they are few, else the selected and `NEXT_BEST`."""
    few = site.num_experts <= MANY_EXPERTS
    return site.num_experts if few else min(site.num_experts, site.num_experts_per_tok + NEXT_BEST)


def _site(site: Site) -> dict:
    return {
        "name": site.name,
        "layer": site.layer_idx,
        "block": site.block,
        "experts": site.num_experts,
        "k": site.num_experts_per_tok,
        "listed": num_listed(site),
        "granularity": site.granularity,
        "shared": site.has_shared_expert,
    }


def _part(trace: RoutingTrace, start: int) -> dict:
    """Positions `start`.. as columns, each of them base64 per site.

    `probs`: uint16 (65535 is one) of the listed experts, by number where all of them are listed. `selected`: uint16.
    `weights`: float32. Where some are not listed, `selected` goes on with the numbers of the next best, `probs` is in
    its order, and `rest` holds float32 pairs: the sum of the others, and the entropy of all as a share of the highest.
    """
    tokens = trace.tokens[start:]
    places = [
        [offset, token.image_index, *(round(float(edge), 1) for edge in token.box or ())]
        for offset, token in enumerate(tokens)
        if token.image_index is not None
    ]
    columns: dict[str, list[str]] = {name: [] for name in COLUMNS}
    # A choice for a whole sequence is one row for the prompt and one for the answer, which may have got its own.
    answer = next((position for position, token in enumerate(trace.tokens) if token.phase == "decode"), 0)
    whole = [position for position in sorted({0, answer}) if position >= start]
    for site in trace.sites:
        rows = whole if site.granularity == "sequence" else slice(start, len(trace.tokens))
        probs = np.asarray(trace.router_probs[site.name][rows], np.float32)
        selected = np.asarray(trace.selected_experts[site.name][rows])
        rest = np.empty((0, 2), np.float32)
        if num_listed(site) < site.num_experts:
            probs, selected, rest = _named(probs, selected, num_listed(site))
        columns["probs"].append(_b64(np.rint(np.clip(probs, 0, 1) * 65535).astype("<u2")))
        columns["selected"].append(_b64(selected.astype("<u2")))
        columns["weights"].append(_b64(np.asarray(trace.routing_weights[site.name][rows]).astype("<f4")))
        columns["rest"].append(_b64(rest.astype("<f4")))
    return {
        "text": [token.text for token in tokens],
        "modality": "".join(_CODES[token.modality] for token in tokens),
        "role": "".join(_CODES[token.role] for token in tokens),
        "phase": "".join(token.phase[0] for token in tokens),
        "places": places,
        **columns,
    }


def _named(probs: np.ndarray, selected: np.ndarray, listed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From `probs` [tokens, experts] and `selected` [tokens, k]: probs and numbers of the listed, and the rest.

    Returns `[tokens, listed]` probs and expert numbers, the selected first in their order, then by probability,
    and `[tokens, 2]` with the sum of the unlisted and the normalised entropy of all.
    """
    others = probs.copy()
    np.put_along_axis(others, selected.astype(np.int64), -1, axis=1)
    best = np.argsort(-others, axis=1, kind="stable")[:, : listed - selected.shape[1]]
    numbers = np.concatenate((selected, best), axis=1)
    named = np.take_along_axis(probs, numbers.astype(np.int64), axis=1)
    total = probs.sum(axis=1)
    share = probs / np.maximum(total, np.finfo(np.float32).tiny)[:, None]
    nats = -(share * np.log(np.where(share > 0, share, 1))).sum(axis=1)
    rest = np.stack((np.maximum(0, total - named.sum(axis=1)), nats / np.log(probs.shape[1])), axis=1)
    return named, numbers, rest


def _b64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def _image(image: TraceImage) -> dict:
    """A small data URL of a picture; an unreadable one (a file may come from anybody) is drawn as a blank."""
    size = {"width": image.width, "height": image.height, "label": image.label}
    try:
        picture = read_picture(image.data, max_bytes=MAX_SOURCE_BYTES, max_pixels=MAX_SOURCE_PIXELS)
    except ImageError:
        return {"src": "", **size}
    small = picture.to_pil()
    small.thumbnail((DISPLAY_PIXELS, DISPLAY_PIXELS))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85)
    return {"src": "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii"), **size}
