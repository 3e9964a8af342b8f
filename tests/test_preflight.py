"""What `true-kd validate` finds: all of it, nothing else, and the very tokens that training trains."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import Ended, save_random_model
from pydantic import TypeAdapter
from rich.console import Console
from test_cli import only_line, tree
from test_pipeline import SCORED, Place, plan_of

from true_kd import events
from true_kd.batching import collate
from true_kd.cli.checking import _colour, _marked
from true_kd.datasets import build_data
from true_kd.models import ModelOptions, open_model
from true_kd.pipeline import distill
from true_kd.preflight import Report, ShownToken

ASK = tuple(f"say hello to {count} cats" for count in range(5))
CHECK = ({"prompt": "who is there", "answer": "the cat"}, {"prompt": "who sat down", "answer": "a dog"})


@pytest.fixture
def place(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Place:
    """A place with one domain, `a`, that is as it should be."""
    place = Place(tmp_path, teacher_folder, student_folder)
    place.config["training"]["max_seq_length"] = 128
    place.config["capture"]["max_tokens"] = 12
    place.write("a", ASK, CHECK)
    return place


@pytest.fixture
def validate(place: Place, cli: Callable[..., Ended]) -> Callable[..., Ended]:
    """Validates the place."""

    def call(*arguments: str) -> Ended:
        base = place.root / "base.yaml"
        base.write_text(json.dumps(place.config))
        before = tree(place.root)
        ended = cli("validate", "--config", str(base), *arguments)
        assert tree(place.root) == before, "something was written"
        return ended

    return call


def found(ended: Ended) -> list[dict[str, Any]]:
    """The findings of all domains."""
    report = json.loads(ended.out)
    return [finding for domain in report["domains"] for finding in domain["findings"]]


# Nothing to find.


def test_what_is_in_order_is_counted_and_shown(validate) -> None:
    ended = validate()
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("a: 5 to train, 2 held out; 0 replies in the data, 0 prompts in the cache, ")
    assert ended.out.count("The teacher will write its reply here.") == 2
    assert ended.out.endswith("\n0 problems, 0 warnings in a.\n")
    assert "\x1b" not in ended.out


def test_the_demo_has_nothing_to_complain_of(cli) -> None:
    ended = cli("validate", "--config", "pocket:configs/base.yaml", "--show", "1")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.endswith("\n0 problems, 0 warnings in 6 domains.\n")
    assert ended.out.count("<|im_start|>") == 12


@pytest.mark.parametrize("show", [0, 1, 3, 99])
def test_as_many_prompts_are_shown_as_asked_for(show: int, validate) -> None:
    report = json.loads(validate("--show", str(show), "--json").out)
    assert len(report["domains"][0]["examples"]) == min(show, len(ASK))


def test_a_negative_number_of_prompts_is_refused(validate) -> None:
    ended = validate("--show", "-1")
    assert ended.code == 2
    assert "--show" in only_line(ended.err)


# The tokens that are trained.


def trained_by(place: Place) -> dict[str, list[tuple[int, bool]]]:
    """By the line it comes from: the ids of each training example, and whether a batch trains them."""
    jobs, failures = plan_of(place, "a")
    for event in distill(jobs, failures):
        if isinstance(event, events.TrainingStarted):
            break
    student = open_model(ModelOptions(model=place.config["student"]), "student")
    data = build_data(jobs[0], student)
    batch = collate(data.train, jobs[0].config.losses.final.temperature)
    width = batch.tokens.shape[1]
    ids, predicting = batch.tokens.tolist(), set(batch.rows.tolist())
    return {
        example.where: [
            (ids[row][at], at > 0 and row * width + at - 1 in predicting) for at in range(len(example.tokens))
        ]
        for row, example in enumerate(data.train)
    }


@pytest.mark.parametrize(
    ("train", "changes", "reply"),
    [
        (ASK, {}, "cache"),
        (SCORED, {}, "cache"),
        (SCORED, {"targets": {"share": 0.5}}, "cache"),
        (SCORED, {"targets": {"preset": "exact"}}, "cache"),
        (({"text": "the cat sat on the mat"}, {"text": "the mat sat on the cat"}), {}, "cache"),
        (SCORED, {"training": {"max_seq_length": 20}}, "cache"),
    ],
    ids=["written", "given", "a share of the tokens", "hidden states", "raw text", "cut"],
)
def test_what_is_shown_as_trained_is_what_a_batch_trains(train, changes, reply, place: Place, validate) -> None:
    for group, values in changes.items():
        place.config.setdefault(group, {}).update(values)
    place.write("a", train, CHECK if not changes else ("who is it", "who was it"))
    trained = trained_by(place)
    manifests = {path: path.stat().st_mtime_ns for path in (place.root / "cache").glob("*/manifest.jsonl")}
    examples = json.loads(validate("--show", "9", "--json").out)["domains"][0]["examples"]
    shown = {example["where"]: [(token["id"], token["trained"]) for token in example["tokens"]] for example in examples}
    assert trained == shown
    assert len(trained) == len(train)
    assert any(mask for tokens in shown.values() for _, mask in tokens)
    assert all(sum(mask for _, mask in shown[one["where"]]) == one["trained_tokens"] for one in examples)
    assert {path: path.stat().st_mtime_ns for path in manifests} == manifests, "the cache was touched"
    if "training" in changes:
        assert max(one["cut_tokens"] for one in examples) > 0


def test_before_the_teacher_has_seen_them_the_replies_of_the_data_are_shown_as_they_will_be_trained(
    place: Place, validate
) -> None:
    place.write("a", SCORED, CHECK)
    examples = json.loads(validate("--show", "9", "--json").out)["domains"][0]["examples"]
    shown = {one["where"]: [(token["id"], token["trained"]) for token in one["tokens"]] for one in examples}
    assert {one["reply"] for one in examples} == {"data"}
    assert shown == trained_by(place)


def test_the_pieces_of_the_tokens_are_their_text_special_tokens_included(place: Place, validate, student) -> None:
    place.write("a", [{"prompt": "hé 猫", "completion": "🐈 sat"}, *ASK], CHECK)
    example = json.loads(validate("--show", "1", "--json").out)["domains"][0]["examples"][0]
    assert "".join(token["text"] for token in example["tokens"]) == "<|user|>hé 猫<|end|>\n<|assistant|>🐈 sat<|end|>"
    trained = "".join(token["text"] for token in example["tokens"] if token["trained"])
    assert trained == "🐈 sat<|end|>"
    assert example["prompt_tokens"] + example["trained_tokens"] == len(example["tokens"])


def test_with_a_budget_the_cache_that_it_chose_is_found(place: Place, validate) -> None:
    place.config["targets"] = {"bytes_per_token": 60}
    assert {one["reply"] for one in json.loads(validate("--json").out)["domains"][0]["examples"]} == {"teacher"}
    trained = trained_by(place)
    examples = json.loads(validate("--show", "9", "--json").out)["domains"][0]["examples"]
    assert {one["reply"] for one in examples} == {"cache"}
    assert {one["where"]: [(token["id"], token["trained"]) for token in one["tokens"]] for one in examples} == trained


# How they are shown.

HOSTILE = "+ trained\n. read\t\x1b[31mred ↵ \u2028 end\n\n"


def tokens(*pieces: tuple[str, bool]) -> list[ShownToken]:
    return [ShownToken(number, text, trained) for number, (text, trained) in enumerate(pieces)]


@pytest.mark.parametrize("columns", [20, 60, 200])
def test_without_colours_every_line_says_whether_it_is_trained(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    pieces = (("ask ", False), (HOSTILE, False), ("x" * 150, True), ("猫" * 40, True), ("\n", True), ("z", False))
    lines = list(_marked(tokens(*pieces)))
    assert {line[:2] for line in lines} == {"+ ", ". "}
    assert all(line.isprintable() for line in lines)
    assert all(len(line) + line.count("猫") <= columns for line in lines)
    trained = "".join(line[2:] for line in lines if line.startswith("+ "))
    assert trained == "x" * 150 + "猫" * 40 + "↵"
    read = "".join(line[2:] for line in lines if line.startswith(". "))
    assert read == r"ask + trained↵. read\t\x1b[31mred \u21b5 \u2028 end↵↵z"


def test_lines_are_broken_between_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert list(_marked(tokens(("the cat sat ", False), ("<|end|>", False), ("on", True)))) == [
        ". the cat sat ",
        ". <|end|>",
        "+ on",
    ]


def test_on_a_terminal_the_trained_tokens_alone_have_a_ground() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system="256", width=60, legacy_windows=False)
    _colour(tokens(("read ", False), ("first ", True), ("second", True), (" last", False)), console)
    grounds = re.findall(r"\x1b\[30;48;5;(\d+)m([^\x1b]*)", shown.getvalue())
    assert [text for _, text in grounds] == ["first ", "second"]
    assert grounds[0][0] != grounds[1][0], "where one token ends and the next begins"
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()) == "read first second last\n"


def test_in_a_pipe_of_60_columns_nothing_is_wider(place: Place, validate) -> None:
    validate()
    command = [sys.executable, "-m", "true_kd", "validate", "--config", str(place.root / "base.yaml"), "--all"]
    done = subprocess.run(
        command, env={**os.environ, "COLUMNS": "60"}, capture_output=True, text=True, check=False, cwd=place.root
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if line[:2] in ("+ ", ". ")) <= 60


# What is wrong.


def test_every_bad_line_of_both_files_is_named(place: Place, validate) -> None:
    place.write("a", [{"promt": "x"}] * 7, [{"prompt": ""}] * 5)
    ended = validate()
    assert ended.code == 2
    for split, count in (("train", 7), ("valid", 5)):
        for number in range(1, count + 1):
            assert re.search(rf"^{re.escape(str(place.root))}/prompts/a/{split}.jsonl:{number}:\d+: ", ended.out, re.M)
    assert ended.out.endswith("12 problems, 0 warnings in a.\n")
    assert [finding["kind"] for finding in found(validate("--json"))] == ["prompts"] * 12


def test_every_fault_of_a_config_is_named_and_the_prompts_are_read_all_the_same(place: Place, validate) -> None:
    place.write("a", [*ASK, {"promt": "x"}], CHECK)
    (place.root / "a.yaml").write_text("training:\n  itres: 3\n  bogus: 1\nlosses: {temprature: 2, alpha: 7, x: 1}\n")
    ended = validate("-d", "a")
    assert ended.code == 2
    lines = [line for line in ended.out.splitlines() if line.startswith(str(place.root))]
    assert sum("a.yaml:" in line for line in lines) == 5
    assert sum("train.jsonl:6:" in line for line in lines) == 1


def test_what_all_domains_share_is_told_once(place: Place, validate) -> None:
    place.write("b", ASK, CHECK)
    ended = validate("-d", "a", "-d", "b", "--set", "losses.alpha=7", "--show", "0")
    assert ended.code == 2
    assert ended.out.count("--set losses.alpha: 7,") == 1
    assert ended.out.endswith("1 problem, 0 warnings in 2 domains.\n")


def test_a_broken_base_config_is_listed_whole_where_it_says_where_the_domains_are(place: Place, validate) -> None:
    place.config.update(one=1, two=2, three=3, four=4, five=5)
    ended = validate()
    assert (ended.code, ended.err) == (2, "")
    assert all(f" {name}: unknown key" in ended.out for name in ("one", "two", "three", "four", "five"))
    report = json.loads(validate("--json").out)
    assert (report["problems"], len(report["findings"])) == (5, 5)


def test_a_config_of_no_domain_is_told_with_what_was_meant(place: Place, validate) -> None:
    place.write("cats", ASK, CHECK)
    (place.root / "cast.yaml").write_text("seed: 1\n")
    ended = validate("--show", "0")
    assert ended.code == 0
    assert f"warning: {place.root}/cast.yaml: is read for no domain; did you mean 'cats'?" in ended.out
    assert [finding["kind"] for finding in json.loads(validate("--json").out)["findings"]] == ["config"]
    assert "cast.yaml" not in validate("-d", "a").out, "whoever names a domain asks of that alone"


def test_a_name_that_no_domain_has_is_one_problem(validate) -> None:
    ended = validate("-d", "Cats")
    assert (ended.code, ended.out.count("not a domain name")) == (2, 1)
    assert ended.out.endswith("\n1 problem, 0 warnings in Cats.\n")


def test_without_a_config_one_line_says_so(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = cli("validate")
    assert (ended.code, ended.out) == (2, "")
    assert "true-kd init" in only_line(ended.err)


def test_a_domain_that_is_not_there_is_named_with_what_was_meant(validate) -> None:
    ended = validate("--domain", "b")
    assert ended.code == 2
    assert "no such domain" in ended.out
    assert "Domains here: a." in ended.out


LONG = "the cat sat on the mat " * 30

CASES: dict[str, tuple[list[Any], list[Any], dict[str, Any], str, str, str]] = {
    "a prompt that is too long": ([*ASK, LONG], CHECK, {}, "problem", "length", "train.jsonl:6: the prompt has "),
    "a reply that is cut": (
        [*ASK, {"prompt": "tell", "completion": LONG}],
        CHECK,
        {},
        "warning",
        "length",
        "train.jsonl:6: 61 of the 182 tokens of the reply find no room",
    ),
    "little room for the teacher": (
        ASK,
        CHECK,
        {"capture.max_tokens": 120},
        "warning",
        "length",
        "tokens for the teacher's reply, the least of 7 prompts",
    ),
    "a leak": ([*ASK, "who is  there"], CHECK, {}, "problem", "leak", "valid.jsonl:1: the same prompt as "),
    "a leak by another reply": (
        [*ASK, {"prompt": "who is there", "completion": "nobody"}],
        CHECK,
        {},
        "problem",
        "leak",
        "train.jsonl:6, which is trained on",
    ),
    "a twin": ([*ASK, ASK[0], ASK[0]], CHECK, {}, "warning", "duplicate", "train.jsonl:1: the same prompt again in"),
    "an answer with the marker": (
        ASK,
        [{"prompt": "who", "answer": "answer: me"}, *CHECK],
        {},
        "problem",
        "answer",
        "valid.jsonl:1: answer 'answer: me' holds 'answer:'",
    ),
    "an answer that is too long": (
        ASK,
        [{"prompt": "who", "answer": "the cat " * 20}, *CHECK],
        {},
        "problem",
        "answer",
        "valid.jsonl:1: the answer takes ",
    ),
    "a completion without its answer": (
        ASK,
        [{"prompt": "who", "completion": "me", "answer": "you"}, *CHECK],
        {},
        "problem",
        "answer",
        "valid.jsonl:1: the completion does not give the answer 'you'",
    ),
    "a text of one token": ([*ASK, {"text": "t"}], CHECK, {}, "problem", "template", "train.jsonl:6: a text of 1 tok"),
    "no reward": (ASK, CHECK, {"losses.weigh_by": "reward"}, "problem", "reward", "train.jsonl:5: no 'reward'"),
    "a link in place of the output folder": (ASK, CHECK, {"out": "linked"}, "problem", "config", "a link, expected"),
}


@pytest.mark.parametrize(("train", "valid", "sets", "severity", "kind", "says"), CASES.values(), ids=CASES.keys())
def test_what_is_wrong_is_found_and_said(
    train, valid, sets, severity, kind, says, place: Place, validate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.root)
    (place.root / "linked").mkdir()
    (place.root / "linked" / "a").symlink_to(place.root)
    place.write("a", train, valid)
    ended = validate("--json", *(f"--set={key}={value}" for key, value in sets.items()))
    findings = [finding for finding in found(ended) if says in finding["message"]]
    assert [(finding["severity"], finding["kind"]) for finding in findings] == [(severity, kind)], ended.out
    assert all("\n" not in finding["message"] and finding["message"].endswith(".") for finding in found(ended))
    assert {finding["kind"] for finding in found(ended)} == {kind}
    assert ended.code == (2 if severity == "problem" else 0)


def test_a_template_that_refuses_is_told_for_every_prompt_and_both_models(
    place: Place, validate, tmp_path: Path, teacher_folder: Path
) -> None:
    folder = shutil.copytree(teacher_folder, tmp_path / "picky")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}{% if 'cat' in m.content %}{{ raise_exception('no cats') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    place.config["teacher"] = str(folder)
    place.write("a", ["a dog", *ASK], CHECK)
    findings = found(validate("--json"))
    assert len(findings) == len(ASK)
    assert all("refuses it (no cats)" in finding["message"] for finding in findings)
    place.config["student"] = str(shutil.copytree(folder, tmp_path / "picky-too"))
    assert len(found(validate("--json"))) == 2 * len(ASK)


def test_a_template_without_end_is_stopped_once(place: Place, validate, tmp_path: Path, teacher_folder: Path) -> None:
    folder = shutil.copytree(teacher_folder, tmp_path / "endless")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    place.config["teacher"] = str(folder)
    report = json.loads(validate("--json").out)["domains"][0]
    assert ["was stopped" in finding["message"] for finding in report["findings"]] == [True]
    assert any(line.startswith("prompts after ") for line in report["unchecked"])


def test_other_vocabularies_are_told_with_the_number_of_ids(
    place: Place, validate, tmp_path: Path, tokenizer_folder: Path
) -> None:
    other = shutil.copytree(tokenizer_folder, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(re.sub(r'"<\|tool\|>"', '"<|tule|>"', text))
    place.config["student"] = str(save_random_model(tmp_path / "student", other, seed=2))
    [finding] = found(validate("--json"))
    assert (finding["severity"], finding["kind"]) == ("warning", "vocabulary")
    assert "1 ids stand for different tokens" in finding["message"]
    for strategy in ("match", "truncate"):
        [finding] = found(validate("--json", "--vocab-strategy", strategy))
        assert (finding["severity"], finding["kind"]) == ("problem", "vocabulary")
        assert "1 of " in finding["message"]
    [finding] = found(validate("--json", "--vocab-strategy", "truncate", "--force"))
    assert (finding["severity"], finding["kind"]) == ("warning", "vocabulary")


def test_replies_that_the_teacher_left_unfinished_are_counted(place: Place, validate) -> None:
    jobs, failures = plan_of(place, "a")
    list(distill(jobs, failures))
    [finding] = [finding for finding in found(validate("--json")) if finding["kind"] == "reply"]
    assert finding["severity"] == "warning"
    assert "ends at capture.max_tokens=12, the first of " in finding["message"]


def test_what_is_printed_for_programs_keeps_to_its_schema(place: Place, validate) -> None:
    schema = TypeAdapter(Report).json_schema()
    place.write("b", [*ASK, ASK[0], LONG, {"prompt": "tell", "completion": LONG}], CHECK)
    place.write("c", [{"promt": 1}], CHECK)
    for flags in ((), ("-d", "c"), ("--set", "bogus=1")):
        jsonschema.validate(json.loads(validate("--json", *flags).out), schema)
    described = [part for part in schema["$defs"].values() if part.get("type") == "object"]
    assert all("description" in field or "$ref" in field for part in described for field in part["properties"].values())


# Models that are not here.


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever connects fails the test."""

    def connect(*_: Any) -> None:
        raise AssertionError("somebody asked the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def lay_out_hub(hub: Path, name: str, model: Path) -> Path:
    """A model in the layout of the hub's cache; returns its snapshot."""
    folder = hub / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    shutil.copytree(model, snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_a_model_that_is_not_downloaded_stays_so_and_what_was_not_checked_is_said(
    place: Place, validate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    place.config.update(teacher="some/teacher", student="some/student")
    place.write("a", [*ASK, ASK[0]], CHECK)
    ended = validate()
    assert ended.code == 0
    assert "not checked: what needs the student's tokenizer: student 'some/student': not downloaded yet" in ended.out
    assert "warning: " in ended.out, "what can be examined without it is"
    assert not (tmp_path / "hub").exists()


def test_a_download_that_broke_off_counts_as_none(
    place: Place, validate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None, student_folder: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (lay_out_hub(tmp_path / "hub", "some/student", student_folder) / "model.safetensors").unlink()
    place.config["student"] = "some/student"
    ended = validate()
    assert ended.code == 0
    assert "student 'some/student': not downloaded yet" in ended.out


def test_a_model_that_is_downloaded_is_read_without_asking_the_hub(
    place: Place,
    validate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_network: None,
    student_folder: Path,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    lay_out_hub(tmp_path / "hub", "some/student", student_folder)
    place.config["student"] = "some/student"
    place.write("a", [*ASK, LONG], CHECK)
    ended = validate("--show", "1")
    assert "<|user|>say hello" in ended.out
    assert "not checked" not in ended.out
    assert (ended.code, ended.out.count("train.jsonl:6: the prompt has")) == (2, 1)


def test_without_the_teacher_the_students_tokens_stand_in_for_the_replies_of_the_data(
    place: Place, validate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    place.write("a", SCORED, CHECK)
    with_teacher = json.loads(validate("--json").out)["domains"][0]
    place.config["teacher"] = "some/teacher"
    without = json.loads(validate("--json").out)["domains"][0]
    assert without["examples"] == with_teacher["examples"]
    assert any("the student's stand in for them" in line for line in without["unchecked"])


def test_a_model_folder_that_is_none_is_a_problem(validate) -> None:
    ended = validate("--json", "--student", "./nowhere")
    assert ended.code == 2
    assert [finding["kind"] for finding in found(ended)] == ["model"]


def test_no_secret_of_a_prompt_path_or_model_name_is_repeated(validate) -> None:
    secret = "hf_" + "a1B2" * 8
    for flags in (("--student", f"org/{secret}"), ("--set", f"teacher.revision={secret}")):
        ended = validate(*flags)
        assert secret not in ended.out + ended.err
