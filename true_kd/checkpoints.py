"""Checkpoints that a stopped run goes on from: optimizer, random numbers, best weights and all that was measured.

They lie beside the adapter in a checkpoint's folder, which mlx-lm loads as it does any adapter. The record of a
checkpoint is written last and bears the digests of the other files: where it stands, the checkpoint is whole. Only the
newest keeps more than the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlx.core as mx
from pydantic import TypeAdapter, ValidationError

from true_kd import adapters
from true_kd.files import digest_file, remove, write_atomic, write_json
from true_kd.reporting import Validation
from true_kd.training import StepMetrics

FORMAT = 1
"""Version of the record's layout."""
STATE = "training_state.safetensors"
RECORD = "training_state.json"


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


def save_checkpoint(folder: Path, progress: Progress, state: Mapping[str, mx.array], run_digest: str) -> None:
    """Write what there is besides the adapter, which is in the checkpoint's folder already, and thin older ones out.

    Parameters
    ----------
    folder
        that of the domain.
    """
    place = adapters.checkpoint_folder(folder, progress.iteration)
    arrays = {**_prefixed(_STATE, state), **_prefixed(_BEST, progress.best_weights)}
    mx.eval(list(arrays.values()))
    write_atomic(place / STATE, lambda path: mx.save_safetensors(str(path), arrays))
    record = {
        "format": FORMAT,
        "run_digest": run_digest,
        "sha256": {name: digest_file(place / name) for name in (adapters.WEIGHTS, STATE)},
        "best": progress.best and progress.best.iteration,
        "steps": [asdict(step) for step in progress.steps],
        "validations": [asdict(validation) for validation in progress.validations],
    }
    write_json(place / RECORD, record)
    drop_states(folder, but=progress.iteration)


def drop_states(folder: Path, but: int | None = None) -> None:
    """Leave nothing but the adapters in the checkpoints of a domain, in that of iteration `but` all."""
    for iteration, place in adapters.checkpoints(folder).items():
        if iteration != but:
            # The record first: without it nothing is taken for a checkpoint.
            remove(place / RECORD)
            remove(place / STATE)


def find_checkpoint(folder: Path, run_digest: str) -> Checkpoint | None:
    """The newest whole checkpoint of this run in a domain's folder; None where there is none."""
    for _, place in sorted(adapters.checkpoints(folder).items(), reverse=True):
        found = _read(place, run_digest)
        if found is not None:
            return found
    return None


def _read(place: Path, run_digest: str) -> Checkpoint | None:
    record = adapters.read_json(place / RECORD)
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("run_digest") != run_digest:
        return None
    try:
        if record["sha256"] != {name: digest_file(place / name) for name in (adapters.WEIGHTS, STATE)}:
            return None
        steps = TypeAdapter(list[StepMetrics]).validate_python(record["steps"])
        validations = TypeAdapter(list[Validation]).validate_python(record["validations"])
        weights, arrays = (mx.load(str(place / name)) for name in (adapters.WEIGHTS, STATE))
        mx.eval(weights, arrays)
    except (OSError, ValidationError, KeyError, RuntimeError, ValueError):
        return None
    if place != adapters.checkpoint_folder(place.parent, len(steps)):
        return None
    best = next((validation for validation in validations if validation.iteration == record.get("best")), None)
    progress = Progress(steps, validations, best, _unprefixed(_BEST, arrays))
    return Checkpoint(progress, weights, _unprefixed(_STATE, arrays))


_STATE, _BEST = "state.", "best."


def _prefixed(prefix: str, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    return {prefix + name: value for name, value in arrays.items()}


def _unprefixed(prefix: str, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
