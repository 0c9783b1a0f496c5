"""What turns a chat with pictures into the inputs of a MoE-LLaVA model: tokenizer, pictures, prompt.

The result is transformers' `LlavaProcessor`; everything special to MoE-LLaVA is its parts. It knows nothing of
weights.
"""

import base64
import binascii
import json
from pathlib import Path

from tokenizers import AddedToken, normalizers
from transformers import (
    AutoTokenizer,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

from mllm_demo.errors import CheckpointError
from mllm_demo.models.moe_llava.config import MoeLlavaConfig

IMAGE_TOKEN = "<image>"
END_OF_ANSWER = "<|endoftext|>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# The original's template of all four families: roles in capitals, a space after each part, and after an answer, which
# is trimmed, the end token and no space. Pictures stand before the text of their message, each on a line of its own.
CHAT_TEMPLATE = (
    "{%- if messages and messages[0].role == 'system' -%}"
    "{%- set system = messages[0].content if messages[0].content is string else messages[0].content"
    " | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}"
    f'{{%- else -%}}{{%- set system = "{SYSTEM}" -%}}{{%- endif -%}}'
    "{{- system + ' ' -}}"
    "{%- for message in messages if message.role != 'system' -%}"
    "{%- if message.content is string -%}{%- set said = message.content -%}{%- else -%}"
    "{%- set shown = message.content | selectattr('type', 'equalto', 'image') | list -%}"
    f"{{%- set said = '{IMAGE_TOKEN}\\n' * (shown | length) + message.content"
    " | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}"
    "{%- endif -%}"
    "{%- if message.role == 'user' -%}{{- 'USER: ' + said + ' ' -}}"
    f"{{%- else -%}}{{{{- 'ASSISTANT: ' + said | trim + '{END_OF_ANSWER}' -}}}}{{%- endif -%}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)

# How both kinds of tiktoken vocabulary split text, and what follows their last rank (Qwen's and Stability AI's
# published tokenizers; their own code is not run).
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CODE = (
    "gh_stars filename issue_start issue_comment issue_closed jupyter_start jupyter_text jupyter_code jupyter_output "
    "empty_output commit_before commit_msg commit_after reponame"
)
_SPECIAL = {
    "qwen.tiktoken": (0, [END_OF_ANSWER, "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))]),
    # One number after the last rank is left out.
    "arcade100k.tiktoken": (
        1,
        [
            END_OF_ANSWER,
            *(f"<|fim_{part}|>" for part in ("prefix", "middle", "suffix", "pad")),
            *(f"<{name}>" for name in _CODE.split()),
            *("<|endofprompt|>", "<|im_start|>", "<|im_end|>", "<|pause|>"),
            *(f"<|reg{n}|>" for n in range(8)),
            "<|extra0|>",
        ],
    ),
}


class _Ranks(TikTokenConverter):
    """transformers' converter, reading the file itself and giving special tokens the numbers they have."""

    def __init__(self, path: Path) -> None:
        self.skipped, special = _SPECIAL[path.name]
        super().__init__(str(path), pattern=_SPLIT, extra_special_tokens=special)

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        lines = (line.split() for line in Path(tiktoken_url).read_bytes().splitlines() if line)
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}

    def extract_vocab_merges_from_model(self, tiktoken_url: str):
        vocab, merges = super().extract_vocab_merges_from_model(tiktoken_url)
        first = 1 + max(vocab.values()) + self.skipped
        vocab |= {token: first + number for number, token in enumerate(self.extra_special_tokens)}
        return vocab, merges


def load_tokenizer(folder: Path, title: str) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, with a token for pictures beyond its own; raises `CheckpointError`."""
    ranks = next((folder / name for name in _SPECIAL if (folder / name).is_file()), None)
    try:
        if ranks is not None:
            core = _Ranks(ranks).converted()
            core.normalizer = normalizers.NFC()
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=core, eos_token=END_OF_ANSWER, clean_up_tokenization_spaces=False
            )
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, binascii.Error) as error:
        raise CheckpointError(f"{title} has no usable tokenizer in {folder.name}; fetch it again.") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    return tokenizer


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest number of the tokenizer's own tokens."""
    return 1 + max(number for token, number in tokenizer.get_vocab().items() if token != IMAGE_TOKEN)


def load_image_processor(tower: Path, config: MoeLlavaConfig, title: str) -> LlavaImageProcessorPil:
    """What the tower's own processor does, with the choice (`do_pad`) to pad pictures to squares first.

    Padding is off, as in the original's web demo and evaluations: CLIP's pictures are cropped in the middle and
    SigLIP's stretched. Raises `CheckpointError`.
    """
    try:
        described = json.loads((tower / "preprocessor_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The vision tower of {title} has no readable preprocessor_config.json; fetch it again."
        ) from error
    stretched = isinstance(config.vision_config, SiglipVisionConfig)
    side = config.vision_config.image_size
    square = {"height": side, "width": side}
    size = described.get("size", square if stretched else side)
    if stretched and isinstance(size, int):
        size = {"height": size, "width": size}
    names = ("resample", "do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    return LlavaImageProcessorPil(
        **{name: described[name] for name in names if name in described},
        size=size,
        crop_size=described.get("crop_size", side),
        do_center_crop=described.get("do_center_crop", not stretched),
        do_pad=False,
    )


def make_processor(
    tokenizer: PreTrainedTokenizerBase, images: LlavaImageProcessorPil, config: MoeLlavaConfig
) -> LlavaProcessor:
    """Joins the parts. The tower's class token is counted where it has one: the model drops one token of all."""
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=0 if isinstance(config.vision_config, SiglipVisionConfig) else 1,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
