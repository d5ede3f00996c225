"""A recipe at work on a model: attacks it, watches it, measures it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense.attacks.isolation import eager, isolated, own_pass
from lightning_wdefense.attacks.outputs import class_labels, hard_labels, predictions, tensor_of
from lightning_wdefense.defenses.discrepancies import Transport
from lightning_wdefense.defenses.objective import Branch
from lightning_wdefense.defenses.recipe import Recipe
from lightning_wdefense.defenses.recording import ForwardRecorder, Recording


class Defense:
    """Binds a recipe to the module whose outputs it regularises.

    Args:
        recipe: what to do.
        model: takes the inputs and returns logits.

    Raises:
        ValueError: if the recipe's features name no submodule.
    """

    def __init__(self, recipe: Recipe, model: nn.Module) -> None:
        self.recipe, self.model = recipe, model
        self.recorder = ForwardRecorder(model, recipe.features)

    def adversarial(
        self, inputs: Tensor, labels: Any, *, radius: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Adversarial inputs of the recipe's attack, its eps multiplied by ``radius`` (the warm-up)."""
        attack = self.recipe.attack
        assert attack is not None
        if radius != 1.0:
            attack = attack.with_eps(attack.threat.eps * radius)
        return attack(self.model, inputs, labels, generator=generator)

    def forward(self, inputs: Tensor) -> Branch:
        """A plain forward pass, in whatever mode the model is in."""
        with own_pass(), self.watch(len(inputs)) as seen:
            self.model(inputs)
        return seen.branch()

    @contextlib.contextmanager
    def watch(self, size: int) -> Iterator[Watch]:
        """Watch somebody else call the model once on ``size`` samples."""
        with self.recorder.recording() as recording:
            yield Watch(self, recording, size)

    def measure(self, inputs: Tensor, adversarial: Tensor, labels: Any) -> dict[str, Tensor]:
        """What the attack did, in eval mode and without a trace: accuracies, success, and the transport cost of the features.

        Costs two forward passes. Accuracies are left out where the labels are not classes of the outputs.
        """
        with isolated(self.model, inputs.device), eager():
            clean, attacked = self.forward(inputs), self.forward(adversarial)
        measured = {"transport_cost": Transport()(clean.features.detach(), attacked.features.detach())}
        with contextlib.suppress(TypeError, ValueError):
            target = hard_labels(class_labels(labels, clean.outputs))
            right = predictions(clean.outputs) == target
            still = predictions(attacked.outputs) == target
            measured["clean_acc"] = right.float().mean()
            measured["adversarial_acc"] = still.float().mean()
            measured["attack_success"] = (right & ~still).sum() / right.sum().clamp_min(1)
        return measured


class Watch:
    """What was seen of the model during :meth:`Defense.watch`."""

    def __init__(self, defense: Defense, recording: Recording, size: int) -> None:
        self._defense, self._recording, self._size = defense, recording, size

    def branch(self) -> Branch:
        """Outputs and features of the one pass over the whole batch.

        Raises:
            RuntimeError: if the model did not run exactly once on the whole batch.
            TypeError: if its outputs hold no tensor.
        """
        outputs, model = self._recording.outputs, self._defense.model
        children = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
        hint = (
            "Call the module itself (`self(x)`) once in training_step, or name the submodule that is called on the whole batch "
            f"with model=; its submodules: {', '.join(map(repr, children)) or 'none'}."
        )
        if len(outputs) != 1:
            raise RuntimeError(
                f"The outputs of {type(model).__name__} could not be captured: its forward ran {len(outputs)} times during "
                f"the step, where once was expected. {hint}"
            )
        found = tensor_of(outputs[0])
        if found.ndim == 0 or len(found) != self._size:
            raise RuntimeError(
                f"The outputs of {type(model).__name__} could not be captured: their shape is {tuple(found.shape)}, but the "
                f"batch has {self._size} samples. {hint}"
            )
        recorder = self._defense.recorder
        return Branch(outputs[0], recorder.features_of(outputs[0], self._recording, self._size))
