"""The processor of a checkpoint: what turns a chat with pictures into tensors.

It knows nothing of weights or devices.
"""

from pathlib import Path
from types import SimpleNamespace

from transformers import AutoProcessor, PretrainedConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from mllm_demo.errors import CheckpointError


class _NoVideo(ProcessorMixin):
    """Takes the video part away from those processors that hand it on by name."""

    def __init__(self, *args, **kwargs) -> None:
        kwargs.pop("video_processor", None)
        super().__init__(*args, **kwargs)


def _without_video(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """`processor_class` with no video part, for machines without torchvision, which only video needs."""

    class PictureProcessor(processor_class, _NoVideo):
        # SmolVLM asks it for the defaults of a video while rendering any chat.
        video_processor = SimpleNamespace(num_frames=None, fps=None)

        @classmethod
        def get_attributes(cls):
            return [name for name in super().get_attributes() if name != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(cls, folder, processor_dict=None, **kwargs):
            # The video processor is the last part of every signature, so None in its place shifts nothing.
            return [*super()._get_arguments_from_pretrained(folder, processor_dict, **kwargs), None]

    PictureProcessor.__name__ = processor_class.__name__
    return PictureProcessor


def load_processor(folder: Path, config: PretrainedConfig, title: str) -> ProcessorMixin:
    """Reads the processor in `folder`; raises `CheckpointError` when it is missing, partial or has no chat template."""
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except ImportError as error:
        processor_class = PROCESSOR_MAPPING.get(type(config), None)
        if processor_class is None or "video_processor" not in processor_class.get_attributes()[-1:]:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"The processor of {title} needs a package that is missing: {reason}"
            ) from error
        try:
            processor = _without_video(processor_class).from_pretrained(folder, trust_remote_code=False)
        except ImportError as inner:
            reason = " ".join(str(inner).split())
            raise CheckpointError(
                f"The processor of {title} needs a package that is missing: {reason}"
            ) from inner
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{title} has no usable processor in {folder}; save it there with processor.save_pretrained()."
        ) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise CheckpointError(
            f"{title} has no processor for pictures and text; pick an image-text-to-text model."
        )
    if not processor.chat_template:
        raise CheckpointError(
            f"{title} has no chat template; pick a model tuned for chat (often named 'Instruct')."
        )
    return processor
