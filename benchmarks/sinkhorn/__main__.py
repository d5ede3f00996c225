"""The debiased Sinkhorn divergence with its gradients to both clouds, against other libraries at equal accuracy.

    python -m benchmarks.sinkhorn                 # times; can be stopped, and goes on where it was
    python -m benchmarks.sinkhorn --robustness    # accuracy of the default settings on many problems

Each side is timed with the fastest of its settings that meets the target on all seeds, against a converged float64
solution. The times of all sides are then taken in turns, in one process on the same cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.shared.files import alone, read, write_atomically, write_text
from benchmarks.sinkhorn.peers import Call, Setting, Side, our_sides, peer_sides
from benchmarks.sinkhorn.problems import ROBUSTNESS_ROWS, ROWS, VALUE_TARGET, Case, Errors, Row, make_case, worst_errors
from benchmarks.sinkhorn.report import plot, robustness_report, time_report

PATIENCE = 60.0
"""Seconds of timing after which a row makes do with fewer repeats, though with one for each seed."""
PACKAGES = "torch", "lightning-wdefense", "geomloss", "POT", "ott-jax", "jax", "mdot-tnt", "flash-sinkhorn"


class Trial(NamedTuple):
    """One setting: seconds of a call, and the worst errors on the seeds (the first only, if that was hopeless)."""

    setting: Setting
    seconds: float
    errors: Errors
    note: str = ""

    def meets(self, target: float) -> bool:
        return self.errors.gradient <= target and self.errors.value <= VALUE_TARGET


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt Python code. What runs in the background would go on, and disturb the times of others."""

    def interrupt(*_: Any) -> None:
        raise TimeoutError(f"a call took more than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0 if math.isinf(seconds) else seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def timed(call: Call) -> tuple[float, Any]:
    start = time.perf_counter()
    solution = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, solution


def attempt(side: Side, setting: Setting, cases: list[Case], cap: float, hopeless: float) -> Trial:
    """Run a setting on all seeds, unless the gradient of the first is beyond ``hopeless``."""
    seconds, worst = [], Errors(0.0, 0.0)
    try:
        cap = cap if side.interruptible else math.inf
        # geomloss leaves gradients switched off when it is interrupted.
        with torch.enable_grad():
            for case in cases:
                call = side.prepare(setting, case.x, case.y, case.blur)
                with time_limit(cap):
                    first, solution = timed(call)
                worst = Errors(*np.maximum(worst, worst_errors(solution, case.exact)).tolist())
                hopeful = worst.gradient <= hopeless
                # Again, because the first call may have compiled something, which takes a second or two.
                if hopeful or first < 5:
                    with time_limit(cap):
                        first = min(timed(call)[0] for _ in range(5 if first < 0.05 else 1))
                seconds.append(first)
                if not hopeful:
                    break
    except Exception as error:
        print(f"  {side.name} {setting}: {type(error).__name__}: {error}"[:120], flush=True)
        return Trial(setting, math.inf, Errors(math.inf, math.inf), f"{type(error).__name__}: {error}"[:100])
    if not all(map(math.isfinite, worst)):
        worst = Errors(math.inf, math.inf)
    return Trial(setting, statistics.median(seconds), worst)


def tune(side: Side, cases: list[Case], targets: list[float], cap: float) -> list[Trial]:
    """Climb each ladder until it is accurate enough, or slower than what is known to be."""
    trials, fastest = [], dict.fromkeys(targets, cap)
    for ladder in side.ladders:
        for setting in ladder:
            trial = attempt(side, setting, cases, cap, math.inf if side.fixed else max(targets))
            trials.append(trial)
            fastest |= {t: min(fastest[t], trial.seconds) for t in targets if trial.meets(t)}
            too_slow = trial.seconds > max(fastest.values())
            if too_slow or trial.meets(min(targets)) or not math.isfinite(trial.errors.gradient):
                break
    return trials


def choose(side: Side, trials: list[Trial], targets: list[float]) -> dict[str, Trial]:
    """The fastest setting for each target, or else the most accurate one; of a fixed side, its only one."""
    if side.fixed:
        return {"fixed": trials[0]}
    chosen = {}
    for target in targets:
        good = [trial for trial in trials if trial.meets(target)]
        most_accurate = min(trials, key=lambda trial: max(trial.errors.gradient, trial.errors.value))
        chosen[f"{target:g}"] = min(good, key=lambda trial: trial.seconds) if good else most_accurate
    return chosen


def time_in_turns(calls: dict[Any, list[Call]], repeats: int) -> dict[Any, dict[str, float]]:
    """Milliseconds of each side: median, and 10th and 90th percentile. Each has a call for each seed."""
    seconds = {name: [] for name in calls}
    for each in calls.values():
        for call in each:
            call()
    start = time.perf_counter()
    for turn in range(repeats):
        for name, each in calls.items():
            call = each[turn % len(each)]
            taken = timed(call)[0]
            # A short call is slow after another library had the caches and the cores: the second one counts.
            seconds[name].append(timed(call)[0] if taken < 0.05 else taken)
        if time.perf_counter() - start > PATIENCE and turn + 1 >= max(map(len, calls.values())):
            break
    quantiles = {name: np.quantile(1e3 * np.array(each), (0.5, 0.1, 0.9)) for name, each in seconds.items()}
    return {name: dict(zip(("ms", "p10", "p90"), each.tolist(), strict=True)) for name, each in quantiles.items()}


def peak_memory(call: Call, device: str) -> float:
    """MiB of tensors that a call allocates beyond what was there, at its peak."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())])
    return float(max(held, default=0)) / 2**20


def measure(row: Row, relative_blur: float, options: argparse.Namespace, old: dict[str, Any] | None) -> dict[str, Any]:
    """Tune and time every side on one row. With an old record, only ours is tuned anew."""
    from lightning_wdefense.transport import sinkhorn

    cases = [make_case(row, relative_blur, seed, options.cache, options.device) for seed in range(options.seeds)]
    record, calls, tried = {}, {}, {}
    for side in our_sides() + peer_sides(options.device):
        if old and side.name in old["sides"] and not side.name.startswith("ours"):
            chosen = {target: read_trial(trial) for target, trial in old["sides"][side.name].items()}
        else:
            began = time.monotonic()
            trials = tune(side, cases, options.targets, options.cap)
            tried[side.name] = [[t.setting, t.seconds, *t.errors, t.note] for t in trials]
            chosen = choose(side, trials, options.targets)
            print(f"  {side.name}: {len(trials)} settings in {time.monotonic() - began:.0f} s", flush=True)
        record[side.name] = {target: write_trial(trial) for target, trial in chosen.items()}
        for target, trial in chosen.items():
            if math.isfinite(trial.seconds) and (side.fixed or trial.meets(float(target))):
                key = side.name, json.dumps(trial.setting)
                calls[key] = [side.prepare(trial.setting, case.x, case.y, case.blur) for case in cases]
                record[side.name][target]["timing"] = key
    times = time_in_turns(calls, options.repeats)
    for trial in (trial for each in record.values() for trial in each.values()):
        if "timing" in trial:
            trial |= times[trial.pop("timing")]
    return {
        "row": row._asdict() | {"name": row.name, "relative_blur": relative_blur},
        "sides": record,
        "tried": (old["tried"] if old else {}) | tried,
        "ours_n_iter": [sinkhorn(case.x, case.y, blur=case.blur).n_iter for case in cases],
        "ours_peak_mib": peak_memory(calls["ours default", "{}"][0], options.device),
        "environment": environment(options),
    }


def write_trial(trial: Trial) -> dict[str, Any]:
    return trial._asdict() | {"errors": trial.errors._asdict()}


def read_trial(record: dict[str, Any]) -> Trial:
    return Trial(record["setting"], record["seconds"], Errors(**record["errors"]), record["note"])


def environment(options: argparse.Namespace) -> dict[str, str]:
    cpu = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if "model name" in line]
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else (models or [platform.processor()])[0]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"hardware": hardware, "threads": f"{options.threads} of {os.cpu_count()} cores", **versions}


def robustness(row: Row, relative_blur: float, options: argparse.Namespace, _: Any) -> dict[str, Any]:
    """Errors of our default settings over all seeds of one row."""
    from lightning_wdefense.transport import SinkhornConvergenceWarning

    ours = our_sides()[1]
    seeds, converged = [], 0
    for seed in range(options.seeds):
        case = make_case(row, relative_blur, seed, options.cache, options.device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            solution = ours.prepare({}, case.x, case.y, case.blur)()
        converged += not any(issubclass(warning.category, SinkhornConvergenceWarning) for warning in caught)
        seeds.append({**worst_errors(solution, case.exact)._asdict(), "reference": case.exact[0].marginal_error})
    errors = {name: np.array([seed[name] for seed in seeds]) for name in ("gradient", "value")}
    quantiles = {
        name: {"median": float(np.median(each)), "p90": float(np.quantile(each, 0.9)), "max": float(each.max())}
        for name, each in errors.items()
    }
    return {
        "row": row._asdict() | {"name": row.name, "relative_blur": relative_blur},
        "problems": len(seeds),
        "converged": converged,
        "violations": sum(not (s["gradient"] <= 1e-2 and s["value"] <= VALUE_TARGET) for s in seeds),
        **quantiles,
        "worst_reference": max(seed["reference"] for seed in seeds),
        "seeds": seeds,
        "environment": environment(options),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sinkhorn", description=__doc__.splitlines()[0])
    parser.add_argument("--robustness", action="store_true", help="only check the accuracy of our default settings")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="cores that every side may use")
    parser.add_argument("--seeds", type=int, help="problems of each row (3; with --robustness 20)")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="such as 'adv 64x10'; all if absent")
    parser.add_argument(
        "--blurs", nargs="+", type=float, help="relative (0.2 0.05; with --robustness 0.5 0.2 0.05 0.02)"
    )
    parser.add_argument("--targets", nargs="+", type=float, default=[1e-2, 1e-3], help="gradient errors")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of each side")
    parser.add_argument("--cap", type=float, default=20.0, help="seconds of a call at which a setting is given up")
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes after which no new row is begun")
    parser.add_argument(
        "--again", choices=("all", "ours"), help="measure finished rows again; 'ours': keep the peers' settings"
    )
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sinkhorn_references")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.seeds = options.seeds or (20 if options.robustness else 3)
    options.blurs = options.blurs or ([0.5, 0.2, 0.05, 0.02] if options.robustness else [0.2, 0.05])
    known = ROBUSTNESS_ROWS if options.robustness else ROWS
    options.rows = [row for row in known if not options.rows or row.name in options.rows]
    if not options.rows:
        parser.error(f"--rows must name some of: {', '.join(row.name for row in known)}")
    return options


def share_cores(options: argparse.Namespace) -> None:
    """The same cores for every library: XLA counts those it may use when it starts, which is later."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.threads :])
    torch.set_num_threads(options.threads)
    if options.threads == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["KINETO_LOG_LEVEL"] = "5"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    torch.backends.cuda.matmul.allow_tf32 = False


def run(
    options: argparse.Namespace, name: str, one: Callable[..., dict[str, Any]], settings: str
) -> list[dict[str, Any]]:
    """Records of all rows of the file, each saved as soon as it is there."""
    path, start = options.output / f"{name}.json", time.monotonic()
    records = read(path)
    for row, blur in ((row, blur) for row in options.rows for blur in options.blurs):
        key = f"{row.name}, blur {blur:g}, {settings}"
        if (key in records and not options.again) or time.monotonic() - start > 60 * options.budget:
            continue
        began = time.monotonic()
        records[key] = one(row, blur, options, records.get(key) if options.again == "ours" else None)
        write_atomically(path, records)
        print(f"{key}: {time.monotonic() - began:.0f} s", flush=True)
    return list(records.values())


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments()
    share_cores(options)
    options.output.mkdir(parents=True, exist_ok=True)
    kind, settings = "sinkhorn", f"{options.seeds} seeds, {options.threads} threads"
    if options.robustness:
        kind, one, write = "sinkhorn_robustness", robustness, robustness_report
    else:
        one, write = measure, time_report
        settings += f", targets {' '.join(f'{target:g}' for target in options.targets)}"
    name = f"{kind}_{options.device}"
    with alone(options.output / f"{name}.json"):
        records = run(options, name, one, settings)
    text = f"# {__doc__.splitlines()[0]}\n\n{write(records)}\n"
    for each in dict.fromkeys(json.dumps(record["environment"]) for record in records):
        text += f"Measured with {', '.join(f'{key} {value}' for key, value in json.loads(each).items())}.\n"
    write_text(options.output / f"{name}.md", text)
    print(text)
    if not options.robustness:
        plot(records, options.output / f"{name}.png")


if __name__ == "__main__":
    main()
