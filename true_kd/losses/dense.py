"""The losses on whole logits, exact: what the fast path is tested against, and what a notebook wants."""

from __future__ import annotations

import mlx.core as mx
from jaxtyping import Float, Int

from true_kd.losses.divergences import LEAST_LOGPROB, Divergence, ForwardKL


def compute_kd_loss(
    teacher_logits: Float[mx.array, "*batch vocab"],
    student_logits: Float[mx.array, "*batch vocab"],
    temperature: float,
    divergence: Divergence | None = None,
) -> Float[mx.array, ""]:
    """T^2 times a divergence, of distributions softened by `temperature`; nats, the mean over all positions.

    None stands for forward KL, KL(teacher || student). Zero when the logits are equal up to a constant, never negative
    beyond rounding. The teacher gets no gradient. Teacher logits may be -inf (probability zero). Hinton, Vinyals and
    Dean (2015), https://arxiv.org/abs/1503.02531.

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
    gaps = student - mx.maximum(teacher, LEAST_LOGPROB)
    values, _ = (divergence or ForwardKL()).weigh(gaps, mx.exp(teacher), mx.exp(student))
    return temperature**2 * mx.mean(mx.sum(values, axis=-1))


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
