"""The values that follow from the distances of the samples, in `evaluate` and in the monitor."""

from __future__ import annotations

import pytest
import torch
from support.lightning_modules import digits_loaders, quiet_trainer, trained_classifier
from torch import nn

from lightning_wdefense import RobustnessMonitor, ThreatModel, evaluate
from lightning_wdefense.attacks import DDN, FMN, PGD, MinimalEps, WassersteinAttack
from lightning_wdefense.evaluation.protocol import EvaluationProtocol
from lightning_wdefense.metrics import distributional_accuracy

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
LINEAR = ThreatModel(norm="l2", eps=1.0, bounds=None)


class Along(nn.Module):
    """Class 1 where the first coordinate is positive: its absolute value is the distance."""

    def forward(self, inputs):
        return torch.stack([-inputs[:, 0], inputs[:, 0]], 1)


def points(*places: float) -> list:
    inputs = torch.tensor(places).unsqueeze(1)
    return [(part, torch.ones(len(part)).long()) for part in inputs.split(3)]


PLACES = (0.2, -0.5, 0.9, 2.0, 1.4)


@pytest.mark.parametrize(
    "attack", ["fmn", "ddn", "minimal-pgd", FMN(LINEAR, steps=30), DDN(LINEAR), MinimalEps(PGD(LINEAR))]
)
def test_values_by_hand(attack):
    result = evaluate(Along(), points(*PLACES), LINEAR, distances=attack, epsilons=[0.5, 1.0, 2.5], features=None)
    expected = torch.tensor([0.2, 0.0, 0.9, 2.0, 1.4])
    torch.testing.assert_close(result.samples["distance"], expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(result.curve.accuracies, torch.tensor([0.8, 0.6, 0.4, 0.0]))
    assert result.values["auac"] == pytest.approx((0.7 * 0.5 + 0.5 * 0.5 + 0.2 * 1.5) / 2.5, abs=1e-6)
    assert result.values["median_distance"] == pytest.approx(0.9, rel=1e-3)
    # The squares 0, 0.04, 0.81, 1.96 and 4 of five samples: a budget of 5 takes four of them, and a part of the last.
    left = (5 - 0.04 - 0.81 - 1.96) / 4
    assert result.values["distributional_acc"] == pytest.approx((1 - left) / 5, abs=2e-3)
    assert result.values["robust_acc"] == pytest.approx(0.4)


def test_orders():
    for p in (1.0, 3.0, torch.inf):
        result = evaluate(Along(), points(*PLACES), LINEAR, distances="fmn", p=p, features=None)
        expected = distributional_accuracy(result.samples["distance"], [1.0], p=p).accuracies[0]
        assert result.values["distributional_acc"] == pytest.approx(float(expected), abs=1e-6)
        if p == torch.inf:
            assert result.values["distributional_acc"] == pytest.approx(result.values["robust_acc"])


def test_curve_agrees_with_the_attacks_at_eps():
    """What the attacks found counts, however weak the minimum-norm attack is."""
    model = trained_classifier().net
    loader, threat = digits_loaders()[1], ThreatModel(eps=0.1)
    result = evaluate(
        model, loader, threat, {"pgd": PGD(threat, steps=20)}, distances=FMN(threat, steps=1, tightening=0)
    )
    assert float(result.curve.accuracies[-1]) <= result.robust_acc
    assert len(result.curve.epsilons) == 21
    assert float(result.curve.epsilons[-1]) == pytest.approx(0.1)
    assert float(result.curve.accuracies[0]) == pytest.approx(result.clean_acc)
    strong = evaluate(model, loader, threat, distances="fmn")
    assert strong.values["auac"] < result.values["auac"]


def test_one_run_agrees_with_a_run_at_every_eps():
    model, loader = trained_classifier().net, digits_loaders()[1]
    threat, epsilons = ThreatModel(norm="l2", eps=1.0), [0.25, 0.5, 0.75, 1.0]
    by_distance = evaluate(model, loader, threat, distances="fmn", epsilons=epsilons, features=None).curve
    attack = PGD(threat, steps=40, restarts=2)
    by_eps = evaluate(model, loader, threat, {"pgd": attack}, epsilons=epsilons, features=None).curve
    assert (by_distance.accuracies - by_eps.accuracies).abs().max() < 0.03


def test_logged_in_training():
    threat = ThreatModel(eps=0.1)
    monitor = RobustnessMonitor(threat, ["fgsm"], distances=FMN(threat, steps=5), max_batches=2, name="near")
    trainer = quiet_trainer(max_epochs=2, callbacks=[monitor])
    trainer.fit(trained_classifier(), *digits_loaders())
    logged = trainer.callback_metrics
    assert {"val/near/auac", "val/near/median_distance", "val/near/distributional_acc"} <= set(logged)
    assert 0 < float(logged["val/near/median_distance"]) < 1
    assert float(logged["val/near/distributional_acc"]) <= float(logged["val/near/robust_acc"]) + 1e-6
    assert monitor.curves["val/near/robustness_curve"].accuracies[0] == pytest.approx(
        float(logged["val/near/clean_acc"])
    )


def test_wasserstein_norm():
    threat = ThreatModel(norm="wasserstein", eps=0.2)
    attack = WassersteinAttack(threat, steps=3, restarts=1, neighbourhood=3, methods=("frank-wolfe",))
    loader = [(inputs[:4], labels[:4]) for inputs, labels in list(digits_loaders()[1])[:1]]
    model = trained_classifier().net
    result = evaluate(model, loader, threat, {"w": attack}, distances=MinimalEps(attack, tolerance=0.5), features=None)
    assert (result.samples["distance"][result.samples["robust_right"] == 0] <= 0.2 + 1e-6).all()


def test_nothing_found_is_said():
    class Constant(nn.Module):
        def forward(self, inputs):
            return 0 * inputs[:, :1] + torch.tensor([[0.0, 5.0]])

    with pytest.warns(UserWarning, match="found no adversarial input at all"):
        result = evaluate(Constant(), points(*PLACES), LINEAR, distances="fmn", features=None)
    assert result.clean_acc == result.robust_acc == 1
    assert all(torch.tensor(result.values[name]).isnan() for name in ("median_distance", "distributional_acc", "auac"))


def test_no_sample_is_no_error():
    """A monitor whose loader gave nothing to attack."""
    protocol = EvaluationProtocol.of(
        LINEAR, ["pgd"], epsilons=None, independent=False, ignore_index=None, features=None, distances="fmn", p=2.0
    )
    with pytest.warns(UserWarning, match="was called before"):
        values, curve = protocol.compute(protocol.new_measures(torch.device("cpu")))
    assert torch.tensor([values["median_distance"], values["distributional_acc"], float(curve.auac)]).isnan().all()


ERRORS = {
    "unknown": ({"distances": "fnm"}, ValueError, "no minimum-norm attack 'fnm'. Did you mean 'fmn'"),
    "an attack": ({"distances": PGD(LINEAR)}, TypeError, r"MinimalEps\(attack\)"),
    "another threat": ({"distances": FMN(ThreatModel(norm="l2"))}, ValueError, "was made for ThreatModel"),
    "the norm": ({"threat": ThreatModel(), "distances": "ddn"}, ValueError, "no norm 'linf'"),
    "p": ({"distances": "fmn", "p": 0.5}, ValueError, "from 1 to inf, got 0.5"),
    "eps 0": ({"threat": LINEAR.with_eps(0), "distances": "fmn"}, ValueError, "needs a positive eps"),
    "among the attacks": ({"attacks": ["fmn"]}, ValueError, "distances='fmn'"),
}


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        evaluate(Along(), points(*PLACES), **{"threat": LINEAR, "features": None} | changes)


def test_masks_have_no_distance():
    loader = [(torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4).long())]
    with pytest.raises(ValueError, match="for masks, tokens or several inputs use epsilons="):
        evaluate(nn.Conv2d(3, 2, 1), loader, ThreatModel(eps=0.1), distances="fmn", features=None)
