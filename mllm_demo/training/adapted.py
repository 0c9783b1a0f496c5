"""The adapted model while it learns: what its lessons have in common, from pixels to hidden states and shipped files.

It knows nothing of data, losses' weights or optimizers.
"""

from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from mllm_demo.models.bundled.assembly import save_vision
from mllm_demo.models.bundled.weights import ADAPTER, VISION_FILE
from mllm_demo.models.quantize import compute_dtype
from mllm_demo.training import attention
from mllm_demo.training.base import save_heads
from mllm_demo.training.conversations import IGNORED

# Weight of the balance loss: strong while the routers find their first division of labour, weak afterwards.
BALANCE = {2: 0.05, 3: 0.01}
EXACT = 4  # of so many steps one is made on weights that are not rounded
PLACED = 20  # the language model's layer, of 30, after which places are asked for


class Rounding:
    """The frozen linear weights of `model` in two states: as they are, and what NF4 with double quantization keeps of
    them (computed on the CPU everywhere); both in the dtype that the model has now."""

    @torch.no_grad()
    def __init__(self, model: nn.Module):
        linear = (m for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad)
        self.weights = [module.weight for module in linear]
        self.exact = [weight.detach().clone() for weight in self.weights]
        self.rounded = [self._round(weight) for weight in self.weights]

    @staticmethod
    def _round(weight: torch.Tensor) -> torch.Tensor:
        packed, state = quantize_4bit(weight.cpu().bfloat16(), quant_type="nf4", compress_statistics=True)
        return dequantize_4bit(packed, state).to(weight)

    @torch.no_grad()
    def use(self, rounded: bool) -> None:
        torch._foreach_copy_(self.weights, self.rounded if rounded else self.exact)

    def begin(self, step: int) -> None:
        """Makes the weights those of step number `step`."""
        self.use(step % EXACT > 0)


def parts_of(model: nn.Module) -> nn.Module:
    """What holds `vision_tower`, `multi_modal_projector` and `language_model`, adapted or not."""
    return (model.base_model.model if isinstance(model, PeftModel) else model).model


class Reader(nn.ModuleDict):
    """What turns the tower's maps into image tokens: its transformer layers, its norm and the connector."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """`maps`: what the tower's `joined` says of pictures → `[pictures, cells, hidden]`."""
        return self["connector"](self["norm"](self["context"](maps)))


def reader_of(model: nn.Module) -> Reader:
    parts = parts_of(model)
    tower = parts.vision_tower
    return Reader({"context": tower.context, "norm": tower.norm, "connector": parts.multi_modal_projector})


def quicken(model: PeftModel, device: torch.device, compiled: bool) -> None:
    """The language model and its experts compute in the dtype that suits `device` and, if `compiled`, as one graph for
    all layers, with and without the adapter; tower, reader and routers stay in float32."""
    language_model, dtype = parts_of(model).language_model, compute_dtype(device)
    routers = {id(p) for n, p in model.named_parameters() if "router" in n}
    for parameter in language_model.parameters():
        if id(parameter) not in routers:
            parameter.data = parameter.data.to(dtype)
    if device.type == "cpu":
        model.base_model.model.set_attn_implementation(attention.NAME)
    if compiled:
        for layer in language_model.layers:
            layer.compile(dynamic=True)


def see(model: PeftModel, pixels: torch.Tensor) -> torch.Tensor:
    """`pixels [pictures, 3, H, W]` → what the connector says of every patch, `[pictures, patches, hidden]`."""
    half = model.get_input_embeddings().weight.dtype == torch.bfloat16
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=half):
        with torch.no_grad():
            maps = parts_of(model).vision_tower.joined(pixels.to(memory_format=torch.channels_last))
        return reader_of(model)(maps)


def hidden_states(
    model: PeftModel, batch: dict[str, torch.Tensor], tokens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the language model's last layer, and its layer `PLACED`, say of every position, `[B, T, hidden]` each;
    `tokens`: what `see` says of the batch's pictures, or of as many cells as it has image tokens, if it has any."""
    embeds = model.get_input_embeddings()(batch["input_ids"])
    if tokens is not None:
        where = (batch["input_ids"] == model.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(where, tokens.to(embeds.dtype))
    seen: dict[str, torch.Tensor] = {}
    language_model = parts_of(model).language_model
    last = language_model.register_forward_hook(lambda m, a, output: seen.update(last=output.last_hidden_state))
    middle = language_model.layers[PLACED].register_forward_hook(lambda m, a, output: seen.update(middle=output))
    # The adapter follows whole forwards, so the model is called, but for one position's logits; named by index,
    # because a slice would make the head copy its weights for every sequence.
    first = torch.zeros(1, dtype=torch.long, device=embeds.device)
    with last, middle:
        model(
            inputs_embeds=embeds, attention_mask=batch["attention_mask"], position_ids=batch.get("position_ids"),
            logits_to_keep=first, use_cache=False,
        )  # fmt: skip
    return seen["last"], seen["middle"]


def missed(said: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy of the logits `said` `[labels, vocab]` over the labels of `batch`, by their weights."""
    answered = batch["labels"] != IGNORED
    each = functional.cross_entropy(said, batch["labels"][answered], reduction="none")
    weights = batch["weights"][answered]
    return (each * weights).sum() / weights.sum()


def export(model: PeftModel, heads: dict[str, dict[str, torch.Tensor]], folder: Path) -> None:
    """Writes what is shipped into `folder`: tower and connector, and the adapter with its experts in float16; beside
    them `heads`, which the program never reads and the next training goes on with."""
    adapter = folder / ADAPTER.name
    model.save_pretrained(adapter)
    file = adapter / "adapter_model.safetensors"
    (adapter / "README.md").unlink()  # an empty form; the model card stands beside the folder
    # A router's choice hangs on small differences, so routers keep their precision; they are a hundredth of it all.
    state = {name: value if "router" in name else value.half() for name, value in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    save_vision(model.base_model.model, folder / VISION_FILE.name)
    save_heads(heads, folder)
