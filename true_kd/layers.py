"""Puts the layers of a config over each other, and knows of each value which layer it came from.

A layer is a file or a flag. Of a value that two of them give, the later one counts, in messages as in the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from true_kd.errors import ConfigError
from true_kd.validation import dotted
from true_kd.yaml_file import Document, KeyPath

SEAMS = ("teacher", "student")
"""The keys under which a model stands: its name alone, or a mapping."""

DEFAULT = "default"
"""The origin of a value that no layer gives."""


@dataclass(frozen=True)
class Override:
    """One value from the command line, and the flag that gave it."""

    flag: str
    path: KeyPath
    value: Any


@dataclass(frozen=True)
class Layers:
    """The layers of a config, the lowest first: files, then flags."""

    documents: Sequence[Document]
    """At least one."""
    overrides: Sequence[Override]

    def merged(self, start: Mapping[str, Any]) -> dict[str, Any]:
        """What all of them say together, over `start`.

        Raises
        ------
        ConfigError
            for a flag whose path leads through a value that holds no keys.
        """
        data: dict[str, Any] = {}
        merge(data, start)
        for document in self.documents:
            merge(data, by_name(document.data))
        for override in self.overrides:
            if _names_model(override):
                merge(data, by_name({str(override.path[0]): override.value}))
            else:
                put(data, override.path, override.value, override.flag)
        return data

    def where(self, path: KeyPath) -> str:
        """The place to look at for what is wrong at `path`: a flag, or the line of a file, of the nearest key."""
        flags = {override.path: override.flag for override in self.overrides}
        for length in range(len(path), 0, -1):
            below = [flag for given, flag in flags.items() if given[:length] == path[:length]]
            if below:
                return below[-1]
            for document in reversed(self.documents):
                if document.line(path[:length]) is not None:
                    return document.where(path[:length])
        return self.documents[0].name

    def origin(self, path: KeyPath) -> str:
        """Where the value at `path` came from: "configs/math.yaml:12", "--set", or `DEFAULT`."""
        place = DEFAULT
        for document in self.documents:
            if document.line(path) is not None:
                place = document.where(path)
            elif path[0] in SEAMS and isinstance(document.data.get(str(path[0])), str):
                place = _of_named(path, place, document.where(path[:1]))
        for override in self.overrides:
            if _names_model(override) and override.path == path[:1]:
                place = _of_named(path, place, override.flag)
            elif override.path == path[: len(override.path)]:
                place = override.flag
        return place


def _names_model(override: Override) -> bool:
    return override.path in ((seam,) for seam in SEAMS) and isinstance(override.value, str)


def _of_named(path: KeyPath, before: str, place: str) -> str:
    """The origin of a model's key where the model is given by its name: see `by_name`."""
    taken_back = path[1:] in (("revision",), ("adapter",)) and before != DEFAULT
    return place if path[1:] == ("model",) or taken_back else before


def by_name(data: Mapping[str, Any]) -> dict[str, Any]:
    """`teacher: NAME` as `teacher: {model: NAME}`, and the same for the student.

    Revision and adapter of a model named before go: they are not this one's.
    """
    spelled = dict(data)
    for seam in SEAMS:
        if isinstance(spelled.get(seam), str):
            spelled[seam] = {"model": spelled[seam], "revision": None, "adapter": None}
    return spelled


def merge(into: dict[str, Any], data: Mapping[str, Any]) -> None:
    """Put all of `data` over what is there, mapping by mapping."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            below = into.get(key)
            if not isinstance(below, dict):
                below = into[key] = {}
            merge(below, value)
        else:
            into[key] = value


def put(into: dict[str, Any], path: KeyPath, value: Any, giver: str) -> None:
    """Put one value at a path; `giver` is what messages call who gave it.

    Raises
    ------
    ConfigError
        where the path leads through a value that holds no keys.
    """
    for depth, key in enumerate(path[:-1]):
        below = into.setdefault(key, {})
        if not isinstance(below, dict):
            place = dotted(path[: depth + 1])
            raise ConfigError([f"{giver}: {place} is {below!r}, expected a mapping that can hold {path[depth + 1]!r}."])
        into = below
    into[path[-1]] = value
