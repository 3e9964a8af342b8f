"""metrics.jsonl: a domain's training, one JSON object a line, for whoever follows it while it trains.

The file says what kd_metrics.json says, and what a checkpoint says: it is a function of them. So a run that goes on
does not cut the file of the one before, it writes it anew up to its checkpoint and adds to that; each iteration is
there once. Only what comes after a last line end can be half written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from true_kd import adapters
from true_kd.files import CannotRead, CannotWrite, flush, read_plain, write_atomic
from true_kd.options import record
from true_kd.reporting.records import KDResult, Validation
from true_kd.training import StepMetrics

FORMAT = 1
"""Version of the layout of the lines."""
_MOST = 2**30


@record
class Start:
    """The first line: what is trained."""

    format: int
    """Version of this layout; a new one when a field changes its meaning or goes."""
    domain: str
    """The domain, or the domain with " (SFT control)" behind it."""
    iters: int
    """Optimizer steps that are to be made; fewer are where `training.patience` ends it."""


@record
class Finish:
    """The last line: training is over, and its best weights are in the folder. The proof is still to come."""

    iteration: int
    """The last one that was made."""
    best_iteration: int
    """The iteration whose weights were kept: that of the lowest validation loss."""


Line = Start | StepMetrics | Validation | Finish
KINDS: Mapping[str, type] = {"start": Start, "step": StepMetrics, "validation": Validation, "finish": Finish}
"""The `type` of each line."""
_TYPES = {kind: name for name, kind in KINDS.items()}


def spell(line: Line) -> str:
    """A line, its end included; NaN and infinity are refused (ValueError)."""
    return json.dumps({"type": _TYPES[type(line)], **asdict(line)}, ensure_ascii=False, allow_nan=False) + "\n"


class MetricsFile:
    """metrics.jsonl of a run, which `begin` makes and `add` makes longer."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / adapters.LINES
        self._descriptor: int | None = None

    def begin(self, lines: Sequence[Line]) -> None:
        """Write these lines in the place of whatever is there.

        Raises
        ------
        CannotWrite
            where that cannot be done.
        """
        _write(self._path, "".join(map(spell, lines)))
        try:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise CannotWrite(self._path, error) from error

    def add(self, line: Line) -> None:
        """Write a line, for readers to see at once; on the disk it is when the system finds time."""
        assert self._descriptor is not None, "begin comes first"
        text = spell(line).encode()
        try:
            while text:
                text = text[os.write(self._descriptor, text) :]
        except OSError as error:
            raise CannotWrite(self._path, error, len(text)) from error

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lines_of(
    domain: str,
    iters: int,
    steps: Sequence[StepMetrics],
    validations: Sequence[Validation],
    best_iteration: int | None = None,
) -> list[Line]:
    """The lines of a training as far as it is, each validation after the step that it is of; `best_iteration` ends
    one that is over."""
    due = list(validations)
    lines: list[Line] = [Start(FORMAT, domain, iters)]
    for iteration, step in enumerate([None, *steps]):
        lines += [] if step is None else [step]
        while due and due[0].iteration <= iteration:
            lines.append(due.pop(0))
    if best_iteration is not None:
        lines.append(Finish(len(steps), best_iteration))
    return lines


def settle(folder: Path, domain: str, iters: int, result: KDResult) -> None:
    """Have a finished domain's metrics.jsonl on the disk, and say what its result says; it may be gone or damaged."""
    path = folder / adapters.LINES
    lines = lines_of(domain, iters, result.steps, result.validations, result.best_iteration)
    text = "".join(map(spell, lines))
    try:
        is_there = read_plain(path, _MOST) == text.encode()
    except (FileNotFoundError, CannotRead, ValueError):
        is_there = False
    if not is_there:
        _write(path, text)
        return
    try:
        with path.open("rb") as file:
            flush(file.fileno())
    except OSError as error:
        raise CannotWrite(path, error) from error


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a metrics.jsonl as far as they are whole: one that is being written is not there yet.

    Nothing where there is no file, or it is of another format.
    """
    try:
        content = read_plain(path, _MOST)
    except (FileNotFoundError, CannotRead, ValueError):
        return
    for number, text in enumerate(content.split(b"\n")[:-1]):
        try:
            found = json.loads(text)
            line = _READERS[found.pop("type")].validate_python(found)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return
        if number == 0 and not (isinstance(line, Start) and line.format == FORMAT):
            return
        yield line


_READERS = {name: TypeAdapter(kind) for name, kind in KINDS.items()}


def line_schema() -> dict[str, Any]:
    """The JSON schema of a line of metrics.jsonl."""
    parts: dict[str, Any] = {}
    for name, kind in KINDS.items():
        part = TypeAdapter(kind).json_schema(mode="serialization", ref_template="#/$defs/{model}")
        parts |= part.pop("$defs", {})
        kind_of_line = {"const": name, "type": "string", "description": "What this line is."}
        properties = {"type": kind_of_line, **part["properties"]}
        parts[part["title"]] = {**part, "properties": properties, "required": ["type", *part["required"]]}
    names = [kind.__name__ for kind in KINDS.values()]
    return {
        "$defs": parts,
        "title": "Line",
        "description": "One line of metrics.jsonl.",
        "oneOf": [{"$ref": f"#/$defs/{name}"} for name in names],
    }


def _write(path: Path, text: str) -> None:
    content = text.encode()
    write_atomic(path, lambda place: place.write_bytes(content), len(content))
