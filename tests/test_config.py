"""One config from class defaults, base file, domain file and command line; and where a fault is said to stand."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from true_kd.cli import running
from true_kd.config import SHORT_NAMES, KDConfig, NoConfigs, Override, RunConfig, describe_key, load_config
from true_kd.errors import ConfigError
from true_kd.losses import LossOptions
from true_kd.models import ModelOptions
from true_kd.validation import parse_override
from true_kd.yaml_file import KeyPath, read_yaml

ROOT = Path(__file__).parents[1]
DOMAINS = ("action", "debug", "memory", "reflection", "task", "thinking")
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
RUN_WIDE = {"domains": "[cats]", "prompts": "elsewhere", "out": "elsewhere", "cache": "elsewhere", "fresh": "true"}

DEFAULTS = {
    "losses.temperature": 2.0,
    "losses.alpha": 0.7,
    "training.iters": 200,
    "training.learning_rate": 1e-4,
    "out": "adapters_kd",
    "teacher.model": "mlx-community/Qwen2.5-7B-Instruct-4bit",
    "student.model": "mlx-community/Qwen2.5-3B-Instruct-4bit",
    "prompts": "prompts",
    "vocab_strategy": "auto",
    "seed": 0,
    "fresh": False,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with an empty configs/base.yaml."""
    monkeypatch.chdir(tmp_path)
    write(base="")
    return tmp_path


def write(**files: str) -> None:
    """Write configs/<name>.yaml for each keyword."""
    Path("configs").mkdir(exist_ok=True)
    for name, text in files.items():
        Path("configs", f"{name}.yaml").write_text(text)


def at(options: Any, path: KeyPath) -> Any:
    """The value behind a key path."""
    for key in path:
        options = getattr(options, str(key))
    return options


def leaves(data: Mapping[str, Any], before: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every key path of a config file, with its value."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*before, key))
        elif key in ("teacher", "student"):
            yield (*before, key, "model"), value
        else:
            yield (*before, key), value


def problems(domain: str | None = None, *overrides: Override) -> list[str]:
    """The lines that loading the config is refused with."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, domain, overrides)
    return list(caught.value.lines)


# What ships.


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_config_is_a_config(file: Path) -> None:
    data = read_yaml(file).data
    config = load_config(file, None, [])
    assert data
    assert all(at(config, path) == value for path, value in leaves(data))


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_config_of_each_domain_has_the_values_of_its_own_file(domain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stated = dict(leaves(read_yaml(Path("configs", f"{domain}.yaml")).data))
    config = load_config(None, domain, [])
    assert stated
    assert {path: at(config, path) for path in stated} == stated


def test_the_shipped_base_file_repeats_defaults_and_never_changes_one() -> None:
    stated = dict(leaves(read_yaml(ROOT / "configs" / "base.yaml").data))
    assert stated == {path: at(RunConfig(), path) for path in stated}


@pytest.mark.parametrize(("key", "value"), DEFAULTS.items(), ids=DEFAULTS)
def test_an_empty_base_file_gives_the_documented_default(key: str, value: Any, folder: Path) -> None:
    found = at(load_config(None, None, []), tuple(key.split(".")))
    assert (found, type(found)) == (value, type(value))


def test_no_shipped_domain_file_states_what_it_gets_anyway() -> None:
    base = load_config(ROOT / "configs" / "base.yaml", None, [])
    files = {domain: read_yaml(ROOT / "configs" / f"{domain}.yaml").data for domain in DOMAINS}
    repeated = [
        (domain, path) for domain, data in files.items() for path, value in leaves(data) if at(base, path) == value
    ]
    assert repeated == []


# Bounds.


@pytest.mark.parametrize(
    ("key", "inside", "outside"),
    [
        ("losses.temperature", (0.5, 1, 10.0), (0.49, 10.01, 0, -2.0)),
        ("losses.alpha", (0, 0.0, 1, 1.0), (-0.01, 1.01)),
        ("training.iters", (1, 10_000), (0, -1, 1.5)),
        ("training.learning_rate", (1e-6, 1), (0, -1e-4, 1.01)),
        ("training.batch_size", (1,), (0,)),
        ("training.max_seq_length", (8,), (0,)),
        ("training.patience", (1, 50, None), (0, -1, 1.5)),
        ("training.accumulate", (1, 8), (0, -1)),
        ("training.compile", ("auto", "always", "never"), ("on", "", "Auto")),
        ("losses.divergence", ("forward_kl", "reverse_kl", "total_variation"), ("KL", "", "forward-kl")),
        ("losses.temperature_end", (0.5, 10, None), (0.49, 10.01)),
        ("losses.alpha_end", (0, 1, None), (-0.01, 1.01)),
        ("losses.beta", (0.01, 0.99), (0, 1)),
        ("losses.skew", (0.01, 0.99), (0, 1)),
        ("losses.weigh_by", ("none", "entropy", "certainty", "reward"), ("loss", "")),
        ("memory_gb", (0.001, 1, 512.0, None), (0, -1)),
        ("targets.threshold", (0.001, 0.5, None), (0.0009, 0.51)),
        ("targets.draw_temperature", (1.0, 2, 4.0, None), (0.5, 3.0, 8.0)),
        ("targets.preset", ("tiny", "default", "hot", "exact"), ("Tiny", "small", "")),
        ("targets.share", (0.01, 1), (0, 1.01)),
        ("targets.bytes_per_token", (4, 64.5, None), (3.9, -1)),
        ("targets.gigabytes", (0.001, 2, None), (0, -1)),
        ("fidelity.tokens", (1,), (0,)),
        ("fidelity.least_cosine", (0, 1), (-0.1, 1.1)),
        ("fidelity.when_poor", ("refuse", "warn"), ("ignore", "")),
        ("lora.rank", (1,), (0,)),
        ("seed", (0, 2**31 - 1), (-1, 2**31)),
        ("out", ("x",), ("",)),
        ("vocab_strategy", ("auto", "match", "align", "uld", "truncate", "project"), ("Match", "pad", "")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_within_their_bounds_are_taken_and_all_others_refused(
    key: str, inside: tuple, outside: tuple, folder: Path
) -> None:
    path = tuple(key.split("."))
    for value in inside:
        assert at(load_config(None, None, [Override("--set", path, value)]), path) == value
    for value in outside:
        [line] = problems(None, Override("--set", path, value))
        assert line.startswith(f"--set {key}: {value!r}, expected ")


@pytest.mark.parametrize(("key", "value"), [("training.max_seq_length", 7), ("losses.chunk", 15)])
def test_a_bound_that_is_stricter_than_that_of_the_type_holds(key: str, value: int, folder: Path) -> None:
    assert problems(None, Override("--set", tuple(key.split(".")), value))


def test_zero_adapted_layers_are_refused(folder: Path) -> None:
    assert problems(None, Override("--set", ("lora", "num_layers"), 0))


@pytest.mark.parametrize("key", ["prompts", "cache"])
def test_an_empty_folder_name_is_refused(key: str, folder: Path) -> None:
    assert problems(None, Override("--set", (key,), ""))


@pytest.mark.parametrize("word", ["auto", "always", "never"])
def test_each_word_of_a_choice_can_be_written_without_quotes(word: str, folder: Path) -> None:
    write(base=f"teacher: {{model: a/b, dequantize: {word}}}\n")
    assert load_config(None, None, []).teacher.dequantize == word


# Precedence.


@pytest.mark.parametrize(
    ("base", "domain", "flags", "expected"),
    [
        ("", "", [], 200),
        ("training: {iters: 11}", "", [], 11),
        ("training: {iters: 11}", "training: {iters: 12}", [], 12),
        ("training: {iters: 11}", "training: {iters: 12}", ["--iters"], 13),
        ("training: {iters: 11}", "training: {iters: 12}", ["--iters", "--set"], 14),
        ("training: {iters: 11}", "", ["--iters"], 13),
        ("", "training: {iters: 12}", [], 12),
    ],
)
def test_default_gives_way_to_base_to_domain_to_flag_to_set(
    base: str, domain: str, flags: list[str], expected: int, folder: Path
) -> None:
    write(base=base, cats=domain)
    values = {"--iters": 13, "--set": 14}
    overrides = [Override(flag, ("training", "iters"), values[flag]) for flag in flags]
    assert load_config(None, "cats", overrides).training.iters == expected


def test_a_layer_changes_only_the_keys_it_names(folder: Path) -> None:
    write(base="losses: {temperature: 3.0, alpha: 0.2}\nseed: 5", cats="losses: {alpha: 0.4}\n")
    config = load_config(None, "cats", [Override("--set", ("losses", "chunk"), 99)])
    assert (config.losses.temperature, config.losses.alpha, config.losses.chunk, config.seed) == (3.0, 0.4, 99, 5)


def test_a_domain_file_is_read_for_its_own_domain_alone(folder: Path) -> None:
    write(cats="seed: 7\n")
    assert load_config(None, "dogs", []).seed == 0
    assert load_config(None, None, []).seed == 0


def test_a_domain_without_a_file_has_the_base_config(folder: Path) -> None:
    write(base="seed: 3\n")
    assert load_config(None, "cats", []) == load_config(None, None, [])


def test_the_domain_file_lies_beside_the_base_file_that_was_given(folder: Path) -> None:
    write(cats="seed: 1\n")
    other = folder / "other"
    other.mkdir()
    (other / "mine.yaml").write_text("out: here\n")
    (other / "cats.yaml").write_text("seed: 2\n")
    config = load_config(other / "mine.yaml", "cats", [])
    assert (config.out, config.seed) == ("here", 2)


def test_a_domain_called_like_the_base_file_may_still_set_run_wide_keys_in_it(folder: Path) -> None:
    write(base="out: here\n")
    assert load_config(None, "base", []).out == "here"


def test_a_model_may_be_a_name_in_one_layer_and_a_mapping_in_another(folder: Path) -> None:
    write(base="teacher: a/b\n", cats="teacher: {revision: main}\n")
    assert load_config(None, "cats", []).teacher == ModelOptions(model="a/b", revision="main")


@pytest.mark.parametrize("seam", ["teacher", "student"])
def test_another_model_does_not_get_the_revision_of_the_one_before(seam: str, folder: Path) -> None:
    write(base=f"{seam}: {{model: a/b, revision: x, dequantize: never}}\n", cats=f"{seam}: c/d\n")
    named = Override(f"--{seam}", (seam,), "e/f")
    assert at(load_config(None, "cats", []), (seam,)) == ModelOptions(model="c/d", dequantize="never")
    assert at(load_config(None, None, [named]), (seam,)) == ModelOptions(model="e/f", dequantize="never")
    refined = load_config(None, None, [named, Override("--set", (seam, "revision"), "y")])
    assert at(refined, (seam,)) == ModelOptions(model="e/f", revision="y", dequantize="never")


@pytest.mark.parametrize("seam", ["teacher", "student"])
def test_a_key_below_a_model_leaves_its_default_name(seam: str, folder: Path) -> None:
    default = DEFAULTS[f"{seam}.model"]
    config = load_config(None, None, [Override("--set", (seam, "revision"), "main")])
    assert at(config, (seam,)) == ModelOptions(model=default, revision="main")
    write(base=f"{seam}: {{revision: main}}\n")
    assert at(load_config(None, None, []), (seam,)) == ModelOptions(model=default, revision="main")


def test_a_domain_file_with_the_other_suffix_is_not_passed_over(folder: Path) -> None:
    Path("configs/cats.yml").write_text("seed: 1\n")
    assert problems("cats") == ["configs/cats.yml: not read, expected cats.yaml. Rename it."]


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_set_takes_a_model_by_name_as_the_file_does(key: str, folder: Path) -> None:
    path, value = parse_override(f"{key}=a/b")
    assert at(load_config(None, None, [Override("--set", path, value)]), (key, "model")) == "a/b"


def test_a_small_learning_rate_may_be_written_as_people_write_it(folder: Path) -> None:
    write(base="training: {learning_rate: 1e-5}\n")
    assert load_config(None, None, []).training.learning_rate == 1e-5


# Messages.


def test_an_unknown_key_is_refused_with_file_line_and_the_key_that_was_meant(folder: Path) -> None:
    write(base="seed: 0\nlosses:\n  alpha: 0.5\n  temprature: 3\n")
    assert problems() == ["configs/base.yaml:4 losses.temprature: unknown key; did you mean 'temperature'?"]


@pytest.mark.parametrize(
    ("text", "line", "meant"),
    [
        ("temperature: 3\n", 1, "losses.temperature"),
        ("seed: 1\nlearning_rate: 1e-4\n", 2, "training.learning_rate"),
        ("\n\nteachr: a/b\n", 3, "teacher"),
        ("lora:\n  Rank: 8\n", 2, "rank"),
        ("# a comment\ntraining:\n  itres: 5\n", 3, "iters"),
        ("batch_size: 8\n", 1, "training.batch_size"),
        ("batch_sise: 8\n", 1, "training.batch_size"),
        ("lora: {iters: 8}\n", 1, "training.iters"),
    ],
)
def test_a_misplaced_or_misspelled_key_leads_to_the_right_one(text: str, line: int, meant: str, folder: Path) -> None:
    write(cats=text)
    [problem] = problems("cats")
    assert problem.startswith(f"configs/cats.yaml:{line} ")
    assert problem.endswith(f"unknown key; did you mean '{meant}'?")


@pytest.mark.parametrize("name", sorted(name for name, path in SHORT_NAMES.items() if path != (name,)))
def test_a_short_name_in_a_file_leads_to_its_key(name: str, folder: Path) -> None:
    write(base=f"{name}: 1\n")
    meant = ".".join(map(str, SHORT_NAMES[name]))
    assert problems() == [f"configs/base.yaml:1 {name}: unknown key; did you mean '{meant}'?"]


@pytest.mark.parametrize("name", ["alpha", "lora_alpha"])
def test_the_alpha_of_other_tools_leads_to_the_scale_of_the_adapter(name: str, folder: Path) -> None:
    write(base=f"lora: {{{name}: 16}}\n")
    assert problems() == [f"configs/base.yaml:1 lora.{name}: unknown key; did you mean 'scale'? scale = {name} / rank."]


def test_a_fault_of_the_base_file_is_placed_there_even_for_a_domain_with_a_file(folder: Path) -> None:
    write(base="losses:\n  alpha: 3\n", cats="losses:\n  temperature: 1\n")
    assert problems("cats") == ["configs/base.yaml:2 losses.alpha: 3, expected a number at most 1."]


def test_the_layer_that_won_is_the_one_that_is_blamed(folder: Path) -> None:
    write(base="losses: {alpha: 3}\n", cats="\nlosses: {alpha: 4}\n")
    assert problems("cats")[0].startswith("configs/cats.yaml:2 losses.alpha: 4,")
    assert problems("cats", Override("--alpha", ("losses", "alpha"), 5.0))[0].startswith("--alpha losses.alpha: 5.0,")


def test_all_faults_of_all_layers_come_at_once(folder: Path) -> None:
    write(base="seed: -1\nlora: {rnk: 3}\n", cats="training: {iters: 0}\n")
    found = problems("cats", Override("--alpha", ("losses", "alpha"), 2.0))
    places = {line.split(" ")[0] for line in found}
    assert places == {"configs/base.yaml:1", "configs/base.yaml:2", "configs/cats.yaml:1", "--alpha"}
    assert len(found) == 4


@pytest.mark.parametrize(("key", "value"), RUN_WIDE.items(), ids=RUN_WIDE)
def test_a_key_of_the_whole_run_is_refused_in_a_domain_file(key: str, value: str, folder: Path) -> None:
    write(base=f"{key}: {value}\n", cats=f"seed: 1\n{key}: {value}\n")
    [line] = problems("cats")
    assert line.startswith(f"configs/cats.yaml:2 {key}: holds for a whole run")
    assert "Move it to base.yaml" in line
    assert load_config(None, "dogs", []) is not None


def test_without_configs_one_line_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoConfigs) as caught:
        load_config(None, None, [])
    [line] = str(caught.value).splitlines()
    assert line.startswith("configs/base.yaml: not found here, expected configs/ and prompts/ in the current folder.")
    assert "`true-kd init`" in line


def test_a_base_file_that_was_named_and_is_not_there_is_named_in_the_message(folder: Path) -> None:
    with pytest.raises(NoConfigs, match=r"^--config 'other\.yaml': no such file, expected a YAML file"):
        load_config(Path("other.yaml"), None, [])


def test_a_value_where_a_group_of_keys_belongs_is_refused(folder: Path) -> None:
    assert problems(None, Override("--set", ("losses",), 3)) == ["--set losses: 3, expected a mapping of keys."]
    found = problems(None, Override("--set", ("seed",), 3), Override("--set", ("seed", "deeper"), 3))
    assert found == ["--set: seed is 3, expected a mapping that can hold 'deeper'."]


# Short names.


def value_at(config: RunConfig, path: KeyPath) -> Any:
    """The value that a short name stands for: of a model, its name."""
    found = at(config, path)
    return found.model if isinstance(found, ModelOptions) else found


def test_every_flag_is_the_short_name_of_a_key_that_exists() -> None:
    flags = set(inspect.signature(running.distill).parameters) - {"domain", "everything", "config", "sets", "as_json"}
    assert flags == set(SHORT_NAMES)
    assert all(at(RunConfig(), path) is not ... for path in SHORT_NAMES.values())


@pytest.mark.parametrize(("name", "path"), SHORT_NAMES.items(), ids=SHORT_NAMES)
def test_the_help_of_a_short_name_says_what_it_means_and_its_default(name: str, path: KeyPath) -> None:
    text = describe_key(path)
    meaning, _, default = text.partition(" [")
    assert len(meaning) > 10
    value = value_at(RunConfig(), path)
    assert default.endswith(f"default: {'none' if value == () else value}]")


def test_the_help_of_a_bounded_value_shows_its_bounds() -> None:
    assert describe_key(SHORT_NAMES["temperature"]).endswith("[0.5 to 10, default: 2.0]")
    assert describe_key(SHORT_NAMES["alpha"]).endswith("[0 to 1, default: 0.7]")


# The config for Python.


def test_a_python_config_without_arguments_has_the_same_defaults() -> None:
    assert KDConfig().model_dump() == RunConfig().model_dump()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("teacher", "a/b"),
        ("student", "c/d"),
        ("temperature", 3.5),
        ("alpha", 0.25),
        ("iters", 17),
        ("learning_rate", 3e-5),
        ("batch_size", 2),
        ("max_seq_length", 128),
        ("rank", 4),
        ("out", "here"),
        ("prompts", "there"),
        ("vocab_strategy", "project"),
        ("seed", 9),
        ("fresh", True),
    ],
)
def test_a_python_config_takes_each_short_name(name: str, value: Any) -> None:
    assert value_at(KDConfig(**{name: value}), SHORT_NAMES[name]) == value


@pytest.mark.parametrize("teacher", ["a/b", {"model": "a/b"}, ModelOptions(model="a/b")], ids=["name", "dict", "class"])
def test_a_python_config_takes_a_model_in_any_form(teacher: Any) -> None:
    assert KDConfig(teacher=teacher).teacher == ModelOptions(model="a/b")


def test_a_python_config_says_what_an_unknown_name_was_meant_to_be() -> None:
    with pytest.raises(ConfigError, match=r"temprature: unknown key; did you mean 'losses\.temperature'\?$"):
        KDConfig(temprature=3)


@pytest.mark.parametrize("value", [True, "3", None, 0.4, float("nan"), float("inf"), [2.0]])
def test_a_python_config_refuses_what_is_no_temperature(value: Any) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        KDConfig(temperature=value)


def test_a_python_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        KDConfig().seed = 3


def test_group_first_and_short_name_second_are_both_kept() -> None:
    assert KDConfig(losses=LossOptions(alpha=0.5), temperature=3.0).losses == LossOptions(alpha=0.5, temperature=3.0)


def test_short_name_first_and_group_second_are_both_kept() -> None:
    assert KDConfig(temperature=3.0, losses={"alpha": 0.5}).losses == LossOptions(alpha=0.5, temperature=3.0)


def test_a_dict_that_was_given_to_a_python_config_stays_as_it_was() -> None:
    given = {"alpha": 0.5}
    KDConfig(losses=given, temperature=3.0)
    assert given == {"alpha": 0.5}


def test_a_resolved_config_is_itself_a_config(folder: Path) -> None:
    config = KDConfig(temperature=3.0, teacher="a/b", rank=3, learning_rate=3e-7, seed=2**31 - 1)
    saved = folder / "run.json"
    saved.write_text(json.dumps(config.model_dump(mode="json"), indent=2))
    assert load_config(saved, None, []).model_dump() == config.model_dump()
