"""What a model's outputs and a batch's labels are is not guessed from a few numbers."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score
from support.attacks import EPS_CASES, OWN_CASES
from support.modules import batch, classifier
from torch import nn

from lightning_wdefense.attacks import FGSM, PGD, AutoAttack, GibbsNoise, ThreatModel, WassersteinAttack, worst_case
from lightning_wdefense.modules.outputs import MIN_ROWS, check_logits

THREAT = ThreatModel(eps=0.2)

# --- probabilities

ONE, FEW = nn.Linear(6, 1), nn.Linear(6, 3)
PROBABILITIES = {
    "sigmoid": lambda x: ONE(x).sigmoid(),
    "sigmoid, squeezed": lambda x: ONE(x).sigmoid().flatten(),
    "sigmoid, clamped": lambda x: ONE(x)[:, 0].sigmoid().clamp(1e-6, 1 - 1e-6),
    "1 - sigmoid": lambda x: 1 - ONE(x).sigmoid(),
    "sigmoid in bfloat16": lambda x: ONE(x).sigmoid().bfloat16(),
    "mean of sigmoids": lambda x: torch.stack([ONE(x).sigmoid(), ONE(1 - x).sigmoid()]).mean(0),
    "logits of a sigmoid": lambda x: {"logits": ONE(x).sigmoid()},
    "a class of a softmax": lambda x: FEW(x).softmax(1)[:, 1],
    "softmax": lambda x: FEW(x).softmax(1),
    "softmax in float16": lambda x: FEW(x).softmax(1).half().float(),
    "softmin": lambda x: F.softmin(FEW(x), 1),
    "mean of softmaxes": lambda x: torch.stack([FEW(x).softmax(1), FEW(1 - x).softmax(1)]).mean(0),
}
READ_BY = {
    "pgd": lambda model, x, y: PGD(THREAT)(model, x, y),
    "trades' attack": lambda model, x, y: PGD(THREAT, loss="kl")(model, x),
    "gibbs": lambda model, x, y: GibbsNoise(THREAT)(model, x, y),
    "autoattack": lambda model, x, y: AutoAttack(THREAT, steps=1, queries=1)(model, x, y),
    "worst case": lambda model, x, y: worst_case(model, {"fgsm": FGSM(THREAT)}, x, y),
}


@pytest.mark.parametrize("read", READ_BY.values(), ids=READ_BY)
@pytest.mark.parametrize("model", PROBABILITIES.values(), ids=PROBABILITIES)
def test_probabilities_are_refused_at_any_batch_size(model, read):
    for size in (1, 12):
        with pytest.raises(ValueError, match=r"look like probabilities.*logits.*model="):
            read(model, torch.rand(size, 6), torch.zeros(size, dtype=torch.long))


def test_frozen_models_and_inference_mode_hide_nothing():
    model = nn.Sequential(nn.Linear(6, 1), nn.Sigmoid()).requires_grad_(False)
    with torch.inference_mode(), pytest.raises(ValueError, match="sigmoid"):
        worst_case(model, {"fgsm": FGSM(THREAT)}, torch.rand(4, 6), torch.zeros(4, dtype=torch.long))


def test_following_the_advice():
    """The submodule that returns logits is attacked, and counted, as such."""
    model = nn.Sequential(nn.Linear(6, 1), nn.Sigmoid())
    x = torch.rand(16, 6)
    y = (model(x) > 0.5).float()
    found = worst_case(model[0], {"fgsm": FGSM(THREAT)}, x, y)
    assert torch.equal(found.clean, y.long().flatten())
    loss = lambda p, y: F.binary_cross_entropy(p, y, reduction="none")  # noqa: E731
    moved = PGD(THREAT, loss=loss)(model, x, y)
    assert (loss(model(moved), y) > loss(model(x), y)).all()


BY_CHANCE = {
    "two logits": torch.tensor([[0.25, 0.75]]),
    "three logits, two samples": torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.5, 0.0]]),
    "one logit": torch.tensor([[0.3]]),
    "one logit of 1": torch.tensor([[1.0]]),
    "the same logits for all": torch.tensor([[0.25, 0.75]]).repeat(64, 1),
}


@pytest.mark.parametrize("logits", BY_CHANCE.values(), ids=BY_CHANCE)
def test_logits_that_look_like_probabilities_by_chance(logits):
    layer = nn.Linear(6, logits.shape[1])
    with torch.no_grad():
        layer.weight.zero_()
    x = torch.rand(len(logits), 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGD(THREAT)(lambda x: layer(x) - layer.bias + logits, x, torch.zeros(len(x), dtype=torch.long))
        check_logits(logits)


def test_many_rows_are_evidence_without_a_graph():
    rows = torch.rand(64, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
    check_logits(rows[: MIN_ROWS - 1])
    for many in (rows[:MIN_ROWS], rows.T.reshape(1, 3, 8, 8), rows.bfloat16()):
        with pytest.raises(ValueError, match="every row is non-negative and sums to 1"):
            check_logits(many)


def test_a_single_output_in_0_1_whose_making_is_not_known_is_warned_of():
    values = torch.rand(64, 1)
    with pytest.warns(UserWarning, match=r"single output lies in \[0, 1\] for all 64 samples.*return the logit"):
        check_logits(values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_logits(values[: MIN_ROWS - 1])
        check_logits(values - 0.5)
        check_logits(nn.Linear(1, 1)(values) * 0 + 0.1)  # an untrained model, known to end in no sigmoid


# --- targets

X = torch.rand(8, 6, generator=torch.Generator().manual_seed(0))
TARGETS = {
    "regression in 0..1": (ONE, torch.linspace(0, 1, 8)[:, None], "single output.*from 0 to 1, are not all 0 or 1"),
    "regression in 0..1, flat": (ONE, torch.linspace(0.1, 1, 8), "from 0.1 to 1"),
    "regression": (ONE, torch.linspace(-3, 3, 8)[:, None], "from -3 to 3"),
    "labels -1 and 1": (ONE, torch.tensor([1.0, -1] * 4), r"labels -1 and 1 with \(labels \+ 1\) / 2"),
    "several labels": (FEW, torch.tensor([[1.0, 0, 1], [0, 1, 0]] * 4), "sum to 1"),
    "several labels, integers": (FEW, torch.tensor([[1, 0, 1], [0, 1, 0]] * 4), r"labels have shape \(8, 3\)"),
    "several targets": (FEW, torch.randn(8, 3), "non-negative"),
    "token ids": (FEW, torch.zeros(8, 5, dtype=torch.long), r"labels have shape \(8, 5\)"),
}
TARGETS_READ_BY = {name: READ_BY[name] for name in ("pgd", "gibbs", "autoattack", "worst case")}


@pytest.mark.parametrize("read", TARGETS_READ_BY.values(), ids=TARGETS_READ_BY)
@pytest.mark.parametrize(("model", "targets", "message"), TARGETS.values(), ids=TARGETS)
def test_targets_of_other_tasks_are_refused(model, targets, message, read):
    with pytest.raises(ValueError, match=re.compile(f"{message}.*another task.*loss=.*PGD", re.DOTALL)):
        read(model, X, targets)


@pytest.mark.parametrize(("model", "targets", "message"), TARGETS.values(), ids=TARGETS)
def test_and_the_advice_leads_on(model, targets, message):
    """With a loss of the task's own the attack raises that loss, whatever the targets are."""
    if targets.shape != model(X).shape:
        targets = targets.float().mean(1, keepdim=True) if targets.ndim > 1 else targets[:, None].float()
    loss = lambda z, y: (z - y).square().mean(1)  # noqa: E731
    moved = PGD(THREAT, loss=loss)(model, X, targets)
    assert (loss(model(moved), targets) > loss(model(X), targets)).all()


# --- elements that belong to no class


@pytest.fixture(scope="module")
def masks():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 1))
        x, labels = torch.rand(4, 3, 6, 7), torch.randint(0, 4, (4, 6, 7))
    labels[:, :2] = 255
    return model, x, labels


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_attacks_leave_out_ignored_pixels(masks, loss):
    """As torch's cross-entropy does, -100 is no class: the same as an attack on the other pixels alone."""
    model, x, labels = masks
    cropped = lambda x: model(x)[:, :, 2:]  # noqa: E731
    attack = PGD(THREAT, loss=loss, steps=3, restarts=2)
    got = attack(model, x, labels.masked_fill(labels == 255, -100))
    torch.testing.assert_close(got, attack(cropped, x, labels[:, 2:]))


@pytest.mark.parametrize("dtype", [torch.long, torch.uint8, torch.int32])
def test_the_worst_case_leaves_out_ignored_pixels(masks, dtype):
    model, x, labels = masks
    found = worst_case(model, {"pgd": PGD(THREAT, steps=3)}, x, labels.to(dtype), ignore_index=255)
    kept = labels != 255
    assert torch.equal(found.labels == -100, ~kept)
    for predicted, right in ((found.clean, found.clean == found.labels), (found.adversarial["pgd"], found.robust)):
        expected = accuracy_score(labels[kept], (predicted if predicted is found.clean else found.worst)[kept])
        assert float(right[kept].float().mean()) == pytest.approx(expected)
    assert not found.robust[~kept].any()
    same = worst_case(model, {"pgd": PGD(THREAT, steps=3)}, x, labels.masked_fill(~kept, -100))
    assert torch.equal(same.inputs, found.inputs)


def test_a_sample_whose_pixels_are_all_ignored_is_not_broken(masks):
    model, x, labels = masks
    labels = labels.clone()
    labels[0] = 255
    left = []
    worst_case(
        model, {"fgsm": FGSM(THREAT)}, x, labels, ignore_index=255, on_attack=lambda name, open_: left.append(open_)
    )
    assert left[0].tolist() == [True, False, False, False]


def test_masks_of_one_channel(masks):
    _, x, labels = masks
    model = nn.Conv2d(3, 1, 1)
    binary = (labels % 2).float().masked_fill(labels == 255, 255.0)[:, None]
    found = worst_case(model, {"fgsm": FGSM(THREAT)}, x, binary, ignore_index=255)
    kept = labels != 255
    assert torch.equal(found.labels[kept], labels[kept] % 2)
    assert (found.labels[~kept] == -100).all()


def test_without_ignore_index_the_message_names_it(masks):
    model, x, labels = masks
    with pytest.raises(ValueError, match=r"from 0 to 255, but the model has 4 classes.*-100.*ignore_index="):
        worst_case(model, {"fgsm": FGSM(THREAT)}, x, labels)
    with pytest.raises(ValueError, match=r"run from -100 to -100.*0..2\.$"):  # one label a sample is a class
        PGD(THREAT)(FEW, X, torch.full((8,), -100))


# --- outputs that are not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("label", [0, 1])
def test_a_model_that_diverged_is_lost(value, label):
    model = lambda x: FEW(x) * 0 + torch.tensor([value, 0.0, 0.0]) * torch.ones(len(x), 1)  # noqa: E731
    labels = torch.full((8,), label)
    with pytest.warns(UserWarning, match="NaN or infinite for 8 of 8 predictions, which count as wrong"):
        found = worst_case(model, {"pgd": PGD(THREAT)}, X, labels)
    assert (found.clean == -1).all()
    assert not found.robust.any()
    assert not found.attacked.any()


def test_an_attack_that_makes_a_model_overflow_breaks_it():
    model = lambda x: FEW(x) * 0 + torch.stack([x[:, 0] * 0 + 1, (x[:, 0] - 0.55).relu() * torch.inf, x[:, 0] * 0], 1)  # noqa: E731
    x = torch.full((4, 6), 0.5)
    with pytest.warns(UserWarning, match="count as wrong"):
        found = worst_case(
            lambda x: model(x).nan_to_num(nan=0.0, posinf=torch.inf),
            {"jump": Jump(THREAT)},
            x,
            torch.zeros(4, dtype=torch.long),
        )
    assert (found.clean == 0).all()
    assert (found.adversarial["jump"] == -1).all()
    assert not found.robust.any()


class Jump(FGSM):
    """Adds the radius to everything."""

    def perturb(self, problem):
        return problem.project(problem.data + self.threat.eps)


def test_masked_classes_are_no_fault():
    """Logits of minus infinity exclude a class."""
    model = lambda x: FEW(x) + torch.tensor([0.0, 0.0, -torch.inf])  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (worst_case(model, {"fgsm": FGSM(THREAT)}, X, torch.zeros(8, dtype=torch.long)).clean < 2).all()


# --- parts of a batch


class Squeezing(nn.Module):
    """Fine for the pipeline's batches, but of one sample it makes a number."""

    def __init__(self):
        super().__init__()
        self.two = classifier(1, 8, 8, classes=2)

    def forward(self, x):
        return self.two(x).diff(dim=1).squeeze()


class Fixed(nn.Module):
    """Has a batch size of its own."""

    def __init__(self):
        super().__init__()
        self.net = classifier(1, 8, 8)

    def forward(self, x):
        return self.net(x.view(16, 1, 8, 8))


PARTIAL = {
    **{
        name: case.build for name, case in OWN_CASES.items() if case.labelled and not (case.transports or case.searches)
    },
    "restarts": lambda threat: PGD(threat, steps=2, restarts=4),
    "autoattack": lambda threat: AutoAttack(threat, steps=2, queries=20),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", PARTIAL.values(), ids=PARTIAL)
def test_models_that_take_no_parts_of_a_batch(attack):
    """They are attacked as the same model without that limit."""
    fixed = Fixed()
    x, y = batch(1, 8, 8, model=fixed.net, n=16)
    y = torch.where(torch.arange(16) < 12, y, (y + 1) % 5)
    attacks = {"fgsm": FGSM(ThreatModel(eps=0.02)), "other": attack(ThreatModel(eps=0.02))}
    got, expected = (worst_case(model, attacks, x, y) for model in (fixed, fixed.net))
    torch.testing.assert_close(got.inputs, expected.inputs, atol=1e-5, rtol=0)
    assert torch.equal(got.robust, expected.robust)


def test_wasserstein_attack_on_a_model_of_a_fixed_batch_size():
    fixed = Fixed()
    x, y = batch(1, 8, 8, model=fixed.net, n=16)
    attack, some = WassersteinAttack(ThreatModel("wasserstein", 0.1), steps=2), torch.tensor([3, 5, 7])
    with pytest.warns(UserWarning, match=r"not accept a part of a batch, 3 of 16 samples \(RuntimeError"):
        got = attack(fixed, x, y, samples=some)
    torch.testing.assert_close(got, attack(fixed.net, x, y, samples=some), atol=1e-5, rtol=0)
    assert not torch.equal(got, x)


@pytest.mark.parametrize("independent", [False, True])
def test_a_model_that_squeezes(independent):
    x = torch.rand(16, 1, 8, 8)
    y = (Squeezing()(x) > 0).float()
    y[1:] = 1 - y[1:]  # one of them is right on clean inputs
    with pytest.warns(UserWarning, match=r"a part of a batch, 1 of 16 samples \(outputs of shape \(\)\)"):
        found = worst_case(Squeezing(), {"fgsm": FGSM(THREAT), "pgd": PGD(THREAT)}, x, y, independent=independent)
    assert found.attacked.sum() == 1


# --- which samples


BY_EPS = {name: case for name, case in EPS_CASES.items() if case.own}


@pytest.mark.parametrize("case", BY_EPS.values(), ids=BY_EPS)
@pytest.mark.parametrize("none", [torch.zeros(4, dtype=torch.bool), torch.tensor([], dtype=torch.long)])
def test_no_sample_is_chosen(case, none):
    x, y = batch(1, 6, 6, n=4)
    assert torch.equal(
        case(THREAT if not case.transports else ThreatModel("wasserstein", 0.2))(
            classifier(1, 6, 6), x, y, samples=none
        ),
        x,
    )


SAMPLES = {
    "mask of another length": torch.ones(5, dtype=torch.bool),
    "mask of pixels": torch.ones(8, 6, dtype=torch.bool),
    "too large": torch.tensor([0, 8]),
    "too small": torch.tensor([-9]),
    "floats": torch.tensor([0.0, 1.0]),
}


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
def test_samples_that_are_none(samples):
    with pytest.raises(ValueError, match=r"samples= must be a boolean mask of shape \(8,\) or indices in 0..7"):
        PGD(THREAT)(FEW, X, torch.zeros(8, dtype=torch.long), samples=samples)
