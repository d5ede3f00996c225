"""What a report says of where and how it was made."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch


def processor(device: str) -> str:
    """The GPU's name, or the CPU's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return next(iter(models), platform.machine())


def hardware(device: str) -> str:
    """The GPU's name, or the CPU's with the threads in use."""
    name = processor(device)
    return name if device == "cuda" else f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def command(name: str, argv: Sequence[str]) -> str:
    """The command for a report: without the folders, which are each machine's own."""
    words, rest = [f"python -m benchmarks.{name}"], iter(argv)
    for word in rest:
        if word in ("--work", "--output"):
            next(rest)
        elif word == "--data":
            next(rest)
            words.append("--data folder")
        else:
            words.append(word)
    return " ".join(words)
