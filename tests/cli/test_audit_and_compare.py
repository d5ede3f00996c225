"""What becomes of a result: the report, the audit, the comparison, and the exit status that gates a pipeline."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conftest import DATA, MODEL
from support.lightning_modules import trained_classifier

from lightning_wdefense import ThreatModel
from lightning_wdefense.audit import AuditReport, Finding
from lightning_wdefense.cli import runs

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass
class Report:
    """Stands for the report: keeps what it was given."""

    name: str
    result: Any
    audit: Any = None
    settings: dict = field(default_factory=dict)

    def write(self, folder: Path) -> list[Path]:
        file = folder / "report.json"
        made.append(self)
        file.write_text(json.dumps({"name": self.name, "settings": self.settings}))
        return [file]

    @classmethod
    def load(cls, file: Path) -> Report:
        return cls(json.loads(file.read_text())["name"], None)


class Comparison(list):
    def write(self, folder: Path) -> list[Path]:
        folder.mkdir()
        (folder / "comparison.md").write_text("compared")
        return [folder / "comparison.md"]

    def __str__(self) -> str:
        return " against ".join(report.name for report in self)


made: list[Report] = []
audited: list[dict] = []


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """The report, the comparison and an audit that passes; those of the package have tests of their own."""

    def audit(model, loader, threat, attacks, **options):
        audited.append(
            {"model": model, "batches": [len(labels) for _, labels in loader], "attacks": attacks, **options}
        )
        finding = Finding("logits", verdict[0], "1 of 1", "It means something.", "Do something.")
        return AuditReport(
            (finding,), threat, tuple(attacks or ("fgsm", "apgd-ce")), options["samples"], 0.9, 0.5, 0.5, 0.1
        )

    made.clear()
    audited.clear()
    verdict = ["pass"]
    monkeypatch.setattr(runs, "Report", Report)
    monkeypatch.setattr(runs, "compare", Comparison)
    monkeypatch.setattr(runs, "audit", audit)
    return verdict


def test_the_report_gets_all_that_a_reader_asks_for(evaluated, checkpoints):
    done = evaluated("--name", "mine", "--epsilons", 0.05, 0.1)
    assert done.out.endswith("\nWrote robustness/report.json\n")
    (report,) = made
    assert report.name == "mine"
    assert report.audit is None
    assert report.result.curve is not None
    assert report.settings["model"] == {"class_path": MODEL, "init_args": {"batch_norm": True, "calls": "self", "learning_rate": 0.5}}  # fmt: skip
    assert report.settings["checkpoint"] == str(checkpoints / "digits.ckpt")
    assert report.settings["threat"]["eps"] == 0.1
    assert report.settings["epsilons"] == [0.05, 0.1]
    assert "config" not in report.settings
    evaluated("--epsilons", 0.05, 0.1)
    assert made[1].name == "DigitsClassifier"


@pytest.mark.parametrize(("least", "status"), [(0.2, 0), (0.9, 1), (1, 1), (0, 0)])
def test_a_robust_accuracy_that_is_asked_for(evaluated, least, status):
    done = evaluated("--min-robust-acc", least)
    assert done.status == status
    assert len(made) == 1, "the report is written in any case"
    if status:
        found = made[0].result.robust_acc
        assert done.err == f"Failed: the robust accuracy, {found:.4f}, is below --min-robust-acc {least:g}.\n"


def test_an_evaluation_with_an_audit(evaluated, stand_ins):
    words = ("--audit", "--samples", 50, "--seed", 3, "--inputs", 0)
    done = evaluated(*words)
    assert done.status == 0
    assert "Audit on 50 samples, linf, eps 0.1: pass" in done.out
    assert made[0].audit.passed
    (call,) = audited
    assert (call["samples"], call["seed"], call["inputs"], call["labels"], call["attacks"]) == (
        50,
        3,
        0,
        None,
        ["fgsm"],
    )
    stand_ins[0] = "fail"
    done = evaluated(*words)
    assert done.status == 1
    assert done.err.endswith("Failed: the audit (logits).\n")
    stand_ins[0] = "warn"
    assert evaluated(*words).status == 0


def test_an_audit_evaluates_the_samples_that_it_audits(command, checkpoints, stand_ins):
    stand_ins[0] = "fail"
    words = ("--model", MODEL, "--checkpoint", checkpoints / "digits.ckpt", "--data", DATA, "--threat.eps", 0.1)
    done = command("audit", *words, "--samples", 40)
    assert done.status == 1
    assert "linf, eps 0.1, 64 samples" in done.out  # two whole batches
    assert audited[0]["batches"] == [32, 32]
    assert audited[0]["attacks"] is None  # then the audit chooses, and the evaluation takes the same
    assert made[0].result.attacks == ("fgsm", "apgd-ce")
    assert made[0].audit.failed == ("logits",)
    assert made[0].result.threat == ThreatModel(eps=0.1)


def test_an_interruption_of_the_audit_keeps_the_evaluation(evaluated, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "audit", interrupted)
    done = evaluated("--audit")
    assert done.status == 130
    assert done.err == "lightning-wdefense: interrupted in the audit, which starts anew; an evaluation is kept.\n"
    assert not made


def test_reports_are_compared(command, evaluated, folder):
    for name in ("one", "two", "three"):
        evaluated("--name", name, "--output", name)
    done = command("compare", "one", "two/report.json", "three", "--output", "all")
    assert done == (0, "one against two against three\n\nWrote all/comparison.md\n", "")
    (folder / "two" / "report.json").write_text("{")
    done = command("compare", "one", "two")
    assert done.status == 2
    assert "two/report.json is no report: " in done.err
    assert not (folder / "comparison").exists()


def test_models_of_the_same_name_are_called_by_their_folders(command, evaluated, folder):
    evaluated("--name", "other", "--output", "runs/c")
    for name in ("runs/a", "runs/b"):
        evaluated("--name", "Net", "--output", name)
    done = command("compare", "runs/a", "runs/b/report.json", "runs/c", "--output", "all")
    assert done.out.startswith("a against b against other\n"), done
    (folder / "more").mkdir()
    (folder / "runs" / "a").rename(folder / "more" / "b")
    done = command("compare", "more/b", "runs/b", "--output", "again")
    assert done.out.startswith("more/b against runs/b\n"), done


@pytest.mark.parametrize("command_of", ["evaluate", "audit"])
def test_a_twin_has_weights_of_its_own(command, checkpoints, folder, command_of):
    weights = {key: 2 * value for key, value in torch.load(checkpoints / "digits.pt", weights_only=True).items()}
    torch.save(weights, "twin.pt")
    words = ("--model", MODEL, "--checkpoint", checkpoints / "digits.ckpt", "--data", DATA, "--threat.eps", 0.1)
    more = ("--audit", "--attacks", "fgsm") if command_of == "evaluate" else ()
    assert command(command_of, *words, *more, "--samples", 40, "--twin", "twin.pt").status == 0
    (call,) = audited
    for key, value in call["twin"].state_dict().items():
        assert torch.equal(value, weights[key])
        assert torch.equal(
            call["model"].state_dict()[key], torch.load(checkpoints / "digits.pt", weights_only=True)[key]
        )
    assert not call["twin"].training
    assert made[0].settings["twin"] == "twin.pt"


def test_the_twin_of_an_exported_model_is_one(command, checkpoints, folder):
    inputs = torch.rand(2, 1, 8, 8)
    torch.export.save(torch.export.export(trained_classifier().net.eval(), (inputs,)), "model.pt2")
    words = ("audit", "--model", "model.pt2", "--data", DATA, "--threat.eps", 0.1, "--samples", 40, "--attacks", "fgsm")
    done = command(*words, "--twin", checkpoints / "digits.ckpt")
    assert done.status == 2
    assert "the twin of an exported model is an exported model" in done.err
    assert command(*words, "--twin", "model.pt2").status == 0
    assert type(audited[0]["twin"]).__name__ == "ExportedModel"
