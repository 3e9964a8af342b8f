"""A phase in a process of its own: what it says comes through, what it dies of is told, and it dies with its run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import ASK, TIMED, Place, files_of, steady_lines

from true_kd import events
from true_kd.errors import CacheError, EnvironmentProblem, LockedError, TrueKDError
from true_kd.manifest import SHARD
from true_kd.pipeline.apart import GPUStopped, OutOfMemory, ProcessDied, run_apart

PHASES = '''
import os, signal, sys, time
from pathlib import Path
from true_kd import events, stopping
from true_kd.errors import CacheError, LockedError

def say(*models):
    for model in models:
        print("to nobody")
        yield events.TeacherOpening(model)
    return {"said": len(models), "by": os.getpid()}

def refuse(folder):
    yield events.TeacherOpening("a")
    raise LockedError(Path(folder), "another run")

def refuse_at_once():
    raise CacheError("cache 3f9c1a: damaged. Capture it again.")
    yield

def stumble():
    yield events.TeacherOpening("a")
    return [][3]

def run_out_of_disk():
    yield events.TeacherOpening("a")
    raise OSError(28, "No space left on device", "/somewhere")

def die(words, number):
    yield events.TeacherOpening("a")
    sys.stderr.write(words)
    sys.stderr.flush()
    os.kill(os.getpid(), number)

def leave(code):
    yield events.TeacherOpening("a")
    os._exit(code)

def linger(folder):
    """Works until it is stopped, and then tidies up."""
    try:
        yield events.TeacherFreed(os.getpid())
        while True:
            time.sleep(0.01)
    except stopping.Stopped as stop:
        (Path(folder) / "stopped").write_text(str(stop.number))
        raise

def chatter(folder):
    """Says more than anybody hears, until it is stopped."""
    try:
        while True:
            yield events.TeacherFreed(os.getpid())
    except stopping.Stopped as stop:
        (Path(folder) / "stopped").write_text(str(stop.number))
        raise

def return_what_cannot_be_sent():
    yield events.TeacherOpening("a")
    return lambda: 3
'''
METAL = (
    "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer execution "
    "failed: {}\n"
)
MEMORY = METAL.format("Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)")
WATCHDOG = METAL.format("Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)")


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of phases that a child finds as well."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "some_phases.py").write_text(PHASES)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    import some_phases

    yield some_phases
    del sys.modules["some_phases"]


def apart(phase: Callable[..., Any], *arguments: Any) -> Any:
    """A phase apart, named as the messages of these tests expect it."""
    return run_apart(phase, *arguments, what="math: student 'tiny'", remedy="training.batch_size")


def run(phase: Callable[..., Any], *arguments: Any) -> tuple[list[Any], Any]:
    """The events and the result of a phase."""
    seen = []

    def watch() -> Iterator[Any]:
        result = yield from apart(phase, *arguments)
        seen.append(result)

    return list(watch()), seen[0]


def failure(phase: Callable[..., Any], *arguments: Any, says: int = 1) -> Exception:
    """What a phase fails with that says so many things before."""
    heard: list[Any] = []
    with pytest.raises(Exception) as caught:  # noqa: PT011
        heard.extend(apart(phase, *arguments))
    assert heard == [events.TeacherOpening("a")] * says
    return caught.value


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not fetched does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def wait_until(is_so: Callable[[], bool], seconds: float = 60.0) -> None:
    """Look again and again, until a deadline."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.02)


def test_events_and_the_result_come_through(phases: Any) -> None:
    seen, result = run(phases.say, "a", "b")
    assert seen == [events.TeacherOpening("a"), events.TeacherOpening("b")]
    assert result["said"] == 2
    assert result["by"] != os.getpid()
    assert not is_alive(result["by"])


def test_what_a_phase_prints_goes_nowhere(phases: Any, capfd: pytest.CaptureFixture[str]) -> None:
    run(phases.say, "a")
    assert capfd.readouterr() == ("", "")


def test_an_error_arrives_as_what_it_was(phases: Any, tmp_path: Path) -> None:
    error = failure(phases.refuse, str(tmp_path))
    assert (type(error), error.exit_code) == (LockedError, 3)
    assert str(error) == str(LockedError(tmp_path, "another run"))
    [trace] = error.__notes__
    assert "in refuse" in trace
    assert "some_phases.py" in trace


def test_an_error_before_the_first_event_arrives_as_well(phases: Any) -> None:
    error = failure(phases.refuse_at_once, says=0)
    assert (type(error), str(error)) == (CacheError, "cache 3f9c1a: damaged. Capture it again.")


def test_a_bug_arrives_with_its_traceback_and_is_no_error_of_the_users(phases: Any) -> None:
    error = failure(phases.stumble)
    assert not isinstance(error, TrueKDError)
    assert "IndexError: list index out of range" in str(error)
    assert "return [][3]" in error.__notes__[0]


def test_a_result_that_cannot_be_sent_is_told_of(phases: Any) -> None:
    error = failure(phases.return_what_cannot_be_sent)
    assert type(error) is ProcessDied
    assert "ended with exit code 1 (AttributeError: Can't pickle" in str(error)


def test_a_fault_of_the_machine_arrives_as_such(phases: Any) -> None:
    error = failure(phases.run_out_of_disk)
    assert type(error) is EnvironmentProblem
    assert str(error).startswith("/somewhere: No space left on device")


def test_a_killed_process_is_one_that_memory_ran_out_for(phases: Any) -> None:
    error = failure(phases.die, "", signal.SIGKILL)
    assert (type(error), error.exit_code) == (OutOfMemory, 4)
    assert str(error).startswith("math: student 'tiny': killed by the system (SIGKILL), most likely for want of memory")
    assert "Lower training.batch_size, and run the same command again" in str(error)


@pytest.mark.parametrize(
    ("words", "kind", "says"),
    [
        (MEMORY, OutOfMemory, "Metal ran out of memory, most likely for want of memory. Lower training.batch_size"),
        (WATCHDOG, GPUStopped, "macOS stopped the GPU's work, because it held up the display"),
    ],
    ids=["memory", "watchdog"],
)
def test_an_abort_by_metal_is_told_by_its_cause(words: str, kind: type, says: str, phases: Any) -> None:
    # Long words before it push nothing out.
    error = failure(phases.die, "a warning\n" * 5000 + words, signal.SIGABRT)
    assert (type(error), error.exit_code) == (kind, 4)
    assert says in str(error)
    assert "run the same command again" in str(error)
    assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_process_that_dies_of_something_else_is_named_with_it(number: signal.Signals, phases: Any) -> None:
    error = failure(phases.die, "", number)
    assert (type(error), error.exit_code) == (ProcessDied, 1)
    assert f"math: student 'tiny': its process died of {number.name} (Fatal Python error" in str(error)
    assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("code", [0, 3])
def test_a_process_that_leaves_without_a_word_is_told_of(code: int, phases: Any) -> None:
    error = failure(phases.leave, code)
    assert type(error) is ProcessDied
    assert f"its process ended with exit code {code}" in str(error)


def test_a_process_that_died_leaves_room_for_the_next(phases: Any) -> None:
    failure(phases.die, "", signal.SIGKILL)
    assert run(phases.say, "a")[0] == [events.TeacherOpening("a")]


@pytest.mark.parametrize("name", ["linger", "chatter"])
def test_closing_the_generator_ends_the_process_where_nothing_is_lost(name: str, phases: Any, tmp_path: Path) -> None:
    running = apart(getattr(phases, name), str(tmp_path))
    pid = next(running).active_memory
    assert is_alive(pid)
    running.close()
    assert not is_alive(pid)
    assert (tmp_path / "stopped").read_text() == str(int(signal.SIGTERM))


def test_an_interrupt_of_the_parent_ends_the_process_where_nothing_is_lost(phases: Any, tmp_path: Path) -> None:
    running = apart(phases.linger, str(tmp_path))
    pid = next(running).active_memory
    with pytest.raises(KeyboardInterrupt):
        running.throw(KeyboardInterrupt())
    assert not is_alive(pid)
    assert (tmp_path / "stopped").exists()


PARENT = """
import sys
from test_apart import apart
import some_phases

for event in apart(getattr(some_phases, sys.argv[1]), sys.argv[2]):
    print(event.active_memory, flush=True)
"""


@linux
@pytest.mark.parametrize("name", ["linger", "chatter"])
def test_a_killed_parent_takes_its_process_with_it(name: str, phases: Any, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).parent)])}
    command = [sys.executable, "-c", PARENT, name, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    wait_until(lambda: not is_alive(pid), 20.0)


# The whole command line: slow, as each process imports all anew.


COMMAND = ("-m", "true_kd", "distill", "--domain", "a", "--domain", "b", "--config", "base.yaml")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> Place:
    """A run of two domains that nothing killed, in one process."""
    place = lay_out(tmp_path_factory.mktemp("whole"), teacher_folder, student_folder)
    assert place.run("a", "b", isolate=False).failures == {}
    return place


def lay_out(root: Path, teacher: Path, student: Path) -> Place:
    """A place with two domains, each step of which is told of."""
    place = Place(root, teacher, student, isolate=True)
    place.config["training"] |= {"iters": 40, "validate_every": 10, "checkpoint_every": 10}
    place.config["capture"] |= {"shard_prompts": 2, "batch_size": 1}
    place.write("a")
    place.write("b", [f"{prompt} and the mat" for prompt in ASK])
    (root / "base.yaml").write_text(json.dumps(place.config))
    return place


@pytest.fixture
def place(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Place:
    return lay_out(tmp_path, teacher_folder, student_folder)


def children(pid: int) -> list[int]:
    """The processes of a phase that a process has started."""
    with contextlib.suppress(OSError):
        found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [child for child in found if b"true_kd.pipeline.child" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return []


def start(place: Place) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    return subprocess.Popen([sys.executable, *COMMAND], cwd=place.root, env=environment, **pipes)


def kill_child(process: subprocess.Popen, is_time: Callable[[], bool]) -> None:
    """Kill the process that works for another, at a certain moment."""

    def has_come() -> bool:
        assert process.poll() is None, process.communicate()
        return is_time() and bool(children(process.pid))

    wait_until(has_come)
    [child] = children(process.pid)
    os.kill(child, signal.SIGKILL)


def assert_whole(place: Place, whole: Place) -> None:
    """Both domains are as if nothing had been killed."""
    for domain in ("a", "b"):
        found, expected = files_of(place.out / domain), files_of(whole.out / domain)
        assert found.keys() == expected.keys()
        for name, content in expected.items():
            assert content == found[name] or name in TIMED, name
        assert steady_lines(found["metrics.jsonl"]) == steady_lines(expected["metrics.jsonl"])


@linux
@pytest.mark.slow
def test_a_domain_whose_process_is_killed_fails_alone_and_is_finished_by_the_same_command(
    place: Place, whole: Place
) -> None:
    with start(place) as process:
        kill_child(process, (place.out / "a" / "checkpoint_10" / "training_state.json").exists)
        out, err = process.communicate()
    assert process.returncode == 4, (out, err)
    [line] = err.splitlines()
    assert line.startswith(f"a: failed. a: student '{place.config['student']}': killed by the system (SIGKILL)")
    assert "Lower training.batch_size" in line
    summary = json.loads((place.out / "kd_summary.json").read_text())
    assert (list(summary["domains"]), list(summary["failed"])) == (["b"], ["a"])
    with start(place) as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "a: goes on from the checkpoint of iteration " in out
    assert_whole(place, whole)


@linux
@pytest.mark.slow
def test_a_teacher_whose_process_is_killed_costs_one_domain_and_goes_on_where_it_was(
    place: Place, whole: Place
) -> None:
    with start(place) as process:
        kill_child(process, lambda: any(SHARD.fullmatch(path.name) for path in place.root.glob("cache/*/*")))
        out, err = process.communicate()
    assert process.returncode == 4, (out, err)
    [line] = err.splitlines()
    assert f"failed. teacher '{place.config['teacher']}': killed by the system (SIGKILL)" in line
    assert "capture.batch_size" in line
    summary = json.loads((place.out / "kd_summary.json").read_text())
    assert len(summary["domains"]) == len(summary["failed"]) == 1
    with start(place) as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert_whole(place, whole)


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_run_apart_that_a_signal_stops_says_so_in_one_line_and_leaves_no_process(
    number: signal.Signals, code: int, place: Place, whole: Place
) -> None:
    with start(place) as process:
        wait_until((place.out / "a" / "checkpoint_10" / "training_state.json").exists)
        found = children(process.pid)
        process.send_signal(number)
        _, err = process.communicate()
    assert process.returncode == code
    [line] = err.splitlines()
    assert line.startswith("true-kd: stopped by ")
    assert not any(is_alive(child) for child in found)
    with start(place) as process:
        _, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert_whole(place, whole)


@linux
@pytest.mark.slow
def test_a_run_whose_own_process_is_killed_leaves_no_other_behind_and_goes_on(place: Place, whole: Place) -> None:
    with start(place) as process:
        wait_until((place.out / "a" / "checkpoint_10" / "training_state.json").exists)
        found = children(process.pid)
        process.kill()
    wait_until(lambda: not any(is_alive(child) for child in found), 20.0)
    with start(place) as process:
        _, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert_whole(place, whole)
