"""The page: which component stands where and which callback it calls; it knows nothing of how those work."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from mllm_demo.chat.events import Engine
from mllm_demo.errors import TraceError
from mllm_demo.routing.trace import RoutingTrace
from mllm_demo.settings import QUANTIZATIONS, Settings
from mllm_demo.ui import words
from mllm_demo.ui.api import add_ask_endpoint
from mllm_demo.ui.callbacks import SLOW_TICK_S, Callbacks, status_line
from mllm_demo.ui.routing_view import routing_view
from mllm_demo.ui.theme import CSS, JS, make_theme

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parents[2] / "assets"
IMAGE_SUFFIXES = [".jpg", ".jpeg", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"]
SAMPLE = "sample_trace.safetensors"
# Uploads and traces lie on the server's disk for at most this long.
DELETE_CACHE_EVERY_S, DELETE_CACHE_AFTER_S = 900, 6 * 3600


def build_page(engine: Engine, settings: Settings, assets: Path = ASSETS) -> gr.Blocks:
    """The whole page around `engine`. `assets` may hold `examples/examples.json` and a sample trace."""
    do = Callbacks(engine, settings, _sample(assets / SAMPLE))
    # Served from where they lie: copies in Gradio's cache vanish when another program on this machine clears it.
    gr.set_static_paths([assets / "examples"])
    with gr.Blocks(
        title=words.PAGE_TITLE, analytics_enabled=False, delete_cache=(DELETE_CACHE_EVERY_S, DELETE_CACHE_AFTER_S)
    ) as page:
        gr.HTML(f"<h1>{words.HEADLINE}</h1><p>{words.SUBLINE}</p>", elem_id="masthead")
        status = gr.HTML(status_line(engine.status()), elem_id="status")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320, elem_id="left"):
                chat, notice, ask = _chat(_examples(assets / "examples"))
                sampling, model, footprint, load, progress, panel = _settings_panels(engine, settings)
            with gr.Column(scale=8, min_width=320, elem_id="right"):
                with gr.Tabs():
                    with gr.Tab("Routing"):
                        view = routing_view({})
                    with gr.Tab("Overview"):
                        # Values from the start: an update that meets a tab while it opens would be lost.
                        plots = [gr.Plot(figure, show_label=False, container=False) for figure in do.sample_overview()]
                with gr.Row(elem_id="files"):
                    download = gr.DownloadButton(words.DOWNLOAD_TRACE, size="sm", interactive=False, min_width=130)
                    opener = gr.UploadButton(words.OPEN_TRACE, size="sm", file_types=[".safetensors"], min_width=130)
        timer = gr.Timer(SLOW_TICK_S)
        add_ask_endpoint(engine, settings, do.sessions, do.read)

        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        long = {**hidden, "concurrency_limit": None}
        answer = [ask, chat, view, status, download, notice]
        for started in (
            ask.submit(do.send, [ask, chat, *sampling], answer, **long),
            chat.example_select(do.example, sampling, answer, **long),
            chat.retry(do.retry, [chat, *sampling], answer, **long),
            chat.edit(do.edit, [chat, *sampling], answer, **long),
        ):
            started.then(do.overview, None, plots, **hidden)
        ask.stop(do.stopped, None, None, queue=False, **hidden)
        chat.undo(do.undo, chat, [ask, chat], **hidden)
        chat.clear(do.cleared, None, [view, download, notice, *plots], queue=False, **hidden)
        opener.upload(do.open_trace, opener, [view, download, notice], **hidden).then(
            do.overview, None, plots, **hidden
        )
        gr.on([field.change for field in model], do.foreseen, model, footprint, **hidden, trigger_mode="always_last")
        page.load(do.foreseen, model, footprint, **hidden)
        load.click(do.load, model, [progress, status, notice], **long)
        timer.tick(do.refreshed, None, [status, timer], queue=False, **hidden)
        page.load(do.opened, None, [view, status, timer, download, panel], queue=False, **hidden)
        page.unload(do.closed)
    return page


def launch_kwargs(settings: Settings) -> dict:
    """What `page.launch` needs besides host, port, share and auth, which the command line decides."""
    return {
        "server_name": settings.host,
        "server_port": settings.port,
        "share": settings.share,
        "auth": settings.auth,
        "theme": make_theme(),
        "css": CSS,
        "js": JS,
        "allowed_paths": [str(ASSETS / SAMPLE)],
        "footer_links": ["api"],
        "run_history": False,
        "enable_monitoring": False,
        "max_file_size": settings.picture_limits["max_bytes"],
        # Waiting people each hold a thread while the engine answers one; clicks must still get through.
        "max_threads": 40 + 2 * settings.queue_size,
        "show_error": True,
    }


def _chat(examples: list[dict]) -> tuple[gr.Chatbot, gr.HTML, gr.MultimodalTextbox]:
    chat = gr.Chatbot(
        elem_id="chat",
        label=words.CHAT_LABEL,
        show_label=False,
        height="clamp(380px, calc(100vh - 268px), 760px)",
        editable="user",
        latex_delimiters=[],
        buttons=["copy", "copy_all"],
        placeholder=words.CHAT_EMPTY if examples else words.CHAT_EMPTY_PLAIN,
        examples=examples or None,
        allow_tags=False,
        feedback_options=None,
        group_consecutive_messages=False,
    )
    notice = gr.HTML("", elem_id="notice")
    ask = gr.MultimodalTextbox(
        elem_id="ask",
        label="Question",
        show_label=False,
        placeholder=words.PLACEHOLDER_INPUT,
        sources=["upload"],
        # A video file is not read, but the refusal says what to do; the browser's own would not.
        file_types=["image", "video", *IMAGE_SUFFIXES],
        file_count="multiple",
        max_lines=6,
        max_plain_text_length=20000,
    )
    return chat, notice, ask


def _settings_panels(engine: Engine, settings: Settings) -> tuple:
    """→ sampling fields, model fields, footprint, load button, progress, and the panel of the model."""
    default, choice = settings.sampling, settings.choice
    with gr.Accordion(words.ANSWER_SETTINGS, open=False):
        sampling = [
            gr.Slider(1, 1024, default.max_new_tokens, step=1, label="Max new tokens"),
            gr.Slider(0, 2, default.temperature, step=0.05, label="Temperature", info=words.TEMPERATURE_INFO),
            gr.Slider(0.05, 1, default.top_p, step=0.05, label="Top-p"),
            gr.Slider(1, 2, default.repetition_penalty, step=0.05, label="Repetition penalty"),
            gr.Number(default.seed, label="Seed", precision=0, minimum=0, maximum=2**31 - 1),
        ]
    with gr.Accordion(words.MODEL_SETTINGS, open=False, elem_id="model") as panel:
        presets = [(f"{p.title} · {p.needs_gb:.1f} GB", p.name) for p in engine.presets()]
        notes = {p.name: f"{p.note} Licence: {p.licence}." for p in engine.presets()}
        named = gr.Dropdown(
            presets, value=choice.model, label=words.MODEL_LABEL, info=words.MODEL_INFO, allow_custom_value=True
        )
        about = gr.Markdown(notes.get(choice.model, ""), elem_id="about")
        quiet = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        named.change(lambda name: notes.get(name, ""), named, about, **quiet)
        model = [
            named,
            gr.Textbox(choice.adapter_text or "", label=words.ADAPTER_LABEL, info=words.ADAPTER_INFO),
            gr.Radio(list(QUANTIZATIONS), value=choice.quantization, label=words.QUANTIZATION_LABEL),
        ]
        footprint = gr.HTML("", elem_id="footprint")
        load = gr.Button(words.LOAD, variant="primary", size="md")
        progress = gr.HTML("", elem_id="progress")
        gr.Markdown(words.LOAD_SHARED)
    return sampling, model, footprint, load, progress, panel


def _examples(folder: Path) -> list[dict]:
    """Example cards from `examples.json`, a list of {"image", "question"}; none if the folder is not there."""
    listing = folder / "examples.json"
    if not listing.is_file():
        return []
    entries: Sequence[dict] = json.loads(listing.read_text("utf-8"))
    return [
        {"text": entry["question"], "files": [str(folder / entry["image"])]}
        for entry in entries
        if (folder / entry["image"]).is_file()
    ]


def _sample(path: Path) -> tuple[RoutingTrace, Path] | None:
    if not path.is_file():
        return None
    try:
        return RoutingTrace.load(path), path
    except TraceError as error:
        log.warning("the recorded example cannot be shown: %s", error)
        return None
