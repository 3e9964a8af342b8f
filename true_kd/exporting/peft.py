"""An adapter folder of PEFT, for transformers and whatever else reads that.

PEFT keeps both matrices transposed, names layers from its wrapper's root, and writes `lora_alpha` for scale times rank.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from safetensors.numpy import load_file, save

from true_kd import adapters
from true_kd.exporting.checking import Formula, Measured, Original, apply_formulas, dense
from true_kd.exporting.exporter import Exporter, Request
from true_kd.exporting.reading import Adapter, CannotExport, check_layers
from true_kd.files import write_json

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_ROOT = "base_model.model."
TOLERANCE = 1e-5

FAMILIES = frozenset(
    [
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
        *("olmo2", "granite", "smollm3", "starcoder2", "stablelm", "cohere"),
    ]
)
"""Those whose layers bear the same names in mlx-lm and in transformers, compared by logits with PEFT itself."""


def check(adapter: Adapter, request: Request) -> None:
    """Raise `CannotExport` for an adapter that PEFT would apply otherwise."""
    check_layers(adapter, "peft", FAMILIES)
    for layer in adapter.layers:
        if layer.kind == "embedding" and layer.m is not None:
            raise CannotExport(
                "peft",
                f"{layer.name} is an embedding with DoRA, which PEFT normalises otherwise",
                "DoRA on linear layers",
                "Use --to fused.",
            )


def write(adapter: Adapter, folder: Path, request: Request, base: str | None) -> tuple[str, ...]:
    """Write the folder; `base` is the id of the unquantised student."""
    tensors: dict[str, np.ndarray] = {}
    for layer in adapter.layers:
        name = f"{_ROOT}{layer.name}"
        parts = ("lora_embedding_A", "lora_embedding_B") if layer.kind == "embedding" else _LINEAR
        for part, values in zip(parts, (layer.a, layer.b), strict=True):
            tensors[f"{name}.{part}"] = np.ascontiguousarray(values.T)
        if layer.m is not None:
            tensors[f"{name}.lora_magnitude_vector"] = layer.m
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": False,
        "use_dora": adapter.type == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # Whole paths: by their last part PEFT would also adapt layers that were not trained.
        "target_modules": [layer.name for layer in adapter.layers],
    }
    write_json(folder / CONFIG, config)
    if base == adapter.local_path:
        return (f"{CONFIG} names {base} of this machine. To share it, give --base-model ID.",)
    return ()


_LINEAR = ("lora_A.weight", "lora_B.weight")


def measure(adapter: Adapter, folder: Path, original: Original, plain: nn.Module | None) -> Measured:
    """Read the folder back and apply it to the plain student as PEFT documents it."""
    assert plain is not None
    apply_formulas(plain, formulas(folder))
    return original.compare_logits(original.read(plain), TOLERANCE)


def formulas(folder: Path) -> dict[str, Formula]:
    """What PEFT computes for each layer of a folder; from the file alone, in its own orientation."""
    tensors = {name: mx.array(values) for name, values in load_file(folder / WEIGHTS).items()}
    config = adapters.read_json(folder / CONFIG)
    scaling = config["lora_alpha"] / config["r"]
    found: dict[str, Formula] = {}
    for name in config["target_modules"]:
        of = {
            part.removeprefix(f"{_ROOT}{name}."): values
            for part, values in tensors.items()
            if part.startswith(f"{_ROOT}{name}.")
        }
        if "lora_embedding_A" in of:
            found[name] = _embedding(of["lora_embedding_A"], of["lora_embedding_B"], scaling)
        else:
            down, up = of["lora_A.weight"], of["lora_B.weight"]
            magnitude = of.get("lora_magnitude_vector")
            found[name] = _linear(down, up, scaling) if magnitude is None else _dora(down, up, scaling, magnitude)
    return found


def _linear(down: mx.array, up: mx.array, scaling: float) -> Formula:
    """W x + (lora_alpha / r) B A x; Hu et al. 2021, section 4.1."""

    def formula(layer: nn.Module, inputs: mx.array) -> mx.array:
        return layer(inputs) + scaling * ((inputs @ down.T) @ up.T)

    return formula


def _embedding(down: mx.array, up: mx.array, scaling: float) -> Formula:
    def formula(layer: nn.Module, tokens: mx.array) -> mx.array:
        return layer(tokens) + scaling * (down.T[tokens] @ up.T)

    return formula


def _dora(down: mx.array, up: mx.array, scaling: float, magnitude: mx.array) -> Formula:
    """m (W + s B A) / ||W + s B A||, norms over the inputs of each output; Liu et al. 2024, equation 5."""

    def formula(layer: nn.Module, inputs: mx.array) -> mx.array:
        direction = dense(layer) + scaling * (up @ down)
        weight = magnitude[:, None] * direction / mx.linalg.norm(direction, axis=1, keepdims=True)
        out = inputs @ weight.T
        return out + layer.bias if "bias" in layer else out

    return formula


EXPORTER = Exporter(check, write, measure, on_plain=True, base="needed")
