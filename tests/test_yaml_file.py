"""Strict YAML: what counts as plain data, and where the rest is said to be."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from true_kd.errors import ConfigError
from true_kd.suggest import did_you_mean, quote
from true_kd.yaml_file import Document, read_value, read_yaml


def read(folder: Path, content: str | bytes) -> Document:
    path = folder / "base.yaml"
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return read_yaml(path)


def refusal(folder: Path, content: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, content)
    return str(caught.value).replace(str(folder) + "/", "")


@pytest.mark.parametrize(
    ("scalar", "expected"),
    [
        ("1e-4", 1e-4),
        ("1e4", 10000.0),
        ("2.", 2.0),
        (".5", 0.5),
        ("-1.5E+3", -1500.0),
        ("0", 0),
        ("-7", -7),
        ("+7", 7),
        ("0x1f", 31),
        ("0o17", 15),
        ("true", True),
        ("TRUE", True),
        ("False", False),
        ("", None),
        ("null", None),
        ("~", None),
        ("y", "y"),
        ("12:30", "12:30"),
        ("2024-01-31", "2024-01-31"),
        ("1.2.3", "1.2.3"),
        ("'no'", "no"),
        ('"010"', "010"),
        ("a_1", "a_1"),
        ("mlx-community/Qwen3-4B-4bit", "mlx-community/Qwen3-4B-4bit"),
        ("[1, a, 2.5]", [1, "a", 2.5]),
        ("{b: {c: 1}}", {"b": {"c": 1}}),
    ],
)
def test_a_scalar_means_what_it_looks_like(tmp_path: Path, scalar: str, expected: object) -> None:
    value = read(tmp_path, f"a: {scalar}\n").data["a"]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("content", ["", "# only a comment\n", "---\n", "\ufeff"])
def test_an_empty_file_is_an_empty_mapping(tmp_path: Path, content: str) -> None:
    assert read(tmp_path, content).data == {}


def test_every_key_and_item_knows_its_line(tmp_path: Path) -> None:
    document = read(tmp_path, "# c\na: 1\nb:\n  c: 2\n\n  d:\n    - x\n    - {e: 3}\n")
    assert document.line(("b", "c")) == 4
    assert document.line(("b", "d", 1)) == 8
    assert document.line(("b", "d", 1, "e")) == 8
    assert document.line(("b", "x")) is None


def test_a_missing_key_is_placed_at_the_nearest_key_above(tmp_path: Path) -> None:
    document = read(tmp_path, "a: 1\nb:\n  c: 2\n")
    assert document.where(("b", "c")).endswith("base.yaml:3")
    assert document.where(("b", "missing")).endswith("base.yaml:2")
    assert document.where(("missing",)).endswith("base.yaml")


def test_a_byte_order_mark_and_carriage_returns_are_tolerated(tmp_path: Path) -> None:
    document = read(tmp_path, b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert document.data == {"a": 1, "b": 2}
    assert document.line(("b",)) == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: 1\nb: no", "base.yaml:2:4: 'no', expected true or false. Write false, or quote it."),
        ("a: On", "base.yaml:1:4: 'On', expected true or false. Write true, or quote it."),
        ("a: [yes]", "base.yaml:1:5: 'yes', expected true or false."),
        ("a: 010", "base.yaml:1:4: '010', which some readers of YAML take for octal. Write 10, or quote it."),
        ("a: -00", "base.yaml:1:4: '-00', which some readers"),
        ("a: 1_000", "base.yaml:1:4: '1_000', expected digits alone. Write 1000, or quote it."),
        ("a: .nan", "base.yaml:1:4: '.nan', expected a finite number."),
        ("a: -.INF", "base.yaml:1:4: '-.INF', expected a finite number."),
        ("a: nan", "base.yaml:1:4: 'nan', expected a finite number."),
        ("a: 1e999", "base.yaml:1:4: '1e999', expected a finite number."),
        ("a: " + "9" * 5000, "base.yaml:1:4: '999"),
        ("a: 1\nb: 2\na: 3", "base.yaml:3:1: key 'a' again, first on line 1. Keep one of them."),
        ("a: {b: 1, b: 2}", "base.yaml:1:11: key 'b' again, first on line 1."),
        ("a: &x 1", "base.yaml:1:4: anchor '&x', expected plain values. Remove it."),
        ("a: *x", "base.yaml:1:4: alias '*x', expected plain values. Write the value out."),
        ("a:\n  <<: {b: 1}", "base.yaml:2:3: a merge key '<<', expected plain keys. Write the keys out."),
        ("a: !x 1", "base.yaml:1:4: tag '!x', expected plain values. Remove it."),
        ("a: !!python/name:os.system x", "base.yaml:1:4: tag 'tag:yaml.org,2002:python/name:os.system'"),
        ("a: ! 1", "base.yaml:1:4: tag '!', expected plain values."),
        ("1: a", "base.yaml:1:1: '1' as a key, which is not text. Put it in quotes."),
        ("no: a", "base.yaml:1:1: 'no' as a key, which is not text. Put it in quotes."),
        ("~: a", "base.yaml:1:1: '~' as a key"),
        ("? [a]\n: 1", "base.yaml:1:3: a list, mapping or alias as a key, expected text."),
        ("a: 1\n---\nb: 2", "base.yaml:2:1: a second document, expected one. Remove the '---' line."),
        ("%YAML 1.1\n---\na: 1", "base.yaml:1:1: a % directive"),
        ("[1]", "base.yaml:1:1: a list, expected a mapping at the top. Write 'key: value' lines."),
        ("text", "base.yaml:1:1: text, expected a mapping at the top."),
        ("a: [1", "base.yaml:1:6: expected ',' or ']', but got '<stream end>', while parsing a flow sequence."),
        ("a:\n\t- 1", "base.yaml:2:1: found character '\\t' that cannot start any token"),
        ("a:\n\t- 1", "Indent with spaces."),
        ("a: b: c", "base.yaml:1:5: mapping values are not allowed here. Check indentation, colons and quotes here."),
        ("a: 1\n b: 2", "base.yaml:2:3: mapping values are not allowed here."),
        ("a: 1\nb: \x07", "base.yaml:2:4: '\\x07' is not a printable character. Remove it."),
        ('a: "\\ud800"', "base.yaml:1:4: '\\ud800' is not a character"),
        ('"\\0": 1', "base.yaml:1:1: '\\x00' is not a character"),
        ('a: 1\nb: "\\UFFFFFFFF"', "base.yaml:2:7: an escape or directive without a meaning. Remove it."),
        (b"a: 1\nb: \xc3\xa9\xff", "base.yaml:2:5: byte 0xff is not UTF-8. Save the file as UTF-8."),
        (b"\xef\xbb\xbf\xff", "base.yaml:1:1: byte 0xff is not UTF-8."),
        ("a: " + "[" * 50_000, "base.yaml:1:23: nested more than 20 levels deep. Write it flatter."),
        ("\n".join("  " * depth + "a:" for depth in range(40)), "base.yaml:21:41: nested more than 20 levels deep."),
        (" " * 100_001, "base.yaml: larger than 100 kB"),
    ],
)
def test_anything_but_plain_data_is_named_by_file_line_and_column(
    tmp_path: Path, content: str | bytes, expected: str
) -> None:
    message = refusal(tmp_path, content)
    assert expected in message
    assert "\n" not in message


def test_all_problems_are_found_before_the_first_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "a: no\nb: 010\nc: &x 1\nd: [\n")
    assert [line.split(":")[1] for line in caught.value.lines] == ["1", "2", "3", "5"]


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read \(No such file"):
        read_yaml(tmp_path / "none.yaml")


def test_a_value_keeps_a_hash_sign_only_in_quotes() -> None:
    assert read_value("'a # b'", "--set 'x'") == "a # b"
    with pytest.raises(ConfigError, match="Quote it if '#' belongs to it"):
        read_value("a # b", "--set 'x'")


def test_the_nearest_word_is_suggested_and_a_strange_one_is_not() -> None:
    assert did_you_mean("Temprature", ["temperature", "rank"]) == "; did you mean 'temperature'?"
    assert did_you_mean("zzz", ["temperature", "rank"]) == ""
    assert did_you_mean("x" * 1_000_000, ["x" * 1_000_000]) == ""


def test_quoted_text_is_short_and_safe_for_a_terminal() -> None:
    assert quote("a\x1b[31m\n") == "'a\\x1b[31m\\n'"
    assert len(quote("x" * 1_000_000)) == 62


def plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


signs = "ab:- \n\t[]{},#&*!|>'\"%?~<@`0_.\\é"
snippets = ["\n  ", ": ", "- ", "---\n", "no", "1e5", "<<", '"\\U', "FFFFFFFF", "%YAML "]
yaml_pieces = st.lists(st.sampled_from([*signs, *snippets]), max_size=30).map("".join)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60) | yaml_pieces.map(str.encode))
def test_any_bytes_are_plain_data_or_a_config_error(tmp_path: Path, raw: bytes) -> None:
    try:
        document = read(tmp_path, raw)
    except ConfigError:
        return
    assert plain(document.data)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30) | yaml_pieces)
def test_any_text_is_a_flat_value_or_a_config_error(text: str) -> None:
    try:
        value = read_value(text, "--set 'x'")
    except ConfigError:
        return
    assert plain(value)
    assert not isinstance(value, dict)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.dictionaries(
        st.from_regex(r"[a-z]{4,8}", fullmatch=True),
        st.recursive(
            st.booleans() | st.integers(-(10**17), 10**17) | st.text("abc #:-é'\"\n", max_size=8) | st.none(),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=6,
        ),
        max_size=4,
    )
)
def test_plain_data_survives_being_written_and_read(tmp_path: Path, data: dict[str, object]) -> None:
    written = yaml.dump(data, Dumper=NoAliases, allow_unicode=True)
    assert read(tmp_path, written).data == data


class NoAliases(yaml.SafeDumper):
    """Writes equal lists out, as our files must."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def test_the_reader_builds_no_python_objects(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    assert "tag" in refusal(tmp_path, f"a: !!python/object/apply:pathlib.Path.mkdir [{trace}]")
    assert not trace.exists()
