"""`init` and `domains`: what to start from, and what is there."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from true_kd.cli.flags import AsJson, ConfigFile, Out, Prompts, overrides
from true_kd.cli.output import say_json
from true_kd.errors import InputError
from true_kd.suggest import printable, quote

if TYPE_CHECKING:
    from true_kd.project import DomainState


def init(
    folder: Annotated[str, typer.Argument(help="Where to lay them out.")] = ".",
    domain: Annotated[
        str | None,
        typer.Option(
            "--domain",
            metavar="NAME",
            help="One new domain instead of those that come along: prompts to replace, and a config of its own.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Lay out configs/ and prompts/ to start from; files that are there already stay as they are."""
    from true_kd.files import expand
    from true_kd.starter import lay_out, lay_out_domain

    if not folder.strip():
        raise InputError(f"FOLDER {quote(folder)}: empty, expected a folder. Write its path.")
    path = expand(folder, "FOLDER")
    if domain is None:
        found = lay_out(path)
    else:
        prompts = _prompts_of(path)
        found = lay_out_domain(path, prompts, domain)
    if as_json:
        say_json({"folder": str(path), "written": list(map(str, found.written)), "kept": list(map(str, found.kept))})
        return 0
    for file in () if domain is None else found.written:
        typer.echo(printable(str(file)))
    typer.echo(printable(f"{path}: {len(found.written)} files written, {len(found.kept)} already there and kept."))
    inside = "" if path == Path() else f"cd {shlex.quote(str(path))} && "
    if domain is None:
        typer.echo(printable(f"Next: {inside}true-kd distill --domain thinking"))
    else:
        typer.echo(printable(f"Next: put your own prompts into {prompts / domain}, then run"))
        typer.echo(printable(f"  {inside}true-kd distill --domain {domain}"))
    return 0


def _prompts_of(folder: Path) -> Path:
    """The folder of prompts of the project in a folder: where its base config has it, or that of a new project."""
    from true_kd.config import load_config
    from true_kd.files import expand
    from true_kd.layout import BASE, PROMPTS
    from true_kd.pocket import PREFIX

    if not (folder / BASE).is_file():
        return folder / PROMPTS
    name = load_config(folder / BASE, None, ()).prompts
    if name.startswith(PREFIX):
        raise InputError(f"{folder / BASE} prompts: {quote(name)}, expected a folder of your own. Change it first.")
    return folder / expand(name, "prompts")


def domains(
    config: ConfigFile = None,
    prompts: Prompts = None,
    out: Out = None,
    as_json: AsJson = False,
) -> int:
    """List the domains: prompts to train and validate on, whether they have a config, and what their adapter gained."""
    from true_kd.project import survey

    found = survey(config, overrides({"prompts": prompts, "out": out}, None))
    if as_json:
        say_json(
            {
                "prompts": str(found.prompts),
                "out": str(found.out),
                "domains": [_domain_facts(state) for state in found.domains],
                "unread": found.unread,
            }
        )
        return 0
    if found.domains:
        _show_domains(found.domains)
    else:
        typer.echo(printable(f"No domains in {found.prompts}. Lay one out with `true-kd init --domain NAME`."))
    for state in found.domains:
        if state.problem is not None:
            typer.echo(printable(f"{state.domain}: {state.problem}"))
    for file in found.unread:
        typer.echo(printable(f"{file}: of no domain here."))
    return 0


def _domain_facts(state: DomainState) -> dict[str, Any]:
    """What programs are told of a domain: of the proof, the verdict and the share of the gap that was closed."""
    facts = {field.name: getattr(state, field.name) for field in fields(state) if field.name != "proof"}
    gap = state.proof and state.proof.gap_closed.kl
    return {
        **facts,
        "outcome": state.proof and state.proof.verdict.outcome,
        "gap_closed": gap and asdict(gap),
    }


def _show_domains(states: Sequence[DomainState]) -> None:
    rows = [("domain", "train", "valid", "config", "gap closed")]
    for state in states:
        train, valid = ("?" if count is None else f"{count:,}" for count in (state.train, state.valid))
        valid += _HELD_OUT if state.held_out else ""
        rows.append((state.domain, train, valid, "own" if state.config else "-", _gained(state)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    name = min(widths[0], 22)
    for domain, train, valid, own, gained in rows:
        cells = f"{train:>{widths[1]}}  {valid:>{widths[2]}}  {own:<{widths[3]}}  {gained}"
        # A long name has a line of its own, so that the others keep their columns.
        typer.echo(
            printable(f"{domain:<{name}}  {cells}" if len(domain) <= name else f"{domain}\n{'':<{name}}  {cells}")
        )
    if any(state.held_out for state in states):
        typer.echo(f"{_HELD_OUT} held out of train, as there is no valid file")


_HELD_OUT = "*"


def _gained(state: DomainState) -> str:
    """The headline figure of a domain's adapter."""
    from true_kd.console import interval

    if state.adapter is None:
        return "-"
    if not state.finished:
        return "unusable" if state.problem else "unfinished"
    if state.proof is None or state.proof.gap_closed.kl is None:
        return "not measured"
    return interval(state.proof.gap_closed.kl)
