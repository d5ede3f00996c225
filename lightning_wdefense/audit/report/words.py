"""Threat models, intervals and settings in words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.audit.report.storage import plain

GREY_LEVELS = 255


def threat_in_words(threat: ThreatModel) -> str:
    """What the attacker knows and may do."""
    eps = eps_in_words(threat)
    may = {
        "linf": f"change every input value by at most {eps} (L∞ norm)",
        "l2": f"change an input by at most {eps} in Euclidean length (L2 norm)",
        "l1": f"change the values of an input by at most {eps} in total (L1 norm)",
        "wasserstein": f"move the pixel mass of an image at a transport cost of at most {eps} (share of the mass times pixels moved)",
    }[threat.norm]
    bounds = (
        "The inputs have no bounds."
        if threat.bounds is None
        else f"Adversarial inputs stay between {threat.bounds[0]:g} and {threat.bounds[1]:g}."
    )
    units = ""
    if threat.mean is not None or threat.std is not None:
        units = f" The pipeline normalises the data with mean {_numbers(threat.mean, 0)} and std {_numbers(threat.std, 1)}; eps counts in the units before that."
    return f"The attacker knows the model and may {may}, in units of the data. {bounds}{units}"


def eps_in_words(threat: ThreatModel) -> str:
    """The budget, as grey levels where it is a number of them and no short decimal: ``"8/255"``."""
    levels = threat.eps * GREY_LEVELS
    whole = round(levels) and abs(levels - round(levels)) < 1e-4 and float(f"{threat.eps:.3g}") != threat.eps
    if threat.norm == "linf" and threat.bounds == (0.0, 1.0) and whole:
        return f"{round(levels)}/{GREY_LEVELS}"
    return f"{threat.eps:.4g}"


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return "unknown" if math.isnan(difference) else f"{100 * difference:+.1f}".replace("-", "−")


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def flattened(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows: dotted names and values."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            rows += flattened(value, f"{prefix}{name}.")
        else:
            rows.append(
                (f"{prefix}{name}", value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False))
            )
    return rows


def listed(words: Sequence[str]) -> str:
    """Words in a row: ``"a, b and c"``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _numbers(values: Any, default: float) -> str:
    return f"{default:g}" if values is None else ", ".join(f"{value:g}" for value in values)
