"""``benchmarks.gpu``: a rehearsal of all of it, and how it spends its minutes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import schedule
from benchmarks.gpu.__main__ import arguments
from benchmarks.gpu.book import LINES, Book, summary

ROOT = Path(__file__).parents[2]
HANGS = 40.0
"""Seconds after which the stage that hangs is killed: enough for a loaded machine to import PyTorch before."""
FAKES = {
    "works": "def run(context):\n    context.measure('figure', lambda: {'ms': 1.23456789})",
    "fails": "def run(context):\n    context.measure('before', lambda: {'ms': 1.0})\n    raise RuntimeError('planted')",
    "hangs": (
        "import subprocess, sys, time\ndef run(context):\n    context.measure('before', lambda: {'ms': 1.0})\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    context.measure('child', lambda: {'pid': child.pid})\n    time.sleep(600)"
    ),
    "lame": "def run(context):\n    context.measure('faulty', lambda: 1 / 0)\n    context.measure('whole', lambda: {'ms': 2.0})",
    "slow": "def run(context):\n    context.measure('quick', lambda: {'ms': 1.0})\n    context.measure('long', lambda: {'ms': 2.0}, seconds=600)",
}


def call(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=900, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Stages that end in all the ways that there are, and what is left of them in the book."""
    (tmp_path / "fakes").mkdir()
    for name, code in FAKES.items():
        (tmp_path / "fakes" / f"{name}.py").write_text(f'"""{name}"""\n{code}\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fakes"))
    monkeypatch.setattr(schedule, "GRACE", 1.0)
    monkeypatch.setattr(schedule, "STARTED", 1.0)
    monkeypatch.setattr(schedule, "REHEARSED", 1.0)

    def run(*names: str, minutes: float = 6.0, seconds: float = 90.0) -> dict:
        chosen = tuple(schedule.Stage(name, name, HANGS if name == "hangs" else seconds) for name in names)
        monkeypatch.setattr(schedule, "STAGES", chosen)
        monkeypatch.setattr(schedule, "EVERY", chosen)
        options = Namespace(
            rehearse=not torch.cuda.is_available(),
            minutes=minutes,
            output=tmp_path / "out",
            data=None,
            wheels=None,
            stages=None,
        )
        run.failed = schedule.run(options)
        return json.loads((tmp_path / "out" / "gpu.json").read_text())["stages"]

    return run


@pytest.mark.slow
def test_each_stage_costs_no_more_than_its_share_and_a_second_call_goes_on(stages, tmp_path):
    """One that hangs is killed with all that it started, one that fails ends; their figures stay, and the next ones run."""
    begun = time.monotonic()
    found = stages("hangs", "fails", "lame", "works")
    assert time.monotonic() - begun < 240
    assert list(found) == ["hangs", "fails", "lame", "works"]
    states = {name: stage["state"] for name, stage in found.items()}
    assert states == {
        "hangs": "killed after 41 s",
        "fails": "failed with exit status 1",
        "lame": "figures are missing",
        "works": "done",
    }
    assert stages.failed == 3
    assert found["hangs"]["rows"]["before"] == found["fails"]["rows"]["before"] == {"ms": 1.0}
    assert found["lame"]["rows"] == {"faulty": {"error": "ZeroDivisionError: division by zero"}, "whole": {"ms": 2.0}}
    assert found["works"]["rows"] == {"figure": {"ms": 1.235}}
    child = found["hangs"]["rows"]["child"]["pid"]
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "zombie" in status.read_text()

    # Called again, what is finished is not run again, and of the others only what failed.
    (tmp_path / "fakes" / "lame.py").write_text(
        '""" """\n' + FAKES["lame"].replace("1 / 0", "{'ms': 5.0}").replace("2.0", "9.0")
    )
    (tmp_path / "fakes" / "works.py").write_text('""" """\n' + FAKES["fails"])
    again = stages("works", "lame")
    assert again["works"] == found["works"]
    assert again["lame"]["rows"] == {"faulty": {"ms": 5.0}, "whole": {"ms": 2.0}}
    assert again["lame"]["state"] == "done"
    assert stages.failed == 0


def test_says_what_there_was_no_time_for(stages, capsys):
    found = stages("works", "slow", minutes=0.03)
    assert found["slow"]["state"].startswith("not begun")
    assert "not begun" in capsys.readouterr().out


def test_the_last_table_is_short(tmp_path):
    book = Book(tmp_path)
    rows = {f"row {row}": {"ms": 1.0} for row in range(40)}
    with book.changing() as content:
        content["stages"] = {stage: {"state": "done", "title": stage, "rows": rows} for stage in "abcde"}
    lines = summary(book).splitlines()
    assert len(lines) <= LINES
    assert all(any(line.startswith(stage + " ") for line in lines) for stage in "abcde")
    assert sum("more in gpu.md" in line for line in lines) == 5


@pytest.mark.parametrize("stage", schedule.EVERY, ids=lambda stage: stage.name)
def test_every_stage_is_there(stage):
    assert callable(importlib.import_module(stage.module).run)


@pytest.mark.slow
def test_rehearsal_of_one_stage(tmp_path):
    given = ["--rehearse", "--minutes", "4", "--stages", "cifar", "--output", str(tmp_path)]
    assert schedule.run(arguments(given)) == 0
    (stage,) = json.loads((tmp_path / "gpu.json").read_text())["stages"].values()
    assert stage["state"] == "done"
    assert {row["epochs"] for row in stage["rows"].values()} == {1}


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Every stage at toy size: nothing may fail on a GPU for a silly reason. And the second call has nothing to do."""
    begun = time.monotonic()
    run = call("--rehearse", "--minutes", "12", "--output", tmp_path / "out")
    seconds = time.monotonic() - begun
    assert run.returncode == 0, run.stdout + run.stderr
    content = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [stage["state"] for stage in content["stages"].values()] == ["done"] * len(schedule.STAGES), run.stdout
    assert list(content["stages"]) == [stage.name for stage in schedule.STAGES]
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) <= 8
    assert max(file.stat().st_size for file in files) <= 16 * 2**20
    assert seconds < 600  # a minute and a half on a machine of its own
    written = (tmp_path / "out" / "gpu.json").read_text()
    again = call("--rehearse", "--minutes", "12", "--output", tmp_path / "out")
    assert again.returncode == 0
    assert "==" not in again.stdout
    assert (tmp_path / "out" / "gpu.json").read_text() == written


def test_bad_arguments(tmp_path, capsys):
    with Book(tmp_path).changing() as content:
        content["about"]["card"] = "NVIDIA A100"
    cases = {
        "another folder": ["--rehearse", "--output", tmp_path],
        "too few": ["--rehearse", "--minutes", "0.01", "--output", tmp_path / "out"],
        "no cifar10.npz": ["--rehearse", "--data", tmp_path, "--output", tmp_path / "out"],
        "holds no wheels": ["--rehearse", "--wheels", tmp_path, "--output", tmp_path / "out"],
    }
    if not torch.cuda.is_available():
        cases["--rehearse"] = ["--output", tmp_path / "out"]
    for words, given in cases.items():
        with pytest.raises(SystemExit) as stopped:
            arguments([str(each) for each in given])
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
