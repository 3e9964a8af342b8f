"""The certificate of a cache: how far its sample is from the full distribution, measured before training.

No teacher is needed. The targets' noise is in plain sight: the drawn entries of a token are an unbiased sample whose
signs can be flipped at random, which leaves noise of the same size and no signal. One gradient of the flipped
entries therefore measures, at the run's own student and temperature, how much of the gradient from the cache is
noise (a half-sample estimate; McCarthy, 1969). `scripts/bench_cache.py` compares it with the angle to full logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from true_kd.batching import Batch, collate
from true_kd.errors import InputError
from true_kd.examples import Example
from true_kd.losses import ForwardKL, Objective, chunks, token_losses
from true_kd.models import Split
from true_kd.options import Fraction, Options, PositiveInt, record
from true_kd.targets import SparseTargets
from true_kd.training import Gradients, Room, sum_gradients


class FidelityOptions(Options):
    """The certificate of the cached targets, made on held-out tokens before training."""

    tokens: PositiveInt = 1000
    """Held-out response tokens that are looked at."""
    least_cosine: Fraction = 0.9
    """Cosine between the gradient from the cache and that from full logits, below which the targets are poor."""
    when_poor: Literal["refuse", "warn"] = "refuse"
    """Refuse to train on poor targets, or warn. On fewer than 200 tokens it is a warning: they say too little."""


_ENOUGH = 200
"""Tokens from which on a poor certificate may refuse a run."""


@record
class Position:
    """A response token at which the cache says least about the teacher."""

    where: str
    """The prompt it answers."""
    token: int
    """Its place in the response, counted from 0."""
    tail_mass: float
    """Share of the distribution there that is sampled."""


@record
class Fidelity:
    """What the cache keeps of the teacher, at the run's temperature, over held-out response tokens."""

    temperature: float
    """Of the loss, the highest of the run."""
    tokens: int
    """Held-out response tokens that were looked at."""
    tail_mass: float
    """Mean share of the distribution that is sampled, not kept exactly."""
    kl_floor: float
    """Standard error that the sample leaves in the mean T^2 KL of these tokens, nats: less than this cannot be seen."""
    cosine: float
    """Between the adapter's KD gradient over these tokens from the cache and from full logits, as estimated."""
    worst: tuple[Position, ...]
    """The positions with the most tail mass, at most three."""
    bytes_per_token: float
    """On disk, over the files that hold the domain's targets."""
    cache_bytes: int
    """Of these files."""

    @property
    def angle(self) -> float:
        """Degrees between the two gradients."""
        return math.degrees(math.acos(self.cosine))

    def is_poor(self, options: FidelityOptions) -> bool:
        """Whether the targets are worse than the options allow."""
        return self.cosine < options.least_cosine

    def refuses(self, options: FidelityOptions) -> bool:
        """Whether a run on these targets must not start."""
        return self.is_poor(options) and options.when_poor == "refuse" and self.tokens >= _ENOUGH


def certify(
    student: nn.Module,
    examples: Sequence[Example],
    objective: Objective,
    batch_size: int,
    options: FidelityOptions,
    cache_bytes: int,
    cache_tokens: int,
    room: Room | None = None,
) -> Fidelity:
    """Measure the targets of the first held-out examples with a student whose adapter is in place.

    `cache_bytes` and `cache_tokens` are those of the domain's cache files; `room` cuts batches to fit the memory. A
    divergence that no sample can give is stood for by forward KL. Leaves the student in evaluation mode.

    Raises
    ------
    InputError
        when the student has no finite gradient.
    """
    chosen: list[Example] = []
    while len(chosen) < len(examples) and sum(len(example.kept) for example in chosen) < options.tokens:
        chosen.append(examples[len(chosen)])
    student.eval()
    divergence = objective.divergence if objective.divergence.sampled else ForwardKL()
    objective = replace(objective, divergence=divergence, alpha=1.0)
    temperature = objective.temperature
    tokens = sum(len(example.kept) for example in chosen)
    signal, noise, squares = 0.0, 0.0, 0.0
    tails = [_tail_mass(example, temperature) for example in chosen]
    if isinstance(chosen[0].targets, SparseTargets):
        rng = np.random.default_rng(0)
        batches = [chosen[at : at + batch_size] for at in range(0, len(chosen), batch_size)]
        groups = [part for batch in batches for part in (room.cut(batch) if room else [batch])]
        whole = [collate(group, temperature) for group in groups]
        flipped = [collate(group, temperature, lambda *given: _flip(*given, rng)) for group in groups]
        gradients = Gradients(student)
        signal = _square_norm(gradients, whole, objective, tokens)
        noise = _square_norm(gradients, flipped, objective, tokens)
        squares = sum(_square_sum(gradients.split, batch, objective) for batch in flipped)
        if not math.isfinite(signal + noise + squares):
            raise InputError(
                "student: the gradient of its loss on the validation prompts is not a finite number before any "
                "training, expected one. Choose another student, or a smaller lora.scale."
            )
    seen = _drawn_share(chosen, temperature, tails)
    places = [
        Position(example.where, int(example.kept[at]), float(mass))
        for example, masses in zip(chosen, tails, strict=True)
        for at, mass in enumerate(masses)
    ]
    return Fidelity(
        temperature=temperature,
        tokens=tokens,
        tail_mass=float(np.mean(np.concatenate(tails))),
        kl_floor=max(math.sqrt(squares) / tokens, temperature**2 * (1.0 - seen)),
        cosine=seen * (math.sqrt(max(0.0, 1.0 - noise / signal)) if signal > 0 else 1.0),
        worst=tuple(sorted(places, key=lambda place: -place.tail_mass)[:3]),
        bytes_per_token=cache_bytes / cache_tokens,
        cache_bytes=cache_bytes,
    )


def _tail_mass(example: Example, temperature: float) -> np.ndarray:
    targets = example.targets
    return targets.tail_mass(temperature) if isinstance(targets, SparseTargets) else np.zeros(len(targets))


def _drawn_share(examples: Sequence[Example], temperature: float, tails: Sequence[np.ndarray]) -> float:
    """Share of the distribution that the entries stand for, 1 unless most of the tail was never drawn.

    A sharp teacher's tail at temperature 1 may be too small for a single draw, and most of its distribution at 4: noise
    that no drawn entry shows. Its mass is known all the same, and is taken for lost: a cautious reading.
    """
    drawn, tail, total = 0.0, 0.0, 0
    for example, masses in zip(examples, tails, strict=True):
        if isinstance(example.targets, SparseTargets):
            # Ids that the student lacks were drawn as well.
            known = replace(example.targets, ids=np.zeros_like(example.targets.ids))
            weights, _ = known.at_temperature(temperature)
            drawn += float(weights[~example.targets.exact].sum())
        tail, total = tail + float(masses.sum()), total + len(masses)
    return 1.0 if drawn >= tail / 2 else 1.0 - (tail - drawn) / total


def _flip(targets: SparseTargets, temperature: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Weights whose expectation is zero and whose variance is that of the sample: drawn entries with random signs.

    Signs alternate along a row: what a systematic sample gets right together then cancels, as it does in the sample.
    """
    weights, logprobs = targets.at_temperature(temperature)
    drawn = np.cumsum(~targets.exact)
    # Counted within the row: how examples are batched changes nothing.
    drawn -= drawn[targets.offsets[:-1]][targets.rows]
    start = (rng.random(len(targets)) < 0.5)[targets.rows]
    signs = np.where((drawn + start) % 2 == 0, 1.0, -1.0)
    # An id that was nearly sure to be drawn is hardly chance: its weight varies by the square root of 1 - probability.
    return (signs * weights * np.sqrt(1.0 - targets.drawn_chance)).astype(np.float32), logprobs


def _square_norm(gradients: Gradients, batches: Sequence[Batch], objective: Objective, tokens: int) -> float:
    """Squared norm of the mean KD gradient over the batches with respect to the adapter."""
    _, gradient = sum_gradients(gradients, batches, objective, tokens)
    return sum(_squares(leaf) for _, leaf in tree_flatten(gradient))


def _square_sum(split: Split, batch: Batch, objective: Objective) -> float:
    """Sum over tokens of their squared contribution to T^2 times the divergence."""
    states = split.states_at(batch.tokens, batch.rows)
    total = 0.0
    for rows in chunks(split.head, states, objective):
        targets = batch.targets.rows(rows.start, rows.stop)
        kd, _ = token_losses(split.head(states[rows]), batch.labels[rows], targets, objective)
        total += _squares(kd)
    return total


def _squares(values: mx.array) -> float:
    """The sum of their squares, which float32 may not hold."""
    return float(np.sum(np.square(np.array(values.astype(mx.float32), dtype=np.float64))))
