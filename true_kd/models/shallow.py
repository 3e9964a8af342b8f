"""Models cut to a few layers, with zeros for weights: made from the headers of a real one's files, to rehearse with.

What a pass through a model takes, of time and of memory, is linear in its layers, and zeros take as long as numbers.
No weight is read; a file of zeros takes no room where the file system knows holes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from true_kd.models.inspection import check_safetensors
from true_kd.models.opening import ModelOptions, describe
from true_kd.models.stand_in import TEXT_FILES

_DEPTHS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
"""How mlx-lm's families spell the number of their decoder layers."""
_NUMBERED = re.compile(r"(.+?)\.(\d+)\.(.+)")
"""A tensor of one of several layers: what they are in, the number, and the rest."""


class UnknownDepth(ValueError):
    """A model's config and tensors do not agree on what its decoder layers are."""


def count_layers(options: ModelOptions, seam: str) -> int:
    """The decoder layers of a model, as its config counts them and its tensors are numbered.

    Raises
    ------
    UnknownDepth
        when they do not agree.
    ModelError
        when there is no such model.
    """
    files = describe(options, seam)
    config = json.loads((files.path / "config.json").read_bytes())
    return _find_stack(config, [name for path in files.weights for name in check_safetensors(path)])[1]


def write_shallow(options: ModelOptions, seam: str, layers: int, into: Path) -> None:
    """Write the first `layers` layers of a model, and all of it that is no layer, as a model's folder of its own.

    Raises
    ------
    UnknownDepth
        see `count_layers`.
    """
    files = describe(options, seam)
    entries = {name: entry for path in files.weights for name, entry in _header(path).items()}
    config = json.loads((files.path / "config.json").read_bytes())
    stack, depth = _find_stack(config, list(entries))
    for name in TEXT_FILES:
        if (files.path / name).is_file() and name != "config.json":
            shutil.copyfile(files.path / name, into / name)
    (into / "config.json").write_text(json.dumps(_cut(config, depth, layers)), encoding="utf-8")
    kept, size = {}, 0
    for name, entry in entries.items():
        numbered = _NUMBERED.fullmatch(name)
        if numbered and numbered[1] == stack and int(numbered[2]) >= layers:
            continue
        start, end = entry["data_offsets"]
        kept[name] = {**entry, "data_offsets": [size, size + end - start]}
        size += end - start
    header = json.dumps({"__metadata__": {"format": "mlx"}, **kept}).encode()
    header += b" " * (-len(header) % 8)
    with (into / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


def _header(path: Path) -> dict[str, Any]:
    check_safetensors(path)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return header


def _find_stack(config: Any, names: list[str]) -> tuple[str, int]:
    """What the decoder layers are in, by the names of the tensors, and how many there are."""
    counts: dict[str, set[int]] = {}
    for name in names:
        if numbered := _NUMBERED.fullmatch(name):
            counts.setdefault(numbered[1], set()).add(int(numbered[2]))
    depths = set(_depths(config))
    stacks = {stack: len(found) for stack, found in counts.items() if found == set(range(len(found)))}
    fitting = [(stack, count) for stack, count in stacks.items() if count in depths]
    if len(fitting) != 1:
        raise UnknownDepth(f"{len(fitting)} stacks of layers fit its config, expected one")
    return fitting[0]


def _depths(config: Any) -> Iterator[int]:
    if isinstance(config, Mapping):
        for name, value in config.items():
            if name in _DEPTHS and type(value) is int:
                yield value
            yield from _depths(value)


def _cut(config: Any, depth: int, layers: int) -> Any:
    """A config of `depth` layers as one of `layers`: the number itself, and every list with an entry a layer."""
    if isinstance(config, Mapping):
        return {
            name: layers if name in _DEPTHS and value == depth else _cut(value, depth, layers)
            for name, value in config.items()
        }
    return config[:layers] if isinstance(config, list) and len(config) == depth else config
