"""The training loop: a generator that yields one `StepMetrics` per optimizer step.

The caller logs, validates, saves or stops; nothing here writes a file or prints. The gradient of a step is the sum
over the response tokens of all its micro-batches divided, once, by their number: accumulating over micro-batches
equals the large batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map
from pydantic import Field

from true_kd.batching import Batch, BatchOptions, batch_indices, collate
from true_kd.errors import TrueKDError
from true_kd.examples import Example
from true_kd.losses import LossOptions, LossSums, dense_losses, head_losses
from true_kd.models import Split, split_head, trainable
from true_kd.options import Fraction, PositiveInt


class TrainingOptions(BatchOptions):
    """The optimisation."""

    iters: PositiveInt = 200
    """Optimizer steps."""
    learning_rate: float = Field(default=1e-4, gt=0.0, le=1.0)
    """Peak learning rate of Adam."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up, fall to a tenth of the peak along a cosine, or stay."""
    warmup: Fraction = 0.05
    """Share of the steps over which the learning rate rises from zero."""
    accumulate: PositiveInt = 1
    """Micro-batches per optimizer step."""
    grad_clip: float = Field(default=1.0, ge=0.0)
    """Largest norm of the gradient; 0 switches clipping off."""
    validate_every: PositiveInt = 50
    """Steps between validations; the last step is always validated."""
    checkpoint_every: PositiveInt = 100
    """Steps between checkpoints."""


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step. Losses are means over the step's response tokens, nats, `kd` with its T^2."""

    iteration: int
    """Counted from 1."""
    total: float
    kd: float
    ce: float
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    response_tokens: int
    padded_tokens: int
    """What the body computed: prompt, response and padding."""
    seconds: float
    tokens_per_second: float
    """Prompt and response tokens by time; padding does not count."""
    peak_memory: int
    """Bytes, the largest since the phase began."""


class NonFinite(TrueKDError):
    """The loss or the gradient of a step is NaN or infinite; the step was not applied."""

    def __init__(self, iteration: int, what: str) -> None:
        self.iteration = iteration
        self.what = what
        super().__init__(f"iteration {iteration}: {what} is not a finite number.")


def learning_rate_at(iteration: int, options: TrainingOptions) -> float:
    """The learning rate of step `iteration`, counted from 1."""
    warmup = round(options.warmup * options.iters)
    if iteration <= warmup:
        return options.learning_rate * iteration / warmup
    if options.schedule == "constant":
        return options.learning_rate
    progress = (iteration - warmup) / max(options.iters - warmup, 1)
    return options.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    student: nn.Module, examples: Sequence[Example], options: TrainingOptions, losses: LossOptions, seed: int
) -> Iterator[StepMetrics]:
    """Train the student's trainable parameters on the examples; yields after each step has been applied.

    Raises
    ------
    NonFinite
        when a step's loss or gradient is not finite. The parameters are those of the step before.
    """
    student.train()
    split = split_head(student)
    optimizer = optim.Adam(learning_rate=options.learning_rate)
    optimizer.init(student.trainable_parameters())
    lengths = [len(example) for example in examples]
    for iteration in range(1, options.iters + 1):
        start = time.perf_counter()
        batches = [
            collate([examples[index] for index in batch_indices(lengths, options, seed, step)], losses.temperature)
            for step in range((iteration - 1) * options.accumulate, iteration * options.accumulate)
        ]
        tokens = sum(batch.response_tokens for batch in batches)
        sums, gradient = sum_gradients(student, split, batches, losses, tokens)
        norm = mx.sqrt(sum(mx.sum(mx.square(leaf)) for _, leaf in tree_flatten(gradient)))
        means = [value.item() for value in (sums.total / tokens, sums.kd / tokens, sums.ce / tokens, norm)]
        for value, what in zip(means, ("the loss", "the KD loss", "the CE loss", "the gradient"), strict=True):
            if not math.isfinite(value):
                raise NonFinite(iteration, what)
        if options.grad_clip > 0:
            factor = min(1.0, options.grad_clip / (means[3] + 1e-6))
            gradient = tree_map(lambda leaf, factor=factor: leaf * factor, gradient)
        learning_rate = learning_rate_at(iteration, options)
        optimizer.learning_rate = learning_rate
        optimizer.update(student, gradient)
        mx.eval(student.trainable_parameters(), optimizer.state)
        seconds = time.perf_counter() - start
        padded = sum(batch.padded_tokens for batch in batches)
        yield StepMetrics(
            iteration=iteration,
            total=means[0],
            kd=means[1],
            ce=means[2],
            learning_rate=learning_rate,
            grad_norm=means[3],
            response_tokens=tokens,
            padded_tokens=padded,
            seconds=seconds,
            tokens_per_second=sum(batch.sequence_tokens for batch in batches) / seconds,
            peak_memory=mx.get_peak_memory(),
        )
        student.train()


def sum_gradients(
    student: nn.Module, split: Split, batches: Sequence[Batch], losses: LossOptions, tokens: int
) -> tuple[LossSums, dict]:
    """Sums of the losses over all micro-batches, and the gradient of their total divided by `tokens`."""
    sums = LossSums(mx.array(0.0), mx.array(0.0), mx.array(0.0))
    gradient: dict | None = None
    differentiate = nn.value_and_grad(student, _objective(split, losses, _trains_head(student)))
    for batch in batches:
        (_, (total, kd, ce)), part = differentiate(batch, tokens)
        gradient = part if gradient is None else tree_map(mx.add, gradient, part)
        sums = LossSums(sums.total + total, sums.kd + kd, sums.ce + ce)
        mx.eval(gradient, sums.total, sums.kd, sums.ce)
    return sums, gradient or {}


def _objective(split: Split, losses: LossOptions, trains_head: bool):
    def objective(batch: Batch, tokens: int):
        states = split.states_at(batch.tokens, batch.rows)
        if trains_head or not split.fast:
            sums = dense_losses(split.head(states), batch.labels, batch.targets, losses)
            return sums.total / tokens, (sums.total, sums.kd, sums.ce)
        sums, state_gradient = head_losses(split.head, mx.stop_gradient(states), batch.labels, batch.targets, losses)
        # Not the loss, but its gradient: d/dp sum(states * g) is the chain rule through the body, with g already
        # known at the states. The loss itself travels beside it.
        surrogate = mx.sum(states.astype(mx.float32) * mx.stop_gradient(state_gradient).astype(mx.float32))
        return surrogate / tokens, (sums.total, sums.kd, sums.ce)

    return objective


def _trains_head(student: nn.Module) -> bool:
    return any(name.startswith(("lm_head", "model.embed_tokens")) for name in trainable(student))
