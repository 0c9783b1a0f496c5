"""Where an answer came from, as plain JSON-able values, and the small pictures a trace carries.

It knows nothing of how answers are made.
"""

import io
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

from PIL import Image

from mllm_demo.chat.messages import Conversation, Message, Picture
from mllm_demo.models.loading import LoadedModel
from mllm_demo.routing.trace import TraceImage
from mllm_demo.settings import Sampling

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
TRACE_IMAGE_SIDE = 512


def provenance(loaded: LoadedModel, messages: Conversation, sampling: Sampling) -> dict[str, object]:
    """Everything that is known before the first token; `outcome` is added by the end."""
    return {
        "base": loaded.choice.model,
        "base_title": loaded.title,
        "base_revision": loaded.base_revision,
        "adapter": loaded.choice.adapter,
        "adapter_title": loaded.adapter_title,
        "adapter_revision": loaded.adapter_revision,
        "quantization": loaded.quantization,
        "dtype": loaded.dtype,
        "remark": loaded.remark,
        "expert_quantization": loaded.choice.expert_quantization,
        "awaker_gate": loaded.choice.awaker_gate,
        "device": str(loaded.device),
        "sampling": {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": sampling.seed,
        },
        "messages": [_message(message) for message in messages],
        "versions": {library: _version(library) for library in LIBRARIES},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def outcome(*, answer: str, reason: str, new_tokens: int, prefill_s: float, decode_s: float) -> Mapping[str, object]:
    """What is known at the end; `timings` in seconds."""
    return {
        "answer": answer,
        "reason": reason,
        "new_tokens": new_tokens,
        "timings": {"prefill_s": round(prefill_s, 4), "decode_s": round(decode_s, 4)},
    }


def trace_image(picture: Picture) -> TraceImage:
    """A JPEG no longer than 512 pixels on a side, which says the size of the picture it stands for."""
    small = picture.to_pil()
    small.thumbnail((TRACE_IMAGE_SIDE, TRACE_IMAGE_SIDE), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    small.save(encoded, format="JPEG", quality=88)
    return TraceImage(encoded.getvalue(), picture.width, picture.height, picture.label)


def _message(message: Message) -> dict[str, object]:
    return {
        "role": message.role,
        "content": [
            {
                "type": "image",
                "sha256": part.digest,
                "name": part.name,
                "width": part.width,
                "height": part.height,
                **({"label": part.label} if part.label else {}),
            }
            if isinstance(part, Picture)
            else {"type": "text", "text": part}
            for part in message.content
        ],
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
