"""Models beyond the textbook: one logit, soft labels, objects with logits, segmentation, regression."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.attacks import ATTACK_CASES, OWN_CASES
from support.modules import batch, classifier
from torch import nn

from lightning_wdefense.attacks import FGSM, PGD, ThreatModel

THREAT = ThreatModel(norm="linf", eps=0.3)
# A callable loss gets labels and outputs as they are, so what is said of both here is not of it.
NAMED_LOSS = {name: case for name, case in ATTACK_CASES.items() if name != "pgd-callable"}
# The distance between two logits is not that between their differences, so the transport cost is another.
FEW_CLASSES = {
    # Of samples that share a budget, a flipped sign in one moves the others.
    name: case
    for name, case in NAMED_LOSS.items()
    if not case.shares and name not in ("apgd-t", "feature-scattering", "sinkhorn")
}
named_loss = pytest.mark.parametrize("case", NAMED_LOSS.values(), ids=NAMED_LOSS)


class Binary(nn.Module):
    """One logit of two: ``(N, 1)``, or ``(N,)``."""

    def __init__(self, column: bool) -> None:
        super().__init__()
        self.two, self.column = classifier(1, 6, 6, classes=2), column

    def forward(self, inputs):
        z = self.two(inputs)
        z = z[:, 1] - z[:, 0]
        return z[:, None] if self.column else z


@pytest.mark.parametrize("case", FEW_CLASSES.values(), ids=FEW_CLASSES)
@pytest.mark.parametrize("column", [True, False], ids=["(N, 1)", "(N,)"])
def test_one_logit_is_two(case, column):
    """A binary model with one logit is attacked as the same model with two, whatever its labels look like."""
    model = Binary(column)
    inputs, labels = batch(1, 6, 6, model=model.two)
    expected = case(THREAT)(model.two, inputs, labels)
    for given in (labels, labels.float(), labels[:, None], labels[:, None].float(), labels.bool(), labels.int()):
        got = case(THREAT)(model, inputs, given)
        close = (got - expected).abs().flatten(1).amax(1) < 1e-3  # a sign may flip where a gradient is zero
        assert close.float().mean() >= 0.75


@named_loss
def test_soft_labels(case):
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6)
    soft = 0.9 * F.one_hot(labels, 5).float() + 0.02
    adversarial = case(THREAT)(model, inputs, soft)
    assert not torch.equal(adversarial, inputs)
    if not case.own:  # those look at the likeliest class alone
        assert torch.equal(adversarial, case(THREAT)(model, inputs, labels))


def test_soft_labels_enter_the_cross_entropy():
    model = classifier(6)
    inputs, _ = batch(6)
    soft = torch.rand(8, 5).softmax(1)
    start = inputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-(soft * model(start).log_softmax(1)).sum(), start)
    expected = (inputs + 0.3 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(FGSM(THREAT)(model, inputs, soft), expected)


@named_loss
@pytest.mark.parametrize("wrap", [lambda z: SimpleNamespace(logits=z, loss=None), lambda z: {"logits": z}])
def test_objects_with_logits(case, wrap):
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6)
    attack = case(THREAT)
    got = attack(lambda x: wrap(model(x)), inputs, labels)
    assert torch.equal(got, attack(model, inputs, labels))


# --- one label an element

# FAB and the minimum-norm attacks look for the boundary between two classes of a sample, and refuse.
SEGMENTATION = {
    name: case
    for name, case in OWN_CASES.items()
    if case.labelled and not case.searches and name not in ("pgd-callable", "fab-t")
}


def segmenter(classes: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, classes, 1)).eval()


@pytest.mark.filterwarnings("ignore:AutoAttack leaves FAB-T out")
@pytest.mark.parametrize("case", SEGMENTATION.values(), ids=SEGMENTATION)
@pytest.mark.parametrize("classes", [1, 4], ids=["one channel", "four classes"])
def test_segmentation(case, classes):
    model = segmenter(classes)
    inputs = torch.rand(4, 3, 6, 7)
    with torch.no_grad():
        clean = model(inputs)
    labels = (clean[:, 0] > 0).long() if classes == 1 else clean.argmax(1)
    two = torch.cat([torch.zeros_like(clean), clean], 1) if classes == 1 else clean
    adversarial = case(THREAT)(model, inputs, labels)
    with torch.no_grad():
        after = model(adversarial)
        after = torch.cat([torch.zeros_like(after), after], 1) if classes == 1 else after
    before = F.cross_entropy(two, labels, reduction="none").flatten(1).sum(1)
    succeeded = F.cross_entropy(after, labels, reduction="none").flatten(1).sum(1) > before
    if getattr(
        case(THREAT), "early_exit", False
    ):  # leaves a sample at its first wrong element, wherever the start put it
        succeeded |= (after.argmax(1) != labels).flatten(1).any(1)
    assert succeeded.all()
    if classes == 1:
        for given in (labels.float(), labels[:, None], labels[:, None].float()):
            assert torch.equal(case(THREAT)(model, inputs, given), adversarial)


def test_segmentation_without_labels():
    for classes in (1, 4):
        model, inputs = segmenter(classes), torch.rand(4, 3, 6, 7)
        adversarial = PGD(THREAT, loss="kl")(model, inputs)
        assert ((model(adversarial) - model(inputs)).abs().flatten(1).amax(1) > 0.1).all()


def test_segmentation_with_a_loss_of_ones_own():
    """Void pixels (255) are a matter of the loss."""
    model = segmenter(4)
    inputs, labels = torch.rand(4, 3, 6, 7), torch.randint(0, 4, (4, 6, 7))
    labels[:, :2] = 255

    def loss(outputs, labels):
        return F.cross_entropy(outputs, labels, ignore_index=255, reduction="none")

    adversarial = PGD(THREAT, steps=3, loss=loss, restarts=2)(model, inputs, labels)
    assert loss(model(adversarial), labels).sum() > loss(model(inputs), labels).sum()


# --- regression


def regression_loss(outputs, labels):
    return (outputs.squeeze(-1) - labels["target"]) ** 2


@pytest.mark.parametrize(
    "attack",
    [
        FGSM(THREAT, loss=regression_loss),
        FGSM(THREAT, noise=2.0, loss=regression_loss),
        PGD(THREAT, loss=regression_loss),
        PGD(THREAT, steps=2, restarts=3, loss=regression_loss),
    ],
    ids=["fgsm", "n-fgsm", "pgd", "restarts"],
)
@pytest.mark.parametrize("inference", [False, True])
def test_regression_with_structured_labels(attack, inference):
    """Labels of any structure reach the loss, also those that Lightning made under inference_mode."""
    model = nn.Sequential(classifier(6), nn.Linear(5, 1))
    inputs, _ = batch(6)
    with torch.inference_mode(inference):
        labels = {"target": torch.randn(8), "name": ["a"] * 8}
        adversarial = attack(model, inputs.clone(), labels)
    with torch.no_grad():
        after, before = regression_loss(model(adversarial), labels), regression_loss(model(inputs), labels)
    assert (after > before).float().mean() > 0.7
    assert after.mean() > 1.5 * before.mean()


def test_attack_without_labels():
    model = classifier(6)
    inputs, _ = batch(6)
    adversarial = PGD(THREAT, loss="kl")(model, inputs)
    assert (model(adversarial).argmax(1) != model(inputs).argmax(1)).any()


def test_recurrent_model_is_left_as_it_was():
    """Recurrent layers are kept in training mode inside (cuDNN needs it), where that makes no difference."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.drop, self.head = nn.LSTM(3, 8, batch_first=True), nn.Dropout(0.5), nn.Linear(8, 5)

        def forward(self, x):
            self.seen = self.lstm.training, self.drop.training
            return self.head(self.drop(self.lstm(x)[0][:, -1]))

    model = Recurrent()
    inputs, labels = torch.rand(4, 6, 3), torch.arange(4)
    for mode in (True, False):
        model.train(mode)
        PGD(THREAT)(model, inputs, labels)
        assert model.seen == (True, False)
        assert all(module.training is mode for module in model.modules())
