"""RobustnessAudit audits what a trainer tested, says so to the loggers, and refuses what it would measure wrongly."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support.lightning_modules import (
    DigitsClassifier,
    HeadlessDigitsClassifier,
    digits_loaders,
    quiet_trainer,
    trained_classifier,
)
from support.logs import tensorboard_history

from lightning_wdefense import RobustnessAudit, ThreatModel
from lightning_wdefense.attacks import PGD
from lightning_wdefense.audit import AuditReport, audit

pytestmark = pytest.mark.filterwarnings("ignore")

THREAT = ThreatModel(eps=0.1)
QUICK = {"pgd": PGD(THREAT, steps=10)}


def audited(module=None, audit_options=None, **options):
    callback = RobustnessAudit(THREAT, QUICK, **{"samples": 40, "progress": False} | (audit_options or {}))
    quiet_trainer(callbacks=[callback], **options).test(
        module or trained_classifier(), digits_loaders(32)[1], verbose=False
    )
    return callback


def test_it_is_what_the_function_finds(capsys):
    module = trained_classifier()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = audited(module).report
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    expected = audit(module.eval(), digits_loaders(32)[1], THREAT, QUICK, samples=40, progress=False)
    assert {**found.to_dict(), "seconds": 0} == {**expected.to_dict(), "seconds": 0}
    assert found.samples == 40
    assert "Audit on 40 samples" in capsys.readouterr().out


def test_loggers_get_the_verdicts(tmp_path):
    path = tmp_path / "audit" / "found.json"
    loggers = [TensorBoardLogger(tmp_path, name="", version="tb"), CSVLogger(tmp_path, name="", version="csv")]
    found = audited(audit_options={"path": path}, logger=loggers).report
    assert AuditReport.from_dict(json.loads(path.read_text())) == found
    logged = {key: value for key, value in tensorboard_history(tmp_path / "tb").items() if "audit" in key}
    assert logged["test/audit/passed"] == float(found.passed)
    assert logged["test/audit/audited_acc"] == pytest.approx(found.audited_acc)
    for finding in found.findings:
        key = f"test/audit/{finding.check}"
        assert (key in logged) == (finding.verdict != "skipped")
        if key in logged:
            assert logged[key] == {"pass": 1.0, "warn": 0.5, "fail": 0.0}[finding.verdict]


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_in_the_precision_of_the_trainer(precision):
    assert audited(precision=precision).report.samples == 40


class Normalising(DigitsClassifier):
    """Its steps change the inputs, so plain forward passes on them are of another model."""

    def loss(self, batch):
        inputs, labels = batch
        return F.cross_entropy(self(4 * inputs - 2), labels)


def test_a_step_that_does_more_is_refused():
    with pytest.raises(ValueError, match="test_step of Normalising is more than one of the module"):
        audited(Normalising())
    assert audited(Normalising(), {"through": "model"}).report.samples == 40


def test_a_module_without_forward_needs_a_path():
    module = HeadlessDigitsClassifier()
    with pytest.raises(ValueError, match="model="):
        audited(module)
    assert audited(module, {"model": "net"}).report.samples == 40


def test_a_second_test_audits_anew():
    callback = RobustnessAudit(THREAT, QUICK, samples=10, progress=False)
    module, trainer = trained_classifier(), quiet_trainer(callbacks=[callback])
    trainer.test(module, digits_loaders(32)[1], verbose=False)
    first = callback.report
    with torch.no_grad():
        module.net.head.weight.zero_()
        module.net.head.bias.zero_()
    trainer.test(module, digits_loaders(32)[1], verbose=False)
    assert callback.report.clean_acc < first.clean_acc


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"samples": 0}, ValueError, "samples must be at least 1"),
        ({"attacks": ["pdg"]}, ValueError, "Did you mean"),
        ({"through": "modell"}, ValueError, "Did you mean"),
    ],
    ids=str,
)
def test_bad_input(options, error, says):
    with pytest.raises(error, match=says):
        RobustnessAudit(THREAT, **options)
