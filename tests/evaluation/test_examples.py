"""What an evaluation keeps for a report: samples, the transport plan by class, accuracies by class, seconds."""

from __future__ import annotations

import math

import ot
import pytest
import torch
from support.lightning_modules import digits_loaders, trained_classifier
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from lightning_wdefense import EvaluationResult, ThreatModel, evaluate
from lightning_wdefense.attacks import FGSM, FMN, PGD
from lightning_wdefense.evaluation.details.examples import ExampleRanking
from lightning_wdefense.evaluation.details.plan import class_plan

pytestmark = pytest.mark.filterwarnings("ignore")

THREAT = ThreatModel(eps=0.1, mean=0.5, std=0.5)
ATTACKS = {"fgsm": FGSM(THREAT), "pgd": PGD(THREAT, steps=5, random_start=False)}
N = 4


class InModelUnits(nn.Module):
    """A classifier that sees normalised inputs."""

    def __init__(self):
        super().__init__()
        self.net = trained_classifier().net
        self.forwards = 0

    def forward(self, x):
        self.forwards += 1
        return self.net(x * 0.5 + 0.5)


def loader():
    return [((inputs - 0.5) / 0.5, labels) for inputs, labels in digits_loaders()[1]]


def run(**options) -> EvaluationResult:
    return evaluate(InModelUnits(), loader(), THREAT, ATTACKS, progress=False, **{"examples": N} | options)


@pytest.fixture(scope="module")
def by_attack() -> EvaluationResult:
    return run()


@pytest.fixture(scope="module")
def by_distance() -> EvaluationResult:
    return run(distances=FMN(THREAT, steps=20))


def margin(example) -> float:
    logits = trained_classifier().net.eval()(example.attacked[None])[0].tolist()
    own = logits.pop(example.label)
    return own - max(logits)


def test_ends_by_distance(by_distance):
    distances = by_distance.samples["distance"].masked_fill(by_distance.samples["clean_right"] == 0, math.nan)
    order = [row for row in distances.argsort().tolist() if not math.isnan(distances[row])]
    least, most = by_distance.examples
    assert [each.sample for each in least] == order[:N]
    assert [each.sample for each in most] == order[: -N - 1 : -1]
    assert [each.distance for each in least] == distances[order[:N]].tolist()


def test_ends_by_attack_and_margin(by_attack):
    least, most = by_attack.examples
    fallen = (by_attack.samples["broken_by"] == 0).sum()
    assert fallen > N
    assert [each.broken_by for each in least] == [0] * N
    assert [each.broken_by for each in most] == [-1] * N
    assert [margin(each) for each in least] == sorted(margin(each) for each in least)
    assert [margin(each) for each in most] == sorted((margin(each) for each in most), reverse=True)
    assert all(margin(each) < 0 for each in least)
    assert all(math.isnan(each.distance) for each in (*least, *most))


def test_nothing_between_the_ends_is_more_extreme():
    everything = run(examples=64).examples.least
    assert len(everything) == 64
    keys = [(each.broken_by if each.broken_by >= 0 else math.inf, margin(each)) for each in everything]
    assert keys == sorted(keys)
    assert {0, 1} <= {each.broken_by for each in everything}


def test_each_is_the_sample_that_its_row_says(by_attack, by_distance):
    images = torch.cat([inputs for inputs, _ in digits_loaders()[1]])
    model = trained_classifier().net.eval()
    for result in (by_attack, by_distance):
        for example in (*result.examples.least, *result.examples.most):
            row = {name: column[example.sample].item() for name, column in result.samples.items()}
            assert (example.label, example.clean) == (row["label"], row["clean"])
            assert (example.adversarial, example.broken_by) == (row["worst"], row["broken_by"])
            torch.testing.assert_close(example.inputs, images[example.sample])
            assert (example.attacked - example.inputs).abs().max() <= 0.1 + 1e-6
            assert model(example.attacked[None]).argmax() == example.adversarial


def test_no_sample_is_in_both():
    least, most = run(examples=100, max_batches=1).examples
    right = int(run(max_batches=1).samples["clean_right"].sum())
    assert len({each.sample for each in (*least, *most)}) == len(least) + len(most) == right


def test_batches_without_a_right_sample_are_counted():
    batches = loader()
    first = batches[0][0], (batches[0][1] + 1) % 10
    wrong = first[0][:8], InModelUnits().eval()(first[0][:8]).argmin(1)  # labels that the model never gives
    result = evaluate(InModelUnits(), [wrong, *batches[:1]], THREAT, ATTACKS, examples=2, progress=False)
    assert all(each.sample >= 8 for each in result.examples.least)
    for each in result.examples.least:
        assert result.samples["label"][each.sample] == each.label


def test_no_examples_cost_nothing():
    counts = {}
    for examples in (0, 2):
        model = InModelUnits()
        result = evaluate(model, loader(), THREAT, ATTACKS, features=None, examples=examples, progress=False)
        counts[examples] = model.forwards
    assert counts[2] - counts[0] == 2 * len(loader())  # outputs on clean and on adversarial inputs
    assert run(examples=0).examples is run(examples=0).plan is None
    assert result.plan is None  # without features
    assert result.examples.least


def test_memory_is_bounded_and_states_can_be_restored():
    metric = ExampleRanking(2)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(5):
        margins = torch.rand(6, generator=generator)
        samples = {name: torch.zeros(6, dtype=torch.long) for name in ("label", "worst")} | {
            "broken_by": torch.full((6,), -1)
        }
        metric.update(samples, torch.ones(6, dtype=torch.bool), margins, torch.rand(6, 3), torch.rand(6, 3))
        seen += margins.tolist()
        assert sum(part.numel() for part in metric.inputs) <= 4 * 2 * 3
    again = ExampleRanking(2)
    for name in metric._defaults:
        setattr(again, name, getattr(metric, name))
    order = sorted(range(30), key=seen.__getitem__)
    for each in (metric, again):
        least, most = each.compute()
        assert [example.sample for example in least] == order[:2]
        assert [example.sample for example in most] == order[:-3:-1]


def test_several_processes_are_merged():
    class Stub(ExampleRanking):
        """One of two processes, of which the other's states are given."""

        def _sync_dist(self, *args, **kwargs):
            super()._sync_dist(lambda state, group=None: next(self.pairs), None)

    def filled(margins):
        metric = Stub(1, sync_on_compute=False)
        samples = {
            "label": torch.arange(len(margins)),
            "worst": torch.arange(len(margins)),
            "broken_by": torch.full((len(margins),), -1),
        }
        inputs = torch.tensor(margins).unsqueeze(1)
        if margins:
            metric.update(samples, torch.ones(len(margins), dtype=torch.bool), inputs[:, 0], inputs, inputs)
        return metric

    for shares, least, most in ((([3.0, 2.0], [1.0, 5.0, 4.0]), 2, 3), (([], [1.0, 5.0]), 0, 1)):
        metrics = [filled(share) for share in shares]
        states = {name: [_state(metric, name) for metric in metrics] for name in metrics[0]._reductions}
        metrics[0].pairs = iter(list(states.values()))
        metrics[0].sync(distributed_available=lambda: True)
        found = metrics[0].compute()
        assert [each.sample for each in (*found.least, *found.most)] == [least, most]
        assert found.least[0].inputs.tolist() == [1.0]


def _state(metric, name):
    state = getattr(metric, name)
    if not isinstance(state, list):
        return state
    return torch.cat(state) if state else torch.empty(0, dtype=torch.long if name == "facts" else torch.float32)


def test_plan_is_that_of_an_exact_solver():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    clean = torch.randn(60, 4, generator=generator) + 2 * labels.unsqueeze(1)
    moved = clean + torch.randn(60, 4, generator=generator)
    costs = torch.cdist(clean, moved).square().double() / 2
    weights = torch.full((60,), 1 / 60, dtype=torch.float64)
    plan = ot.sinkhorn(weights, weights, costs, float(0.04 * costs.mean()), numItermax=10_000, stopThr=1e-12)
    hot = nn.functional.one_hot(labels).double()
    found = class_plan(clean, moved, labels, 3)
    torch.testing.assert_close(found.double(), hot.T @ plan @ hot, atol=2e-4, rtol=0)
    assert 0.01 < 1 - found.trace() < 0.5  # else this shows little


def test_plan_of_an_evaluation(by_attack):
    right = by_attack.samples["label"][by_attack.samples["clean_right"] == 1]
    shares = right.bincount(minlength=10) / len(right)
    assert by_attack.plan.shape == (10, 10)
    torch.testing.assert_close(by_attack.plan.sum(1), shares, atol=1e-5, rtol=0)
    torch.testing.assert_close(by_attack.plan.sum(0), shares, atol=2e-3, rtol=0)
    assert by_attack.values["transport_shift"] == run(examples=0).values["transport_shift"]


def test_classes_are_torchmetrics(by_attack):
    samples = by_attack.samples
    expected = multiclass_confusion_matrix(samples["worst"], samples["label"], 10)
    assert torch.equal(by_attack.confusion(), expected)
    found = by_attack.by_class()
    assert found.classes.tolist() == list(range(10))
    assert torch.equal(found.counts, samples["label"].bincount())
    for name, share in (("clean", found.clean), ("worst", found.robust)):
        torch.testing.assert_close(share, multiclass_accuracy(samples[name], samples["label"], 10, average=None))


@pytest.mark.filterwarnings("error:The ``compute`` method")
def test_masks_have_no_examples_and_no_classes():
    class Bright(nn.Module):
        def forward(self, x):
            return torch.cat([0.5 - x, x - 0.5], 1)

    inputs = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    batch = inputs, (inputs[:, 0] > 0.5).long()
    result = evaluate(Bright(), [batch], ThreatModel(eps=0.1), ["fgsm"], examples=2, progress=False)
    assert result.examples == ((), ())
    assert result.plan is None
    for read in (result.confusion, result.by_class):
        with pytest.raises(ValueError, match="masks, with several labels each"):
            read()


def test_a_diverged_model():
    class Diverged(nn.Module):
        def forward(self, x):
            outputs = x.flatten(1)[:, :3] * 1.0
            return torch.where(x.flatten(1)[:, :1] > 0.9, torch.nan, outputs)

    inputs = torch.tensor([[0.89, 0.1, 0.0], [0.95, 0.0, 0.0], [0.7, 0.2, 0.1]])
    labels = torch.tensor([0, 0, 0])
    result = evaluate(
        Diverged(), [(inputs, labels)], ThreatModel(eps=0.05), ["fgsm", "pgd"], examples=2, progress=False
    )
    assert result.samples["clean"].tolist() == [0, -1, 0]
    assert result.confusion().sum() == (result.samples["worst"] >= 0).sum()
    assert {each.sample for each in (*result.examples.least, *result.examples.most)} == {0, 2}


def test_seconds_are_those_of_the_attacks_and_of_all(by_distance):
    assert 0 < by_distance.seconds["attacks"] <= by_distance.seconds["total"] < 60


@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [(-1, ValueError, "0 .none. or more, got -1"), (True, TypeError, "an integer"), ("4", TypeError, "got a str: '4'")],
)
def test_bad_numbers(examples, error, message):
    with pytest.raises(error, match=message):
        run(examples=examples)


def test_inputs_of_several_shapes_say_what_to_do():
    class Mean(nn.Module):
        def forward(self, x):
            return torch.cat([x.mean((1, 2, 3)).unsqueeze(1), torch.zeros(len(x), 1)], 1)

    batches = [(torch.rand(2, 1, size, size), torch.zeros(2, dtype=torch.long)) for size in (4, 5)]
    with pytest.raises(ValueError, match=r"inputs of one shape, got \(1, 5, 5\) after \(1, 4, 4\).*examples=0"):
        evaluate(Mean(), batches, ThreatModel(eps=0.1), ["fgsm"], examples=1, features=None, progress=False)
