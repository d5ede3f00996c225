"""Words have no gradient, their embeddings have: adversarial training of a text classifier in the space of its embeddings.

    pip install -e ".[examples]" && python examples/text.py

Which package is a docstring from: NumPy, SciPy, scikit-learn or PyTorch? The text is what is installed, with the packages' own names left out.
An attacker may move the embedded words of a text by 2 together (L2; each word has length 8). ``perturb="embedding"`` names the submodule whose
output is moved; padding is left alone, as the batch's mask says. What is gained is measured twice: by ``RobustnessMonitor``, and by an attack
written out below that knows nothing of this package. ``--fast`` takes fewer texts and epochs, for a quick look.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import random
import re
import warnings
from collections import Counter

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_wdefense import RobustnessMonitor, ThreatModel, WassersteinDefense

warnings.filterwarnings("ignore", ".*does not have many workers.*")
warnings.filterwarnings("ignore", ".*LeafSpec.*")
warnings.filterwarnings("ignore", ".*no `val_dataloader`.*")

THREAT = ThreatModel(norm="l2", eps=2.0, bounds=None)
PACKAGES = ("numpy", "scipy", "sklearn", "torch")
GIVEAWAYS = {*PACKAGES, "np", "scikit", "learn", "pytorch"}
LENGTH = 24  # words of each text
PADDING, UNKNOWN = 0, 1
QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}


class TextClassifier(L.LightningModule):
    """An ordinary module: it weighs the words of a text, and classifies their mean."""

    def __init__(self, words):
        super().__init__()
        # Normalised: otherwise embeddings could grow until the attacker's radius is nothing beside them.
        self.embedding = nn.Sequential(
            nn.Embedding(words, 64, padding_idx=PADDING), nn.LayerNorm(64, elementwise_affine=False)
        )
        self.hidden = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
        self.attention, self.head = nn.Linear(128, 1), nn.Sequential(nn.Dropout(0.3), nn.Linear(128, len(PACKAGES)))

    def classify(self, embedded, mask):
        hidden = self.hidden(embedded)
        weights = self.attention(hidden).masked_fill(~mask.unsqueeze(-1), -torch.inf).softmax(1)
        return self.head((weights * hidden).sum(1))

    def forward(self, ids, mask):
        return self.classify(self.embedding(ids), mask)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["ids"], batch["mask"]), batch["label"])

    def test_step(self, batch, batch_idx):
        logits = self(batch["ids"], batch["mask"])
        self.log("test_loss", F.cross_entropy(logits, batch["label"]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def docstrings(package):
    """The docstrings of all public functions, classes and methods of a package, each once, as lists of words."""
    root = importlib.import_module(package)
    modules = [package]
    modules += [f"{package}.{each.name}" for each in pkgutil.iter_modules(root.__path__) if each.name[0] != "_"]
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in filter(None, map(imported, modules)):
            members = [getattr(module, name, None) for name in dir(module) if name[0] != "_"]
            classes = [each for each in members if inspect.isclass(each)]
            members += [getattr(each, name, None) for each in classes for name in vars(each) if name[0] != "_"]
            for each in members:
                if callable(each) and str(getattr(each, "__module__", None)).split(".")[0] == package:
                    words = re.findall("[a-z]{2,}", (inspect.getdoc(each) or "").lower())
                    words = [word for word in words if word not in GIVEAWAYS][:LENGTH]
                    if len(words) >= 5:
                        found[tuple(words)] = None
    return list(found)


def imported(name):
    """A module, if it can be imported here: some need what is not installed, or are not meant to be."""
    if name.split(".")[-1] in ("conftest", "setup", "distutils", "f2py"):
        return None
    try:
        return importlib.import_module(name)
    except Exception:
        return None


def texts(per_package):
    """As many texts of each package, shuffled, each with the number of its package; what two packages share is of none."""
    found = {package: docstrings(package) for package in PACKAGES}
    owners = Counter(words for each in found.values() for words in each)
    draw = random.Random(0)
    chosen = []
    for label, package in enumerate(PACKAGES):
        own = sorted(words for words in found[package] if owners[words] == 1)
        chosen += [(words, label) for words in draw.sample(own, min(per_package, len(own)))]
    draw.shuffle(chosen)
    return chosen


def loaders(chosen):
    """Two thirds to train on, the rest to test on, and how many words there are."""
    cut = len(chosen) * 2 // 3
    counts = Counter(word for words, _ in chosen[:cut] for word in words)
    number = {word: index + 2 for index, word in enumerate(word for word, count in counts.items() if count > 1)}

    def collate(samples):
        width = max(len(words) for words, _ in samples)
        ids = [[number.get(word, UNKNOWN) for word in words] + [PADDING] * (width - len(words)) for words, _ in samples]
        ids = torch.tensor(ids)
        return {"ids": ids, "mask": ids != PADDING, "label": torch.tensor([label for _, label in samples])}

    train = DataLoader(chosen[:cut], batch_size=64, shuffle=True, collate_fn=collate)
    test = DataLoader(chosen[cut:], batch_size=len(chosen) - cut, collate_fn=collate)
    return train, test, len(number) + 2


def rows(lengths):
    return lengths.clamp_min(1e-12)[:, None, None]


def accuracies(module, loader, steps=20):
    """Clean, and under an attack in the space of the embeddings, written by hand: projected gradient ascent from the clean text."""
    module.eval()
    clean, attacked, seen = 0, 0, 0
    for batch in loader:
        mask, label = batch["mask"], batch["label"]
        embedded = module.embedding(batch["ids"]).detach()
        delta = torch.zeros_like(embedded)
        for _ in range(steps):
            delta.requires_grad_()
            loss = F.cross_entropy(module.classify(embedded + delta, mask), label, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, delta)
            step = 2.5 * THREAT.eps / steps * gradient / rows(gradient.flatten(1).norm(dim=1))
            delta = (delta + step).detach()
            delta = delta * (THREAT.eps / rows(delta.flatten(1).norm(dim=1))).clamp(max=1)
        with torch.no_grad():
            right = [module.classify(each, mask).argmax(1) == label for each in (embedded, embedded + delta)]
        clean, attacked, seen = clean + int(right[0].sum()), attacked + int(right[1].sum()), seen + len(label)
    return clean / seen, attacked / seen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="few texts, few epochs, one seed")
    fast = parser.parse_args().fast
    train, test, words = loaders(texts(200 if fast else 900))
    print(f"{len(train.dataset)} texts to train on, {len(test.dataset)} to test on, {words} words")
    seeds = range(1 if fast else 3)
    results = {"plain": [], "defended": []}
    for seed in seeds:
        for name, found in results.items():
            L.seed_everything(seed, verbose=False)
            module = TextClassifier(words)
            defense = [WassersteinDefense("pgd-at", threat=THREAT, perturb="embedding")] if name == "defended" else []
            L.Trainer(max_epochs=5 if fast else 6, callbacks=defense, **QUIET).fit(module, train)
            monitor = RobustnessMonitor(THREAT, ["pgd"], perturb="embedding", progress=False)
            numbers = L.Trainer(callbacks=[monitor], **QUIET).test(module, test, verbose=False)[0]
            found.append((*accuracies(module, test), numbers["test/clean_acc"], numbers["test/robust_acc"]))
            clean, attacked, _, monitored = found[-1]
            print(f"seed {seed}, {name}: clean {clean:.1%}, under attack {attacked:.1%} (monitor {monitored:.1%})")
    means = {name: torch.tensor(found).mean(0) for name, found in results.items()}
    for name, (clean, attacked, _, monitored) in means.items():
        print(f"{name}, mean: clean {clean:.1%}, under attack {attacked:.1%} (monitor {monitored:.1%})")
    gain = means["defended"] - means["plain"]
    print(f"gained: clean {100 * gain[0]:+.1f} points, under attack {100 * gain[1]:+.1f} points")


if __name__ == "__main__":
    main()
