"""A grid of settings is distilled from one cache, each point in its own folder, and compared on the same prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import Place

from true_kd import events
from true_kd.config import Override
from true_kd.errors import InputError
from true_kd.reporting import read_result
from true_kd.sweep import Axis, grid, sweep

TEMPERATURE = Axis("--temperature", ("losses", "temperature"), (1.0, 2.0))
ALPHA = Axis("--alpha", ("losses", "alpha"), (0.5, 0.9))
SEED = Axis("--seed", ("seed",), (0, 1))


def names(*axes: Axis, with_control: bool = False) -> list[str]:
    return [point.name for point in grid(axes, with_control)]


def test_the_grid_has_every_combination_in_order() -> None:
    assert names(TEMPERATURE, ALPHA) == [
        "temperature=1,alpha=0.5",
        "temperature=1,alpha=0.9",
        "temperature=2,alpha=0.5",
        "temperature=2,alpha=0.9",
    ]


def test_points_that_differ_in_the_seed_alone_are_one_setting() -> None:
    points = grid([TEMPERATURE, SEED], with_control=True)
    assert [point.setting for point in points] == ["temperature=1"] * 2 + ["temperature=2"] * 2 + ["sft"] * 2
    assert len({point.name for point in points}) == 6
    assert [point.is_control for point in points] == [False] * 4 + [True] * 2


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ([], "nothing to vary"),
        ([Axis("--grid", ("capture", "max_tokens"), (1, 2))], "capture.max_tokens cannot be swept"),
        ([Axis("--grid", ("teacher",), ("a", "b"))], "teacher cannot be swept"),
        ([ALPHA, Axis("--grid", ALPHA.path, (0.1, 0.2))], "losses.alpha is swept twice"),
        ([Axis("--seed", ("seed",), tuple(range(201)))], "201 points"),
    ],
    ids=["none", "capture", "teacher", "twice", "many"],
)
def test_a_grid_that_cannot_be_is_refused(axes: list[Axis], says: str) -> None:
    with pytest.raises(InputError, match=says):
        grid(axes, with_control=False)


class Swept:
    """A sweep that came to its end."""

    def __init__(self, place: Place, *axes: Axis, with_control: bool = False, **changes: Any) -> None:
        base = place.root / "base.yaml"
        base.write_text(json.dumps(place.config))
        given = [Override("--set", tuple(name.split("__")), value) for name, value in changes.items()]
        self.events = list(sweep(base, ["a"], given, grid(axes, with_control)))
        self.end: events.SweepFinished = self.events[-1]
        self.folder = place.out / "sweep"

    def count(self, kind: type) -> int:
        return sum(isinstance(event, kind) for event in self.events)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> Callable[[], Place]:
    """Makes places with a domain of eight held-out prompts, each in a folder of its own, that share a cache."""
    shared = tmp_path_factory.mktemp("cache")

    def make() -> Place:
        place = Place(tmp_path_factory.mktemp("sweep"), teacher_folder, student_folder)
        place.config |= {"cache": str(shared), "report": False, "evaluation": {"speed_tokens": 0}}
        place.config["training"] |= {"iters": 3, "batch_size": 5}
        place.write("a", valid=[f"who said hello to cat {count}" for count in range(8)])
        return place

    return make


@pytest.fixture(scope="module")
def swept(ready: Callable[[], Place]) -> Swept:
    """A sweep that is only looked at."""
    return Swept(ready(), TEMPERATURE, Axis("--grid", ("lora", "rank"), (2,)), with_control=True)


def test_the_teacher_is_opened_once_whatever_the_number_of_points(swept: Swept) -> None:
    assert swept.count(events.PointStarted) == 3
    assert swept.count(events.TeacherOpening) <= 1
    assert swept.count(events.CaptureReused) >= 2


def test_each_point_is_a_run_of_its_own(swept: Swept) -> None:
    for name in ("temperature=1,rank=2", "temperature=2,rank=2", "sft"):
        result = read_result(swept.folder / name / "a")
        assert result is not None
        assert result.proof is not None
    run = json.loads((swept.folder / "temperature=1,rank=2" / "a" / "run.json").read_text())
    assert run["losses"]["temperature"] == 1.0
    assert json.loads((swept.folder / "sft" / "a" / "run.json").read_text())["losses"]["alpha"] == 0.0


def test_the_best_is_the_nearest_of_those_that_distil(swept: Swept) -> None:
    [found] = swept.end.recommendations
    measured = {row.setting: row.kl.value for row in found.rows}
    for name, kl in measured.items():
        proof = read_result(swept.folder / name / "a").proof
        assert kl == pytest.approx(proof.adapted.kl.value)
    assert found.best == min((name for name in measured if name != "sft"), key=measured.get)
    assert [row.kl.value for row in found.rows] == sorted(measured.values())
    assert found.best in found.sentence


def test_the_table_is_kept_as_json(swept: Swept) -> None:
    kept = json.loads(swept.end.table.read_text())
    assert swept.end.table == swept.folder / "sweep.json"
    assert kept["domains"]["a"]["best"] == swept.end.recommendations[0].best


def test_a_sweep_that_is_given_again_trains_nothing(ready: Callable[[], Place]) -> None:
    place = ready()
    first = Swept(place, ALPHA)
    again = Swept(place, ALPHA)
    assert first.count(events.Stepped) == 6
    assert again.count(events.Stepped) == 0
    assert again.end.recommendations == first.end.recommendations


def test_repetitions_are_averaged(ready: Callable[[], Place]) -> None:
    swept = Swept(ready(), TEMPERATURE, SEED)
    [found] = swept.end.recommendations
    assert [row.seeds for row in found.rows] == [2, 2]
    for row in found.rows:
        kls = [read_result(swept.folder / f"{row.setting},seed={seed}" / "a").proof.adapted.kl.value for seed in (0, 1)]
        assert row.kl.value == pytest.approx(sum(kls) / 2)


def test_a_point_that_fails_does_not_stop_the_others(ready: Callable[[], Place]) -> None:
    swept = Swept(ready(), Axis("--learning-rate", ("training", "learning_rate"), (0.01, 1.0)), training__iters=40)
    failed = [name for name in swept.end.failures]
    assert len(swept.end.recommendations[0].rows) + len(failed) == 2
