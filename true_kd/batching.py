"""Examples to batches: order, length bucketing and padding.

The batch of a step is a pure function of the examples, the seed and the step; nothing is drawn from a global state.
Within an epoch every example comes exactly once, the last partial batch included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Int
from pydantic import Field

from true_kd.examples import Example
from true_kd.losses import BatchTargets, HeadTargets, TokenTargets
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
    targets: BatchTargets
    response_tokens: int
    sequence_tokens: int
    """Prompt and response tokens, without padding."""
    padded_tokens: int
    """Batch times sequence: what the body computes."""


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


def batch_indices(lengths: Sequence[int], options: BatchOptions, seed: int, step: int) -> list[int]:
    """Example indices of micro-batch `step`, counted from 0 over all epochs."""
    per_epoch = -(-len(lengths) // options.batch_size)
    epoch, position = divmod(step, per_epoch)
    return epoch_batches(lengths, options, seed, epoch)[position]


Weigh = Callable[[SparseTargets, float], tuple[np.ndarray, np.ndarray]]
"""Weights and log-probabilities of sparse entries at a temperature."""


def collate(examples: Sequence[Example], temperature: float, weigh: Weigh = SparseTargets.at_temperature) -> Batch:
    """Pad examples to one length, and lay out their targets at the loss temperature, weighed by `weigh`."""
    width = max(len(example) for example in examples)
    tokens = np.zeros((len(examples), width), dtype=np.int32)
    for index, example in enumerate(examples):
        tokens[index, : len(example)] = example.tokens
    rows = np.concatenate([example.rows + index * width for index, example in enumerate(examples)])
    labels = np.concatenate([example.labels for example in examples])
    return Batch(
        tokens=mx.array(tokens),
        rows=mx.array(rows.astype(np.int32)),
        labels=mx.array(labels),
        targets=_lay_out(examples, temperature, weigh),
        response_tokens=len(labels),
        sequence_tokens=sum(len(example) for example in examples),
        padded_tokens=tokens.size,
    )


def _lay_out(examples: Sequence[Example], temperature: float, weigh: Weigh) -> BatchTargets:
    first = examples[0].targets
    if isinstance(first, HiddenTargets):
        states = np.concatenate([example.targets.states for example in examples])
        return HeadTargets(mx.array(states), first.head, temperature)
    return _pad_targets(examples, [weigh(example.targets, temperature) for example in examples])


def _pad_targets(examples: Sequence[Example], softened: Sequence[tuple[np.ndarray, np.ndarray]]) -> TokenTargets:
    counts = np.concatenate([np.diff(example.targets.offsets) for example in examples])
    filled = np.arange(counts.max(initial=1))[None] < counts[:, None]

    def padded(values: list[np.ndarray], dtype: type) -> mx.array:
        out = np.zeros(filled.shape, dtype=dtype)
        out[filled] = np.concatenate(values)
        return mx.array(out)

    return TokenTargets(
        ids=padded([np.maximum(example.targets.ids, 0) for example in examples], np.int32),
        weights=padded([weights for weights, _ in softened], np.float32),
        logprobs=padded([logprobs for _, logprobs in softened], np.float32),
    )
