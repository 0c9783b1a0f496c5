"""An engine without a model: streams words with a synthetic, repeatable routing trace.

Everything the page can be asked to show is reachable: queueing, progress, stop, errors (by magic words in the
question: "fail", "crash", "slow", "plain", "sequence", "sequence twice", "where").
"""

import io
import re
import threading
import time

import numpy as np
from PIL import Image, ImageDraw

from mllm_demo.chat.events import (
    EngineStatus,
    Finished,
    Footprint,
    FootprintPart,
    LoadProgress,
    Preset,
    Queued,
    Started,
    TextDelta,
    TraceUpdate,
)
from mllm_demo.chat.messages import pictures
from mllm_demo.errors import CheckpointError, GenerationError
from mllm_demo.routing.trace import RoutingTrace, Site, Token, TraceImage

LAYERS, EXPERTS, GRID = 24, 4, 7
BOX_ANSWER = "The circle is at [27, 9, 71, 49]; neither [90, 1, 5, 20] nor [1.5, 2, 3, 4] is a box."
ANSWER = "There is a red circle above a blue square, and the word CAT stands below them."


def sites(granularity="token", layers=LAYERS, shared=True):
    return tuple(
        Site(f"model.layers.{i}.{module}", i, block, EXPERTS, 1, granularity, shared)
        for i in range(layers)
        for module, block in (("self_attn.o_proj", "attention"), ("mlp", "mlp"))
    )


def picture_png(size=224):
    image = Image.new("RGB", (size, size), "#e8eef5")
    pen = ImageDraw.Draw(image)
    s = size / 224
    pen.ellipse([60 * s, 20 * s, 160 * s, 110 * s], fill="#d33a2c")
    pen.rectangle([70 * s, 120 * s, 150 * s, 180 * s], fill="#2b62c9")
    pen.text((90 * s, 190 * s), "CAT", fill="#222222", font_size=round(26 * s))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def prompt(question, images):
    tokens = [Token(1, "<|im_start|>", "special", "system", "prefill")]
    tokens += [Token(2, w, "text", "system", "prefill") for w in ("You", " are", " a", " helpful", " assistant", ".")]
    tokens += [Token(3, "<|im_end|>", "special", "system", "prefill")]
    tokens += [Token(1, "<|im_start|>", "special", "user", "prefill")]
    for index, image in enumerate(images):
        w, h = image.width / GRID, image.height / GRID
        for r in range(GRID):
            for c in range(GRID):
                box = (c * w, r * h, (c + 1) * w, (r + 1) * h)
                tokens.append(Token(9, "<image>", "image", "user", "prefill", index, box))
    tokens += [Token(5, w, "text", "user", "prefill") for w in re.findall(r"\s?\S+", question)]
    tokens += [Token(3, "<|im_end|>", "special", "user", "prefill")]
    tokens += [Token(1, "<|im_start|>", "special", "assistant", "prefill")]
    return tokens


def trace_of(tokens, images, where=None, note="", twice=False):
    """Smooth random routing: image tokens by place, words by their text, a different mixture in each layer.

    `twice`: sequence-level choices are made once for the prompt and again for the answer.
    """
    answer = [number for number, token in enumerate(tokens) if token.phase == "decode"]
    where = where or sites()
    probs, selected, weights = {}, {}, {}
    for site in where:
        rng = np.random.default_rng(sum(map(ord, site.name)) * 7919)
        field = rng.normal(size=(EXPERTS, 6))
        rows = []
        for i, token in enumerate(tokens):
            if token.box:
                x, y = token.box[0] / 224, token.box[1] / 224
                z = field @ np.array([np.sin(4 * x), np.cos(4 * y), x * y, np.cos(3 * x), 0.4, np.sin(2 * y)])
            else:
                z = np.random.default_rng(sum(map(ord, token.text)) + i % 3 + site.layer_idx).normal(size=EXPERTS)
                z = z + field[:, 0]
            rows.append(z)
        logits = 1.6 * np.array(rows)
        if site.granularity == "sequence":
            logits[:] = logits[0]
            if twice:
                logits[answer] = np.roll(logits[0], 1)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        best = p.argmax(1)[:, None]
        probs[site.name] = p.astype(np.float16)
        selected[site.name] = best.astype(np.int16)
        weights[site.name] = np.take_along_axis(p, best, 1).astype(np.float16)
    return RoutingTrace(tuple(tokens), tuple(where), probs, selected, weights, tuple(images), {"answer": note})


def sample_trace():
    image = TraceImage(picture_png(), 224, 224)
    answer = [Token(6, w, "text", "assistant", "decode") for w in re.findall(r"\s?\S+", ANSWER)]
    return trace_of([*prompt("What is in the picture?", [image]), *answer], [image], note=ANSWER)


class FakeEngine:
    def __init__(self, pause=0.03, state="ready"):
        self.pause = pause
        self.state = state
        self.lock = threading.Lock()
        self.waiting = 0
        self.title = "Tessera 0.2B"
        self.healed = False
        self.asked = []
        self.stopped = 0
        self.ended = threading.Event()

    def status(self):
        if self.state == "loading":
            return EngineStatus("loading", note="fetching weights, 42 %")
        if self.state == "failed":
            return EngineStatus(
                "failed", error="the weights could not be fetched; check the connection and press Load."
            )
        if self.state == "empty":
            return EngineStatus("empty")
        return EngineStatus(
            "ready", self.title, "MoE-LoRA, 4 experts", "cpu", "nf4", 0.71, 183_000_000, 147_000_000, 2048, True
        )

    def presets(self):
        return [
            Preset("bundled", "Tessera 0.2B", 0.3, "Apache-2.0", "bundled"),
            Preset("smolvlm", "SmolVLM 256M", 0.6, "Apache-2.0", "Verified on a tiny model."),
        ]

    def footprint(self, choice):
        if "missing" in choice.model:
            raise CheckpointError(f"{choice.model} is neither a folder nor a known model; check the spelling.")
        many = 60 if "large" in choice.model else 1
        part = FootprintPart("experts", many * 10**9, many * 10**9, many * 2 * 10**9, many * 520 * 10**6, 5 * 10**8)
        needs = many * 14 * 10**8
        return Footprint(choice.model, choice.quantization, "cpu", (part,), 10**8, needs, 2 * 10**9, (640, 480), 81)

    def load(self, choice):
        if "missing" in choice.model:
            raise CheckpointError(f"{choice.model} is neither a folder nor a known model; check the spelling.")
        self.state = "loading"
        for i in range(5):
            time.sleep(self.pause * 5)
            yield LoadProgress(i / 5, "reading weights")
        self.state, self.title = "ready", choice.model

    def answer(self, messages, sampling, stop=None):
        stop = stop or threading.Event()
        question = messages[-1].text
        self.asked.append(messages)
        ahead = self.waiting + self.lock.locked()
        self.waiting += 1
        try:
            while not self.lock.acquire(timeout=0.1):
                yield Queued(ahead)
                if stop.is_set():
                    yield Finished("", None, "stopped", 0, 0, 0)
                    return
        finally:
            self.waiting -= 1
        try:
            yield from self._answer(messages, question, sampling, stop)
        finally:
            self.lock.release()
            self.ended.set()

    def _answer(self, messages, question, sampling, stop):
        images = [TraceImage(p.png, p.width, p.height, p.label) for p in pictures(messages)]
        tokens = prompt(question, images)
        plain = "plain" in question
        where = sites("sequence") if "sequence" in question else sites()
        twice = "twice" in question
        yield Started(len(tokens), sum(t.modality == "image" for t in tokens))
        time.sleep(self.pause * 5)
        if "crash" in question:
            raise ZeroDivisionError("not for the eyes of people")
        if "fail" in question and not self.healed:
            raise GenerationError("the model ran out of memory while answering; ask with a smaller picture.")
        answer = BOX_ANSWER if "where" in question else ANSWER * (120 if "slow" in question else 1)
        words = re.findall(r"\s?\S+", answer)[: sampling.max_new_tokens]
        text, reason, begun, said = "", "end", time.monotonic(), 0
        for i, word in enumerate(words):
            if stop.is_set():
                reason = "stopped"
                self.stopped += 1
                break
            time.sleep(self.pause)
            text += word
            said = i + 1
            tokens.append(Token(6, word, "text", "assistant", "decode"))
            yield TextDelta(text, said)
            if i % 6 == 0 and not plain:
                yield TraceUpdate(trace_of(tokens, images, where, twice=twice))
        trace = None if plain else trace_of(tokens, images, where, text, twice)
        yield Finished(text, trace, reason, said, 0.4, time.monotonic() - begun)
