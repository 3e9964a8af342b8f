"""The JSON schema of a config says what `load_config` says: of every shipped file, and of values made for every key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from true_kd.config import load_config
from true_kd.config_schema import schema
from true_kd.errors import ConfigError
from true_kd.layout import CONFIG_SCHEMA
from true_kd.yaml_file import read_yaml

ROOT = Path(__file__).parents[1]
SHIPPED = [
    *sorted((ROOT / "configs").glob("*.yaml")),
    *sorted((ROOT / "true_kd" / "pocket" / "configs").glob("*.yaml")),
    ROOT / "true_kd" / "new_domain" / "config.yaml",
]
SCHEMA = schema()
CHECK = jsonschema.Draft202012Validator(SCHEMA)


def keys() -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The path of every key of the schema, and what it says of it."""
    for name, field in SCHEMA["properties"].items():
        yield (name,), field
        for part in (field, *field.get("anyOf", ())):
            if "$ref" in part:
                group = SCHEMA["$defs"][part["$ref"].rpartition("/")[2]]
                yield from (((name, below), facts) for below, facts in group["properties"].items())


KEYS = dict(keys())


def parts(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The kinds that a value may be of."""
    return [*facts.get("anyOf", [facts])]


def candidates(facts: Mapping[str, Any]) -> Iterator[Any]:
    """Values at and beside every bound, every choice and what looks like one, and one of every other kind."""
    # A float without a fraction is left out: for a whole number a schema cannot refuse it.
    yield from (None, True, False, 1, 2, 0, -1, -2, 0.25, -0.75, 1.5, 2.0**40 + 0.5, 123456789, "", "x", "1", "all")
    yield from ([], ["x"], [1], ["x", "y"], [["x"]], {}, {"x": 1}, {"model": "a/b"}, {"model": ""}, {"model": None})
    for part in parts(facts):
        for bound in (part[name] for name in part if "imum" in name):
            step = 1 if part["type"] == "integer" else max(abs(bound), 1.0) / 1000
            yield from (bound - step, bound, bound + step)
        for choice in part.get("enum", ()):
            yield choice
            if isinstance(choice, str):
                yield from (choice.upper(), f"{choice} ", choice[:-1])
            else:
                yield from (choice + 0.5, int(choice), str(choice))


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A config of one key."""
    for key in reversed(path):
        value = {key: value}
    return value


def loads(data: Any, file: Path) -> bool:
    """Whether a config is accepted."""
    file.write_text(json.dumps(data))
    try:
        load_config(file, None, [])
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("path", KEYS, ids=".".join)
def test_schema_and_reader_accept_and_refuse_the_same_values(path: tuple[str, ...], tmp_path: Path) -> None:
    facts = KEYS[path]
    whole = all(part.get("type") in ("integer", "null") for part in parts(facts))
    seen = {True: 0, False: 0}
    for value in candidates(facts):
        if whole and isinstance(value, float) and value.is_integer():
            continue
        data = nested(path, value)
        accepted = CHECK.is_valid(data)
        assert loads(data, tmp_path / "base.yaml") == accepted, value
        seen[accepted] += 1
    assert min(seen.values()) > 0


@pytest.mark.parametrize("path", [path for path in KEYS if len(path) == 2], ids=".".join)
def test_an_unknown_key_in_a_group_is_refused_by_both(path: tuple[str, ...], tmp_path: Path) -> None:
    data = nested((path[0], f"{path[1]}x"), 1)
    assert not CHECK.is_valid(data)
    assert not loads(data, tmp_path / "base.yaml")


def test_an_unknown_key_at_the_top_is_refused_by_both(tmp_path: Path) -> None:
    for data in ({"temperature": 2.0}, {"teachr": "a/b"}, {"": 1}):
        assert not CHECK.is_valid(data)
        assert not loads(data, tmp_path / "base.yaml")


def test_the_defaults_are_those_of_the_config_and_fit_their_own_schema(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("")
    config = load_config(tmp_path / "base.yaml", None, [])
    plain = config.model_dump(mode="json")
    CHECK.validate(plain)
    for path, facts in KEYS.items():
        if "default" in facts:
            value: Any = plain
            for key in path:
                value = value[key]
            assert facts["default"] == (value["model"] if path in (("teacher",), ("student",)) else value), path


def test_every_key_says_what_it_means() -> None:
    assert [path for path, facts in KEYS.items() if not facts.get("description") and "$ref" not in facts] == []


def test_it_is_a_schema() -> None:
    CHECK.check_schema(SCHEMA)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.parent.name}/{file.name}")
def test_every_shipped_config_fits(file: Path) -> None:
    CHECK.validate(read_yaml(file).data)


def modeline(file: Path) -> str:
    """The place of the schema that a config points editors at."""
    first = file.read_text(encoding="utf-8").splitlines()[0]
    found = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert found, f"{file}: {first}"
    return found[1]


@pytest.mark.parametrize("file", SHIPPED[:-1], ids=lambda file: f"{file.parent.parent.name}/{file.name}")
def test_every_shipped_config_leads_an_editor_to_the_schema_beside_it(file: Path) -> None:
    place = file.parent / modeline(file)
    assert json.loads(place.read_text(encoding="utf-8")) == json.loads(json.dumps(SCHEMA))


@pytest.mark.parametrize("arguments", [(), ("--domain", "sailing")], ids=["all", "one domain"])
def test_after_init_every_config_leads_to_the_schema(
    arguments: tuple[str, ...], cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("init", *arguments).code == 0
    files = sorted(Path("configs").glob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        assert modeline(file) == CONFIG_SCHEMA
        place = file.parent / CONFIG_SCHEMA
        assert not place.is_symlink()
        assert json.loads(place.read_text(encoding="utf-8")) == json.loads(json.dumps(SCHEMA))
    assert load_config(None, None, []).seed == 0


def test_config_schema_prints_it(cli) -> None:
    ended = cli("config", "schema")
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(ended.out) == json.loads(json.dumps(SCHEMA))


def test_every_example_of_the_page_is_a_config(tmp_path: Path) -> None:
    page = (ROOT / "true_kd" / "docs" / "configs.md").read_text(encoding="utf-8")
    examples = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert examples
    for number, example in enumerate(examples):
        file = tmp_path / f"example{number}.yaml"
        file.write_text(example)
        load_config(file, None, [])
        CHECK.validate(read_yaml(file).data)
