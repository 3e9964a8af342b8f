"""What a prompt file means.

A domain is a folder `<root>/<domain>/` with `train.jsonl` or `train.txt`, `valid.jsonl` or `valid.txt`, and if wanted
`system.md`, the system message of every chat prompt that has none of its own. The JSON lines are those of mlx-lm:
`{"messages": [...]}`, `{"prompt": ..., "completion": ...}` and `{"text": ...}`; a `.txt` file holds one prompt a line.
Whatever comes out of here is a well-formed `Prompt`: strings that UTF-8 can write, roles that chat templates know, and
never both a conversation and raw text. Every bad line is found before the first one is reported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from true_kd.errors import PromptError
from true_kd.suggest import did_you_mean, nearest, quote

SPLITS = ("train", "valid")
"""The splits of a domain, each one file."""

ROLES = ("system", "user", "assistant", "tool")
"""The roles a message may have."""

SYSTEM_FILE = "system.md"
"""The file of a domain folder that holds the system message."""

MAX_LINE_BYTES = 10_000_000
"""A longer line is refused: no context window holds it, and it is most often a file without line ends."""

MAX_DEPTH = 100
"""Deepest nesting of lists and objects in one line, so that no reader of a prompt can run out of stack."""

_SUFFIXES = (".jsonl", ".txt")
_DOMAIN_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_KEYS_BESIDE = {
    "messages": ("tools", "answer"),
    "prompt": ("completion", "tools", "answer"),
    "text": ("answer",),
}
_KNOWN_KEYS = ("messages", "prompt", "completion", "text", "tools", "answer")


@dataclass(frozen=True)
class Prompt:
    """One prompt, and the reply to score if the data brings one. Exactly one of `messages` and `text` is given."""

    where: str
    """The line it came from, for messages: "prompts/math/train.jsonl:12" or "train_prompts[3]"."""
    messages: tuple[Mapping[str, Any], ...] | None = None
    """The conversation up to, and without, the completion; system message included."""
    text: str | None = None
    """Raw text: no chat template, every token is scored."""
    tools: tuple[Mapping[str, Any], ...] | None = None
    """Tool descriptions for the chat template, as given."""
    completion: Mapping[str, Any] | None = None
    """The assistant message that the teacher scores; None when the teacher writes it."""
    answer: str | None = None
    """The checkable answer of a held-out task."""

    def identity(self) -> str:
        """Everything but `where` as one line of JSON, for fingerprints.

        Keys below the top level keep their order: templates print tools as they find them, so a different order is
        a different prompt.
        """
        facts = {
            "messages": self.messages,
            "text": self.text,
            "tools": self.tools,
            "completion": self.completion,
            "answer": self.answer,
        }
        return json.dumps(facts, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def check_domain_name(name: str) -> None:
    """Raise `PromptError` unless `name` can be the name of a domain, and so of a folder on every system."""
    if not _DOMAIN_NAME.fullmatch(name):
        raise PromptError(
            [
                f"domain {quote(name)}: not a domain name, expected 1 to 64 lower-case letters, digits, '-' or '_', "
                "starting with a letter or digit. Rename the folder."
            ]
        )


def list_domains(root: Path) -> list[str]:
    """The names of the folders under `root` that hold a train file, sorted."""
    if not root.is_dir():
        raise PromptError([f"{root}: no such folder, expected one folder per domain. Create it, or choose another."])
    try:
        entries = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        found = [name for name in entries if _candidates(root / name, "train")]
    except OSError as error:
        raise PromptError([f"{root}: cannot be read ({error.strerror}). Check its permissions."]) from error
    bad = [name for name in found if not _DOMAIN_NAME.fullmatch(name)]
    if bad:
        raise PromptError(
            [
                f"{root}: folder {quote(name)} holds a train file but is not named like a domain, expected lower-case "
                "letters, digits, '-' or '_'. Rename it."
                for name in bad
            ]
        )
    return found


def domain_folder(root: Path, domain: str) -> Path:
    """The folder of `domain`, which exists and lies under `root`."""
    check_domain_name(domain)
    folder = root / domain
    if not folder.is_dir():
        known = list_domains(root)
        listed = f"Domains here: {', '.join(known)}." if known else f"Create {folder}/train.jsonl."
        hint = did_you_mean(domain, known) or "."
        raise PromptError([f"{folder}: no such domain{hint} {listed}"])
    if not folder.resolve().is_relative_to(root.resolve()):
        raise PromptError([f"{folder}: leads outside {root}, expected a folder below it. Move the prompts there."])
    return folder


def has_split(root: Path, domain: str, split: str) -> bool:
    """Whether the domain has a file for this split."""
    assert split in SPLITS, split
    return bool(_candidates(domain_folder(root, domain), split))


def load_prompts(root: Path, domain: str, split: str) -> list[Prompt]:
    """All prompts of one split of a domain, in the order of the file; at least one.

    Raises `PromptError` with one line for every bad line of the file, or when there is no file; ask `has_split`
    first where a split may be missing.
    """
    assert split in SPLITS, split
    folder = domain_folder(root, domain)
    found = _candidates(folder, split)
    if not found:
        wanted = folder / f"{split}.jsonl"
        raise PromptError([f"{wanted}: no such file, nor {split}.txt. Write one prompt a line into it."])
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise PromptError([f"{folder}: both {names}, expected one file per split. Merge them, or remove one."])
    problems: list[str] = []
    system = _read_system(folder / SYSTEM_FILE, problems)
    prompts = list(_read_prompts(found[0], system, problems))
    if not prompts and not problems:
        problems.append(f"{found[0]}: no prompts, expected one a line. Write some, or remove the file.")
    if problems:
        raise PromptError(problems)
    return prompts


def from_strings(strings: Sequence[str], name: str = "train_prompts") -> list[Prompt]:
    """One chat prompt with a single user message per string; `where` is "train_prompts[3]"."""
    if isinstance(strings, str):
        raise PromptError([f"{name}: one string, expected a list of strings. Write [{quote(strings)}]."])
    return _from_values(strings, name, str, lambda value: {"prompt": value})


def from_records(records: Sequence[dict[str, Any]], name: str = "train_prompts") -> list[Prompt]:
    """One prompt per record, each in the form of a line of a `.jsonl` file; `where` is "train_prompts[3]"."""
    return _from_values(records, name, dict, lambda value: value)


def _from_values(
    values: Sequence[Any], name: str, expected: type, to_record: Callable[[Any], dict[str, Any]]
) -> list[Prompt]:
    prompts: list[Prompt] = []
    problems: list[str] = []
    for index, value in enumerate(values):
        where = f"{name}[{index}]"
        try:
            if not isinstance(value, expected):
                _refuse(f"{_kind(value)}, expected {_NAMES[expected]}. Convert it first")
            prompts.append(_to_prompt(_parse_line(_dump(to_record(value))), None, where))
        except _Refusal as refusal:
            problems.append(f"{where}: {refusal.message}")
    if not values:
        problems.append(f"{name}: empty, expected at least one prompt. Add some.")
    if problems:
        raise PromptError(problems)
    return prompts


def _dump(record: Any) -> str:
    # Through JSON and back: one set of rules for files and for Python, and a copy that the caller cannot change.
    try:
        return json.dumps(record, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        message = f"not plain JSON data ({error}), expected strings, numbers, lists and dicts. Convert it first."
        raise _Refusal(message) from error


def _candidates(folder: Path, split: str) -> list[Path]:
    return [path for suffix in _SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]


def _read_system(path: Path, problems: list[str]) -> str | None:
    if not path.is_file():
        return None
    before = len(problems)
    text = "\n".join(line for _, line in _read_lines(path, problems)).strip()
    if not text and len(problems) == before:
        problems.append(f"{path}: empty, expected the system message. Write it, or remove the file.")
    return text or None


def _read_prompts(path: Path, system: str | None, problems: list[str]) -> Iterator[Prompt]:
    for number, line in _read_lines(path, problems):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if path.suffix == ".txt":
            yield _to_prompt({"prompt": line.strip()}, system, where)
            continue
        try:
            yield _to_prompt(_parse_line(line), system, where)
        except _Refusal as refusal:
            column = refusal.column or _key_column(line, refusal.key)
            problems.append(f"{where}:{column}: {refusal.message}")


def _read_lines(path: Path, problems: list[str]) -> Iterator[tuple[int, str]]:
    """Line numbers and lines without their ends; lines that are not clean UTF-8 go to `problems` instead."""
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 5):  # room for a byte order mark and a line end
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
        problems.append(f"{path}: cannot be read ({error.strerror}). Check its permissions.")


class _Refusal(Exception):
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


def _refuse(message: str, key: str | None = None) -> NoReturn:
    raise _Refusal(f"{message}.", key=key)


# Strings, numbers, words and brackets of JSON. An unterminated string runs to the end of the line, which keeps the
# scan linear on hostile input.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}:]|[-+.\w]+', re.DOTALL)

# Escapes that name no character: a lone half of a surrogate pair, and NUL. The first two alternatives keep step.
_BAD_ESCAPE = re.compile(
    r"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u(?:[dD][89a-fA-F][0-9a-fA-F]{2}|0000))"
)


def _parse_line(line: str) -> dict[str, Any]:
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
        raise _Refusal(message, error.colno) from error
    except _ConstantRefused as error:
        token = str(error)
        column = next((m.start() + 1 for m in _TOKEN.finditer(line) if m.group() == token), 1)
        raise _Refusal(f"{quote(token)}, expected a finite number. Write a smaller number or null.", column) from error
    except _DuplicateKey as error:
        column, key = next((column, name) for _, column, name, again in _keys(line) if again)
        raise _Refusal(f"key {quote(key)} twice in one object, expected once. Remove one.", column) from error
    if "\\u" in line:
        for match in _BAD_ESCAPE.finditer(line):
            if match.group(1):
                message = f"{match.group(1)} is not a character, expected text that UTF-8 can write. Remove it."
                raise _Refusal(message, match.start() + 1)
    if not isinstance(record, dict):
        _refuse(f'{_kind(record)}, expected a JSON object such as {{"prompt": "..."}}. Write one object a line')
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
                raise _Refusal(message, match.start() + 1)
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


def _key_column(line: str, key: str | None) -> int:
    return next((column for depth, column, name, _ in _keys(line) if depth == 1 and name == key), 1)


def _to_prompt(record: dict[str, Any], system: str | None, where: str) -> Prompt:
    for key in record:
        if key not in _KNOWN_KEYS:
            hint = did_you_mean(key, _KNOWN_KEYS) or f", expected some of {', '.join(_KNOWN_KEYS)}. Remove it."
            raise _Refusal(f"{quote(key)}: unknown key{hint}", key=key)
    # Exporters write absent columns as null.
    given = {key: value for key, value in record.items() if value is not None}
    kinds = [kind for kind in _KEYS_BESIDE if kind in given]
    if not kinds:
        _refuse("no prompt, expected 'messages', 'prompt' or 'text'. Add one of them")
    kind = kinds[0]
    for key in given:
        if key != kind and key not in _KEYS_BESIDE[kind]:
            beside = " or ".join(f"'{other}'" for other in _KEYS_BESIDE[kind])
            _refuse(f"'{key}' together with '{kind}', expected only {beside} beside it. Remove one of the two", key)
    answer = given.get("answer")
    if answer is not None:
        _check_text(answer, "answer", "answer")
    if kind == "text":
        _check_text(given["text"], "text", "text")
        return Prompt(where=where, text=given["text"], answer=answer)
    completion: dict[str, Any] | None = None
    if kind == "messages":
        messages = _to_messages(given["messages"], "messages")
        if messages[-1]["role"] == "assistant":
            completion = messages.pop()
            if not completion["content"].strip() and not completion.get("tool_calls"):
                _refuse("messages: the last message is empty, expected the reply to score. Write it, or drop it", kind)
    else:
        messages = _to_prompt_messages(given["prompt"])
        if "completion" in given:
            _check_text(given["completion"], "completion", "completion")
            completion = {"role": "assistant", "content": given["completion"]}
    if not any(message["role"] == "user" for message in messages):
        _refuse(f"{kind}: no user message, expected at least one before the reply. Add it", kind)
    if system is not None and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    return Prompt(
        where=where,
        messages=tuple(messages),
        tools=_to_tools(given.get("tools")),
        completion=completion,
        answer=answer,
    )


def _to_prompt_messages(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        messages = _to_messages(value, "prompt")
        if messages[-1]["role"] == "assistant":
            _refuse("prompt: ends with an assistant message, expected user or tool. Name the list 'messages'", "prompt")
        return messages
    _check_text(value, "prompt", "prompt")
    return [{"role": "user", "content": value}]


def _to_messages(value: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        _refuse(f'{key}: {_kind(value)}, expected a list of messages. Write [{{"role": "user", ...}}]', key)
    if not value:
        _refuse(f"{key}: an empty list, expected at least one message. Add a user message", key)
    return [_to_message(message, f"{key}[{index}]", key) for index, message in enumerate(value)]


def _to_message(value: Any, where: str, key: str) -> dict[str, Any]:
    """The message as given, nulls left out, and with `content` "" where only tool calls are given."""
    if not isinstance(value, dict):
        _refuse(f"{where}: {_kind(value)}, expected an object with 'role' and 'content'. Write it so", key)
    message = {name: part for name, part in value.items() if part is not None}
    roles = f"{', '.join(ROLES[:-1])} or {ROLES[-1]}"
    role = message.get("role")
    if role is None:
        _refuse(f"{where}: no 'role'{_instead('role', message)}, expected {roles}. Add it", key)
    if not isinstance(role, str) or role not in ROLES:
        shown = quote(role) if isinstance(role, str) else _kind(role)
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise _Refusal(f"{where}.role: {shown}, expected {roles}{hint or '. Change it.'}", key=key)
    calls = message.get("tool_calls")
    if calls is not None:
        if role != "assistant":
            _refuse(f"{where}.tool_calls: in a {role} message, expected only in assistant messages. Remove it", key)
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            _refuse(f"{where}.tool_calls: {_kind(calls)}, expected a list of objects. Write it so", key)
    if "content" not in message and calls:
        # Templates disagree about a missing content; all of them print "" as nothing.
        message["content"] = ""
    if "content" not in message:
        _refuse(f"{where}: no 'content'{_instead('content', message)}, expected a string. Add it", key)
    content = message["content"]
    if not isinstance(content, str):
        _refuse(f"{where}.content: {_kind(content)}, expected a string. Join its parts into one string", key)
    if role == "user":
        _check_text(content, f"{where}.content", key)
    return message


def _instead(key: str, message: dict[str, Any]) -> str:
    found = nearest(key, [name for name in message if name not in ("role", "content")])
    return f" but {quote(found)}" if found is not None else ""


def _to_tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        _refuse(f"tools: {_kind(value)}, expected a list of objects. Write one object per tool", "tools")
    return tuple(value)


def _check_text(value: Any, where: str, key: str) -> None:
    if not isinstance(value, str):
        _refuse(f"{where}: {_kind(value)}, expected a string. Put it in quotes", key)
    if not value.strip():
        _refuse(f"{where}: empty, expected text. Write it, or remove the line", key)


_NAMES = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def _kind(value: Any) -> str:
    return _NAMES.get(type(value), type(value).__name__)
