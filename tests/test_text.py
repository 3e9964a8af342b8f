"""What the tokens of a reply add to its text is the text, whatever it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from true_kd.models import ModelOptions, open_tokenizer, token_pieces


@pytest.fixture(scope="module")
def byte_level(student_folder: Path) -> Any:
    """The tokenizer of the tests: of bytes, so that a character may be several tokens."""
    return open_tokenizer(ModelOptions(model=str(student_folder)), "student").tokenizer


@pytest.fixture(scope="module", params=["pocket:teacher", "the tests'"])
def tokenizer(request: pytest.FixtureRequest, byte_level: Any) -> Any:
    """The shipped tokenizer, and that of the tests."""
    if request.param == "the tests'":
        return byte_level
    return open_tokenizer(ModelOptions(model=request.param), "teacher").tokenizer


TEXTS = {
    "words": "the cat sat on the mat and said hello",
    "a space before": " the cat",
    "spaces within": "the  cat   sat",
    "a space after": "the cat ",
    "a space alone": " ",
    "lines": "one\ntwo\n\n three\n",
    "characters of several bytes": "naïve – 猫 🙂 👩‍👩‍👧 é",
    "numbers and signs": "12 + 30 = 42; f(x) -> {'a': [1, 2]} 100%",
    "nothing": "",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_the_pieces_join_to_the_text(text: str, tokenizer: Any) -> None:
    ids = tokenizer.encode(text)
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30))
def test_the_pieces_join_to_any_text(byte_level: Any, text: str) -> None:
    ids = byte_level.encode(text)
    assert "".join(token_pieces(byte_level, ids)) == byte_level.decode(ids)


def test_a_character_of_several_tokens_comes_with_the_last(byte_level: Any) -> None:
    ids = byte_level.encode("é猫")
    assert len(ids) == 5, "the tokenizer of the tests no longer spells these in bytes"
    assert token_pieces(byte_level, ids) == ["", "é", "", "", "猫"]


def test_a_character_that_is_cut_does_not_stop_the_pieces(byte_level: Any) -> None:
    ids = byte_level.encode("cat 猫")[:-1]
    pieces = token_pieces(byte_level, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == byte_level.decode(ids)
    assert "\ufffd" in pieces[-1]


def test_bytes_that_are_no_character_leave_what_follows(byte_level: Any) -> None:
    broken = [byte_level.encode("猫")[0], *byte_level.encode("cat")]
    pieces = token_pieces(byte_level, broken)
    assert len(pieces) == len(broken)
    assert "".join(pieces).endswith("cat")


def test_a_token_of_its_own_keeps_its_space(byte_level: Any) -> None:
    [token] = byte_level.encode(" the")
    assert token_pieces(byte_level, [token]) == [" the"]


def test_each_token_has_its_own_text(byte_level: Any) -> None:
    ids = byte_level.encode("the cat sat")
    assert token_pieces(byte_level, ids) == [byte_level.decode([token]) for token in ids]


def test_a_stop_token_is_a_piece_like_others(byte_level: Any) -> None:
    pieces = token_pieces(byte_level, [*byte_level.encode("the cat"), 1])
    assert pieces[-1] == "<|end|>"


def test_pieces_of_one_reply_do_not_depend_on_the_last(byte_level: Any) -> None:
    first = token_pieces(byte_level, byte_level.encode("the cat"))
    token_pieces(byte_level, byte_level.encode("猫")[:1])
    assert token_pieces(byte_level, byte_level.encode("the cat")) == first
