"""Attempts as CUDA graphs, for problems of a shape that is repeated, such as the batches of a training.

An attempt consists of about eighty kernel launches, which take the host much longer than the GPU. As a graph it is one launch. This is
used only if the environment has ``LIGHTNING_WDEFENSE_RECORD=1``, because it has not been verified on a GPU yet.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_wdefense._cuda_graphs import record, tensor_signature
from lightning_wdefense.transport.clouds.measures import Measure
from lightning_wdefense.transport.entropic.gpu.speculation import Attempt, attempt
from lightning_wdefense.transport.entropic.problem.arguments import Arguments
from lightning_wdefense.transport.entropic.solver.optimum import Optimum, Transports

DEVICES = frozenset({"cuda"} if os.environ.get("LIGHTNING_WDEFENSE_RECORD") == "1" else ())
"""Types of the devices on which attempts are recorded."""

LARGEST = 2**22
"""Number of entries of all costs up to which an attempt is recorded. With a larger one the GPU is busy for longer than the host, and a
graph keeps the memory of everything that it computes."""

KEPT = 4
"""Number of graphs that are kept, the most recently used ones."""

RECENT = 8
"""Number of the last calls that are searched for one of the same shapes."""

_lock = threading.Lock()
_graphs: OrderedDict[Hashable, _Recorded] = OrderedDict()
_recent: deque[Hashable] = deque(maxlen=RECENT)
_refused = threading.Event()


def attempt_again(arguments: Arguments, start: Tensor | None) -> Attempt | None:
    """An attempt, by the graph of earlier ones of the same shapes if there is one."""
    if _refused.is_set() or not _recordable(arguments):
        return attempt(arguments, start)
    arguments = arguments.detached()
    x, y, options, _, pairs, needed, weighted = arguments
    labels = (x.labels, y.labels) if options.label_cost is not None else (None, None)
    # Weights that were not given are the same every time.
    changing = [x.points, y.points, *([x.weights, y.weights] if weighted else []), *labels, start]
    stream = torch.cuda.current_stream(x.points.device).cuda_stream if x.points.is_cuda else 0
    kinds = tuple(None if each is None else tensor_signature(each) for each in changing)
    key = options, pairs, needed, weighted, stream, kinds
    with _lock:
        graph = _graphs.get(key)
        if graph is None and key in _recent:
            graph = _recorded(arguments, start)
        if graph is None:
            _recent.append(key)
        else:
            _graphs[key] = graph
            _graphs.move_to_end(key)
            while len(_graphs) > KEPT:
                _graphs.popitem(last=False)
            return graph(changing)
    return attempt(arguments, start)


class _Recorded:
    """An attempt as a graph, which reads and writes tensors of its own."""

    def __init__(self, arguments: Arguments, start: Tensor | None) -> None:
        arguments = arguments._replace(x=_copied(arguments.x), y=_copied(arguments.y))
        start = None if start is None else start.clone()
        x, y = arguments.x, arguments.y
        weights = [x.weights, y.weights] if arguments.weighted else []
        self._own = [x.points, y.points, *weights, x.labels, y.labels, start]
        self._read = x, y  # a graph keeps nothing alive that it reads, and weights that do not change are read as well

        def compute() -> tuple[Tensor, Attempt]:
            found = attempt(arguments, start)
            assert found is not None
            # One tensor, so that one copy is enough to have the results in memory of their own.
            return torch.cat([each.reshape(-1) for each in _fields(found) if isinstance(each, Tensor)]), found

        self._replay, (self._results, found) = record(compute, x.points.device)
        self._pairs, self._limits = list(found.transports.optima), [limit for _, limit in found.errors]
        self._fields = [each.shape if isinstance(each, Tensor) else each for each in _fields(found)]
        self._sizes = [each.numel() for each in self._fields if isinstance(each, torch.Size)]

    def __call__(self, given: Sequence[Tensor | None]) -> Attempt:
        for own, each in zip(self._own, given, strict=True):
            if own is not None and each is not None:
                own.copy_(each)
        self._replay()
        # Not as views of one tensor: what is done to one of them in place would count as done to all.
        parts = iter(torch.unsafe_split_with_sizes(self._results.clone(), self._sizes))
        fields: list[Any] = [next(parts).view(each) if isinstance(each, torch.Size) else each for each in self._fields]
        width = len(Optimum._fields)
        optima = {pair: Optimum(*fields[i * width : (i + 1) * width]) for i, pair in enumerate(self._pairs)}
        blur, n_iter, *errors = fields[len(optima) * width :]
        return Attempt(Transports(optima, blur), n_iter, list(zip(errors, self._limits, strict=True)))


def _fields(found: Attempt) -> list[Any]:
    """All that is in an attempt, in a row, but for the tolerances."""
    optima, blur = found.transports
    return [*chain(*optima.values()), blur, found.n_iter, *(error for error, _ in found.errors)]


def _recorded(arguments: Arguments, start: Tensor | None) -> _Recorded | None:
    try:
        # Later calls outside of inference mode write to its tensors.
        with torch.inference_mode(False), torch.no_grad():
            if attempt(arguments, start) is None:  # the kernels are not made for it
                return None
            return _Recorded(arguments, start)
    except torch.cuda.OutOfMemoryError:
        return None
    except Exception as error:  # a driver may raise anything
        _refused.set()
        message = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"Transport could not be recorded as a CUDA graph ({type(error).__name__}: {message}), so it is launched piece by piece from now "
            "on: the results are the same.",
            stacklevel=2,
        )
        return None


def _recordable(arguments: Arguments) -> bool:
    x, y = arguments.x, arguments.y
    (size, n), m, device = x.weights.shape, y.weights.shape[1], x.points.device
    if device.type not in DEVICES or size * (n + m) ** 2 > LARGEST:
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _copied(measure: Measure) -> Measure:
    points, weights, labels = measure
    return Measure(points.clone(), weights.clone(), None if labels is None else labels.clone())
