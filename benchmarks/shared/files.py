"""What benchmarks keep on disk: whole or not at all, in whatever moment they are killed, and shared by all processes that work on it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

UNFINISHED = ".wdefense-unfinished"
"""Ends the names of files and folders that are being written; their process holds a lock on them."""


@contextlib.contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether the lock is ours. The system frees it when its process ends, in whatever way, so none is ever stale."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")  # for people who look
        lock.flush()
        yield True


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """For a file that a benchmark reads once and writes again and again: a second process would undo the first one's work.

    Raises:
        SystemExit: if another process has the file.
    """
    with claimed(path.with_suffix(".lock")) as ours:
        if not ours:
            raise SystemExit(f"Another process works on {path}: wait until it has ended, or give another --output.")
        yield


@contextlib.contextmanager
def _in_use(place: Path) -> Iterator[bool]:
    """Whether the lock of an unfinished file or folder is ours, and it is still there."""
    try:
        handle = os.open(place, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = place.exists()
        except BlockingIOError:
            ours = False
        yield ours
    finally:
        os.close(handle)


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def sweep(folder: Path, *, below: bool = False) -> None:
    """Remove what killed processes have left unfinished in a folder, and ``below`` it; never what a living one works on."""
    for place in sorted((folder.rglob if below else folder.glob)(f"*{UNFINISHED}")):
        with _in_use(place) as ours:
            if ours:
                _remove(place)


@contextlib.contextmanager
def _unfinished(folder: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new file or folder of this process alone, removed in the end if it is still there."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    while True:
        make(place := folder / f"{uuid.uuid4().hex}{UNFINISHED}")
        with _in_use(place) as ours:
            if not ours:  # another process has swept it before we had the lock
                continue
            try:
                yield place
            finally:
                _remove(place)
            return


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder in another, which the next call removes if this one is killed."""
    with _unfinished(folder, Path.mkdir) as place:
        yield place


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of ``path`` when it is complete: a reader finds the old or the new one, never a part."""
    with _unfinished(path.parent, Path.touch) as place:
        with place.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(place, path)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def write_atomically(path: Path, content: Any, *, indent: int | None = 1) -> None:
    """As JSON."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def save(path: Path, state: Any) -> None:
    """Tensors, for :func:`load`."""
    with replacing(path) as file:
        torch.save(state, file)


def read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or none that can be read, which is said."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        return _unreadable(path, error) or {}
    return found if isinstance(found, dict) else _unreadable(path, "it holds no JSON object") or {}


def load(path: Path) -> Any:
    """Tensors on the CPU; ``None`` where there are none, or none that can be read, which is said."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except (RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        return _unreadable(path, error)


def _unreadable(path: Path, why: object) -> None:
    reason = str(why).splitlines()[0] if str(why) else type(why).__name__
    print(f"{path} cannot be read, and counts as absent: {reason}", file=sys.stderr, flush=True)


def kept(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``compute`` returned, now or in an earlier run."""
    if not (found := read(path)):
        write_atomically(path, compute())
        found = read(path)
    return found


def short_hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
