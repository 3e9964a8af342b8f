"""What a project holds: its domains, each with its prompts, its own config and its adapter. Opens no model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from true_kd import adapters, jobs
from true_kd.config import Override, RunConfig, base_path, load_config
from true_kd.errors import InputError, Problems, PromptError, TrueKDError
from true_kd.files import expand
from true_kd.layout import domains_in
from true_kd.prompts import check_domain_name, folders_with_prompts, has_split
from true_kd.proof import Proof
from true_kd.reporting import read_result
from true_kd.suggest import did_you_mean, quote


@dataclass(frozen=True)
class DomainState:
    """One domain of a project, as it stands."""

    domain: str
    train: int | None
    """Training prompts; None where they cannot be read."""
    valid: int | None
    """Prompts to validate on."""
    held_out: bool
    """Whether these are taken from the training prompts, as there is no file of them."""
    config: str | None
    """Its own config file; None where the base file says all."""
    adapter: str | None
    """The folder of its adapter, finished or not."""
    finished: bool
    proof: Proof | None
    """Of a finished adapter, where it was measured."""
    problem: str | None
    """Why a run would refuse it, or why its adapter cannot be used: the first reason, on one line."""


@dataclass(frozen=True)
class Project:
    """The domains of a project, and files beside its base config that no run reads."""

    prompts: Path
    out: Path
    domains: tuple[DomainState, ...]
    unread: tuple[str, ...]


def survey(base: Path | None, overrides: Sequence[Override] = ()) -> Project:
    """Every domain that has prompts or an adapter, by name.

    Raises
    ------
    TrueKDError
        when the base config or the folder of the prompts cannot be read.
    """
    config = load_config(base, None, overrides)
    root, out = config.prompts_folder, config.out_folder
    with_adapter = domains_in(out)
    if not root.is_dir() and not with_adapter:
        raise PromptError([f"prompts {quote(str(root))}: no such folder. Run `true-kd init`, or give --prompts."])
    with_prompts = folders_with_prompts(root) if root.is_dir() else []
    names = sorted({*with_prompts, *with_adapter})
    states = tuple(_state(name, base, overrides, config) for name in names)
    own = base_path(base)
    unread = tuple(str(path) for path in _files_beside(own) if path.stem not in names)
    return Project(root, out, states, unread)


def known_domains(base: Path | None) -> list[str]:
    """The domains that a project has prompts or a config for, sorted; the default config where it has none."""
    own = base_path(base)
    names = {path.stem for path in _files_beside(own)}
    config = load_config(base, None, ()) if own.is_file() else RunConfig()
    with contextlib.suppress(PromptError):  # a project without prompts: a run says so
        names |= set(folders_with_prompts(config.prompts_folder))
    return sorted(name for name in names if _fault_of_name(name) is None)


def check_known(domain: str, base: Path | None) -> None:
    """Raise `InputError` for a domain that a project has neither prompts nor a config for."""
    check_domain_name(domain)
    known = known_domains(base)
    if domain not in known:
        listed = f" Domains here: {', '.join(known)}." if known else ""
        raise InputError(f"domain {quote(domain)}: no such domain{did_you_mean(domain, known) or '.'}{listed}")


def _files_beside(own: Path) -> list[Path]:
    """The YAML files beside a base file."""
    return sorted(path for path in expand(str(own.parent), "configs").glob("*.yaml") if path.name != own.name)


def _fault_of_name(name: str) -> TrueKDError | None:
    try:
        check_domain_name(name)
    except PromptError as error:
        return error
    return None


def _state(domain: str, base: Path | None, overrides: Sequence[Override], shared: RunConfig) -> DomainState:
    own = base_path(base).with_name(f"{domain}.yaml")
    train = valid = None
    held_out, problem = False, _fault_of_name(domain)
    if problem is None:
        try:
            config = load_config(base, domain, overrides)
            found = jobs.read_domain(config.prompts_folder, domain)
            train, valid = (len(prompts) for prompts in found)
            held_out = not has_split(config.prompts_folder, domain, "valid")
        except TrueKDError as error:
            problem = error
    folder = shared.out_folder / domain
    has_adapter = domain in domains_in(shared.out_folder)
    result = read_result(folder) if has_adapter else None
    told = None if problem is None else _first_line(problem)
    if told is None and has_adapter and result is None and (folder / adapters.METRICS).exists():
        told = (
            f"{folder / adapters.METRICS}: damaged, of another version, or the adapter beside it has changed since. "
            "Distil it again."
        )
    return DomainState(
        domain=domain,
        train=train,
        valid=valid,
        held_out=held_out,
        config=str(own) if own.is_file() and own != base_path(base) else None,
        adapter=str(folder) if has_adapter else None,
        finished=result is not None,
        proof=None if result is None else result.proof,
        problem=told,
    )


def _first_line(error: TrueKDError) -> str:
    lines = error.lines if isinstance(error, Problems) else str(error).splitlines()
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return f"{lines[0]}{more}"
