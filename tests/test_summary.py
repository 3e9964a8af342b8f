"""The schemas that are shipped, and the page on kd_summary.json, are those of the records; and what is written fits."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from test_pipeline import Place

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import write_schema  # noqa: E402

SCHEMA = json.loads(write_schema.SCHEMA.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", write_schema.texts(), ids=lambda path: path.name)
def test_the_shipped_file_is_what_the_records_give(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == write_schema.texts()[path], "run scripts/write_schema.py"


def records(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "Summary", found
    yield from found["$defs"].items()


@pytest.mark.parametrize("path", [write_schema.SCHEMA, write_schema.LINES, write_schema.STATUS], ids=lambda at: at.name)
def test_every_record_and_every_field_says_what_it_means(path: Path) -> None:
    schema = json.loads(path.read_text(encoding="utf-8"))
    silent = [name for name, record in records(schema) if not record.get("description")]
    silent += [
        f"{name}.{field}"
        for name, record in records(schema)
        for field, facts in record.get("properties", {}).items()
        if not facts.get("description")
    ]
    assert silent == []


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> dict[str, Any]:
    """Of a run of two domains, one with answers and a control, and one that fails."""
    place = Place(tmp_path_factory.mktemp("schemas"), teacher_folder, student_folder, control="sft")
    place.write("a", valid=[{"prompt": f"where is cat {number}", "answer": "here"} for number in range(6)])
    place.write("b")
    place.write("bad", valid=[{"prompt": "x " * 3000}])
    run = place.run("a", "b", "bad")
    assert set(run.results) == {"a", "b"}
    return run.summary


def test_what_a_run_writes_fits_the_schema(summary: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(summary, closed(SCHEMA))
    assert set(summary["failed"]) == {"bad"}


def closed(found: Any) -> Any:
    """The schema with unknown fields refused: what is written and what is told are the same fields."""
    if isinstance(found, dict):
        inside = {name: closed(part) for name, part in found.items()}
        return {**inside, "additionalProperties": False} if "properties" in inside else inside
    return [closed(part) for part in found] if isinstance(found, list) else found


def test_a_field_of_another_kind_does_not_fit(summary: dict[str, Any]) -> None:
    summary = json.loads(json.dumps(summary))
    summary["domains"]["a"]["proof"]["student"]["kl"]["value"] = "small"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(summary, SCHEMA)
