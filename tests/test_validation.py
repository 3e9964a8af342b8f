"""One line for every fault of a config: its place, what it found, what was expected, and the fix."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ConfigDict, Field

from true_kd.errors import ConfigError
from true_kd.validation import dotted, parse_override, validate
from true_kd.yaml_file import KeyPath, read_yaml


class Options(pydantic.BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Precision(Enum):
    half = "half"
    full = "full"


class Losses(Options):
    temperature: float = Field(1.0, gt=0, le=10)
    kind: Literal["forward_kl", "reverse_kl"] = "forward_kl"
    weights: tuple[float, ...] = Field((), max_length=2)


class Lora(Options):
    rank: int = Field(16, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    keys: tuple[str, ...] = ()


class LocalTeacher(Options):
    kind: Literal["local"]
    path: Path


class RemoteTeacher(Options):
    kind: Literal["remote"]
    url: str = Field(min_length=3)


Teacher = Annotated[LocalTeacher | RemoteTeacher, Field(discriminator="kind")]


class Run(Options):
    name: str
    losses: Losses = Losses()
    lora: Lora | None = None
    teachers: tuple[Teacher, ...] = ()
    grad_checkpoint: bool = False
    seed: int | Literal["random"] = 0
    precision: Precision = Precision.half

    @pydantic.field_validator("name")
    @classmethod
    def check_name(cls, name: str) -> str:
        if name == "bad":
            raise ValueError("'bad', expected a good name. Choose another.")
        return name

    @pydantic.model_validator(mode="after")
    def check_whole(self) -> Run:
        if self.name == "both":
            raise ValueError("both at once. Choose one.")
        return self


def at_line_7(path: KeyPath) -> str:
    return "configs/math.yaml:7"


def refusal(**data: object) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(Run, {"name": "math", **data}, at_line_7)
    return str(caught.value)


def test_plain_data_becomes_the_model() -> None:
    data = {
        "name": "math",
        "losses": {"temperature": 2, "weights": [1, 0.5]},
        "lora": {"keys": ["q_proj"]},
        "teachers": [{"kind": "local", "path": "models/a"}, {"kind": "remote", "url": "http://x"}],
        "seed": "random",
        "precision": "full",
    }
    run = validate(Run, data, at_line_7)
    assert run.losses == Losses(temperature=2.0, weights=(1.0, 0.5))
    assert type(run.losses.temperature) is float
    assert run.teachers[0] == LocalTeacher(kind="local", path=Path("models/a"))
    assert run.seed == "random"
    assert run.precision is Precision.full


def test_what_a_model_holds_is_valid_input_again() -> None:
    run = validate(Run, {"name": "math", "teachers": [{"kind": "local", "path": Path("a")}]}, at_line_7)
    assert validate(Run, run.model_dump(), at_line_7) == run
    assert validate(Run, run.model_dump(mode="json"), at_line_7) == run


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"losses": {"temprature": 1}}, "losses.temprature: unknown key; did you mean 'temperature'?"),
        ({"rank": 8}, "rank: unknown key; did you mean 'lora.rank'?"),
        ({"losses": {"dropout": 0.1}}, "losses.dropout: unknown key; did you mean 'lora.dropout'?"),
        ({"losses": {"zzz": 1}}, "losses.zzz: unknown key, expected one of kind, temperature, weights. Remove it."),
        ({"a\x1b b": 1}, "'a\\x1b b': unknown key"),
        ({"losses": {"temperature": 12}}, "losses.temperature: 12, expected a number at most 10."),
        ({"losses": {"temperature": 0}}, "losses.temperature: 0, expected a number above 0."),
        ({"lora": {"rank": 0}}, "lora.rank: 0, expected a number at least 1."),
        ({"lora": {"dropout": 1.0}}, "lora.dropout: 1.0, expected a number below 1."),
        ({"losses": {"temperature": True}}, "losses.temperature: true, expected a number."),
        ({"losses": {"temperature": "1e-4"}}, "losses.temperature: '1e-4', expected a number. Remove the quotes."),
        ({"losses": {"temperature": None}}, "losses.temperature: null, expected a number."),
        ({"losses": {"temperature": float("nan")}}, "losses.temperature: nan, expected a finite number."),
        ({"lora": {"rank": False}}, "lora.rank: false, expected a whole number."),
        ({"lora": {"rank": 1000.0}}, "lora.rank: 1000.0, expected a whole number. Write 1000."),
        ({"lora": {"rank": 8.5}}, "lora.rank: 8.5, expected a whole number."),
        ({"lora": {"rank": 10**400}}, "lora.rank: an integer of more than 64 bits"),
        ({"lora": 3}, "lora: 3, expected a mapping of keys."),
        ({"lora": {"keys": "q_proj"}}, "lora.keys: 'q_proj', expected a list. Write ['q_proj']."),
        ({"lora": {"keys": ["q", 3]}}, "lora.keys[1]: 3, expected text. Put it in quotes."),
        ({"losses": {"weights": [1, 2, 3]}}, "losses.weights: a list of 3, expected at most 2 items."),
        ({"grad_checkpoint": 1}, "grad_checkpoint: 1, expected true or false."),
        ({"grad_checkpoint": "true"}, "grad_checkpoint: 'true', expected true or false. Remove the quotes."),
        ({"losses": {"kind": "forward_lk"}}, "losses.kind: 'forward_lk', expected 'forward_kl' or 'reverse_kl'; did"),
        ({"losses": {"kind": "forward_lk"}}, "did you mean 'forward_kl'?"),
        ({"losses": {"kind": "x"}}, "losses.kind: 'x', expected 'forward_kl' or 'reverse_kl'. Choose one."),
        ({"precision": "ful"}, "precision: 'ful', expected 'half' or 'full'; did you mean 'full'?"),
        ({"seed": 1.5}, "seed: 1.5, expected a whole number or 'random'."),
        ({"teachers": [{"kind": "local"}]}, "teachers[0].path: missing, expected a value. Add it."),
        ({"teachers": [{"kind": "remote", "url": "x"}]}, "teachers[0].url: 'x', expected at least 3 characters."),
        ({"teachers": [{"kind": "remote", "url": "http", "urll": 1}]}, "[0].urll: unknown key; did you mean 'url'?"),
        ({"teachers": [{"kind": "local", "path": "a", "urll": 1}]}, "did you mean 'teachers.url'?"),
        ({"teachers": [{"kind": "locl"}]}, "teachers[0]: kind is 'locl', expected one of 'local', 'remote'; did you"),
        ({"teachers": [{}]}, "teachers[0]: no 'kind', expected it to say which kind this is. Add it."),
        ({"teachers": {"kind": "local"}}, "teachers: a mapping, expected a list."),
        ({"name": 3}, "name: 3, expected text. Put it in quotes."),
        ({"name": "bad"}, "name: 'bad', expected a good name. Choose another."),
        ({"name": "\udc80"}, "name: '\\udc80', expected text that UTF-8 can write."),
        ({"name": b"x"}, "name: bytes, expected text, a number, a list or a mapping. Convert it first."),
        ({"lora": {3: 4}}, "lora: '3' as a key, expected text. Put it in quotes."),
    ],
)
def test_a_fault_is_one_line_with_place_finding_and_fix(data: dict[str, object], expected: str) -> None:
    message = refusal(**data)
    assert message.startswith("configs/math.yaml:7 ")
    assert expected in message
    assert "\n" not in message
    assert message.endswith((".", "?"))


def test_a_fault_of_the_whole_config_needs_no_key() -> None:
    assert refusal(name="both") == "configs/math.yaml:7 both at once. Choose one."


def test_a_missing_key_is_reported_under_its_own_path() -> None:
    with pytest.raises(ConfigError, match="name: missing, expected a value"):
        validate(Run, {}, at_line_7)


def test_all_faults_are_collected() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Run, {"name": 1, "losses": {"temperature": 12}, "grad_checkpoint": "x"}, at_line_7)
    assert len(caught.value.lines) == 3


def test_the_place_is_the_line_of_the_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text("name: math\n\nlosses:\n  temperature: 12\n  temprature: 1\nteachers:\n  - kind: local\n")
    document = read_yaml(path)
    with pytest.raises(ConfigError) as caught:
        validate(Run, document.data, document.where)
    assert caught.value.lines == (
        f"{path}:4 losses.temperature: 12, expected a number at most 10.",
        f"{path}:5 losses.temprature: unknown key; did you mean 'temperature'?",
        f"{path}:7 teachers[0].path: missing, expected a value. Add it.",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora.rank=16", (("lora", "rank"), 16)),
        ("losses.temperature=1e-4", (("losses", "temperature"), 1e-4)),
        ("lora.keys=[q_proj, v_proj]", (("lora", "keys"), ["q_proj", "v_proj"])),
        ("lora=null", (("lora",), None)),
        ("name='16'", (("name",), "16")),
        ("name=a=b", (("name",), "a=b")),
        ("name = math ", (("name",), "math")),
    ],
)
def test_an_override_is_a_path_and_a_yaml_value(text: str, expected: object) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora.rank", "--set 'lora.rank': expected key.path=value. Write it like lora.rank=16."),
        ("=3", "--set '=3': expected key.path=value."),
        ("a..b=3", "--set 'a..b=3': expected key.path=value."),
        ("a b=3", "--set 'a b=3': expected key.path=value."),
        ("", "--set '': expected key.path=value."),
        ("lora=", "--set 'lora=': no value, expected one after '='. Write null for none."),
        ("lora={rank: 3}", "--set 'lora': '{rank: 3}', expected one value or a flat list. Set one key at a time."),
        ("a=no", "--set 'a': 'no', expected true or false. Write false, or quote it."),
        ("a=[1", "--set 'a': expected ',' or ']'"),
    ],
)
def test_a_bad_override_is_quoted_with_its_fix(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(text)
    assert str(caught.value).startswith(expected)


def test_a_path_is_written_as_people_write_it() -> None:
    assert dotted(("losses", "terms", 0, "weight")) == "losses.terms[0].weight"
    assert dotted(("a b", 1)) == "'a b'[1]"


names = st.sampled_from(
    ["name", "losses", "lora", "teachers", "seed", "kind", "path", "rank", "keys", "x", "local", "int"]
)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["local", "remote", "random", "both", "\ud800", b"x"])
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(data=st.dictionaries(names, plain, max_size=5))
def test_any_data_is_a_model_or_a_config_error(data: dict[str, object]) -> None:
    lines: tuple[str, ...] = ()
    try:
        validate(Run, data, at_line_7)
    except ConfigError as error:
        lines = error.lines
    assert all(line.startswith("configs/math.yaml:7 ") and "\n" not in line for line in lines)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20) | st.text("ab.=[]{}: '\"#&*!1-\n", max_size=20))
def test_any_override_is_a_value_or_a_config_error(text: str) -> None:
    try:
        path, _ = parse_override(text)
    except ConfigError:
        return
    assert path
    assert all(path)
