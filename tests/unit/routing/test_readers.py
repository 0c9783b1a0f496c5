"""Any router type can be read: whoever brings one registers how, and the tap hears it like every other."""

import pytest
import torch
from torch import nn

from mllm_demo.routing.readers import RouterReader, Routing, listeners, register
from mllm_demo.routing.tap import RoutingTap
from mllm_demo.routing.trace import Site, Token


class Gate(nn.Linear):
    """Three experts, one chosen."""


class NarrowGate(Gate):
    """The same, read in another way."""


class Block(nn.Module):
    def __init__(self, gate: type[Gate]):
        super().__init__()
        self.gate = gate(4, 3)

    def forward(self, inputs_embeds):
        return self.gate(inputs_embeds)


class Model(nn.Module):
    def __init__(self, *gates: type[Gate]):
        super().__init__()
        self.layers = nn.ModuleList(Block(gate) for gate in gates)

    def forward(self, inputs_embeds):
        for layer in self.layers:
            layer(inputs_embeds)


def site(path, module, root):
    return Site(path, int(path.split(".")[1]), "mlp", 3, 1)


def read(module, args, kwargs, output):
    probs = output.softmax(-1)
    weights, selected = probs.max(-1, keepdim=True)
    return Routing(probs, selected, weights)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register(RouterReader(Gate, site, read))


def test_a_registered_router_is_heard_at_every_position():
    torch.manual_seed(0)
    model, x = Model(Gate, Gate), torch.randn(1, 5, 4)
    with RoutingTap(model) as tap, torch.no_grad():
        model(x)
        trace = tap.trace([Token(n, "x", "text", "user", "prefill") for n in range(5)])
        expected = model.layers[1].gate(x)[0].softmax(-1)
    assert [site.name for site in trace.sites] == ["layers.0.gate", "layers.1.gate"]
    # 1e-3: half precision keeps 11 bits of a probability.
    assert torch.allclose(torch.tensor(trace.router_probs["layers.1.gate"].copy()).float(), expected, atol=1e-3)
    assert (trace.selected_experts["layers.1.gate"][:, 0] == expected.argmax(-1).numpy()).all()


def test_the_most_derived_reader_wins_and_may_leave_a_router_out():
    model = Model(Gate, NarrowGate)
    assert len(listeners(model)) == 2
    register(RouterReader(NarrowGate, lambda *_: None, read))
    assert [listener.site.name for listener in listeners(model)] == ["layers.0.gate"]


def test_what_nobody_registered_is_no_router():
    assert listeners(nn.Sequential(nn.Linear(4, 3))) == []
