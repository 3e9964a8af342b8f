"""Takes a model apart at its output head, and proves that the parts give what the whole gives.

The parts are the model's own code: a model runs up to its last hidden states, or from there on, with one of its modules
replaced in a passing copy. So soft-capping, scaling and biases are mlx-lm's, and no family is known here by name.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from true_kd.errors import ModelError
from true_kd.files import save_tensors
from true_kd.models.finite import is_finite
from true_kd.models.inspection import check_safetensors


@dataclass(frozen=True)
class Split:
    """A model as a body (tokens to hidden states) and an output head (hidden states to logits)."""

    body: Callable[..., mx.array]
    """Token ids [batch, sequence] to hidden states [batch, sequence, width], after the final norm; `cache`: what the
    layers keep of the tokens before, as mlx-lm has it."""
    head: Callable[[mx.array], mx.array]
    """Hidden states [..., width] to logits [..., vocab]: bias, scaling and soft-capping included."""
    layer: str
    """Dotted name, from the module, of the layer that holds the output weights: "lm_head", "model.embed_tokens"."""
    plain: bool
    """True where the head is no more than that layer's own linear map: no soft-capping, no scaling."""
    vocab_size: int
    """Logits per token."""

    def states_at(self, tokens: mx.array, rows: mx.array) -> mx.array:
        """What enters the head at some positions of the flattened `tokens` [batch, sequence]; [rows, width]."""
        states = self.body(tokens)
        return states.reshape(-1, states.shape[-1])[rows]


def split_head(module: nn.Module) -> Split:
    """Take a model apart at its output head, proved on a few tokens to give the model's own logits.

    The parts read the module's parameters and layers when they are called. The module stays as it is.

    Raises
    ------
    ModelError
        when the model cannot be taken apart: logits of all its tokens at once are more than memory holds.
    """
    training = module.training
    module.eval()
    try:
        return _split(module)
    finally:
        module.train(training)


def save_head(module: nn.Module, path: Path) -> None:
    """Write a model's output head, quantised or not, as a safetensors file that `load_head` reads.

    Raises
    ------
    ModelError
        when the head is not one plain linear layer or embedding, such as one that bears an adapter, or not of finite
        numbers.
    """
    split = split_head(module)
    layer = _at(module, split.layer)
    if not split.plain or type(layer) not in (nn.Linear, nn.Embedding, nn.QuantizedLinear, nn.QuantizedEmbedding):
        found = type(layer).__name__ if split.plain else f"{type(layer).__name__} with soft-capping or scaling"
        raise ModelError(
            f"teacher: its output head is a {found}, expected a plain linear layer to keep for "
            "targets.preset exact. Choose another preset."
        )
    packing = {name: getattr(layer, name) for name in ("group_size", "bits", "mode") if hasattr(layer, name)}
    arrays = {name: value for name, value in layer.parameters().items() if isinstance(value, mx.array)}
    if not is_finite(arrays).item():
        raise ModelError("teacher: its output head is not of finite numbers, expected sound weights. Choose another.")
    save_tensors(path, arrays, {"packing": json.dumps(packing)})


def load_head(path: Path) -> Callable[[mx.array], mx.array]:
    """The output head of a file that `save_head` wrote: hidden states to logits.

    Raises
    ------
    ValueError, KeyError, OSError
        when it is not what `save_head` writes.
    """
    shapes = check_safetensors(path)
    if len(shapes.get("weight", ())) != 2 or not set(shapes) <= {"weight", "bias", "scales", "biases"}:
        raise ValueError("no output head")
    arrays, metadata = mx.load(str(path), return_metadata=True)
    if not is_finite(arrays).item():
        raise ValueError("numbers that are not finite")
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


class _Proxy:
    """Stands in a shell for one of its modules: gives an answer known before, or keeps the module's own.

    All else that is asked of the module, such as the embedding that serves as output layer, comes from it.
    """

    def __init__(self, module: nn.Module, given: mx.array | None = None) -> None:
        self.module = module
        self.given = given
        self.answer: object = given
        self.asked = False

    def __call__(self, *inputs: object, **options: object) -> object:
        if self.given is None:
            self.answer = self.module(*inputs, **options)
        return self.answer

    def __getattr__(self, name: str) -> object:
        self.asked = True
        return getattr(self.module, name)


def _split(module: nn.Module) -> Split:
    """The split at the outermost place where the proof holds."""
    tokens = mx.array([[1, 2, 3, 4]])
    logits = module(tokens)
    for place in _places(module):
        body, head = _body(module, place), _head(module, place)
        states = body(tokens)
        if not (_could_enter_head(states, logits) and _gives(head, states, logits)):
            continue
        if name := _output_layer(module, place, states, logits.shape[-1]):
            linear = _linear_map(module, name)
            plain = isinstance(_at(module, name), nn.Module) and _agree(head, linear, states)
            return Split(body, linear if plain else head, name, plain, logits.shape[-1])
    family = type(module).__module__.rpartition(".")[2]
    raise ModelError(
        f"model of family {family}: no part of it gives hidden states that the rest turns into its logits, expected a "
        "body and an output head. Choose a model of another family."
    )


def _places(module: nn.Module) -> Iterator[str]:
    """Dotted names of the modules in a module, outermost first, without the blocks of its body, which lie in lists."""
    level = [("", module)]
    while level:
        level = [
            (f"{above}{name}.", child)
            for above, parent in level
            for name, child in parent.children().items()
            if isinstance(child, nn.Module)
        ]
        yield from (name[:-1] for name, _ in level)


def _at(module: nn.Module, place: str) -> nn.Module:
    return reduce(getattr, place.split("."), module)


def _shell(module: nn.Module, place: str, proxy: _Proxy) -> nn.Module:
    """A copy of a module that shares all its parts but the one at `place`, where the proxy stands."""
    shell = copy.copy(module)
    name, _, rest = place.partition(".")
    # As an item: some models ask whether a layer is "in" them.
    shell[name] = _shell(module[name], rest, proxy) if rest else proxy
    return shell


def _body(module: nn.Module, place: str) -> Callable[..., mx.array]:
    """The model up to what the module at `place` answers."""

    def body(tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        proxy = _Proxy(_at(module, place))
        # The logits are lazy, and let go before anything computes them.
        shell = _shell(module, place, proxy)
        shell(tokens) if cache is None else shell(tokens, cache=cache)
        return proxy.answer

    return body


def _head(module: nn.Module, place: str) -> Callable[[mx.array], mx.array]:
    """The model from the answer of the module at `place` on."""

    def head(states: mx.array) -> mx.array:
        rows = states.reshape(1, -1, states.shape[-1])
        shell = _shell(module, place, _Proxy(_at(module, place), given=rows))
        # The tokens give no more than a shape: whatever is made of them is lazy, and the proxy looks at none of it.
        logits = shell(mx.zeros(rows.shape[:2], dtype=mx.uint32))
        return logits.reshape(*states.shape[:-1], logits.shape[-1])

    return head


def _linear_map(module: nn.Module, name: str) -> Callable[[mx.array], mx.array]:
    """What the layer of this name, a linear layer or an embedding, makes of hidden states."""

    def linear(states: mx.array) -> mx.array:
        layer = _at(module, name)
        return getattr(layer, "as_linear", layer)(states)

    return linear


def _could_enter_head(states: object, logits: mx.array) -> bool:
    """Whether these may be the hidden states of the tokens of some logits, and are no logits themselves."""
    return isinstance(states, mx.array) and states.shape[:-1] == logits.shape[:-1] and states.shape != logits.shape


def _gives(head: Callable[[mx.array], mx.array], states: mx.array, logits: mx.array) -> bool:
    """Whether a head gives these logits, and those of a token from its own state alone, as no attention does."""
    found = head(states)
    alone = head(mx.concatenate([mx.zeros_like(states[:, :-1]), states[:, -1:]], axis=1))
    close = mx.allclose(found.astype(mx.float32), logits.astype(mx.float32), rtol=1e-2, atol=1e-2, equal_nan=True)
    return close.item() and mx.array_equal(found[:, -1], alone[:, -1], equal_nan=True).item()


def _output_layer(module: nn.Module, place: str, states: mx.array, vocab: int) -> str:
    """Name of what holds the output weights that the head after `place` reads; "" if nothing does."""
    for name in _places(module):
        layer = _at(module, name)
        # An adapted layer comes before the layer in it, and holds arrays of this length too.
        if any(isinstance(value, mx.array) and vocab in value.shape for value in layer.values()):
            proxy = _Proxy(layer)
            _head(_shell(module, name, proxy), place)(states)
            if proxy.asked or (isinstance(proxy.answer, mx.array) and proxy.answer.shape[-1] == vocab):
                return name
    # An array of the model itself, in no layer.
    arrays = (name for name, value in module.items() if isinstance(value, mx.array) and vocab in value.shape)
    return next(arrays, "")


def _agree(head: Callable[[mx.array], mx.array], linear: Callable[[mx.array], mx.array], states: mx.array) -> bool:
    """Whether a head is a linear map to the last bit, seen where soft-capping would show: at large logits, not at 0."""
    found = head(8 * states)
    return mx.any(found != 0).item() and mx.array_equal(found, linear(8 * states), equal_nan=True).item()
