"""Whether numbers are finite: asked of whatever is saved, and of whatever was saved."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten


def is_finite(tree: Any) -> mx.array:
    """Whether all floats in a tree of arrays are finite numbers; a bool, computed when it is evaluated."""
    leaves = [leaf for _, leaf in tree_flatten(tree) if mx.issubdtype(leaf.dtype, mx.floating)]
    return mx.all(mx.stack([mx.all(mx.isfinite(leaf)) for leaf in leaves])) if leaves else mx.array(True)
