"""What happens when somebody asks, stops, edits, loads a model or opens a trace.

Talks to the engine through its protocol only and turns every `DemoError` into words in the page. It knows
nothing of layout: `ui.page` decides which component each returned value goes to.
"""

import html
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import gradio as gr

from mllm_demo.chat.events import (
    Engine,
    EngineStatus,
    Event,
    Finished,
    Footprint,
    Queued,
    Started,
    TextDelta,
    TraceUpdate,
)
from mllm_demo.chat.grounding import draw_boxes, find_boxes
from mllm_demo.chat.images import read_pictures
from mllm_demo.chat.messages import Conversation, Picture, pictures
from mllm_demo.errors import DemoError
from mllm_demo.figures.expert_load import expert_load_figure
from mllm_demo.figures.modality_share import modality_share_figure
from mllm_demo.figures.pathways import pathways_figure
from mllm_demo.figures.payload import PayloadStream, empty_payload
from mllm_demo.figures.style import sentence_figure
from mllm_demo.routing.stats import site_groups
from mllm_demo.routing.trace import RoutingTrace
from mllm_demo.settings import Sampling, Settings, split_adapters
from mllm_demo.ui import history as chat
from mllm_demo.ui import words
from mllm_demo.ui.sessions import Sessions

log = logging.getLogger(__name__)

POLL_S = 0.3
MIN_UPDATE_S = 0.1
SLOW_TICK_S = 20.0
FAST_TICK_S = 1.0
OVERVIEW = (expert_load_figure, modality_share_figure, pathways_figure)
# What one answer event updates, in this order: input, chat, view, status, download, notice.
Outputs = tuple
SKIP = gr.skip()


class Callbacks:
    """One per page. `sample`: the trace shown before anybody asked, and its file; or None."""

    def __init__(self, engine: Engine, settings: Settings, sample: tuple[RoutingTrace, Path] | None) -> None:
        self.engine = engine
        self.settings = settings
        self.sessions = Sessions()
        self._sample, self._sample_path = sample or (None, None)
        self._sample_payload = (
            PayloadStream("sample").update(self._sample, live=False, note=words.SAMPLE_NOTE)
            if self._sample
            else empty_payload(words.EMPTY_VIEW)
        )
        self.read: Callable = partial(_read_upload, **settings.picture_limits)

    # Opening and closing the page

    def opened(self) -> tuple:
        status = self.engine.status()
        return (
            self._sample_payload,
            status_line(status),
            self.tick(),
            self._sample_download(),
            # Asked at every visit: when the page is made, nothing is loaded yet.
            gr.Accordion(open=True) if status.state in ("failed", "empty") else SKIP,
        )

    def closed(self, request: gr.Request) -> None:
        self.sessions.forget(_key(request))

    def tick(self) -> gr.Timer:
        busy = self.engine.status().state == "loading"
        return gr.Timer(FAST_TICK_S if busy else SLOW_TICK_S)

    def refreshed(self, request: gr.Request) -> tuple:
        status = self.engine.status()
        return status_line(status, self.sessions.last_answer(_key(request), status)), self.tick()

    # Asking

    def send(
        self, request: gr.Request, entered: dict | None, history: chat.History, *sampling: float
    ) -> Iterator[Outputs]:
        """A message typed by a person; its pictures are checked before anything else happens."""
        entered = entered or {}
        text, files = (entered.get("text") or "").strip(), list(entered.get("files") or [])
        good, problems = self._checked(files)
        if problems:
            kept = {"text": entered.get("text") or "", "files": good}
            yield kept, SKIP, SKIP, SKIP, SKIP, notice(" ".join(problems))
            return
        if not text and not files:
            yield SKIP, SKIP, SKIP, SKIP, SKIP, notice(words.NOTHING_ASKED)
            return
        turn = chat.user_messages(text or words.WHAT_IS_THIS, files)
        yield from self._answer([*history, *turn], sampling, request, first_input={"text": "", "files": []})

    def example(self, request: gr.Request, event: gr.SelectData, *sampling: float) -> Iterator[Outputs]:
        files = [file["path"] for file in event.value.get("files") or []]
        yield from self._answer(chat.user_messages(event.value.get("text") or "", files), sampling, request)

    def retry(
        self, request: gr.Request, event: gr.RetryData, history: chat.History, *sampling: float
    ) -> Iterator[Outputs]:
        yield from self._answer(history[: _message_index(event) + 1], sampling, request)

    def edit(
        self, request: gr.Request, event: gr.EditData, history: chat.History, *sampling: float
    ) -> Iterator[Outputs]:
        index = _message_index(event)
        edited = chat.user_messages(chat.typed(str(event.value)), [])
        yield from self._answer([*history[:index], *edited], sampling, request)

    def undo(self, history: chat.History, event: gr.UndoData, request: gr.Request) -> tuple:
        self.sessions.stop(_key(request))
        index = _message_index(event)
        start = chat.turn_start(history, index)
        turn = history[start : index + 1]
        files = [path for message in turn for path, _ in chat.files_of(message)]
        return {"text": "".join(map(chat.text_of, turn)), "files": files}, history[:start]

    def cleared(self, request: gr.Request) -> tuple:
        self.sessions.forget(_key(request))
        return self._sample_payload, self._sample_download(), "", *self.sample_overview()

    def stopped(self, request: gr.Request) -> None:
        self.sessions.stop(_key(request))

    def _checked(self, files: list[str]) -> tuple[list[str], list[str]]:
        good, problems = [], []
        for path in files:
            try:
                self.read(path, Path(path).name)
                good.append(path)
            except DemoError as error:
                problems.append(words.sentence(error))
        return good, problems

    def _answer(
        self, history: chat.History, sampling: Sequence[float], request: gr.Request, first_input: dict | None = None
    ) -> Iterator[Outputs]:
        key = _key(request)
        stop = self.sessions.begin(key)
        stream = PayloadStream()
        view: object = SKIP
        answer = ""
        drawn = sent = 0.0
        busy = gr.MultimodalTextbox(submit_btn=False, stop_btn=True)
        if first_input is not None:
            busy = gr.MultimodalTextbox(value=first_input, submit_btn=False, stop_btn=True)
        idle = gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
        pending = chat.remark(words.waiting(Queued(0)), pending=True)
        yield busy, [*history, pending], SKIP, SKIP, SKIP, ""
        try:
            for status in self._until_ready(stop):
                yield SKIP, [*history, chat.remark(words.loading(status), pending=True)], SKIP, SKIP, SKIP, ""
            asked = chat.conversation(history, self.read)
            for event in self.engine.answer(asked, _sampling(sampling), stop):
                if not self.sessions.is_current(key, stop):
                    return
                if isinstance(event, Finished):
                    yield self._finished(key, event, history, asked, stream, idle)
                    return
                if isinstance(event, TextDelta):
                    answer = event.text
                if isinstance(event, TraceUpdate) and time.monotonic() - drawn >= redraw_s(stream):
                    view, drawn = stream.update(event.trace, live=True), time.monotonic()
                elif isinstance(event, TextDelta | TraceUpdate) and time.monotonic() - sent < MIN_UPDATE_S:
                    continue
                sent = time.monotonic()
                yield SKIP, [*history, _shown(event, answer)], view, SKIP, SKIP, ""
        except DemoError as error:
            sentence = words.sentence(error)
        except Exception:
            log.exception("answering failed")
            sentence = words.UNEXPECTED
        if self.sessions.is_current(key, stop):
            partly = [chat.answer_message(answer)] if answer else []
            remark = chat.remark(words.NOT_ANSWERED, sentence)
            yield idle, [*history, *partly, remark], view, status_line(self.engine.status()), SKIP, ""

    def _until_ready(self, stop: threading.Event) -> Iterator[EngineStatus]:
        """Reports while the model loads; returns when it is ready, raises `DemoError` when it never will be."""
        while (status := self.engine.status()).state != "ready":
            if status.state == "failed":
                raise DemoError(words.failed(status))
            if status.state == "empty":
                raise DemoError(words.NO_MODEL)
            if stop.is_set():
                raise DemoError(words.STOPPED_WAITING)
            yield status
            stop.wait(POLL_S)

    def _finished(
        self, key: str, event: Finished, history: chat.History, asked: Conversation, stream: PayloadStream,
        idle: gr.MultimodalTextbox,
    ) -> Outputs:  # fmt: skip
        status = self.engine.status()
        if event.trace is None:
            view = empty_payload(words.no_routing(status))
        else:
            view = stream.update(event.trace, live=False, note=words.how_it_ended(event))
        self.sessions.keep_answer(key, status, event)
        shown = self._answered(key, event.text, asked) if event.text else chat.remark(words.how_it_ended(event) or "…")
        return idle, [*history, shown], view, status_line(status, event), self._download(key, event.trace), ""

    def _answered(self, key: str, text: str, asked: Conversation) -> dict:
        """The answer, with the last picture that was asked about where it names boxes in it."""
        boxes, seen = find_boxes(text), pictures(asked)
        if not boxes or not seen:
            return chat.answer_message(text)
        described = words.boxes_drawn(boxes)
        path = self.sessions.save_drawing(key, draw_boxes(seen[-1], boxes).png, described)
        return chat.answer_message(text, str(path), described)

    def _download(self, key: str, trace: RoutingTrace | None) -> gr.DownloadButton:
        if trace is None:
            return gr.DownloadButton(value=None, interactive=False)
        return gr.DownloadButton(value=str(self.sessions.save_trace(key, trace)), interactive=True)

    def _sample_download(self) -> gr.DownloadButton:
        return gr.DownloadButton(value=self._sample_path, interactive=self._sample is not None)

    # Traces

    def open_trace(self, path: str, request: gr.Request) -> tuple:
        """Shows a saved trace; on any other file nothing changes but the notice. View, download, notice."""
        try:
            trace = RoutingTrace.load(path)
            view = PayloadStream("file").update(trace, live=False, note=Path(path).name)
        except DemoError as error:
            return SKIP, SKIP, notice(words.sentence(error).replace(path, Path(path).name))
        key = _key(request)
        self.sessions.keep_trace(key, trace)
        return view, self._download(key, trace), ""

    def overview(self, request: gr.Request) -> tuple:
        return self._overview(self.sessions.trace(_key(request)))

    def sample_overview(self) -> tuple:
        return self._overview(self._sample)

    def _overview(self, trace: RoutingTrace | None) -> tuple:
        """Expert load, modality share and pathways of the first routers that choose per token; why not, without any."""
        groups = site_groups(trace).values() if trace else ()
        choosing = [sites for sites in groups if sites[0].granularity == "token"]
        if trace is None or not choosing:
            why = words.NOT_BY_TOKEN if groups else words.NO_OVERVIEW
            return tuple(sentence_figure(title, why) for title in words.OVERVIEW)
        sites = next((sites for sites in choosing if sites[0].block == "mlp"), choosing[0])
        label = sites[0].block
        return tuple(draw(trace, sites, label) for draw in OVERVIEW)

    # Models

    def foreseen(self, model: str, adapter: str, quantization: str) -> str:
        """What the model now chosen would take, as HTML; a sentence where that cannot be known."""
        try:
            asked = {"model": model or "", "adapter": adapter.strip() or None, "quantization": quantization}
            return footprint(self.engine.footprint(replace(self.settings.choice, **asked)))
        except DemoError as error:
            return f"<p>{html.escape(words.sentence(error))}</p>"
        except Exception:
            log.exception("a footprint could not be made")
            return ""

    def load(self, model: str, adapter: str, quantization: str) -> Iterator[tuple[str, str, str]]:
        """Loads another model; yields progress, status line, notice."""
        try:
            asked = {"model": model or "", "adapter": split_adapters(adapter), "quantization": quantization}
            choice = replace(self.settings.choice, **asked)
            for step in self.engine.load(choice):
                yield progress(step.fraction, step.note), status_line(self.engine.status()), ""
        except DemoError as error:
            yield "", status_line(self.engine.status()), notice(words.sentence(error))
            return
        except Exception:
            log.exception("loading failed")
            yield "", status_line(self.engine.status()), notice(words.UNEXPECTED)
            return
        yield "", status_line(self.engine.status()), ""


def _read_upload(path: str, name: str, **limits: int) -> tuple[Picture, ...]:
    return read_pictures(path, name=name, **limits)


def redraw_s(stream: PayloadStream) -> float:
    """Seconds between two drawings of a growing trace: heavy ones keep the browser busy for longer."""
    return 0.4 + stream.num_bytes / 1e6


def _key(request: gr.Request) -> str:
    return str(request.session_hash)


def _message_index(event: gr.RetryData | gr.EditData | gr.UndoData) -> int:
    """Which message it is about; Gradio also counts the parts of a message that has several."""
    return event.index if isinstance(event.index, int) else event.index[0]


def _sampling(values: Sequence[float]) -> Sampling:
    max_new_tokens, temperature, top_p, repetition_penalty, seed = values
    return Sampling(int(max_new_tokens), float(temperature), float(top_p), float(repetition_penalty), int(seed or 0))


def _shown(event: Event, answer: str) -> dict:
    if answer:
        return chat.answer_message(answer)
    if isinstance(event, Queued):
        return chat.remark(words.waiting(event), pending=True)
    if isinstance(event, Started):
        return chat.remark(words.reading(event), pending=True)
    return chat.remark("Thinking", pending=True)


def notice(sentence: str) -> str:
    return f'<div class="notice" role="alert"><span>{html.escape(sentence)}</span></div>'


def progress(fraction: float, note: str) -> str:
    percent = round(100 * fraction)
    return (
        f'<div class="progress" role="status"><progress max="100" value="{percent}" aria-label="Loading the model">'
        f"</progress><div>{html.escape(note)} · {percent} %</div></div>"
    )


def footprint(seen: Footprint) -> str:
    """A table of a model's parts, what else is worth knowing, and whether it fits."""
    head = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in words.FOOTPRINT_COLUMNS)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in words.footprint_rows(seen)
    )
    inside = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    table = f'<table aria-label="{words.FOOTPRINT_TABLE}">{inside}</table>' if rows else ""
    said = " ".join(words.footprint_sentences(seen))
    refused = "" if seen.fits else f"<p><strong>{html.escape(words.does_not_fit(seen))}</strong></p>"
    inner = f"{table}<p>{html.escape(said)}</p>{refused}"
    return f'<div class="footprint" role="status" aria-label="Footprint">{inner}</div>'


def status_line(status: EngineStatus, finished: Finished | None = None) -> str:
    if status.state == "ready":
        name, *rest = words.status_parts(status, finished)
        parts = [f'<span class="name">{html.escape(name)}</span>', *(f"<span>{html.escape(p)}</span>" for p in rest)]
        if status.remark:
            parts.append(f'<span class="remark">{html.escape(status.remark)}</span>')
    else:
        said = {"loading": words.loading(status), "failed": words.failed(status)}.get(status.state, words.NO_MODEL)
        parts = [f"<span>{html.escape(said)}</span>"]
    inner = '<i class="dot" aria-hidden="true"></i>' + "".join(parts)
    return f'<div class="status" role="status" aria-label="Model" data-state="{status.state}">{inner}</div>'
