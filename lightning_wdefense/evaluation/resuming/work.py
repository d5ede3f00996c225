"""The finished batches of an evaluation, kept in a file, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_wdefense.evaluation.measures import Measures
from lightning_wdefense.evaluation.samples import Samples

FORMAT = "lightning_wdefense.evaluation 1"
"""Stands in every file: what it is, and the version of its form."""

SHOWN = 80
"""Number of characters of a setting that a message shows."""

ADVICE = "Delete the file to start anew, or name another one."


class OtherEvaluationError(ValueError):
    """The finished batches in a file are of another model, other settings or other data."""


class KeptWork:
    """Finished batches of an evaluation in a file.

    The file is written anew after each batch and then takes the place of the old one, so that whatever ends the process leaves a
    whole file. It holds tensors, numbers and texts only.

    Args:
        path: the file; its folder is made if there is none.
        asked: all that decides the values, as texts by their names.

    Attributes:
        samples: the samples of the finished batches.
        whole: whether the model must be run on whole batches; ``None`` before the first one.

    Raises:
        OtherEvaluationError: if the file is of another evaluation. It stays as it is.
        ValueError: if it is no file of an evaluation at all. It stays as it is.
    """

    def __init__(self, path: Path, asked: Mapping[str, str]) -> None:
        self._path, self._asked = path, dict(asked)
        self._digests: list[str] = []
        self._states: dict[str, Any] = {}
        self._finished = False
        self.samples: Samples = {}
        self.whole: bool | None = None
        if path.exists():
            self._load()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        """Number of finished batches."""
        return len(self._digests)

    def has(self, index: int, digest: str) -> bool:
        """Whether a batch of the loader is finished.

        Args:
            index: its place.
            digest: digest of its inputs and labels.

        Raises:
            OtherEvaluationError: if another batch was finished in its place, or the evaluation ended before it.
        """
        if index >= len(self) and not self._finished:
            return False
        if index >= len(self):
            raise OtherEvaluationError(
                f"The loader gives more batches than the {len(self)} of {self._path}, which is of a finished evaluation: the data differ. {ADVICE}"
            )
        if digest != self._digests[index]:
            raise OtherEvaluationError(
                f"Batch {index} of the loader is another one than in {self._path}: the data, their order or the batch size differ. A loader "
                f"that shuffles needs the same seed in both runs; better is shuffle=False. {ADVICE}"
            )
        return True

    def restore(self, measures: Measures) -> None:
        """Give new metrics the states that they had after the finished batches."""
        metrics = measures.metrics()
        if metrics.keys() != self._states.keys():
            raise OtherEvaluationError(
                f"{self._path} holds other metrics than this evaluation: {sorted(metrics.keys() ^ self._states.keys())}. {ADVICE}"
            )
        for name, metric in metrics.items():
            kept = self._states[name]
            for state, value in kept["values"].items():
                moved = tree_map(lambda each: each.to(metric.device) if isinstance(each, Tensor) else each, value)  # noqa: B023
                setattr(metric, state, moved)
            metric._update_count = kept["updates"]

    def add(self, digest: str, samples: Samples, measures: Measures, whole: bool) -> None:
        """Another batch is finished.

        Args:
            digest: digest of its inputs and labels.
            samples: the samples of all finished batches.
            measures: the metrics after it.
            whole: whether the model must be run on whole batches.
        """
        self.samples, self.whole = samples, whole
        self._digests.append(digest)
        self._states = {
            name: {"values": metric.metric_state, "updates": metric._update_count}
            for name, metric in measures.metrics().items()
        }
        self._write()

    def finish(self, batches: int) -> None:
        """The loader has ended after so many batches.

        Raises:
            OtherEvaluationError: if more of them were finished before.
        """
        if batches < len(self):
            raise OtherEvaluationError(
                f"The loader gave {batches} batches, but {self._path} holds {len(self)} finished ones: the data differ. {ADVICE}"
            )
        if batches and not self._finished:
            self._finished = True
            self._write()

    def _load(self) -> None:
        try:
            found = torch.load(self._path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise ValueError(
                f"{self._path}, where the finished batches would be kept, cannot be read: {error}."
            ) from error
        except Exception as error:  # torch.load has many
            raise ValueError(
                f"{self._path} is no file of finished batches, and is left as it is: name another one."
            ) from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(
                f"{self._path} holds no finished batches of an evaluation (of this version), and is left as it is: name another file."
            )
        self._check(found["asked"])
        self._digests, self._states, self._finished = found["batches"], found["states"], found["finished"]
        self.samples, self.whole = found["samples"], found["whole"]

    def _check(self, kept: dict[str, str]) -> None:
        names = dict.fromkeys((*self._asked, *kept))
        differ = [
            f"{name} ({_shown(*(side.get(name, 'nothing') for side in (kept, self._asked)))})"
            for name in names
            if kept.get(name) != self._asked.get(name)
        ]
        if differ:
            raise OtherEvaluationError(
                f"{self._path} holds finished batches of another evaluation. What differs (there, here): {'; '.join(differ)}. {ADVICE}"
            )

    def _write(self) -> None:
        content = {
            "format": FORMAT,
            "asked": self._asked,
            "batches": self._digests,
            "finished": self._finished,
            "whole": self.whole,
            "samples": self.samples,
            "states": self._states,
        }
        unfinished = self._path.with_name(f"{self._path.name}.{os.getpid()}.unfinished")
        try:
            # A tensor that is a view would bring all that it is a view of.
            torch.save(tree_map(lambda each: _own(each) if isinstance(each, Tensor) else each, content), unfinished)
            os.replace(unfinished, self._path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise


class Kept(NamedTuple):
    """What a file says of itself.

    Attributes:
        batches: number of finished batches.
        finished: whether they are all.
    """

    batches: int
    finished: bool


def finished_batches(path: Path) -> Kept:
    """What a file holds; nothing if there is none, or it is no such file."""
    with contextlib.suppress(Exception):  # torch.load has many
        found = torch.load(path, map_location="cpu", weights_only=True)
        return Kept(len(found["batches"]), found["finished"])
    return Kept(0, False)


def _own(tensor: Tensor) -> Tensor:
    """The tensor without a graph, and with a storage that is no larger than itself."""
    tensor = tensor.detach()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _shown(there: str, here: str) -> str:
    """Two texts, from a little before where they begin to differ."""
    start = next((i for i, (a, b) in enumerate(zip(there, here, strict=False)) if a != b), min(len(there), len(here)))
    start = max(0, start - SHOWN // 2) if max(len(there), len(here)) > SHOWN else 0
    parts = [
        ("..." if start else "") + text[start : start + SHOWN] + ("..." if len(text) > start + SHOWN else "")
        for text in (there, here)
    ]
    return ", ".join(parts)
