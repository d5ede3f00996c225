"""Record computations with a module as CUDA graphs and replay them.

A graph reads tensors at the addresses that they had when it was recorded, and runs none of the module's Python code. So
a graph is replayed only if the module is in the same state as at the recording. No graph is recorded of a module that
changes with each pass.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric, MetricCollection

from lightning_wdefense._cuda_graphs import record, tensor_signature
from lightning_wdefense.modules.state.module_state import MODULE_ATTRIBUTES, preserved_attributes, preserved_buffers
from lightning_wdefense.modules.state.random_state import RandomState

DEVICES = frozenset({"cuda"})
"""Device types that graphs are recorded on."""

MAX_GRAPHS = 4
"""Largest number of graphs that are kept of a module; each holds the memory of a pass."""

RECENT_CALLS = 8
"""Number of recent calls that are searched for the same computation."""

WARN_AFTER = 8
"""Number of successive calls with a changed module after which a warning is given."""

_LEAVES = frozenset({int, float, str, bool, type(None)})
_PLAIN = (Tensor, nn.Parameter)
_WRAPPERS = ("torch.nn.parallel", "torch.distributed.fsdp", "torch.distributed._composable")

Compute = Callable[..., Tensor]
"""A computation to record: a function from tensors to a tensor."""

State = tuple[tuple[str, Hashable], ...]
Key = tuple[Hashable, State]


class UnrecordableError(Exception):
    """A module cannot be recorded; the message says why."""


class Replays:
    """Runs the computations of one call of an attack, with CUDA graphs if there are some.

    A graph is recorded at the second of two recent calls with the same computation and the module in the same state. So
    no graph is recorded for a smaller last batch, or for a module that always changes.

    Args:
        module: the module that the computations run.
        kind: a key for all computations of this call; a graph is used for one kind only.
    """

    def __init__(self, module: nn.Module, kind: Hashable) -> None:
        self._module, self._kind, self._kept = module, kind, _kept_with(module)
        self._ready: dict[Hashable, RecordedGraph | None] = {}

    def __call__(self, name: Hashable, compute: Compute, *tensors: Tensor) -> Tensor:
        """The result of ``compute(*tensors)``, as a new tensor.

        Args:
            name: a key for the computation.
            compute: the computation; it may use no other tensors than these and the module's own.
            tensors: the arguments, all on one device.
        """
        what = name, self._kind, *map(tensor_signature, tensors), *_surroundings(tensors[0].device)
        if what not in self._ready:
            self._ready[what] = self._prepared(what, compute, tensors)
        return (self._ready[what] or compute)(*tensors)

    def _prepared(self, what: Hashable, compute: Compute, tensors: Sequence[Tensor]) -> RecordedGraph | None:
        kept = self._kept
        if kept.refused:
            return None
        key = what, self._state
        recorded = kept.graphs.get(key)
        if recorded is None and key in kept.recent:
            try:
                recorded = self._recorded(compute, tensors)
            except Exception as error:
                kept.refuse(self._module, error)
                return None
        kept.note(self._module, key, recorded)
        return recorded

    def _recorded(self, compute: Compute, tensors: Sequence[Tensor]) -> RecordedGraph:
        self._kept.make_room()
        with _weights_cast_inside(tensors[0].device):
            return RecordedGraph(compute, tensors, check_recordable(self._module, partial(compute, *tensors), tensors))

    @cached_property
    def _state(self) -> State:
        return state_of(self._module)


class RecordedGraph:
    """A computation as a CUDA graph, with its own input and output tensors.

    Args:
        compute: the computation.
        tensors: examples of its arguments, with the right shape, dtype and device.
        reads: other tensors that the computation reads; they must live as long as the graph.
    """

    def __init__(self, compute: Compute, tensors: Sequence[Tensor], reads: Sequence[Tensor]) -> None:
        self._own, self._reads = [each.detach().clone() for each in tensors], reads
        self._replay, self._result = record(partial(compute, *self._own), tensors[0].device)

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The result, as a new tensor."""
        for own, given in zip(self._own, tensors, strict=True):
            own.copy_(given)
        self._replay()
        return self._result.clone()


def check_recordable(module: nn.Module, compute: Callable[[], Any], own: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a computation once and check whether it can be recorded as a CUDA graph.

    Args:
        module: the module that the computation runs.
        compute: the computation.
        own: the arguments of the computation.

    Returns:
        The other tensors that it reads, except the module's own.

    Raises:
        UnrecordableError: if the computation cannot be recorded, or a graph would compute something else.
    """
    _check_kind(module)
    device = own[0].device
    modules, random, reads = list(module.modules()), RandomState(device), _ReadTracker(device)
    with preserved_buffers(modules), preserved_attributes(modules):
        before, tensors = state_of(module), [*own, *_tensors_of(module)]
        with _synchronization_detector(device) as waits, reads:
            compute()
        written, changed = reads.written, difference(before, state_of(module))
    if drawn := random.drawn:
        random.restore()
    if waits():
        raise UnrecordableError(
            "it synchronises with the device, as .item(), a boolean mask or a tensor made from numbers does"
        )
    if drawn:
        raise UnrecordableError("it draws random numbers")
    if written:
        raise UnrecordableError("it writes to its own tensors")
    if changed:
        raise UnrecordableError(f"{changed} changes with each pass")
    if reads.foreign:
        raise UnrecordableError("it uses tensors on another device")
    known = set(map(id, tensors))
    return tuple(each for each in reads.found if id(each) not in known)


def _check_kind(module: nn.Module) -> None:
    for each in module.modules():
        name = type(each).__name__
        if isinstance(each, torch.jit.ScriptModule) or hasattr(each, "_orig_mod") or each._compiled_call_impl:
            raise UnrecordableError(f"{name} is compiled")
        if any(base.__module__.startswith(_WRAPPERS) for base in type(each).__mro__):
            raise UnrecordableError(f"{name} communicates with other processes or devices")
        for tensor in (*each._parameters.values(), *each._buffers.values()):
            if tensor is not None and not _is_plain(tensor):
                raise UnrecordableError(f"{name} holds a {type(tensor).__name__} of layout {tensor.layout}")


class _ReadTracker(TorchDispatchMode):
    """Records the tensors that are read inside but not made inside, and whether any tensor is on another device.

    Scalar tensors on another device that are made inside do not count: PyTorch makes them from Python numbers.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.foreign, self._device = False, device
        self._found: dict[int, tuple[Tensor, int]] = {}
        self._made: set[int] = set()

    @property
    def found(self) -> list[Tensor]:
        return [tensor for tensor, _ in self._found.values()]

    @property
    def written(self) -> bool:
        return any(_version(tensor) != version for tensor, version in self._found.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for each in _tensors_in((args, kwargs)):
            if _storage(each) not in self._made:
                self._found.setdefault(id(each), (each, _version(each)))
                self.foreign |= each.device != self._device
        result = func(*args, **(kwargs or {}))
        for each in _tensors_in(result):
            self._made.add(_storage(each))
            self.foreign |= each.device != self._device and each.ndim > 0
        return result


@contextlib.contextmanager
def _synchronization_detector(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether something inside synchronised with the device."""
    if device.type != "cuda":
        yield lambda: False
        return
    before = torch.cuda.get_sync_debug_mode()
    # Not "error", which would raise in other threads too.
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: any("called a synchronizing" in str(each.message) for each in seen)
        finally:
            torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def _weights_cast_inside(device: torch.device) -> Iterator[None]:
    # Without this, the graph would read weights in autocast's cache, which are freed after the attack.
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False):
        yield


class _ModuleGraphs:
    """The graphs of a module, and its recent computations."""

    def __init__(self) -> None:
        self.graphs: OrderedDict[Key, RecordedGraph] = OrderedDict()
        self.recent: deque[Key] = deque(maxlen=RECENT_CALLS)
        self.refused = False
        self._changes = 0

    def make_room(self) -> None:
        """Remove the least recently used graphs, to have space for a new one."""
        while len(self.graphs) >= MAX_GRAPHS:
            self.graphs.popitem(last=False)

    def note(self, module: nn.Module, key: Key, recorded: RecordedGraph | None) -> None:
        """Record that a computation ran in this call, with its graph if there is one."""
        if recorded is not None:
            self.graphs[key] = recorded
            self.graphs.move_to_end(key)
            self._changes = 0
        elif others := [state for what, state in self.recent if what == key[0]]:
            self._changes += 1
            if self._changes == WARN_AFTER:
                warnings.warn(
                    f"graph=True has no effect: {type(module).__name__} changes from one attack to the next "
                    f"({difference(others[-1], key[1])}), so no graph of it can be used again.",
                    stacklevel=2,
                )
        self.recent.append(key)

    def refuse(self, module: nn.Module, error: Exception) -> None:
        """Record no graphs of this module any more, and warn."""
        self.refused = True
        self.graphs.clear()
        reason = str(error).partition("\n")[0]
        if not isinstance(error, UnrecordableError):
            reason = f"{type(error).__name__}: {reason}"
        warnings.warn(
            f"{type(module).__name__} cannot be run as a CUDA graph ({reason}), so attacks run it without graphs. The results are the "
            "same.",
            stacklevel=2,
        )


# No value here may refer to the module, or the module would never be freed.
_kept: WeakKeyDictionary[nn.Module, _ModuleGraphs] = WeakKeyDictionary()


def _kept_with(module: nn.Module) -> _ModuleGraphs:
    return _kept.setdefault(module, _ModuleGraphs())


def state_of(module: nn.Module) -> State:
    """The state that a graph of the module depends on: addresses of tensors, modes, hooks, and attributes such as numbers.

    Metrics are ignored: they change at every step, and the model does not use them.
    """
    state: list[tuple[str, Hashable]] = []
    for path, each in module.named_modules():
        if isinstance(each, (Metric, MetricCollection)):
            continue
        hooks = tuple(
            map(tuple, (each._forward_pre_hooks, each._forward_hooks, each._backward_pre_hooks, each._backward_hooks))
        )
        state.append((path or "it", (type(each), each.training, hooks)))
        dot = path and f"{path}."
        state.extend((f"{dot}{name}", _token(value)) for name, value in _own(each))
    return tuple(state)


def difference(state: State, other: State) -> str | None:
    """The name of the first entry in which two states differ; ``None`` if they are equal."""
    there = dict(other)
    for name, token in state:
        if name not in there or there.pop(name) != token:
            return name
    return next(iter(there), None)


def _own(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module._parameters.items()
    yield from module._buffers.items()
    for name, value in vars(module).items():
        if name not in MODULE_ATTRIBUTES and (isinstance(value, Tensor) or type(value) in _LEAVES):
            yield name, value


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [value for each in module.modules() for _, value in _own(each) if isinstance(value, Tensor)]


def _token(value: Any) -> Hashable:
    if not isinstance(value, Tensor):
        return value
    return (value.data_ptr(), *tensor_signature(value), value.stride()) if _is_plain(value) else id(value)


def _surroundings(device: torch.device) -> tuple[Hashable, ...]:
    """Settings that a recording depends on, and the CUDA stream: the same graph must not run on two streams at once."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return autocast, torch.are_deterministic_algorithms_enabled(), stream


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN and tensor.layout is torch.strided


def _tensors_in(values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
