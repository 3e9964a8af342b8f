"""The objective's options, and what they come to at a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
from pydantic import Field

from true_kd.losses.divergences import DIVERGENCES, Divergence, DivergenceName
from true_kd.options import Fraction, Options, Temperature

_CHUNK_BYTES = {"cpu": 30_000_000, "gpu": 128_000_000}
"""Of one chunk of logits, float32, where the options do not say. On a CPU they stay below the 32 MB from which on glibc
takes fresh pages from the kernel each time: at 151,936 ids elementwise passes took 0.04 ms a token for 32 tokens,
and 0.32 for 64. On a GPU it is a guess that keeps the matrix products large."""


WeighBy = Literal["none", "entropy", "certainty", "reward"]


@dataclass(frozen=True)
class Objective:
    """The losses of one step, every choice made."""

    divergence: Divergence
    temperature: float
    alpha: float | mx.array
    """Where a step is compiled, its argument, so that a schedule does not compile it again."""
    chunk: int | None


class LossOptions(Options):
    """The objective: alpha * T^2 * divergence(teacher, student) + (1 - alpha) * cross-entropy."""

    divergence: DivergenceName = "forward_kl"
    """What the KD term measures: forward_kl, reverse_kl, jensen_shannon, skewed_kl, skewed_reverse_kl or
    total_variation."""
    temperature: Temperature = 2.0
    """Softens teacher and student in the KD term, which is scaled by its square (Hinton et al., 2015)."""
    temperature_end: Temperature | None = None
    """Temperature of the last step, reached along a line; null where it stays."""
    alpha: Fraction = 0.7
    """Weight of the KD term; 1 - alpha weighs cross-entropy on the teacher's text."""
    alpha_end: Fraction | None = None
    """Weight of the KD term at the last step, reached along a line; null where it stays."""
    beta: float = Field(default=0.5, ge=0.01, le=0.99)
    """Of jensen_shannon: near 0 it behaves like forward KL, near 1 like reverse KL."""
    skew: float = Field(default=0.1, ge=0.01, le=0.99)
    """Of skewed_kl and skewed_reverse_kl: how much of the one distribution is mixed into the other."""
    weigh_by: WeighBy = "none"
    """What each token weighs: all the same, more where the teacher is unsure (its entropy) or sure (1 / (1 + entropy)),
    or by the `reward` of its prompt's record. On average over the training data a token weighs 1."""
    chunk: int | None = Field(default=None, ge=16)
    """Response tokens that pass the output head at a time: memory of the loss is a few times chunk by vocabulary;
    null for as many as make 30 MB of logits on a CPU and 128 MB on a GPU."""

    def at(self, progress: float) -> Objective:
        """The objective at a share of the run, from 0 at the first step to 1 at the last."""
        return Objective(
            divergence=DIVERGENCES[self.divergence](self.beta, self.skew),
            temperature=_between(self.temperature, self.temperature_end, progress),
            alpha=_between(self.alpha, self.alpha_end, progress),
            chunk=self.chunk,
        )

    @property
    def final(self) -> Objective:
        """The objective that the run ends on, which validation measures throughout."""
        return self.at(1.0)

    @property
    def distils(self) -> bool:
        """Whether anything is taken from the teacher's distribution."""
        return max(self.alpha, self.alpha_end or 0.0) > 0

    @property
    def hottest(self) -> float:
        """The highest temperature of the run."""
        return max(self.temperature, self.temperature_end or 0.0)


def _between(start: float, end: float | None, progress: float) -> float:
    return start if end is None else start * (1.0 - progress) + end * progress


def chunk_rows(chunk: int | None, vocab: int) -> int:
    """Response tokens in a chunk of `head_losses`, with a vocabulary of that size."""
    device = "cpu" if mx.default_device() == mx.Device(mx.cpu) else "gpu"
    return chunk or max(16, _CHUNK_BYTES[device] // (4 * vocab) // 16 * 16)
