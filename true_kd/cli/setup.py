"""`init` and `doctor`: what to start from, and what this machine is."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from true_kd.cli.flags import AsJson
from true_kd.cli.output import say_json
from true_kd.errors import InputError
from true_kd.suggest import printable, quote


def init(
    folder: Annotated[str, typer.Argument(help="Where to lay them out.")] = ".",
) -> int:
    """Lay out configs/ and prompts/ to start from; files that are there already stay as they are."""
    from true_kd.files import expand
    from true_kd.starter import lay_out

    if not folder.strip():
        raise InputError(f"FOLDER {quote(folder)}: empty, expected a folder. Write its path.")
    path = expand(folder, "FOLDER")
    written, kept = lay_out(path)
    typer.echo(printable(f"{path}: {len(written)} files written, {len(kept)} already there and kept."))
    inside = "" if path == Path() else f"cd {shlex.quote(str(path))} && "
    typer.echo(printable(f"Next: {inside}true-kd distill --domain thinking"))
    return 0


def doctor(as_json: AsJson = False) -> int:
    """Show versions, device and BLAS: what to paste into an issue."""
    from true_kd.doctor import describe_machine

    if as_json:
        say_json(describe_machine())
        return 0
    for name, value in describe_machine().items():
        typer.echo(f"{name:<14}{value}")
    return 0
