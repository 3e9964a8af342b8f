"""Which micro-batches each step has, and how they are cut to fit the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.nn as nn
from mlx.utils import tree_flatten

from true_kd.backend import device_name
from true_kd.batching import Batch, BatchOrder, collate, round_up
from true_kd.examples import Example
from true_kd.losses import LossOptions, Objective, chunk_rows
from true_kd.memory import METAL_TOKENS, StepMemory, split_micro_batch
from true_kd.models import split_head
from true_kd.targets import HiddenTargets
from true_kd.training.options import TrainingOptions, shape_multiple


class Room:
    """What is left of a budget of memory above the weights, and the parts of a micro-batch that fit in it."""

    def __init__(self, memory: StepMemory, weights: int, budget: int, multiple: int = 1) -> None:
        """`weights`, of the student, and `budget`, which includes them, are in bytes; sequences are padded to a
        multiple of `multiple`."""
        self._memory = memory
        self._weights = weights
        self._left = budget - weights
        self._multiple = multiple
        self._most_tokens = METAL_TOKENS if device_name() == "metal" else None

    @classmethod
    def of(
        cls,
        student: nn.Module,
        examples: Sequence[Example],
        options: TrainingOptions,
        losses: LossOptions,
        budget: int,
    ) -> Room:
        """What an open student with its adapter leaves of the budget, for examples with targets like these."""
        vocab = split_head(student).vocab_size
        dense = isinstance(examples[0].targets, HiddenTargets)
        chunk = chunk_rows(losses.chunk, vocab)
        memory = StepMemory.of(student, vocab, chunk, options.grad_checkpoint, dense)
        weights = sum(leaf.nbytes for _, leaf in tree_flatten(student.parameters()))
        return cls(memory, weights, budget, shape_multiple(options, losses))

    @property
    def weights(self) -> int:
        """Bytes of the student's weights."""
        return self._weights

    def need(self, examples: Sequence[Example]) -> int:
        """Bytes that the largest of the examples takes when it stands alone, the weights included."""
        needs = [self._memory.bytes(1, self._width(example), len(example.kept)) for example in examples]
        return self._weights + max(needs)

    def need_together(self, examples: Sequence[Example]) -> int:
        """Bytes that examples take in one micro-batch, the weights included."""
        width = max(self._width(example) for example in examples)
        rows = sum(len(example.kept) for example in examples)
        return self._weights + self._memory.bytes(len(examples), width, rows)

    def cut(self, examples: Sequence[Example]) -> list[list[Example]]:
        """The examples in as few parts as fit; one that does not fit stands alone."""
        lengths = [self._width(example) for example in examples]
        rows = [len(example.kept) for example in examples]
        parts = split_micro_batch(lengths, rows, self._memory, self._left, self._most_tokens)
        return [[examples[at] for at in part] for part in parts]

    def _width(self, example: Example) -> int:
        return round_up(len(example), self._multiple)


class Plan:
    """The micro-batches of each step, laid out one after the other; a function of the seed and the step alone."""

    def __init__(
        self,
        examples: Sequence[Example],
        options: TrainingOptions,
        losses: LossOptions,
        seed: int,
        room: Room | None,
    ) -> None:
        self._examples = examples
        self._options = options
        self._losses = losses
        self._order = BatchOrder([len(example) for example in examples], options, seed)
        self._room = room
        self._multiple = shape_multiple(options, losses)

    def objective(self, iteration: int) -> Objective:
        """The losses of a step, counted from 1."""
        return self._losses.at((iteration - 1) / max(self._options.iters - 1, 1))

    def batches(self, first: int) -> Iterator[tuple[Batch, bool]]:
        """From step `first` to the end: a micro-batch, and whether it is the last of its step."""
        for iteration in range(first, self._options.iters + 1):
            temperature = self.objective(iteration).temperature
            parts = self.parts(iteration)
            for at, part in enumerate(parts, start=1):
                yield collate(part, temperature, multiple=self._multiple), at == len(parts)

    def parts(self, iteration: int) -> list[list[Example]]:
        """The micro-batches of a step, counted from 1."""
        accumulate = self._options.accumulate
        parts = []
        for step in range((iteration - 1) * accumulate, iteration * accumulate):
            examples = [self._examples[index] for index in self._order[step]]
            parts += [examples] if self._room is None else self._room.cut(examples)
        return parts
