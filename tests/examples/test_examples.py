"""Every example runs as a user would run it, in an empty folder, and prints what it promises."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

# The command line of each example, and what its output must hold.
CASES = {
    "quickstart.py": (["--fast"], [r"undefended.*%", r"defended.*%", r"Wrote .*robustness\.png"]),
    "mixin.py": ([], [r"test/robust_acc\b"]),
    "wandb_logging.py": ([], [r"Most robust epoch: .*\.ckpt"]),
    "purifier.py": (["--fast"], [r"no purifier.*%", r"trained as usual.*%", r"trained through.*%"]),
    "tabular.py": ([], [r"undefended: clean \d", r"defended: clean \d"]),
    "own_loop.py": (["--epochs=1"], [r"epoch 0: loss [\d.]+", r"defended batches: 21\b", r"clean_acc +0\.\d"]),
    "fabric.py": (["--epochs=1"], [r"epoch 0: loss [\d.]+, eps 0\.067", r"498 samples", r"clean_acc +0\.\d"]),
    "report.py": (["--fast"], [r"robust_acc ", r"points more under attack", r"Wrote reports/comparison\.html"]),
    "text.py": (["--fast"], [r"plain, mean: clean \d", r"defended, mean: clean \d", r"gained: clean [+-]"]),
    "cli/train.py": (
        [
            "fit",
            f"--config={EXAMPLES / 'cli/config.yaml'}",
            "--trainer.max_epochs=1",
            "--trainer.limit_train_batches=2",
        ],
        [r"Most robust epoch: .*\.ckpt, val/robust_acc [\d.]+%"],
    ),
    "hydra/train.py": (
        ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "callbacks.wasserstein_defense.recipe=trades"],
        [r"At the end: .*val/clean_acc [\d.]+.*val/robust_acc [\d.]+.*val/robust_acc_pgd-20"],
    ),
}


# The accuracy under attack, as an example prints it, and how many points the defended model must have more than which other.
GAINS = {
    "tabular.py": (r"(\w+): .*under PGD ([\d.]+)%", "undefended", 10),
    "text.py": (r"(\w+), mean: .*under attack ([\d.]+)%", "plain", 5),  # by the example's own attack
}
QUICK = ("tabular.py", "cli/train.py", "hydra/train.py")


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
    assert {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py")} == set(CASES)


def commands(example: str) -> list[list[str]]:
    """The commands in the docstring of an example, without the interpreter."""
    text = ast.get_docstring(ast.parse((EXAMPLES / example).read_text())).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("python ")]
    return [[word for word in line[1:] if word != "mine.yaml" and word != ">"] for line in lines]


def printed(example: str, arguments: list[str]) -> str:
    """What a command of the docstring would build, which both of these examples can print without training."""
    show = ["--print_config"] if example == "cli/train.py" else ["--cfg", "job", "--resolve"]
    command = [sys.executable, *arguments, *(word for word in show if word not in arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "arguments", "shows"),
    [
        ("cli/train.py", 0, [r"max_epochs: 5\b", r"recipe: class-transport", r"monitor: val/robust_acc"]),
        ("cli/train.py", 1, [r"max_epochs: 1\b"]),
        ("cli/train.py", 2, [r"class_path: lightning_wdefense\.AdversarialExampleLogger"]),
        ("cli/train.py", 3, [r"class_path: lightning_wdefense\.DetectionMonitor\n\s+init_args:\n\s+threat:\n.*\n\s+eps: 0\.2", r"- knn"]),
        ("hydra/train.py", 0, [r"max_epochs: 5\b", r"recipe: class-transport", r"monitor: val/robust_acc"]),
        ("hydra/train.py", 1, [r"max_epochs: 1\b", r"recipe: trades"]),
        ("hydra/train.py", 2, [r"(?s)eps: 0\.1\b.*eps: 0\.1\b"]),
        ("hydra/train.py", 3, [r"norm: l2"]),
        ("hydra/train.py", 4, [r"callbacks: \{\}|callbacks: null"]),
        ("hydra/train.py", 5, [r"_target_: lightning_wdefense\.RobustnessMonitor"]),
    ],
)  # fmt: skip
def test_commands_of_the_docstring_build_what_they_say(example, arguments, shows):
    text = printed(example, commands(example)[arguments])
    for pattern in shows:
        assert re.search(pattern, text), text
