"""What fits which machine: the largest batches of both phases, from the shapes of the models and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import mlx.nn as nn
from mlx.utils import tree_flatten

from true_kd.capture import FLOATS_HELD, ROWS_HELD
from true_kd.config import RunConfig
from true_kd.losses import chunk_rows
from true_kd.memory import METAL_SHARE, StepMemory
from true_kd.models import add_lora, cache_bytes, open_skeleton
from true_kd.options import record

MACHINES = (16, 32, 64, 128)
"""Memory of Macs, in GB."""
BATCHES = (64, 32, 16, 8, 4, 2, 1)


@record
class Fit:
    """What a Mac of some memory takes. Metal's limits are Apple's to set, and were not measured: see `budget_of`."""

    memory_gb: int
    """The machine's, in 2^30 bytes."""
    budget: int
    """Bytes that a run takes there at most."""
    capture_batch: int
    """The largest capture.batch_size whose teacher's phase fits; 0 where the teacher fits with none."""
    training_batch: int
    """The most sequences of training.max_seq_length in a micro-batch that fits; 0 where not even one does."""
    training_batch_recomputed: int
    """The same with training.grad_checkpoint."""


def budget_of(memory_gb: int) -> int:
    """Bytes that a run takes on a Mac of so many GB: a share of the working set that Metal recommends.

    That set is taken to be two thirds of the memory up to 36 GB and three quarters above, as macOS has it by default;
    nothing of it was measured on a Mac.
    """
    share = 2 / 3 if memory_gb <= 36 else 3 / 4
    return int(METAL_SHARE * share * memory_gb * 2**30)


def find_fits(config: RunConfig, vocabs: tuple[int, int], tokens: int, has_teacher: bool) -> list[Fit]:
    """The largest batches on each of MACHINES, models in the types that they are stored in.

    Parameters
    ----------
    vocabs
        logits of a token of teacher and student.
    tokens
        of the longest prompt and reply that the teacher is to meet.
    has_teacher
        whether the teacher's weights are wanted at all.
    """
    teacher = open_skeleton(config.teacher, "teacher", as_stored=True) if has_teacher else None
    student = open_skeleton(config.student, "student", as_stored=True)
    add_lora(student, config.lora)
    steps = [
        StepMemory.of(
            student,
            vocabs[1],
            chunk_rows(config.losses.chunk, vocabs[1]),
            recompute,
            config.targets.settings.kind == "hidden",
        )
        for recompute in (False, True)
    ]
    width = config.training.max_seq_length
    fits = []
    for memory_gb in MACHINES:
        budget = budget_of(memory_gb)
        captured = max(BATCHES)
        if teacher is not None:
            captured = _largest(lambda batch: _teacher_need(teacher, vocabs[0], batch, tokens), budget)
        left = budget - weight_bytes(student)
        trained = [_largest(lambda batch, step=step: step.bytes(batch, width, batch * width), left) for step in steps]
        fits.append(Fit(memory_gb, budget, captured, *trained))
    return fits


def _largest(need: Callable[[int], int], budget: int) -> int:
    return next((batch for batch in BATCHES if need(batch) <= budget), 0)


LOGITS_COPIES = 5
"""Of the logits that a capture holds back, while their targets are made."""


def _teacher_need(teacher: nn.Module, vocab: int, batch: int, tokens: int) -> int:
    """Bytes of weights, keys and values, and the logits that are made targets together."""
    held = 4 * LOGITS_COPIES * max(batch * vocab, min(ROWS_HELD * vocab, FLOATS_HELD))
    return weight_bytes(teacher) + cache_bytes(teacher, batch, tokens) + held


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a model's parameters, adapters included."""
    return sum(leaf.nbytes for _, leaf in tree_flatten(module.parameters()))
