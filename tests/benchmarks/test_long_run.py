"""The benchmark of long runs: what it says of series that grow or do not, and a run of some hundred steps."""

from __future__ import annotations

import json
import random

import pytest

from benchmarks.scale.long_run import __main__ as long_run
from benchmarks.scale.long_run.growth import growth


def series(slope, noise, count=16):
    draw = random.Random(0)
    return [100 + slope * window + draw.gauss(0, noise) for window in range(count)]


def test_a_series_that_grows():
    found = growth(series(0.5, 0.2))
    assert found.low < 7.5 / found.mean < found.high
    assert found.high - found.low < 0.01
    assert found.verdict(0.02) == "grows"
    assert found.verdict(0.5) == "flat"


def test_a_series_that_does_not():
    assert growth([100.0] * 8) == (100, 0, 0, 0)
    assert growth(series(0, 0.2)).verdict(0.01) == "flat"
    assert growth(series(0, 20)).verdict(0.01) == "not shown"


def test_windows_that_resemble_each_other_say_less():
    wave = [0, 1, 2, 3, 3, 2, 1, 0]
    smooth = growth([100 + step for step in wave * 2])
    shuffled = random.Random(0).sample(wave * 2, 16)
    rough = growth([100 + step for step in shuffled])
    assert smooth.high - smooth.low > 1.3 * (rough.high - rough.low)


def test_a_slope_needs_windows():
    with pytest.raises(ValueError, match="at least 4 windows, got 3"):
        growth([1.0, 2.0, 3.0])


@pytest.mark.slow
def test_a_long_run_that_is_short(tmp_path, capsys):
    """Nothing lives longer than its step: as many tensors and objects in the last window as in the second."""
    options = ["--steps", "300", "--window", "50", "--attack-steps", "1", "--output", str(tmp_path)]
    result = long_run.main(options)
    assert json.loads((tmp_path / "long_run.json").read_text()) == json.loads(json.dumps(result))
    page = (tmp_path / "long_run.md").read_text()
    assert page in capsys.readouterr().out
    assert str(tmp_path) not in page
    for name, found in result["recipes"].items():
        assert f"## `{name}`" in page
        windows = found["windows"]
        assert len(windows) == 6
        counts = [window["tensors"] for window in windows]
        assert max(counts[3:]) <= max(counts[:3]) + 10, name  # a leak of one tensor a step would be 50 a window
        assert windows[-1]["objects"] - windows[2]["objects"] < 300, name
        assert windows[-1]["resident_mib"] - windows[2]["resident_mib"] < 20, name


def test_too_few_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        long_run.main(["--steps", "100", "--window", "50"])
    assert "fewer than 6 windows" in capsys.readouterr().err
