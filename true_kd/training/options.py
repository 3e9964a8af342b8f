"""How training goes: steps, learning rate, validation and checkpoints."""

from __future__ import annotations

import math
from typing import Literal

import mlx.core as mx
from pydantic import Field

from true_kd.batching import BatchOptions
from true_kd.losses import LossOptions
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
    grad_checkpoint: bool = False
    """Compute each layer again in the backward pass: much less memory, on a CPU 40 to 70 % more time."""
    compile: Literal["auto", "always", "never"] = "auto"
    """What is compiled: auto the optimizer's update on a GPU; always the gradient as well, and padded to shapes that
    repeat: where lengths differ much, new shapes cost more than they save. On a CPU it starts a C++ compiler."""
    grad_clip: float = Field(default=1.0, ge=0.0)
    """Largest norm of the gradient; 0 switches clipping off."""
    validate_every: PositiveInt = 50
    """Steps between validations; the last step is always validated."""
    patience: PositiveInt | None = None
    """Validations in a row without a new best after which training stops; null to go on to the end."""
    checkpoint_every: PositiveInt = 100
    """Steps between checkpoints, from which a stopped run goes on."""


def learning_rate_at(iteration: int, options: TrainingOptions) -> float:
    """The learning rate of step `iteration`, counted from 1."""
    warmup = round(options.warmup * options.iters)
    if iteration <= warmup:
        return options.learning_rate * iteration / warmup
    if options.schedule == "constant":
        return options.learning_rate
    progress = (iteration - warmup) / max(options.iters - warmup, 1)
    return options.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def compiles_update(options: TrainingOptions) -> bool:
    """Whether the optimizer's update is compiled: its shapes are the same in every step."""
    return options.compile == "always" or (options.compile == "auto" and mx.default_device() != mx.Device(mx.cpu))


def compiles_gradient(options: TrainingOptions, losses: LossOptions) -> bool:
    """Whether losses and gradient are compiled: not where the temperature, a constant of theirs, changes each step."""
    return options.compile == "always" and losses.temperature_end is None


def shape_multiple(options: TrainingOptions, losses: LossOptions) -> int:
    """What sequences, rows and entries are padded to a multiple of: shapes that repeat are compiled once."""
    return 32 if compiles_gradient(options, losses) else 1
