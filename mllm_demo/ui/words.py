"""Every text of the page, so that tone and spelling are decided in one place; it knows nothing of Gradio."""

from collections.abc import Sequence

from mllm_demo.chat.events import EngineStatus, Finished, Footprint, Queued, Started
from mllm_demo.chat.grounding import Box

PAGE_TITLE = "Which expert sees what? A 4-bit MoE-LoRA vision-language model"
HEADLINE = "Which expert sees what?"
SUBLINE = (
    "Ask a 4-bit vision-language model about a picture and watch its experts share the work, "
    "patch by patch and word by word."
)

PLACEHOLDER_INPUT = "Ask about a picture"
CHAT_LABEL = "Conversation"
CHAT_EMPTY = "**Drop or paste a picture below and ask,**\n\nor start with one of these."
CHAT_EMPTY_PLAIN = "**Drop or paste a picture below and ask.**"
WHAT_IS_THIS = "What is in this picture?"
STOP = "Stop"
NOT_ANSWERED = "⚠ Not answered"

EMPTY_VIEW = "Ask about a picture, and the expert that every patch and every word went to is drawn here."
SAMPLE_NOTE = "ask, and your own answer takes its place"

ANSWER_SETTINGS = "Answer settings"
MODEL_SETTINGS = "Model"
TEMPERATURE_INFO = "0: always the likeliest token"
MODEL_LABEL = "Model"
MODEL_INFO = "a preset, a folder on the server or a Hugging Face id"
ADAPTER_LABEL = "Adapter"
ADAPTER_INFO = (
    "folder or id of a PEFT adapter; several LoRA adapters, separated by commas, become one mixture with a router "
    "that needs no training (Arrow); empty for the preset's own"
)
QUANTIZATION_LABEL = "Quantization"
LOAD = "Load this model"
LOAD_SHARED = "Everybody on this page shares one model; loading another one replaces it for all."
DOWNLOAD_TRACE = "Download trace"
OPEN_TRACE = "Open trace"

OVERVIEW = ("Expert load", "Picture or text?", "Pathways")
NO_OVERVIEW = "ask about a picture, and it is drawn here"
NOT_BY_TOKEN = "the router chooses once for all tokens"

NOTHING_ASKED = "Write a question first, or choose an example."
NO_MODEL = "No model is loaded; choose one under “Model” and press “Load this model”."
STOPPED_WAITING = "Stopped before the model was ready; press retry to ask again."
UNEXPECTED = "Something unexpected went wrong; the server's log says what. Press retry to ask again."
NO_FILE = "The endpoint needs a picture; pass a file as `image`."


def no_routing(status: EngineStatus) -> str:
    if status.unread_experts:
        return (
            "This answer has no routing to show: the model has experts, but this program cannot read the routers of "
            f"{' and '.join(status.unread_experts)} yet."
        )
    return (
        "This answer has no routing to show: the model has no experts, neither its own nor LoRA experts. Load the "
        "bundled model, a mixture-of-experts model, or an adapter of type MoE-LoRA, under “Model”."
    )


def waiting(event: Queued) -> str:
    if event.ahead == 1:
        return "One person is before you"
    return f"{event.ahead} people are before you" if event.ahead else "You are next"


def reading(event: Started) -> str:
    if not event.image_tokens:
        return f"Reading {event.prompt_tokens} tokens"
    return f"Reading {event.prompt_tokens} tokens, {event.image_tokens} of them from pictures"


def loading(status: EngineStatus) -> str:
    return f"The model is still loading: {status.note}" if status.note else "The model is still loading"


def sentence(error: Exception | str) -> str:
    """The error's message; its first word is capitalised unless it is a name such as a file's."""
    said = str(error)
    return said[:1].upper() + said[1:] if said.split(" ")[0].isalpha() else said


def failed(status: EngineStatus) -> str:
    return f"The model could not be loaded. {sentence(status.error)}".strip()


def memory(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def status_parts(status: EngineStatus, finished: Finished | None) -> list[str]:
    """The pieces of the status line of a ready model, most important first."""
    parts = [f"{status.model} with {status.adapter}" if status.adapter else status.model]
    parts.append("GPU" if status.device.startswith("cuda") else status.device.upper())
    share = f"{100 * status.four_bit_share:.0f} % of the weights in 4 bit"
    parts.append(f"{status.quantization}, {share}" if status.quantization != "none" else "not quantized")
    if finished and finished.new_tokens and finished.decode_s > 0:
        parts.append(f"{finished.tokens_per_s:.1f} tokens/s")
    parts.append(memory(status.memory_bytes))
    return parts


def boxes_drawn(boxes: Sequence[Box]) -> str:
    """What a picture with boxes shows, for who cannot see it; a file can be called so, too."""
    places = [f"from {b.x1} to {b.x2} percent across and from {b.y1} to {b.y2} percent down" for b in boxes]
    if len(places) == 1:
        return f"Picture with a box {places[0]}"
    if len(places) == 2:
        return f"Picture with box 1 {places[0]}, and box 2 {places[1]}"
    return f"Picture with {len(places)} boxes"


def how_it_ended(finished: Finished) -> str:
    return {
        "stopped": "You stopped this answer.",
        "length": "The answer reached the length set under “Answer settings”.",
    }.get(finished.reason, "")


FOOTPRINT_TABLE = "Memory by part of the model"
FOOTPRINT_COLUMNS = ("", "weights", "in 16 bit", "as loaded", "in 4 bit")
PARTS = {"embeddings": "embeddings and head", "rest": "everything else"}


def footprint_rows(seen: Footprint) -> list[tuple[str, str, str, str, str]]:
    """Cells of the table of a model's parts, one row each and one for all."""

    def row(name: str, weights: int, in_16_bit: int, held: int, four_bit: float) -> tuple[str, str, str, str, str]:
        many = f"{weights / 1e9:.1f} B" if weights >= 1e9 else f"{weights / 1e6:.0f} M"
        return name, many, memory(in_16_bit), memory(held), f"{100 * four_bit:.0f} %"

    rows = [
        row(
            PARTS.get(part.name, part.name),
            part.weights,
            part.bytes_in_16_bit,
            part.bytes_held,
            part.four_bit_weights / part.weights if part.weights else 0,
        )
        for part in seen.parts
    ]
    total = sum(part.weights for part in seen.parts)
    return [*rows, row("all", total, seen.bytes_in_16_bit, seen.bytes_held, seen.four_bit_share)] if rows else []


def footprint_sentences(seen: Footprint) -> list[str]:
    """What the table does not say: KV cache, a picture's tokens, which card holds the model."""
    said = []
    if seen.cache_bytes:
        said.append(f"Each 1,000 tokens of conversation take {memory(seen.cache_bytes)} more.")
    if seen.image_tokens:
        said.append("A picture of {} x {} takes {} tokens.".format(*seen.image_size, seen.image_tokens))
    smallest = min(seen.cards_gb, default=None)
    holds = f"A graphics card of {smallest} GB holds it." if smallest else "No graphics card of up to 24 GB holds it."
    return [*said, f"With room to work it needs {memory(seen.needs_bytes)}. {holds}"]


def does_not_fit(seen: Footprint) -> str:
    device = "GPU" if seen.device.startswith("cuda") else "CPU"
    way_out = "a smaller model" if seen.quantization in ("nf4", "fp4") else "a smaller model or nf4"
    return f"It does not fit here: {memory(seen.free_bytes)} is free on the {device}. Choose {way_out}."
