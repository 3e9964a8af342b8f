"""The layout of an adapter folder: what mlx-lm reads, and what true-kd adds beside it.

`adapters.safetensors` and `adapter_config.json` load unchanged in mlx-lm; every checkpoint folder holds the same two.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from true_kd.errors import CacheError
from true_kd.files import write_atomic, write_json
from true_kd.models import LoraOptions, attach_adapter, lora_parameters

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
METRICS = "kd_metrics.json"
RUN = "run.json"
SUMMARY = "kd_summary.json"
REPORT = "report.html"
CONTROL = "control_sft"
"""Folder inside that of a domain: the adapter of the control, with the files of a domain of its own."""


def checkpoint_folder(folder: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return folder / f"checkpoint_{iteration}"


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoint folders of a domain by iteration."""
    found = {}
    for path in folder.glob("checkpoint_*"):
        number = path.name.removeprefix("checkpoint_")
        named = number.isdecimal() and path == checkpoint_folder(folder, int(number))
        if named and path.is_dir() and not path.is_symlink():
            found[int(number)] = path
    return found


def remove_checkpoints(folder: Path, after: int) -> None:
    """Delete the checkpoint folders of iterations beyond `after`."""
    for iteration, path in checkpoints(folder).items():
        if iteration > after:
            shutil.rmtree(path, ignore_errors=True)


def save_adapter(
    folder: Path, weights: Mapping[str, mx.array], lora: LoraOptions, student: str, settings: Mapping[str, Any]
) -> None:
    """Write weights and config; `settings` are the KD settings that the config carries besides mlx-lm's own keys."""
    mx.eval(list(weights.values()))
    config = {
        "fine_tune_type": lora.type,
        "num_layers": lora.num_layers,
        "lora_parameters": lora_parameters(lora),
        "model": student,
        "true_kd": dict(settings),
    }
    write_json(folder / CONFIG, config)
    # By name, as the file depends on the order: the same adapter is the same bytes.
    write_atomic(folder / WEIGHTS, lambda path: mx.save_safetensors(str(path), dict(sorted(weights.items()))))


def load_adapter(module: nn.Module, folder: Path) -> None:
    """Put a saved adapter on a freshly opened model, all of it.

    Raises
    ------
    CacheError
        when the folder's tensors are not exactly those its config describes; mlx-lm itself takes a part silently.
    """
    try:
        found, expected = attach_adapter(module, folder, WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CacheError(f"{folder}: not an adapter of this student ({error}). Distil it again.") from error
    if found != expected:
        raise CacheError(
            f"{folder / WEIGHTS}: {len(found)} tensors, expected the {len(expected)} of its config. Distil it again."
        )
    # The layers that bear it are new, and drop out inputs until they are told not to.
    module.eval()


def count_parameters(weights: Path) -> int:
    """Numbers in an adapter's file."""
    return sum(array.size for array in mx.load(str(weights)).values())


def read_json(path: Path) -> Any:
    """The content of a JSON file of ours; None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
