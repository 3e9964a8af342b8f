"""A run, as one frozen object, and where each of its values came from.

Precedence: class default < base file (`configs/base.yaml`, or `--config`) < `<domain>.yaml` beside it < command line.
The defaults live in the options classes beside the code that reads them; this module only puts them together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from true_kd import pocket
from true_kd.cache import default_root
from true_kd.capture import CaptureOptions
from true_kd.errors import ConfigError
from true_kd.evaluation import EvaluationOptions
from true_kd.fidelity import FidelityOptions
from true_kd.files import expand
from true_kd.gate import GateOptions
from true_kd.losses import LossOptions
from true_kd.models import LoraOptions, ModelOptions
from true_kd.options import Options
from true_kd.suggest import quote
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
    prompts: str = Field(default="prompts", min_length=1)
    """Folder with one folder of prompts per domain."""
    domains: tuple[str, ...] | Literal["all"] | None = None
    """The domains that run when the command line names none: a list, all, or null to ask for a choice."""
    out: str = Field(default="adapters_kd", min_length=1)
    """Folder that gets one adapter folder per domain, and kd_summary.json."""
    cache: str | None = Field(default=None, min_length=1)
    """Folder of the teacher's targets; null for $TRUE_KD_CACHE or the platform's cache folder."""
    capture: CaptureOptions = CaptureOptions()
    """How the teacher writes its replies."""
    targets: TargetOptions = TargetOptions()
    """How much of the teacher's distribution is kept."""
    fidelity: FidelityOptions = FidelityOptions()
    """The certificate of the cached targets."""
    lora: LoraOptions = LoraOptions()
    """The adapter."""
    losses: LossOptions = LossOptions()
    """The objective."""
    training: TrainingOptions = TrainingOptions()
    """The optimisation."""
    evaluation: EvaluationOptions = EvaluationOptions()
    """What is measured on the validation prompts."""
    gate: GateOptions = GateOptions()
    """The check that the teacher has something to teach."""
    control: Literal["none", "sft"] = "none"
    """Train a second student on the same text for as many steps by cross-entropy alone, and say whether distillation
    beat it: sft, or none to leave it out."""
    report: bool = True
    """Write report.html beside kd_summary.json at the end of a run."""
    report_to: tuple[Literal["trackio", "tensorboard", "wandb", "swanlab", "mlflow"], ...] = ()
    """Experiment trackers that get curves, settings and proof: trackio, tensorboard, wandb, swanlab, mlflow. Each is
    an extra to install, such as true-kd[trackio]."""
    vocab_strategy: VocabStrategy = "match"
    """What to do when the vocabularies differ: match (refuse), truncate (keep common ids), project (map by token)."""
    memory_gb: float | None = Field(default=None, gt=0.0, le=1e6)
    """Memory in 10^9 bytes that the student's phase may take: a micro-batch that needs more is cut into parts, with the
    same gradient. null for most of what the machine has."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of adapter initialisation, dropout and data order."""
    fresh: bool = False
    """Do finished domains again."""
    isolate: bool = True
    """Run the teacher's phase and each domain in a process of its own, so that one that dies, as Metal does when memory
    runs out, costs no other; false keeps all in one, to debug."""

    @property
    def out_folder(self) -> Path:
        """`out` as a path."""
        return expand(self.out, "out")

    @property
    def prompts_folder(self) -> Path:
        """`prompts` as a path."""
        return pocket.locate(self.prompts, "prompts")

    @property
    def cache_folder(self) -> Path:
        """`cache` as a path, or the default one."""
        return expand(self.cache, "cache") if self.cache else default_root()


# Flags of the command line and keyword arguments of `KDConfig`, each the short name of one key.
SHORT_NAMES: Mapping[str, KeyPath] = {
    "teacher": ("teacher",),
    "student": ("student",),
    "divergence": ("losses", "divergence"),
    "temperature": ("losses", "temperature"),
    "alpha": ("losses", "alpha"),
    "iters": ("training", "iters"),
    "learning_rate": ("training", "learning_rate"),
    "batch_size": ("training", "batch_size"),
    "max_seq_length": ("training", "max_seq_length"),
    "patience": ("training", "patience"),
    "rank": ("lora", "rank"),
    "cache_bytes": ("targets", "bytes_per_token"),
    "cache_gb": ("targets", "gigabytes"),
    "out": ("out",),
    "prompts": ("prompts",),
    "control": ("control",),
    "vocab_strategy": ("vocab_strategy",),
    "memory_gb": ("memory_gb",),
    "seed": ("seed",),
    "report_to": ("report_to",),
    "fresh": ("fresh",),
}

_STEPS = "did you mean 'iters'? It counts optimizer steps"
_EPOCHS = f"{_STEPS}: epochs * prompts / (batch_size * accumulate)."

# Keys that people write and no config has: short names without their group, the names of other tools, and secrets.
_MEANT: Mapping[KeyPath, str] = {
    **{(name,): f"did you mean '{dotted(path)}'?" for name, path in SHORT_NAMES.items() if path != (name,)},
    ("lora", "alpha"): "did you mean 'scale'? scale = alpha / rank.",
    ("lora", "lora_alpha"): "did you mean 'scale'? scale = lora_alpha / rank.",
    **{("training", name): f"{_STEPS}." for name in ("steps", "max_steps")},
    **{("training", name): _EPOCHS for name in ("epochs", "num_epochs", "num_train_epochs")},
    **{(name,): "a config holds no secrets. Remove it, and run `hf auth login`." for name in ("hf_token", "token")},
}


@cache
def describe_key(path: KeyPath) -> str:
    """What a key of the config means, its bounds and its default: the text of `--help`."""
    options: Any = RunConfig()
    path = (*path, "model") if path[0] in _SEAMS else path
    for key in path[:-1]:
        options = getattr(options, str(key))
    field = type(options).model_fields[str(path[-1])]
    # Beside null, bounds stand in the part of the type that is a number.
    parts = [field.metadata, *(getattr(part, "__metadata__", ()) for part in get_args(field.annotation))]
    rules = [rule for part in parts for found in part for rule in getattr(found, "metadata", [found])]
    limits = {name: getattr(rule, name) for rule in rules for name in _BOUNDS if hasattr(rule, name)}
    if "ge" in limits and "le" in limits:
        bounds = f"{limits['ge']:g} to {limits['le']:g}, "
    else:
        bounds = "".join(f"{_BOUNDS[name]} {limit:g}, " for name, limit in limits.items())
    default = getattr(options, str(path[-1]))
    default = "none" if default == () else default
    return f"{' '.join((field.description or '').split())} [{bounds}default: {default}]"


_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most"}


_SEAMS = ("teacher", "student")
_RUN_WIDE = ("domains", "prompts", "out", "cache", "fresh", "report_to")


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
            if isinstance(value, Mapping) or name in _SEAMS:
                _merge(nested, _by_name({name: value}))
            else:
                _put(nested, path, value)
        checked = validate(RunConfig, nested, lambda _: "KDConfig", _MEANT)
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
        layers += _read_domain(base_path(base), domain)
    # A model's mapping may leave out its name, which then is the default one.
    merged: dict[str, Any] = {seam: {"model": RunConfig.model_fields[seam].default.model} for seam in _SEAMS}
    for layer in layers:
        _merge(merged, _by_name(layer.data))
    flags: dict[KeyPath, str] = {}
    for override in overrides:
        if override.path in ((seam,) for seam in _SEAMS) and isinstance(override.value, str):
            _merge(merged, _by_name({override.path[0]: override.value}))
        else:
            _put(merged, override.path, override.value, override.flag)
        flags[override.path] = override.flag

    def where(path: KeyPath) -> str:
        for length in range(len(path), 0, -1):
            below = [flag for given, flag in flags.items() if given[:length] == path[:length]]
            if below:
                return below[-1]
            for layer in reversed(layers):
                if layer.line(path[:length]) is not None:
                    return f"{layer.name}:{layer.line(path[:length])}"
        return layers[0].name

    return validate(RunConfig, merged, where, _MEANT)


def base_path(base: Path | None) -> Path:
    """The base file behind `--config`, `pocket:` names resolved."""
    return BASE if base is None else pocket.locate(str(base), "--config")


class NoConfigs(ConfigError):
    """There is no base file where one is expected."""

    def __init__(self, path: Path, given: bool) -> None:
        found = "a folder" if path.is_dir() else "not a file" if path.exists() else "no such file"
        if given:
            line = f"--config {quote(str(path))}: {found}, expected a YAML file such as configs/base.yaml."
        else:
            line = (
                f"{path}: not found here, expected configs/ and prompts/ in the current folder. "
                "Run `true-kd init` to lay them out, or give --config."
            )
        super().__init__([line])


def _read_base(base: Path | None) -> Document:
    path = base_path(base)
    if not path.is_file():
        raise NoConfigs(path, given=base is not None)
    return read_yaml(path)


def _read_domain(base: Path, domain: str) -> list[Document]:
    """The domain's own file beside the base file, if there is one."""
    path = base.with_name(f"{domain}.yaml")
    for suffix in (".yml", ".YML", ".YAML"):
        other = path.with_suffix(suffix)
        # Where the file system knows no capitals, it may be the file itself.
        if other.is_file() and not (path.is_file() and other.samefile(path)) and other != base:
            raise ConfigError([f"{other}: not read, expected {path.name}. Rename it."])
    if os.path.lexists(path) and not path.is_file():
        raise ConfigError([f"{path}: not a file, expected the config of the domain. Remove it."])
    if not path.is_file() or path == base:
        return []
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
    return [document]


def _by_name(data: Mapping[str, Any]) -> dict[str, Any]:
    """`teacher: NAME` as `teacher: {model: NAME}`, and the same for the student.

    Revision and adapter of a model named before go: they are not this one's.
    """
    spelled = dict(data)
    for seam in _SEAMS:
        if isinstance(spelled.get(seam), str):
            spelled[seam] = {"model": spelled[seam], "revision": None, "adapter": None}
    return spelled


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
