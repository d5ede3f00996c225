"""``perturb=``: the output of a submodule under attack, through the Trainer, seen from inside of the user's own module."""

from __future__ import annotations

import copy
import pickle

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from support.lightning_modules import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense import Recipe, RobustnessMonitor, ThreatModel, WassersteinDefense
from lightning_wdefense.attacks import PGD
from lightning_wdefense.attacks.steps.sites import Perturb

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS, LENGTH, WIDTH = 20, 6, 8
THREAT = ThreatModel(norm="l2", eps=0.8, bounds=None)


class Tokens(L.LightningModule):
    """Classifies texts; keeps what its own training steps saw of the embeddings, outside of itself."""

    def __init__(self, padding_idx=None, learning_rate=1e-2):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH, padding_idx=padding_idx)
        self.head = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 2))
        self.learning_rate = learning_rate

    def classify(self, embedded):
        return self.head(embedded.mean(1))

    def forward(self, ids):
        return self.classify(self.embedding(ids))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())
        return F.cross_entropy(logits, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.learning_rate)


class Watched(Tokens):
    """Keeps what its own step saw, which is the last before ``on_train_batch_end``."""

    def __init__(self, **options):
        super().__init__(**options)
        self.deltas = []

    def classify(self, embedded):
        SEEN["embedded"] = embedded.detach().clone()
        return super().classify(embedded)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        SEEN["delta"] = SEEN["embedded"] - self.embedding.weight[batch[0]].detach()
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.deltas.append((batch, SEEN["delta"]))


SEEN: dict = {}


class Adam(Tokens):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def texts(n=64, length=LENGTH, padded=False):
    """Words of even number are more frequent in class 1."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (n,), generator=draw)
    ids = torch.randint(1, WORDS // 2, (n, length), generator=draw) * 2
    ids = ids - (torch.rand(n, length, generator=draw) < torch.where(y == 1, 0.15, 0.85)[:, None]).long()
    if padded:
        ids = ids * (torch.arange(length) < torch.randint(2, length + 1, (n, 1), generator=draw))
    return ids, y


def loader(n=64, batch_size=16, **options):
    return DataLoader(TensorDataset(*texts(n, **options)), batch_size)


def defended(module, perturb="embedding", recipe="pgd-at", data=None, threat=THREAT, **options):
    defense = WassersteinDefense(recipe, threat=threat, perturb=perturb, warmup_epochs=0)
    quiet_trainer(callbacks=[defense], **options).fit(module, data or loader())
    return module


def seeded(kind=Tokens, **options):
    torch.manual_seed(0)
    return kind(**options)


def test_the_users_own_step_sees_a_ball_around_each_sample():
    module = defended(seeded(Watched))
    assert len(module.deltas) == 4
    for _, delta in module.deltas:
        lengths = delta.flatten(1).norm(dim=1)
        assert (lengths <= THREAT.eps + 1e-5).all()
        assert (lengths > 0.9 * THREAT.eps).all()


def test_the_users_own_step_sees_a_ball_around_each_token():
    module = defended(seeded(Watched), Perturb("embedding", by="token"))
    for _, delta in module.deltas:
        lengths = delta.norm(dim=-1)
        assert (lengths <= THREAT.eps + 1e-5).all()
        assert (lengths > 0.9 * THREAT.eps).all()


@pytest.mark.parametrize("by", ["sample", "token"])
def test_padding_is_left_alone_in_the_users_own_step(by):
    module = defended(seeded(Watched, padding_idx=0), Perturb("embedding", by=by), data=loader(padded=True))
    for (ids, _), delta in module.deltas:
        assert (delta[ids == 0] == 0).all()
        assert (delta[ids != 0].abs().sum(-1) > 0).all()
    assert (module.embedding.weight[0] == 0).all()


def test_it_is_the_attack_of_a_plain_loop():
    """The loss in the user's own step is that of the test's own attack."""
    module = seeded(Watched, learning_rate=0.0)
    defended(module)
    for (ids, y), delta in module.deltas:
        clean, worst = module.embedding(ids).detach(), by_hand(module, ids, y)
        ours, best = (F.cross_entropy(Tokens.classify(module, clean + each), y) for each in (delta, worst))
        assert ours > 0.97 * best
        assert best > 1.1 * F.cross_entropy(Tokens.classify(module, clean), y)


def by_hand(module, ids, y, steps=40, eps=THREAT.eps):
    clean = module.embedding(ids).detach()
    delta = torch.zeros_like(clean)
    for _ in range(steps):
        delta.requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(Tokens.classify(module, clean + delta), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, delta)
        delta = delta.detach() + 2.5 * eps / steps * F.normalize(gradient.flatten(1)).reshape(gradient.shape)
        delta = delta * (eps / delta.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp(max=1)[:, None, None]
    return delta.detach()


def test_bf16_itself():
    module = defended(seeded(Watched), precision="bf16-true")
    for _, delta in module.deltas:
        lengths = delta.float().flatten(1).norm(dim=1)
        assert (lengths <= THREAT.eps * 1.03).all()  # its numbers have three digits
        assert (lengths > 0.9 * THREAT.eps).all()


@pytest.mark.slow
def test_it_trains_the_embeddings_and_gains():
    """Measured by the test's own attack, as the pipeline ``token_ids`` is among the quick tests."""
    ids, y = texts(256)
    left = {}
    for name, callbacks in {
        "plain": [],
        "defended": [WassersteinDefense(recipe(2), perturb="embedding")],
    }.items():
        module = seeded(Adam)
        before = module.embedding.weight.detach().clone()
        quiet_trainer(max_epochs=20, callbacks=callbacks).fit(module, loader(256, 32))
        assert (module.embedding.weight - before).abs().max() > 0.1
        right = module.classify(module.embedding(ids) + by_hand(module, ids, y, 20, 2.0)).argmax(1) == y
        left[name] = float(right.float().mean())
    assert left["defended"] > left["plain"] + 0.1, left


def recipe(eps, steps=4):
    threat = THREAT.with_eps(float(eps))
    return Recipe(attack=PGD(threat, steps=steps), sees="adversarial")


def test_eps_zero_trains_bit_for_bit_as_without():
    plain, module = seeded(), seeded()
    quiet_trainer(max_epochs=2).fit(plain, loader())
    defended(module, threat=THREAT.with_eps(0.0), max_epochs=2)
    for (name, wanted), value in zip(plain.state_dict().items(), module.state_dict().values(), strict=True):
        assert torch.equal(value, wanted), name


@pytest.mark.parametrize("recipe", ["trades", "mart", "class-transport", "udr", "wrm", "alp"])
def test_other_recipes_move_it_as_well(recipe):
    module = seeded()
    before = module.embedding.weight.detach().clone()
    defended(module, recipe=recipe)
    assert not torch.equal(module.embedding.weight, before)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert not any(each._forward_hooks for each in module.modules())


def test_bf16_autocast():
    module = defended(seeded(Watched), precision="bf16-mixed")
    for _, delta in module.deltas:
        lengths = delta.flatten(1).norm(dim=1)
        assert (lengths <= THREAT.eps + 1e-5).all()
        assert (lengths > 0.9 * THREAT.eps).all()


def test_the_module_can_be_copied_in_the_step():
    class Copying(Tokens):
        def training_step(self, batch, batch_idx):
            plain = (
                copy.deepcopy(self.embedding),
                pickle.loads(pickle.dumps(self.embedding)),
                copy.deepcopy(self).embedding,
            )
            embedded = self.embedding(batch[0])
            for each in plain:
                assert torch.equal(each(batch[0]), self.embedding.weight[batch[0]])
                assert not each._forward_hooks
            copied["moved"] = not torch.equal(embedded, plain[0](batch[0]))
            return F.cross_entropy(self.classify(embedded), batch[1])

    copied = {}
    defended(seeded(Copying), limit_train_batches=2)
    assert copied["moved"]


# --- what is refused, before anything is trained


class Odd(Tokens):
    def __init__(self):
        super().__init__()
        self.shift, self.rnn, self.unused = Shift(), nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Identity()
        self.steps = 0

    def forward(self, ids):
        embedded, _ = self.rnn(self.embedding(self.shift(ids)))
        return self.classify(embedded) + 0 * self.classify(self.embedding(ids))

    def configure_optimizers(self):
        return Counting(self.parameters(), 1e-2)


class Shift(nn.Module):
    def forward(self, ids):
        return (ids + 1) % WORDS


class Counting(torch.optim.SGD):
    steps = 0

    def step(self, *args, **kwargs):
        found = super().step(*args, **kwargs)  # runs the training step
        Counting.steps += 1
        return found


REFUSED = {
    "runs twice": ("embedding", "perturb='embedding' ran 2 times"),
    "does not run": ("unused", "perturb='unused' ran 0 times"),
    "integers": ("shift", "perturb='shift' returns torch.int64"),
    "tuple": ("rnn", "perturb='rnn' returns tuple"),
    "none such": ("embeding", "perturb=.*embeding.*embedding"),
}


@pytest.mark.parametrize(("path", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_moved_is_refused_before_the_first_step(path, message):
    Counting.steps = 0
    module = Odd()
    with pytest.raises(ValueError, match=message):
        defended(module, path)
    assert Counting.steps == 0
    assert not any(each._forward_hooks for each in module.modules())
    with pytest.raises(ValueError, match=message):
        quiet_trainer(callbacks=[RobustnessMonitor(THREAT, perturb=path)]).validate(module, loader(), verbose=False)


@pytest.mark.parametrize("callback", [WassersteinDefense, RobustnessMonitor])
def test_plain_passes_cannot_be_perturbed(callback):
    given = {"recipe": "pgd-at"} if callback is WassersteinDefense else {}
    with pytest.raises(ValueError, match=r"perturb='embedding' acts inside of the step.*: leave through= out"):
        callback(threat=THREAT, perturb="embedding", through="model", **given)
    callback(threat=THREAT, perturb="embedding", through="step", **given)


def test_integer_inputs_are_told_what_to_do_and_it_works():
    threat = ThreatModel(norm="l2", eps=0.5, bounds=None)
    with pytest.raises((TypeError, ValueError), match=r'perturb="path\.to\.the\.embedding"'):
        quiet_trainer(callbacks=[WassersteinDefense("pgd-at", threat=threat)]).fit(seeded(), loader())
    with pytest.raises((TypeError, ValueError), match=r'perturb="path\.to\.the\.embedding"'):
        quiet_trainer(callbacks=[RobustnessMonitor(threat)]).validate(seeded(), loader(), verbose=False)
    defended(seeded(), "embedding", threat=threat)
    monitor = RobustnessMonitor(threat, perturb="embedding")
    (logged,) = quiet_trainer(callbacks=[monitor]).validate(seeded(), loader(), verbose=False)
    assert logged["val/robust_acc"] < logged["val/clean_acc"]


def test_a_detached_embedding_is_named():
    class Detached(Tokens):
        def forward(self, ids):
            return self.classify(self.embedding(ids).detach())

    with pytest.raises(ValueError, match=r"does not depend on the output of perturb='embedding'.*detach"):
        defended(seeded(Detached))


# --- the monitor


@pytest.fixture(scope="module")
def trained():
    module = seeded(learning_rate=0.5)
    quiet_trainer(max_epochs=15).fit(module, loader(256, 32))
    return module.eval()


def test_the_monitor_measures_what_a_plain_loop_does(trained):
    ids, y = texts(256)
    eps = 2.0
    with torch.no_grad():
        clean = trained(ids).argmax(1) == y
        left = trained.classify(trained.embedding(ids) + by_hand(trained, ids, y, 40, eps)).argmax(1) == y
    attack = PGD(THREAT.with_eps(eps), steps=40, random_start=False)
    monitor = RobustnessMonitor(THREAT.with_eps(eps), {"pgd": attack}, perturb="embedding")
    data = DataLoader(TensorDataset(ids, y), 64)
    (logged,) = quiet_trainer(callbacks=[monitor]).validate(trained, data, verbose=False)
    assert logged["val/clean_acc"] == pytest.approx(float(clean.float().mean()))
    assert logged["val_acc"] == logged["val/clean_acc"]
    assert logged["val/robust_acc"] == pytest.approx(float((clean & left).float().mean()), abs=0.01)
    assert logged["robust/val_acc"] == pytest.approx(float(left.float().mean()), abs=0.01)
    assert logged["val/clean_acc"] - logged["val/robust_acc"] > 0.1


def test_the_monitor_by_token(trained):
    """Balls around tokens give the whole sample more room than one around it."""
    ids, y = texts(256)
    left = {}
    for by in ("sample", "token"):
        monitor = RobustnessMonitor(THREAT, perturb=Perturb("embedding", by=by))
        data = DataLoader(TensorDataset(ids, y), 64)
        (logged,) = quiet_trainer(callbacks=[monitor]).validate(trained, data, verbose=False)
        left[by] = logged["robust/val_acc"]
        assert logged["val_acc"] > left[by]
    assert left["token"] < left["sample"]


def test_the_monitor_leaves_no_trace(trained):
    before = copy.deepcopy(trained.state_dict())
    monitor = RobustnessMonitor(THREAT, perturb="embedding")
    quiet_trainer(callbacks=[monitor]).validate(trained, loader(), verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert not any(each._forward_hooks for each in trained.modules())
