"""What tokens spell is what their tokenizer says, and what is spelled is written as it would write it."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from pathlib import Path

import pytest
import tokenizer_zoo as zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from true_kd.alignment.spelling import Spelling
from true_kd.errors import VocabularyError

often = settings(max_examples=40, deadline=None)
every = pytest.mark.parametrize("name", zoo.ALL)
with_bytes = pytest.mark.parametrize("name", [name for name in zoo.ALL if name != "phrases"])

ODD = [
    "  ",
    "\n",
    "\n\n",
    "\t",
    "é",
    "e\u0301",
    "猫",
    "🐈",
    "👩‍👩‍👧",
    "the",
    " cat",
    "can't",
    "<tool_call>",
    "        ",
    "12",
]
# A space as SentencePiece writes it is a space to it, and special tokens are no text.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
texts = st.lists(st.one_of(st.sampled_from(ODD), st.text(characters, max_size=4)), max_size=6).map("".join)


def nfc(name: str, text: str) -> bytes:
    """A text as a tokenizer reads it."""
    return unicodedata.normalize("NFC", text).encode() if name.startswith("qwen") else text.encode()


def ordinary(spelling: Spelling) -> list[int]:
    """The ids that spell something."""
    return [index for index, piece in enumerate(spelling.pieces) if piece]


def sample(spelling: Spelling) -> list[int]:
    """All ids that spell something, of a large vocabulary some."""
    ids = ordinary(spelling)
    return ids[:: max(1, len(ids) // 600)]


@with_bytes
@given(text=texts)
@often
def test_the_tokens_of_a_text_in_the_middle_spell_it_to_the_byte(name: str, text: str) -> None:
    spelling = zoo.spelled(name)
    assert spelling.join(spelling.encode(text.encode(), continues=True)) == nfc(name, text)


@with_bytes
@given(text=texts)
@often
def test_the_tokens_of_a_whole_text_spell_it_with_the_space_that_is_added(name: str, text: str) -> None:
    spelling = zoo.spelled(name)
    expected = nfc(name, text)
    # Metaspace adds none in front of a space, and nothing is added to nothing.
    allowed = {b" " + expected, expected if text[:1] in ("", " ") else None} if spelling.adds_space else {expected}
    assert spelling.join(spelling.encode(text.encode(), continues=False)) in allowed


@with_bytes
@given(text=st.lists(st.sampled_from([" ", "\n", "\t", "a", "猫"]), max_size=8).map("".join))
@often
def test_spaces_and_lines_at_the_start_of_a_reply_are_all_kept(name: str, text: str) -> None:
    spelling = zoo.spelled(name)
    assert spelling.join(spelling.encode(text.encode(), continues=True)) == text.encode()


@every
@given(text=st.binary(max_size=12))
@often
def test_bytes_that_are_no_text_are_written_all_the_same(name: str, text: bytes) -> None:
    spelling = zoo.spelled(name)
    for continues in (True, False):
        tokens = spelling.encode(text, continues)
        assert all(0 <= token < spelling.model.size for token in tokens)
    assert spelling.split(text) == () or spelling.join(spelling.split(text)) == text


@with_bytes
@given(text=st.binary(min_size=1, max_size=12))
@often
def test_any_bytes_are_cut_into_tokens_that_spell_them(name: str, text: bytes) -> None:
    spelling = zoo.spelled(name)
    marked = name not in zoo.OWN[:5] and not name.startswith(("gpt2", "qwen")) and "\u2581".encode() in text
    if not marked:
        assert spelling.join(spelling.split(text)) == text
        assert spelling.split(text)


@every
def test_the_piece_of_each_id_is_what_the_tokenizer_decodes_in_the_middle_of_a_text(name: str) -> None:
    spelling = zoo.spelled(name)
    tokenizer = spelling.model.tokenizer
    [a] = spelling.split(b"a")
    for index in sample(spelling):
        decoded = tokenizer.decode([a, a, index, a])
        assert decoded == (b"aa" + spelling.spelled(index) + b"a").decode(errors="replace"), (index, decoded)


@every
@given(text=texts)
@often
def test_each_token_of_a_text_is_the_cut_of_its_own_piece(name: str, text: str) -> None:
    spelling = zoo.spelled(name)
    for token in spelling.encode(text.encode(), continues=False):
        if spelling.pieces[token]:
            assert spelling.split(spelling.pieces[token]) == (token,)


@every
@given(text=texts)
@often
def test_of_ids_that_spell_the_same_the_one_that_is_written_is_meant(name: str, text: str) -> None:
    spelling = zoo.spelled(name)
    for token in spelling.encode(text.encode(), continues=False):
        if piece := spelling.pieces[token]:
            assert spelling.ids[piece] == token


@every
def test_every_spelling_has_an_id_that_spells_it(name: str) -> None:
    spelling = zoo.spelled(name)
    assert set(spelling.ids) == {piece for piece in spelling.pieces if piece}
    assert all(spelling.pieces[index] == piece for piece, index in spelling.ids.items())


def test_an_added_token_is_meant_rather_than_a_learned_one_of_the_same_spelling() -> None:
    layout = json.loads((zoo.folder_of("gemma") / "tokenizer.json").read_text())
    byte = layout["model"]["vocab"]["<0x0A>"]
    spelling = zoo.spelled("gemma")
    assert spelling.pieces[byte] == b"\n"
    assert spelling.ids[b"\n\n"] == spelling.model.ids["\n\n"]


@pytest.mark.parametrize("name", zoo.OWN)
def test_special_tokens_spell_nothing_and_are_known_by_name(name: str) -> None:
    spelling = zoo.spelled(name)
    for text in zoo.SPECIAL:
        index = spelling.model.ids[text]
        assert spelling.pieces[index] is None
        assert spelling.special[index] == text
        assert spelling.spelled(index) == text.encode()


@pytest.mark.parametrize("name", zoo.ADDED)
def test_added_tokens_that_are_not_special_spell_their_text(name: str) -> None:
    spelling = zoo.spelled(name)
    for text in zoo.ADDED[name]:
        # The decoder of SentencePiece's kind makes a space of its mark wherever it stands.
        expected = text.replace("\u2581", " ") if name == "gemma" else text
        assert spelling.pieces[spelling.model.ids[text]] == expected.encode()


@pytest.mark.parametrize(("name", "text"), [("qwen", "<tool_call>"), ("gpt2", " " * 8), ("gemma", "<table>")])
def test_an_added_token_is_cut_out_of_a_text_as_the_tokenizer_does(name: str, text: str) -> None:
    spelling = zoo.spelled(name)
    index = spelling.model.ids[text]
    assert spelling.split(text.encode()) == (index,)
    assert index in spelling.split(f"a{text}b".encode())
    assert index in spelling.encode(f"a{text}b".encode(), continues=True)


@every
def test_rows_that_only_pad_the_head_spell_nothing(name: str) -> None:
    spelling = zoo.spelled(name)
    assert len(spelling.pieces) == spelling.model.size
    assert all(
        spelling.pieces[index] is None for index in range(max(spelling.model.ids.values()) + 1, len(spelling.pieces))
    )
    assert spelling.spelled(spelling.model.size - 1) == b""


@pytest.mark.parametrize("name", zoo.OWN)
def test_a_head_with_fewer_rows_than_tokens_leaves_the_others_out(name: str) -> None:
    model = dataclasses.replace(zoo.opened(name), size=300)
    assert len(Spelling(model).pieces) == 300
    assert max(Spelling(model).ids.values()) < 300


@pytest.mark.parametrize(
    ("name", "adds"), [(name, name in ("prefixed", "llama", "mistral", "phrases", "first")) for name in zoo.OWN]
)
def test_it_is_known_which_tokenizers_add_a_space(name: str, adds: bool) -> None:
    assert zoo.spelled(name).adds_space is adds


@pytest.mark.parametrize("name", ["gpt2", "qwen", *(real for real in zoo.REAL if real.startswith(("gpt2", "qwen")))])
@pytest.mark.parametrize("text", ["    return", "\n\n  x", " # said", "it's", "12 cats"])
def test_a_stretch_of_several_words_is_cut_where_the_tokenizer_cuts_it(name: str, text: str) -> None:
    spelling = zoo.spelled(name)
    assert list(spelling.split(text.encode())) == spelling.model.tokenizer.encode(text, add_special_tokens=False)


def test_a_tokenizer_of_neither_kind_is_refused_in_words(tmp_path: Path) -> None:
    from mlx_lm.utils import load_tokenizer
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    model = dataclasses.replace(zoo.opened("gpt2"), tokenizer=load_tokenizer(tmp_path, eos_token_ids=[0]), name="odd")
    with pytest.raises(VocabularyError, match="'odd': its tokenizer is neither byte-level BPE nor"):
        Spelling(model)


def test_a_tokenizer_without_bytes_cannot_spell_what_it_never_saw() -> None:
    spelling = zoo.spelled("phrases")
    assert spelling.split(b"the cat")
    assert spelling.split("\N{SNOWMAN}".encode()) == ()
    assert spelling.split(b"\xe7") == ()


def test_what_draws_the_end_of_a_token_into_another_comes_of_earlier_merges() -> None:
    spelling = Spelling(zoo.merging("b c", "a b", "c c", "ab d", "_ ab"))
    ids = spelling.ids
    assert spelling.breaking(ids[b"ab"]) == {b"c"}
    assert spelling.breaking(ids[b" ab"]) == {b"c", b"d"}
    assert spelling.breaking(ids[b"abd"]) == spelling.breaking(ids[b"a"]) == spelling.breaking(ids[b"cc"]) == set()
    assert spelling.split(b"abc") == (ids[b"a"], ids[b"bc"])
    assert spelling.split(b" abd") == (ids[b" "], ids[b"abd"])


@pytest.mark.parametrize("name", [name for name in zoo.ALL if name != "phrases"])
def test_whatever_is_said_to_draw_in_the_end_of_a_token_makes_tokens_over_it(name: str) -> None:
    spelling = zoo.spelled(name)
    known = set(spelling.ids)
    for token in range(0, spelling.model.size, max(1, spelling.model.size // 300)):
        piece = spelling.pieces[token]
        for other in spelling.breaking(token) if piece else ():
            assert any(piece[at:] + other in known for at in range(1, len(piece)))
