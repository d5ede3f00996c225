"""Our AutoAttack against torchattacks' parts and the official code: verdicts on the same images, and time.

    python -m benchmarks.attacks.autoattack --data DIR --output benchmarks/results

Every side attacks the same images with the same settings, each part those that the parts before have left. Times are of one run, on one
core: of the process, and by the wall. ``--official`` takes a checkout of github.com/fra31/auto-attack, which is left out without it.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torchattacks

from benchmarks.attacks.autoattack.models import CASES, model_of
from benchmarks.attacks.autoattack.report import report
from benchmarks.attacks.autoattack.sides import Side, of_official_code, of_torchattacks, ours
from benchmarks.shared.data import load
from benchmarks.shared.files import write_atomically, write_text
from benchmarks.shared.machine import hardware
from benchmarks.shared.protocol import PROTOCOLS


def measured(name: str, sides: dict[str, Side], work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One model: each side's robust accuracy after each part, its times, and on how many images its verdict is not ours."""
    case = CASES[name]
    splits = load(PROTOCOLS[case.dataset], options.data)
    model = model_of(name, splits, work, options.epochs)
    x, y = splits.test.first(options.images)
    with torch.no_grad():
        clean = 100 * float((model(x).argmax(1) == y).float().mean())
    row: dict[str, Any] = {"model": name, "images": len(y), "clean": round(clean, 2), "sides": {}}
    reference = None
    for side, run in sides.items():
        left, seconds = run(model, x, y, case.threat, options.steps, options.queries)
        final = left["square"]
        reference = final if reference is None else reference
        row["sides"][side] = {
            "left": {part: round(100 * float(each.float().mean()), 2) for part, each in left.items()},
            "robust": round(100 * float(final.float().mean()), 2),
            "other_verdicts": int((final != reference).sum()),
            "seconds": seconds,
            **{key: round(sum(part[key] for part in seconds.values()), 2) for key in ("cpu_s", "wall_s")},
        }
    return row


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attacks.autoattack", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, help="folder of mnist.npz; the digits alone if absent")
    parser.add_argument("--official", type=Path, help="checkout of github.com/fra31/auto-attack")
    parser.add_argument("--work", type=Path, help="folder in which trained models are kept")
    parser.add_argument("--images", type=int, default=200, help="test images of each model")
    parser.add_argument("--steps", type=int, default=100, help="of APGD and FAB")
    parser.add_argument("--queries", type=int, default=5000, help="of Square")
    parser.add_argument("--epochs", type=int, help="of each training; None for those of the case")
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if options.quick:
        options.images, options.steps, options.queries, options.epochs = 16, 3, 10, 1
    return options


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    sides: dict[str, Side] = {"ours": ours, "torchattacks": of_torchattacks}
    if options.official:
        sides["official code"] = of_official_code(options.official)
    names = [name for name, case in CASES.items() if options.data or case.dataset == "digits"]
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        rows = [measured(name, sides, work, options) for name in names]
    result = {
        "environment": {
            "command": "python -m benchmarks.attacks.autoattack"
            + " --data DIR" * bool(options.data)
            + " --official DIR" * bool(options.official)
            + f" --images {options.images} --steps {options.steps} --queries {options.queries}",
            "hardware": hardware("cpu"),
            "torch": torch.__version__,
            "torchattacks": torchattacks.__version__,
        },
        "models": rows,
    }
    write_atomically(options.output / "autoattack_cpu.json", result, indent=2)
    write_text(options.output / "autoattack_cpu.md", report(result))
    print(report(result))


if __name__ == "__main__":
    main()
