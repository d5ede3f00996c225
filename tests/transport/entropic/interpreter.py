"""A process in which Triton's kernels are interpreted, which is decided where their modules are imported."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

LIMIT = 600
"""Seconds after which a call ends the process, which says where it was."""


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """Yields a function that calls another one in the process. It is started once, because to import takes seconds."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_interpret) as pool:
        yield lambda function, *arguments: pool.submit(_call, function, *arguments).result()


def _interpret() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """Not even the end of the parent by force leaves the process behind, waiting for calls."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    try:
        return function(*arguments)
    finally:
        faulthandler.cancel_dump_traceback_later()
