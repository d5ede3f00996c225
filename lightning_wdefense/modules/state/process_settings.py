"""Contexts for settings of the whole process that several threads use at the same time."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any


class SharedContext:
    """One context for all threads: the first thread enters it, and the last thread leaves it.

    If threads overlap, the context may stay entered for longer than any single thread is inside. A thread that is the
    only one inside may nest it: then each level is entered and left separately, as without this class.

    Args:
        context: makes the context; one thread may enter it and another one leave it.
    """

    def __init__(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._context, self._lock = context, threading.Lock()
        self._inside: Counter[int] = Counter()
        self._entered: list[AbstractContextManager[Any]] = []
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Enter the context if no other thread is inside."""
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
                self._inside = +self._inside  # drops threads with a count of 0
                if not self._inside:
                    while self._entered:
                        self._entered.pop().__exit__(None, None, None)
                elif self._inside.keys() == {me} and self._entered[-1] is mine:
                    self._entered.pop().__exit__(None, None, None)

    def _forked(self) -> None:
        # The other threads do not exist in the child process, so they must be removed here.
        me = threading.get_ident()
        self._lock, self._inside = threading.Lock(), +Counter({me: self._inside[me]})
