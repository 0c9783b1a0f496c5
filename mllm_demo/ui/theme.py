"""How the page looks around the routing view: Gradio theme, style sheet, page head.

System fonts only, nothing is fetched from elsewhere; it knows nothing of what the page does.
"""

from pathlib import Path

import gradio as gr

_STATIC = Path(__file__).parent / "static"
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
FONT_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = (_STATIC / "page.css").read_text("utf-8")
JS = (_STATIC / "page.js").read_text("utf-8")


def make_theme() -> gr.themes.Base:
    """Neutral, so that the experts' colours are the only colours."""
    return gr.themes.Default(
        primary_hue=gr.themes.colors.zinc,
        secondary_hue=gr.themes.colors.zinc,
        neutral_hue=gr.themes.colors.zinc,
        radius_size=gr.themes.sizes.radius_lg,
        font=FONT,
        font_mono=FONT_MONO,
    ).set(
        body_background_fill="#f3f4f6",
        body_background_fill_dark="#0d0e11",
        body_text_color="#1b1d22",
        body_text_color_dark="#eceef2",
        body_text_color_subdued="#5c626d",
        body_text_color_subdued_dark="#a2a8b4",
        block_background_fill="#ffffff",
        block_background_fill_dark="#18191d",
        border_color_primary="#dfe2e7",
        border_color_primary_dark="#2e3138",
        block_border_color="#dfe2e7",
        block_border_color_dark="#2e3138",
        block_shadow="none",
        button_primary_background_fill="#1b1d22",
        button_primary_background_fill_hover="#33363e",
        button_primary_background_fill_dark="#eceef2",
        button_primary_background_fill_hover_dark="#ffffff",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#14161a",
        slider_color="#1b1d22",
        slider_color_dark="#eceef2",
    )
