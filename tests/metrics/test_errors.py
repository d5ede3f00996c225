"""Each mistake is answered with what was wrong and what to do."""

import pytest
import torch

from lightning_wdefense.metrics import (
    AttackSuccessRate,
    Detectability,
    DistributionalAccuracy,
    RobustAccuracy,
    RobustAccuracyCurve,
    Sensitivity,
    TransportShift,
    area_under_accuracy_curve,
    attack_success_rate,
    distributional_accuracy,
    robust_accuracy,
    robust_accuracy_curve,
    sensitivity,
)

Y = torch.tensor([0, 1, 2, 0])
LOGITS = torch.eye(3)[Y]
NAN = LOGITS.index_fill(0, torch.tensor([1]), torch.nan)
X = torch.randn(4, 5)
D = torch.tensor([0.0, 1.0, 2.0, torch.inf])


def update_twice(first: dict, second: dict) -> None:
    metric = RobustAccuracy()
    metric.update(Y, first, Y)
    metric.update(Y, second, Y)


def shift_twice(first: torch.Tensor, second: torch.Tensor) -> None:
    metric = TransportShift()
    metric.update(first, first)
    metric.update(second, second)


ERRORS = {
    "length": (
        lambda: robust_accuracy(Y, {"pgd": Y[:3]}, Y),
        ValueError,
        r"adversarial_preds\['pgd'\].*\(3,\).*\(4,\)",
    ),
    "dimensions": (lambda: attack_success_rate(LOGITS[None], Y, Y), ValueError, r"clean_preds.*\(1, 3\).*\(4,\)"),
    "one-hot integers": (lambda: attack_success_rate(LOGITS, LOGITS, LOGITS.long()), ValueError, "float soft labels"),
    "no batch dimension": (lambda: AttackSuccessRate().update(Y[0], Y, Y), ValueError, "Unsqueeze"),
    "no clean predictions": (lambda: RobustAccuracy().update(None, {"pgd": Y}, Y), TypeError, "clean_preds.*NoneType"),
    "no target": (lambda: AttackSuccessRate().update(Y, Y, None), TypeError, "target.*NoneType"),
    "no mapping": (lambda: RobustAccuracy().update(Y, Y, Y), TypeError, "{'pgd': preds}, got Tensor"),
    "NaN": (lambda: robust_accuracy(Y, {"pgd": NAN}, Y), ValueError, r"NaN \(3 of 12 values\).*diverged"),
    "NaN target": (lambda: attack_success_rate(LOGITS, LOGITS, NAN), ValueError, "`target` holds NaN"),
    "label too large": (lambda: attack_success_rate(LOGITS, LOGITS, Y + 1), ValueError, r"from 1 to 3.*0\.\.2"),
    "label ignored": (lambda: attack_success_rate(Y, Y, Y - 100), ValueError, "-100.*non-negative.*as ignore_index="),
    "soft classes": (lambda: attack_success_rate(LOGITS, LOGITS, X.softmax(1)), ValueError, "over 5 classes.*over 3"),
    "float labels": (lambda: attack_success_rate(Y, Y, Y.float()), ValueError, r"target\.long\(\)"),
    "float labels, many classes": (
        lambda: attack_success_rate(LOGITS, LOGITS, (Y > 1).float()),
        ValueError,
        r"target\.long\(\)",
    ),
    "missing attack": (
        lambda: update_twice({"a": Y, "b": Y}, {"a": Y}),
        ValueError,
        r"Missing: \['b'\]; additional: \[\]",
    ),
    "additional attack": (lambda: update_twice({"a": Y}, {"a": Y, "b": Y}), ValueError, r"additional: \['b'\]"),
    "attack after none": (lambda: update_twice({}, {"a": Y}), ValueError, r"additional: \['a'\]"),
    "unnamed attack": (lambda: RobustAccuracy(("a",)).update(Y, {"b": Y}, Y), ValueError, r"Missing: \['a'\].*\['b'\]"),
    "names as a string": (lambda: RobustAccuracy("pgd"), TypeError, r"Write \('pgd',\)"),
    "names of another type": (lambda: RobustAccuracy((1,)), TypeError, "strings"),
    "keys of other types": (lambda: RobustAccuracy().update(Y, {1: Y, "a": Y}, Y), TypeError, "strings"),
    "repeated names": (lambda: RobustAccuracy(("a", "a")), ValueError, "distinct"),
    "reserved name": (lambda: robust_accuracy(Y, {"clean": Y}, Y), ValueError, "Rename the attack"),
    "empty epsilons": (lambda: RobustAccuracyCurve([]), ValueError, r"at least one larger budget, got \(\)"),
    "only zero": (lambda: RobustAccuracyCurve([0.0]), ValueError, "at least one larger budget"),
    "decreasing epsilons": (lambda: RobustAccuracyCurve([0.0, 0.2, 0.1]), ValueError, "increase strictly.*Sort"),
    "repeated epsilons": (lambda: RobustAccuracyCurve([0.0, 0.0]), ValueError, "increase strictly"),
    "infinite epsilons": (lambda: RobustAccuracyCurve([0.0, float("inf")]), ValueError, "finite"),
    "NaN epsilons": (lambda: RobustAccuracyCurve([0.0, float("nan")]), ValueError, "finite"),
    "no zero": (lambda: RobustAccuracyCurve([0.1, 0.2]), ValueError, "Put 0.0 first"),
    "negative epsilons": (lambda: RobustAccuracyCurve([-0.1, 0.0]), ValueError, "start at 0.0"),
    "predictions for epsilons": (
        lambda: robust_accuracy_curve([Y, Y], Y, [0.0, 0.1, 0.2]),
        ValueError,
        "for 2 budgets, but there are 3",
    ),
    "mapping for epsilons": (
        lambda: robust_accuracy_curve({0.0: Y, 0.1: Y}, Y, [0.0, 0.1]),
        TypeError,
        r"preds\[0\].*float",
    ),
    "accuracies": (lambda: area_under_accuracy_curve([0.0, 1.0], [1.0]), ValueError, "one accuracy for each"),
    "max_samples": (lambda: TransportShift(max_samples=0), ValueError, "at least 1, got 0"),
    "setting of the transport": (lambda: TransportShift(blur=-1.0), ValueError, "blur must be positive"),
    "features' shapes": (lambda: TransportShift().update(X, X[:3]), ValueError, r"\(4, 5\) and \(3, 5\)"),
    "features' width": (lambda: shift_twice(X, X[:, :4]), ValueError, "4 values per sample, those of earlier .* 5"),
    "empty features": (lambda: TransportShift().update(X[:, :0], X[:, :0]), ValueError, "empty dimensions"),
    "integer features": (lambda: TransportShift().update(Y, Y), TypeError, "clean_features.*float.*int64"),
    "no features": (lambda: TransportShift().update(X, None), TypeError, "adversarial_features.*NoneType"),
    "NaN features": (lambda: TransportShift().update(X, X * torch.nan), ValueError, "adversarial_features.*NaN"),
    "cost without labels": (lambda: TransportShift(label_cost=1.0).update(X, X), ValueError, "pass `labels`"),
    "soft labels": (lambda: TransportShift(label_cost=1.0).update(X, X, X), TypeError, "argmax of soft labels"),
    "labels' length": (lambda: TransportShift(label_cost=1.0).update(X, X, Y[:2]), ValueError, r"\(2,\).*4 pairs"),
    "resamples": (lambda: Detectability(resamples=0), ValueError, "at least 1, got 0"),
    "confidence": (lambda: Detectability(confidence=95), ValueError, "between 0 and 1, such as 0.95, got 95"),
    "scores' shape": (lambda: Detectability().update(X[:, 0], X), ValueError, r"adversarial_scores.*\(N,\).*\(4, 5\)"),
    "integer scores": (lambda: Detectability().update(Y, X[:, 0]), TypeError, "clean_scores.*float.*int64"),
    "NaN scores": (lambda: Detectability().update(X[:, 0] * torch.nan, X[:, 0]), ValueError, "clean_scores.*NaN"),
    "order": (lambda: DistributionalAccuracy([1.0], p=0.5), ValueError, "`p`.*from 1 to inf, got 0.5"),
    "NaN order": (lambda: distributional_accuracy(D, [1.0], p=torch.nan), ValueError, "from 1 to inf, got nan"),
    "no radii": (lambda: distributional_accuracy(D, []), ValueError, r"at least one radius.*got \(\)"),
    "negative radii": (lambda: DistributionalAccuracy([-1.0, 1.0]), ValueError, "not negative, got.*-1.0"),
    "infinite radii": (lambda: DistributionalAccuracy([1.0, torch.inf]), ValueError, "finite and not negative"),
    "decreasing radii": (lambda: DistributionalAccuracy([1.0, 0.5]), ValueError, "increase strictly.*Sort"),
    "only radius 0": (lambda: DistributionalAccuracy([0.0]), ValueError, "end above 0"),
    "negative distance": (lambda: distributional_accuracy(-D, [1.0]), ValueError, "0 or more.*got -1.0.*3 of 4"),
    "NaN distance": (lambda: distributional_accuracy(D * torch.nan, [1.0]), ValueError, "got nan.*misclassified"),
    "distances' shape": (lambda: DistributionalAccuracy([1.0]).update(X), ValueError, r"\(N,\).*\(4, 5\)"),
    "integer distances": (lambda: DistributionalAccuracy([1.0]).update(Y), TypeError, "distances.*float.*int64"),
    "no distances": (lambda: DistributionalAccuracy([1.0]).update(None), TypeError, "distances.*NoneType"),
    "weights' shape": (lambda: distributional_accuracy(D, [1.0], 2, X[0]), ValueError, r"\(4,\) and \(5,\)"),
    "negative weight": (lambda: distributional_accuracy(D, [1.0], 2, D - 1), ValueError, "weights.*got -1.0"),
    "NaN weight": (lambda: distributional_accuracy(D, [1.0], 2, D * torch.nan), ValueError, "weights.*got nan"),
    "no weight": (lambda: distributional_accuracy(D, [1.0], 2, torch.zeros(4)), ValueError, "All weights are 0"),
    "nothing found": (lambda: distributional_accuracy(D[3:], [1.0]), ValueError, "All 1 distances are infinite"),
    "order of a sensitivity": (lambda: Sensitivity(p=0), ValueError, "from 1 to inf, got 0.0"),
    "norm of a sensitivity": (lambda: Sensitivity(norm="l3"), ValueError, "norm 'l3'.*'l2'"),
    "integer gradients": (lambda: sensitivity(Y), TypeError, "gradients.*float.*int64"),
    "gradients' shape": (lambda: sensitivity(X[:, :0]), ValueError, r"empty dimensions.*\(4, 0\)"),
    "NaN gradients": (lambda: sensitivity(X * torch.nan), ValueError, "gradients.*NaN"),
    "keyword": (lambda: TransportShift(blurr=1.0), ValueError, "blurr"),
}


@pytest.mark.parametrize("mistake", ERRORS)
def test_mistakes_are_explained(mistake):
    make, kind, match = ERRORS[mistake]
    with pytest.raises(kind, match=match):
        make()
