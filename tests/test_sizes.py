"""A model's size is counted as its user finds it, and read back from a file only where that says what it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from true_kd.manifest import SIZE, is_stored
from true_kd.models import LanguageModel, ModelOptions, open_model
from true_kd.sizes import ModelSize, machine, measure_size, read_size, size_file, write_size

PROMPTS = [[5, 6, 7], [8, 9], [10], [11, 12]]
KNOWN = ModelSize(1000, 4000, 12.5)


def options(folder: Path) -> ModelOptions:
    return ModelOptions(model=str(folder))


def stored_numbers(folder: Path) -> int:
    return sum(array.size for array in mx.load(str(folder / "model.safetensors")).values())


# Measured


def test_parameters_and_bytes_are_those_of_the_weights_on_disk(student: LanguageModel, student_folder: Path) -> None:
    found = measure_size(student, options(student_folder), "student", PROMPTS, 0)
    assert found.parameters == stored_numbers(student_folder)
    assert found.bytes == (student_folder / "model.safetensors").stat().st_size
    assert found.tokens_per_second is None


def test_a_speed_is_measured_where_it_is_asked_for(student: LanguageModel, student_folder: Path) -> None:
    assert measure_size(student, options(student_folder), "student", PROMPTS, 2).tokens_per_second > 0
    assert measure_size(student, options(student_folder), "student", [], 2).tokens_per_second is None


@pytest.mark.parametrize("dequantize", ["never", "always"])
def test_quantised_weights_count_unpacked_and_weigh_packed(
    dequantize: str, quantised_folder: Path, student_folder: Path
) -> None:
    packed = ModelOptions(model=str(quantised_folder), dequantize=dequantize)
    found = measure_size(open_model(packed, "student"), packed, "student", PROMPTS, 0)
    assert found.parameters == stored_numbers(student_folder)
    assert found.bytes == (quantised_folder / "model.safetensors").stat().st_size
    assert found.bytes < 0.5 * (student_folder / "model.safetensors").stat().st_size


# Kept


def test_a_size_is_read_back_where_it_was_measured(tmp_path: Path) -> None:
    write_size(tmp_path / "size.json", KNOWN)
    assert read_size(tmp_path / "size.json") == KNOWN


def test_a_size_without_a_speed_is_one(tmp_path: Path) -> None:
    write_size(tmp_path / "size.json", ModelSize(1000, 4000))
    assert read_size(tmp_path / "size.json") == ModelSize(1000, 4000)


def changed(path: Path, **changes: Any) -> Path:
    write_size(path, KNOWN)
    record = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in record.items() if value is not ...}))
    return path


@pytest.mark.parametrize("other", ["another machine", "", None, 3, ...], ids=repr)
def test_a_speed_of_another_machine_is_not_known_here(other: Any, tmp_path: Path) -> None:
    assert read_size(changed(tmp_path / "size.json", machine=other)) == ModelSize(1000, 4000)


@pytest.mark.parametrize(
    "changes",
    [
        {name: value}
        for name in ("parameters", "bytes")
        for value in (..., None, "1000", 1000.0, True, 0, -1, 2**53, [1000])
    ]
    + [{"tokens_per_second": value} for value in ("12", True, 0, -1.0, float("nan"), float("inf"), 1e13, [1.0])],
    ids=str,
)
def test_numbers_that_are_no_size_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    path = changed(tmp_path / "size.json", **changes)
    with pytest.raises(ValueError, match="no "):
        read_size(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b"\xff\xfe",
        b'"size"',
        b" " * 2**15,
        b"1" * 2**13,
        b"[" * 2**13,
        b'{"a":' * 2000,
    ],
    ids=lambda content: repr(content[:8]),
)
def test_a_file_that_says_anything_else_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "size.json").write_bytes(content)
    with pytest.raises(ValueError):  # noqa: PT011 - of whichever kind: what is read is a stranger's
        read_size(tmp_path / "size.json")


def test_a_file_that_is_not_there_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="size"):
        read_size(tmp_path / "size.json")


def test_the_machine_is_told_by_what_it_computes_with() -> None:
    assert machine() == machine()
    assert mx.__version__ in machine()


def test_a_cache_may_hold_the_sizes_of_several_machines() -> None:
    names = {size_file(name) for name in (machine(), "another", "")}
    assert len(names) == 3
    for name in names:
        assert SIZE.fullmatch(name)
        assert is_stored(name)


@pytest.mark.parametrize("name", ["size-1.json", "size-0123456789abcdef.json.tmp", "../size-0123456789abcdef.json"])
def test_other_names_are_no_sizes(name: str) -> None:
    assert not is_stored(name)
