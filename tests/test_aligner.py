"""The teacher's distribution over the student's next token: against brute force where every text can be written out."""

from __future__ import annotations

import dataclasses
import itertools
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import tokenizer_zoo as zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from test_spelling import ODD, characters

from true_kd.alignment import Account
from true_kd.alignment.aligner import Place, Text
from true_kd.alignment.spelling import Spelling
from true_kd.alignment.tables import LEAST, LOOKED_AT, Tables
from true_kd.models import ModelTokenizer

often = settings(max_examples=30, deadline=None)
LETTERS = zoo.merging()
WORDS = zoo.merging("a b", "ab c", "_ ab", "_ abc", "c c")
"""Its first token of a text never depends on more than the longest token holds."""
EXACT = 1e-6
"""Nothing is less likely, and drawn, in what is compared with brute force."""
OTHERS = zoo.merging("a b", "c a", "b _")
Says = Callable[[tuple[int, ...]], np.ndarray]
"""Probabilities of a teacher's next token after some."""


@cache
def tables(teacher: ModelTokenizer, student: ModelTokenizer, least: float = LEAST) -> Tables:
    return Tables(Spelling(teacher), Spelling(student), zoo.END, least)


@cache
def tables_of(teacher: str, student: str) -> Tables:
    return Tables(zoo.spelled(teacher), zoo.spelled(student), zoo.opened(student).stop_ids[0])


def encode(model: ModelTokenizer, text: str) -> list[int]:
    return list(model.tokenizer.encode(text, add_special_tokens=False))


def spread(text: Text, place: Place, says: Says, seed: int | Sequence[int] = 0) -> tuple[np.ndarray, Account]:
    """What comes out where a teacher answers every question at once."""
    theirs = tuple(text.theirs)
    asking = text.spread(place, lambda at: says(theirs[:at]), np.random.default_rng(seed))
    answers = None
    try:
        while True:
            asked = asking.send(answers)
            answers = [says((*theirs[:before], *path)) for before, path in asked]
    except StopIteration as end:
        return end.value


def chain(model: ModelTokenizer, alphabet: str, seed: int, least: float = 0.05) -> Says:
    """A teacher whose next token depends on its last, and that writes nothing otherwise than its tokenizer."""
    spelling = Spelling(model)
    pieces = {
        index: piece for index, piece in enumerate(spelling.pieces) if piece and set(piece) <= set(alphabet.encode())
    }

    @cache
    def after(last: int) -> np.ndarray:
        rng = np.random.default_rng((seed, last + 1))
        found = np.zeros(model.size)
        for index, piece in pieces.items():
            if last < 0 or spelling.split(pieces[last] + piece) == (last, index):
                found[index] = least + rng.random()
        found[zoo.END] = least + rng.random()
        return found / found.sum()

    return lambda tokens: after(tokens[-1] if tokens else -1)


@dataclass(frozen=True)
class Written:
    """What a teacher may write."""

    text: bytes
    is_whole: bool
    """Whether it ended there."""
    mass: float
    first: bytes
    """What its first token spells."""


def write_out(teacher: ModelTokenizer, says: Says, start: tuple[int, ...], deep: int) -> list[Written]:
    """All that a teacher may write after some tokens, so many more of them."""
    pieces = Spelling(teacher).pieces
    found: list[Written] = []
    waiting = [(start, 1.0)]
    while waiting:
        tokens, mass = waiting.pop()
        text = [pieces[token] for token in tokens[len(start) :]]
        if len(text) == deep:
            found.append(Written(b"".join(text), False, mass, text[0]))
            continue
        for token in np.flatnonzero(probs := says(tokens)):
            share = mass * float(probs[token])
            if token == zoo.END:
                found.append(Written(b"".join(text), True, share, text[0] if text else b""))
            else:
                waiting.append(((*tokens, int(token)), share))
    return found


def by_brute_force(
    text: Text, place: Place, teacher: ModelTokenizer, student: ModelTokenizer, says: Says
) -> np.ndarray:
    """The distribution over the student's token at a place, given its tokens before and those that the teacher has
    written by then: of all texts, written out."""
    before = tuple(text.theirs[: place.before])
    head = Spelling(teacher).join(before)
    masses: dict[tuple[bytes, bool], float] = {}
    for written in write_out(teacher, says, before, 5 if teacher is LETTERS else 3):
        # Where the teacher's token goes on beyond the student's, it is known that it does.
        if not place.inside or (written.first.startswith(place.inside) and written.first != place.inside):
            whole = (head + written.text, written.is_whole)
            masses[whole] = masses.get(whole, 0.0) + written.mass
    found = np.zeros(student.size)
    for (whole, is_whole), mass in masses.items():
        tokens = encode(student, whole.decode()) + [zoo.END] * is_whole
        if tokens[: place.index] == text.ours[: place.index] and len(tokens) > place.index:
            found[tokens[place.index]] += mass
    return found / found.sum()


def told(teacher: ModelTokenizer, student: ModelTokenizer, text: str, least: float = LEAST) -> Text:
    """A reply in the tokens of both, its end included."""
    return Text(tables(teacher, student, least), [*encode(teacher, text), zoo.END], [*encode(student, text), zoo.END])


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return 0.5 * float(np.abs(one - other).sum())


REPLIES = ["abc ab", "a b c", "cc abca", "", " ", "bcc"]


@pytest.mark.parametrize("text", REPLIES)
@pytest.mark.parametrize("seed", range(2))
def test_a_teacher_of_letters_teaches_words_as_all_its_texts_do(text: str, seed: int) -> None:
    says = chain(LETTERS, "abc ", seed)
    retold = told(LETTERS, WORDS, text, least=EXACT)
    assert [place.index for place in retold.places] == list(range(len(retold.ours)))
    for place in retold.places:
        found, _ = spread(retold, place, says)
        assert distance(found, by_brute_force(retold, place, LETTERS, WORDS, says)) <= 1e-4


@pytest.mark.parametrize("text", REPLIES)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("merges", [("b c", "a b", "c c"), ("c _", "b c", "a b"), ("c a", "a b", "b b", "ab b")])
def test_words_that_are_cut_otherwise_when_they_go_on_are_taught_as_all_texts_do(
    text: str, seed: int, merges: tuple[str, ...]
) -> None:
    says, words = chain(LETTERS, "abc ", seed), zoo.merging(*merges)
    retold = told(LETTERS, words, text, least=EXACT)
    for place in retold.places:
        found, _ = spread(retold, place, says)
        assert distance(found, by_brute_force(retold, place, LETTERS, words, says)) <= 1e-4


@pytest.mark.parametrize("text", REPLIES)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("teacher", [WORDS, OTHERS], ids=["words", "others"])
def test_a_teacher_of_words_teaches_letters_as_all_its_texts_do(teacher: ModelTokenizer, text: str, seed: int) -> None:
    says = chain(teacher, "abc ", seed)
    retold = told(teacher, LETTERS, text, least=EXACT)
    assert [place.index for place in retold.places] == list(range(len(retold.ours)))
    for place in retold.places:
        found, _ = spread(retold, place, says)
        assert distance(found, by_brute_force(retold, place, teacher, LETTERS, says)) <= 1e-4


@pytest.mark.parametrize("text", REPLIES)
@pytest.mark.parametrize("seed", range(2))
def test_where_words_of_both_begin_other_words_are_taught_as_all_texts_do(text: str, seed: int) -> None:
    says = chain(OTHERS, "abc ", seed)
    retold = told(OTHERS, WORDS, text, least=EXACT)
    for place in retold.places:
        if not place.inside:
            found, _ = spread(retold, place, says)
            assert distance(found, by_brute_force(retold, place, OTHERS, WORDS, says)) <= 1e-4


def log_likelihoods(teacher: ModelTokenizer, student: ModelTokenizer, seed: int) -> tuple[float, float, int]:
    """Of a reply, by the teacher's own tokens and by what its student is taught of each of its labels."""
    says = chain(teacher, "abc ", seed, least=0.3)
    retold = told(teacher, student, "abc abb cc a ccab", least=EXACT)
    theirs = sum(np.log(says(tuple(retold.theirs[:at]))[token]) for at, token in enumerate(retold.theirs))
    ours = sum(np.log(spread(retold, place, says)[0][retold.ours[place.index]]) for place in retold.places)
    return theirs, ours, len(retold.places)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("student", [WORDS, LETTERS], ids=["words", "letters"])
def test_a_reply_is_as_likely_in_the_students_tokens_as_in_the_letters_of_its_teacher(
    student: ModelTokenizer, seed: int
) -> None:
    theirs, ours, places = log_likelihoods(LETTERS, student, seed)
    assert ours == pytest.approx(theirs, abs=0.02 * places)


@pytest.mark.parametrize("seed", range(4))
def test_letters_are_the_likelier_the_longer_the_teacher_is_known_to_have_gone_on(seed: int) -> None:
    theirs, ours, _ = log_likelihoods(WORDS, LETTERS, seed)
    assert theirs < ours < 0


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("text", ["a", "ab", "c", "ab ", "ab a"])
def test_over_all_that_a_teacher_of_words_may_have_written_letters_are_taught_as_all_its_texts_do(
    text: str, seed: int
) -> None:
    """Where one of the teacher's tokens ends its student is taught what comes after it, elsewhere how it goes on: of
    all the ways to come to a text, that is what follows the text."""
    says = chain(WORDS, "abc ", seed)
    start = text.encode()
    expected, found = np.zeros(LETTERS.size), np.zeros(LETTERS.size)
    seen: dict[tuple[int, ...], float] = {}
    waiting: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while waiting:
        tokens, mass = waiting.pop()
        written = Spelling(WORDS).join(tokens)
        if len(written) > len(start) or (written == start and tokens[-1:] != (zoo.END,)):
            # Up to the token that goes beyond the text, or that follows it.
            seen[tokens] = mass
            continue
        for token in np.flatnonzero(probs := says(tokens)):
            piece = Spelling(WORDS).pieces[token] or b""
            if token != zoo.END and (written + piece)[: len(start)] == start[: len(written + piece)]:
                waiting.append(((*tokens, int(token)), mass * float(probs[token])))
    for tokens, mass in seen.items():
        whole = Spelling(WORDS).join(tokens)
        if whole == start:
            for token in np.flatnonzero(probs := says(tokens)):
                piece = Spelling(WORDS).pieces[token]
                expected[letters(piece[:1])[0] if piece else zoo.END] += mass * float(probs[token])
        else:
            expected[letters(whole[len(start) : len(start) + 1])[0]] += mass
        theirs = [*tokens, zoo.END]
        retold = Text(tables(WORDS, LETTERS, EXACT), theirs, [*letters(whole), zoo.END])
        found += mass * spread(retold, retold.places[len(start)], says)[0]
    assert distance(found / found.sum(), expected / expected.sum()) <= 1e-4


def random_says(size: int, seed: int, sharp: float = 0.02) -> Says:
    """A teacher of no sense: any distribution after anything."""

    @cache
    def after(tokens: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([seed, *tokens])
        return (rng.dirichlet(np.full(size, sharp)) * 0.9 + 0.1 / size).astype(np.float32)

    return after


texts = st.lists(
    st.one_of(st.sampled_from([*ODD, "hello", " world", " said"]), st.text(characters, max_size=3)), max_size=5
).map("".join)
readable = [name for name in zoo.ALL if name != "phrases"]
first_of_pairs = pytest.mark.parametrize("teacher", readable)


@first_of_pairs
@given(text=texts, data=st.data())
@often
def test_what_comes_out_is_a_distribution_and_all_of_it_is_accounted_for(teacher: str, text: str, data) -> None:
    student = data.draw(st.sampled_from(zoo.OWN))
    theirs = [*zoo.spelled(teacher).encode(text.encode(), True), zoo.opened(teacher).stop_ids[0]]
    ours = [*zoo.spelled(student).encode(text.encode(), True), zoo.END]
    retold = Text(tables_of(teacher, student), theirs, ours)
    says = random_says(zoo.opened(teacher).size, len(text))
    for place in retold.places[:4] + retold.places[-1:]:
        found, account = spread(retold, place, says)
        assert found.shape == (zoo.opened(student).size,)
        assert found.min() >= 0
        assert found.sum() == pytest.approx(1.0, abs=1e-9)
        assert sum(vars(account).values()) == pytest.approx(1.0, abs=1e-5)
        assert min(vars(account).values()) >= 0


@first_of_pairs
@given(text=texts)
@often
def test_a_student_of_the_same_tokenizer_is_taught_the_distribution_itself(teacher: str, text: str) -> None:
    spelling, size = zoo.spelled(teacher), zoo.opened(teacher).size
    stop = zoo.opened(teacher).stop_ids[0]
    tokens = [*spelling.encode(text.encode(), True), stop]
    ours = tables_of(teacher, teacher)
    retold = Text(ours, tokens, tokens)
    assert [(place.index, place.before, place.inside) for place in retold.places] == [
        (at, at, b"") for at in range(len(tokens))
    ]
    rng = np.random.default_rng(len(text))
    for place in retold.places:
        before, piece = retold.label_before(place), spelling.pieces[tokens[place.index]]
        if piece and ours.follow(before, piece) != tokens[place.index]:
            continue  # space that is cut so because of what comes after it
        # What the tokenizer writes otherwise after its token before is left out.
        canonical = [
            int(index)
            for index in rng.integers(0, size, 60)
            if spelling.pieces[index] and ours.follow(before, spelling.pieces[index]) == index
        ]
        probs = np.zeros(size)
        some = list({*canonical, stop, tokens[place.index]})
        probs[some] = rng.dirichlet(np.full(len(some), 0.5))
        found, account = spread(retold, place, lambda tokens, probs=probs: probs)
        np.testing.assert_allclose(found, probs, atol=1e-9)
        assert account.matched == pytest.approx(1.0)


def test_an_account_names_the_ways_in_the_order_they_are_stored_in() -> None:
    total = Account(matched=1.0)
    total += Account(split=0.5, chained=0.25, drawn=0.125, merged=0.0625, nowhere=0.0625)
    np.testing.assert_allclose(total.shares(2), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125])


def answer(probs: dict[str, float]) -> np.ndarray:
    """Probabilities of a teacher of letters by what they spell; "." is its end."""
    found = np.zeros(LETTERS.size)
    for text, mass in probs.items():
        found[zoo.END if text == "." else encode(LETTERS, text)[0]] = mass
    return found


def test_each_way_of_the_account_is_taken_where_it_is_due() -> None:
    said = {
        (): {"a": 0.5, "b": 0.3, ".": 0.1, "\x00": 0.1},
        ("a",): {"b": 0.6, "c": 0.4},
        ("a", "b"): {"c": 0.25, "b": 0.75},
    }
    spelling = Spelling(LETTERS)
    retold = told(LETTERS, WORDS, "b")
    found, account = spread(
        retold,
        retold.places[0],
        lambda tokens: answer(said[tuple(spelling.spelled(token).decode() for token in tokens)]),
    )
    ids = Spelling(WORDS).ids
    assert found[ids[b"abc"]] == pytest.approx(0.5 * 0.6 * 0.25)
    assert found[ids[b"ab"]] == pytest.approx(0.5 * 0.6 * 0.75)
    assert found[ids[b"a"]] == pytest.approx(0.5 * 0.4)
    assert found[ids[b"b"]] == pytest.approx(0.3)
    assert found[zoo.END] == pytest.approx(0.1)
    assert account.chained == pytest.approx(0.5 * 0.6)
    assert account.matched == pytest.approx(0.5 * 0.4 + 0.5)


def test_what_the_student_would_have_drawn_into_its_token_before_cannot_follow() -> None:
    retold = told(LETTERS, WORDS, "aca", least=EXACT)
    found, account = spread(retold, retold.places[1], lambda tokens: answer({"b": 0.25, "c": 0.5, "a": 0.25 - 1e-6}))
    ids = Spelling(WORDS).ids
    assert found[ids[b"b"]] == 0.0
    assert account.merged == pytest.approx(0.25, abs=1e-5)
    assert found[ids[b"c"]] + found[ids[b"cc"]] == pytest.approx(2 / 3, abs=1e-3)


RECUT = zoo.merging("b c", "a b", "c c", "_ a")


def write(says: Says, rng: np.random.Generator) -> str:
    """A text that a teacher of letters may write."""
    tokens: tuple[int, ...] = ()
    while (token := int(rng.choice(LETTERS.size, p=says(tokens)))) != zoo.END:
        tokens = (*tokens, token)
    return Spelling(LETTERS).join(tokens).decode()


@pytest.mark.parametrize("student", [WORDS, OTHERS, RECUT], ids=["words", "others", "recut"])
def test_students_are_taught_each_token_as_often_as_they_read_it(student: ModelTokenizer) -> None:
    says, rng = chain(LETTERS, "abc ", 3), np.random.default_rng(0)
    taught, read, spreads = np.zeros(student.size), np.zeros(student.size), np.zeros(student.size)
    for seed in range(300):
        retold = told(LETTERS, student, write(says, rng))
        for place in retold.places:
            found, _ = spread(retold, place, says, [seed, place.index])
            taught += found
            spreads += found * (1 - found)
            read[retold.ours[place.index]] += 1
    assert read.sum() > 500
    assert np.abs(read - taught).max() <= 4 * np.sqrt(spreads.max() + 1)
    assert ((read - taught) ** 2 / (spreads + 1))[read > 5].mean() < 2.5


@pytest.mark.parametrize("share", [(LEAST + LOOKED_AT) / 2, LOOKED_AT / 2])
def test_unlikely_beginnings_are_drawn_as_often_as_they_are_likely(share: float) -> None:
    """Each time some stand for all, which is right in the mean: also of what comes of those that were drawn."""
    retold = told(LETTERS, WORDS, "b")
    said = {(): {"a": share, "c": share, "b": 1 - 2 * share}, "a": {"b": 0.5, " ": 0.5}, "c": {"c": 0.25, "a": 0.75}}
    says = lambda tokens: answer(said[Spelling(LETTERS).spelled(tokens[-1]).decode() if tokens else ()])  # noqa: E731
    said["b"] = said[" "] = {" ": 1.0}
    found, drawn = np.zeros(WORDS.size), 0.0
    for seed in range(2000):
        one, account = spread(retold, retold.places[0], says, seed)
        found += one / 2000
        drawn += account.drawn / 2000
    ids = Spelling(WORDS).ids
    # Within four deviations: each time one at most is drawn of a kind, for LEAST or LOOKED_AT.
    for text, mass in (("a", 0.5), ("ab", 0.5), ("cc", 0.25), ("c", 0.75)):
        assert found[ids[text.encode()]] == pytest.approx(share * mass, abs=4 * (LEAST * share * mass / 2000) ** 0.5)
    assert found[ids[b"b"]] == pytest.approx(1 - 2 * share, abs=4 * (LEAST * share / 1000) ** 0.5)
    assert drawn == pytest.approx(2 * share, abs=4 * (LEAST * share / 1000) ** 0.5)


def test_what_the_student_has_no_counterpart_of_goes_nowhere_and_the_rest_is_renormalised() -> None:
    padded = ModelTokenizer(LETTERS.name, LETTERS.tokenizer, LETTERS.size + 1, "")
    retold = told(padded, WORDS, "b")
    said = np.append(answer({"b": 0.4, ".": 0.1}), 0.5)
    found, account = spread(retold, retold.places[0], lambda tokens: said)
    assert account.nowhere == pytest.approx(0.5)
    assert found[Spelling(WORDS).ids[b"b"]] == pytest.approx(0.8)
    assert found[zoo.END] == pytest.approx(0.2)


def test_tokens_that_the_head_has_no_row_for_are_taught_nothing() -> None:
    last = zoo.opened("llama").ids["<|tool|>"]
    cut = dataclasses.replace(zoo.opened("llama"), size=last)
    found = Tables(zoo.spelled("qwen"), Spelling(cut), last)
    assert found.first[zoo.opened("qwen").ids["<|tool|>"]] == -1
    assert found.first[zoo.opened("qwen").ids["<|user|>"]] == zoo.opened("llama").ids["<|user|>"]
    assert found.stop_id is None


def test_what_the_student_cannot_spell_goes_nowhere() -> None:
    spelling = zoo.spelled("letters")
    probs = np.zeros(spelling.model.size)
    probs[spelling.ids[b"\xe7"]], probs[spelling.ids[b"a"]] = 0.5, 0.5
    retold = Text(tables_of("letters", "phrases"), letters(b"a"), zoo.spelled("phrases").split(b"a"))
    _, account = spread(retold, retold.places[0], lambda tokens: probs)
    assert (account.nowhere, account.merged) == (pytest.approx(0.5), 0.0)


@pytest.mark.parametrize("spaces", [1, 2, 3])
@pytest.mark.parametrize("student", ["qwen", "gpt2"])
@pytest.mark.parametrize("teacher", ["letters", "mistral", "gemma", "unsplit"])
def test_what_comes_after_spaces_says_how_they_are_cut(teacher: str, student: str, spaces: int) -> None:
    """A word draws the last of them to it: a text that the teacher does not write here, but is sure of."""
    theirs, ours = zoo.spelled(teacher), zoo.spelled(student)
    head, rest = b"cat\n", b" " * spaces + b"cat"
    said = [*theirs.split(head + b"cat"), theirs.model.stop_ids[0]]
    retold = Text(tables_of(teacher, student), said, [*ours.split(head + b"cat"), zoo.END])
    sure = [*theirs.split(head + rest), theirs.model.stop_ids[0]]

    def says(tokens: tuple[int, ...]) -> np.ndarray:
        is_known = list(tokens) == sure[: len(tokens)]
        return np.eye(theirs.model.size)[sure[len(tokens)] if is_known else sure[-1]]

    [place] = [place for place in retold.places if place.index == len(ours.split(head))]
    found, _ = spread(retold, place, says)
    assert found[ours.split(head + rest)[place.index]] == pytest.approx(1.0)


def test_special_tokens_of_one_name_are_the_same_token() -> None:
    found = tables_of("qwen", "llama")
    for text in ("<|user|>", "<|tool|>", "<unk>"):
        assert found.first[zoo.opened("qwen").ids[text]] == zoo.opened("llama").ids[text]
        assert found.same[zoo.opened("qwen").ids[text]] == zoo.opened("llama").ids[text]


def test_every_token_that_ends_a_reply_of_the_teacher_is_the_students_end() -> None:
    from copy import copy

    tokenizer = copy(LETTERS.tokenizer)
    letter = encode(LETTERS, "x")[0]
    tokenizer.eos_token_ids = {zoo.END, 3, letter}
    found = tables(ModelTokenizer("ends", tokenizer, LETTERS.size, ""), WORDS)
    assert [int(found.first[index]) for index in (zoo.END, 3, letter)] == [zoo.END] * 3
    assert [int(found.same[index]) for index in (zoo.END, 3, letter)] == [zoo.END] * 3


@first_of_pairs
def test_the_first_token_of_each_is_the_beginning_of_what_it_spells(teacher: str) -> None:
    found = tables_of(teacher, "unsplit")
    for index in range(0, found.teacher.model.size, max(1, found.teacher.model.size // 500)):
        piece = found.teacher.pieces[index]
        if piece:
            assert piece.startswith(found.student.pieces[found.first[index]])
            assert (found.same[index] >= 0) == (piece in found.student.ids)


@first_of_pairs
def test_tokens_that_go_on_are_those_that_begin_so(teacher: str) -> None:
    found = tables_of(teacher, "letters")
    for inside in (b"t", b" ", b"th", b" s", "猫".encode()[:2], b"\xff\xfe"):
        ids, firsts = found.continuing(inside)
        expected = {
            index
            for index, piece in enumerate(found.teacher.pieces)
            if piece and piece.startswith(inside) and len(piece) > len(inside)
        }
        assert set(ids.tolist()) == expected
        for index, first in zip(ids, firsts, strict=True):
            assert found.student.pieces[first] == found.teacher.pieces[index][len(inside) : len(inside) + 1]


@pytest.mark.parametrize("teacher", [name for name in readable if name != "prefixed"])
@given(text=texts)
@often
def test_what_a_tokenizer_writes_next_follows_its_token_before(teacher: str, text: str) -> None:
    found = tables_of("letters", teacher)
    spelling = zoo.spelled(teacher)
    tokens = spelling.encode(text.encode(), continues=True)
    for before, token in itertools.pairwise(tokens):
        # How space is cut depends on what comes after it.
        if spelling.spelled(token).strip() and spelling.spelled(before).isascii() and spelling.pieces[before]:
            assert found.follow(before, spelling.spelled(token)) in (token, found.first_of(spelling.spelled(token)))


@pytest.mark.parametrize("text", ["    return one", "\n\n  x = 1", "cats  #  said", "a   b"])
@pytest.mark.parametrize("teacher", [name for name in readable if name != "prefixed"])
def test_a_word_follows_the_spaces_before_it(teacher: str, text: str) -> None:
    found, spelling = tables_of("letters", teacher), zoo.spelled(teacher)
    for before, token in itertools.pairwise(spelling.encode(text.encode(), continues=True)):
        if spelling.spelled(token).strip():
            assert found.follow(before, spelling.spelled(token)) == token


# Where the student's tokens begin in the teacher's text.


def checked(retold: Text, teacher: Spelling, student: Spelling) -> list[int]:
    """The indices of the places, each of which is seen to stand where it says."""
    stop = teacher.model.stop_ids
    spelled = [b"" if token in stop else teacher.spelled(token) for token in retold.theirs]
    whole = b"".join(spelled)
    for place in retold.places:
        token = retold.ours[place.index]
        begins = sum(map(len, spelled[: place.before]))
        if token in student.model.stop_ids:
            assert (retold.theirs[place.before] in stop, begins, place.inside) == (True, len(whole), b"")
            continue
        piece = student.spelled(token)
        assert piece == (place.ahead + whole[begins + len(place.inside) :])[: len(piece)]
        assert not place.ahead or not place.inside
        assert spelled[place.before].startswith(place.inside)
        assert len(spelled[place.before]) > len(place.inside)
    return [place.index for place in retold.places]


@first_of_pairs
@given(text=texts, data=st.data())
@often
def test_every_token_of_a_text_that_both_spell_alike_has_its_place(teacher: str, text: str, data) -> None:
    student = data.draw(st.sampled_from(readable[:-1] if not zoo.REAL else readable))
    text = unicodedata.normalize("NFC", text)
    theirs = [*zoo.spelled(teacher).encode(text.encode(), True), zoo.opened(teacher).stop_ids[0]]
    ours = [*zoo.spelled(student).encode(text.encode(), True), zoo.opened(student).stop_ids[0]]
    retold = Text(tables_of(teacher, student), theirs, ours)
    assert checked(retold, zoo.spelled(teacher), zoo.spelled(student)) == list(range(len(ours)))
    assert retold.our_bytes == len(text.encode())


def letters(text: bytes) -> list[int]:
    return [Spelling(LETTERS).ids[bytes([byte])] for byte in text]


@pytest.mark.parametrize(
    ("theirs", "ours", "kept"),
    [
        ("cafe\u0301 noir", "café noir", [0, 1, 2, *range(5, 10)]),
        ("abXcd", "abYYcd", [0, 1, 4, 5]),
        ("X", "Y", []),
        ("", "", []),
        ("abc", "", []),
        ("ab", "ab", [0, 1]),
        ("ab", "abY", [0, 1]),
        ("Xab", "ab", [0, 1]),
        ("a  b", "a b", [0, 1, 2]),
        ("ab", "aab", [0, 2]),
        ("aa", "aaa", [0, 1]),
        ("abab", "ababab", [0, 1, 2, 3]),
    ],
)
def test_where_the_two_spell_a_stretch_otherwise_its_tokens_are_left_out(
    theirs: str, ours: str, kept: list[int]
) -> None:
    retold = Text(tables(LETTERS, LETTERS), letters(theirs.encode()), letters(ours.encode()))
    spelling = Spelling(LETTERS)
    assert checked(retold, spelling, spelling) == kept
    positions = [place.before for place in retold.places]
    assert positions == sorted(set(positions))


@given(theirs=st.text("ab ", max_size=8), ours=st.text("ab ", max_size=8), shift=st.integers(-2, 2))
@settings(max_examples=200, deadline=None)
def test_no_two_tokens_stand_at_one_place(theirs: str, ours: str, shift: int) -> None:
    retold = Text(tables(LETTERS, LETTERS), letters(theirs.encode()), letters(ours.encode()), shift)
    spelling = Spelling(LETTERS)
    checked(retold, spelling, spelling)
    positions = [(place.before, not place.ahead) for place in retold.places]
    assert positions == sorted(set(positions))


@pytest.mark.parametrize("shift", [1, 2])
def test_bytes_that_one_of_the_two_has_in_front_shift_its_places(shift: int) -> None:
    text = b"abcab"
    less = letters(text[shift:])
    more = letters(text)
    behind = Text(tables(LETTERS, LETTERS), more, less, shift)
    assert [(place.index, place.before) for place in behind.places] == [(at, at + shift) for at in range(5 - shift)]
    ahead = Text(tables(LETTERS, LETTERS), less, more, -shift)
    assert [(place.index, place.before) for place in ahead.places] == [(at + shift, at) for at in range(5 - shift)]


def test_a_token_that_begins_before_the_teachers_text_knows_what_it_spells_ahead() -> None:
    ours = encode(WORDS, " abc")
    retold = Text(tables(LETTERS, WORDS), letters(b"abc"), ours, -1)
    assert retold.places == [Place(0, 0, b"", b" ")]


@pytest.mark.parametrize(("added", "indices"), [(0, [1, 2]), (1, [0, 1, 2])])
def test_a_token_that_is_the_space_in_front_alone_is_taught_where_that_is_always_there(
    added: int, indices: list[int]
) -> None:
    retold = Text(tables(LETTERS, LETTERS), letters(b"bc"), letters(b" bc"), -1, added)
    assert [place.index for place in retold.places] == indices
    found, account = spread(retold, retold.places[0], lambda tokens: answer({"b": 0.75, "c": 0.25}))
    assert found[letters(b" " if added else b"b")] == pytest.approx(1.0 if added else 0.75)
    assert sum(vars(account).values()) == pytest.approx(1.0)


def test_after_a_space_ahead_rare_tokens_too_are_written_with_it() -> None:
    student = zoo.merging("_ a", "_ b")
    ids = Spelling(student).ids
    retold = Text(tables(LETTERS, student), letters(b"a"), encode(student, " a"), -1)
    rare = LOOKED_AT / 2
    said = answer({"a": 0.6, "b": rare, "c": 0.3, ".": 0.1 - rare})
    found, account = spread(retold, retold.places[0], lambda tokens: said)
    assert found[ids[b" a"]] == pytest.approx(0.6)
    assert found[ids[b" b"]] == pytest.approx(rare)
    assert found[ids[b" "]] == pytest.approx(0.3)
    assert found[zoo.END] == pytest.approx(0.1 - rare)
    assert sum(vars(account).values()) == pytest.approx(1.0)


def test_a_reply_that_was_cut_has_no_place_for_its_end() -> None:
    retold = Text(tables(LETTERS, WORDS), letters(b"abc"), [*encode(WORDS, "abc"), zoo.END])
    assert [place.index for place in retold.places] == [0]


def test_inside_the_name_of_a_special_token_the_text_itself_is_taught() -> None:
    theirs = [zoo.opened("qwen").ids["<|user|>"]]
    retold = Text(tables_of("qwen", "letters"), theirs, zoo.spelled("letters").split(b"<|user|>"))
    for place in retold.places[1:]:
        found, _ = spread(retold, place, random_says(zoo.opened("qwen").size, 3))
        assert found[retold.ours[place.index]] == pytest.approx(1.0)


def test_a_text_that_the_teacher_finds_impossible_is_taught_all_the_same() -> None:
    retold = told(WORDS, LETTERS, "abc")
    zeros = np.zeros(WORDS.size)
    zeros[encode(WORDS, "c")] = 1.0
    for place in retold.places:
        found, account = spread(retold, place, lambda tokens: zeros)
        assert found.sum() == pytest.approx(1.0)
        assert sum(vars(account).values()) == pytest.approx(1.0)
