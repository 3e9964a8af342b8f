"""What a run tells whoever watches it: the records that `pipeline.distill` yields, in the order of their happening."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from true_kd.alignment import Compatibility, MappedTargets
from true_kd.budget import BudgetChoice
from true_kd.capture import CaptureProgress
from true_kd.config import RunConfig
from true_kd.fidelity import Fidelity
from true_kd.gate import Headroom, ParentComparison
from true_kd.proof import Proof
from true_kd.ranking import Recommendation
from true_kd.reporting import DataCounts, KDResult, Validation
from true_kd.training import StepMetrics


@dataclass(frozen=True)
class TeacherOpening:
    """The teacher's weights are about to be loaded, or downloaded where they are not here yet."""

    model: str


@dataclass(frozen=True)
class TeacherBusy:
    """Another process captures from the same teacher: it is waited for, and not captured twice."""

    model: str
    holder: str


@dataclass(frozen=True)
class StudentUnknown:
    """The student's tokenizer is not here: targets are captured in the teacher's vocabulary."""

    domain: str
    why: str


@dataclass(frozen=True)
class BudgetChosen:
    """A budget on disk was turned into a threshold of the targets, from a few replies of the teacher."""

    choice: BudgetChoice


@dataclass(frozen=True)
class CacheDamaged:
    """A file of the cache was damaged or gone, and was dropped; what it held is captured again where it is wanted."""

    domain: str
    file: Path
    replies: int
    """That it held, of other domains included; 0 for a file without replies."""


@dataclass(frozen=True)
class Captured:
    """The teacher's replies to a domain's prompts, as far as they are."""

    domain: str
    progress: CaptureProgress
    is_probe: bool = False
    """Whether it is to a few held-out prompts, before all others."""


@dataclass(frozen=True)
class CaptureReused:
    """All of a domain's replies are in the cache already; the teacher is not needed."""

    domain: str
    replies: int


@dataclass(frozen=True)
class DomainCaptured:
    """All of a domain's targets are in the cache."""

    domain: str
    replies: int
    tokens: int
    cache_bytes: int
    """Of the files that hold them, whole."""
    bytes_per_token: float
    """Over those files."""
    folder: Path


@dataclass(frozen=True)
class Probed:
    """Teacher and student were compared, on a few held-out prompts or on all of them."""

    domain: str
    headroom: Headroom


@dataclass(frozen=True)
class TeacherFreed:
    """The teacher is gone from memory; `active_memory` bytes are still held."""

    active_memory: int


@dataclass(frozen=True)
class TrainingStarted:
    """A domain's student is open and its data is laid out."""

    domain: str
    iters: int
    data: DataCounts
    made: int = 0
    """Steps that an earlier run of this job made, and that this one goes on from."""
    config: RunConfig | None = None
    """Of the job."""
    run_digest: str = ""
    """The same for each part of a run that was stopped and goes on; see `jobs.Job.run_digest`."""


@dataclass(frozen=True)
class Certified:
    """The cached targets were measured against what the full distribution would give."""

    domain: str
    fidelity: Fidelity
    poor: bool


@dataclass(frozen=True)
class DivergenceCoarsened:
    """No sample of the teacher gives the run's divergence: the ids that are kept exactly are compared one by one, all
    others as one."""

    domain: str
    divergence: str
    tail_mass: float
    """Mean share of the distribution that is compared as one."""


@dataclass(frozen=True)
class CheckpointsReplaced:
    """Checkpoints in the domain's folder are of a run with other settings, prompts or models, and give way."""

    domain: str
    newest: int
    """The last iteration of theirs."""


@dataclass(frozen=True)
class CheckpointsDamaged:
    """Checkpoints of this run are not what was written, and are passed over."""

    domain: str
    damaged: tuple[str, ...]
    """Each with what is wrong with it, the newest first."""
    made: int
    """The iteration of the one that the run goes on from; 0 where it begins anew."""


@dataclass(frozen=True)
class AdapterDamaged:
    """What this run had finished is not what was written, and is distilled again."""

    domain: str
    folder: str
    damage: str


@dataclass(frozen=True)
class MemoryShort:
    """The longest example by itself is expected to take more than the budget of memory; it is tried all the same."""

    domain: str
    need: int
    """Bytes, the student's weights included."""
    weights: int
    """Bytes of the student's weights."""
    budget: int
    """Bytes."""
    recomputes: bool
    """Whether gradient checkpointing is on already."""


@dataclass(frozen=True)
class Stepped:
    """An optimizer step was applied."""

    domain: str
    step: StepMetrics


@dataclass(frozen=True)
class Validated:
    """The student was measured on the validation prompts."""

    domain: str
    validation: Validation


@dataclass(frozen=True)
class Proving:
    """Student, adapters and teacher are about to be compared on the held-out prompts."""

    domain: str
    prompts: int


@dataclass(frozen=True)
class DomainFinished:
    """A domain's adapter is in its folder; `result.unchanged` where it had been there already."""

    result: KDResult


@dataclass(frozen=True)
class Evaluated:
    """A domain's adapter was measured anew."""

    domain: str
    proof: Proof
    kept: bool
    """Whether it went into the domain's kd_metrics.json: not where the adapter is of other prompts or settings."""


@dataclass(frozen=True)
class DomainFailed:
    """A domain stopped with an error, and the run goes on with the next."""

    domain: str
    error: Exception
    """Without its traceback, whose frames would keep models in memory."""
    trace: str = ""
    """The traceback as text."""


@dataclass(frozen=True)
class CaptureFinished:
    """The last event of a run that captures only."""

    domains: tuple[str, ...]
    failures: Mapping[str, Exception]
    seconds: float


@dataclass(frozen=True)
class EvaluationFinished:
    """The last event of an evaluation."""

    proofs: Mapping[str, Proof]
    """By domain."""
    failures: Mapping[str, Exception]


@dataclass(frozen=True)
class ParentCompared:
    """A teacher was measured against its full-precision parent, on replies that it wrote itself."""

    domain: str
    parent: str
    replies: int


@dataclass(frozen=True)
class AnalysisFinished:
    """The last event of an analysis."""

    headrooms: Mapping[str, Headroom]
    """By domain, the most to gain first."""
    parents: Mapping[str, ParentComparison]
    tokenizers: Mapping[str, tuple[Compatibility, MappedTargets]]
    """Of domains whose teacher and student have different ones: how they go together."""
    failures: Mapping[str, Exception]


@dataclass(frozen=True)
class PointStarted:
    """The next setting of a sweep."""

    point: str
    number: int
    """Counted from 1."""
    total: int


@dataclass(frozen=True)
class SweepFinished:
    """The last event of a sweep."""

    recommendations: tuple[Recommendation, ...]
    """One a domain."""
    failures: Mapping[str, Exception]
    """By domain and point."""
    table: Path
    """The file with all rows."""


@dataclass(frozen=True)
class RunFinished:
    """All domains are done; the summary is written."""

    results: tuple[KDResult, ...]
    failures: Mapping[str, Exception]
    summary: Path
    seconds: float
    report: Path | None = None
    """The page for people, where one is wanted."""


Event = (
    TeacherOpening
    | TeacherBusy
    | StudentUnknown
    | BudgetChosen
    | CacheDamaged
    | Captured
    | DomainCaptured
    | CaptureReused
    | Probed
    | TeacherFreed
    | TrainingStarted
    | Certified
    | DivergenceCoarsened
    | CheckpointsReplaced
    | CheckpointsDamaged
    | AdapterDamaged
    | MemoryShort
    | Stepped
    | Validated
    | Proving
    | DomainFinished
    | Evaluated
    | EvaluationFinished
    | ParentCompared
    | AnalysisFinished
    | PointStarted
    | SweepFinished
    | DomainFailed
    | CaptureFinished
    | RunFinished
)
