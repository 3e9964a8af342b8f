"""One process at a time holds a lock, a dead one holds nothing, and whoever is refused is told who has it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from true_kd.errors import LockedError
from true_kd.files import CannotWrite
from true_kd.jobs import plan
from true_kd.locks import Lock, check_free, hold
from true_kd.pipeline.steps import hold_folder, look_free

HOLD = """
import sys
from pathlib import Path
from true_kd.locks import hold

with hold(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.readline()
"""
"""Holds a lock until it is told to go; as if it were `true-kd distill`."""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "out" / ".lock"


@pytest.fixture
def holder(lock: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock."""
    lock.parent.mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, "distill", str(lock)], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_whoever_is_refused_is_told_who_holds_it(holder: subprocess.Popen, lock: Path) -> None:
    with pytest.raises(LockedError) as caught, hold(lock):
        pass
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith(f"{lock.parent}: in use by `-c distill` (process {holder.pid}, since 2")
    assert len(str(caught.value).splitlines()) == 1


def test_a_holder_on_another_machine_is_named_with_it(holder: subprocess.Popen, lock: Path) -> None:
    about = lock.with_name(".lock.json")
    about.write_text(json.dumps({**json.loads(about.read_text()), "host": "studio"}))
    assert f"(process {holder.pid} on studio, since 2" in Lock(lock).holder


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3", '{"host": 1}'])
def test_a_holder_that_nothing_is_known_of_is_another_run(
    content: str | None, holder: subprocess.Popen, lock: Path
) -> None:
    about = lock.with_name(".lock.json")
    about.unlink()
    if content is not None:
        about.write_text(content)
    with pytest.raises(LockedError, match="in use by another true-kd run"), hold(lock):
        pass


def test_a_holder_that_is_killed_holds_nothing(holder: subprocess.Popen, lock: Path) -> None:
    holder.kill()
    holder.wait()
    assert lock.with_name(".lock.json").exists(), "it had no time to tidy up"
    with hold(lock):
        assert json.loads(lock.with_name(".lock.json").read_text())["pid"] == os.getpid()


def test_a_stopped_holder_is_waited_for(holder: subprocess.Popen, lock: Path) -> None:
    mine = Lock(lock)
    assert not mine.acquire(0.05)
    assert not mine.is_held
    holder.send_signal(signal.SIGKILL)
    assert mine.acquire(patience=-1)
    assert mine.is_held
    mine.release()
    mine.release()
    assert not mine.is_held


def test_a_lock_that_was_given_back_is_free_and_nobody_is_said_to_hold_it(lock: Path) -> None:
    lock.parent.mkdir()
    for _ in range(2):
        with hold(lock):
            assert lock.with_name(".lock.json").exists()
        assert not lock.with_name(".lock.json").exists()


def test_a_link_in_the_place_of_the_holders_file_leads_nowhere(lock: Path) -> None:
    lock.parent.mkdir()
    (lock.parent / "mine").write_text("mine")
    lock.with_name(".lock.json").symlink_to(lock.parent / "mine")
    with hold(lock):
        assert (lock.parent / "mine").read_text() == "mine"


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite) as caught, hold(tmp_path / "file" / ".lock"):
        pass
    assert len(str(caught.value).splitlines()) == 1


def test_looking_whether_a_lock_is_free_makes_nothing(tmp_path: Path) -> None:
    check_free(tmp_path / ".lock")
    check_free(tmp_path / "nowhere" / ".lock")
    assert list(tmp_path.iterdir()) == []


def test_looking_whether_a_lock_is_free_finds_the_holder(holder: subprocess.Popen, lock: Path) -> None:
    with pytest.raises(LockedError, match=f"process {holder.pid}"):
        check_free(lock)
    holder.communicate("\n")
    check_free(lock)


TAKE_TURNS = """
import os, sys
from pathlib import Path
from true_kd.locks import Lock

folder = Path(sys.argv[1])
sys.stdin.readline()
for _ in range(20):
    lock = Lock(folder / ".lock")
    assert lock.acquire(patience=-1)
    # Fails where another is inside as well.
    os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
    os.unlink(folder / "inside")
    with (folder / "turns").open("a") as file:
        file.write(f"{os.getpid()}\\n")
    lock.release()
"""


@pytest.mark.parametrize("count", [2, 8])
def test_of_several_processes_exactly_one_at_a_time_is_inside(count: int, tmp_path: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", TAKE_TURNS, str(tmp_path)]
    processes = [subprocess.Popen(command, **pipes) for _ in range(count)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    ends = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, ends
    turns = (tmp_path / "turns").read_text().split()
    assert sorted(turns) == sorted([str(process.pid) for process in processes] * 20)


def test_a_run_looks_for_another_before_it_makes_anything(tmp_path: Path) -> None:
    look_free([])
    (tmp_path / "prompts" / "a").mkdir(parents=True)
    for split in ("train", "valid"):
        (tmp_path / "prompts" / "a" / f"{split}.jsonl").write_text('{"prompt": "hi"}\n')
    places = {"prompts": str(tmp_path / "prompts"), "out": str(tmp_path / "out")}
    (tmp_path / "base.yaml").write_text(json.dumps({"teacher": "t", "student": "s", **places}))
    jobs, _ = plan(tmp_path / "base.yaml", ["a"], [])
    before = sorted(tmp_path.rglob("*"))
    look_free(jobs)
    assert sorted(tmp_path.rglob("*")) == before
    with hold_folder(tmp_path / "out"), pytest.raises(LockedError, match=f"process {os.getpid()}"):
        look_free(jobs)
