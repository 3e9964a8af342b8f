"""metrics.jsonl: what a follower reads while a domain trains, and what is left when it is finished."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from test_pipeline import Place, Run, files_of, steady_lines

from true_kd import events
from true_kd.adapters import CONTROL, LINES
from true_kd.errors import NonFiniteLossError
from true_kd.evaluation import EvalMetrics
from true_kd.files import CannotWrite
from true_kd.reporting import Finish, MetricsFile, Start, Validation, line_schema, lines_of, read_lines, read_result
from true_kd.training import StepMetrics

STEP = StepMetrics(1, 1.5, 1.0, 2.0, 1e-3, 0.5, 40, 64, 0.25, 400.0, 10**9)
METRICS_ = EvalMetrics(1.0, 0.5, 1.5, 0.25, 0.75, 10)


def steps(count: int) -> list[StepMetrics]:
    return [replace(STEP, iteration=number) for number in range(1, count + 1)]


def check(content: bytes) -> list[dict[str, Any]]:
    """The lines of a file, each as its schema has it."""
    lines = [json.loads(line) for line in content.decode().splitlines()]
    schema = jsonschema.Draft202012Validator(line_schema())
    for line in lines:
        schema.validate(line)
    return lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> tuple[Place, Run]:
    place = Place(tmp_path_factory.mktemp("lines"), teacher_folder, student_folder, control="sft")
    place.config["training"] |= {"iters": 4, "checkpoint_every": 2}
    place.write("a")
    return place, place.run("a")


# While it trains


def test_each_step_can_be_read_when_it_is_told(place_of_one: Place) -> None:
    path = place_of_one.out / "a" / LINES
    for event in place_of_one.start("a"):
        if isinstance(event, events.Stepped):
            assert list(read_lines(path))[-1] == event.step
        if isinstance(event, events.Validated) and event.validation.iteration > 0:
            assert list(read_lines(path))[-1] == event.validation


@pytest.fixture
def place_of_one(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Place:
    place = Place(tmp_path, teacher_folder, student_folder)
    place.write("a")
    return place


def test_what_a_stopped_run_wrote_beyond_its_checkpoint_is_there_once(
    finished: tuple[Place, Run], tmp_path: Path
) -> None:
    whole, _ = finished
    place = Place(tmp_path, Path(whole.config["teacher"]), Path(whole.config["student"]), control="sft")
    place.config |= {"training": whole.config["training"], "cache": whole.config["cache"]}
    place.write("a")
    for event in place.start("a"):
        if isinstance(event, events.Stepped) and event.step.iteration == 3:
            break
    path = place.out / "a" / LINES
    assert [line.iteration for line in read_lines(path) if isinstance(line, StepMetrics)] == [1, 2, 3]
    with path.open("a") as file:
        file.write('{"type": "step", "itera')
    run = place.run("a")
    [started] = [event for event in run.of(events.TrainingStarted) if event.domain == "a"]
    assert started.made == 2
    expected = files_of(whole.out / "a")
    for name in (LINES, f"{CONTROL}/{LINES}"):
        assert steady_lines(files_of(place.out / "a")[name]) == steady_lines(expected[name])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is the full disk")
def test_a_disk_that_is_full_at_a_line_is_told_with_what_is_needed_and_free(tmp_path: Path) -> None:
    told = MetricsFile(tmp_path)
    told.begin(lines_of("a", 2, [], []))
    told.close()
    told._descriptor = os.open("/dev/full", os.O_WRONLY)
    where = re.escape(str(tmp_path / LINES))
    with pytest.raises(CannotWrite, match=rf"{where}: cannot be written \(No space left on device: \d+ bytes needed, "):
        told.add(STEP)
    told.close()


def test_a_number_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    told = MetricsFile(tmp_path)
    told.begin(lines_of("a", 2, [], []))
    before = (tmp_path / LINES).read_bytes()
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            told.add(replace(STEP, grad_norm=value))
    told.close()
    assert (tmp_path / LINES).read_bytes() == before


# What is left


def test_a_finished_file_says_what_kd_metrics_says(finished: tuple[Place, Run]) -> None:
    place, run = finished
    for folder, label in ((place.out / "a", "a"), (place.out / "a" / CONTROL, "a (SFT control)")):
        result = read_result(folder)
        lines = list(read_lines(folder / LINES))
        assert lines[0] == Start(1, label, 4)
        assert [line for line in lines if isinstance(line, StepMetrics)] == list(result.steps)
        assert [line for line in lines if isinstance(line, Validation)] == list(result.validations)
        assert lines[-1] == Finish(4, result.best_iteration)
    assert run.results["a"].steps == tuple(line for line in read_lines(place.out / "a" / LINES) if hasattr(line, "kd"))


def test_each_line_is_as_its_schema_has_it_and_in_order(finished: tuple[Place, Run]) -> None:
    lines = check((finished[0].out / "a" / LINES).read_bytes())
    kinds = [(line["type"], line.get("iteration")) for line in lines]
    assert kinds == [
        ("start", None),
        ("validation", 0),
        ("step", 1),
        ("step", 2),
        ("validation", 2),
        ("step", 3),
        ("step", 4),
        ("validation", 4),
        ("finish", 4),
    ]
    assert list(lines[2]) == ["type", *asdict(STEP)]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("spoil", [Path.unlink, cut])
def test_a_finished_domain_gets_its_file_again(spoil, finished: tuple[Place, Run]) -> None:
    place, _ = finished
    paths = (place.out / "a" / LINES, place.out / "a" / CONTROL / LINES)
    before = [path.read_bytes() for path in paths]
    for path in paths:
        spoil(path)
    assert place.run("a").results["a"].unchanged
    assert [path.read_bytes() for path in paths] == before


def test_a_run_of_other_settings_leaves_nothing_of_the_one_before(place_of_one: Place) -> None:
    place_of_one.run("a")
    place_of_one.run("a", training__iters=1)
    assert [line.iteration for line in read_lines(place_of_one.out / "a" / LINES) if isinstance(line, StepMetrics)] == [
        1
    ]


def test_a_diverged_domain_keeps_the_lines_of_its_steps_and_no_finish(place_of_one: Place) -> None:
    training = {"training__learning_rate": 1.0, "training__grad_clip": 0.0, "training__warmup": 0.0}
    run = place_of_one.run("a", **training, training__iters=4, lora__scale=1e30)
    assert isinstance(run.failures["a"], NonFiniteLossError)
    check((place_of_one.out / "a" / LINES).read_bytes())
    lines = list(read_lines(place_of_one.out / "a" / LINES))
    steps = [event.step for event in run.of(events.Stepped)]
    assert [line for line in lines if isinstance(line, StepMetrics)] == steps
    assert not any(isinstance(line, Finish) for line in lines)


# Reading


def whole_file(folder: Path) -> bytes:
    told = MetricsFile(folder)
    told.begin(lines_of("a", 3, [], [Validation(0, METRICS_)]))
    for step in steps(3):
        told.add(step)
    told.add(Finish(3, 0))
    told.close()
    return (folder / LINES).read_bytes()


def test_a_file_that_is_cut_anywhere_reads_as_its_whole_lines(tmp_path: Path) -> None:
    content = whole_file(tmp_path)
    every = list(read_lines(tmp_path / LINES))
    assert len(every) == 6
    for length in range(len(content) + 1):
        (tmp_path / LINES).write_bytes(content[:length])
        assert list(read_lines(tmp_path / LINES)) == every[: content[:length].count(b"\n")], length


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 200,
        b"\n",
        b"[]\n",
        b"{}\n",
        b'{"type": "start"}\n',
        b'{"type": "start", "format": 2, "domain": "a", "iters": 3}\n',
        b'{"type": []}\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_what_is_no_such_file_reads_as_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / LINES).write_bytes(content)
    assert list(read_lines(tmp_path / LINES)) == []


def test_zeros_after_a_power_cut_end_the_reading(tmp_path: Path) -> None:
    content = whole_file(tmp_path)
    half = content.find(b"\n", len(content) // 2) + 1
    (tmp_path / LINES).write_bytes(content[:half] + b"\0" * 100 + b"\n" + content[half:])
    assert len(list(read_lines(tmp_path / LINES))) == content[:half].count(b"\n")


def test_no_file_a_folder_and_a_link_read_as_nothing(tmp_path: Path) -> None:
    assert list(read_lines(tmp_path / LINES)) == []
    (tmp_path / LINES).mkdir()
    assert list(read_lines(tmp_path / LINES)) == []
    (tmp_path / "b").mkdir()
    whole_file(tmp_path / "b")
    (tmp_path / "link").symlink_to(tmp_path / "b" / LINES)
    assert list(read_lines(tmp_path / "link")) == []
