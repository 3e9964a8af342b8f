"""A plan says what the run then does; its rehearsal reads no weights; nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import save_random_model
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from true_kd import events, jobs, pipeline
from true_kd.config import Override
from true_kd.models import ModelOptions, UnknownDepth, count_layers, open_model, write_shallow
from true_kd.planning import DomainForecast, Forecast, forecast
from true_kd.planning.forecast import decoding_steps
from true_kd.planning.machines import MACHINES, budget_of, find_fits
from true_kd.planning.rehearsal import Depth, extrapolate
from true_kd.reporting import KDResult

POCKET = Path("pocket:configs/base.yaml")
NEAR = 0.15
"""How far an estimate may be from what the run measures."""


# From shallow models to deep ones


@given(
    st.tuples(*[st.floats(0, 1e6)] * 3),
    st.integers(7, 80).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, layers))),
)
def test_what_is_linear_in_the_layers_is_extrapolated_exactly(
    slopes: tuple[float, float, float], whole: tuple[int, int]
) -> None:
    from true_kd.planning.rehearsal import _depths

    layers, adapted = whole
    depths = _depths(Depth(layers, adapted))
    costs = [{"cost": float(np.dot(slopes, depth.features))} for depth in depths]
    expected = float(np.dot(slopes, Depth(layers, adapted).features))
    assert extrapolate(depths, costs, Depth(layers, adapted))["cost"] == pytest.approx(expected, rel=1e-6, abs=1e-3)


def test_noise_never_makes_a_deep_model_cheaper_than_a_shallow_one() -> None:
    found = extrapolate([Depth(2), Depth(4)], [{"cost": 5.0}, {"cost": 4.0}], Depth(40))
    assert found["cost"] == 4.0


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 12))
def test_decoding_steps_lie_between_a_full_batch_and_one_after_the_other(replies: list[int], width: int) -> None:
    steps = decoding_steps(replies, width)
    assert max(replies, default=0) <= steps <= sum(replies)
    assert steps >= sum(replies) / width
    assert decoding_steps(replies, 1) == sum(replies)
    assert decoding_steps(replies, len(replies) + 1) == max(replies, default=0)


# Shallow models


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A model of ten layers."""
    return save_random_model(tmp_path_factory.mktemp("deep"), tokenizer_folder, seed=3, num_hidden_layers=10)


def shallow(folder: Path, layers: int, into: Path) -> ModelOptions:
    into.mkdir()
    write_shallow(ModelOptions(model=str(folder)), "student", layers, into)
    return ModelOptions(model=str(into))


def test_a_shallow_model_has_the_shapes_of_the_whole_and_zeros_for_weights(deep_folder: Path, tmp_path: Path) -> None:
    assert count_layers(ModelOptions(model=str(deep_folder)), "student") == 10
    whole = open_model(ModelOptions(model=str(deep_folder)), "student")
    cut = open_model(shallow(deep_folder, 3, tmp_path / "cut"), "student")
    weights, zeros = (dict(tree_flatten(model.module.parameters())) for model in (whole, cut))
    assert len(cut.module.layers) == 3
    kept = {name for name in weights if not name.startswith(tuple(f"model.layers.{at}." for at in range(3, 10)))}
    assert set(zeros) == kept
    for name, array in zeros.items():
        assert (array.shape, array.dtype) == (weights[name].shape, weights[name].dtype)
        assert not array.any().item()
    assert cut.tokenizer.encode("the cat") == whole.tokenizer.encode("the cat")


def test_no_weight_of_the_whole_is_read(deep_folder: Path, tmp_path: Path) -> None:
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    for file in deep_folder.iterdir():
        (spoiled / file.name).write_bytes(file.read_bytes())
    weights = spoiled / "model.safetensors"
    content = weights.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    weights.write_bytes(content[:header] + b"\xff" * (len(content) - header))  # NaN, each of them
    cut = open_model(shallow(spoiled, 2, tmp_path / "cut"), "student")
    assert mx.isfinite(cut.module(mx.array([[1, 2, 3]]))).all().item()


def test_a_quantised_model_is_cut_as_well(quantised_folder: Path, tmp_path: Path) -> None:
    cut = open_model(shallow(quantised_folder, 1, tmp_path / "cut"), "student")
    assert len(cut.module.layers) == 1


@pytest.mark.parametrize("change", [{"num_hidden_layers": 9}, {"num_hidden_layers": None}])
def test_a_model_whose_layers_nobody_can_tell_is_not_cut(
    change: dict[str, Any], deep_folder: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    for file in deep_folder.iterdir():
        (odd / file.name).write_bytes(file.read_bytes())
    config = json.loads((odd / "config.json").read_text()) | change
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownDepth):
        count_layers(ModelOptions(model=str(odd)), "student")


# The plan and the run


def planned(base: Path, domains: list[str], **values: Any) -> list[jobs.Job]:
    given = [Override("--set", tuple(key.split(".")), value) for key, value in values.items()]
    found, failures = jobs.plan(base, domains, given)
    assert not failures
    return found


def run(work: list[jobs.Job]) -> dict[str, KDResult]:
    found = [event.result for event in pipeline.distill(work) if isinstance(event, events.DomainFinished)]
    return {result.domain: result for result in found}


def assert_near(estimate: float, measured: float) -> None:
    assert estimate == pytest.approx(measured, rel=NEAR), estimate / measured


def assert_holds(said: DomainForecast, result: KDResult, folder: Path) -> None:
    """That a run was as its plan said."""
    assert said.train_examples == result.data.train_examples
    assert said.valid_examples == result.data.valid_examples
    assert (said.truncated, said.dropped) == (result.data.truncated, result.data.dropped)
    assert said.trainable_parameters == result.trainable_parameters
    assert_near(said.train_tokens, result.data.train_tokens)
    assert_near(said.train_response_tokens, result.data.train_response_tokens)
    assert_near(said.cache_bytes, result.data.cache_bytes)
    assert_near(said.training_peak, result.training_peak_memory)
    tensors = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    assert tensors <= said.folder_bytes * 1.2


SMALL = {"isolate": False, "report": False, "training.iters": 20, "training.checkpoint_every": 10}


@pytest.mark.slow
def test_on_the_pocket_pair_a_plan_is_within_15_percent_of_the_run(tmp_path: Path) -> None:
    values = {**SMALL, "out": str(tmp_path / "out"), "cache": str(tmp_path / "cache"), "training.iters": 60}
    work = planned(POCKET, ["task"], **values)
    # Some replies are there, as `analyze` leaves them: what the others will be follows.
    sample = replace(work[0], train_prompts=work[0].train_prompts[:32], valid_prompts=work[0].valid_prompts[:8])
    for _ in pipeline.capture([sample]):
        pass
    [said] = forecast(planned(POCKET, ["task"], **values), {}, with_fits=False).domains
    assert (said.basis, said.cached, said.to_write) == ("sample", 40, 376)
    [result] = run(work).values()
    assert_holds(said, result, tmp_path / "out" / "task")
    assert_near(said.capture_peak, result.capture_peak_memory)
    [after] = forecast(planned(POCKET, ["task"], **values), {}, with_fits=False).domains
    assert after.reuse.finished
    assert (after.new_cache_bytes, after.capture_peak, after.training_peak, after.folder_bytes) == (0, 0, 0, 0)


PROMPT = "the cat sat on the mat and said hello to the world"
SHAPES = {
    "deep": {"num_hidden_layers": 12, "hidden_size": 64, "intermediate_size": 96},
    "wide": {"num_hidden_layers": 9, "hidden_size": 160, "intermediate_size": 480, "num_attention_heads": 10},
}


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [-1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_other_shapes_a_plan_is_within_15_percent_of_the_run(
    shape: str, adapted: int, tmp_path: Path, tokenizer_folder: Path
) -> None:
    teacher = save_random_model(tmp_path / "teacher", tokenizer_folder, 4, **SHAPES[shape], vocab_size=2048)
    student = save_random_model(tmp_path / "student", tokenizer_folder, 5, **SHAPES[shape], vocab_size=2048)
    domain = tmp_path / "prompts" / "cats"
    domain.mkdir(parents=True)
    records = [
        {"prompt": f"{number} {PROMPT}", "completion": " ".join([PROMPT] * (1 + number % 5))} for number in range(40)
    ]
    (domain / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    base = tmp_path / "base.yaml"
    base.write_text(json.dumps({"teacher": str(teacher), "student": str(student)}))
    values = {
        **SMALL,
        "out": str(tmp_path / "out"),
        "cache": str(tmp_path / "cache"),
        "prompts": str(tmp_path / "prompts"),
        "lora.num_layers": adapted,
        "lora.rank": 4,
        "gate.when_no_better": "warn",
        "fidelity.when_poor": "warn",
    }
    [said] = forecast(planned(base, ["cats"], **values), {}, with_fits=False).domains
    assert (said.basis, said.to_score, said.to_write) == ("known", 40, 0)
    work = planned(base, ["cats"], **values)
    for _ in pipeline.capture(work):
        pass
    [measured] = run(work).values()
    # Of random weights nobody knows how many entries a token has.
    assert_holds(replace(said, cache_bytes=measured.data.cache_bytes), measured, tmp_path / "out" / "cats")
    [again] = forecast(planned(base, ["cats"], **values, fresh=True), {}, with_fits=False).domains
    assert again.cache_bytes == pytest.approx(measured.data.cache_bytes, rel=0.01)


# What is there already


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_folder: Path, student_folder: Path) -> Path:
    """The current folder: a project of two domains."""
    folder = tmp_path / "project"
    (folder / "configs").mkdir(parents=True)
    base = {
        "teacher": str(teacher_folder),
        "student": str(student_folder),
        "training": {"iters": 4, "batch_size": 4, "max_seq_length": 64, "checkpoint_every": 2},
        "capture": {"max_tokens": 4},
        "lora": {"rank": 2},
        "isolate": False,
    }
    (folder / "configs" / "base.yaml").write_text(json.dumps(base))
    for domain in ("cats", "dogs"):
        (folder / "prompts" / domain).mkdir(parents=True)
        (folder / "prompts" / domain / "train.txt").write_text("\n".join(f"{domain} {n} {PROMPT}" for n in range(12)))
    monkeypatch.chdir(folder)
    return folder


def say(**values: Any) -> dict[str, DomainForecast]:
    work = planned(Path("configs/base.yaml"), ["cats", "dogs"], **values)
    return {found.domain: found for found in forecast(work, {}, with_probe=False, with_fits=False).domains}


def test_what_is_reused_and_what_is_not_is_said_with_the_reason(project: Path) -> None:
    before = say()
    assert [found.reuse.reason for found in before.values()] == ["nothing there yet"] * 2
    assert before["cats"].basis == "bound"
    run(planned(Path("configs/base.yaml"), ["cats"]))
    after = say()
    assert after["cats"].reuse.finished
    assert after["cats"].reuse.reason.startswith("finished 20")
    assert (after["cats"].cached, after["cats"].to_write, after["cats"].basis) == (12, 0, "known")
    assert after["dogs"].reuse.reason == "nothing there yet"
    other = say(**{"losses.temperature": 3.0, "training.iters": 6})["cats"].reuse
    assert not other.finished
    assert "losses.temperature was 2.0, is 3.0" in other.reason
    assert "training.iters was 4, is 6" in other.reason
    assert say(fresh=True)["cats"].reuse.reason == "done again: --fresh"
    assert "control" in say(control="sft")["cats"].reuse.reason
    assert "evaluation" in say(**{"evaluation.exact_match": False})["cats"].reuse.reason
    (project / "prompts" / "cats" / "train.txt").write_text("\n".join(f"cats {n} {PROMPT}" for n in range(20)))
    assert "prompts or models" in say()["cats"].reuse.reason
    assert say()["cats"].to_write == 8


def test_a_run_that_was_stopped_is_planned_from_where_it_was(project: Path) -> None:
    for event in pipeline.distill(planned(Path("configs/base.yaml"), ["cats"])):
        if isinstance(event, events.Stepped) and event.step.iteration == 3:
            break
    assert say()["cats"].reuse.reason == "goes on at iteration 2 of 4"


def test_damage_is_a_reason(project: Path) -> None:
    run(planned(Path("configs/base.yaml"), ["cats"]))
    weights = project / "adapters_kd" / "cats" / "adapters.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert say()["cats"].reuse.reason == "done again: its files are damaged"


# Machines


def test_what_fits_a_mac_grows_with_its_memory(project: Path) -> None:
    work = planned(Path("configs/base.yaml"), ["cats"])
    fits = forecast(work, {}, with_probe=False).fits
    assert [fit.memory_gb for fit in fits] == list(MACHINES)
    assert all(fit.capture_batch == 64 and fit.training_batch == 64 for fit in fits)
    config = work[0].config.model_copy(
        update={"training": work[0].config.training.model_copy(update={"max_seq_length": 131072})}
    )
    lean = find_fits(config, (320, 320), tokens=10**7, has_teacher=True)
    for name in ("budget", "capture_batch", "training_batch", "training_batch_recomputed"):
        values = [getattr(fit, name) for fit in lean]
        assert values == sorted(values)
    assert lean[0].training_batch == 0
    assert lean[0].capture_batch < 64
    assert all(fit.training_batch <= fit.training_batch_recomputed for fit in lean)
    assert budget_of(16) < 16 * 2**30


# The command


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_command_says_it_in_words_and_writes_nothing(project: Path, cli: Callable[..., Any]) -> None:
    before = tree(project.parent)
    ended = cli("plan", "--all", "--no-probe")
    assert (ended.code, ended.err) == (0, "")
    assert "\x1b" not in ended.out
    for words in ("cats", "12 for the teacher to write", "nothing there yet", "what fits a Mac", "16 GB"):
        assert words in ended.out
    # Into a pipe no line is folded.
    assert max(map(len, ended.out.splitlines())) > 80
    assert tree(project.parent) == before


def test_the_command_rehearses_unless_told_otherwise(project: Path, cli: Callable[..., Any]) -> None:
    before = tree(project.parent)
    ended = cli("plan", "-d", "cats", "--json")
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert set(found) == {name for name in Forecast.__dataclass_fields__}
    [domain] = found["domains"]
    assert domain["capture_peak"] > 0
    assert domain["training_peak"] > 0
    assert found["seconds"] == pytest.approx(sum(domain["seconds"].values()))
    assert tree(project.parent) == before


def test_a_domain_that_cannot_be_run_is_named_and_the_others_are_planned(
    project: Path, cli: Callable[..., Any]
) -> None:
    (project / "configs" / "dogs.yaml").write_text("training: {iter: 3}")
    ended = cli("plan", "--all", "--no-probe")
    assert ended.code == 2
    assert "dogs: cannot be run. configs/dogs.yaml:1 training.iter" in ended.out
    assert "12 for the teacher to write" in ended.out


def test_memory_that_does_not_suffice_is_said(project: Path, cli: Callable[..., Any]) -> None:
    ended = cli("plan", "-d", "cats", "--memory-gb", "0.0001")
    assert ended.code == 0
    assert "TOO MUCH for the 100.0 kB" in " ".join(ended.out.split())
