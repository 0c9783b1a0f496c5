"""What can be loaded by name, and what each needs; the only module that may name a model.

Memory is estimated by one formula from parameter counts, never measured here; `memory.py` asks the real
configuration before loading. It knows nothing of torch, downloads or the page.
"""

from dataclasses import dataclass

from mllm_demo.chat.events import Preset
from mllm_demo.settings import DEFAULT_MODEL

# NF4 with double quantization: 4 bits a weight, 8 bits per block of 64, 32 bits per 256 blocks (QLoRA, section 3).
NF4_BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
# Room for a conversation with a picture or two, and for activations and the runtime's own buffers.
CONVERSATION_TOKENS = 4000
WORKING_BYTES = 500_000_000


def needed(weights_bytes: float, cache_bytes: float) -> int:
    """Bytes that a model takes while it answers. `cache_bytes`: its KV cache for 1,000 tokens."""
    return round(weights_bytes + cache_bytes * CONVERSATION_TOKENS / 1000 + WORKING_BYTES)


@dataclass(frozen=True)
class CatalogueEntry:
    """A preset. `hub_id` is None for the model that is shipped with the program.

    `parameters` and `unquantized` are in millions; the latter (embeddings, output head, convolutions) stay in 16 bit.
    `cache_mb`: the KV cache for 1,000 tokens.
    `described_by`: hub id of the base model, where a checkpoint holds weights only and borrows its configuration,
    tokenizer and processor.
    """

    name: str
    title: str
    hub_id: str | None
    parameters: float
    unquantized: float
    cache_mb: float
    licence: str
    note: str
    described_by: str | None = None

    @property
    def needs_gb(self) -> float:
        """GB of device memory in NF4, from these numbers."""
        quantized = self.parameters - self.unquantized
        weights = (quantized * NF4_BYTES_PER_WEIGHT + self.unquantized * 2) * 1e6
        return round(needed(weights, self.cache_mb * 1e6) / 1e9, 1)

    def as_preset(self) -> Preset:
        """The entry as the page shows it."""
        return Preset(self.name, self.title, self.needs_gb, self.licence, self.note)


AWAKER = CatalogueEntry(
    "awaker2.5-vl",
    "Awaker2.5-VL",
    "MetabrainAGI/Awaker2.5-VL",
    parameters=11082,
    # Embeddings and output head, and 110 M of plain LoRA in 32 bit.
    unquantized=1311,
    cache_mb=57,
    licence="not stated by its authors; base Apache-2.0",
    note=(
        "Needs a GPU of 12 GB, a 22 GB download and 22 GB more on disk for its one conversion. Verified: tiny random "
        "models give the original's logits, gates and words, image and text, in float32 and bfloat16. Not verified: "
        "the published weights, which were not available."
    ),
    described_by="Qwen/Qwen2-VL-7B-Instruct",
)

MOE_LLAVA_NOTE = (
    "Routed experts of its own. Its pickled weights are converted once, which takes their size on disk again "
    "({disk} GB in all). Verified: tiny random models give the original's routing, logits and words in float32. Not "
    "verified: the published weights and tokenizer files, which were not available."
)
MOE_LLAVA = (
    CatalogueEntry(
        "moe-llava-phi2",
        "MoE-LLaVA Phi-2 2.7B x 4",
        "LanguageBind/MoE-LLaVA-Phi2-2.7B-4e",
        parameters=5605,
        unquantized=261,
        cache_mb=328,
        licence="research preview (Apache-2.0 code); base MIT",
        note=MOE_LLAVA_NOTE.format(disk=24),
    ),
    CatalogueEntry(
        "moe-llava-phi2-384",
        "MoE-LLaVA Phi-2 2.7B x 4, 384 pixels",
        "LanguageBind/MoE-LLaVA-Phi2-2.7B-4e-384",
        parameters=5715,
        unquantized=261,
        cache_mb=328,
        licence="research preview (Apache-2.0 code); base MIT",
        note=MOE_LLAVA_NOTE.format(disk=24),
    ),
    CatalogueEntry(
        "moe-llava-stablelm",
        "MoE-LLaVA StableLM 1.6B x 4",
        "LanguageBind/MoE-LLaVA-StableLM-1.6B-4e",
        parameters=3200,
        unquantized=413,
        cache_mb=197,
        licence="research preview (Apache-2.0 code); base: Stability AI's own licence",
        note=MOE_LLAVA_NOTE.format(disk=14),
    ),
    CatalogueEntry(
        "moe-llava-stablelm-384",
        "MoE-LLaVA StableLM 1.6B x 4, 384 pixels",
        "LanguageBind/MoE-LLaVA-StableLM-1.6B-4e-384",
        parameters=3310,
        unquantized=413,
        cache_mb=197,
        licence="research preview (Apache-2.0 code); base: Stability AI's own licence",
        note=MOE_LLAVA_NOTE.format(disk=15),
    ),
    CatalogueEntry(
        "moe-llava-qwen",
        "MoE-LLaVA Qwen 1.8B x 4",
        "LanguageBind/MoE-LLaVA-Qwen-1.8B-4e",
        parameters=3364,
        unquantized=624,
        cache_mb=197,
        licence="research preview (Apache-2.0 code); base: Tongyi Qianwen's own licence",
        note=MOE_LLAVA_NOTE.format(disk=15),
    ),
)

CATALOGUE = (
    CatalogueEntry(
        DEFAULT_MODEL,
        "Tessera",
        None,
        parameters=140,
        unquantized=34,
        cache_mb=23,
        licence="Apache-2.0",
        note="Small, made for this demo, with routed experts; needs no GPU.",
    ),
    CatalogueEntry(
        "smolvlm-256m",
        "SmolVLM 256M Instruct",
        "HuggingFaceTB/SmolVLM-256M-Instruct",
        parameters=256,
        unquantized=58,
        cache_mb=23,
        licence="Apache-2.0",
        note="The smallest hub preset; usable on a CPU.",
    ),
    CatalogueEntry(
        "smolvlm-500m",
        "SmolVLM 500M Instruct",
        "HuggingFaceTB/SmolVLM-500M-Instruct",
        parameters=507,
        unquantized=96,
        cache_mb=41,
        licence="Apache-2.0",
        note="Slow on a CPU.",
    ),
    CatalogueEntry(
        "smolvlm-2.2b",
        "SmolVLM 2.2B Instruct",
        "HuggingFaceTB/SmolVLM-Instruct",
        parameters=2246,
        unquantized=203,
        cache_mb=197,
        licence="Apache-2.0",
        note="Needs a GPU to be pleasant.",
    ),
    CatalogueEntry(
        "qwen2-vl-2b",
        "Qwen2-VL 2B Instruct",
        "Qwen/Qwen2-VL-2B-Instruct",
        parameters=2209,
        unquantized=235,
        cache_mb=29,
        licence="Apache-2.0",
        note="Needs a GPU to be pleasant.",
    ),
    CatalogueEntry(
        "qwen2-vl-7b",
        "Qwen2-VL 7B Instruct",
        "Qwen/Qwen2-VL-7B-Instruct",
        parameters=8291,
        unquantized=1091,
        cache_mb=57,
        licence="Apache-2.0",
        note="Needs a GPU; the base of Awaker2.5-VL.",
    ),
    AWAKER,
    CatalogueEntry(
        "qwen2.5-vl-3b",
        "Qwen2.5-VL 3B Instruct",
        "Qwen/Qwen2.5-VL-3B-Instruct",
        parameters=3755,
        unquantized=313,
        cache_mb=37,
        licence="Qwen Research (non-commercial)",
        note="Needs a GPU.",
    ),
    CatalogueEntry(
        "qwen2.5-vl-7b",
        "Qwen2.5-VL 7B Instruct",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        parameters=8292,
        unquantized=1092,
        cache_mb=57,
        licence="Apache-2.0",
        note="Needs a GPU.",
    ),
    CatalogueEntry(
        "qwen3-vl-2b",
        "Qwen3-VL 2B Instruct",
        "Qwen/Qwen3-VL-2B-Instruct",
        parameters=2128,
        unquantized=313,
        cache_mb=115,
        licence="Apache-2.0",
        note="Needs a GPU to be pleasant.",
    ),
    CatalogueEntry(
        "qwen3-vl-4b",
        "Qwen3-VL 4B Instruct",
        "Qwen/Qwen3-VL-4B-Instruct",
        parameters=4438,
        unquantized=391,
        cache_mb=147,
        licence="Apache-2.0",
        note="Needs a GPU.",
    ),
    CatalogueEntry(
        "qwen3-vl-8b",
        "Qwen3-VL 8B Instruct",
        "Qwen/Qwen3-VL-8B-Instruct",
        parameters=8767,
        unquantized=1247,
        cache_mb=147,
        licence="Apache-2.0",
        note="Needs a GPU.",
    ),
    *MOE_LLAVA,
    CatalogueEntry(
        "qwen3-vl-30b-a3b",
        "Qwen3-VL 30B-A3B Instruct",
        "Qwen/Qwen3-VL-30B-A3B-Instruct",
        parameters=31071,
        unquantized=640,
        cache_mb=98,
        licence="Apache-2.0",
        note="128 experts a layer, 8 a token; a 24 GB GPU.",
    ),
    CatalogueEntry(
        "aria",
        "Rhymes Aria 25B",
        "rhymes-ai/Aria",
        parameters=25307,
        unquantized=531,
        cache_mb=287,
        licence="Apache-2.0",
        note="64 experts a layer, 6 a token, and two for all; a 16 GB GPU.",
    ),
    CatalogueEntry(
        "gemma-4-26b-a4b",
        "Gemma 4 26B-A4B Instruct",
        "google/gemma-4-26B-A4B-it",
        parameters=25806,
        unquantized=766,
        cache_mb=225,
        licence="Apache-2.0",
        note="128 experts a layer, 8 a token; a 16 GB GPU.",
    ),
    CatalogueEntry(
        "ernie-4.5-vl-28b-a3b",
        "ERNIE 4.5 VL 28B-A3B",
        "baidu/ERNIE-4.5-VL-28B-A3B-PT",
        parameters=29399,
        unquantized=274,
        cache_mb=57,
        licence="Apache-2.0",
        note="64 experts for text and 64 for pictures a layer, 6 a token; a 24 GB GPU.",
    ),
    CatalogueEntry(
        "qwen3.5-35b-a3b",
        "Qwen3.5 35B-A3B",
        "Qwen/Qwen3.5-35B-A3B",
        parameters=35114,
        unquantized=1044,
        cache_mb=82,
        licence="Apache-2.0",
        note="256 experts a layer, 8 a token and one for all; a 24 GB GPU.",
    ),
    CatalogueEntry(
        "glm-4.5v",
        "GLM 4.5V 108B-A12B",
        "zai-org/GLM-4.5V",
        parameters=107744,
        unquantized=1293,
        cache_mb=188,
        licence="MIT",
        note="128 experts a layer, 8 a token; needs an 80 GB GPU.",
    ),
    CatalogueEntry(
        "llama-4-scout",
        "Llama 4 Scout 109B-A17B Instruct",
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        parameters=108225,
        unquantized=2075,
        cache_mb=197,
        licence="Llama 4 Community (ask on the hub)",
        note="16 experts a layer, one a token; needs an 80 GB GPU.",
    ),
)


def find(name: str) -> CatalogueEntry | None:
    """The entry called `name`, or None: then it is a folder or a hub id."""
    return next((entry for entry in CATALOGUE if entry.name == name), None)


def presets() -> tuple[Preset, ...]:
    """Every entry as the page shows it, the bundled model first."""
    return tuple(entry.as_preset() for entry in CATALOGUE)
