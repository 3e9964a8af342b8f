"""What is written is read back, and only while it is true of the adapter beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from handmade import usual_proof

from true_kd import reporting
from true_kd.evaluation import EvalMetrics
from true_kd.reporting import (
    DataCounts,
    KDResult,
    Validation,
    peak_memory,
    read_result,
    write_result,
    write_summary,
)
from true_kd.training import StepMetrics

DIGEST, PROOF_DIGEST = "d" * 64, "e" * 64
PROOF = usual_proof("a", control=True, tasks=8)


def metrics(loss: float) -> EvalMetrics:
    return EvalMetrics(loss=loss, kd=loss + 0.1, ce=loss - 0.1, kl=loss / 3, top1_agreement=0.5, tokens=30)


def step(iteration: int) -> StepMetrics:
    return StepMetrics(
        iteration=iteration,
        total=1.0 / iteration,
        kd=0.7 / iteration,
        ce=1.7 / iteration,
        learning_rate=1e-4,
        grad_norm=0.3,
        response_tokens=20,
        padded_tokens=50,
        seconds=0.1,
        tokens_per_second=500.0,
        peak_memory=1000 + iteration,
    )


def make_result(out: Path, domain: str, **changes: Any) -> KDResult:
    """A result, and the adapter that it speaks of."""
    folder = out / domain
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapters.safetensors").write_bytes(f"the adapter of {domain}".encode())
    (folder / "adapter_config.json").write_text("{}")
    result = KDResult(
        domain=domain,
        teacher="a/teacher",
        student="a/student",
        adapter_path=str(folder),
        data=DataCounts(10, 2, 200, 300, 1, 2, 3, 0, 4000),
        before=metrics(3.0),
        after=metrics(1.1),
        best_iteration=2,
        steps=tuple(step(iteration) for iteration in (1, 2, 3)),
        validations=(Validation(0, metrics(3.0)), Validation(2, metrics(1.1)), Validation(3, metrics(1.2))),
        seconds={"capture": 1.5, "training": 2.25, "evaluation": 0.1},
        capture_peak_memory=5000,
        training_peak_memory=3000,
        trainable_parameters=100,
        finished_at="2026-01-02T03:04:05+00:00",
        proof=PROOF,
        versions={"mlx": "0.32"},
    )
    return replace(result, **changes)


def write(out: Path, domain: str = "a", **changes: Any) -> KDResult:
    result = make_result(out, domain, **changes)
    write_result(out / domain, result, DIGEST, PROOF_DIGEST)
    return result


@pytest.mark.parametrize(
    "changes",
    [{}, {"proof": usual_proof("a")}, {"proof": None}],
    ids=["with all there is", "of no control and no tasks", "of a control"],
)
def test_a_result_is_read_back_as_it_was(tmp_path: Path, changes: dict[str, Any]) -> None:
    written = write(tmp_path, **changes)
    assert read_result(tmp_path / "a", DIGEST) == replace(written, unchanged=True)


def test_a_result_is_read_whatever_run_it_is_of(tmp_path: Path) -> None:
    write(tmp_path)
    assert read_result(tmp_path / "a") is not None


def test_the_result_of_another_run_is_none_of_this_one(tmp_path: Path) -> None:
    write(tmp_path)
    assert read_result(tmp_path / "a", "f" * 64) is None


def test_the_result_of_other_measures_is_none_of_this_run(tmp_path: Path) -> None:
    write(tmp_path)
    assert read_result(tmp_path / "a", DIGEST, "f" * 64) is None
    assert read_result(tmp_path / "a", "f" * 64, PROOF_DIGEST) is None
    assert read_result(tmp_path / "a", DIGEST, PROOF_DIGEST) is not None
    assert read_result(tmp_path / "a", DIGEST) is not None, "the adapter is there, whatever is measured of it"


def test_a_result_follows_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    found = read_result(tmp_path / "new" / "a", DIGEST)
    assert found is not None
    assert found.adapter_path == str(tmp_path / "new" / "a")


def test_there_is_no_result_in_an_empty_folder(tmp_path: Path) -> None:
    assert read_result(tmp_path / "nowhere", DIGEST) is None


@pytest.mark.parametrize("file", ["adapters.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("content", [b"", b"something else"])
def test_a_result_is_void_when_its_adapter_changed(tmp_path: Path, file: str, content: bytes) -> None:
    write(tmp_path)
    (tmp_path / "a" / file).write_bytes(content)
    assert read_result(tmp_path / "a", DIGEST) is None


@pytest.mark.parametrize("file", ["adapters.safetensors", "adapter_config.json"])
def test_a_result_is_void_when_its_adapter_is_gone(tmp_path: Path, file: str) -> None:
    write(tmp_path)
    (tmp_path / "a" / file).unlink()
    assert read_result(tmp_path / "a", DIGEST) is None


def edited(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    def edit(record: dict[str, Any]) -> Any:
        return {**record, **changes}

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        edited(format=reporting.FORMAT + 1),
        edited(result=None),
        edited(result={}),
        pytest.param(edited(curves=None)),
        pytest.param(edited(curves={})),
        edited(curves={"iteration": [1, 2], "total": [1.0]}),
        edited(curves={"iteration": [1, 2]}),
        lambda record: [],
        lambda record: {**record, "result": {**record["result"], "best_iteration": "two"}},
        lambda record: {**record, "result": {**record["result"], "proof": {}}},
        lambda record: {**record, "result": {**record["result"], "proof": {**record["result"]["proof"], "student": 3}}},
        lambda record: {name: value for name, value in record.items() if name != "curves"},
        edited(timings=None),
        edited(timings={}),
        edited(timings={"seconds": [0.1], "tokens_per_second": [1.0], "peak_memory": [1]}),
        lambda record: {name: value for name, value in record.items() if name != "timings"},
    ],
)
def test_metrics_that_cannot_be_understood_are_no_result(tmp_path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    write(tmp_path)
    path = tmp_path / "a" / "kd_metrics.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    assert read_result(tmp_path / "a", DIGEST) is None


def test_metrics_are_json_of_numbers_that_are_some(tmp_path: Path) -> None:
    write(tmp_path)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    json.loads((tmp_path / "a" / "kd_metrics.json").read_text(), parse_constant=refuse)


@pytest.mark.parametrize("length", [0, 1, 500])
def test_half_a_metrics_file_is_no_result(tmp_path: Path, length: int) -> None:
    write(tmp_path)
    path = tmp_path / "a" / "kd_metrics.json"
    path.write_bytes(path.read_bytes()[:length])
    assert read_result(tmp_path / "a", DIGEST) is None


def test_curves_and_timings_have_one_list_per_quantity(tmp_path: Path) -> None:
    written = write(tmp_path)
    record = json.loads((tmp_path / "a" / "kd_metrics.json").read_text())
    assert set(record["timings"]) == set(StepMetrics.MEASURED)
    assert set(record["curves"]) == set(StepMetrics.__dataclass_fields__) - set(StepMetrics.MEASURED) - {"MEASURED"}
    for name, values in {**record["curves"], **record["timings"]}.items():
        assert values == [getattr(step, name) for step in written.steps]


def test_the_curves_have_nothing_that_depends_on_the_clock(tmp_path: Path) -> None:
    write(tmp_path / "one")
    slower = tuple(
        replace(step(iteration), seconds=9.0, tokens_per_second=1.0, peak_memory=1) for iteration in (1, 2, 3)
    )
    write(tmp_path / "other", steps=slower)
    one, other = (json.loads((tmp_path / name / "a" / "kd_metrics.json").read_text()) for name in ("one", "other"))
    assert one["curves"] == other["curves"]
    assert one["timings"] != other["timings"]


def first_format(record: dict[str, Any]) -> dict[str, Any]:
    """It had the timings among the curves."""
    curves = {**record["curves"], **record.pop("timings")}
    return {**record, "format": 1, "curves": curves}


def second_format(record: dict[str, Any]) -> dict[str, Any]:
    """It had shares of right answers, and no proof."""
    del record["result"]["proof"], record["proof_digest"]
    answers = {"tasks": 5, "student": 0.2, "adapted": 0.6, "teacher": 0.8}
    return {**record, "format": 2, "result": {**record["result"], "exact_match": answers, "student_parameters": 9}}


@pytest.mark.parametrize("earlier", [first_format, second_format])
def test_metrics_of_an_earlier_format_are_no_result(
    earlier: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    write(tmp_path)
    path = tmp_path / "a" / "kd_metrics.json"
    path.write_text(json.dumps(earlier(json.loads(path.read_text()))))
    assert read_result(tmp_path / "a") is None
    assert json.loads(write_summary(tmp_path, [], {}, 1.0).read_text())["domains"] == {}


# The summary


def test_the_summary_holds_results_and_failures(tmp_path: Path) -> None:
    results = [write(tmp_path, "b"), write(tmp_path, "a")]
    path = write_summary(tmp_path, results, {"c": "c: no prompts"}, 12.3456)
    summary = json.loads(path.read_text())
    assert path == tmp_path / "kd_summary.json"
    assert list(summary["domains"]) == ["a", "b"]
    assert summary["failed"] == {"c": "c: no prompts"}
    assert summary["seconds"] == 12.346
    assert summary["domains"]["a"]["after"]["kl"] == results[0].after.kl
    assert summary["domains"]["a"]["proof"]["verdict"]["sentence"] == PROOF.verdict.sentence
    assert summary["domains"]["a"]["training_loss"] == {
        "first": {"total": 1.0, "kd": 0.7, "ce": 1.7},
        "last": {"total": 1.0 / 3, "kd": 0.7 / 3, "ce": 1.7 / 3},
    }


def test_the_summary_keeps_what_was_finished_before(tmp_path: Path) -> None:
    write(tmp_path, "earlier")
    (tmp_path / "not a domain").mkdir()
    (tmp_path / "a file").write_text("")
    summary = json.loads(write_summary(tmp_path, [write(tmp_path, "a")], {}, 1.0).read_text())
    assert list(summary["domains"]) == ["a", "earlier"]
    assert summary["domains"]["earlier"]["unchanged"] is True
    assert summary["domains"]["a"]["unchanged"] is False


def test_the_summary_forgets_what_was_finished_before_and_failed_now(tmp_path: Path) -> None:
    write(tmp_path, "a")
    summary = json.loads(write_summary(tmp_path, [], {"a": "a: it failed"}, 1.0).read_text())
    assert summary["domains"] == {}


def test_the_summary_forgets_a_domain_whose_adapter_was_damaged(tmp_path: Path) -> None:
    write(tmp_path, "earlier")
    (tmp_path / "earlier" / "adapters.safetensors").write_bytes(b"")
    summary = json.loads(write_summary(tmp_path, [write(tmp_path, "a")], {}, 1.0).read_text())
    assert list(summary["domains"]) == ["a"]


def test_a_summary_of_failures_alone_is_written(tmp_path: Path) -> None:
    summary = json.loads(write_summary(tmp_path / "out", [], {"a": "a: it failed"}, 1.0).read_text())
    assert (summary["domains"], summary["failed"], summary["peak_memory"]) == (
        {},
        {"a": "a: it failed"},
        {"capture": 0, "training": 0, "run": 0},
    )


@pytest.mark.parametrize(("capture", "training"), [(5000, 3000), (3000, 5000), (0, 5000)])
def test_the_peak_memory_is_that_of_the_larger_phase(tmp_path: Path, capture: int, training: int) -> None:
    result = write(tmp_path, capture_peak_memory=capture, training_peak_memory=training)
    peak = {"capture": capture, "training": training, "run": 5000}
    assert asdict(peak_memory([result])) == peak
    summary = json.loads(write_summary(tmp_path, [result], {}, 1.0).read_text())
    assert summary["peak_memory"] == summary["domains"]["a"]["peak_memory"] == peak


def test_the_time_is_in_utc() -> None:
    assert datetime.fromisoformat(reporting.now()).utcoffset().total_seconds() == 0
