"""The one value every picture is drawn from: which expert each token was routed to, at every router.

Frozen, numpy only, versioned, one `.safetensors` file. It knows nothing of models, hooks or pages.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MODALITIES = ("image", "text", "special")
PHASES = ("prefill", "decode")
BLOCKS = ("attention", "mlp", "layer", "model", "vision", "connector")
GRANULARITIES = ("token", "sequence", "modality")
TRACE_VERSION = 1


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


@dataclass(frozen=True)
class Site:
    """One router. `name` is its module path; `block` says which part of the layer it serves."""

    name: str
    layer_idx: int
    block: str
    num_experts: int
    num_experts_per_tok: int
    granularity: str = "token"
    has_shared_expert: bool = False


@dataclass(frozen=True)
class TraceImage:
    """A picture of the conversation: `data` is an encoded PNG or JPEG, `width` x `height` its original size."""

    data: bytes
    width: int
    height: int


@dataclass(frozen=True)
class RoutingTrace:
    """Routing of one answer.

    router_probs[site.name]      float16 [tokens, num_experts], softmax before top-k
    selected_experts[site.name]  int16   [tokens, num_experts_per_tok]
    routing_weights[site.name]   float16 [tokens, num_experts_per_tok], what the experts' outputs were multiplied by
    provenance                   JSON-able: base, adapter, quantization, dtypes, sampling, seed, messages, answer,
                                 versions, timings
    """

    tokens: tuple[Token, ...]
    sites: tuple[Site, ...]
    router_probs: Mapping[str, np.ndarray]
    selected_experts: Mapping[str, np.ndarray]
    routing_weights: Mapping[str, np.ndarray]
    images: tuple[TraceImage, ...] = ()
    provenance: Mapping[str, object] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Writes one `.safetensors` file; raises `TraceError` if it cannot."""
        raise NotImplementedError

    @classmethod
    def load(cls, path: str | Path) -> "RoutingTrace":
        """Reads what `save` wrote; raises `TraceError` naming what is wrong with any other file."""
        raise NotImplementedError
