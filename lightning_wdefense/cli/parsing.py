"""The words of the command as options: names, class paths and YAML files, by LightningCLI's conventions."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union

import yaml
from jsonargparse import DefaultHelpFormatter, Namespace
from torch import nn

import lightning_wdefense.cli.class_paths as class_paths
from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks.minimal.base import MinimalAttack
from lightning_wdefense.attacks.registry import Attacks
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.cli.loading.checkpoints import Checkpoint
from lightning_wdefense.cli.suggestions import SuggestingParser, suggestions
from lightning_wdefense.cli.usage import UsageError

try:
    from lightning.pytorch import LightningDataModule
except ImportError:  # pragma: no cover - a pipeline that has only the old package
    from pytorch_lightning import LightningDataModule  # type: ignore[no-redef, assignment]

PACKAGE = __name__.split(".")[0]

LISTS = ("--attacks", "--epsilons", "--image-size")
"""Options that take several words as well as a list in brackets."""

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


class ShortHelp(DefaultHelpFormatter):
    """Help without the types, whose known subclasses fill pages."""

    def _get_help_string(self, action: Any) -> str:
        if getattr(action, "_typehint", None) is None:
            return super()._get_help_string(action)
        text = re.sub(r":\w+:`~?([^`]*)`", r"\1", action.help or "").replace("``", "")  # of docstrings
        return text + ("" if action.default in (None, argparse.SUPPRESS) else " (default: %(default)s)")


class CommandParser(SuggestingParser):
    """A parser whose errors are one line, with what was perhaps meant."""

    commands: Mapping[str, CommandParser] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message in one line.

        Raises:
            UsageError: unless this parser is a part of another one, whose message will hold this one.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        found: list[str] = []
        with contextlib.suppress(Exception):  # no fault in a suggestion may hide the message
            found = [text for text in suggestions(message) if "argument of" in text]
        raise UsageError(" ".join(found) or self._in_one_line(message)) from ex

    def _in_one_line(self, message: str) -> str:
        if match := re.search(r'key "(model|data)":.*the following arguments are required: (\w+)', message, re.S):
            stored = ", or a --checkpoint that stores it" if match[1] == "model" else ""
            return f"--{match[1]}: the class needs {match[2]!r}: give --{match[1]}.{match[2]}{stored}."
        if match := re.search(r"unrecognized arguments: (--[\w.+-]+)", message):
            known = [each for action in self._actions for each in action.option_strings if each.startswith("--")]
            known = [each for each in known if not each.endswith(("+", ".help"))]
            return unknown_name("option", match[1], known).split(" Known:")[0] + " See --help."
        for path in re.findall(r"class_path '([\w.]+)'", message):
            try:
                class_paths.imported(path)
            except UsageError as error:
                return str(error)
        if match := re.search(r"Subcommand '(\w+)' does not accept option '([\w.-]+)'", message):
            known = [action.dest for action in self.commands[match[1]]._actions]
            return unknown_name("option", match[2], known).split(" Known:")[0] + " See --help."
        if match := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            return unknown_name("command", match[1], re.findall(r"\w+", match[2]))
        if match := re.search(r'key "([\w.]+)":\s+Expected a typing.Literal\[(.*)\]. Got value: (.*)', message):
            name = "--" + match[1].replace("_", "-")
            return unknown_name(f"value of {name}", match[3], re.findall(r"'(\w+)'", match[2]))
        message = re.sub(
            r"Does not validate against any of the Union subtypes\s+Subtypes: .*\s+Errors:\s+- ", "", message
        )
        message = re.sub(r"\s+- Expected a <class 'str'>.*|\s+Given value type: .*", "", message, flags=re.S)
        message = re.sub(
            r"Expected a <class '(\w+)'>. Got value: (.*)", r"it takes a value of the type \1, got \2.", message
        )
        return re.sub(r'^Parser key "([\w.]+)":', r"--\1:", " ".join(message.split()))


def parsed(words: Sequence[str]) -> tuple[str, Any]:
    """The command, and its options with all objects made.

    Raises:
        UsageError: if something is wrong with the words, a YAML file or the checkpoint.
        SystemExit: after ``--help``, ``--version`` and ``--print_config``.
    """
    words = _tidied(words)
    checkpoint, model = _read_before(words)
    parser, commands = _parsers()
    if model is not None:
        for name in ("evaluate", "audit"):
            commands[name].set_defaults({"model": model})
    config = parser.parse_args(words)
    command = config.subcommand
    if command is None:
        raise UsageError(f"give one of the commands {', '.join(ABOUT)}, such as: lightning-wdefense evaluate --help")
    options = parser.instantiate_classes(config)[command]
    if command != "compare":
        options.checkpoint = checkpoint
        options.settings = _settings(commands[command], config[command])
        _check(options)
    return command, options


def _parsers() -> tuple[CommandParser, dict[str, CommandParser]]:
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


def _add_measured(parser: CommandParser, attacks: Sequence[str]) -> None:
    """What is measured, on what, and where the report goes."""
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--debug", action="store_true", help="show where an error happened")

    add = parser.add_argument_group("the model").add_argument
    add("--model", type=Union[nn.Module, str], help="class path of a LightningModule or nn.Module, its arguments as --model.NAME; or a file of torch.export (.pt2)")  # noqa: UP007 # fmt: skip
    add("--checkpoint", type=str | None, help="its weights: a Lightning checkpoint or a state_dict; hyperparameters in it fill arguments of the model that are not given")  # fmt: skip
    add("--trust-checkpoint", action="store_true", help="read a checkpoint that holds more than tensors and plain values, which can run code")  # fmt: skip
    add("--outputs", type=int | str | None, help="key or position of the logits in what the model returns")
    add("--device", type=str, default="auto", help="such as cpu or cuda:0; auto takes a GPU if there is one")

    add = parser.add_argument_group("the data").add_argument
    add("--data", type=Union[(*_data_modules(), str)], help="class path of a LightningDataModule, its arguments as --data.NAME; or a folder of images with a sub-folder for each class")  # type: ignore[arg-type]  # fmt: skip
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
    add("--attacks", type=Attacks, default=list(attacks), help="names, or class paths in a YAML file; a claim needs at least autoattack")  # fmt: skip
    add("--seed", type=int, default=0, help="of the attacks' noise, and of a data module that shuffles")

    add = parser.add_argument_group("what becomes of it").add_argument
    add("--output", type=str, default="robustness", help="folder of the report, and of the finished batches with which an interrupted run goes on")  # fmt: skip
    add("--name", type=str | None, help="name of the model in the report")
    add("--examples", type=int, default=6, help="how many of the least and of the most robust samples the report shows")
    add("--min-robust-acc", type=float | None, help="robust accuracy, from 0 to 1, below which the exit status is 1")


def _add_evaluate(parser: CommandParser) -> None:
    _add_measured(parser, ["pgd"])
    add = parser.add_argument_group("what is measured").add_argument
    add("--epsilons", type=list[float] | None, help="increasing values of eps for the accuracy curve")
    add("--distances", type=Union[str, MinimalAttack, None], help="minimum-norm attack, such as fmn: distances to the decision boundary, and the curve from one run")  # noqa: UP007 # fmt: skip
    add("--p", type=float, default=2.0, help="order of the Wasserstein distance of the distributional accuracy")
    add("--independent", action="store_true", help="run each attack on all samples, not on those that others left")
    add("--features", type=str | None, default="penultimate", help="layer of the transport shift; null for none")
    add("--max-batches", type=int | None, help="attack only so many batches")
    add("--audit", action="store_true", help="audit the model as well, on --samples; the report shows it")
    add("--samples", type=int, default=200, help="how many samples are audited")


def _add_audit(parser: CommandParser) -> None:
    _add_measured(parser, ["apgd-ce", "apgd-t"])
    parser.add_argument("--samples", type=int, default=200, help="how many samples are attacked and audited")


def _add_compare(parser: CommandParser) -> None:
    parser.add_argument("reports", type=str, nargs="*", help="files report.json, or folders that hold one")
    parser.add_argument("--output", type=str, default="comparison", help="folder of the comparison")
    parser.add_argument("--debug", action="store_true", help="show where an error happened")


_FILLED = {"evaluate": _add_evaluate, "audit": _add_audit, "compare": _add_compare}


def _data_modules() -> list[type]:
    """LightningDataModule, also of the old package, if the user's code has imported it."""
    old = sys.modules.get("pytorch_lightning")
    return list(dict.fromkeys([LightningDataModule, getattr(old, "LightningDataModule", LightningDataModule)]))


def _tidied(words: Sequence[str]) -> list[str]:
    """``--min_robust_acc`` as ``--min-robust-acc``, and ``--epsilons 0.1 0.2`` as ``--epsilons=[0.1, 0.2]``."""
    found: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if name.startswith("--") and "." not in name and name != "--print_config":
            name = name.replace("_", "-")
        if name in LISTS:
            values = [value] if equals else []
            while not equals and left and not left[0].startswith("--"):
                values.append(left.pop(0))
            joined = values[0] if len(values) == 1 and values[0][:1] in "[{" else f"[{', '.join(values)}]"
            found.append(f"{name}={joined}")
        else:
            found.append(name + equals + value)
    return found


def _read_before(words: Sequence[str]) -> tuple[Checkpoint | None, dict[str, Any] | None]:
    """The checkpoint, and the model with the init arguments that it stores, which must be known before the words are parsed."""
    given: dict[str, Any] = {}
    model: str | None = None
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        value = value if equals else next(iter(words[place + 1 : place + 2]), "")
        if name == "--config":
            for key, each in _yaml(value).items():
                if key == "model":
                    model = each.get("class_path", model) if isinstance(each, dict) else each
                else:
                    given[str(key).replace("-", "_")] = each
        elif name in ("--model", "--model.class_path"):
            model = value
        elif name == "--checkpoint":
            given["checkpoint"] = None if value == "null" else value
        elif name == "--trust-checkpoint":
            given["trust_checkpoint"] = value.lower() not in ("false", "no", "0")
    for path in (model, given.get("data")):  # so that the classes of the old package are known
        if isinstance(path, str) and not path.endswith(".pt2"):
            with contextlib.suppress(UsageError):
                class_paths.imported(path)
    if not isinstance(given.get("checkpoint"), str):
        return None, None
    checkpoint = Checkpoint.read(Path(given["checkpoint"]), trust=bool(given.get("trust_checkpoint")))
    if isinstance(model, str) and model.endswith(".pt2"):
        return checkpoint, None
    path, arguments = checkpoint.init_args(model)
    return checkpoint, {"class_path": path, "init_args": arguments} if path and arguments else None


def _yaml(text: str) -> dict[str, Any]:
    """What a YAML file says; nothing if it cannot be read, which the parser then says."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        found = yaml.safe_load(Path(text).read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _settings(parser: CommandParser, config: Namespace) -> dict[str, Any]:
    """The options as plain values, for the report."""
    config = config.clone()
    config.pop("config", None)
    found = yaml.safe_load(parser.dump(config, skip_validation=True))
    return {key: value for key, value in found.items() if value is not None and key != "debug"}


def _check(options: Any) -> None:
    """Refuse values that no run can take.

    Raises:
        UsageError: for the first of them.
    """
    epsilons = getattr(options, "epsilons", None)
    if epsilons is not None and any(later <= one for one, later in itertools.pairwise(epsilons)):
        raise UsageError(
            f"--epsilons must increase, got {epsilons}: write {' '.join(f'{eps:g}' for eps in sorted(set(epsilons)))}."
        )
    share = options.min_robust_acc
    if share is not None and not 0 <= share <= 1:
        raise UsageError(
            f"--min-robust-acc is a share from 0 to 1, got {share:g}"
            + (f": write {share / 100:g}." if 1 < share <= 100 else ".")
        )
    for name, least in (
        ("batch_size", 1),
        ("samples", 1),
        ("examples", 0),
        ("dataloader", 0),
        ("workers", 0),
        ("max_batches", 1),
    ):
        value = getattr(options, name, None)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {value}.")
    if options.image_size is not None:
        if len(options.image_size) not in (1, 2) or min(options.image_size) < 1:
            raise UsageError(f"--image-size takes one number of pixels, or height and width, got {options.image_size}.")
        options.image_size = (options.image_size[0], options.image_size[-1])
