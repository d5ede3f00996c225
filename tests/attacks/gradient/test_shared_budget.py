"""SharedBudgetPGD: closed forms of linear losses, exact projections, PGD as its limit, and whose budget it is."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from support.modules import batch, classifier

from lightning_wdefense._ranks import Ranks
from lightning_wdefense.attacks import PGD, SharedBudgetPGD, ThreatModel, get_attack
from lightning_wdefense.attacks.gradient.allocation import first_order_shares, within_budget
from lightning_wdefense.attacks.registry import evaluation_attacks

L2 = ThreatModel(norm="l2", eps=0.8)
FREE = {norm: ThreatModel(norm=norm, eps=0.5, bounds=None) for norm in ("linf", "l2", "l1")}
SLOPES = torch.tensor([3.0, 0.5, 1.0, 2.0], dtype=torch.float64)


def mean_of_order(lengths, p):
    return float(lengths.double().pow(p).mean() ** (1 / p))


@pytest.mark.parametrize("p", [1.2, 1.5, 2, 3, 6])
def test_shares_maximise_a_linear_loss(p):
    """Against a numerical optimiser."""
    slopes = SLOPES.numpy()
    found = minimize(
        lambda lengths: -slopes @ lengths,
        np.full(4, 0.5),
        jac=lambda lengths: -slopes,
        bounds=[(0, None)] * 4,
        constraints={"type": "ineq", "fun": lambda lengths: 1 - np.mean(lengths**p)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(first_order_shares(SLOPES, p).numpy(), found.x, atol=2e-4)


def test_shares_at_the_ends():
    assert first_order_shares(SLOPES, 1).tolist() == [4, 0, 0, 0]
    assert first_order_shares(torch.tensor([1.0, 2, 2, 0]).double(), 1).tolist() == [0, 2, 2, 0]
    torch.testing.assert_close(first_order_shares(SLOPES, 1e6), torch.ones(4).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(first_order_shares(SLOPES, 1.001), first_order_shares(SLOPES, 1), atol=4e-2, rtol=0)
    for p in (1, 1.5, 2, 9):
        assert first_order_shares(torch.zeros(3).double(), p).tolist() == [0, 0, 0]
        tiny = first_order_shares(SLOPES * 1e-200, p)
        torch.testing.assert_close(tiny, first_order_shares(SLOPES, p))


@pytest.mark.parametrize("p", [1, 2])
def test_lengths_go_to_the_nearest_in_the_budget(p):
    """Against a numerical optimiser, where that is the rule."""
    lengths = torch.tensor([2.0, 0.3, 1.0, 0.1], dtype=torch.float64)
    found = minimize(
        lambda new: np.sum((new - lengths.numpy()) ** 2),
        np.full(4, 0.1),
        bounds=[(0, None)] * 4,
        constraints={"type": "ineq", "fun": lambda new: 0.5**p - np.mean(new**p)},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    np.testing.assert_allclose(within_budget(lengths, 0.5, p).numpy(), found.x, atol=1e-5)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 50])
def test_lengths_in_the_budget_stay_and_others_spend_it(p):
    inside = torch.tensor([0.5, 0.1, 0.0], dtype=torch.float64)
    assert torch.equal(within_budget(inside, 0.5, p), inside)
    new = within_budget(inside + torch.tensor([3, 1, 0.6]), 0.5, p)
    assert (new <= inside + torch.tensor([3, 1, 0.6])).all()
    if p < 50:
        assert mean_of_order(new, p) == pytest.approx(0.5, abs=1e-12)


def test_a_large_order_cuts_each_length():
    torch.testing.assert_close(
        within_budget(torch.tensor([9.0, 0.2, 0.7]).double(), 0.5, 1e5), torch.tensor([0.5, 0.2, 0.5]).double(), atol=1e-4, rtol=0
    )  # fmt: skip


@pytest.mark.parametrize("norm", FREE)
@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize("steps", [1, 10])
def test_linear_losses_are_solved(norm, p, steps):
    """Closed form: the lengths are those of the dual norms of the gradients, and the directions are steepest."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    attack = SharedBudgetPGD(FREE[norm], p, steps=steps, loss=lambda outputs, _: outputs, random_start=False)
    found = attack(lambda x: (weights * x).sum(1), torch.zeros(6, 5, dtype=torch.float64))
    dual = weights.norm(p={"linf": 1, "l2": 2, "l1": torch.inf}[norm], dim=1)
    q = math.inf if p == 1 else p / (p - 1)
    gain = dual.max() if p == 1 else dual.pow(q).mean() ** (1 / q)  # Hoelder's inequality
    assert float((weights * found).sum(1).mean()) == pytest.approx(0.5 * float(gain), rel=1e-6)
    assert mean_of_order(FREE[norm].ball.length(found), p) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_large_order_is_pgd(norm):
    threat = ThreatModel(norm=norm, eps={"linf": 0.2, "l2": 0.8, "l1": 2.0}[norm])
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6, n=16)
    expected = PGD(threat)(model, inputs, labels)

    def equal(p):
        found = SharedBudgetPGD(threat, p)(model, inputs, labels)
        return float(((found - expected).flatten(1).abs().amax(1) < 1e-3).float().mean())

    assert equal(1e7) >= 0.9  # rounding may flip a sign
    assert equal(2) < 0.5


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("p", [1, 1.5, 2, 4])
def test_the_budget_holds_and_the_box(norm, p):
    threat = ThreatModel(norm=norm, eps={"linf": 0.2, "l2": 0.8, "l1": 2.0}[norm])
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6, n=32)
    for options in ({}, {"loss": "margin", "clip": 0.0}, {"random_start": False}, {"step_size": 5.0}):
        found = SharedBudgetPGD(threat, p, **options)(model, inputs, labels)
        assert mean_of_order(threat.ball.length(found - inputs), p) <= threat.eps + 1e-6
        assert 0 <= found.min() <= found.max() <= 1
    free = SharedBudgetPGD(ThreatModel(norm=norm, eps=threat.eps, bounds=None), p)(model, inputs, labels)
    lengths = threat.ball.length(free - inputs)
    assert mean_of_order(lengths, p) == pytest.approx(threat.eps, abs=1e-5)
    assert lengths.max() > 1.05 * threat.eps  # what others leave is spent


def test_sharing_harms_more_than_a_ball_for_each_sample():
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6, n=64)
    loss = torch.nn.CrossEntropyLoss()
    threat = L2.with_eps(0.4)
    shared, alone = (attack(model, inputs, labels) for attack in (SharedBudgetPGD(threat), PGD(threat)))
    assert loss(model(shared), labels) > loss(model(alone), labels) + 0.3


def test_what_counts_no_more_is_left_to_the_others():
    """With a clipped margin more samples are misclassified, by less."""
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6, n=64)
    threat = L2.with_eps(0.4)

    def wrong(**options):
        found = SharedBudgetPGD(threat, steps=20, **options)(model, inputs, labels)
        return float((model(found).argmax(1) != labels).float().mean())

    assert wrong(loss="margin", clip=0.02) > wrong(loss="margin") + 0.02
    still = SharedBudgetPGD(threat, loss="margin", clip=-1e3, random_start=False)(model, inputs, labels)
    assert torch.equal(still, inputs)  # all of them are above it from the start


def test_the_budget_is_of_the_attacked_samples():
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6, n=16)
    chosen = torch.tensor([1, 4, 9])
    attack = SharedBudgetPGD(L2)
    found = attack(model, inputs, labels, samples=chosen)
    alone = attack(model, inputs[chosen], labels[chosen])
    torch.testing.assert_close(found[chosen], alone, atol=1e-5, rtol=0)
    assert torch.equal(found[[0, 2, 3]], inputs[[0, 2, 3]])


class Together(Ranks):
    """Two ranks, of which the other one has these lengths or slopes, without processes."""

    other = torch.tensor([0.0, 0.0])

    def row_counts(self, rows):
        return [len(rows), 2]

    def any(self, condition, device=None):
        return True

    def gather(self, rows, sizes):
        return torch.cat([rows, self.other.to(rows)])


def test_all_ranks_share(monkeypatch):
    """Two samples of another rank that stay where they are leave their part of the budget to this rank's."""
    monkeypatch.setattr(Ranks, "current", classmethod(lambda cls: Together(2, 0)))
    weights = torch.tensor([[3.0], [4.0]])
    attack = SharedBudgetPGD(FREE["l2"], loss=lambda outputs, _: outputs, random_start=False)
    found, alone = (
        each(lambda x: (weights * x).sum(1), torch.zeros(2, 1)) for each in (attack, replace(attack, all_ranks=False))
    )
    torch.testing.assert_close(alone.flatten(), 0.5 * torch.tensor([3.0, 4.0]) / 12.5**0.5)
    torch.testing.assert_close(found, alone * 2**0.5)


def test_errors():
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6, n=4)
    message = "a shared budget with a batch of one. Use PGD.*drop_last=True"
    with pytest.raises(ValueError, match=message):
        SharedBudgetPGD(L2)(model, inputs[:1], labels[:1])
    with pytest.raises(ValueError, match=message):
        SharedBudgetPGD(L2)(model, inputs, labels, samples=torch.tensor([2]))
    for options, says in (
        ({"p": 0.5}, r"p must be at least 1 and finite, got 0\.5\..*PGD"),
        ({"p": math.inf}, "got inf.*PGD"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"step_size": 0.0}, "step_size must be positive"),
        ({"clip": math.inf}, "clip must be finite"),
        ({"random_start": "normal"}, "random_start must be"),
        ({"loss": "kl", "random_start": False}, "zero gradient at the clean inputs"),
        ({"loss": "dlr"}, "Unknown attack loss|no attack loss|attack loss"),
        ({"threat": ThreatModel(norm="wasserstein", eps=0.1)}, "no ball in pixel space"),
    ):
        with pytest.raises(ValueError, match=says):
            SharedBudgetPGD(**{"threat": L2} | options)


def test_monitors_refuse_it():
    with pytest.raises(ValueError, match=r"shared-budget-pgd.*training only: evaluate with 'pgd' or 'autoattack'"):
        evaluation_attacks([get_attack("shared-budget-pgd", L2)], L2)


def test_for_losses_of_a_step():
    assert SharedBudgetPGD(L2).of_losses().p == 2
    assert SharedBudgetPGD(L2, loss="margin", clip=0.1).of_losses() is None
    assert SharedBudgetPGD(L2, loss="kl").of_losses() is None
