"""The number formats of the stored targets: log-probabilities in a byte (of drawn ids 6 bits), tail sums in 10 bits."""

from __future__ import annotations

import numpy as np

LOGPROB_BITS = 8
DRAWN_BITS = 6
"""Of drawn ids, whose log-probability reweighs them for other temperatures and enters the values of divergences, but
not the gradient of forward KL at the draw temperature."""
_DROPPED = LOGPROB_BITS - DRAWN_BITS
LEAST_LOGPROB = -40.0
"""Log-probabilities below this are stored as this."""

TAIL_BITS = 10
_TAIL_LOW, _TAIL_HIGH = -20.0, 13.0  # 13 nats: the logarithm of 440,000 ids, each of weight 1
_TAIL_STEP = (_TAIL_HIGH - _TAIL_LOW) / (2**TAIL_BITS - 1)

# Steps grow with the square root of -log p: probabilities around 0.99 are right to 0.0025, around 0.5 to 0.01, around
# 0.001 to 7 %. Even steps would spend the byte on the small ones, which weigh little.
_SPAN = 2**LOGPROB_BITS - 1
LOGPROBS = LEAST_LOGPROB * (np.arange(_SPAN + 1) / _SPAN) ** 2
"""float64 [256], the log-probability of each code, nats."""


def logprob_codes(logprobs: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """uint8 codes of log-probabilities (nats), the nearest there are: of drawn ids among every fourth."""
    share = np.clip(logprobs / LEAST_LOGPROB, 0.0, 1.0)
    step = np.where(exact, 1, 1 << _DROPPED)
    codes = np.rint(np.sqrt(share) * _SPAN / step) * step
    return np.minimum(codes, _SPAN + 1 - step).astype(np.uint8)


def to_drawn(codes: np.ndarray) -> np.ndarray:
    """The DRAWN_BITS that are stored of a drawn id's code."""
    return codes >> _DROPPED


def from_drawn(stored: np.ndarray) -> np.ndarray:
    """The code of a drawn id, uint8."""
    return (stored << _DROPPED).astype(np.uint8)


def tail_codes(logs: np.ndarray) -> np.ndarray:
    """uint16 codes of the logarithms of tail sums; half a step is 1.6 % of the sum."""
    return np.rint((np.clip(logs, _TAIL_LOW, _TAIL_HIGH) - _TAIL_LOW) / _TAIL_STEP).astype(np.uint16)


def tail_logs(codes: np.ndarray) -> np.ndarray:
    """float64 logarithms of tail sums."""
    return _TAIL_LOW + codes * _TAIL_STEP
