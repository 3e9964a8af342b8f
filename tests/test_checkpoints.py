"""A stopped run goes on as if nothing had stopped it; a checkpoint that is damaged or of another run is passed over."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_pipeline import SCORED, TIMED, WEIGHTS, Place, files_of, plan_of, steady_lines

from true_kd import events, stopping
from true_kd.adapters import checkpoints, load_adapter, save_adapter
from true_kd.checkpoints import RECORD, STATE, Progress, drop_states, find_start
from true_kd.datasets import build_data
from true_kd.evaluation import EvalMetrics, evaluate
from true_kd.files import CHECK, read_record, write_record
from true_kd.models import LoraOptions, ModelOptions, add_lora, open_model, trainable
from true_kd.pipeline import distill
from true_kd.reporting import Validation
from true_kd.training import train

STEADY = {"iters": 12, "validate_every": 3, "checkpoint_every": 4, "learning_rate": 0.01}
CONFIG = "adapter_config.json"
ROOT_FILES = {WEIGHTS, CONFIG, *TIMED}


def lay_out(root: Path, teacher: Path, student: Path) -> Place:
    """A place whose run draws random numbers, and passes through its data many times."""
    place = Place(root, teacher, student)
    place.write("a")
    place.config["lora"] = {"rank": 2, "dropout": 0.3}
    place.config["training"] = {**STEADY, "batch_size": 2, "accumulate": 2}
    return place


def lay_out_patient(root: Path, teacher: Path, student: Path) -> Place:
    """A place whose student soon gets worse at the replies that validate it, so that patience ends the run."""
    place = lay_out(root, teacher, student)
    place.write("a", SCORED, [{"prompt": "hi", "completion": "said hello to the world"}])
    place.config["losses"] = {"alpha": 0.0}
    place.config["training"] |= {
        "validate_every": 1,
        "patience": 3,
        "iters": 16,
        "accumulate": 1,
        "learning_rate": 0.003,
    }
    return place


def ready(place: Place) -> Place:
    """The place with its config written, as the command line wants it."""
    (place.root / "base.yaml").write_text(json.dumps(place.config))
    return place


class Whole:
    """A run that nothing stopped, and places to repeat it in."""

    def __init__(self, root: Path, make: Callable[[Path], Place]) -> None:
        self._make = make
        self.place = make(root)
        self.run = self.place.run("a")
        assert self.run.failures == {}
        self.files = files_of(self.place.out / "a")
        self.result = self.run.results["a"]

    def again(self, root: Path) -> Place:
        """A place for the same run, whose teacher has answered already."""
        place = self._make(root)
        shutil.copytree(self.place.root / "cache", root / "cache")
        return ready(place)

    def assert_repeated(self, place: Place) -> None:
        """Everything that a run leaves is there, bit for bit, but for what is measured with a clock."""
        found = files_of(place.out / "a")
        assert found.keys() == self.files.keys()
        for name, content in found.items():
            if name not in TIMED:
                assert content == self.files[name], name
        assert repeatable(found) == repeatable(self.files)


def repeatable(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What of a run's metrics is the same each time it is made, wherever its prompts lie."""
    record = json.loads(files["kd_metrics.json"])
    timed = {"seconds", "finished_at", "adapter_path", "capture_peak_memory", "training_peak_memory"}
    kept = {name: value for name, value in record["result"].items() if name not in timed}
    lines = steady_lines(files["metrics.jsonl"])
    return {"curves": record["curves"], "lines": lines, "sha256": record["sha256"], **without_places(kept)}


def without_places(record: Any) -> Any:
    """A record without the lines of prompts that it names."""
    if isinstance(record, dict):
        return {name: without_places(value) for name, value in record.items() if name != "where"}
    return [without_places(item) for item in record] if isinstance(record, list) else record


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"), lambda root: lay_out(root, teacher_folder, student_folder))


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> Whole:
    return Whole(tmp_path_factory.mktemp("patient"), lambda root: lay_out_patient(root, teacher_folder, student_folder))


def stop_at(place: Place, iteration: int, **changes: Any) -> None:
    """Run until a step was made, and stop there."""
    for event in place.start("a", **changes):
        if isinstance(event, events.Stepped) and event.step.iteration == iteration:
            return
    raise AssertionError(f"the run was over before step {iteration}")


def made(place: Place, **changes: Any) -> int:
    """Run to the end; returns how many steps an earlier run had made."""
    run = place.run("a", **changes)
    assert run.failures == {}
    [started] = run.of(events.TrainingStarted)
    assert len(run.of(events.Stepped)) == run.results["a"].steps[-1].iteration - started.made
    return started.made


def states(folder: Path) -> set[str]:
    """The files below a folder that a run goes on from."""
    return {name for name in files_of(folder) if name.rpartition("/")[2] in (RECORD, STATE)}


@pytest.fixture(autouse=True, scope="module")
def fast_collection(whole: Whole, patient: Whole) -> Iterator[None]:
    """What tests import is set aside, as in test_pipeline."""
    gc.freeze()
    yield
    gc.unfreeze()


# Kills


COMMAND = ("distill", "-d", "a", "--config", "base.yaml")
KILLED_BEFORE = """
import os, signal, sys
name = sys.argv[1]
def watch(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(name):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
sys.argv = ["true-kd", *sys.argv[2:]]
from true_kd.__main__ import main
main()
"""
"""The command line, killed before the file of a certain name gets it."""


def spawn(place: Place, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, *arguments], cwd=place.root, env=environment, **silent)


def test_a_run_that_is_killed_twice_ends_as_if_it_had_not_been(whole: Whole, tmp_path: Path) -> None:
    place = whole.again(tmp_path)
    for iteration in (4, 8):
        record = place.out / "a" / f"checkpoint_{iteration}" / RECORD
        with spawn(place, "-m", "true_kd", *COMMAND) as process:
            while not record.exists():
                assert process.poll() is None
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not (place.out / "a" / "kd_metrics.json").exists()
    with spawn(place, "-m", "true_kd", *COMMAND) as process:
        assert process.wait() == 0
    whole.assert_repeated(place)


@pytest.mark.parametrize(
    ("before", "reached"),
    [
        (f"checkpoint_4/{RECORD}", 0),
        (f"checkpoint_8/{WEIGHTS}", 4),
        (f"checkpoint_12/{RECORD}", 8),
        ("a/kd_metrics.json", 12),
    ],
    ids=["before the first checkpoint", "after the best of 6", "before the last checkpoint", "after the last"],
)
def test_a_run_that_is_killed_anywhere_ends_as_if_it_had_not_been(
    before: str, reached: int, whole: Whole, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = whole.again(tmp_path)
    with spawn(place, "-c", KILLED_BEFORE, before, *COMMAND) as process:
        assert process.wait() == -signal.SIGKILL
    assert not (place.out / "a" / "kd_metrics.json").exists()
    monkeypatch.chdir(place.root)
    ended = cli(*COMMAND)
    assert (ended.code, ended.err) == (0, "")
    told = f"a: goes on from the checkpoint of iteration {reached}"
    assert (told in ended.out.splitlines()) is (reached > 0)
    whole.assert_repeated(place)


def test_a_file_that_a_kill_left_unfinished_is_gone_in_the_end(stopped: Place) -> None:
    (stopped.out / "a" / ".tmp-1234.safetensors").write_bytes(b"half of")
    assert made(stopped) == 8
    assert list(stopped.out.rglob(".tmp-*")) == []


class Stop(BaseException):
    """Ends a run, like Ctrl-C, where no Ctrl-C would come on its own."""


def test_a_run_that_is_stopped_before_any_of_its_files_appears_ends_as_if_it_had_not_been(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.replace
    short = {
        "training__iters": 3,
        "training__checkpoint_every": 2,
        "training__batch_size": 5,
        "training__accumulate": 1,
    }
    expected = whole.again(tmp_path / "expected")
    expected.run("a", **short)
    for count in range(100):
        place = whole.again(tmp_path / str(count))
        left = count

        def replace(source: Any, target: Any) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise Stop
            rename(source, target)

        monkeypatch.setattr("os.replace", replace)
        try:
            place.run("a", **short)
            break
        except Stop:
            place.run("a", **short)
        found = files_of(place.out / "a")
        assert found.keys() == files_of(expected.out / "a").keys()
        for name, content in files_of(expected.out / "a").items():
            assert content == found[name] or name in TIMED, (count, name)
        assert repeatable(found) == repeatable(files_of(expected.out / "a"))
    assert count > 10


# Stops, at any step and with any adapter


@pytest.mark.parametrize("iteration", [1, 4, 5, 12])
def test_a_run_that_is_stopped_at_a_step_ends_as_if_it_had_not_been(
    iteration: int, whole: Whole, tmp_path: Path
) -> None:
    place = whole.again(tmp_path)
    stop_at(place, iteration)
    # The step is told before it is validated and saved.
    assert made(place) == (iteration - 1) // 4 * 4
    whole.assert_repeated(place)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora__type": "dora"},
        {"lora__num_layers": 1},
        {"training__grad_checkpoint": True},
        {"training__compile": "always"},
        {"training__compile": "always", "losses__alpha_end": 0.2, "training__grad_checkpoint": True},
        {"losses__temperature_end": 1.0, "losses__alpha_end": 0.2, "losses__weigh_by": "certainty"},
        {"targets__preset": "exact", "losses__divergence": "reverse_kl"},
        {"training__checkpoint_every": 1},
        {"training__checkpoint_every": 2, "training__validate_every": 100},
    ],
    ids=lambda changes: " ".join(f"{name.rpartition('__')[2]}={value}" for name, value in changes.items()),
)
def test_a_stopped_run_goes_on_exactly_whatever_its_options(
    changes: dict[str, Any], whole: Whole, tmp_path: Path
) -> None:
    changes = {"training__iters": 6, **changes}
    place, stopped = whole.again(tmp_path / "whole"), whole.again(tmp_path / "stopped")
    assert made(place, **changes) == 0
    stop_at(stopped, 5, **changes)
    assert made(stopped, **changes) == 4
    found, expected = files_of(stopped.out / "a"), files_of(place.out / "a")
    assert repeatable(found) == repeatable(expected)
    assert {name: content for name, content in found.items() if name.endswith(WEIGHTS)} == {
        name: content for name, content in expected.items() if name.endswith(WEIGHTS)
    }


# Signals


@contextlib.contextmanager
def signalled(is_place: Callable[[CodeType], bool], count: int) -> Iterator[list[int]]:
    """Ctrl-C at the so-manieth call of the functions that are meant; gives the number of calls that is still missing.

    A generator is called each time that it goes on.
    """
    left = [count]

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and is_place(frame.f_code):
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGINT)

    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    stopping.listen()
    sys.setprofile(watch)
    try:
        yield left
    finally:
        sys.setprofile(None)
        for number, handler in before.items():
            signal.signal(number, handler)


def left_by_signal(place: Place) -> dict[int, bool]:
    """The checkpoints that can be gone on from, and whether each is one that any run writes."""
    found = checkpoints(place.out / "a")
    records = {iteration: read_record(folder / RECORD) for iteration, folder in found.items()}
    return {iteration: record["scheduled"] for iteration, record in records.items() if record}


SIGNALS = {
    "in its first step": (train, 1, 1),
    "in a step": (train, 6, 6),
    "in a step that a checkpoint follows": (train, 8, 8),
    "in its last step": (train, 12, 12),
    "in its first validation": (evaluate, 1, 3),
    "in a validation": (evaluate, 3, 9),
    "in its last validation": (evaluate, 4, 12),
}


@pytest.mark.parametrize(("function", "count", "reached"), SIGNALS.values(), ids=SIGNALS.keys())
def test_a_run_that_a_signal_stops_keeps_every_step_and_ends_as_if_it_had_not_been(
    function: Callable[..., Any], count: int, reached: int, whole: Whole, tmp_path: Path
) -> None:
    place = whole.again(tmp_path)
    with pytest.raises(stopping.Stopped), signalled(lambda code: code is function.__code__, count):
        place.run("a")
    kept = left_by_signal(place)
    assert max(kept) == reached
    assert [iteration for iteration, scheduled in kept.items() if not scheduled] == [reached] * (reached % 4 > 0)
    assert made(place) == reached
    whole.assert_repeated(place)


def test_a_run_that_a_signal_stops_in_the_validation_that_ends_it_keeps_its_last_checkpoint(
    patient: Whole, tmp_path: Path
) -> None:
    place, last = patient.again(tmp_path), len(patient.result.steps)
    with pytest.raises(stopping.Stopped), signalled(lambda code: code is evaluate.__code__, last):
        place.run("a")
    assert last % STEADY["checkpoint_every"] > 0
    assert left_by_signal(place)[last] is False, "whether it is the last is not known before it is validated"
    assert made(place) == last
    patient.assert_repeated(place)


@pytest.mark.slow
def test_a_run_that_signals_stop_at_every_step_ends_as_if_it_had_not_been(whole: Whole, tmp_path: Path) -> None:
    place = whole.again(tmp_path)
    for step in range(1, 13):
        # The first call of a run that goes on makes its first step.
        with pytest.raises(stopping.Stopped), signalled(lambda code: code is train.__code__, 1):
            place.run("a")
        assert max(left_by_signal(place)) == step
    assert made(place) == 12
    whole.assert_repeated(place)


@pytest.mark.slow
def test_a_run_that_a_signal_stops_anywhere_in_our_code_ends_as_if_it_had_not_been(
    whole: Whole, tmp_path: Path
) -> None:
    short = {"training__iters": 3, "training__checkpoint_every": 2, "training__validate_every": 1}
    rooms = tuple(f"true_kd/{name}.py" for name in ("arms", "checkpoints", "adapters", "files", "training", "student"))

    def is_ours(code: CodeType) -> bool:
        return code.co_filename.endswith(rooms)

    expected = whole.again(tmp_path / "expected")
    with signalled(is_ours, 10**9) as left:
        expected.run("a", **short)
    calls = 10**9 - left[0]
    files = files_of(expected.out / "a")
    assert calls > 200
    reached = set()
    for count in range(calls // 24, calls, calls // 12):
        place = whole.again(tmp_path / str(count))
        with pytest.raises(stopping.Stopped), signalled(is_ours, count):
            place.run("a", **short)
        reached.add(max(left_by_signal(place), default=0))
        place.run("a", **short)
        found = files_of(place.out / "a")
        assert found.keys() == files.keys(), count
        for name, content in files.items():
            assert content == found[name] or name in TIMED, (count, name)
        assert repeatable(found) == repeatable(files), count
    assert reached == {0, 1, 2, 3}


def test_a_second_domain_is_stopped_and_goes_on_alone(whole: Whole, tmp_path: Path) -> None:
    place = whole.again(tmp_path)
    place.write("b")
    for event in place.start("a", "b", training__iters=6):
        if isinstance(event, events.Stepped) and (event.domain, event.step.iteration) == ("b", 6):
            break
    run = place.run("a", "b", training__iters=6)
    assert run.results["a"].unchanged
    assert [(event.domain, event.made) for event in run.of(events.TrainingStarted)] == [("b", 4)]
    assert place.weights("b") == place.weights("a"), "the same prompts"


def test_the_time_of_all_its_parts_is_that_of_a_stopped_run(whole: Whole, tmp_path: Path) -> None:
    place = whole.again(tmp_path)
    stop_at(place, 9)
    result = place.run("a").results["a"]
    assert len(result.steps) == 12
    assert result.seconds["training"] >= sum(step.seconds for step in result.steps)


# Patience


def test_training_stops_when_patience_is_at_its_end(patient: Whole) -> None:
    result = patient.result
    losses = [validation.metrics.loss for validation in result.validations[1:]]
    best = int(np.argmin(losses)) + 1
    assert len(losses) == len(result.steps) == best + 3 < 16
    assert result.best_iteration == best
    assert best > 1, losses
    assert result.after.loss == losses[best - 1]
    assert [event.step.iteration for event in patient.run.of(events.Stepped)] == list(range(1, best + 4))
    assert f"checkpoint_{best + 3}/{WEIGHTS}" in patient.files


def test_the_weights_in_the_folder_are_the_best_when_patience_ended_the_run(patient: Whole, tmp_path: Path) -> None:
    place = patient.again(tmp_path)
    made(place, training__checkpoint_every=1)
    best = place.out / "a" / f"checkpoint_{patient.result.best_iteration}"
    assert place.weights() == (best / WEIGHTS).read_bytes() == patient.files[WEIGHTS]


def test_without_patience_training_goes_on_to_the_end(patient: Whole, tmp_path: Path) -> None:
    place = patient.again(tmp_path)
    result = place.run("a", training__patience=None).results["a"]
    assert len(result.steps) == 16
    shared = len(patient.result.steps)
    assert [step.total for step in result.steps[:shared]] == [step.total for step in patient.result.steps]


def test_a_run_out_of_patience_goes_on_exactly_wherever_it_was_stopped(patient: Whole, tmp_path: Path) -> None:
    last = len(patient.result.steps)
    for iteration in (1, last - 2, last):
        place = patient.again(tmp_path / str(iteration))
        stop_at(place, iteration, training__checkpoint_every=1)
        assert made(place, training__checkpoint_every=1) == iteration - 1
        found = repeatable(files_of(place.out / "a"))
        assert {**found, "sha256": None} == {**repeatable(patient.files), "sha256": None}
        assert place.weights() == patient.files[WEIGHTS]


def test_a_run_that_was_killed_when_patience_had_ended_makes_no_step_more(patient: Whole, tmp_path: Path) -> None:
    place = patient.again(tmp_path)
    with spawn(place, "-c", KILLED_BEFORE, "a/kd_metrics.json", *COMMAND) as process:
        assert process.wait() == -signal.SIGKILL
    assert made(place) == len(patient.result.steps)
    patient.assert_repeated(place)


@pytest.mark.parametrize("damage", ["lost", "cut", "another's"])
def test_the_best_adapter_is_there_though_it_was_lost_while_the_run_was_stopped(
    damage: str, patient: Whole, tmp_path: Path
) -> None:
    place = patient.again(tmp_path)
    stop_at(place, len(patient.result.steps), training__checkpoint_every=1)
    weights = place.out / "a" / WEIGHTS
    if damage == "lost":
        weights.unlink()
    else:
        last = max(checkpoints(place.out / "a").items())[1] / WEIGHTS
        weights.write_bytes(last.read_bytes()[: -7 if damage == "cut" else None])
    assert made(place, training__checkpoint_every=1) == len(patient.result.steps) - 1
    assert place.weights() == patient.files[WEIGHTS]


def test_the_best_weights_are_kept_where_steps_are_compiled(patient: Whole, tmp_path: Path) -> None:
    place = patient.again(tmp_path)
    options = {"training__compile": "always", "training__checkpoint_every": 1, "lora__dropout": 0.0}
    result = place.run("a", **options).results["a"]
    assert result.best_iteration < len(result.steps)
    best = place.out / "a" / f"checkpoint_{result.best_iteration}"
    assert place.weights() == (best / WEIGHTS).read_bytes()
    stopped = patient.again(tmp_path / "stopped")
    stop_at(stopped, len(result.steps), **options)
    assert made(stopped, **options) == len(result.steps) - 1
    assert stopped.weights() == place.weights()
    assert stopped.run("a", **options).results["a"].after == result.after


def progress(losses: list[float], iterations: list[int]) -> Progress:
    found = Progress()
    for loss, iteration in zip(losses, iterations, strict=True):
        found.validated(Validation(iteration, EvalMetrics(loss, loss, loss, loss, 0.5, 10)), {})
    return found


@given(
    losses=st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0]), max_size=8),
    every=st.integers(1, 5),
    patience=st.integers(1, 5) | st.none(),
)
def test_patience_counts_validations_since_the_best(losses: list[float], every: int, patience: int | None) -> None:
    found = progress(losses, [every * at for at in range(1, len(losses) + 1)])
    since = len(losses) - 1 - losses.index(min(losses)) if losses else 0
    assert found.is_over(10_000, patience) is (patience is not None and since >= patience)
    assert (found.best.metrics.loss if found.best else None) == min(losses, default=None)


def test_a_run_is_over_when_all_its_steps_are_made(whole: Whole) -> None:
    found = Progress(steps=list(whole.result.steps))
    assert (found.iteration, found.is_over(12, None), found.is_over(13, None)) == (12, True, False)
    assert (Progress().iteration, Progress().is_over(1, 1)) == (0, False)


# Checkpoints that are none


@pytest.fixture(scope="module")
def halfway(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that was stopped with two whole checkpoints."""
    place = whole.again(tmp_path_factory.mktemp("halfway"))
    stop_at(place, 9)
    assert states(place.out / "a") == {f"checkpoint_{at}/{name}" for at in (4, 8) for name in (RECORD, STATE)}
    return place


@pytest.fixture
def stopped(halfway: Place, whole: Whole, tmp_path: Path) -> Place:
    """A copy of that run, to go on from."""
    place = whole.again(tmp_path / "stopped")
    shutil.copytree(halfway.out, place.out)
    return place


def edit(**changes: Any) -> Callable[[Path], None]:
    """Another value in a record, which then is not what was written."""

    def change(folder: Path) -> None:
        record = json.loads((folder / RECORD).read_text())
        (folder / RECORD).write_text(json.dumps({**record, **changes}))

    return change


def forge(**changes: Any) -> Callable[[Path], None]:
    """Another value in a record, and the digest that goes with it."""

    def change(folder: Path) -> None:
        record = json.loads((folder / RECORD).read_text())
        del record[CHECK]
        write_record(folder / RECORD, {**record, **changes})

    return change


def cut(name: str) -> Callable[[Path], None]:
    def shorten(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-7])

    return shorten


def forget_a_step(folder: Path) -> None:
    forge(steps=json.loads((folder / RECORD).read_text())["steps"][:-1])(folder)


def link(folder: Path) -> None:
    elsewhere = folder.parent.parent / f"elsewhere_{folder.name}"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


def fold_up(folder: Path) -> None:
    (folder / RECORD).unlink()
    (folder / RECORD).mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "half a state": cut(STATE),
    "no state": lambda folder: (folder / STATE).unlink(),
    "another state": lambda folder: (folder / STATE).write_bytes((folder / WEIGHTS).read_bytes()),
    "half an adapter": cut(WEIGHTS),
    "no adapter": lambda folder: (folder / WEIGHTS).unlink(),
    "no config": lambda folder: (folder / CONFIG).unlink(),
    "a folder for a record": lambda folder: fold_up(folder),
    "half a record": cut(RECORD),
    "an empty record": lambda folder: (folder / RECORD).write_bytes(b""),
    "a record of noise": lambda folder: (folder / RECORD).write_bytes(bytes(range(256))),
    "a record of depth": lambda folder: (folder / RECORD).write_text("[" * 100_000),
    "a list for a record": lambda folder: (folder / RECORD).write_text("[]"),
    "a record with another run's digest": edit(run_digest="0" * 64),
    "a record with another format's number": edit(format=0),
    "a record without a digest": edit(**{CHECK: None}),
    "a record without digests": forge(sha256=None),
    "a record of words": forge(steps="many"),
    "a record of other steps": forge(steps=[{"iteration": 1}]),
    "a record that forgot a step": forget_a_step,
    "a record of no validations": forge(validations=None),
}
"""What can be wrong with a checkpoint of this run."""

STRANGERS: dict[str, Callable[[Path], object]] = {
    "no record": lambda folder: (folder / RECORD).unlink(),
    "a record of another run": forge(run_digest="0" * 64),
    "a record of another format": forge(format=0),
    "a link": link,
    "an empty folder": lambda folder: [file.unlink() for file in folder.iterdir()],
    "a folder that is gone": shutil.rmtree,
}
"""What is no checkpoint of this run."""


def look_twice(change: Callable[[Path], object], folder: Path) -> tuple[list[int], list[list[str]]]:
    """The iterations that a run would go on from as its checkpoints 8 and 4 are changed, and the damaged ones."""
    digest = json.loads((folder / "checkpoint_8" / RECORD).read_text())["run_digest"]
    found = [find_start(folder, digest)]
    for iteration in (8, 4):
        change(folder / f"checkpoint_{iteration}")
        found.append(find_start(folder, digest))
    return [start.made for start in found], [[told.partition(": ")[0] for told in start.damaged] for start in found]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_told_of_and_passed_over_for_an_older_one(
    damage: Callable[[Path], object], stopped: Place
) -> None:
    made, damaged = look_twice(damage, stopped.out / "a")
    assert made == [8, 4, 0]
    assert damaged == [[], ["checkpoint_8"], ["checkpoint_8", "checkpoint_4"]]


@pytest.mark.parametrize("change", STRANGERS.values(), ids=STRANGERS.keys())
def test_what_is_no_checkpoint_of_this_run_is_passed_over_without_a_word(
    change: Callable[[Path], object], stopped: Place
) -> None:
    assert look_twice(change, stopped.out / "a") == ([8, 4, 0], [[], [], []])


def flip(path: Path, at: int, mask: int = 0xFF) -> None:
    """Change bits of one byte of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= mask
    path.write_bytes(content)


def spread(path: Path, count: int) -> list[int]:
    """Places in a file, from its first byte to its last."""
    return [int(at) for at in np.linspace(0, path.stat().st_size - 1, count)]


def test_every_flipped_byte_of_a_record_is_noticed(stopped: Place) -> None:
    record = stopped.out / "a" / "checkpoint_8" / RECORD
    content, value = record.read_bytes(), read_record(record)
    same = 0
    for at in range(len(content)):
        for mask in (0x01, 0xFF):
            record.write_bytes(content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :])
            try:
                found = read_record(record)
            except ValueError:
                continue
            # The last of 17 digits may say the same number.
            assert (found, mask) == (value, 0x01)
            same += 1
    assert same < 100


@pytest.mark.parametrize("name", [RECORD, STATE, WEIGHTS, CONFIG])
def test_a_flipped_byte_of_any_file_of_a_checkpoint_is_noticed_wherever_it_is(name: str, stopped: Place) -> None:
    folder = stopped.out / "a"
    digest = json.loads((folder / "checkpoint_8" / RECORD).read_text())["run_digest"]
    path = folder / "checkpoint_8" / name
    for at in spread(path, 25):
        flip(path, at)
        start = find_start(folder, digest)
        assert (start.made, len(start.damaged)) == (4, 1), at
        assert name in start.damaged[0]
        flip(path, at)
        assert find_start(folder, digest).made == 8


@pytest.mark.parametrize("name", [RECORD, STATE, WEIGHTS, CONFIG])
def test_a_run_with_a_flipped_byte_in_its_newest_checkpoint_says_so_and_ends_as_it_should(
    name: str, stopped: Place, whole: Whole
) -> None:
    path = stopped.out / "a" / "checkpoint_8" / name
    flip(path, path.stat().st_size // 2, 0x10)
    run = stopped.run("a")
    [told] = run.of(events.CheckpointsDamaged)
    assert (told.domain, told.made, [each.partition(":")[0] for each in told.damaged]) == ("a", 4, ["checkpoint_8"])
    assert [event.made for event in run.of(events.TrainingStarted)] == [4]
    assert run.of(events.CheckpointsReplaced) == []
    whole.assert_repeated(stopped)


def test_a_run_with_whole_checkpoints_speaks_of_no_damage(stopped: Place) -> None:
    run = stopped.run("a")
    assert (
        run.of(events.CheckpointsDamaged) == run.of(events.AdapterDamaged) == run.of(events.CheckpointsReplaced) == []
    )


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "kd_metrics.json"])
def test_a_finished_domain_with_a_flipped_byte_is_told_of_and_distilled_again_to_the_same_bytes(
    name: str, whole: Whole, tmp_path: Path
) -> None:
    place = whole.again(tmp_path)
    shutil.copytree(whole.place.out, place.out)
    assert place.run("a").results["a"].unchanged
    path = place.out / "a" / name
    flip(path, path.stat().st_size // 2)
    run = place.run("a")
    [told] = run.of(events.AdapterDamaged)
    assert (told.domain, told.folder) == ("a", str(place.out / "a"))
    assert name in told.damage
    assert run.captured_tokens == {"a": 0}, "the teacher is not asked again"
    whole.assert_repeated(place)


@pytest.mark.parametrize(
    "kind", ["half a state", "no adapter", "a record of noise", "a folder for a record", "an empty folder"]
)
def test_a_run_with_a_damaged_checkpoint_ends_as_it_should(kind: str, stopped: Place, whole: Whole) -> None:
    (DAMAGES | STRANGERS)[kind](stopped.out / "a" / "checkpoint_8")
    assert made(stopped) == 4
    assert stopped.weights() == whole.files[WEIGHTS]
    assert repeatable(files_of(stopped.out / "a")) == repeatable(whole.files)


def test_a_run_that_begins_again_after_damage_ends_as_it_should(stopped: Place, whole: Whole) -> None:
    for iteration in (4, 8):
        cut(STATE)(stopped.out / "a" / f"checkpoint_{iteration}")
    assert made(stopped) == 0
    whole.assert_repeated(stopped)


def test_the_newest_of_two_whole_checkpoints_is_gone_on_from(stopped: Place, whole: Whole) -> None:
    assert made(stopped) == 8
    whole.assert_repeated(stopped)


@pytest.mark.parametrize("name", ["checkpoint_8", "checkpoint_12"])
def test_a_checkpoint_under_another_number_is_not_gone_on_from(name: str, stopped: Place, whole: Whole) -> None:
    folder = stopped.out / "a"
    shutil.rmtree(folder / "checkpoint_8") if name == "checkpoint_8" else None
    (folder / ("checkpoint_4" if name == "checkpoint_8" else "checkpoint_8")).rename(folder / name)
    assert made(stopped) == (0 if name == "checkpoint_8" else 4)
    whole.assert_repeated(stopped)


@pytest.mark.parametrize("name", ["checkpoint_", "checkpoint_x", "checkpoint_-4", "checkpoint_8.old"])
def test_a_folder_that_is_no_checkpoint_is_in_nobodys_way(name: str, stopped: Place, whole: Whole) -> None:
    shutil.copytree(stopped.out / "a" / "checkpoint_8", stopped.out / "a" / name)
    assert made(stopped) == 8
    assert stopped.weights() == whole.files[WEIGHTS]


@pytest.mark.parametrize("name", ["checkpoint_08", "checkpoint_٨"])
def test_a_folder_with_another_spelling_of_a_number_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    assert checkpoints(tmp_path) == {}


def test_a_file_in_the_place_of_a_checkpoint_is_no_bug_of_ours(stopped: Place, whole: Whole) -> None:
    (stopped.out / "a" / "checkpoint_3").write_text("mine")
    assert made(stopped) == 8
    assert stopped.weights() == whole.files[WEIGHTS]


def test_a_folder_in_the_place_of_an_older_record_is_in_nobodys_way(stopped: Place, whole: Whole) -> None:
    fold_up(stopped.out / "a" / "checkpoint_4")
    assert made(stopped) == 8
    whole.assert_repeated(stopped)


def test_an_adapter_that_was_read_and_is_saved_again_is_the_same_file(whole: Whole, tmp_path: Path) -> None:
    """MLX writes tensors in an order that depends on that of the mapping it is given."""
    saved = whole.place.out / "a"
    weights = mx.load(str(saved / WEIGHTS))
    for order in (weights, dict(reversed(weights.items()))):
        save_adapter(tmp_path, order, LoraOptions(rank=2), "student", {})
        assert (tmp_path / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()


# Checkpoints of other runs


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"training__learning_rate": 0.005},
        {"training__iters": 13},
        {"training__patience": 2},
        {"losses__divergence": "jensen_shannon"},
        {"lora__dropout": 0.2},
        {"fresh": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_run_does_not_go_on_from_a_checkpoint(change: dict[str, Any], stopped: Place, whole: Whole) -> None:
    first = (stopped.out / "a" / "checkpoint_4" / WEIGHTS).read_bytes()
    begun = next(event for event in stopped.start("a", **change) if isinstance(event, events.TrainingStarted))
    assert begun.made == 0
    assert (stopped.out / "a" / "checkpoint_4" / WEIGHTS).read_bytes() == first, "nothing is deleted before training"


def test_another_run_leaves_nothing_of_the_one_before(stopped: Place, whole: Whole) -> None:
    assert made(stopped, seed=1, training__iters=3) == 0
    assert {path.name for path in (stopped.out / "a").iterdir()} == {*ROOT_FILES, "checkpoint_3"}


def test_a_fresh_run_ends_as_the_first_did(stopped: Place, whole: Whole) -> None:
    assert made(stopped, fresh=True) == 0
    whole.assert_repeated(stopped)


def test_where_things_lie_and_what_they_may_take_does_not_part_a_run_from_its_checkpoint(
    stopped: Place, whole: Whole
) -> None:
    moved = stopped.root / "moved"
    stopped.out.rename(moved)
    assert made(stopped, out=str(moved), memory_gb=64.0) == 8
    assert (moved / "a" / WEIGHTS).read_bytes() == whole.files[WEIGHTS]


def test_checkpoints_beyond_the_one_gone_on_from_are_removed_when_training_begins(stopped: Place) -> None:
    cut(STATE)(stopped.out / "a" / "checkpoint_8")
    for event in stopped.start("a"):
        if isinstance(event, events.Stepped):
            assert event.step.iteration == 5
            break
    assert {path.name for path in (stopped.out / "a").glob("checkpoint_*")} == {"checkpoint_4"}


# What is kept


def test_a_finished_domain_keeps_adapters_and_no_state(whole: Whole) -> None:
    assert states(whole.place.out / "a") == set()
    folders = {f"checkpoint_{iteration}" for iteration in range(4, 13, 4)}
    adapter = {f"{folder}/{name}" for folder in folders for name in (WEIGHTS, CONFIG)}
    assert whole.files.keys() == adapter | ROOT_FILES


def test_only_the_newest_two_checkpoints_keep_their_states(whole: Whole, tmp_path: Path) -> None:
    place = whole.again(tmp_path)
    seen = set()
    for event in place.start("a", training__iters=16, training__checkpoint_every=3):
        if isinstance(event, events.Stepped):
            newest = (event.step.iteration - 1) // 3 * 3
            kept = {at for at in (newest - 3, newest) if at > 0}
            assert states(place.out / "a") == {f"checkpoint_{at}/{name}" for at in kept for name in (RECORD, STATE)}
            seen.add(newest)
    assert seen == {0, 3, 6, 9, 12, 15}


def test_dropping_states_leaves_the_adapters(stopped: Place) -> None:
    before = files_of(stopped.out / "a")
    drop_states(stopped.out / "a")
    assert files_of(stopped.out / "a") == {
        name: content for name, content in before.items() if name not in states_of(before)
    }
    drop_states(stopped.out / "a")


def states_of(names: Mapping[str, bytes]) -> set[str]:
    return {name for name in names if name.rpartition("/")[2] in (RECORD, STATE)}


@pytest.fixture(scope="module")
def trained(
    whole: Whole, student_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, mx.array]]:
    """The adapter after each step, trained on the same data by the loop alone."""
    [job], failures = plan_of(whole.place, "a")
    job.config = job.config.model_copy(update={"out": str(tmp_path_factory.mktemp("loop"))})
    for event in distill([job], failures):
        if isinstance(event, events.TrainingStarted):
            break
    student = open_model(ModelOptions(model=str(student_folder)), "student")
    data = build_data(job, student)
    config = job.config
    mx.random.seed(config.seed)
    add_lora(student.module, config.lora)
    found = {}
    for step in train(student.module, data.train, config.training, config.losses, config.seed):
        found[step.iteration] = {name: mx.array(value) for name, value in trainable(student.module).items()}
    return found


def assert_same_arrays(found: Mapping[str, mx.array], expected: Mapping[str, mx.array]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert mx.array_equal(found[name], value), name


def test_every_checkpoint_is_exactly_what_was_trained(whole: Whole, trained: dict[int, dict[str, mx.array]]) -> None:
    folder = whole.place.out / "a"
    for iteration in range(4, 13, 4):
        assert_same_arrays(mx.load(str(folder / f"checkpoint_{iteration}" / WEIGHTS)), trained[iteration])
    assert_same_arrays(mx.load(str(folder / WEIGHTS)), trained[whole.result.best_iteration])


def test_every_checkpoint_loads_in_mlx_lm(whole: Whole, student_folder: Path) -> None:
    from mlx_lm import load

    tokens = mx.array([[7, 8, 9, 10, 11]])
    plain = load(str(student_folder))[0](tokens)
    seen = [plain]
    for folder in (whole.place.out / "a", *sorted((whole.place.out / "a").glob("checkpoint_*"))):
        theirs = load(str(student_folder), adapter_path=str(folder))[0]
        ours = open_model(ModelOptions(model=str(student_folder)), "student").module
        load_adapter(ours, folder)
        ours.eval()
        assert mx.array_equal(theirs(tokens), ours(tokens))
        seen.append(theirs(tokens))
    assert len({np.array(logits).tobytes() for logits in seen}) >= 4
