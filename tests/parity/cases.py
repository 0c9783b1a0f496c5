"""The recorded outputs of other systems: every case folder, found and told by its own configuration.

A case is any folder, however deep, with `config.json` and `state.safetensors` under the folder named by
MLLM_PARITY_CASES (default: `tests/parity/cases`). It knows nothing of how a family is loaded.
"""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file

CASES_VARIABLE = "MLLM_PARITY_CASES"
DEFAULT_CASES = Path(__file__).parent / "cases"


@dataclass(frozen=True)
class Case:
    """One recorded run: what the original was given and what it computed."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))

    @property
    def family(self) -> str:
        """Which original made it, "awaker" or "moe_llava", by what the configuration declares."""
        return "awaker" if "expert_adapters" in self.config.get("moe", {}) else "moe_llava"

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of `name`.safetensors: "state", "inputs", "expected" and so on."""
        return load_file(self.folder / f"{name}.safetensors")


def find_cases(family: str) -> list[Case]:
    """Every case of `family`, sorted by path."""
    root = Path(os.environ.get(CASES_VARIABLE) or DEFAULT_CASES)
    folders = sorted({path.parent for path in root.rglob("state.safetensors")})
    cases = [Case(folder) for folder in folders if (folder / "config.json").is_file()]
    return [case for case in cases if case.family == family]
