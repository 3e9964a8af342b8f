"""Where each value of a config came from: of files, flags and models named in one word."""

from __future__ import annotations

from pathlib import Path

import pytest

from true_kd.config import Override, RunConfig, leaves, load_config, resolve
from true_kd.layers import DEFAULT


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a configs/ in it."""
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    return tmp_path


def origins(base: str, domain: str = "", *overrides: Override) -> dict[str, str]:
    """The origin of every value that is not the default's, by its dotted key."""
    Path("configs/base.yaml").write_text(base)
    Path("configs/cats.yaml").write_text(domain)
    found = resolve(None, "cats", overrides)
    by_key = {".".join(map(str, path)): found.origin(path) for path, _ in leaves(found.config)}
    assert len(by_key) > 50
    return {key: origin for key, origin in by_key.items() if origin != DEFAULT}


def test_without_a_line_every_value_is_the_default() -> None:
    assert origins("") == {}


def test_each_value_has_the_line_of_the_last_layer_that_gives_it() -> None:
    base = "seed: 1\nlosses:\n  alpha: 0.5\n  temperature: 1.0\n"
    found = origins(base, "\nlosses: {alpha: 0.6}\n", Override("--iters", ("training", "iters"), 5))
    assert found == {
        "seed": "configs/base.yaml:1",
        "losses.alpha": "configs/cats.yaml:2",
        "losses.temperature": "configs/base.yaml:4",
        "training.iters": "--iters",
    }


def test_a_value_that_repeats_the_default_came_from_its_line_all_the_same() -> None:
    assert origins(f"seed: {RunConfig().seed}\n") == {"seed": "configs/base.yaml:1"}


def test_of_two_flags_for_one_key_the_last_counts() -> None:
    given = [Override("--iters", ("training", "iters"), 5), Override("--set", ("training", "iters"), 6)]
    assert origins("", "", *given) == {"training.iters": "--set"}


def test_a_list_is_one_value() -> None:
    assert origins("lora:\n  keys:\n    - self_attn.q_proj\n") == {"lora.keys": "configs/base.yaml:2"}


def test_a_model_named_in_one_word_gives_its_name_alone() -> None:
    assert origins("teacher: a/b\n") == {"teacher.model": "configs/base.yaml:1"}
    assert origins("", "", Override("--teacher", ("teacher",), "a/b")) == {"teacher.model": "--teacher"}


def test_another_model_takes_back_the_revision_of_the_one_before_and_nothing_else() -> None:
    base = "teacher:\n  model: a/b\n  revision: x\n  dequantize: never\n"
    expected = {"teacher.model": "configs/cats.yaml:1", "teacher.revision": "configs/cats.yaml:1"}
    assert origins(base, "teacher: c/d\n") == {**expected, "teacher.dequantize": "configs/base.yaml:4"}
    again = origins(base, "teacher: c/d\n", Override("--set", ("teacher", "revision"), "y"))
    assert again["teacher.revision"] == "--set"


def test_leaves_are_the_whole_config_as_plain_data() -> None:
    Path("configs/base.yaml").write_text("lora: {keys: [a, b]}\n")
    config = load_config(None, None, [])
    again: dict = {}
    for path, value in leaves(config):
        group = again
        for key in path[:-1]:
            group = group.setdefault(key, {})
        group[path[-1]] = value
    assert again == config.model_dump(mode="json")
