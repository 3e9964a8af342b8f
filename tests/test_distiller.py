"""The Python API: prompts as strings or records, options by short names, and every domain done that can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import true_kd
from true_kd import KDConfig, KDResult, TrueKnowledgeDistiller
from true_kd.cache import TargetCache
from true_kd.capture import TeacherPrompt, render_for, teacher_identity
from true_kd.config import RunConfig
from true_kd.distiller import DistillationFailed
from true_kd.errors import ConfigError, InputError, PoorTargetsError, PromptError, TrueKDError
from true_kd.models import LanguageModel
from true_kd.prompts import from_records

STRINGS = [f"say hello to {count} cats" for count in range(4)]
RECORDS = [{"prompt": prompt, "completion": "the cat sat"} for prompt in STRINGS]
LONG = ["the cat sat on the mat " * 20, "hello to the world " * 20]


@pytest.fixture
def config(tmp_path: Path) -> KDConfig:
    return KDConfig(
        iters=2,
        learning_rate=0.01,
        rank=2,
        max_seq_length=60,
        out=str(tmp_path / "out"),
        capture={"max_tokens": 4},
        # Three seconds a process; tests/test_apart.py is where they are apart.
        isolate=False,
    )


@pytest.fixture
def distiller(teacher_folder: Path, student_folder: Path, config: KDConfig) -> TrueKnowledgeDistiller:
    return TrueKnowledgeDistiller(str(teacher_folder), str(student_folder), config)


# The names


def test_every_public_name_can_be_imported() -> None:
    for name in true_kd.__all__:
        assert getattr(true_kd, name).__name__ == name


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="TrueDistiller"):
        _ = true_kd.TrueDistiller


# One domain


def test_strings_are_distilled(distiller: TrueKnowledgeDistiller, tmp_path: Path) -> None:
    result = distiller.distill_domain("greetings", STRINGS, ["say hello to the mat"])
    assert isinstance(result, KDResult)
    assert result.adapter_path == str(tmp_path / "out" / "greetings")
    assert (result.data.train_examples, result.data.valid_examples) == (4, 1)
    assert len(result.steps) == 2
    assert (tmp_path / "out" / "greetings" / "adapters.safetensors").is_file()


def test_records_are_distilled(distiller: TrueKnowledgeDistiller) -> None:
    result = distiller.distill_domain("greetings", RECORDS, [{**RECORDS[0], "answer": "the cat sat"}])
    assert result.data.train_examples == 4
    assert result.proof.teacher.exact_match is None, "the data wrote the reply, not the teacher"


def test_a_tenth_is_held_out_where_no_validation_prompts_are_given(distiller: TrueKnowledgeDistiller) -> None:
    data = distiller.distill_domain("greetings", RECORDS * 5).data
    assert (data.train_examples, data.valid_examples) == (18, 2)


def test_prompts_are_read_from_the_folder_where_none_are_given(
    teacher_folder: Path, student_folder: Path, config: KDConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "prompts" / "greetings"
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("\n".join(STRINGS))
    (folder / "valid.txt").write_text("say hello\nsaid hello\n")
    config = config.model_copy(update={"prompts": str(tmp_path / "prompts")})
    distiller = TrueKnowledgeDistiller(str(teacher_folder), str(student_folder), config)
    data = distiller.distill_domain("greetings").data
    assert (data.train_examples, data.valid_examples) == (4, 2)


def test_a_finished_domain_is_not_done_again(distiller: TrueKnowledgeDistiller) -> None:
    first = distiller.distill_domain("greetings", STRINGS)
    again = distiller.distill_domain("greetings", STRINGS)
    assert (first.unchanged, again.unchanged) == (False, True)
    assert again.after == first.after


def test_the_models_of_the_config_are_taken_where_none_are_named(
    teacher_folder: Path, student_folder: Path, tmp_path: Path
) -> None:
    config = KDConfig(teacher=str(teacher_folder), student=str(student_folder), out=str(tmp_path))
    assert TrueKnowledgeDistiller(config=config).config == config
    assert TrueKnowledgeDistiller("other", config=config).config.teacher.model == "other"
    assert TrueKnowledgeDistiller("other", config=config).config.student.model == str(student_folder)


def test_the_configs_other_settings_of_a_model_are_kept() -> None:
    config = KDConfig(student={"model": "some/student", "dequantize": "never"})
    found = TrueKnowledgeDistiller(student_model_id="another/student", config=config).config.student
    assert (found.model, found.dequantize) == ("another/student", "never")


def test_a_domain_that_fails_raises_its_own_error(distiller: TrueKnowledgeDistiller) -> None:
    with pytest.raises(InputError, match="max_seq_length=60"):
        distiller.distill_domain("greetings", LONG)


@pytest.mark.parametrize("name", ["", "..", "a/b", "Upper", "/tmp/x"])
def test_a_domain_cannot_lie_elsewhere(distiller: TrueKnowledgeDistiller, name: str) -> None:
    with pytest.raises(PromptError, match="not a domain name"):
        distiller.distill_domain(name, STRINGS)


def test_a_missing_model_is_an_error(config: KDConfig) -> None:
    with pytest.raises(TrueKDError, match=r"teacher './nowhere'"):
        TrueKnowledgeDistiller("./nowhere", "./nowhere either", config).distill_domain("greetings", STRINGS)


@pytest.mark.parametrize(
    ("prompts", "what"),
    [
        ([], "empty"),
        (["one"], "two or more"),
        ([""], r"train_prompts\[0\]"),
        ([{"promt": "hi"}, {"prompt": "hi"}], r"train_prompts\[0\].*prompt"),
        pytest.param("hello", "expected a list"),
        pytest.param(["hello", {"prompt": "hi"}], r"train_prompts\[\d\]"),
        pytest.param([3, 4], r"train_prompts\[0\]"),
    ],
    ids=["none", "one", "an empty string", "unknown key", "a string", "a mixture", "numbers"],
)
def test_prompts_that_are_none_are_refused(distiller: TrueKnowledgeDistiller, prompts: Any, what: str) -> None:
    with pytest.raises(PromptError, match=what):
        distiller.distill_domain("greetings", prompts)


def test_bad_validation_prompts_are_named_as_such(distiller: TrueKnowledgeDistiller) -> None:
    with pytest.raises(PromptError, match=r"valid_prompts\[1\]"):
        distiller.distill_domain("greetings", STRINGS, ["hi", ""])


def test_poor_targets_are_an_error_of_their_own(distiller: TrueKnowledgeDistiller) -> None:
    changes = {"targets": {"preset": "tiny"}, "temperature": 4.0, "max_seq_length": 256}
    poor = TrueKnowledgeDistiller(config=KDConfig(**{**distiller.config.model_dump(mode="json"), **changes}))
    long = [{**record, "completion": "the cat sat on the mat and said hello " * 4} for record in RECORDS * 3]
    with pytest.raises(PoorTargetsError, match="cosine") as refusal:
        poor.distill_domain("greetings", RECORDS, long)
    assert isinstance(refusal.value, InputError)


def test_the_result_has_the_certificate_of_its_targets(distiller: TrueKnowledgeDistiller) -> None:
    result = distiller.distill_domain("greetings", STRINGS)
    assert result.fidelity.temperature == 2.0
    assert result.fidelity.tokens == result.before.tokens
    assert distiller.distill_domain("greetings", STRINGS).fidelity == result.fidelity


def test_a_share_of_the_tokens_trains_those_that_the_teacher_is_least_sure_of(
    distiller: TrueKnowledgeDistiller, teacher: LanguageModel, tmp_path: Path
) -> None:
    changes = {"targets": {"share": 0.3, "threshold": 0.001}, "batch_size": 8, "cache": str(tmp_path / "cache")}
    config = KDConfig(**{**distiller.config.model_dump(mode="json"), **changes})
    records = [{"prompt": f"say {word}", "completion": "the cat sat on the mat"} for word in ("hello", "cat", "mat")]
    prompts = from_records([*records, *records])
    result = TrueKnowledgeDistiller(config=config).distill_domain("greetings", records, records)
    asked = render_for(teacher, prompts[:3], config.capture)
    lengths = [len(item.rendered.response) for item in asked]
    written = json.loads((tmp_path / "out" / "greetings" / "kd_metrics.json").read_text())
    assert written["result"]["data"]["train_response_tokens"] == sum(round(0.3 * length) for length in lengths)
    assert written["curves"]["response_tokens"] == [sum(round(0.3 * length) for length in lengths)] * 2
    assert written["result"]["before"]["tokens"] == result.before.tokens == result.data.train_response_tokens
    assert written["result"]["data"]["cache_tokens"] == sum(lengths)
    replies = TargetCache(tmp_path / "cache", teacher_identity(teacher, config.targets.settings)).read(
        [item.key for item in asked]
    )
    for item in asked:
        entropies, kept = entropies_of(teacher, item), replies[item.key].kept
        assert entropies[kept].min() > np.delete(entropies, kept).max() - 0.1


def entropies_of(teacher: LanguageModel, asked: TeacherPrompt) -> np.ndarray:
    """The teacher's entropy at each token of a given reply, nats."""
    prompt, response = asked.rendered.prompt, asked.rendered.response
    logits = teacher.module(mx.array([[*prompt, *response]]))[0, len(prompt) - 1 : -1].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return -np.array(mx.sum(mx.exp(logprobs) * logprobs, axis=-1))


# Several domains


def test_a_mapping_gives_the_prompts_of_several_domains(distiller: TrueKnowledgeDistiller, tmp_path: Path) -> None:
    results = distiller.distill_all({"plain": STRINGS, "scored": RECORDS})
    assert list(results) == ["plain", "scored"]
    summary = json.loads((tmp_path / "out" / "kd_summary.json").read_text())
    assert list(summary["domains"]) == ["plain", "scored"]


def with_folders(distiller: TrueKnowledgeDistiller, root: Path, *domains: str) -> TrueKnowledgeDistiller:
    """The distiller, reading its prompts from files."""
    for domain in domains:
        (root / domain).mkdir(parents=True)
        (root / domain / "train.txt").write_text("\n".join(STRINGS))
    config = distiller.config.model_copy(update={"prompts": str(root)})
    return TrueKnowledgeDistiller(config=config)


@pytest.mark.parametrize(("asked", "done"), [(None, ["one", "two"]), (["two"], ["two"])])
def test_domains_are_read_from_their_folders(
    distiller: TrueKnowledgeDistiller, tmp_path: Path, asked: list[str] | None, done: list[str]
) -> None:
    results = with_folders(distiller, tmp_path / "prompts", "one", "two").distill_all(asked)
    assert list(results) == done


def test_a_failing_domain_leaves_the_others_done(distiller: TrueKnowledgeDistiller) -> None:
    with pytest.raises(DistillationFailed, match="too-long") as failed:
        distiller.distill_all({"too-long": LONG, "good": STRINGS})
    assert list(failed.value.results) == ["good"]
    assert isinstance(failed.value.results["good"], KDResult)
    assert isinstance(failed.value.failures["too-long"], InputError)
    assert isinstance(failed.value, TrueKDError)


def test_a_domain_with_bad_prompts_leaves_the_others_done(distiller: TrueKnowledgeDistiller) -> None:
    with pytest.raises(DistillationFailed) as failed:
        distiller.distill_all({"bad": [""], "good": STRINGS})
    assert list(failed.value.results) == ["good"]
    assert isinstance(failed.value.failures["bad"], PromptError)


@pytest.mark.parametrize("domains", [{}, []])
def test_no_domains_at_all_are_an_error_in_words(distiller: TrueKnowledgeDistiller, domains: Any) -> None:
    with pytest.raises(TrueKDError, match="domain"):
        distiller.distill_all(domains)


# Options


def test_short_names_and_nested_names_are_the_same_options() -> None:
    short = KDConfig(
        teacher="a/teacher",
        student="a/student",
        temperature=3.0,
        alpha=0.5,
        iters=10,
        learning_rate=1e-3,
        batch_size=2,
        max_seq_length=128,
        rank=8,
    )
    nested = KDConfig(
        teacher={"model": "a/teacher"},
        student={"model": "a/student"},
        losses={"temperature": 3.0, "alpha": 0.5},
        training={"iters": 10, "learning_rate": 1e-3, "batch_size": 2, "max_seq_length": 128},
        lora={"rank": 8},
    )
    assert short == nested
    assert short.losses.temperature == 3.0
    assert short.training.max_seq_length == 128


def test_short_and_nested_names_go_together() -> None:
    config = KDConfig(lora={"dropout": 0.1}, rank=8)
    assert (config.lora.rank, config.lora.dropout) == (8, 0.1)
    assert (KDConfig(rank=8, lora={"dropout": 0.1}).lora.rank, config.lora.dropout) == (8, 0.1)


def test_a_budget_has_short_names_too() -> None:
    assert KDConfig(cache_bytes=40) == KDConfig(targets={"bytes_per_token": 40.0})
    assert KDConfig(cache_gb=2, targets={"draw_temperature": 4}).targets.gigabytes == 2.0


@pytest.mark.parametrize("other", [{"threshold": 0.1}, {"preset": "exact"}], ids=str)
def test_a_budget_that_makes_no_sense_is_one_line(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refusal:
        KDConfig(cache_bytes=40, targets=other)
    assert "\n" not in str(refusal.value)
    assert "bytes_per_token" in str(refusal.value)


def test_options_objects_are_taken_as_they_are() -> None:
    config = KDConfig(rank=8)
    assert KDConfig(lora=config.lora) == config


def test_nothing_given_is_the_default_of_every_option() -> None:
    assert KDConfig().model_dump() == RunConfig().model_dump()


def test_a_whole_number_will_do_for_a_fraction() -> None:
    assert KDConfig(temperature=3, alpha=1).losses.temperature == 3.0


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"temperature": 0.1}, "losses.temperature: 0.1"),
        ({"temperature": "2"}, "losses.temperature"),
        ({"alpha": 1.5}, "losses.alpha: 1.5"),
        ({"alpha": float("nan")}, "losses.alpha: nan"),
        ({"iters": 0}, "training.iters: 0"),
        ({"iters": 2.5}, "training.iters: 2.5"),
        ({"iters": True}, "training.iters: true"),
        ({"rank": -1}, "lora.rank: -1"),
        ({"seed": -1}, "seed: -1"),
        ({"temprature": 2.0}, "temperature"),
        ({"lora": {"rnk": 2}}, "did you mean 'rank'"),
        ({"vocab_strategy": "projct"}, "project"),
        ({"teacher": 3}, "teacher"),
        ({"training": 3, "iters": 3}, "training"),
        ({"out": ""}, "out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_value_is_one_line(values: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        KDConfig(**values)
    text = str(refusal.value)
    assert what in text
    assert "\n" not in text
    assert text.startswith("KDConfig")


def test_all_bad_values_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        KDConfig(temperature=0.1, rank=0)
    assert len(str(refusal.value).splitlines()) == 2


def test_options_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        KDConfig().seed = 3
