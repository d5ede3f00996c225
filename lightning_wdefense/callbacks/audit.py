"""The callback that audits a model after the test epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense._compat import Callback, LightningModule, Trainer, rank_zero_warn
from lightning_wdefense.attacks import ThreatModel
from lightning_wdefense.attacks.registry import Attacks
from lightning_wdefense.audit import AuditReport, audit
from lightning_wdefense.audit.case import claimed_attacks
from lightning_wdefense.audit.report.storage import plain, to_json, write_files
from lightning_wdefense.callbacks.evaluation.route import EvaluationRoute
from lightning_wdefense.callbacks.requirements import attacked_model
from lightning_wdefense.callbacks.schedule import logged_step
from lightning_wdefense.callbacks.target import Target, Through
from lightning_wdefense.evaluation.attacked_batch import StepBatch
from lightning_wdefense.modules.batches import Inputs, Labels
from lightning_wdefense.modules.outputs import Pick
from lightning_wdefense.modules.parallel import check_strategy
from lightning_wdefense.modules.paths import map_tensors


class RobustnessAudit(Callback):
    """Checks at the end of a test epoch whether the robust accuracy is to be believed, on the first samples of the first dataloader.

    It runs :func:`~lightning_wdefense.audit.audit` on the module in the trainer's precision. It prints the findings, keeps them in
    :attr:`report`, and logs ``test/audit/{check}`` (1 for a pass, 0.5 for a warning, 0 for a failure), ``test/audit/passed``,
    ``test/audit/claimed_acc`` and ``test/audit/audited_acc`` to all loggers. With several processes the first one audits its samples, and the
    others wait.

    Args:
        threat: the threat model.
        attacks: the attacks that the claim rests on, such as those of your :class:`RobustnessMonitor`; ``None`` for the strongest by
            gradients.
        samples: number of samples.
        twin: an undefended model of the same task, to transfer attacks from.
        path: where the findings are written as JSON; ``None`` for nowhere.
        model: dotted path to the submodule that takes the inputs and returns logits, if it is not the module itself.
        through: ``"model"`` to run plain forward passes of the model whatever the steps do; ``"auto"`` to refuse a module whose step does
            something else with the inputs.
        inputs: where the inputs are in a batch.
        labels: the same for the labels.
        outputs: where the logits are in the model's return value.
        seed: seed of all noise.
        progress: show a progress bar.

    Raises:
        MisconfigurationException: under a strategy that shards the model.
        ValueError: if an attack is unknown, unbounded or made for another threat model, or ``samples`` is below 1; at the first test batch, if
            the step is not a plain forward pass of the model on the inputs.

    Example:
        >>> from lightning_wdefense import RobustnessAudit, ThreatModel
        >>> callback = RobustnessAudit(ThreatModel(eps=8 / 255), attacks=["autoattack"])
        >>> callback.report is None  # until trainer.test(module, callbacks=[callback], ...) has run
        True
    """

    report: AuditReport | None
    """The findings of the last test."""

    def __init__(
        self,
        threat: ThreatModel,
        attacks: Attacks | None = None,
        *,
        samples: int = 200,
        twin: nn.Module | None = None,
        path: str | Path | None = None,
        model: str | None = None,
        through: Through = "auto",
        inputs: Inputs = None,
        labels: Labels = None,
        outputs: Pick = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}.")
        self.attacks = claimed_attacks(attacks, threat)
        self.threat, self.samples, self.twin, self.path = threat, samples, twin, path
        self.model, self.through, self.seed, self.progress = model, through, seed, progress
        self.report = None
        self._target = Target.of(through, inputs, labels, outputs=outputs)
        self._route = EvaluationRoute(self._target)
        self._batches: list[tuple[Tensor, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check early that the strategy does not shard the parameters."""
        if stage == "test":
            check_strategy(trainer, "RobustnessAudit", on_all_ranks=False)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the samples of an earlier test."""
        self._batches, self._route = [], EvaluationRoute(self._target)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first samples."""
        if dataloader_idx or sum(len(inputs) for inputs, _ in self._batches) >= self.samples:
            return
        with torch.inference_mode(False):
            batch = map_tensors(batch, torch.clone)  # the step may modify its batch
            if not self._batches:
                self._check_route(trainer, pl_module, batch)
            self._batches.append(self._target.read(batch))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Audit the model."""
        batches, self._batches = self._batches, []
        if trainer.is_global_zero and not batches:
            rank_zero_warn("RobustnessAudit got no test batch, so there is nothing to audit.")
        elif trainer.is_global_zero:
            model = attacked_model(pl_module, self.model, needs_forward=self.through == "model")
            with trainer.precision_plugin.forward_context():
                self.report = audit(
                    model,
                    batches,
                    self.threat,
                    self.attacks,
                    samples=self.samples,
                    twin=self.twin,
                    outputs=self._target.outputs,
                    seed=self.seed,
                    progress=self.progress,
                )
            self._publish(trainer, self.report)
        trainer.strategy.barrier("RobustnessAudit")

    def _check_route(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        model = attacked_model(pl_module, self.model, needs_forward=self.through == "model")
        with trainer.precision_plugin.forward_context():
            found = self._route.attacked_batch(pl_module, model, self.threat, "test", batch, (0, None))
        if isinstance(found, StepBatch):
            raise ValueError(
                f"RobustnessAudit runs plain forward passes, but test_step of {type(pl_module).__name__} is more than one of "
                f"{'the module' if self.model is None else repr(self.model)} on the batch's inputs, so the audit would be of another model. "
                "Name the submodule that takes these inputs and returns the logits with model=, or move what the step does to the inputs into "
                "forward. If plain passes are what you want, set through='model'."
            )

    def _publish(self, trainer: Trainer, report: AuditReport) -> None:
        print(f"\n{report}\n")
        if self.path is not None:
            path = Path(self.path)
            write_files(path.parent, {path.name: to_json(plain(report.to_dict()))})
        scores = {"pass": 1.0, "warn": 0.5, "fail": 0.0}
        values = {
            f"test/audit/{each.check}": scores[each.verdict] for each in report.findings if each.verdict in scores
        }
        values |= {
            "test/audit/passed": float(report.passed),
            "test/audit/claimed_acc": report.robust_acc,
            "test/audit/audited_acc": report.audited_acc,
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=logged_step(trainer))
