"""What a measurement ran on: versions, hardware and date."""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("lightning-wdefense", "torch", "lightning", "pytorch-lightning", "torchmetrics", "numpy")


def environment() -> dict[str, str]:
    """Versions of Python and of the packages that are installed, the hardware, and the date (UTC)."""
    found = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    # Run from its sources, the package is not installed.
    found.setdefault("lightning-wdefense", sys.modules[__name__.partition(".")[0]].__version__)
    found |= {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    found["processor"] = f"{_processor()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return found


def _processor() -> str:
    """The name of the processor; on Linux Python does not know it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
