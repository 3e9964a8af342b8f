"""A reply token by token, shaded by its distance to the teacher before and after."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from true_kd.proof import Sample

LEVELS = (0.03, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0)
"""KL in nats at which each shade begins. Below the first a token is bare."""


@dataclass(frozen=True)
class Token:
    """One token on the page."""

    text: str
    """What it adds to the reply; line ends are shown."""
    title: str
    """Its numbers in words."""
    before: str
    """Class of its shade, k0 to k7, or "unknown"."""
    after: str


@dataclass(frozen=True)
class Shaded:
    """A sample, ready to be shown."""

    tokens: tuple[Token, ...]
    before: float | None
    """Mean KL of the tokens shown; None where none is known."""
    after: float | None


def shade(sample: Sample) -> Shaded:
    """The tokens of a sample with their shades."""
    return Shaded(
        tokens=tuple(
            Token(piece.replace("\n", "↵\n"), _title(piece, before, after), _level(before), _level(after))
            for piece, before, after in zip(sample.pieces, sample.student, sample.adapted, strict=True)
        ),
        before=_mean(sample.student),
        after=_mean(sample.adapted),
    )


def _title(piece: str, before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "no target was kept here"
    part = "" if piece else "a part of the letter before; "
    return f"{part}KL {before:.3f} before, {after:.3f} after"


def _level(kl: float | None) -> str:
    return "unknown" if kl is None else f"k{bisect.bisect_right(LEVELS, kl)}"


def _mean(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
