"""Every example runs as a user would run it, in an empty folder, and prints what it promises."""

from __future__ import annotations

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
}


def run(example, folder, *arguments):
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "COLUMNS": "120"}
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("example", CASES)
def test_example_runs(example, tmp_path):
    arguments, promised = CASES[example]
    output = run(example, tmp_path, *arguments)
    for pattern in promised:
        assert re.search(pattern, output), output
    if example == "quickstart.py":
        assert (tmp_path / "robustness.png").stat().st_size > 10_000


def test_every_example_is_listed():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(CASES)


def test_defended_tabular_model_is_more_robust(tmp_path):
    shares = {
        name: float(share) for name, share in re.findall(r"(\w+): .*under PGD ([\d.]+)%", run("tabular.py", tmp_path))
    }
    assert shares["defended"] > shares["undefended"] + 10
