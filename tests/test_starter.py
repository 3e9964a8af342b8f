"""`true-kd init --domain`: a new domain that runs as it is laid out, and nothing of the user's is ever touched."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_cli import only_line, refused, tree

from true_kd.config import RunConfig, leaves, load_config
from true_kd.jobs import read_domain
from true_kd.layers import DEFAULT
from true_kd.yaml_file import read_yaml

TEMPLATE = Path(__file__).parents[1] / "true_kd" / "new_domain"
LAID_OUT = {
    *("configs/base.yaml", "configs/config.schema.json", "configs/sailing.yaml"),
    *("prompts/sailing/train.jsonl", "prompts/sailing/valid.jsonl", "prompts/sailing/system.md"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_domain_in_an_empty_folder_is_a_project(cli, folder: Path) -> None:
    ended = cli("init", "--domain", "sailing")
    assert (ended.code, ended.err) == (0, "")
    assert set(files(folder)) == LAID_OUT
    assert "6 files written, 0 already there and kept." in ended.out
    assert ended.out.endswith("then run\n  true-kd distill --domain sailing\n")
    train, valid = read_domain(load_config(None, "sailing", []).prompts_folder, "sailing")
    assert len(train) >= 8
    assert len(valid) >= 2
    assert {prompt.completion is None for prompt in train} == {True, False}
    assert any(prompt.answer for prompt in valid)


def test_its_config_changes_nothing_and_each_key_in_it_shows_the_default() -> None:
    text = (TEMPLATE / "config.yaml").read_text(encoding="utf-8")
    assert read_yaml(TEMPLATE / "config.yaml").data == {}
    Path("all.yaml").write_text(re.sub(r"^#(?! )|^#(?=  )", "", text, flags=re.MULTILINE))
    stated = {path for path, _ in leaves(RunConfig())} & set(read_yaml(Path("all.yaml")).lines)
    assert len(stated) >= 10
    assert load_config(Path("all.yaml"), None, []) == RunConfig()


def test_a_new_domain_joins_a_project_and_changes_no_file_of_it(cli, folder: Path) -> None:
    cli("init")
    before = files(folder)
    ended = cli("init", "--domain", "sailing", "--json")
    found = json.loads(ended.out)
    assert set(found["written"]) == set(files(folder)) - set(before) == LAID_OUT - set(before)
    assert set(found["kept"]) == {"configs/base.yaml", "configs/config.schema.json"}
    assert {name: content for name, content in files(folder).items() if name in before} == before


def test_a_new_domain_elsewhere_says_where_to_go_next(cli, folder: Path) -> None:
    assert cli("init", "new place", "--domain", "sailing").out.endswith(
        "cd 'new place' && true-kd distill --domain sailing\n"
    )
    assert set(files(folder / "new place")) == LAID_OUT


def test_prompts_go_where_the_project_has_them(cli, folder: Path) -> None:
    Path("configs").mkdir()
    Path("configs/base.yaml").write_text("prompts: data/prompts\n")
    assert cli("init", "--domain", "sailing").code == 0
    assert Path("data/prompts/sailing/train.jsonl").is_file()
    assert not Path("prompts").exists()
    assert cli("init", str(folder), "--domain", "rowing").code == 0
    assert Path("data/prompts/rowing/train.jsonl").is_file()


def test_what_is_there_of_a_domain_without_prompts_is_kept(cli, folder: Path) -> None:
    Path("prompts/sailing").mkdir(parents=True)
    Path("prompts/sailing/valid.txt").write_text("mine\nmine too\n")
    Path("configs").mkdir()
    Path("configs/sailing.yaml").write_text("seed: 3\n")
    assert cli("init", "--domain", "sailing").code == 0
    assert set(files(folder)) == LAID_OUT - {"prompts/sailing/valid.jsonl"} | {"prompts/sailing/valid.txt"}
    assert load_config(None, "sailing", []).seed == 3
    assert len(read_domain(Path("prompts"), "sailing")[1]) == 2


@pytest.mark.parametrize("file", ["train.jsonl", "train.txt"])
def test_a_domain_that_is_there_is_refused(file: str, cli, folder: Path) -> None:
    Path("prompts/sailing").mkdir(parents=True)
    Path("prompts/sailing", file).write_text("mine\n")
    before = tree(folder)
    assert f"prompts/sailing/{file}: the domain is there already" in refused(cli("init", "--domain", "sailing"))
    assert tree(folder) == before


@pytest.mark.parametrize(
    "name", ["Sailing", "", ".", "..", "../x", "a/b", "/etc", "a b", "-x", "é", "x" * 65, "base", "a\nb"]
)
def test_a_name_that_cannot_be_one_is_refused_and_writes_nothing(name: str, cli, folder: Path) -> None:
    refused(cli("init", f"--domain={name}"))
    assert tree(folder) == set()


def test_a_file_or_a_link_in_the_way_is_refused_and_nothing_is_written(cli, folder: Path, tmp_path: Path) -> None:
    Path("prompts").mkdir()
    Path("prompts/sailing").touch()
    assert "prompts/sailing: a file is in the way" in refused(cli("init", "--domain", "sailing"))
    (tmp_path / "outside").mkdir()
    Path("prompts/rowing").symlink_to(tmp_path / "outside")
    assert "prompts/rowing: a link" in refused(cli("init", "--domain", "rowing"))
    assert tree(folder) == {"prompts", "prompts/sailing", "prompts/rowing"}
    assert tree(tmp_path / "outside") == set()


def test_a_project_whose_base_config_is_broken_or_the_demos_is_refused(cli, folder: Path) -> None:
    Path("configs").mkdir()
    for text, says in (("sed: 1\n", "did you mean 'seed'?"), ("prompts: pocket:prompts\n", "expected a folder")):
        Path("configs/base.yaml").write_text(text)
        assert says in refused(cli("init", "--domain", "sailing"))
        assert tree(folder) == {"configs", "configs/base.yaml"}


def test_where_nothing_can_be_written_a_new_domain_ends_in_one_line(cli) -> None:
    assert "/proc/here" in refused(cli("init", "/proc/here", "--domain", "sailing"), code=4)


@pytest.mark.slow
def test_a_new_domain_runs_as_it_is(cli) -> None:
    cli("init", "--domain", "sailing")
    models = ("--teacher", "pocket:teacher", "--student", "pocket:student")
    few = ("--iters", "2", "--set", "isolate=false", "--set", "capture.max_tokens=4")
    ended = cli("distill", "--domain", "sailing", *models, *few, "--set", "evaluation.speed_tokens=0")
    assert ended.code == 0, ended.err
    [row] = json.loads(cli("domains", "--json").out)["domains"]
    assert (row["domain"], row["finished"], row["problem"]) == ("sailing", True, None)
    assert row["config"] == "configs/sailing.yaml"
    origin = json.loads(cli("config", "show", "--json").out)["origins"]["training.iters"]
    assert origin.startswith("configs/base.yaml:") or origin == DEFAULT
    assert only_line(cli("config", "diff", "adapters_kd").err).startswith("adapters_kd: no run.json in it")
