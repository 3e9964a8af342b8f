"""Gradient checkpointing: a decoder layer keeps its inputs only, and its activations are computed again when the
backward pass comes by (Chen et al., 2016, https://arxiv.org/abs/1604.06174).

It belongs to one module: mlx-lm's `grad_checkpoint` patches the class, so a teacher of the same class pays as well.
Gradients are those without recomputation, dropout included: the second run draws the masks of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map


def recompute_layers(module: nn.Module) -> None:
    """Have the decoder layers of this module recompute their activations in the backward pass, in training mode only.

    Each layer gets a subclass of its own class: names of parameters, `isinstance` and everything in eval mode are as
    before. Doing it twice is doing it once.
    """
    for layer in module.layers:
        if not getattr(type(layer), "recomputes", False):
            layer.__class__ = _recomputing(type(layer))


@cache
def _recomputing(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer's class that recomputes."""
    members = {
        # A layer is called with whatever its family has: `mask`, `cache`, `offset` ... They go through untouched.
        "__call__": lambda layer, *inputs, **named: _call(kind.__call__, layer, inputs, named),
        "recomputes": True,
    }
    return type(kind.__name__, (kind,), members)


def _call(call: Callable, layer: nn.Module, inputs: tuple, named: dict[str, Any]) -> Any:
    if layer.training and _are_values((inputs, tuple(named.values()))):
        return _checkpointed(call, layer, inputs, named)
    return call(layer, *inputs, **named)


def _checkpointed(call: Callable, layer: nn.Module, inputs: tuple, named: dict[str, Any]) -> Any:
    """What the layer gives, with a gradient that runs it once more.

    Not `mx.checkpoint`: there the second run waits for the layer's outputs only, and the gradients of the parameters
    may be left to the end of the whole backward pass, holding the activations that they are made of. Here the second
    run waits for the cotangents, and the cotangent handed on waits for the parameters' gradients: one layer at a time.
    A LoRA student of 8 layers, hidden 256, 512 tokens, on a CPU: 116 MB above the weights without recomputation, 34
    with mlx-lm's, 25 with this; time 1.4 to 1.7 times that without, either way.
    """
    parameters = layer.trainable_parameters()
    arguments = (parameters, inputs, named)
    results: list[Any] = []

    def run(*arrays: mx.array) -> list[mx.array]:
        replaced, others, keywords = _replace(arguments, arrays)
        layer.update(replaced)
        found = call(layer, *others, **keywords)
        layer.update(parameters)
        results.append(found)
        return _floats(found)

    function = mx.custom_function(run)
    drawn = _random_state() if _draws(layer) else None

    @function.vjp
    def backward(primals: Sequence[mx.array], cotangents: Sequence[mx.array], _: Sequence[mx.array]) -> list[mx.array]:
        primals = mx.depends(list(primals), list(cotangents))
        if drawn is None:
            gradients = mx.vjp(run, primals, list(cotangents))[1]
        else:
            later = _random_state()
            mx.random.state[0][:] = mx.depends([drawn], list(cotangents))[0]
            gradients = mx.vjp(run, primals, list(cotangents))[1]
            mx.random.state[0][:] = later
        results.clear()
        own = len(_floats(parameters))
        return [*gradients[:own], *mx.depends(gradients[own:], gradients[:own])] if own else gradients

    outputs = function(*_floats(arguments))
    return _replace(results.pop(), outputs)


def _random_state() -> mx.array:
    """A copy of the state that the next random number is drawn from."""
    return mx.array(mx.random.state[0])


def _draws(layer: nn.Module) -> bool:
    """Whether a forward pass in training mode takes random numbers: mlx-lm's layers have no source but dropout."""
    return any(isinstance(part, nn.Dropout) and part._p_1 < 1 for part in layer.modules())


def _are_values(tree: Any) -> bool:
    """Whether a second run can see the same again: arrays and constants, and no cache, dictionary or other state."""
    if isinstance(tree, (tuple, list)):
        return all(_are_values(part) for part in tree)
    return tree is None or isinstance(tree, (mx.array, bool, int, float, str))


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def _floats(tree: Any) -> list[mx.array]:
    """The arrays of a tree that may have a gradient."""
    return [leaf for _, leaf in tree_flatten(tree) if _is_float(leaf)]


def _replace(tree: Any, arrays: Sequence[mx.array]) -> Any:
    """The tree with its `_floats` replaced, in their order."""
    remaining = iter(arrays)
    return tree_map(lambda leaf: next(remaining) if _is_float(leaf) else leaf, tree)
