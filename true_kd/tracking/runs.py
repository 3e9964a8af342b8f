"""What a tracker is, and what it is told: one run per domain, its settings by an allow-list, its numbers by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from true_kd.config import RunConfig
from true_kd.proof import Proof
from true_kd.reporting import DataCounts, Validation
from true_kd.suggest import redact
from true_kd.training import StepMetrics

PROJECT = "true-kd"
"""What the runs are filed under."""

Value = float | int | str | bool


@dataclass(frozen=True)
class Run:
    """A domain's run, as a tracker files it."""

    name: str
    """The domain; in a sweep with the point behind it."""
    id: str
    """The same for each part of a run that was stopped and goes on, and for no other run."""
    made: int
    """Steps that earlier parts made; 0 for a run that begins."""
    settings: Mapping[str, Value]
    root: Path
    """The output folder of the command, for trackers that keep files."""
    folder: Path
    """The domain's folder."""


class Tracker(Protocol):
    """A run that is being tracked. Any call may raise anything."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take numbers of an iteration; within a name they come in order."""

    def finish(self, summary: Mapping[str, Value], failed: bool) -> None:
        """The run is over; `summary` is its proof, empty where it has none."""


_GROUPS = ("losses", "training", "lora", "targets")
_CAPTURE = ("max_tokens", "sampling_temperature", "top_p", "top_k", "min_p")
_PLAIN = ("seed", "control", "vocab_strategy")


def settings_of(config: RunConfig, data: DataCounts) -> dict[str, Value]:
    """What of a config a tracker is told: numbers, switches and choices of a list; of models their names alone."""
    told: dict[str, Value] = {
        f"{seam}.model": _model_name(getattr(config, seam).model) for seam in ("teacher", "student")
    }
    for group in _GROUPS:
        told |= {f"{group}.{name}": value for name, value in _scalars(getattr(config, group).model_dump(mode="json"))}
    capture = config.capture.model_dump(mode="json", include=set(_CAPTURE))
    told |= {f"capture.{name}": value for name, value in _scalars(capture)}
    told |= {name: getattr(config, name) for name in _PLAIN}
    told |= {f"data.{name}": getattr(data, name) for name in ("train_examples", "valid_examples", "train_tokens")}
    return told


def _scalars(group: Mapping[str, object]) -> list[tuple[str, Value]]:
    """What of a group of options is no list and no group; a choice is one of a few words."""
    return [
        (name, value)
        for name, value in group.items()
        if isinstance(value, (bool, int, float)) or (isinstance(value, str) and _WORD.fullmatch(value))
    ]


_WORD = re.compile(r"[a-z0-9_]{1,32}")
_HUB_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def _model_name(model: str) -> str:
    """The name of a hub or pocket model; of a path no more than its last part, as those before name people."""
    is_hub_name = _HUB_NAME.fullmatch(model) and not model.startswith((".", "~")) and not Path(model).exists()
    return redact(model if is_hub_name or model.startswith(("pocket:", "cache:")) else Path(model).name)


def step_metrics(step: StepMetrics) -> dict[str, float]:
    """A step's numbers by the names that trackers group them by."""
    return {
        "train/loss": step.total,
        "train/kd": step.kd,
        "train/ce": step.ce,
        "train/learning_rate": step.learning_rate,
        "train/grad_norm": step.grad_norm,
        "train/tokens_per_second": step.tokens_per_second,
        "train/peak_memory_bytes": float(step.peak_memory),
    }


def validation_metrics(validation: Validation) -> dict[str, float]:
    """A validation's numbers."""
    found = validation.metrics
    return {
        "valid/loss": found.loss,
        "valid/kd": found.kd,
        "valid/ce": found.ce,
        "valid/kl": found.kl,
        "valid/top1_agreement": found.top1_agreement,
    }


def proof_metrics(proof: Proof) -> dict[str, Value]:
    """What a domain's proof comes to: each measure of each model, the share of the gap that was closed, the verdict."""
    told: dict[str, Value] = {"proof/outcome": proof.verdict.outcome}
    models = {"student": proof.student, "adapted": proof.adapted, "control": proof.control, "teacher": proof.teacher}
    for name, scores in models.items():
        if scores is None:
            continue
        found = {"kl": scores.kl, "perplexity": scores.perplexity, "top1_agreement": scores.top1_agreement}
        found["exact_match"] = scores.exact_match
        told |= {f"proof/{name}_{what}": each.value for what, each in found.items() if each is not None}
    if proof.gap_closed.kl is not None:
        told["proof/gap_closed"] = proof.gap_closed.kl.value
    return told
