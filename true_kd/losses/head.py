"""The losses of response tokens through the student's output head, chunk by chunk.

Owns the rule that a loss is a sum over tokens: the division by the number of tokens of a whole optimizer step happens
once, outside. The gradient with respect to the hidden states is formed in the same pass, so that no array of tokens
by vocabulary outlives a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int
from mlx.utils import tree_flatten, tree_map

from true_kd.losses.distributions import BatchTargets, Comparison, Softened, TokenTargets
from true_kd.losses.divergences import ForwardKL
from true_kd.losses.options import Objective, chunk_rows

Head = Callable[[mx.array], mx.array]
"""Hidden states [tokens, width] to logits [tokens, vocab]."""


@dataclass(frozen=True)
class LossSums:
    """Sums over tokens, each times its weight; nats."""

    total: mx.array
    """alpha * kd + (1 - alpha) * ce."""
    kd: mx.array
    """T^2 times the divergence."""
    ce: mx.array

    @classmethod
    def zero(cls) -> LossSums:
        """Of no tokens."""
        return cls(mx.array(0.0), mx.array(0.0), mx.array(0.0))

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(self.total + other.total, self.kd + other.kd, self.ce + other.ce)


def head_losses(
    head: Head,
    hidden: Float[mx.array, "rows width"],
    labels: Int[mx.array, " rows"],
    targets: BatchTargets,
    weights: Float[mx.array, " rows"],
    objective: Objective,
    trained: nn.Module | None = None,
) -> tuple[LossSums, Float[mx.array, "rows width"], dict]:
    """Sums of the weighted losses, and the gradient of `total` with respect to the hidden states.

    Parameters
    ----------
    trained
        the layer that `head` reads, where it has trainable parameters of its own.

    Returns
    -------
    sums, states, parameters
        the last is the gradient of the trained layer's parameters, a tree as theirs; empty where there are none.
    """
    own = trained.trainable_parameters() if trained is not None else {}
    sums, parts, parameters = LossSums.zero(), [], {}

    def surrogate(inputs: dict) -> tuple[mx.array, LossSums]:
        """Its gradient is the slope of the losses, drawn through the head; its value means nothing."""
        if trained is not None:
            trained.update(inputs["own"])
        logits = head(inputs["states"]).astype(mx.float32)
        part, slope = _losses_and_slope(
            mx.stop_gradient(logits), labels[rows], targets.rows(rows.start, rows.stop), weights[rows], objective
        )
        return mx.sum(logits * slope), part

    for rows in chunks(head, hidden, objective):
        states = hidden[rows]
        if parts:
            # All chunks are one lazy graph; a chunk that waits for the one before it never shares memory with it.
            before = [parts[-1], sums.total, sums.kd, sums.ce, *(leaf for _, leaf in tree_flatten(parameters))]
            (states,) = mx.depends([states], before)
        (_, part), gradient = mx.value_and_grad(surrogate)({"states": states, "own": own})
        parts.append(gradient["states"])
        parameters = tree_map(mx.add, parameters, gradient["own"]) if parameters else gradient["own"]
        sums = sums + part
    if trained is not None:
        trained.update(own)
    return sums, mx.concatenate(parts, axis=0), parameters


def chunks(head: Head, hidden: mx.array, objective: Objective) -> Iterator[slice]:
    """Slices of the rows of `hidden`, as many at a time as may pass the head together."""
    # Lazy: the shape alone is asked for.
    size = chunk_rows(objective.chunk, head(hidden[:1]).shape[-1])
    for start in range(0, len(hidden), size):
        yield slice(start, min(start + size, len(hidden)))


def token_losses(
    logits: Float[mx.array, "rows vocab"], labels: Int[mx.array, " rows"], targets: BatchTargets, objective: Objective
) -> tuple[Float[mx.array, " rows"], Float[mx.array, " rows"]]:
    """T^2 times the divergence, and cross-entropy at temperature 1, of each token; nats."""
    _, kd, _, ce = _compare(logits.astype(mx.float32), labels, targets, objective)
    return objective.temperature**2 * kd.values, ce.values


def _losses_and_slope(
    logits: mx.array, labels: mx.array, targets: BatchTargets, weights: mx.array, objective: Objective
) -> tuple[LossSums, mx.array]:
    """The sums of a chunk, and the slope of their total with respect to its logits."""
    alpha, temperature = objective.alpha, objective.temperature
    soft, kd, plain, ce = _compare(logits, labels, targets, objective)
    kd_sum = temperature**2 * mx.sum(weights * kd.values)
    ce_sum = mx.sum(weights * ce.values)
    kd_scale, ce_scale = (alpha * temperature) * weights[:, None], (1 - alpha) * weights[:, None]
    slope = soft.powers * (kd.pull * kd_scale / soft.sums) + plain.powers * (ce.pull * ce_scale / plain.sums)
    slope = ce.add_entries(kd.add_entries(slope, kd_scale), ce_scale)
    return LossSums(alpha * kd_sum + (1 - alpha) * ce_sum, kd_sum, ce_sum), slope


def _compare(
    logits: mx.array, labels: mx.array, targets: BatchTargets, objective: Objective
) -> tuple[Softened, Comparison, Softened, Comparison]:
    soft, plain = Softened.both(logits, objective.temperature)
    kd = targets.compare(soft, objective.divergence)
    return soft, kd, plain, TokenTargets.of_labels(labels).compare(plain, ForwardKL())
