"""Flags that several commands share: each is the short name of one key of the config, whose help text it carries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from true_kd.cli.completion import domain_names, one_of
from true_kd.config import SHORT_NAMES, Override, describe_key, key_choices
from true_kd.validation import parse_override


def flag(name: str, *spellings: str) -> Any:
    """The option of a short name, with the help text that its key carries."""
    help_text = describe_key(SHORT_NAMES[name])
    return typer.Option(*spellings, help=help_text, show_default=False, autocompletion=offers(name))


def offers(name: str) -> Any:
    """What a shell offers for the value of a short name: its choices, where it has some."""
    choices = key_choices(SHORT_NAMES[name])
    return one_of(choices) if choices else None


Domains = Annotated[
    list[str] | None,
    typer.Option("--domain", "-d", help="A domain; repeat it for several.", autocompletion=domain_names),
]
Everything = Annotated[bool, typer.Option("--all", help="Every domain that has prompts.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Set any key of the config, such as lora.rank=8."),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="Base config instead of configs/base.yaml.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Teacher = Annotated[str | None, flag("teacher", "--teacher")]
Student = Annotated[str | None, flag("student", "--student")]
Prompts = Annotated[str | None, flag("prompts", "--prompts")]
Out = Annotated[str | None, flag("out", "--out")]
ReportTo = Annotated[
    list[str] | None,
    typer.Option("--report-to", metavar="NAME", help=describe_key(SHORT_NAMES["report_to"]), show_default=False),
]
Force = Annotated[bool, typer.Option("--force", help=describe_key(("force",)))]
Fresh = Annotated[bool, typer.Option("--fresh", help=describe_key(("fresh",)))]


def overrides(flags: dict[str, Any], sets: list[str] | None) -> list[Override]:
    """What the flags, by short name, and `--set` change; flags that are None were not given."""
    given = [
        Override(f"--{name.replace('_', '-')}", SHORT_NAMES[name], value)
        for name, value in flags.items()
        if value is not None
    ]
    return given + [Override("--set", *parse_override(text)) for text in sets or ()]
