"""Transports that are queued on a GPU without waiting for it: with and without kernels, which are interpreted where there is no GPU."""

import importlib.util

import pytest
import torch
from transport.entropic import speculation_cases as cases
from transport.entropic.test_triton import slabs_and_prices, some, stack_of

from lightning_wdefense.transport.entropic.problem import costs

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


INTERPRETED = (
    "rectangular", "one point", "entropic", "zero weights", "padding", "batch, rectangular", "soft labels", "labels, batch",
    "cosine", "reach, weighted", "reach, batch", "p1, labels", "half", "accurate", "annealed",
)  # fmt: skip
"""One of each kind."""
QUICK = {"one point", "padding", "batch, rectangular", "soft labels", "reach, weighted", "p1, labels", "half"}


@pytest.mark.parametrize("name", some(INTERPRETED, {*INTERPRETED} - QUICK))
def test_values_interpreted(name, interpreted):
    interpreted(cases.check_value, name, cases.SMALL[name])


@pytest.mark.parametrize("name", [name for name in cases.SMALL if name != "annealed"])  # which only the kernels do
def test_values_without_kernels(name):
    with cases.without_kernels():
        cases.check_value(name, cases.SMALL[name])


@pytest.mark.parametrize("group", cases.GROUPS)
def test_group(group):
    with cases.without_kernels():
        cases.check_group(group)


@pytest.mark.slow
@pytest.mark.parametrize("group", cases.GROUPS)
def test_group_interpreted(group, interpreted):
    interpreted(cases.check_group, group)


@needs_gpu
@pytest.mark.parametrize("name", [*cases.SMALL, *cases.LARGE])
def test_values_on_a_gpu(name):
    cases.check_value(name, {**cases.SMALL, **cases.LARGE}[name], "cuda")


@needs_gpu
@pytest.mark.parametrize("group", cases.GROUPS)
def test_group_on_a_gpu(group):
    cases.check_group(group, "cuda")


@needs_gpu
@pytest.mark.parametrize("name", ["uniform", "rectangular", "padding", "soft labels", "reach, weighted", "p1", "half"])
def test_waits_once(name):
    cases.check_waits_once(cases.SMALL[name])


@needs_gpu
def test_same_every_time():
    first, second = (cases.LARGE["1024"].gradients("cuda") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(*pair) for pair in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 128, 128), [(0, 3, 1)]),
        ((2, 1024, 1024), [(0, 2, 64)]),
        ((2, 2048, 2048), [(0, 1, 128), (1, 2, 128)]),
        ((80, 256, 256), [(0, 40, 2), (40, 80, 2)]),
        ((7, 1000, 1000), [(0, 4, 32), (4, 7, 32)]),
        ((1, 3000, 3000), []),
        ((9, 3000, 3000), []),
    ],
    ids=str,
)
def test_portions(shape, expected, monkeypatch):
    """As many problems in a launch as can run at once."""
    from lightning_wdefense.transport.entropic.triton import persistent

    class Properties:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    size, n, m = shape
    found = persistent.portions(n, m, size, torch.device("cuda"))
    assert [(part.start, part.stop, slabs.programs) for part, slabs in found] == expected


@pytest.mark.parametrize(
    ("slabs", "most", "rho"),
    slabs_and_prices(
        {(1, 16, 16): 16, (1, 128, 128): 128, (64, 16, 1024): 128, (32, 32, 1024): 800, (128, 16, 2048): 800}
    ),
)
def test_average_compiles(slabs, most, rho):
    pytest.importorskip("triton")
    from lightning_wdefense.transport.entropic.triton import persistent, symmetric

    stack = stack_of(symmetric.average, symmetric.settings(persistent.Slabs(*slabs), rho))
    assert stack is None or stack <= most


@pytest.mark.parametrize("root", [False, True])
def test_pairwise_compiles(root):
    pytest.importorskip("triton")
    from lightning_wdefense.transport.entropic.triton import pairwise

    settings = {"ROOT": root, "TILE": pairwise.TILE, "UNROLLED": pairwise.UNROLLED, "num_warps": 4}
    stack = stack_of(pairwise.pairwise, settings)
    assert stack is None or stack == 0


@pytest.mark.parametrize(
    ("entries", "lazy", "expected"),
    [(2**14, True, False), (2**26, True, False), (2**29, True, True), (2**29, False, False), (2**32, False, True)],
    ids=str,
)
def test_stored_where_a_gpu_has_memory(entries, lazy, expected, monkeypatch):
    """4 GiB are free, and 2 GiB more that PyTorch holds: a cost may take a quarter, its kernel half of what is left."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**32, 2**36))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**33)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**33 - 2**31)

    class OnGpu:
        device = torch.device("cuda")

        @staticmethod
        def element_size():
            return 4

    cost = costs.GroundCost((entries // 128, 128), lambda part: None, lazy=lazy)
    assert cost.too_large(OnGpu()) == expected
