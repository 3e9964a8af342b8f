"""What distilling one domain gave, as Python sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from true_kd.alignment import MappedTargets
from true_kd.evaluation import EvalMetrics
from true_kd.fidelity import Fidelity
from true_kd.options import record
from true_kd.proof import Proof
from true_kd.training import StepMetrics


@record
class Validation:
    """The student on the validation prompts after an iteration (0: before training)."""

    iteration: int
    """The steps that were made before."""
    metrics: EvalMetrics
    """Over the response tokens of the validation prompts."""


@record
class DataCounts:
    """What a domain was trained and validated on."""

    train_examples: int
    """Prompts with their replies."""
    valid_examples: int
    """Those held out."""
    train_response_tokens: int
    """Tokens that count in the loss, once through the data."""
    train_tokens: int
    """Prompt and response tokens, once through the data."""
    truncated: int
    """Examples, training and held out, whose response was cut at training.max_seq_length."""
    dropped: int
    """Examples of both kinds left out: prompt too long, or a reply that the student's vocabulary cannot write."""
    cut_replies: int
    """Replies of all prompts, those left out included, that reached capture.max_tokens without ending."""
    differing_ids: int
    """Ids that stand for different tokens in teacher and student; 0 under vocab_strategy match."""
    cache_bytes: int
    """Size of the cache files that hold the domain's targets."""
    cache_tokens: int = 0
    """Response tokens in those files, of other domains as well where they share one."""
    mapped: MappedTargets | None = None
    """Where teacher and student have different tokenizers: how the targets came into the student's vocabulary."""


@record
class KDResult:
    """What distilling one domain gave. Losses in nats per response token, memory in bytes, time in seconds."""

    domain: str
    teacher: str
    student: str
    adapter_path: str
    data: DataCounts
    before: EvalMetrics
    after: EvalMetrics
    """With the weights of `best_iteration`, which are those that were kept."""
    best_iteration: int
    steps: tuple[StepMetrics, ...]
    validations: tuple[Validation, ...]
    seconds: Mapping[str, float]
    """Per phase: capture, training, evaluation, and control where there is one. Capture counts what this run captured,
    not what the cache held."""
    capture_peak_memory: int
    training_peak_memory: int
    trainable_parameters: int
    finished_at: str
    fidelity: Fidelity | None = None
    """What the cached targets kept of the teacher; None for a control, which takes nothing from them."""
    proof: Proof | None = None
    """Whether it helped; None for a control, which is measured in the proof of its domain."""
    unchanged: bool = False
    """True when the result is that of an earlier run that this one had no need to repeat."""
    versions: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        # The fields hold every step of the run: 7,000 characters after four of them.
        return (
            f"{type(self).__name__}(domain={self.domain!r}, kl={self.before.kl:.4f} -> {self.after.kl:.4f}, "
            f"best_iteration={self.best_iteration}, adapter_path={self.adapter_path!r})"
        )

    def _repr_markdown_(self) -> str:
        """What a notebook shows of it: the held-out measures before and after, and the verdict."""
        rows = [
            ("KL to the teacher, nats", f"{self.before.kl:.4f}", f"{self.after.kl:.4f}"),
            ("−log p of the text, nats", f"{self.before.ce:.4f}", f"{self.after.ce:.4f}"),
            ("top-1 agreement", f"{self.before.top1_agreement:.1%}", f"{self.after.top1_agreement:.1%}"),
        ]
        head = f"**{self.domain}**: {self.after.tokens:,} held-out tokens, iteration {self.best_iteration}"
        table = ["| | before | after |", "|---|---|---|", *(f"| {name} | {old} | {new} |" for name, old, new in rows)]
        said = [] if self.proof is None else ["", self.proof.verdict.sentence]
        return "\n".join([head, "", *table, *said, "", f"`{self.adapter_path}`"])
