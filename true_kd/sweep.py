"""One domain under several settings, from one cache, and which of them is the best.

Each point of the grid is a run of its own in a folder of its own, so a sweep that is stopped goes on, and its adapters
can be used as they are. What is compared is the held-out KL to the teacher at temperature 1, which means the same at
every point; losses do not. Points that differ in nothing but the seed are repetitions of one setting.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from true_kd import events, pipeline
from true_kd.adapters import SWEEP
from true_kd.config import Override
from true_kd.errors import InputError, TrueKDError
from true_kd.files import write_json
from true_kd.jobs import plan, refuse
from true_kd.ranking import Run, recommend
from true_kd.validation import dotted
from true_kd.yaml_file import KeyPath

RESULT = "sweep.json"
_SEED: KeyPath = ("seed",)
_SWEPT = ("losses", "training", "lora", "seed")
_MOST_POINTS = 200


@dataclass(frozen=True)
class Axis:
    """One key of the config and the values that it takes."""

    flag: str
    path: KeyPath
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Point:
    """One value of each axis."""

    name: str
    """"temperature=2,alpha=0.7": the name of its folder, too."""
    overrides: tuple[Override, ...]
    setting: str
    """The name without the seed."""
    is_control: bool = False


def grid(axes: Sequence[Axis], with_control: bool) -> list[Point]:
    """All combinations of the axes' values, in their order; with the control as the last, by each seed.

    Raises
    ------
    InputError
        when an axis would change what the teacher says, is given twice, or there are too many points.
    """
    if not axes:
        raise InputError(
            "sweep: nothing to vary, expected values such as --temperature 1,2,4 or --grid lora.rank=8,16."
        )
    for axis in axes:
        if axis.path[0] not in _SWEPT or axis.path == ("training", "max_seq_length"):
            raise InputError(
                f"{axis.flag}: {dotted(axis.path)} cannot be swept, expected a key of losses, training or lora, or the "
                "seed: all points share what the teacher said, and what is measured of it. Set it with --set."
            )
    paths = [axis.path for axis in axes]
    if len(set(paths)) < len(paths):
        raise InputError(
            f"sweep: {dotted(max(paths, key=paths.count))} is swept twice, expected once. Merge the lists."
        )
    count = math.prod(len(axis.values) for axis in axes)
    if count > _MOST_POINTS:
        raise InputError(f"sweep: {count:,} points, expected at most {_MOST_POINTS}. Give fewer values.")
    points = [_point(axes, values) for values in itertools.product(*(axis.values for axis in axes))]
    if with_control:
        seeds = [axis for axis in axes if axis.path == _SEED]
        for values in itertools.product(*(axis.values for axis in seeds)):
            bare = _point(seeds, values)
            name = ",".join(["sft", *filter(None, [bare.name])])
            points.append(Point(name, bare.overrides, "sft", is_control=True))
    names = [point.name for point in points]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise InputError(f"sweep: {twice} comes twice, expected each point once. Leave a value out.")
    return points


def _point(axes: Sequence[Axis], values: Sequence[Any]) -> Point:
    def name(kept: Sequence[tuple[Axis, Any]]) -> str:
        return ",".join(f"{axis.path[-1]}={_spell(value)}" for axis, value in kept)

    pairs = list(zip(axes, values, strict=True))
    setting = name([pair for pair in pairs if pair[0].path != _SEED])
    return Point(
        name(pairs), tuple(Override(axis.flag, axis.path, value) for axis, value in pairs), setting or "as set"
    )


def _spell(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def sweep(
    base: Path | None, domains: Sequence[str], given: Sequence[Override], points: Sequence[Point]
) -> Iterator[events.Event]:
    """Distil every domain at every point, and say which is best.

    Yields the events of all runs, and `SweepFinished` at the end.

    Raises
    ------
    TrueKDError
        when nothing of a point can be done.
    """
    found: dict[str, list[Run]] = {}
    failures: dict[str, Exception] = {}
    # All of them first: a value out of bounds is found before hours are spent on the others.
    planned = [(point, *plan(base, domains, [*given, *point.overrides])) for point in points]
    for _, jobs, refused in planned:
        if not jobs:
            refuse(refused)
    where = planned[0][1][0].config.out_folder / SWEEP
    for number, (point, jobs, refused) in enumerate(planned, start=1):
        for job in jobs:
            config = job.control().config if point.is_control else job.config
            job.config = config.model_copy(update={"out": str(where / point.name), "control": "none"})
        yield events.PointStarted(point.name, number, len(points))
        with contextlib.closing(pipeline.distill(jobs, refused)) as running:
            for event in running:
                if not isinstance(event, events.RunFinished):
                    yield event
                    continue
                failures |= {f"{domain} at {point.name}": error for domain, error in event.failures.items()}
                for result in event.results:
                    assert result.proof is not None, "a finished run of a domain is proved"
                    run = Run(point.setting, point.is_control, result.proof.prompts)
                    found.setdefault(result.domain, []).append(run)
    recommendations = []
    for domain, runs in found.items():
        try:
            recommendations.append(recommend(domain, runs))
        except TrueKDError as error:
            failures[domain] = error
    if recommendations:
        write_json(where / RESULT, {"domains": {each.domain: asdict(each) for each in recommendations}})
    yield events.SweepFinished(tuple(recommendations), failures, where / RESULT)
