"""What one thread at a time may work on."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator

import torch


class ObjectLocks:
    """Objects that one thread at a time holds: several at once, and again by the thread that holds them already.

    All of them are taken together or none is, so that their order does not matter. Where threads that hold something wait for each other
    in a circle, the one that would close it gets an error.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders: dict[int, tuple[int, int]] = {}  # by object: the thread, and how many times
        self._wanted: dict[int, set[int]] = {}  # by thread: the objects that it waits for
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    @contextlib.contextmanager
    def __call__(self, objects: Iterable[object]) -> Iterator[None]:
        """Wait until no other thread holds any of these objects, and hold them inside.

        Raises:
            RuntimeError: if the threads that hold them wait for what this one holds.
        """
        if _in_autograd_worker():
            # Whoever called backward() holds what it needs, and waits for this thread.
            yield
            return
        kept = list(objects)  # alive, so that no other object gets one of their ids
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
                        "Two threads attack models that run each other, each inside of the other's attack: they would wait for each "
                        "other forever. Give each thread a copy of the model (copy.deepcopy), or attack in one thread."
                    )
                self._changed.wait()
        finally:
            del self._wanted[me]

    def _ahead_of(self, thread: int) -> set[int]:
        """The threads that hold what this one waits for."""
        holders = {self._holders[key][0] for key in self._wanted.get(thread, ()) if key in self._holders}
        return holders - {thread}

    def _would_wait_forever(self, me: int, ahead: set[int]) -> bool:
        seen: set[int] = set()
        while ahead := ahead - seen:
            seen |= ahead
            ahead = set().union(*(self._ahead_of(thread) for thread in ahead))
        return me in seen

    def _forked(self) -> None:
        # The other threads are not in the child, nor will they ever let go.
        me = threading.get_ident()
        self._changed, self._wanted = threading.Condition(), {}
        self._holders = {key: holder for key, holder in self._holders.items() if holder[0] == me}


locked = ObjectLocks()
"""The one of this package."""


def _in_autograd_worker() -> bool:
    # Backward passes on accelerators run in threads that PyTorch made, and with them the passes that checkpointing makes again.
    return torch._C._current_graph_task_id() != -1 and isinstance(threading.current_thread(), threading._DummyThread)
