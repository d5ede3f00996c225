"""What is attacked in a module's batches, and how the attack may run the module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks.labels import replace_ignore_index
from lightning_wdefense.attacks.steps.sites import InputSite, Perturb, PerturbationSite
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.modules.batches import BatchReader, Inputs, Labels
from lightning_wdefense.modules.outputs import Pick, output_picker
from lightning_wdefense.modules.steps import Noise, Step

Through = Literal["auto", "model", "step"]


@dataclass(frozen=True)
class Target:
    """What a callback attacks, from the callback's arguments.

    Args:
        through: ``"model"`` for plain forward passes, ``"step"`` for the module's own step, ``"auto"`` to choose by an inspection.
        batches: finds inputs and labels.
        perturb: the submodule whose output is attacked instead of the inputs.
        outputs: where the outputs are in the model's return value.
        ignore_index: label of elements that are left out.

    Raises:
        ValueError: if ``through`` is unknown, or is ``"model"`` together with ``perturb=``.
    """

    through: Through
    batches: BatchReader
    perturb: Perturb | None = None
    outputs: Pick = None
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        if self.through not in get_args(Through):
            raise ValueError(unknown_name("value of through=", self.through, get_args(Through)))
        if self.through == "model" and self.perturb is not None:
            raise ValueError(
                f"perturb={self.perturb.path!r} acts inside of the step, so through='model' cannot be used: leave through= out, or "
                "set it to 'step'."
            )

    @classmethod
    def of(
        cls,
        through: Through,
        inputs: Inputs,
        labels: Labels,
        *,
        perturb: str | Perturb | None = None,
        outputs: Pick = None,
        ignore_index: int | None = None,
    ) -> Target:
        """The target that a callback's arguments describe."""
        perturb = Perturb(perturb) if isinstance(perturb, str) else perturb
        return cls(through, BatchReader(inputs, labels), perturb, outputs, ignore_index)

    @property
    def may_be_plain(self) -> bool:
        """Whether an inspection of the step may choose plain forward passes."""
        return self.through == "auto" and self.perturb is None

    def read(self, batch: Any) -> tuple[Tensor, Any]:
        """Inputs and labels of a batch for a plain forward pass.

        Raises:
            TypeError: if the inputs are not a tensor.
            ValueError: if inputs or labels are not found.
        """
        inputs, labels = self.batches.read(batch)
        return inputs, replace_ignore_index(labels, self.ignore_index)

    def labels(self, batch: Any) -> Any:
        """The labels of a batch, or ``None``."""
        return replace_ignore_index(self.batches.labels_or_none(batch), self.ignore_index)

    def inputs(self, batch: Any, threat: ThreatModel) -> InputSite:
        """The inputs of a batch as the attacked values."""
        return InputSite(self.batches, batch, threat)

    def site(self, step: Step, batch: Any, threat: ThreatModel, noise: Noise = "off") -> PerturbationSite:
        """The values that the attack perturbs in a batch.

        Args:
            step: the step that runs on the batch.
            batch: the batch.
            threat: the threat model.
            noise: how the random numbers of the step are treated.
        """
        if self.perturb is None:
            return self.inputs(batch, threat)

        def run() -> None:
            with step.repeatable(step.module.device, noise):
                step(batch)

        return self.perturb.site(step.module, batch, threat, run)

    def pick(self, outputs: Any) -> Any:
        """The outputs in the model's return value."""
        pick = output_picker(self.outputs)
        return outputs if pick is None else pick(outputs)
