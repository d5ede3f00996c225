"""What benchmarks keep on disk; and where ``defenses.py`` keeps its runs: a folder each, shared by all processes that work on them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: Any) -> None:
    """Write JSON so that a reader finds the old or the new one, and never a part."""
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def kept(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``compute`` returned, now or in an earlier run."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, compute())
    return read(path)


def short_hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


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


IDENTITY = ("protocol", "recipe", "changes", "averaged", "seed")
"""Fields of a record that decide its result."""


class Run:
    """One training run and what was measured on it.

    Args:
        work: the folder of all runs.
        identity: all that decides its result, the fields of ``IDENTITY``; another identity is another folder.
    """

    def __init__(self, work: Path, identity: dict[str, Any]) -> None:
        self.identity = identity
        name = f"{identity['protocol']['dataset']}-{identity['recipe']}-{identity['seed']}-{short_hash(identity)}"
        self.folder = work / re.sub(r"[^\w.-]", "_", name)
        self.weights = self.folder / "weights.pt"

    @property
    def record(self) -> dict[str, Any]:
        return read(self.folder / "run.json") or dict(self.identity)

    def store(self, **finished: Any) -> None:
        """Add to the record what has been finished. For the process that has claimed the run."""
        write_atomically(self.folder / "run.json", self.record | finished)

    def claim(self) -> contextlib.AbstractContextManager[bool]:
        return claimed(self.folder / "lock")


def adopt(work: Path, written: Path) -> None:
    """Take over the runs that an earlier sitting, perhaps on another machine, has left in its results, without their weights."""
    for record in read(written).get("runs", []):
        run = Run(work, {field: record[field] for field in IDENTITY})
        with run.claim() as ours:
            if ours and not (run.folder / "run.json").exists():
                run.store(**record)


def records(work: Path, protocol: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of all runs under a protocol, whichever process made them."""
    found = (read(path) for path in sorted(work.glob(f"{protocol['dataset']}-*/run.json")))
    return [record for record in found if record["protocol"] == protocol]
