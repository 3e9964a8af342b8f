"""Divergences between the teacher's distribution p and the student's q at a token, one class each.

Each is an f-divergence and is written as the sum over ids of `p * terms(log q - log p)`, in a form in which every id
that the teacher all but excludes adds next to nothing: `p * terms` tends to 0 with p whatever q is there. A sample of
the teacher's entries, each weighed by one over its chance of being drawn, then gives it without bias (but for the
rounding of what the cache stores), with no weight beyond bounds; `sampled` is False where there is no such form. All
are zero, entry by entry, where q = p.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import mlx.core as mx
from jaxtyping import Float

_EXTREME = 80.0
"""Gaps beyond this, in nats, are taken for it where they are exponentiated: exp(88) is the end of float32."""

LEAST_LOGPROB = -87.0
"""Of the teacher, where it is divided by: less has no probability in float32."""


class Divergence(ABC):
    """How far the student is from the teacher at one token."""

    sampled: ClassVar[bool]
    """Whether a sample of the teacher's entries gives it without bias."""

    @abstractmethod
    def weigh(
        self,
        gaps: Float[mx.array, "*tokens entries"],
        theirs: Float[mx.array, "*tokens entries"],
        ours: Float[mx.array, "*tokens entries"],
    ) -> tuple[Float[mx.array, "*tokens entries"], Float[mx.array, "*tokens entries"]]:
        """What each entry adds, nats, and the derivative of that with respect to its gap.

        Parameters
        ----------
        gaps
            log q - log p.
        theirs
            p, or what stands for it: the weight of an entry that was drawn.
        ours
            q.
        """


class SampledDivergence(Divergence):
    """A divergence that adds up from terms which a sample of the teacher's entries gives without bias."""

    sampled = True

    def weigh(
        self,
        gaps: Float[mx.array, "*tokens entries"],
        theirs: Float[mx.array, "*tokens entries"],
        ours: Float[mx.array, "*tokens entries"],
    ) -> tuple[Float[mx.array, "*tokens entries"], Float[mx.array, "*tokens entries"]]:
        """`theirs` times the terms; an entry that weighs nothing adds nothing, however extreme its gap."""
        gaps = mx.where(theirs != 0, gaps, 0.0)
        (terms,), (slopes,) = mx.vjp(self.terms, [gaps], [theirs])
        return theirs * terms, slopes

    @abstractmethod
    def terms(self, gap: Float[mx.array, "*tokens entries"]) -> Float[mx.array, "*tokens entries"]:
        """What each entry adds per unit of the teacher's probability, nats, given `gap` = log q - log p."""


@dataclass(frozen=True)
class ForwardKL(SampledDivergence):
    """KL(p || q): the student covers all that the teacher does. Hinton et al. (2015), arXiv:1503.02531."""

    def terms(self, gap: Float[mx.array, "*tokens entries"]) -> Float[mx.array, "*tokens entries"]:
        """-log(q / p)."""
        return -gap


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q || p): the student avoids what the teacher avoids. Gu et al. (2024), arXiv:2306.08543.

    An id weighs more the less the teacher thinks of it, which is where a sample has nothing.
    """

    sampled = False

    def weigh(
        self,
        gaps: Float[mx.array, "*tokens entries"],
        theirs: Float[mx.array, "*tokens entries"],
        ours: Float[mx.array, "*tokens entries"],
    ) -> tuple[Float[mx.array, "*tokens entries"], Float[mx.array, "*tokens entries"]]:
        """q log(q / p) - q + p; the last two add up to nothing, and keep each entry above zero."""
        slopes = ours * gaps
        return slopes - ours + theirs, slopes


@dataclass(frozen=True)
class JensenShannon(SampledDivergence):
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. Agarwal et al. (2024), arXiv:2306.13649.

    At beta = 0.5 at most log 2; divided by beta it tends to KL(p || q) for small beta, and by 1 - beta to KL(q || p)
    for beta near 1.
    """

    beta: float

    def terms(self, gap: Float[mx.array, "*tokens entries"]) -> Float[mx.array, "*tokens entries"]:
        """The definition less c (x - 1), x = q / p and c = -(1 - beta) log(1 - beta), which adds up to nothing."""
        beta, rest = self.beta, 1.0 - self.beta
        gap = mx.clip(gap, -_EXTREME, _EXTREME)
        ratio = mx.exp(gap)
        of_teacher = -beta * mx.log(beta + rest * ratio)
        of_student = -rest * ratio * mx.log1p((beta / rest) * mx.exp(-gap))
        return of_teacher + of_student - rest * math.log(rest)


@dataclass(frozen=True)
class SkewedKL(SampledDivergence):
    """KL(p || skew p + (1 - skew) q): forward KL without its infinite wall. Ko et al. (2024), arXiv:2402.03898."""

    skew: float

    def terms(self, gap: Float[mx.array, "*tokens entries"]) -> Float[mx.array, "*tokens entries"]:
        """-log(skew + (1 - skew) q / p)."""
        return -mx.log(self.skew + (1.0 - self.skew) * mx.exp(mx.minimum(gap, _EXTREME)))


@dataclass(frozen=True)
class SkewedReverseKL(SampledDivergence):
    """KL(q || skew q + (1 - skew) p): reverse KL that a sample can give. Ko et al. (2024), arXiv:2402.03898."""

    skew: float

    def terms(self, gap: Float[mx.array, "*tokens entries"]) -> Float[mx.array, "*tokens entries"]:
        """The definition less c (x - 1), x = q / p and c = -log(skew), which adds up to nothing."""
        gap = mx.clip(gap, -_EXTREME, _EXTREME)
        return -mx.exp(gap) * mx.log1p(((1.0 - self.skew) / self.skew) * mx.exp(-gap)) - math.log(self.skew)


@dataclass(frozen=True)
class TotalVariation(SampledDivergence):
    """Half the sum of |p - q|, at most 1. Wen et al. (2023), arXiv:2307.15190."""

    def terms(self, gap: Float[mx.array, "*tokens entries"]) -> Float[mx.array, "*tokens entries"]:
        """max(1 - q / p, 0): what p has above q is half of all that they differ by."""
        return mx.maximum(1.0 - mx.exp(mx.minimum(gap, _EXTREME)), 0.0)


DivergenceName = Literal[
    "forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl", "skewed_reverse_kl", "total_variation"
]

DIVERGENCES: Mapping[DivergenceName, Callable[[float, float], Divergence]] = {
    "forward_kl": lambda beta, skew: ForwardKL(),
    "reverse_kl": lambda beta, skew: ReverseKL(),
    "jensen_shannon": lambda beta, skew: JensenShannon(beta),
    "skewed_kl": lambda beta, skew: SkewedKL(skew),
    "skewed_reverse_kl": lambda beta, skew: SkewedReverseKL(skew),
    "total_variation": lambda beta, skew: TotalVariation(),
}
"""Each divergence by name, made from `losses.beta` and `losses.skew`."""
