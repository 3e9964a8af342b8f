"""A teacher's reply comes to the student's tokens, with the distribution that the aligner spreads at each of them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import tokenizer_zoo as zoo
from conftest import save_random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_aligner import checked, spread, texts
from test_branching import read_plainly

from true_kd.alignment import Account, Aligner, Alignment, sum_up
from true_kd.alignment.aligner import Way
from true_kd.alignment.replies import find_alignment
from true_kd.errors import VocabularyError
from true_kd.models import Branches, LanguageModel, ModelOptions, open_model, seed_of, split_head
from true_kd.shards import CachedReply, pack_replies, unpack_replies
from true_kd.targets import SparseTargets, TargetOptions

often = settings(max_examples=25, deadline=None)
TARGETS = TargetOptions(preset="default", threshold=0.001).settings
KEY = "0123456789abcdef" * 2
SOME = "the cat said hello\n\tto the world"
templates = pytest.mark.parametrize("teacher_template", [True, False], ids=["chat", "plain"])
student_templates = pytest.mark.parametrize("student_template", [True, False], ids=["to chat", "to plain"])
pairs = pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("gpt2", "qwen"),
        ("gpt2", "llama"),
        ("llama", "gpt2"),
        ("llama", "mistral"),
        ("mistral", "gemma"),
        ("first", "prefixed"),
        ("gemma", "first"),
        *((one, other) for one in zoo.REAL for other in zoo.REAL if one != other),
    ],
)


@cache
def aligner(
    teacher: str, student: str, chat: bool | None = None, to_chat: bool | None = None, way: Way = "align"
) -> Aligner:
    return Aligner(way, zoo.opened(teacher, chat), zoo.opened(student, to_chat))


def replying(aligner: Aligner, text: str, is_first: bool = False) -> list[int]:
    """A teacher's tokens of a reply, its end included; `is_first` where it begins with the space that is added."""
    spelling = aligner.teacher_spelling
    return [*spelling.encode(text.encode(), continues=not is_first), spelling.model.stop_ids[0]]


@pairs
@templates
@student_templates
@pytest.mark.parametrize("text", [SOME, " the cat", "  the cat", "\nthe", "\n\nthe", "猫 🐈", "x", ""])
def test_every_token_of_a_reply_has_its_place_whoever_adds_a_space(
    teacher: str, student: str, teacher_template: bool, student_template: bool, text: str
) -> None:
    made = aligner(teacher, student, teacher_template, student_template)
    for is_first in (True, False):
        retold = made.retell(replying(made, text, is_first), [5])
        kept = checked(retold, made.teacher_spelling, made.student_spelling)
        assert kept == list(range(len(retold.ours)))
        assert retold.ours[-1] in made.student.stop_ids


@pairs
@templates
@student_templates
def test_the_student_writes_a_reply_as_its_own_tokenizer_writes_the_text(
    teacher: str, student: str, teacher_template: bool, student_template: bool
) -> None:
    made = aligner(teacher, student, teacher_template, student_template)
    retold = made.retell(replying(made, SOME, is_first=teacher_template), [5])
    tokens = retold.ours[:-1]
    if student_template or not made.student_spelling.adds_space:
        assert tokens == made.student.tokenizer.encode(SOME, add_special_tokens=False)
    else:
        assert made.student_spelling.join(tokens) == SOME.encode()


@pairs
@given(text=texts, chat=st.booleans(), to_chat=st.booleans(), is_first=st.booleans())
@often
def test_any_reply_is_retold_in_tokens_that_stand_where_they_say(
    teacher: str, student: str, text: str, chat: bool, to_chat: bool, is_first: bool
) -> None:
    made = aligner(teacher, student, chat, to_chat)
    retold = made.retell(replying(made, text, is_first), [5])
    kept = checked(retold, made.teacher_spelling, made.student_spelling)
    said = made.teacher_spelling.join(retold.theirs[:-1])
    if made.student_spelling.join(retold.ours[:-1]).strip(b" ") == said.strip(b" "):
        assert kept == list(range(len(retold.ours)))


@pairs
def test_a_reply_cut_in_the_middle_of_a_character_loses_its_last_token_alone(teacher: str, student: str) -> None:
    made = aligner(teacher, student)
    whole = made.teacher_spelling.encode("the 🐈".encode(), True)
    if len(whole) > 2 and made.teacher_spelling.spelled(whole[-1])[:1] != b" ":
        retold = made.retell(whole[:-1], [5])
        kept = checked(retold, made.teacher_spelling, made.student_spelling)
        assert 0 < len(kept) < len(retold.ours)
        assert kept == list(range(len(kept)))
        assert not set(retold.ours) & set(made.student.stop_ids)


@pairs
def test_a_reply_that_was_cut_gets_no_end(teacher: str, student: str) -> None:
    made = aligner(teacher, student)
    assert made.retell(replying(made, SOME)[:-1], [5]).ours == made.retell(replying(made, SOME), [5]).ours[:-1]


@pairs
def test_an_empty_reply_is_its_end_alone(teacher: str, student: str) -> None:
    made = aligner(teacher, student)
    retold = made.retell(replying(made, ""), [5])
    assert (len(retold.ours), len(retold.places)) == (1, 1)


@pairs
@pytest.mark.parametrize("text", [SOME, " the cat", "  aaa", "猫 🐈\n", "aaaa aaaa"])
def test_plain_text_is_retold_from_the_first_token_of_each_on(teacher: str, student: str, text: str) -> None:
    made = aligner(teacher, student)
    theirs = made.teacher_spelling.model.tokenizer.encode(text)
    ours = made.student.tokenizer.encode(text)
    retold = made.retell(theirs[1:], theirs[:1], text)
    assert retold.ours == ours[1:]
    spelled = [len(made.student_spelling.pieces[token] or b"") for token in ours]
    # Where each begins, counted from the end of the text.
    seen = sum(len(made.teacher_spelling.spelled(token)) for token in theirs[1:])
    expected = [
        at - 1 for at in range(1, len(ours)) if sum(spelled[at:]) - spelled[at] < seen and sum(spelled[at:]) > 0
    ]
    assert checked(retold, made.teacher_spelling, made.student_spelling) == expected
    for place in retold.places:
        behind = sum(len(made.teacher_spelling.spelled(token)) for token in retold.theirs[place.before :])
        assert behind - len(place.inside) + len(place.ahead) == sum(spelled[place.index + 1 :])


@pytest.mark.parametrize("way", ["align", "uld", "truncate", "project"])
def test_an_alignment_depends_on_its_way_and_on_what_the_student_writes_with(way: Way) -> None:
    options = ModelOptions(model="student")
    facts = {
        name: find_alignment(way, options, zoo.opened("gpt2"), zoo.opened(name)).facts["tokenizer"]
        for name in ("gpt2", "qwen", "llama", "gemma")
    }
    assert len(set(facts.values())) == 4
    plain = find_alignment(way, options, zoo.opened("gpt2"), zoo.opened("qwen", False))
    assert plain.facts["tokenizer"] != facts["qwen"]
    other = find_alignment(way, ModelOptions(model="other"), zoo.opened("gpt2"), zoo.opened("qwen"))
    assert isinstance(other, Alignment)
    assert other.facts == {"way": way, "tokenizer": facts["qwen"], "version": 2}


def test_an_alignment_needs_tokens_that_can_be_read_as_text() -> None:
    import dataclasses

    odd = dataclasses.replace(zoo.opened("gpt2"), tokenizer=object())
    with pytest.raises(VocabularyError):
        find_alignment("align", ModelOptions(model="a"), odd, zoo.opened("gpt2"))


# Scores, of a teacher of random weights.


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageModel]:
    """Random teachers of three tokenizers."""
    found = {}
    for name in ("gpt2", "llama", "gemma"):
        folder = tmp_path_factory.mktemp(name)
        save_random_model(
            folder, zoo.folder_of(name), zlib.crc32(name.encode()) % 100, vocab_size=720, eos_token_id=zoo.END
        )
        found[name] = open_model(ModelOptions(model=str(folder)), "teacher")
    return found


def score(
    teacher: LanguageModel,
    student: str,
    response: Sequence[int],
    opening: Sequence[int] = (5, 9, 6),
    way: Way = "align",
    text: str | None = None,
) -> tuple[CachedReply, Aligner]:
    made = Aligner(way, teacher, zoo.opened(student))
    branches = Branches(teacher.module, split_head(teacher.module), [*opening, *response])
    return made.score(branches, opening, (response, "given"), KEY, TARGETS, text), made


def probabilities(teacher: LanguageModel, tokens: Sequence[int]) -> np.ndarray:
    return np.exp(read_plainly(teacher.module, tokens, [(len(tokens), ())])[0])


def dense(targets: SparseTargets) -> np.ndarray:
    """The kept log-probabilities of each token, NaN where none is kept."""
    found = np.full((len(targets), targets.vocab_size), np.nan)
    rows = np.repeat(np.arange(len(targets)), np.diff(targets.offsets))
    exact = targets.exact
    found[rows[exact], targets.ids[exact]] = targets.logprobs[exact]
    return found


def assert_as_stored(found: np.ndarray, expected: np.ndarray) -> None:
    """Log-probabilities are those expected, but for the byte that they are stored in."""
    expected = np.maximum(expected, -40.0)
    step = 80 * (255 * np.sqrt(-expected / 40) + 1) / 255**2
    assert (np.abs(found - expected) <= 1.6 * step + 1e-3).all()


pairs_of_models = pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("gpt2", "qwen"),
        ("gpt2", "llama"),
        ("llama", "gpt2"),
        ("llama", "gemma"),
        ("gemma", "letters"),
        ("gemma", "mistral"),
    ],
)


@pairs_of_models
@pytest.mark.parametrize("text", [SOME, "猫 🐈 x", ""])
def test_targets_are_the_spread_of_what_the_teacher_itself_says(
    teachers: dict[str, LanguageModel], teacher: str, student: str, text: str
) -> None:
    model, opening = teachers[teacher], [5, 9, 6]
    response = replying(Aligner("align", model, zoo.opened(student)), text)
    reply, made = score(model, student, response, opening)
    retold = made.retell(response, opening)
    np.testing.assert_array_equal(reply.tokens, retold.ours)
    np.testing.assert_array_equal(reply.kept, [place.index for place in retold.places])
    np.testing.assert_array_equal(reply.targets.labels, reply.tokens[reply.kept])
    assert reply.finished == "given"
    says = lambda tokens: probabilities(model, [*opening, *tokens])  # noqa: E731
    spreads = [spread(retold, place, says, [seed_of(KEY), place.index]) for place in retold.places]
    with np.errstate(divide="ignore"):
        logs = np.log(np.stack([found for found, _ in spreads]))
    labels = reply.tokens[reply.kept]
    assert_as_stored(reply.targets.label_logprobs(labels), logs[np.arange(len(labels)), labels])
    kept = dense(reply.targets)
    assert_as_stored(kept[~np.isnan(kept)], logs[~np.isnan(kept)])
    # All that is likely is kept.
    assert not np.isnan(kept[logs > np.log(0.02)]).any()
    accounts = np.mean([list(vars(account).values()) for _, account in spreads], axis=0)
    assert reply.account[0] == pytest.approx(len(reply.kept) / len(reply.tokens))
    np.testing.assert_allclose(reply.account[1:], accounts, atol=1e-3)
    assert reply.account[1:].sum() == pytest.approx(1.0, abs=1e-4)


@pairs_of_models
def test_targets_of_plain_text_are_those_of_its_tokens_after_the_first(
    teachers: dict[str, LanguageModel], teacher: str, student: str
) -> None:
    model = teachers[teacher]
    tokens = model.tokenizer.encode(SOME)
    reply, made = score(model, student, tokens[1:], tokens[:1], text=SOME)
    assert reply.tokens.tolist() == made.student.tokenizer.encode(SOME)[1:]
    retold = made.retell(tokens[1:], tokens[:1], SOME)
    assert len(reply.kept) == len(retold.places) > 5
    found, _ = spread(retold, retold.places[-1], lambda rest: probabilities(model, [*tokens[:1], *rest]))
    label = int(reply.tokens[-1])
    assert_as_stored(reply.targets.label_logprobs(reply.tokens)[-1:], np.log(found[[label]]))


def test_a_long_reply_is_scored_as_its_parts_are(teachers: dict[str, LanguageModel]) -> None:
    model = teachers["gpt2"]
    response = replying(Aligner("align", model, zoo.opened("llama")), SOME * 14)
    whole, _ = score(model, "llama", response)
    assert len(response) > 128
    part, _ = score(model, "llama", response[:40])
    count = len(part.kept) - 2
    labels = part.tokens[part.kept]
    np.testing.assert_allclose(
        whole.targets.label_logprobs(labels)[:count], part.targets.label_logprobs(labels)[:count], atol=0.2
    )


def test_the_same_reply_is_always_scored_the_same(teachers: dict[str, LanguageModel]) -> None:
    response = replying(Aligner("align", teachers["gpt2"], zoo.opened("llama")), SOME)
    one, other = (score(teachers["gpt2"], "llama", response)[0].targets for _ in range(2))
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.logprob_codes, other.logprob_codes)


@pytest.mark.parametrize("way", ["align", "uld", "truncate", "project"])
def test_a_reply_of_which_the_student_has_no_token_has_no_targets(teachers: dict[str, LanguageModel], way: Way) -> None:
    # A space by itself, which SentencePiece adds to every text, cut before the end; and a text of one token.
    [space] = Aligner(way, teachers["llama"], zoo.opened("gpt2")).teacher_spelling.split(b" ")
    empty, _ = score(teachers["llama"], "gpt2", [space], way=way)
    tokens = teachers["gpt2"].tokenizer.encode("the")
    single, _ = score(teachers["gpt2"], "qwen", tokens[1:], tokens[:1], way=way, text="the")
    for reply in (empty, single):
        assert (len(reply.tokens), len(reply.kept), len(reply.targets)) == (0, 0, 0)
        assert reply.account.tolist() == [0.0] * (1 + len(vars(Account())))
    assert sum_up([empty], way).positions == 0.0


@pytest.mark.parametrize("way", ["align", "uld", "truncate", "project"])
def test_a_reply_that_the_student_spells_otherwise_altogether_has_no_targets(
    teachers: dict[str, LanguageModel], way: Way
) -> None:
    [byte] = Aligner(way, teachers["gpt2"], zoo.opened("gemma")).teacher_spelling.split(b"\xff")
    reply, _ = score(teachers["gpt2"], "gemma", [byte], way=way)
    assert len(reply.tokens) > 0
    assert (len(reply.kept), len(reply.targets)) == (0, 0)


def test_replies_without_targets_lie_in_a_shard_beside_others(
    teachers: dict[str, LanguageModel],
) -> None:
    [byte] = Aligner("align", teachers["gpt2"], zoo.opened("llama")).teacher_spelling.split(b"\xff")
    tokens = teachers["gpt2"].tokenizer.encode("the")
    replies = {
        "0" * 32: score(teachers["gpt2"], "llama", [byte])[0],
        "1" * 32: score(
            teachers["gpt2"], "llama", replying(Aligner("align", teachers["gpt2"], zoo.opened("llama")), SOME)
        )[0],
        "2" * 32: score(teachers["gpt2"], "llama", tokens[1:], tokens[:1], text="the")[0],
    }
    found = unpack_replies(np.frombuffer(pack_replies(replies), dtype=np.uint8), replies, None)
    for key, reply in replies.items():
        np.testing.assert_array_equal(found[key].tokens, reply.tokens)
        np.testing.assert_array_equal(found[key].kept, reply.kept)
        np.testing.assert_array_equal(found[key].targets.ids, reply.targets.ids)


def test_uld_keeps_the_teachers_probabilities_by_rank(teachers: dict[str, LanguageModel]) -> None:
    model, opening = teachers["gpt2"], [5, 9, 6]
    response = replying(Aligner("uld", model, zoo.opened("qwen")), SOME)
    reply, made = score(model, "qwen", response, opening, "uld")
    retold = made.retell(response, opening)
    assert reply.targets.is_ranked
    assert reply.targets.vocab_size == zoo.opened("qwen").size
    kept = dense(reply.targets)
    for row, place in zip(kept, retold.places, strict=True):
        ranked = np.sort(probabilities(model, [*opening, *response[: place.before]]))[::-1][: made.student.size]
        ranked = ranked / ranked.sum()
        assert_as_stored(row[~np.isnan(row)], np.log(ranked)[~np.isnan(row)])


@pytest.mark.parametrize("way", ["truncate", "project"])
def test_rules_of_thumb_send_each_token_where_they_say(teachers: dict[str, LanguageModel], way: Way) -> None:
    model, opening = teachers["gpt2"], [5, 9, 6]
    response = replying(Aligner(way, model, zoo.opened("llama")), SOME)
    reply, made = score(model, "llama", response, opening, way)
    retold, size = made.retell(response, opening), made.student.size
    ids = made.student_spelling.ids
    kept = dense(reply.targets)
    for row, place in zip(kept, retold.places, strict=True):
        probs = probabilities(model, [*opening, *response[: place.before]])
        expected = np.zeros(size)
        if way == "truncate":
            expected[: min(size, len(probs))] = probs[:size]
        else:
            for index, mass in enumerate(probs):
                name = made.teacher_spelling.special.get(index)
                piece = made.teacher_spelling.pieces[index]
                to = ids.get(piece) if piece else made.student.ids.get(name) if name else None
                if to is not None:
                    expected[to] += mass
        with np.errstate(divide="ignore"):
            expected = np.log(expected / expected.sum())
        assert_as_stored(row[~np.isnan(row)], expected[~np.isnan(row)])
    assert reply.account[2:6].tolist() == [0.0] * 4


def test_a_teacher_that_gives_all_to_what_the_student_lacks_teaches_nothing_by_rule() -> None:
    made = aligner("gpt2", "llama", way="project")
    probs = np.zeros(made.teacher_spelling.model.size, dtype=np.float32)
    probs[-1] = 1.0
    found, account = made._by_rule(probs)
    np.testing.assert_allclose(found, 1 / len(found))
    assert account.nowhere == 1.0


def test_the_end_of_a_reply_is_what_the_students_template_ends_it_with() -> None:
    made = aligner("gpt2", "qwen", None, True)
    assert made.retell(replying(made, SOME), [5]).ours[-1] == zoo.END


@pytest.mark.parametrize("student", zoo.OWN)
def test_the_compatibility_counts_the_spellings_of_both(student: str) -> None:
    made = aligner("gpt2", student)
    theirs, ours = (
        {piece for piece in spelling.pieces if piece} for spelling in (made.teacher_spelling, made.student_spelling)
    )
    found = made.compatibility
    assert (found.teacher_tokens, found.student_tokens, found.shared) == (len(theirs), len(ours), len(theirs & ours))
