"""A proof says what the scores come to, how sure that is, and nothing that they do not say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from handmade import (
    ADAPTED,
    LETTERS,
    STUDENT,
    TEACHER,
    by_example,
    example,
    examples,
    proof,
    right,
    scores,
    usual_proof,
)
from pydantic import TypeAdapter

from true_kd.evaluation import Estimate, TokenScores, share_estimate
from true_kd.examples import Example
from true_kd.gate import SAME_KL, teacher_nll
from true_kd.models import LanguageModel
from true_kd.proof import Proof
from true_kd.proof.samples import pick_samples
from true_kd.sizes import ModelSize


@pytest.fixture(scope="module")
def replies() -> list[Example]:
    return examples(12)


def uneven(of: Sequence[Example], mean: float, seed: int = 0, spread: float = 0.2) -> np.ndarray:
    """Values that differ from reply to reply, about a mean."""
    values = np.random.default_rng(seed).normal(mean, spread * abs(mean), len(of))
    return by_example(of, (values + mean - values.mean()).tolist())


# Each model


def test_each_model_is_measured_over_tokens() -> None:
    of = [example("a"), example("bbb"), *examples(6)]
    kl = by_example(of, [4.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    rank = by_example(of, [0, 2, 5, 0, 0, 0, 0, 0])
    student = proof(of, scores(of, kl, 2 * kl, rank), scores(of, kl)).student
    assert student.kl.value == pytest.approx(25 / 40)
    assert student.nll.value == pytest.approx(50 / 40)
    assert student.perplexity.value == pytest.approx(np.exp(50 / 40))
    assert student.top1_agreement.value == pytest.approx(31 / 40)
    assert student.top5_agreement.value == pytest.approx(34 / 40), "the sixth is not among the first five"


@pytest.mark.parametrize("model", ["student", "adapted", "control", "teacher"])
def test_each_measure_lies_in_its_interval(model: str) -> None:
    found = getattr(usual_proof(control=True, tasks=8), model)
    for name in ("kl", "nll", "perplexity", "top1_agreement", "top5_agreement", "exact_match"):
        estimate = getattr(found, name)
        assert estimate.low <= estimate.value <= estimate.high, name


def test_the_teacher_is_where_it_is() -> None:
    of = [example("abcd", 0.9), example("efgh", 0.3), *examples(6)]
    teacher = proof(of, scores(of, 0.5), scores(of, 0.2)).teacher
    assert teacher.kl == Estimate(0.0, 0.0, 0.0)
    assert teacher.top1_agreement == teacher.top5_agreement == Estimate(1.0, 1.0, 1.0)
    likelihoods = teacher_nll(of)
    assert teacher.nll.value == pytest.approx(likelihoods.mean())
    assert teacher.nll.value == pytest.approx(-np.log([0.9] * 4 + [0.3] * 4 + [0.5] * 36).mean(), abs=0.02)
    assert teacher.perplexity.value == pytest.approx(np.exp(likelihoods.mean()))


def test_counts_are_those_of_the_examples(replies: list[Example]) -> None:
    found = proof(replies, scores(replies, 0.5), scores(replies, 0.2))
    assert (found.examples, found.tokens, found.tasks) == (12, 72, 0)
    assert usual_proof(tasks=8).tasks == 8


def test_a_perplexity_beyond_all_numbers_is_none(replies: list[Example]) -> None:
    found = proof(replies, scores(replies, 0.5, nll=1e4), scores(replies, 0.2))
    assert found.student.perplexity is None
    assert found.student.nll.value == 1e4
    assert found.adapted.perplexity is not None


# The gap


def test_the_gap_that_is_closed_is_one_less_what_is_left(replies: list[Example]) -> None:
    before, after = uneven(replies, 0.8, 1), uneven(replies, 0.2, 2)
    found = proof(replies, scores(replies, before), scores(replies, after)).gap_closed.kl
    assert found.value == pytest.approx(1 - after.sum() / before.sum())
    assert found.low < found.value < found.high


@pytest.mark.parametrize(("after", "closed"), [(0.0, 1.0), (0.5, 0.0), (0.25, 0.5), (1.0, -1.0)])
def test_all_of_a_gap_is_one_nothing_is_zero_and_away_is_below(
    after: float, closed: float, replies: list[Example]
) -> None:
    found = proof(replies, scores(replies, 0.5), scores(replies, after)).gap_closed.kl
    assert found.value == pytest.approx(closed)


def test_on_the_text_the_gap_ends_at_the_teachers_own_likelihood(replies: list[Example]) -> None:
    likelihoods = teacher_nll(replies)
    student = scores(replies, 0.5, likelihoods + 1.0)
    assert proof(replies, student, scores(replies, 0.2, likelihoods + 0.4)).gap_closed.nll.value == pytest.approx(0.6)
    assert proof(replies, student, scores(replies, 0.2, likelihoods)).gap_closed.nll.value == pytest.approx(1.0)
    beyond = proof(replies, student, scores(replies, 0.2, likelihoods - 0.2)).gap_closed.nll
    assert beyond.value == pytest.approx(1.2), "training on a text can expect it more than who wrote it"


def test_where_the_student_expects_the_text_more_than_the_teacher_there_is_no_gap_of_it(replies: list[Example]) -> None:
    found = proof(replies, scores(replies, 0.5, teacher_nll(replies) - 0.1), scores(replies, 0.2, 0.1))
    assert found.gap_closed.nll is None
    assert found.gap_closed.kl is not None


def test_the_gap_of_answers_is_counted_in_answers(replies: list[Example]) -> None:
    answers = {"student": right(2, 10), "adapted": right(6, 10), "teacher": right(10, 10)}
    found = proof(replies, scores(replies, 0.5), scores(replies, 0.2), answers=answers)
    assert found.gap_closed.exact_match.value == pytest.approx(0.5)
    assert found.adapted.exact_match == share_estimate(right(6, 10))
    assert found.teacher.exact_match == share_estimate(right(10, 10))


@pytest.mark.parametrize("teacher", [right(2, 10), right(1, 10), None], ids=["no better", "worse", "unknown"])
def test_without_better_answers_of_the_teacher_there_is_no_gap_of_them(
    teacher: np.ndarray | None, replies: list[Example]
) -> None:
    answers = {"student": right(2, 10), "adapted": right(6, 10)}
    answers |= {} if teacher is None else {"teacher": teacher}
    found = proof(replies, scores(replies, 0.5), scores(replies, 0.2), answers=answers)
    assert found.gap_closed.exact_match is None
    assert found.adapted.exact_match.value == 0.6


def test_the_control_has_a_gap_of_its_own() -> None:
    found = usual_proof(control=True, tasks=8)
    assert found.control_gap_closed.kl.value == pytest.approx(0.4, abs=0.01)
    assert found.control_gap_closed.exact_match.value == pytest.approx(0.25)
    alone = usual_proof()
    assert (alone.control, alone.control_gap_closed, alone.against_control) == (None, None, None)


# Against the control


def test_a_lead_on_the_control_is_a_difference_of_pairs(replies: list[Example]) -> None:
    hard = uneven(replies, 1.0, 3, spread=0.5)
    found = proof(
        replies,
        scores(replies, 2 * hard, 3.0, 1),
        scores(replies, hard, 1.0, 0),
        scores(replies, hard + 0.05, 1.2, by_example(replies, [1] + [0] * 11)),
        {"student": right(0, 8), "adapted": right(6, 8), "control": right(4, 8), "teacher": right(8, 8)},
    )
    ahead = found.against_control
    assert ahead.kl.by.value == pytest.approx(0.05)
    assert (ahead.kl.by.low, ahead.kl.by.high) == (pytest.approx(0.05), pytest.approx(0.05)), "though prompts differ"
    assert ahead.kl.sureness == 1.0
    assert ahead.nll.by.value == pytest.approx(0.2)
    assert ahead.top1_agreement.by.value == pytest.approx(1 / 12)
    assert ahead.exact_match.by.value == pytest.approx(0.25)
    assert found.adapted.kl.high > found.control.kl.low, "side by side their intervals say nothing"


def test_an_adapter_behind_its_control_has_a_lead_below_zero(replies: list[Example]) -> None:
    found = proof(replies, scores(replies, 1.0), scores(replies, 0.5, 2.0, 1), scores(replies, 0.2, 1.0, 0))
    for lead in (found.against_control.kl, found.against_control.nll, found.against_control.top1_agreement):
        assert lead.by.value < 0
        assert lead.sureness == 0.0
    assert found.against_control.exact_match is None


# What is kept, and what it takes


def test_retention_is_the_share_of_the_teachers(replies: list[Example]) -> None:
    likelihoods = teacher_nll(replies)
    answers = {"student": right(0, 10), "adapted": right(6, 10), "teacher": right(8, 10)}
    found = proof(replies, scores(replies, 0.5), scores(replies, 0.2, likelihoods + 0.3), answers=answers).retention
    assert found.likelihood.value == pytest.approx(np.exp(-0.3))
    assert found.exact_match.value == pytest.approx(0.75)


def test_of_a_teacher_that_answers_nothing_right_no_answers_are_kept(replies: list[Example]) -> None:
    answers = {"student": right(0, 10), "adapted": right(6, 10), "teacher": right(0, 10)}
    found = proof(replies, scores(replies, 0.5), scores(replies, 0.2), answers=answers).retention
    assert found.exact_match is None


def test_the_footprint_is_that_of_student_and_adapter_beside_the_teacher() -> None:
    found = usual_proof()
    assert (found.footprint.adapter_parameters, found.footprint.adapter_bytes) == (100, 400)
    assert found.footprint.parameter_ratio == pytest.approx(20_000 / 1100)
    assert found.footprint.byte_ratio == pytest.approx(80_000 / 4400)
    assert found.footprint.speed_up == pytest.approx(4.0)
    for model, size in ((found.student, STUDENT), (found.adapted, ADAPTED), (found.teacher, TEACHER)):
        assert (model.parameters, model.bytes, model.tokens_per_second) == (
            size.parameters,
            size.bytes,
            size.tokens_per_second,
        )


@pytest.mark.parametrize(
    ("teacher", "known"), [(ModelSize(), set()), (ModelSize(20_000, 80_000), {"parameter_ratio", "byte_ratio"})]
)
def test_what_is_not_known_of_the_teacher_is_compared_with_nothing(
    teacher: ModelSize, known: set[str], replies: list[Example]
) -> None:
    found = proof(replies, scores(replies, 0.5), scores(replies, 0.2), teacher=teacher).footprint
    for name in ("parameter_ratio", "byte_ratio", "speed_up"):
        assert (getattr(found, name) is not None) is (name in known), name
    assert found.adapter_parameters == 100


# Places, prompts, samples


def test_places_are_compared_stretch_by_stretch() -> None:
    of = [example("abcdefghi"), *examples(5, length=2)]
    place = scores(of, 1.0).position
    found = proof(of, scores(of, 1.0 + place), scores(of, 0.1 * place), scores(of, 0.5)).by_position
    assert [(part.start, part.stop, part.tokens) for part in found] == [
        (0, 1, 6),
        (1, 2, 6),
        (2, 4, 2),
        (4, 8, 4),
        (8, 16, 1),
    ]
    assert [part.student for part in found] == pytest.approx([1.0, 2.0, 3.5, 6.5, 9.0])
    assert [part.adapted for part in found] == pytest.approx([0.0, 0.1, 0.25, 0.55, 0.8])
    assert [part.control for part in found] == pytest.approx([0.5] * 5)
    assert all(part.control is None for part in usual_proof().by_position)


def test_prompts_add_up_to_the_whole() -> None:
    found = usual_proof(control=True, tasks=8)
    by_prompt, tokens = found.prompts, sum(found.prompts.tokens)
    assert tokens == found.tokens
    assert by_prompt.where == tuple(f"prompts.jsonl:{at}" for at in range(1, 13))
    for model in ("student", "adapted", "control"):
        standing = getattr(found, model)
        assert sum(by_prompt.kl[model]) / tokens == pytest.approx(standing.kl.value)
        assert sum(by_prompt.nll[model]) / tokens == pytest.approx(standing.nll.value)
        assert sum(by_prompt.agreed[model]) / tokens == pytest.approx(standing.top1_agreement.value)
        assert np.mean(by_prompt.right[model]) == standing.exact_match.value
    assert sum(by_prompt.nll["teacher"]) / tokens == pytest.approx(found.teacher.nll.value)
    assert by_prompt.right["teacher"] == (True,) * 8


def test_the_best_samples_gained_most_and_the_worst_have_most_left(replies: list[Example]) -> None:
    before = by_example(replies, [1.0, 1.0, 1.0, 1.0, 5.0, 4.0, 3.0, 9.0, 1.0, 1.0, 1.0, 1.0])
    after = by_example(replies, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 8.9, 1.2, 1.1, 0.9, 0.9])
    found = proof(replies, scores(replies, before), scores(replies, after)).samples
    assert [(one.kind, one.where.rpartition(":")[2]) for one in found] == [
        ("best", "5"),
        ("best", "6"),
        ("best", "7"),
        ("worst", "8"),
        ("worst", "9"),
        ("worst", "10"),
    ]


def test_samples_are_ranked_by_token_not_by_length() -> None:
    of = [example("a" * 40), *[example("b" * 4) for _ in range(6)]]
    before, after = by_example(of, [0.5, *[2.0] * 6]), by_example(of, [0.3, *[1.0] * 6])
    found = proof(of, scores(of, before), scores(of, after)).samples
    assert {one.pieces[0] for one in found} == {"b"}


def test_what_gained_nothing_is_no_best_sample(replies: list[Example]) -> None:
    found = proof(replies, scores(replies, 0.5), scores(replies, 0.6)).samples
    assert [one.kind for one in found] == ["worst"] * 3


def test_of_few_replies_each_is_shown_once() -> None:
    of = examples(4)
    found = proof(of, scores(of, 0.5), scores(of, 0.2)).samples
    assert len(found) == len({one.where for one in found}) == 4


def test_a_sample_has_the_kl_of_each_token_before_and_after(replies: list[Example]) -> None:
    before, after = np.linspace(0.5, 1.0, 72), np.linspace(0.1, 0.4, 72)
    found = proof(replies, scores(replies, before), scores(replies, after)).samples
    for one in found:
        at = int(one.where.rpartition(":")[2]) - 1
        assert one.student == pytest.approx(before[6 * at : 6 * at + 6], abs=1e-4)
        assert one.adapted == pytest.approx(after[6 * at : 6 * at + 6], abs=1e-4)
        assert "".join(one.pieces) == LETTERS.decode(replies[at].response)
        assert one.prompt == f"say {''.join(one.pieces)}"


def test_a_token_whose_target_is_not_kept_has_no_kl() -> None:
    of = [example("abcdef", kept=[1, 4])]
    [found] = proof(of, scores(of, [0.5, 0.7]), scores(of, [0.1, 0.2])).samples
    assert found.pieces == tuple("abcdef")
    assert found.student == (None, 0.5, None, None, 0.7, None)
    assert found.adapted == (None, 0.1, None, None, 0.2, None)


def test_a_long_reply_is_shown_in_its_beginning_and_a_long_prompt_in_its_end() -> None:
    of = [example("a" * 800)]
    [found] = proof(of, scores(of, 0.5), scores(of, 0.1)).samples
    assert 100 <= len(found.pieces) == len(found.student) == len(found.adapted) < 800
    assert 400 <= len(found.prompt) < 800
    assert found.prompt.endswith("a")


@pytest.mark.parametrize("text", ["the cat sat on the mat", "naïve – 猫 🙂!", " the cat"])
def test_the_pieces_of_a_sample_join_to_the_reply_in_any_script(text: str, student: LanguageModel) -> None:
    ids = student.tokenizer.encode(text)
    of = [example("x" * len(ids))]
    of = [Example(of[0].prompt, np.array(ids, dtype=np.int32), of[0].targets, of[0].kept, of[0].weights, "here:1")]
    [found] = pick_samples(of, scores(of, 0.5), scores(of, 0.1), student.tokenizer)
    assert "".join(found.pieces) == text
    assert len(found.pieces) == len(ids)


# The verdict


def verdict_of(
    of: Sequence[Example],
    before: Any,
    after: Any,
    control: Any = None,
    answers: Mapping[str, np.ndarray] | None = None,
) -> tuple[str, str | None, str]:
    beside = None if control is None else scores(of, control)
    found = proof(of, scores(of, before), scores(of, after), beside, dict(answers or {})).verdict
    return found.outcome, found.against_control, found.sentence


def test_a_gap_surely_closed_has_helped(replies: list[Example]) -> None:
    outcome, place, sentence = verdict_of(replies, uneven(replies, 0.5, 1), uneven(replies, 0.2, 2))
    assert (outcome, place) == ("helped", None)
    assert sentence.startswith("cats: distillation helped: the adapter closes 60% (")
    assert sentence.endswith("of the KL to the teacher.")


def test_a_gap_surely_widened_has_hurt(replies: list[Example]) -> None:
    outcome, _, sentence = verdict_of(replies, uneven(replies, 0.5, 1), uneven(replies, 0.7, 2, spread=0.05))
    assert outcome == "hurt"
    assert "distillation hurt" in sentence


def test_a_change_that_may_be_chance_is_unclear(replies: list[Example]) -> None:
    after = uneven(replies, 0.5, 1) + by_example(replies, [0.2, -0.21] * 6)
    outcome, _, sentence = verdict_of(replies, uneven(replies, 0.5, 1), after)
    assert outcome == "unclear"
    assert "from chance" in sentence


@pytest.mark.parametrize("count", [1, 4])
def test_a_handful_of_prompts_is_unclear_whatever_they_show(count: int) -> None:
    of = examples(count)
    outcome, _, sentence = verdict_of(of, 0.5, 0.01)
    assert outcome == "unclear"
    assert "too few held-out prompts" in sentence
    assert "98%" in sentence


def test_a_gap_that_some_draws_do_not_have_is_not_laid_to_a_lack_of_prompts() -> None:
    """A student so near that, by the noise of sampled targets, some draws of the prompts find it nearer than near."""
    of = examples(30)
    before = uneven(of, 0.012, spread=3.0)
    found = proof(of, scores(of, before), scores(of, before / 2))
    assert found.student.kl.low > 0
    assert "too few held-out prompts" not in found.verdict.sentence


def test_no_share_is_told_as_less_than_nothing_where_it_is_nothing(replies: list[Example]) -> None:
    _, _, sentence = verdict_of(replies, 0.5, 0.5001)
    assert "-0%" not in sentence


def answers_of(student: int, adapted: int, teacher: int = 20) -> dict[str, np.ndarray]:
    return {"student": right(student, 20), "adapted": right(adapted, 20), "teacher": right(teacher, 20)}


def test_nearer_but_with_surely_fewer_right_answers_is_mixed(replies: list[Example]) -> None:
    outcome, _, sentence = verdict_of(replies, 0.5, 0.2, answers=answers_of(18, 5))
    assert outcome == "mixed"
    assert "answers 25% of the tasks right, before 90% (the teacher 100%)" in sentence


@pytest.mark.parametrize("adapted", [17, 18, 20])
def test_nearer_and_with_about_as_many_right_answers_has_helped(adapted: int, replies: list[Example]) -> None:
    assert verdict_of(replies, 0.5, 0.2, answers=answers_of(18, adapted))[0] == "helped"


@pytest.mark.parametrize("before", [0.0, 0.9 * SAME_KL, -0.001])
@pytest.mark.parametrize("after", [0.0, 0.5])
def test_where_student_and_teacher_were_the_same_there_was_nothing_to_learn(
    before: float, after: float, replies: list[Example]
) -> None:
    outcome, place, sentence = verdict_of(replies, before, after, control=0.1)
    assert (outcome, place) == ("nothing to learn", None)
    assert f"KL {before:.4f} nats" in sentence


@pytest.mark.parametrize(("control", "expected"), [(0.3, "ahead"), (0.1, "behind")])
def test_a_sure_difference_to_the_control_has_a_side(control: float, expected: str, replies: list[Example]) -> None:
    beside = uneven(replies, control, 3, spread=0.05)
    outcome, place, sentence = verdict_of(replies, 0.5, uneven(replies, 0.2, 2, spread=0.05), beside)
    assert (outcome, place) == ("helped", expected)
    assert f"distillation is {expected} by 0.100 nats per token (0.0" in sentence
    span = sentence.rpartition("(")[2].partition(")")[0]
    low, high = (float(end) for end in span.split(" to "))
    assert 0 < low < 0.1 < high


def test_a_difference_to_the_control_that_may_be_chance_is_level(replies: list[Example]) -> None:
    beside = by_example(replies, [0.1, 0.301] * 6)
    outcome, place, sentence = verdict_of(replies, 0.5, 0.2, beside)
    assert (outcome, place) == ("helped", "level")
    assert sentence.endswith("no difference can be told from chance.")


def test_of_a_handful_of_prompts_no_side_is_taken() -> None:
    assert verdict_of(examples(3), 0.5, 0.1, control=0.4)[1] == "level"


def test_the_sentence_is_one_line_and_names_the_domain() -> None:
    for control in (False, True):
        sentence = usual_proof("dogs", control, tasks=8).verdict.sentence
        assert sentence.startswith("dogs: ")
        assert "\n" not in sentence


# On disk


def without_answers(of: Sequence[Example]) -> Proof:
    return proof(of, scores(of, 0.0), scores(of, 0.0), scores(of, 0.0))


PROOFS: dict[str, Any] = {
    "usual": usual_proof,
    "with all there is": lambda: usual_proof(control=True, tasks=8),
    "without a gap": lambda: without_answers(examples(6)),
    "of one prompt": lambda: without_answers(examples(1)),
    "of an unlikely text": lambda: proof(
        examples(6), scores(examples(6), 900.0, nll=1e4), scores(examples(6), 900.0, nll=1e4)
    ),
    "of no right answers": lambda: proof(
        examples(6),
        scores(examples(6), 0.5),
        scores(examples(6), 0.2),
        scores(examples(6), 0.2),
        {name: right(0, 3) for name in ("student", "adapted", "control", "teacher")},
    ),
    "of a part of the tokens": lambda: proof(
        [example("abcdef", kept=[1, 4])], partly(0.5), partly(0.1), teacher=ModelSize()
    ),
}


def partly(kl: float) -> TokenScores:
    return scores([example("abcdef", kept=[1, 4])], kl)


@pytest.mark.parametrize("make", PROOFS.values(), ids=PROOFS.keys())
def test_a_proof_is_json_without_a_number_that_is_none(make: Any) -> None:
    json.dumps(asdict(make()), allow_nan=False)


@pytest.mark.parametrize("make", PROOFS.values(), ids=PROOFS.keys())
def test_a_proof_is_read_back_as_it_was(make: Any) -> None:
    written = make()
    assert TypeAdapter(Proof).validate_python(json.loads(json.dumps(asdict(written)))) == written


def test_the_same_scores_are_the_same_proof() -> None:
    assert usual_proof(control=True, tasks=8) == usual_proof(control=True, tasks=8)
