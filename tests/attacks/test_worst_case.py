"""The per-sample worst case over attacks, on attacks whose outcome is known; and which attacks may measure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_wdefense.attacks import FGSM, PGD, Attack, ThreatModel, get_attack, worst_case
from lightning_wdefense.attacks.registry import ATTACKS, evaluation_attacks

THREAT = ThreatModel(eps=1.0, bounds=None)


@dataclass(frozen=True)
class Breaks(Attack):
    """Turns the sign, and with it the class, of the samples whose values it is given (within a distance of 1)."""

    name: ClassVar[str] = "breaks"

    threat: ThreatModel
    values: tuple[float, ...]
    seen: list
    seed: int = 0
    noises: list | None = None

    def perturb(self, problem) -> Tensor:
        self.seen.append([round(value, 1) for value in problem.data.flatten().tolist()])
        if self.noises is not None:
            self.noises.append(torch.rand(1, generator=problem.generator).item())
        broken = torch.isclose(problem.data, torch.tensor(self.values)).any(1, keepdim=True)
        return torch.where(broken, -0.05 * problem.data.sign(), problem.data * 1.01)


def model(inputs: Tensor) -> Tensor:
    """Class 1 where the input is positive."""
    return torch.cat([-inputs, inputs], 1)


INPUTS = torch.tensor([[0.1], [0.2], [0.3], [0.4], [0.5], [-0.6]])
LABELS = torch.ones(6, dtype=torch.long)  # the last sample is wrong on its clean input


def run(*, independent: bool = False, labels=LABELS, **options):
    seen = {"a": [], "b": [], "c": []}
    broken = {"a": (0.1, 0.2), "b": (0.2, 0.3), "c": ()}
    attacks = {name: Breaks(THREAT, broken[name] or (9.0,), seen[name]) for name in seen}
    return worst_case(model, attacks, INPUTS, labels, independent=independent, **options), seen


def test_in_order_each_attack_gets_what_is_left():
    result, seen = run()
    assert seen == {"a": [[0.1, 0.2, 0.3, 0.4, 0.5]], "b": [[0.3, 0.4, 0.5]], "c": [[0.4, 0.5]]}
    assert result.clean.tolist() == [1, 1, 1, 1, 1, 0]
    assert result.adversarial["a"].tolist() == [0, 0, 1, 1, 1, 0]
    assert result.adversarial["b"].tolist() == [0, 0, 0, 1, 1, 0]  # what a broke stays broken
    assert result.adversarial["c"].tolist() == [0, 0, 0, 1, 1, 0]


def test_independent_attacks_all_get_what_is_right_on_clean_inputs():
    result, seen = run(independent=True)
    assert all(calls == [[0.1, 0.2, 0.3, 0.4, 0.5]] for calls in seen.values())
    assert result.adversarial["a"].tolist() == [0, 0, 1, 1, 1, 0]
    assert result.adversarial["b"].tolist() == [1, 0, 0, 1, 1, 0]
    assert result.adversarial["c"].tolist() == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("independent", [False, True])
def test_what_both_modes_agree_on(independent):
    result, _ = run(independent=independent)
    assert result.robust.tolist() == [False, False, False, True, True, False]
    assert result.worst.tolist() == [0, 0, 0, 1, 1, 0]
    assert result.attacked.tolist() == [True] * 5 + [False]
    # The input that broke a sample; the last one tried (1.01 times); the clean one.
    torch.testing.assert_close(result.inputs[:3], torch.full((3, 1), -0.05))
    torch.testing.assert_close(result.inputs[3:], torch.tensor([[0.404], [0.505], [-0.6]]))


def test_the_arguments_are_left_alone_and_the_results_are_detached():
    inputs, labels = INPUTS.clone(), LABELS.clone()
    inputs.requires_grad_()
    result = worst_case(model, {"a": Breaks(THREAT, (0.1,), [])}, inputs, labels)
    assert torch.equal(inputs, INPUTS)
    assert torch.equal(labels, LABELS)
    assert inputs.grad is None
    assert not result.inputs.requires_grad
    assert result.inputs.data_ptr() != inputs.data_ptr()


def test_it_works_under_inference_mode():
    with torch.inference_mode():
        inputs, labels = INPUTS * 1.0, LABELS * 1
        result = worst_case(model, {"fgsm": FGSM(ThreatModel(eps=0.35, bounds=None))}, inputs, labels)
    assert result.robust.tolist() == [False, False, False, True, True, False]
    assert not result.inputs.is_inference()


def test_soft_labels():
    result, seen = run(labels=torch.nn.functional.one_hot(LABELS, 2).float())
    assert result.labels.tolist() == LABELS.tolist()
    assert result.robust.tolist() == [False, False, False, True, True, False]
    assert seen["c"] == [[0.4, 0.5]]


def test_a_single_logit_and_labels_that_are_floats():
    seen: list = []
    result = worst_case(lambda x: x, {"a": Breaks(THREAT, (0.1,), seen)}, INPUTS, LABELS.float().unsqueeze(1))
    assert seen == [[0.1, 0.2, 0.3, 0.4, 0.5]]
    assert result.robust.tolist() == [False, True, True, True, True, False]


def test_one_label_an_element():
    # Two elements a sample (segmentation): every attack runs on all samples, and elements are counted.
    def segment(inputs: Tensor) -> Tensor:
        return torch.stack([-inputs, inputs], 1)

    inputs = torch.tensor([[0.1, 0.9], [0.9, 0.9], [-0.9, 0.1]])
    attacks = {"fgsm": FGSM(ThreatModel(eps=0.2, bounds=None)), "again": FGSM(ThreatModel(eps=0.2, bounds=None))}
    for independent in (False, True):
        result = worst_case(segment, attacks, inputs, torch.ones(3, 2, dtype=torch.long), independent=independent)
        assert result.robust.tolist() == [[False, True], [True, True], [False, False]]
        assert result.worst.tolist() == [[0, 1], [1, 1], [0, 0]]
        assert result.attacked.tolist() == [True, True, True]


def test_each_attack_gets_a_generator_of_its_own_or_its_seed():
    noises: list[float] = []
    attacks = {name: Breaks(THREAT, (9.0,), [], noises=noises) for name in "ab"}
    worst_case(model, attacks, INPUTS, LABELS, generator=lambda: torch.Generator().manual_seed(5))
    worst_case(model, attacks, INPUTS, LABELS)
    assert noises[0] == noises[1] == torch.rand(1, generator=torch.Generator().manual_seed(5)).item()
    assert noises[2] == noises[3] == torch.rand(1, generator=torch.Generator().manual_seed(0)).item()


def test_on_attack_hears_what_is_left():
    heard = []
    run(on_attack=lambda name, left: heard.append((name, left.tolist())))
    assert heard == [
        ("a", [False, False, True, True, True, False]),
        ("b", [False, False, False, True, True, False]),
        ("c", [False, False, False, True, True, False]),
    ]


def test_no_attack_is_called_where_nothing_is_left():
    seen: list = []
    result = worst_case(model, {"a": Breaks(THREAT, (0.1,), seen)}, INPUTS, torch.zeros(6, dtype=torch.long))
    assert seen == [[-0.6]]
    seen.clear()
    result = worst_case(model, {"a": Breaks(THREAT, (0.1,), seen)}, INPUTS[:5], torch.zeros(5, dtype=torch.long))
    assert seen == []
    assert not result.robust.any()
    assert torch.equal(result.inputs, INPUTS[:5])


@pytest.mark.parametrize(
    ("inputs", "labels", "error", "message"),
    [
        (INPUTS, LABELS + 1, ValueError, "labels run from 2 to 2.*2 classes"),
        (INPUTS, LABELS[:3], ValueError, "labels have shape"),
        (INPUTS, None, TypeError, "labels must be a tensor"),
        (INPUTS.long(), LABELS, TypeError, r"torch\.int64.*x\.float\(\) / 255"),
        (INPUTS * torch.nan, LABELS, ValueError, "NaN"),
    ],
)
def test_errors_come_before_any_attack(inputs, labels, error, message):
    seen: list = []
    with pytest.raises(error, match=message):
        worst_case(model, {"a": Breaks(THREAT, (0.1,), seen)}, inputs, labels)
    assert seen == []


def test_inputs_outside_the_bounds_are_an_error_even_where_nothing_is_attacked():
    with pytest.raises(ValueError, match="mean and std are not set"):
        worst_case(model, {"fgsm": FGSM(ThreatModel(eps=0.1))}, -INPUTS.abs(), LABELS)


# -------------------------------------------------------------------------------------------- which may measure


BOX = ThreatModel(eps=0.1)


def test_names_objects_and_mappings_become_attacks_by_name():
    attacks = evaluation_attacks(["fgsm", PGD(BOX, steps=3)], BOX)
    assert list(attacks) == ["fgsm", "pgd"]
    assert attacks["fgsm"] == FGSM(BOX)
    assert attacks["pgd"].steps == 3
    mine = evaluation_attacks({"weak": "fgsm", "strong": PGD(BOX, steps=50)}, BOX)
    assert list(mine) == ["weak", "strong"]


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_name_measures_or_says_why_not(name):
    threat = replace(BOX, norm="wasserstein") if name == "wasserstein" else BOX
    attack = get_attack(name, threat)
    if attack.bounded:
        assert list(evaluation_attacks([name], threat)) == [name]
    else:
        with pytest.raises(ValueError, match="leaves the threat model's ball"):
            evaluation_attacks([name], threat)


def test_bounds_are_judged_on_the_whole_batch():
    # One stray value among many is forgiven, also once few samples are left to attack.
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    inputs = torch.rand(16, 64, generator=torch.Generator().manual_seed(0))
    inputs[3, 0] = 1.02
    labels = model(inputs).argmax(1)
    only = torch.arange(16) == 3
    threat = ThreatModel(eps=0.1)
    with pytest.warns(UserWarning, match="widened"):
        result = worst_case(model, {"pgd": PGD(threat)}, inputs, labels, samples=only)
    assert torch.equal(result.attacked, only)
    assert torch.equal(result.inputs[~only], inputs[~only])
    assert not torch.equal(result.inputs[only], inputs[only])
