"""What of a module's batches is attacked, and how the adversary may get at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks.labels import ignoring
from lightning_wdefense.attacks.steps.sites import InputSite, Perturb, Site
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.modules.batches import Batches, Inputs, Labels
from lightning_wdefense.modules.outputs import Pick, picking
from lightning_wdefense.modules.steps import Noise, Step

Through = Literal["auto", "model", "step"]


@dataclass(frozen=True)
class Target:
    """What a callback attacks, as its user says it.

    Args:
        through: by plain forward passes (``"model"``), through the module's own step, or what a first look shows to be right.
        batches: finds inputs and labels.
        perturb: the submodule whose output is attacked, if it is not the inputs.
        outputs: where in what the model returns its outputs are.
        ignore_index: label of elements that count for nothing.

    Raises:
        ValueError: for an unknown way, or plain forward passes beside ``perturb=``.
    """

    through: Through
    batches: Batches
    perturb: Perturb | None = None
    outputs: Pick = None
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        if self.through not in get_args(Through):
            raise ValueError(unknown_name("way for through=", self.through, get_args(Through)))
        if self.through == "model" and self.perturb is not None:
            raise ValueError(
                f"perturb={self.perturb.path!r} acts inside of the step: leave through= out, or set it to 'step'."
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
        """The target that a callback's arguments mean."""
        perturb = Perturb(perturb) if isinstance(perturb, str) else perturb
        return cls(through, Batches(inputs, labels), perturb, outputs, ignore_index)

    @property
    def may_be_plain(self) -> bool:
        """Whether a first look may choose plain forward passes."""
        return self.through == "auto" and self.perturb is None

    def read(self, batch: Any) -> tuple[Tensor, Any]:
        """Inputs and labels of a batch that a plain forward pass takes.

        Raises:
            TypeError: if the inputs are not a tensor.
            ValueError: if inputs or labels are not found.
        """
        inputs, labels = self.batches.read(batch)
        return inputs, ignoring(labels, self.ignore_index)

    def labels(self, batch: Any) -> Any:
        """The labels of a batch, if there are any."""
        return ignoring(self.batches.labels_or_none(batch), self.ignore_index)

    def inputs(self, batch: Any, threat: ThreatModel) -> InputSite:
        """The inputs of a batch as what the adversary moves."""
        return InputSite(self.batches, batch, threat)

    def site(self, step: Step, batch: Any, threat: ThreatModel, noise: Noise = "off") -> Site:
        """What the adversary moves in a batch.

        Args:
            step: takes the batch.
            batch: the batch.
            threat: the threat model.
            noise: how the step is to be run.
        """
        if self.perturb is None:
            return self.inputs(batch, threat)

        def run() -> None:
            with step.rehearsal(step.module.device, noise):
                step(batch)

        return self.perturb.site(step.module, batch, threat, run)

    def pick(self, outputs: Any) -> Any:
        """The outputs in what the model returns."""
        pick = picking(self.outputs)
        return outputs if pick is None else pick(outputs)
