"""The teacher's distribution at each response token, sparse, unbiased and free in temperature.

For every token the most likely ids are kept exactly; the rest of the vocabulary is represented by a systematic sample
whose weights sum to the tail's exact mass. The distribution is not renormalised over the kept ids: `logprobs` are
log-softmax over the whole vocabulary, in nats.

The sample is drawn once, in proportion to the distribution at `draw_temperature`, and reweighted for any other
temperature. Expectations under the teacher are unbiased at that temperature and at 1, whose partition functions are
stored; at any other the partition function is estimated from the same sample, which is consistent but biased (5 % of
an expectation at T = 5 in the worst case tried, a flat tail of 2,000 ids and 20 draws). Why sampling: plain top-k is
biased, and at T = 2 its gradient points elsewhere (Sparse Logit Sampling, ACL 2025, https://arxiv.org/abs/2503.16870).
Systematic sampling with a fixed total is Madow's (1949); for a given number of draws its inclusion probabilities are
those of the variance-optimal threshold sample of Duffield, Lund and Thorup (2007).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from true_kd.options import Options, Temperature

_EXACT = 255
"""The value of `draws` that marks an id kept exactly."""


class TargetOptions(Options):
    """How much of the teacher's distribution is kept per token."""

    threshold: float = Field(default=0.01, gt=0.0, le=0.5)
    """Ids at least this likely (at temperature 1 or at draw_temperature) are kept exactly; the rest is sampled, one
    draw for each such share of its mass. Smaller is more faithful and larger on disk."""
    draw_temperature: Temperature = 2.0
    """The temperature the sample is drawn for; other temperatures reuse it with other weights and more variance."""
    max_draws: int = Field(default=200, ge=1, le=254)
    """Upper limit of the draws per token, for teachers that are nearly uniform."""


_LEAST = -1e4
"""Stands for the log-probability of an impossible token: exp of a tenth of it is 0 still."""


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's distribution at the N response tokens of one example; E entries in all, rows of varying length.

    Rows are delimited by `offsets`: the entries of token n are `offsets[n]` to `offsets[n + 1]`. Within a row ids
    ascend and are unique, and the realised token is among them.
    """

    offsets: np.ndarray
    """int32 [N + 1]."""
    ids: np.ndarray
    """int32 [E], ids of the teacher's vocabulary, or after `with_ids` the student's; -1 where that has none."""
    logprobs: np.ndarray
    """float32 [E], the teacher's log-probability at temperature 1, nats."""
    draws: np.ndarray
    """uint8 [E], how often the tail sample drew this id; 255 where it is kept exactly."""
    draw_mass: np.ndarray
    """float32 [N], the mass at the draw temperature that one draw stands for."""
    log_partition: np.ndarray
    """float32 [N], log of the sum of p^(1/T) at the draw temperature T, over the whole vocabulary, nats."""
    draw_temperature: float

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, tokens: np.ndarray) -> TeacherTargets:
        """The targets of the given tokens, in that order."""
        counts = np.diff(self.offsets)[tokens]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        entries = np.arange(offsets[-1]) + np.repeat(self.offsets[tokens] - offsets[:-1], counts)
        return TeacherTargets(
            offsets,
            self.ids[entries],
            self.logprobs[entries],
            self.draws[entries],
            self.draw_mass[tokens],
            self.log_partition[tokens],
            self.draw_temperature,
        )

    def with_ids(self, id_map: np.ndarray) -> TeacherTargets:
        """The same targets in another vocabulary. Entries that `id_map` sends to -1 stay, with weight 0: their mass is
        left unassigned, not handed to the others."""
        return replace(self, ids=np.where(self.ids >= 0, id_map[self.ids], -1).astype(np.int32))

    def at_temperature(self, temperature: float) -> tuple[np.ndarray, np.ndarray]:
        """Weights and log-probabilities of the entries for the distribution softened by `temperature`.

        Returns
        -------
        weights
            float32 [E]; a sum over a row's entries of weight times f(id) is the expectation of f under the teacher:
            unbiased at temperature 1 and at the draw temperature, self-normalised (consistent) at the others.
        logprobs
            float32 [E], log of the teacher's softened probability of each entry, nats.
        """
        rows = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        beta = 1.0 / temperature
        raw = self.logprobs.astype(np.float64)
        at_draw = raw / self.draw_temperature - self.log_partition[rows]
        sampled = self.draws != _EXACT
        log_multiplicity = np.zeros_like(raw)
        log_multiplicity[sampled] = (
            np.log(np.maximum(self.draws[sampled].astype(np.float64) * self.draw_mass[rows[sampled]], 1e-300))
            - at_draw[sampled]
        )
        log_weights = beta * raw + log_multiplicity
        if temperature == 1.0:
            partition = np.zeros(len(self))
        elif temperature == self.draw_temperature:
            partition = self.log_partition.astype(np.float64)
        else:
            top = np.full(len(self), -np.inf)
            np.maximum.at(top, rows, log_weights)
            total = np.bincount(rows, np.exp(log_weights - top[rows]), minlength=len(self))
            partition = top + np.log(total)
        logprobs = beta * raw - partition[rows]
        weights = np.where(self.ids >= 0, np.exp(log_weights - partition[rows]), 0.0)
        return weights.astype(np.float32), logprobs.astype(np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """The array fields by name, in the order they are stored."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "draw_temperature"}


def encode(
    logits: Float[mx.array, "tokens vocab"],
    labels: Int[mx.array, " tokens"],
    uniforms: np.ndarray,
    options: TargetOptions,
) -> TeacherTargets:
    """Compress the teacher's logits at some tokens.

    Parameters
    ----------
    logits
        unnormalised, or log-probabilities: only differences along the vocabulary matter.
    labels
        the realised tokens, kept whatever their probability.
    uniforms
        float [tokens] in [0, 1): the random start of each token's systematic sample. The caller derives them from
        what is encoded, so that the same tokens always give the same targets.

    The dense work is done on the device; only the marked entries come back.
    """
    temperature = options.draw_temperature
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    log_partition = mx.logsumexp(logprobs / temperature, axis=-1, keepdims=True)
    softened = mx.exp(logprobs / temperature - log_partition)
    exact = (softened >= options.threshold) | (logprobs >= float(np.log(options.threshold)))
    exact = exact | (mx.arange(logits.shape[-1])[None] == labels[:, None])
    tail = mx.where(exact, 0.0, softened)
    mass = mx.sum(tail, axis=-1, keepdims=True)
    count = mx.clip(mx.ceil(mass / options.threshold), 1, options.max_draws)
    steps = mx.cumsum(tail, axis=-1)
    # Divided by its own last element, the cumulative sum ends at exactly `count`, whatever the rounding within it.
    # The running maximum undoes what rounding in a parallel sum may take back.
    steps = mx.cummax(steps / mx.maximum(steps[:, -1:], 1e-30) * count, axis=-1)
    crossed = mx.minimum(mx.floor(steps + mx.array(uniforms, dtype=mx.float32)[:, None]), count)
    previous = mx.concatenate([mx.zeros_like(crossed[:, :1]), crossed[:, :-1]], axis=-1)
    drawn = mx.where(exact | (mass <= 0), 0.0, crossed - previous)
    marks = mx.where(exact, _EXACT, drawn).astype(mx.uint8)
    marked = np.array(marks)
    rows, ids = np.nonzero(marked)
    kept = np.array(logprobs[mx.array(rows), mx.array(ids)])
    per_row = np.bincount(rows, minlength=len(uniforms))
    return TeacherTargets(
        offsets=np.concatenate([[0], np.cumsum(per_row)]).astype(np.int32),
        ids=ids.astype(np.int32),
        logprobs=np.maximum(kept, _LEAST),
        draws=marked[rows, ids],
        draw_mass=np.array((mass / count)[:, 0]),
        log_partition=np.array(log_partition[:, 0]),
        draw_temperature=temperature,
    )


def join(parts: list[TeacherTargets]) -> TeacherTargets:
    """The targets of consecutive stretches of tokens as one."""
    ends = np.cumsum([0] + [part.offsets[-1] for part in parts])
    offsets = [part.offsets[1:] + start for part, start in zip(parts, ends[:-1], strict=True)]
    joined = {
        name: np.concatenate([part.arrays()[name] for part in parts])
        for name in ("ids", "logprobs", "draws", "draw_mass", "log_partition")
    }
    return TeacherTargets(
        offsets=np.concatenate([[0], *offsets]).astype(np.int32), draw_temperature=parts[0].draw_temperature, **joined
    )
