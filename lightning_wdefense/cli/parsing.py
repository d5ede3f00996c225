"""The words of the command as options: names, class paths and YAML files, by LightningCLI's conventions."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

import lightning_wdefense.cli.class_paths as class_paths
from lightning_wdefense.cli.loading import loaders, models
from lightning_wdefense.cli.loading.checkpoints import Checkpoint
from lightning_wdefense.cli.options import ABOUT, parsers
from lightning_wdefense.cli.parser import CommandParser
from lightning_wdefense.cli.usage import UsageError

LISTS = ("--attacks", "--epsilons", "--image-size")
"""Options that take several words as well as a list in brackets."""


def parsed(words: Sequence[str]) -> tuple[str, Any]:
    """The command, and its options with all objects made.

    Raises:
        UsageError: if something is wrong with the words, a YAML file or the checkpoint.
        SystemExit: after ``--help``, ``--version`` and ``--print_config``.
    """
    words = _tidied(words)
    checkpoint, model = _read_before(words)
    parser, commands = parsers()
    if model is not None:
        for name in ("evaluate", "audit"):
            commands[name].set_defaults({"model": model})
    config = parser.parse_args(words)
    command = config.subcommand
    if command is None:
        raise UsageError(f"give one of the commands {', '.join(ABOUT)}, such as: lightning-wdefense evaluate --help")
    options = parser.instantiate(config)[command]
    if command != "compare":
        options.checkpoint = checkpoint
        options.settings = _settings(commands[command], config[command])
        _check(options)
    return command, options


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
    return {key: value for key, value in found.items() if value is not None}


def _check(options: Any) -> None:
    """Refuse values that no run can take.

    Raises:
        UsageError: for the first of them.
    """
    for name, kind in (("model", models.KIND), ("data", loaders.KIND)):
        if options[name] in (None, "null"):  # which is a text where a text is allowed
            raise UsageError(f"--{name} is missing: {kind}.")
    epsilons = getattr(options, "epsilons", None)
    if epsilons is not None and any(later <= one for one, later in itertools.pairwise(epsilons)):
        raise UsageError(
            f"--epsilons must increase, got {epsilons}: write {' '.join(f'{eps:g}' for eps in sorted(set(epsilons)))}."
        )
    if options.twin is not None and not getattr(options, "audit", True):
        raise UsageError(f"--twin {options.twin} is for the audit: give --audit as well.")
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
