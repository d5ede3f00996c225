"""What each command does with its options."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.seed import seed_everything
from torch import nn

from lightning_wdefense.attacks import ThreatModel
from lightning_wdefense.attacks.registry import Attacks
from lightning_wdefense.audit import AuditReport, Report, audit, compare
from lightning_wdefense.cli.loading import ImageFolder, loader_of, model_of, twin_of
from lightning_wdefense.cli.loading.loaders import FirstSamples
from lightning_wdefense.cli.usage import UsageError, note
from lightning_wdefense.evaluation.evaluate import evaluate
from lightning_wdefense.evaluation.result import EvaluationResult
from lightning_wdefense.evaluation.resuming import ADVICE, OtherEvaluationError, finished_batches
from lightning_wdefense.evaluation.subject import Subject
from lightning_wdefense.modules.outputs import output_picker

FINISHED = "finished_batches.pt"
"""The file in the output folder that holds the finished batches."""


def run_evaluate(options: Any) -> bool:
    """Evaluate, and audit if asked for; returns whether the model failed."""
    loader, model, threat = _prepared(options)
    result = _evaluated(options, model, loader, threat, options.attacks or ["pgd"])
    return _reported(options, model, result, _audited(options, model, loader, threat) if options.audit else None)


def run_audit(options: Any) -> bool:
    """Audit the model on a few samples, and evaluate it on them; returns whether it failed."""
    loader, model, threat = _prepared(options)
    few = FirstSamples(loader, options.samples)
    audited = _audited(options, model, few, threat)
    result = _evaluated(options, model, few, threat, options.attacks or audited.attacks)
    return _reported(options, model, result, audited)


def run_compare(options: Any) -> bool:
    """Write the comparison of several reports; never fails."""
    if len(options.reports) < 2:
        raise UsageError("compare takes two or more reports: report.json files, or folders that hold one.")
    files = [path / "report.json" if path.is_dir() else path for path in map(Path, options.reports)]
    for given, file in zip(options.reports, files, strict=True):
        if not file.is_file():
            raise UsageError(
                f"There is no report in {given}: `lightning-wdefense evaluate --output {given} ...` writes one."
            )
    comparison = compare(_told_apart([_report_in(file) for file in files], [file.parent for file in files]))
    written = comparison.write(Path(options.output))
    print(comparison)
    _tell(written)
    return False


RUNS: dict[str, Callable[[Any], bool]] = {"evaluate": run_evaluate, "audit": run_audit, "compare": run_compare}
"""What each command runs; it returns whether the model failed."""


def _prepared(options: Any) -> tuple[Any, nn.Module, ThreatModel]:
    seed_everything(options.seed, verbose=False)
    model = model_of(options.model, options.checkpoint, options.device)
    options.twin = twin_of(model, options.twin, options.device, trust=options.trust_checkpoint)
    loader = loader_of(options.data, options, options.threat)
    if isinstance(images := getattr(loader, "dataset", None), ImageFolder):
        pick = output_picker(options.outputs) or (lambda found: found)
        images.check_outputs(lambda inputs: pick(model(inputs)), Subject(model).device)
        options.settings["class_names"] = images.classes
    return loader, model, options.threat


def _evaluated(options: Any, model: nn.Module, loader: Any, threat: ThreatModel, attacks: Attacks) -> EvaluationResult:
    """The result, of finished batches as well.

    Raises:
        KeyboardInterrupt: with how to go on.
        UsageError: if the finished batches are of another evaluation, which is not finished.
    """
    file = Path(options.output) / FINISHED
    before = finished_batches(file)
    if before.batches and not before.finished:
        note(f"Going on after {_batches(before.batches)} in {file}.")
    names = ("epsilons", "distances", "p", "independent", "features", "max_batches", "ignore_index", "examples")
    measured = {name: options[name] for name in names} | _common(options) | {"resume": file}
    try:
        try:
            result = evaluate(model, loader, threat, attacks, **measured)
        except OtherEvaluationError as error:
            if not before.finished:
                advice = f"The evaluation there is not finished. Delete {file} to start anew, or give another --output."
                raise UsageError(str(error).replace(ADVICE, advice)) from error
            note(f"{file} is of another evaluation, which is finished: this one takes its place.")
            file.unlink()
            return evaluate(model, loader, threat, attacks, **measured)
    except KeyboardInterrupt:
        kept = finished_batches(file).batches
        how = f"{_batches(kept)} kept in {file}, the same command goes on there" if kept else "no batch was finished"
        raise KeyboardInterrupt(f"interrupted: {how}.") from None
    if before.finished:
        note(f"Nothing was attacked again: {file} holds this evaluation already.")
    return result


def _audited(options: Any, model: nn.Module, loader: Any, threat: ThreatModel) -> AuditReport:
    try:
        chosen = {"samples": options.samples, "twin": options.twin} | _common(options)
        return audit(model, loader, threat, options.attacks, **chosen)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted in the audit, which starts anew; an evaluation is kept.") from None


def _common(options: Any) -> dict[str, Any]:
    return {name: options[name] for name in ("inputs", "labels", "outputs", "seed")}


def _reported(options: Any, model: nn.Module, result: EvaluationResult, audited: AuditReport | None) -> bool:
    """Print the result, write the report, and say whether the model failed."""
    print(result)
    if audited is not None:
        print(f"\n{audited}")
    name = options.name or (Path(options.model).stem if isinstance(options.model, str) else type(model).__name__)
    _tell(Report(name, result, audited, settings=options.settings).write(Path(options.output)))
    failed = audited is not None and not audited.passed
    if audited is not None and failed:
        note(f"Failed: the audit ({', '.join(audited.failed)}).")
    least = options.min_robust_acc
    if least is not None and not result.robust_acc >= least:  # NaN fails as well
        note(f"Failed: the robust accuracy, {result.robust_acc:.4f}, is below --min-robust-acc {least:g}.")
        failed = True
    return failed


def _report_in(file: Path) -> Report:
    try:
        return Report.load(file)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is no report: {type(error).__name__}: {error}") from error


def _told_apart(reports: list[Report], folders: list[Path]) -> list[Report]:
    """The reports; those of models of the same name, such as two checkpoints of one class, are named by their folders."""
    for name_of in (lambda folder: folder.resolve().name, str):
        names = Counter(report.name for report in reports)
        reports = [
            replace(report, name=name_of(folder)) if names[report.name] > 1 else report
            for report, folder in zip(reports, folders, strict=True)
        ]
    return reports


def _tell(written: list[Path]) -> None:
    if written:
        print(f"\nWrote {', '.join(map(str, written))}")


def _batches(count: int) -> str:
    return f"{count} finished batch{'es' * (count != 1)}"
