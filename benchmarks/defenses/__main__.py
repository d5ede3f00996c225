"""Which way of training is the most robust, and what it costs: every recipe, trained and attacked alike.

    python -m benchmarks.defenses --dataset digits --recipes pgd-at trades sat-features --seeds 3
    python -m benchmarks.defenses --dataset mnist --data DIR --recipes all --tune        # settings, on validation images
    python -m benchmarks.defenses --dataset mnist --data DIR --recipes all --seeds 5 --autoattack pgd-at trades
    python -m benchmarks.defenses --dataset mnist --data DIR --recipes all --timing      # steps of all in turns

Each recipe is trained through ``WassersteinDefense`` in a Trainer; the epoch is chosen by PGD on validation images; test images
are attacked by PGD, and by APGD-CE and APGD-T, which with ``--autoattack`` FAB-T and Square complete. A recipe may carry changes and
averaged weights: ``trades:weight=3``, ``"sat-features:weight=0.3,attack.steps=7"``, ``pgd-at+avg``. What ``--tune`` chose is used
unless ``--no-tuned`` is given; changes in the argument come on top of it.

All of it can be stopped, or killed, and goes on where it was, and several processes can share the work: give each the same command. Where the
work folder is lost, the runs in the written JSON count as done; only what needs their weights trains again.
Tables and plot are made from all runs under the same protocol that the work folder holds.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from benchmarks.defenses.plot import plot
from benchmarks.defenses.report import lost, markdown, rows, summary
from benchmarks.defenses.runs import Bench, describe, work_on
from benchmarks.defenses.store import adopt, records
from benchmarks.defenses.timing import REFERENCE, time_in_turns, timings
from benchmarks.defenses.tuning import choose, tuned
from benchmarks.shared.data import load
from benchmarks.shared.files import claimed, sweep, write_atomically, write_text
from benchmarks.shared.protocol import ALWAYS, AUTOATTACK, PROTOCOLS, STAGES, Protocol
from benchmarks.shared.training import check
from benchmarks.shared.variants import Variant, candidates
from lightning_wdefense.defenses import RECIPES

SETTABLE = [field for field in fields(Protocol) if field.name not in ("dataset", "device", "data")]


def flag(name: str) -> str:
    """Of a field of the protocol."""
    return "--limit-train" if name == "train" else f"--{name.replace('_', '-')}"


def arguments(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defenses", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=PROTOCOLS, required=True)
    parser.add_argument("--data", type=Path, help="folder that holds mnist.npz or cifar10.npz; digits need none")
    parser.add_argument(
        "--recipes", nargs="+", default=["all"], help=f"'all', or of: {', '.join(RECIPES)}; may carry changes"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe (3)")
    parser.add_argument(
        "--autoattack", nargs="+", default=[], metavar="NAME", help="recipes for the full AutoAttack, or 'all'"
    )
    parser.add_argument("--tune", action="store_true", help="choose settings on validation images")
    parser.add_argument("--tune-seeds", type=int, default=1)
    parser.add_argument("--tune-samples", type=int, default=500, help="validation images that tuning attacks")
    parser.add_argument("--no-tuned", action="store_true", help="use the presets")
    parser.add_argument("--timing", action="store_true", help="time steps of all recipes in turns")
    parser.add_argument("--rounds", type=int, default=8, help="of --timing")
    parser.add_argument("--block", type=int, default=30, help="steps of a recipe in a round of --timing")
    parser.add_argument("--threads", type=int, default=1, help="cores of this process")
    parser.add_argument(
        "--work", type=Path, default=Path("benchmarks/work"), help="folder of runs, shared by processes"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", help="of the files that are written; defenses_DATASET")
    group = parser.add_argument_group("protocol", "by default that of the dataset")
    for field in SETTABLE:
        kind = {"int": int, "float": float, "float | None": float, "str": str}[field.type]
        group.add_argument(flag(field.name), dest=field.name, type=kind)
    options = parser.parse_args(argv)
    for name in ("seeds", "tune_seeds", "tune_samples", "rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"{flag(name)} must be at least 1, got {getattr(options, name)}.")
    options.stem = options.output / (options.name or f"defenses_{options.dataset}")
    if options.block < 5:
        parser.error(f"--block must be at least 5, got {options.block}: the first steps are not counted.")
    return parser, options


def make_bench(options: argparse.Namespace) -> Bench:
    """The protocol with its changes, and the data.

    Raises:
        ValueError: if a value or the data will not do.
    """
    given = {field.name: getattr(options, field.name) for field in SETTABLE}
    protocol = replace(
        PROTOCOLS[options.dataset], **{name: value for name, value in given.items() if value is not None}
    )
    for field in SETTABLE:
        value, optional = getattr(protocol, field.name), field.name == "warmup_epochs"
        if isinstance(value, (int, float)) and not (value > 0 or (optional and value == 0)):
            raise ValueError(
                f"{flag(field.name)} must {'not be negative' if optional else 'be positive'}, got {value}."
            )
    if protocol.optimizer not in ("adam", "sgd") or protocol.schedule not in ("constant", "one-cycle"):
        raise ValueError("--optimizer is adam or sgd, --schedule constant or one-cycle.")
    if protocol.attack_precision not in ("32", "bf16"):
        raise ValueError(f"--attack-precision is 32 or bf16, got {protocol.attack_precision!r}.")
    splits = load(protocol, options.data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Bench(replace(protocol, device=device, data=splits.fingerprint), splits, options.work)


def make_variants(options: argparse.Namespace, bench: Bench) -> list[Variant]:
    """The recipes that were asked for.

    Raises:
        ValueError: if one does not exist, was not tuned, or is not written rightly.
    """
    # Times are told in multiples of the reference's.
    wanted = [REFERENCE, *options.recipes] if options.timing else options.recipes
    names = [each for name in wanted for each in (RECIPES if name == "all" else [name])]
    variants = [Variant.parse(name) for name in dict.fromkeys(names)]
    for variant in variants:
        variant.recipe(bench.protocol.threat)
    if not (options.tune or options.no_tuned):
        variants = [tuned(variant, bench, options.stem) for variant in variants]
    known = {"all", *(variant.label for variant in variants)}
    if unknown := sorted(set(options.autoattack) - known):
        raise ValueError(
            f"--autoattack names {', '.join(unknown)}, which --recipes does not: {', '.join(sorted(known))}."
        )
    return variants


def make_jobs(options: argparse.Namespace, bench: Bench, variants: list[Variant]) -> list[tuple[Variant, int]]:
    """Runs, seed by seed, so that an early look sees all recipes. What is new is tried on one small step.

    Raises:
        ValueError: if a variant does not run.
    """
    if options.timing:
        jobs = []
    elif options.tune:
        tried = [each for variant in variants for each in candidates(variant, bench.protocol.threat)]
        jobs = [(variant, seed) for seed in range(options.tune_seeds) for variant in tried]
    else:
        jobs = [(variant, seed) for seed in range(options.seeds) for variant in variants]
    new = (
        variants if options.timing else [each for each, seed in jobs if "training" not in bench.run(each, seed).record]
    )
    for variant in {variant.key: variant for variant in new}.values():
        check(variant, bench.protocol, bench.splits.train)
    for stage in STAGES:
        bench.protocol.attack(stage)
    return jobs


def run_jobs(options: argparse.Namespace, bench: Bench, jobs: list[tuple[Variant, int]]) -> bool:
    """Do all that no other process does; whether nothing failed. A failure is told, and tried again by the next call."""
    failed, elsewhere = [], 0
    for variant, seed in jobs:
        complete = not {"all", variant.label}.isdisjoint(options.autoattack)
        stages = ALWAYS + AUTOATTACK * complete
        try:
            elsewhere += not work_on(bench, variant, seed, stages, options.tune_samples if options.tune else None)
        except Exception:
            traceback.print_exc()
            failed.append(f"{variant.label}, seed {seed}")
    if elsewhere:
        print(f"{elsewhere} runs are with another process, which will write the tables when it is done.")
    if failed:
        print(f"Failed, see above: {'; '.join(failed)}.", file=sys.stderr)
    return not failed


def report(options: argparse.Namespace, bench: Bench, variants: list[Variant]) -> str:
    """Write JSON, table and plot of all runs, and return the table."""
    found, timing = records(bench.work, asdict(bench.protocol)), timings(bench)
    current = {variant.label: variant.key for variant in variants}

    def meaning(label: str) -> str | None:
        if label in current:
            return current[label]
        try:
            variant = Variant.parse(label)
            return (variant if options.no_tuned else tuned(variant, bench, options.stem)).key
        except ValueError:
            return None

    table = rows(found, timing, meaning)
    content = {
        "protocol": asdict(bench.protocol),
        "rows": summary(table, bench.protocol),
        "timing": timing,
        "runs": found,
    }
    write_atomically(options.stem.with_suffix(".json"), content)
    machines = {describe(run["hardware"]) for run in found if "hardware" in run}
    text = f"# {__doc__.splitlines()[0]}\n\n{markdown(table, lost(found), bench.protocol, sorted(machines))}"
    write_text(options.stem.with_suffix(".md"), text)
    if table:
        plot(table, bench.protocol, options.stem.with_suffix(".png"))
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser, options = arguments(argv)
    torch.set_num_threads(options.threads)
    try:
        bench = make_bench(options)
        adopt(options.work, options.stem.with_suffix(".json"))
        variants = make_variants(options, bench)
        jobs = make_jobs(options, bench, variants)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    for folder in (options.work, options.output):
        folder.mkdir(parents=True, exist_ok=True)
    sweep(options.work, below=True)
    if options.timing:
        time_in_turns(bench, variants, options.rounds, options.block)
    succeeded = run_jobs(options, bench, jobs)
    if options.tune:
        print(choose(bench, variants, options.tune_seeds, options.tune_samples, options.stem))
    else:
        with claimed(options.work / "report.lock", wait=True):  # the last of several processes has seen the runs of all
            print(report(options, bench, variants))
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
