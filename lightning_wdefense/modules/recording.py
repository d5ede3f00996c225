"""Record a model's outputs and features during forward passes, by hooks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense._names import unknown_name
from lightning_wdefense.modules.attachments import attach_hook
from lightning_wdefense.modules.outputs import tensor_of
from lightning_wdefense.modules.state.isolation import eager, internal_pass_depth, isolated

OUTPUTS, PENULTIMATE = "outputs", "penultimate"

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Recording:
    """What was recorded in one or more forward passes.

    Attributes:
        outputs: the outputs of each call of the model.
        features: the features at each call of the feature layer.
        heads: the outputs of the last linear layer at each of its calls, if they are recorded.
    """

    outputs: list[Any] = field(default_factory=list)
    features: list[Any] = field(default_factory=list)
    heads: list[Any] = field(default_factory=list)


class ForwardRecorder:
    """Records a model's outputs and the features of one of its layers, by forward hooks, in the calling thread only.

    The hooks stay while the recorder is attached, because a compiled model ignores hooks that are added later. Outside
    of :meth:`recording` they do nothing.

    Args:
        model: the module whose outputs are recorded.
        features: ``"outputs"``; ``"penultimate"``, the input of the last linear layer that runs, or without a linear
            layer the input of the last convolution, averaged over positions; or a dotted path to a submodule, whose
            output is taken.
        pick: finds the outputs in what the model returns; ``None`` for all of it.

    Raises:
        ValueError: if there is no such submodule; the message lists the most similar names.
    """

    def __init__(self, model: nn.Module, features: str = OUTPUTS, pick: Callable[[Any], Any] | None = None) -> None:
        self.model, self.features, self._pick = model, features, pick
        self._handles: list[Any] = []
        self._here = threading.local()  # by thread: backward passes on accelerators, which repeat forward passes for checkpointing, run in other threads
        self._layer = None if features in (OUTPUTS, PENULTIMATE) else find_submodule(model, features, "features")

    def attach(self, example: Tensor | Callable[[], Any], *, temporary: bool = False, head: bool = False) -> None:
        """Register the hooks, if they are not registered yet.

        Args:
            example: a batch to find the penultimate layer with, or a function that runs the model without side effects.
            temporary: the passes to record run inside :func:`eager` only, so compiled code need not be compiled again.
            head: also record the outputs of the last linear layer.
        """
        if self._handles:
            return
        last: nn.Module | None = None
        if self.features == PENULTIMATE or head:
            last = last_linear(self.model, trial_pass(self.model, example) if isinstance(example, Tensor) else example)
            self._layer = last if self.features == PENULTIMATE else self._layer
        self._handles.append(attach_hook(self.model, self._saw_outputs))
        if self.features == PENULTIMATE:
            assert self._layer is not None
            self._handles.append(attach_hook(self._layer, self._saw_input, before=True))
        elif self._layer is not None:
            self._handles.append(attach_hook(self._layer, self._saw_features))
        if last is not None and head:
            self._handles.append(attach_hook(last, self._saw_head))
        if (self._layer is not None or head) and not temporary:
            torch.compiler.reset()  # compiled code ignores new hooks, so it must be compiled again

    def detach(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recording]:
        """Record this thread's forward passes inside the context, except those that this package makes itself (attacks)."""
        here = self._here
        outer = getattr(here, "recording", None), getattr(here, "level", 0)
        recording = here.recording = Recording()
        here.level = internal_pass_depth()
        try:
            yield recording
        finally:
            here.recording, here.level = outer

    def observe(self, inputs: Tensor) -> tuple[Any, Tensor]:
        """Run the model on these inputs; returns the outputs, and the features ``(N, D)``, detached."""
        with self.recording() as recording:
            outputs = self.model(inputs)
        return outputs, self.features_of(outputs, recording, len(inputs)).detach().reshape(len(inputs), -1)

    def features_of(self, outputs: Any, recording: Recording, size: int) -> Tensor:
        """The features of a recorded pass.

        Args:
            outputs: the model's outputs in that pass.
            recording: the recording of that pass.
            size: number of samples, N.

        Returns:
            Features ``(N, D)``; for ``features="outputs"`` the tensor of the outputs, in its own shape.

        Raises:
            TypeError: if the layer's features are not a tensor.
            ValueError: if the layer did not run, or its features do not have one row per sample.
        """
        found = (
            tensor_of(outputs) if self.features == OUTPUTS else recording.features[-1] if recording.features else None
        )
        if found is None:
            raise ValueError(
                f"The layer of features={self.features!r} did not run in the forward pass: name a layer that runs with features=."
            )
        if not isinstance(found, Tensor):
            raise TypeError(
                f"The layer of features={self.features!r} returns a {type(found).__name__}, not a tensor: name a layer that returns a tensor."
            )
        if found.ndim == 0 or len(found) != size:
            raise ValueError(
                f"The features={self.features!r} have shape {tuple(found.shape)}, but the batch has {size} samples: name a layer "
                "whose output has one row per sample."
            )
        return found if self.features == OUTPUTS else self.rows(found)

    def rows(self, features: Tensor) -> Tensor:
        """Recorded features as a point cloud ``(M, D)``; the input of a convolution is averaged over positions."""
        if self.features == PENULTIMATE and not isinstance(self._layer, nn.Linear) and features.ndim > 2:
            features = features.flatten(2).mean(2)
        return features.reshape(len(features), -1)

    def _recorded(self) -> Recording | None:
        recording: Recording | None = getattr(self._here, "recording", None)
        return recording if recording is not None and self._here.level == internal_pass_depth() else None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_here": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _here=threading.local())

    def _saw_outputs(self, module: nn.Module, args: Any, outputs: Any) -> None:
        recording = self._recorded()
        if recording is not None:
            recording.outputs.append(outputs if self._pick is None else self._pick(outputs))

    def _saw_features(self, module: nn.Module, args: Any, outputs: Any) -> None:
        recording = self._recorded()
        if recording is not None:
            recording.features.append(outputs)

    def _saw_head(self, module: nn.Module, args: Any, outputs: Any) -> None:
        recording = self._recorded()
        if recording is not None:
            recording.heads.append(outputs)

    def _saw_input(self, module: nn.Module, args: Any) -> None:
        recording = self._recorded()
        if recording is not None:
            recording.features.append(args[0])


def find_submodule(model: nn.Module, path: str, argument: str) -> nn.Module:
    """The submodule at a dotted path.

    Args:
        model: the module.
        path: the dotted path.
        argument: name of the user's argument, for the error message.

    Raises:
        ValueError: if there is none; the message lists the most similar names.
    """
    known = dict(model.named_modules())
    known.pop("", None)
    if path not in known:
        shown = sorted(known, key=lambda name: (name.count("."), name))
        raise ValueError(unknown_name(f"submodule for {argument}=", path, shown[:60]))
    return known[path]


def last_linear(model: nn.Module, run: Callable[[], Any]) -> nn.Module:
    """The last ``nn.Linear`` that runs; without a linear layer, the last convolution.

    Args:
        model: the module.
        run: runs it once, without side effects.

    Raises:
        ValueError: if no linear layer and no convolution runs.
    """
    ran: list[nn.Module] = []
    linear = [module for module in model.modules() if isinstance(module, (nn.Linear, *CONVOLUTIONS))]
    handles = [attach_hook(module, lambda module, args: ran.append(module), before=True) for module in linear]
    try:
        with eager():
            run()
    finally:
        for handle in handles:
            handle.remove()
    for kind in (nn.Linear, CONVOLUTIONS):
        for module in reversed(ran):
            if isinstance(module, kind):
                return module
    layers = ", ".join(repr(name) for name, module in model.named_modules() if name and not list(module.children()))
    raise ValueError(
        f'features="penultimate" is the input of the last nn.Linear (or convolution) that runs, but {type(model).__name__} runs none: name '
        f'a layer with features=, use features="outputs", or a recipe without features (pgd-at, trades). Its layers: {layers}.'
    )


def trial_pass(model: Callable[[Tensor], Any], example: Tensor) -> Callable[[], Any]:
    """A function that runs the model on an example without side effects."""

    def run() -> None:
        with isolated(model, example.device):
            model(example.detach().clone())

    return run
