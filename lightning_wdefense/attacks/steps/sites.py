"""The place in a pipeline that the adversary perturbs: the inputs of a batch, or the output of a submodule."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.modules.attachments import attach_hook
from lightning_wdefense.modules.batches import BatchReader
from lightning_wdefense.modules.outputs import float32_or_better
from lightning_wdefense.modules.paths import as_key, resolve, value_at
from lightning_wdefense.modules.recording import find_submodule
from lightning_wdefense.modules.state.isolation import eager

CHANNELS = (1, 3, 4)
"""Channel numbers of images: a list of 3-D tensors with one of these in dimension 0 holds images, if nothing else tells."""


class PerturbationSite(ABC):
    """One batch, and the values in it that the adversary perturbs.

    Attributes:
        values: the values that the adversary perturbs, detached, as one tensor ``(M, ...)``; each row has its own ball.
        threat: the threat model, for the units of ``values``.
        size: number of samples in the batch.
    """

    values: Tensor
    threat: ThreatModel
    size: int

    @abstractmethod
    def perturbed(self, values: Tensor) -> contextlib.AbstractContextManager[Any]:
        """A context that yields the batch to run: inside it, a pass over that batch uses these values instead of the clean ones.

        Args:
            values: values in the shape of ``self.values``.
        """


class InputSite(PerturbationSite):
    """The inputs in a batch: one tensor, or several, each with its own ball.

    Several tensors of the same shape are concatenated along dimension 0. Of tensors of different shapes (object
    detection: images of different sizes), each sample becomes a row in data units, padded with zeros.

    Args:
        batches: finds the inputs.
        batch: the batch.
        threat: the threat model.
    """

    def __init__(self, batches: BatchReader, batch: Any, threat: ThreatModel) -> None:
        self._batches, self._batch = batches, batch
        self._inputs = [each.detach() for each in batches.inputs(batch)]
        self.threat, self._rows = threat, False
        self.size = len(self._inputs) if self._samples else len(self._inputs[0])
        if len(self._inputs) == 1 and not self._samples:
            self.values = self._inputs[0]
        elif len({each.shape[1:] for each in self._inputs}) == 1 and not self._samples:
            self.values = torch.cat(self._inputs)
        else:
            self._rows, self._units = True, threat
            self.threat = replace(threat, mean=None, std=None)
            rows = [self._units.to_data(float32_or_better(self._batched(each))).flatten(1) for each in self._inputs]
            width = max(row.shape[1] for row in rows)
            empty = 0.0 if threat.bounds is None else min(max(0.0, threat.bounds[0]), threat.bounds[1])
            self.values = torch.cat([nn.functional.pad(row, (0, width - row.shape[1]), value=empty) for row in rows])

    @cached_property
    def _samples(self) -> bool:
        """Whether each tensor is one sample, as in a list of images (C, H, W) or of sequences of different lengths."""
        count, lengths, dimensions = len(self._inputs), [len(each) for each in self._inputs], self._inputs[0].ndim
        if dimensions < 2 or not self._batches.are_listed(self._batch):
            return False
        labels = self._batches.labels_or_none(self._batch)
        known = len(labels) if isinstance(labels, (list, tuple)) or (isinstance(labels, Tensor) and labels.ndim) else 0
        if known:
            by_sample, by_tensor = known == count, set(lengths) == {known} and isinstance(labels, Tensor)
            if by_sample != by_tensor:
                return by_sample
        return len(set(lengths)) > 1 or (dimensions == 3 and lengths[0] in CHANNELS)

    def _batched(self, each: Tensor) -> Tensor:
        return each.unsqueeze(0) if self._samples else each

    @contextlib.contextmanager
    def perturbed(self, values: Tensor) -> Iterator[Any]:
        """Yield the batch with other inputs."""
        yield self._batches.replace(self._batch, self._unpacked(values))

    def _unpacked(self, values: Tensor) -> list[Tensor]:
        if not self._rows and len(self._inputs) == 1:
            return [values]
        found, start = [], 0
        for each in self._inputs:
            like = self._batched(each) if self._rows else each
            part = values[start : start + len(like)]
            start += len(like)
            if self._rows:
                part = self._units.to_model(part[:, : like[0].numel()].reshape(like.shape)).reshape(each.shape)
            found.append(part.to(each.dtype))
        return found


class OutputSite(PerturbationSite):
    """The output of a submodule, such as the embeddings of tokens.

    Args:
        module: the submodule.
        values: the output of the submodule for the batch.
        batch: the batch.
        threat: the threat model, in units of that output.
        free: mask of the elements that may be perturbed (not padding), broadcastable to the values; ``None`` for all.
        by_token: use a ball for each token (each vector of the last dimension) instead of one for each sample.
    """

    def __init__(
        self,
        module: nn.Module,
        values: Tensor,
        batch: Any,
        threat: ThreatModel,
        *,
        free: Tensor | None = None,
        by_token: bool = False,
    ) -> None:
        self._module, self._batch, self.threat, self._free = module, batch, threat, free
        self._clean, self.size = values.detach(), len(values)
        self.values = self._clean.flatten(0, -2) if by_token else self._clean

    @contextlib.contextmanager
    def perturbed(self, values: Tensor) -> Iterator[Any]:
        """Yield the same batch, and add the perturbation of the values to the submodule's output in every pass."""
        delta = values.reshape(self._clean.shape) - self._clean.to(values.dtype)
        if self._free is not None:
            delta = delta * self._free.to(delta.dtype)

        def move(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output + delta.to(output.dtype)

        handle = attach_hook(self._module, move)
        try:
            with eager():  # compiled code ignores the new hook
                yield self._batch
        finally:
            handle.remove()


@dataclass(frozen=True)
class Perturb:
    """The output of a submodule that the adversary perturbs: embeddings of tokens, categorical columns or nodes of a graph.

    Args:
        path: dotted path to the submodule. It must run once in the step and return a floating-point tensor
            ``(N, ...)``.
        by: ``"sample"`` for a ball around the whole output of each sample, ``"token"`` for a ball around each vector of
            the last dimension.
        padding: key, position or path of a mask ``(N, T)`` in the batch, true or 1 for tokens; padding is not
            perturbed. ``None`` for ``attention_mask`` or ``mask``, if the batch has one. The ``padding_idx`` of an
            ``nn.Embedding`` is not perturbed either.

    Raises:
        ValueError: if ``by`` is neither ``"sample"`` nor ``"token"``.

    References:
        Miyato et al., "Adversarial training methods for semi-supervised text classification", 2017.

    Example:
        >>> Perturb("encoder.embeddings", by="token").by
        'token'
    """

    path: str
    by: Literal["sample", "token"] = "sample"
    padding: str | int | tuple[int | str, ...] | None = None

    def __post_init__(self) -> None:
        if self.by not in ("sample", "token"):
            raise ValueError(f'by must be "sample" or "token", got {self.by!r}.')
        object.__setattr__(self, "padding", as_key(self.padding))

    def site(self, root: nn.Module, batch: Any, threat: ThreatModel, run: Callable[[], Any]) -> OutputSite:
        """The values to perturb for one batch.

        Args:
            root: the module that the path starts at.
            batch: the batch.
            threat: the threat model, in units of the submodule's output.
            run: runs the batch once, without side effects.

        Raises:
            ValueError: if there is no such submodule, it does not run exactly once, it returns no floating-point
                tensor, its output lies outside the threat model's bounds, or the padding mask does not fit.
        """
        module = find_submodule(root, self.path, "perturb")
        seen: list[tuple[Any, Any]] = []

        def see(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.append(((*args, *kwargs.values()), output))

        handle = attach_hook(module, see, keywords=True)
        try:
            with eager():
                run()
        finally:
            handle.remove()
        if len(seen) != 1:
            raise ValueError(
                f"perturb={self.path!r} ran {len(seen)} times in the step, but must run once: name a submodule that runs once."
            )
        ((args, output),) = seen
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim < 2:
            found = f"{output.dtype} {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"perturb={self.path!r} returns {found}, but a floating-point tensor (N, ...) is needed: name another submodule."
            )
        if threat.bounds is not None and not bool(((output >= threat.bounds[0]) & (output <= threat.bounds[1])).all()):
            raise ValueError(
                f"The output of perturb={self.path!r} lies outside of the threat model's bounds {threat.bounds}, which are bounds of inputs. "
                'Use ThreatModel(norm="l2", eps=..., bounds=None), with eps in units of that output.'
            )
        free = self._free(module, args, output, batch)
        return OutputSite(module, output, batch, threat, free=free, by_token=self.by == "token")

    def _free(self, module: nn.Module, args: Any, output: Tensor, batch: Any) -> Tensor | None:
        free: Tensor | None = None
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            free = args[0] != module.padding_idx
        mask = _mask(batch, self.padding)
        fits = mask is not None and mask.shape == output.shape[: mask.ndim]
        if mask is not None and self.padding is not None and not fits:
            raise ValueError(
                f"padding={self.padding!r} has shape {tuple(mask.shape)}, which does not fit the output of perturb={self.path!r}, "
                f"{tuple(output.shape)}: name a mask in the shape of its first dimensions, true for tokens."
            )
        if mask is not None and fits:
            free = mask.bool() if free is None else free & mask.bool()
        if free is None:
            return None
        return free.reshape(*free.shape, *[1] * (output.ndim - free.ndim))


def _mask(batch: Any, key: str | int | tuple[int | str, ...] | None) -> Tensor | None:
    for name in ("attention_mask", "mask") if key is None else (key,):
        path = resolve(batch, name)
        found = None if path is None else value_at(batch, path)
        if isinstance(found, Tensor):
            return found
    if key is not None:
        raise ValueError(f"padding={key!r} names no tensor in the batch: give the key, position or path of a mask.")
    return None
