"""What commands print: JSON for programs, and colours where there are some."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from true_kd.suggest import printable

if TYPE_CHECKING:
    from rich.console import Console


def say_json(value: Any, indent: int | None = 2) -> None:
    """Print a value as JSON on stdout, all of it ASCII: it reads the same whatever the locale, and no text that it
    quotes has power over a terminal. NaN and infinity are refused (ValueError)."""
    typer.echo(json.dumps(value, indent=indent, ensure_ascii=True, allow_nan=False))


def watched(stages: Generator[str, None, _Result], word: Callable[[str], str] = str) -> _Result:
    """Go through the stages of some work, and name them, as `word` puts it, where there is somebody to watch."""
    with contextlib.ExitStack() as stack:
        status = None
        if sys.stderr.isatty():
            from rich.console import Console

            status = stack.enter_context(Console(stderr=True, highlight=False).status("", spinner="line"))
        while True:
            try:
                stage = next(stages)
            except StopIteration as end:
                return end.value
            if status is not None:
                from rich.text import Text

                status.update(Text(printable(word(stage))))


_Result = TypeVar("_Result")


def line_width() -> int:
    """Columns of a line of text: those of the terminal, or of $COLUMNS; in a pipe or a file no line is folded."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        return shutil.get_terminal_size().columns
    return _UNFOLDED


_UNFOLDED = 1000


def colour_console() -> Console | None:
    """Where stdout is a terminal that shows colours, and NO_COLOR is not set; else None."""
    if not sys.stdout.isatty() or os.environ.get("TERM") in ("dumb", "unknown") or os.environ.get("NO_COLOR"):
        return None
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.color_system else None
