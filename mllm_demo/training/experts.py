"""Whether the experts of a model have learned different work, in what they are chosen for and in what they do.

    python -m mllm_demo.training.experts --items 24

For every router the mutual information between a question's task and the chosen expert, with a permutation test; then
for every task the change of every task's loss when the experts that it prefers may not be chosen anywhere, beside the
change of its own without random other experts: with intervals, from resampling questions, and with a test whether a
mask hurts most the task that it was made for. It knows nothing of how the model was trained.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from mllm_demo.models.loading import LoadedModel
from mllm_demo.routing.controls import masked_experts
from mllm_demo.routing.specialization import belonging, by_task, permutation_test, preferred
from mllm_demo.routing.tap import RoutingTap
from mllm_demo.routing.trace import Token
from mllm_demo.settings import QUANTIZATIONS
from mllm_demo.training.conversations import IGNORED, Encoder, Sample, collate
from mllm_demo.training.evaluate import PACKED, items, unpack
from mllm_demo.training.questions import TASKS
from mllm_demo.training.trained import HELP, load_trained

BATCH = 24
RESAMPLED = 4000
READ = ("input_ids", "attention_mask", "pixel_values")  # what of a batch the model reads


def samples(loaded: LoadedModel, art: Path, split: str, count: int, seed: int) -> tuple[list[Sample], np.ndarray]:
    """`count` held-out questions with their right answers per task, and the task of each, int64 `[items]`."""
    encoder = Encoder(loaded.processor, loaded.model.config.vision_config.side**2)
    made, tasks = [], []
    for number, task in enumerate(TASKS):
        for scene, question in items(art, split, task, count, seed):
            pixels = loaded.processor.image_processor(scene.image, return_tensors="pt").pixel_values[0]
            made.append(encoder.encode([(question.prompt, question.answer)], pixels))
            tasks.append(number)
    return made, np.array(tasks)


def _inputs(loaded: LoadedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(loaded.device) for name, value in batch.items() if name in READ}


@torch.inference_mode()
def choices(loaded: LoadedModel, made: list[Sample], pad: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """How many tokens of each item each expert served, int64 `[items, sites, experts]`, and the sites' names."""
    counts = []
    for sample in tqdm(made, desc="routing", leave=False):
        with RoutingTap(loaded.model) as tap:
            loaded.model(**_inputs(loaded, collate([sample], pad)), use_cache=False)
            # What a token says does not matter here, only which experts served it.
            tokens = [Token(int(i), "", "text", "user", "prefill") for i in sample.input_ids]
            chosen = np.stack(list(tap.trace(tokens).selected_experts.values()))  # (sites, tokens, k)
        experts = max(site.num_experts for site in tap.sites)
        counts.append((chosen[..., None] == np.arange(experts)).sum((1, 2)))
    return np.stack(counts), tuple(site.name for site in tap.sites)


@torch.inference_mode()
def batches_of(loaded: LoadedModel, made: list[Sample], pad: int) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """What the language model reads of `made`, with pictures already looked at, because masks change nothing there, and
    its labels, int64 `[B, T]`: a batch each."""
    base, found = loaded.model.get_base_model(), []
    for start in range(0, len(made), BATCH):
        batch = collate(made[start : start + BATCH], pad)
        inputs = _inputs(loaded, batch)
        embeds = base.get_input_embeddings()(inputs["input_ids"])
        seen = base.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        where = (inputs["input_ids"] == base.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(where, torch.cat(tuple(seen)).to(embeds))
        read = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
        found.append((read, batch["labels"].to(loaded.device)))
    return found


@torch.inference_mode()
def losses(loaded: LoadedModel, batches: list[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> np.ndarray:
    """Mean cross entropy of each item's answer tokens, float64 `[items]`."""
    found = []
    for read, labels in batches:
        answered = (labels != IGNORED).any(0).nonzero()[:, 0]  # where any answer stands: the rest needs no logits
        logits = loaded.model(**read, use_cache=False, logits_to_keep=answered).logits
        labels = labels[:, answered]
        each = functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        found.append(each.sum(1) / (labels != IGNORED).sum(1))
    return torch.cat(found).double().cpu().numpy()


def interval(differences: list[np.ndarray], seed: int) -> list[float]:
    """Mean of `differences`, `[items]` for each task, and the ends of its 95 % interval: items resampled in each."""
    differences = np.stack(differences)
    drawn = np.random.default_rng(seed).integers(0, differences.shape[1], (RESAMPLED, *differences.shape))
    spread = np.take_along_axis(differences[None], drawn, 2).mean((1, 2))
    return [round(float(value), 4) for value in (differences.mean(), *np.quantile(spread, (0.025, 0.975)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=24, help="questions per task")
    parser.add_argument("--split", default="held-out")
    parser.add_argument("--bundle", type=Path, help=HELP)
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="nf4")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--controls", type=int, default=3, help="random masks that each preferred mask is held against")
    parser.add_argument("--permutations", type=int, default=500)
    parser.add_argument("--art", type=Path, default=Path("runs/art"))
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    loaded = load_trained(options.quantization, options.bundle)
    if options.quantization in PACKED:
        unpack(loaded)
    pad = loaded.processor.tokenizer.pad_token_id
    made, tasks = samples(loaded, options.art, options.split, options.items, options.seed)
    counts, sites = choices(loaded, made, pad)
    found = permutation_test(counts, tasks, options.permutations, options.seed)
    print("router: information in bits (expected by chance), p")
    for name, bits, p, chance in zip(sites, found.information, found.p_value, found.expected, strict=True):
        print(f"{name}: {bits:.3f} ({chance:.3f}), p = {p:.3f}", flush=True)

    rng, experts = np.random.default_rng(options.seed), counts.shape[-1]
    favourite = preferred(counts, tasks)  # (tasks, sites)
    each = options.items  # of every task, one task after the other
    answered = [batches_of(loaded, made[start : start + each], pad) for start in range(0, len(made), each)]
    every = sum(answered, [])
    plain = losses(loaded, every).reshape(len(TASKS), -1)

    def change(mask: np.ndarray, batches: list, before: np.ndarray) -> np.ndarray:
        with masked_experts(loaded.model, {site: [int(e)] for site, e in zip(sites, mask, strict=True)}):
            return losses(loaded, batches).reshape(before.shape) - before

    table, damage, beyond = [], [], []
    for number, task in enumerate(TASKS):
        own = change(favourite[number], every, plain)  # (tasks, items)
        shifts = rng.integers(1, experts, (options.controls, len(sites)))
        masks = (favourite[number] + shifts) % experts
        control = np.mean([change(mask, answered[number], plain[number]) for mask in masks], axis=0)
        damage.append(own.mean(1))
        beyond.append(own[number] - control)
        row = {"task": task, "loss": plain[number].mean(), "masked": own.mean(1).tolist()}
        row |= {"random others": control.mean(), "beyond": interval(beyond[-1:], options.seed)}
        table.append(row)
        print(
            f"{task:12} loss {row['loss']:.3f}; without its preferred experts {own[number].mean():+.3f} "
            f"(other tasks {np.delete(own, number, axis=0).mean():+.3f}), without random others {control.mean():+.3f}; "
            "{:+.3f} between them ({:+.3f} to {:+.3f})".format(*row["beyond"]),
            flush=True,
        )
    whole = interval(beyond, options.seed)
    gap, p_value = belonging(np.array(damage), seed=options.seed)
    print("all tasks, preferred against random others: {:+.3f} ({:+.3f} to {:+.3f})".format(*whole))
    print(f"a task's own mask against other tasks' masks: {gap:+.3f}, p = {p_value:.4f}")
    if options.out:
        report = {"sites": sites, "information": found.information.tolist(), "p": found.p_value.tolist()}
        table_of = by_task(counts, tasks)
        report["shares"] = (table_of / table_of.sum(-1, keepdims=True)).round(4).tolist()  # (sites, tasks, experts)
        report |= {"expected": found.expected.tolist(), "masking": table, "items": options.items}
        report |= {"beyond random others": whole, "own mask": {"gap": gap, "p": p_value}, "controls": options.controls}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
