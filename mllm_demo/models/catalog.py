"""What can be loaded by name, and what each needs; the only module that may name a model.

Memory is estimated by one formula from parameter counts, never measured here; `memory.py` asks the real
configuration before loading. It knows nothing of torch, downloads or the page.
"""

from dataclasses import dataclass

from mllm_demo.chat.events import Preset
from mllm_demo.settings import DEFAULT_MODEL

# NF4 with double quantization: 4 bits a weight, 8 bits per block of 64, 32 bits per 256 blocks (QLoRA, section 3).
NF4_BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
# Room for activations, the KV cache of a few thousand tokens and the runtime's own buffers.
WORKING_MEMORY_FACTOR = 1.2
WORKING_MEMORY_GB = 0.3


@dataclass(frozen=True)
class CatalogueEntry:
    """A preset. `hub_id` is None for the model that is shipped with the program.

    `parameters` and `unquantized` are in millions; the latter (embeddings, output head, convolutions) stay in 16 bit.
    `described_by`: hub id of the base model, where a checkpoint holds weights only and borrows its configuration,
    tokenizer and processor.
    """

    name: str
    title: str
    hub_id: str | None
    parameters: float
    unquantized: float
    licence: str
    note: str
    described_by: str | None = None

    @property
    def needs_gb(self) -> float:
        """GB of device memory in NF4, estimated from the parameter counts."""
        quantized = self.parameters - self.unquantized
        weights_gb = (quantized * NF4_BYTES_PER_WEIGHT + self.unquantized * 2) / 1000
        return round(weights_gb * WORKING_MEMORY_FACTOR + WORKING_MEMORY_GB, 1)

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
        licence="research preview (Apache-2.0 code); base MIT",
        note=MOE_LLAVA_NOTE.format(disk=24),
    ),
    CatalogueEntry(
        "moe-llava-phi2-384",
        "MoE-LLaVA Phi-2 2.7B x 4, 384 pixels",
        "LanguageBind/MoE-LLaVA-Phi2-2.7B-4e-384",
        parameters=5715,
        unquantized=261,
        licence="research preview (Apache-2.0 code); base MIT",
        note=MOE_LLAVA_NOTE.format(disk=24),
    ),
    CatalogueEntry(
        "moe-llava-stablelm",
        "MoE-LLaVA StableLM 1.6B x 4",
        "LanguageBind/MoE-LLaVA-StableLM-1.6B-4e",
        parameters=3200,
        unquantized=413,
        licence="research preview (Apache-2.0 code); base: Stability AI's own licence",
        note=MOE_LLAVA_NOTE.format(disk=14),
    ),
    CatalogueEntry(
        "moe-llava-stablelm-384",
        "MoE-LLaVA StableLM 1.6B x 4, 384 pixels",
        "LanguageBind/MoE-LLaVA-StableLM-1.6B-4e-384",
        parameters=3310,
        unquantized=413,
        licence="research preview (Apache-2.0 code); base: Stability AI's own licence",
        note=MOE_LLAVA_NOTE.format(disk=15),
    ),
    CatalogueEntry(
        "moe-llava-qwen",
        "MoE-LLaVA Qwen 1.8B x 4",
        "LanguageBind/MoE-LLaVA-Qwen-1.8B-4e",
        parameters=3364,
        unquantized=624,
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
        licence="Apache-2.0",
        note="Small, made for this demo, with routed experts; needs no GPU.",
    ),
    CatalogueEntry(
        "smolvlm-256m",
        "SmolVLM 256M Instruct",
        "HuggingFaceTB/SmolVLM-256M-Instruct",
        parameters=256,
        unquantized=58,
        licence="Apache-2.0",
        note="The smallest hub preset; usable on a CPU.",
    ),
    CatalogueEntry(
        "smolvlm-500m",
        "SmolVLM 500M Instruct",
        "HuggingFaceTB/SmolVLM-500M-Instruct",
        parameters=507,
        unquantized=96,
        licence="Apache-2.0",
        note="Slow on a CPU.",
    ),
    CatalogueEntry(
        "smolvlm-2.2b",
        "SmolVLM 2.2B Instruct",
        "HuggingFaceTB/SmolVLM-Instruct",
        parameters=2246,
        unquantized=203,
        licence="Apache-2.0",
        note="Needs a GPU to be pleasant.",
    ),
    CatalogueEntry(
        "qwen2-vl-2b",
        "Qwen2-VL 2B Instruct",
        "Qwen/Qwen2-VL-2B-Instruct",
        parameters=2209,
        unquantized=235,
        licence="Apache-2.0",
        note="Needs a GPU to be pleasant.",
    ),
    CatalogueEntry(
        "qwen2-vl-7b",
        "Qwen2-VL 7B Instruct",
        "Qwen/Qwen2-VL-7B-Instruct",
        parameters=8291,
        unquantized=1091,
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
        licence="Qwen Research (non-commercial)",
        note="Needs a GPU.",
    ),
    CatalogueEntry(
        "qwen2.5-vl-7b",
        "Qwen2.5-VL 7B Instruct",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        parameters=8292,
        unquantized=1092,
        licence="Apache-2.0",
        note="Needs a GPU.",
    ),
    CatalogueEntry(
        "qwen3-vl-2b",
        "Qwen3-VL 2B Instruct",
        "Qwen/Qwen3-VL-2B-Instruct",
        parameters=2128,
        unquantized=313,
        licence="Apache-2.0",
        note="Needs a GPU to be pleasant.",
    ),
    CatalogueEntry(
        "qwen3-vl-4b",
        "Qwen3-VL 4B Instruct",
        "Qwen/Qwen3-VL-4B-Instruct",
        parameters=4438,
        unquantized=391,
        licence="Apache-2.0",
        note="Needs a GPU.",
    ),
    CatalogueEntry(
        "qwen3-vl-8b",
        "Qwen3-VL 8B Instruct",
        "Qwen/Qwen3-VL-8B-Instruct",
        parameters=8767,
        unquantized=1247,
        licence="Apache-2.0",
        note="Needs a GPU.",
    ),
    *MOE_LLAVA,
)


def find(name: str) -> CatalogueEntry | None:
    """The entry called `name`, or None: then it is a folder or a hub id."""
    return next((entry for entry in CATALOGUE if entry.name == name), None)


def presets() -> tuple[Preset, ...]:
    """Every entry as the page shows it, the bundled model first."""
    return tuple(entry.as_preset() for entry in CATALOGUE)
