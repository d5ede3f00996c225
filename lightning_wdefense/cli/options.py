"""The options of each command."""

from __future__ import annotations

import sys
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from typing import Literal, Union

from torch import nn

from lightning_wdefense.attacks.minimal.base import MinimalAttack
from lightning_wdefense.attacks.registry import Attacks
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.cli.parser import CommandParser, ShortHelp

try:
    from lightning.pytorch import LightningDataModule
except ImportError:  # pragma: no cover - a pipeline that has only the old package
    from pytorch_lightning import LightningDataModule  # type: ignore[no-redef, assignment]

PACKAGE = __name__.split(".")[0]

ABOUT = {
    "evaluate": "Attack a model and measure how robust it is; write report.html, report.md and report.json.",
    "audit": "Check whether a model's robust accuracy can be believed; write report.html, report.md and report.json.",
    "compare": "Put the reports of several models beside each other, with paired differences.",
}

USAGE = {
    "evaluate": "lightning-wdefense evaluate --model CLASS [--checkpoint FILE] --data CLASS --threat.eps EPS [options]",
    "audit": "lightning-wdefense audit --model CLASS [--checkpoint FILE] --data CLASS --threat.eps EPS [options]",
    "compare": "lightning-wdefense compare FOLDER FOLDER [FOLDER ...] [--output FOLDER]",
}

EPILOG = "exit status: 0 if all is fine; 1 if --min-robust-acc is not reached or the audit failed; 2 for wrong usage, bad input and any other error"


def parsers() -> tuple[CommandParser, dict[str, CommandParser]]:
    """The parser of the command, and those of its commands by their names."""
    parser = CommandParser(
        prog="lightning-wdefense",
        formatter_class=ShortHelp,  # which the parsers of the commands take over
        description="Adversarial robustness, measured.",
        version=sys.modules[PACKAGE].__version__,
        epilog=EPILOG,
    )
    commands = parser.add_subcommands(required=False)
    found = {}
    for name, about in ABOUT.items():
        each = found[name] = CommandParser(description=about, epilog=EPILOG, usage=USAGE[name])
        _FILLED[name](each)
        commands.add_subcommand(name, each, help=about)
    parser.commands = found
    return parser, found


def _add_measured(parser: CommandParser, attacks: Sequence[str] | None, which: str) -> None:
    """What is measured, on what, and where the report goes."""
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--debug", action="store_true", default=SUPPRESS, help="show where an error happened")

    add = parser.add_argument_group("the model").add_argument
    add("--model", type=Union[nn.Module, str], help="class path of a LightningModule or nn.Module, its arguments as --model.NAME; or a file of torch.export (.pt2)")  # noqa: UP007 # fmt: skip
    add("--checkpoint", type=str | None, help="its weights: a Lightning checkpoint or a state_dict; hyperparameters in it fill arguments of the model that are not given")  # fmt: skip
    add("--trust-checkpoint", action="store_true", help="read a checkpoint that holds more than tensors and plain values, which can run code")  # fmt: skip
    add("--outputs", type=int | str | None, help="key or position of the logits in what the model returns")
    add("--device", type=str, default="auto", help="such as cpu or cuda:0; auto takes a GPU if there is one")

    add = parser.add_argument_group("the data").add_argument
    add("--data", type=Union[_data_modules()], help="class path of a LightningDataModule, its arguments as --data.NAME; or a folder of images with a sub-folder for each class")  # type: ignore[arg-type]  # noqa: UP007 # fmt: skip
    add("--stage", type=Literal["test", "validate", "predict", "fit"], default="test", help="of a data module: which dataloader, test, validate, predict or fit")  # fmt: skip
    add("--dataloader", type=int, default=0, help="of a data module: which of several dataloaders of the stage, from 0")
    add("--inputs", type=int | str | None, help="where the inputs are in a batch, if they are not found")
    add("--labels", type=int | str | None, help="where the labels are in a batch, if they are not found")
    add("--ignore-index", type=int | None, help="label of pixels that are left out")
    add("--batch-size", type=int, default=100, help="of a folder")
    add("--image-size", type=list[int] | None, help="of a folder: height and width in pixels, or one number for both")
    add("--grayscale", action="store_true", help="of a folder: one channel instead of three")
    add("--workers", type=int, default=0, help="of a folder: processes that read")

    parser.add_class_arguments(ThreatModel, "threat", help="the threat model")

    add = parser.add_argument_group("the attacks").add_argument
    add("--attacks", type=Attacks | None, default=attacks, help=f"names, or class paths in a YAML file; {which}")
    add("--seed", type=int, default=0, help="of the attacks' noise, and of a data module that shuffles")

    add = parser.add_argument_group("what is measured").add_argument
    add("--epsilons", type=list[float] | None, help="increasing values of eps for the accuracy curve")
    add("--distances", type=Union[str, MinimalAttack, None], help="minimum-norm attack, such as fmn: distances to the decision boundary, and the curve from one run")  # noqa: UP007 # fmt: skip
    add("--p", type=float, default=2.0, help="order of the Wasserstein distance of the distributional accuracy")
    add("--independent", action="store_true", help="run each attack on all samples, not on those that others left")
    add("--features", type=str | None, default="penultimate", help="layer of the transport shift; null for none")
    add("--max-batches", type=int | None, help="attack only so many batches")

    add = parser.add_argument_group("what becomes of it").add_argument
    add("--output", type=str, default="robustness", help="folder of the report, and of the finished batches with which an interrupted run goes on")  # fmt: skip
    add("--name", type=str | None, help="name of the model in the report")
    add("--examples", type=int, default=6, help="how many of the least and of the most robust samples the report shows")
    add("--min-robust-acc", type=float | None, help="robust accuracy, from 0 to 1, below which the exit status is 1")


def _add_twin(add: Callable[..., object]) -> None:
    add("--twin", type=str | None, help="checkpoint of an undefended model of the same class, or a file of torch.export: the audit transfers attacks from it")  # fmt: skip


def _add_evaluate(parser: CommandParser) -> None:
    _add_measured(parser, ["pgd"], "a claim needs at least autoattack")
    add = parser.add_argument_group("the audit").add_argument
    add("--audit", action="store_true", help="audit the model as well, on --samples; the report shows it")
    add("--samples", type=int, default=200, help="how many samples are audited")
    _add_twin(add)


def _add_audit(parser: CommandParser) -> None:
    _add_measured(parser, None, "by default the strongest by gradients, APGD in most norms")
    parser.add_argument("--samples", type=int, default=200, help="how many samples are attacked and audited")
    _add_twin(parser.add_argument)


def _add_compare(parser: CommandParser) -> None:
    parser.add_argument("reports", type=str, nargs="*", help="files report.json, or folders that hold one")
    parser.add_argument("--output", type=str, default="comparison", help="folder of the comparison")
    parser.add_argument("--debug", action="store_true", default=SUPPRESS, help="show where an error happened")


_FILLED = {"evaluate": _add_evaluate, "audit": _add_audit, "compare": _add_compare}


def _data_modules() -> tuple[type, ...]:
    """What ``--data`` may be: a LightningDataModule, also of the old package if the user's code has imported it, or a text."""
    old = sys.modules.get("pytorch_lightning")
    return LightningDataModule, getattr(old, "LightningDataModule", LightningDataModule), str
