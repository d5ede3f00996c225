"""Attacks in several threads at once: what they find and what they leave is the same as one after the other."""

from __future__ import annotations

import _thread
import copy
import multiprocessing
import random
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from support.attacks import ATTACK_CASES
from support.modules import Nasty, Snapshot, batch, classifier
from support.threads import one_core_each, restless
from torch import nn

from lightning_wdefense._frozen import frozen
from lightning_wdefense.attacks import PGD, SinkhornAttack, ThreatModel, get_attack
from lightning_wdefense.defenses import ResidualGenerator
from lightning_wdefense.modules.recording import ForwardRecorder
from lightning_wdefense.modules.state.isolation import eager, isolated

CPU = torch.device("cpu")
LINF = ThreatModel(eps=0.2)
PATIENCE = 20  # seconds until a test that hangs fails

OF_EACH_KIND = {
    "pgd": PGD(LINF, steps=2, restarts=2),
    "sinkhorn": SinkhornAttack(LINF, steps=2, features="penultimate"),
    "wasserstein": ATTACK_CASES["wasserstein-kl"](LINF),
    "apgd-ce": get_attack("apgd-ce", LINF, steps=2),
    "square": get_attack("square", LINF, queries=8),
}


@pytest.fixture(autouse=True)
def _switch_often():
    with restless(1e-4):
        yield


class Slow(nn.Module):
    """Lets other threads in at every pass."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs):
        time.sleep(5e-4)
        return self.net(inputs)


def in_threads(calls):
    """What the calls return, each from a thread of its own; all start at once."""
    start = threading.Barrier(len(calls))

    def run(call):
        start.wait(PATIENCE)
        return call()

    with one_core_each(len(calls)) as pool:
        return list(pool.map(run, calls, timeout=PATIENCE))


def test_each_with_a_model_of_its_own():
    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    models = [Slow(classifier(1, 6, 6, seed=seed)).train() for seed in range(8)]
    data = [batch(1, 6, 6, model=copy.deepcopy(model).eval(), seed=seed) for seed, model in enumerate(models)]

    def everything(index):
        names = [*OF_EACH_KIND][index % 5 :] + [*OF_EACH_KIND][: index % 5]
        return {name: OF_EACH_KIND[name](models[index], *data[index]) for name in names}

    calls = [partial(everything, index) for index in range(8)]
    snapshots = [Snapshot(model) for model in models]
    alone = [call() for call in calls]
    together = in_threads(calls)
    wrong = {name for a, b in zip(alone, together, strict=True) for name in a if not torch.equal(a[name], b[name])}
    assert not wrong
    for snapshot in snapshots:
        snapshot.check()  # also the global random states


@pytest.mark.parametrize("share", ["all", "a submodule"])
def test_a_shared_model(share):
    """Attacked by one thread at a time."""
    net = Slow(nn.Sequential(classifier(6), nn.Dropout(0.5))).train()
    models = [net if share == "all" else nn.Sequential(nn.Identity(), net) for _ in range(4)]
    attack, data = PGD(LINF, steps=3, restarts=2), [batch(6, seed=seed) for seed in range(4)]
    calls = [partial(attack, model, *part) for model, part in zip(models, data, strict=True)]
    snapshot = Snapshot(net)
    alone = [call() for call in calls]
    for expected, found in zip(alone, in_threads(calls), strict=True):
        assert torch.equal(found, expected)
    snapshot.check()


def test_a_shared_nasty_model():
    model, inputs = Nasty(6), torch.rand(4, 6)
    snapshot = Snapshot(model)
    in_threads([partial(PGD(LINF, steps=5), model, inputs, torch.arange(4))] * 4)
    snapshot.check()


def test_models_that_share_nothing_do_not_wait_for_each_other():
    meet = threading.Barrier(4)

    class Meeting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = classifier(6)

        def forward(self, inputs):
            meet.wait(PATIENCE)
            return self.net(inputs)

    inputs, labels = batch(6)
    attack = PGD(LINF, steps=2)
    expected = attack(classifier(6), inputs, labels)
    for found in in_threads([partial(attack, Meeting(), inputs, labels) for _ in range(4)]):
        assert torch.equal(found, expected)


def overlapping(make, during=lambda: None):
    """Two threads, of which the one that came first goes first."""
    both, first_left = threading.Barrier(2), threading.Event()

    def first():
        with make():
            second_may_come.set()
            both.wait(PATIENCE)
            during()
        first_left.set()

    def second():
        second_may_come.wait(PATIENCE)
        during()
        with make():
            both.wait(PATIENCE)
            first_left.wait(PATIENCE)
            during()

    second_may_come = threading.Event()
    in_threads([first, second])


def test_random_states_come_back_with_the_last_thread():
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    snapshot = Snapshot(nn.Identity())
    overlapping(lambda: isolated(nn.Identity(), CPU), lambda: (torch.rand(1), random.random(), np.random.rand()))
    snapshot.check()


def test_compiled_modules_are_compiled_again_after_the_last_thread():
    compiled: list[object] = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    function = torch.compile(lambda x: x + 1, backend=backend)
    during: list[int] = []
    overlapping(eager, lambda: during.append(len(compiled)) or function(torch.rand(2)))
    assert during == [0, 0, 0]
    function(torch.rand(2))
    assert len(compiled) == 1


def test_a_frozen_module_shared_by_threads():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)

    def freeze():
        with frozen(model):
            time.sleep(1e-3)

    in_threads([freeze] * 4)
    assert model.weight.requires_grad
    assert not model.bias.requires_grad


def test_layers_made_in_several_threads_have_the_weights_of_their_seed():
    def make(seed):
        return [ResidualGenerator(20, seed=seed).correction[1].weight for _ in range(20)]

    calls = [partial(make, seed) for seed in range(8)]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for index, found in enumerate(in_threads(calls)):
        assert all(torch.equal(each, ResidualGenerator(20, seed=index).correction[1].weight) for each in found)
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_are_made_without_seeding_the_accelerators(monkeypatch):
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    ResidualGenerator(4, seed=1)
    assert not seeded


def test_only_the_thread_that_records_is_recorded():
    model, inputs = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.rand(4, 3)
    recorder = ForwardRecorder(model, "0")
    recorder.attach(inputs)
    with recorder.recording() as recording:
        mine = model(inputs)
        in_threads([partial(model, inputs)])

        def attacked():
            with isolated(nn.Identity(), CPU):  # must not hide the passes of this one
                inside.set()
                recorded.wait(PATIENCE)

        inside, recorded = threading.Event(), threading.Event()
        thread = threading.Thread(target=attacked)
        thread.start()
        inside.wait(PATIENCE)
        again = model(inputs)
        recorded.set()
        thread.join()
    assert [id(each) for each in recording.outputs] == [id(mine), id(again)]
    assert len(recording.features) == 2


class Mutual(nn.Module):
    """Attacks another model in its own forward pass, once both are in theirs."""

    meet = threading.Barrier(2)

    def __init__(self) -> None:
        super().__init__()
        self.net, self.others = classifier(6), []

    def forward(self, inputs):
        if self.others:
            self.meet.wait(PATIENCE)
            other, self.others = self.others[0], []
            PGD(LINF, steps=1)(other, inputs.detach(), torch.zeros(len(inputs), dtype=torch.long))
        return self.net(inputs)


def test_threads_that_would_wait_for_each_other_forever():
    first, second = Mutual(), Mutual()
    inputs, labels = batch(6)

    def attack(model):
        try:
            return PGD(LINF, steps=1)(model, inputs, labels)
        except RuntimeError as error:
            return str(error)

    def attack_both(models):
        return [each for each in in_threads([partial(attack, model) for model in models]) if isinstance(each, str)]

    first.others, second.others = [second], [first]
    (message,) = attack_both([first, second])
    assert "Give each thread a copy of the model (copy.deepcopy)" in message
    first.others, second.others = [second], [first]
    assert not attack_both(copy.deepcopy(model) for model in (first, second))


def test_an_attack_in_a_backward_pass_of_another_thread(monkeypatch):
    """As checkpointing on accelerators has it: the passes that it makes again run in threads that PyTorch made."""
    model, done = classifier(6), threading.Event()
    inputs, labels = batch(6)
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 0)

    def worker():
        PGD(LINF, steps=1)(model, inputs, labels)
        done.set()

    with isolated(model, CPU):
        _thread.start_new_thread(worker, ())
        assert done.wait(PATIENCE), "the worker waits for the thread that waits for it"


@pytest.mark.skipif(not hasattr(multiprocessing, "get_context") or sys.platform == "win32", reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_process_forked_while_another_thread_attacks():
    """As the workers of a dataloader are."""
    model = classifier(6)
    torch.manual_seed(0)

    def child():
        state = torch.get_rng_state()
        with isolated(model, CPU):
            torch.rand(1)
        sys.exit(0 if torch.equal(torch.get_rng_state(), state) else 1)

    inside, leave = threading.Event(), threading.Event()

    def attack():
        with isolated(model, CPU):
            inside.set()
            leave.wait(PATIENCE)

    thread = threading.Thread(target=attack)
    thread.start()
    inside.wait(PATIENCE)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(PATIENCE)
    leave.set()
    thread.join()
    process.kill()
    assert process.exitcode == 0
