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
    "text.py": (["--fast"], [r"plain, mean: clean \d", r"defended, mean: clean \d", r"gained: clean [+-]"]),
}


# The accuracy under attack, as an example prints it, and how many points the defended model must have more than which other.
GAINS = {
    "tabular.py": (r"(\w+): .*under PGD ([\d.]+)%", "undefended", 10),
    "text.py": (r"(\w+), mean: .*under attack ([\d.]+)%", "plain", 5),  # by the example's own attack
}
QUICK = ("tabular.py",)


@pytest.mark.parametrize(
    "example", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_example_runs(example, tmp_path):
    arguments, patterns = CASES[example]
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "COLUMNS": "120"}
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for pattern in patterns:
        assert re.search(pattern, done.stdout), done.stdout
    if example == "quickstart.py":
        assert (tmp_path / "robustness.png").stat().st_size > 10_000
    if example in GAINS:
        pattern, other, points = GAINS[example]
        shares = {name: float(share) for name, share in re.findall(pattern, done.stdout)}
        assert shares["defended"] > shares[other] + points


def test_every_example_is_listed():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(CASES)
