"""A run, as one frozen object, and where each of its values came from.

Precedence: class default < base file (`configs/base.yaml`, or `--config`) < `<domain>.yaml` beside it < command line.
The defaults live in the options classes beside the code that reads them; this module only puts them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from true_kd import pocket
from true_kd.capture import CaptureOptions
from true_kd.errors import ConfigError
from true_kd.evaluation import EvaluationOptions
from true_kd.losses import LossOptions
from true_kd.models import LoraOptions, ModelOptions
from true_kd.options import Options
from true_kd.targets import TargetOptions
from true_kd.training import TrainingOptions
from true_kd.validation import dotted, validate
from true_kd.vocabulary import VocabStrategy
from true_kd.yaml_file import Document, KeyPath, read_yaml

BASE = Path("configs") / "base.yaml"
"""The base file that is read when `--config` names no other."""


class RunConfig(Options):
    """Everything that describes a run. `run.json` holds one, and is itself a valid `--config`."""

    teacher: ModelOptions = ModelOptions(model="mlx-community/Qwen2.5-7B-Instruct-4bit")
    """The model that is imitated."""
    student: ModelOptions = ModelOptions(model="mlx-community/Qwen2.5-3B-Instruct-4bit")
    """The model that gets the adapter."""
    prompts: str = "prompts"
    """Folder with one folder of prompts per domain."""
    domains: tuple[str, ...] | None = None
    """The domains that run when the command line names none; null to ask for a choice."""
    out: str = Field(default="adapters_kd", min_length=1)
    """Folder that gets one adapter folder per domain, and kd_summary.json."""
    cache: str | None = None
    """Folder of the teacher's targets; null for $TRUE_KD_CACHE or the platform's cache folder."""
    capture: CaptureOptions = CaptureOptions()
    """How the teacher writes its replies."""
    targets: TargetOptions = TargetOptions()
    """How much of the teacher's distribution is kept."""
    lora: LoraOptions = LoraOptions()
    """The adapter."""
    losses: LossOptions = LossOptions()
    """The objective."""
    training: TrainingOptions = TrainingOptions()
    """The optimisation."""
    evaluation: EvaluationOptions = EvaluationOptions()
    """What is measured on the validation prompts."""
    vocab_strategy: VocabStrategy = "match"
    """What to do when the vocabularies differ: match (refuse), truncate (keep common ids), project (map by token)."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of adapter initialisation, dropout and data order."""
    fresh: bool = False
    """Do finished domains again."""


# Flags of the command line and keyword arguments of `KDConfig`, each the short name of one key.
SHORT_NAMES: Mapping[str, KeyPath] = {
    "teacher": ("teacher", "model"),
    "student": ("student", "model"),
    "temperature": ("losses", "temperature"),
    "alpha": ("losses", "alpha"),
    "iters": ("training", "iters"),
    "learning_rate": ("training", "learning_rate"),
    "batch_size": ("training", "batch_size"),
    "max_seq_length": ("training", "max_seq_length"),
    "rank": ("lora", "rank"),
    "out": ("out",),
    "prompts": ("prompts",),
    "vocab_strategy": ("vocab_strategy",),
    "seed": ("seed",),
    "fresh": ("fresh",),
}


@cache
def describe_key(path: KeyPath) -> str:
    """What a key of the config means, its bounds and its default: the text of `--help`."""
    options: Any = RunConfig()
    for key in path[:-1]:
        options = getattr(options, str(key))
    field = type(options).model_fields[str(path[-1])]
    limits = {name: getattr(rule, name) for rule in field.metadata for name in ("ge", "le") if hasattr(rule, name)}
    bounds = f"{limits['ge']:g} to {limits['le']:g}, " if len(limits) == 2 else ""
    return f"{' '.join((field.description or '').split())} [{bounds}default: {getattr(options, str(path[-1]))}]"


_RUN_WIDE = ("domains", "prompts", "out", "cache", "fresh")


class KDConfig(RunConfig):
    """A `RunConfig` for Python: besides the nested options it takes the short names of the command-line flags.

    >>> KDConfig(temperature=3.0, alpha=0.5).losses.temperature
    3.0
    """

    def __init__(self, **values: Any) -> None:
        nested: dict[str, Any] = {}
        for name, value in values.items():
            path = SHORT_NAMES.get(name, (name,))
            if isinstance(value, Options):
                value = value.model_dump(mode="json", exclude_unset=True)
            if isinstance(value, Mapping):
                _merge(nested, {name: value})
            else:
                _put(nested, path, value)
        checked = validate(RunConfig, nested, lambda _: "KDConfig")
        super().__init__(**{name: getattr(checked, name) for name in checked.model_fields_set})


@dataclass(frozen=True)
class Override:
    """One value from the command line, and the flag that gave it."""

    flag: str
    path: KeyPath
    value: Any


def load_config(base: Path | None, domain: str | None, overrides: Sequence[Override]) -> RunConfig:
    """The config of a domain: base file, `<domain>.yaml` beside it where there is one, then the command line.

    `base` None stands for `configs/base.yaml`. Without `domain`, the base file alone.

    Raises
    ------
    ConfigError
        for a missing base file, anything in the files that does not belong there, and values out of bounds.
    """
    layers = [_read_base(base)]
    if domain is not None:
        beside = base_path(base).with_name(f"{domain}.yaml")
        if beside.is_file() and beside != base_path(base):
            layers.append(_read_domain(beside))
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge(merged, _spelled_out(layer.data))
    flags: dict[KeyPath, str] = {}
    for override in overrides:
        by_name = override.path in (("teacher",), ("student",)) and isinstance(override.value, str)
        path = (*override.path, "model") if by_name else override.path
        _put(merged, path, override.value, override.flag)
        flags[path] = override.flag

    def where(path: KeyPath) -> str:
        for length in range(len(path), 0, -1):
            if path[:length] in flags:
                return flags[path[:length]]
            for layer in reversed(layers):
                if layer.line(path[:length]) is not None:
                    return f"{layer.name}:{layer.line(path[:length])}"
        return layers[0].name

    return validate(RunConfig, merged, where)


def base_path(base: Path | None) -> Path:
    """The base file behind `--config`, `pocket:` names resolved."""
    return BASE if base is None else pocket.locate(str(base))


class NoConfigs(ConfigError):
    """There is no base file where one is expected."""

    def __init__(self, path: Path, given: bool) -> None:
        if given:
            super().__init__([f"--config {path}: no such file, expected a YAML file such as configs/base.yaml."])
        else:
            super().__init__(
                [
                    f"{path}: not found in {Path.cwd()}, expected configs/ and prompts/ in the current folder. "
                    "Run `true-kd init` to lay them out, or give --config."
                ]
            )


def _read_base(base: Path | None) -> Document:
    path = base_path(base)
    if not path.is_file():
        raise NoConfigs(path, given=base is not None)
    return read_yaml(path)


def _read_domain(path: Path) -> Document:
    document = read_yaml(path)
    misplaced = [key for key in document.data if key in _RUN_WIDE]
    if misplaced:
        raise ConfigError(
            [
                f"{document.where((key,))} {key}: holds for a whole run, not for one domain. "
                "Move it to base.yaml, or give it on the command line."
                for key in misplaced
            ]
        )
    return document


def _spelled_out(data: Mapping[str, Any]) -> dict[str, Any]:
    """`teacher: NAME` as `teacher: {model: NAME}`, and the same for the student."""
    return {
        key: {"model": value} if key in ("teacher", "student") and isinstance(value, str) else value
        for key, value in data.items()
    }


def _merge(into: dict[str, Any], data: Mapping[str, Any]) -> None:
    for key, value in data.items():
        if isinstance(value, Mapping):
            below = into.get(key)
            if not isinstance(below, dict):
                below = into[key] = {}
            _merge(below, value)
        else:
            into[key] = value


def _put(into: dict[str, Any], path: KeyPath, value: Any, flag: str = "KDConfig") -> None:
    for depth, key in enumerate(path[:-1]):
        below = into.setdefault(key, {})
        if not isinstance(below, dict):
            place = dotted(path[: depth + 1])
            raise ConfigError([f"{flag}: {place} is {below!r}, expected a mapping that can hold {path[depth + 1]!r}."])
        into = below
    into[path[-1]] = value
