"""The command line: flags to overrides, events to the terminal, failures to exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from true_kd import __version__, cache_cli
from true_kd.config import SHORT_NAMES, Override, describe_key
from true_kd.errors import shared_exit_code
from true_kd.validation import parse_override

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


def _flag(name: str, *spellings: str) -> Any:
    """The option of a short name, with the help text that its key carries."""
    return typer.Option(*spellings, help=describe_key(SHORT_NAMES[name]), show_default=False)


Domains = Annotated[list[str] | None, typer.Option("--domain", "-d", help="A domain to distil; repeat it for several.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Set any key of the config, such as lora.rank=8."),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="Base config instead of configs/base.yaml.", show_default=False)
]


@app.command()
def distill(
    domain: Domains = None,
    everything: Annotated[bool, typer.Option("--all", help="Every domain that has prompts.")] = False,
    config: ConfigFile = None,
    teacher: Annotated[str | None, _flag("teacher", "--teacher")] = None,
    student: Annotated[str | None, _flag("student", "--student")] = None,
    divergence: Annotated[str | None, _flag("divergence", "--divergence")] = None,
    temperature: Annotated[float | None, _flag("temperature", "--temperature")] = None,
    alpha: Annotated[float | None, _flag("alpha", "--alpha")] = None,
    iters: Annotated[int | None, _flag("iters", "--iters")] = None,
    patience: Annotated[int | None, _flag("patience", "--patience")] = None,
    learning_rate: Annotated[float | None, _flag("learning_rate", "--learning-rate")] = None,
    batch_size: Annotated[int | None, _flag("batch_size", "--batch-size")] = None,
    max_seq_length: Annotated[int | None, _flag("max_seq_length", "--max-seq-length")] = None,
    rank: Annotated[int | None, _flag("rank", "--rank")] = None,
    memory_gb: Annotated[float | None, _flag("memory_gb", "--memory-gb")] = None,
    cache_bytes: Annotated[float | None, _flag("cache_bytes", "--cache-bytes")] = None,
    cache_gb: Annotated[float | None, _flag("cache_gb", "--cache-gb")] = None,
    prompts: Annotated[str | None, _flag("prompts", "--prompts")] = None,
    out: Annotated[str | None, _flag("out", "--out")] = None,
    vocab_strategy: Annotated[str | None, _flag("vocab_strategy", "--vocab-strategy")] = None,
    seed: Annotated[int | None, _flag("seed", "--seed")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help=describe_key(("fresh",)))] = False,
    sets: Sets = None,
) -> int:
    """Capture the teacher once and train one LoRA adapter per domain."""
    flags = {
        "teacher": teacher,
        "student": student,
        "divergence": divergence,
        "temperature": temperature,
        "alpha": alpha,
        "iters": iters,
        "patience": patience,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "max_seq_length": max_seq_length,
        "rank": rank,
        "memory_gb": memory_gb,
        "cache_bytes": cache_bytes,
        "cache_gb": cache_gb,
        "prompts": prompts,
        "out": out,
        "vocab_strategy": vocab_strategy,
        "seed": seed,
        "fresh": fresh or None,
    }
    return _distill(config, domain or [], everything, _overrides(flags, sets))


@app.command("capture")
def capture_command(
    domain: Domains = None,
    everything: Annotated[bool, typer.Option("--all", help="Every domain that has prompts.")] = False,
    config: ConfigFile = None,
    teacher: Annotated[str | None, _flag("teacher", "--teacher")] = None,
    cache_bytes: Annotated[float | None, _flag("cache_bytes", "--cache-bytes")] = None,
    cache_gb: Annotated[float | None, _flag("cache_gb", "--cache-gb")] = None,
    prompts: Annotated[str | None, _flag("prompts", "--prompts")] = None,
    sets: Sets = None,
) -> int:
    """Let the teacher answer and fill the cache, without training: `distill` then finds all it needs there."""
    from true_kd import pipeline

    flags = {"teacher": teacher, "cache_bytes": cache_bytes, "cache_gb": cache_gb, "prompts": prompts}
    return _run(pipeline.capture, config, domain or [], everything, _overrides(flags, sets))


@app.command()
def demo(
    out: Annotated[str | None, _flag("out", "--out")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help=describe_key(("fresh",)))] = False,
    sets: Sets = None,
) -> int:
    """Distil all six domains with the embedded pocket models; needs no network and a few minutes on a laptop."""
    from true_kd.pocket import BASE

    typer.echo(f"true-kd demo is: true-kd distill --all --config {BASE}")
    return _distill(Path(BASE), [], True, _overrides({"out": out, "fresh": fresh or None}, sets))


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


def _overrides(flags: dict[str, Any], sets: list[str] | None) -> list[Override]:
    given = [
        Override(f"--{name.replace('_', '-')}", SHORT_NAMES[name], value)
        for name, value in flags.items()
        if value is not None
    ]
    return given + [Override("--set", *parse_override(text)) for text in sets or ()]


def _distill(config: Path | None, named: list[str], everything: bool, overrides: list[Override]) -> int:
    from true_kd import pipeline

    return _run(pipeline.distill, config, named, everything, overrides)


def _run(phase: Any, config: Path | None, named: list[str], everything: bool, overrides: list[Override]) -> int:
    """Plan the domains, run a generator of events on them, and show what it yields."""
    from true_kd import events, jobs
    from true_kd.console import make_view

    domains = jobs.choose_domains(config, named, everything, overrides)
    planned, failures = jobs.plan(config, domains, overrides)
    if not planned:
        jobs.refuse(failures)
    view = make_view()
    with view:
        for event in phase(planned, failures):
            view.show(event)
            if isinstance(event, (events.RunFinished, events.CaptureFinished)):
                return shared_exit_code(event.failures.values())
    return 1
