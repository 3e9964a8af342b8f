"""The exact form of the teacher's distribution: its last hidden state, and the output head that reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np


class TeacherHead:
    """A teacher's output head, which gives its distribution in the ids of a student."""

    def __init__(self, read: Callable[[mx.array], mx.array], columns: mx.array | None = None) -> None:
        """`read` takes hidden states [tokens, width] to logits [tokens, vocab]; `columns` are the teacher's ids in the
        student's order, -1 where it has none, and None where the ids are the same."""
        self._read = read
        self._columns = columns
        self._mapped: tuple[np.ndarray, TeacherHead] | None = None

    def in_ids(self, id_map: np.ndarray) -> TeacherHead:
        """The same head in another vocabulary; `id_map` gives the new id of each of the teacher's, -1 for none."""
        if self._mapped is None or self._mapped[0] is not id_map:
            self._mapped = id_map, TeacherHead(self._read, _compose(self._columns, _columns(id_map)))
        return self._mapped[1]

    def logprobs(self, states: mx.array, temperature: float) -> mx.array:
        """Log-probabilities of the distribution softened by `temperature`, nats, float32 [tokens, vocab].

        Normalised over the teacher's whole vocabulary; -inf at ids that the teacher does not have.
        """
        logits = self._read(states).astype(mx.float32) / temperature
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if self._columns is not None:
            none = mx.full((logprobs.shape[0], 1), -mx.inf)
            columns = mx.where(self._columns < 0, logprobs.shape[-1], self._columns)
            logprobs = mx.concatenate([logprobs, none], axis=-1)[:, columns]
        return logprobs


_ROWS = 64
"""Tokens that are read by the head at a time."""


@dataclass(frozen=True)
class HiddenTargets:
    """The teacher's last hidden state at N response tokens, from which `head` gives every logit."""

    states: np.ndarray
    """float16 [N, width], what enters the output head; in files it is mapped, and read where it is used."""
    head: TeacherHead | None
    """None where only the reply's tokens are wanted."""

    def __len__(self) -> int:
        return len(self.states)

    @property
    def entropies(self) -> np.ndarray:
        """float64 [N], the teacher's entropy at temperature 1 over the ids of `head`, nats."""
        found = [np.zeros(0)]
        for _, logprobs in self._chunks():
            terms = mx.where(logprobs > -mx.inf, mx.exp(logprobs) * logprobs, 0.0)
            found.append(np.array(-mx.sum(terms, axis=-1), dtype=np.float64))
        return np.concatenate(found)

    def label_logprobs(self, labels: np.ndarray) -> np.ndarray:
        """float64 [N], the teacher's log-probability of each of `labels`, ids of `head`, at temperature 1, nats."""
        found = [np.zeros(0)]
        for rows, logprobs in self._chunks():
            own = mx.take_along_axis(logprobs, mx.array(labels[rows])[:, None], axis=-1)
            found.append(np.array(own[:, 0], dtype=np.float64))
        return np.concatenate(found)

    def _chunks(self) -> Iterator[tuple[slice, mx.array]]:
        for start in range(0, len(self), _ROWS):
            rows = slice(start, min(start + _ROWS, len(self)))
            yield rows, self.head.logprobs(mx.array(self.states[rows]), 1.0)

    def take(self, tokens: np.ndarray) -> HiddenTargets:
        """The targets of the given tokens, in that order."""
        return replace(self, states=self.states[tokens])

    def first(self, count: int) -> HiddenTargets:
        """The targets of the first `count` tokens, without copying their states."""
        return replace(self, states=self.states[:count])

    def with_ids(self, id_map: np.ndarray) -> HiddenTargets:
        """The same targets in another vocabulary; what has no id there keeps its mass unassigned."""
        return replace(self, head=self.head and self.head.in_ids(id_map))


def _compose(first: mx.array | None, second: mx.array | None) -> mx.array | None:
    if first is None or second is None:
        return first if second is None else second
    none = (second < 0) | (second >= len(first))
    return mx.concatenate([first, mx.array([-1])])[mx.where(none, len(first), second)]


def _columns(id_map: np.ndarray) -> mx.array | None:
    """The teacher's id of each id that `id_map` gives; of two with one new id the lower counts."""
    if np.array_equal(id_map, np.arange(len(id_map))):
        return None
    columns = np.full(int(id_map.max()) + 1, -1, dtype=np.int32)
    known = np.flatnonzero(id_map >= 0)[::-1]
    columns[id_map[known]] = known
    return mx.array(columns)
