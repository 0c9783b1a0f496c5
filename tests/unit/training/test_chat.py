"""The adapter learns to answer, and to go on speaking as its language model does."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaModel

from mllm_demo.training import adapted, chat
from mllm_demo.training.adapters import single_lora
from mllm_demo.training.concepts import CellTargets
from mllm_demo.training.conversations import IGNORED, Sample, collate
from mllm_demo.training.placing import COMPARED, NOWHERE, UNKNOWN, PlaceHead
from mllm_demo.training.tower import DENSE
from tests.unit.training.test_adapters import tiny


class Tiny(nn.Module):
    """A language model inside what a vision-language model is made of, without the parts that see."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = tiny()
        self.model = nn.Module()
        self.model.language_model = LlamaModel(self.config)
        self.head = nn.Linear(48, 32, bias=False)

    def get_input_embeddings(self):
        return self.model.language_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.head

    def prepare_inputs_for_generation(self):
        """PEFT asks for it."""

    def forward(self, inputs_embeds, attention_mask, position_ids=None, **others):
        return self.model.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids
        )


def sample(turns: list[int], talk: list[int]) -> Sample:
    ids = torch.tensor(turns + talk)
    nowhere = torch.tensor([NOWHERE] * len(ids))
    labels = torch.full_like(ids, IGNORED)
    return Sample(ids, labels, torch.zeros(len(ids)), None, nowhere, talk=torch.tensor(talk) if talk else None)


def said(model, ids: list[int]) -> torch.Tensor:
    """Logarithms of what follows on every token, read one sequence at a time."""
    with torch.no_grad():
        embeds = model.get_input_embeddings()(torch.tensor([ids]))
        states = model(inputs_embeds=embeds, attention_mask=torch.ones(1, len(ids))).last_hidden_state[0]
        return model.get_output_embeddings()(states).log_softmax(-1)


@pytest.mark.parametrize("trained", [False, True])
def test_talk_after_a_picture_is_held_against_what_the_language_model_says_to_it_alone(monkeypatch, trained):
    monkeypatch.setattr(adapted, "PLACED", 0)
    model = single_lora(Tiny()).eval()
    for name, parameter in model.named_parameters():
        if trained and "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    turns, talk, longer = [3, 9, 4, 11, 7], [2, 5, 6], [8, 1, 12, 30, 2]
    batch = collate([sample(turns, talk), sample(turns, []), sample(turns[:2], longer)], pad=0)
    with torch.no_grad():
        found = chat.losses_of(model, PlaceHead(48), None, batch)["talk"]
    base = Tiny()
    apart = [
        functional.kl_div(said(model, turns[:many] + ids)[many:], said(base, ids), log_target=True, reduction="sum")
        for many, ids in ((5, talk), (2, longer))
    ]
    assert torch.allclose(found, sum(apart) / 8, atol=1e-5) and found > 1e-3
    with torch.no_grad():
        kept = chat.losses_of(model, PlaceHead(48), None, collate([sample([], talk)], pad=0))["talk"]
    assert (kept > 1e-3) == trained  # nothing stands before it: only the adapter can change what is said


def test_the_lesson_of_the_middle_tells_of_places_as_the_whole_does_without_what_stands_above(monkeypatch):
    monkeypatch.setattr(adapted, "PLACED", 0)
    model = single_lora(Tiny()).eval()
    monkeypatch.setattr(chat, "see", lambda model, pixels: None)
    there = sample([3, 9, 4, 11, 7], [])
    there.places[2] = torch.tensor((1, 2, 3, 4, 5, UNKNOWN, COMPARED))
    batch, head = collate([there], pad=0) | {"pixel_values": None}, PlaceHead(48)
    with torch.no_grad():
        whole = chat.losses_of(model, head, None, collate([there], pad=0))
        layers = adapted.parts_of(model).language_model.layers
        adapted.parts_of(model).language_model.layers = layers[:1]
        lesson = chat.losses_of_middle(model, head, batch)
    assert lesson["extremes"] > 0 and len(layers) > 1
    assert all(torch.equal(value, whole[name]) for name, value in lesson.items())


@pytest.mark.parametrize("learned", [False, True])
def test_heads_learn_what_tokens_tell_only_where_tokens_are_learned(monkeypatch, learned):
    monkeypatch.setattr(adapted, "PLACED", 0)
    model = single_lora(Tiny()).eval()
    model.config.image_token_id = 9
    monkeypatch.setattr(chat, "see", lambda model, pixels: torch.ones(1, 48, requires_grad=learned))
    batch = collate([sample([3, 9, 4], [])], pad=0) | {"pixel_values": None}
    batch |= dict.fromkeys(CellTargets._fields)
    asked = []

    def cell_heads(tokens, target):
        asked.append(tokens)
        return {name: tokens.mean() for name in DENSE}

    losses = chat.losses_of(model, PlaceHead(48), cell_heads, batch)
    assert ("tokens" in losses) == (len(asked) == 1) == learned
    if learned:
        assert losses["tokens"].item() == pytest.approx(sum(DENSE.values()))
