"""Stage I: joins the taught tower to the 4-bit language model through MoE-LoRA experts, on rendered conversations.

The language model's weights are rounded to NF4 before training, so the adapter learns to live with the weights that
are shipped. Loss on answers only, plus the routers' balance loss.

    python -m mllm_demo.training.chat --steps 600
    torchrun --nproc-per-node 2 -m mllm_demo.training.chat --threads 1    # one process a core, gradients averaged

Resumes from `runs/chat/last.pt`; `--export` writes the shipped files. It knows nothing of evaluation.
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset

from mllm_demo.models.bundled.assembly import save_vision
from mllm_demo.models.bundled.weights import ADAPTER, VISION_FILE
from mllm_demo.moe_lora import MoeLoraConfig
from mllm_demo.training import art
from mllm_demo.training.base import build_model
from mllm_demo.training.conversations import IGNORED, Conversations, Encoder, collate
from mllm_demo.training.small_talk import replies

ADAPTER_CONFIG = {
    "r": 8,
    "lora_alpha": 16,
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "use_shared_expert": True,
    "router_scope": "block",
    "granularity": "token",
    "router_noise_std": 0.1,
    "router_aux_loss_coef": 0.02,
    "target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"],
    "plain_target_modules": ["q_proj", "k_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}


@torch.no_grad()
def round_to_nf4(model: nn.Module) -> None:
    """Replaces each linear weight by what NF4 with double quantization keeps of it."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            packed, state = quantize_4bit(module.weight.bfloat16(), quant_type="nf4", compress_statistics=True)
            module.weight.copy_(dequantize_4bit(packed, state))


def build(options) -> tuple[nn.Module, object]:
    """The PEFT model in float32 with the taught tower, and its processor."""
    model, processor = build_model(options.base)
    talk = replies(model, processor, options.base / "replies.json")
    taught = torch.load(options.tower, weights_only=True)
    model.model.vision_tower.load_state_dict(taught["tower"])
    model.model.multi_modal_projector.load_state_dict(taught["connector"])
    round_to_nf4(model.model.language_model)
    return get_peft_model(model, MoeLoraConfig(**ADAPTER_CONFIG)), processor, talk


def answer_loss(model, batch: dict[str, torch.Tensor], seen: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy over answer tokens; only those go through the output head."""
    labels = batch["labels"]
    model(**{k: v for k, v in batch.items() if k != "labels"}, logits_to_keep=1, use_cache=False)
    wanted = labels != IGNORED
    logits = model.get_output_embeddings()(seen.pop("hidden")[wanted])
    return functional.cross_entropy(logits, labels[wanted])


def export(model: nn.Module) -> None:
    """Writes the shipped files: tower and connector, and the adapter with its experts in float16."""
    model.save_pretrained(ADAPTER)
    file = ADAPTER / "adapter_model.safetensors"
    (ADAPTER / "README.md").unlink()  # an empty form; the model card stands beside the folder
    # A router's choice hangs on small differences, so routers keep their precision; they are a hundredth of it all.
    state = {name: value if "router" in name else value.half() for name, value in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    save_vision(model.base_model.model, VISION_FILE)


def average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """One exchange between processes for all gradients together."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(flat)
    flat /= world
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8, help="pictures a step, over all processes")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--connector-lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tower", type=Path, default=Path("runs/tower/last.pt"))
    parser.add_argument("--base", type=Path, default=Path("runs/base"))
    parser.add_argument("--art", type=Path, default=Path("runs/art"))
    parser.add_argument("--out", type=Path, default=Path("runs/chat"))
    parser.add_argument("--export", action="store_true", help="only write the shipped files from the last checkpoint")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    model, processor, talk = build(options)
    connector = model.base_model.model.model.multi_modal_projector
    connector.requires_grad_(True)
    adapter = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
    optimizer = torch.optim.AdamW([{"params": adapter}, {"params": connector.parameters()}], weight_decay=0.0)
    rates = (options.lr, options.connector_lr)
    trained = {"adapter": nn.ParameterList(adapter), "connector": connector, "optimizer": optimizer}

    step, last = 0, options.out / "last.pt"
    if last.exists():
        state = torch.load(last, weights_only=True)
        for name, part in trained.items():
            part.load_state_dict(state[name])
        step = state["step"]
        print(f"resumed at step {step}", flush=True)
    if options.export:
        export(model)
        return

    def save() -> None:
        partial_file = last.with_suffix(".part")
        torch.save({name: part.state_dict() for name, part in trained.items()} | {"step": step}, partial_file)
        partial_file.rename(last)

    vision = model.config.vision_config
    encoder = Encoder(processor, (vision.image_size // vision.patch_size) ** 2)
    art.prepare(options.art)
    data = Conversations(
        options.art, "train", options.seed + 1, (options.steps - step) * options.batch_size, encoder,
        start=step * options.batch_size, replies=talk,
    )  # fmt: skip
    data = Subset(data, range(rank, len(data), world))
    pad = processor.tokenizer.pad_token_id
    loader = DataLoader(data, options.batch_size // world, num_workers=1, collate_fn=partial(collate, pad=pad))

    seen: dict[str, torch.Tensor] = {}
    language_model = model.base_model.model.model.language_model
    hook = language_model.register_forward_hook(lambda m, a, output: seen.update(hidden=output.last_hidden_state))
    began, first = time.monotonic(), step
    average = None
    for batch in loader:
        ramp = min(1.0, (step + 1) / 25) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / options.steps)))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * ramp
        model.train()
        model.base_model.model.model.vision_tower.eval()
        loss = answer_loss(model, batch, seen)
        balance = model.base_model.router_aux_loss()
        (loss + ADAPTER_CONFIG["router_aux_loss_coef"] * balance).backward()
        if world > 1:
            average_gradients([*adapter, *connector.parameters()], world)
        nn.utils.clip_grad_norm_([*adapter, *connector.parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        average = loss.item() if average is None else 0.9 * average + 0.1 * loss.item()
        if rank > 0:
            continue
        if step % 10 == 0 or step == options.steps:
            pace = (step - first) / (time.monotonic() - began)
            row = {"step": step, "pictures/s": round(pace * options.batch_size, 2)}
            row |= {"minutes left": round((options.steps - step) / pace / 60, 1)}
            row |= {"loss": round(average, 4), "balance": round(balance.item(), 3)}
            print(row, flush=True)
            with (options.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
        if step % 50 == 0 or step == options.steps:
            save()
    hook.remove()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
