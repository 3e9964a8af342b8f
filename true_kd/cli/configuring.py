"""`true-kd config`: what a config comes to, where each value of it came from, and what it may hold."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import typer

from true_kd.cli.completion import domain_names
from true_kd.cli.flags import AsJson, ConfigFile, Sets, overrides
from true_kd.cli.output import say_json
from true_kd.suggest import printable

app = typer.Typer(help="Show what a config comes to, and where each value came from.", rich_markup_mode=None)

Domain = Annotated[
    str | None,
    typer.Option(
        "--domain",
        "-d",
        help="With the domain's own file over the base.",
        show_default=False,
        autocompletion=domain_names,
    ),
]
First = Annotated[
    str,
    typer.Argument(metavar="A", help="A domain, a config file, or an adapter's folder.", autocompletion=domain_names),
]
Second = Annotated[
    str | None,
    typer.Argument(
        metavar="[B]",
        help="Another; without it, the defaults.",
        show_default=False,
        autocompletion=domain_names,
    ),
]


@app.callback(invoke_without_command=True)
def _main(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def show(domain: Domain = None, config: ConfigFile = None, as_json: AsJson = False, sets: Sets = None) -> int:
    """Print the whole config of a run as YAML, each value with the file and line, or the flag, that it came from.

    What is printed is itself a config.
    """
    from true_kd.config import leaves, resolve
    from true_kd.project import check_known
    from true_kd.prompts import check_domain_name
    from true_kd.validation import dotted

    if domain is not None:
        check_domain_name(domain)
    found = resolve(config, domain, overrides({}, sets))
    if domain is not None:
        check_known(domain, config)
    if as_json:
        origins = {dotted(path): found.origin(path) for path, _ in leaves(found.config)}
        say_json({"files": found.files, "config": found.config.model_dump(mode="json"), "origins": origins})
        return 0
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    rows = [(path, value, found.origin(path)) for path, value in leaves(found.config)]
    for line in _yaml_lines(rows, width):
        typer.echo(printable(line))
    return 0


@app.command()
def diff(
    first: First,
    second: Second = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Print the keys in which two configs differ, with both values and where they came from.

    Of a domain it is what a run would get; of an adapter's folder what its run got, as run.json there has it.
    """
    from true_kd.differing import differences, find_config
    from true_kd.yaml_file import write_value

    one, other = (find_config(name, config) for name in (first, second))
    found = differences(one, other)
    if as_json:
        say_json({"a": one.name, "b": other.name, "differences": [asdict(each) for each in found]})
        return 0
    typer.echo(printable(f"A: {one.name}\nB: {other.name}"))
    for each in found:
        typer.echo(printable(each.key))
        typer.echo(printable(f"  A  {write_value(each.a)}  # {each.a_origin}"))
        typer.echo(printable(f"  B  {write_value(each.b)}  # {each.b_origin}"))
    if not found:
        typer.echo("No key differs.")
    return 0


@app.command()
def schema() -> int:
    """Print the JSON schema of a config: what `configs/config.schema.json` holds for editors."""
    from true_kd.config_schema import schema as config_schema

    say_json(config_schema())
    return 0


_COLUMN = 36
"""Where the origins stand, behind values that leave them the room."""


def _yaml_lines(rows: list[tuple[tuple[str | int, ...], object, str]], width: int | None) -> Iterator[str]:
    """The lines of the YAML of all values, its origins as comments: above the value where `width` is too small."""
    from true_kd.yaml_file import write_value

    group: tuple[str | int, ...] = ()
    for path, value, origin in rows:
        if path[:-1] != group:
            group = path[:-1]
            if group:
                yield f"{group[-1]}:"
        indent = "  " * len(group)
        line = f"{indent}{path[-1]}: {write_value(value)}"
        beside = f"{line:<{_COLUMN}}  # {origin}"
        if width is None or len(beside) <= width:
            yield beside
        else:
            yield f"{indent}# {origin}"
            yield line
