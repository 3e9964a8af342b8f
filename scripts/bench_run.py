"""Where the time of a whole run goes: `true-kd distill` with the pocket models, phase by phase, in fresh processes.

Phases are told apart by the run's events; inside a phase a few functions are timed by wrapping them, so that nothing
of the product changes: what they take counts for the outermost of them, and what is left is Python. A further run
under cProfile lists the functions that take the most themselves, apart from waiting for the device; it is slower, so
its shares count and its seconds do not.

    python scripts/bench_run.py
    python scripts/bench_run.py --domain task --runs 1 --set training.iters=50
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

REST = "Python and the rest"
WAITING = "waiting for the device"
TIMED = {
    "opening models": ("true_kd.models.open_model",),
    "laying out batches": ("true_kd.batching.collate", "true_kd.batching.epoch_batches"),
    "evaluation": ("true_kd.evaluation.evaluate", "true_kd.evaluation.measure", "true_kd.evaluation.exact_match"),
    "measuring speed": ("true_kd.models.decoding_speed",),
    "intervals": ("true_kd.gate.weigh_up", "true_kd.proof.prove"),
    "the report": ("true_kd.report.write_report",),
    "writing files": ("true_kd.files.write_atomic", "true_kd.files.write_json"),
    # Generation waits in `async_eval` when the device is behind; `numpy.array` of an mlx array waits as well, unseen.
    WAITING: tuple(
        f"mlx.core.{name}" for name in ("eval", "async_eval", "array.item", "array.tolist", "array.__float__")
    ),
}

PHASES = (
    "interpreter",
    "imports",
    "plan",
    "teacher",
    "student and data",
    "evaluation before",
    "certificate",
    "training",
    "last validation",
    "proof",
    "summary, report",
    "exit",
)
# The phase that an event begins; Validated and Stepped depend on what was before.
BEGINS = {
    "TeacherOpening": "teacher",
    "CaptureReused": "teacher",
    "TeacherFreed": "student and data",
    "TrainingStarted": "evaluation before",
    "Certified": "training",
    "Proving": "proof",
    "DomainFinished": "summary, report",
}


class Stopwatch:
    """Seconds by phase and by what they went into; all time since `started` is in one of them."""

    def __init__(self, started: float) -> None:
        self.seconds: Counter[tuple[str, str]] = Counter()
        self.phase = PHASES[0]
        self._last = started
        self._inside = False

    def book(self, into: str = REST) -> None:
        """Charge the time since the last call."""
        now = time.time()
        self.seconds[self.phase, into] += now - self._last
        self._last = now

    def begin(self, phase: str) -> None:
        """Close a phase and open the next."""
        self.book()
        self.phase = phase

    def see(self, event: Any) -> None:
        """What an event says of the phases."""
        name = type(event).__name__
        if name == "Validated":
            self.begin("last validation" if event.validation.iteration else "certificate")
        elif name == "Stepped" and self.phase != "training":
            # That validation was not the last.
            self.book()
            for phase, into in list(self.seconds):
                if phase == self.phase:
                    self.seconds["training", into] += self.seconds.pop((phase, into))
            self.phase = "training"
        elif name in BEGINS:
            self.begin(BEGINS[name])

    def wrap(self, function: Callable, into: str) -> Callable:
        """The same function, its time charged where no other wrapped function called it."""

        @functools.wraps(function)
        def wrapped(*given: Any, **named: Any) -> Any:
            if self._inside:
                return function(*given, **named)
            self.book()
            self._inside = True
            try:
                return function(*given, **named)
            finally:
                self._inside = False
                self.book(into)

        return wrapped


def put_in(stopwatch: Stopwatch) -> None:
    """Wrap the functions of TIMED wherever a module of true_kd or their own holds them."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "true_kd"]
    for into, paths in TIMED.items():
        for path in paths:
            owner, _, name = path.rpartition(".")
            holder = (
                importlib.import_module("mlx.core").array
                if owner == "mlx.core.array"
                else importlib.import_module(owner)
            )
            function = getattr(holder, name)
            wrapped = stopwatch.wrap(function, into)
            for place in (holder, *modules):
                if getattr(place, name, None) is function:
                    setattr(place, name, wrapped)


def distill(arguments: argparse.Namespace, stopwatch: Stopwatch) -> None:
    """One domain into an empty folder, as the command line does it."""
    stopwatch.begin("imports")
    import true_kd  # noqa: F401 - loads a fast BLAS before mlx

    import mlx.core  # noqa: F401 - `put_in` wraps its functions  # isort: skip

    from true_kd import events, jobs, pipeline
    from true_kd.config import Override
    from true_kd.validation import parse_override

    put_in(stopwatch)
    stopwatch.begin("plan")
    with tempfile.TemporaryDirectory() as folder:
        overrides = [Override(f"--{name}", (name,), str(Path(folder, name))) for name in ("out", "cache")]
        overrides.append(Override("--control", ("control",), "none"))
        # What is timed has to be in this process.
        overrides.append(Override("--set", ("isolate",), False))
        overrides += [Override("--set", *parse_override(text)) for text in arguments.set]
        planned, failures = jobs.plan(arguments.config, [arguments.domain], overrides)
        for event in pipeline.distill(planned, failures):
            stopwatch.see(event)
            if isinstance(event, events.DomainFailed):
                raise SystemExit(f"the run failed:\n{event.trace}")
    stopwatch.begin("exit")


def profile(arguments: argparse.Namespace, stopwatch: Stopwatch) -> list[tuple[str, int, float]]:
    """Functions of one run, each with its calls and the seconds it took itself, the slowest first."""
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.runcall(distill, arguments, stopwatch)
    found = []
    for (path, line, name), (_, calls, own, *_) in pstats.Stats(profiler).stats.items():
        place = "/".join(Path(path).parts[-2:]) + f":{line} " if line else ""
        found.append((f"{place}{name}", calls, own))
    return sorted(found, key=lambda row: -row[2])


def child(arguments: argparse.Namespace, *flags: str) -> tuple[dict[str, Any], float]:
    """What a fresh process found, and the wall clock at its end."""
    given = ["--config", str(arguments.config), "--domain", arguments.domain]
    given += [part for text in arguments.set for part in ("--set", text)]
    command = [sys.executable, __file__, *given, *flags, "--started"]
    ended = subprocess.run([*command, repr(time.time())], stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        raise SystemExit(ended.returncode)
    return json.loads(ended.stdout.splitlines()[-1]), time.time()


def show_phases(runs: list[Counter[tuple[str, str]]]) -> None:
    """Print the medians over runs; the parts of a phase are listed below it."""
    parts = {key: statistics.median(run[key] for run in runs) for run in runs for key in run}
    whole = sum(parts.values())
    print("| phase | seconds | share |\n|---|---|---|")
    for phase in PHASES:
        mine = {into: seconds for (at, into), seconds in parts.items() if at == phase}
        print(f"| **{phase}** | {sum(mine.values()):.2f} | {sum(mine.values()) / whole:.1%} |")
        for into, seconds in sorted(mine.items(), key=lambda item: -item[1]):
            if len(mine) > 1 and seconds >= 0.005:
                print(f"| {phase}: {into} | {seconds:.2f} | {seconds / whole:.1%} |")
    print(f"| **all** | {whole:.2f} | 100.0% |", flush=True)


def show_functions(functions: list[tuple[str, int, float]], top: int) -> None:
    """Print those that took the most themselves."""
    # MLX's own functions are unknown to the profiler: what they take counts for their callers, or for the wrapper.
    whole = sum(own for _, _, own in functions)
    waiting = sum(own for name, _, own in functions if name.endswith(" wrapped"))
    print(
        f"\nUnder cProfile the run takes {whole:.1f} s, of which {waiting:.1f} s waiting. Of the rest, by own time:\n"
    )
    print("| function | calls | seconds | share of the rest |\n|---|---|---|---|")
    for name, calls, own in [row for row in functions if not row[0].endswith(" wrapped")][:top]:
        print(f"| {name} | {calls:,} | {own:.3f} | {own / (whole - waiting):.1%} |")


def time_help(times: int) -> list[float]:
    """Seconds of `true-kd --help` in fresh processes."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "true_kd", "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("pocket:configs/base.yaml"))
    parser.add_argument("--domain", default="thinking")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="Any other key of the config.")
    parser.add_argument("--top", type=int, default=20, help="Functions in the profile; 0 for no profile.")
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.started:
        stopwatch = Stopwatch(arguments.started)
        functions = profile(arguments, stopwatch) if arguments.profile else distill(arguments, stopwatch)
        stopwatch.book()
        print(
            json.dumps({"seconds": [[*key, value] for key, value in stopwatch.seconds.items()], "functions": functions})
        )
        return
    runs = []
    for _ in range(arguments.runs):
        started = time.time()
        found, ended = child(arguments)
        seconds = Counter({(phase, into): value for phase, into, value in found["seconds"]})
        # What the interpreter takes to go away, it cannot tell itself.
        seconds["exit", REST] += ended - started - seconds.total()
        runs.append(seconds)
    print(f"Domain {arguments.domain} of {arguments.config}, medians of {len(runs)} runs.\n")
    show_phases(runs)
    if arguments.top:
        show_functions(child(arguments, "--profile")[0]["functions"], arguments.top)
    times = time_help(5)
    print(f"\n`true-kd --help`: {statistics.median(times):.3f} s, median of 5 ({min(times):.3f} to {max(times):.3f}).")


if __name__ == "__main__":
    main()
