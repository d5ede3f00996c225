"""Run a model on a part of a batch, even if the model accepts whole batches only."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_wdefense.modules.outputs import tensor_of


class PartialBatchModel:
    """A model that can be called on a part of a batch.

    A model with a fixed batch size, or with a ``squeeze``, may fail on a part of a batch, or return outputs of another
    size. In these cases the part is padded with clean samples to a whole batch, and a warning says so.

    Args:
        run: the model; takes inputs in model units.
        batch: the clean inputs ``(N, ...)``, in model units, for the padding.
        whole: always pad to a whole batch.
    """

    def __init__(self, run: Callable[[Tensor], Any], batch: Tensor, *, whole: bool = False) -> None:
        self._run, self._batch, self._whole = run, batch, whole

    def __call__(self, inputs: Tensor) -> Any:
        """The outputs for inputs ``(M, ...)`` in model units, ``M <= N``."""
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
            f"The model does not accept a part of a batch, {len(inputs)} of {len(self._batch)} samples ({reason}). It is run on whole "
            "batches instead, which takes longer.",
            stacklevel=2,
        )
        return outputs

    def _run_padded_after(self, inputs: Tensor, error: Exception) -> Any:
        """The outputs from a padded batch, if the model fails because of the size of the part; otherwise raise its error."""
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
    """Why the outputs do not have one row for each of ``size`` samples; ``None`` if they do, or hold no tensor."""
    try:
        found = tensor_of(outputs)
    except TypeError:
        return None
    return None if found.ndim and len(found) == size else f"outputs of shape {tuple(found.shape)}"
