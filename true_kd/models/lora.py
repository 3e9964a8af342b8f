"""Puts adapters on a student through mlx-lm, so that their files load there unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from pydantic import Field, field_validator

from true_kd.errors import InputError
from true_kd.models.inspection import check_safetensors, read_json
from true_kd.options import Options, PositiveInt
from true_kd.suggest import did_you_mean


class LoraOptions(Options):
    """The adapter, in mlx-lm's terms."""

    type: Literal["lora", "dora"] = "lora"
    """Low-rank update, or its magnitude-and-direction variant DoRA."""
    rank: PositiveInt = 16
    """Rank of the update."""
    scale: float = Field(default=2.0, gt=0.0)
    """Multiplies the update; what other tools call lora_alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input while training."""
    num_layers: int = Field(default=-1, ge=-1, json_schema_extra={"not": {"const": 0}})
    """How many layers get an adapter, counted from the last; -1 for all."""
    keys: tuple[str, ...] | None = None
    """Layers inside a block to adapt, such as self_attn.q_proj; null for every linear layer."""

    @field_validator("num_layers")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        # mlx-lm reads 0 as all layers.
        if value == 0:
            raise ValueError("0, expected -1 for all layers or a number from 1. Change it.")
        return value


def add_lora(module: nn.Module, options: LoraOptions) -> None:
    """Freeze the model and put adapters on it, through mlx-lm so that its files load there unchanged.

    Raises
    ------
    InputError
        when no layer bears one of `keys`, or a layer cannot be adapted this way.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    check_keys(module, options)
    module.freeze()
    try:
        linear_to_lora_layers(module, options.num_layers, lora_parameters(options), use_dora=options.type == "dora")
    except ValueError as error:
        raise InputError(f"lora: this student cannot be adapted ({error}). Change lora.keys or lora.type.") from error


def check_keys(module: nn.Module, options: LoraOptions) -> None:
    """Raise InputError when a key of `options` names no layer of the model."""
    layers = dict(module.layers[-1].named_modules()) | dict(module.named_modules())
    names = {name for name, layer in layers.items() if name and "weight" in layer}
    unknown = [key for key in options.keys or () if key not in names]
    if unknown or options.keys == ():
        within = sorted(name for name, layer in module.layers[-1].named_modules() if name and "weight" in layer)
        raise InputError(
            f"lora.keys: no layer of the student is called {', '.join(unknown) or 'nothing'}"
            f"{_meant(unknown[0], within) if unknown else ''}. Expected some of: {', '.join(within)}."
        )


def _meant(key: str, within: Sequence[str]) -> str:
    """The layer that was probably meant: other tools name it by the last part of its name."""
    same = next((name for name in within if name.rpartition(".")[2] == key), None)
    return did_you_mean(key, within) if same is None else f"; did you mean '{same}'?"


def lora_parameters(options: LoraOptions) -> dict[str, Any]:
    """The `lora_parameters` of mlx-lm's adapter_config.json."""
    parameters: dict[str, Any] = {"rank": options.rank, "scale": options.scale, "dropout": options.dropout}
    if options.keys is not None:
        parameters["keys"] = list(options.keys)
    return parameters


def trainable(module: nn.Module) -> dict[str, mx.array]:
    """Trainable parameters by dotted name, as adapters.safetensors stores them."""
    return dict(tree_flatten(module.trainable_parameters()))


def parameter_count(module: nn.Module) -> int:
    """Number of parameters, quantised weights counted unpacked."""
    from mlx_lm.utils import get_total_parameters

    return int(get_total_parameters(module))


def attach_adapter(module: nn.Module, folder: Path, weights: str) -> tuple[set[str], set[str]]:
    """Put the adapter of a folder, in its file `weights`, on a freshly opened model.

    Returns the names of its tensors, and of those that the model takes. Raises what mlx-lm raises (ValueError,
    KeyError, OSError ...) for tensors that it does not take. Missing ones it accepts silently: the caller compares.
    """
    from mlx_lm.tuner.utils import load_adapters

    read_json(folder / "adapter_config.json")
    shapes = check_safetensors(folder / weights)
    load_adapters(module, str(folder))
    taken = {name for name, _ in tree_flatten(module.parameters()) if name.rsplit(".", 1)[-1] in _ADAPTER_LEAVES}
    mx.eval(module.parameters())
    return set(shapes), taken


_ADAPTER_LEAVES = ("lora_a", "lora_b", "m")
