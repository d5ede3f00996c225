"""What is undone, beyond what the contract tests see."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from support.modules import Nasty, Snapshot, batch, classifier
from torch import nn

from lightning_wdefense.attacks import PGD, ThreatModel, worst_case
from lightning_wdefense.attacks.isolation import isolated, module_of

CPU = torch.device("cpu")
ATTACK = PGD(ThreatModel(eps=0.1), steps=2)


def test_modes_are_left_alone_on_request():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout().eval())
    with isolated(model, CPU, evaluation=False):
        assert model.training
        assert not model[1].training
    with isolated(model, CPU):
        assert not model.training
    assert model.training
    assert not model[1].training


def test_nests():
    model, inputs = Nasty(6), torch.rand(4, 6)
    snapshot = Snapshot(model)
    with isolated(model, CPU):
        inner = Snapshot(model)
        ATTACK(model, inputs, torch.arange(4))
        inner.check()
        model(inputs)
    snapshot.check()


def test_an_exception_passes_through():
    model, inputs = Nasty(6), torch.rand(4, 6)
    snapshot = Snapshot(model)

    def body():
        with isolated(model, CPU):
            model(inputs)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        body()
    snapshot.check()


def test_module_of():
    model = nn.Linear(2, 2)
    for callable_ in (model, model.forward, partial(model), partial(partial(model.forward), input=None)):
        assert module_of(callable_) is model
    assert module_of(torch.relu) is None
    assert module_of(lambda x: model(x)) is None
    assert module_of([].append) is None


def test_a_buffer_under_two_names_and_in_two_modules():
    class Shared(nn.Module):
        def __init__(self, tensor):
            super().__init__()
            self.register_buffer("count", tensor)

        def forward(self, x):
            self.count += 1
            return x

    tensor = torch.zeros(1)
    model = nn.Sequential(Shared(tensor), Shared(tensor), classifier(6))
    inputs, labels = batch(6)
    ATTACK(model, inputs, labels)
    assert model[0].count is model[1].count is tensor
    assert tensor == 0


def test_a_written_view_of_a_buffer():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.zeros(4, 3))
            self.net = classifier(6)

        def forward(self, x):
            self.table[1].add_(1)
            return self.net(x)

    model = Views()
    inputs, labels = batch(6)
    ATTACK(model, inputs, labels)
    assert not model.table.any()


def test_an_attack_inside_a_models_forward():
    """As an input purifier or a self-attacking model has it."""

    class Attacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Nasty(6)

        def forward(self, x):
            return self.net(ATTACK(self.net, x, torch.zeros(len(x), dtype=torch.long)).clone())

    model = Attacked()
    snapshot = Snapshot(model.net)
    with torch.no_grad(), isolated(model, CPU):
        model(torch.rand(4, 6))
    snapshot.check()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: nn.utils.parametrizations.spectral_norm(layer),
        lambda layer: nn.utils.parametrizations.orthogonal(layer),
    ],
)
def test_parametrized_layers(wrap):
    model = nn.Sequential(wrap(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 5)).train()
    before, inputs = copy.deepcopy(model.state_dict()), torch.rand(4, 6)
    snapshot = Snapshot(model)
    adversarial = ATTACK(model, inputs, torch.arange(4))
    snapshot.check()
    assert adversarial.shape == (4, 6)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_compiled_model():
    model = classifier(6)
    inputs, labels = batch(6)
    compiled = torch.compile(model.train(), backend="eager")
    snapshot = Snapshot(model)
    got = ATTACK(compiled, inputs, labels)
    snapshot.check()
    assert torch.equal(got, ATTACK(model, inputs, labels))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_model():
    model = torch.jit.script(classifier(6).train())
    inputs, labels = batch(6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adversarial = ATTACK(model, inputs, labels)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(adversarial, ATTACK(classifier(6), inputs, labels))


def test_a_model_that_is_no_module():
    inputs, labels = batch(6)
    weight = torch.randn(6, 5)
    state = torch.get_rng_state()
    ATTACK(lambda x: x @ weight + torch.rand(5), inputs, labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert weight.grad is None


def test_worst_case_of_a_model_that_works_in_place():
    """Its scratch work must not become the inputs that are attacked, nor those that are reported."""
    net = classifier(6)
    inputs, labels = batch(6)

    def model(x):
        return net(x.mul_(2).sub_(1))

    labels = model(inputs.clone()).argmax(1)
    kept = inputs.clone()
    found = worst_case(model, {"pgd": PGD(ThreatModel(eps=0.1))}, inputs, labels)
    assert torch.equal(inputs, kept)
    assert (found.inputs - inputs).abs().max() <= 0.1 + 1e-6
    assert torch.equal(model(found.inputs.clone()).argmax(1), found.adversarial["pgd"])
