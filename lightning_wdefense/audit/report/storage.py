"""Results as plain values for JSON, and back. Values that are not finite are strings, because JSON has no number for them."""

from __future__ import annotations

import base64
import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.evaluation.details.examples import Example, Examples
from lightning_wdefense.evaluation.result import EvaluationResult
from lightning_wdefense.metrics import AccuracyCurve


def result_to_dict(result: EvaluationResult) -> dict[str, Any]:
    """A result as plain values."""
    curve, examples, plan = result.curve, result.examples, result.plan
    return {
        "threat": asdict(result.threat),
        "attacks": list(result.attacks),
        "values": plain(result.values),
        "intervals": plain(result.intervals),
        "curve": None if curve is None else plain(curve._asdict()),
        "plan": None if plan is None else packed(plan),
        "seconds": plain(result.seconds),
        "samples": plain(result.samples),
        "examples": None
        if examples is None
        else {end: [_example_to_dict(each) for each in group] for end, group in examples._asdict().items()},
    }


def result_from_dict(values: Mapping[str, Any]) -> EvaluationResult:
    """The result that :func:`result_to_dict` made plain values of."""
    curve, examples, plan = values["curve"], values["examples"], values["plan"]
    return EvaluationResult(
        values={name: float(value) for name, value in values["values"].items()},
        samples={name: _column(column) for name, column in values["samples"].items()},
        threat=ThreatModel(**values["threat"]),
        attacks=tuple(values["attacks"]),
        curve=None if curve is None else AccuracyCurve(*(_floats(curve[name]) for name in AccuracyCurve._fields)),
        examples=None
        if examples is None
        else Examples(*(tuple(map(_example_from_dict, examples[end])) for end in Examples._fields)),
        plan=None if plan is None else unpacked(plan),
        seconds={name: float(value) for name, value in values["seconds"].items()},
    )


def plain(value: Any) -> Any:
    """A value as JSON knows it; numbers that are not finite as ``"nan"``, ``"inf"`` and ``"-inf"``, anything unknown as its text."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def to_json(values: Mapping[str, Any]) -> str:
    """Plain values as JSON, a line for each entry."""
    lines = (
        f"{json.dumps(name)}: {json.dumps(each, ensure_ascii=False, allow_nan=False)}" for name, each in values.items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write_files(folder: str | Path, texts: Mapping[str, str]) -> list[Path]:
    """Write files by their names. Each appears as a whole: it is written under another name first.

    Args:
        folder: where to; it is made if it does not exist.
        texts: the texts by the names of the files.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    temporary = {place / name: place / f".{name}.{os.getpid()}" for name in texts}
    try:
        for path, text in zip(temporary.values(), texts.values(), strict=True):
            path.write_text(text, encoding="utf-8")
        for path, unfinished in temporary.items():
            unfinished.replace(path)
    finally:
        for unfinished in temporary.values():
            unfinished.unlink(missing_ok=True)
    return list(temporary)


def packed(tensor: Tensor) -> dict[str, Any]:
    """A large tensor as its shape, and its values in float32 (little endian, compressed by zlib) in base64."""
    values = zlib.compress(tensor.float().contiguous().numpy().astype("<f4").tobytes())
    return {"shape": list(tensor.shape), "float32": base64.b64encode(values).decode()}


def unpacked(values: Mapping[str, Any]) -> Tensor:
    """The tensor that :func:`packed` packed."""
    data = numpy.frombuffer(zlib.decompress(base64.b64decode(values["float32"])), "<f4").astype("float32")
    return torch.from_numpy(data).view(values["shape"])


def _example_to_dict(example: Example) -> dict[str, Any]:
    return plain(example._replace(pair=None)._asdict()) | {"pair": packed(example.pair)}  # type: ignore[arg-type]


def _example_from_dict(values: Mapping[str, Any]) -> Example:
    return Example(**{**values, "distance": float(values["distance"]), "pair": unpacked(values["pair"])})


def _column(values: list[Any]) -> Tensor:
    return torch.tensor(values) if all(isinstance(value, int) for value in values) else _floats(values)


def _floats(values: Any) -> Tensor:
    """Numbers, of which some may be strings, in lists of any depth."""
    return torch.tensor(_numbers(values), dtype=torch.float32)


def _numbers(values: Any) -> Any:
    return [_numbers(each) for each in values] if isinstance(values, list) else float(values)
