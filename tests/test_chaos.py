"""Nothing lost: runs that are killed, stopped, starved of disk or run side by side end as if nothing had happened.

The short form is part of every test run. `make test-chaos` sets TRUE_KD_CHAOS=25, which multiplies the number of kills
and stops, and visits every system call instead of some; what it found stands in true_kd/docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from forking import WRITES, Call, Ended, Forked, Server, calls_of, has_strace, inject, snapshot, traced
from test_pipeline import Place, steady_lines

FACTOR = int(os.environ.get("TRUE_KD_CHAOS", "1"))
EVERYTHING = FACTOR >= 20
"""Whether every system call is visited."""
FLEETING = re.compile(r"/(\.lock[^/]*|\.(tmp-)?status)\.json$")
"""Files that nobody depends on: who holds a lock, and how far the run is."""
DISTILL = ("distill", "--domain", "a", "--config", "base.yaml")

needs_strace = pytest.mark.skipif(not has_strace(), reason="strace is not here, or may not watch processes")


class Whole:
    """A run that nothing disturbed, and the place to repeat it in."""

    def __init__(self, root: Path, server: Server, make: Callable[[Path], Place], *argv: str) -> None:
        self.root = root / "run"
        self._make = make
        self._server = server
        self.argv = argv
        self.clear()
        self.ended = server.run(*argv, cwd=self.root)
        assert self.ended.code == 0, self.ended.err
        self.seconds = self.ended.seconds
        self.left = self.look()
        self.clear()

    def clear(self) -> Path:
        """The place as it was before the run, at the same path."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        place = self._make(self.root)
        (self.root / "base.yaml").write_text(json.dumps(place.config))
        return self.root

    def look(self) -> dict[str, Any]:
        """All that is there, but for what a clock measured."""
        found: dict[str, Any] = {}
        for name, content in snapshot(self.root).items():
            if name.endswith((".json", ".jsonl")) and not name.endswith("manifest.jsonl"):
                content = steady(json.loads(content)) if name.endswith(".json") else steady_lines(content)
            found[name] = content
        for name in [name for name in found if name.endswith("about.json")]:
            del found[name]
        return found

    def start(self) -> Forked:
        """The run again; it waits for `go`."""
        return self._server.start(*self.argv, cwd=self.root)

    def finish(self) -> Ended:
        """The same command once more, to the end; then all is as it should be."""
        ended = self._server.run(*self.argv, cwd=self.root)
        assert ended.code == 0, ended.err
        found = self.look()
        assert found.keys() == self.left.keys(), found.keys() ^ self.left.keys()
        differing = [name for name, content in found.items() if content != self.left[name]]
        assert not differing, differing
        return ended


TIMED = {"seconds", "finished_at", "peak_memory", "capture_peak_memory", "training_peak_memory", "timings"}
RETOLD = {"unchanged", "check"}
"""What a run that goes on says of itself, and digests of records that hold times."""


def steady(value: Any) -> Any:
    """A record without what depends on the clock."""
    if isinstance(value, dict):
        return {name: steady(part) for name, part in value.items() if name not in TIMED | RETOLD}
    return [steady(part) for part in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def make(teacher_folder: Path, student_folder: Path) -> Callable[[Path], Place]:
    def lay_out(root: Path) -> Place:
        place = Place(root, teacher_folder, student_folder)
        place.write("a")
        place.config["lora"] = {"rank": 2, "dropout": 0.3}
        place.config["capture"] = {"max_tokens": 4, "shard_prompts": 3, "batch_size": 2}
        place.config["training"] = {"iters": 6, "validate_every": 2, "checkpoint_every": 2, "learning_rate": 0.01}
        return place

    return lay_out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, server: Server, make: Callable[[Path], Place]) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"), server, make, *DISTILL)


@pytest.fixture(scope="module")
def with_control(tmp_path_factory: pytest.TempPathFactory, server: Server, make: Callable[[Path], Place]) -> Whole:
    return Whole(tmp_path_factory.mktemp("control"), server, make, *DISTILL, "--control", "sft")


def wait_somewhere(run: Forked, whole: Whole, chance: random.Random) -> None:
    """Let a run come to a random place: after so many of its lines, whatever the machine's speed, and a moment more."""
    lines, deadline = chance.randint(0, whole.ended.out.count("\n")), time.monotonic() + 2 * whole.seconds
    while run.said().count("\n") < lines and not run.is_over and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(chance.uniform(0.0, 0.3 if lines == 0 else 0.05))


def some(items: Sequence[Any], count: int) -> list[Any]:
    """So many of the items, evenly spread; all of them when everything is visited."""
    if EVERYTHING or len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


@contextlib.contextmanager
def after(what: str) -> Iterator[None]:
    """Say what came before a fault."""
    try:
        yield
    except AssertionError as fault:
        raise AssertionError(f"{fault}\nafter {what}") from fault


def assert_one_line(ended: Ended, code: int) -> str:
    """One line on stderr and the exit code; the line."""
    assert ended.code == code, (ended.code, ended.err)
    assert "Traceback" not in ended.err
    lines = ended.err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# Kills


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(with_control: Whole) -> None:
    chance = random.Random(0)
    kills, wanted = 0, 4 if FACTOR == 1 else 8 * FACTOR
    while kills < wanted:
        with_control.clear()
        told = []
        for _ in range(chance.randint(1, 5)):
            run = with_control.start()
            run.go()
            wait_somewhere(run, with_control, chance)
            run.kill()
            ended = run.wait()
            told.append(ended.out)
            kills += ended.code == -signal.SIGKILL
        with after("\n---\n".join(told)):
            with_control.finish()
    print(f"\n{kills} kills at random moments: 0 lost, 0 changed")


@needs_strace
@pytest.mark.slow
def test_a_run_that_is_killed_before_any_change_of_the_disk_ends_as_if_it_had_not_been(
    whole: Whole, tmp_path: Path
) -> None:
    calls = recorded(whole, tmp_path)
    visited = some(calls, 6)
    killed = 0
    for call in visited:
        whole.clear()
        run = whole.start()
        with inject(run, tmp_path / "log", call, "signal=SIGKILL"):
            run.go()
            ended = run.wait()
        # How often a run looks at its locks depends on the time it takes: the last of these calls may not come again.
        assert ended.code in (-signal.SIGKILL, 0), call
        killed += ended.code != 0
        with after(f"killed before {call}"):
            whole.finish()
    assert killed > len(visited) // 2
    print(f"\nkilled before {killed} of {len(calls)} system calls: 0 lost, 0 changed")


def recorded(whole: Whole, tmp_path: Path) -> list[Call]:
    """The changes that an undisturbed run makes to the disk."""
    whole.clear()
    run = whole.start()
    with traced(run, tmp_path / "log"):
        run.go()
        assert run.wait().code == 0
    calls = calls_of(tmp_path / "log", run.pid, whole.root)
    assert len(calls) > 100
    return calls


@needs_strace
def test_whatever_gets_its_name_is_on_the_disk_before(whole: Whole, tmp_path: Path) -> None:
    calls = recorded(whole, tmp_path)
    flushed: set[str] = set()
    renamed: list[str] = []
    for call in calls:
        if FLEETING.search(call.path):
            continue
        if call.name in WRITES:
            flushed.discard(call.path)
        elif call.name in ("fsync", "fdatasync"):
            flushed.add(call.path)
            renamed = [path for path in renamed if str(Path(path).parent) != call.path]
        elif call.name.startswith("rename") and Path(call.path).is_file() is False and call.path.count(".tmp-") == 1:
            assert call.path in flushed, call
            renamed.append(call.path)
    assert renamed == [], "renames without a flush of their folder"


@pytest.mark.slow
def test_a_run_whose_domains_have_processes_of_their_own_outlives_kills_as_well(
    tmp_path: Path, server: Server, make: Callable[[Path], Place]
) -> None:
    whole = Whole(tmp_path, server, make, *DISTILL, "--set", "isolate=true")
    chance = random.Random(1)
    kills, wanted = 0, 1 if FACTOR == 1 else 2 * FACTOR
    while kills < wanted:
        whole.clear()
        for _ in range(chance.randint(1, 3)):
            run = whole.start()
            run.go()
            wait_somewhere(run, whole, chance)
            # Its child hears of it by itself, and the next run may begin before.
            run.kill()
            kills += run.wait().code == -signal.SIGKILL
        whole.finish()
    print(f"\n{kills} kills of the parent of a domain's process: 0 lost, 0 changed")


# Signals


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_run_that_is_stopped_says_so_and_goes_on(number: signal.Signals, whole: Whole) -> None:
    chance = random.Random(number)
    longest, stops, wanted = 0.0, 0, FACTOR
    while stops < wanted:
        whole.clear()
        for _ in range(chance.randint(1, 3)):
            run = whole.start()
            run.go()
            # Before its first line a run may not have set its handlers.
            while not run.said() and not run.is_over:
                time.sleep(0.002)
            wait_somewhere(run, whole, chance)
            asked = time.perf_counter()
            run.kill(number)
            ended = run.wait()
            if ended.code == 0:
                continue
            assert ended.code == 128 + number, (ended.code, ended.err)
            assert re.fullmatch(r"true-kd: stopped by [^.]+\. .*run it again to go on\.\n", ended.err), ended.err
            longest = max(longest, time.perf_counter() - asked)
            stops += 1
        whole.finish()
    print(f"\n{stops} stops by {number.name}: 0 lost, 0 changed, {longest:.1f} s at most")
    assert longest < 30


def test_a_stopped_run_goes_on_from_the_step_it_was_at(whole: Whole, tmp_path: Path) -> None:
    whole.clear()
    command = [sys.executable, "-m", "true_kd", *DISTILL, "--set", "training.iters=5000", "--set", "isolate=true"]
    command += ["--set", "training.checkpoint_every=5000", "--set", "training.validate_every=5000"]
    run = subprocess.Popen(command, cwd=whole.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith("a: 500/5000"):
            break
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert (run.returncode, len(err.splitlines())) == (130, 1), err
    [checkpoint] = (whole.root / "out" / "a").glob("checkpoint_*")
    assert int(checkpoint.name.removeprefix("checkpoint_")) >= 500
    again = subprocess.Popen(command, cwd=whole.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = next(line for line in again.stdout if "goes on from" in line)
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=60)
    assert said == f"a: goes on from the checkpoint of iteration {checkpoint.name.removeprefix('checkpoint_')}\n"
    assert again.returncode == 143


# Disk


ERRORS = {"ENOSPC": "No space left on device", "EIO": "Input/output error"}


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
def test_a_write_that_fails_is_one_line_and_costs_nothing(error: str, whole: Whole, tmp_path: Path) -> None:
    failing = [call for call in recorded(whole, tmp_path) if call.name in (*WRITES, "fsync", "rename")]
    visited = some(failing, 4)
    noticed = 0
    for call in visited:
        whole.clear()
        run = whole.start()
        with inject(run, tmp_path / "log", call, f"error={error}"):
            run.go()
            ended = run.wait()
        if ended.code == 0:
            assert FLEETING.search(call.path), (call, ended.out)
        else:
            noticed += 1
            line = assert_one_line(ended, 4)
            assert ERRORS[error] in line, line
            assert str(whole.root) in line, line
            if error == "ENOSPC":
                assert re.search(r"needed, [\d.]+ (GB|MB|kB|bytes) free", line), line
        with after(f"{error} at {call}: {ended}"):
            whole.finish()
    print(f"\n{error} at {len(visited)} of {len(failing)} writes: {noticed} noticed, 0 lost, 0 changed")


@pytest.mark.slow
def test_files_that_may_not_grow_stop_a_run_in_one_line(whole: Whole) -> None:
    whole.clear()
    whole.finish()
    # What a run says goes to files as well here, which must have room for it.
    room = 2 * len(whole.ended.out)
    sizes = {len(content) for content in snapshot(whole.root).values() if len(content) > room}
    assert len(sizes) >= 2, "no file of this run is larger than what it says"
    for limit in some(sorted(sizes), 2):
        whole.clear()
        run = whole.start()
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (limit - 1, resource.RLIM_INFINITY))
        run.go()
        line = assert_one_line(run.wait(), 4)
        assert "File too large" in line, line
        whole.finish()


@pytest.mark.slow
def test_a_full_disk_stops_a_run_in_one_line_and_it_goes_on_after(whole: Whole, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mounted(disk, 1 << 20):
        pytest.skip("a small disk cannot be mounted here")
    try:
        stopped = 0
        for index in range(max(2, FACTOR)):
            for path in disk.iterdir():
                shutil.rmtree(path, ignore_errors=True)
            place = {"out": str(disk / "out"), "cache": str(disk / "cache")}
            sets = [part for name, value in place.items() for part in ("--set", f"{name}={value}")]
            remount(disk, 1 << 20)
            whole.clear()
            filler = disk / "filler"
            size = (1 << 20) - 16_384 * (index + 1)
            filler.write_bytes(bytes(size))
            run = whole._server.run(*whole.argv, *sets, cwd=whole.root)
            if run.code != 0:
                stopped += 1
                line = assert_one_line(run, 4)
                assert "No space left on device" in line, line
                assert str(disk) in line, line
            filler.unlink()
            again = whole._server.run(*whole.argv, *sets, cwd=whole.root)
            assert again.code == 0, again.err
            weights = (disk / "out" / "a" / "adapters.safetensors").read_bytes()
            assert weights == whole.left["out/a/adapters.safetensors"]
        assert stopped > 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def mounted(disk: Path, size: int) -> bool:
    """Mount a small disk in memory, where that is allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


def remount(disk: Path, size: int) -> None:
    """Give the disk another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


# Several at once


@pytest.mark.slow
def test_of_several_runs_on_one_domain_one_works_and_the_others_leave_at_once(whole: Whole) -> None:
    longest = 0.0
    for round_ in range(max(1, FACTOR // 2)):
        whole.clear()
        runs = [whole.start() for _ in range(2 + round_ % 7)]
        for run in runs:
            run.go()
        ends = [run.wait() for run in runs]
        worked = [run.pid for run, end in zip(runs, ends, strict=True) if end.code == 0]
        assert worked, [end.err for end in ends]
        for end in ends:
            if end.code != 0:
                line = assert_one_line(end, 3)
                assert re.search(r"in use by `true-kd distill` \(process (\d+), since ", line), line
                longest = max(longest, end.seconds)
        whole.finish()
    print(f"\nthe others left after {longest:.2f} s at most")


@pytest.mark.slow
def test_the_one_that_leaves_names_the_one_that_works(whole: Whole) -> None:
    whole.clear()
    working = whole.start()
    working.go()
    deadline = time.monotonic() + 60
    about = whole.root / "out" / ".lock.json"
    while not (about.exists() and about.read_text().endswith("}")):
        assert time.monotonic() < deadline
    os.kill(working.pid, signal.SIGSTOP)
    command = [sys.executable, "-m", "true_kd", *whole.argv]
    began = time.perf_counter()
    other = subprocess.run(command, cwd=whole.root, capture_output=True, text=True)
    took = time.perf_counter() - began
    os.kill(working.pid, signal.SIGCONT)
    assert other.returncode == 3
    assert f"process {working.pid}" in other.stderr
    assert working.wait().code == 0
    whole.finish()
    print(f"\na second run left with exit code 3 after {took:.2f} s, its start included")


@pytest.mark.slow
def test_runs_that_share_a_teacher_capture_once(whole: Whole) -> None:
    for _ in range(max(1, FACTOR // 5)):
        whole.clear()
        runs = []
        for number in range(4):
            argv = (*whole.argv, "--out", f"out{number}")
            runs.append(whole._server.start(*argv, cwd=whole.root))
        for run in runs:
            run.go()
        ends = [run.wait() for run in runs]
        assert [end.code for end in ends] == [0, 0, 0, 0], [end.err for end in ends]
        captured = [
            end for end in ends if "captured 7/7 replies, from the cache" not in end.out and ": opening" in end.out
        ]
        assert len(captured) == 1, [end.out for end in ends]
        found = whole.look()
        cache = {name for name in whole.left if name.startswith("cache/")}
        assert {name for name in found if name.startswith("cache/")} == cache
        for number in range(4):
            name = "a/adapters.safetensors"
            assert found[f"out{number}/{name}"] == whole.left[f"out/{name}"]


# Hours


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory and open files are read from /proc")
def test_memory_and_open_files_stay_what_they_are(tmp_path: Path, server: Server) -> None:
    iters = 5000 if EVERYTHING else 240
    sets = {"training.iters": iters, "training.validate_every": iters // 10, "training.checkpoint_every": iters // 10}
    sets |= {"isolate": "false", "report": "false", "control": "none", "evaluation.speed_tokens": 0}
    sets |= {"evaluation.exact_match": "false", "gate.prompts": 1}
    flags = [part for name, value in sets.items() for part in ("--set", f"{name}={value}")]
    run = server.start(
        "distill", "--domain", "task", "--config", "pocket:configs/base.yaml", "--out", "out", *flags, cwd=tmp_path
    )
    run.go()
    seen: dict[int, tuple[int, int]] = {}
    page = os.sysconf("SC_PAGE_SIZE")
    while not run.is_over:
        steps = re.findall(rf"task: (\d+)/{iters} ", run.said())
        with contextlib.suppress(OSError, IndexError):
            resident = int((Path("/proc") / str(run.pid) / "statm").read_text().split()[1]) * page
            files = len(list((Path("/proc") / str(run.pid) / "fd").iterdir()))
            if steps:
                seen[int(steps[-1])] = (resident, files)
        time.sleep(0.2)
    ended = run.wait()
    assert ended.code == 0, ended.err
    early = max(value for step, value in seen.items() if step <= iters // 2)
    late = max(value for step, value in seen.items() if step > iters // 2 and step < iters)
    print(
        f"\n{iters} iterations: {early[0] / 1e6:.1f} MB and {early[1]} files in the first half, "
        f"{late[0] / 1e6:.1f} MB and {late[1]} files in the second"
    )
    # A short run is still warming up the allocator's arenas; a batch kept per step would be far more than that.
    assert late[0] < (1.02 if EVERYTHING else 1.1) * early[0]
    assert late[1] <= early[1]
