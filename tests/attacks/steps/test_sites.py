"""Where the adversary acts, seen by hooks and computations of the tests' own."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_wdefense.attacks import PGD, ThreatModel
from lightning_wdefense.attacks.steps.sites import InputSite, Perturb
from lightning_wdefense.modules.batches import BatchReader

L2 = ThreatModel(norm="l2", eps=0.7, bounds=None)
LINF = ThreatModel(norm="linf", eps=0.1, bounds=None)
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [5, 3, 0, 0, 0], [8, 9, 7, 9, 3]])
LABELS = torch.tensor([0, 1, 2, 0])


class Words(nn.Module):
    """Embeds, weighs by place, classifies."""

    def __init__(self, padding_idx=None, keyword=False):
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.Embedding(10, 6, padding_idx=padding_idx)
        self.tower = nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 3))
        self.keyword = keyword

    def forward(self, ids):
        embedded = self.embeddings(input=ids) if self.keyword else self.embeddings(ids)
        return self.tower(embedded.flatten(1))


def ids_of(batch):
    return batch if isinstance(batch, Tensor) else batch["ids"] if isinstance(batch, dict) else batch[0]


def attacked(perturb, model=None, batch=IDS, threat=L2, steps=5):
    """What PGD on the mean loss adds to the embeddings, as the test sees it in a pass with what it found, and the site."""
    model = model or Words()
    site = perturb.site(model, batch, threat, lambda: model(ids_of(batch)))

    def losses(values):
        with site.perturbed(values) as moved:
            return F.cross_entropy(model(ids_of(moved)), LABELS).expand(len(values))

    found = PGD(threat, steps=steps, loss=lambda values, labels: values)(losses, site.values)
    return added(model, site, found, ids_of(batch)), site


def added(model, site, values, ids):
    seen = []
    with site.perturbed(values):
        handle = model.tower.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(ids)
        handle.remove()
    clean = model.embeddings.weight[ids].detach()
    return seen[0].detach().reshape(clean.shape) - clean


# --- the output of a submodule


def test_a_ball_around_each_sample():
    delta, site = attacked(Perturb("embeddings"))
    lengths = delta.flatten(1).norm(dim=1)
    assert site.size == 4
    assert site.values.shape == (4, 5, 6)
    assert (lengths <= L2.eps + 1e-5).all()
    assert (lengths > 0.95 * L2.eps).all()
    assert delta.norm(dim=-1).max() < 0.95 * L2.eps  # shared by the tokens


def test_a_ball_around_each_token():
    delta, site = attacked(Perturb("embeddings", by="token"))
    lengths = delta.norm(dim=-1)
    assert site.size == 4
    assert site.values.shape == (20, 6)
    assert (lengths <= L2.eps + 1e-5).all()
    assert (lengths > 0.9 * L2.eps).all()


@pytest.mark.parametrize("by", ["sample", "token"])
def test_linf_balls(by):
    delta, _ = attacked(Perturb("embeddings", by=by), threat=LINF)
    assert delta.abs().max() <= LINF.eps + 1e-6
    assert (delta.abs() > 0.9 * LINF.eps).float().mean() > 0.9


def test_the_attack_is_one():
    model = Words()
    delta, _ = attacked(Perturb("embeddings"), model)
    clean = model.embeddings(IDS)
    before, after = (F.cross_entropy(model.tower(each.flatten(1)), LABELS) for each in (clean, clean + delta))
    by_hand = torch.zeros_like(clean)
    for _ in range(50):
        by_hand = by_hand.detach().requires_grad_()
        loss = F.cross_entropy(model.tower((clean.detach() + by_hand).flatten(1)), LABELS, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, by_hand)
        moved = by_hand.detach() + 0.1 * F.normalize(gradient.flatten(1)).reshape(gradient.shape)
        by_hand = moved * (L2.eps / moved.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]
    best = F.cross_entropy(model.tower((clean + by_hand).flatten(1)), LABELS)
    assert after - before > 0.95 * (best - before) > 0


@dataclass
class Batch:
    ids: Tensor
    padding: Tensor

    def __getitem__(self, index):
        return self.ids


MASK = IDS != 0
PADDED = {
    "padding_idx": (Words(padding_idx=0), IDS, {}),
    "padding_idx, by keyword": (Words(padding_idx=0, keyword=True), IDS, {}),
    "attention_mask": (Words(), {"ids": IDS, "attention_mask": MASK.long()}, {}),
    "mask": (Words(), {"ids": IDS, "mask": MASK}, {}),
    "named": (Words(), {"ids": IDS, "kept": MASK.float()}, {"padding": "kept"}),
    "attribute": (Words(), Batch(IDS, MASK), {"padding": "padding"}),
    "position": (Words(), (IDS, MASK), {"padding": 1}),
    "path": (Words(), {"ids": IDS, "more": {"mask": MASK}}, {"padding": "more.mask"}),
}


@pytest.mark.parametrize("by", ["sample", "token"])
@pytest.mark.parametrize(("model", "batch", "options"), PADDED.values(), ids=PADDED)
def test_padding_is_left_alone(model, batch, options, by):
    delta, _ = attacked(Perturb("embeddings", by=by, **options), model, batch)
    assert (delta[~MASK] == 0).all()
    lengths = delta.norm(dim=-1)[MASK] if by == "token" else delta.flatten(1).norm(dim=1)
    assert (lengths <= L2.eps + 1e-5).all()
    assert (lengths > 0.3 * L2.eps).all()


def test_both_kinds_of_padding_are_heeded():
    mask = torch.ones(4, 5)
    mask[:, 0] = 0
    delta, _ = attacked(Perturb("embeddings"), Words(padding_idx=0), {"ids": IDS, "attention_mask": mask})
    assert torch.equal(delta.abs().sum(-1) > 0, MASK & mask.bool())


def test_a_mask_of_something_else_is_no_padding():
    """By convention alone: a mask of other dimensions is of something else."""
    delta, _ = attacked(Perturb("embeddings"), batch={"ids": IDS, "mask": torch.zeros(4, 8, 8)})
    assert (delta != 0).all()


@pytest.mark.parametrize("by", ["sample", "token"])
def test_clean_values_change_no_bit(by):
    model = Words()
    site = Perturb("embeddings", by=by).site(model, IDS, L2, lambda: model(IDS))
    with site.perturbed(site.values):
        assert torch.equal(model(IDS), Words()(IDS))
    assert torch.equal(site.values.flatten(), model.embeddings.weight[IDS].detach().flatten())
    assert not model.embeddings._forward_hooks
    assert "__getstate__" not in vars(model.embeddings)


def test_gradients_reach_the_submodule_and_what_is_behind():
    model = Words()
    site = Perturb("embeddings").site(model, IDS, L2, lambda: model(IDS))
    with site.perturbed(site.values + 0.1):
        F.cross_entropy(model(IDS), LABELS).backward()
    plain = Words()
    embedded = plain.embeddings(IDS) + 0.1
    F.cross_entropy(plain.tower(embedded.flatten(1)), LABELS).backward()
    torch.testing.assert_close(model.embeddings.weight.grad, plain.embeddings.weight.grad)
    torch.testing.assert_close(model.tower[0].weight.grad, plain.tower[0].weight.grad)
    assert model.embeddings.weight.grad.abs().sum() > 0


def test_the_hook_is_gone_after_an_exception():
    model = Words()
    site = Perturb("embeddings").site(model, IDS, L2, lambda: model(IDS))
    with pytest.raises(ZeroDivisionError), site.perturbed(site.values + 1):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        Perturb("embeddings").site(model, IDS, L2, lambda: 1 / 0)
    assert not model.embeddings._forward_hooks


def test_copies_made_meanwhile_are_not_moved():
    model = Words()
    site = Perturb("embeddings").site(model, IDS, L2, lambda: model(IDS))
    with site.perturbed(site.values + 1):
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert not torch.equal(model(IDS), Words()(IDS))
        for each in copies:
            assert torch.equal(each(IDS), Words()(IDS))
    for each in copies:
        assert not any(module._forward_hooks for module in each.modules())
        assert torch.equal(each(IDS), Words()(IDS))


def test_a_module_that_was_compiled_and_run_before():
    """Compiled code does not notice hooks that come later."""
    model = Words()
    compiled = torch.compile(model, backend="eager")
    clean = compiled(IDS).detach()
    site = Perturb("embeddings").site(model, IDS, L2, lambda: compiled(IDS))
    for shift in (0.5, 1.0):
        with site.perturbed(site.values + shift):
            wanted = model.tower((model.embeddings.weight[IDS] + shift).flatten(1))
            torch.testing.assert_close(compiled(IDS), wanted)
        assert torch.equal(compiled(IDS), clean)


def test_half_precision_is_moved_in_its_own():
    model = Words().bfloat16()
    site = Perturb("embeddings").site(model, IDS, L2, lambda: model(IDS))
    with site.perturbed(site.values + 0.5):
        assert model(IDS).dtype == torch.bfloat16


class Odd(Words):
    def __init__(self):
        super().__init__()
        self.pair, self.whole, self.unused = Pair(), Whole(), nn.Identity()
        self.rnn = nn.GRU(6, 6, batch_first=True)

    def forward(self, ids):
        self.whole(ids)
        self.pair(self.embeddings(ids))
        self.rnn(self.embeddings(ids))
        return self.tower(self.embeddings(ids).flatten(1))


class Pair(nn.Module):
    def forward(self, x):
        return {"out": x}


class Whole(nn.Module):
    def forward(self, ids):
        return ids + 1


REFUSED = {
    "several times": ("embeddings", r"perturb='embeddings' ran 3 times in the step"),
    "never": ("unused", r"perturb='unused' ran 0 times in the step"),
    "integers": ("whole", r"perturb='whole' returns torch.int64 \(4, 5\).*floating-point"),
    "dictionary": ("pair", r"perturb='pair' returns dict.*name another"),
    "tuple": ("rnn", r"perturb='rnn' returns tuple.*name another"),
    "none such": ("embedings", r"perturb=.*embedings.*embeddings"),
}


@pytest.mark.parametrize(("path", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_moved_is_refused(path, message):
    model = Odd()
    with pytest.raises(ValueError, match=message):
        Perturb(path).site(model, IDS, L2, lambda: model(IDS))
    assert not any(module._forward_hooks for module in model.modules())


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"padding='other' names no tensor"):
        attacked(Perturb("embeddings", padding="other"), batch={"ids": IDS})
    with pytest.raises(ValueError, match=r"padding='other' has shape \(4, 9\).*\(4, 5, 6\)"):
        attacked(Perturb("embeddings", padding="other"), batch={"ids": IDS, "other": torch.ones(4, 9)})
    with pytest.raises(ValueError, match="by must be"):
        Perturb("embeddings", by="word")


# --- the inputs of a batch


def ascended(site, loss, threat, steps=10):
    """The batch as PGD on one number of it leaves it."""

    def losses(values):
        with site.perturbed(values) as moved:
            return loss(moved).expand(len(values))

    attack = PGD(site.threat, steps=steps, loss=lambda values, labels: values)
    with site.perturbed(attack(losses, site.values)) as moved:
        return moved


def test_several_inputs_have_a_ball_each():
    batch = {"left": torch.rand(4, 3, 6, 6), "right": torch.rand(4, 3, 6, 6), "other": torch.rand(4), "y": LABELS}
    threat = ThreatModel(norm="l2", eps=0.5)
    site = InputSite(BatchReader(["left", "right"]), batch, threat)
    weights = torch.randn(3, 6, 6)
    moved = ascended(site, lambda b: (b["left"] * weights).sum() - 1e-3 * (b["right"] * weights).sum(), threat)
    assert site.size == 4
    assert moved["other"] is batch["other"]
    for name in ("left", "right"):
        lengths = (moved[name] - batch[name]).flatten(1).norm(dim=1)
        assert (lengths <= 0.5 + 1e-5).all()
        assert (lengths > 0.4).all()  # though one matters a thousand times less
        assert 0 <= moved[name].min() <= moved[name].max() <= 1
        sign = 1 if name == "left" else -1
        assert (sign * ((moved[name] - batch[name]) * weights).flatten(1).sum(1) > 0).all()


def test_several_inputs_of_different_shapes():
    batch = {"image": torch.rand(4, 3, 6, 6), "row": torch.rand(4, 5), "y": LABELS}
    threat = ThreatModel(norm="l2", eps=0.5)
    site = InputSite(BatchReader(["image", "row"]), batch, threat)
    moved = ascended(site, lambda b: b["image"].sin().sum() + b["row"].square().sum(), threat)
    for name in ("image", "row"):
        assert moved[name].shape == batch[name].shape
        assert ((moved[name] - batch[name]).flatten(1).norm(dim=1) <= 0.5 + 1e-5).all()
        assert (moved[name] > batch[name]).float().mean() > 0.5
        assert 0 <= moved[name].min() <= moved[name].max() <= 1


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
UNITS = {"as they are": {}, "normalised": {"mean": MEAN, "std": STD}, "by one": {"mean": 0.5, "std": 0.2}}


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("units", UNITS.values(), ids=UNITS)
def test_images_of_different_sizes(units, norm):
    mean, std = (
        torch.tensor(units.get(key, default)).reshape(-1, 1, 1) for key, default in (("mean", 0.0), ("std", 1.0))
    )
    data = [torch.rand(3, *size) for size in ((4, 6), (8, 5), (6, 6), (3, 9))]
    images = [(each - mean) / std for each in data]
    targets = [{"boxes": torch.rand(1, 4)} for _ in images]
    threat = ThreatModel(norm=norm, eps=0.3, **units)
    site = InputSite(BatchReader(), (images, targets), threat)
    assert site.size == 4
    with site.perturbed(site.values) as (same, _):
        for each, image in zip(same, images, strict=True):
            torch.testing.assert_close(each, image, rtol=0, atol=1e-6)
    moved, kept = ascended(site, lambda batch: sum(each.sum() for each in batch[0]), threat)
    assert kept is targets
    for each, image, clean in zip(moved, images, data, strict=True):
        assert each.shape == image.shape
        seen = each * std + mean
        delta = (seen - clean).flatten()
        assert (delta.norm() if norm == "l2" else delta.abs().max()) <= 0.3 + 1e-5
        assert (delta.norm() if norm == "l2" else delta.max()) > 0.2
        assert seen.min() >= -1e-6
        assert seen.max() <= 1 + 1e-6
        assert delta.mean() > 0


def test_sequences_of_different_lengths():
    batch = {"inputs": [torch.randn(n, 2) for n in (3, 5, 4)]}
    site = InputSite(BatchReader(), batch, L2)
    moved = ascended(site, lambda b: sum(each.sum() for each in b["inputs"]), L2)["inputs"]
    assert site.size == 3
    for each, clean in zip(moved, batch["inputs"], strict=True):
        assert each.shape == clean.shape
        assert 0.5 < (each - clean).norm() <= L2.eps + 1e-5


def test_clean_inputs_change_no_bit():
    batch = {"left": torch.rand(4, 7), "right": torch.rand(4, 7), "y": LABELS}
    site = InputSite(BatchReader(["left", "right"]), batch, ThreatModel(norm="l2", eps=0.5))
    with site.perturbed(site.values) as same:
        assert torch.equal(same["left"], batch["left"])
        assert torch.equal(same["right"], batch["right"])
    x = torch.rand(4, 7)
    with InputSite(BatchReader(), (x, LABELS), LINF).perturbed(x) as (again, labels):
        assert again is x
        assert labels is LABELS


IMAGE = torch.rand(3, 4, 4)
SEQUENCES = torch.rand(8, 10, 2)
COUNTS = {
    "images, targets in a list": (([IMAGE] * 2, [{}] * 2), None, 2),
    "one image, as a last batch may be": (([IMAGE], [{}]), None, 1),
    "three images of three channels": (([IMAGE] * 3, torch.zeros(3)), None, 3),
    "grey images": (([IMAGE[:1]] * 5, torch.zeros(5)), None, 5),
    "images without labels": ({"images": [IMAGE] * 2}, None, 2),
    "views of images": (([torch.rand(8, 3, 4, 4)] * 2, torch.zeros(8)), None, 16),
    "views of sequences": (([SEQUENCES] * 2, torch.zeros(8)), None, 16),
    "views of sequences without labels": ({"x": [SEQUENCES] * 2}, None, 16),
    "a single view": (([SEQUENCES], torch.zeros(8)), None, 8),
    "named inputs": ({"a": SEQUENCES, "b": SEQUENCES}, ["a", "b"], 16),
    "named inputs, two samples": ({"a": SEQUENCES[:2], "b": SEQUENCES[:2], "y": torch.zeros(2)}, ["a", "b"], 4),
    "got and set": ({"a": [IMAGE] * 2}, lambda batch, *new: {"a": new[0]} if new else batch["a"], 2),
}


@pytest.mark.parametrize(("batch", "inputs", "balls"), COUNTS.values(), ids=COUNTS)
def test_how_many_balls_there_are(batch, inputs, balls):
    site = InputSite(BatchReader(inputs), batch, L2)
    assert len(site.values) == balls
    with site.perturbed(site.values + 1) as moved:
        found = BatchReader(inputs).inputs(moved)
    for each, clean in zip(found, BatchReader(inputs).inputs(batch), strict=True):
        torch.testing.assert_close(each, clean + 1)


def test_one_normalised_image():
    threat = ThreatModel(norm="l2", eps=0.3, mean=MEAN, std=STD)
    site = InputSite(BatchReader(), ([IMAGE], [{}]), threat)
    with site.perturbed(site.values) as (found, _):
        torch.testing.assert_close(found[0], IMAGE)
