"""In which keys two configs differ: of domains, of files, or of runs that are done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from true_kd import pocket
from true_kd.config import Resolved, RunConfig, leaves, resolve
from true_kd.errors import InputError
from true_kd.layers import DEFAULT
from true_kd.layout import RUN
from true_kd.project import known_domains
from true_kd.suggest import did_you_mean, quote
from true_kd.validation import dotted


@dataclass(frozen=True)
class NamedConfig:
    """A config, and what it is called in a comparison."""

    name: str
    config: RunConfig
    origin: Callable[[tuple[str | int, ...]], str]


@dataclass(frozen=True)
class Difference:
    """One key with its two values, and where they came from."""

    key: str
    """Dotted, as in `--set`."""
    a: Any
    b: Any
    a_origin: str
    b_origin: str


def find_config(name: str | None, base: Path | None = None) -> NamedConfig:
    """The config that a name stands for: a domain, a file, the folder of an adapter; None for the defaults.

    A domain of the project comes first, so a folder of the same name is written with a slash.

    Raises
    ------
    InputError
        when it is none of these, or the config that it is cannot be read.
    """
    if name is None:
        return NamedConfig("the defaults", RunConfig(), lambda _: DEFAULT)
    domains = known_domains(base)
    if name in domains:
        return _named(f"domain {name}", resolve(base, name, ()))
    path = pocket.locate(name, "config")
    for place in (path, path / RUN):
        if place.is_file():
            return _named("", resolve(place, None, ()))
    if path.is_dir():
        raise InputError(f"{path}: no {RUN} in it, expected the folder of an adapter. Name that of one domain.")
    here = f"Domains here: {', '.join(domains)}." if domains else "No domains here: check the path, or give --config."
    hint = did_you_mean(name, domains) or "."
    raise InputError(f"{quote(name)}: expected a domain, a config file, or the folder of an adapter{hint} {here}")


def differences(one: NamedConfig, other: NamedConfig) -> list[Difference]:
    """The keys in which two configs differ, in the order of the classes."""
    values = dict(leaves(other.config))
    return [
        Difference(dotted(path), value, values[path], one.origin(path), other.origin(path))
        for path, value in leaves(one.config)
        if value != values[path]
    ]


def _named(what: str, found: Resolved) -> NamedConfig:
    files = " over ".join(reversed(found.files))
    return NamedConfig(f"{what} ({files})" if what else files, found.config, found.origin)
