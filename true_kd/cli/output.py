"""What commands print for programs."""

from __future__ import annotations

import json
from typing import Any

import typer


def say_json(value: Any, indent: int | None = 2) -> None:
    """Print a value as JSON on stdout, all of it ASCII: it reads the same whatever the locale, and no text that it
    quotes has power over a terminal. NaN and infinity are refused (ValueError)."""
    typer.echo(json.dumps(value, indent=indent, ensure_ascii=True, allow_nan=False))
