"""Plants known faults in a copy of the package, one by one, and says which of them the tests do not see.

Run by hand from anywhere; nothing in the working tree is changed, and pytest collects nothing here::

    python tests/planted_faults.py                  # all of them, about half an hour on one core
    python tests/planted_faults.py 3 10-20 metrics/ # some: numbers, ranges, or parts of a file's path
    python tests/planted_faults.py --list           # what there is

A line a fault: ``caught``, ``SURVIVED`` (no named test failed), ``survived`` (expected: the line says why), or an error of the table:
``NOT FOUND`` (its text is not in the file exactly once), ``UNFIT`` (its tests fail without it) and ``BROKEN`` (they cannot even be
collected with it). The exit code is 1 if one survives unexpectedly, else 2 if the table is in error, else 0.

Why by hand, and not mutmut or cosmic-ray: both make a mutant of every operator and constant, many thousands in 13,000 lines, and each costs
the tests of its module: days on two cores. Most are equivalent or of no interest, and none drops a ``detach``, a projection or a reduction
over ranks. Faults that somebody could make say more, in less than an hour.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lightning_wdefense"
COPIED = (PACKAGE, "tests", "pyproject.toml")
"""The tests too: those that start processes give them the folder above their own."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", help="numbers, ranges (10-20), or parts of a file's path; all by default")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for the tests of a fault (default: 300)")
    parser.add_argument("--list", action="store_true", help="show the table and plant nothing")
    options = parser.parse_args(arguments)
    chosen = {number: fault for number, fault in enumerate(FAULTS, 1) if _is_chosen(number, fault, options.which)}
    if not chosen:
        parser.error(f"no fault is chosen by {' '.join(options.which)!r}; there are {len(FAULTS)}.")
    if options.list:
        for number, fault in chosen.items():
            print(f"{number:4} {fault.file}: {fault.what}")
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"
    _import_what_stays()
    with tempfile.TemporaryDirectory(prefix="planted-faults-") as folder:
        return _plant_all(chosen, Copy(Path(folder)), options.limit)


def _plant_all(chosen: dict[int, Fault], copy: Copy, limit: float) -> int:
    started, counts = time.monotonic(), dict.fromkeys(("caught", "SURVIVED", "survived", "error"), 0)
    failing = copy.failing(fault.tests for fault in chosen.values())
    print(f"unplanted: {len(failing)} failing tests, {time.monotonic() - started:.0f} s", flush=True)
    for number, fault in chosen.items():
        began = time.monotonic()
        unfit = [test for test in failing if test.startswith(fault.tests)]
        verdict = f"UNFIT ({unfit[0]})" if unfit else copy.plant(fault, limit)
        if verdict.startswith("SURVIVED") and fault.survives:
            verdict = f"survived ({fault.survives})"
        elif verdict.startswith("caught") and fault.survives:
            verdict += ", though the table says that it survives"
        kind = verdict.split()[0].rstrip(",")
        counts[kind if kind in counts else "error"] += 1
        print(f"{number:4} {time.monotonic() - began:4.0f} s  {fault.file}: {fault.what}: {verdict}", flush=True)
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    print(f"{len(chosen)} faults: {summary}; {(time.monotonic() - started) / 60:.0f} min")
    return 1 if counts["SURVIVED"] else 2 if counts["error"] else 0


class Copy:
    """A copy of the package and its tests, in which faults are planted.

    Args:
        folder: an empty folder for it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, folder / name)

    def failing(self, sets: Iterable[tuple[str, ...]]) -> list[str]:
        """Which of all these tests fail as it is; ends the program if they cannot be run."""
        code, output = self._pytest("--tb=line", "-rfE", *dict.fromkeys(test for each in sets for test in each))
        if code not in (0, 1):
            sys.exit(f"{output}\nThe tests that the table names cannot be run (above).")
        lines = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return [line.partition(" ")[2].partition(" - ")[0] for line in lines]

    def plant(self, fault: Fault, limit: float) -> str:
        """Plant one fault, run its tests, and take it out again; returns the verdict."""
        planted = self.folder / PACKAGE / fault.file
        source = planted.read_text() if planted.exists() else ""
        if source.count(fault.text) != 1:
            return f"NOT FOUND ({source.count(fault.text)} times in the file)"
        planted.write_text(source.replace(fault.text, fault.instead))
        _forget_compiled(planted)
        try:
            code, output = self._pytest("-x", "--tb=line", *fault.tests, limit=limit)
        finally:
            planted.write_text(source)
            _forget_compiled(planted)
        if code is None:
            return "caught (by the time limit)"
        if code not in (0, 1):
            return f"BROKEN ({output.strip().splitlines()[-1]})"
        return "caught" if code else "SURVIVED"

    def _pytest(self, *arguments: str, limit: float = math.inf) -> tuple[int | None, str]:
        """Exit code and output of pytest in a process of its own; no code where it took too long.

        A fork of this one: PyTorch and Lightning take longer to import than most faults' tests take to run.
        """
        output = self.folder / "output.txt"
        child = os.fork()
        if child == 0:
            code = 70  # of an error outside of pytest
            try:
                code = self._run_here(output, ["-q", "-p", "no:cacheprovider", "-n", "0", "-m", "", *arguments])
            finally:
                os._exit(code)
        end, ended, status = time.monotonic() + limit, 0, 0
        try:
            while not ended and time.monotonic() < end:
                ended, status = os.waitpid(child, os.WNOHANG)
                time.sleep(0.05)
        finally:
            if not ended:
                os.killpg(child, signal.SIGKILL)  # and what the tests started
                os.waitpid(child, 0)
        return (os.waitstatus_to_exitcode(status) if ended else None), output.read_text()

    def _run_here(self, output: Path, arguments: list[str]) -> int:
        os.setsid()
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(self.folder)
        os.environ["PYTHONPATH"] = str(self.folder)  # of the processes that tests start
        sys.path[:] = [str(self.folder), *(path for path in sys.path if path != str(ROOT / "tests"))]
        found = importlib.util.find_spec(PACKAGE)
        assert found is not None
        assert str(found.origin).startswith(str(self.folder)), f"the tests would see {found.origin}"
        import pytest

        code = int(pytest.main(arguments))
        sys.stdout.flush()
        return code


def _import_what_stays() -> None:
    """What all tests need and no fault is planted in."""
    for name in ("torch._dynamo", "lightning", "torchmetrics", "sklearn.datasets", "scipy.stats", "ot"):
        importlib.import_module(name)


def _forget_compiled(source: Path) -> None:
    Path(importlib.util.cache_from_source(str(source))).unlink(missing_ok=True)


def _is_chosen(number: int, fault: Fault, which: Sequence[str]) -> bool:
    for each in which:
        first, _, last = each.partition("-")
        if first.isdigit() and (not last or last.isdigit()):
            if int(first) <= number <= int(last or first):
                return True
        elif each in fault.file:
            return True
    return not which


if __name__ == "__main__":
    sys.exit(main())
