"""How a model is run inside an attack: its precision, its memory layout, and whether it is compiled or replayed as a graph."""

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
"""Of ``torch.compile``."""


@dataclass(frozen=True)
class Execution:
    """How the model is run inside an attack: ``attack(model, inputs, labels, execution=Execution(precision="bf16"))``.

    It says nothing of what the attack is: the ball, the bounds and the results' dtype stay as they are, and the attack itself
    iterates in float32. The user's model is not changed: no parameter is converted, nothing is attached to it.

    Args:
        precision: ``"bf16"`` runs the call as inside ``torch.autocast(device, torch.bfloat16)``, whatever autocast surrounds it.
            Any device that has autocast takes it; without hardware for it (AMX or AVX512-BF16 on CPUs, Ampere and later on
            NVIDIA GPUs) it may be slower than float32. ``None`` leaves the surrounding autocast.
        channels_last: give models of 4-D inputs these in channels-last layout, which their convolutions then keep. The model
            must not take views of its activations that need the other layout (``flatten`` instead of ``view``). Other inputs
            stay as they are.
        compile: run the model through ``torch.compile``, once for each module and kept for its lifetime. Only the inputs'
            gradients are compiled, not the weights'. Modules that are compiled already, or scripted, run as they are. Attacks
            of torchattacks run it eagerly, since they may walk a graph twice. Hooks are those that the module has when it is
            compiled first, as always with ``torch.compile``.
        whole: never run the model on a part of a batch, where early exit, restarts or several attacks leave some samples: for models whose
            outputs of a sample depend on the others. The callbacks find that out by themselves.

        graph: take the gradients of PGD's steps, and of others that do nothing else, by CUDA graphs, which are launched as one: for models
            so small that launching their kernels takes longer than running them. A graph is recorded in the second of two attacks alike,
            and kept for the module's lifetime, at most four of a module, each with the memory of a pass. It sees the weights of today, and
            another is recorded where the module's tensors have moved, or its modes, hooks or attributes that are numbers or strings have
            changed; of what is inside of other objects it knows nothing, nor of PyTorch's settings of precision. Where a graph runs,
            neither ``forward`` nor hooks run in Python. The rest is as without: the first step of an attack, which checks the outputs (all
            of FGSM), parts of a batch, early exit, losses of your own, float16, attacks through a step, and models that are no
            ``nn.Module`` themselves. A model that waits for the device, draws random numbers or changes with its own passes runs as
            without, after a warning. On other devices than CUDA's it changes nothing.

    Raises:
        ValueError: if there is no such precision, or both ``compile`` and ``graph`` are asked for.

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
                'compile=True and graph=True exclude each other: take one, or compile the model yourself with mode="reduce-overhead", '
                "which makes graphs of its own."
            )

    def lay_out(self, inputs: Tensor) -> Tensor:
        """The inputs in the layout that the model is given them in."""
        if self.channels_last and inputs.ndim == 4:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs

    @contextlib.contextmanager
    def prepared(self, model: Callable[[Tensor], Any], device: torch.device) -> Iterator[Callable[[Tensor], Any]]:
        """What to call in place of the model, inside of this context.

        Args:
            model: the user's.
            device: where it runs.

        Raises:
            TypeError: if something other than a module is to be compiled.
            ValueError: if the device has no autocast.
        """
        run = _compiled(model) if self.compile else model
        with self._autocast(device):
            yield (lambda inputs: run(self.lay_out(inputs))) if self.channels_last else run

    def replays(self, model: Callable[[Tensor], Any], device: torch.device) -> Replays | None:
        """What takes gradients by graphs in one call of an attack, inside of :meth:`prepared`; ``None`` for without.

        Args:
            model: the user's.
            device: where it runs.
        """
        if not self.graph or device.type not in DEVICES or not isinstance(model, nn.Module):
            return None
        return Replays(model, self.channels_last)

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if self.precision is None:
            return contextlib.nullcontext()
        if not torch.amp.is_autocast_available(device.type):
            raise ValueError(
                f'precision="bf16" needs torch.autocast, which does not know {device.type!r} devices: use None.'
            )
        # Around the whole attack, so that the weights are cast once and not at every step.
        return torch.autocast(device.type, torch.bfloat16)


# From a module to its compiled form, which must not refer to the module, or neither would ever be freed.
_compiled_forms: WeakKeyDictionary[nn.Module, Callable[..., Any]] = WeakKeyDictionary()


def _stateless(module: nn.Module, parameters: dict[str, Tensor], inputs: Tensor) -> Any:
    return functional_call(module, parameters, (inputs,))


def _compiled(model: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"compile=True needs an nn.Module, got {type(model).__name__}: compile it yourself with torch.compile, and leave "
            "compile=False."
        )
    if (
        hasattr(model, "_orig_mod")
        or model._compiled_call_impl is not None
        or isinstance(model, torch.jit.ScriptModule)
    ):
        return model
    if model not in _compiled_forms:
        # Each with a code object of its own: what is compiled, and how often at most, is counted by code object.
        own = types.FunctionType(_stateless.__code__.replace(), globals(), _stateless.__name__)
        _compiled_forms[model] = torch.compile(own, backend=BACKEND)
    # A compiled backward pass computes the gradients of all that require them, asked for or not.
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return partial(_compiled_forms[model], model, parameters)
