"""The Triton kernels, in their interpreter, compiled without a GPU, and on one where there is one."""

import math
import os
import re
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path

import pytest
import torch
from transport.entropic import triton_cases

import lightning_wdefense.transport.entropic.triton as kernels

needs_triton = pytest.mark.skipif(not kernels.supported(), reason=f"needs Triton {kernels.OLDEST} or later")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def some(names, slow):
    """All names, of which some are slow."""
    assert slow <= {*names}
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@needs_triton
@pytest.mark.parametrize(
    "name",
    some(
        triton_cases.SOLVES,
        {"uniform", "weighted", "accurate", "small blur", "batch", "unbalanced batch", "poor start", "several hundred"},
    ),
)
def test_solves_interpreted(name, interpreted):
    interpreted(triton_cases.check_solve, name, triton_cases.SOLVES[name])


@needs_triton
@pytest.mark.parametrize("name", triton_cases.STREAMS)
def test_streaming_interpreted(name, interpreted):
    interpreted(triton_cases.check_stream, name, *triton_cases.STREAMS[name])


@needs_triton
def test_programs_interpreted(interpreted):
    interpreted(triton_cases.check_programs, 2)


@needs_triton
@pytest.mark.parametrize("name", some(triton_cases.ENDS, {*triton_cases.ENDS} - {"p1", "large blur"}))
def test_end_to_end_interpreted(name, interpreted):
    interpreted(triton_cases.check_end_to_end, name)


@needs_triton
@pytest.mark.parametrize("name", triton_cases.ENDS)
def test_end_to_end_without_kernels(name):
    from transport.entropic.speculation_cases import without_kernels

    with without_kernels():
        triton_cases.check_end_to_end(name)


@needs_gpu
@needs_triton
@pytest.mark.parametrize("name", [*triton_cases.SOLVES, *triton_cases.LARGE_SOLVES])
def test_solves_on_a_gpu(name):
    case = {**triton_cases.SOLVES, **triton_cases.LARGE_SOLVES}[name]
    triton_cases.check_solve(name, case, "cuda")


@needs_gpu
@needs_triton
@pytest.mark.parametrize("name", triton_cases.ENDS)
def test_end_to_end_on_a_gpu(name):
    triton_cases.check_end_to_end(name, "cuda")


@needs_gpu
@needs_triton
def test_solves_alike_every_time():
    cost, a, b, eps, mean = (each.cuda() for each in triton_cases.LARGE_SOLVES["1000"].problem())
    first, second = (kernels.potential(cost, a, b, float(eps), None, float(mean), 1e-3, 500) for _ in range(2))
    assert torch.equal(first, second)


@needs_gpu
@needs_triton
@pytest.mark.parametrize("name", [*triton_cases.STREAMS, *triton_cases.LARGE_STREAMS])
def test_streaming_on_a_gpu(name):
    shape = {**triton_cases.STREAMS, **triton_cases.LARGE_STREAMS}[name]
    triton_cases.check_stream(name, *shape, "cuda")


def stack_of(kernel, settings):
    """Bytes of the stack that a kernel needs on an H100, where the registers are not enough; ``None`` without the tools."""
    triton = pytest.importorskip("triton", minversion=str(kernels.OLDEST))
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        pytest.skip("interpreted")
    backend = pytest.importorskip("triton.backends.nvidia")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in settings.items() if name.isupper()}
    options = {name: value for name, value in settings.items() if not name.isupper()}
    names = {"n": "i32", "m": "i32", "depth": "i32", "max_iter": "i32", "warm": "i32", "arrived": "*i32"}
    names |= {name: "fp32" for name in ("rho", "tol", "inverse_eps")} | dict.fromkeys(constants, "constexpr")
    signature = {name: names.get(name, "*fp32") for name in kernel.arg_names}
    position = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = {position[name]: [["tt.divisibility", 16]] for name in signature if signature[name].startswith("*")}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={position[name]: value for name, value in constants.items()},
        attrs=aligned,
    )
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(backend.__path__[0], "bin", "cuobjdump")
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def slabs_and_prices(stacks):
    """Slabs, bytes of the stack, and prices. Slow but for one of a single program and one of many: the compiler takes seconds for each."""
    quick = {((1, 128, 128), math.inf), ((64, 16, 1024), 1.0)}
    return [
        pytest.param(slabs, most, rho, id=f"{slabs}-{rho}", marks=[] if (slabs, rho) in quick else pytest.mark.slow)
        for slabs, most in stacks.items()
        for rho in (math.inf, 1.0)
    ]


@pytest.mark.parametrize(
    ("slabs", "most", "rho"),
    slabs_and_prices(
        {(1, 16, 16): 128, (1, 64, 64): 128, (1, 128, 128): 128, (64, 16, 1024): 128, (128, 16, 2048): 800}
    ),
)
def test_solve_compiles(slabs, most, rho):
    """And it keeps its matrix in registers; the largest slab alone is spilled to the cache in part."""
    pytest.importorskip("triton")
    from lightning_wdefense.transport.entropic.triton import persistent, small

    stack = stack_of(small.sinkhorn, small.settings(persistent.Slabs(*slabs), rho))
    assert stack is None or stack <= most


@pytest.mark.parametrize("name", ["log_sums_kernel", "weighted_points_kernel"])
def test_streaming_compiles(name):
    pytest.importorskip("triton")
    from lightning_wdefense.transport.entropic.triton import streaming

    kernel, settings = getattr(streaming, name), {"WIDTH": streaming.WIDTH, **streaming.tiles()}
    unused = {key for key in settings if key.isupper()} - set(kernel.arg_names)
    stack = stack_of(kernel, {key: value for key, value in settings.items() if key not in unused})
    # No tile is spilled. Triton 3.8 puts four words of weighted_points_kernel on the stack, earlier releases none.
    assert stack is None or stack <= 16


@needs_triton
@pytest.mark.parametrize(
    ("shape", "multiprocessors", "expected"),
    [
        ((1, 128, 128), 132, (1, 128, 128)),
        ((100, 20, 128), 132, (1, 32, 128)),
        ((1, 1000, 1000), 132, (64, 16, 1024)),
        ((1, 2048, 2048), 132, (128, 16, 2048)),
        ((1, 2049, 2048), 132, None),
        ((1, 100, 2049), 132, None),
        ((8, 256, 256), 132, (4, 64, 256)),
        ((100, 256, 256), 132, None),
        ((1, 1000, 1000), 40, (32, 32, 1024)),
    ],
    ids=str,
)
def test_spread(shape, multiprocessors, expected, monkeypatch):
    """All programs that meet must run at the same time, and hold all of the rows."""
    from lightning_wdefense.transport.entropic.triton import persistent

    class Properties:
        multi_processor_count = multiprocessors

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    size, n, m = shape
    slabs = persistent.spread(n, m, size, torch.device("cuda"))
    assert slabs == expected


def solve(dtype=torch.float32):
    cost, a, b, eps, mean = (each.to(dtype) for each in triton_cases.SOLVES["uniform"].problem())
    return kernels.potential(cost, a, b, float(eps), None, float(mean), 1e-3, 100)


@pytest.mark.parametrize(("version", "expected"), [("3.3.1", False), ("3.4.0+git663e04e8", True)])
def test_an_old_triton_is_left_alone(version, expected, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    monkeypatch.setattr(kernels, "supported", kernels.supported.__wrapped__)
    assert kernels.available(torch.device("cuda")) is expected


def test_leaves_to_pytorch_what_it_cannot_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not kernels.available(torch.device("cpu"))
    assert solve() is None
    monkeypatch.setattr(kernels, "available", lambda device: True)
    assert solve(torch.float64) is None


def test_warns_once_of_a_kernel_that_fails(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no such instruction\nand a long listing")

    monkeypatch.setattr(kernels, "available", lambda device: True)
    monkeypatch.setattr(kernels, "_failed", set())
    monkeypatch.setattr(kernels, "_per_problem", fails)
    with pytest.warns(UserWarning, match=r"for small transport problems failed .*; PyTorch solves them from now on"):
        assert solve() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert solve() is None
