"""A run, as one frozen object, resolved from its files and flags.

Precedence: class default < base file (`configs/base.yaml`, or `--config`) < `<domain>.yaml` beside it < command line.
The defaults live in the options classes beside the code that reads them; this module only puts them together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import Field
from pydantic.fields import FieldInfo

from true_kd import pocket
from true_kd.cache import default_root
from true_kd.capture import CaptureOptions
from true_kd.errors import ConfigError
from true_kd.evaluation import EvaluationOptions
from true_kd.fidelity import FidelityOptions
from true_kd.files import expand
from true_kd.gate import GateOptions
from true_kd.layers import SEAMS, Layers, Override, by_name, merge, put
from true_kd.layout import BASE, OUT, PROMPTS
from true_kd.losses import LossOptions
from true_kd.models import LoraOptions, ModelOptions
from true_kd.options import Options
from true_kd.suggest import quote
from true_kd.targets import TargetOptions
from true_kd.training import TrainingOptions
from true_kd.validation import dotted, validate
from true_kd.vocabulary import VocabStrategy
from true_kd.yaml_file import Document, KeyPath, read_yaml


class RunConfig(Options):
    """Everything that describes a run. `run.json` holds one, and is itself a valid `--config`."""

    teacher: ModelOptions = ModelOptions(model="mlx-community/Qwen2.5-7B-Instruct-4bit")
    """The model that is imitated."""
    student: ModelOptions = ModelOptions(model="mlx-community/Qwen2.5-3B-Instruct-4bit")
    """The model that gets the adapter."""
    prompts: str = Field(default=PROMPTS, min_length=1)
    """Folder with one folder of prompts per domain."""
    domains: tuple[str, ...] | Literal["all"] | None = None
    """The domains that run when the command line names none: a list, all, or null to ask for a choice."""
    out: str = Field(default=OUT, min_length=1)
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
    vocab_strategy: VocabStrategy = "auto"
    """What to do when the vocabularies differ: auto (align), match (refuse), align (by the bytes of the text), project
    (map by token text), uld (sorted probabilities, with losses.divergence total_variation), truncate (keep common ids,
    where they agree)."""
    force: bool = False
    """Let vocab_strategy truncate pair ids that stand for different tokens."""
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
    "force": ("force",),
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


def _field(path: KeyPath) -> tuple[FieldInfo, Any]:
    """The field of a key, and its default; of a model named alone, that of its name."""
    options: Any = RunConfig()
    path = (*path, "model") if path[0] in SEAMS else path
    for key in path[:-1]:
        options = getattr(options, str(key))
    return type(options).model_fields[str(path[-1])], getattr(options, str(path[-1]))


def key_choices(path: KeyPath) -> tuple[str, ...]:
    """The words that a key may be; none where it is something else."""
    annotation = _field(path)[0].annotation
    return get_args(annotation) if get_origin(annotation) is Literal else ()


@cache
def describe_key(path: KeyPath) -> str:
    """What a key of the config means, its bounds and its default: the text of `--help`."""
    field, default = _field(path)
    # Beside null, bounds stand in the part of the type that is a number.
    parts = [field.metadata, *(getattr(part, "__metadata__", ()) for part in get_args(field.annotation))]
    rules = [rule for part in parts for found in part for rule in getattr(found, "metadata", [found])]
    limits = {name: getattr(rule, name) for rule in rules for name in _BOUNDS if hasattr(rule, name)}
    if "ge" in limits and "le" in limits:
        bounds = f"{limits['ge']:g} to {limits['le']:g}, "
    else:
        bounds = "".join(f"{_BOUNDS[name]} {limit:g}, " for name, limit in limits.items())
    default = "none" if default == () else default
    return f"{' '.join((field.description or '').split())} [{bounds}default: {default}]"


_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most"}


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
            if isinstance(value, Mapping) or name in SEAMS:
                merge(nested, by_name({name: value}))
            else:
                put(nested, path, value, "KDConfig")
        checked = validate(RunConfig, nested, lambda _: "KDConfig", _MEANT)
        super().__init__(**{name: getattr(checked, name) for name in checked.model_fields_set})


@dataclass(frozen=True)
class Resolved:
    """A config, and where each of its values came from."""

    config: RunConfig
    origin: Callable[[KeyPath], str]
    """Of a value: "configs/math.yaml:12", a flag, or "default"."""
    files: tuple[str, ...]
    """The files that were read, the lowest layer first."""


def resolve(base: Path | None, domain: str | None, overrides: Sequence[Override]) -> Resolved:
    """The config of a domain: base file, `<domain>.yaml` beside it where there is one, then the command line.

    `base` None stands for `configs/base.yaml`. Without `domain`, the base file alone.

    Raises
    ------
    ConfigError
        for a missing base file, anything in the files that does not belong there, and values out of bounds.
    """
    documents = [_read_base(base)]
    if domain is not None:
        documents += _read_domain(base_path(base), domain)
    layers = Layers(documents, overrides)
    # A model's mapping may leave out its name, which then is the default one.
    names = {seam: {"model": RunConfig.model_fields[seam].default.model} for seam in SEAMS}
    config = validate(RunConfig, layers.merged(names), layers.where, _MEANT)
    return Resolved(config, layers.origin, tuple(document.name for document in documents))


def load_config(base: Path | None, domain: str | None, overrides: Sequence[Override]) -> RunConfig:
    """The config alone: see `resolve`."""
    return resolve(base, domain, overrides).config


def leaves(options: Options, above: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """The path and the value of every key that holds no keys itself, in the order of the classes; plain data."""
    plain = options.model_dump(mode="json")
    for name in type(options).model_fields:
        value = getattr(options, name)
        if isinstance(value, Options):
            yield from leaves(value, (*above, name))
        else:
            yield (*above, name), plain[name]


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
