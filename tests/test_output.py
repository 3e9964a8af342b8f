"""`--json`: each command with a result prints one JSON document on stdout, and everything else on stderr."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from test_pipeline import Place

from true_kd import cli as command_line
from true_kd.cli.output import say_json

PACKAGE = Path(command_line.__file__).parents[1]
SCHEMAS = PACKAGE / "schemas"
DISTILL = ("distill", "--config", "base.yaml", "-d", "a")

COMMANDS: dict[str, tuple[str, ...]] = {
    "distill": DISTILL,
    "capture": ("capture", "--config", "base.yaml", "-d", "a"),
    "sweep": ("sweep", "--config", "base.yaml", "-d", "a", "--alpha", "0.5,1", "--iters", "1"),
    "evaluate": ("evaluate", "--config", "base.yaml", "-d", "a"),
    "analyze": ("analyze", "--config", "base.yaml", "-d", "a"),
    "report": ("report", "out", "--no-html"),
    "status": ("status", "--out", "out"),
    "compare": ("compare", "hi", "--config", "base.yaml", "-d", "a", "--max-tokens", "2"),
    "generate": ("generate", "hi", "--config", "base.yaml", "-d", "a", "--max-tokens", "2"),
    "plan": ("plan", "--config", "base.yaml", "-d", "a", "--no-probe"),
    "validate": ("validate", "--config", "base.yaml", "-d", "a"),
    "domains": ("domains", "--config", "base.yaml"),
    "config show": ("config", "show", "--config", "base.yaml"),
    "init": ("init", "new", "--domain", "birds"),
    "export": ("export", "--config", "base.yaml", "-d", "a", "--to", "mlx"),
    "push": ("push", "me/cats", "--config", "base.yaml", "-d", "a", "--dry-run", "--base-model", "them/model"),
    "doctor": ("doctor",),
    "cache ls": ("cache", "ls", "--cache", "cache"),
    "cache info": ("cache", "info", "KEY", "--cache", "cache"),
    "cache verify": ("cache", "verify", "--cache", "cache"),
    "cache export": ("cache", "export", "KEY", "exported", "--cache", "cache"),
    "cache import": ("cache", "import", "lent", "--cache", "elsewhere"),
    "cache prune": ("cache", "prune", "KEY", "--cache", "cache"),
}
"""A call of each command, ready but for --json."""
OTHERS = {"demo", "chat", "serve"}
"""`demo` is distill with a config of its own; of the others nothing is left to read."""
SCHEMA_OF = {"distill": "kd_summary", **{name: name for name in ("status", "plan", "validate", "doctor")}}
"""Documents whose schema is shipped."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path, cli) -> Path:
    """A folder in which `a` is distilled, whose prompts are not ASCII, and one of whose caches is lent."""
    root = tmp_path_factory.mktemp("scripts")
    place = Place(root, teacher_folder, student_folder)
    place.config |= {"prompts": "prompts", "out": "out", "cache": "cache"}
    place.write("a", [f"grüß die Katze {count} \x9b31m" for count in range(5)])
    (root / "base.yaml").write_text(json.dumps(place.config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert cli(*DISTILL).code == 0
        [key] = [path.name for path in (root / "cache").iterdir() if path.is_dir()]
        assert cli("cache", "export", key, "lent", "--cache", "cache").code == 0
    return root


@pytest.fixture
def called(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]) -> Callable[..., Any]:
    """Calls the command line in a copy of that folder; KEY stands for the cache there."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    [key] = [path.name for path in Path("cache").iterdir() if path.is_dir()]

    def call(*arguments: str) -> Any:
        return cli(*(key if argument == "KEY" else argument for argument in arguments))

    return call


def test_every_command_is_looked_at() -> None:
    every = {name.partition(" ")[0] for name in COMMANDS} | OTHERS
    assert every >= set(command_line.COMMANDS) - elsewhere()


def elsewhere() -> set[str]:
    """Commands whose JSON has tests beside those of what they do."""
    return {name for name in command_line.COMMANDS if (Path(__file__).parent / f"test_{name}.py").exists()}


@pytest.mark.parametrize("name", COMMANDS)
def test_stdout_is_one_document_of_ascii(name: str, called: Callable[..., Any]) -> None:
    ended = called(*COMMANDS[name], "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found is not None
    assert ended.out.isascii()
    assert "\x1b" not in ended.out + ended.err
    if name in SCHEMA_OF:
        schema = (SCHEMAS / SCHEMA_OF[name]).with_suffix(".schema.json")
        jsonschema.validate(found, json.loads(schema.read_text()))


def test_what_distill_prints_is_the_summary_also_where_a_domain_failed(called: Callable[..., Any]) -> None:
    Path("prompts/b").mkdir()
    Path("prompts/b/train.jsonl").write_text("{")
    ended = called(*DISTILL, "-d", "b", "--json")
    assert ended.code == 2
    assert json.loads(ended.out) == json.loads(Path("out/kd_summary.json").read_text())
    assert set(json.loads(ended.out)["failed"]) == {"b"}
    assert "b: failed. " in ended.err


def test_capture_counts_what_is_in_the_cache(called: Callable[..., Any]) -> None:
    found = json.loads(called(*COMMANDS["capture"], "--json").out)
    assert set(found) == {"domains", "failed", "seconds"}
    assert set(found["domains"]["a"]) == {"domain", "replies", "tokens", "cache_bytes", "bytes_per_token", "folder"}
    assert found["domains"]["a"]["replies"] == 7


@pytest.mark.parametrize("name", sorted({"distill", "capture", "sweep", "evaluate", "analyze", "report", "cache info"}))
def test_a_mistake_is_one_line_on_stderr_and_nothing_on_stdout(name: str, called: Callable[..., Any]) -> None:
    wrong = {"a": "no-such-domain", "out": "nowhere", "KEY": "ffff"}
    ended = called(*(wrong.get(argument, argument) for argument in COMMANDS[name]), "--json")
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (2, "", 1), ended


def test_prune_tells_what_would_go_and_what_went(called: Callable[..., Any]) -> None:
    told = json.loads(called(*COMMANDS["cache prune"], "--json").out)
    assert (told["removed"], len(told["caches"])) == (False, 1)
    gone = json.loads(called(*COMMANDS["cache prune"], "--yes", "--json").out)
    assert {**gone, "removed": False} == told
    assert json.loads(called("cache", "ls", "--cache", "cache", "--json").out) == []


def test_a_document_is_the_same_in_any_locale_and_has_no_power_over_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    value = {"text": "grüß \x1b[31m \x9b \ud800 \u2028 猫"}
    say_json(value)
    out = capsys.readouterr().out
    assert out.isascii()
    assert all(letter.isprintable() or letter == "\n" for letter in out)
    assert json.loads(out) == value


def test_no_number_is_written_that_json_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        say_json({"loss": float("nan")})
    assert capsys.readouterr().out == ""


def test_the_page_for_scripts_names_every_command_and_schema() -> None:
    page = (PACKAGE / "docs" / "scripting.md").read_text(encoding="utf-8")
    for name in (*COMMANDS, "demo"):
        assert f"`{name}`" in page, name
    for path in SCHEMAS.iterdir():
        assert f"(../schemas/{path.name})" in page or path.name in COMMANDS, path.name
