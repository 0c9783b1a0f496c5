"""Stages I to III: joins the taught tower to the 4-bit language model, on rendered conversations.

    python -m mllm_demo.training.chat --stage 1 --steps 500                # reader and a single LoRA
    python -m mllm_demo.training.chat --stage 2 --steps 100                # experts copied from it, routers balanced
    python -m mllm_demo.training.chat --stage 3 --steps 400                # experts on the full mixture
    python -m mllm_demo.training.chat --stage 3 --middle --init assets/bundled --out runs/middle    # a lesson apart
    python -m mllm_demo.training.chat --stage 3 --export                   # writes the shipped files, or those --to
    python -m mllm_demo.training.chat --stage 3 --init assets/bundled --out runs/more --seed 1  # from what is shipped
    python -m mllm_demo.training.chat --stage 3 --init assets/bundled --out runs/more --export --blend 0.5  # half-way
    torchrun --nproc-per-node 2 -m mllm_demo.training.chat --threads 1 ... # one process a core, gradients averaged

`--experts 1` in stages 2 and 3 goes on with a single LoRA of the same active rank, for comparison. Three of four steps
are made on the language model's weights rounded to NF4, which are shipped, and the fourth on those of 16 bit, so the
adapter learns to live with both.
Beside the adapter learns the reader: the tower's transformer layers and the connector; the convolutions stay as they
are. Loss: on answers, on drifting away from the language model's own speech where there is text alone or talk that
needs no picture, on not knowing where things are in the middle of the language model (see `placing`), on image tokens
from which stage 0's heads can no longer read names, letters, counts, values and ranks, and on unevenly used experts.
Beside every batch of stage 3, `--readings` sequences of `reading` keep what that lesson taught, and count things.
`--middle` is a lesson about charts, most of all about which part is largest or smallest, for the adapter up to the
layer that is asked for places: nothing above it is computed and the reader stays as it is, which takes half the time.
What is said afterwards is stage III's to mend.
Every stage resumes from its own `last.pt`. It knows nothing of evaluation.
"""

import argparse
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset

from mllm_demo.models.bundled.assembly import load_vision
from mllm_demo.models.bundled.weights import ADAPTER, ASSETS, VISION_FILE
from mllm_demo.training import art
from mllm_demo.training.adapted import (
    BALANCE,
    PLACED,
    Rounding,
    export,
    hidden_states,
    missed,
    parts_of,
    quicken,
    reader_of,
    see,
)
from mllm_demo.training.adapters import lora_state, mixture, single_lora
from mllm_demo.training.base import TAUGHT_FILE, build_model, load_taught, read_heads, read_taught
from mllm_demo.training.concepts import CellTargets
from mllm_demo.training.conversations import IGNORED, MIX, Conversations, Encoder, collate
from mllm_demo.training.placing import UNKNOWN, PlaceHead
from mllm_demo.training.reading import BESIDE, readings_to_learn, said
from mllm_demo.training.runs import (
    Masters,
    Run,
    add_flags,
    average_gradients,
    begin,
    cosine,
    leave_processes,
    wait_for_others,
)
from mllm_demo.training.small_talk import talk, texts
from mllm_demo.training.tokens import Letters
from mllm_demo.training.tower import DENSE, DenseHeads, dense_heads

WEIGHTS = {"answers": 1.0, "text": 3.0, "talk": 2.0, "tokens": 0.5, "reading": 1.0}
WEIGHTS |= {"columns": 1.0, "rows": 0.25, "values": 0.5, "counts": 0.5, "extremes": 1.5}  # what the middle tells
PLACE_LR = 2e-3


def folder_of(options, stage: int) -> Path:
    return options.out / ("stage1" if stage == 1 else f"stage{stage}-{options.experts}")


def _end_of(folder: Path) -> dict:
    file = folder / "end.pt"
    if not file.exists():
        raise SystemExit(f"{file} is missing: finish the stage before this one first.")
    end = torch.load(file, weights_only=True)
    if not end.keys() >= {"reader", "adapter", "places", "dense"}:
        raise SystemExit(f"{file} was written by another version of this command: repeat that stage first.")
    return end


def heads_before(options) -> dict[str, dict[str, torch.Tensor]]:
    """State dicts of the heads that go on: "dense" and, but for stage 1, "places"."""
    if options.init:
        return read_heads(options.init)
    if options.stage == 1:
        return {"dense": read_taught(options.tower)["heads"]}
    return _end_of(folder_of(options, options.stage - 1))


def build(options, device: torch.device, rank: int) -> tuple[PeftModel, object, dict[str, tuple[str, ...]]]:
    """The adapted model where the stage before `options.stage` left it, on `device`, its processor, and what its
    language model wrote: "texts" to stand alone, "talk" to follow pictures; nothing for `--middle` and `--export`."""
    model, processor = build_model(options.base)
    model.to(device)
    if rank > 0:
        wait_for_others()
    written = {}
    if not (options.middle or options.export):  # neither has any use for text, which takes minutes to write
        written = {"texts": texts(model, processor, options.base), "talk": talk(model, processor, options.base)}
    if rank == 0:
        wait_for_others()
    if options.init:
        load_vision(model, options.init / VISION_FILE.name)
        model.requires_grad_(False)
        return PeftModel.from_pretrained(model, options.init / ADAPTER.name, is_trainable=True), processor, written
    load_taught(model, read_taught(options.tower))
    if options.stage > 1:
        reader_of(model).load_state_dict(_end_of(folder_of(options, options.stage - 1))["reader"])
    model.requires_grad_(False)
    if options.stage == 1:
        adapted = single_lora(model)
    else:
        adapted = mixture(model, options.experts, _end_of(folder_of(options, 1))["adapter"])
        if options.stage == 3:
            adapted.load_state_dict(_end_of(folder_of(options, 2))["adapter"], strict=False)
    return adapted, processor, written


def alone(model: PeftModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logarithms of what the language model without the adapter says at the tokens of `ids [B, T]` that `mask` names,
    in reading order: `[tokens, vocab]`."""
    with torch.no_grad(), model.disable_adapter():
        hidden = hidden_states(model, {"input_ids": ids, "attention_mask": mask}, None)[0]
        return model.get_output_embeddings()(hidden[mask.bool()]).float().log_softmax(-1)


def places_told(
    place_head: PlaceHead, middle: torch.Tensor, batch: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What `place_head` misses where the hidden states `middle [B, T, hidden]` should know of places."""
    placed = (batch["places"] != UNKNOWN).any(-1)
    return place_head(middle[placed], batch["places"][placed])


def losses_of_middle(
    model: PeftModel, place_head: PlaceHead, batch: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`places_told` alone, of a batch in which every sample has a picture."""
    return places_told(place_head, hidden_states(model, batch, see(model, batch["pixel_values"]))[1], batch)


def losses_of(
    model: PeftModel, place_head: PlaceHead, cell_heads: DenseHeads, batch: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """"answers": mean cross entropy over the tokens of answers, by their `weights`; "text" and "talk": mean
    Kullback-Leibler divergence, over the tokens of text alone and of talk that follows on pictures, of what the model
    says there from what its language model says without the adapter and without a picture; what `place_head` says of
    places; "tokens": what `cell_heads` miss in image tokens, where these are learned."""
    head = model.get_output_embeddings()
    ids, mask, is_text = (batch[name] for name in ("input_ids", "attention_mask", "is_text"))
    kept: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}  # what is wanted, and at which rows, tokens
    if is_text.any():
        read = (mask.bool() & is_text[:, None]).nonzero(as_tuple=True)
        kept["text"] = (alone(model, ids[is_text], mask[is_text]), *read)
    if "talk" in batch:
        places = batch["talk_mask"].bool()
        starts = mask.sum(1)[batch["talkers"]] - places.sum(1)
        rows, columns = places.nonzero(as_tuple=True)
        wanted = alone(model, batch["talk"], batch["talk_mask"])
        kept["talk"] = (wanted, batch["talkers"][rows], starts[rows] + columns)
    tokens = see(model, batch["pixel_values"]) if "pixel_values" in batch else None
    hidden, middle = hidden_states(model, batch, tokens)
    losses = places_told(place_head, middle, batch)
    if tokens is not None and tokens.requires_grad:  # else neither they nor the heads have anything to learn
        told = cell_heads(tokens, CellTargets(*(batch[name] for name in CellTargets._fields)))
        losses["tokens"] = sum(weight * told[name] for name, weight in DENSE.items())
    answered = batch["labels"] != IGNORED
    if answered.any():
        losses["answers"] = missed(head(hidden[answered]).float(), batch)
    for name, (wanted, rows, columns) in kept.items():
        said = head(hidden[rows, columns]).float().log_softmax(-1)
        losses[name] = functional.kl_div(said, wanted, log_target=True, reduction="batchmean")
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("--experts", type=int, default=4)
    add_flags(parser, steps=400, batch_size=8, lr=1.5e-3, every=50, out=Path("runs/chat"))
    parser.add_argument("--reader-lr", type=float, default=3e-4, help="0 leaves tower, connector and heads as they are")
    parser.add_argument("--tower", type=Path, default=TAUGHT_FILE, help="what stage 0 taught")
    parser.add_argument("--init", type=Path, help="go on from a model in the layout of assets/bundled, in stage 3")
    parser.add_argument("--average", type=float, default=0.98, help="how much of the average of weights a step keeps")
    parser.add_argument("--readings", type=int, default=0, help="sequences of `reading` beside every batch of stage 3")
    parser.add_argument("--middle", action="store_true", help="a lesson of charts for the layers that tell places")
    parser.add_argument("--compile", action="store_true", help="a third faster on a CPU with a C++ compiler")
    parser.add_argument("--export", action="store_true", help="only write the shipped files from the last checkpoint")
    parser.add_argument("--blend", type=float, default=1.0, help="of --export: how far from what --init held, 0 to 1")
    parser.add_argument("--to", type=Path, default=ASSETS, help="the folder that --export writes")
    options = parser.parse_args()
    if options.init and options.stage != 3:
        parser.error("--init goes on with a whole model, which is stage 3; leave it out or choose --stage 3.")
    if options.middle and not options.init:
        parser.error("--middle is a lesson for a whole model; say which with --init, and --stage 3.")
    if options.readings and (options.stage != 3 or options.middle):
        parser.error("--readings go with stage 3 and without --middle, which has nothing read out; leave one out.")
    if options.blend != 1.0 and not (options.init and options.export and 0.0 <= options.blend < 1.0):
        parser.error("--blend is a share from 0 to 1 of the way from --init to what --export writes; give all three.")
    rank, world, device = begin(options)

    model, processor, written = build(options, device, rank)
    reader = reader_of(model).requires_grad_(not options.middle and options.reader_lr > 0)
    quicken(model, device, options.compile)
    adapter = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
    place_head = PlaceHead(model.config.text_config.hidden_size).to(device)
    former = heads_before(options)
    cell_heads = dense_heads(model, processor, device, former["dense"])
    if "places" in former:
        place_head.load_state_dict(former["places"])
    masters = Masters([*adapter, *reader.parameters()])
    # What batches of a dozen leave as noise in the weights, an average over the last steps does not have.
    average = AveragedModel(masters.copies, multi_avg_fn=get_ema_multi_avg_fn(options.average))
    initial = [copy.detach().clone() for copy in masters.copies] if options.blend < 1.0 else []
    copies, beside = list(masters.copies), [*place_head.parameters(), *cell_heads.parameters()]
    rates = (options.lr, options.reader_lr, PLACE_LR)
    groups = (copies[: len(adapter)], copies[len(adapter) :], beside)
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], weight_decay=0.0, betas=(0.9, 0.98))
    folder = folder_of(options, options.stage)
    heads = {"places": place_head, "dense": cell_heads}
    parts = {"masters": masters, "average": average, "optimizer": optimizer} | heads
    run = Run(folder, parts, options.steps, options.batch_size, rank)
    if options.export:
        model.float()
        masters.become(average)
        masters.blend(initial, options.blend)
        masters.give_back()
        export(model, {name: head.state_dict() for name, head in heads.items()}, options.to)
        return

    vision = model.config.vision_config
    encoder = Encoder(processor, vision.side**2)
    art.prepare(options.art)
    # Every stage goes on with pictures that no stage before it has drawn.
    data = Conversations(
        options.art, "train", options.seed + options.stage, (options.steps - run.step) * options.batch_size, encoder,
        start=run.step * options.batch_size, mix={"chart": 1.0} if options.middle else MIX, **written,
    )  # fmt: skip
    data = Subset(data, range(rank, len(data), world))
    pad = processor.tokenizer.pad_token_id
    loader = DataLoader(
        data, options.batch_size // world, num_workers=options.workers, collate_fn=partial(collate, pad=pad)
    )  # fmt: skip

    beside_it, letters = repeat(None), None
    if options.readings:
        beside_it = readings_to_learn(options, run, world, encoder, options.readings, BESIDE)
        letters = Letters.of(cell_heads)

    weights = WEIGHTS | {"balance": BALANCE.get(options.stage, 0.0)}
    language_model = parts_of(model).language_model
    rounding, layers = Rounding(language_model), language_model.layers
    if options.middle:
        language_model.layers = layers[: PLACED + 1]
    model.train()
    parts_of(model).vision_tower.eval()
    for batch, readings in zip(loader, beside_it, strict=False):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * cosine(run.step, options.steps, 25)
        rounding.begin(run.step)
        batch = {name: value.to(device) for name, value in batch.items()}
        if options.middle:
            losses = losses_of_middle(model, place_head, batch)
        else:
            read = {}
            if readings is not None:
                readings = {name: value.to(device) for name, value in readings.items()}
                read["reading"] = missed(said(model, letters, cell_heads, readings), readings)
            losses = losses_of(model, place_head, cell_heads, batch) | read
            if options.stage > 1 and options.experts > 1:
                losses["balance"] = model.base_model.router_aux_loss()
        sum(weights[name] * loss for name, loss in losses.items()).backward()
        masters.take_gradients()
        average_gradients([*copies, *beside])
        nn.utils.clip_grad_norm_(copies, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        masters.give_back()
        average.update_parameters(masters.copies)
        run.advance(dict(zip(losses, torch.stack([*losses.values()]).tolist(), strict=True)))
        if run.step % options.every == 0 or run.step == options.steps:
            run.save()
    language_model.layers = layers
    if rank == 0:
        model.float()
        masters.become(average)
        masters.give_back()
        adapter_state = (
            lora_state(model)
            if options.stage == 1
            else {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
        )
        told = {name: head.state_dict() for name, head in heads.items()}
        torch.save({"reader": reader.state_dict(), "adapter": adapter_state} | told, folder / "end.pt")
    leave_processes()


if __name__ == "__main__":
    main()
