"""Importing the package is light: it loads no optional package, and no part of SciPy, before something is asked of it."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_wdefense

HEAVY = ["geomloss", "matplotlib", "pandas", "scipy", "sklearn", "tensorboard", "torchattacks", "wandb"]
"""Packages that take a tenth of a second or more to load, and that only some users need."""

PUBLIC = [
    lightning_wdefense.__name__,
    *(
        f"{lightning_wdefense.__name__}.{found.name}"
        for found in pkgutil.iter_modules(lightning_wdefense.__path__)
        if found.ispkg
    ),
]

SCRIPT = """
import sys
import lightning, torch, torchmetrics

heavy = set(sys.argv[2].split(","))
# torchmetrics loads some of these where they are installed. They are forgotten here, so that those come back that we ask for ourselves.
for name in [name for name in sys.modules if name.split(".")[0] in heavy]:
    del sys.modules[name]
exec(sys.argv[1])
print(*sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""


def loaded(statement: str) -> list[str]:
    """Which heavy packages a statement loads, in an interpreter of its own that has imported Lightning and torchmetrics."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, statement, ",".join(HEAVY)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_every_public_subpackage_is_asked():
    assert {f"lightning_wdefense.{name}" for name in ("attacks", "callbacks", "metrics", "transport")} < set(PUBLIC)


def test_the_package_and_its_subpackages_load_nothing_heavy():
    assert loaded(f"import {', '.join(PUBLIC)}") == []


def test_what_is_loaded_is_seen():
    assert loaded("import geomloss; from scipy.optimize import linprog") == ["geomloss", "scipy"]


def test_geomloss_is_an_extra(monkeypatch: pytest.MonkeyPatch):
    import torch

    from lightning_wdefense.transport import sinkhorn_divergence

    monkeypatch.setitem(sys.modules, "geomloss", None)
    x, y = torch.rand(2, 5, 3)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-wdefense\[geomloss\]"'):
        sinkhorn_divergence(x, y, solver="geomloss")
    assert sinkhorn_divergence(x, y) > 0
