"""What commands print fits 60 columns, whole, and no escape code goes where nothing understands it."""

from __future__ import annotations

import importlib
import io
import json
import os
import pty
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from test_cli import lay_out

from true_kd.__main__ import main
from true_kd.cli import COMMANDS

COLUMNS = 60
DUMB = {"TERM": "dumb"}
NO_COLOR = {"TERM": "xterm-256color", "NO_COLOR": "1"}
WHERE = {"a pipe": None, "NO_COLOR": NO_COLOR, "a dumb terminal": DUMB}
"""Where output goes, and the environment of a terminal there."""


@dataclass(frozen=True)
class Printed:
    """What a command printed, stdout and stderr together, and how it ended."""

    code: int
    text: str


def in_pipe(*arguments: str) -> Printed:
    """A command whose output is no terminal's."""
    stream = io.StringIO()
    return Printed(_call(stream, {}, arguments), stream.getvalue())


def on_terminal(environment: dict[str, str], *arguments: str) -> Printed:
    """A command on a terminal of its own."""
    far, near = pty.openpty()
    found: list[bytes] = []

    def read() -> None:
        while True:
            try:
                found.append(os.read(far, 2**16))
            except OSError:  # Linux's end of a terminal
                return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(near, "w", encoding="utf-8") as stream:
        assert stream.isatty()
        code = _call(stream, environment, arguments)
    reader.join()
    os.close(far)
    return Printed(code, b"".join(found).decode().replace("\r\n", "\n"))


def _call(stream: io.TextIOBase, environment: dict[str, str], arguments: tuple[str, ...]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
            patch.delenv(name, raising=False)
        for name, value in {"COLUMNS": str(COLUMNS), "TRANSFORMERS_VERBOSITY": "error", **environment}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["true-kd", *arguments])
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        with pytest.raises(SystemExit) as stop:
            main()
    return stop.value.code


def printed(where: str, *arguments: str) -> Printed:
    """A command's output at one of the places of `WHERE`."""
    environment = WHERE[where]
    return in_pipe(*arguments) if environment is None else on_terminal(environment, *arguments)


def commands() -> Iterator[tuple[str, ...]]:
    """Every command, and every command below it."""
    yield ()
    for name, (module, function, _) in COMMANDS.items():
        yield (name,)
        found = getattr(importlib.import_module(f"true_kd.cli.{module}"), function)
        if isinstance(found, typer.Typer):
            yield from ((name, each.name or each.callback.__name__) for each in found.registered_commands)


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_help_fits_and_leaves_nothing_out(command: tuple[str, ...]) -> None:
    shown = in_pipe(*command, "--help")
    assert shown.code == 0
    assert "\x1b" not in shown.text
    assert [line for line in shown.text.splitlines() if len(line) > COLUMNS] == []
    # "[ARGS]..." and "--set KEY..." stand for more to write; three dots behind a word or a comma are a text cut off.
    assert not re.search(r"[\w,]\.\.\.$|…", shown.text, flags=re.MULTILINE)
    assert on_terminal(DUMB, *command, "--help") == shown
    assert on_terminal(NO_COLOR, *command, "--help") == shown


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path, cli) -> Path:
    """A project of cats, which are finished, and a domain of a long name that is not."""
    folder = lay_out(tmp_path_factory.mktemp("run") / "project", teacher_folder, student_folder)
    (folder / "prompts" / "dogs").rename(folder / "prompts" / ("the-longest-of-names-" * 3)[:64])
    (folder / "configs" / "cats.yaml").write_text("seed: 0\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli("distill", "-d", "cats").code == 0
    return folder


FITTING = ("domains", "report", "config show", "config show -d cats", "cache", "plan -d cats --no-probe")
"""Whose lines are laid out for the terminal."""
FLOWING = (
    *("doctor", "config diff cats", "config diff cats adapters_kd/cats", "config schema", "init --domain new"),
    *("cache ls", "cache info", "cache verify", "generate -d cats hello -m 2", "compare hi -d cats -m 2"),
)
"""Whose lines are text and paths, which a terminal may wrap."""
REFUSED = (
    *("distill -d cat", "domains --config nowhere.yaml", "config show --set lora.rnk=2", "report nowhere", "nothing"),
)
ANIMATED = ("cache info", "cache verify", "compare hi -d cats -m 2")
"""Which show on stderr that they work, where there is a terminal that can."""


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("command", [*FITTING, *FLOWING, *REFUSED])
def test_no_escape_code_and_nothing_cut(
    command: str, where: str, distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(distilled)
    monkeypatch.setenv("TRUE_KD_CACHE", str(distilled / "cache"))
    arguments = command.split()
    if arguments[0] == "init":
        arguments.insert(1, str(tmp_path / "project"))
    if command == "cache info":
        arguments.append(json.loads(in_pipe("cache", "ls", "--json").text)[0]["key"])
    shown = printed(where, *arguments)
    assert shown.code == (2 if command in REFUSED else 0), shown.text
    assert shown.text.endswith("\n")
    if command in ANIMATED and where == "NO_COLOR":
        assert not re.search(r"\x1b\[[0-9;]*m", shown.text)
    else:
        assert "\x1b" not in shown.text
    assert "…" not in shown.text
    if command in FITTING and where != "a pipe":
        # A name of 64 letters or a path is wider by itself.
        wide = [line for line in shown.text.splitlines() if len(line) > COLUMNS]
        assert [line for line in wide if max(map(len, line.split())) < COLUMNS - 20] == []


def test_a_narrow_terminal_shows_every_row_and_every_figure(distilled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(distilled)
    found = json.loads(in_pipe("domains", "--json").text)["domains"]
    shown = on_terminal(NO_COLOR, "domains").text
    assert len(found) == 2
    for domain in found:
        assert domain["domain"] in shown
        assert str(domain["train"]) in shown


def test_a_narrow_show_is_the_same_config_as_a_wide_one(distilled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from true_kd.config import load_config

    monkeypatch.chdir(distilled)
    texts = {where: printed(where, "config", "show").text for where in WHERE}
    for where, text in texts.items():
        file = distilled / f"{where.replace(' ', '-')}.conf"
        file.write_text(text)
        assert load_config(file, None, []) == load_config(None, None, [])
        assert text.count("# ") == texts["a pipe"].count("# ")
