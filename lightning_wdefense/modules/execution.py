"""Options for how an attack runs the model: precision, memory layout, compilation and CUDA graphs."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_wdefense._names import unknown_name
from lightning_wdefense.modules.graphs import DEVICES, Replays

BACKEND = "inductor"
"""Backend of ``torch.compile``."""


@dataclass(frozen=True)
class Execution:
    """How the model is run inside an attack: ``attack(model, inputs, labels, execution=Execution(precision="bf16"))``.

    It does not change the attack: the ball, the bounds and the dtype of the results stay the same, and the attack
    iterates in float32. It does not change the user's model either: no parameter is converted, and nothing is attached
    to it.

    Args:
        precision: ``"bf16"`` runs the model inside ``torch.autocast(device, torch.bfloat16)``, whatever autocast
            surrounds the call. It works on every device with autocast. Without hardware support (AMX or AVX512-BF16 on
            CPUs, Ampere or later on NVIDIA GPUs) it may be slower than float32. ``None`` keeps the surrounding
            autocast.
        channels_last: convert 4-D inputs to the channels-last memory layout, which convolutions then keep. The model
            must not take views of its activations that need the other layout (use ``flatten`` instead of ``view``).
            Other inputs are not changed.
        compile: run the model through ``torch.compile``. Each module is compiled once and kept for its lifetime. Only
            the gradients of the inputs are compiled, not those of the weights. Modules that are already compiled, or
            scripted, run unchanged. Attacks of torchattacks run the model eagerly, because they may use an autograd
            graph twice. As always with ``torch.compile``, hooks that are added after the first compilation do not run.
            PyTorch 2.4 runs the model partly or wholly eagerly, with the same results.
        whole: never run the model on a part of a batch, as early exit, restarts and a sequence of attacks do. Use it
            for models whose outputs for a sample depend on the other samples. The callbacks detect such models
            themselves.
        graph: compute gradients with CUDA graphs, each launched as a whole. It helps for models so small that launching
            their kernels takes longer than running them; see below.

    **CUDA graphs.** A graph is recorded at the second of two similar attacks and kept for the module's lifetime. Each
    module has at most four graphs, and each graph holds the memory of a forward and backward pass. A graph uses the
    current values of the weights. A new graph is recorded if a tensor of the module has moved in memory, or if a mode,
    a hook, or an attribute that is a number or a string has changed. Changes inside other objects, and of PyTorch's
    precision settings, are not noticed. While a graph runs, neither ``forward`` nor hooks run in Python.

    These run without graphs: the first step of an attack, which checks the outputs (so all of FGSM), parts of a batch,
    early exit, callable losses, float16, attacks through a step, models that are not an ``nn.Module``, and other
    devices than CUDA. A model that synchronises with the device, draws random numbers or changes with each pass also
    runs without graphs, after a warning.

    Raises:
        ValueError: if the precision is unknown, or both ``compile`` and ``graph`` are true.

    References:
        Micikevicius et al., "Mixed precision training", 2018. Kalamkar et al., "A study of BFLOAT16 for deep learning
        training", 2019.

    Example:
        >>> import torch
        >>> from lightning_wdefense.attacks import PGD, ThreatModel
        >>> inputs, labels = torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
        >>> attack = PGD(ThreatModel(eps=0.1))
        >>> adversarial = attack(torch.nn.Linear(6, 3), inputs, labels, execution=Execution(precision="bf16"))
        >>> adversarial.dtype
        torch.float32
    """

    precision: Literal["bf16"] | None = None
    channels_last: bool = False
    compile: bool = False
    whole: bool = False
    graph: bool = False

    def __post_init__(self) -> None:
        if self.precision not in (None, "bf16"):
            raise ValueError(unknown_name("precision", self.precision, ["bf16"]))
        if self.compile and self.graph:
            raise ValueError(
                "compile=True and graph=True exclude each other: set one of them, or compile the model yourself with "
                'mode="reduce-overhead", which records CUDA graphs itself.'
            )

    def lay_out(self, inputs: Tensor) -> Tensor:
        """The inputs in the memory layout for the model: channels-last if asked for and 4-D, otherwise unchanged."""
        if self.channels_last and inputs.ndim == 4:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs

    @contextlib.contextmanager
    def prepared(self, model: Callable[[Tensor], Any], device: torch.device) -> Iterator[Callable[[Tensor], Any]]:
        """A context that yields the function to call instead of the model.

        Args:
            model: the user's model.
            device: the device of the inputs.

        Raises:
            TypeError: if ``compile`` is true and the model is not an ``nn.Module``.
            ValueError: if the device does not support autocast.
        """
        run = _compiled(model) if self.compile else model
        with self._autocast(device):
            yield (lambda inputs: run(self.lay_out(inputs))) if self.channels_last else run

    def replays(self, model: Callable[[Tensor], Any], device: torch.device) -> Replays | None:
        """The CUDA graphs for one call of an attack, inside of :meth:`prepared`; ``None`` for no graphs.

        Args:
            model: the user's model.
            device: the device of the inputs.
        """
        if not self.graph or device.type not in DEVICES or not isinstance(model, nn.Module):
            return None
        return Replays(model, self.channels_last)

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if self.precision is None:
            return contextlib.nullcontext()
        if not torch.amp.is_autocast_available(device.type):
            raise ValueError(
                f'precision="bf16" needs torch.autocast, which does not support {device.type!r} devices: use precision=None.'
            )
        # Around the whole attack, so that the weights are cast once and not at every step.
        return torch.autocast(device.type, torch.bfloat16)


# From a module to its compiled form. The compiled form must not refer to the module, or neither would ever be freed.
_compiled_forms: WeakKeyDictionary[nn.Module, Callable[..., Any]] = WeakKeyDictionary()


def _stateless(module: nn.Module, parameters: dict[str, Tensor], inputs: Tensor) -> Any:
    return functional_call(module, parameters, (inputs,))


def _compiled(model: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"compile=True needs an nn.Module, got {type(model).__name__}: compile it yourself with torch.compile, and set "
            "compile=False."
        )
    if (
        hasattr(model, "_orig_mod")
        or model._compiled_call_impl is not None
        or isinstance(model, torch.jit.ScriptModule)
    ):
        return model
    if model not in _compiled_forms:
        # Each module gets its own code object: PyTorch counts compilations, and limits them, by code object.
        own = types.FunctionType(_stateless.__code__.replace(), globals(), _stateless.__name__)
        _compiled_forms[model] = torch.compile(own, backend=BACKEND)
    # A compiled backward pass computes the gradients of all tensors that require them, so the parameters are detached.
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return partial(_compiled_forms[model], model, parameters)
