"""The one value every picture is drawn from: which expert each token was routed to, at every router.

Frozen, numpy only, versioned, one `.safetensors` file. It knows nothing of models, hooks or pages.
"""

import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from mllm_demo.errors import TraceError

MODALITIES = ("image", "text", "special")
TOKEN_ROLES = ("system", "user", "assistant")
PHASES = ("prefill", "decode")
BLOCKS = ("attention", "mlp", "layer", "model", "vision", "connector")
GRANULARITIES = ("token", "sequence", "modality")
TRACE_VERSION = 1
TRACE_FORMAT = "mllm_demo.routing_trace"
MAX_FILE_BYTES = 1 << 30

_KINDS = ("router_probs", "selected_experts", "routing_weights")
# What a hostile or damaged file can make the readers below raise.
_UNREADABLE = (
    SafetensorError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RecursionError,
    OverflowError,
    MemoryError,
)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise TraceError(message)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_box(box: object) -> bool:
    return (
        isinstance(box, tuple)
        and len(box) == 4
        and all(isinstance(edge, (int, float)) and math.isfinite(edge) for edge in box)
        and 0 <= box[0] < box[2]
        and 0 <= box[1] < box[3]
    )


@dataclass(frozen=True)
class Token:
    """One position of the sequence; its identity is its index in `RoutingTrace.tokens`.

    `box`: (x0, y0, x1, y1) in pixels of the original image `image_index`, None unless `modality` is "image"
    (and None for an image token that covers no one region, such as a row separator).
    """

    id: int
    text: str
    modality: str
    role: str
    phase: str
    image_index: int | None = None
    box: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        _check(_is_int(self.id) and self.id >= 0, f"a token id must be 0 or more, not {self.id!r}.")
        _check(isinstance(self.text, str), f"a token's text must be a string, not {self.text!r}.")
        for name, values in (("modality", MODALITIES), ("role", TOKEN_ROLES), ("phase", PHASES)):
            value = getattr(self, name)
            _check(value in values, f"a token's {name} must be one of {values}, not {value!r}.")
        if self.image_index is not None:
            _check(
                _is_int(self.image_index) and self.image_index >= 0,
                f"a token's image index must be 0 or more, not {self.image_index!r}.",
            )
        if self.box is not None:
            _check(
                self.image_index is not None and self.modality == "image" and _is_box(self.box),
                f"only an image token has a box, (x0, y0, x1, y1) x0 < x1 and y0 < y1, not {self.box!r}.",
            )


@dataclass(frozen=True)
class Site:
    """One router. `name` is its module path; `block` says which part of the layer it serves.

    `layer_idx` is -1 for a router that serves no single layer.
    """

    name: str
    layer_idx: int
    block: str
    num_experts: int
    num_experts_per_tok: int
    granularity: str = "token"
    has_shared_expert: bool = False

    def __post_init__(self) -> None:
        _check(isinstance(self.name, str) and bool(self.name), f"a router needs a name, not {self.name!r}.")
        where = f"router {self.name!r}"
        _check(
            _is_int(self.layer_idx) and self.layer_idx >= -1,
            f"{where}: layer_idx must be a whole number from -1, not {self.layer_idx!r}.",
        )
        _check(self.block in BLOCKS, f"{where}: block must be one of {BLOCKS}, not {self.block!r}.")
        _check(
            _is_int(self.num_experts)
            and _is_int(self.num_experts_per_tok)
            and 1 <= self.num_experts_per_tok <= self.num_experts < 2**15,
            f"{where}: {self.num_experts_per_tok!r} of {self.num_experts!r} experts cannot be selected.",
        )
        _check(
            self.granularity in GRANULARITIES,
            f"{where}: granularity must be one of {GRANULARITIES}, not {self.granularity!r}.",
        )
        _check(
            isinstance(self.has_shared_expert, bool),
            f"{where}: has_shared_expert must be true or false, not {self.has_shared_expert!r}.",
        )


@dataclass(frozen=True)
class TraceImage:
    """A picture of the conversation: `data` is encoded PNG or JPEG, `width` x `height` its original size.

    `label`: which frame of a moving picture it is, and when it is shown; empty for any other picture.
    """

    data: bytes
    width: int
    height: int
    label: str = ""

    def __post_init__(self) -> None:
        _check(isinstance(self.data, bytes) and bool(self.data), "an image of a trace must have bytes.")
        _check(
            _is_int(self.width) and _is_int(self.height) and self.width > 0 and self.height > 0,
            f"an image of a trace cannot be {self.width!r} x {self.height!r} pixels.",
        )
        _check(isinstance(self.label, str), f"an image's label must be a string, not {self.label!r}.")


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Routing of one answer, complete: every site has a value for every position, or making one raises.

    router_probs[site.name]      float16 [tokens, num_experts], softmax before top-k
    selected_experts[site.name]  int16   [tokens, num_experts_per_tok]
    routing_weights[site.name]   float16 [tokens, num_experts_per_tok], what the experts' outputs were
                                 multiplied by
    provenance                   JSON-able: base, adapter, quantization, dtypes, sampling, seed, messages,
                                 answer, versions, timings

    The arrays are read-only. Two traces are compared with `equals`; `==` is identity.
    """

    tokens: tuple[Token, ...]
    sites: tuple[Site, ...]
    router_probs: Mapping[str, np.ndarray]
    selected_experts: Mapping[str, np.ndarray]
    routing_weights: Mapping[str, np.ndarray]
    images: tuple[TraceImage, ...] = ()
    provenance: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tokens", "sites", "images"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check(bool(self.sites), "a routing trace needs at least one router.")
        names = [site.name for site in self.sites]
        _check(len(set(names)) == len(names), "a routing trace cannot hold two routers of the same name.")
        for position, token in enumerate(self.tokens):
            _check(
                token.image_index is None or token.image_index < len(self.images),
                f"token {position} is of image {token.image_index}, the trace has {len(self.images)} images.",
            )
        for kind in _KINDS:
            arrays = getattr(self, kind)
            extra = sorted(set(arrays) - set(names))
            _check(not extra, f"{kind} has an entry for {extra[:1]}, which is not a router of this trace.")
            checked = {site.name: self._checked(kind, site, arrays.get(site.name)) for site in self.sites}
            object.__setattr__(self, kind, checked)

    def _checked(self, kind: str, site: Site, array: np.ndarray | None) -> np.ndarray:
        """The array as a read-only view, after its type, shape and every value were checked."""
        _check(isinstance(array, np.ndarray), f"{kind} of router {site.name!r} is missing.")
        columns = site.num_experts if kind == "router_probs" else site.num_experts_per_tok
        dtype, shape = ("int16" if kind == "selected_experts" else "float16"), (len(self.tokens), columns)
        _check(
            array.dtype == dtype and array.shape == shape,
            f"{kind} of router {site.name!r} is {array.dtype} {list(array.shape)}, "
            f"expected {dtype} {list(shape)}.",
        )
        if kind == "selected_experts":
            good = (array >= 0) & (array < site.num_experts)
        elif kind == "router_probs":
            # 1.001: half precision rounds a probability of one at most one step up.
            good = (array >= 0) & (array <= np.float16(1.001))
        else:
            good = np.isfinite(array)
        if not good.all():
            position = int(np.argmin(good.all(axis=1)))
            values = array[position].tolist()
            raise TraceError(f"{kind} of router {site.name!r} has a hole at position {position}: {values}.")
        view = array.view()
        view.flags.writeable = False
        return view

    @property
    def num_layers(self) -> int:
        """One more than the highest `layer_idx`; 0 if no router serves a single layer."""
        return 1 + max(site.layer_idx for site in self.sites)

    def site(self, name: str) -> Site:
        """The router called `name`; raises `TraceError` when there is none."""
        for site in self.sites:
            if site.name == name:
                return site
        raise TraceError(f"this trace has no router {name!r}.")

    def sites_of_block(self, block: str) -> tuple[Site, ...]:
        """The routers of one block, by layer; several of one layer keep the order of the model."""
        found = (site for site in self.sites if site.block == block)
        return tuple(sorted(found, key=lambda site: site.layer_idx))

    def token_indices(self, modality: str) -> np.ndarray:
        """int64 [n]: the positions of that modality, ascending."""
        _check(modality in MODALITIES, f"modality must be one of {MODALITIES}, not {modality!r}.")
        return np.flatnonzero([token.modality == modality for token in self.tokens])

    def equals(self, other: "RoutingTrace") -> bool:
        """True when everything is the same, arrays bit for bit, provenance as its JSON."""
        return (
            (self.tokens, self.sites, self.images) == (other.tokens, other.sites, other.images)
            and _json_value(self.provenance) == _json_value(other.provenance)
            and all(np.array_equal(array, other._arrays()[key]) for key, array in self._arrays().items())
        )

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            f"{kind}/{site.name}": getattr(self, kind)[site.name] for kind in _KINDS for site in self.sites
        }

    def save(self, path: str | Path) -> Path:
        """Writes one `.safetensors` file; raises `TraceError` if it cannot.

        The file appears whole or not at all: it is written beside `path` and then renamed.
        """
        path = Path(path)
        arrays = {key: np.ascontiguousarray(array) for key, array in self._arrays().items()}
        for index, image in enumerate(self.images):
            arrays[f"images/{index}"] = np.frombuffer(image.data, dtype=np.uint8)
        header = {
            "format": TRACE_FORMAT,
            "version": str(TRACE_VERSION),
            "tokens": _to_json([list(asdict(token).values()) for token in self.tokens], "tokens"),
            "sites": _to_json([asdict(site) for site in self.sites], "sites"),
            "images": _to_json([[image.width, image.height] for image in self.images], "images"),
            # Beside the sizes, so that files without it and readers that do not know it both stay good.
            "image_labels": _to_json([image.label for image in self.images], "labels"),
            "provenance": _to_json(self.provenance, "provenance"),
        }
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            partial.write_bytes(to_safetensors(arrays, metadata=header))
            os.replace(partial, path)
        except (OSError, ValueError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise TraceError(f"the trace could not be written to {path}: {_reason(error)}.") from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> "RoutingTrace":
        """Reads what `save` wrote; raises `TraceError` naming what is wrong with any other file."""
        path = Path(path)
        try:
            size = path.stat().st_size
            _check(path.is_file(), f"{path} is not a file.")
            _check(size <= MAX_FILE_BYTES, f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB; no trace is.")
            with safe_open(path, framework="np") as file:
                header = file.metadata() or {}
                _check(header.get("format") == TRACE_FORMAT, f"{path} is not a routing trace.")
                version = header.get("version")
                _check(
                    version == str(TRACE_VERSION),
                    f"{path} is a routing trace of version {version}; this program reads {TRACE_VERSION}.",
                )
                return cls._from_file(header, set(file.keys()), file.get_tensor)
        except TraceError as error:
            if str(path) in str(error):
                raise
            raise TraceError(f"{path}: {error}") from error
        except FileNotFoundError as error:
            raise TraceError(f"there is no file {path}.") from error
        except _UNREADABLE as error:
            raise TraceError(f"{path} is not a readable routing trace: {_reason(error)}.") from error

    @classmethod
    def _from_file(cls, header: Mapping[str, str], keys: set[str], get) -> "RoutingTrace":
        sites = tuple(Site(**site) for site in json.loads(header["sites"]))
        tokens = tuple(
            Token(*values[:-1], box=None if values[-1] is None else tuple(values[-1]))
            for values in json.loads(header["tokens"])
        )
        sizes = json.loads(header["images"])
        expected = {f"{kind}/{site.name}" for kind in _KINDS for site in sites}
        expected |= {f"images/{index}" for index in range(len(sizes))}
        _complain("lacks", expected - keys)
        _complain("holds an unknown entry", keys - expected)
        images = []
        labels = json.loads(header["image_labels"]) if "image_labels" in header else [""] * len(sizes)
        for index, ((width, height), label) in enumerate(zip(sizes, labels, strict=True)):
            data = get(f"images/{index}")
            _check(data.dtype == np.uint8 and data.ndim == 1, f"image {index} is not stored as bytes.")
            images.append(TraceImage(data.tobytes(), width, height, label))
        provenance = json.loads(header["provenance"])
        _check(isinstance(provenance, dict), "provenance is not a table.")
        return cls(
            tokens,
            sites,
            *({site.name: get(f"{kind}/{site.name}") for site in sites} for kind in _KINDS),
            images=tuple(images),
            provenance=provenance,
        )


def _complain(what: str, names: Iterable[str]) -> None:
    for name in sorted(names)[:1]:
        raise TraceError(f"the trace {what} {name!r}.")


def _reason(error: BaseException) -> str:
    """One line about a foreign exception, without its final stop."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _to_json(value: object, what: str) -> str:
    try:
        return json.dumps(value, allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise TraceError(f"the {what} of this trace cannot be written as JSON: {_reason(error)}.") from error


def _json_value(provenance: Mapping[str, object]) -> object:
    return json.loads(_to_json(provenance, "provenance"))


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a JSON value")
