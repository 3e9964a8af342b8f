"""Adapters are measured anew without being touched, and domains are weighed up before anything is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import save_random_model
from test_pipeline import EXACT, SLACK, WEIGHTS, Place, active_memory, files_of, metrics_of

from true_kd import events
from true_kd.adapters import CONTROL
from true_kd.config import Override
from true_kd.errors import InputError, LockedError, ModelError, VocabularyError
from true_kd.gate import Headroom, ParentComparison
from true_kd.jobs import plan
from true_kd.manifest import SHARD, read_manifest
from true_kd.pipeline import analyze, evaluate
from true_kd.proof import Proof

OTHERS = ("where is the cat", "who is on the mat", "say what the world said")


@pytest.fixture
def place(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Place:
    """A place with one domain, `a`."""
    place = Place(tmp_path, teacher_folder, student_folder)
    place.write("a")
    return place


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> Place:
    """A run of domain `a` with its control, that is only looked at."""
    place = Place(tmp_path_factory.mktemp("finished"), teacher_folder, student_folder, control="sft")
    place.write("a")
    assert place.run("a").failures == {}
    return place


@pytest.fixture
def done(finished: Place, place: Place) -> Place:
    """A copy of that run; its prompts lie elsewhere, and are the same."""
    for name in ("out", "cache"):
        shutil.copytree(finished.root / name, place.root / name)
    place.config["control"] = "sft"
    return place


class Evaluation:
    """The events of an evaluation that came to its end."""

    def __init__(self, place: Place, *domains: str, **changes: Any) -> None:
        self.events = list(evaluate(*jobs_of(place, *domains, **changes)))
        self.end: events.EvaluationFinished = self.events[-1]
        self.proofs: Mapping[str, Proof] = self.end.proofs

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def kept(self) -> dict[str, bool]:
        return {event.domain: event.kept for event in self.of(events.Evaluated)}


def jobs_of(place: Place, *domains: str, **changes: Any) -> tuple[list, dict]:
    base = place.root / "base.yaml"
    base.write_text(json.dumps(place.config))
    return plan(base, domains, [Override("--set", tuple(name.split("__")), value) for name, value in changes.items()])


def weights_of(place: Place) -> dict[str, tuple[bytes, int]]:
    """Every adapter of a place, with its time."""
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in place.out.rglob(WEIGHTS)}


# Adapters anew


def test_a_finished_adapter_measures_as_its_run_said(done: Place) -> None:
    before, weights = metrics_of(done), weights_of(done)
    found = Evaluation(done, "a")
    assert found.end.failures == {}
    assert found.kept == {"a": True}
    assert found.of(events.Stepped) == found.of(events.TeacherOpening) == found.of(events.Probed) == []
    assert weights_of(done) == weights, "not touched"
    after = metrics_of(done)
    assert after["curves"] == before["curves"]
    for name in ("student", "adapted", "control", "teacher", "gap_closed", "against_control", "verdict"):
        assert after["result"]["proof"][name] == before["result"]["proof"][name], name
    assert done.run("a").results["a"].unchanged


def test_what_is_measured_otherwise_goes_into_metrics_and_summary(done: Place) -> None:
    found = Evaluation(done, "a", evaluation__speed_tokens=2)
    assert found.proofs["a"].adapted.tokens_per_second > 0
    assert metrics_of(done)["result"]["proof"]["adapted"]["tokens_per_second"] > 0
    summary = json.loads((done.out / "kd_summary.json").read_text())
    assert summary["domains"]["a"]["proof"]["adapted"]["tokens_per_second"] > 0
    assert done.run("a", evaluation__speed_tokens=2).results["a"].unchanged


@pytest.mark.parametrize("change", [{"losses__temperature": 3.0}, {"seed": 1}, {"training__iters": 3}], ids=str)
def test_an_adapter_of_other_settings_is_measured_and_its_metrics_stay(change: dict[str, Any], done: Place) -> None:
    before = files_of(done.out / "a")
    found = Evaluation(done, "a", **change, control="none")
    assert found.kept == {"a": False}
    assert found.proofs["a"].adapted.kl.value > 0
    assert files_of(done.out / "a") == before


def test_other_held_out_prompts_are_measured_and_the_metrics_stay(done: Place) -> None:
    done.write("a", valid=OTHERS)
    before = files_of(done.out / "a")
    found = Evaluation(done, "a", control="none")
    assert found.kept == {"a": False}
    assert found.proofs["a"].examples == len(OTHERS)
    assert files_of(done.out / "a") == before


def test_measuring_on_other_prompts_trains_no_control_and_leaves_the_one_there(done: Place) -> None:
    """The config of the run, which asks for a control, is that of the evaluation."""
    done.write("a", valid=OTHERS)
    before = weights_of(done)
    found = Evaluation(done, "a")
    assert found.of(events.Stepped) == []
    assert weights_of(done) == before


def test_a_run_that_was_stopped_is_measured_as_far_as_it_came(done: Place) -> None:
    (done.out / "a" / "kd_metrics.json").unlink()
    found = Evaluation(done, "a")
    assert found.kept == {"a": False}
    assert not (done.out / "a" / "kd_metrics.json").exists(), "it would pass for finished"


def test_a_control_that_is_there_is_measured_though_none_is_asked_for(done: Place) -> None:
    assert Evaluation(done, "a", control="none").proofs["a"].control is not None
    shutil.rmtree(done.out / "a" / CONTROL)
    assert Evaluation(done, "a", control="none").proofs["a"].control is None


def test_a_domain_without_an_adapter_fails_alone(done: Place) -> None:
    done.write("b")
    found = Evaluation(done, "b", "a")
    assert isinstance(found.end.failures["b"], InputError)
    assert "no adapter here" in str(found.end.failures["b"])
    assert list(found.proofs) == ["a"]
    assert not (done.out / "b").exists()


def test_the_teacher_answers_what_the_cache_lacks(done: Place) -> None:
    shutil.rmtree(done.root / "cache")
    found = Evaluation(done, "a")
    assert len(found.of(events.TeacherOpening)) == 1
    assert found.kept == {"a": True}


def test_a_folder_in_use_is_not_measured(done: Place) -> None:
    running = done.start("a", fresh=True)
    next(running)
    with pytest.raises(LockedError):
        Evaluation(done, "a")
    running.close()


def test_models_are_open_one_at_a_time(
    place: Place, tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> None:
    large = large_model(tmp_path_factory, tokenizer_folder)
    place.config["student"] = str(large)
    place.run("a")
    held = active_memory()
    seen = [
        active_memory() - held
        for event in evaluate(*jobs_of(place, "a"))
        if isinstance(event, (events.Proving, events.Evaluated))
    ]
    assert len(seen) == 2
    assert max(seen) < SLACK


def large_model(factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768, "num_attention_heads": 4}
    return save_random_model(factory.mktemp("large"), tokenizer_folder, seed=5, **sizes)


# What there is to gain


class Analysis:
    """The events of an analysis that came to its end."""

    def __init__(self, place: Place, *domains: str, parent: str | None = None, **changes: Any) -> None:
        self.events = list(analyze(*jobs_of(place, *domains, **changes), parent))
        self.end: events.AnalysisFinished = self.events[-1]
        self.headrooms: Mapping[str, Headroom] = self.end.headrooms
        self.parents: Mapping[str, ParentComparison] = self.end.parents

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def cached_replies(place: Place) -> int:
    files = [file for path in place.root.glob("cache/*/manifest.jsonl") for file in read_manifest(path.parent).items()]
    return sum(file.replies for name, file in files if SHARD.fullmatch(name))


def test_a_sample_is_compared_and_nothing_is_trained(place: Place) -> None:
    place.write("a", valid=OTHERS)
    found = Analysis(place, "a", gate__prompts=2)
    assert found.end.failures == {}
    assert found.headrooms["a"].prompts == 2
    assert cached_replies(place) == 2, "no more than the sample"
    assert not place.out.exists()
    kinds = [type(event) for event in found.events]
    assert kinds.index(events.TeacherOpening) < kinds.index(events.TeacherFreed) < kinds.index(events.Probed)
    assert kinds.count(events.TeacherOpening) == 1


def test_an_analysis_finds_what_the_proof_finds(place: Place) -> None:
    proof = place.run("a").results["a"].proof
    found = Analysis(place, "a", gate__prompts=100)
    assert found.headrooms["a"] == proof.headroom
    assert found.of(events.TeacherOpening) == [], "all is in the cache"


def test_the_domain_with_the_most_to_gain_comes_first(place: Place, teacher_folder: Path) -> None:
    place.config["targets"] = EXACT
    place.write("b")
    (place.root / "b.yaml").write_text(f"student: {teacher_folder}\n")
    found = Analysis(place, "b", "a")
    assert list(found.headrooms) == ["a", "b"]
    assert found.headrooms["b"].standing == "same"


def test_a_gate_that_refuses_does_not_stop_an_analysis(place: Place, teacher_folder: Path) -> None:
    place.config |= {"targets": EXACT, "student": str(teacher_folder), "gate": {"when_no_better": "refuse"}}
    found = Analysis(place, "a")
    assert found.end.failures == {}
    assert found.headrooms["a"].standing == "same"


def test_a_domain_that_leaves_no_room_fails_alone(place: Place) -> None:
    place.write("b", valid=["the cat sat on the mat " * 20])
    found = Analysis(place, "b", "a", training__max_seq_length=60)
    assert isinstance(found.end.failures["b"], InputError)
    assert list(found.headrooms) == ["a"]


def test_a_teacher_without_its_weights_is_analysed_as_far_as_its_cache_knows(place: Place) -> None:
    expected = place.run("a").results["a"].proof.headroom
    [cache] = [path.parent.name for path in (place.root / "cache").glob("*/manifest.jsonl")]
    assert Analysis(place, "a", teacher__model=f"cache:{cache}").headrooms["a"] == expected
    place.write("a", valid=OTHERS)
    found = Analysis(place, "a", teacher__model=f"cache:{cache}")
    assert isinstance(found.end.failures["a"], ModelError)
    assert "its weights are not here" in str(found.end.failures["a"])


# A teacher and its parent


@pytest.fixture
def quantised(place: Place, quantised_folder: Path) -> Place:
    """The place with a teacher in four bits, made from the student."""
    place.config |= {"teacher": {"model": str(quantised_folder), "dequantize": "never"}, "targets": EXACT}
    return place


def test_a_teacher_is_compared_with_its_parent(quantised: Place, student_folder: Path) -> None:
    found = Analysis(quantised, "a", parent=str(student_folder))
    comparison = found.parents["a"]
    assert 0 < comparison.kl.value < 1.0
    assert comparison.replies == 2
    assert comparison.top1_agreement.value <= 1.0
    assert found.headrooms["a"].kl.value == pytest.approx(comparison.kl.value, rel=1.0), "its student is its parent"
    [told] = found.of(events.ParentCompared)
    assert (told.domain, told.parent, told.replies) == ("a", str(student_folder), 2)


def test_a_teacher_that_is_its_own_parent_has_lost_nothing(place: Place, teacher_folder: Path) -> None:
    place.config["targets"] = EXACT
    comparison = Analysis(place, "a", parent=str(teacher_folder)).parents["a"]
    assert abs(comparison.kl.value) < 1e-4
    assert comparison.top1_agreement.value == 1.0
    assert comparison.parent_nll == pytest.approx(comparison.teacher_nll, rel=1e-3)


def test_teacher_and_parent_are_open_one_after_the_other(
    quantised: Place, tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> None:
    large = large_model(tmp_path_factory, tokenizer_folder)
    quantised.config["teacher"] = str(large)
    held = active_memory()
    seen = [
        active_memory() - held
        for event in analyze(*jobs_of(quantised, "a"), str(large))
        if isinstance(event, events.TeacherOpening)
    ]
    assert len(seen) == 3, "teacher, parent, teacher"
    assert max(seen) < SLACK
    assert active_memory() - held < SLACK


def test_a_parent_of_another_vocabulary_is_refused(place: Place, teacher_folder: Path) -> None:
    stranger = place.root / "stranger"
    shutil.copytree(teacher_folder, stranger)
    tokenizer = json.loads((stranger / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Ġmat"], vocabulary["Ġcat"] = vocabulary["Ġcat"], vocabulary["Ġmat"]
    (stranger / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(VocabularyError):
        Analysis(place, "a", parent=str(stranger))


def test_a_parent_does_not_change_what_there_is_to_gain(quantised: Place, student_folder: Path) -> None:
    with_parent = Analysis(quantised, "a", parent=str(student_folder)).headrooms
    assert Analysis(quantised, "a").headrooms == with_parent
