"""Our numbers beside those of torchattacks and Foolbox, on real data."""

from __future__ import annotations

import pytest
import torch
import torchattacks

from lightning_wdefense.attacks import PGD, AutoAttack, ThreatModel

SETTINGS = {
    "linf": (ThreatModel(norm="linf", eps=0.1), {"alpha": 0.02, "steps": 20}, torchattacks.PGD),
    "l2": (ThreatModel(norm="l2", eps=0.6), {"alpha": 0.1, "steps": 20}, torchattacks.PGDL2),
}
settings = pytest.mark.parametrize(("threat", "options", "theirs"), SETTINGS.values(), ids=SETTINGS)
models = pytest.mark.parametrize("which", [0, 1], ids=["plain", "robust"])


def accuracy(model, adversarial, labels) -> float:
    with torch.no_grad():
        return (model(adversarial).argmax(1) == labels).float().mean().item()


@settings
@models
def test_pgd_from_the_clean_inputs_is_torchattacks_pgd(digits_cnn, threat, options, theirs, which):
    """Without a random start nothing is random: the same inputs come out, but where rounding flips a sign."""
    model, inputs, labels = digits_cnn[which], *(part[:250] for part in digits_cnn[2:])
    expected = theirs(model, eps=threat.eps, random_start=False, **options)(inputs, labels)
    attack = PGD(threat, steps=options["steps"], step_size=options["alpha"], random_start=False)
    got = attack(model, inputs, labels)
    same = (got - expected).flatten(1).abs().amax(1) < 1e-3
    assert same.float().mean() > 0.97
    assert accuracy(model, got, labels) == pytest.approx(accuracy(model, expected, labels), abs=0.004)


@settings
@models
def test_pgd_from_random_starts_leaves_what_torchattacks_leaves(digits_cnn, threat, options, theirs, which):
    """The starts differ, so only samples on the edge do: about 2% of 500, a standard deviation of 0.6 points; 3 of those."""
    model, inputs, labels = digits_cnn[which], *digits_cnn[2:]
    torch.manual_seed(0)
    expected = accuracy(model, theirs(model, eps=threat.eps, random_start=True, **options)(inputs, labels), labels)
    attack = PGD(threat, steps=options["steps"], step_size=options["alpha"])
    assert accuracy(model, attack(model, inputs, labels), labels) == pytest.approx(expected, abs=0.02)
    assert 0.05 < expected < 0.95, "too easy or too hard to show anything"


@pytest.fixture(scope="module")
def autoattacked(digits_cnn):
    """The robust model, 150 digits, their labels, and which of them the full AutoAttack leaves."""
    _, robust, inputs, labels = digits_cnn
    inputs, labels = inputs[:150], labels[:150]
    adversarial = AutoAttack(ThreatModel(norm="linf", eps=0.2))(robust, inputs, labels)
    left = robust(adversarial).argmax(1) == labels
    assert 0.2 < left.float().mean() < 0.9
    return robust, inputs, labels, left


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_foolbox_finds_nothing_that_autoattack_missed(autoattacked):
    """LinfPGD with 100 steps, the worst of 5 random starts, is never more than one point below the full AutoAttack."""
    foolbox = pytest.importorskip("foolbox")
    robust, inputs, labels, ours = autoattacked
    peer = foolbox.PyTorchModel(robust, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(steps=100, rel_stepsize=0.025)
    left = torch.ones(len(labels), dtype=torch.bool)
    for seed in range(5):
        torch.manual_seed(seed)
        left &= ~attack(peer, inputs, labels, epsilons=0.2)[2]
    assert left.float().mean() >= ours.float().mean() - 0.01


@pytest.mark.slow
def test_autoattack_leaves_no_more_than_torchattacks_preset_and_pgd(autoattacked):
    robust, inputs, labels, ours = autoattacked
    preset = torchattacks.AutoAttack(robust, eps=0.2, seed=0)(inputs[:60], labels[:60])
    assert ours[:60].sum() <= (robust(preset).argmax(1) == labels[:60]).sum()
    pgd = PGD(ThreatModel(norm="linf", eps=0.2), steps=100, restarts=5)(robust, inputs, labels)
    assert ours.sum() <= (robust(pgd).argmax(1) == labels).sum()
