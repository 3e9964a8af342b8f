"""Two small computations that show whether what is installed computes, and computes rightly."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from true_kd.doctor.verdicts import Check
from true_kd.models import ModelOptions, open_model
from true_kd.suggest import printable, redact

PROMPT = (
    "<|im_start|>user\nGoal: do laundry. Put in order: fold, dry, wash, spin, iron.<|im_end|><|im_start|>assistant\n"
)
REPLY = "You wash at once and end with fold. That gives:\nanswer: wash, spin, dry, iron, fold<|im_end|>"
"""A line of the pocket models' own prompts, and what their teacher says to it."""

MOST_NATS = 1.0
"""Nats per token that the student takes to read the reply at most: 0.29 on a CPU, 6.6 by chance."""

OFF = 0.1
"""How far from the exact product a matrix product may be: one of 129 terms of about 1, on a GPU in 10 bits."""


def try_matmul() -> Check:
    """Multiply two matrices, and compare with what numpy makes of them."""
    return _tried("matrix product", _matmul)


def _matmul() -> str | None:
    numbers = np.random.default_rng(0)
    left = numbers.normal(size=(257, 129)).astype(np.float32)
    right = numbers.normal(size=(129, 65)).astype(np.float32)
    product = np.array(mx.array(left) @ mx.array(right))
    off = float(np.abs(product - left.astype(np.float64) @ right).max())
    return None if off < OFF else f"off by {off:.3g}"


def try_model() -> Check:
    """Open the smallest model that comes along, and have it read a line of its own kind."""
    return _tried("pocket model", _model)


def _model() -> str | None:
    model = open_model(ModelOptions(model="pocket:student"), "student")
    opening, reply = (model.tokenizer.encode(text) for text in (PROMPT, REPLY))
    logits = model.module(mx.array([[*opening, *reply]]))[0, len(opening) - 1 : -1].astype(mx.float32)
    nats = nn.losses.cross_entropy(logits, mx.array(reply), reduction="mean").item()
    return None if nats < MOST_NATS else f"{nats:.3g} nats a token, expected below {MOST_NATS:g}"


def _tried(name: str, compute: Callable[[], str | None]) -> Check:
    started = time.perf_counter()
    try:
        fault = compute()
    except Exception as error:  # noqa: BLE001 - a broken installation fails in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        fault = f"fails ({printable(redact(reason))[:200]})"
    if fault is None:
        return Check(name, "ok", f"right, in {time.perf_counter() - started:.1f} s")
    return Check(
        name,
        "problem",
        fault,
        "What is installed does not compute rightly. Run pip install --force-reinstall mlx mlx-lm (with the extra you "
        "use), and on Linux try TRUE_KD_BLAS=off.",
    )
