"""Strict JSON lines: each fault with its column, and nothing that a later reader could choke on.

Unique keys, finite numbers, bounded depth, and text that UTF-8 can write; the scans are linear on hostile input.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from true_kd.suggest import quote

MAX_LINE_BYTES = 10_000_000
"""A longer line is refused: no context window holds it, and it is most often a file without line ends."""

MAX_PROBLEMS = 1000
"""Reading ends with so many: more than anybody mends at once, and a file can have millions of lines."""

MAX_DEPTH = 100
"""Deepest nesting of lists and objects in one line, so that no reader of a prompt can run out of stack."""


def read_lines(path: Path, problems: list[str]) -> Iterator[tuple[int, str]]:
    """Line numbers and lines without their ends; lines that are not clean UTF-8 go to `problems` instead."""
    try:
        with path.open("rb") as file:
            number = 0
            while len(problems) < MAX_PROBLEMS and (
                raw := file.readline(MAX_LINE_BYTES + 5)
            ):  # room for a byte order mark and a line end
                number += 1
                raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                body = raw.removesuffix(b"\n").removesuffix(b"\r")
                if len(body) > MAX_LINE_BYTES:
                    while raw and not raw.endswith(b"\n"):
                        raw = file.readline(MAX_LINE_BYTES)
                    problems.append(
                        f"{path}:{number}: longer than {MAX_LINE_BYTES // 1_000_000} MB, expected one prompt a line. "
                        "Split it into several lines."
                    )
                    continue
                zero = body.find(b"\0")
                try:
                    line = body.decode("utf-8") if zero < 0 else body[:zero].decode("utf-8")
                except UnicodeDecodeError as error:
                    column = len(body[: error.start].decode("utf-8")) + 1
                    byte = body[error.start]
                    problems.append(f"{path}:{number}:{column}: byte 0x{byte:02x} is not UTF-8. Save it as UTF-8.")
                    continue
                if zero >= 0:
                    problems.append(f"{path}:{number}:{len(line) + 1}: a NUL byte, expected text. Save it as UTF-8.")
                    continue
                yield number, line
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror}). Check that it is a file and may be read.")


class Refusal(Exception):
    """Why one line is no prompt. `column` counts from 1; `key` names a top-level key whose column is wanted."""

    def __init__(self, message: str, column: int | None = None, key: str | None = None) -> None:
        self.message = message
        self.column = column
        self.key = key
        super().__init__(message)


class _ConstantRefused(Exception):
    """A JSON token that no finite number stands behind."""


class _DuplicateKey(Exception):
    """A key that one object holds twice."""


def refuse(message: str, key: str | None = None) -> NoReturn:
    """Raise `Refusal`; a full stop is added to the message."""
    raise Refusal(f"{message}.", key=key)


# Strings, numbers, words and brackets of JSON. An unterminated string runs to the end of the line, which keeps the
# scan linear on hostile input.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}:]|[-+.\w]+', re.DOTALL)

# Escapes that name no character: a lone half of a surrogate pair, and NUL. The first two alternatives keep step.
_BAD_ESCAPE = re.compile(
    r"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u(?:[dD][89a-fA-F][0-9a-fA-F]{2}|0000))"
)


def parse_line(line: str) -> dict[str, Any]:
    """The JSON object a line holds: unique keys, finite numbers, no lone surrogates, bounded depth."""
    if line.count("[") + line.count("{") > MAX_DEPTH:
        _check_depth(line)
    try:
        record = json.loads(
            line,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_bounded_int,
        )
    except json.JSONDecodeError as error:
        fault = error.msg.replace("Expecting", "expected")
        message = f"{fault[0].lower()}{fault[1:].removesuffix(' at')}. Write one JSON object on this line."
        raise Refusal(message, error.colno) from error
    except _ConstantRefused as error:
        token = str(error)
        column = next((m.start() + 1 for m in _TOKEN.finditer(line) if m.group() == token), 1)
        raise Refusal(f"{quote(token)}, expected a finite number. Write a smaller number or null.", column) from error
    except _DuplicateKey as error:
        column, key = next((column, name) for _, column, name, again in _keys(line) if again)
        raise Refusal(f"key {quote(key)} twice in one object, expected once. Remove one.", column) from error
    if "\\u" in line:
        for match in _BAD_ESCAPE.finditer(line):
            if match.group(1):
                message = f"{match.group(1)} is not a character, expected text that UTF-8 can write. Remove it."
                raise Refusal(message, match.start() + 1)
    if not isinstance(record, dict):
        refuse(f'{name_of(type(record))}, expected a JSON object such as {{"prompt": "..."}}. Write one object a line')
    return record


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for key, value in pairs:
        if key in record:
            raise _DuplicateKey
        record[key] = value
    return record


def _refuse_constant(token: str) -> NoReturn:
    raise _ConstantRefused(token)


def _finite_float(token: str) -> float:
    value = float(token)
    return value if math.isfinite(value) else _refuse_constant(token)


def _bounded_int(token: str) -> int:
    # int() itself raises ValueError above 4300 digits, and takes quadratic time below.
    return int(token) if len(token) <= 300 else _refuse_constant(token)


def _check_depth(line: str) -> None:
    depth = 0
    for match in _TOKEN.finditer(line):
        token = match.group()
        if token in ("[", "{"):
            depth += 1
            if depth > MAX_DEPTH:
                message = f"nested more than {MAX_DEPTH} levels deep. Write it flatter."
                raise Refusal(message, match.start() + 1)
        elif token in ("]", "}"):
            depth -= 1


def _keys(line: str) -> Iterator[tuple[int, int, str, bool]]:
    """Depth (1 is the top level), column, name and "seen before in its object" of every object key.

    The line is valid JSON at least up to the last key that is asked for.
    """
    open_objects: list[set[str]] = []
    before: re.Match[str] | None = None
    for match in _TOKEN.finditer(line):
        token = match.group()
        if token in ("[", "{"):
            open_objects.append(set())
        elif token in ("]", "}"):
            open_objects.pop()
        elif token == ":" and before:
            name = json.loads(before.group())
            yield len(open_objects), before.start() + 1, name, name in open_objects[-1]
            open_objects[-1].add(name)
        before = match


def key_column(line: str, key: str | None) -> int:
    """The column (from 1) of a top-level key; 1 where it is not found."""
    return next((column for depth, column, name, _ in _keys(line) if depth == 1 and name == key), 1)


_NAMES = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def name_of(kind: type) -> str:
    """What JSON calls a Python type: "a string"."""
    return _NAMES.get(kind, kind.__name__)
