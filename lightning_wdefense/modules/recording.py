"""See a model's outputs and features as they pass, without changing the model."""

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
    """What one forward pass of the model showed.

    Attributes:
        outputs: what each call of the model returned.
        features: what the feature layer showed each time it ran.
        heads: what the last linear layer made of them, where its input is what is wanted.
    """

    outputs: list[Any] = field(default_factory=list)
    features: list[Any] = field(default_factory=list)
    heads: list[Any] = field(default_factory=list)


class ForwardRecorder:
    """Records a model's outputs, and the features of one of its layers, through forward hooks, in the thread that asks for it.

    The hooks stay for as long as the recorder is attached (a compiled model does not notice hooks that come later) and do
    nothing outside of :meth:`recording`.

    Args:
        model: the module whose outputs are wanted.
        features: ``"outputs"``, ``"penultimate"`` (the input of the last linear layer that runs, or without any that of the last
            convolution, averaged over positions), or a dotted path to a submodule of ``model``, whose output is taken.
        pick: finds the outputs in what the model returns.

    Raises:
        ValueError: if there is no such submodule, with the nearest ones.
    """

    def __init__(self, model: nn.Module, features: str = OUTPUTS, pick: Callable[[Any], Any] | None = None) -> None:
        self.model, self.features, self._pick = model, features, pick
        self._handles: list[Any] = []
        self._here = (
            threading.local()
        )  # backward passes on accelerators, with what checkpointing makes again, have threads of their own
        self._layer = None if features in (OUTPUTS, PENULTIMATE) else find_submodule(model, features, "features")

    def attach(self, example: Tensor | Callable[[], Any], *, temporary: bool = False, head: bool = False) -> None:
        """Register the hooks, once.

        Args:
            example: a batch from which the penultimate layer is found, or what runs the model, without a trace.
            temporary: for passes inside :func:`eager` alone, so that compiled code need not be compiled again.
            head: also record what the last linear layer returns.
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
            torch.compiler.reset()  # compiled code does not notice new hooks: what there is must be compiled again

    def detach(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recording]:
        """Record the forward passes made inside by this thread, but not what other callbacks do in between: attacks and passes of their own."""
        here = self._here
        outer = getattr(here, "recording", None), getattr(here, "level", 0)
        recording = here.recording = Recording()
        here.level = internal_pass_depth()
        try:
            yield recording
        finally:
            here.recording, here.level = outer

    def observe(self, inputs: Tensor) -> tuple[Any, Tensor]:
        """The outputs of a forward pass on these inputs, and its features, detached, ``(N, D)``."""
        with self.recording() as recording:
            outputs = self.model(inputs)
        return outputs, self.features_of(outputs, recording, len(inputs)).detach().reshape(len(inputs), -1)

    def features_of(self, outputs: Any, recording: Recording, size: int) -> Tensor:
        """The features of a recorded pass over ``size`` samples: ``(N, D)``, outputs in their own shape.

        Raises:
            TypeError: if the layer's features are not a tensor.
            ValueError: if the layer did not run, or not on the whole batch.
        """
        found = (
            tensor_of(outputs) if self.features == OUTPUTS else recording.features[-1] if recording.features else None
        )
        if found is None:
            raise ValueError(
                f"The layer of features={self.features!r} did not run in the forward pass: name one that does with features=."
            )
        if not isinstance(found, Tensor):
            raise TypeError(
                f"The layer of features={self.features!r} returns a {type(found).__name__}, not a tensor: name one that does."
            )
        if found.ndim == 0 or len(found) != size:
            raise ValueError(
                f"The features={self.features!r} have shape {tuple(found.shape)}, but the batch has {size} samples: they must "
                "come one row a sample."
            )
        return found if self.features == OUTPUTS else self.rows(found)

    def rows(self, features: Tensor) -> Tensor:
        """What the layer showed as a cloud ``(M, D)``; of a convolution's input the mean over positions."""
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
    """The submodule at a dotted path, or an error that lists the nearest ones."""
    known = dict(model.named_modules())
    known.pop("", None)
    if path not in known:
        shown = sorted(known, key=lambda name: (name.count("."), name))
        raise ValueError(unknown_name(f"submodule for {argument}=", path, shown[:60]))
    return known[path]


def last_linear(model: nn.Module, run: Callable[[], Any]) -> nn.Module:
    """The last ``nn.Linear`` that runs; without any, the last convolution.

    Raises:
        ValueError: if neither runs.
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
        f'a layer with features=, use features="outputs", or a recipe that needs no features (pgd-at, trades). Its layers: {layers}.'
    )


def trial_pass(model: Callable[[Tensor], Any], example: Tensor) -> Callable[[], Any]:
    """A pass of the model over an example that leaves no trace."""

    def run() -> None:
        with isolated(model, example.device):
            model(example.detach().clone())

    return run
