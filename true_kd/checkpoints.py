"""Checkpoints that a stopped run goes on from: optimizer, random numbers, best weights and all that was measured.

They lie beside the adapter in a checkpoint's folder, which mlx-lm loads as it does any adapter. The record of a
checkpoint is written last and bears the digests of the other files, and its own: where it stands, the checkpoint is
whole. The newest two keep more than the adapter, so that one that is damaged costs no more than the steps since the
other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from pydantic import TypeAdapter, ValidationError

from true_kd import adapters
from true_kd.files import (
    digest_file,
    discard,
    read_record,
    remove,
    remove_temporaries,
    save_tensors,
    write_atomic,
    write_record,
)
from true_kd.models import check_safetensors, is_finite
from true_kd.reporting import Validation
from true_kd.training import StepMetrics

FORMAT = 2
"""Version of the record's layout."""
STATE = "training_state.safetensors"
RECORD = "training_state.json"
KEPT = 2
"""Checkpoints that can be gone on from."""
_FILES = (adapters.WEIGHTS, adapters.CONFIG, STATE)


@dataclass
class Progress:
    """What training a domain has come to."""

    steps: list[StepMetrics] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    best: Validation | None = None
    """The validation of the lowest loss."""
    best_weights: dict[str, mx.array] = field(default_factory=dict)

    @property
    def iteration(self) -> int:
        """Steps that were made."""
        return self.steps[-1].iteration if self.steps else 0

    def validated(self, validation: Validation, weights: Mapping[str, mx.array]) -> bool:
        """Note a validation; returns whether it is the best so far, with these weights."""
        self.validations.append(validation)
        if self.best is not None and validation.metrics.loss >= self.best.metrics.loss:
            return False
        self.best, self.best_weights = validation, dict(weights)
        return True

    def lacks_validation(self, iters: int, every: int) -> bool:
        """Whether the weights of this iteration are to be validated and were not: each `every` steps, and at the end
        of `iters`."""
        due = self.iteration > 0 and (self.iteration % every == 0 or self.iteration == iters)
        return due and not any(validation.iteration == self.iteration for validation in self.validations)

    def is_over(self, iters: int, patience: int | None) -> bool:
        """Whether training ends here: all steps are made, or none of the last `patience` validations was the best."""
        if self.iteration >= iters:
            return True
        if patience is None or self.best is None:
            return False
        return sum(validation.iteration > self.best.iteration for validation in self.validations) >= patience


@dataclass(frozen=True)
class Checkpoint:
    """A place to go on from."""

    progress: Progress
    weights: dict[str, mx.array]
    state: dict[str, mx.array]
    """As `TrainingState.arrays` gave it."""


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    checkpoint: Checkpoint | None = None
    """None at the beginning."""
    damaged: tuple[str, ...] = ()
    """What is wrong with each newer checkpoint of the run, which is passed over."""

    @property
    def made(self) -> int:
        """Steps that an earlier run made."""
        return self.checkpoint.progress.iteration if self.checkpoint else 0


def save_checkpoint(
    folder: Path, progress: Progress, state: Mapping[str, mx.array], run_digest: str, scheduled: bool = True
) -> None:
    """Write what there is besides the adapter, which is in the checkpoint's folder already, and thin older ones out.

    Parameters
    ----------
    folder
        that of the domain.
    scheduled
        False for one that a stopped run leaves between two that it would have written: it goes when it is not needed.
    """
    place = adapters.checkpoint_folder(folder, progress.iteration)
    arrays = {**_prefixed(_STATE, state), **_prefixed(_BEST, progress.best_weights)}
    mx.eval(list(arrays.values()))
    need = sum(array.nbytes for array in arrays.values())
    write_atomic(place / STATE, lambda path: save_tensors(path, arrays), need)
    record = {
        "format": FORMAT,
        "run_digest": run_digest,
        "scheduled": scheduled,
        "sha256": {name: digest_file(place / name) for name in _FILES},
        "best": progress.best and progress.best.iteration,
        "steps": [asdict(step) for step in progress.steps],
        "validations": [asdict(validation) for validation in progress.validations],
    }
    write_record(place / RECORD, record)
    with_states = [iteration for iteration, path in adapters.checkpoints(folder).items() if (path / RECORD).exists()]
    drop_states(folder, but=sorted(with_states)[-KEPT:])


def drop_states(folder: Path, but: list[int] | None = None) -> None:
    """Leave nothing but the adapters in the checkpoints of a domain, in those of the iterations `but` all.

    Of a checkpoint that is not one of its schedule nothing is left.
    """
    for iteration, place in adapters.checkpoints(folder).items():
        if iteration in (but or ()):
            continue
        if _is_extra(place):
            discard(place)
        else:
            # The record first: without it nothing is taken for a checkpoint.
            remove(place / RECORD)
            remove(place / STATE)


def clean_up(folder: Path) -> None:
    """Leave in a finished domain's folder what a run leaves that nothing stopped."""
    drop_states(folder)
    for place in (folder, *adapters.checkpoints(folder).values()):
        remove_temporaries(place)


def find_start(folder: Path, run_digest: str) -> Start:
    """The newest whole checkpoint of this run in a domain's folder."""
    damaged = []
    for _, place in sorted(adapters.checkpoints(folder).items(), reverse=True):
        try:
            found = _read(place, run_digest)
        except ValueError as error:
            damaged.append(f"{place.name}: {error}")
            continue
        if found is not None:
            return Start(found, tuple(damaged))
    return Start(None, tuple(damaged))


def _is_extra(place: Path) -> bool:
    try:
        record = read_record(place / RECORD)
    except ValueError:
        return False
    return record is not None and record.get("scheduled") is False


def _read(place: Path, run_digest: str) -> Checkpoint | None:
    """The checkpoint in a folder; None where there is none, or it is another run's.

    Raises
    ------
    ValueError
        when it is damaged.
    """
    record = read_record(place / RECORD)
    if record is None or record.get("format") != FORMAT or record.get("run_digest") != run_digest:
        return None
    digests: dict[str, str] = _parse(dict[str, str], record.get("sha256"))
    for name in _FILES:
        if not (place / name).is_file() or digest_file(place / name) != digests.get(name):
            raise ValueError(f"{name} is not what was written")
    steps: list[StepMetrics] = _parse(list[StepMetrics], record.get("steps"))
    validations: list[Validation] = _parse(list[Validation], record.get("validations"))
    if place != adapters.checkpoint_folder(place.parent, len(steps)):
        raise ValueError(f"it is that of iteration {len(steps)}")
    try:
        for name in (adapters.WEIGHTS, STATE):
            check_safetensors(place / name)
        weights, arrays = (mx.load(str(place / name)) for name in (adapters.WEIGHTS, STATE))
        mx.eval(weights, arrays)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"its tensors cannot be read ({error})") from error
    if not is_finite([weights, arrays]).item():
        raise ValueError("it holds numbers that are not finite")
    best = next((validation for validation in validations if validation.iteration == record.get("best")), None)
    progress = Progress(steps, validations, best, _unprefixed(_BEST, arrays))
    return Checkpoint(progress, weights, _unprefixed(_STATE, arrays))


def _parse(kind: Any, value: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{RECORD} says nothing that can be used") from error


_STATE, _BEST = "state.", "best."


def _prefixed(prefix: str, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    return {prefix + name: value for name, value in arrays.items()}


def _unprefixed(prefix: str, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
