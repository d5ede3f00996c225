"""Bad input ends with status 2 and one clear sentence, before anything is attacked and without a report."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from cli.conftest import DATA, MODEL
from PIL import Image
from support.lightning_modules import trained_classifier

import lightning_wdefense.cli.runs as runs
from lightning_wdefense.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")


class Thing:
    """Code in a checkpoint."""


@pytest.fixture
def files(folder, checkpoints) -> Path:
    """Checkpoints and folders of images that are wrong, each in its own way."""
    weights = trained_classifier(batch_norm=True).state_dict()
    other = {key: value for key, value in weights.items() if not key.startswith("net.head")}
    torch.save(other | {f"layer.{index}": torch.zeros(1) for index in range(5)}, "keys.pt")
    torch.save(weights | {"net.head.weight": torch.zeros(3, 32)}, "shape.pt")
    torch.save({f"{name}.{key}": value for key, value in weights.items() for name in ("student", "teacher")}, "two.pt")
    torch.save({"state_dict": weights, "hyper_parameters": {"thing": Thing()}}, "objects.ckpt")
    torch.save(trained_classifier(batch_norm=True), "module.pt")
    torch.save({"epoch": 3, "loss": 0.1}, "no_weights.pt")
    torch.save([1, 2], "list.pt")
    Path("half.ckpt").write_bytes((checkpoints / "digits.ckpt").read_bytes()[:5000])
    Path("text.ckpt").write_text("a text")
    Path("broken.pt2").write_text("a text")
    Path("broken.yaml").write_text("attacks: [pgd")
    Path("misspelt.yaml").write_text("thraet: {eps: 0.1}")
    Path("empty/zero").mkdir(parents=True)
    for name in ("one/zero/0.png", "loose/0.png", "sizes/a/0.png", "few/a/0.png", "few/b/0.png", "noimage/a/0.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(name)
    Path("sizes/b").mkdir()
    Image.new("L", (9, 8)).save("sizes/b/0.png")
    Path("noimage/b").mkdir()
    Path("noimage/b/0.png").write_text("a text")
    return folder


CASES = {
    # The checkpoint.
    "no-file": (["--checkpoint", "nothing.ckpt"], r"--checkpoint nothing\.ckpt: there is no such file\."),
    "text": (["--checkpoint", "text.ckpt"], r"--checkpoint text\.ckpt is no checkpoint of PyTorch or Lightning\.$"),
    "half": (["--checkpoint", "half.ckpt"], r"half\.ckpt is no checkpoint of PyTorch or Lightning"),
    "no-weights": (["--checkpoint", "no_weights.pt"], r"no_weights\.pt holds no weights but the keys 'epoch', 'loss': give"),
    "list": (["--checkpoint", "list.pt"], r"list\.pt holds no weights but a list"),
    "objects": (["--checkpoint", "objects.ckpt"], r"holds more than tensors and plain values, such as .*Thing\. Reading that can run code: give --trust-checkpoint"),
    "module": (["--checkpoint", "module.pt"], r"holds more than tensors .*such as .*DigitsClassifier"),
    "keys": (["--checkpoint", "keys.pt", "--model.batch_norm=true"], r"2 keys that the model has and the checkpoint lacks: 'net\.head\.weight', 'net\.head\.bias'; 5 keys that the checkpoint has and the model lacks: 'layer\.0', 'layer\.1', 'layer\.2', \.\.\.\. Is it"),
    "shape": (["--checkpoint", "shape.pt", "--model.batch_norm=true"], r"1 of 11 shapes differ\. net\.head\.weight is \(3, 32\) in the checkpoint and \(10, 32\) in the model\. Give the init arguments"),
    "two-models": (["--checkpoint", "two.pt", "--model.batch_norm=true"], r"under several names: 'student\.', 'teacher\.'"),
    # The twin.
    "twin-of-nothing": (["--twin", "keys.pt"], r"--twin keys\.pt is for the audit: give --audit as well\."),
    "twin-no-file": (["--audit", "--twin", "nothing.ckpt"], r"--twin nothing\.ckpt: there is no such file\."),
    "twin-objects": (["--audit", "--twin", "module.pt"], r"--twin module\.pt holds more than tensors .*give --trust-checkpoint"),
    "twin-shape": (["--audit", "--twin", "shape.pt"], r"--twin shape\.pt does not fit the model: 1 of 11 shapes differ.*in the model\. A twin has the class and the init arguments of the model; any other can"),
    "twin-keys": (["--audit", "--twin", "keys.pt"], r"--twin keys\.pt does not fit .* A twin has the class"),
    "twin-no-export": (["--audit", "--twin", "broken.pt2"], r"^broken\.pt2 is no file of torch\.export"),
    # The model.
    "class": (["--model", "cli.project.Probabilites"], r"--model cli\.project\.Probabilites: There is no class in cli\.project 'Probabilites'\. Did you mean 'Probabilities'"),
    "module-path": (["--model", "cli.projct.Wide"], r"There is no class in cli 'projct'\. Did you mean 'project'"),
    "top-module": (["--model", "jsonargparze.Wide"], r"There is no module 'jsonargparze'"),
    "function": (["--model", "cli.project.untold"], r"this is a function that does not say what it returns; write def untold\(\.\.\.\) -> torch\.nn\.Module"),
    "no-module": (["--model", "cli.project.DigitsData"], r"this is the class DigitsData, which is something else\. It must be an nn\.Module"),
    "no-class-path": (["--model", "digits"], r"--model digits: this is neither a class path.* nor an nn\.Module.*\.pt2"),
    "no-export": (["--model", "broken.pt2", "--checkpoint=null"], r"broken\.pt2 is no file of torch\.export, .*torch\.export\.save"),
    "no-export-file": (["--model", "nothing.pt2", "--checkpoint=null"], r"nothing\.pt2: there is no such file"),
    "export-and-checkpoint": (["--model", "broken.pt2"], r"broken\.pt2 holds its own weights: leave out --checkpoint"),
    "argument": (["--model.learning_rat", "3"], r"There is no argument of DigitsClassifier 'learning_rat'\. Did you mean 'learning_rate'"),
    "type": (["--model.learning_rate", "a"], r"learning_rate.*float.*got a"),
    "required": (["--model", "cli.project.Wide"], r"--model: the class needs 'width': give --model\.width, or a --checkpoint that stores it\."),
    "probabilities": (["--model", "cli.project.Probabilities", "--checkpoint=null"], r"The model's outputs look like probabilities"),
    "not-logits": (["--model", "cli.project.Named", "--checkpoint=null"], r"not logits but a dict"),
    "outputs": (["--model", "cli.project.Named", "--checkpoint=null", "--outputs", "score"], r"outputs='score' is not in .*'scores'"),
    "no-forward": (["--model", "support.lightning_modules.HeadlessDigitsClassifier"], r"HeadlessDigitsClassifier has no forward\(\), by which it is attacked\. .*--model my_project\.Network"),
    "device": (["--device", "cuda:77"], r"--device cuda:77: "),
    # The data.
    "stage": (["--stage", "validate"], r"DigitsData has no val_dataloader\(\), which --stage validate needs\. It has one for --stage test or --stage fit\."),
    "unknown-stage": (["--stage", "tset"], r"There is no value of --stage 'tset'\. Did you mean 'test'\? Known: 'test', 'validate', 'predict', 'fit'\."),
    "no-loader": (["--data", "cli.project.NoLoader"], r"test_dataloader\(\) of NoLoader returns \[\], so there is nothing"),
    "dataloader": (["--data", "cli.project.SeveralLoaders", "--dataloader=2"], r"--dataloader 2: SeveralLoaders gives 2 for --stage test, counted from 0"),
    "fails": (["--data", "cli.project.FailingData"], r"KeyError: '/data/digits'\n\(.*project\.py, line \d+; --debug shows the way there\)"),
    "data-class": (["--data", "cli.project.DigitData"], r"--data cli\.project\.DigitData: There is no class .*Did you mean 'DigitsData'"),
    "data-argument": (["--data.batch_siez=3"], r"There is no argument of DigitsData 'batch_siez'\. Did you mean 'batch_size'"),
    "no-data": (["--data", "null"], r"--data is missing: a LightningDataModule or a folder of images"),
    "no-folder": (["--data", "no/folder"], r"--data no/folder: there is no such folder"),
    "empty-folder": (["--data", "empty"], r"--data empty: there is no image\. Expected is one sub-folder for each class"),
    "one-class": (["--data", "one"], r"--data one: there is only one class, 'zero'"),
    "loose": (["--data", "loose"], r"--data loose: images stand in no sub-folder \(1\)"),
    "few-classes": (["--data", "few", "--grayscale"], r"--data few has 2 sub-folders, but the model 10 classes\..* an empty one"),
    "no-image": (["--data", "noimage", "--grayscale", "--model=cli.project.Wide", "--model.width=2", "--checkpoint=null"], r"noimage/b/0\.png cannot be read as an image"),
    "sizes": (["--data", "sizes", "--model=cli.project.Wide", "--model.width=2", "--checkpoint=null"], r"The images differ in size: sizes/b/0\.png has 8 x 9 pixels, those before it 8 x 8\. Give --image-size\."),
    "image-size": (["--data", "few", "--image-size", "1", "2", "3"], r"--image-size takes one number of pixels, or height and width"),
    # What is asked.
    "epsilons": (["--epsilons", "0.2", "0.1"], r"--epsilons must increase, got \[0\.2, 0\.1\]: write 0\.1 0\.2\."),
    "same-epsilons": (["--epsilons", "0.1", "0.1"], r"--epsilons must increase"),
    "attack": (["--attacks", "pdg"], r"There is no attack 'pdg'\. Did you mean 'pgd'"),
    "other-threat": (["--threat.norm", "l3"], r"There is no value of --threat\.norm 'l3'\. Did you mean 'l2' or 'l1'"),
    "eps": (["--threat.eps", "-1"], r"eps must be finite and not negative"),
    "eps-type": (["--threat.eps", "a"], r"--threat\.eps: it takes a value of the type float, got a\."),
    "share": (["--min-robust-acc", "45"], r"--min-robust-acc is a share from 0 to 1, got 45: write 0\.45\."),
    "batches": (["--max-batches", "0"], r"--max-batches must be at least 1, got 0\."),
    "option": (["--attakcs", "pgd"], r"There is no option '--attakcs'\. Did you mean '--attacks'"),
    "no-yaml": (["--config", "nothing.yaml"], r"--config: File does not exist: .*nothing\.yaml"),
    "broken-yaml": (["--config", "broken.yaml"], r"did not find expected ',' or '\]'"),
    "yaml-key": (["--config", "misspelt.yaml"], r"There is no option 'thraet\.eps'\. Did you mean 'threat\.eps'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_of_an_evaluation(case, evaluated, files):
    words, message = CASES[case]
    done = evaluated(*words)
    assert done.status == 2
    assert done.out == ""
    *_, last = done.err.split("lightning-wdefense: error: ")
    assert re.search(message, last.rstrip()), done.err
    assert "Traceback" not in done.err
    assert last.rstrip().count("\n") <= (1 if case == "fails" else 0)
    assert case == "no-image" or not os.path.exists("robustness") or os.listdir("robustness") == []


def test_objects_in_a_checkpoint_that_is_trusted(evaluated, files):
    for name in ("objects.ckpt", "module.pt"):
        words = ("--checkpoint", name, "--trust-checkpoint", "--model.batch_norm=true", "--output", name[:3])
        assert evaluated(*words).status == 0


def test_debug_shows_the_traceback(evaluated):
    done = evaluated("--data", "cli.project.FailingData", "--debug")
    assert done.status == 2
    assert "Traceback" in done.err
    assert "raise KeyError" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of the commands evaluate, audit, compare"),
        (["evalate"], "There is no command 'evalate'. Did you mean 'evaluate'"),
        (["evaluate"], "--model is missing: an nn.Module"),
        (["evaluate", "--model", MODEL], "--data is missing: a LightningDataModule"),
        (["compare", "one"], "compare takes two or more reports"),
        (["compare", "one", "two"], "There is no report in one: `lightning-wdefense evaluate --output one ...` writes one."),
        (["audit", "--model", MODEL, "--data", DATA, "--samples", "0"], "--samples must be at least 1"),
    ],
)  # fmt: skip
def test_of_commands(command, words, message):
    done = command(*words)
    assert done.status == 2
    assert message in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("missing", ["jsonargparse", "docstring_parser"])
def test_a_missing_extra(command, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "lightning_wdefense.cli.parsing", raising=False)
    done = command("evaluate")
    assert done == (2, "", 'lightning-wdefense: error: the command needs jsonargparse: pip install "lightning-wdefense[cli]"\n')  # fmt: skip


def test_without_pillow(evaluated, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "A folder of images needs Pillow: pip install pillow" in evaluated("--data", "few").err


def test_a_failure_on_the_way_keeps_what_was_done(evaluated, folder):
    words = ("--model", "cli.project.FailsAtLast", "--checkpoint", "null", "--data.size", 67)
    done = evaluated(*words)
    assert done.status == 2
    assert "ArithmeticError: three" in done.err
    assert os.listdir("robustness") == [runs.FINISHED]
    assert evaluated(*words).err.count("Going on after 2 finished batches") == 1


def test_help_and_version(capsys):
    assert main(["--version"]) == 0
    assert main(["evaluate", "--help"]) == 0
    text = capsys.readouterr().out
    assert "exit status: 0 if all is fine; 1 if --min-robust-acc" in text
    assert "known subclasses" not in text
    assert "``" not in text
