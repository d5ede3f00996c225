"""Every example runs as a user would run it, in an empty folder, and prints what it promises."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

# The command line of each example, and what its output must hold.
CASES = {
    "quickstart.py": (["--fast"], [r"undefended.*%", r"defended.*%", r"Wrote .*robustness\.png"]),
    "mixin.py": ([], [r"test/robust_acc\b"]),
    "wandb_logging.py": ([], [r"Most robust epoch: .*\.ckpt"]),
    "purifier.py": (["--fast"], [r"no purifier.*%", r"trained as usual.*%", r"trained through.*%"]),
    "tabular.py": ([], [r"undefended: clean \d", r"defended: clean \d"]),
    "text.py": (["--fast"], [r"plain, mean: clean \d", r"defended, mean: clean \d", r"gained: clean [+-]"]),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs an example, once in all, and returns its folder and output."""

    @functools.cache
    def run(example):
        folder = tmp_path_factory.mktemp("example")
        environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "COLUMNS": "120"}
        command = [sys.executable, str(EXAMPLES / example), *CASES[example][0]]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder, done.stdout

    return run


@pytest.mark.parametrize("example", CASES)
def test_example_runs(example, run):
    folder, output = run(example)
    for pattern in CASES[example][1]:
        assert re.search(pattern, output), output
    if example == "quickstart.py":
        assert (folder / "robustness.png").stat().st_size > 10_000


def test_every_example_is_listed():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(CASES)


def test_defended_tabular_model_is_more_robust(run):
    _, output = run("tabular.py")
    shares = {name: float(share) for name, share in re.findall(r"(\w+): .*under PGD ([\d.]+)%", output)}
    assert shares["defended"] > shares["undefended"] + 10


def test_defended_text_classifier_is_more_robust(run):
    """By the example's own attack."""
    _, output = run("text.py")
    shares = {name: float(share) for name, share in re.findall(r"(\w+), mean: .*under attack ([\d.]+)%", output)}
    assert shares["defended"] > shares["plain"] + 5
