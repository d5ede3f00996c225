"""A tensor and its value at one moment, which is put back if it was written to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class TensorSnapshot:
    """Takes note of a tensor's value.

    Whether it was written to its version says; ``batch_norm`` writes to running statistics without a change of version, but counts its batches.

    Args:
        tensor: one that no graph has made.
        count: the number of batches that the tensor is a statistic of, if it is one.
    """

    def __init__(self, tensor: Tensor, count: Tensor | None = None) -> None:
        self.value = tensor.detach().clone()
        self._tensor, self._count, self._required = tensor, count, tensor.requires_grad
        self._note()

    @property
    def written(self) -> bool:
        """Whether it was written to since."""
        return self._versions != self._now()

    def restore(self) -> None:
        """Give the tensor its value back."""
        tensor = self._tensor
        if tensor._version == self._versions[0]:
            tensor.data.copy_(self.value)  # as batch_norm wrote: a graph that saved it does not mind
            return
        parameter = isinstance(tensor, nn.Parameter) and tensor.is_leaf  # whose flag is its owner's matter
        if tensor.requires_grad and not self._required and not parameter and not tensor._is_view():
            tensor.detach_()  # what was written had a graph
        tensor.copy_(self.value)

    def _note(self) -> None:
        self._versions = self._now()

    def _now(self) -> tuple[int, int]:
        return self._tensor._version, 0 if self._count is None else self._count._version


def restore_written(kept: Iterable[TensorSnapshot]) -> None:
    """Give those that were written to their values back; a copy would spoil graphs that saved the others for their backward."""
    written = [each for each in kept if each.written]
    with torch.no_grad():
        for each in written:
            each.restore()
    for each in written:  # when the counts are back as well
        each._note()


def batch_count(module: nn.Module, name: str) -> Tensor | None:
    """The number of batches that a buffer of a module is a running statistic of, if it is one."""
    if isinstance(module, nn.modules.batchnorm._NormBase) and name in ("running_mean", "running_var"):
        return module.num_batches_tracked
    return None
