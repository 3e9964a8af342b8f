"""What a prompt file means.

A domain is a folder `<root>/<domain>/` with `train.jsonl` or `train.txt`, `valid.jsonl` or `valid.txt`, and if wanted
`system.md`, the system message of every chat prompt that has none of its own. The JSON lines are those of mlx-lm:
`{"messages": [...]}`, `{"prompt": ..., "completion": ...}` and `{"text": ...}`; a `.txt` file holds one prompt a line.
Whatever comes out of here is a well-formed `Prompt`: strings that UTF-8 can write, roles that chat templates know, and
never both a conversation and raw text. Every bad line is found before the first one is reported.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from true_kd.errors import PromptError
from true_kd.json_lines import Refusal, key_column, name_of, parse_line, read_lines, refuse
from true_kd.suggest import did_you_mean, nearest, quote

SPLITS = ("train", "valid")
"""The splits of a domain, each one file."""

ROLES = ("system", "user", "assistant", "tool")
"""The roles a message may have."""

MOST_REWARD = 1e9
"""The largest reward that a record may bear."""

SYSTEM_FILE = "system.md"
"""The file of a domain folder that holds the system message."""

_SUFFIXES = (".jsonl", ".txt")
_DOMAIN_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_KEYS_BESIDE = {
    "messages": ("tools", "answer", "reward"),
    "prompt": ("completion", "tools", "answer", "reward"),
    "text": ("reward",),
}
_KNOWN_KEYS = ("messages", "prompt", "completion", "text", "tools", "answer", "reward")


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
    reward: float | None = None
    """What the tokens of the reply weigh in the loss where `losses.weigh_by` is reward."""

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
            **({} if self.reward is None else {"reward": self.reward}),
        }
        return json.dumps(facts, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def check_domain_name(name: str) -> None:
    """Raise `PromptError` unless `name` can be the name of a domain, and so of a folder on every system."""
    if not _DOMAIN_NAME.fullmatch(name):
        meant = name.lower()
        hint = f"; did you mean {quote(meant)}?" if _DOMAIN_NAME.fullmatch(meant) else ". Choose another name."
        raise PromptError(
            [
                f"domain {quote(name)}: not a domain name, expected 1 to 64 lower-case letters, digits, '-' or '_', "
                f"starting with a letter or digit{hint}"
            ]
        )


def folders_with_prompts(root: Path) -> list[str]:
    """The names of the folders under `root` that hold a train file, sorted; not all need be names of domains."""
    if not root.is_dir():
        raise PromptError([f"{root}: no such folder, expected one folder per domain. Create it, or choose another."])
    try:
        entries = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        return [name for name in entries if split_files(root / name, "train")]
    except OSError as error:
        raise PromptError([f"{root}: cannot be read ({error.strerror}). Check its permissions."]) from error


def list_domains(root: Path) -> list[str]:
    """The domains under `root`, sorted: the folders that hold a train file, each of them named like one."""
    found = folders_with_prompts(root)
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
    return bool(split_files(domain_folder(root, domain), split))


def load_prompts(root: Path, domain: str, split: str) -> list[Prompt]:
    """All prompts of one split of a domain, in the order of the file; at least one.

    Raises `PromptError` with one line for every bad line of the file, or when there is no file; ask `has_split`
    first where a split may be missing.
    """
    assert split in SPLITS, split
    folder = domain_folder(root, domain)
    found = split_files(folder, split)
    if not found:
        wanted = folder / f"{split}.jsonl"
        raise PromptError([f"{wanted}: no such file, nor {split}.txt. Write one prompt a line into it."])
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise PromptError([f"{folder}: both {names}, expected one file per split. Merge them, or remove one."])
    problems: list[str] = []
    system = read_system(folder / SYSTEM_FILE, problems)
    return _load(found[0], system, problems)


def load_file(path: Path) -> list[Prompt]:
    """All prompts of a `.jsonl` or `.txt` file outside any domain, in its order; at least one.

    Raises `PromptError` with one line for every bad line of the file, or when it cannot be read.
    """
    return _load(path, None, [])


def _load(path: Path, system: str | None, problems: list[str]) -> list[Prompt]:
    prompts = list(_read_prompts(path, system, problems))
    if not prompts and not problems:
        problems.append(f"{path}: no prompts, expected one a line. Write some, or remove the file.")
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
                refuse(f"{name_of(type(value))}, expected {name_of(expected)}. Convert it first")
            prompts.append(_to_prompt(parse_line(_dump(to_record(value))), None, where))
        except Refusal as refusal:
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
        raise Refusal(message) from error


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split in a domain's folder: one, none, or by mistake both kinds."""
    return [path for suffix in _SUFFIXES if os.path.lexists(path := folder / f"{split}{suffix}")]


def read_system(path: Path, problems: list[str]) -> str | None:
    """The system message in a domain's SYSTEM_FILE; None where there is none. Faults go to `problems`."""
    if not os.path.lexists(path):
        return None
    before = len(problems)
    text = "\n".join(line for _, line in read_lines(path, problems)).strip()
    if not text and len(problems) == before:
        problems.append(f"{path}: empty, expected the system message. Write it, or remove the file.")
    return text or None


def _read_prompts(path: Path, system: str | None, problems: list[str]) -> Iterator[Prompt]:
    for number, line in read_lines(path, problems):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if path.suffix == ".txt":
            yield _to_prompt({"prompt": line.strip()}, system, where)
            continue
        try:
            yield _to_prompt(parse_line(line), system, where)
        except Refusal as refusal:
            column = refusal.column or key_column(line, refusal.key)
            problems.append(f"{where}:{column}: {refusal.message}")


def _to_prompt(record: dict[str, Any], system: str | None, where: str) -> Prompt:
    for key in record:
        if key not in _KNOWN_KEYS:
            hint = did_you_mean(key, _KNOWN_KEYS) or f", expected some of {', '.join(_KNOWN_KEYS)}. Remove it."
            raise Refusal(f"{quote(key)}: unknown key{hint}", key=key)
    # Exporters write absent columns as null.
    given = {key: value for key, value in record.items() if value is not None}
    kinds = [kind for kind in _KEYS_BESIDE if kind in given]
    if not kinds:
        refuse("no prompt, expected 'messages', 'prompt' or 'text'. Add one of them")
    kind = kinds[0]
    for key in given:
        if key != kind and key not in _KEYS_BESIDE[kind]:
            beside = " or ".join(f"'{other}'" for other in _KEYS_BESIDE[kind]) or "nothing"
            refuse(f"'{key}' together with '{kind}', expected {beside} beside it. Remove one of the two", key)
    answer = given.get("answer")
    if answer is not None:
        _check_text(answer, "answer", "answer")
    reward = _to_reward(given.get("reward"))
    if kind == "text":
        _check_text(given["text"], "text", "text")
        return Prompt(where=where, text=given["text"], answer=answer, reward=reward)
    completion: dict[str, Any] | None = None
    if kind == "messages":
        messages = _to_messages(given["messages"], "messages")
        if messages[-1]["role"] == "assistant":
            completion = messages.pop()
            if not completion["content"].strip() and not completion.get("tool_calls"):
                refuse("messages: the last message is empty, expected the reply to score. Write it, or drop it", kind)
    else:
        messages = _to_prompt_messages(given["prompt"])
        if "completion" in given:
            _check_text(given["completion"], "completion", "completion")
            completion = {"role": "assistant", "content": given["completion"]}
    if not any(message["role"] == "user" for message in messages):
        refuse(f"{kind}: no user message, expected at least one before the reply. Add it", kind)
    if system is not None and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    return Prompt(
        where=where,
        messages=tuple(messages),
        tools=_to_tools(given.get("tools")),
        completion=completion,
        answer=answer,
        reward=reward,
    )


def _to_prompt_messages(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        messages = _to_messages(value, "prompt")
        if messages[-1]["role"] == "assistant":
            refuse("prompt: ends with an assistant message, expected user or tool. Name the list 'messages'", "prompt")
        return messages
    _check_text(value, "prompt", "prompt")
    return [{"role": "user", "content": value}]


def _to_messages(value: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        refuse(f'{key}: {name_of(type(value))}, expected a list of messages. Write [{{"role": "user", ...}}]', key)
    if not value:
        refuse(f"{key}: an empty list, expected at least one message. Add a user message", key)
    return [_to_message(message, f"{key}[{index}]", key) for index, message in enumerate(value)]


def _to_message(value: Any, where: str, key: str) -> dict[str, Any]:
    """The message as given, nulls left out, and with `content` "" where only tool calls are given."""
    if not isinstance(value, dict):
        refuse(f"{where}: {name_of(type(value))}, expected an object with 'role' and 'content'. Write it so", key)
    message = {name: part for name, part in value.items() if part is not None}
    roles = f"{', '.join(ROLES[:-1])} or {ROLES[-1]}"
    role = message.get("role")
    if role is None:
        refuse(f"{where}: no 'role'{_instead('role', message)}, expected {roles}. Add it", key)
    if not isinstance(role, str) or role not in ROLES:
        shown = quote(role) if isinstance(role, str) else name_of(type(role))
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise Refusal(f"{where}.role: {shown}, expected {roles}{hint or '. Change it.'}", key=key)
    calls = message.get("tool_calls")
    if calls is not None:
        if role != "assistant":
            refuse(f"{where}.tool_calls: in a {role} message, expected only in assistant messages. Remove it", key)
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            refuse(f"{where}.tool_calls: {name_of(type(calls))}, expected a list of objects. Write it so", key)
    if "content" not in message and calls:
        # Templates disagree about a missing content; all of them print "" as nothing.
        message["content"] = ""
    if "content" not in message:
        refuse(f"{where}: no 'content'{_instead('content', message)}, expected a string. Add it", key)
    content = message["content"]
    if not isinstance(content, str):
        refuse(f"{where}.content: {name_of(type(content))}, expected a string. Join its parts into one string", key)
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
        refuse(f"tools: {name_of(type(value))}, expected a list of objects. Write one object per tool", "tools")
    return tuple(value)


def _to_reward(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse(f"reward: {name_of(type(value))}, expected a number. Write one without quotes", "reward")
    if not 0 <= value <= MOST_REWARD:
        refuse(f"reward: {str(value)[:20]}, expected a number from 0 to {MOST_REWARD:g}, a weight. Scale it", "reward")
    return float(value)


def _check_text(value: Any, where: str, key: str) -> None:
    if not isinstance(value, str):
        refuse(f"{where}: {name_of(type(value))}, expected a string. Put it in quotes", key)
    if not value.strip():
        refuse(f"{where}: empty, expected text. Write it, or remove the line", key)
