"""What training minimises: `alpha * T^2 * KL(teacher || student) + (1 - alpha) * CE`, over response tokens.

Owns the temperature and its T^2, and the rule that a loss is a sum over tokens: the division by the number of tokens
of a whole optimizer step happens once, outside. Two forms of the same quantity:

- `compute_kd_loss` and `compute_ce_loss`: exact, on dense logits. The reference that the fast path is tested against.
- `head_losses`: the fast path. Hidden states of response tokens go through the output head in chunks, the teacher is
  sparse, and the gradient with respect to the hidden states is formed in the same pass, so that no array of
  tokens by vocabulary outlives a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx
from jaxtyping import Float, Int
from pydantic import Field

from true_kd.options import Fraction, Options, Temperature
from true_kd.targets import TeacherHead


class LossOptions(Options):
    """The objective."""

    temperature: Temperature = 2.0
    """Softens teacher and student in the KD term, which is scaled by its square (Hinton et al., 2015)."""
    alpha: Fraction = 0.7
    """Weight of the KD term; 1 - alpha weighs cross-entropy on the teacher's text."""
    chunk: int = Field(default=256, ge=16)
    """Response tokens that pass the output head at a time: memory of the loss is chunk times vocabulary."""


def compute_kd_loss(
    teacher_logits: Float[mx.array, "*batch vocab"],
    student_logits: Float[mx.array, "*batch vocab"],
    temperature: float,
) -> Float[mx.array, ""]:
    """T^2 * KL(teacher || student), both softened by `temperature`; nats, the mean over all positions.

    Zero when the logits are equal up to a constant, never negative beyond rounding. The teacher gets no gradient.
    Teacher logits may be -inf (probability zero). Hinton, Vinyals and Dean (2015), https://arxiv.org/abs/1503.02531.

    Raises
    ------
    ValueError
        when the shapes differ (see `align_vocab_sizes`) or the temperature is not positive.
    """
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher logits {teacher_logits.shape} and student logits {student_logits.shape} differ in shape; "
            "use align_vocab_sizes first"
        )
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: expected a number above 0")
    teacher = _log_softmax(mx.stop_gradient(teacher_logits), temperature)
    student = _log_softmax(student_logits, temperature)
    probabilities = mx.exp(teacher)
    terms = mx.where(probabilities > 0, probabilities * (teacher - student), 0.0)
    return temperature**2 * mx.mean(mx.sum(terms, axis=-1))


def compute_ce_loss(
    logits: Float[mx.array, "*batch vocab"], targets: Int[mx.array, "*batch"], ignore_index: int = -100
) -> Float[mx.array, ""]:
    """Cross-entropy of `targets` (ids aligned with `logits`, not shifted), nats, the mean over targets that count.

    Positions whose target is `ignore_index` count neither above nor below the fraction bar; 0 when none counts.
    """
    counts = targets != ignore_index
    safe = mx.where(counts, targets, 0)
    logprobs = mx.take_along_axis(_log_softmax(logits, 1.0), safe[..., None], axis=-1)[..., 0]
    return -mx.sum(mx.where(counts, logprobs, 0.0)) / mx.maximum(mx.sum(counts), 1)


def _log_softmax(logits: mx.array, temperature: float) -> mx.array:
    scaled = logits.astype(mx.float32) / temperature
    return scaled - mx.logsumexp(scaled, axis=-1, keepdims=True)


@dataclass(frozen=True)
class TokenTargets:
    """The teacher at R response tokens, padded to K entries each; padding has weight 0."""

    ids: Int[mx.array, "rows entries"]
    weights: Float[mx.array, "rows entries"]
    """Weights at the loss temperature; a row's weights times f(id) sum to the expectation of f under the teacher."""
    logprobs: Float[mx.array, "rows entries"]
    """The teacher's log-probabilities at the loss temperature, nats; 0 where padded."""

    def rows(self, start: int, stop: int) -> TokenTargets:
        """The targets of a slice of the tokens."""
        return TokenTargets(self.ids[start:stop], self.weights[start:stop], self.logprobs[start:stop])

    def cross(self, logprobs: Float[mx.array, "rows vocab"]) -> Float[mx.array, " rows"]:
        """Sum of weights times (the teacher's log-probability less the student's), which is their KL, per token."""
        return mx.sum(self.weights * (self.logprobs - mx.take_along_axis(logprobs, self.ids, axis=-1)), axis=-1)

    def slope(self, probabilities: Float[mx.array, "rows vocab"]) -> Float[mx.array, "rows vocab"]:
        """Derivative of `cross` with respect to the student's scaled logits, whose softmax is `probabilities`."""
        mass = mx.sum(self.weights, axis=-1, keepdims=True)
        rows = mx.arange(self.ids.shape[0])[:, None]
        return (mass * probabilities).at[rows, self.ids].subtract(self.weights)

    def best(self) -> Int[mx.array, " rows"]:
        """The teacher's most likely id at each token, of those the student has."""
        entries = mx.where(self.weights > 0, self.logprobs, -mx.inf)
        return mx.take_along_axis(self.ids, mx.argmax(entries, axis=-1, keepdims=True), axis=-1)[:, 0]


@dataclass(frozen=True)
class HeadTargets:
    """The teacher at R response tokens by its hidden states; its output head gives every logit, a chunk at a time."""

    hidden: Float[mx.array, "rows width"]
    head: TeacherHead
    temperature: float

    def rows(self, start: int, stop: int) -> HeadTargets:
        """The targets of a slice of the tokens."""
        return replace(self, hidden=self.hidden[start:stop])

    def cross(self, logprobs: Float[mx.array, "rows vocab"]) -> Float[mx.array, " rows"]:
        """KL per token, over the whole vocabulary; what the student has no id for is left out."""
        teacher = self._padded(logprobs.shape[-1])
        probabilities = mx.exp(teacher)
        return mx.sum(mx.where(probabilities > 0, probabilities * (teacher - logprobs), 0.0), axis=-1)

    def slope(self, probabilities: Float[mx.array, "rows vocab"]) -> Float[mx.array, "rows vocab"]:
        """Derivative of `cross` with respect to the student's scaled logits, whose softmax is `probabilities`."""
        teacher = mx.exp(self._padded(probabilities.shape[-1]))
        return mx.sum(teacher, axis=-1, keepdims=True) * probabilities - teacher

    def best(self) -> Int[mx.array, " rows"]:
        """The teacher's most likely id at each token, of those the student has."""
        return mx.argmax(self._logprobs, axis=-1).astype(mx.int32)

    @cached_property
    def _logprobs(self) -> mx.array:
        # Read once per chunk: the value and the gradient of the loss share it.
        return self.head.logprobs(self.hidden, self.temperature)

    def _padded(self, width: int) -> mx.array:
        """The teacher's log-probabilities with those of ids that only pad the student's head, -inf."""
        missing = width - self._logprobs.shape[-1]
        if missing <= 0:
            return self._logprobs
        return mx.concatenate([self._logprobs, mx.full((self._logprobs.shape[0], missing), -mx.inf)], axis=-1)


BatchTargets = TokenTargets | HeadTargets
"""The teacher at the counted tokens of a batch."""


@dataclass(frozen=True)
class LossSums:
    """Sums over tokens, nats. `total` is `alpha * kd + (1 - alpha) * ce`; `kd` carries its T^2."""

    total: mx.array
    kd: mx.array
    ce: mx.array


def target_kd(
    logits: Float[mx.array, "rows vocab"], targets: BatchTargets, temperature: float
) -> Float[mx.array, " rows"]:
    """T^2 * KL(teacher || student) per token, nats.

    Equals the dense loss for hidden states, and where sparse entries cover the vocabulary; otherwise it is an unbiased
    estimate of it, which a single token may take below zero.
    """
    return temperature**2 * targets.cross(_log_softmax(logits, temperature))


def label_ce(logits: Float[mx.array, "rows vocab"], labels: Int[mx.array, " rows"]) -> Float[mx.array, " rows"]:
    """Cross-entropy per token at temperature 1, nats."""
    logits = logits.astype(mx.float32)
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


def head_losses(
    head: Callable[[mx.array], mx.array],
    hidden: Float[mx.array, "rows width"],
    labels: Int[mx.array, " rows"],
    targets: BatchTargets,
    options: LossOptions,
) -> tuple[LossSums, Float[mx.array, "rows width"]]:
    """Sums of the losses over response tokens and the gradient of `total` with respect to their hidden states.

    The gradient treats the head's own parameters as constants, which under LoRA on the body they are; a trained head
    takes `dense_losses`.
    """
    sums = LossSums(mx.array(0.0), mx.array(0.0), mx.array(0.0))
    gradients: list[mx.array] = []
    for start in range(0, hidden.shape[0], options.chunk):
        stop = min(start + options.chunk, hidden.shape[0])
        states = hidden[start:stop]
        if gradients:
            # All chunks are one lazy graph; a chunk that waits for the one before it never shares memory with it.
            (states,) = mx.depends([states], [gradients[-1], sums.total, sums.kd, sums.ce])
        part, gradient = _chunk_losses(head, states, labels[start:stop], targets.rows(start, stop), options)
        gradients.append(gradient)
        sums = LossSums(sums.total + part.total, sums.kd + part.kd, sums.ce + part.ce)
    return sums, mx.concatenate(gradients, axis=0)


def _chunk_losses(
    head: Callable[[mx.array], mx.array],
    hidden: mx.array,
    labels: mx.array,
    targets: BatchTargets,
    options: LossOptions,
) -> tuple[LossSums, mx.array]:
    """One chunk of `head_losses`. With W the sum of a token's weights w, and q the student's softmax:

    d total / d logits = alpha T (W q_T - w) + (1 - alpha) (q_1 - onehot(label)).

    Written out rather than left to automatic differentiation, which keeps three times as many arrays of tokens by
    vocabulary alive.
    """
    alpha, temperature = options.alpha, options.temperature

    def float_head(states: mx.array) -> mx.array:
        return head(states).astype(mx.float32)

    logits = float_head(hidden)
    sums = dense_losses(logits, labels, targets, options)
    slope = (alpha * temperature) * targets.slope(mx.softmax(logits / temperature, axis=-1))
    slope = slope + (1 - alpha) * mx.softmax(logits, axis=-1)
    slope = slope.at[mx.arange(hidden.shape[0]), labels].subtract(1 - alpha)
    _, (gradient,) = mx.vjp(float_head, [hidden], [slope])
    return sums, gradient


def dense_losses(
    logits: Float[mx.array, "rows vocab"], labels: Int[mx.array, " rows"], targets: BatchTargets, options: LossOptions
) -> LossSums:
    """The same sums from logits that are all there, differentiable through the head."""
    kd = mx.sum(target_kd(logits, targets, options.temperature))
    ce = mx.sum(label_ce(logits, labels))
    return LossSums(options.alpha * kd + (1 - options.alpha) * ce, kd, ce)
