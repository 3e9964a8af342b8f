"""What a shell offers after TAB: names of commands and flags by typer, and what may follow them by this module.

A shell waits for it, so domain names are found without MLX and without the command that they are for; and whatever goes
wrong, nothing is offered and nothing is said.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from true_kd.errors import InputError
from true_kd.layout import BASE, OUT, PROMPTS
from true_kd.suggest import quote

if TYPE_CHECKING:
    from true_kd.yaml_file import Document

VARIABLE = "_TRUE_KD_COMPLETE"
"""Set by the scripts that `--show-completion` prints; see typer for the protocol."""

SHELLS = ("bash", "zsh", "fish")

_OF_ADAPTERS = ("compare", "chat", "generate", "evaluate", "report", "serve", "push", "export", "status")
"""Commands whose domains are those that have an adapter."""
_DOMAIN_FLAGS = ("--domain", "-d")


def part_at_equals() -> None:
    """Have typer see `--domain=math` as two words: bash makes three of it, with '=' between."""
    words, number = os.environ.get("COMP_WORDS", "").split("\n"), os.environ.get("COMP_CWORD", "")
    if VARIABLE not in os.environ or not number.isdecimal() or not 1 < int(number) < len(words):
        return
    at = int(number)
    if words[at] == "=":
        words[at] = ""
    elif words[at - 1] == "=":
        del words[at - 1]
        at -= 1
    os.environ |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(at)}


def words_before() -> list[str]:
    """The words between the program and the one that is completed; empty where no shell asks."""
    if VARIABLE not in os.environ:
        return []
    line = os.environ.get("_TYPER_COMPLETE_ARGS")
    if line is None:
        number = os.environ.get("COMP_CWORD", "0")
        return os.environ.get("COMP_WORDS", "").split()[1 : int(number) if number.isdecimal() else 1]
    words = line.split()
    return words[1:] if line[-1:].isspace() else words[1:-1]


def asks_for_domain(words: Sequence[str]) -> bool:
    """Whether a domain's name follows and nothing else of the command matters.

    Not of `init`, where it is a new one, nor of `report`, whose folder is an argument.
    """
    return len(words) > 1 and words[-1] in _DOMAIN_FLAGS and not {"init", "report"} & {*words}


def domain_names(context: typer.Context, incomplete: str) -> list[str]:
    """The domains that a command could mean: those with prompts, or for some commands those with an adapter."""
    from true_kd.files import expand
    from true_kd.layout import domains_in
    from true_kd.pocket import locate
    from true_kd.prompts import folders_with_prompts

    given = context.params
    config = given.get("config")
    base = _base(BASE if config is None else locate(str(config), "--config"))
    if context.info_name in _OF_ADAPTERS:
        found = domains_in(expand(given.get("out") or given.get("folder") or _value(base, "out", OUT), "--out"))
    else:
        found = folders_with_prompts(locate(given.get("prompts") or _value(base, "prompts", PROMPTS), "--prompts"))
    return [name for name in found if name.startswith(incomplete)]


def one_of(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """Offers fixed values."""

    def values(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return values


STAND_IN: dict[str, Any] = {"context_settings": {"ignore_unknown_options": True, "allow_extra_args": True}}
"""How `stand_in` is to be registered."""


def stand_in(
    domain: Annotated[list[str] | None, typer.Option(*_DOMAIN_FLAGS, autocompletion=domain_names)] = None,
    config: Annotated[str | None, typer.Option("--config")] = None,
    prompts: Annotated[str | None, typer.Option("--prompts")] = None,
    out: Annotated[str | None, typer.Option("--out")] = None,
) -> None:
    """Stands for a command of which nothing is asked but a domain's name."""


def set_up(flag: str, shell: str) -> int:
    """`--show-completion SHELL` and `--install-completion SHELL`: for a shell that is not the one that runs it."""
    from typer.completion import get_completion_script, install

    if shell not in SHELLS:
        raise InputError(f"{flag} {quote(shell)}: expected {', '.join(SHELLS[:-1])} or {SHELLS[-1]}. Choose one.")
    script = {"prog_name": "true-kd", "complete_var": VARIABLE, "shell": shell}
    if flag == "--show-completion":
        typer.echo(get_completion_script(**script))
        return 0
    _, path = install(**script)
    typer.echo(f"{shell} completion installed in {path}. It works in the next shell that is started.")
    return 0


def _base(path: Path) -> Document | None:
    from true_kd.yaml_file import read_yaml

    return read_yaml(path) if path.is_file() else None


def _value(base: Document | None, key: str, default: str) -> str:
    found = default if base is None else base.data.get(key, default)
    return found if isinstance(found, str) else default
