"""The script that looks at pages sees what is wrong with them."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "docs" / "look.py"
PAGE = '<!DOCTYPE html><html><head><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"></head><body>{}</body></html>'
WIDE = '<div style="width:{}px">wide</div>'

spec = importlib.util.spec_from_file_location("look", SCRIPT)
assert spec is not None
look = importlib.util.module_from_spec(spec)
spec.loader.exec_module(look)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(map(shutil.which, look.PROGRAMS)), reason="there is no Chromium"),
]

FAULTY = {
    "console": ("<script>console.error('broken', 7)</script>", "console: broken 7"),
    "exception": ("<script>nothing()</script>", "nothing is not defined"),
    "missing": ('<script src="missing.js"></script>', "ERR_FILE_NOT_FOUND"),
    "image": ('<img src="missing.png">', "image not shown"),
    "wide": (WIDE.format(2000), "scrolls sideways"),
    "label": (
        '<svg width="50" height="20"><text x="20" y="15">a long label</text></svg>',
        "label cut off: a long label",
    ),
}


def run(folder: Path, *pages: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, pages), "--output", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def write(path: Path, body: str) -> Path:
    path.write_text(PAGE.format(body))
    return path


def test_faults_are_seen(tmp_path):
    for name, (body, message) in FAULTY.items():
        found = run(tmp_path / "out", write(tmp_path / f"{name}.html", body))
        assert found.returncode == 1, name
        assert message in found.stdout, found.stdout


def test_good_pages_and_their_pictures(tmp_path):
    body = WIDE.format(300) + f'<div style="overflow-x:auto">{WIDE.format(3000)}</div><p style="height:2000px">tall</p>'
    found = run(tmp_path / "out", write(tmp_path / "good.html", body), write(tmp_path / "more.html", "<p>text</p>"))
    assert found.returncode == 0, found.stdout + found.stderr
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "out").iterdir()}
    assert len(sizes) == 4
    for name, (width, height) in sizes.items():
        assert width == (780 if "phone" in name else 1280)
        if "good.html" in name:
            assert height > 2000


def test_a_page_that_is_only_too_wide_for_a_phone(tmp_path):
    found = run(tmp_path / "out", write(tmp_path / "wide.html", WIDE.format(700)))
    assert found.returncode == 1
    assert found.stdout.count("scrolls sideways") == 1
