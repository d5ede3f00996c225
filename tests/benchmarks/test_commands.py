"""The commands of the benchmarks that are written down are those that there are, and their folders are in order."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXTS = [
    path
    for folder in ("docs", "examples", "benchmarks", "lightning_wdefense", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".md", ".py", ".json", ".yaml") and path != Path(__file__)
]


def test_every_command_starts_a_benchmark():
    texts = [ROOT / "README.md", ROOT / "CHANGELOG.md", *TEXTS]
    named = {name for path in texts for name in re.findall(r"python3? -m (benchmarks(?:\.[a-z_]+)+)", path.read_text())}
    started = {".".join(path.relative_to(ROOT).parent.parts) for path in (ROOT / "benchmarks").rglob("__main__.py")}
    assert named == started
    files = {name for path in texts for name in re.findall(r"\bbenchmarks/[\w/]+\.py\b", path.read_text())}
    assert all((ROOT / name).is_file() for name in files)


def test_no_folder_is_told_by_prefixes():
    for folder in {path.parent for path in (ROOT / "benchmarks").rglob("*.py")}:
        names = [path.stem for path in folder.iterdir() if path.name != "results" and path.stem.strip("_")[0] != "."]
        names = [name for name in names if not name.startswith("__")]
        assert len(names) <= 12, folder
        prefixes = Counter(name.partition("_")[0] for name in names)
        assert max(prefixes.values(), default=1) == 1, folder
