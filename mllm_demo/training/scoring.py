"""Judges replies exactly. It knows nothing of models."""

import math
import re
from dataclasses import astuple

from mllm_demo.chat.grounding import find_boxes
from mllm_demo.training.questions import Question
from mllm_demo.training.things import COLOURS, SHAPES
from mllm_demo.training.wording import NAME_FORMS

NUMBERS = {"no": 0, "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
DIRECTIONS = {"left": "left", "right": "right", "above": "above", "below": "below"}
MINIMAL_OVERLAP = 0.5
_NAMES = re.compile(r"\b(" + "|".join(sorted(map(re.escape, NAME_FORMS), key=len, reverse=True)) + r")\b")


def box_in(text: str) -> tuple[int, ...] | None:
    """The first box that the chat would draw."""
    boxes = find_boxes(text)
    return astuple(boxes[0]) if boxes else None


def overlap(first, second) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    wide = min(first[2], second[2]) - max(first[0], second[0])
    high = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(wide, 0) * max(high, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return shared / max(sum(areas) - shared, 1e-9)


def is_right(question: Question, reply: str) -> bool:
    """The key is said and no other candidate of its kind is; boxes by overlap, numbers within the slack."""
    said, key = reply.lower(), question.key
    words = re.findall(r"[a-z]+|\d+", said)
    if question.task == "unanswerable":
        return "can't tell" in said or "cannot tell" in said
    if question.task == "grounding":
        box = box_in(reply)
        return box is not None and overlap(box, box_in(key)) >= MINIMAL_OVERLAP
    if key in ("yes", "no"):  # a comparison of values tells them first
        told = words[:1] if question.task == "presence" else [word for word in words if word in ("yes", "no")]
        return told == [key]
    if question.task == "relations":
        return {DIRECTIONS[w] for w in words if w in DIRECTIONS} == {key}
    if question.task == "reading" or '"' in question.answer:
        marked = re.search(r'"(.*?)"', said)
        return (marked.group(1) if marked else said).strip(" .") == key
    if key.isdigit():
        numbers = {int(w) if w.isdigit() else NUMBERS[w] for w in words if w.isdigit() or w in NUMBERS}
        return len(numbers) == 1 and abs(numbers.pop() - int(key)) <= question.slack
    if key in COLOURS:
        return {w for w in words if w in COLOURS} == {key}
    if key in SHAPES or key in NAME_FORMS:
        return {NAME_FORMS[form] for form in _NAMES.findall(said)} == {key}
    return key in said


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.96, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return round(middle - half, 3), round(middle + half, 3)
