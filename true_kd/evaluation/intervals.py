"""How sure a measure is: intervals over the held-out prompts, by the bootstrap.

The unit that is drawn again is the prompt, not the token: tokens of one reply go right and wrong together. All that is
compared is measured on the same prompts and resampled together, so that a difference is as sure as it is, not as its
two sides are. The intervals are bias-corrected and accelerated (BCa; Efron, 1987, J. Am. Stat. Assoc. 82:171). They
say what other prompts of this kind would change, not what another training seed would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import NormalDist

import numpy as np

from true_kd.options import record

CONFIDENCE = 0.95
"""Of every interval: the share of such intervals that hold the true value."""

RESAMPLES = 2000
"""Draws of all prompts with replacement: the ends of an interval then move by a hundredth of its width or two."""

FEWEST = 5
"""Prompts from which on an interval is given: of fewer the bootstrap knows too little to say how little it knows."""

_NORMAL = NormalDist()
_CHUNK = 2**22


@record
class Estimate:
    """A measure and its interval, at `CONFIDENCE`."""

    value: float
    """Over all held-out prompts."""
    low: float | None = None
    """The lower end; null, as the upper one, where there are fewer than five prompts (but for shares of tasks)."""
    high: float | None = None
    """The upper end."""


Statistic = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""A measure, given the sums of each column over some prompts: all arguments and the result are arrays of one shape."""


class Resampled:
    """Sums over prompts of some columns, and the same over many draws of as many prompts with replacement."""

    def __init__(self, columns: Mapping[str, np.ndarray], seed: int = 0) -> None:
        """`columns` hold a number for each prompt; the same seed always draws the same prompts."""
        names, table = list(columns), np.stack([np.asarray(column, dtype=np.float64) for column in columns.values()])
        self.count = table.shape[1]
        """Prompts."""
        rng = np.random.default_rng([seed, self.count])
        step = max(1, _CHUNK // self.count)
        even = np.full(self.count, 1.0 / self.count)
        drawn = [
            table @ rng.multinomial(self.count, even, size=min(step, RESAMPLES - at)).T
            for at in range(0, RESAMPLES, step)
        ]
        whole = table.sum(axis=1)
        self._whole = dict(zip(names, whole, strict=True))
        self._drawn = dict(zip(names, np.concatenate(drawn, axis=1), strict=True))
        self._without_one = dict(zip(names, whole[:, None] - table, strict=True))

    def total(self, column: str) -> float:
        """The sum of a column over all prompts."""
        return float(self._whole[column])

    def estimate(self, statistic: Statistic) -> Estimate | None:
        """The measure over all prompts with its interval; None where it has no finite value."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            value = float(statistic(self._whole))
            drawn = np.sort(statistic(self._drawn))
            without = statistic(self._without_one)
        if not np.isfinite(value):
            return None
        if self.count < FEWEST or not (np.isfinite(drawn).all() and np.isfinite(without).all()):
            return Estimate(value)
        return Estimate(value, *_interval(value, drawn, without))

    def sureness(self, statistic: Statistic) -> float | None:
        """Share of the draws in which a measure is above zero; half of those in which it is zero count.

        None where there are fewer than five prompts.
        """
        if self.count < FEWEST:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = statistic(self._drawn)
        return float(np.mean(drawn > 0) + np.mean(drawn == 0) / 2)


def _interval(value: float, drawn: np.ndarray, without: np.ndarray) -> tuple[float, float]:
    """The ends, from the sorted measures over draws and those that leave out one prompt each."""
    below = (np.count_nonzero(drawn < value) + np.count_nonzero(drawn == value) / 2) / len(drawn)
    shift = _NORMAL.inv_cdf(min(max(below, 1 / (len(drawn) + 1)), len(drawn) / (len(drawn) + 1)))
    apart = without.mean() - without
    squares = float(np.sum(apart**2))
    bend = float(np.sum(apart**3)) / (6 * squares**1.5) if squares > 0 else 0.0

    def end(level: float) -> float:
        reach = shift + _NORMAL.inv_cdf(level)
        return float(np.quantile(drawn, _NORMAL.cdf(shift + reach / max(1 - bend * reach, 1e-9))))

    tail = (1 - CONFIDENCE) / 2
    return end(tail), end(1 - tail)


def share_estimate(right: np.ndarray) -> Estimate:
    """A share of right answers (bool [tasks]) with Wilson's interval, which no answer right does not shrink to a point.

    Wilson (1927), J. Am. Stat. Assoc. 22:209.
    """
    count, share = len(right), float(np.mean(right))
    z = _NORMAL.inv_cdf(1 - (1 - CONFIDENCE) / 2)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return Estimate(share, float(max(middle - reach, 0.0)), float(min(middle + reach, 1.0)))
