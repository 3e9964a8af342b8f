"""Numbers as the report writes them: as many digits as their interval supports, and a unit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from true_kd.evaluation import Estimate

_DECIMALS = 3
"""Of a KL or a perplexity, at most."""


@dataclass(frozen=True)
class Shown:
    """A measure in words."""

    value: str
    span: str = ""
    """Its interval, "0.026 to 0.038"; empty where it has none."""

    def __str__(self) -> str:
        return f"{self.value} ({self.span})" if self.span else self.value


MISSING = Shown("-")


def number(estimate: Estimate | None) -> Shown:
    """A KL, an nll or a perplexity: to three decimals, fewer where its interval is wide."""
    if estimate is None:
        return MISSING
    if estimate.value > 1e6:
        return Shown("over 10^6")
    digits = _digits(estimate)
    value = _fixed(estimate.value, digits)
    if estimate.low is None or estimate.high is None:
        return Shown(value)
    return Shown(value, _span(_fixed(estimate.low, digits), _fixed(estimate.high, digits)))


def share(estimate: Estimate | None) -> Shown:
    """A share in whole percent."""
    if estimate is None:
        return MISSING
    if estimate.low is None or estimate.high is None:
        return Shown(percent(estimate.value))
    ends = (percent(end).removesuffix("%") for end in (estimate.low, estimate.high))
    return Shown(percent(estimate.value), _span(*ends))


def points(estimate: Estimate | None) -> Shown:
    """A difference of shares, in points of a percent."""
    if estimate is None:
        return MISSING
    value = _whole(estimate.value)
    return Shown(f"{value} {'point' if value in ('1', '-1') else 'points'}", _whole_span(estimate))


def percent(value: float) -> str:
    """A share in whole percent; 0% and 100% only where they are exact."""
    if 0 < value < 0.005:
        return "<1%"
    if 0.995 <= value < 1:
        return ">99%"
    return f"{_whole(value)}%"


def cosine(value: float) -> str:
    """A cosine, to four decimals; 1 only where it is exact."""
    return ">0.9999" if 0.99995 <= value < 1 else f"{value:.4f}"


def ratio(value: float | None) -> str:
    """How many times: "2.7x", two digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}×" if value >= 10 else f"{value:.1f}×" if value >= 1 else f"{value:.2g}×"


def size(count: int | None) -> str:
    """Bytes, in powers of ten."""
    if count is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{_three(count / scale)} {unit}"
    return f"{count} bytes"


def amount(count: int | None) -> str:
    """How many parameters, or tokens."""
    if count is None:
        return "-"
    for unit, scale in (("billion", 1e9), ("million", 1e6)):
        if count >= scale:
            return f"{_three(count / scale)} {unit}"
    return f"{count:,}"


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def places(start: int, stop: int) -> str:
    """Places in a reply from `start` up to, but without, `stop`."""
    return str(start) if stop == start + 1 else f"{start}–{stop - 1}"


def _digits(estimate: Estimate) -> int:
    """Decimals that leave the half-width of the interval two digits."""
    if estimate.low is None or estimate.high is None or estimate.high <= estimate.low:
        return _DECIMALS
    half = (estimate.high - estimate.low) / 2
    return min(_DECIMALS, max(0, 1 - math.floor(math.log10(half))))


def _fixed(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    text = f"{value:,.{digits}f}"
    if float(text.replace(",", "")) != 0:
        return text
    # What rounds to nothing is not nothing.
    least = f"{10.0**-digits:.{digits}f}"
    return f"<{least}" if value > 0 else f">-{least}"


def _whole_span(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return _span(_whole(estimate.low), _whole(estimate.high))


def _span(low: str, high: str) -> str:
    """Two ends in words; nothing where they read the same."""
    return "" if low == high else f"{low} to {high}"


def _whole(value: float) -> str:
    return f"{round(100 * value):,d}"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
