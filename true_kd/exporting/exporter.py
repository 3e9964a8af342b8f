"""What is asked of an export, and what each target brings: a file of this package, and a line in its table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlx.nn as nn

from true_kd.exporting.checking import Measured, Original
from true_kd.exporting.reading import Adapter
from true_kd.prompts import Prompt

Target = Literal["mlx", "peft", "gguf", "fused", "ollama", "lmstudio"]


@dataclass(frozen=True)
class Request:
    """What is exported to where."""

    target: Target
    output: str | None = None
    """The folder; None for exports/<domain>-<target>, and LM Studio's own."""
    force: bool = False
    """Replace an earlier export, and keep a fused model that lost too much."""
    keep_bits: bool = False
    """Quantise a fused model as the student was."""
    base_model: str | None = None
    """The student before it was quantised; None to look it up."""
    prompts: Sequence[Prompt] | None = None
    """What the export is checked on; None for prompts of the domain."""
    system: str | None = None
    """The system message of a Modelfile."""


@dataclass(frozen=True)
class Exporter:
    """How one target is written and compared."""

    check: Callable[[Adapter, Request], None]
    """Raises `CannotExport` for what the target cannot take."""
    write: Callable[[Adapter, Path, Request, str | None], tuple[str, ...]]
    """Fills the folder; the id of the unquantised student is None where nobody knows it. Returns notes for a person."""
    measure: Callable[[Adapter, Path, Original, nn.Module | None], Measured]
    """Reads the folder back; the module is the plain student in float32 where `on_plain`."""
    on_plain: bool = False
    """Whether what was written is measured on the plain student."""
    base: Literal["none", "if known", "needed"] = "none"
    """Whether the tool opens the unquantised student by itself."""
    is_model: bool = False
    """Whether it is a model of its own, which holds the student's weights."""
