"""How near `true-kd plan` comes to the run it is of: estimate by measurement, domain by domain.

Each domain is planned when a few of its replies are in the cache, as `true-kd analyze` leaves them, and then distilled,
with a cache of its own in each round. Plan and run take turns, so that what else the machine does shows in both.

    python scripts/bench_plan.py
    python scripts/bench_plan.py --domains task --rounds 1 --set training.iters=50
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import true_kd  # noqa: F401 - loads a fast BLAS before mlx
from true_kd import events, jobs, pipeline, pocket
from true_kd.config import Override
from true_kd.planning import DomainForecast, forecast
from true_kd.reporting import KDResult
from true_kd.validation import parse_override

SAMPLE = 16
"""Prompts of each split whose replies are there before the plan."""
MEASURES = ("tokens", "cache", "teacher's peak", "student's peak", "capture s", "training s", "measuring s", "all s")


def work(arguments: argparse.Namespace, domain: str, folder: Path) -> jobs.Job:
    """The job of a domain, with cache and output below a folder."""
    values = {"cache": str(folder / "cache"), "out": str(folder / "out"), "report": False}
    given = [Override("--set", (name,), value) for name, value in values.items()]
    given += [Override("--set", *parse_override(text)) for text in arguments.set]
    [job], failures = jobs.plan(arguments.config, [domain], given)
    if failures:
        jobs.refuse(failures)
    return job


def one_round(arguments: argparse.Namespace, domain: str) -> list[float]:
    """Ratios of estimates to measurements, in the order of MEASURES."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = work(arguments, domain, folder)
        sample = replace(job, train_prompts=job.train_prompts[:SAMPLE], valid_prompts=job.valid_prompts[:SAMPLE])
        for _ in pipeline.capture([sample]):
            pass
        [said] = forecast([work(arguments, domain, folder)], {}, with_fits=False).domains
        ended = list(pipeline.distill([work(arguments, domain, folder)]))
    [result] = [event.result for event in ended if isinstance(event, events.DomainFinished)]
    return ratios(said, result)


def ratios(said: DomainForecast, result: KDResult) -> list[float]:
    """Estimates by measurements, in the order of MEASURES."""
    seconds = dict(said.seconds or {})
    # The run books what it takes to start a process nowhere.
    seconds.pop("starting", None)
    phases = ("capture", "training", "evaluation")
    return [
        said.train_tokens / result.data.train_tokens,
        said.cache_bytes / result.data.cache_bytes,
        (said.capture_peak or 0) / result.capture_peak_memory,
        (said.training_peak or 0) / result.training_peak_memory,
        *(seconds[phase] / result.seconds[phase] for phase in phases),
        sum(seconds.values()) / sum(result.seconds.values()),
    ]


def show(name: str, rounds: Sequence[Sequence[float]]) -> None:
    """A row: medians, and the range where there are several rounds."""
    cells = []
    for values in zip(*rounds, strict=True):
        spread = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
        cells.append(f"{statistics.median(values):.2f}{spread}")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(pocket.BASE))
    parser.add_argument("--domains", nargs="*", default=["task", "thinking", "debug"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="Any other key of the config.")
    arguments = parser.parse_args()
    print(f"| plan / run | {' | '.join(MEASURES)} |\n|---|{'---|' * len(MEASURES)}")
    for domain in arguments.domains:
        show(domain, [one_round(arguments, domain) for _ in range(arguments.rounds)])


if __name__ == "__main__":
    main()
