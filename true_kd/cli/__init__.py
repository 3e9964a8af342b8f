"""The command line: flags to overrides, events to the terminal, failures to exit codes.

A command's module is imported when that command is called, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from true_kd import __version__
from true_kd.cli import completion

EXIT_CODES = (
    "Exit codes: 0 done, 1 run failed, 2 input, 3 locked by another run, 4 environment (disk, memory, versions), "
    "5 integrity, 130 Ctrl-C, 143 SIGTERM, 129 terminal closed."
)

COMMANDS: Mapping[str, tuple[str, str, str]] = {
    "distill": ("running", "distill", "Capture the teacher once and train one LoRA adapter per domain."),
    "capture": ("running", "capture_command", "Let the teacher answer and fill the cache, without training."),
    "demo": ("running", "demo", "Distil all six domains with the embedded pocket models."),
    "plan": ("planning", "plan", "Say what a run would do, take and leave, before it does."),
    "analyze": ("proving", "analyze", "Say what each domain has to gain, before hours of capture."),
    "sweep": ("proving", "sweep", "Distil under all combinations of some settings from one cache."),
    "evaluate": ("proving", "evaluate", "Measure adapters anew: student, adapter and teacher."),
    "status": ("watching", "status", "Show how far a run is, from another terminal."),
    "report": ("reporting", "report", "Build the report of finished domains again."),
    "compare": ("talking", "compare", "Show plain student, student with adapter and teacher side by side."),
    "chat": ("talking", "chat", "Talk to the student with its adapter."),
    "generate": ("talking", "generate", "Print the reply of the student with its adapter, for scripts."),
    "serve": ("publishing", "serve", "Serve the student with its adapter over HTTP."),
    "push": ("publishing", "push", "Upload an adapter to the Hugging Face hub, with a model card."),
    "export": ("exporting", "export", "Export an adapter to PEFT, llama.cpp, Ollama and others."),
    "cache": ("caches", "app", "Look after the caches of teacher targets."),
    "domains": ("setup", "domains", "List the domains: their prompts, configs, and what their adapters gained."),
    "config": ("configuring", "app", "Show what a config comes to, and where each value came from."),
    "init": ("setup", "init", "Lay out configs/ and prompts/ to start from."),
    "validate": ("checking", "validate", "Find all that is wrong with configs and prompts, and show what is trained."),
    "doctor": ("checking", "doctor", "Check this machine: versions, device, memory, disk, hub, a small computation."),
}
"""Each command: its module in this package, its function there, and what the overview says of it."""

# Typer carries its own copy of click from some version on; this is ClickException in either, without importing it.
_UsageProblem = typer.BadParameter.__mro__[2]


def run(arguments: list[str]) -> int:
    """Run the command line; returns the exit code.

    Raises
    ------
    KeyboardInterrupt
        for Ctrl-C, which typer turns into the exit code 130, and click into an exception of its own.
    """
    completion.part_at_equals()
    try:
        if len(arguments) == 2 and arguments[0] in ("--show-completion", "--install-completion"):
            return completion.set_up(*arguments)
        code = make_app(arguments)(arguments, prog_name="true-kd", standalone_mode=False) or 0
    except typer.Exit as stop:
        return stop.exit_code
    except _UsageProblem as problem:
        line = " ".join(problem.format_message().split()).rstrip(".")
        typer.echo(f"true-kd: {line}{'' if line.endswith('?') else '.'} See `true-kd --help`.", err=True)
        return 2
    except typer.Abort as abort:
        raise KeyboardInterrupt from abort
    if code == 130:
        raise KeyboardInterrupt
    return code


def make_app(arguments: Sequence[str]) -> typer.Typer:
    """The application for some arguments: whole where they call a command, else by name and summary.

    A shell that completes a line asks for its command alone, and of that where it can for no more than the domain.
    """
    app = typer.Typer(
        name="true-kd",
        help="Distil a large language model into small LoRA adapters on the machine in front of you.",
        epilog=EXIT_CODES,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_main)
    words = completion.words_before() or arguments
    called = next((word for word in words if not word.startswith("-")), None)
    for name, (module, function, summary) in COMMANDS.items():
        if name != called:
            # The short help is not cut to the width of the terminal.
            app.command(name, help=summary, short_help=summary)(_other)
            continue
        if words is not arguments and function != "app" and completion.asks_for_domain(words):
            app.command(name, **completion.STAND_IN)(completion.stand_in)
            continue
        found = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        if isinstance(found, typer.Typer):
            for command in found.registered_commands:
                command.short_help = " ".join((inspect.getdoc(command.callback) or "").partition("\n\n")[0].split())
            app.add_typer(found, name=name)
        else:
            app.command(name)(found)
    return app


def _other() -> None:
    """Stands for a command that is not called."""
    raise AssertionError("the command that is called is there whole")


def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.")] = False,
) -> None:
    if version:
        typer.echo(f"true-kd {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
