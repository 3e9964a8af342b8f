"""What commands print for programs."""

from __future__ import annotations

import json
from typing import Any

import typer


def say_json(value: Any, indent: int | None = 2) -> None:
    """Print a value as JSON on stdout; NaN and infinity are refused (ValueError)."""
    typer.echo(json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False))
