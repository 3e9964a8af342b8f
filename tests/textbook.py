"""The losses as their papers write them, in float64 numpy: what the tests hold the code against.

`CASES` are the divergences of the registry, some of them several times, each with its definition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from true_kd.losses import DIVERGENCES, Divergence

Definition = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""The probabilities of teacher and student [..., vocab] to nats [...]."""


def log_softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities softened by a temperature; -inf stays -inf."""
    logits = logits.astype(np.float64) / temperature
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities softened by a temperature."""
    return np.exp(log_softmax(logits, temperature))


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q), with 0 log 0 = 0."""
    possible = p > 0
    ratio = np.where(possible, p, 1.0) / np.where(possible, q, 1.0)
    return np.where(possible, p * np.log(ratio), 0.0).sum(axis=-1)


def total_variation(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Half the sum of |p - q|."""
    return 0.5 * np.abs(p - q).sum(axis=-1)


def jensen_shannon(p: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    """Agarwal et al. (2024), equation 1."""
    middle = beta * p + (1 - beta) * q
    return beta * kl(p, middle) + (1 - beta) * kl(q, middle)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each position."""
    return -np.take_along_axis(log_softmax(logits), labels[..., None], axis=-1)[..., 0]


@dataclass(frozen=True)
class Case:
    """A divergence and what it is to be."""

    name: str
    divergence: Divergence
    definition: Definition

    def between(self, teacher: np.ndarray, student: np.ndarray, temperature: float) -> np.ndarray:
        """T^2 times the definition, of logits."""
        return temperature**2 * self.definition(softmax(teacher, temperature), softmax(student, temperature))


def _make(name: str, beta: float = 0.5, skew: float = 0.1) -> Case:
    definitions: Mapping[str, Definition] = {
        "forward_kl": kl,
        "reverse_kl": lambda p, q: kl(q, p),
        "jensen_shannon": lambda p, q: jensen_shannon(p, q, beta),
        "skewed_kl": lambda p, q: kl(p, skew * p + (1 - skew) * q),
        "skewed_reverse_kl": lambda p, q: kl(q, skew * q + (1 - skew) * p),
        "total_variation": total_variation,
    }
    return Case(name, DIVERGENCES[name](beta, skew), definitions[name])


CASES: Mapping[str, Case] = {
    "forward_kl": _make("forward_kl"),
    "reverse_kl": _make("reverse_kl"),
    "jensen_shannon 0.01": _make("jensen_shannon", beta=0.01),
    "jensen_shannon 0.2": _make("jensen_shannon", beta=0.2),
    "jensen_shannon 0.5": _make("jensen_shannon", beta=0.5),
    "jensen_shannon 0.9": _make("jensen_shannon", beta=0.9),
    "skewed_kl 0.1": _make("skewed_kl", skew=0.1),
    "skewed_kl 0.6": _make("skewed_kl", skew=0.6),
    "skewed_reverse_kl 0.1": _make("skewed_reverse_kl", skew=0.1),
    "skewed_reverse_kl 0.6": _make("skewed_reverse_kl", skew=0.6),
    "total_variation": _make("total_variation"),
}
SAMPLED = {name: case for name, case in CASES.items() if case.divergence.sampled}


def slope(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central finite differences of `function`."""
    at = at.astype(np.float64)
    found = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        found[index] = (function(up) - function(down)) / (2 * step)
    return found
