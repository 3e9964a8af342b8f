"""`true-kd domains`: what a project holds, and in one line what is wrong with it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from test_cli import lay_out, refused

from true_kd import adapters
from true_kd.config import RunConfig
from true_kd.prompts import load_file

PAGE = Path(__file__).parents[1] / "true_kd" / "docs" / "configs.md"


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path, cli) -> Path:
    """A project of cats, which are finished, and dogs."""
    folder = lay_out(tmp_path_factory.mktemp("run") / "project", teacher_folder, student_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli("distill", "-d", "cats").code == 0
    return folder


@pytest.fixture
def project(distilled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: that project."""
    monkeypatch.chdir(distilled)
    return distilled


def domains(cli, *arguments: str) -> dict[str, dict[str, Any]]:
    """What `domains --json` tells of each."""
    ended = cli("domains", "--json", *arguments)
    assert (ended.code, ended.err) == (0, "")
    return {each["domain"]: each for each in json.loads(ended.out)["domains"]}


def test_each_domain_has_its_prompts_and_what_its_adapter_gained(cli, project: Path) -> None:
    found = domains(cli)
    assert set(found) == {"cats", "dogs"}
    counts = {"train": 5, "valid": 1, "held_out": True, "config": None, "problem": None}
    assert {key: found["cats"][key] for key in counts} == {key: found["dogs"][key] for key in counts} == counts
    result = json.loads(Path("adapters_kd", "cats", adapters.METRICS).read_text())["result"]
    assert found["cats"]["adapter"] == "adapters_kd/cats"
    assert found["cats"]["finished"] is True
    assert found["cats"]["gap_closed"] == result["proof"]["gap_closed"]["kl"]
    assert found["cats"]["outcome"] == result["proof"]["verdict"]["outcome"]
    assert (found["dogs"]["adapter"], found["dogs"]["finished"], found["dogs"]["gap_closed"]) == (None, False, None)


def test_the_table_has_a_row_for_each(cli, project: Path) -> None:
    ended = cli("domains")
    assert (ended.code, ended.err) == (0, "")
    head, cats, dogs, note = ended.out.splitlines()
    assert head.split() == ["domain", "train", "valid", "config", "gap", "closed"]
    assert cats.split()[:4] == ["cats", "5", "1*", "-"]
    assert cats.split()[4].endswith("%")
    assert dogs.split() == ["dogs", "5", "1*", "-", "-"]
    assert note == "* held out of train, as there is no valid file"


def test_a_domain_with_a_problem_is_told_in_one_line_and_the_others_are_listed(
    cli, tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lay_out(tmp_path / "project", teacher_folder, teacher_folder)
    monkeypatch.chdir(folder)
    (folder / "prompts" / "bad").mkdir()
    (folder / "prompts" / "bad" / "train.jsonl").write_text('{"prompt": 1}\n{"prompt": 2}\n{"prompt": "x"}\n')
    (folder / "prompts" / "Loud").mkdir()
    (folder / "prompts" / "Loud" / "train.txt").write_text("x\ny\n")
    (folder / "configs" / "dogs.yaml").write_text("sed: 1\n")
    (folder / "configs" / "cat.yaml").write_text("seed: 1\n")
    found = domains(cli)
    assert found["cats"]["problem"] is None
    assert found["bad"]["problem"].startswith("prompts/bad/train.jsonl:1")
    assert found["bad"]["problem"].endswith("(and 1 more)")
    assert "did you mean 'loud'?" in found["Loud"]["problem"]
    assert "did you mean 'seed'?" in found["dogs"]["problem"]
    assert found["dogs"]["train"] is None
    lines = cli("domains").out.splitlines()
    assert len(lines) == 1 + 4 + 3 + 1 + 1
    assert lines[-1] == "configs/cat.yaml: of no domain here."


def test_an_adapter_without_prompts_or_without_an_end_or_damaged_is_told(
    cli, distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(distilled, folder)
    monkeypatch.chdir(folder)
    shutil.copytree("adapters_kd/cats", "adapters_kd/gone")
    shutil.copytree("adapters_kd/cats", "adapters_kd/dogs")
    Path("adapters_kd/dogs", adapters.METRICS).unlink()
    metrics = Path("adapters_kd/cats", adapters.METRICS)
    metrics.write_text(metrics.read_text().replace('"cats"', '"dogs"', 1))
    found = domains(cli)
    assert "prompts/gone: no such domain" in found["gone"]["problem"]
    assert (found["dogs"]["adapter"], found["dogs"]["finished"]) == ("adapters_kd/dogs", False)
    assert found["cats"]["problem"].startswith(f"{metrics}: damaged")
    rows = {line.split()[0]: line for line in cli("domains").out.splitlines()[1:4]}
    assert rows["dogs"].endswith("unfinished")
    assert rows["cats"].endswith("unusable")


def test_domains_follows_its_flags(cli, project: Path, tmp_path: Path) -> None:
    (tmp_path / "other" / "birds").mkdir(parents=True)
    (tmp_path / "other" / "birds" / "train.txt").write_text("x\ny\n")
    found = domains(cli, "--prompts", str(tmp_path / "other"), "--out", str(tmp_path / "none"))
    assert set(found) == {"birds"}
    pocket = domains(cli, "--config", "pocket:configs/base.yaml")
    assert set(pocket) == {"action", "debug", "memory", "reflection", "task", "thinking"}
    assert pocket["debug"]["config"].endswith("debug.yaml")


def test_no_domains_are_told_with_what_to_do(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "`true-kd init`" in refused(cli("domains"))
    Path("configs").mkdir()
    Path("configs/base.yaml").write_text("")
    assert "prompts 'prompts': no such folder" in refused(cli("domains"))
    Path("prompts").mkdir()
    ended = cli("domains")
    assert (ended.code, ended.out) == (0, "No domains in prompts. Lay one out with `true-kd init --domain NAME`.\n")


# The page about configs and domains.


def blocks(language: str) -> list[str]:
    """The examples of one kind in docs/configs.md."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_every_record_of_the_page_is_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(blocks("json")))
    prompts = load_file(file)
    assert len(prompts) == 8
    assert [prompt.completion is not None for prompt in prompts] == [
        False,
        True,
        False,
        True,
        False,
        False,
        False,
        True,
    ]
    assert [name for prompt in prompts for name in ("text", "tools", "answer", "reward") if getattr(prompt, name)] == [
        *("tools", "text", "answer", "reward")
    ]


def test_every_command_of_the_page_works(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("init").code == 0
    (tmp_path / "adapters_kd" / "sailing").mkdir(parents=True)
    saved = json.dumps(RunConfig().model_dump(mode="json"))
    (tmp_path / "adapters_kd" / "sailing" / adapters.RUN).write_text(saved)
    lines = [
        words[1:] for line in "\n".join(blocks("shell")).splitlines() if (words := shlex.split(line, comments=True))
    ]
    assert len(lines) == 9
    for words in lines:
        ended = cli(*words)
        if words[0] == "distill":
            assert "not in the local hub cache" in ended.err
        else:
            assert (ended.code, ended.err) == (0, ""), words
