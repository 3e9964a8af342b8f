"""Writes what follows from the classes in the code: the JSON schemas of what scripts read and of a config, the page of
every field of kd_summary.json, and the table of every key of a config.

python scripts/write_schema.py   # tests/test_summary.py and tests/test_config_schema.py compare them with the classes
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

import true_kd
from true_kd import config_schema, layout
from true_kd.doctor import Diagnosis
from true_kd.planning import Forecast
from true_kd.preflight import Report
from true_kd.reporting import line_schema, schema
from true_kd.status import status_schema

PACKAGE = Path(true_kd.__file__).parent
SCHEMA = PACKAGE / "schemas" / "kd_summary.schema.json"
LINES = PACKAGE / "schemas" / "metrics_line.schema.json"
STATUS = PACKAGE / "schemas" / "status.schema.json"
PAGE = PACKAGE / "docs" / "kd_summary.md"
CONFIG_SCHEMA = PACKAGE / "schemas" / layout.CONFIG_SCHEMA
PRINTED = {"plan": Forecast, "validate": Report, "doctor": Diagnosis}
"""What commands print with --json, by their names."""
CONFIG_PAGE = PACKAGE / "docs" / "configs.md"
"""Written by hand down to `KEYS`, and made from the schema below it."""
KEYS = "## Every key\n"

_OPENING = """# kd_summary.json, field by field

`kd_summary.json` lies in the output folder of a run, beside the folders of its domains, and is written anew at the end
of each run. [kd_summary.schema.json](../schemas/kd_summary.schema.json) is its JSON schema. Fields are added in any
version; one that changes its meaning or goes raises `format`. A number that could not be measured is null. What the
measures mean is told in [proof.md](proof.md). This page is made from the records in the code by
`scripts/write_schema.py`.
"""


def page(found: Mapping[str, Any]) -> str:
    """The page: a table for the file, and one for each record in it, in the order in which they are met."""
    parts = [_OPENING, _table("The file", found)]
    todo, done = _names(found), set()
    while todo:
        name = todo.pop(0)
        if name not in done:
            done.add(name)
            part = found["$defs"][name]
            parts.append(_table(name, part))
            todo += _names(part)
    return "\n".join(parts)


def _table(title: str, part: Mapping[str, Any]) -> str:
    meaning = " ".join(part.get("description", "").split())
    lines = [f"## {title}", "", meaning, "", "| field | type | |", "|---|---|---|"]
    for name, field in part["properties"].items():
        meaning = " ".join(field.get("description", "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {_kind(field)} | {meaning} |")
    return "\n".join([*lines, ""])


def _kind(field: Mapping[str, Any]) -> str:
    """The type of a field in words."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in field:
        return " or ".join(_kind(each) for each in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field["type"] == "array":
        return f"list of {_kind(field['items'])}"
    if field["type"] == "object" and "additionalProperties" in field:
        return f"object, by name: {_kind(field['additionalProperties'])}"
    return {"string": "text", "integer": "whole number"}.get(field["type"], field["type"])


def _names(part: Mapping[str, Any]) -> list[str]:
    """The records that a record refers to."""
    found = []
    for key, value in part.items():
        if key == "$ref":
            found.append(value.rpartition("/")[2])
        elif key == "$defs":
            continue
        elif isinstance(value, Mapping):
            found += _names(value)
        elif isinstance(value, list):
            found += [name for each in value if isinstance(each, Mapping) for name in _names(each)]
    return found


def config_keys(found: Mapping[str, Any]) -> str:
    """A table for the keys of a config that stand alone, and one for each group of them."""
    alone = {name: field for name, field in found["properties"].items() if "$ref" not in field}
    model = found["$defs"]["ModelOptions"]
    parts = [_key_table("", "Of a whole run", alone), _key_table("teacher.", model["description"], model["properties"])]
    for name, field in found["properties"].items():
        if "$ref" in field:
            group = found["$defs"][field["$ref"].rpartition("/")[2]]
            parts.append(_key_table(f"{name}.", group["description"], group["properties"]))
    return "\n".join(parts)


def _key_table(before: str, meaning: str, fields: Mapping[str, Any]) -> str:
    lines = [f"{meaning.rstrip('.')}.", "", "| key | values | default | |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = f"`{json.dumps(field['default'])}`" if "default" in field else ""
        told = field["description"].replace("|", "\\|")
        lines.append(f"| `{before}{name}` | {_values(field)} | {default} | {told} |")
    return "\n".join([*lines, ""])


def _values(field: Mapping[str, Any]) -> str:
    """What a key may hold, in words."""
    if "anyOf" in field:
        return " or ".join("keys of a model" if "$ref" in each else _values(each) for each in field["anyOf"])
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field or field["type"] == "array":
        return _kind(field)
    bounds = [f"{words} {field[name]:g}" for name, words in _BOUNDS.items() if name in field]
    return " ".join([{"boolean": "true or false", "null": "null"}.get(field["type"], _kind(field)), *bounds])


_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}


def texts() -> dict[Path, str]:
    """The files and what is to be in them."""
    found, config = schema(), config_schema.schema()
    schemas = {SCHEMA: found, LINES: line_schema(), STATUS: status_schema(), CONFIG_SCHEMA: config}
    for command, kind in PRINTED.items():
        path = PACKAGE / "schemas" / f"{command}.schema.json"
        schemas[path] = TypeAdapter(kind).json_schema(mode="serialization")
    by_hand = CONFIG_PAGE.read_text(encoding="utf-8").partition(KEYS)[0]
    return {path: json.dumps(each, indent=2, ensure_ascii=False) + "\n" for path, each in schemas.items()} | {
        PAGE: page(found),
        CONFIG_PAGE: f"{by_hand}{KEYS}\n{config_keys(config)}",
    }


if __name__ == "__main__":
    for path, text in texts().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
