"""Fuses an adapter into its model through mlx-lm, and writes models as mlx-lm lays them out.

A layer is fused in float32 and stored as it was: what bfloat16 rounds away is rounded once.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from true_kd.files import save_tensors
from true_kd.models import opening

LayerKind = Literal["linear", "embedding", "experts", "other"]


def layer_kinds(module: nn.Module, names: Collection[str]) -> dict[str, LayerKind]:
    """What the layers of these dotted names are; names that the model does not have are left out."""
    return {name: _kind(layer) for name, layer in module.named_modules() if name in names}


def _kind(layer: nn.Module) -> LayerKind:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    if isinstance(layer, (SwitchLinear, QuantizedSwitchLinear)):
        return "experts"
    if type(layer) in (nn.Linear, nn.QuantizedLinear):
        return "linear"
    return "embedding" if type(layer) in (nn.Embedding, nn.QuantizedEmbedding) else "other"


def fuse_layers(module: nn.Module, config: dict[str, Any], keep_bits: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A model without its adapter, whose own weights do what they did together; and its config.

    Parameters
    ----------
    keep_bits
        layers that were quantised are quantised again as they were, which loses most of a small adapter; otherwise
        all of the model is unpacked.
    """
    fused = [(name, _fuse(layer, keep_bits)) for name, layer in module.named_modules() if hasattr(layer, "fuse")]
    module.update_modules(tree_unflatten(fused))
    if not keep_bits:
        module = opening._mlx_lm_utils().dequantize_model(module)
        config = {name: value for name, value in config.items() if name not in _PACKING}
    return module, config


_PACKING = ("quantization", "quantization_config")


def _fuse(layer: nn.Module, keep_bits: bool) -> nn.Module:
    inner = layer["linear"] if "linear" in layer else layer["embedding"]
    floats = [value.dtype for _, value in tree_flatten(inner.parameters()) if mx.issubdtype(value.dtype, mx.floating)]
    inner.set_dtype(mx.float32)
    fused = layer.fuse(dequantize=not keep_bits)
    # Of the mx and nv formats all is bytes.
    fused.set_dtype(floats[0] if floats else mx.bfloat16)
    mx.eval(fused.parameters())
    return fused


def save_model(folder: Path, module: nn.Module, config: dict[str, Any]) -> None:
    """Write weights and config.json into a folder, as `mlx_lm.load` reads them.

    Raises
    ------
    OSError
        when the disk is full.
    """
    utils = opening._mlx_lm_utils()
    weights = dict(tree_flatten(module.parameters()))
    shards = utils.make_shards(weights)
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_tensors(folder / name, shard, {"format": "mlx"})
        placed |= dict.fromkeys(shard, name)
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in weights.values())},
        "weight_map": dict(sorted(placed.items())),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    utils.save_config(dict(config), folder / "config.json")
