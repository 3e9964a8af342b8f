"""Examples to batches: order, length bucketing and padding.

The batch of a step is a pure function of the examples, the seed and the step; nothing is drawn from a global state.
Within an epoch every example comes exactly once, the last partial batch included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from true_kd.examples import Example
from true_kd.losses import BatchTargets, HeadTargets, RankedTargets, TokenTargets
from true_kd.options import Options, PositiveInt
from true_kd.targets import HiddenTargets, SparseTargets


class BatchOptions(Options):
    """How examples are grouped."""

    batch_size: PositiveInt = 4
    """Sequences in a micro-batch."""
    max_seq_length: int = Field(default=2048, ge=8)
    """Longest sequence in tokens, prompt and response; longer responses are cut at the end, and counted."""
    bucket: PositiveInt = 16
    """Batches whose examples are sorted by length together: larger pads less and mixes less."""


@dataclass(frozen=True)
class Batch:
    """Padded sequences and, flattened over the batch, their R response tokens that count."""

    tokens: Int[mx.array, "batch sequence"]
    """Right-padded with id 0: under causal attention padding on the right reaches nothing before it."""
    rows: Int[mx.array, " rows"]
    """Positions in the flattened `tokens` that predict a response token."""
    labels: Int[mx.array, " rows"]
    weights: Float[mx.array, " rows"]
    """What each token weighs in the loss; 0 for rows that only pad."""
    targets: BatchTargets
    response_tokens: int
    sequence_tokens: int
    """Prompt and response tokens, without padding."""
    padded_tokens: int
    """Batch times sequence: what the body computes."""

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays, in the order that `with_arrays` takes them."""
        return [self.tokens, self.rows, self.labels, self.weights, *self.targets.arrays]

    def with_arrays(self, arrays: Sequence[mx.array]) -> Batch:
        """A batch of other arrays, in which everything else is as here."""
        tokens, rows, labels, weights, *targets = arrays
        return replace(
            self, tokens=tokens, rows=rows, labels=labels, weights=weights, targets=self.targets.with_arrays(targets)
        )


def epoch_batches(lengths: Sequence[int], options: BatchOptions, seed: int, epoch: int) -> list[list[int]]:
    """Example indices of each batch of an epoch, in the order they are trained.

    Shuffled, sorted by length within stretches of `bucket` batches, cut into batches, and the batches shuffled.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    stretch = options.batch_size * options.bucket
    batches = []
    for start in range(0, len(order), stretch):
        block = sorted(order[start : start + stretch], key=lambda index: lengths[index])
        batches += [block[at : at + options.batch_size] for at in range(0, len(block), options.batch_size)]
    return [[int(index) for index in batches[at]] for at in rng.permutation(len(batches))]


class BatchOrder:
    """The micro-batches of a run, counted from 0 over all epochs; each a pure function of its number and the seed."""

    def __init__(self, lengths: Sequence[int], options: BatchOptions, seed: int) -> None:
        self._lengths = lengths
        self._options = options
        self._seed = seed
        self._epoch, self._batches = 0, epoch_batches(lengths, options, seed, 0)

    def __getitem__(self, step: int) -> list[int]:
        """Example indices of micro-batch `step`."""
        epoch, position = divmod(step, len(self._batches))
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, epoch_batches(self._lengths, self._options, self._seed, epoch)
        return self._batches[position]


Weigh = Callable[[SparseTargets, float], tuple[np.ndarray, np.ndarray]]
"""Weights and log-probabilities of sparse entries at a temperature."""


def collate(
    examples: Sequence[Example], temperature: float, weigh: Weigh = SparseTargets.at_temperature, multiple: int = 1
) -> Batch:
    """Pad examples to one length, and lay out their targets at the loss temperature, weighed by `weigh`.

    Sequences and rows are padded to a multiple of `multiple`, rows by such as weigh nothing: shapes that repeat are
    compiled once.
    """
    width = round_up(max(len(example) for example in examples), multiple)
    tokens = np.zeros((len(examples), width), dtype=np.int32)
    for index, example in enumerate(examples):
        tokens[index, : len(example)] = example.tokens
    count = sum(len(example.kept) for example in examples)
    rows = round_up(count, multiple)

    def padded(parts: Sequence[np.ndarray], dtype: type) -> mx.array:
        out = np.zeros(rows, dtype=dtype)
        out[:count] = np.concatenate(parts)
        return mx.array(out)

    return Batch(
        tokens=mx.array(tokens),
        rows=padded([example.rows + index * width for index, example in enumerate(examples)], np.int32),
        labels=padded([example.labels for example in examples], np.int32),
        weights=padded([example.weights for example in examples], np.float32),
        targets=_lay_out(examples, temperature, weigh, rows, multiple),
        response_tokens=count,
        sequence_tokens=sum(len(example) for example in examples),
        padded_tokens=tokens.size,
    )


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is no smaller than `number`."""
    return -(-number // multiple) * multiple


def _lay_out(examples: Sequence[Example], temperature: float, weigh: Weigh, rows: int, multiple: int) -> BatchTargets:
    first = examples[0].targets
    if isinstance(first, HiddenTargets):
        states = np.concatenate([example.targets.states for example in examples])
        states = np.concatenate([states, np.zeros((rows - len(states), states.shape[1]), dtype=states.dtype)])
        return HeadTargets(mx.array(states), first.head, temperature)
    # Together: softening a few dozen entries costs less than the calls it takes.
    targets = SparseTargets.join([example.targets for example in examples])
    counts = np.zeros(rows, dtype=np.int64)
    counts[: len(targets)] = np.diff(targets.offsets)
    filled = np.arange(round_up(int(counts.max(initial=1)), multiple))[None] < counts[:, None]

    def padded(values: np.ndarray, dtype: type) -> mx.array:
        out = np.zeros(filled.shape, dtype=dtype)
        out[filled] = values
        return mx.array(out)

    weights, logprobs = weigh(targets, temperature)
    entries = TokenTargets(
        ids=padded(np.maximum(targets.ids, 0), np.int32),
        weights=padded(weights, np.float32),
        logprobs=padded(logprobs, np.float32),
        exact=padded(targets.exact, np.bool_),
    )
    return RankedTargets(entries) if targets.is_ranked else entries
