"""A LoRA file of llama.cpp: the same numbers under its names, for any GGUF of the same student.

Two things go wrong without an error there: without `adapter.lora.alpha` the update is taken once instead of scale
times, and the llama family's query and key rows are in another order. Both are in what is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from true_kd.errors import CacheError
from true_kd.exporting.checking import Formula, Measured, Original, apply_formulas
from true_kd.exporting.exporter import Exporter, Request
from true_kd.exporting.reading import Adapter, CannotExport, check_layers

TOLERANCE = 1e-3

ARCHITECTURES = {
    **{"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"},
    **{"gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3"},
}
"""The architecture of llama.cpp by mlx-lm's model type: those that were compared by logits with llama.cpp itself."""
_PERMUTED = ("llama",)
"""Architectures that rotate pairs of neighbours, where the weights of the hub rotate the halves of a head."""


def check(adapter: Adapter, request: Request) -> None:
    """Raise `CannotExport` for an adapter that has no GGUF, or that llama.cpp would apply otherwise."""
    if adapter.type == "dora":
        raise CannotExport(
            "gguf",
            "a DoRA adapter, and GGUF has no place for its magnitudes",
            "a LoRA adapter",
            "Use --to fused or --to peft, or distil with lora.type lora.",
        )
    check_layers(adapter, "gguf", ARCHITECTURES)
    if adapter.config.get("rope_traditional"):
        raise CannotExport(
            "gguf",
            "rope_traditional is set, and llama.cpp would rotate other pairs",
            "a student of the usual rotation",
            "Use --to fused.",
        )


def file_name(adapter: Adapter) -> str:
    """Of the file in the folder."""
    return f"{adapter.name}-lora.gguf"


def write(adapter: Adapter, folder: Path, request: Request, base: str | None) -> tuple[str, ...]:
    """Write the file; `base` is the id of the unquantised student, where it is known."""
    import gguf

    architecture = ARCHITECTURES[adapter.model_type]
    names = _tensor_names(architecture, adapter)
    writer = gguf.GGUFWriter(folder / file_name(adapter), architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.alpha))
    writer.add_name(f"{adapter.name} adapter")
    if base is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.rsplit("/", 1)[-1])
    for layer in adapter.layers:
        up = layer.b.T
        heads = _permuted_heads(architecture, layer.name, adapter.config)
        if heads:
            up = _permute(up, heads)
        # Rows of an embedding's first matrix are looked up by token, so they stay rows.
        down = layer.a if layer.kind == "embedding" else layer.a.T
        writer.add_tensor(f"{names[layer.name]}.lora_a", np.ascontiguousarray(down))
        writer.add_tensor(f"{names[layer.name]}.lora_b", np.ascontiguousarray(up))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ()


def _tensor_names(architecture: str, adapter: Adapter) -> dict[str, str]:
    """llama.cpp's name of each adapted layer's weights."""
    import gguf

    [number] = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    table = gguf.get_tensor_name_map(number, int(adapter.config["num_hidden_layers"]))
    found = {}
    for layer in adapter.layers:
        name = table.get_name(layer.name)
        if name is None:
            raise CannotExport(
                "gguf", f"{layer.name} has no name in llama.cpp", "layers that it knows", "Leave it out of lora.keys."
            )
        found[layer.name] = f"{name}.weight"
    return found


def _permuted_heads(architecture: str, layer: str, config: Any) -> int:
    """Heads of a layer whose rows llama.cpp has in another order; 0 for others."""
    if architecture not in _PERMUTED:
        return 0
    queries = int(config["num_attention_heads"])
    part = layer.rpartition(".")[2]
    return {"q_proj": queries, "k_proj": int(config.get("num_key_value_heads") or queries)}.get(part, 0)


def _permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head, halves first, as pairs of neighbours."""
    size = rows.shape[0] // heads
    return rows.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def measure(adapter: Adapter, folder: Path, original: Original, plain: nn.Module | None) -> Measured:
    """Read the file back and apply it to the plain student as llama.cpp does."""
    assert plain is not None
    apply_formulas(plain, formulas(adapter, folder / file_name(adapter)))
    return original.compare_logits(original.read(plain), TOLERANCE)


def formulas(adapter: Adapter, path: Path) -> dict[str, Formula]:
    """What llama.cpp computes for each layer, from the file alone but for the student's sizes."""
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: mx.array(np.array(tensor.data)) for tensor in reader.tensors}
    field = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA)
    alpha = float(field.contents()) if field is not None else 0.0
    architecture = str(reader.get_field(gguf.Keys.General.ARCHITECTURE).contents())
    found: dict[str, Formula] = {}
    for name, theirs in _tensor_names(architecture, adapter).items():
        down, up = tensors.pop(f"{theirs}.lora_a"), tensors.pop(f"{theirs}.lora_b")
        # llama_adapter_lora_weight::get_scale: no alpha is a scale of 1.
        scale = alpha / up.shape[-1] if alpha else 1.0
        heads = _permuted_heads(architecture, name, adapter.config)
        order = mx.array(_neighbours(up.shape[0], heads)) if heads else None
        is_table = theirs == "token_embd.weight"
        found[name] = _lookup(down, up, scale) if is_table else _linear(down, up, scale, order)
    if tensors:
        raise CacheError(f"{path}: {len(tensors)} tensors of no layer, expected none. Please report it.")
    return found


def _neighbours(rows: int, heads: int) -> list[int]:
    """Where in llama.cpp's order each of the student's rows is.

    The student rotates rows i and i + size/2 of a head together, llama.cpp rows 2i and 2i + 1.
    """
    size = rows // heads
    return [head * size + 2 * (row % (size // 2)) + row // (size // 2) for head in range(heads) for row in range(size)]


def _linear(down: mx.array, up: mx.array, scale: float, order: mx.array | None) -> Formula:
    def formula(layer: nn.Module, inputs: mx.array) -> mx.array:
        update = scale * ((inputs @ down.T) @ up.T)
        return layer(inputs) + (update if order is None else update[..., order])

    return formula


def _lookup(down: mx.array, up: mx.array, scale: float) -> Formula:
    def formula(layer: nn.Module, tokens: mx.array) -> mx.array:
        return layer(tokens) + scale * (down[tokens] @ up.T)

    return formula


EXPORTER = Exporter(check, write, measure, on_plain=True, base="if known")
