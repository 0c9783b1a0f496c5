"""Reads a person's own image, question and answer lines; what is wrong with a line is said by its number.

    {"image": "cat.png", "question": "What is this?", "answer": "A cat."}
    {"image": null, "turns": [{"question": "Hello!", "answer": "Hello."}, {"question": "...", "answer": "..."}]}

`image`: a path relative to the file, several in a list, or null. It knows nothing of models; pictures are decoded as
uploads are, since they may come from anywhere.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm_demo.chat.images import read_pictures
from mllm_demo.chat.messages import Conversation, Message
from mllm_demo.errors import DataError, ImageError, SettingsError
from mllm_demo.settings import Settings

SHOWN_PROBLEMS = 10
LIMITS = Settings(frames=1).picture_limits


@dataclass(frozen=True)
class Line:
    """One line of the file: `number` from 1, `images` as paths, `turns` as (question, answer)."""

    number: int
    images: tuple[Path, ...]
    turns: tuple[tuple[str, str], ...]

    def conversation(self) -> Conversation:
        """Messages with decoded pictures, which stand before the first question; raises `DataError`."""
        pictures = []
        for path in self.images:
            if not os.path.isfile(path):
                raise DataError(f"the picture {path.name} is not there; paths are relative to the data file.")
            try:
                pictures += read_pictures(path, **LIMITS)
            except ImageError as error:
                raise DataError(str(error)) from error
        messages = []
        for index, (question, answer) in enumerate(self.turns):
            messages.append(Message("user", (*(pictures if index == 0 else ()), question)))
            messages.append(Message("assistant", (answer,)))
        return tuple(messages)


@dataclass(frozen=True)
class UserData:
    """A file's lines that are well formed, and by line number what is wrong with the others.

    `digest` names the file's content.
    """

    lines: tuple[Line, ...]
    problems: Mapping[int, str]
    digest: str


def read_lines(path: Path) -> UserData:
    """Reads every line of `path` without opening a picture; empty lines count but are no problem.

    Raises `SettingsError` when the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"The data file {path} cannot be read ({error.strerror}); check --data.") from error
    lines, problems = [], {}
    for number, raw in enumerate(content.splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            lines.append(_line(number, raw, path.parent))
        except DataError as error:
            problems[number] = str(error)
    return UserData(tuple(lines), problems, hashlib.sha256(content).hexdigest()[:16])


def report(problems: Mapping[int, str], total: int) -> list[str]:
    """What to tell a person about the lines that were skipped: the first ones in full, then a count."""
    said = [f"skipped line {number}: {problems[number]}" for number in sorted(problems)[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        said.append(f"... and {len(problems) - SHOWN_PROBLEMS} more lines")
    if problems:
        said.append(f"{len(problems)} of {total} lines were skipped")
    return said


def require_some(lines: Sequence, problems: Mapping[int, str], path: Path) -> None:
    """Raises `DataError` when no line is left, with the first reason."""
    if lines:
        return
    if not problems:
        raise DataError(f"{path} is empty; write one JSON object a line, with image, question and answer.")
    first = min(problems)
    raise DataError(f"No line of {path} can be used; line {first}: {problems[first]}")


def _line(number: int, raw: bytes, folder: Path) -> Line:
    try:
        entry = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError("it is not UTF-8 text; save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise DataError(f"it is not JSON ({reason}); write one object a line.") from error
    if not isinstance(entry, dict):
        raise DataError('it is not an object; write {"image": ..., "question": ..., "answer": ...}.')
    if "image" not in entry:
        raise DataError("it has no image; write a path, a list of paths, or null for text alone.")
    return Line(number, _images(entry["image"], folder), _turns(entry))


def _images(value: object, folder: Path) -> tuple[Path, ...]:
    names = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError("its image is not a path, a list of paths or null; write one of these.")
    return tuple(folder / name for name in names)


def _turns(entry: dict) -> tuple[tuple[str, str], ...]:
    turns = entry.get("turns", [entry])
    if "turns" in entry and ("question" in entry or "answer" in entry):
        raise DataError("it has turns beside a question or an answer; write one of the two.")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DataError('its turns are not a list of {"question": ..., "answer": ...}; write at least one.')
    pairs = []
    for index, turn in enumerate(turns, start=1):
        where = f" in turn {index}" if len(turns) > 1 else ""
        for name in ("question", "answer"):
            if name not in turn:
                raise DataError(f"it has no {name}{where}; add one.")
            if not isinstance(turn[name], str):
                raise DataError(f"its {name}{where} is not text; put it in quotes.")
            if not turn[name].strip():
                raise DataError(f"its {name}{where} is empty; write one or drop the line.")
        pairs.append((turn["question"].strip(), turn["answer"].strip()))
    return tuple(pairs)
