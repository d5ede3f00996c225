import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from lightning_wdefense.metrics import RobustAccuracy, attack_success_rate, robust_accuracy


def random_indices(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(3, shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def predictions(draw, max_attacks: int = 4):
    size, seed = draw(st.integers(1, 30)), draw(st.integers(0, 10_000))
    attacks = {f"attack{i}": random_indices(seed + 2 + i, size) for i in range(draw(st.integers(0, max_attacks)))}
    return random_indices(seed, size), attacks, random_indices(seed + 1, size)


@settings(max_examples=60, deadline=None)
@given(predictions())
def test_against_a_loop_and_scikit_learn(drawn):
    clean, attacks, target = drawn
    result = robust_accuracy(clean, attacks, target)
    survivors = [
        all(int(preds[i]) == int(target[i]) for preds in (clean, *attacks.values())) for i in range(len(target))
    ]
    assert result["robust"].item() == pytest.approx(np.mean(survivors))
    assert result["clean"].item() == pytest.approx(accuracy_score(target, clean))
    for name, preds in attacks.items():
        left = np.where(clean == target, preds, -1)
        assert result[name].item() == pytest.approx(accuracy_score(target, left))


@settings(max_examples=60, deadline=None)
@given(predictions())
def test_robust_is_the_worst_case(drawn):
    clean, attacks, target = drawn
    result = robust_accuracy(clean, attacks, target)
    assert all(result["robust"] <= value for value in result.values())
    assert all(result[name] <= result["clean"] for name in attacks)
    if not attacks:
        assert result["robust"] == result["clean"]


@settings(max_examples=60, deadline=None)
@given(predictions(), st.integers(0, 10_000))
def test_one_more_attack_never_raises_robust_accuracy(drawn, seed):
    clean, attacks, target = drawn
    before = robust_accuracy(clean, attacks, target)
    after = robust_accuracy(clean, {**attacks, "another": random_indices(seed, len(target))}, target)
    assert after["robust"] <= before["robust"]
    assert all(after[name] == value for name, value in before.items() if name != "robust")


@settings(max_examples=60, deadline=None)
@given(predictions(max_attacks=1))
def test_success_rate_is_what_robust_accuracy_lost(drawn):
    clean, attacks, target = drawn
    for name, preds in attacks.items():
        accuracy = robust_accuracy(clean, attacks, target)
        expected = 1 - accuracy[name] / accuracy["clean"]
        torch.testing.assert_close(attack_success_rate(clean, preds, target), expected, equal_nan=True)


def test_success_rate_without_a_right_sample_is_nan():
    assert torch.isnan(attack_success_rate(torch.tensor([1, 1]), torch.tensor([0, 1]), torch.tensor([0, 0])))


def test_names_keep_the_order_they_were_given_in():
    preds = torch.tensor([0])
    named, discovered = RobustAccuracy(("pgd", "fgsm")), RobustAccuracy()
    for metric in (named, discovered):
        metric.update(preds, {"pgd": preds, "fgsm": preds}, preds)
    assert list(named.compute()) == ["clean", "robust", "pgd", "fgsm"]
    assert list(discovered.compute()) == ["clean", "robust", "fgsm", "pgd"]
    assert discovered.attacks == ("fgsm", "pgd")


def test_the_order_of_the_mapping_does_not_matter():
    target, right, wrong = torch.tensor([0, 0]), torch.tensor([0, 0]), torch.tensor([1, 1])
    metric = RobustAccuracy()
    metric.update(target, {"a": right, "b": wrong}, target)
    metric.update(target, {"b": wrong, "a": right}, target)
    assert {name: value.item() for name, value in metric.compute().items()} == {"clean": 1, "robust": 0, "a": 1, "b": 0}


def test_no_attack_can_be_named_too():
    preds = torch.tensor([0, 1])
    metric = RobustAccuracy(())
    assert {name: value.item() for name, value in metric(preds, {}, preds).items()} == {"clean": 1, "robust": 1}


def test_a_failed_first_update_fixes_no_names():
    preds = torch.tensor([0, 1])
    metric = RobustAccuracy()
    with pytest.raises(ValueError, match="target"):
        metric.update(preds, {"typo": preds}, torch.tensor([0]))
    metric.update(preds, {"pgd": preds}, preds)
    assert metric.attacks == ("pgd",)


@pytest.mark.skipif(not hasattr(RobustAccuracy, "merge_state"), reason="needs torchmetrics 1.6 or later")
def test_merging_other_attacks_is_refused():
    preds = torch.tensor([0, 1])
    for attacks in ({"pgd": preds}, {}):
        metric, other = RobustAccuracy(("fgsm",)), RobustAccuracy()
        other.update(preds, attacks, preds)
        with pytest.raises(ValueError, match=r"Missing: \['fgsm'\]"):
            metric.merge_state(other)
