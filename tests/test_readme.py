"""The README holds: its commands run, its Python runs, and what it shows of the pocket models is what they do."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("shell")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def generate_commands() -> list[list[str]]:
    return [words for words in commands() if words[0] == "mlx_lm.generate" and "true_kd/pocket/student" in words]


def promised_replies() -> list[str]:
    return [line.removeprefix("#").strip() for line in "\n".join(blocks("shell")).splitlines() if line.startswith("# ")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's own adapter of the domain `reflection`, in a folder where `true_kd/` is as in a checkout."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "true_kd").symlink_to(ROOT / "true_kd")
    distil = [sys.executable, "-m", "true_kd", "distill", "--domain", "reflection"]
    ended = subprocess.run(
        [*distil, "--config", "pocket:configs/base.yaml"],
        cwd=folder,
        env={**os.environ, "TRUE_KD_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return folder


def test_every_make_target_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [words[1] for words in commands() if words[0] == "make"]
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


NEEDS_AN_ADAPTER = {"evaluate", "compare", "chat", "generate", "report", "export", "push"}
NEEDS_NOTHING = {"doctor", "validate", "status"}


def true_kd_commands() -> list[list[str]]:
    return [words[1:] for words in commands() if words[0] == "true-kd"]


def test_every_true_kd_command_of_the_readme_gets_as_far_as_its_models(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    # Offline the default models cannot be had: config, flags and prompts are right when that is what is missing.
    monkeypatch.chdir(ROOT)
    mine = [words for words in true_kd_commands() if words[0] not in NEEDS_AN_ADAPTER | NEEDS_NOTHING]
    assert {words[0] for words in mine} <= {"distill", "capture", "cache", "analyze", "sweep", "plan"}
    assert len(mine) >= 3
    for words in mine:
        ended = cli(*words)
        assert ended.code == 2
        assert "not in the local hub cache" in ended.err


@pytest.mark.parametrize("words", [words for words in true_kd_commands() if words[0] in NEEDS_NOTHING], ids=" ".join)
def test_every_command_of_the_readme_that_looks_around_works_in_a_checkout(
    words: list[str], cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    ended = cli(*words)
    assert ended.code == 0, ended
    assert ended.out


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for words in true_kd_commands() if words[0] in NEEDS_AN_ADAPTER], ids=" ".join)
def test_every_command_of_the_readme_for_an_adapter_works_on_one(
    words: list[str], cli, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same commands on the demo's adapter: its domain and folder are others.
    monkeypatch.chdir(demo)
    monkeypatch.setenv("TRUE_KD_CACHE", str(demo / "cache"))
    monkeypatch.setattr("sys.stdin", io.StringIO("The stew that Tom made was cold. What to change?\nq\n"))
    out = [] if words[0] == "report" else ["--out", "adapters_kd/pocket"]
    place = ["adapters_kd/pocket"] if words[0] == "report" else []
    ended = cli(*("reflection" if word == "thinking" else word for word in words), *place, *out)
    assert ended.code == 0, ended.err
    assert ended.out


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    [source] = blocks("python")
    ended = subprocess.run(
        [sys.executable, "-c", source.replace("iters=100", "iters=5")],
        cwd=tmp_path,
        env={**os.environ, "TRUE_KD_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.rstrip().endswith("adapters_kd/greetings")


@pytest.mark.slow
def test_the_demo_lifts_the_student_as_its_table_says(demo: Path) -> None:
    from true_kd.reporting import read_result

    result = read_result(demo / "adapters_kd/pocket/reflection")
    proof = result.proof
    assert proof.teacher.exact_match.value >= 0.9
    assert proof.student.exact_match.value < 0.4
    # The table says 23 to 92 %; another BLAS rounds otherwise, which moves a task or two.
    assert proof.adapted.exact_match.value > proof.student.exact_match.value + 0.4
    assert proof.gap_closed.kl.low > 0.7
    assert proof.verdict.outcome == "helped"
    assert proof.verdict.against_control == "ahead"


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1], ids=["student", "with its adapter"])
def test_mlx_lm_generate_says_what_the_readme_shows(demo: Path, which: int) -> None:
    words = generate_commands()[which]
    ended = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "generate", *words[1:]],
        cwd=demo,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert promised_replies()[which] in " ".join(ended.stdout.split())


def test_exit_codes_are_told_in_the_same_words_everywhere() -> None:
    from true_kd.cli import EXIT_CODES

    for page in (ROOT / "README.md", ROOT / "true_kd" / "docs" / "reliability.md"):
        assert EXIT_CODES in " ".join(page.read_text(encoding="utf-8").split()), page
