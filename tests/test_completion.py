"""Completion as shells ask for it: by environment variables, and by a TAB in a real bash."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import Ended
from test_cli import refused

from true_kd.cli import COMMANDS
from true_kd.cli.completion import VARIABLE, asks_for_domain, words_before
from true_kd.losses.divergences import DIVERGENCES

SIX = ["action", "debug", "memory", "reflection", "task", "thinking"]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a project of cats, cows and dogs, of which cats has an adapter."""
    folder = tmp_path / "project"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "base.yaml").write_text("prompts: questions\nout: answers\n")
    for domain in ("cats", "cows", "dogs"):
        (folder / "questions" / domain).mkdir(parents=True)
        (folder / "questions" / domain / "train.txt").write_text("x\n")
    (folder / "answers" / "cats").mkdir(parents=True)
    for name in ("adapters.safetensors", "adapter_config.json"):
        (folder / "answers" / "cats" / name).touch()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def ask(cli, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], Ended]:
    """Runs the program as a shell does it for completions, but in this process."""

    def call(environment: dict[str, str]) -> Ended:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            return cli()

    return call


def apart(environment: dict[str, str], *before: str) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own, after some code."""
    code = f"{''.join(before)}from true_kd.__main__ import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def bash(*words: str) -> dict[str, str]:
    """How bash asks for the last of some words, joined as the script of typer does it."""
    return {VARIABLE: "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}


def zsh(*words: str) -> dict[str, str]:
    """How zsh asks."""
    return {VARIABLE: "complete_zsh", "_TYPER_COMPLETE_ARGS": " ".join(words)}


def fish(*words: str) -> dict[str, str]:
    """How fish asks."""
    action = {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    return {VARIABLE: "complete_fish", "_TYPER_COMPLETE_ARGS": " ".join(words), **action}


@pytest.fixture
def offered(ask) -> Callable[..., list[str]]:
    """What bash is offered for the last of some words."""

    def call(*words: str) -> list[str]:
        ended = ask(bash("true-kd", *words))
        assert ended.err == ""
        return ended.out.split()

    return call


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["distill", "--domain", ""], ["cats", "cows", "dogs"]),
        (["distill", "--all", "-d", "cats", "-d", "c"], ["cats", "cows"]),
        (["analyze", "--temperature", "2", "-d", "do"], ["dogs"]),
        (["compare", "-d", ""], ["cats"]),
        (["generate", "hello", "--domain", "c"], ["cats"]),
        (["evaluate", "-d", "d"], []),
        (["report", "-d", "c"], ["cats"]),
        (["config", "show", "-d", "do"], ["dogs"]),
        (["config", "diff", "co"], ["cows"]),
        (["distill", "--domain", "=", "do"], ["dogs"]),
        (["distill", "--config", "pocket:configs/base.yaml", "-d", ""], SIX),
        (["distill", "--prompts", "pocket:prompts", "-d", "t"], ["task", "thinking"]),
        (["chat", "--out", "nowhere", "-d", ""], []),
        (["init", "--domain", "c"], []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_domain_names_are_offered_where_one_can_stand(words: list[str], expected: list[str], offered) -> None:
    assert offered(*words) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["distill", "--divergence", ""], list(DIVERGENCES)),
        (["sweep", "--divergence", "rev"], ["reverse_kl"]),
        (["distill", "--control", ""], ["none", "sft"]),
        (["export", "--to", "g"], ["gguf"]),
        (["distill", "--vocab-strategy", ""], ["auto", "match", "align", "uld", "truncate", "project"]),
        (["distill", "--vocab"], ["--vocab-strategy"]),
        (["cache", "ver"], ["verify"]),
        (["config", ""], ["show", "diff", "schema"]),
        (["con"], ["config"]),
        ([""], list(COMMANDS)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_commands_flags_and_values_are_offered(words: list[str], expected: list[str], offered) -> None:
    assert offered(*words) == expected


def test_zsh_and_fish_are_offered_the_same(ask) -> None:
    words = ("true-kd", "distill", "-d", "c")
    assert ask(zsh(*words)).out == '_arguments \'*: :(("cats"\n"cows"))\'\n'
    assert ask(fish(*words)).out == "cats\ncows\n"
    assert ask(zsh("true-kd", "distill", "--control", "")).out == '_arguments \'*: :(("none"\n"sft"))\'\n'
    overview = ask(zsh("true-kd", "")).out
    assert all(f'"{name}":"' in overview for name in COMMANDS)


WRONG = {
    "a config that cannot be read": ("configs/base.yaml", "prompts: [\n"),
    "a config of no mapping": ("configs/base.yaml", "- x\n"),
    "prompts that are no text": ("configs/base.yaml", "prompts: 3\n"),
    "prompts that are not there": ("configs/base.yaml", "prompts: nowhere\n"),
    "no path": ("configs/base.yaml", 'prompts: "a\\0b"\n'),
}


@pytest.mark.parametrize(("file", "text"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("shell", [bash, zsh, fish])
def test_whatever_is_wrong_nothing_is_said(shell, file: str, text: str, ask) -> None:
    Path(file).write_text(text)
    ended = ask(shell("true-kd", "distill", "-d", "c"))
    assert ended.err == ""
    assert "cats" not in ended.out


@pytest.mark.parametrize("words", [["nothing", "-d", "c"], ["distill", "-d", "'"], ["distill", "--domain"], []])
def test_a_line_that_means_nothing_is_answered_with_nothing_wrong(words: list[str], ask) -> None:
    ended = ask(bash("true-kd", *words))
    assert ended.err == ""
    assert "Traceback" not in ended.out


def test_without_a_backend_domains_are_offered_and_nothing_is_said(tmp_path: Path) -> None:
    missing = "import sys; sys.modules['mlx'] = sys.modules['mlx.core'] = None; "
    assert apart(bash("true-kd", "distill", "-d", "co"), missing).stdout == "cows\n"
    ended = apart(bash("true-kd", "distill", "--control", ""), missing)
    assert (ended.stdout.strip(), ended.stderr) == ("", "")


def test_a_domain_is_found_without_mlx_and_without_its_command() -> None:
    loaded = "import atexit, sys; atexit.register(lambda: print(*sorted(sys.modules), sep='\\n')); "
    for shell in (bash, zsh, fish):
        found = apart(shell("true-kd", "compare", "-d", "c"), loaded).stdout.split()
        heavy = {"mlx", "mlx_lm", "numpy", "transformers", "true_kd.config", "true_kd.cli.talking"}
        assert heavy & {*found} == set()
        assert "true_kd.cli.completion" in found


def test_the_words_before_the_cursor_are_known_of_every_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(environment: dict[str, str]) -> list[str]:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            return words_before()

    for shell in (bash, zsh, fish):
        assert found(shell("true-kd", "distill", "-d", "c")) == ["distill", "-d"]
        assert found(shell("true-kd", "distill", "-d", "")) == ["distill", "-d"]
        assert found(shell("true-kd", "")) == []
    assert words_before() == []
    assert found({VARIABLE: "complete_bash", "COMP_WORDS": "true-kd", "COMP_CWORD": "x"}) == []
    assert not asks_for_domain([])
    assert not asks_for_domain(["-d"])


# The scripts.


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_shown_and_installed(
    shell: str, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    shown = cli("--show-completion", shell)
    assert (shown.code, shown.err) == (0, "")
    assert VARIABLE in shown.out
    assert f"complete_{shell}" in shown.out
    assert not list(home.iterdir())
    ended = cli("--install-completion", shell)
    assert (ended.code, ended.err) == (0, "")
    installed = Path(re.search(r"installed in (\S+)\. ", ended.out)[1])
    assert installed.is_relative_to(home)
    assert installed.read_text().strip() == shown.out.strip()


@pytest.mark.parametrize("flag", ["--show-completion", "--install-completion"])
def test_another_shell_is_refused(flag: str, cli) -> None:
    assert refused(cli(flag, "tcsh")) == f"{flag} 'tcsh': expected bash, zsh or fish. Choose one."


def typed(lines: Sequence[tuple[str, str]], folder: Path) -> list[str]:
    """What a line of an interactive bash looks like after TAB."""
    program = folder / "true-kd"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m true_kd "$@"\n')
    program.chmod(0o755)
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(PS1="$ ", PATH=f"{folder}:{os.environ['PATH']}", TERM="dumb", INPUTRC=os.devnull)
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])

    def until(sign: str) -> str:
        text, end = "", time.monotonic() + 30
        while not re.search(sign, text):
            assert time.monotonic() < end, text
            if select.select([terminal], [], [], 0.1)[0]:
                text += os.read(terminal, 4096).decode()
        return text

    try:
        os.write(terminal, b'eval "$(true-kd --show-completion bash)"; echo rea""dy\n')
        until("\nready")
        found = []
        for line, sign in lines:
            os.write(terminal, f"{line}\t".encode())
            found.append(until(sign))
            os.write(terminal, b"\x15")
        return found
    finally:
        os.write(terminal, b"\x15\nexit\n")
        os.close(terminal)
        os.waitpid(child, 0)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs a bash")
def test_a_tab_in_a_real_bash_completes_a_domain(project: Path, tmp_path: Path) -> None:
    lines = [("true-kd distill -d do", "distill -d dogs "), ("true-kd distill --domain=do", "--domain=dogs ")]
    assert len(typed(lines, tmp_path)) == 2
