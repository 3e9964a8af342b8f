"""A file is old or new, never a part; and what cannot be written is said in one line."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from true_kd.files import CannotWrite, digest_file, digest_json, write_atomic, write_json


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
    assert line.startswith(f"{tmp_path / 'a.txt'}: cannot be written (No space left on device). ")
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
