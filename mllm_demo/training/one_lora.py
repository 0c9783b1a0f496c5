"""Puts one LoRA of the same active rank in the place of a model's experts: what they are held against.

    python -m mllm_demo.training.one_lora --init assets/bundled --to runs/one
    python -m mllm_demo.training.chat --stage 3 --experts 1 --init runs/one --out runs/one-run      # goes on from it

In every module that has experts, what they add to the layer's output is fitted, over the tokens of conversations from
the training split, by the nearest LoRA of the rank that a token's expert and the shared one have together (reduced-rank
regression: Izenman, 1975). So it starts with all that the experts have learned but for what only a choice among them
can do. It knows nothing of stages or losses.
"""

import argparse
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

from mllm_demo.models.bundled.assembly import load_vision
from mllm_demo.models.bundled.weights import ADAPTER, ASSETS, VISION_FILE
from mllm_demo.moe_lora.layer import MoeLoraLayer
from mllm_demo.training import art
from mllm_demo.training.adapted import export
from mllm_demo.training.base import build_model, read_heads
from mllm_demo.training.conversations import Conversations, Encoder, collate

RIDGE = 1e-3  # of the mean square of an input's channels, added to each of them
PICTURES = 96


class Added:
    """What one layer's experts add to its output, over the tokens it has read: `[in, in]` and `[in, out]` sums."""

    def __init__(self, layer: MoeLoraLayer):
        self.squares = torch.zeros(layer.in_features, layer.in_features)
        self.products = torch.zeros(layer.in_features, layer.out_features)

    def __call__(self, layer: MoeLoraLayer, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        """A forward hook."""
        x = inputs[0].flatten(0, -2)
        added = output.flatten(0, -2) - layer.base_layer(x)
        self.squares += (x.T @ x).float().cpu()
        self.products += (x.T @ added).float().cpu()

    def closest(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`A [rank, in]`, `B [out, rank]`: x A' B' is as near as can be to what was added, each rank's rows as long
        as its columns."""
        ridge = RIDGE * self.squares.diagonal().mean()
        root = torch.linalg.cholesky(self.squares + ridge * torch.eye(len(self.squares)))  # squares = root root'
        # |x (W - A' B')|^2 summed over tokens is |root' (W - A' B')|^2, and root' W is this:
        wanted = torch.linalg.solve_triangular(root, self.products, upper=False)
        left, sizes, right = torch.svd_lowrank(wanted, q=2 * rank, niter=8)
        A = torch.linalg.solve_triangular(root.T, left[:, :rank], upper=True).T
        B = right[:, :rank] * sizes[:rank]
        length = (A.norm(dim=1) / B.norm(dim=0).clamp(min=1e-12)).sqrt().clamp(min=1e-12)
        return A / length[:, None], B * length


@torch.no_grad()
def one_lora(model: PeftModel, batches: Iterable[dict[str, torch.Tensor]]) -> PeftModel:
    """`model` with one LoRA in the place of its experts, fitted on `batches`: what the model is called with, without
    padding. Modules of an ordinary LoRA keep it; `model` itself is taken apart."""
    layers = {name: m for name, m in model.base_model.model.named_modules() if isinstance(m, MoeLoraLayer)}
    fits = {name: Added(layer) for name, layer in layers.items() if layer.num_experts["default"]}
    hooks = [layers[name].register_forward_hook(fit) for name, fit in fits.items()]
    model.eval()
    for batch in batches:
        model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    config = deepcopy(model.peft_config["default"])
    if config.num_experts_per_tok != 1:
        raise ValueError("Only experts of which each token has one have a single LoRA of the same active rank here.")
    config.num_experts = 1  # whose weight is 1 for every token, so that all ranks together are one LoRA
    rank = config.r * (1 + config.use_shared_expert)
    plain = {name: (m.lora_A["default"], m.lora_B["default"]) for name, m in layers.items() if name not in fits}
    single = get_peft_model(model.unload(), config)
    for name, layer in single.base_model.model.named_modules():
        if isinstance(layer, MoeLoraLayer):
            A, B = fits[name].closest(rank) if name in fits else plain[name]
            layer.lora_A["default"].copy_(A)
            layer.lora_B["default"].copy_(B / layer.scaling["default"] if name in fits else B)
    return single


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--init", type=Path, default=ASSETS, help="the model, as assets/bundled is")
    parser.add_argument("--to", type=Path, required=True, help="the folder to write, of the same layout")
    parser.add_argument("--base", type=Path, default=Path("runs/base"))
    parser.add_argument("--art", type=Path, default=Path("runs/art"))
    parser.add_argument("--pictures", type=int, default=PICTURES, help="conversations to fit to")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    art.prepare(options.art)
    model, processor = build_model(options.base)
    load_vision(model, options.init / VISION_FILE.name)
    model.requires_grad_(False)
    encoder = Encoder(processor, model.config.vision_config.side**2)
    data = Conversations(options.art, "train", options.seed, options.pictures, encoder)

    def batches() -> Iterable[dict[str, torch.Tensor]]:
        for index in range(len(data)):
            batch = collate([data[index]], processor.tokenizer.pad_token_id)
            yield {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
            print(f"\r{index + 1} of {len(data)} conversations read", end="", flush=True)
        print("\nfitting", flush=True)

    single = one_lora(PeftModel.from_pretrained(model, options.init / ADAPTER.name), batches())
    export(single, read_heads(options.init), options.to)


if __name__ == "__main__":
    main()
