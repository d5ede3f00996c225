"""Run a model on a part of a batch, also one that only takes whole batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_wdefense.modules.outputs import tensor_of


class PartialBatchModel:
    """A model on parts of a batch: what is left of it, or was chosen.

    A model that has a fixed batch size, or squeezes, fails on sizes that its loader never gave it. Where it does, or its outputs do not
    come one a sample, parts are filled up with clean samples, for which a whole batch is run; a warning says so.

    Args:
        run: takes inputs in model units.
        batch: the clean inputs ``(N, ...)``, in model units.
        whole: never try a part.
    """

    def __init__(self, run: Callable[[Tensor], Any], batch: Tensor, *, whole: bool = False) -> None:
        self._run, self._batch, self._whole = run, batch, whole

    def __call__(self, inputs: Tensor) -> Any:
        """The outputs for a part, or for all of the batch."""
        missing = len(self._batch) - len(inputs)
        if missing <= 0:
            return self._run(inputs)
        if self._whole:
            return self._run_padded(inputs)
        try:
            outputs = self._run(inputs.clone())  # the model may work in place
            reason = _shape_problem(outputs, len(inputs))
        except Exception as error:
            outputs, reason = self._run_padded_after(inputs, error), f"{type(error).__name__}: {error}"
        else:
            if reason is None:
                return outputs
            outputs = self._run_padded(inputs)
        self._whole = True
        warnings.warn(
            f"The model does not take a part of a batch, {len(inputs)} of {len(self._batch)} samples ({reason}), so it is run on whole "
            "ones, which takes longer.",
            stacklevel=2,
        )
        return outputs

    def _run_padded_after(self, inputs: Tensor, error: Exception) -> Any:
        """The outputs by way of a whole batch, if it is the part's size that the model fails on, and not something else."""
        try:
            outputs = self._run_padded(inputs)
        except Exception:
            raise error from None
        try:
            self._run(inputs.clone())
        except Exception:
            return outputs
        raise error

    def _run_padded(self, inputs: Tensor) -> Any:
        size, whole = len(inputs), len(self._batch)
        outputs = self._run(torch.cat([inputs, self._batch[size:].to(inputs)]))
        return apply_to_collection(
            outputs, Tensor, lambda each: each[:size] if each.ndim and len(each) == whole else each
        )


def _shape_problem(outputs: Any, size: int) -> str | None:
    """What is wrong with the outputs for so many samples, if they hold a tensor."""
    try:
        found = tensor_of(outputs)
    except TypeError:
        return None
    return None if found.ndim and len(found) == size else f"outputs of shape {tuple(found.shape)}"
