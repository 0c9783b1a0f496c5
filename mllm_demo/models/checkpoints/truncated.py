"""Which tensor a cut-off `pytorch_model.bin` breaks off in, told without loading it.

`torch.save` writes a zip whose directory stands at the end, so a file that is cut off cannot be opened; but its first
record lists the tensors and each record begins with its own name. Nothing is unpickled: the list is only read through.
"""

import pickletools
import re
from pathlib import Path

_RECORD = re.compile(rb"PK\x03\x04.{26}([\w.-]+)/data/(\d+)", re.DOTALL)
_PIECE = 64 * 2**20
_LONGEST_LIST = 64 * 2**20


def first_cut_tensor(file: Path) -> str | None:
    """The name of the first tensor that is not whole in `file`; None where that cannot be told."""
    try:
        with file.open("rb") as stream:
            start = stream.read(_LONGEST_LIST)
        if not start.startswith(b"PK\x03\x04"):
            return None
        names = _tensor_names(start)
        return names.get(_last_record(file))
    except (OSError, ValueError, IndexError):
        return None


def _tensor_names(start: bytes) -> dict[str, str]:
    """Storage number -> name of the tensor that is listed with it, from the bytes a file begins with."""
    name_length = int.from_bytes(start[26:28], "little")
    extra_length = int.from_bytes(start[28:30], "little")
    names: dict[str, str] = {}
    texts: list[str] = []
    for operation, value, _ in pickletools.genops(start[30 + name_length + extra_length :]):
        if isinstance(value, str) and "UNICODE" in operation.name:
            texts.append(value)
        elif operation.name == "BINPERSID":
            # A tensor is its name, then ("storage", type, number, device, length); "storage" is written out once only.
            number = next(text for text in reversed(texts) if text.isdigit())
            name = next(text for text in reversed(texts) if "." in text)
            names.setdefault(number, name)
    return names


def _last_record(file: Path) -> str:
    """The number of the last tensor whose record begins in `file`."""
    end = file.stat().st_size
    overlap = 512  # longer than a record's beginning
    with file.open("rb") as stream:
        while end > 0:
            start = max(0, end - _PIECE)
            stream.seek(start)
            found = _RECORD.findall(stream.read(end - start + overlap))
            if found:
                return found[-1][1].decode()
            end = start
    raise ValueError("no record")
