"""`true-kd evaluate`, `analyze` and `sweep` as their users meet them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_cli import lay_out, refused, tree

from true_kd.reporting import read_result


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory, cli, teacher_folder: Path, student_folder: Path) -> Path:
    """A project whose domain cats was distilled."""
    folder = lay_out(tmp_path_factory.mktemp("proving") / "project", teacher_folder, student_folder)
    valid = "".join(
        json.dumps({"prompt": f"where is cat number {number}?", "answer": "here"}) + "\n" for number in range(6)
    )
    (folder / "prompts" / "cats" / "valid.jsonl").write_text(valid)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ended = cli("distill", "-d", "cats", "--set", "report=false")
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def project(distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of the project."""
    folder = tmp_path / "project"
    shutil.copytree(distilled, folder)
    monkeypatch.chdir(folder)
    return folder


# evaluate


def test_evaluate_shows_the_models_side_by_side_and_the_verdict(cli, project: Path) -> None:
    ended = cli("evaluate", "-d", "cats")
    assert ended.code == 0, ended.err
    header = next(line for line in ended.out.splitlines() if line.startswith("cats  "))
    assert header.split() == ["cats", "student", "distilled", "teacher"]
    for row in ("KL to the teacher, nats", "perplexity", "top-1", "top-5", "exact match", "parameters", "tokens/s"):
        assert f"\n{row}" in ended.out
    assert ended.out.splitlines()[-1].startswith("cats: ")
    assert "\x1b" not in ended.out


def test_evaluate_brings_the_record_up_to_date(cli, project: Path) -> None:
    before = read_result(project / "adapters_kd" / "cats")
    assert cli("evaluate", "-d", "cats", "--set", "evaluation.answer_marker=SO").code == 0
    after = read_result(project / "adapters_kd" / "cats")
    assert after.steps == before.steps
    assert after.proof.adapted.kl == before.proof.adapted.kl
    summary = json.loads((project / "adapters_kd" / "kd_summary.json").read_text())
    assert summary["domains"]["cats"]["proof"]["examples"] == 6


def test_evaluate_prints_json_alone_on_stdout(cli, project: Path) -> None:
    ended = cli("evaluate", "--all", "--json")
    found = json.loads(ended.out)
    assert found["failed"] == {}
    assert found["domains"]["cats"]["student"]["kl"]["value"] > 0
    assert "measured" in ended.err


def test_evaluate_trains_the_control_that_is_asked_for(cli, project: Path) -> None:
    ended = cli("evaluate", "-d", "cats", "--control", "sft")
    assert ended.code == 0, ended.err
    assert "SFT control" in ended.out
    assert (project / "adapters_kd" / "cats" / "control_sft" / "adapters.safetensors").is_file()
    assert "SFT control" in cli("evaluate", "-d", "cats").out, "a control that is there is measured"


def test_an_adapter_of_other_prompts_is_measured_and_its_record_left_alone(cli, project: Path) -> None:
    metrics = (project / "adapters_kd" / "cats" / "kd_metrics.json").read_bytes()
    with (project / "prompts" / "cats" / "valid.jsonl").open("a") as file:
        file.write('{"prompt": "one more cat"}\n')
    ended = cli("evaluate", "-d", "cats")
    assert ended.code == 0, ended.err
    assert "not kept" in ended.out
    assert (project / "adapters_kd" / "cats" / "kd_metrics.json").read_bytes() == metrics


def test_evaluate_finds_an_adapter_that_has_moved(cli, project: Path) -> None:
    (project / "adapters_kd").rename(project / "elsewhere")
    ended = cli("evaluate", "-d", "cats", "--out", "elsewhere")
    assert ended.code == 0, ended.err
    assert not (project / "adapters_kd").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--domain NAME"),
        (["--all", "-d", "cats"], "--domain NAME"),
        (["-d", "cat"], "did you mean 'cats'"),
        (["-d", "dogs"], "dogs"),
        (["-d", "../cats"], "domain"),
        (["-d", "cats", "--out", "nowhere"], "nowhere"),
        (["-d", "cats", "--set", "evaluation.exact_mach=x"], "did you mean"),
        (["-d", "cats", "--control", "dpo"], "control"),
    ],
    ids=" ".join,
)
def test_a_wrong_call_of_evaluate_ends_in_one_line(arguments: list[str], says: str, cli, project: Path) -> None:
    before = tree(project)
    assert says in refused(cli("evaluate", *arguments))
    assert tree(project) == before


# analyze


def test_analyze_ranks_the_domains_and_trains_nothing(cli, project: Path) -> None:
    ended = cli("analyze", "--all", "--sample", "4")
    assert ended.code == 0, ended.err
    rows = [line.split()[0] for line in ended.out.splitlines() if line.startswith(("cats  ", "dogs  "))]
    found = json.loads(cli("analyze", "--all", "--sample", "4", "--json").out)["domains"]
    assert rows == list(found) == sorted(found, key=lambda name: -found[name]["kl"]["value"])
    assert found["cats"]["prompts"] == 4
    assert found["cats"]["teacher_right"]["value"] == 0.0
    assert not (project / "adapters_kd" / "dogs").exists()


def test_analyze_compares_a_quantised_teacher_with_its_parent(
    cli, project: Path, quantised_folder: Path, student_folder: Path, teacher_folder: Path
) -> None:
    arguments = ("-d", "cats", "--sample", "4", "--student", str(teacher_folder), "--json")
    ended = cli("analyze", *arguments, "--teacher", str(quantised_folder), "--parent", str(student_folder))
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)["parents"]["cats"]
    assert 0 < found["kl"]["value"] < 1
    assert found["replies"] == 4
    same = cli("analyze", *arguments, "--teacher", str(student_folder), "--parent", str(student_folder))
    assert abs(json.loads(same.out)["parents"]["cats"]["kl"]["value"]) < 0.005


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-d", "cats", "--sample", "0"], "--sample"),
        (["-d", "cats", "--parent", "./nowhere"], "nowhere"),
        (["-d", "birds"], "birds"),
        ([], "--domain NAME or --all"),
    ],
    ids=" ".join,
)
def test_a_wrong_call_of_analyze_ends_in_one_line(arguments: list[str], says: str, cli, project: Path) -> None:
    assert says in refused(cli("analyze", *arguments))


# sweep


def test_sweep_ends_in_a_table_and_a_recommendation(cli, project: Path) -> None:
    ended = cli(
        "sweep", "-d", "cats", "--temperature", "1, 2", "--alpha", "0.5,0.9", "--iters", "1", "--control", "sft"
    )
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    table = [line for line in lines if line.startswith(("temperature=", "sft"))]
    assert len(table) == 5
    assert sum(line.rstrip().endswith("best") for line in table) == 1
    assert any(line.startswith("cats: take temperature=") for line in lines)
    assert (project / "adapters_kd" / "sweep" / "sweep.json").is_file()


def test_sweep_prints_json_alone_on_stdout(cli, project: Path) -> None:
    ended = cli("sweep", "-d", "cats", "--grid", "lora.rank=1,2", "--iters", "1", "--json")
    [row, other] = json.loads(ended.out)["domains"]["cats"]["rows"]
    assert {row["setting"], other["setting"]} == {"rank=1", "rank=2"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--temperature", "1,hot"], "--temperature losses.temperature: 'hot'"),
        (["--temperature", "1,,2"], "an empty value"),
        (["--temperature", "1,200"], "temperature"),
        (["--temperature", "2"], "nothing to vary"),
        ([], "nothing to vary"),
        (["--grid", "losses.temprature=1,2"], "did you mean"),
        (["--grid", "capture.seed=1,2"], "cannot be swept"),
        (["--alpha", "0.1,0.2", "--grid", "losses.alpha=0.1,0.2"], "twice"),
        (["--alpha", "0.1,0.2", "--control", "dpo"], "--control"),
    ],
    ids=" ".join,
)
def test_a_wrong_call_of_sweep_ends_in_one_line(arguments: list[str], says: str, cli, project: Path) -> None:
    before = tree(project)
    assert says in refused(cli("sweep", "-d", "cats", *arguments))
    assert tree(project) == before
