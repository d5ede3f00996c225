"""How the model is run inside an attack, and attacks that end early: the same promises, for less work."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from packaging.version import Version
from support.attacks import ATTACK_CASES
from support.modules import Nasty, Snapshot, batch, classifier
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_wdefense.attacks import FGSM, PGD, Execution, ThreatModel
from lightning_wdefense.modules import execution
from lightning_wdefense.modules.recording import ForwardRecorder
from lightning_wdefense.modules.state.isolation import isolated

compiles = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.5"),
    reason="PyTorch 2.4 cannot compile functional_call: models run partly or wholly eager",
)
THREAT = ThreatModel(eps=0.1)
ATTACK = PGD(THREAT, steps=3)
BF16, COMPILED = Execution(precision="bf16"), Execution(compile=True)
GRAPH = Execution(graph=True)
EVERYTHING = Execution("bf16", channels_last=True, compile=True)
EXECUTIONS = {
    "bf16": BF16,
    "channels_last": Execution(channels_last=True),
    "compile": COMPILED,
    "graph": GRAPH,
    "all": EVERYTHING,
}
executions = pytest.mark.parametrize("how", EXECUTIONS.values(), ids=EXECUTIONS)


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """Quick to compile with, and it differentiates ahead of time as the default one does."""
    monkeypatch.setattr(execution, "BACKEND", "aot_eager")
    torch.compiler.reset()


def convolutional() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), classifier(8, 6, 6)).train()


def images(n: int = 8):
    return batch(3, 8, 8, model=convolutional().eval(), n=n)


def recorded(model: nn.Module) -> list[dict[str, object]]:
    """What the attack's passes ran in."""
    seen: list[dict[str, object]] = []

    def hook(module, args, outputs):
        layout = args[0].is_contiguous(memory_format=torch.channels_last)
        seen.append({"dtype": outputs.dtype, "channels_last": layout, "samples": len(args[0])})

    model.register_forward_hook(hook)
    return seen


# --- what is computed


@pytest.mark.parametrize("case", ATTACK_CASES.values(), ids=ATTACK_CASES)
def test_nothing_asked_for_is_nothing_changed(case):
    inputs, labels = images()
    expected = case(THREAT)(convolutional(), inputs, labels)
    assert torch.equal(case(THREAT)(convolutional(), inputs, labels, execution=Execution()), expected)


# Compilation takes seconds: the quick tests have an attack of each kind in one of the two executions that compile.
QUICK = [
    ("linf", "pgd", "compile"),
    ("l2", "pgd-early-exit", "compile"),
    ("linf", "torchattacks-pgd", "compile"),
    ("l2", "pgd-kl", "all"),
    ("linf", "pgd-restarts", "all"),
]
LEGAL = [
    pytest.param(norm, name, how, marks=pytest.mark.slow if slow else ())
    for norm in ("linf", "l2")
    for name in ("fgsm", "pgd", "pgd-restarts", "pgd-early-exit", "pgd-kl", "torchattacks-pgd")
    for how in EXECUTIONS
    for slow in [EXECUTIONS[how].compile and (norm, name, how) not in QUICK]
]


@pytest.mark.parametrize(("norm", "name", "how"), LEGAL)
def test_results_are_legal_and_inputs_like(norm, name, how):
    threat = ThreatModel(norm=norm, eps=0.1 if norm == "linf" else 0.5, mean=0.4, std=0.3)
    data, labels = images()
    inputs = threat.to_model(data)
    model = convolutional()
    adversarial = ATTACK_CASES[name](threat)(model, inputs, labels, execution=EXECUTIONS[how])
    assert adversarial.dtype == torch.float32
    assert adversarial.stride() == inputs.stride()
    moved = threat.to_data(adversarial)
    assert moved.min() >= -1e-6
    assert moved.max() <= 1 + 1e-6
    assert 1e-3 < threat.ball.length(moved - data).max() <= threat.eps + 1e-6


@executions
def test_nearly_as_strong(digits_cnn, how):
    """The robust model loses as many of 300 digits, to within 2%: bf16 flips some signs of small gradients."""
    _, model, inputs, labels = digits_cnn
    inputs, labels = inputs[:300], labels[:300]
    attack = PGD(ThreatModel(eps=0.2), steps=10)
    left = [
        (model(attack(model, inputs, labels, execution=each)).argmax(1) == labels).float().mean().item()
        for each in (None, how)
    ]
    assert 0.2 < left[0] < 0.9, "too easy or too hard to show anything"
    assert left[1] == pytest.approx(left[0], abs=0.02)


def test_passes_run_as_told():
    inputs, labels = images()
    for how in (BF16, Execution(channels_last=True), Execution()):
        seen = recorded(model := convolutional())
        ATTACK(model, inputs, labels, execution=how)
        assert len(seen) == 3
        for each in seen:
            assert each["dtype"] == (torch.bfloat16 if how.precision else torch.float32)
            assert each["channels_last"] == how.channels_last


def test_channels_last_is_for_images_alone():
    inputs, labels = batch(6)
    how = Execution(channels_last=True)
    assert torch.equal(ATTACK(classifier(6), inputs, labels, execution=how), ATTACK(classifier(6), inputs, labels))


@pytest.mark.parametrize("outer", [torch.float16, torch.bfloat16])
def test_inside_autocast(outer):
    """bf16 wins over what surrounds it, and what surrounds it is back afterwards."""
    inputs, labels = images()
    expected = ATTACK(convolutional(), inputs, labels, execution=BF16)
    with torch.autocast("cpu", outer):
        got = ATTACK(convolutional(), inputs, labels, execution=BF16)
        assert torch.get_autocast_dtype("cpu") == outer
        seen = recorded(model := convolutional())
        ATTACK(model, inputs, labels, execution=Execution(channels_last=True))
        assert {each["dtype"] for each in seen} == {outer}
    assert torch.equal(got, expected)


class Counting(TorchDispatchMode):
    """Which gradients the convolutions' backward passes compute."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", [Execution(), pytest.param(COMPILED, marks=compiles)], ids=["eager", "compiled"])
def test_gradients_of_weights_are_not_computed(how):
    inputs, labels = images()
    model = convolutional()
    ATTACK(model, inputs, labels, execution=how)
    with Counting() as counted:
        ATTACK(model, inputs, labels, execution=how)
    assert counted.masks == 3 * [[True, False, False]]


# --- the model is left as it was


@executions
def test_the_model_is_left_as_it_was_also_without_gradients(how):
    inputs, labels = images()
    model = convolutional()
    snapshot, attributes = Snapshot(model), [set(vars(module)) for module in model.modules()]
    layouts = [parameter.stride() for parameter in model.parameters()]
    expected = ATTACK(model, inputs, labels, execution=how)
    snapshot.check()
    with torch.inference_mode():
        got = ATTACK(model, inputs.clone(), labels.clone(), execution=how)
    assert torch.equal(got, expected)
    assert not got.is_inference()
    snapshot.check()
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert [parameter.stride() for parameter in model.parameters()] == layouts
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    model(inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_nasty_module_in_bf16():
    model, inputs = Nasty(36), torch.rand(8, 1, 6, 6)
    snapshot = Snapshot(model)
    ATTACK(model, inputs, torch.arange(8) % 5, execution=BF16)
    snapshot.check()


@executions
def test_recorders_do_not_see_the_attack(how):
    inputs, labels = images()
    model = convolutional().eval()
    recorder = ForwardRecorder(model, features="penultimate")
    recorder.attach(inputs)
    with recorder.recording() as seen:
        model(inputs)
        ATTACK(model, inputs, labels, execution=how)
        model(inputs)
    assert len(seen.outputs) == len(seen.features) == 2
    with isolated(model, inputs.device), recorder.recording() as seen:
        ATTACK(model, inputs, labels, execution=how)
    assert not seen.outputs


# --- compiling


@pytest.fixture
def compilations(monkeypatch):
    """Graphs that were compiled."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(execution, "BACKEND", backend)
    return graphs


@compiles
def test_compiled_once(compilations):
    inputs, labels = images()
    model = convolutional()
    ATTACK(model, inputs, labels, execution=COMPILED)
    assert len(compilations) == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    halved = copy.deepcopy(model)
    for attack in (ATTACK, ATTACK.with_eps(0.05), FGSM(THREAT)):
        got = attack(model, inputs, labels, execution=COMPILED)
        assert torch.equal(got, attack(halved, inputs, labels)), "the weights of today, not those that were compiled"
    assert len(compilations) == 1
    for seed in range(9):  # more than torch.compile's limit of compilations of one function
        ATTACK(nn.Sequential(classifier(3, 8, 8, classes=5 + seed)), inputs, labels, execution=COMPILED)
    assert len(compilations) == 10


def test_a_compiled_form_does_not_outlive_its_module(compilations):
    inputs, labels = images()
    model = convolutional()
    ATTACK(model, inputs, labels, execution=COMPILED)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_tied_weights(compilations):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    inputs, labels = torch.rand(4, 6), torch.arange(4)
    model = Tied()
    assert torch.equal(ATTACK(model, inputs, labels, execution=COMPILED), ATTACK(model, inputs, labels))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_is_compiled_already_runs_as_it_is(compilations):
    inputs, labels = batch(6)
    expected = ATTACK(classifier(6), inputs, labels)
    in_place = classifier(6)
    in_place.compile(backend="eager")
    for model in (torch.compile(classifier(6), backend="eager"), in_place, torch.jit.script(classifier(6))):
        assert torch.equal(ATTACK(model, inputs, labels, execution=COMPILED), expected)
    assert not compilations


def test_mistakes():
    inputs, labels = batch(6)
    with pytest.raises(ValueError, match=r"no precision 'bf15'. Did you mean 'bf16'"):
        Execution(precision="bf15")
    with pytest.raises(TypeError, match=r"compile=True needs an nn.Module, got function"):
        ATTACK(lambda x: classifier(6)(x), inputs, labels, execution=COMPILED)
    with pytest.raises(ValueError, match="does not support 'meta' devices"):
        ATTACK(classifier(6), inputs.to("meta"), labels, execution=BF16)


# --- early exit


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_early_exit_leaves_each_sample_where_it_is_first_wrong(loss, norm):
    """Beside the trajectory of the same attack without it."""
    model = classifier(6)
    inputs, labels = batch(6, n=64)
    labels[:8] = (labels[:8] + 1) % 5
    threat = ThreatModel(norm=norm, eps=0.15 if norm == "linf" else 0.4)

    def path(steps, early_exit):
        attack = PGD(threat, steps, step_size=0.04, random_start=False, loss=loss, early_exit=early_exit)
        return attack(model, inputs, labels)

    trajectory = [inputs, *(path(steps, False) for steps in range(1, 6))]
    wrong = torch.stack([model(point).argmax(1) != labels for point in trajectory])
    first = torch.where(wrong.any(0), wrong.int().argmax(0), 5)
    expected = torch.stack(trajectory)[first, torch.arange(64)]
    got = path(5, True)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    assert torch.equal(got[:8], inputs[:8]), "those that are wrong already are not touched"
    assert (model(got).argmax(1) != labels)[wrong.any(0)].all()
    assert 0.2 < wrong.any(0).float().mean() < 0.9, "too easy or too hard to show anything"


def test_early_exit_runs_the_model_on_fewer_samples():
    inputs, labels = batch(6, n=64)
    labels[:32] = (labels[:32] + 1) % 5
    seen = recorded(model := classifier(6))
    PGD(THREAT, steps=4, random_start=False, early_exit=True)(model, inputs, labels)
    samples = [each["samples"] for each in seen]
    assert samples[:2] == [64, 32]
    assert sorted(samples, reverse=True) == samples
    assert len(samples) <= 4, "no passes beside those of the gradients"


def test_early_exit_of_all_samples_ends_the_attack():
    inputs, labels = batch(6)
    seen = recorded(model := classifier(6))
    attack = PGD(THREAT, random_start=False, early_exit=True)
    adversarial = attack(model, inputs, (labels + 1) % 5)
    assert torch.equal(adversarial, inputs)
    assert len(seen) == 1


def test_early_exit_with_restarts_and_soft_labels():
    model = classifier(20, scale=6.0)
    inputs, labels = batch(20, model=model, n=64)
    soft = nn.functional.one_hot(labels, 5).float()
    one, many = (PGD(THREAT, 2, restarts=restarts, early_exit=True)(model, inputs, soft) for restarts in (1, 6))
    right_one, right_many = (model(found).argmax(1) == labels for found in (one, many))
    assert not (right_many & ~right_one).any()
    assert right_many.sum() < right_one.sum()
