"""`lightning-wdefense evaluate` measures what `evaluate` measures, of models, checkpoints and data of every form."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from cli.conftest import DATA, MODEL
from cli.project import network
from PIL import Image
from support.lightning_modules import digits, digits_loaders, trained_classifier
from support.processes import script_environment

from lightning_wdefense import ThreatModel, evaluate
from lightning_wdefense.attacks import PGD
from lightning_wdefense.cli.runs import FINISHED

pytestmark = pytest.mark.filterwarnings("ignore")

THREAT = ThreatModel(eps=0.1)


def expected(attacks=("fgsm",), loader=None, model=None, threat=THREAT, **options):
    loader = digits_loaders()[1] if loader is None else loader
    return evaluate(model or trained_classifier(batch_norm=True), loader, threat, attacks, progress=False, **options)


def printed(result) -> str:
    return f"{result}\n"


def test_a_lightning_checkpoint_with_its_hyperparameters(evaluated):
    assert evaluated() == (0, printed(expected()), "")
    assert os.listdir("robustness") == [FINISHED]


def test_a_given_argument_wins_over_the_checkpoint(evaluated):
    done = evaluated("--model.batch_norm", "false")
    assert done.status == 2
    assert "5 keys that the checkpoint has and the model lacks" in done.err


def test_a_state_dict_and_a_class_from_a_function(command, checkpoints):
    data = ("--data", DATA, "--data.batch_size", 16, "--threat.eps", 0.1, "--attacks", "fgsm")
    done = command("evaluate", "--model", MODEL, "--model.init_args.batch_norm=true", "--checkpoint", checkpoints / "digits.pt", *data)  # fmt: skip
    assert done.out == printed(expected(loader=digits_loaders(batch_size=16)[1]))
    again = command("evaluate", "--model=cli.project.network", "--checkpoint", checkpoints / "digits.ckpt", *data, "--output", "other")  # fmt: skip
    assert again.out == done.out
    assert "The weights are those under 'net.' of" in again.err


def test_the_class_that_lightning_cli_stored(command, checkpoints, folder):
    content = torch.load(checkpoints / "digits.ckpt", weights_only=True)
    content["hyper_parameters"] |= {"_class_path": MODEL, "_instantiator": "lightning.pytorch.cli.instantiate_module"}
    torch.save(content, folder / "cli.ckpt")
    done = command("evaluate", "--checkpoint=cli.ckpt", "--data", DATA, "--threat.eps=0.1", "--attacks", "fgsm")
    assert done == (0, printed(expected()), "")


def test_a_yaml_file_and_changes_of_it(command, checkpoints):
    threat = {"norm": "linf", "eps": 0.1}
    attack = {"class_path": "lightning_wdefense.attacks.PGD", "init_args": {"threat": threat, "steps": 3}}
    config = {
        "model": {"class_path": MODEL, "init_args": {"calls": "net"}},
        "checkpoint": str(checkpoints / "digits.ckpt"),
        "data": {"class_path": DATA, "init_args": {"size": 64}},
        "threat": threat,
        "attacks": {"fgsm": "fgsm", "short": attack},
        "epsilons": [0.05, 0.1],
        "min_robust_acc": 0.2,
    }
    with open("robust.yaml", "w") as file:
        yaml.safe_dump(config, file)
    attacks = {"fgsm": "fgsm", "short": PGD(THREAT, steps=3)}
    loader = digits_loaders(val_size=64)[1]
    done = command("evaluate", "--config", "robust.yaml")
    assert done == (0, printed(expected(attacks, loader, epsilons=[0.05, 0.1])), "")
    done = command("evaluate", "--config", "robust.yaml", "--epsilons", 0.02, 0.1, "--seed=1", "--data.size=32", "--output=o", "--p=1")  # fmt: skip
    assert done.out == printed(expected(attacks, digits_loaders(val_size=32)[1], epsilons=[0.02, 0.1], seed=1))
    # What is printed is read again, with all that the checkpoint had filled in.
    done = command("evaluate", "--config", "robust.yaml", "--print_config")
    assert done.status == 0
    assert yaml.safe_load(done.out)["model"]["init_args"] == {"batch_norm": True, "calls": "net", "learning_rate": 0.5}
    with open("all.yaml", "w") as file:
        file.write(done.out)
    assert command("evaluate", "--config", "all.yaml").err.startswith("Nothing was attacked again")


def test_several_attacks_and_settings(evaluated):
    words = (
        "--attacks",
        "fgsm",
        "pgd",
        "--independent",
        "--features",
        "null",
        "--max_batches",
        2,
        "--distances",
        "fmn",
    )
    settings = {"independent": True, "features": None, "max_batches": 2, "distances": "fmn"}
    assert evaluated(*words).out == printed(expected(["fgsm", "pgd"], **settings))


def test_a_module_in_the_working_directory(command, folder):
    (folder / "own_project_of_this_test.py").write_text("from cli.project import *\nclass Mine(Wide):\n    def forward(self, x):\n        return self.net(x.flatten(1))\n")  # fmt: skip
    path = list(sys.path)
    done = command("evaluate", "--model", "own_project_of_this_test.Mine", "--model.width=10", "--data=own_project_of_this_test.DigitsData", "--attacks=fgsm")  # fmt: skip
    assert done.status == 0
    assert "Without --checkpoint the weights are those of a new model" in done.err
    assert sys.path == path


def test_stages_and_several_dataloaders(evaluated):
    assert "128 samples" in evaluated("--stage", "fit").out  # shuffled by the seed, so that it can be resumed
    assert evaluated("--stage", "fit").err.startswith("Nothing was attacked again")
    done = evaluated("--data", "cli.project.SeveralLoaders", "--dataloader", 1, "--output", "other")
    assert "8 samples" in done.out
    assert "gives 2 dataloaders; --dataloader 1 is measured" in done.err
    assert "on_after_batch_transfer() of SeveralLoaders is not run" in done.err


@pytest.fixture
def images(folder):
    """A folder of 60 digits, and the images and labels in their order."""
    pixels, labels = (each[512:572] for each in digits())
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        (place := folder / "images" / f"class {label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(place / f"{index:03}.png")
    order = [index for label in range(10) for index in range(60) if labels[index] == label]
    return (pixels[order] * 255).round() / 255, labels[order]


def test_a_folder_of_images(command, checkpoints, images):
    pixels, labels = images
    threat = ThreatModel(eps=0.1, mean=0.5, std=0.25)
    words = ("--model", MODEL, "--checkpoint", checkpoints / "digits.ckpt", "--attacks", "fgsm", "--data", "images")
    words += ("--threat.eps", 0.1, "--threat.mean", 0.5, "--threat.std", 0.25, "--grayscale", "--batch-size", 16)
    batches = list(zip(((pixels - 0.5) / 0.25).split(16), labels.split(16), strict=True))
    done = command("evaluate", *words)
    assert done.out == printed(expected(loader=batches, threat=threat))
    assert done.err == "60 images of 10 classes: 0 is 'class 0', 1 is 'class 1', 2 is 'class 2', ...\n"
    done = command("evaluate", *words, "--image-size", 8, 8, "--output", "other")  # the size that they have
    assert done.out == printed(expected(loader=batches, threat=threat))


def test_images_are_scaled_to_the_bounds_cut_and_in_colour(images):
    from pathlib import Path

    from lightning_wdefense.cli.loading import ImageFolder

    first = ImageFolder(Path("images"), ThreatModel(bounds=(0, 255)))[0]
    assert torch.equal(first[0], (images[0][0] * 255).round().expand(3, 8, 8))
    wide = ImageFolder(Path("images"), THREAT, (4, 8), grayscale=True)[0][0]
    assert wide.shape == (1, 4, 8)
    assert torch.allclose(wide, images[0][0][:, 2:6], atol=0.01)  # covered, and cut out of the middle


@pytest.mark.parametrize("batch", ["dynamic", "fixed"])
def test_an_exported_model(command, batch):
    shapes = ({0: torch.export.Dim("batch")},) if batch == "dynamic" else None
    program = torch.export.export(network_with_weights(), (torch.rand(20, 1, 8, 8),), dynamic_shapes=shapes)
    torch.export.save(program, "digits.pt2")
    done = command("evaluate", "--model=digits.pt2", "--data", DATA, "--threat.eps=0.1", "--attacks", "fgsm", "pgd", "--features=outputs")  # fmt: skip
    whole = expected(["fgsm", "pgd"], model=network_with_weights(), features="outputs")
    assert done.err == ""
    assert (
        done.out.splitlines()[2:-1] == printed(whole).splitlines()[2:-1]
    )  # but the transport shift, whose last digit may differ
    again = command("evaluate", "--model=digits.pt2", "--data", DATA, "--threat.eps=0.1", "--attacks", "fgsm", "pgd", "--features=outputs", "--device=cpu")  # fmt: skip
    assert again.err.startswith("Nothing was attacked again")


def network_with_weights() -> torch.nn.Module:
    model = network()
    model.load_state_dict(trained_classifier(batch_norm=True).net.state_dict())
    return model.eval()


def test_interrupted_it_goes_on(evaluated, monkeypatch):
    perturb, calls = PGD.perturb, []

    def once(self, problem):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return perturb(self, problem)

    monkeypatch.setattr(PGD, "perturb", once)
    done = evaluated("--attacks", "pgd")
    assert done.status == 130
    assert done.err.endswith("lightning-wdefense: interrupted: 2 finished batches kept in robustness/finished_batches.pt, the same command goes on there.\n")  # fmt: skip
    again = evaluated("--attacks", "pgd")
    assert again.out == printed(expected(["pgd"]))
    assert again.err.startswith("Going on after 2 finished batches in robustness/finished_batches.pt.")
    assert len(calls) == 3 + 2 + 4
    # Another evaluation would lose what is not finished, but takes the place of what is.
    other = evaluated("--attacks", "pgd", "--seed", 5)
    assert other.status == 0
    assert "is of another evaluation, which is finished: this one takes its place" in other.err


def test_work_that_is_not_finished_is_never_lost(evaluated, folder):
    assert evaluated("--model", "cli.project.FailsAtLast", "--checkpoint", "null", "--data.size", 67).status == 2
    kept = (folder / "robustness" / FINISHED).read_bytes()
    done = evaluated()
    assert done.status == 2
    assert (
        "finished_batches.pt holds finished batches of another evaluation. What differs (there, here): model ("
        in done.err
    )
    assert done.err.rstrip().endswith("The evaluation there is not finished. Delete robustness/finished_batches.pt to start anew, or give another --output.")  # fmt: skip
    assert (folder / "robustness" / FINISHED).read_bytes() == kept


def test_a_real_process_that_is_killed(command, checkpoints, folder):
    """The command as a user starts it."""
    (folder / "killed_project.py").write_text(
        "import os, signal\nfrom lightning_wdefense.attacks import FGSM\nfrom cli.project import *\n"
        "class Deadly(FGSM):\n"
        "    def perturb(self, problem):\n"
        "        if os.path.exists('robustness/finished_batches.pt') and not os.path.exists('once'):\n"
        "            open('once', 'w').close()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().perturb(problem)\n"
    )
    attack = {"class_path": "killed_project.Deadly", "init_args": {"threat": {"eps": 0.1}}}
    (folder / "killed.yaml").write_text(yaml.safe_dump({"attacks": {"fgsm": attack}, "threat": {"eps": 0.1}}))
    words = ("--config=killed.yaml", "--model", MODEL, f"--checkpoint={checkpoints / 'digits.ckpt'}", "--data", DATA)

    command_line = [sys.executable, "-m", "lightning_wdefense.cli", "evaluate", *words]
    killed = subprocess.run(command_line, env=script_environment(), capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = command("evaluate", *words)
    assert done.status == 0, done.err
    assert done.out == printed(expected())
    assert "Going on after 1 finished batch in" in done.err
