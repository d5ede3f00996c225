"""What SinkhornAttack does beyond the contract: it fools as often, and is harder to tell by distribution."""

from __future__ import annotations

from dataclasses import replace

import ot
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score
from support.attacks import square_error
from support.modules import Nasty, Snapshot, batch, classifier

from lightning_wdefense.attacks import PGD, Execution, SinkhornAttack, ThreatModel, get_attack
from lightning_wdefense.detection import KNNDistance
from lightning_wdefense.transport import SinkhornDivergence

LINF = ThreatModel(eps=0.1)


def attacked(model, attack, x, y):
    return torch.cat([attack(model, *part) for part in zip(x.split(128), y.split(128), strict=True)])


@pytest.mark.parametrize(
    ("threat", "features"),
    [
        pytest.param(ThreatModel(eps=0.2), "penultimate", id="linf"),
        pytest.param(ThreatModel(norm="l2", eps=1.5), "6", id="l2", marks=pytest.mark.slow),
    ],
)
def test_fools_as_often_and_is_harder_to_detect(digits_cnn, threat, features):
    plain, _, x, y = digits_cnn
    layer = plain[:7]  # its output is what the last linear layer is given
    with torch.no_grad():
        learned, x, y = layer(x[:250]), x[250:], y[250:]
        right = plain(x).argmax(1) == y
    areas, costs, success = [], [], []
    for weight in (0.0, 30.0):
        adversarial = attacked(plain, SinkhornAttack(threat, weight=weight, features=features), x, y)
        with torch.no_grad():
            clean, moved = layer(x), layer(adversarial)
            broken = right & (plain(adversarial).argmax(1) != y)
        detector = KNNDistance().fit(learned)
        scores = torch.cat([detector.score(clean[right]), detector.score(moved[broken])])
        areas.append(roc_auc_score([0] * int(right.sum()) + [1] * int(broken.sum()), scores))
        costs.append(ot.emd2([], [], cdist(clean, moved, "sqeuclidean")))
        success.append(broken.sum() / right.sum())
    assert success[0] > 0.8
    assert success[1] > success[0] - 0.02
    assert costs[1] < 0.8 * costs[0]
    assert areas[1] < areas[0] - 0.03


def test_without_a_price_it_is_pgd_that_keeps_what_it_found():
    model = classifier(6)
    inputs, labels = batch(6, n=200)
    threat = ThreatModel(eps=0.15)
    pgd = PGD(threat, steps=10, loss="margin")(model, inputs, labels)
    ours = SinkhornAttack(threat, steps=10, weight=0.0)(model, inputs, labels)
    fooled = model(pgd).argmax(1) != labels
    assert 0.2 < fooled.float().mean() < 0.9
    torch.testing.assert_close(ours[fooled], pgd[fooled])
    assert (model(ours).argmax(1) != labels)[fooled].all()


def test_takes_its_step_along_the_gradient():
    model = classifier(6)
    inputs, labels = batch(6)
    threat = replace(LINF, bounds=None)
    start = inputs + threat.ball.uniform(inputs, threat.eps, torch.Generator().manual_seed(0))
    start.requires_grad_()
    clean = model(inputs).detach()
    scale = (clean - clean.mean(0)).square().sum(1).mean().sqrt()
    shift = SinkhornDivergence(blur=0.5)((clean - clean.mean(0)) / scale, (model(start) - clean.mean(0)) / scale)
    objective = square_error(model(start), labels).sum() - 3.0 * 8 * shift
    (gradient,) = torch.autograd.grad(objective, start)
    expected = threat.project(start.detach() + 0.03 * gradient.sign(), inputs, threat.box(inputs))
    attack = SinkhornAttack(threat, 1, 0.03, 3.0, loss=square_error, divergence=SinkhornDivergence(blur=0.5))
    torch.testing.assert_close(attack(model, inputs, labels), expected)


def test_the_features_scale_does_not_matter():
    model = classifier(6)
    inputs, labels = batch(6, n=40)

    class Scaled(torch.nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale, self.model, self.layer = scale, model, torch.nn.Identity()

        def forward(self, x):
            return self.layer(self.model(x) * self.scale) / self.scale

    results = [
        SinkhornAttack(LINF, steps=5, features="layer")(Scaled(scale), inputs, labels) for scale in (1.0, 1000.0)
    ]
    close = (results[0] - results[1]).abs().flatten(1).amax(1) < 1e-3
    assert close.float().mean() > 0.9


@pytest.mark.parametrize("features", ["penultimate", "body", "body.0"])
def test_features_of_a_layer_leave_a_nasty_module_as_it_was(features):
    for fail_at in (None, 1, 2, 4):
        model = Nasty(36, fail_at=fail_at)
        inputs, labels = torch.rand(8, 1, 6, 6), torch.arange(8) % 5
        snapshot = Snapshot(model)
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        attack = SinkhornAttack(ThreatModel(eps=0.1), steps=3, features=features)
        if fail_at is None:
            attack(model, inputs, labels)
        else:
            with pytest.raises(RuntimeError, match="nasty failure"):
                attack(model, inputs, labels)
        snapshot.check()
        assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_features_of_a_layer_whatever_way_the_model_is_called():
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6)
    attack = SinkhornAttack(LINF, steps=3, features="penultimate")
    expected = attack(model, inputs, labels)
    assert not torch.equal(expected, replace(attack, features="outputs")(model, inputs, labels))
    assert torch.equal(attack(model.forward, inputs, labels), expected)
    assert torch.equal(replace(attack, features="3")(model, inputs, labels), expected)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(attack(compiled, inputs, labels), expected)
    assert torch.equal(attack(model, inputs, labels, execution=Execution(channels_last=True)), expected)


def test_registered_by_name():
    assert get_attack("sinkhorn", LINF, features="penultimate") == SinkhornAttack(LINF, features="penultimate")


MISTAKES = {
    "a function has no layers": (
        lambda x: x @ torch.ones(6, 3),
        "penultimate",
        TypeError,
        "needs an nn.Module, got function",
    ),
    "no such layer": (classifier(6), "heed", ValueError, "no submodule for features= 'heed'"),
    "no linear layer": (torch.nn.Sequential(torch.nn.Tanh()), "penultimate", ValueError, "Sequential runs none"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_features_that_cannot_be_had(mistake):
    model, features, kind, match = MISTAKES[mistake]
    with pytest.raises(kind, match=match):
        SinkhornAttack(LINF, features=features)(model, torch.rand(4, 6), torch.arange(4) % 3)
