"""The base of every options class, and of every record that a run leaves.

Options are frozen, refuse unknown keys and never take numbers from booleans or strings. Of both, the string below a
field is its description: in `--help`, in the JSON schemas and in the docs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeVar, dataclass_transform

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """Base of all options. Each subclass lives beside the code that reads it and owns the defaults."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )


_Record = TypeVar("_Record")


@dataclass_transform(frozen_default=True)
def record(cls: type[_Record]) -> type[_Record]:
    """A frozen dataclass that is written to JSON: its schema tells what each field means."""
    cls.__pydantic_config__ = ConfigDict(use_attribute_docstrings=True)  # type: ignore[attr-defined]
    return dataclass(frozen=True)(cls)


PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Temperature = Annotated[float, Field(ge=0.5, le=10.0)]
