"""What each command does with its options."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.seed import seed_everything
from torch import nn

from lightning_wdefense.attacks import ThreatModel
from lightning_wdefense.cli.loading import ImageFolder, loader_of, model_of
from lightning_wdefense.cli.loading.loaders import FirstSamples
from lightning_wdefense.cli.usage import UsageError, note
from lightning_wdefense.evaluation.evaluate import evaluate
from lightning_wdefense.evaluation.result import EvaluationResult
from lightning_wdefense.evaluation.resuming import ADVICE, OtherEvaluationError, finished_batches
from lightning_wdefense.evaluation.resuming.work import Kept
from lightning_wdefense.evaluation.subject import Subject
from lightning_wdefense.modules.outputs import output_picker

FINISHED = "finished_batches.pt"
"""The file in the output folder that holds the finished batches."""


def run_evaluate(options: Any) -> bool:
    """Evaluate, and audit if asked for; returns whether the model failed."""
    loader, model, threat = _prepared(options)
    measured = {
        name: options[name] for name in ("epsilons", "distances", "p", "independent", "features", "max_batches")
    }
    result, cost = _evaluated(options, model, loader, threat, **measured)
    audit = _audited(options, model, loader, threat) if options.audit else None
    return _reported(options, model, result, audit, cost)


def run_audit(options: Any) -> bool:
    """Evaluate a few samples and audit the model on them; returns whether it failed."""
    loader, model, threat = _prepared(options)
    few = FirstSamples(loader, options.samples)
    result, cost = _evaluated(options, model, few, threat)
    return _reported(options, model, result, _audited(options, model, few, threat), cost)


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
    Report, compare = _of_audit("Report", "compare")  # noqa: N806
    comparison = compare([_report_in(Report, file) for file in files])
    written = comparison.write(Path(options.output))
    print(comparison)
    _tell(written)
    return False


RUNS: dict[str, Callable[[Any], bool]] = {"evaluate": run_evaluate, "audit": run_audit, "compare": run_compare}
"""What each command runs; it returns whether the model failed."""


def _prepared(options: Any) -> tuple[Any, nn.Module, ThreatModel]:
    seed_everything(options.seed, verbose=False)
    model = model_of(options.model, options.checkpoint, options.device)
    loader = loader_of(options.data, options, options.threat)
    if isinstance(images := getattr(loader, "dataset", None), ImageFolder):
        pick = output_picker(options.outputs) or (lambda found: found)
        images.check_outputs(lambda inputs: pick(model(inputs)), Subject(model).device)
    return loader, model, options.threat


def _evaluated(
    options: Any, model: nn.Module, loader: Any, threat: ThreatModel, **measured: Any
) -> tuple[EvaluationResult, dict[str, float]]:
    """The result, and what it cost, if it was not interrupted on the way.

    Raises:
        KeyboardInterrupt: with how to go on.
    """
    file = Path(options.output) / FINISHED
    before, began = finished_batches(file), time.perf_counter()
    if before.batches and not before.finished:
        note(f"Going on after {_batches(before.batches)} in {file}.")
    if "examples" in inspect.signature(evaluate).parameters:
        measured["examples"] = options.examples

    def run() -> EvaluationResult:
        return evaluate(model, loader, threat, options.attacks, **measured, **_common(options), resume=file)

    try:
        try:
            result = run()
            if before.finished:
                note(f"Nothing was attacked again: {file} holds this evaluation already.")
        except OtherEvaluationError as error:
            if not before.finished:
                advice = f"The evaluation there is not finished. Delete {file} to start anew, or give another --output."
                raise UsageError(str(error).replace(ADVICE, advice)) from error
            note(f"{file} is of another evaluation, which is finished: this one takes its place.")
            file.unlink()
            before, began = Kept(0, False), time.perf_counter()
            result = run()
    except KeyboardInterrupt:
        kept = finished_batches(file).batches
        how = f"{_batches(kept)} kept in {file}, the same command goes on there" if kept else "no batch was finished"
        raise KeyboardInterrupt(f"interrupted: {how}.") from None
    return result, {} if before.batches else {"evaluation_seconds": round(time.perf_counter() - began, 2)}


def _audited(options: Any, model: nn.Module, loader: Any, threat: ThreatModel) -> Any:
    (audit,) = _of_audit("audit")
    try:
        return audit(model, loader, threat, options.attacks, samples=options.samples, **_common(options))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted in the audit, which starts anew; the evaluation is kept.") from None


def _common(options: Any) -> dict[str, Any]:
    return {name: options[name] for name in ("ignore_index", "inputs", "labels", "outputs", "seed")}


def _reported(options: Any, model: nn.Module, result: EvaluationResult, audit: Any, cost: Mapping[str, float]) -> bool:
    """Print the result, write the report, and say whether the model failed."""
    print(result)
    if audit is not None:
        print(f"\n{audit}")
        cost = {**cost, "audit_seconds": round(audit.seconds, 2)}
    name = options.name or (Path(options.model).stem if isinstance(options.model, str) else type(model).__name__)
    _tell(_written(options, name=name, result=result, audit=audit, cost=cost, settings=options.settings))
    failed = audit is not None and bool(audit.failed)
    if failed:
        note(f"Failed: the audit ({', '.join(audit.failed)}).")
    least = options.min_robust_acc
    if least is not None and not result.robust_acc >= least:  # NaN fails as well
        note(f"Failed: the robust accuracy, {result.robust_acc:.4f}, is below --min-robust-acc {least:g}.")
        failed = True
    return failed


def _written(options: Any, **contents: Any) -> list[Path]:
    import lightning_wdefense.audit as audit

    return audit.Report(**contents).write(Path(options.output)) if hasattr(audit, "Report") else []


def _of_audit(*names: str) -> list[Any]:
    """What reports are made of, which loads only when it is needed."""
    import lightning_wdefense.audit as audit

    missing = [name for name in names if not hasattr(audit, name)]
    if missing:
        raise UsageError(f"this version has no {' or '.join(missing)}.")
    return [getattr(audit, name) for name in names]


def _report_in(report: Any, file: Path) -> Any:
    try:
        return report.load(file)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is no report: {type(error).__name__}: {error}") from error


def _tell(written: list[Path]) -> None:
    if written:
        print(f"\nWrote {', '.join(map(str, written))}")


def _batches(count: int) -> str:
    return f"{count} finished batch{'es' * (count != 1)}"
