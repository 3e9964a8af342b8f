"""The layout of an adapter folder: what mlx-lm reads, and what true-kd adds beside it.

`adapters.safetensors` and `adapter_config.json` load unchanged in mlx-lm; every checkpoint folder holds the same two.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from true_kd.errors import CacheError
from true_kd.files import CHECK, digest_file, digest_json, discard, remove, save_tensors, staging
from true_kd.layout import CONFIG, CONTROL, LINES, METRICS, REPORT, RUN, SUMMARY, SWEEP, WEIGHTS
from true_kd.models import LoraOptions, attach_adapter, check_safetensors, lora_parameters

OURS = "true_kd"
"""The key of an adapter's config under which true-kd's own facts are, which mlx-lm passes over."""

__all__ = ["CONFIG", "CONTROL", "LINES", "METRICS", "OURS", "REPORT", "RUN", "SUMMARY", "SWEEP", "WEIGHTS"]


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
            discard(path)


def save_adapter(
    folder: Path,
    weights: Mapping[str, mx.array],
    lora: LoraOptions,
    student: str,
    settings: Mapping[str, Any],
    run: Mapping[str, Any] | None = None,
) -> None:
    """Write weights and config, which bears the digests of both: one without its own other is noticed.

    All of it is on the disk before any of it takes its name, so that a full disk leaves what was there.

    Parameters
    ----------
    settings
        the KD settings that the config carries besides mlx-lm's own keys.
    run
        the resolved config of the run, to lie beside them; None for none.
    """
    mx.eval(list(weights.values()))
    # By name, as the file depends on the order: the same adapter is the same bytes.
    arrays = dict(sorted(weights.items()))
    config = {
        "fine_tune_type": lora.type,
        "num_layers": lora.num_layers,
        "lora_parameters": lora_parameters(lora),
        "model": student,
    }
    with staging(folder, last=WEIGHTS) as stage:
        need = sum(array.nbytes for array in arrays.values())
        staged = stage.write(WEIGHTS, lambda path: save_tensors(path, arrays), need)
        config = signed(config, {**settings, _SHA256: digest_file(staged)})
        if run is not None:
            stage.write_json(RUN, run)
        stage.write_json(CONFIG, config)
        if not _is_alike(folder, config):
            # mlx-lm would take old weights for those of a config that means others.
            remove(folder / WEIGHTS)


def signed(config: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's config with true-kd's own facts, the digest of the weights among them, and a digest of it all."""
    whole = {**config, OURS: {name: value for name, value in ours.items() if name != CHECK}}
    whole[OURS][CHECK] = digest_json(whole)
    return whole


_SHA256 = "weights_sha256"


def _is_alike(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the weights in a folder mean the same under another config."""
    old = read_json(folder / CONFIG)
    return isinstance(old, dict) and {**old, OURS: None} == {**config, OURS: None}


def check_adapter(folder: Path) -> None:
    """Compare an adapter of ours with the digests that it bears; one of another tool's bears none.

    Raises
    ------
    ValueError
        when a file of it is missing, damaged or another's.
    """
    config = read_json(folder / CONFIG)
    ours = config.get(OURS) if isinstance(config, dict) else None
    if ours is None and config is not None and not (folder / RUN).exists():
        return
    if not isinstance(ours, dict):
        raise ValueError(f"{CONFIG} is not what was written")
    if ours.pop(CHECK, None) != digest_json(config):
        raise ValueError(f"{CONFIG} is not what was written")
    if not (folder / WEIGHTS).is_file() or ours.get(_SHA256) != digest_file(folder / WEIGHTS):
        raise ValueError(f"{WEIGHTS} is not what its config says")


def require_whole(folder: Path) -> None:
    """Refuse an adapter that is not what was written, before anything is made of it.

    Raises
    ------
    CacheError
        with the file.
    """
    try:
        check_adapter(folder)
        check_safetensors(folder / WEIGHTS)
    except (OSError, ValueError) as error:
        raise CacheError(f"{folder}: not the adapter that was written ({error}). Distil it again.") from error


def copy_adapter(source: Path, destination: Path, alpha: float | int) -> None:
    """Copy an adapter's two files; the config of the copy says its scale as `lora_parameters.alpha` besides.

    That is scale times rank, for other tools than mlx-lm.
    """
    config = read_json(source / CONFIG)
    config["lora_parameters"]["alpha"] = alpha
    if isinstance(ours := config.get(OURS), dict):
        config = signed(config, ours)
    with staging(destination, last=WEIGHTS) as stage:
        weights = source / WEIGHTS
        stage.write(WEIGHTS, lambda path: shutil.copyfile(weights, path), weights.stat().st_size)
        stage.write_json(CONFIG, config)


def load_adapter(module: nn.Module, folder: Path) -> None:
    """Put a saved adapter on a freshly opened model, all of it.

    Raises
    ------
    CacheError
        when a file has changed since it was written, or the folder's tensors are not exactly those its config
        describes; mlx-lm itself takes a part silently.
    """
    try:
        check_adapter(folder)
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
    """Numbers in an adapter's file; ValueError where it is damaged."""
    return sum(math.prod(shape) for shape in check_safetensors(weights).values())


def read_json(path: Path) -> Any:
    """The content of a JSON file of ours; None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
