"""An adapter is found with what it was trained with, or one line says what is there instead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_adapters import KINDS, adapt, opened, save

from true_kd.config import KDConfig, Override
from true_kd.errors import ConfigError, InputError, PromptError
from true_kd.finding import FoundAdapter, domains_in, find_domain, find_folder, output_folder, system_message
from true_kd.models import LoraOptions


def lay_run(
    out: Path, domain: str, teacher: Path, student: Path, options: LoraOptions = KINDS["lora"], **settings: Any
) -> Path:
    """What a run leaves of a domain in an output folder: a random adapter and its config."""
    folder = save(out / domain, adapt(opened(student), options), options, student)
    config = KDConfig(teacher=str(teacher), student=str(student), lora=options, domains=(domain,), **settings)
    (folder / "run.json").write_text(json.dumps(config.model_dump(mode="json")))
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> Path:
    """An output folder with the domains cats and dogs."""
    out = tmp_path_factory.mktemp("found") / "out"
    lay_run(out, "cats", teacher_folder, student_folder, seed=7)
    shutil.copytree(out / "cats", out / "dogs")
    return out


@pytest.fixture
def out(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it in the current folder, where it has the default's name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(original, tmp_path / "adapters_kd")
    return Path("adapters_kd")


def refused(kind: type[InputError], call: Any, *arguments: Any, **options: Any) -> str:
    """The one line in which a call is refused."""
    with pytest.raises(kind) as caught:
        call(*arguments, **options)
    [line] = str(caught.value).splitlines()
    assert caught.value.exit_code == 2
    return line


# Domains


def test_a_domain_is_found_with_the_config_of_its_run(out: Path, student_folder: Path) -> None:
    found = find_domain("cats", str(out))
    assert (found.folder, found.domain) == (out / "cats", "cats")
    assert (found.config.seed, found.config.student.model) == (7, str(student_folder))


def test_without_out_the_base_config_says_where(out: Path) -> None:
    assert find_domain("dogs").folder == out / "dogs", "the default, where there is no config"
    out.rename("elsewhere")
    Path("configs").mkdir()
    Path("configs/base.yaml").write_text("out: elsewhere\n")
    assert find_domain("dogs").folder == Path("elsewhere/dogs")
    Path("other.yaml").write_text("out: nowhere\n")
    assert output_folder(None, Path("other.yaml")) == Path("nowhere")
    assert output_folder("~", Path("other.yaml")) == Path.home(), "what is given comes first"


def test_a_config_that_is_named_or_there_must_be_one(out: Path) -> None:
    assert "nothing.yaml" in refused(ConfigError, find_domain, "cats", None, Path("nothing.yaml"))
    Path("configs").mkdir()
    Path("configs/base.yaml").write_text("outt: elsewhere\n")
    assert "did you mean 'out'" in refused(ConfigError, find_domain, "cats")


def test_values_of_the_run_can_be_changed(out: Path) -> None:
    moved = find_domain("cats", str(out), None, [Override("--student", ("student",), "elsewhere/student")])
    assert moved.config.student.model == "elsewhere/student"
    assert moved.config.seed == 7


def test_an_unknown_domain_is_answered_with_those_that_are_there(out: Path) -> None:
    line = refused(InputError, find_domain, "cat", str(out))
    assert line.startswith("adapters_kd/cat: no such folder, expected an adapter; did you mean 'cats'?")
    assert line.endswith("Domains here: cats, dogs.")
    assert domains_in(out) == ["cats", "dogs"]


def test_where_there_is_nothing_the_way_to_an_adapter_is_told(tmp_path: Path) -> None:
    assert domains_in(tmp_path / "none") == []
    line = refused(InputError, find_domain, "cats", str(tmp_path))
    assert line.endswith("Run `true-kd distill --domain cats`, or give --out.")


def test_a_long_list_of_domains_is_cut(out: Path) -> None:
    for number in range(20):
        shutil.copytree(out / "cats", out / f"d{number:02}")
    line = refused(InputError, find_domain, "zebras", str(out))
    assert line.endswith("Domains here: cats, d00, d01, d02, d03, d04, d05, d06, d07, d08, d09, d10 and 10 more.")


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json"])
def test_a_folder_without_all_of_an_adapter_has_none(name: str, out: Path) -> None:
    (out / "cats" / name).unlink()
    assert f"adapters_kd/cats: no {name} in it" in refused(InputError, find_domain, "cats", str(out))
    assert domains_in(out) == ["dogs"]


def test_without_the_config_of_the_run_the_folder_can_still_be_named(out: Path, student_folder: Path) -> None:
    (out / "cats" / "run.json").unlink()
    assert "Give --adapter adapters_kd/cats instead." in refused(InputError, find_domain, "cats", str(out))
    found = find_folder("adapters_kd/cats")
    assert (found.domain, found.config.student.model) == (None, str(student_folder))


def test_a_damaged_config_of_the_run_is_named(out: Path) -> None:
    (out / "cats" / "run.json").write_text('{"seed": "many"}')
    assert "run.json:1" in refused(ConfigError, find_domain, "cats", str(out))


@pytest.mark.parametrize("name", ["../cats", "Cats", "", "cats/../dogs", "a b"])
def test_a_name_that_no_domain_has_reaches_no_folder(name: str, out: Path) -> None:
    refused(PromptError, find_domain, name, str(out))


# Folders


def test_the_folder_of_a_domain_brings_its_config_and_domain(out: Path) -> None:
    assert find_folder("adapters_kd/cats") == find_domain("cats", str(out))
    moved = find_folder("adapters_kd/cats", teacher="a/teacher", student="a/student")
    assert (moved.config.teacher.model, moved.config.student.model) == ("a/teacher", "a/student")


def test_a_checkpoint_and_a_control_bring_the_config_of_their_run(out: Path) -> None:
    for name, run in (("checkpoint_20", False), ("control_sft", True)):
        folder = out / "cats" / name
        folder.mkdir()
        for file in ("adapters.safetensors", "adapter_config.json", *(["run.json"] if run else [])):
            shutil.copy(out / "cats" / file, folder)
        found = find_folder(str(folder))
        assert (found.folder, found.domain, found.config.seed) == (folder, "cats", 7)


def test_an_adapter_of_mlx_lm_brings_its_model(out: Path) -> None:
    (out / "cats" / "run.json").unlink()
    (out / "cats" / "adapter_config.json").write_text('{"model": "some/student"}')
    found = find_folder("adapters_kd/cats")
    assert (found.domain, found.config.student.model) == (None, "some/student")
    other = find_folder("adapters_kd/cats", "a/teacher", "another/student")
    assert (other.config.teacher.model, other.config.student.model) == ("a/teacher", "another/student")


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"model": 3}', '{"model": ""}'])
def test_an_adapter_that_names_no_model_needs_one(content: str, out: Path) -> None:
    (out / "cats" / "run.json").unlink()
    (out / "cats" / "adapter_config.json").write_text(content)
    assert refused(InputError, find_folder, "adapters_kd/cats").endswith("Give --student MODEL.")
    assert find_folder("adapters_kd/cats", student="a/student").config.student.model == "a/student"


@pytest.mark.parametrize("name", ["adapters_kd", "nowhere", "adapters_kd/cats/run.json", "nul\0"])
def test_a_folder_without_an_adapter_is_refused(name: str, out: Path) -> None:
    assert refused(InputError, find_folder, name).startswith("--adapter ")


# System messages


def test_the_system_message_is_that_of_the_domain(out: Path, tmp_path: Path) -> None:
    config = KDConfig(prompts=str(tmp_path / "prompts"))
    found = FoundAdapter(out / "cats", config, "cats")
    assert system_message(found) is None, "its prompts are not here"
    folder = tmp_path / "prompts" / "cats"
    folder.mkdir(parents=True)
    (folder / "system.md").write_text("Be brief.\nBe kind.\n")
    assert system_message(found) == "Be brief.\nBe kind."
    assert system_message(FoundAdapter(out / "cats", config, None)) is None
    (folder / "system.md").write_bytes(b"\xff")
    assert "system.md:1" in refused(PromptError, system_message, found)


def test_pocket_prompts_are_looked_up_where_they_lie() -> None:
    assert system_message(FoundAdapter(Path("x"), KDConfig(prompts="pocket:prompts"), "reflection")) is None
