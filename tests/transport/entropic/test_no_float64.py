"""Transports on a device without float64, such as Apple's, rehearsed on the CPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_wdefense import _dtype
from lightning_wdefense.transport import sinkhorn_divergence
from lightning_wdefense.transport.entropic.newton import problem as small
from lightning_wdefense.transport.entropic.solver import arrays


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        wide = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor) and each.dtype == torch.float64]
        assert not [each for each in wide if each.ndim], f"{func} made a tensor in float64"
        return result


@pytest.mark.parametrize("options", [{}, {"p": 1}, {"reach": 2.0}], ids=str)
def test_divergence(options, monkeypatch):
    x, y = torch.randn(40, 5), torch.randn(30, 5) + 0.5
    expected = sinkhorn_divergence(x, y, **options)
    monkeypatch.setattr(_dtype, "NO_FLOAT64", frozenset({"mps", "cpu"}))
    monkeypatch.setattr(small, "SMALL", 0)  # which is for CPUs alone
    monkeypatch.setattr(arrays, "SMALL", 0)
    moved = x.clone().requires_grad_()
    with NoFloat64():
        got = sinkhorn_divergence(moved, y, **options)
        got.backward()
    torch.testing.assert_close(got.detach(), expected, rtol=2e-3, atol=1e-5)
    assert moved.grad.isfinite().all()
