"""From a micro-batch to its losses and gradient, and from a step's gradient to new parameters.

Owns the division: gradients and losses are sums over tokens, divided once, by the tokens of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from true_kd.batching import Batch
from true_kd.losses import LossSums, Objective, head_losses
from true_kd.models import is_finite, split_head


class Gradients:
    """Sums of the losses of a micro-batch, and the gradient of their weighted total at the trainable parameters."""

    def __init__(self, student: nn.Module, compiled: bool = False) -> None:
        self.split = split_head(student)
        self._student = student
        self._trained = self._trained_head()
        self._compile = compiled
        self._compiled: Callable | None = None

    def __call__(self, batch: Batch, objective: Objective) -> tuple[LossSums, dict]:
        """Both are sums over tokens; nothing is computed before they are evaluated."""
        alpha = mx.array(objective.alpha)
        if not self._compile:
            return self._differentiate(batch, objective, alpha)
        if self._compiled is None:

            def differentiate(arrays: list[mx.array], alpha: mx.array) -> tuple[list[mx.array], dict]:
                sums, gradient = self._differentiate(batch.with_arrays(arrays), objective, alpha)
                return [sums.total, sums.kd, sums.ce], gradient

            state = [self._student.state, mx.random.state]
            self._compiled = mx.compile(differentiate, inputs=state, outputs=state)
        sums, gradient = self._compiled(batch.arrays, alpha)
        return LossSums(*sums), gradient

    def _differentiate(self, batch: Batch, objective: Objective, alpha: mx.array) -> tuple[LossSums, dict]:
        objective = replace(objective, alpha=alpha)

        def surrogate() -> tuple[mx.array, tuple[LossSums, dict]]:
            """Not the loss, but its gradient: d/dp sum(states * g) is the chain rule through the body, with the loss's
            gradient g at the states already known. The losses themselves travel beside it."""
            states = self.split.states_at(batch.tokens, batch.rows)
            sums, slopes, of_head = head_losses(
                self.split.head,
                mx.stop_gradient(states),
                batch.labels,
                batch.targets,
                batch.weights,
                objective,
                self._trained,
            )
            product = states.astype(mx.float32) * mx.stop_gradient(slopes).astype(mx.float32)
            return mx.sum(product), (sums, of_head)

        (_, (sums, of_head)), gradient = nn.value_and_grad(self._student, surrogate)()
        return sums, self._with_head(gradient, of_head)

    def _trained_head(self) -> nn.Module | None:
        """The layer of the output head, where some of its parameters are trained."""
        layer = dict(self._student.named_modules()).get(self.split.layer)
        return layer if layer is not None and tree_flatten(layer.trainable_parameters()) else None

    def _with_head(self, gradient: dict, of_head: dict) -> dict:
        """The gradient with that of the head's own parameters added; the body's holds what tied embeddings do there."""
        if self._trained is not None:
            *path, last = self.split.layer.split(".")
            node = gradient
            for key in path:
                node = node[key]
            node[last] = tree_map(mx.add, node[last], of_head)
        return gradient


def sum_gradients(
    gradients: Gradients, batches: Sequence[Batch], objective: Objective, tokens: int
) -> tuple[LossSums, dict]:
    """Sums of the losses over some micro-batches, and the gradient of their total divided by `tokens`."""
    sums, gradient = LossSums.zero(), None
    for batch in batches:
        part, slopes = gradients(batch, objective)
        sums, gradient = sums + part, slopes if gradient is None else tree_map(mx.add, gradient, slopes)
        mx.eval(gradient, sums.total, sums.kd, sums.ce)
    return sums, tree_map(lambda leaf: leaf / tokens, gradient or {})


class Update:
    """Applies a step: divides by its tokens and clips.

    Where a number is not finite the parameters stay as they were; the optimizer's state is then lost.
    """

    def __init__(self, student: nn.Module, optimizer: optim.Optimizer, grad_clip: float, compiled: bool) -> None:
        self._student = student
        self._optimizer = optimizer
        self._grad_clip = grad_clip
        state = [student.state, optimizer.state]
        self._apply = mx.compile(self._update, inputs=state, outputs=state) if compiled else self._update

    def __call__(self, gradient: dict, sums: LossSums, tokens: int, learning_rate: float) -> tuple[mx.array, mx.array]:
        """The gradient's norm before clipping, and whether the new parameters are finite.

        Both and the new parameters are computed when they are evaluated.
        """
        return self._apply(gradient, sums.total + sums.kd + sums.ce, mx.array(1.0 / tokens), mx.array(learning_rate))

    def _update(
        self, gradient: dict, losses: mx.array, share: mx.array, learning_rate: mx.array
    ) -> tuple[mx.array, mx.array]:
        squares = [mx.sum(mx.square(leaf.astype(mx.float32))) for _, leaf in tree_flatten(gradient)]
        norm = share * mx.sqrt(sum(squares))
        factor = mx.minimum(1.0, self._grad_clip / (norm + 1e-6)) * share if self._grad_clip > 0 else share
        before = self._student.trainable_parameters()
        self._optimizer.learning_rate = learning_rate
        self._optimizer.update(self._student, tree_map(lambda leaf: (leaf * factor).astype(leaf.dtype), gradient))
        whole = is_finite(self._student.trainable_parameters())
        sound = mx.isfinite(norm) & mx.isfinite(losses) & whole
        self._student.update(
            tree_map(lambda new, old: mx.where(sound, new, old), self._student.trainable_parameters(), before)
        )
        return norm, whole
