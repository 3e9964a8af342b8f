"""`init` and `doctor`: what to start from, and what this machine is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    folder: Annotated[Path, typer.Argument(help="Where to lay them out.")] = Path(),
) -> int:
    """Lay out configs/ and prompts/ to start from; files that are there already stay as they are."""
    from true_kd.starter import lay_out

    written, kept = lay_out(folder)
    typer.echo(f"{folder}: {len(written)} files written, {len(kept)} already there and kept.")
    inside = "" if folder == Path() else f"cd {folder} && "
    typer.echo(f"Next: {inside}true-kd distill --domain thinking")
    return 0


def doctor() -> int:
    """Show versions, device and BLAS: what to paste into an issue."""
    from true_kd.doctor import describe_machine

    for name, value in describe_machine().items():
        typer.echo(f"{name:<14}{value}")
    return 0
