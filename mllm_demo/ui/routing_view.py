"""The routing view as one Gradio component: reads its template, style and script once.

It knows nothing of traces: its value is what `figures.payload` makes, and all looking around in it happens in
the browser, without a request.
"""

from pathlib import Path

import gradio as gr

_STATIC = Path(__file__).parent / "static"
SCRIPTS = ("view_data", "view_image", "view_words", "view_layers", "view_token", "view_main")

HTML = (_STATIC / "routing_view.html").read_text("utf-8")
CSS = (_STATIC / "routing_view.css").read_text("utf-8")
JS = "\n".join((_STATIC / f"{name}.js").read_text("utf-8") for name in SCRIPTS)


def routing_view(value: dict) -> gr.HTML:
    """The component; update it with payloads as an event's output."""
    return gr.HTML(
        value,
        html_template=HTML,
        css_template=CSS,
        js_on_load=JS,
        apply_default_css=False,
        elem_id="routing-view",
    )
