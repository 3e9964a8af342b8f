"""The student's phase by its options: what it learns, what it may take of memory, and how its steps are computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest
from conftest import save_random_model
from test_pipeline import ASK, SCORED, WEIGHTS, Place, Run, metrics_of

from true_kd import events, pocket
from true_kd.errors import InputError
from true_kd.losses.divergences import DIVERGENCES, DivergenceName
from true_kd.memory import default_budget
from true_kd.reporting import KDResult

REPLY = "the cat sat on the mat and said hello to the world "


@pytest.fixture(autouse=True)
def guards() -> Iterator[None]:
    """MLX's limits, which a run sets, are those of before when a test is over."""
    yield
    mx.set_memory_limit(default_budget())


@pytest.fixture
def place(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Place:
    """A place with one domain, `a`, whose replies are given."""
    place = Place(tmp_path, teacher_folder, student_folder)
    place.write("a", [{**record, "completion": REPLY * (1 + at % 3)} for at, record in enumerate(SCORED)], SCORED[:2])
    place.config["training"] = {"iters": 3, "batch_size": 5, "learning_rate": 0.01, "validate_every": 3}
    return place


def result_of(run: Run) -> KDResult:
    assert run.failures == {}
    return run.results["a"]


def adapter_of(folder: Path) -> np.ndarray:
    """All numbers of the adapter in a folder."""
    weights = mx.load(str(folder / WEIGHTS))
    return np.concatenate([np.array(weights[name]).ravel() for name in sorted(weights)])


def assert_same_to_rounding(found: KDResult, expected: KDResult) -> None:
    """The same training, and nearly the same adapter: Adam makes much of the rounding of a gradient near zero."""
    for name in ("total", "kd", "ce"):
        for one, other in zip(found.steps, expected.steps, strict=True):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4)
    for one, other in zip(found.steps, expected.steps, strict=True):
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)
        assert one.response_tokens == other.response_tokens
    assert found.steps[0].grad_norm == pytest.approx(expected.steps[0].grad_norm, rel=1e-4)
    one, other = adapter_of(Path(found.adapter_path)), adapter_of(Path(expected.adapter_path))
    assert np.linalg.norm(one - other) < 0.01 * np.linalg.norm(other)


def elsewhere(place: Place, name: str) -> dict[str, Any]:
    return {"out": str(place.root / name)}


# Memory


SHORT = 1e-4
"""Gigabytes in which no example fits."""


def test_a_budget_that_cuts_micro_batches_changes_nothing_but_rounding(place: Place) -> None:
    whole = result_of(place.run("a"))
    cut = result_of(place.run("a", memory_gb=SHORT, **elsewhere(place, "cut")))
    assert not cut.unchanged
    assert_same_to_rounding(cut, whole)
    lengths = cut.steps[0].padded_tokens
    assert lengths == cut.data.train_tokens < whole.steps[0].padded_tokens, "each example stands alone, unpadded"


@pytest.mark.parametrize("targets", [{"preset": "exact"}, {"share": 0.5}], ids=str)
@pytest.mark.parametrize("training", [{"grad_checkpoint": True}, {"accumulate": 2, "batch_size": 3}], ids=str)
def test_a_budget_changes_nothing_whatever_the_options(
    targets: dict[str, Any], training: dict[str, Any], place: Place
) -> None:
    place.config["targets"] = targets
    place.config["training"] |= training
    place.config["losses"] = {"weigh_by": "entropy"}
    whole = result_of(place.run("a"))
    assert_same_to_rounding(result_of(place.run("a", memory_gb=SHORT, **elsewhere(place, "cut"))), whole)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A random model whose activations outweigh it."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 512, "num_attention_heads": 4}
    return save_random_model(tmp_path_factory.mktemp("wide"), tokenizer_folder, seed=6, **sizes)


def test_a_smaller_budget_takes_less_memory(place: Place, wide_folder: Path) -> None:
    place.config["student"] = str(wide_folder)
    record = {"prompt": "say hello", "completion": REPLY * 6}
    place.write("a", [record] * 8, [record])
    place.config["training"] |= {"batch_size": 8, "iters": 2}
    peaks = []
    for memory_gb in (4.0, 0.03):
        result = result_of(place.run("a", memory_gb=memory_gb, **elsewhere(place, str(memory_gb))))
        peaks.append(result.training_peak_memory)
    assert peaks[1] < 0.7 * peaks[0], peaks
    # As `set_guards` says: give or take a quarter.
    assert peaks[1] < 1.25 * 0.03e9


def test_another_budget_finds_the_run_finished(place: Place) -> None:
    result_of(place.run("a"))
    assert result_of(place.run("a", memory_gb=SHORT)).unchanged
    assert result_of(place.run("a", memory_gb=3.0)).unchanged


def test_a_run_goes_on_with_another_budget(place: Place) -> None:
    place.config["training"] |= {"iters": 6, "checkpoint_every": 2}
    whole = result_of(place.run("a"))
    for event in place.start("a", **elsewhere(place, "stopped")):
        if isinstance(event, events.Stepped) and event.step.iteration == 5:
            break
    run = place.run("a", memory_gb=SHORT, **elsewhere(place, "stopped"))
    [started] = run.of(events.TrainingStarted)
    assert started.made == 4
    assert_same_to_rounding(result_of(run), whole)
    assert run.results["a"].steps[:4] != whole.steps[:4], "measured anew"
    assert [replace(step, seconds=0, tokens_per_second=0, peak_memory=0) for step in run.results["a"].steps[:4]] == [
        replace(step, seconds=0, tokens_per_second=0, peak_memory=0) for step in whole.steps[:4]
    ]


@pytest.mark.parametrize("recomputes", [False, True])
def test_an_example_that_cannot_fit_is_told_before_training(recomputes: bool, place: Place) -> None:
    run = place.run("a", memory_gb=SHORT, training__grad_checkpoint=recomputes)
    [short] = run.of(events.MemoryShort)
    assert (short.domain, short.budget, short.recomputes) == ("a", 100_000, recomputes)
    assert short.need > short.budget
    kinds = [type(event) for event in run.events]
    assert kinds.index(events.MemoryShort) < kinds.index(events.Stepped)
    enough = place.run("a", memory_gb=1.001 * short.need / 1e9, training__grad_checkpoint=recomputes, fresh=True)
    assert enough.of(events.MemoryShort) == []


def test_the_machine_itself_is_enough_for_a_small_student(place: Place) -> None:
    assert place.run("a").of(events.MemoryShort) == []


# How a step is computed


def test_recomputing_the_layers_changes_nothing(place: Place) -> None:
    place.config["lora"] = {"rank": 2, "dropout": 0.3}
    plain = result_of(place.run("a"))
    curves = metrics_of(place)["curves"]
    recomputed = result_of(place.run("a", training__grad_checkpoint=True))
    assert not recomputed.unchanged
    found = metrics_of(place)["curves"]
    assert found.keys() == curves.keys()
    for name, values in found.items():
        assert values == pytest.approx(curves[name], rel=1e-4), name
    assert recomputed.after.loss == pytest.approx(plain.after.loss, rel=1e-4)


def test_a_compiled_run_is_the_plain_one_to_rounding(place: Place) -> None:
    place.config["training"] |= {"batch_size": 2, "accumulate": 2, "iters": 4}
    place.config["losses"] = {"alpha_end": 0.2}
    plain = result_of(place.run("a", training__compile="never"))
    compiled = result_of(place.run("a", training__compile="always", **elsewhere(place, "compiled")))
    assert not compiled.unchanged
    assert_same_to_rounding(compiled, plain)
    padded = [step.padded_tokens for step in compiled.steps]
    assert all(count % 32 == 0 for count in padded), "padded to few shapes"
    assert padded != [step.padded_tokens for step in plain.steps]


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="of a machine that computes on its CPU")
def test_on_a_cpu_nothing_is_compiled_unless_it_is_asked_for(place: Place) -> None:
    plain = result_of(place.run("a", training__compile="never"))
    left = result_of(place.run("a", training__compile="auto", **elsewhere(place, "auto")))
    assert (Path(left.adapter_path) / WEIGHTS).read_bytes() == (Path(plain.adapter_path) / WEIGHTS).read_bytes()


@pytest.mark.parametrize("number", [1, 2])
def test_metrics_of_an_earlier_format_are_done_again(number: int, place: Place) -> None:
    result_of(place.run("a"))
    weights, path = place.weights(), place.out / "a" / "kd_metrics.json"
    record = json.loads(path.read_text())
    if number == 1:
        record["curves"] |= record.pop("timings")
    del record["result"]["proof"], record["proof_digest"]
    path.write_text(json.dumps({**record, "format": number}))
    assert not result_of(place.run("a")).unchanged
    assert place.weights() == weights
    assert json.loads(path.read_text())["format"] == 3


# What it is worth


def test_the_proof_says_what_the_metrics_say(place: Place) -> None:
    result = result_of(place.run("a"))
    for model, metrics in ((result.proof.student, result.before), (result.proof.adapted, result.after)):
        assert model.kl.value == pytest.approx(metrics.kl)
        assert model.nll.value == pytest.approx(metrics.ce)
        assert model.top1_agreement.value == pytest.approx(metrics.top1_agreement)
    assert result.proof.tokens == result.before.tokens
    assert result.proof.gap_closed.kl.value == pytest.approx(1 - result.after.kl / result.before.kl)
    assert result.proof.teacher.kl.value == 0.0
    assert {sample.where.rpartition(":")[2] for sample in result.proof.samples} == {"1", "2"}
    assert all("".join(sample.pieces).startswith("the cat sat") for sample in result.proof.samples)


def test_the_footprint_is_that_of_the_files(place: Place, teacher_folder: Path, student_folder: Path) -> None:
    proof = result_of(place.run("a")).proof
    adapter = mx.load(str(place.out / "a" / WEIGHTS))
    assert proof.footprint.adapter_parameters == sum(array.size for array in adapter.values())
    assert proof.footprint.adapter_parameters == metrics_of(place)["result"]["trainable_parameters"]
    assert proof.footprint.adapter_bytes == (place.out / "a" / WEIGHTS).stat().st_size
    for model, folder in ((proof.student, student_folder), (proof.teacher, teacher_folder)):
        assert model.bytes == (folder / "model.safetensors").stat().st_size
        assert model.parameters == sum(array.size for array in mx.load(str(folder / "model.safetensors")).values())
    assert proof.footprint.parameter_ratio == proof.teacher.parameters / proof.adapted.parameters
    assert proof.student.tokens_per_second is None, "no speed was asked for"


def test_what_is_known_of_the_teacher_is_known_when_it_is_not_opened(place: Place) -> None:
    place.config["evaluation"] = {"speed_tokens": 2}
    first = result_of(place.run("a")).proof
    run = place.run("a", fresh=True)
    assert run.of(events.TeacherOpening) == []
    again = result_of(run).proof
    assert again.teacher == first.teacher
    assert again.teacher.tokens_per_second > 0
    assert again.footprint.speed_up == again.adapted.tokens_per_second / again.teacher.tokens_per_second
    assert again.footprint.parameter_ratio == first.footprint.parameter_ratio


def test_a_speed_that_the_cache_lacks_stays_unknown_while_the_teacher_is_closed(place: Place) -> None:
    result_of(place.run("a"))
    proof = result_of(place.run("a", evaluation__speed_tokens=2)).proof
    assert (proof.teacher.tokens_per_second, proof.footprint.speed_up) == (None, None)
    assert proof.student.tokens_per_second > 0
    place.write("b", ["who said hello", "where is the mat"], ["who sat on the cat"])
    run = place.run("a", "b", evaluation__speed_tokens=3)
    assert run.results["b"].proof.teacher.tokens_per_second > 0, "it was open, and is measured then"


def test_the_size_of_a_teacher_is_measured_once_on_a_machine(place: Place) -> None:
    place.config["evaluation"] = {"speed_tokens": 2}
    result_of(place.run("a"))
    [size] = (place.root / "cache").glob("*/size-*.json")
    before = size.read_bytes()
    place.write("b", ["who said hello", "where is the mat"], ["who sat on the cat"])
    run = place.run("b")
    assert len(run.of(events.TeacherOpening)) == 1
    assert size.read_bytes() == before


def test_a_teacher_without_its_weights_is_compared_all_the_same(place: Place) -> None:
    place.config["evaluation"] = {"speed_tokens": 2}
    expected = result_of(place.run("a")).proof
    [cache] = [path.parent.name for path in (place.root / "cache").glob("*/manifest.jsonl")]
    run = place.run("a", teacher__model=f"cache:{cache}", fresh=True)
    assert result_of(run).proof.teacher == expected.teacher


@pytest.mark.parametrize(
    "change",
    [{"evaluation__speed_tokens": 2}, {"evaluation__answer_marker": "so:"}, {"evaluation__exact_match": False}],
)
def test_another_way_to_measure_measures_again_and_trains_nothing(change: dict[str, Any], place: Place) -> None:
    place.write("a", SCORED, [{**SCORED[0], "answer": "the cat sat on the mat"}, *SCORED[1:2]])
    first = result_of(place.run("a"))
    weights = (place.out / "a" / WEIGHTS).stat().st_mtime_ns
    run = place.run("a", **change)
    assert not any(run.of(kind) for kind in (events.TeacherOpening, events.TrainingStarted, events.Stepped))
    assert len(run.of(events.Proving)) == 1
    found = result_of(run)
    assert not found.unchanged
    assert (found.steps, found.validations, found.before, found.after) == (
        first.steps,
        first.validations,
        first.before,
        first.after,
    )
    assert (place.out / "a" / WEIGHTS).stat().st_mtime_ns == weights, "not touched"
    if "evaluation__speed_tokens" in change:
        assert found.proof.adapted.tokens_per_second > 0
    if "evaluation__exact_match" in change:
        assert (first.proof.tasks, found.proof.tasks) == (1, 0)
    assert result_of(place.run("a", **change)).unchanged


def test_measuring_again_that_is_stopped_is_done_the_next_time(place: Place) -> None:
    result_of(place.run("a"))
    for event in place.start("a", evaluation__answer_marker="so:"):
        if isinstance(event, events.Proving):
            break
    run = place.run("a", evaluation__answer_marker="so:")
    assert run.of(events.Stepped) == []
    assert not result_of(run).unchanged


def test_of_a_teacher_that_is_the_student_there_is_nothing_to_learn(place: Place, student_folder: Path) -> None:
    place.config |= {"teacher": str(student_folder), "targets": {"preset": "exact"}, "control": "sft"}
    result = result_of(place.run("a"))
    assert result.proof.headroom.standing == "same"
    assert result.proof.verdict.outcome == "nothing to learn"
    assert result.proof.verdict.against_control is None
    assert "cannot help here" in result.proof.verdict.sentence


def test_a_proof_is_in_the_metrics_and_the_summary(place: Place) -> None:
    run = place.run("a")
    proof = result_of(run).proof
    assert json.loads(json.dumps(asdict(proof))) == metrics_of(place)["result"]["proof"]
    assert run.summary["domains"]["a"]["proof"]["verdict"] == asdict(proof.verdict)
    assert place.run("a").results["a"].proof == proof


def test_replies_kept_in_part_are_proven_on_that_part(place: Place) -> None:
    place.config["targets"] = {"share": 0.5}
    proof = result_of(place.run("a")).proof
    assert proof.tokens == sum(proof.prompts.tokens)
    for sample in proof.samples:
        known = [kl is not None for kl in sample.student]
        assert 0 < sum(known) < len(known) == len(sample.pieces)
        assert [kl is not None for kl in sample.adapted] == known


# The pocket pair, with each objective


@pytest.fixture(scope="module")
def pocket_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few of the pocket prompts, and a cache that the tests share."""
    root = tmp_path_factory.mktemp("pocket")
    source, folder = pocket.locate("pocket:prompts", "prompts") / "task", root / "prompts" / "a"
    folder.mkdir(parents=True)
    for split, count in (("train", 64), ("valid", 24)):
        records = [json.loads(line) for line in (source / f"{split}.jsonl").read_text().splitlines()[:count]]
        rewarded = [{**record, "reward": float(at % 4)} for at, record in enumerate(records)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rewarded))
    return root


def distil_pocket(root: Path, out: Path, learning_rate: float = 2e-3, **losses: Any) -> Run:
    place = Place(root, Path("pocket:teacher"), Path("pocket:student"))
    place.config |= {
        "out": str(out),
        "capture": {"sampling_temperature": 0.0, "max_tokens": 32, "batch_size": 32},
        "evaluation": {"exact_match": False, "speed_tokens": 0},
        "lora": {"rank": 8},
        "training": {"iters": 15, "learning_rate": learning_rate, "batch_size": 8, "validate_every": 15},
        "losses": losses,
    }
    return place.run("a")


@pytest.mark.parametrize("divergence", get_args(DivergenceName))
def test_each_divergence_teaches_the_student(divergence: str, pocket_root: Path, tmp_path: Path) -> None:
    run = distil_pocket(pocket_root, tmp_path, divergence=divergence)
    result = result_of(run)
    assert result.after.loss < 0.95 * result.before.loss
    assert result.after.kd < 0.95 * result.before.kd
    told = [(event.divergence, event.tail_mass) for event in run.of(events.DivergenceCoarsened)]
    sampled = DIVERGENCES[divergence](0.5, 0.1).sampled
    assert told == ([] if sampled else [(divergence, result.fidelity.tail_mass)])
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["true_kd"]["divergence"] == divergence


@pytest.mark.parametrize(
    "losses",
    [
        {"alpha": 1.0, "alpha_end": 0.3},
        {"temperature": 1.5, "temperature_end": 2.0},
        {"divergence": "skewed_kl", "skew": 0.3, "alpha_end": 1.0, "temperature_end": 1.5},
        {"weigh_by": "entropy"},
        {"weigh_by": "reward"},
        {"weigh_by": "certainty", "divergence": "jensen_shannon", "beta": 0.1},
    ],
    ids=lambda losses: " ".join(f"{name}={value}" for name, value in losses.items()),
)
def test_schedules_and_weights_teach_the_student(losses: dict[str, Any], pocket_root: Path, tmp_path: Path) -> None:
    result = result_of(distil_pocket(pocket_root, tmp_path, learning_rate=2e-4, **losses))
    assert result.after.loss < result.before.loss
    first, last = result.steps[0], result.steps[-1]
    for step, alpha in ((first, losses.get("alpha", 0.7)), (last, losses.get("alpha_end", losses.get("alpha", 0.7)))):
        assert step.total == pytest.approx(alpha * step.kd + (1 - alpha) * step.ce, rel=1e-4)


def test_weights_change_what_is_learnt(pocket_root: Path, tmp_path: Path) -> None:
    after = {
        weigh_by: distil_pocket(pocket_root, tmp_path / weigh_by, weigh_by=weigh_by).results["a"].after.loss
        for weigh_by in ("none", "entropy", "reward")
    }
    assert len(set(after.values())) == 3


def test_a_divergence_that_needs_all_targets_is_told_of_only_where_they_are_sampled(place: Place) -> None:
    told = {
        (preset, alpha): len(
            place.run(
                "a", targets__preset=preset, losses__alpha=alpha, losses__divergence="reverse_kl", training__iters=1
            ).of(events.DivergenceCoarsened)
        )
        for preset in ("default", "exact")
        for alpha in (0.0, 0.5)
    }
    assert told == {("default", 0.0): 0, ("default", 0.5): 1, ("exact", 0.0): 0, ("exact", 0.5): 0}


def test_a_reward_that_is_missing_fails_the_domain_in_words(place: Place) -> None:
    place.write("a", [*({"prompt": prompt, "reward": 1.0} for prompt in ASK[:3]), {"prompt": ASK[3]}])
    error = place.run("a", losses__weigh_by="reward").failures["a"]
    assert isinstance(error, InputError)
    assert "train.jsonl:4" in str(error)
