"""An evaluation that was interrupted goes on: equal to the bit, no batch twice, and never on the work of another one."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.lightning_modules import digits_loaders, trained_classifier
from support.modules import Attending
from support.processes import script_environment
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense import ThreatModel, evaluate
from lightning_wdefense.attacks import FMN, PGD, TorchAttack
from lightning_wdefense.evaluation.measures import Measures
from lightning_wdefense.evaluation.resuming import KeptWork
from lightning_wdefense.evaluation.resuming.fingerprint import described, model_digest

pytestmark = pytest.mark.filterwarnings("ignore")

THREAT = ThreatModel(eps=0.1)
SETTINGS = {
    "plain": {},
    "curve": {"epsilons": [0.05, 0.2]},
    "distances": {"distances": FMN(THREAT, steps=5), "features": "outputs"},
    "examples": {"examples": 3},
    "independent": {"independent": True, "features": None, "seed": 3},
}


class Interrupted(PGD):
    """Counts the batches that it attacks, and stops before one of them, as Ctrl-C would."""

    calls = 0
    stop = -1

    @staticmethod
    def halt():
        raise KeyboardInterrupt

    def perturb(self, problem):
        cls = type(self)
        if cls.calls == cls.stop:
            cls.halt()
        cls.calls += 1
        return super().perturb(problem)


@pytest.fixture(autouse=True)
def counting():
    Interrupted.calls, Interrupted.stop = 0, -1


def evaluated(path=None, model=None, loader=None, steps=3, **options):
    loader = digits_loaders()[1] if loader is None else loader
    attacks = {"noisy": Interrupted(THREAT, steps=steps)}
    model = model or trained_classifier(batch_norm=True).net
    return evaluate(model, loader, THREAT, attacks, progress=False, resume=path, **options)


def same(result, expected) -> None:
    assert list(result.values) == list(expected.values)
    for name, value in result.values.items():
        assert value == expected.values[name] or value != value, name
    assert result.samples.keys() == expected.samples.keys()
    assert all(torch.equal(column, expected.samples[name]) for name, column in result.samples.items())
    assert (result.curve is None) == (expected.curve is None)
    if expected.curve is not None:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(result.curve, expected.curve, strict=True))
    assert (result.plan is None) == (expected.plan is None)
    assert result.plan is None or torch.equal(result.plan, expected.plan)
    for ours, theirs in zip(shown(result), shown(expected), strict=True):
        assert ours[:4] == theirs[:4]
        assert torch.equal(ours.pair, theirs.pair)


def shown(result) -> list:
    return [] if result.examples is None else [*result.examples.least, *result.examples.most]


def interrupted(path: Path, after: int = 2, **options) -> None:
    """An evaluation that is stopped after so many attacks."""
    Interrupted.calls, Interrupted.stop = 0, after
    with pytest.raises(KeyboardInterrupt):
        evaluated(path, **options)
    Interrupted.calls, Interrupted.stop = 0, -1


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_result_is_that_of_an_uninterrupted_run(tmp_path, settings):
    options, path = SETTINGS[settings], tmp_path / "new" / "work.pt"
    expected = evaluated(**options)
    whole, Interrupted.calls = Interrupted.calls, 0
    interrupted(path, whole // 2, **options)  # in the third of four batches
    same(evaluated(path, **options), expected)
    assert Interrupted.calls == whole // 2, "a finished batch was attacked again"
    Interrupted.calls = 0
    same(evaluated(str(path), **options), expected)
    assert Interrupted.calls == 0
    assert os.listdir(path.parent) == ["work.pt"]


def test_of_a_finished_evaluation_nothing_is_attacked(tmp_path):
    expected = evaluated(tmp_path / "work.pt")
    before = Interrupted.calls
    same(evaluated(tmp_path / "work.pt"), expected)
    assert Interrupted.calls == before == 4


def test_interrupted_again_and_again(tmp_path):
    expected = evaluated()
    for _ in range(3):
        interrupted(tmp_path / "work.pt", after=1)
    same(evaluated(tmp_path / "work.pt"), expected)


def test_a_failure_keeps_what_was_done(tmp_path):
    batches = list(digits_loaders()[1])
    inputs, labels = batches[2]
    with pytest.raises(ValueError, match="labels run from"):
        evaluated(tmp_path / "work.pt", loader=[*batches[:2], (inputs, labels + 5)])
    Interrupted.calls = 0
    same(evaluated(tmp_path / "work.pt", loader=batches), evaluated())
    assert Interrupted.calls == 2 + 4


def test_a_model_that_needs_whole_batches_still_gets_them(tmp_path):
    model = Attending(trained_classifier().net)
    options = {"model": model, "epsilons": [0.05]}  # the second attack runs on what the first has left
    expected = evaluated(**options)
    interrupted(tmp_path / "work.pt", **options)
    model.sizes.clear()
    same(evaluated(tmp_path / "work.pt", **options), expected)
    assert model.sizes == {32}


def test_masks(tmp_path):
    inputs = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(inputs, (inputs.squeeze(1) * 3).long().clamp(max=2)), 2)
    torch.manual_seed(0)
    model = nn.Conv2d(1, 3, 3, padding=1)
    expected = evaluated(model=model, loader=loader)
    interrupted(tmp_path / "work.pt", model=model, loader=loader)
    same(evaluated(tmp_path / "work.pt", model=model, loader=loader), expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_switched_off(tmp_path, context):
    expected, model = evaluated(), trained_classifier(batch_norm=True).net
    with context():
        interrupted(tmp_path / "work.pt", model=model)
        same(evaluated(tmp_path / "work.pt", model=model), expected)


def test_a_loader_that_shuffles_needs_its_seed(tmp_path):
    data = digits_loaders()[1].dataset

    def loader(seed):
        return DataLoader(data, 32, shuffle=True, generator=torch.Generator().manual_seed(seed))

    interrupted(tmp_path / "work.pt", loader=loader(0))
    with pytest.raises(ValueError, match=r"(?s)Batch 0 of the loader is another one.*work\.pt.*shuffle=False.*Delete"):
        evaluated(tmp_path / "work.pt", loader=loader(1))
    same(evaluated(tmp_path / "work.pt", loader=loader(0)), evaluated(loader=loader(0)))


def other_weights():
    model = copy.deepcopy(trained_classifier(batch_norm=True).net)
    with torch.no_grad():
        model.head.bias[3] += 1e-6
    return {"model": model}


def other_statistics():
    model = copy.deepcopy(trained_classifier(batch_norm=True).net)
    model.norm.running_mean[0] += 1e-6
    return {"model": model}


def other_activation():
    model = copy.deepcopy(trained_classifier(batch_norm=True).net)
    model.act = nn.GELU()
    return {"model": model}


OTHERS = {
    "weights": (other_weights, r"differs.*: model \("),
    "statistics": (other_statistics, r": model \("),
    "activation": (other_activation, r": model \("),
    "steps": (lambda: {"steps": 4}, r": attacks \(.*steps=3.*, .*steps=4.*\)"),
    "seed": (lambda: {"seed": 1}, r": seed \(0, 1\)\. Delete the file to start anew, or name another one"),
    "max-batches": (lambda: {"max_batches": 3}, r": max_batches \(None, 3\)"),
    "features": (lambda: {"features": None}, r": features \('penultimate', None\)"),
    "epsilons": (lambda: {"epsilons": [0.05]}, r": epsilons \(None, \(0\.0, 0\.05\)\)"),
    "several": (lambda: {"independent": True, "ignore_index": 3}, r"independent \(False, True\); ignore_index \(None, 3\)"),
    "distances": (lambda: {"distances": FMN(THREAT, steps=5)}, r"distances \(None, "),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_another_evaluation_is_refused_and_the_file_stays(tmp_path, case):
    path = tmp_path / "work.pt"
    interrupted(path)
    before = path.read_bytes()
    options, message = OTHERS[case]
    with pytest.raises(ValueError, match=f"(?s)work\\.pt holds finished batches of another evaluation.*{message}"):
        evaluated(path, **options())
    assert path.read_bytes() == before
    assert Interrupted.calls == 0


def test_other_data_are_refused(tmp_path):
    batches = list(digits_loaders()[1])
    path = tmp_path / "work.pt"
    evaluated(path, loader=batches)
    inputs, labels = batches[1]
    for other, message in (
        ([batches[0], (inputs, labels.flip(0)), *batches[2:]], "Batch 1 of the loader is another one"),
        ([batches[0], (inputs + 1e-7, labels), *batches[2:]], "Batch 1 of the loader is another one"),
        (batches[:3], r"The loader gave 3 batches, but .*work\.pt holds 4 finished ones: the data differ"),
        ([*batches, batches[0]], "gives more batches than the 4 of"),
        ([], "gave 0 batches, but"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluated(path, loader=other)
    assert Interrupted.calls == 4


@pytest.mark.parametrize("content", [b"", b"not torch's", b"PK\x03\x04"])
def test_a_file_that_is_none_is_left_alone(tmp_path, content):
    path = tmp_path / "work.pt"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"work\.pt is no file of finished batches, and is left as it is: name another"
    ):
        evaluated(path)
    assert path.read_bytes() == content
    assert Interrupted.calls == 0


def test_a_checkpoint_in_its_place_is_left_alone(tmp_path):
    path = tmp_path / "work.pt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="holds no finished batches"):
        evaluated(path)
    torch.save(Interrupted(THREAT), path)  # code, which is not run
    with pytest.raises(ValueError, match="is no file of finished batches"):
        evaluated(path)
    with pytest.raises(ValueError, match="cannot be read"):
        evaluated(tmp_path)


def test_half_a_file_never_takes_the_place_of_a_whole_one(tmp_path, monkeypatch):
    path, save = tmp_path / "work.pt", torch.save

    def full(content, file):
        if len(content["batches"]) == 3:
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        evaluated(path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["work.pt"]
    Interrupted.calls = 0
    same(evaluated(path), evaluated())
    assert Interrupted.calls == 2 + 4


def test_the_file_is_as_large_as_what_it_holds(tmp_path):
    measures = Measures.of(["pgd"], None, shift=True, distances=True)
    measures.distances.distances.append(torch.zeros(1_000_000)[:4])  # a view of much more
    KeptWork(tmp_path / "work.pt", {}).add("digest", {}, measures, whole=False)
    assert (tmp_path / "work.pt").stat().st_size < 50_000
    again = Measures.of(["pgd"], None, shift=True, distances=True)
    KeptWork(tmp_path / "work.pt", {}).restore(again)
    assert torch.equal(again.distances.compute(), torch.zeros(4))
    with pytest.raises(ValueError, match=r"holds other metrics than this evaluation: \['distances'\]"):
        KeptWork(tmp_path / "work.pt", {}).restore(Measures.of(["pgd"], None, shift=True))


def test_descriptions_hold_no_addresses():
    attacks = (
        PGD(THREAT, loss=nn.functional.cross_entropy),
        TorchAttack("PGD", THREAT, steps=3),
        Interrupted(THREAT, loss=lambda outputs, labels: outputs.sum(1)),
        FMN(THREAT),
    )
    for attack in attacks:
        assert "0x" not in described(attack)
        assert described(attack) == described(copy.deepcopy(attack))
    assert described(TorchAttack("PGD", THREAT, steps=3)) != described(TorchAttack("PGD", THREAT, steps=4))
    assert model_digest(nn.Linear(2, 2).to(torch.bfloat16)) != model_digest(nn.Linear(2, 2))
    endless: list = []
    endless.append(endless)
    assert described(endless) == "(...)"


SCRIPT = """
import os, signal, sys
from test_resume import Interrupted, evaluated

Interrupted.__module__ = sys.argv[2]  # pytest has another name for it
Interrupted.stop, Interrupted.halt = 2, lambda: os.kill(os.getpid(), signal.SIGKILL)
evaluated(sys.argv[1])
"""


def test_a_killed_process_goes_on(tmp_path):
    environment = script_environment()
    environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "work.pt"), __name__]
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "work.pt", weights_only=True)["batches"]
    same(evaluated(tmp_path / "work.pt"), evaluated())
    assert Interrupted.calls == 2 + 4
