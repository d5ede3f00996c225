"""Nothing in this repository unpickles what it loads: torch 2.4 and 2.5 would do so by default."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WHOLE_MODULES = ROOT / "tests/callbacks/test_copies.py"
"""Saves and loads whole modules, as some users do."""
TRUSTED = ROOT / "lightning_wdefense/cli/loading/checkpoints.py"
"""Unpickles where the user says ``--trust-checkpoint``."""
FOLDERS = ("lightning_wdefense", "benchmarks", "examples", "tests", "docs")


def unsafe(source: str) -> list[int]:
    """Lines where ``torch.load`` is named in another way than as a call with ``weights_only=True``."""
    if "torch" not in source or "load" not in source:
        return []  # without parsing, which takes most of the time
    nodes = list(ast.walk(ast.parse(source)))
    safe = {
        id(node.func)
        for node in nodes
        if isinstance(node, ast.Call)
        and any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
    }
    named = [node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"]
    imported = [
        node
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and "load" in {name.name for name in node.names}
    ]
    return sorted(node.lineno for node in named + imported if id(node) not in safe)


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import torch\ntorch.load('x', weights_only=True)", []),
        ("import torch\ntorch.load('x')", [2]),
        ("torch.load('x', weights_only=False)\ntorch.load(\n 'x', weights_only=flag)", [1, 2]),
        ("from torch import load", [1]),
        ("read = torch.load", [1]),
        ("json.load('x')", []),
    ],
)
def test_finds_what_is_unsafe(source, lines):
    assert unsafe(source) == lines


def test_every_file_loads_tensors_alone():
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    found = {
        str(path.relative_to(ROOT)): lines
        for path in files
        if path not in (WHOLE_MODULES, TRUSTED) and (lines := unsafe(path.read_text()))
    }
    assert not found


def test_so_do_the_guides():
    guides = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    blocks = [block for guide in guides for block in re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)]
    assert blocks
    assert not [block for block in blocks if unsafe(block)]


def test_the_command_unpickles_only_what_it_is_told_to_trust():
    calls = [node for node in ast.walk(ast.parse(TRUSTED.read_text())) if isinstance(node, ast.Call)]
    (load,) = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    assert {word.arg: ast.unparse(word.value) for word in load.keywords}["weights_only"] == "not trust"
