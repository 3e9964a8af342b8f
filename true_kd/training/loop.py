"""The training loop: a generator that yields one `StepMetrics` per optimizer step.

The caller logs, validates, saves or stops; nothing here writes a file or prints. The gradient of a step is the sum
over the response tokens of all its micro-batches divided, once, by their number: accumulating over micro-batches
equals the large batch. A run that goes on from a `TrainingState` is the run that was never stopped, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from true_kd.batching import Batch
from true_kd.errors import TrueKDError
from true_kd.examples import Example
from true_kd.losses import LossOptions, LossSums
from true_kd.models import recompute_layers
from true_kd.options import record
from true_kd.training.gradients import Gradients, Update
from true_kd.training.options import TrainingOptions, compiles_gradient, compiles_update, learning_rate_at
from true_kd.training.plan import Plan, Room


@record
class StepMetrics:
    """One optimizer step. Losses are means over the step's response tokens, nats, `kd` with its T^2."""

    iteration: int
    """Counted from 1."""
    total: float
    """The loss: alpha * kd + (1 - alpha) * ce."""
    kd: float
    """T^2 times the divergence at the loss temperature."""
    ce: float
    """Cross-entropy on the teacher's text."""
    learning_rate: float
    """Of this step."""
    grad_norm: float
    """Before clipping."""
    response_tokens: int
    """Tokens that count in the loss."""
    padded_tokens: int
    """What the body computed: prompt, response and padding."""
    seconds: float
    """That the step took."""
    tokens_per_second: float
    """Prompt and response tokens by time; padding does not count."""
    peak_memory: int
    """Bytes, the largest since the phase began."""

    MEASURED: ClassVar[tuple[str, ...]] = ("seconds", "tokens_per_second", "peak_memory")
    """What depends on the machine's mood; all else is the same each time a run is made."""


class NonFinite(TrueKDError):
    """The loss or the gradient of a step is NaN or infinite; the step was not applied."""

    def __init__(self, iteration: int, what: str) -> None:
        self.iteration = iteration
        self.what = what
        super().__init__(f"iteration {iteration}: {what} is not a finite number.")


class TrainingState:
    """What training has come to, besides the student's parameters: the step, the optimizer and the random numbers."""

    def __init__(self, student: nn.Module, options: TrainingOptions) -> None:
        self.iteration = 0
        """Steps that were applied."""
        self.optimizer = optim.Adam(learning_rate=options.learning_rate)
        self.optimizer.init(student.trainable_parameters())

    def arrays(self) -> dict[str, mx.array]:
        """The optimizer's state and that of MLX's random numbers, by name."""
        optimizer = {f"{_OPTIMIZER}{name}": value for name, value in tree_flatten(self.optimizer.state)}
        return {**optimizer, _RANDOM: mx.random.state[0]}

    def restore(self, iteration: int, arrays: Mapping[str, mx.array]) -> None:
        """Continue from what `arrays` gave after `iteration` steps."""
        self.iteration = iteration
        names = [name for name in arrays if name.startswith(_OPTIMIZER)]
        self.optimizer.state = tree_unflatten([(name.removeprefix(_OPTIMIZER), arrays[name]) for name in names])
        mx.random.state[0][:] = arrays[_RANDOM]


_OPTIMIZER = "optimizer."
_RANDOM = "random"


def train(
    student: nn.Module,
    examples: Sequence[Example],
    options: TrainingOptions,
    losses: LossOptions,
    seed: int,
    state: TrainingState | None = None,
    room: Room | None = None,
) -> Iterator[StepMetrics]:
    """Train the student's trainable parameters on the examples; yields after each step has been applied.

    Parameters
    ----------
    state
        where to go on from, brought forward with each step; None begins.
    room
        cuts a micro-batch that needs more memory into parts, with the same gradient. None for no limit.

    Raises
    ------
    NonFinite
        when a step's loss or gradient is not finite. The parameters are those of the step before.
    """
    state = state or TrainingState(student, options)
    if options.grad_checkpoint:
        recompute_layers(student)
    student.train()
    gradients = Gradients(student, compiles_gradient(options, losses))
    update = Update(student, state.optimizer, options.grad_clip, compiles_update(options))
    plan = Plan(examples, options, losses, seed, room)
    laid_out = plan.batches(state.iteration + 1)
    upcoming = next(laid_out, None)
    while upcoming is not None:
        start = time.perf_counter()
        iteration = state.iteration + 1
        learning_rate = learning_rate_at(iteration, options)
        batches: list[Batch] = []
        sums, gradient, norm, whole = LossSums.zero(), None, None, None
        while norm is None:
            batch, last = upcoming
            batches.append(batch)
            part, slopes = gradients(batch, plan.objective(iteration))
            sums, gradient = sums + part, slopes if gradient is None else tree_map(mx.add, gradient, slopes)
            pending = [sums.total, sums.kd, sums.ce, gradient]
            if last:
                tokens = sum(batch.response_tokens for batch in batches)
                norm, whole = update(gradient, sums, tokens, learning_rate)
                pending = [sums.total, sums.kd, sums.ce, norm, whole]
                pending += [student.trainable_parameters(), state.optimizer.state]
            # The host lays out the next micro-batch while the device computes this one, and then waits: two of them in
            # memory are what splitting is to spare, and a step's numbers are asked for at its end.
            mx.async_eval(pending)
            upcoming = next(laid_out, None)
            mx.eval(pending)
        means = [sums.total.item() / tokens, sums.kd.item() / tokens, sums.ce.item() / tokens, norm.item()]
        for value, what in zip(means, ("the loss", "the KD loss", "the CE loss", "the gradient"), strict=True):
            if not math.isfinite(value):
                raise NonFinite(iteration, what)
        if not whole.item():
            raise NonFinite(iteration, "the optimizer's step")
        seconds = time.perf_counter() - start
        state.iteration = iteration
        yield StepMetrics(
            iteration=iteration,
            total=means[0],
            kd=means[1],
            ce=means[2],
            learning_rate=learning_rate,
            grad_norm=means[3],
            response_tokens=tokens,
            padded_tokens=sum(batch.padded_tokens for batch in batches),
            seconds=seconds,
            tokens_per_second=sum(batch.sequence_tokens for batch in batches) / seconds,
            peak_memory=mx.get_peak_memory(),
        )
        student.train()
