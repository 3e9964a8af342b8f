"""From plain data to a pydantic model, with every fault as one line that names its place, what it found and the fix.

Data is checked by the strict rules of JSON: a bool is not a number, text is not a number, 1 is a fine float, and text
is a fine path or enum. Unknown keys name the key that was probably meant, here or elsewhere in the same tree.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, TypeVar, get_args, get_origin

import pydantic
import pydantic_core

from true_kd.errors import ConfigError
from true_kd.suggest import did_you_mean, nearest, quote, redact
from true_kd.yaml_file import KeyPath, read_value

Model = TypeVar("Model", bound=pydantic.BaseModel)

_KEY = re.compile(r"[A-Za-z0-9_-]+")
_MOST_FAULTS = 100
"""Each takes its time to be put into words, and nobody reads more at once."""


def validate(
    model_cls: type[Model],
    data: Mapping[str, Any],
    where: Callable[[KeyPath], str],
    meant: Mapping[KeyPath, str] | None = None,
) -> Model:
    """The model that `data` describes.

    `where` gives the place of a key for messages: "configs/math.yaml:12", "--set" or "--temperature"; `meant` what to
    say of keys that are no keys but often written. Raises `ConfigError` with one line "place key.path: found,
    expected. Fix." per problem.
    """
    problems = [f"{where(path)} {_named(path)}{fault}" for path, fault in _not_plain(data, ())]
    if problems:
        raise ConfigError(problems)
    try:
        return model_cls.model_validate_json(pydantic_core.to_json(data), strict=True)
    except pydantic.ValidationError as error:
        faults = _sentences(model_cls, data, error, meant or {})
        raise ConfigError([f"{where(path)} {_named(path)}{fault}" for path, fault in faults]) from error


def parse_override(text: str, flag: str = "--set") -> tuple[KeyPath, Any]:
    """Key path and value of `--set lora.rank=16`; the value is read as in a YAML file, flat lists included."""
    name, equals, value = text.partition("=")
    keys = tuple(key.strip() for key in name.split("."))
    if not equals or not all(_KEY.fullmatch(key) for key in keys):
        raise ConfigError([f"{flag} {quote(text)}: expected key.path=value. Write it like lora.rank=16."])
    if not value.strip():
        raise ConfigError([f"{flag} {quote(text)}: no value, expected one after '='. Write null for none."])
    return keys, read_value(value, f"{flag} {quote(name.strip())}")


def dotted(path: KeyPath) -> str:
    """A path as people write it: "losses.terms[0].weight"; keys that are no plain words are quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            word = part if _KEY.fullmatch(part) and len(part) <= 60 else quote(part)
            text += f".{word}" if text else word
    return text


def _named(path: KeyPath) -> str:
    return f"{dotted(path)}: " if path else ""


def _not_plain(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Paths of values that no config file can hold. They reach this place from Python or a command line."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str):
                yield from _not_plain(item, (*path, key))
            else:
                yield path, f"{quote(str(key))} as a key, expected text. Put it in quotes."
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _not_plain(item, (*path, index))
    elif isinstance(value, int):
        if abs(value) >= 2**63:
            yield path, "an integer of more than 64 bits, expected a smaller one. Write a smaller number."
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield path, f"{value}, expected a finite number. Write a number."
    elif isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            yield path, f"{quote(value)}, expected text that UTF-8 can write. Write it as UTF-8."
        elif redact(value) != value:
            yield path, "holds a password or an access token, expected none in a config. Set HF_TOKEN instead."
    elif value is not None and not isinstance(value, (Enum, os.PathLike)):
        yield path, f"{type(value).__name__}, expected text, a number, a list or a mapping. Convert it first."


def _sentences(
    model_cls: type[pydantic.BaseModel],
    data: Mapping[str, Any],
    error: pydantic.ValidationError,
    meant: Mapping[KeyPath, str],
) -> list[tuple[KeyPath, str]]:
    """One fault per path: a value that fits no member of a union is reported once, with all that it could be."""
    found: dict[KeyPath, list[_Fault]] = {}
    for entry in error.errors(include_url=False)[:_MOST_FAULTS]:
        path = _real_path(data, entry["loc"], entry["type"])
        found.setdefault(path, []).append(_fault(model_cls, data, path, entry, meant))
    return [(path, _sentence(faults)) for path, faults in found.items()]


def _real_path(data: Any, loc: KeyPath, kind: str) -> KeyPath:
    """The path without the labels that pydantic adds for members of a union."""
    path: list[str | int] = []
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        known_key = isinstance(data, Mapping) and part in data
        known_item = isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data)
        if known_key or known_item:
            data = data[part]
        elif not (last and kind == "missing"):
            continue
        path.append(part)
    return tuple(path)


@dataclass(frozen=True)
class _Fault:
    """What is wrong with one value: parts that can be joined with "or", or one `whole` sentence."""

    found: str = ""
    expected: str = ""
    fix: str = ""
    whole: str = ""


_CHOOSE = "Choose one."


def _sentence(faults: list[_Fault]) -> str:
    for fault in faults:
        if fault.whole:
            return fault.whole
    expected = " or ".join(dict.fromkeys(fault.expected for fault in faults))
    fixes = {fault.fix for fault in faults if fault.fix}
    # What to write instead tells more than that there is a choice.
    fixes = fixes - {_CHOOSE} or fixes
    fix = fixes.pop() if len(fixes) == 1 else ""
    return f"{faults[0].found}, expected {expected}{fix if fix.startswith(';') else f'. {fix}'.rstrip()}"


_BOUNDS = {
    "greater_than_equal": ("ge", "a number at least"),
    "greater_than": ("gt", "a number above"),
    "less_than_equal": ("le", "a number at most"),
    "less_than": ("lt", "a number below"),
    "multiple_of": ("multiple_of", "a multiple of"),
}
_LENGTHS = {
    "too_short": ("min_length", "at least", "items"),
    "too_long": ("max_length", "at most", "items"),
    "string_too_short": ("min_length", "at least", "characters"),
    "string_too_long": ("max_length", "at most", "characters"),
}
_KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "string": "text",
    "path": "a path",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "frozen_set": "a list",
    "dict": "a mapping of keys",
    "model": "a mapping of keys",
    "none_required": "null",
}


def _fault(
    model_cls: type[pydantic.BaseModel],
    data: Mapping[str, Any],
    path: KeyPath,
    entry: Mapping[str, Any],
    meant: Mapping[KeyPath, str],
) -> _Fault:
    """Our words for one error of pydantic, by its type (https://docs.pydantic.dev/latest/errors/validation_errors)."""
    kind: str = entry["type"]
    value = entry["input"]
    context: Mapping[str, Any] = entry.get("ctx", {})
    found = _show(value)
    if kind == "extra_forbidden":
        return _Fault(whole=f"unknown key{_suggestion(model_cls, data, path, meant)}")
    if kind == "missing":
        return _Fault(whole="missing, expected a value. Add it.")
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return _Fault(found, f"{words} {_bound(context[key])}")
    if kind in _LENGTHS:
        key, words, unit = _LENGTHS[kind]
        return _Fault(found, f"{words} {context[key]} {unit}")
    if kind in ("literal_error", "enum"):
        hint = did_you_mean(value, re.findall(r"'([^']*)'", context["expected"])) if isinstance(value, str) else ""
        return _Fault(found, context["expected"], hint or _CHOOSE)
    if kind == "union_tag_invalid":
        key = context["discriminator"].strip("'")
        hint = did_you_mean(context["tag"], re.findall(r"'([^']*)'", context["expected_tags"]))
        end = hint or ". Choose one."
        return _Fault(whole=f"{key} is {quote(context['tag'])}, expected one of {context['expected_tags']}{end}")
    if kind == "union_tag_not_found":
        return _Fault(whole=f"no {context['discriminator']}, expected it to say which kind this is. Add it.")
    if kind == "string_pattern_mismatch":
        return _Fault(found, f"text of the form {context['pattern']}")
    if kind in ("value_error", "assertion_error"):
        return _Fault(whole=str(context["error"]))
    expected = _KINDS.get(kind) or _KINDS.get(kind.removesuffix("_type"))
    if expected is None:
        return _Fault(whole=f"{found}: {entry['msg']}.")
    return _Fault(found, expected, _fix(expected, value))


def _fix(expected: str, value: Any) -> str:
    numeric = expected in ("a number", "a whole number")
    if expected == "a whole number" and isinstance(value, float) and value.is_integer():
        return f"Write {int(value)}."
    if numeric and isinstance(value, str) and re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", value):
        return "Remove the quotes."
    if expected == "true or false" and isinstance(value, str) and value.lower() in ("true", "false"):
        return "Remove the quotes."
    if expected == "text" and isinstance(value, (int, float)):
        return "Put it in quotes."
    if expected == "a list" and isinstance(value, (str, int, float)):
        return f"Write [{_show(value)}]."
    return ""


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return quote(value)
    return "a mapping" if isinstance(value, Mapping) else f"a list of {len(value)}"


def _bound(value: Any) -> str:
    # pydantic hands bounds over as floats: "at most 10", not "at most 10.0".
    return str(int(value)) if isinstance(value, float) and value.is_integer() and value < 1e15 else str(value)


def _suggestion(
    model_cls: type[pydantic.BaseModel], data: Mapping[str, Any], path: KeyPath, meant: Mapping[KeyPath, str]
) -> str:
    """What was meant by the unknown key at the end of `path`: a sibling, else a key elsewhere in the tree."""
    if path in meant:
        return f"; {meant[path]}"
    key = str(path[-1])
    siblings = sorted({name for model in _models_at(model_cls, data, path[:-1]) for name in _fields(model)})
    hint = did_you_mean(key, siblings)
    if hint:
        return hint
    misnomer = nearest(key, (str(known[-1]) for known in meant if known[:-1] == path[:-1]))
    if misnomer is not None:
        return f"; {meant[*path[:-1], misnomer]}"
    elsewhere: dict[str, str] = {}
    for full in _key_paths(model_cls):
        elsewhere.setdefault(full.rpartition(".")[2], full)
    found = nearest(key, elsewhere)
    if found is not None:
        return f"; did you mean '{elsewhere[found]}'?"
    # Letters of other alphabets can look like those of a key that is expected.
    spelled = "" if key.isascii() else f" (in ASCII {ascii(key)[:60]})"
    return f"{spelled}, expected one of {', '.join(siblings)}. Remove it." if siblings else f"{spelled}. Remove it."


def _fields(model: type[pydantic.BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _models_at(model_cls: type[pydantic.BaseModel], data: Any, path: KeyPath) -> list[type[pydantic.BaseModel]]:
    """The models that may stand at `path`; of the kinds of a tagged union, those that `data` can be."""
    models = [model_cls]
    for part in path:
        data = data[part]
        if isinstance(part, str):
            models = [found for model in models if part in _fields(model) for found in _models_in(_fields(model)[part])]
        if isinstance(data, Mapping):
            models = [model for model in models if _may_be(model, data)]
    return models


def _may_be(model: type[pydantic.BaseModel], data: Mapping[str, Any]) -> bool:
    tags = {name: get_args(kind) for name, kind in _fields(model).items() if get_origin(kind) is Literal}
    return all(data[name] in choices for name, choices in tags.items() if isinstance(data.get(name), str))


def _models_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    """Every model class inside an annotation such as `tuple[A | B, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _key_paths(model: type[pydantic.BaseModel], before: str = "", above: tuple[type, ...] = ()) -> Iterator[str]:
    """All keys of the tree as "lora.rank", the shallow ones first; a model inside itself is not entered again."""
    for name in _fields(model):
        yield f"{before}{name}"
    for name, annotation in _fields(model).items():
        for nested in _models_in(annotation):
            if nested not in above:
                yield from _key_paths(nested, f"{before}{name}.", (*above, model, nested))
