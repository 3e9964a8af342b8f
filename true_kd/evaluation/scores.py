"""A model against the teacher, token by token, over the response tokens of held-out examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int

from true_kd.batching import collate
from true_kd.examples import Example
from true_kd.losses import ForwardKL, Objective, chunks, token_losses
from true_kd.models import split_head
from true_kd.options import record


@record
class EvalMetrics:
    """A model against the teacher, means over the response tokens of held-out examples."""

    loss: float
    """The training objective, nats."""
    kd: float
    """T^2 times the divergence at the loss temperature, nats."""
    ce: float
    """Cross-entropy on the teacher's text, nats per token; exp of it is the perplexity."""
    kl: float
    """KL(teacher || student) at temperature 1, nats."""
    top1_agreement: float
    """Share of tokens at which model and teacher find the same token most likely."""
    tokens: int
    """Response tokens that count."""

    @property
    def is_finite(self) -> bool:
        """Whether all means are finite numbers."""
        return all(math.isfinite(value) for value in (self.loss, self.kd, self.ce, self.kl))


@dataclass(frozen=True)
class TokenScores:
    """A model against the teacher at each of the T response tokens that count, in the order of the examples."""

    kd: Float[np.ndarray, " tokens"]
    """T^2 times the divergence of the objective, nats."""
    nll: Float[np.ndarray, " tokens"]
    """-log of the probability that the model gives to the token of the text, nats."""
    kl: Float[np.ndarray, " tokens"]
    """KL(teacher || model) at temperature 1, nats; from sampled targets an estimate, which may be below zero."""
    rank: Int[np.ndarray, " tokens"]
    """How many ids the model finds more likely than the teacher's most likely one."""
    example: Int[np.ndarray, " tokens"]
    """Which example the token is of."""
    position: Int[np.ndarray, " tokens"]
    """Its place in the response, counted from 0."""

    def metrics(self, objective: Objective) -> EvalMetrics:
        """The means."""
        kd, ce, kl = (float(np.mean(values)) for values in (self.kd, self.nll, self.kl))
        loss = objective.alpha * kd + (1 - objective.alpha) * ce
        return EvalMetrics(loss, kd, ce, kl, float(np.mean(self.rank < 1)), len(self.kl))

    def sums(self, values: np.ndarray) -> Float[np.ndarray, " examples"]:
        """Sums over the tokens of each example."""
        return np.bincount(self.example, values, minlength=int(self.example[-1]) + 1)


def evaluate(student: nn.Module, examples: Sequence[Example], objective: Objective, batch_size: int) -> EvalMetrics:
    """Measure a model on examples. Leaves it in evaluation mode."""
    return measure(student, examples, objective, batch_size).metrics(objective)


def measure(student: nn.Module, examples: Sequence[Example], objective: Objective, batch_size: int) -> TokenScores:
    """Measure a model on each counted token of some examples. Leaves it in evaluation mode."""
    student.eval()
    split = split_head(student)
    order = sorted(range(len(examples)), key=lambda index: len(examples[index]))
    plainly = replace(objective, divergence=ForwardKL(), temperature=1.0)
    found: list[np.ndarray] = []
    for start in range(0, len(order), batch_size):
        group = [examples[index] for index in order[start : start + batch_size]]
        soft, plain = collate(group, objective.temperature), collate(group, 1.0)
        states = split.states_at(soft.tokens, soft.rows)
        for rows in chunks(split.head, states, objective):
            logits, labels = split.head(states[rows]), soft.labels[rows]
            teacher = plain.targets.rows(rows.start, rows.stop)
            kd, ce = token_losses(logits, labels, soft.targets.rows(rows.start, rows.stop), objective)
            kl, _ = token_losses(logits, labels, teacher, plainly)
            favourite = mx.take_along_axis(logits, teacher.best()[:, None], axis=-1)
            rank = mx.sum(logits > favourite, axis=-1)
            found.append(np.array(mx.stack([kd, ce, kl, rank.astype(mx.float32)]), dtype=np.float64))
    # Measured in the order of their lengths: back into that of the examples.
    measured = np.concatenate([np.full(len(examples[index].kept), index) for index in order])
    back = np.argsort(measured, kind="stable")
    kd, ce, kl, rank = np.concatenate(found, axis=1)[:, back]
    return TokenScores(
        kd=kd,
        nll=ce,
        kl=kl,
        rank=rank.astype(np.int64),
        example=measured[back],
        position=np.concatenate([example.kept for example in examples]).astype(np.int64),
    )
