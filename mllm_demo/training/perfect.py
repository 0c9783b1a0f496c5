"""Image tokens that hold the very letters of a picture, so that what is still misread is the language model's fault.

It knows nothing of questions or scoring.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from mllm_demo.models.bundled.weights import ASSETS
from mllm_demo.models.loading import LoadedModel
from mllm_demo.training.base import read_heads
from mllm_demo.training.concepts import CellTargets, cell_targets
from mllm_demo.training.things import Scene
from mllm_demo.training.tokens import Letters
from mllm_demo.training.tower import dense_heads


@contextmanager
def perfect_letters(loaded: LoadedModel, scenes: Sequence[Scene], bundle: Path | None = None) -> Iterator[None]:
    """Within it, the connector says of the cells of letters what it should. `scenes`: of the pictures that the model
    sees meanwhile, in that order; `bundle`: whose heads tell to which of two cells a letter near their border goes."""
    model = loaded.model.base_model.model
    heads = dense_heads(model, loaded.processor, model.device, read_heads(bundle or ASSETS)["dense"])
    letters, rest = Letters.of(heads), iter(scenes)

    @torch.no_grad()
    def put(connector, seen, said: torch.Tensor) -> torch.Tensor:
        cells = model.config.vision_config.side**2
        tokens = said.reshape(-1, cells, said.shape[-1]).float()
        targets = [cell_targets(next(rest), math.isqrt(cells)).map(torch.from_numpy) for _ in tokens]
        target = CellTargets(*(torch.stack(part).to(tokens.device) for part in zip(*targets, strict=True)))
        return letters.perfect(tokens, target, heads.letters(tokens)).to(said.dtype).view_as(said)

    hook = model.model.multi_modal_projector.register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()
