"""Locks on arbitrary objects, so that one thread at a time works with a module or a setting."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator

import torch


class ObjectLocks:
    """A reentrant lock for each object, with detection of deadlocks.

    A thread takes all the locks that it asks for together, so their order does not matter. If waiting would close a
    circle of threads that wait for each other, the thread gets an error instead.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders: dict[int, tuple[int, int]] = {}  # id of the object -> the thread that holds it, and how often
        self._wanted: dict[int, set[int]] = {}  # thread -> ids of the objects that it waits for
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    @contextlib.contextmanager
    def __call__(self, objects: Iterable[object]) -> Iterator[None]:
        """Wait until no other thread holds any of these objects, and hold them inside the context.

        Raises:
            RuntimeError: for a deadlock: the threads that hold these objects wait for objects that this thread holds.
        """
        if _in_autograd_worker():
            # The thread that called backward() holds the locks, and waits for this thread.
            yield
            return
        kept = list(objects)  # keeps them alive, so that no other object gets one of their ids
        me, keys = threading.get_ident(), {id(each) for each in kept}
        with self._changed:
            self._wait(me, keys)
            for key in keys:
                self._holders[key] = me, self._holders.get(key, (me, 0))[1] + 1
        try:
            yield
        finally:
            with self._changed:
                for key in keys:
                    times = self._holders.pop(key)[1] - 1
                    if times:
                        self._holders[key] = me, times
                self._changed.notify_all()

    def _wait(self, me: int, keys: set[int]) -> None:
        self._wanted[me] = keys
        try:
            while ahead := self._ahead_of(me):
                if self._would_wait_forever(me, ahead):
                    raise RuntimeError(
                        "Deadlock: two threads attack models that share modules, and each waits for a module that the other one "
                        "uses. Give each thread a copy of the model (copy.deepcopy), or run the attacks in one thread."
                    )
                self._changed.wait()
        finally:
            del self._wanted[me]

    def _ahead_of(self, thread: int) -> set[int]:
        """The threads that hold the objects that this thread waits for."""
        holders = {self._holders[key][0] for key in self._wanted.get(thread, ()) if key in self._holders}
        return holders - {thread}

    def _would_wait_forever(self, me: int, ahead: set[int]) -> bool:
        seen: set[int] = set()
        while ahead := ahead - seen:
            seen |= ahead
            ahead = set().union(*(self._ahead_of(thread) for thread in ahead))
        return me in seen

    def _forked(self) -> None:
        # The other threads do not exist in the child process, so their locks must be released here.
        me = threading.get_ident()
        self._changed, self._wanted = threading.Condition(), {}
        self._holders = {key: holder for key, holder in self._holders.items() if holder[0] == me}


locked = ObjectLocks()
"""The locks of this package: ``with locked(objects): ...``."""


def _in_autograd_worker() -> bool:
    # Backward passes on accelerators, and the forward passes that activation checkpointing repeats in them, run in threads of PyTorch.
    return torch._C._current_graph_task_id() != -1 and isinstance(threading.current_thread(), threading._DummyThread)
