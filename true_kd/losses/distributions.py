"""Teacher and student at a chunk of response tokens, and how far they are apart there.

Owns the temperature of both. A comparison gives the value of a divergence and its slope with respect to the student's
softened logits, written out: automatic differentiation would keep three times as many arrays of tokens by vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx
from jaxtyping import Bool, Float, Int

from true_kd.losses.divergences import LEAST_LOGPROB, Divergence
from true_kd.targets import TeacherHead


class Softened:
    """The student's distribution softened by a temperature, at R tokens."""

    def __init__(
        self,
        logits: Float[mx.array, "rows vocab"],
        peaks: Float[mx.array, "rows 1"],
        temperature: float,
        powers: Float[mx.array, "rows vocab"] | None = None,
    ) -> None:
        """`peaks` are the largest logits; `powers` are exp((logits - peaks) / temperature) where they are known."""
        self._logits = logits
        self._temperature = temperature
        self.powers = mx.exp((logits - peaks) * (1.0 / temperature)) if powers is None else powers
        self.sums = mx.sum(self.powers, axis=-1, keepdims=True)
        """float32 [rows, 1]: powers / sums are the probabilities."""
        self._normaliser = peaks * (1.0 / temperature) + mx.log(self.sums)

    @classmethod
    def both(cls, logits: Float[mx.array, "rows vocab"], temperature: float) -> tuple[Softened, Softened]:
        """Softened by `temperature`, and as it is; at the usual temperatures the one gives the other's exponentials."""
        peaks = mx.max(logits, axis=-1, keepdims=True)
        soft = cls(logits, peaks, temperature)
        if temperature == 1.0:
            return soft, soft
        return soft, cls(logits, peaks, 1.0, mx.square(soft.powers) if temperature == 2.0 else None)

    def logprobs_at(self, ids: Int[mx.array, "rows entries"]) -> Float[mx.array, "rows entries"]:
        """Log-probabilities of some ids of each token."""
        return mx.take_along_axis(self._logits, ids, axis=-1) * (1.0 / self._temperature) - self._normaliser

    @property
    def order(self) -> Int[mx.array, "rows vocab"]:
        """The ids of each token, the most likely first."""
        return mx.argsort(-self._logits, axis=-1).astype(mx.int32)

    @property
    def logprobs(self) -> Float[mx.array, "rows vocab"]:
        """Log-probabilities of every id."""
        return self._logits * (1.0 / self._temperature) - self._normaliser


@dataclass(frozen=True)
class Comparison:
    """A divergence at R tokens, and its slope with respect to the student's softened logits, logits / T.

    The slope is `pull` times the student's probabilities, and `entries` on top.
    """

    values: Float[mx.array, " rows"]
    """Nats."""
    pull: Float[mx.array, "rows 1"]
    entries: Float[mx.array, "rows entries"]
    ids: Int[mx.array, "rows entries"] | None
    """Where the entries lie; None where there is one for every id."""

    def add_entries(
        self, slope: Float[mx.array, "rows vocab"], scale: Float[mx.array, "rows 1"]
    ) -> Float[mx.array, "rows vocab"]:
        """`slope` with the entries added, each token's times its `scale`."""
        entries = self.entries * scale
        if self.ids is None:
            return slope + entries
        return slope.at[mx.arange(self.ids.shape[0])[:, None], self.ids].add(entries)


@dataclass(frozen=True)
class TokenTargets:
    """The teacher at R response tokens, padded to K entries each; padding has weight 0."""

    ids: Int[mx.array, "rows entries"]
    weights: Float[mx.array, "rows entries"]
    """Weights at the loss temperature; a row's weights times f(id) sum to the expectation of f under the teacher."""
    logprobs: Float[mx.array, "rows entries"]
    """The teacher's log-probabilities at the loss temperature, nats; 0 where padded."""
    exact: Bool[mx.array, "rows entries"]
    """False for entries that were drawn, and for padding."""

    @classmethod
    def of_labels(cls, labels: Int[mx.array, " rows"]) -> TokenTargets:
        """A teacher that is sure of the label: forward KL from it is cross-entropy."""
        ids = labels[:, None]
        return cls(ids, mx.ones(ids.shape), mx.zeros(ids.shape), mx.ones(ids.shape, dtype=mx.bool_))

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays, in the order that `with_arrays` takes them."""
        return [self.ids, self.weights, self.logprobs, self.exact]

    def with_arrays(self, arrays: Sequence[mx.array]) -> TokenTargets:
        """Targets of other arrays."""
        return TokenTargets(*arrays)

    def rows(self, start: int, stop: int) -> TokenTargets:
        """The targets of a slice of the tokens."""
        return TokenTargets(*(array[start:stop] for array in self.arrays))

    def compare(self, student: Softened, divergence: Divergence) -> Comparison:
        """The divergence between this teacher and a student softened by the same temperature.

        An unbiased estimate where the divergence can be sampled, which a single token may take below zero. Otherwise
        the exact entries are compared one by one and all else as one: no more than the whole divergence, 0 where
        they agree, and nothing about the order within the tail.
        """
        logprobs = student.logprobs_at(self.ids)
        if divergence.sampled:
            values, slopes = divergence.weigh(logprobs - self.logprobs, self.weights, mx.exp(logprobs))
            return Comparison(mx.sum(values, axis=-1), -mx.sum(slopes, axis=-1, keepdims=True), slopes, self.ids)
        known = self.exact & (self.weights > 0)
        theirs, ours = mx.where(known, self.weights, 0.0), mx.where(known, mx.exp(logprobs), 0.0)
        their_rest = mx.maximum(1.0 - mx.sum(theirs, axis=-1, keepdims=True), _LEAST_REST)
        our_rest = mx.maximum(1.0 - mx.sum(ours, axis=-1, keepdims=True), _LEAST_REST)
        values, slopes = divergence.weigh(
            mx.concatenate([logprobs - self.logprobs, mx.log(our_rest) - mx.log(their_rest)], axis=-1),
            mx.concatenate([theirs, their_rest], axis=-1),
            mx.concatenate([ours, our_rest], axis=-1),
        )
        spread = slopes[:, -1:] / our_rest
        entries = slopes[:, :-1] - ours * spread
        pull = spread - mx.sum(slopes, axis=-1, keepdims=True)
        return Comparison(mx.sum(values, axis=-1), pull, entries, self.ids)

    def best(self) -> Int[mx.array, " rows"]:
        """The teacher's most likely id at each token, of those the student has."""
        entries = mx.where(self.weights > 0, self.logprobs, -mx.inf)
        return mx.take_along_axis(self.ids, mx.argmax(entries, axis=-1, keepdims=True), axis=-1)[:, 0]


@dataclass(frozen=True)
class RankedTargets:
    """A teacher of whom only the probabilities are known, from the largest down, not whose they are."""

    ranks: TokenTargets
    """With ranks for ids."""

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays, in the order that `with_arrays` takes them."""
        return self.ranks.arrays

    def with_arrays(self, arrays: Sequence[mx.array]) -> RankedTargets:
        """Targets of other arrays."""
        return RankedTargets(TokenTargets(*arrays))

    def rows(self, start: int, stop: int) -> RankedTargets:
        """The targets of a slice of the tokens."""
        return RankedTargets(self.ranks.rows(start, stop))

    def compare(self, student: Softened, divergence: Divergence) -> Comparison:
        """The divergence between both distributions once each is sorted.

        Of total variation twice this is the Wasserstein distance of the Universal Logit Distillation loss (Boizard et
        al., 2024, arXiv:2402.12030).
        """
        ids = mx.take_along_axis(student.order, self.ranks.ids, axis=-1)
        return replace(self.ranks, ids=ids).compare(student, divergence)

    def best(self) -> Int[mx.array, " rows"]:
        """The token of the text: which one the teacher finds most likely is not known."""
        return self.ranks.ids[:, 0]


_LEAST_REST = 1e-6
"""Of the distribution outside the exact entries: less is rounding."""


@dataclass(frozen=True)
class HeadTargets:
    """The teacher at R response tokens by its hidden states; its output head gives every logit, a chunk at a time."""

    hidden: Float[mx.array, "rows width"]
    head: TeacherHead
    temperature: float

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays, in the order that `with_arrays` takes them."""
        return [self.hidden]

    def with_arrays(self, arrays: Sequence[mx.array]) -> HeadTargets:
        """Targets of other arrays, read by the same head."""
        return HeadTargets(*arrays, self.head, self.temperature)

    def rows(self, start: int, stop: int) -> HeadTargets:
        """The targets of a slice of the tokens."""
        return replace(self, hidden=self.hidden[start:stop])

    def compare(self, student: Softened, divergence: Divergence) -> Comparison:
        """The divergence over the whole vocabulary; what the student has no id for is left out."""
        logprobs = student.logprobs
        teacher = self._padded(logprobs.shape[-1])
        gaps = logprobs - mx.maximum(teacher, LEAST_LOGPROB)
        values, slopes = divergence.weigh(gaps, mx.exp(teacher), mx.exp(logprobs))
        return Comparison(mx.sum(values, axis=-1), -mx.sum(slopes, axis=-1, keepdims=True), slopes, None)

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


BatchTargets = TokenTargets | RankedTargets | HeadTargets
"""The teacher at the counted tokens of a batch."""
