"""The control is the same student on the same text without the teacher's distribution: trained once, and kept apart."""

from __future__ import annotations

import gc
import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import save_random_model
from test_checkpoints import KILLED_BEFORE, spawn
from test_pipeline import EXACT, SCORED, SLACK, TIMED, WEIGHTS, Place, Run, active_memory, files_of, plan_of, size_of

from true_kd import events
from true_kd.adapters import CONTROL, load_adapter
from true_kd.datasets import build_data
from true_kd.evaluation import evaluate
from true_kd.models import ModelOptions, open_model
from true_kd.pipeline import distill
from true_kd.reporting import KDResult, read_result

LABEL = "a (SFT control)"


@pytest.fixture
def place(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Place:
    """A place with one domain, `a`, whose training draws random numbers."""
    return lay_out(tmp_path, teacher_folder, student_folder)


def lay_out(root: Path, teacher: Path, student: Path) -> Place:
    place = Place(root, teacher, student)
    place.write("a")
    place.config |= {"control": "sft", "lora": {"rank": 2, "dropout": 0.3}}
    place.config["training"] |= {"iters": 4, "batch_size": 2}
    return place


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> tuple[Place, Run]:
    """A run with its control that is only looked at."""
    place = lay_out(tmp_path_factory.mktemp("whole"), teacher_folder, student_folder)
    run = place.run("a")
    assert run.failures == {}
    return place, run


@pytest.fixture
def done(whole: tuple[Place, Run], place: Place) -> Place:
    """A copy of that run, to go on from."""
    for name in ("out", "cache"):
        shutil.copytree(whole[0].root / name, place.root / name)
    return place


@pytest.fixture
def captured(whole: tuple[Place, Run], place: Place) -> Place:
    """A place where that run can be made again: its teacher has answered."""
    shutil.copytree(whole[0].root / "cache", place.root / "cache")
    return place


@pytest.fixture(autouse=True, scope="module")
def fast_collection(whole: tuple[Place, Run]) -> Iterator[None]:
    """What tests import is set aside, as in test_pipeline."""
    gc.freeze()
    yield
    gc.unfreeze()


def result_of(run: Run) -> KDResult:
    assert run.failures == {}
    return run.results["a"]


def trained(run: Run) -> list[str]:
    """What a run made steps of."""
    return list(dict.fromkeys(event.domain for event in run.of(events.Stepped)))


def control_of(place: Place) -> bytes:
    return (place.out / "a" / CONTROL / WEIGHTS).read_bytes()


def untimed(place: Place) -> dict[str, bytes]:
    """What a run leaves in a domain's folder and its control's, but for what is measured with a clock."""
    found = files_of(place.out / "a")
    return {name: content for name, content in found.items() if name.rpartition("/")[2] not in TIMED}


def assert_same_run(place: Place, whole: tuple[Place, Run]) -> None:
    """Both adapters and all that was measured of them are those of the run that nothing stopped."""
    assert files_of(place.out / "a").keys() == files_of(whole[0].out / "a").keys()
    assert untimed(place) == untimed(whole[0])
    found, expected = read_result(place.out / "a"), whole[1].results["a"]
    assert without_places(found) == without_places(expected)
    assert [step.total for step in found.steps] == [step.total for step in expected.steps]
    for folder in (place.out, whole[0].out):
        assert read_result(folder / "a" / CONTROL) is not None


def without_places(result: KDResult) -> Any:
    """A proof that does not say where its prompts lie."""
    proof = result.proof
    samples = tuple(replace(sample, where="") for sample in proof.samples)
    return replace(proof, samples=samples, prompts=replace(proof.prompts, where=()))


# What it is


@pytest.mark.parametrize(
    "losses",
    [
        {},
        {"divergence": "jensen_shannon", "temperature": 3.0, "temperature_end": 1.0, "alpha_end": 0.2},
        {"weigh_by": "entropy"},
    ],
    ids=["default", "schedules", "weights of the teacher"],
)
def test_a_control_is_bit_for_bit_a_run_on_the_text_alone(losses: dict[str, Any], captured: Place) -> None:
    captured.config["losses"] = losses
    result_of(captured.run("a"))
    curves = json.loads((captured.out / "a" / CONTROL / "kd_metrics.json").read_text())["curves"]
    plain = str(captured.root / "plain")
    captured.config |= {"losses": {"alpha": 0.0, "temperature": 1.0}, "control": "none"}
    result_of(captured.run("a", out=plain))
    assert control_of(captured) == (Path(plain) / "a" / WEIGHTS).read_bytes()
    assert control_of(captured) != captured.weights()
    found = json.loads((Path(plain) / "a" / "kd_metrics.json").read_text())["curves"]
    assert found.keys() == curves.keys()
    for name in ("total", "ce", "grad_norm", "learning_rate", "response_tokens"):
        assert found[name] == curves[name], name


def test_a_control_weighs_by_the_rewards_of_the_data(captured: Place) -> None:
    captured.write("a", [{"prompt": f"say hello to cat {at}", "reward": float(at)} for at in range(5)])
    captured.config["losses"] = {"weigh_by": "reward"}
    result_of(captured.run("a"))
    captured.config |= {"losses": {"alpha": 0.0, "temperature": 1.0, "weigh_by": "reward"}, "control": "none"}
    result_of(captured.run("a", out=str(captured.root / "plain")))
    assert control_of(captured) == (captured.root / "plain" / "a" / WEIGHTS).read_bytes()


def test_a_control_does_not_change_the_adapter_beside_it(captured: Place, whole: tuple[Place, Run]) -> None:
    result_of(captured.run("a", control="none"))
    assert captured.weights() == whole[0].weights()
    assert not (captured.out / "a" / CONTROL).exists()


def test_a_control_loads_in_mlx_lm(whole: tuple[Place, Run], student_folder: Path) -> None:
    from mlx_lm import load

    tokens = mx.array([[7, 8, 9, 10, 11]])
    seen = [load(str(student_folder))[0](tokens)]
    for folder in (whole[0].out / "a", whole[0].out / "a" / CONTROL):
        theirs = load(str(student_folder), adapter_path=str(folder))[0]
        ours = open_model(ModelOptions(model=str(student_folder)), "student").module
        load_adapter(ours, folder)
        ours.eval()
        assert mx.array_equal(theirs(tokens), ours(tokens))
        seen.append(theirs(tokens))
    assert len({np.array(logits).tobytes() for logits in seen}) == 3


def test_a_control_has_the_files_of_a_domain(whole: tuple[Place, Run]) -> None:
    folder = whole[0].out / "a" / CONTROL
    assert {path.name for path in folder.iterdir()} == {
        WEIGHTS,
        "adapter_config.json",
        *TIMED,
        "checkpoint_2",
        "checkpoint_4",
    }
    written = json.loads((folder / "run.json").read_text())
    assert (written["losses"]["alpha"], written["control"]) == (0.0, "none")
    own = json.loads((whole[0].out / "a" / "run.json").read_text())
    assert own["control"] == "sft"


def test_a_control_is_no_domain_of_the_summary(whole: tuple[Place, Run]) -> None:
    assert list(whole[1].summary["domains"]) == ["a"]
    assert [event.result.domain for event in whole[1].of(events.DomainFinished)] == ["a"]


# What is told of it


def test_the_steps_of_a_control_are_told_under_its_name(whole: tuple[Place, Run]) -> None:
    run = whole[1]
    assert [event.domain for event in run.of(events.TrainingStarted)] == ["a", LABEL]
    for name in ("a", LABEL):
        assert [event.step.iteration for event in run.of(events.Stepped) if event.domain == name] == [1, 2, 3, 4]
        assert [event.validation.iteration for event in run.of(events.Validated) if event.domain == name] == [0, 2, 4]
    assert [event.domain for event in run.of(events.Certified)] == ["a"], "it takes nothing from the targets"
    assert len(run.of(events.TeacherOpening)) == 1


def test_the_proof_measures_the_control_as_it_lies_in_its_folder(whole: tuple[Place, Run], place: Place) -> None:
    original, run = whole
    proof = result_of(run).proof
    [job], failures = plan_of(original, "a")
    job.config = job.config.model_copy(update={"out": str(place.root / "other")})
    for event in distill([job], failures):
        if isinstance(event, events.TrainingStarted):
            break
    student = open_model(ModelOptions(model=original.config["student"]), "student")
    data = build_data(job, student)
    load_adapter(student.module, original.out / "a" / CONTROL)
    measured = evaluate(student.module, data.valid, job.config.losses.final, 4)
    assert proof.control.kl.value == pytest.approx(measured.kl)
    assert proof.control.nll.value == pytest.approx(measured.ce)
    assert proof.control.top1_agreement.value == pytest.approx(measured.top1_agreement)


def test_the_proof_sets_the_control_beside_the_adapter(whole: tuple[Place, Run]) -> None:
    proof = result_of(whole[1]).proof
    by_hand = 1 - proof.control.kl.value / proof.student.kl.value
    assert proof.control_gap_closed.kl.value == pytest.approx(by_hand)
    lead = proof.against_control.kl.by.value
    assert lead == pytest.approx(proof.control.kl.value - proof.adapted.kl.value)
    assert proof.verdict.against_control is not None
    assert proof.control.parameters == proof.adapted.parameters > proof.student.parameters


def test_the_time_of_the_control_is_its_own(whole: tuple[Place, Run]) -> None:
    result = result_of(whole[1])
    kept = read_result(whole[0].out / "a" / CONTROL)
    assert result.seconds["control"] == pytest.approx(sum(kept.seconds.values()))
    assert (kept.fidelity, kept.proof, kept.capture_peak_memory) == (None, None, 0)


# Once


def test_a_run_at_another_temperature_reuses_the_control(done: Place, whole: tuple[Place, Run]) -> None:
    before = files_of(done.out / "a" / CONTROL)
    first = result_of(whole[1])
    run = done.run("a", losses__temperature=4.0)
    assert trained(run) == ["a"]
    assert files_of(done.out / "a" / CONTROL) == before
    found = result_of(run)
    assert found.proof.control == first.proof.control
    assert found.proof.adapted.kl != first.proof.adapted.kl


@pytest.mark.parametrize("change", [{"seed": 1}, {"training__iters": 3}, {"lora__rank": 3}], ids=str)
def test_a_run_that_trains_otherwise_trains_another_control(change: dict[str, Any], done: Place) -> None:
    before = control_of(done)
    assert trained(done.run("a", **change)) == ["a", LABEL]
    assert control_of(done) != before


def test_a_control_that_is_asked_for_later_is_trained_alone(captured: Place, whole: tuple[Place, Run]) -> None:
    first = result_of(captured.run("a", control="none"))
    adapter = (captured.out / "a" / WEIGHTS).stat()
    run = captured.run("a")
    assert trained(run) == [LABEL]
    assert (captured.out / "a" / WEIGHTS).stat().st_mtime_ns == adapter.st_mtime_ns, "not touched"
    found = result_of(run)
    assert not found.unchanged
    assert found.steps == first.steps
    assert (found.before, found.after, found.validations) == (first.before, first.after, first.validations)
    assert found.fidelity == first.fidelity
    assert_same_run(captured, whole)
    assert result_of(captured.run("a")).unchanged


def test_a_control_that_is_no_longer_asked_for_leaves_the_run_finished(done: Place) -> None:
    result = result_of(done.run("a", control="none"))
    assert result.unchanged
    assert result.proof.control is not None


def test_a_fresh_run_trains_both_again(done: Place, whole: tuple[Place, Run]) -> None:
    assert trained(done.run("a", fresh=True)) == ["a", LABEL]
    assert_same_run(done, whole)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_control_that_is_damaged_is_trained_again_alone_when_it_is_needed(
    damage: str, done: Place, whole: tuple[Place, Run]
) -> None:
    weights = done.out / "a" / CONTROL / WEIGHTS
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1])
    run = done.run("a", evaluation__answer_marker="so:")
    assert trained(run) == [LABEL]
    assert untimed(done) == untimed(whole[0])


# Stops


def stop(place: Place, kind: type, domain: str, iteration: int = 0) -> None:
    """Run until something is told, and stop there."""
    for event in place.start("a"):
        if isinstance(event, kind) and event.domain == domain and iteration in (0, step_of(event)):
            return
    raise AssertionError("the run was over before")


def step_of(event: events.Event) -> int:
    return event.step.iteration if isinstance(event, events.Stepped) else 0


def made(place: Place) -> dict[str, int]:
    """Run to the end; returns how many steps an earlier run had made of each."""
    run = place.run("a")
    assert run.failures == {}
    return {event.domain: event.made for event in run.of(events.TrainingStarted)}


def test_a_run_that_is_stopped_between_the_two_trains_only_the_control(
    captured: Place, whole: tuple[Place, Run]
) -> None:
    stop(captured, events.TrainingStarted, LABEL)
    assert (captured.out / "a" / "kd_metrics.json").exists(), (
        "what was distilled is finished, whatever comes of the control"
    )
    assert made(captured) == {LABEL: 0}
    assert_same_run(captured, whole)


def test_a_run_that_is_stopped_in_its_control_goes_on_from_there(captured: Place, whole: tuple[Place, Run]) -> None:
    stop(captured, events.Stepped, LABEL, 3)
    assert made(captured) == {LABEL: 2}
    assert_same_run(captured, whole)


def test_a_run_that_is_stopped_before_its_control_trains_nothing_again(
    captured: Place, whole: tuple[Place, Run]
) -> None:
    stop(captured, events.Proving, "a")
    assert made(captured) == {"a": 4, LABEL: 0}
    assert_same_run(captured, whole)


@pytest.mark.parametrize(
    ("before", "expected"),
    [(f"{CONTROL}/{WEIGHTS}", {LABEL: 0}), (f"{CONTROL}/kd_metrics.json", {LABEL: 4})],
    ids=["before its adapter", "before its metrics"],
)
def test_a_run_that_is_killed_in_its_control_ends_as_if_it_had_not_been(
    before: str, expected: dict[str, int], captured: Place, whole: tuple[Place, Run]
) -> None:
    (captured.root / "base.yaml").write_text(json.dumps(captured.config))
    with spawn(captured, "-c", KILLED_BEFORE, before, "distill", "-d", "a", "--config", "base.yaml") as process:
        assert process.wait() == -signal.SIGKILL
    for temporary in captured.out.rglob(".tmp-*"):
        temporary.unlink()
    assert made(captured) == expected
    assert_same_run(captured, whole)


def test_a_file_that_a_kill_left_unfinished_beside_a_control_is_gone_in_the_end(captured: Place) -> None:
    stop(captured, events.Stepped, LABEL, 3)
    (captured.out / "a" / CONTROL / ".tmp-1234.safetensors").write_bytes(b"half of")
    made(captured)
    assert list(captured.out.rglob(".tmp-*")) == []


def test_a_control_stopped_under_other_settings_is_not_gone_on_from(captured: Place) -> None:
    stop(captured, events.Stepped, LABEL, 3)
    run = captured.run("a", seed=1)
    assert {event.domain: event.made for event in run.of(events.TrainingStarted)} == {"a": 0, LABEL: 0}
    assert {event.domain for event in run.of(events.CheckpointsReplaced)} == {"a", LABEL}


# Around it


def test_students_are_opened_one_at_a_time_for_a_control_as_well(
    place: Place, tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> None:
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768, "num_attention_heads": 4}
    large = save_random_model(tmp_path_factory.mktemp("large"), tokenizer_folder, seed=5, **sizes)
    place.config["student"] = str(large)
    held = active_memory()
    seen = {}
    for event in place.start("a"):
        if isinstance(event, (events.TrainingStarted, events.Proving)):
            seen[type(event).__name__, event.domain] = active_memory() - held
    assert seen.keys() == {("TrainingStarted", "a"), ("TrainingStarted", LABEL), ("Proving", "a")}
    assert max(seen.values()) < size_of(large) + SLACK
    assert seen["Proving", "a"] < SLACK


def test_a_domain_that_is_refused_trains_no_control(place: Place, teacher_folder: Path) -> None:
    place.config |= {"targets": EXACT, "student": str(teacher_folder), "gate": {"when_no_better": "refuse"}}
    run = place.run("a")
    assert list(run.failures) == ["a"]
    assert trained(run) == []
    assert not (place.out / "a" / CONTROL).exists()


def test_a_control_stops_by_its_own_patience(captured: Place) -> None:
    captured.write("a", SCORED, [{"prompt": "hi", "completion": "said hello to the world"}])
    captured.config["training"] = {
        "validate_every": 1,
        "checkpoint_every": 1,
        "iters": 12,
        "learning_rate": 0.03,
        "patience": 2,
    }
    captured.config["losses"] = {"alpha": 1.0}
    result = result_of(captured.run("a"))
    kept = read_result(captured.out / "a" / CONTROL)
    for one in (result, kept):
        losses = [validation.metrics.loss for validation in one.validations[1:]]
        assert one.best_iteration == int(np.argmin(losses)) + 1
    assert len(kept.steps) == kept.best_iteration + 2 < 12
    best = captured.out / "a" / CONTROL / f"checkpoint_{kept.best_iteration}" / WEIGHTS
    assert control_of(captured) == best.read_bytes()
