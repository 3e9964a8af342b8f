"""Finds the adapter of a finished run, and the config that it was trained with.

A domain's folder below the output folder holds run.json, the resolved config of its run; other mlx-lm adapters bring
no more than the name of their model. Nothing is opened here: whether weights fit is for who loads them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from true_kd import adapters, pocket
from true_kd.config import KDConfig, NoConfigs, Override, RunConfig, load_config
from true_kd.errors import InputError, PromptError
from true_kd.files import expand
from true_kd.layout import domains_in, holds_adapter
from true_kd.prompts import SYSTEM_FILE, check_domain_name, read_system
from true_kd.suggest import did_you_mean, quote


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter, and what it was trained with."""

    folder: Path
    """Where adapters.safetensors and adapter_config.json lie."""
    config: RunConfig
    """Of its run. For an adapter of another tool only the models are its own, all else is the default."""
    domain: str | None
    """None for an adapter of another tool."""


def find_domain(
    domain: str, out: str | None = None, base: Path | None = None, overrides: Sequence[Override] = ()
) -> FoundAdapter:
    """The adapter of a domain.

    Parameters
    ----------
    out
        the output folder of the run; None for that of the base config, or the default one where there is no config.
    base
        another base config than configs/base.yaml, read for `out` alone.
    overrides
        what to change of the run's own config, such as a model that has moved.

    Raises
    ------
    InputError
        when there is no such adapter; the message names the domains that are there.
    """
    check_domain_name(domain)
    root = output_folder(out, base)
    folder = root / domain
    if not holds_adapter(folder):
        raise InputError(f"{folder}: {_lack(folder)}, expected an adapter{_advice(root, domain)}")
    if not (folder / adapters.RUN).is_file():
        raise InputError(f"{folder}: no {adapters.RUN}, expected that of the run. Give --adapter {folder} instead.")
    return FoundAdapter(folder, load_config(folder / adapters.RUN, None, overrides), domain)


def find_folder(name: str, teacher: str | None = None, student: str | None = None) -> FoundAdapter:
    """The adapter in a folder: of a domain, of its control, one of its checkpoints, or one that mlx-lm trained.

    Raises
    ------
    InputError
        when there is no adapter, or nothing says what student it is of.
    """
    folder = expand(name, "--adapter")
    if not holds_adapter(folder):
        raise InputError(
            f"--adapter {quote(name)}: {_lack(folder)}, expected a folder with {adapters.WEIGHTS} and "
            f"{adapters.CONFIG}. Check the path."
        )
    models = {"teacher": teacher, "student": student}
    run = _run_of(folder)
    if run is not None:
        given = [Override(f"--{seam}", (seam,), model) for seam, model in models.items() if model is not None]
        config = load_config(run, None, given)
        return FoundAdapter(folder, config, config.domains[0] if isinstance(config.domains, tuple) else None)
    if student is None:
        settings = adapters.read_json(folder / adapters.CONFIG)
        models["student"] = settings.get("model") if isinstance(settings, dict) else None
    if not isinstance(models["student"], str) or not models["student"]:
        raise InputError(
            f"{folder / adapters.CONFIG}: names no model, expected that of the adapter. Give --student MODEL."
        )
    return FoundAdapter(folder, KDConfig(**{seam: model for seam, model in models.items() if model}), None)


def output_folder(out: str | None = None, base: Path | None = None) -> Path:
    """The folder of the domains' folders: `out`, or what the base config says, or the default where there is none.

    Raises
    ------
    ConfigError
        when there is a base config that cannot be read, or one was named and is not there.
    """
    if out is not None:
        return expand(out, "--out")
    try:
        return load_config(base, None, ()).out_folder
    except NoConfigs:
        if base is not None:
            raise
        return RunConfig().out_folder


def system_message(found: FoundAdapter) -> str | None:
    """The system message that the adapter's domain was trained with, where its prompts are still there.

    Raises
    ------
    PromptError
        when its file cannot be read.
    """
    if found.domain is None:
        return None
    path = found.config.prompts_folder / found.domain / SYSTEM_FILE
    problems: list[str] = []
    text = read_system(path, problems)
    if problems:
        raise PromptError(problems)
    return text


def public_name(model: str) -> str:
    """What a model is called before others: its name, or that of its folder where it is a path on this machine."""
    return model if is_public(model) else Path(model).expanduser().resolve().name


def is_public(model: str) -> bool:
    """Whether a model's name means the same elsewhere: that of an embedded model, or an id of the hub."""
    return model.startswith(pocket.PREFIX) or (is_hub_id(model) and not Path(model).exists())


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of an id of the hub: "owner/name"."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def _run_of(folder: Path) -> Path | None:
    """The config of the run that an adapter is of; a checkpoint's lies in the folder above."""
    is_checkpoint = folder in adapters.checkpoints(folder.parent).values()
    places = (folder, folder.parent) if is_checkpoint else (folder,)
    return next((place / adapters.RUN for place in places if (place / adapters.RUN).is_file()), None)


def _lack(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder" if not folder.exists() else "not a folder"
    missing = next(name for name in (adapters.WEIGHTS, adapters.CONFIG) if not (folder / name).is_file())
    return f"no {missing} in it"


_LISTED = 12


def _advice(root: Path, domain: str) -> str:
    """What to do where a domain has no adapter: those that have one, or how to come by one."""
    known = domains_in(root)
    if not known:
        return f". Run `true-kd distill --domain {domain}`, or give --out."
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return f"{did_you_mean(domain, known) or '.'} Domains here: {', '.join(known[:_LISTED])}{more}."
