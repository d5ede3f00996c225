"""Settings of the whole process that threads change at the same time."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any


class SharedContext:
    """One context for all threads: the first thread in enters it, and the last one out leaves it.

    So with threads that come and go the context may stay entered for longer than any of them is inside. A thread that is alone inside
    may nest it: then it is entered and left on its own, as without this class.

    Args:
        context: makes a context, which may be entered by one thread and left by another.
    """

    def __init__(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._context, self._lock = context, threading.Lock()
        self._inside: Counter[int] = Counter()
        self._entered: list[AbstractContextManager[Any]] = []
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Be inside of the context."""
        me, mine = threading.get_ident(), None
        with self._lock:
            if not self._inside.keys() - {me}:
                mine = self._context()
                mine.__enter__()
                self._entered.append(mine)
            self._inside[me] += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside[me] -= 1
                self._inside = +self._inside  # without those who left
                if not self._inside:
                    while self._entered:
                        self._entered.pop().__exit__(None, None, None)
                elif self._inside.keys() == {me} and self._entered[-1] is mine:
                    self._entered.pop().__exit__(None, None, None)

    def _forked(self) -> None:
        # The other threads are not in the child, nor will they ever leave.
        me = threading.get_ident()
        self._lock, self._inside = threading.Lock(), +Counter({me: self._inside[me]})
