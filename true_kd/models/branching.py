"""What a model says along one sequence, and would say next after made-up continuations of it.

The sequence is read once and its keys and values are kept; a continuation costs its own tokens and a few before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from true_kd.backend import device_name
from true_kd.models.heads import Split

Branch = tuple[int, tuple[int, ...]]
"""A continuation: how many tokens of the sequence come before it, and its own tokens."""

_ROWS = 32
"""Continuations computed at a time: the keys and values of the sequence are there once for each."""


@dataclass(frozen=True)
class Grid:
    """Which continuations are computed together, and what their shapes are rounded up to."""

    window: int
    """Continuations that leave the sequence within so many tokens are computed from the first of these on."""
    step: int = 1
    """They begin at a multiple of this, and are filled up to one on the right."""
    rows: int = 1
    """Their number is filled up to a multiple of this."""


_FINE, _COARSE = Grid(3), Grid(16, 8, 8)


def _grid() -> Grid:
    """Few tokens that are computed twice; on CUDA few shapes, each of which costs some 45 ms when it comes first
    (measured on an H200 with a model of 1.5 G parameters; a batch of 32 whose shape was there before takes 35)."""
    return _COARSE if device_name() == "cuda" else _FINE


class Branches:
    """One sequence, and its continuations a batch at a time."""

    def __init__(self, module: nn.Module, split: Split, tokens: Sequence[int], grid: Grid | None = None) -> None:
        """`split` is the model's own; `grid` None for what suits the device."""
        self._grid = grid or _grid()
        self._module = module
        self._split = split
        self._tokens = list(tokens)

    def logits(self, start: int, stop: int) -> mx.array:
        """What the model says after each token of the sequence from `start` up to `stop`; [tokens, vocab]."""
        return self._split.head(self._sequence[1][start:stop])

    def logprobs(self, asked: Sequence[Branch]) -> np.ndarray:
        """Log-probabilities of the token after each continuation, nats, float32 [asked, vocab]."""
        found: list[np.ndarray | None] = [None] * len(asked)
        order = sorted(range(len(asked)), key=lambda at: asked[at][0])
        while order:
            first = asked[order[0]][0] // self._grid.step * self._grid.step
            group = [at for at in order[:_ROWS] if asked[at][0] < first + self._grid.window]
            order = order[len(group) :]
            for at, row in zip(group, self._read(first, [asked[at] for at in group]), strict=True):
                found[at] = row
        return np.stack(found) if found else np.zeros((0, 0), dtype=np.float32)

    def _read(self, first: int, group: Sequence[Branch]) -> np.ndarray:
        """Continuations that begin at `first` or a little later."""
        cache, _ = self._sequence
        # Whatever keeps more than keys and values, such as a state, reads every continuation from the beginning.
        first = first if cache else 0
        paths = [[*self._tokens[first:start], *path] for start, path in group]
        width = _round_up(max(len(path) for path in paths), self._grid.step)
        count = _round_up(len(paths), self._grid.rows)
        paths += paths[:1] * (count - len(paths))
        # Padding on the right is seen by nothing before it.
        padded = mx.array([path + [0] * (width - len(path)) for path in paths])
        # Logits of whole sequences side by side would not fit into memory: the head reads the last of each alone.
        last = mx.array([len(path) - 1 for path in paths])[:, None, None]
        states = self._split.body(padded, self._copies(first, count) if first else None)
        rows = self._split.head(mx.take_along_axis(states, last, axis=1)[:, 0]).astype(mx.float32)
        return np.array(rows - mx.logsumexp(rows, axis=-1, keepdims=True))[: len(group)]

    @cached_property
    def _sequence(self) -> tuple[list[Any], mx.array]:
        """The cache of every layer, none where one is of a kind that cannot be cut to any length; and the states that
        enter the head, [tokens, width]."""
        from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

        cache = make_prompt_cache(self._module)
        if any(type(layer) not in (KVCache, RotatingKVCache) for layer in cache):
            return [], self._split.body(mx.array([self._tokens]))[0]
        # Read at once, so that a window's cache has all of it, in order.
        states = self._split.body(mx.array([self._tokens]), cache)[0]
        mx.eval(states, [(layer.keys, layer.values) for layer in cache])
        return cache, states

    def _copies(self, length: int, rows: int) -> list[Any]:
        """The cache as it was after `length` tokens, for so many sequences side by side."""
        from mlx_lm.models.cache import KVCache, RotatingKVCache

        copies = []
        for layer in self._sequence[0]:
            is_window = type(layer) is RotatingKVCache
            copy = RotatingKVCache(layer.max_size, layer.keep) if is_window else KVCache()
            arrays = (mx.repeat(array[..., :length, :], rows, axis=0) for array in (layer.keys, layer.values))
            copy.state = (*arrays, length, layer.keep, layer.max_size, length) if is_window else (*arrays, length)
            copies.append(copy)
        return copies


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
