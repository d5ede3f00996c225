"""Gradients by graphs: when one is recorded, that it is taken only where it is right, and on a GPU that it computes the same."""

from __future__ import annotations

import copy
import functools
import gc
import random
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.lightning_modules import DigitsClassifier, digits_loaders, quiet_trainer
from support.modules import Snapshot, batch, classifier
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_wdefense import Recipe, WassersteinDefense
from lightning_wdefense.attacks import FGSM, PGD, Execution, LagrangianAttack, ThreatModel
from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.modules import execution, graphs

THREAT = ThreatModel(eps=0.1)
ATTACK = PGD(THREAT, steps=4)
GRAPH = Execution(graph=True)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def convolutional() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), classifier(8, 6, 6)).train()


def images(n: int = 8) -> tuple[Tensor, Tensor]:
    return batch(3, 8, 8, model=convolutional().eval(), n=n)


class Wrapped(nn.Module):
    """A classifier and something around it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = classifier(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Recordings(list):
    """Computations that were recorded, by stand-ins that do them eagerly; ``replays`` counts."""

    replays = 0

    def __call__(self, compute: Callable[[], Tensor], device: torch.device):
        result = compute().clone()
        self.append(compute)

        def replay() -> None:
            self.replays += 1
            result.copy_(compute())

        return replay, result


@pytest.fixture
def recordings(monkeypatch):
    """Graphs on a CPU."""
    found = Recordings()
    monkeypatch.setattr(execution, "DEVICES", {"cpu"})
    monkeypatch.setattr(graphs, "record", found)
    return found


def kept(model: nn.Module) -> int:
    """How many graphs are kept of a module."""
    return len(graphs._kept_with(model).graphs)


# --- when a graph is recorded, and when it is taken


@pytest.mark.parametrize(
    "attack",
    [
        ATTACK,
        PGD(ThreatModel(norm="l2", eps=0.5, mean=0.4, std=0.3), steps=4, loss="margin"),
        PGD(THREAT, steps=4, random_start="gaussian", loss="kl"),
        LagrangianAttack(THREAT, steps=4),
    ],
    ids=["ce", "margin", "kl", "lagrangian"],
)
@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_second_attack_is_recorded_and_all_are_the_same(recordings, attack, precision, channels_last):
    how = {"precision": precision, "channels_last": channels_last}
    model = convolutional()
    snapshot = Snapshot(model)
    replays = []
    for seed in range(4):
        inputs, labels = batch(3, 8, 8, model=convolutional().eval(), seed=seed)
        inputs = attack.threat.to_model(inputs)
        expected = attack(model, inputs, labels, execution=Execution(**how))
        assert torch.equal(attack(model, inputs, labels, execution=Execution(**how, graph=True)), expected)
        replays.append(recordings.replays)
    assert len(recordings) == 1
    assert replays == [0, 3, 6, 9], "all steps but the first, which checks"
    snapshot.check()


def test_the_weights_are_those_of_today(recordings):
    inputs, labels = images()
    model = convolutional()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        expected = ATTACK(copy.deepcopy(model), inputs, labels)
        assert torch.equal(ATTACK(model, inputs, labels, execution=GRAPH), expected)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    assert len(recordings) == 1


class InTurns(PGD):
    """An attack with other labels at every step."""

    def perturb(self, problem: Problem) -> Tensor:
        data = problem.data
        for step in range(4):
            turned = replace(problem, labels=(problem.labels + step) % 5)
            data = self._move(problem, data, turned.gradient(data, "ce", check=step == 0))
        return data


def test_labels_that_change_within_an_attack(recordings):
    model, (inputs, labels) = convolutional(), images()
    expected = InTurns(THREAT)(model, inputs, labels)
    for _ in range(3):
        assert torch.equal(InTurns(THREAT)(model, inputs, labels, execution=GRAPH), expected)
    assert recordings.replays == 6


def test_odd_last_batches_are_not_recorded(recordings):
    model = classifier(6)
    inputs, labels = batch(6)
    for size in 2 * [*[8] * graphs.RECENT_CALLS, 5]:
        ATTACK(model, inputs[:size], labels[:size], execution=GRAPH)
    assert len(recordings) == 1


def test_as_many_as_are_kept(recordings):
    model = classifier(6)
    inputs, labels = batch(6, n=12)
    for size in range(3, 11):
        for _ in range(2):
            ATTACK(model, inputs[:size], labels[:size], execution=GRAPH)
        assert kept(model) <= graphs.MAX_GRAPHS
    assert len(recordings) == 8
    ATTACK(model, inputs[:10], labels[:10], execution=GRAPH)
    assert len(recordings) == 8
    assert kept(model) == graphs.MAX_GRAPHS


def test_what_differs_has_a_graph_of_its_own(recordings):
    """Loss, units, precision, layout, labels: each is right, whatever else is kept."""
    model, (inputs, labels) = convolutional(), images()
    soft = nn.functional.one_hot(labels, 5).float()
    variants = [
        (ATTACK, labels, Execution()),
        (ATTACK, soft, Execution()),
        (ATTACK, labels, Execution(channels_last=True)),
        (ATTACK, labels, Execution(precision="bf16")),
        (PGD(THREAT, 4, loss="margin"), labels, Execution()),
        (PGD(ThreatModel(eps=0.1, mean=0.1, bounds=None), 4), labels, Execution()),
    ]
    for attack, given, how in variants:
        expected = attack(model, inputs, given, execution=how)
        graph = Execution(how.precision, channels_last=how.channels_last, graph=True)
        for _ in range(3):
            assert torch.equal(attack(model, inputs, given, execution=graph), expected)
    assert len(recordings) == len(variants)


class Tempered(Wrapped):
    temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * self.temperature)


def _replace_parameter(model: nn.Module) -> None:
    with torch.no_grad():
        model.body[1].weight = nn.Parameter(0.5 * model.body[1].weight.flip(0))


def _replace_data(model: nn.Module) -> None:
    model.body[1].weight.data = -model.body[1].weight.detach()


def _hook(model: nn.Module) -> None:
    model.body.register_forward_hook(lambda module, args, output: output.flip(1))


def _attribute(model: nn.Module) -> None:
    model.temperature = -2.0


def _submodule(model: nn.Module) -> None:
    model.body[3] = nn.Hardsigmoid()


def _buffer(model: nn.Module) -> None:
    model.body[2].running_mean = model.body[2].running_mean + 3


@pytest.mark.parametrize("change", [_replace_parameter, _replace_data, _hook, _attribute, _submodule, _buffer])
def test_a_module_that_has_changed_is_recorded_anew(recordings, change):
    inputs, labels = batch(6)
    model = Tempered()
    for _ in range(2):
        before = ATTACK(model, inputs, labels, execution=GRAPH)
    change(model)
    expected = ATTACK(model, inputs, labels)
    assert not torch.equal(before, expected)
    assert torch.equal(ATTACK(model, inputs, labels, execution=GRAPH), expected)
    assert len(recordings) == 1
    assert torch.equal(ATTACK(model, inputs, labels, execution=GRAPH), expected)
    assert len(recordings) == 2


def test_what_runs_without(recordings):
    model = classifier(6)
    inputs, labels = batch(6)
    cases = [
        (PGD(THREAT, 4, loss=lambda outputs, labels: outputs.square()), model, {}),
        (PGD(THREAT, 4, early_exit=True), model, {}),
        (FGSM(THREAT), model, {}),
        (ATTACK, model, {"samples": torch.arange(4)}),
        (ATTACK, functools.partial(model), {}),
        (ATTACK, lambda x: model(x), {}),
    ]
    for attack, given, options in cases:
        expected = attack(given, inputs, labels, **options)
        for _ in range(3):
            assert torch.equal(attack(given, inputs, labels, execution=GRAPH, **options), expected)
    with torch.autocast("cpu", torch.float16):
        for _ in range(3):
            ATTACK(model, inputs, labels, execution=GRAPH)
    assert not recordings


def test_restarts_are_replayed_on_the_whole_batch_alone(recordings):
    model = classifier(6)
    inputs, labels = batch(6, n=32)
    attack = PGD(THREAT, steps=3, restarts=3)
    expected = attack(model, inputs, labels)
    for _ in range(3):
        assert torch.equal(attack(model, inputs, labels, execution=GRAPH), expected)
    assert len(recordings) == 1
    assert recordings.replays == 2 * 2


def test_on_another_device_it_changes_nothing():
    model, (inputs, labels) = convolutional(), images()
    expected = ATTACK(model, inputs, labels)
    for _ in range(3):
        assert torch.equal(ATTACK(model, inputs, labels, execution=GRAPH), expected)
    assert model not in graphs._kept


def test_not_with_compile():
    with pytest.raises(ValueError, match="compile=True and graph=True exclude each other"):
        Execution(compile=True, graph=True)


# --- modules of which none is recorded


class Noisy(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + 0.01 * torch.rand_like(x))


class PythonNoise(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + 0.01 * random.random())


class Writing(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.body(x / self.seen)


class Counting(Wrapped):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x)


class Caching(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach() + 1
        return self.body(x)


REASONS = {
    Noisy: "draws random numbers",
    PythonNoise: "draws random numbers",
    Writing: "writes to its own tensors",
    Counting: "calls changes with each pass",
    Caching: "last changes with each pass",
}


@pytest.mark.parametrize("kind", [Noisy, PythonNoise, Writing])
def test_models_that_are_not_the_same_at_each_pass(recordings, kind):
    inputs, labels = batch(6)
    model, twin = kind(), kind()
    snapshot = Snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ATTACK(model, inputs, labels, execution=GRAPH)
        ATTACK(twin, inputs, labels)
    states = torch.get_rng_state(), random.getstate()
    with pytest.warns(UserWarning, match=f"{kind.__name__} cannot be run as a CUDA graph .*{REASONS[kind]}"):
        got = ATTACK(model, inputs, labels, execution=GRAPH)
    assert torch.equal(got, ATTACK(twin, inputs, labels))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = ATTACK(model, inputs, labels, execution=GRAPH)
    assert torch.equal(got, ATTACK(twin, inputs, labels))
    assert not recordings
    snapshot.check()


@pytest.mark.parametrize("kind", REASONS)
def test_why_they_are_not(kind):
    """Said where a pass is looked at."""
    model, (inputs, _) = kind(), batch(6)
    model(inputs)
    with pytest.raises(graphs.UnrecordableError, match=REASONS[kind]):
        graphs.check_recordable(model, lambda: model(inputs), (inputs,))


def test_a_module_that_is_another_at_each_attack_is_named(recordings):
    inputs, labels = batch(6)
    model = Wrapped()

    def attack_in_turns() -> None:
        for step in range(3 * graphs.WARN_AFTER):
            model.progress = step
            ATTACK(model, inputs, labels, execution=GRAPH)

    with pytest.warns(UserWarning, match="Wrapped changes from one attack to the next \\(progress\\)") as seen:
        attack_in_turns()
    assert len([each for each in seen if "graph=True" in str(each.message)]) == 1
    assert not recordings


class Parallel(Wrapped):
    __module__ = "torch.nn.parallel.distributed"


@pytest.mark.parametrize(
    "wrapped", [torch.compile(Wrapped(), backend="eager"), Parallel()], ids=["compiled", "distributed"]
)
def test_wrappers_run_as_they_are(recordings, wrapped):
    inputs, labels = batch(6)
    expected = ATTACK(classifier(6), inputs, labels)
    ATTACK(wrapped, inputs, labels, execution=GRAPH)
    with pytest.warns(UserWarning, match="cannot be run as a CUDA graph"):
        assert torch.equal(ATTACK(wrapped, inputs, labels, execution=GRAPH), expected)
    assert not recordings


def test_a_recording_that_fails(recordings, monkeypatch):
    def fail(compute, device):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphs, "record", fail)
    model, (inputs, labels) = convolutional(), images()
    snapshot = Snapshot(model)
    expected = ATTACK(model, inputs, labels)
    with pytest.warns(UserWarning, match="RuntimeError: operation not permitted when stream is capturing\\)") as seen:
        got = [ATTACK(model, inputs, labels, execution=GRAPH) for _ in range(4)]
    assert all(torch.equal(each, expected) for each in got)
    assert len(seen) == 1
    snapshot.check()


# --- what is read, and what is kept


def test_tensors_from_elsewhere_are_kept_alive():
    model = Wrapped()
    inputs, _ = batch(6)
    elsewhere = torch.ones(6)
    reads = graphs.check_recordable(model, lambda: model(inputs * elsewhere[2:].sum()) + torch.ones(()), (inputs,))
    assert [each is elsewhere for each in reads] == [True]


def test_casts_of_autocast_are_made_inside(recordings):
    """Else the graph would read what the attack's own steps have cast, and lose with its end."""
    model, (inputs, labels) = convolutional(), images()
    how = Execution("bf16", graph=True)
    enabled = []
    model[0].register_forward_hook(lambda *_: enabled.append(torch.is_autocast_cache_enabled()))
    for _ in range(2):
        ATTACK(model, inputs, labels, execution=how)
    assert enabled[: 4 + 1] == [True] * 5
    assert enabled[4 + 1 : 4 + 3] == [False] * 2, "the pass that is looked at, and the one that is recorded"


def test_graphs_do_not_outlive_their_module(recordings, monkeypatch):
    monkeypatch.setattr(graphs, "record", lambda compute, device: (lambda: None, compute()))
    inputs, labels = batch(6)
    model = classifier(6)
    for _ in range(3):
        ATTACK(model, inputs, labels, execution=GRAPH)
    assert kept(model) == 1
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_defense_records_once(recordings):
    """Whatever Lightning and metrics change in the module at every step."""

    class Measured(DigitsClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = MulticlassAccuracy(10)

        def training_step(self, batch, batch_idx):
            self.accuracy(torch.zeros(2, 10), torch.zeros(2, dtype=torch.long))
            self.log("accuracy", self.accuracy)
            return super().training_step(batch, batch_idx)

    recipe = Recipe(PGD(THREAT, steps=3), execution=GRAPH, warmup_epochs=0)
    trainer = quiet_trainer(max_epochs=2, callbacks=[WassersteinDefense(recipe)])
    trainer.fit(Measured(), *digits_loaders())
    assert len(recordings) == 1
    assert recordings.replays > 4


# --- on a GPU


def same(got: Tensor, expected: Tensor) -> bool:
    """But for signs of gradients that are nothing but rounding."""
    return ((got - expected).abs() > 1e-5).float().mean().item() < 0.01


@needs_gpu
@pytest.mark.parametrize("loss", ["ce", "kl", "margin"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "how", [{}, {"precision": "bf16"}, {"precision": "bf16", "channels_last": True}], ids=["plain", "bf16", "layout"]
)
def test_a_gpu_computes_the_same(loss, norm, how):
    threat = ThreatModel(norm=norm, eps=0.1 if norm == "linf" else 0.5, mean=(0.4, 0.5, 0.6), std=0.3)
    attack = PGD(threat, steps=5, random_start="gaussian", loss=loss)
    model = convolutional().cuda()
    snapshot, state = Snapshot(model), torch.cuda.get_rng_state()
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for seed in range(4):
            inputs, labels = batch(3, 8, 8, model=convolutional().eval(), n=32, seed=seed)
            inputs, labels = threat.to_model(inputs.cuda()), labels.cuda()
            expected = attack(model, inputs, labels, execution=Execution(**how))
            got = attack(model, inputs, labels, execution=Execution(**how, graph=True))
            assert same(got, expected)
            assert not same(got, inputs)
            assert kept(model) == (seed > 0)
    assert torch.equal(state, torch.cuda.get_rng_state())
    snapshot.check()


@needs_gpu
def test_a_gpu_runs_no_python():
    model, (inputs, labels) = convolutional().cuda(), (each.cuda() for each in images())
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    for _ in range(2):
        ATTACK(model, inputs, labels, execution=GRAPH)
    passes.clear()
    ATTACK(model, inputs, labels, execution=GRAPH)
    assert len(passes) == 1


@needs_gpu
def test_a_gpu_sees_the_weights_of_today():
    inputs, labels = (each.cuda() for each in images(32))
    model = convolutional().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for how in (Execution(), Execution("bf16")):
        for _ in range(5):
            expected = ATTACK(copy.deepcopy(model), inputs, labels, execution=how)
            got = ATTACK(model, inputs, labels, execution=Execution(how.precision, graph=True))
            assert same(got, expected)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    assert kept(model) == 2
    model.load_state_dict(convolutional().state_dict())
    expected = ATTACK(convolutional().cuda(), inputs, labels)
    assert same(ATTACK(model, inputs, labels, execution=GRAPH), expected)
    model.cpu().cuda()
    with torch.no_grad():
        model[0].weight = nn.Parameter(-model[0].weight)
    expected = ATTACK(copy.deepcopy(model), inputs, labels)
    for _ in range(3):
        torch.rand(1000, 1000, device="cuda")
        assert same(ATTACK(model, inputs, labels, execution=GRAPH), expected)


@needs_gpu
def test_a_gpu_with_odd_batches_restarts_and_steps_of_training():
    inputs, labels = (each.cuda() for each in images(32))
    model = convolutional().cuda()
    attack = PGD(THREAT, steps=3, restarts=2)
    for size in (32, 32, 32, 7, 32):
        expected = attack(model, inputs[:size], labels[:size])
        assert same(attack(model, inputs[:size], labels[:size], execution=GRAPH), expected)
        model(inputs).sum().backward()
    assert kept(model) == 1


@needs_gpu
def test_a_gpu_frees_graphs_with_their_module():
    inputs, labels = (each.cuda() for each in images())
    model = convolutional().cuda()
    for _ in range(3):
        ATTACK(model, inputs, labels, execution=GRAPH)
    assert kept(model) == 1
    alive, graph = weakref.ref(model), weakref.ref(next(iter(graphs._kept_with(model).graphs.values())))
    del model
    gc.collect()
    assert alive() is None
    assert graph() is None
    torch.cuda.synchronize()
    test_a_gpu_runs_no_python()


class Waiting(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * (1.0 if x.max().item() > -9 else 0.0))


class Synchronizing(Wrapped):
    """Its recording fails, if it is not found out before."""

    def forward(self, x: Tensor) -> Tensor:
        torch.cuda.synchronize()
        return self.body(x)


class Hosted(Wrapped):
    """Reads a scalar of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * self.scale)


@needs_gpu
@pytest.mark.parametrize("kind", [Waiting, Hosted, Noisy, Synchronizing])
def test_a_gpu_goes_on_without_what_cannot_be_recorded(kind):
    inputs, labels = (each.cuda() for each in batch(6, n=32))
    model = kind().cuda()
    state = torch.cuda.get_rng_state()
    expected = ATTACK(model, inputs, labels)
    ATTACK(model, inputs, labels, execution=GRAPH)
    with pytest.warns(UserWarning, match="cannot be run as a CUDA graph") as seen:
        got = [ATTACK(model, inputs, labels, execution=GRAPH) for _ in range(3)]
    assert all(same(each, expected) for each in got)
    said = [str(each.message) for each in seen if "CUDA graph" in str(each.message)]
    print(kind.__name__, said)
    assert len(said) == 1
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.equal(state, torch.cuda.get_rng_state())
    # Everything works as before: streams, random numbers, memory, and other graphs.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    nn.functional.dropout(torch.rand(1000, device="cuda", requires_grad=True)).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    test_a_gpu_sees_the_weights_of_today()
