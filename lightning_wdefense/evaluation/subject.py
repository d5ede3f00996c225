"""The model that is evaluated, without the wrappers that only training needs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_wdefense.modules.parallel import precision_of, unwrapped
from lightning_wdefense.modules.recording import OUTPUTS, PENULTIMATE, ForwardRecorder, find_submodule


@dataclass(frozen=True)
class Subject:
    """The model that attacks run.

    Args:
        module: the model, from inputs to outputs.
        precision: the precision plugin of Fabric, in which the model runs; ``None`` for the surrounding precision.
    """

    module: nn.Module
    precision: Any = None

    @classmethod
    def of(cls, model: Any) -> Subject:
        """The model in the wrappers of data parallelism and of Fabric.

        ``DistributedDataParallel`` exchanges buffers in its forward pass, so ranks that run it a different number of times would
        wait for each other, and Fabric's wrapper refuses gradients that it did not take itself. Code of ``torch.compile`` is kept
        if there is no such wrapper inside.

        Raises:
            TypeError: if the model is not an ``nn.Module``, or its parameters are sharded in a way that an attack cannot work with.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"evaluate needs the model as an nn.Module from inputs to logits, got a {type(model).__name__}: wrap a function in "
                "the forward of a module."
            )
        return cls(unwrapped(model), precision_of(model))

    @property
    def device(self) -> torch.device | None:
        """The device of the first parameter or buffer; ``None`` if there is neither."""
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            return tensor.device
        return None

    def layer(self, features: str | None) -> str | None:
        """``features=`` as a layer of :attr:`module`: the path in the user's own model, which may be compiled.

        Raises:
            ValueError: if there is no such layer; the message lists the most similar names.
        """
        original = getattr(self.module, "_orig_mod", None)
        if features not in (None, OUTPUTS, PENULTIMATE) and original is not None:
            find_submodule(original, str(features), "features")
            features = f"_orig_mod.{features}"
        ForwardRecorder(self.module, OUTPUTS if features is None else features)
        return features

    def inputs(self, batch: Any) -> Any:
        """A batch in the precision of the model."""
        return batch if self.precision is None else self.precision.convert_input(batch)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which the model runs."""
        return contextlib.nullcontext() if self.precision is None else self.precision.forward_context()
