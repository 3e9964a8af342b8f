"""What a run will find done already, and why it will do the rest again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from true_kd import adapters, reporting
from true_kd.arms import find_job_start
from true_kd.config import load_config
from true_kd.errors import TrueKDError
from true_kd.jobs import Job, identifying_options
from true_kd.options import record
from true_kd.validation import dotted


@record
class Reuse:
    """What a domain's folder holds of what the run is to make."""

    finished: bool
    """Whether the adapter is there, and all that was measured of it."""
    iteration: int
    """That training goes on from; the last one where it is over."""
    control: bool
    """Whether a control is wanted and still to be trained."""
    reason: str
    """What is kept or done again, and why, in words."""


def find_reuse(job: Job) -> Reuse:
    """Look at what earlier runs left of a job whose digests are known; nothing is changed."""
    config = job.config
    if config.fresh:
        return Reuse(False, 0, config.control != "none", "done again: --fresh")
    earlier = reporting.read_result(job.folder, job.run_digest)
    measured = reporting.read_result(job.folder, job.run_digest, job.proof_digest)
    control = config.control != "none" and (
        reporting.read_result(job.control().folder, job.control().run_digest) is None
    )
    if earlier is not None:
        date = earlier.finished_at[:10]
        if measured is None or measured.proof is None:
            again = "measured again: evaluation has changed"
        elif job.lacks_control(measured.proof):
            again = "with a control to add"
        else:
            return Reuse(True, earlier.steps[-1].iteration, False, f"finished {date}, nothing to do")
        return Reuse(False, earlier.steps[-1].iteration, control, f"trained {date}, {again}")
    start = find_job_start(job)
    if start.made:
        return Reuse(False, start.made, control, f"goes on at iteration {start.made} of {config.training.iters}")
    return Reuse(False, 0, control, _why_anew(job, start.damaged))


def _why_anew(job: Job, damaged: tuple[str, ...]) -> str:
    if damaged or reporting.find_damage(job.folder, job.run_digest):
        return "done again: its files are damaged"
    if not (job.folder / adapters.RUN).is_file():
        return "nothing there yet"
    try:
        before = load_config(job.folder / adapters.RUN, None, ())
    except TrueKDError:
        return "done again: the config that it was trained with cannot be read"
    ours, theirs = dict(_flat(identifying_options(job.config))), dict(_flat(identifying_options(before)))
    changed = [
        f"{key} was {theirs.get(key)}, is {ours.get(key)}"
        for key in (ours | theirs)
        if ours.get(key) != theirs.get(key)
    ]
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        return f"done again: {'; '.join(changed[:_SHOWN])}{more}"
    return "done again: its prompts or models have changed"


_SHOWN = 3


def _flat(options: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*path, name))
        else:
            yield dotted((*path, name)), value
