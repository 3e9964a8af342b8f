"""The command line: flags to overrides, events to the terminal, failures to exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from true_kd import __version__, cache_cli
from true_kd.cli import proving, reporting, running, talking

EXIT_CODES = "Exit codes: 0 done, 1 run failed, 2 input, 3 locked, 4 environment, 5 integrity, 130 Ctrl-C."

app = typer.Typer(
    name="true-kd",
    help="Distil a large language model into small LoRA adapters on the machine in front of you.",
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(cache_cli.app, name="cache")

# Typer carries its own copy of click from some version on; this is ClickException in either, without importing it.
_UsageProblem = typer.BadParameter.__mro__[2]


def run(arguments: list[str]) -> int:
    """Run the command line; returns the exit code.

    Raises
    ------
    KeyboardInterrupt
        for Ctrl-C, which typer turns into the exit code 130, and click into an exception of its own.
    """
    try:
        code = app(arguments, prog_name="true-kd", standalone_mode=False) or 0
    except typer.Exit as stop:
        return stop.exit_code
    except _UsageProblem as problem:
        line = " ".join(problem.format_message().split())
        typer.echo(f"true-kd: {line.rstrip('.')}. See `true-kd --help`.", err=True)
        return 2
    except typer.Abort as abort:
        raise KeyboardInterrupt from abort
    if code == 130:
        raise KeyboardInterrupt
    return code


app.command()(running.distill)
app.command("capture")(running.capture_command)
app.command()(running.demo)
app.command()(proving.evaluate)
app.command()(proving.analyze)
app.command()(proving.sweep)
app.command()(reporting.report)
app.command()(talking.compare)
app.command()(talking.chat)
app.command()(talking.generate)


@app.command()
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


@app.command()
def doctor() -> int:
    """Show versions, device and BLAS: what to paste into an issue."""
    from true_kd.doctor import describe_machine

    for name, value in describe_machine().items():
        typer.echo(f"{name:<14}{value}")
    return 0


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.")] = False,
) -> None:
    if version:
        typer.echo(f"true-kd {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
