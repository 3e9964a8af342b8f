"""`true-kd config`: what it prints is a config, its origins are true, and a comparison shows what differs, no more."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cli import refused

from true_kd import adapters
from true_kd.config import KDConfig, Override, load_config
from true_kd.yaml_file import read_value, write_value

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a project of the domains cats, with a config of its own, and dogs."""
    folder = tmp_path / "project"
    for domain in ("cats", "dogs"):
        (folder / "prompts" / domain).mkdir(parents=True)
        (folder / "prompts" / domain / "train.txt").write_text("one\ntwo\n")
    (folder / "configs").mkdir()
    (folder / "configs" / "base.yaml").write_text("teacher: a/b\ntraining:\n  iters: 11\n")
    (folder / "configs" / "cats.yaml").write_text("training: {learning_rate: 1e-5}\n")
    monkeypatch.chdir(folder)
    return folder


def finished(config: KDConfig, folder: Path) -> None:
    """What a run leaves of its config."""
    folder.mkdir(parents=True)
    (folder / adapters.RUN).write_text(json.dumps(config.model_dump(mode="json"), indent=2))


# show.


@pytest.mark.parametrize("arguments", [(), ("-d", "cats"), ("-d", "dogs", "--set", "lora.rank=3")], ids=" ".join)
def test_what_show_prints_is_the_same_config_again(arguments: tuple[str, ...], cli, project: Path) -> None:
    ended = cli("config", "show", *arguments)
    assert (ended.code, ended.err) == (0, "")
    Path("again.yaml").write_text(ended.out)
    domain = arguments[1] if arguments else None
    given = [Override("--set", ("lora", "rank"), 3)] if "--set" in arguments else []
    assert load_config(Path("again.yaml"), None, []) == load_config(None, domain, given)


def test_show_says_beside_each_value_where_it_came_from(cli) -> None:
    lines = cli("config", "show", "-d", "cats", "--set", "seed=3").out.splitlines()
    origins = {line.split(":")[0].strip(): line.rpartition("# ")[2] for line in lines if "# " in line}
    expected = {"iters": "configs/base.yaml:3", "learning_rate": "configs/cats.yaml:1", "seed": "--set"}
    assert {key: origins[key] for key in expected} == expected
    assert origins["alpha"] == "default"
    assert "  model: a/b" in "\n".join(lines)


def test_show_as_json_has_an_origin_for_every_value(cli) -> None:
    found = json.loads(cli("config", "show", "-d", "cats", "--json").out)
    assert found["files"] == ["configs/base.yaml", "configs/cats.yaml"]
    assert found["config"] == load_config(None, "cats", []).model_dump(mode="json")
    assert found["origins"]["training.learning_rate"] == "configs/cats.yaml:1"

    def keys(part: dict, above: str = "") -> set[str]:
        return {
            key
            for name, value in part.items()
            for key in (keys(value, f"{above}{name}.") if isinstance(value, dict) else {above + name})
        }

    assert set(found["origins"]) == keys(found["config"])


def test_show_of_a_run_repeats_it(cli) -> None:
    finished(KDConfig(teacher="c/d", iters=7), Path("adapters_kd/cats"))
    ended = cli("config", "show", "--config", "adapters_kd/cats/run.json")
    assert re.search(r"iters: 7 +# adapters_kd/cats/run\.json:\d+\n", ended.out)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-d", "cas"], "domain 'cas': no such domain; did you mean 'cats'? Domains here: cats, dogs."),
        (["-d", "zebra"], "domain 'zebra': no such domain. Domains here: cats, dogs."),
        (["-d", "Cats"], "did you mean 'cats'?"),
        (["-d", "../configs/base"], "not a domain name"),
        (["--set", "lora.rnk=3"], "--set lora.rnk: unknown key; did you mean 'rank'?"),
        (["--config", "nowhere.yaml", "-d", "cats"], "--config 'nowhere.yaml': no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_show_ends_in_one_line(arguments: list[str], says: str, cli) -> None:
    assert says in refused(cli("config", "show", *arguments))


def test_without_a_project_show_says_init(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "`true-kd init`" in refused(cli("config", "show"))
    assert "`true-kd init`" in refused(cli("config", "show", "-d", "cats"))


# diff.


def differing(cli, *arguments: str) -> dict[str, tuple]:
    """Values and origins of the keys that differ."""
    ended = cli("config", "diff", *arguments, "--json")
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)["differences"]
    return {each["key"]: (each["a"], each["b"], each["a_origin"], each["b_origin"]) for each in found}


def test_diff_of_two_domains_shows_what_their_files_change(cli) -> None:
    expected = {"training.learning_rate": (1e-5, 1e-4, "configs/cats.yaml:1", "default")}
    assert differing(cli, "cats", "dogs") == expected
    printed = cli("config", "diff", "cats", "dogs").out.splitlines()
    assert printed == [
        "A: domain cats (configs/cats.yaml over configs/base.yaml)",
        "B: domain dogs (configs/base.yaml)",
        "training.learning_rate",
        "  A  1e-05  # configs/cats.yaml:1",
        "  B  0.0001  # default",
    ]


def test_diff_against_the_defaults_has_every_key_that_was_changed(cli) -> None:
    assert set(differing(cli, "cats")) == {"teacher.model", "training.iters", "training.learning_rate"}


def test_diff_takes_files_and_the_folders_of_runs(cli) -> None:
    finished(load_config(None, "cats", [Override("--iters", ("training", "iters"), 12)]), Path("out/cats"))
    found = differing(cli, "cats", "out/cats")
    assert set(found) == {"training.iters"}
    assert found["training.iters"][:3] == (11, 12, "configs/base.yaml:3")
    assert found["training.iters"][3].startswith("out/cats/run.json:")
    assert differing(cli, "out/cats", "out/cats/run.json") == {}
    assert set(differing(cli, "configs/base.yaml", "configs/cats.yaml")) >= {"teacher.model", "training.learning_rate"}


def test_diff_says_when_nothing_differs(cli) -> None:
    assert cli("config", "diff", "cats", "cats").out.endswith("No key differs.\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["cas"], "'cas': expected a domain, a config file, or the folder of an adapter; did you mean 'cats'?"),
        (["cats", "configs"], "configs: no run.json in it"),
        (["cats", "a\0b"], "not a path"),
        (["configs/bad.yaml"], "configs/bad.yaml:1 sed: unknown key; did you mean 'seed'?"),
    ],
    ids=["typo", "folder", "nul", "bad file"],
)
def test_a_wrong_diff_ends_in_one_line(arguments: list[str], says: str, cli) -> None:
    Path("configs/bad.yaml").write_text("sed: 1\n")
    assert says in refused(cli("config", "diff", *arguments))


def test_diff_works_where_there_is_no_project(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("seed: 5\n")
    assert differing(cli, "mine.yaml") == {"seed": (5, 0, "mine.yaml:1", "default")}
    assert refused(cli("config", "diff", "cats")).endswith("No domains here: check the path, or give --config.")


# Values as YAML.

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**17), 10**17),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda text: "\0" not in text),
    st.sampled_from(
        ["no", "1e-4", "0o7", "12:30", "~", "null", "- a", "a: b", "#x", "x #y", "a/b", "C:\\x", "é", " a "]
    ),
)


@given(st.one_of(scalars, st.lists(scalars, max_size=4)))
def test_a_written_value_reads_as_itself(value: object) -> None:
    text = write_value(value)
    assert "\n" not in text
    read = read_value(text, "here")
    assert (read, str(read)) == (value, str(value))


@pytest.mark.parametrize("word", ["adapters_kd", "auto", "mlx-community/Qwen2.5-7B-Instruct-4bit", "pocket:teacher"])
def test_plain_words_are_written_without_quotes(word: str) -> None:
    assert write_value(word) == word
