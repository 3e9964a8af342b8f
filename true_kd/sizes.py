"""How large a model is and how fast it writes, on the machine at hand.

A teacher's size is noted in its cache while its weights are open, since later runs need them no more.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx

from true_kd.backend import device_name
from true_kd.files import digest_json, write_json
from true_kd.models import LanguageModel, ModelOptions, decoding_speed, describe, parameter_count

_PROMPTS = 3
_MOST_BYTES = 2**14


@dataclass(frozen=True)
class ModelSize:
    """What a model takes. None where it is not known."""

    parameters: int | None = None
    """Quantised weights counted unpacked."""
    bytes: int | None = None
    """Of its weights on disk."""
    tokens_per_second: float | None = None
    """That it writes to one prompt at a time, on this machine."""


def measure_size(
    model: LanguageModel, options: ModelOptions, seam: str, prompts: Sequence[Sequence[int]], tokens: int
) -> ModelSize:
    """The size of an open model; `tokens` written to each of the first `prompts` (token ids), 0 for no speed."""
    return ModelSize(
        parameters=parameter_count(model.module),
        bytes=sum(file.stat().st_size for file in describe(options, seam).weights),
        tokens_per_second=measure_speed(model, prompts, tokens),
    )


def measure_speed(model: LanguageModel, prompts: Sequence[Sequence[int]], tokens: int) -> float | None:
    """Tokens per second of an open model; `tokens` written to each of the first `prompts`, None for 0 of either."""
    return decoding_speed(model.module, prompts[:_PROMPTS], tokens) if tokens and prompts else None


def machine() -> str:
    """What speeds are compared on: those of another machine, or another way of computing there, say nothing here."""
    return f"{device_name()}, {mx.device_info().get('device_name', '')}, {platform.machine()}, mlx {mx.__version__}"


def size_file(name: str) -> str:
    """The name of the file in a cache with the teacher's size as measured on a machine."""
    return f"size-{digest_json(name)[:16]}.json"


def write_size(path: Path, size: ModelSize) -> None:
    """Write what `read_size` reads."""
    write_json(path, {"machine": machine(), **asdict(size)})


def read_size(path: Path) -> ModelSize:
    """A size from a file that a stranger may have written; its speed only where it was measured on this machine.

    Raises
    ------
    ValueError, OSError
        when it is not what `write_size` writes.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError("larger than any size is")
    try:
        record = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("nested deeper than any size is") from error
    if not isinstance(record, dict):
        raise ValueError("no object")
    parameters, size, speed = (record.get(name) for name in ("parameters", "bytes", "tokens_per_second"))
    if any(type(count) is not int or not 0 < count < 2**53 for count in (parameters, size)):
        raise ValueError("no counts of parameters and bytes")
    if speed is not None and not (type(speed) in (int, float) and 0 < speed < 1e12):
        raise ValueError("no speed above 0")
    return ModelSize(parameters, size, speed if record.get("machine") == machine() else None)
