"""Run a module's own step as a function of the batch, repeatedly and without side effects."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_wdefense._compat import LightningModule
from lightning_wdefense.modules.attachments import Attachment
from lightning_wdefense.modules.paths import map_tensors
from lightning_wdefense.modules.state.isolation import isolated
from lightning_wdefense.modules.state.muted_logging import Logged, muted
from lightning_wdefense.modules.state.random_state import RandomState
from lightning_wdefense.modules.state.step_state import StepState

Noise = Literal["off", "training", "own"]

_NORMS = (nn.modules.batchnorm._NormBase,)
_DROPOUTS = (nn.modules.dropout._DropoutNd,)


class Step:
    """The ``training_step`` (or another step) of a module, as a function without side effects.

    Inside of :meth:`repeatable` each call starts from the same state of the module, draws the same random numbers, and
    returns the same loss for the same batch. Nothing is logged, and metrics, optimizers, buffers and containers are
    restored. Effects outside of Python cannot be undone: files, printed text, direct calls of ``wandb``.

    Args:
        module: the user's module.
        function: its step, without wrappers of this package.
        name: name of the step, such as ``"training_step"``.
        arguments: further positional arguments of the step, after the batch.
        options: further keyword arguments of the step.
    """

    def __init__(
        self,
        module: LightningModule,
        function: Callable[..., Any],
        name: str,
        arguments: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
    ) -> None:
        self.module, self.name = module, name
        self._function, self._arguments, self._options = function, arguments, options or {}
        self._state: StepState | None = None
        self._random: RandomState | None = None
        self._training: list[nn.Module] = []
        self._flags: list[tuple[Any, str, bool]] = []
        self.logged: Logged = {}

    @property
    def ready(self) -> bool:
        """Whether it is inside of :meth:`repeatable`."""
        return self._state is not None

    @contextlib.contextmanager
    def repeatable(self, device: torch.device, noise: Noise = "off") -> Iterator[None]:
        """A context in which the step may be called; the module is isolated as in :func:`isolated`.

        Args:
            device: the device of the batch.
            noise: ``"off"`` for eval mode. ``"training"`` for the modules' own modes, but without dropout and with
                normalisation layers in eval mode, because some models compute no loss in eval mode. ``"own"`` for the
                modules' own modes.
        """
        module = self.module
        training = [
            each
            for each in module.modules()
            if (each.training or not module.training)
            and not isinstance(each, (*_NORMS, *_DROPOUTS))
            and noise == "training"
        ]
        with isolated(module, device, evaluation=noise != "own"), muted(module, self.name) as logged:
            state = StepState(module)
            state.usable()
            before = self._state, self._random, self._training, self.logged, self._flags
            self._state, self._random = state, RandomState(device)
            self._training, self.logged, self._flags = training, logged, _flags(module)
            gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
            for parameter, _ in gradients:  # the step may call backward() itself
                parameter.grad = None
            try:
                yield
            finally:
                _set_flags(self._flags)
                self._state, self._random, self._training, self.logged, self._flags = before
                state.restore()
                for parameter, gradient in gradients:
                    parameter.grad = gradient

    def __call__(self, batch: Any) -> Any:
        """Run the step on a batch, and return its result."""
        assert self._state is not None, "call it inside of repeatable()"
        assert self._random is not None
        self._state.restore()
        self._state.usable()
        self._random.restore()
        _set_flags(self._flags)
        self.logged.clear()
        modes = [each.training for each in self._training]
        for each in self._training:
            each.training = True
        try:
            return self._function(_own_copy(batch), *self._arguments, **self._options)
        finally:
            for each, mode in zip(self._training, modes, strict=True):
                each.training = mode

    def loss(self, batch: Any) -> Tensor | None:
        """Run the step on a batch, and return its loss as in :meth:`loss_of`."""
        return self.loss_of(self(batch))

    def loss_of(self, result: Any) -> Tensor | None:
        """The loss of the last call, a scalar; ``None`` if there is none.

        It is the result of the step, or its entry ``"loss"``. For other steps than ``training_step`` it may also be a
        tensor that the step logged under a key that contains ``loss``.

        Args:
            result: the result of the last call.
        """
        loss = result.get("loss") if isinstance(result, dict) else result
        if self.name != "training_step" and not (isinstance(loss, Tensor) and loss.ndim == 0):
            loss = self._logged_loss()  # the result is probably predictions
        if not isinstance(loss, Tensor):
            return None
        return loss if loss.ndim == 0 else loss.mean()

    def _logged_loss(self) -> Tensor | None:
        for key, value in self.logged.items():
            if "loss" in key.lower() and isinstance(value, Tensor) and value.requires_grad:
                return value
        return None

    @contextlib.contextmanager
    def one_more_call(self, random: RandomState) -> Iterator[Callable[[Any], Any]]:
        """A context for one more call of the step in the module's own modes, as part of the training step.

        The call has an autograd graph and updates buffers, such as the running statistics of BatchNorm. All other state
        of the module, and the random states, are restored afterwards.

        Args:
            random: the random states at the beginning of the user's own call, from which this call draws too.
        """
        module = self.module
        with muted(module, self.name):
            state, now = StepState(module, buffers=False), RandomState(random._device)
            random.restore()
            try:
                yield lambda batch: self._function(_own_copy(batch), *self._arguments, **self._options)
            finally:
                state.restore()
                now.restore()


def _flags(module: nn.Module) -> list[tuple[Any, str, bool]]:
    """The mode of each submodule, and ``requires_grad`` of each parameter."""
    modes = [(each, "training", each.training) for each in module.modules()]
    return modes + [(each, "requires_grad", each.requires_grad) for each in module.parameters()]


def _set_flags(flags: list[tuple[Any, str, bool]]) -> None:
    for owner, name, value in flags:
        if getattr(owner, name) is not value:
            setattr(owner, name, value)


def _own_copy(batch: Any) -> Any:
    """A copy of the batch's tensors, so that a step that writes to its batch does not change the user's batch."""
    return map_tensors(batch, torch.clone)


def unwrapped_step(module: LightningModule, name: str) -> Callable[..., Any]:
    """A module's step without wrappers of this package and uncompiled; the submodules that it runs may be compiled."""
    function = vars(module).get(name)
    while isinstance(function, Attachment) and hasattr(function, "original"):
        function = function.original
    context = getattr(module, "_compiler_ctx", None)
    if context is not None and f"original_{name}" in context:
        function = context[f"original_{name}"]
    return getattr(module, name) if function is None else function
