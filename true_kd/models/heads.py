"""Takes a model apart at its output head, and proves that the parts give what the whole gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class Split:
    """A model as a body (tokens to hidden states) and an output head (hidden states to logits)."""

    body: Callable[[mx.array], mx.array]
    head: Callable[[mx.array], mx.array]
    fast: bool
    """False where the model could not be taken apart: then `body` gives the logits and `head` passes them on."""


def split_head(module: nn.Module) -> Split:
    """Take a model apart at its output head, proved on a few tokens to give the model's own logits.

    A model whose head does more than one linear map (soft-capping, scaling) is not taken apart: the proof fails, and
    the split passes whole logits through, which is right but slower and larger.
    """
    inner = getattr(module, "model", None)
    if inner is None or not callable(inner):
        return Split(module, lambda logits: logits, fast=False)
    head = getattr(module, "lm_head", None)
    if head is None and hasattr(inner, "embed_tokens"):
        head = inner.embed_tokens.as_linear
    if head is None:
        return Split(module, lambda logits: logits, fast=False)
    training = module.training
    module.eval()
    probe = mx.array([[1, 2, 3, 4]])
    expected = module(probe).astype(mx.float32)
    try:
        found = head(inner(probe)).astype(mx.float32)
        agrees = found.shape == expected.shape and mx.allclose(found, expected, rtol=1e-3, atol=1e-3).item()
    except (ValueError, TypeError):
        agrees = False
    if training:
        module.train()
    if not agrees:
        return Split(module, lambda logits: logits, fast=False)
    return Split(inner, head, fast=True)
