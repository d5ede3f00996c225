"""A cloud on its way through ``sinkhorn_divergence`` visits few files: whoever reads the way of an argument should not get lost."""

from __future__ import annotations

import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy
import pytest
import torch

from lightning_wdefense import transport
from lightning_wdefense.transport import sinkhorn_divergence

FILES = 10
"""That a cloud may visit."""
FOLDER = Path(transport.__file__).parent
DEPTH = 7
"""Dimension of the points."""


def centred(points):
    points = points.detach().double().reshape(-1, *points.shape[-2:])[0, :, :DEPTH]
    return points - points.mean(0)


class Clouds:
    """What is recognised as one of the clouds: its points, moved as a whole, perhaps as directions or with ones beside them."""

    def __init__(self, *clouds):
        self.known = [
            centred(each) for cloud in clouds for each in (cloud, torch.nn.functional.normalize(cloud, dim=-1))
        ]

    def __contains__(self, value):
        if isinstance(value, numpy.ndarray) and value.dtype.kind == "f":
            value = torch.from_numpy(value)
        if not isinstance(value, torch.Tensor) or value.ndim < 2 or value.shape[-1] not in (DEPTH, DEPTH + 1):
            return False
        shape, found = value.shape[-2:], centred(value)
        # What has no weight may have been moved for itself, so most points must agree.
        return any(
            shape[0] == len(each) and bool(((found - each).abs().amax(1) < 0.3).float().mean() > 0.7)
            for each in self.known
        )

    def are_in(self, value, level=0):
        """Whether it is a cloud, or a tuple, mapping or dataclass that holds one."""
        if isinstance(value, tuple | list):
            parts = value
        elif isinstance(value, dict):
            parts = value.values()
        elif is_dataclass(value):
            parts = [vars(value).get(each.name) for each in fields(value)]
        else:
            return value in self
        return level < 3 and any(self.are_in(part, level + 1) for part in parts)


def visited(n, m, **options):
    """Files of the package in which a function is given points."""
    x, y = torch.randn(n, DEPTH, requires_grad=True), torch.randn(m, DEPTH) + 1
    files, clouds = set(), Clouds(x, y)

    def look(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(str(FOLDER)):
            code = frame.f_code
            arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            if any(clouds.are_in(frame.f_locals.get(name)) for name in arguments):
                files.add(str(Path(code.co_filename).relative_to(FOLDER)))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        sinkhorn_divergence(x, y, **options).backward()
    finally:
        sys.setprofile(before)
    return files


def weights(n):
    return torch.where(torch.arange(n) % 5 > 0, 1.0, 0.0) / (torch.arange(n) % 5 > 0).sum()


@pytest.mark.parametrize("options", [{}, {"p": 1}, {"label_cost": 1.0}, {"cost": "cosine"}], ids=str)
@pytest.mark.parametrize(("n", "m"), [(41, 33), (301, 233)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_cloud_visits_few_files(n, m, weighted, options):
    options = options | ({"a": weights(n), "b": weights(m)} if weighted else {})
    if "label_cost" in options:
        options |= {"x_labels": torch.arange(n) % 3, "y_labels": torch.arange(m) % 3}
    files = visited(n, m, **options)
    assert len(files) <= FILES, sorted(files)
    assert {"entropic/divergence.py", "entropic/evaluation.py", "clouds/measures.py"} <= files
    assert "entropic/newton/problem.py" in files if n < 100 else "entropic/solver/optimum.py" in files
    assert "entropic/gradients/envelope.py" in files
