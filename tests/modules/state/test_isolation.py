"""What is undone, beyond what the contract tests see."""

from __future__ import annotations

import copy
from collections import deque
from functools import partial

import pytest
import torch
from support.modules import Nasty, Snapshot, batch, classifier
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_wdefense.attacks import PGD, ThreatModel, worst_case
from lightning_wdefense.modules.state.isolation import isolated, module_of

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
    class SharedContext(nn.Module):
        def __init__(self, tensor):
            super().__init__()
            self.register_buffer("count", tensor)

        def forward(self, x):
            self.count += 1
            return x

    tensor = torch.zeros(1)
    model = nn.Sequential(SharedContext(tensor), SharedContext(tensor), classifier(6))
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


class Caching(nn.Module):
    """Keeps tensors in plain attributes, of every kind that forward passes leave behind."""

    def __init__(self):
        super().__init__()
        self.net, self.scale = classifier(6), nn.Parameter(torch.ones(()))
        self.empty, self.last, self.list, self.passes = None, torch.zeros(3), [torch.zeros(2)], 0
        self.nested = {"layers": [(torch.ones(1), 1)], "names": ["a"]}
        self.queue = deque([torch.ones(1)], maxlen=2)
        self.written = torch.zeros(5)

    def forward(self, x):
        outputs = self.scale * self.net(x)
        self.empty, self.last, self.late = outputs, outputs, {"outputs": outputs}
        self.list.append(outputs)
        self.nested["layers"][0] = (outputs, 2)
        self.nested["more"] = outputs
        self.queue.append(outputs)
        self.queue.append(outputs)
        self.written[:] = outputs[0]
        self.passes += 1
        self.nested["names"].append("b")
        return outputs


def test_tensors_in_plain_attributes():
    """They come back themselves, with their values; other attributes are the user's own."""
    model = Caching()
    inputs, labels = batch(6)
    last, first, layer, queued = model.last, model.list[0], model.nested["layers"][0], model.queue[0]
    ATTACK(model, inputs, labels)
    assert model.empty is None
    assert not hasattr(model, "late")
    assert model.last is last
    assert len(model.list) == 1
    assert model.list[0] is first
    assert model.nested.keys() == {"layers", "names"}
    assert model.nested["layers"][0] is layer
    assert len(model.queue) == 1
    assert model.queue[0] is queued
    assert not model.written.any()
    assert not model.written.requires_grad
    copy.deepcopy(model)
    assert model.passes > 0
    assert model.nested["names"][-1] == "b"


def test_a_tensor_in_a_plain_attribute_made_in_inference_mode():
    """As validation leaves it: no graph may save it."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.mask = classifier(6), None

        def forward(self, x):
            if self.mask is None:
                self.mask = torch.full((6,), 0.5)
            return self.net(x * self.mask)

    model = Masked()
    inputs, labels = batch(6)
    expected = ATTACK(Masked(), inputs, labels)
    with torch.inference_mode():
        model(inputs)
        mask = model.mask
        assert torch.equal(ATTACK(model, inputs, labels), expected)
    assert mask.is_inference()
    assert model.mask is mask


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_weights_that_hooks_compute(norm):
    """They are plain attributes: a graph left in one is neither copied nor saved, nor must the user's own graph be lost."""
    net = nn.Sequential(norm(nn.Linear(6, 5)))
    inputs, labels = batch(6)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            loss = net(inputs).sum()
        weight = net[0].weight
        ATTACK(net, inputs, labels)
        assert net[0].weight is weight
        if mode is torch.no_grad:
            copy.deepcopy(net)
    loss.backward()


def test_a_buffer_that_is_written_with_a_graph():
    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = classifier(6)
            self.register_buffer("memory", torch.zeros(5))

        def forward(self, x):
            outputs = self.net(x)
            self.memory.mul_(0.5).add_(outputs.mean(0))
            return outputs + self.memory

    model = Remembering()
    ATTACK(model, *batch(6))
    assert not model.memory.requires_grad
    assert not model.memory.any()
    copy.deepcopy(model)


def test_an_attack_inside_of_cached_parametrizations():
    """The user trains with weights that have a graph, whoever came first."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)))
    inputs, labels = batch(6)
    weight = model[0].parametrizations.weight.original1
    with nn.utils.parametrize.cached():
        with torch.no_grad(), isolated(model, CPU), torch.no_grad():
            model(inputs)  # computed without a graph
        first = model[0].weight
        ATTACK(model, inputs, labels)
        assert model[0].weight is first
        model(inputs).sum().backward()
    assert weight.grad is not None
    assert not nn.utils.parametrize._cache


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    """What the error says to do works."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = classifier(6)

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=reentrant)

    model = Checkpointed()
    inputs, labels = batch(6)
    snapshot = Snapshot(model)
    if reentrant:
        with pytest.raises(RuntimeError, match=r"checkpoint\(\.\.\., use_reentrant=False\)"):
            ATTACK(model, inputs, labels)
    else:
        assert torch.equal(ATTACK(model, inputs, labels), ATTACK(model.net, inputs, labels))
    snapshot.check()
