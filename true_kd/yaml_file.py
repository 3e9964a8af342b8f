"""Strict YAML as plain data that remembers its lines.

Config files hold mappings, lists, text, numbers, true, false and null, and nothing else. What YAML 1.1 would quietly
turn into something different (`no`, `010`, `12:30`, dates) stays text or is refused with its line; so are anchors,
aliases, merge keys, tags, duplicate keys and numbers that are not finite. Built on the parser events of PyYAML, which
needs no recursion, so no file can exhaust the stack, and no alias can exhaust memory.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from true_kd.errors import ConfigError
from true_kd.suggest import quote

MAX_BYTES = 100_000
"""A larger file is refused: a config is a page of text, and the parser takes some ten seconds for a megabyte."""

MAX_PROBLEMS = 100
"""Reading ends with so many: more than anybody reads at once."""

MAX_DEPTH = 20
"""Deepest nesting of mappings and lists."""

KeyPath = tuple[str | int, ...]
"""Keys and list positions that lead to a value: ("losses", "terms", 0, "weight")."""


@dataclass(frozen=True)
class Document:
    """The data of one YAML file, and the line of each key and list item in it."""

    name: str
    """The file as messages name it."""
    data: dict[str, Any]
    """Plain dicts, lists, strings, ints, floats, bools and None."""
    lines: dict[KeyPath, int] = field(repr=False)
    """The line (from 1) of every path in `data`."""

    def line(self, path: KeyPath) -> int | None:
        """The line (from 1) of the key or item at `path`; None where the file does not have it."""
        return self.lines.get(path)

    def where(self, path: KeyPath) -> str:
        """ "configs/math.yaml:12" for the key at `path`, or for the nearest key above it that the file has."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.name}:{self.lines[path[:length]]}"
        return self.name


def read_yaml(path: Path) -> Document:
    """The mapping that a YAML file holds; an empty file is an empty mapping.

    Raises `ConfigError` with a line "file:line:column: ..." for everything in it that is not plain data.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError([f"{name}: cannot be read ({error.strerror}). Check the path."]) from error
    if len(raw) > MAX_BYTES:
        raise ConfigError([f"{name}: larger than {MAX_BYTES // 1000} kB, expected a page of YAML. Shorten it."])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind a byte order mark.
        body = raw.removeprefix(codecs.BOM_UTF8)
        before = body[: error.start].decode("utf-8")
        line, column = _position(before, len(before))
        message = f"byte 0x{body[error.start]:02x} is not UTF-8. Save the file as UTF-8."
        raise ConfigError([f"{name}:{line}:{column}: {message}"]) from error
    builder = _build(text, _Builder(name, positions=True))
    data = {} if builder.root is None else builder.root
    if not isinstance(data, dict) and not builder.problems:
        builder.problems.append(f"{name}:1:1: {_kind(data)}, expected a mapping at the top. Write 'key: value' lines.")
    if builder.problems:
        raise ConfigError(builder.problems)
    return Document(name, data, builder.lines)


def read_value(text: str, name: str) -> Any:
    """The value that `text` means on the right of a colon: null, a bool, a number, text, or a list of these."""
    builder = _build(text, _Builder(name, positions=False))
    problems = builder.problems
    if not problems and (isinstance(builder.root, dict) or any(isinstance(item, (dict, list)) for item in builder)):
        problems.append(f"{name}: {quote(text)}, expected one value or a flat list. Set one key at a time.")
    if not problems and builder.end < len(text.rstrip()):
        problems.append(f"{name}: {quote(text)}, expected nothing after the value. Quote it if '#' belongs to it.")
    if problems:
        raise ConfigError(problems)
    return builder.root


def write_value(value: Any) -> str:
    """The text on the right of a colon that means `value`, a scalar or a flat list, to every reader of YAML."""
    if isinstance(value, list):
        return f"[{', '.join(map(write_value, value))}]"
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    if _PLAIN_WORD.fullmatch(value) and value.lower() not in _TAKEN_WORDS:
        return value
    return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=float("inf")).rstrip("\n")


_PLAIN_WORD = re.compile(r"/?[A-Za-z][A-Za-z0-9_.-]*([/:][A-Za-z0-9_.-]+)*")
_TAKEN_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n", "inf", "infinity", "nan")


def _build(text: str, builder: _Builder) -> _Builder:
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        line, column = _position(text, error.position)
        builder.problem(line, column, f"{quote(chr(error.character))} is not a printable character. Remove it.")
        return builder
    # PyYAML lets ValueError and OverflowError through for escapes such as "\UFFFFFFFF" and huge %YAML versions.
    try:
        while loader.check_event() and builder.add(loader.get_event()) and len(builder.problems) < MAX_PROBLEMS:
            pass
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark or loader.get_mark()
        fault = ", ".join(" ".join(part.split()) for part in (error.problem, error.context) if part)
        fix = "Indent with spaces." if "\\t" in fault else "Check indentation, colons and quotes here."
        builder.problem(mark.line + 1, mark.column + 1, f"{fault}. {fix}")
    except (ValueError, OverflowError):
        builder.problem(loader.line + 1, loader.column + 1, "an escape or directive without a meaning. Remove it.")
    finally:
        loader.dispose()
    return builder


class _Builder:
    """Plain data from parser events, with an explicit stack in place of recursion."""

    def __init__(self, name: str, positions: bool) -> None:
        self.name = name
        self.positions = positions
        """Whether line and column say anything to the user."""
        self.root: Any = None
        self.end = 0
        """Index behind the last character that belongs to the value."""
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[str] = []
        self._documents = 0
        self._open: list[_Open] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.root if isinstance(self.root, list) else [self.root])

    def add(self, event: yaml.Event) -> bool:
        """Take one event; False when reading on makes no sense."""
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                self._problem(event, "a second document, expected one. Remove the '---' line.")
                return False
            if event.tags or event.version:
                self._problem(event, "a % directive, expected plain YAML. Remove it.")
        elif isinstance(event, yaml.CollectionEndEvent):
            self._open.pop()
            self.end = max(self.end, event.end_mark.index)
        elif isinstance(event, yaml.NodeEvent):
            return self._add_node(event)
        return True

    def _add_node(self, event: yaml.NodeEvent) -> bool:
        self._check_properties(event)
        parent = self._open[-1] if self._open else None
        if parent and isinstance(parent.value, dict) and parent.key is None:
            parent.key = self._key(event, parent)
            return not isinstance(event, yaml.CollectionStartEvent)
        if isinstance(event, yaml.CollectionStartEvent):
            if len(self._open) == MAX_DEPTH:
                self._problem(event, f"nested more than {MAX_DEPTH} levels deep. Write it flatter.")
                return False
            value: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
            self._open.append(_Open(value, self._place(event, parent, value)))
        elif isinstance(event, yaml.ScalarEvent):
            self.end = max(self.end, event.end_mark.index)
            self._place(event, parent, self._scalar(event))
        else:
            self._place(event, parent, None)
        return True

    def _place(self, event: yaml.NodeEvent, parent: _Open | None, value: Any) -> KeyPath:
        """Put the value where it belongs; its path."""
        if parent is None:
            self.root = value
            return ()
        if isinstance(parent.value, list):
            path = (*parent.path, len(parent.value))
            parent.value.append(value)
            self.lines[path] = event.start_mark.line + 1
            return path
        assert parent.key is not None
        path = (*parent.path, parent.key)
        parent.value[parent.key] = value
        parent.key = None
        return path

    def _key(self, event: yaml.NodeEvent, parent: _Open) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            self._problem(event, "a list, mapping or alias as a key, expected text. Write a plain word.")
            return ""
        key = event.value
        path = (*parent.path, key)
        if key == "<<" and event.style is None:
            self._problem(event, "a merge key '<<', expected plain keys. Write the keys out.")
        elif event.style is None and not _is_text(key):
            self._problem(event, f"{quote(key)} as a key, which is not text. Put it in quotes.")
        elif key in parent.value:
            self._problem(event, f"key {quote(key)} again, first on line {self.lines[path]}. Keep one of them.")
        self._check_characters(event)
        self.lines.setdefault(path, event.start_mark.line + 1)
        return key

    def _check_properties(self, event: yaml.NodeEvent) -> None:
        if isinstance(event, yaml.AliasEvent):
            self._problem(event, f"alias '*{event.anchor}', expected plain values. Write the value out.")
            return
        if event.anchor is not None:
            self._problem(event, f"anchor '&{event.anchor}', expected plain values. Remove it.")
        if event.tag is not None:
            self._problem(event, f"tag {quote(event.tag)}, expected plain values. Remove it.")

    def _check_characters(self, event: yaml.ScalarEvent) -> None:
        bad = next((code for code in event.value if code == "\0" or "\ud800" <= code <= "\udfff"), None)
        if bad is not None:
            self._problem(event, f"{quote(bad)} is not a character, expected text. Remove the escape.")

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        self._check_characters(event)
        if event.style is not None:
            return event.value
        try:
            return _plain(event.value)
        except _NotPlain as error:
            self._problem(event, f"{quote(event.value)}{error}")
            return None

    def problem(self, line: int, column: int, message: str) -> None:
        """Note a problem at a line and column, both from 1."""
        where = f"{self.name}:{line}:{column}" if self.positions else self.name
        self.problems.append(f"{where}: {message}")

    def _problem(self, event: yaml.Event, message: str) -> None:
        self.problem(event.start_mark.line + 1, event.start_mark.column + 1, message)


@dataclass
class _Open:
    """A mapping or list that is still being filled."""

    value: Any
    path: KeyPath
    key: str | None = None


class _NotPlain(Exception):
    """An unquoted scalar that readers of YAML disagree about; the message follows the scalar."""


_NULLS = ("", "~", "null", "Null", "NULL")
_TRUE = ("true", "True", "TRUE")
_FALSE = ("false", "False", "FALSE")
_REFUSED_WORDS = {
    **dict.fromkeys(("yes", "Yes", "YES", "on", "On", "ON"), "true"),
    **dict.fromkeys(("no", "No", "NO", "off", "Off", "OFF"), "false"),
}
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_BASED_INT = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_GROUPED = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|nan|infinity)", re.IGNORECASE)
_INT_DIGITS = 18


def _plain(text: str) -> Any:
    """What an unquoted scalar means: the core schema of YAML 1.2, less what YAML 1.1 reads differently."""
    if text in _NULLS:
        return None
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    if text in _REFUSED_WORDS:
        raise _NotPlain(f", expected true or false. Write {_REFUSED_WORDS[text]}, or quote it.")
    if _NOT_FINITE.fullmatch(text):
        raise _NotPlain(", expected a finite number. Write a number, or quote it.")
    if _INT.fullmatch(text):
        digits = text.lstrip("+-")
        if len(digits) > 1 and digits.startswith("0"):
            bare = digits.lstrip("0") or "0"
            raise _NotPlain(f", which some readers of YAML take for octal. Write {quote(bare)[1:-1]}, or quote it.")
        if len(digits) > _INT_DIGITS:
            raise _NotPlain(f", expected at most {_INT_DIGITS} digits. Write a smaller number, or quote it.")
        return int(text)
    if _BASED_INT.fullmatch(text) and len(text) <= _INT_DIGITS:
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        value = float(text)
        if not math.isfinite(value):
            raise _NotPlain(", expected a finite number. Write a smaller number, or quote it.")
        return value
    if "_" in text and _GROUPED.fullmatch(text):
        raise _NotPlain(f", expected digits alone. Write {quote(text.replace('_', ''))[1:-1]}, or quote it.")
    return text


def _is_text(scalar: str) -> bool:
    try:
        return isinstance(_plain(scalar), str)
    except _NotPlain:
        return False


def _position(text: str, index: int) -> tuple[int, int]:
    """Line and column, both from 1, of a character."""
    return text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "a list" if isinstance(value, list) else "a mapping"
