"""What a run tells of itself while it runs, and what another terminal reads of it, whatever state the files are in."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from test_pipeline import Place

from true_kd import events
from true_kd.adapters import LINES, METRICS
from true_kd.locks import Lock, read_holder
from true_kd.status import FILE, LOCK, DomainStatus, Progress, Status, published, read_status, status_schema
from true_kd.status.pace import Outlook, Pace


class Clock:
    """Time that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def place(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Place:
    """A place with the domains `a` and `b`."""
    place = Place(tmp_path, teacher_folder, student_folder)
    place.config["training"] |= {"iters": 4, "checkpoint_every": 2}
    for domain in ("a", "b"):
        place.write(domain)
    return place


@pytest.fixture(scope="module")
def watched(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> tuple[Place, list[tuple[events.Event, Status]]]:
    """A run of two domains, one with a control, and what its status was at each of its events."""
    place = Place(tmp_path_factory.mktemp("watched"), teacher_folder, student_folder, control="sft")
    place.config["training"]["iters"] = 5
    for domain in ("a", "b"):
        place.write(domain)
    seen = [(event, read_status(place.out)) for event in place.start("a", "b")]
    return place, seen


@pytest.fixture
def held(place: Place) -> Iterator[Lock]:
    """The lock on the output folder, held by this process."""
    place.out.mkdir()
    lock = Lock(place.out / LOCK)
    assert lock.acquire()
    yield lock
    lock.release()


# The run's side


def test_a_run_tells_its_stages_in_their_order(watched: tuple[Place, list[tuple[events.Event, Status]]]) -> None:
    stages = []
    for _, found in watched[1]:
        if found.running is not None and found.running.progress is not None:
            progress = found.running.progress
            stage = (progress.stage, progress.domain, progress.number)
            stages += [stage] if stages[-1:] != [stage] else []
    opening, report = ("student_opening", None, None), ("report", None, None)
    trained = [
        [(stage, domain, number) for stage in ("training", "proving", "control")]
        for number, domain in enumerate("ab", start=1)
    ]
    assert stages[0] == ("teacher_opening", None, None)
    assert {stage for stage, *_ in stages[: stages.index(opening)]} == {"teacher_opening", "capturing"}
    assert stages[stages.index(opening) :] == [opening, *trained[0], opening, *trained[1], report]


def test_what_is_told_names_the_run_and_its_domains(watched: tuple[Place, list[tuple[events.Event, Status]]]) -> None:
    place, seen = watched
    event, found = next(pair for pair in seen if isinstance(pair[0], events.TrainingStarted) and pair[0].domain == "b")
    running = found.running
    assert (running.pid, running.host, running.is_here) == (os.getpid(), socket.gethostname(), True)
    assert running.folder == str(place.out)
    progress = running.progress
    assert (progress.stage, progress.domain, progress.number, progress.domains) == ("training", "b", 2, 2)
    assert (progress.done, progress.total) == (0, 5)
    assert (progress.finished, progress.failed, progress.waiting) == (("a",), (), ())
    assert found.domains["a"].state == "finished"
    assert found.domains["a"].says.startswith("a: ")
    assert found.domains["b"].state == "running"
    assert event.domain == "b"


def test_what_a_run_told_is_gone_with_it(watched: tuple[Place, list[tuple[events.Event, Status]]]) -> None:
    place, seen = watched
    assert {path.name for path in place.out.iterdir()} == {"a", "b", ".lock", ".lock-work", "kd_summary.json"}
    end, found = seen[-1]
    assert isinstance(end, events.RunFinished)
    assert found.running is None
    assert {domain.state for domain in found.domains.values()} == {"finished"}


def test_status_is_as_its_schema_has_it(watched: tuple[Place, list[tuple[events.Event, Status]]]) -> None:
    schema = jsonschema.Draft202012Validator(status_schema())
    for text in {json.dumps(asdict(found), allow_nan=False) for _, found in watched[1]}:
        schema.validate(json.loads(text))


def test_a_run_that_is_closed_halfway_leaves_nothing_of_it(place: Place) -> None:
    run = place.start("a")
    for event in run:
        if isinstance(event, events.Stepped) and event.step.iteration == 3:
            break
    assert (place.out / FILE).is_file()
    run.close()
    assert not (place.out / FILE).exists()
    found = read_status(place.out)
    assert found.running is None
    assert found.domains == {"a": DomainStatus("stopped", 3, 4, 2, found.domains["a"].loss, None, None)}
    assert found.domains["a"].loss > 0


def test_what_a_killed_run_left_is_gone_with_the_next(place: Place) -> None:
    place.out.mkdir()
    for name in (FILE, ".tmp-status.json"):
        (place.out / name).write_text("{")
    place.run("a")
    assert not any((place.out / name).exists() for name in (FILE, ".tmp-status.json"))


def test_a_status_that_cannot_be_written_stops_no_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("true_kd.status.publishing.write_fleeting", fail)
    assert place.run("a").failures == {}


def test_no_link_in_the_place_of_the_status_leads_elsewhere(place: Place, tmp_path: Path) -> None:
    place.out.mkdir()
    kept = tmp_path / "kept"
    kept.write_text("mine")
    for name in (FILE, ".tmp-status.json"):
        (place.out / name).symlink_to(kept)
    place.run("a")
    assert kept.read_text() == "mine"


def test_within_a_stage_it_is_told_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And told at once where the stage changes."""
    clock, written = Clock(), []
    monkeypatch.setattr("time.monotonic", clock)
    monkeypatch.setattr("true_kd.status.publishing.write_fleeting", lambda path, text: written.append(json.loads(text)))

    def run() -> Iterator[events.Event]:
        yield events.TeacherOpening("teacher")
        for _ in range(100):
            clock.now += 0.1
            yield events.TeacherOpening("teacher")
        yield events.TeacherFreed(0)

    for _ in published(tmp_path, [], run()):
        pass
    stages = [told["progress"]["stage"] for told in written]
    assert stages[:2] == ["starting", "teacher_opening"]
    assert stages[-1] == "student_opening"
    assert 9 <= stages.count("teacher_opening") <= 11


def test_what_a_generator_returns_and_raises_passes_through(tmp_path: Path) -> None:
    def run() -> Iterator[events.Event]:
        yield events.TeacherFreed(0)
        return 7

    def passes() -> Iterator[events.Event]:
        assert (yield from published(tmp_path, [], run())) == 7

    assert list(passes()) == [events.TeacherFreed(0)]

    def fails() -> Iterator[events.Event]:
        yield events.TeacherFreed(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(published(tmp_path, [], fails()))
    assert list(tmp_path.iterdir()) == []


# How long it takes


def test_the_pace_is_that_of_the_last_steps() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.left(10) is None
    for done in range(100):
        clock.now += 5.0 if done < 20 else 0.5
        pace.mark(done)
        if done == 2:
            assert pace.left(10) is None
    assert pace.left(10) == pytest.approx(5.0)
    assert pace.left(-1) == 0.0


def test_an_outlook_counts_controls_measuring_and_the_domains_to_come() -> None:
    clock = Clock()
    outlook = Outlook({"a": (10, 10), "b": (20,)}, clock)
    assert outlook.others_left(["b"]) is None
    outlook.start(is_control=False)
    clock.now += 3.0  # the student is measured
    pace = Pace(clock)
    for done in range(1, 6):
        clock.now += 1.0 if done > 1 else 0.0
        pace.mark(done)
        outlook.step(pace, is_first=done == 1)
    # Five steps, the proof, ten steps of the control, and the proof of that.
    assert outlook.domain_left("a", pace.left(5)) == pytest.approx(5 + 3 + 10 + 3)
    # Measured, trained, proved.
    assert outlook.others_left(["b"]) == pytest.approx(3 + 20 + 3)
    clock.now += 8.0
    outlook.finish()
    # What `a` took besides its four seconds of steps: 3 + 8.
    assert outlook.others_left(["b"]) == pytest.approx(20 + 11)


def test_the_time_left_comes_true(place: Place) -> None:
    """With steps that all take as long, what is told halfway is what it then takes."""
    clock = Clock()
    outlook, pace = Outlook({"a": (40,)}, clock), Pace(clock)
    outlook.start(is_control=False)
    clock.now += 2.0
    told = None
    for done in range(1, 41):
        clock.now += 0.25
        pace.mark(done)
        outlook.step(pace, is_first=done == 1)
        if done == 20:
            told = clock.now + outlook.domain_left("a", pace.left(20))
    clock.now += 2.0
    assert told == pytest.approx(clock.now, rel=0.02)


# The other terminal's side


def tell(out: Path, **changes: Any) -> None:
    progress = {name: None for name in Progress.__dataclass_fields__}
    progress |= {"updated_at": "2026-01-01T00:00:00+00:00", "stage": "training", "domain": "a", "number": 1}
    progress |= {"domains": 2, "finished": [], "failed": [], "waiting": ["b"], "done": 3, "total": 9, **changes}
    told = {"pid": os.getpid(), "host": socket.gethostname(), "progress": progress}
    (out / FILE).write_text(json.dumps(told))


def test_reading_writes_nothing_and_takes_no_lock(held: Lock, place: Place) -> None:
    tell(place.out)
    before = {path: path.stat().st_mtime_ns for path in place.out.rglob("*")}
    assert read_status(place.out).running.progress.done == 3
    assert {path: path.stat().st_mtime_ns for path in place.out.rglob("*")} == before
    held.release()
    read_status(place.out)
    assert held.acquire(), "nobody else has it"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "\0" * 64,
        '{"pid": 1}',
        '{"pid": "x", "host": [], "progress": {}}',
        '{"pid": PID, "host": "HOST"}',
        '{"pid": PID, "host": "HOST", "progress": {"stage": "dreaming"}}',
        '{"pid": 1, "host": "HOST", "progress": {}}',
    ],
)
def test_a_status_that_is_no_status_is_passed_over(content: str, held: Lock, place: Place) -> None:
    content = content.replace("PID", str(os.getpid())).replace("HOST", socket.gethostname())
    (place.out / FILE).write_text(content)
    running = read_status(place.out).running
    assert (running.pid, running.progress) == (os.getpid(), None)


def test_a_status_that_another_run_left_is_not_taken_for_this_ones(held: Lock, place: Place) -> None:
    tell(place.out)
    told = json.loads((place.out / FILE).read_text())
    (place.out / FILE).write_text(json.dumps({**told, "pid": os.getppid()}))
    assert read_status(place.out).running.progress is None


def holder(out: Path, **changes: Any) -> None:
    about = {"pid": os.getpid(), "host": socket.gethostname(), "command": "true-kd distill", "since": "2026-01-01"}
    about["since"] = read_holder(out / LOCK).since
    (out / f"{LOCK}.json").write_text(json.dumps({**about, **changes}))


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_dead_holder_holds_nothing(held: Lock, place: Place, dead: int) -> None:
    tell(place.out)
    holder(place.out, pid=dead)
    assert read_status(place.out).running is None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="when a process began is read from /proc")
def test_a_younger_process_with_the_number_of_a_dead_one_is_no_holder(held: Lock, place: Place) -> None:
    holder(place.out, since="2020-01-01 00:00:00+00:00")
    assert read_status(place.out).running is None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="what a process is at is read from /proc")
def test_a_process_that_nobody_has_waited_for_is_no_holder(held: Lock, place: Place) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    process.stdout.read()  # it has ended
    while not re.search(r"\) Z ", (Path("/proc") / str(process.pid) / "stat").read_text()):
        pass
    holder(place.out, pid=process.pid)
    assert read_status(place.out).running is None
    process.wait()


def test_a_run_on_another_machine_is_taken_at_its_word(held: Lock, place: Place, dead: int) -> None:
    tell(place.out)
    told = json.loads((place.out / FILE).read_text())
    (place.out / FILE).write_text(json.dumps({**told, "host": "other", "pid": dead}))
    holder(place.out, host="other", pid=dead)
    running = read_status(place.out).running
    assert (running.host, running.is_here, running.progress.done) == ("other", False, 3)


def test_the_point_of_a_sweep_is_found(place: Place) -> None:
    point = place.out / "sweep" / "temperature=2"
    point.mkdir(parents=True)
    lock = Lock(point / LOCK)
    assert lock.acquire()
    tell(point)
    found = read_status(place.out)
    assert (found.running.folder, found.running.progress.domain) == (str(point), "a")
    assert found.domains == {}
    lock.release()


def test_what_failed_in_the_last_run_is_told_with_its_reason(place: Place) -> None:
    place.run("a")
    (place.root / "prompts" / "b" / "train.jsonl").write_text("{")
    run = place.run("a", "b")
    found = read_status(place.out)
    assert (found.domains["b"].state, found.domains["b"].says) == ("failed", str(run.failures["b"]))
    assert found.domains["a"].state == "finished"
    assert found.domains["a"].finished_at == run.results["a"].finished_at


@pytest.mark.parametrize("name", [METRICS, LINES, "kd_summary.json"])
def test_files_that_are_damaged_are_no_reason_to_fail(name: str, place: Place) -> None:
    place.run("a")
    path = place.out / name if name == "kd_summary.json" else place.out / "a" / name
    content = path.read_bytes()
    for spoilt in (b"", content[:100], b"\0" * 100, content.replace(b":", b";"), b"[]"):
        path.write_bytes(spoilt)
        state = read_status(place.out).domains["a"].state
        assert state == ("stopped" if name == METRICS else "finished")


def test_files_may_go_while_they_are_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.run("a")
    files = [path for path in place.out.rglob("*") if path.is_file()]
    for vanishing in files:
        copy = place.root / "copy"
        shutil.copytree(place.out, copy)
        (copy / vanishing.relative_to(place.out)).unlink()
        assert "a" in read_status(copy).domains
        shutil.rmtree(copy)


# The command


def test_status_shows_what_is_there(cli: Callable[..., Any], place: Place) -> None:
    place.run("a")
    told = cli("status", "--out", str(place.out))
    assert (told.code, told.err) == (0, "")
    first, second = told.out.splitlines()
    assert first == f"run  none in {place.out}"
    assert re.match(r"a    finished \d{4}-\d\d-\d\dT\S+\. a: ", second)
    found = cli("status", "--out", str(place.out), "--json")
    assert json.loads(found.out) == json.loads(json.dumps(asdict(read_status(place.out))))


def test_status_shows_a_run(cli: Callable[..., Any], held: Lock, place: Place) -> None:
    numbers = {"loss": 0.5, "kd": 0.25, "ce": 0.75, "tokens_per_second": 1234.5, "peak_memory": 2 * 10**9}
    left = {"stage_seconds_left": 61.0, "domain_seconds_left": 75.0, "run_seconds_left": 3675.0}
    tell(place.out, **numbers, **left, validation_loss=0.125, waiting=["b"], domain="a")
    told = cli("status", "--out", str(place.out))
    assert (told.code, told.err) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in told.out.splitlines())
    assert rows["process"] == str(os.getpid())
    assert rows["domain"] == "a, 1 of 2"
    assert rows["stage"] == "training, iteration 3 of 9"
    assert rows["speed"] == "1,234 tok/s"
    assert rows["loss"] == "0.5000 (kd 0.2500, ce 0.7500)"
    assert rows["memory"] == "2.0 GB at most so far"
    assert rows["left"] == "stage 1:01, domain 1:15, run 1:01:15"
    assert rows["b"] == "waiting"
    assert "a" not in rows
    assert "\x1b" not in told.out
    mine = [line for line in told.out.splitlines() if str(place.out) not in line]
    assert max(map(len, mine)) <= 60


def test_watching_ends_with_the_run(
    cli: Callable[..., Any], held: Lock, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            tell(place.out, done=4)
        if len(looks) == 3:
            held.release()

    tell(place.out)
    monkeypatch.setattr("time.sleep", sleep)
    told = cli("status", "--out", str(place.out), "--watch", "--json")
    assert (told.code, told.err) == (0, "")
    runs = [json.loads(line)["running"] for line in told.out.splitlines()]
    assert [run and run["progress"]["done"] for run in runs] == [3, 4, None]
    assert len(looks) == 3


@pytest.mark.parametrize(("name", "what"), [("nowhere", "no such folder"), ("file", "not a folder")])
def test_a_folder_that_is_not_there_is_refused(
    name: str, what: str, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    told = cli("status", "--out", name, "--json")
    assert (told.code, told.out) == (2, "")
    assert told.err == f"--out '{name}': {what}, expected that of a run. Run `true-kd distill` first.\n"
