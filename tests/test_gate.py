"""What the comparison says of a teacher, and where it finds the student wanting, from scores made by hand."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from handmade import LETTERS, WHOLE, by_example, entropy_of, example, examples, right, scores
from pydantic import TypeAdapter, ValidationError

from true_kd.cache import TargetCache
from true_kd.capture import CaptureOptions, capture, render_for, teacher_identity
from true_kd.errors import InputError
from true_kd.evaluation import TokenScores, share_estimate
from true_kd.examples import Example, make_example
from true_kd.gate import (
    SAME_KL,
    GateOptions,
    Headroom,
    NothingToTeach,
    compare_with_parent,
    stretches,
    teacher_nll,
    weigh_up,
)
from true_kd.losses import LossOptions
from true_kd.models import LanguageModel, load_head
from true_kd.prompts import from_strings
from true_kd.targets import TargetOptions, TargetSettings, TeacherHead


@pytest.fixture(scope="module")
def replies() -> list[Example]:
    return examples(8)


def weighed(
    of: list[Example],
    student: TokenScores,
    given: bool = False,
    teacher_right: np.ndarray | None = None,
    student_right: np.ndarray | None = None,
) -> Headroom:
    return weigh_up(of, student, LETTERS, given, teacher_right, student_right)


# What it says of the teacher


@pytest.mark.parametrize("kl", [0.0, 0.9 * SAME_KL, -0.01])
def test_a_student_that_says_what_the_teacher_says_is_the_same(kl: float, replies: list[Example]) -> None:
    found = weighed(replies, scores(replies, kl))
    assert found.standing == "same"
    assert f"{kl:.4f} nats" in found.why


def test_the_same_student_is_the_same_whatever_it_answers(replies: list[Example]) -> None:
    found = weighed(replies, scores(replies, 0.001, nll=5.0), True, right(8, 8), right(0, 8))
    assert found.standing == "same"


def test_a_teacher_with_more_right_answers_is_better(replies: list[Example]) -> None:
    found = weighed(replies, scores(replies, 0.5), False, right(6, 8), right(2, 8))
    assert found.standing == "better"
    assert "75%" in found.why
    assert "25%" in found.why


@pytest.mark.parametrize("student_right", [4, 7])
def test_a_teacher_with_no_more_right_answers_is_no_better(student_right: int, replies: list[Example]) -> None:
    found = weighed(replies, scores(replies, 0.5), False, right(4, 8), right(student_right, 8))
    assert found.standing == "no better"
    assert "no more than 50%" in found.why


def test_answers_count_for_more_than_given_replies(replies: list[Example]) -> None:
    surprised = scores(replies, 0.5, nll=9.0)
    assert weighed(replies, surprised, True, right(4, 8), right(4, 8)).standing == "no better"
    knowing = scores(replies, 0.5, nll=0.1)
    assert weighed(replies, knowing, True, right(5, 8), right(4, 8)).standing == "better"


def test_a_teacher_that_expects_the_replies_of_the_data_is_better(replies: list[Example]) -> None:
    found = weighed(replies, scores(replies, 0.5, nll=1.0 + teacher_nll(replies)), given=True)
    assert found.standing == "better"
    assert "by 1.000 nats" in found.why


def test_a_student_that_expects_the_replies_of_the_data_leaves_it_no_better(replies: list[Example]) -> None:
    found = weighed(replies, scores(replies, 0.5, nll=teacher_nll(replies) - 0.1), given=True)
    assert found.standing == "no better"
    assert "by 0.100 nats" in found.why


@pytest.mark.parametrize("nll", [0.1, 5.0])
def test_of_replies_that_the_teacher_wrote_nothing_tells_who_is_right(nll: float, replies: list[Example]) -> None:
    found = weighed(replies, scores(replies, 0.5, nll=nll))
    assert found.standing == "unknown"
    assert "0.500 nats" in found.why


def test_answers_of_one_of_the_two_alone_tell_nothing(replies: list[Example]) -> None:
    assert weighed(replies, scores(replies, 0.5), False, None, right(8, 8)).standing == "unknown"


# What is done about it


@pytest.mark.parametrize(
    ("standing", "refused"), [("same", True), ("no better", True), ("better", False), ("unknown", False)]
)
def test_a_gate_that_refuses_does_so_where_nothing_can_be_learnt(
    standing: str, refused: bool, replies: list[Example]
) -> None:
    found = replace(weighed(replies, scores(replies, 0.5)), standing=standing)
    assert GateOptions(when_no_better="refuse").refuses(found) is refused
    assert not GateOptions(when_no_better="warn").refuses(found)


def test_a_gate_warns_unless_it_is_told_otherwise() -> None:
    assert GateOptions().when_no_better == "warn"


@pytest.mark.parametrize("values", [{"prompts": -1}, {"when_no_better": "stop"}, {"prompt": 3}], ids=str)
def test_a_gate_that_makes_no_sense_is_refused(values: dict) -> None:
    with pytest.raises(ValidationError):
        GateOptions(**values)


def test_a_refusal_says_why_and_what_to_do(replies: list[Example]) -> None:
    found = weighed(replies, scores(replies, 0.001))
    error = NothingToTeach(found)
    assert isinstance(error, InputError)
    assert error.exit_code == 2
    assert found.why in str(error)
    assert "gate.when_no_better=warn" in str(error)
    assert "\n" not in str(error)


# Where the student is wanting


def test_means_are_over_tokens_not_over_replies() -> None:
    of = [example("a"), example("bbb"), *examples(4)]
    kl = by_example(of, [4.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    found = weighed(of, scores(of, kl, nll=kl, rank=kl))
    assert (found.prompts, found.tokens) == (6, 28)
    assert found.kl.value == pytest.approx(7 / 28)
    assert found.student_nll == pytest.approx(7 / 28)
    assert found.top1_agreement.value == pytest.approx(24 / 28)
    assert found.kl.low < found.kl.value < found.kl.high


def test_a_few_replies_have_no_interval() -> None:
    of = examples(4)
    found = weighed(of, scores(of, 0.5))
    assert (found.kl.low, found.top1_agreement.low) == (None, None)


def test_right_answers_are_told_with_their_doubt(replies: list[Example]) -> None:
    found = weighed(replies, scores(replies, 0.5), False, right(6, 8), right(2, 8))
    assert (found.teacher_right, found.student_right) == (share_estimate(right(6, 8)), share_estimate(right(2, 8)))
    assert weighed(replies, scores(replies, 0.5)).teacher_right is None


def test_the_teachers_own_numbers_are_those_of_its_distribution() -> None:
    of = [example("abcd", 0.9), example("efgh", 0.3), example("ij", 0.6)]
    chances = np.array([0.9] * 4 + [0.3] * 4 + [0.6] * 2)
    found = weighed(of, scores(of, 0.5))
    assert teacher_nll(of) == pytest.approx(-np.log(chances), abs=0.03)
    assert found.teacher_nll == pytest.approx(-np.log(chances).mean(), abs=0.02)
    assert found.entropy == pytest.approx(np.mean([entropy_of(chance) for chance in chances]), rel=0.02)


@pytest.mark.parametrize("settings", [WHOLE, TargetOptions(preset="exact").settings], ids=lambda value: value.kind)
def test_entropy_and_likelihood_are_those_of_the_teachers_logits(
    settings: TargetSettings, teacher: LanguageModel, tmp_path: Path
) -> None:
    options = CaptureOptions(max_tokens=6)
    cache = TargetCache(tmp_path / "targets", teacher_identity(teacher, settings))
    asked = render_for(teacher, from_strings(["say hello", "where is the cat", "who sat on the mat"]), options)
    list(capture(teacher, asked, cache, options, settings))
    head = TeacherHead(load_head(cache.head_path)) if cache.head_path else None
    kept = cache.read([prompt.key for prompt in asked], head)
    of = [
        make_example(prompt.rendered.prompt, reply.tokens, reply.targets, reply.kept, prompt.key, 100)
        for prompt in asked
        for reply in [kept[prompt.key]]
    ]
    rows = [np.array(teacher.module(mx.array(one.tokens)[None])[0, one.rows.tolist()]) for one in of]
    logits = np.concatenate(rows).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    labels = np.concatenate([one.labels for one in of])
    found = weighed(of, scores(of, 0.5))
    assert found.entropy == pytest.approx(-(np.exp(logprobs) * logprobs).sum(axis=-1).mean(), rel=5e-3)
    assert teacher_nll(of) == pytest.approx(-logprobs[np.arange(len(labels)), labels], rel=0.02, abs=0.03)


def test_the_first_miss_is_the_median_of_those_that_there_are() -> None:
    of = [example("abcd"), example("efghijkl"), example("mn"), example("opqr")]
    rank = np.zeros(18)
    rank[[1, 2]] = 1  # at a quarter of the first
    rank[4 + 6] = 7  # at three quarters of the second
    rank[4 + 8 + 1] = 1  # at half of the third
    assert weighed(of, scores(of, 0.5, rank=rank)).first_miss == 0.5


def test_without_a_miss_there_is_no_first() -> None:
    of = examples(3)
    assert weighed(of, scores(of, 0.5)).first_miss is None


def test_a_miss_lies_where_it_lies_in_the_whole_reply() -> None:
    """Of replies that are kept in part, as well."""
    of = [example("abcdefgh", kept=[2, 6])]
    assert weighed(of, scores(of, 0.5, rank=[0, 1])).first_miss == 6 / 8


def test_places_in_replies_go_by_stretches_that_double() -> None:
    of = [example("abcdefghi"), example("jkl")]
    kl = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3]
    found = weighed(of, scores(of, kl)).by_position
    assert [(part.start, part.stop, part.tokens) for part in found] == [
        (0, 1, 2),
        (1, 2, 2),
        (2, 4, 3),
        (4, 8, 4),
        (8, 16, 1),
    ]
    assert [part.kl for part in found] == pytest.approx([0.6, 0.7, 2.0 / 3, 0.65, 0.9])


def test_empty_stretches_are_left_out() -> None:
    found = stretches(np.array([0, 5, 5, 40]))
    assert [(start, stop, int(inside.sum())) for start, stop, inside in found] == [(0, 1, 1), (4, 8, 2), (32, 64, 1)]
    assert stretches(np.array([], dtype=np.int64)) == []


def test_the_tokens_that_are_missed_are_named_by_what_they_cost() -> None:
    of = [example("abca"), example("ab")]
    found = weighed(of, scores(of, [0.1, 0.5, 0.0, 0.2, 0.1, 0.1])).missed
    assert [(token.text, token.count) for token in found] == [("b", 2), ("a", 3)]
    assert [token.share for token in found] == pytest.approx([0.6, 0.4])


def test_five_tokens_are_named_at_most() -> None:
    of = [example("abcdefgh")]
    found = weighed(of, scores(of, np.arange(1.0, 9.0))).missed
    assert [token.text for token in found] == list("hgfed")


def test_a_student_that_misses_nothing_has_no_tokens_to_name() -> None:
    of = examples(3)
    assert weighed(of, scores(of, 0.0)).missed == ()


def test_what_a_tokenizer_spells_with_a_space_is_named_with_it(student: LanguageModel) -> None:
    [token] = student.tokenizer.encode(" the")
    of = [example("xy")]
    of = [replace(of[0], response=np.array([token, token], dtype=np.int32))]
    [missed] = weigh_up(of, scores(of, 0.5), student.tokenizer, False, None, None).missed
    assert missed.text == " the"


def test_a_teacher_is_compared_with_its_parent_over_tokens(replies: list[Example]) -> None:
    """The targets are the parent's, the scores the teacher's."""
    kl = by_example(replies, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    found = compare_with_parent(replies, scores(replies, kl, 2.0, by_example(replies, [1, 1, 0, 0, 0, 0, 0, 0])))
    assert (found.replies, found.tokens) == (8, 48)
    assert found.kl.value == pytest.approx(0.45)
    assert found.kl.low < 0.45 < found.kl.high
    assert found.top1_agreement.value == pytest.approx(0.75)
    assert found.parent_nll == pytest.approx(teacher_nll(replies).mean())
    assert found.teacher_nll == pytest.approx(2.0)


def test_a_headroom_is_json_and_read_back(replies: list[Example]) -> None:
    student = scores(replies, by_example(replies, np.linspace(0.2, 0.9, 8)), nll=2.0, rank=1)
    found = weighed(replies, student, True, right(6, 8), right(2, 8))
    text = json.dumps(asdict(found), allow_nan=False)
    assert TypeAdapter(Headroom).validate_python(json.loads(text)) == found


def test_the_loss_of_a_headroom_is_not_its_kl(replies: list[Example]) -> None:
    """Whatever the objective: what there is to gain is told at temperature 1."""
    student = scores(replies, 0.5)
    assert student.metrics(LossOptions().final).kd == 2.0
    assert weighed(replies, student).kl.value == pytest.approx(0.5)
