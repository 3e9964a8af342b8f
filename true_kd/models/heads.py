"""Takes a model apart at its output head, and proves that the parts give what the whole gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from true_kd.errors import ModelError


@dataclass(frozen=True)
class Split:
    """A model as a body (tokens to hidden states) and an output head (hidden states to logits)."""

    body: Callable[[mx.array], mx.array]
    head: Callable[[mx.array], mx.array]
    fast: bool
    """False where the model could not be taken apart: then `body` gives the logits and `head` passes them on."""

    def states_at(self, tokens: mx.array, rows: mx.array) -> mx.array:
        """What enters the head at some positions of the flattened `tokens` [batch, sequence]; [rows, width]."""
        states = self.body(tokens)
        return states.reshape(-1, states.shape[-1])[rows]


def split_head(module: nn.Module) -> Split:
    """Take a model apart at its output head, proved on a few tokens to give the model's own logits.

    A model whose head does more than one linear map (soft-capping, scaling) is not taken apart: the proof fails, and
    the split passes whole logits through, which is right but slower and larger.
    """
    inner = getattr(module, "model", None)
    layer = _output_layer(module)
    if inner is None or not callable(inner) or layer is None:
        return Split(module, lambda logits: logits, fast=False)
    head = layer.as_linear if hasattr(layer, "as_linear") else layer
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


def save_head(module: nn.Module, path: Path) -> None:
    """Write a model's output head, quantised or not, as a safetensors file that `load_head` reads.

    Raises
    ------
    ModelError
        when the head is not one plain linear layer or embedding, such as one that bears an adapter.
    """
    layer = _output_layer(module)
    if type(layer) not in (nn.Linear, nn.Embedding, nn.QuantizedLinear, nn.QuantizedEmbedding):
        raise ModelError(
            f"teacher: its output head is a {type(layer).__name__}, expected a plain linear layer to keep for "
            "targets.preset exact. Choose another preset."
        )
    packing = {name: getattr(layer, name) for name in ("group_size", "bits", "mode") if hasattr(layer, name)}
    arrays = {name: value for name, value in layer.parameters().items() if isinstance(value, mx.array)}
    mx.save_safetensors(str(path), arrays, metadata={"packing": json.dumps(packing)})


def load_head(path: Path) -> Callable[[mx.array], mx.array]:
    """The output head of a file that `save_head` wrote: hidden states to logits."""
    arrays, metadata = mx.load(str(path), return_metadata=True)
    packing = json.loads(metadata["packing"])
    weight, bias = arrays["weight"], arrays.get("bias")
    scales = arrays.get("scales")

    def head(states: mx.array) -> mx.array:
        if scales is None:
            logits = states.astype(weight.dtype) @ weight.T
        else:
            # Scales of the mx and nv formats are bytes, which say nothing of the arithmetic.
            states = states.astype(mx.float32 if scales.dtype == mx.uint8 else scales.dtype)
            logits = mx.quantized_matmul(
                states, weight, scales=scales, biases=arrays.get("biases"), transpose=True, **packing
            )
        return logits if bias is None else logits + bias

    return head


def _output_layer(module: nn.Module) -> nn.Module | None:
    """The layer that gives the logits: the head, or the embedding that serves as one."""
    head = getattr(module, "lm_head", None)
    return head if head is not None else getattr(getattr(module, "model", None), "embed_tokens", None)
