"""Where runs are kept: a folder each, shared by all processes that work on them."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.shared.files import claimed, load, read, save, short_hash, write_atomically

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
        self._record, self._weights = self.folder / "run.json", self.folder / "weights.pt"

    @property
    def record(self) -> dict[str, Any]:
        return read(self._record) or dict(self.identity)

    @property
    def known(self) -> bool:
        """Whether it has a record."""
        return bool(read(self._record))

    def store(self, **finished: Any) -> None:
        """Add to the record what has been finished. For the process that has claimed the run."""
        write_atomically(self._record, self.record | finished)

    def weights(self) -> dict[str, Tensor] | None:
        """As they were trained; ``None`` if they are not there, or no record tells how they came about."""
        return load(self._weights) if "training" in self.record else None

    def store_trained(self, weights: dict[str, Tensor] | None, **finished: Any) -> None:
        """The record first: a process that is killed in between leaves no weights that another record might be taken to speak of."""
        self._weights.unlink(missing_ok=True)
        self.store(**finished)
        if weights is not None:
            save(self._weights, weights)

    def claim(self) -> contextlib.AbstractContextManager[bool]:
        return claimed(self.folder / "lock")


def adopt(work: Path, written: Path) -> None:
    """Take over the runs that an earlier sitting, perhaps on another machine, has left in its results, without their weights."""
    for record in read(written).get("runs", []):
        run = Run(work, {field: record[field] for field in IDENTITY})
        with run.claim() as ours:
            if ours and not run.known:
                run.store(**record)


def records(work: Path, protocol: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of all runs under a protocol, whichever process made them."""
    found = (read(path) for path in sorted(work.glob(f"{protocol['dataset']}-*/run.json")))
    return [record for record in found if record.get("protocol") == protocol]
