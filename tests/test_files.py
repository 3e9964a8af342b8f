"""A file is old or new, never a part; and what cannot be written is said in one line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from true_kd.files import (
    CHECK,
    CannotWrite,
    digest_file,
    digest_json,
    discard,
    read_record,
    staging,
    write_atomic,
    write_json,
    write_record,
)


def text(content: str) -> Callable[[Path], Any]:
    """A writer of one string."""
    return lambda path: path.write_text(content)


def failing(error: BaseException) -> Callable[[Path], None]:
    """A writer that gets half way and raises."""

    def write(path: Path) -> None:
        path.write_text("half")
        raise error

    return write


def test_a_new_file_holds_what_the_writer_wrote(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.txt", text("hello"))
    assert (tmp_path / "a.txt").read_text() == "hello"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b" / "c.txt", text("hello"))
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "hello"


def test_the_old_content_stands_until_the_writer_is_done(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    seen = []

    def write(path: Path) -> None:
        path.write_text("new")
        seen.append(target.read_text())

    write_atomic(target, write)
    assert (seen, target.read_text()) == (["old"], "new")


def test_the_temporary_name_has_the_suffix_of_the_final_one(tmp_path: Path) -> None:
    names = []
    write_atomic(tmp_path / "a.safetensors", lambda path: (names.append(path), path.touch()))
    assert names[0].suffix == ".safetensors"
    assert names[0].parent == tmp_path
    assert names[0].name.startswith(".")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[save_safetensors] failed"),
        ValueError("no such value"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_when_the_writer_raises_the_old_file_stands_and_nothing_else(error: BaseException, tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises((CannotWrite, type(error))):
        write_atomic(target, failing(error))
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_is_an_error_of_the_environment_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite) as caught:
        write_atomic(tmp_path / "a.txt", failing(OSError(28, "No space left on device")))
    [line] = str(caught.value).splitlines()
    place = re.escape(str(tmp_path / "a.txt"))
    wrong = r"\(No space left on device: 1 bytes needed, [0-9.]+ [kMG]B free\)"
    assert re.match(rf"{place}: cannot be written {wrong}\. Free space, ", line)
    assert caught.value.exit_code == 4


def test_a_message_of_several_lines_becomes_one(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite) as caught:
        write_atomic(tmp_path / "a.txt", failing(RuntimeError("failed:\n  at some place\n")))
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path / "file" / "a.txt", tmp_path / "file" / "b" / "a.txt"):
        with pytest.raises(CannotWrite) as caught:
            write_atomic(target, text("x"))
        assert len(str(caught.value).splitlines()) == 1
        assert str(target) in str(caught.value)


def test_a_folder_in_the_place_of_the_file_is_one_line_and_stays(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(CannotWrite, match="cannot be written"):
        write_atomic(tmp_path / "a.txt", text("x"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_name_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="cannot be written"):
        write_atomic(tmp_path / ("x" * 300), text("x"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CannotWrite, match="Permission denied"):
            write_atomic(tmp_path / "a.txt", text("x"))
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_has_the_permissions_that_any_new_file_has(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "a.txt", text("x"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~umask


def test_json_is_written_readably_and_comes_back(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": "naïve → ok"}
    write_json(tmp_path / "a.json", value)
    written = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(written) == value
    assert "naïve → ok" in written
    assert written.endswith("}\n")
    assert list(json.loads(written)) == ["b", "a"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), {"deep": [1.0, float("nan")]}])
def test_what_json_has_no_word_for_is_refused_and_the_old_file_stands(value: Any, tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("{}")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(target, value)
    assert target.read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [b"", b"abc", b"\0" * 300_000])
def test_the_digest_of_a_file_is_its_sha256(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    assert digest_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_the_digest_of_data_knows_no_order_of_keys() -> None:
    assert digest_json({"a": 1, "b": {"c": 2, "d": 3}}) == digest_json({"b": {"d": 3, "c": 2}, "a": 1})


@pytest.mark.parametrize(
    ("one", "other"), [([1, 2], [2, 1]), ({"a": 1}, {"a": 2}), ("1", 1), (1, 1.5), (None, ""), ({"a": None}, {})]
)
def test_the_digest_of_data_knows_everything_else(one: Any, other: Any) -> None:
    assert digest_json(one) != digest_json(other)


def test_the_digest_of_data_is_the_sha256_of_its_shortest_json() -> None:
    assert digest_json({"b": "ü", "a": [1]}) == hashlib.sha256('{"a":[1],"b":"ü"}'.encode()).hexdigest()


def test_the_digest_of_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        digest_json([float("nan")])


# Several files at once


def test_files_take_their_names_together_when_the_block_ends(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with staging(tmp_path) as stage:
        for name in ("a", "b"):
            lies = stage.write(name, text(f"new {name}"))
            assert lies.read_text() == f"new {name}"
        assert (tmp_path / "a").read_text() == "old"
        assert not (tmp_path / "b").exists()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new a", "b": "new b"}


ORDER = """
import os, signal, sys
from pathlib import Path
from true_kd.files import staging

left = int(sys.argv[2])

def watch(event, arguments):
    global left
    if event == "os.rename":
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
with staging(Path(sys.argv[1]), last="b") as stage:
    for name in "abc":
        stage.write(name, lambda path: path.write_text("new"))
"""
"""Stages three files, and dies after so many of them have their names."""


@pytest.mark.parametrize(("named", "expected"), [(0, set()), (1, {"a"}), (2, {"a", "c"})])
def test_the_last_file_takes_its_name_after_all_others(named: int, expected: set[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", ORDER, str(tmp_path), str(named)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".tmp-")} == expected


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("a bug")])
def test_a_block_that_fails_leaves_every_old_file_and_no_new_one(error: BaseException, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def fill() -> None:
        with staging(tmp_path) as stage:
            stage.write("a", text("new"))
            stage.write("b", text("new"))
            stage.write("c", failing(error))

    with pytest.raises((CannotWrite, type(error))):
        fill()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


def test_a_name_that_cannot_be_taken_leaves_nothing_temporary(tmp_path: Path) -> None:
    (tmp_path / "b" / "mine").mkdir(parents=True)

    def fill() -> None:
        with staging(tmp_path, last="b") as stage:
            stage.write("b", text("new"))
            stage.write("a", text("new"))

    with pytest.raises(CannotWrite, match="b: cannot be written"):
        fill()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_json_that_is_refused_takes_the_whole_block_with_it(tmp_path: Path) -> None:
    def fill() -> None:
        with staging(tmp_path) as stage:
            stage.write("a", text("new"))
            stage.write_json("b", float("nan"))

    with pytest.raises(ValueError, match="JSON compliant"):
        fill()
    assert list(tmp_path.iterdir()) == []


# Records


VALUE = {"steps": [{"loss": 0.1, "at": 1}, {"loss": 2.5e-7, "at": 2}], "name": "naïve → ok", "none": None, "yes": True}


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", VALUE)
    assert read_record(tmp_path / "a.json") == VALUE
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")).keys() == {*VALUE, CHECK}


def test_every_flipped_bit_of_a_record_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_record(path, VALUE)
    content = path.read_bytes()
    for at, byte in enumerate(content):
        for bit in range(8):
            path.write_bytes(content[:at] + bytes([byte ^ (1 << bit)]) + content[at + 1 :])
            try:
                found = read_record(path)
            except ValueError:
                continue
            # The e of a number may be an E.
            assert (found, bytes([byte])) == (VALUE, b"e"), (at, bit)


@pytest.mark.parametrize("keep", [0, 1, 17, -2])
def test_a_record_that_was_cut_short_is_noticed(keep: int, tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", VALUE)
    (tmp_path / "a.json").write_bytes((tmp_path / "a.json").read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"a\.json"):
        read_record(tmp_path / "a.json")


@pytest.mark.parametrize("content", ["[]", "{}", "null", "3", '{"check": null}', "[" * 100_000, "\0" * 100])
def test_what_is_no_record_is_noticed(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_record(tmp_path / "a.json")


def test_a_record_of_more_bytes_than_allowed_is_not_read(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", VALUE)
    size = (tmp_path / "a.json").stat().st_size
    assert read_record(tmp_path / "a.json", size) == VALUE
    with pytest.raises(ValueError, match=r"a\.json"):
        read_record(tmp_path / "a.json", size - 1)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_record_is_a_plain_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_record(tmp_path / "b.json", VALUE)
    {"link": lambda: path.symlink_to(tmp_path / "b.json"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[
        kind
    ]()
    with pytest.raises(ValueError, match=r"a\.json"):
        read_record(path)


def test_a_record_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert read_record(tmp_path / "a.json") is None


# Deleting folders


def test_a_discarded_folder_is_gone_with_all_that_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("x")
    (tmp_path / "other").write_text("mine")
    discard(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


DISCARD = """
import os, signal, sys
from pathlib import Path
from true_kd.files import discard

def watch(event, arguments):
    if event in ("os.remove", "os.unlink", "shutil.rmtree"):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
discard(Path(sys.argv[1]))
"""


def test_a_folder_whose_deleting_is_killed_is_gone_by_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")
    assert subprocess.run([sys.executable, "-c", DISCARD, str(tmp_path / "a")]).returncode == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".tmp-")


# Real disks without room, and real faults


WITHIN = """
import resource, sys
from pathlib import Path
import mlx.core as mx
from true_kd.files import CannotWrite, save_tensors, write_atomic, write_json

path, what = Path(sys.argv[1]), sys.argv[2]
array = mx.zeros((250_000,))
mx.eval(array)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    if what == "json":
        write_json(path, "x" * 2_499_997)
    else:
        write_atomic(path, lambda temporary: save_tensors(temporary, {"a": array}), 1_000_000)
except CannotWrite as error:
    print(error)
    sys.exit(error.exit_code)
"""
"""Writes a file where none may be larger than 1,000 bytes."""


@pytest.mark.parametrize(("what", "need"), [("json", "2.5 MB"), ("tensors", "1.0 MB")])
def test_where_there_is_no_room_the_message_says_what_is_needed_and_what_is_free(
    what: str, need: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", WITHIN, str(path), what], capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    [line] = done.stdout.splitlines()
    place = re.escape(str(path))
    assert re.match(rf"{place}: cannot be written \(File too large: {need} needed, [0-9.]+ [kMG]B free\)\. Free", line)
    assert (path.read_text(), [found.name for found in tmp_path.iterdir()]) == ("old", [path.name])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="these devices are Linux's")
@pytest.mark.parametrize(
    ("device", "says"),
    [("/dev/full", "No space left on device: 10 bytes needed"), ("/proc/self/mem", "Input/output error")],
)
def test_a_write_that_the_system_refuses_is_never_taken_for_a_file(device: str, says: str, tmp_path: Path) -> None:
    """The first device takes what is written into memory and refuses when it is handed on."""
    (tmp_path / "a").write_text("old")

    def write(path: Path) -> None:
        path.write_text("new")
        with Path(device).open("r+b" if device == "/proc/self/mem" else "wb") as file:
            file.write(b"x" * 10)

    with pytest.raises(CannotWrite, match=says):
        write_atomic(tmp_path / "a", write, 10)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}
