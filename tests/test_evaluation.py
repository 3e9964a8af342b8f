"""The metrics are what a dense computation gives, and a right answer counts as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from textbook import CASES

from true_kd.cache import TargetCache
from true_kd.capture import CaptureOptions, capture, render_for, teacher_identity
from true_kd.evaluation import EvaluationOptions, evaluate, exact_match, extract_answer, measure, right_answers
from true_kd.examples import Example, make_example
from true_kd.losses import LossOptions, Objective
from true_kd.models import LanguageModel, ModelOptions, SamplingOptions, generate_replies, load_head, open_model
from true_kd.prompts import from_records, from_strings
from true_kd.targets import TargetOptions, TargetSettings, TeacherHead

LOSSES = LossOptions()
FINAL = LOSSES.final
EVALUATION = EvaluationOptions()
SAMPLING = SamplingOptions(max_tokens=8, batch_size=4)
ASKED = [
    *from_strings([f"say hello to {name}" for name in ("the cat", "the mat on the mat", "the world", "said")]),
    *from_records([{"prompt": "where?", "completion": "the cat sat on the mat"}, {"text": "the cat sat and said"}]),
]


WHOLE = TargetSettings("sparse", 1e-30, 2.0, 1.0)
"""Every id is kept exactly."""


@pytest.fixture(
    params=[
        WHOLE,
        TargetOptions(preset="exact").settings,
    ],
    ids=["entries", "hidden states"],
)
def examples(request: pytest.FixtureRequest, teacher: LanguageModel, tmp_path: Path) -> list[Example]:
    """What the teacher says to some prompts, with the whole of its distribution."""
    return captured(teacher, request.param, tmp_path)


def captured(teacher: LanguageModel, settings: TargetSettings, tmp_path: Path) -> list[Example]:
    options = CaptureOptions(max_tokens=6)
    cache = TargetCache(tmp_path / "targets", teacher_identity(teacher, settings))
    asked = render_for(teacher, ASKED, options)
    list(capture(teacher, asked, cache, options, settings))
    head = TeacherHead(load_head(cache.head_path)) if cache.head_path else None
    replies = cache.read([prompt.key for prompt in asked], head)
    made = [
        make_example(prompt.rendered.prompt, reply.tokens, reply.targets, reply.kept, prompt.key, 100)
        for prompt in asked
        for reply in [replies[prompt.key]]
    ]
    return [example for example in made if example is not None]


def dense_logprobs(model: LanguageModel, example: Example, temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities at the tokens of one example that count, float64."""
    logits = np.array(model.module(mx.array(example.tokens)[None])[0, example.rows.tolist()]).astype(np.float64)
    logits /= temperature
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def dense_kl(teacher: LanguageModel, student: LanguageModel, examples: Sequence[Example], temperature: float) -> float:
    total, tokens = 0.0, 0
    for example in examples:
        one, other = (dense_logprobs(model, example, temperature) for model in (teacher, student))
        total += float((np.exp(one) * (one - other)).sum())
        tokens += len(one)
    return total / tokens


def test_a_teacher_agrees_with_itself(teacher: LanguageModel, examples: list[Example]) -> None:
    metrics = evaluate(teacher.module, examples, FINAL, batch_size=2)
    assert abs(metrics.kl) < 2e-3, "log-probabilities of eight bits, hidden states of sixteen"
    assert abs(metrics.kd) < 8e-3, "four times that"
    assert metrics.top1_agreement == 1.0


def test_a_teacher_agrees_with_itself_on_sparse_targets(teacher: LanguageModel, tmp_path: Path) -> None:
    sparse = captured(teacher, TargetOptions().settings, tmp_path)
    entries = [np.diff(example.targets.offsets) for example in sparse]
    assert len(set(np.concatenate(entries).tolist())) > 1, "rows of one length show no padding"
    metrics = evaluate(teacher.module, sparse, FINAL, batch_size=3)
    assert metrics.top1_agreement == 1.0
    assert abs(metrics.kl) < 5e-3, "log-probabilities of drawn ids have six bits"


def test_divergences_are_those_of_the_dense_distributions(
    teacher: LanguageModel, student: LanguageModel, examples: list[Example]
) -> None:
    metrics = evaluate(student.module, examples, FINAL, batch_size=2)
    assert metrics.kl == pytest.approx(dense_kl(teacher, student, examples, 1.0), rel=2e-3)
    expected = LOSSES.temperature**2 * dense_kl(teacher, student, examples, LOSSES.temperature)
    assert metrics.kd == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_any_divergence_is_that_of_the_dense_distributions_and_the_kl_beside_it_stays(
    temperature: float, teacher: LanguageModel, student: LanguageModel, examples: list[Example]
) -> None:
    dense = [[dense_logprobs(model, example) for model in (teacher, student)] for example in examples]
    kl = dense_kl(teacher, student, examples, 1.0)
    for name, case in CASES.items():
        metrics = evaluate(student.module, examples, Objective(case.divergence, temperature, 0.4, None), batch_size=6)
        expected = np.concatenate([case.between(*pair, temperature) for pair in dense]).mean()
        assert metrics.kd == pytest.approx(expected, rel=5e-3), name
        assert metrics.kl == pytest.approx(kl, rel=2e-3), name
        assert metrics.loss == pytest.approx(0.4 * metrics.kd + 0.6 * metrics.ce), name


def test_held_out_tokens_all_weigh_the_same(student: LanguageModel, examples: list[Example]) -> None:
    weighed = [replace(example, weights=5.0 * example.weights) for example in examples]
    assert evaluate(student.module, weighed, FINAL, 2) == evaluate(student.module, examples, FINAL, 2)


def test_cross_entropy_is_that_of_the_teachers_text(student: LanguageModel, examples: list[Example]) -> None:
    metrics = evaluate(student.module, examples, FINAL, batch_size=2)
    scores = np.concatenate(
        [dense_logprobs(student, example)[np.arange(len(example.kept)), example.labels] for example in examples]
    )
    assert metrics.tokens == len(scores)
    assert metrics.ce == pytest.approx(-scores.mean(), rel=1e-4)


def test_of_replies_that_are_kept_in_part_only_the_tokens_that_count_are_measured(
    teacher: LanguageModel, student: LanguageModel, tmp_path: Path
) -> None:
    examples = captured(teacher, replace(WHOLE, share=0.4), tmp_path)
    assert all(len(example.targets) == len(example.kept) for example in examples)
    assert sum(len(example.kept) for example in examples) < sum(len(example.response) for example in examples)
    metrics = evaluate(student.module, examples, FINAL, batch_size=2)
    scores = np.concatenate(
        [dense_logprobs(student, example)[np.arange(len(example.kept)), example.labels] for example in examples]
    )
    assert metrics.tokens == len(scores)
    assert metrics.ce == pytest.approx(-scores.mean(), rel=1e-4)
    assert metrics.kl == pytest.approx(dense_kl(teacher, student, examples, 1.0), rel=2e-3)


@pytest.mark.parametrize("preset", ["tiny", "default", "hot"])
def test_a_preset_measures_nearly_what_the_dense_distributions_say(
    teacher: LanguageModel, student: LanguageModel, tmp_path: Path, preset: str
) -> None:
    sparse = captured(teacher, TargetOptions(preset=preset).settings, tmp_path)
    metrics = evaluate(student.module, sparse, FINAL, batch_size=2)
    assert metrics.kl == pytest.approx(dense_kl(teacher, student, sparse, 1.0), rel=0.1)


def test_agreement_is_the_share_of_equal_favourites(
    teacher: LanguageModel, teacher_folder: Path, examples: list[Example]
) -> None:
    near = open_model(ModelOptions(model=str(teacher_folder)), "student")
    weight = near.module.model.norm.weight
    near.module.model.norm.weight = weight + 0.5 * mx.random.normal(weight.shape, key=mx.random.key(1))
    favourites = np.concatenate(
        [
            dense_logprobs(teacher, example).argmax(axis=-1) == dense_logprobs(near, example).argmax(axis=-1)
            for example in examples
        ]
    )
    assert 0 < favourites.mean() < 1, "this change of the teacher no longer changes some favourites and leaves others"
    assert evaluate(near.module, examples, FINAL, batch_size=3).top1_agreement == pytest.approx(favourites.mean())


def test_the_loss_is_the_objective(student: LanguageModel, examples: list[Example]) -> None:
    metrics = evaluate(student.module, examples, LossOptions(alpha=0.25).final, batch_size=2)
    assert metrics.loss == pytest.approx(0.25 * metrics.kd + 0.75 * metrics.ce)


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 256), (4, 16), (100, 16), (100, 1000)])
def test_grouping_does_not_change_the_metrics(
    student: LanguageModel, examples: list[Example], batch_size: int, chunk: int
) -> None:
    expected = evaluate(student.module, examples, FINAL, batch_size=2)
    found = evaluate(student.module, list(reversed(examples)), LossOptions(chunk=chunk).final, batch_size)
    assert found.tokens == expected.tokens
    for name in ("loss", "kd", "ce", "kl", "top1_agreement"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4), name


def test_evaluation_switches_dropout_off(student: LanguageModel, examples: list[Example]) -> None:
    student.module.train()
    evaluate(student.module, examples[:1], FINAL, batch_size=1)
    assert not student.module.training


# Token by token


PARTLY = replace(WHOLE, share=0.4)
"""Every id of some tokens."""


@pytest.mark.parametrize(
    "settings", [WHOLE, PARTLY, TargetOptions(preset="exact").settings], ids=lambda value: value.kind
)
def test_each_token_is_scored_as_the_dense_distributions_say(
    settings: TargetSettings, teacher: LanguageModel, student: LanguageModel, tmp_path: Path
) -> None:
    examples = captured(teacher, settings, tmp_path)
    assert len({len(example) for example in examples}) > 2, "examples of one length are measured in their order"
    scores = measure(student.module, examples, FINAL, batch_size=2)
    ours, theirs = (
        np.concatenate([dense_logprobs(model, example) for example in examples]) for model in (student, teacher)
    )
    labels = np.concatenate([example.labels for example in examples])
    favourite = np.take_along_axis(ours, theirs.argmax(axis=-1)[:, None], axis=-1)
    assert scores.nll == pytest.approx(-ours[np.arange(len(labels)), labels], rel=1e-3)
    assert scores.kl == pytest.approx((np.exp(theirs) * (theirs - ours)).sum(axis=-1), rel=0.03, abs=2e-3)
    assert scores.rank.tolist() == (ours > favourite).sum(axis=-1).tolist()
    assert scores.rank.max() > 5, "this student no longer misses by much"


def test_scores_know_their_example_and_their_place_in_the_response(
    teacher: LanguageModel, student: LanguageModel, tmp_path: Path
) -> None:
    examples = captured(teacher, PARTLY, tmp_path)
    scores = measure(student.module, examples, FINAL, batch_size=4)
    for at, example in enumerate(examples):
        assert scores.position[scores.example == at].tolist() == example.kept.tolist()
    assert np.all(np.diff(scores.example) >= 0)


def test_scores_do_not_depend_on_how_examples_are_grouped(student: LanguageModel, examples: list[Example]) -> None:
    one, other = (measure(student.module, examples, FINAL, batch_size) for batch_size in (1, 4))
    for name in ("kd", "nll", "kl"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-3, abs=1e-4), name
    for name in ("rank", "example", "position"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_the_metrics_are_the_means_of_the_scores(student: LanguageModel, examples: list[Example]) -> None:
    scores = measure(student.module, examples, FINAL, batch_size=2)
    metrics = evaluate(student.module, examples, FINAL, batch_size=2)
    assert scores.metrics(FINAL) == metrics
    assert (metrics.kd, metrics.ce, metrics.kl) == (scores.kd.mean(), scores.nll.mean(), scores.kl.mean())
    assert metrics.top1_agreement == np.mean(scores.rank == 0)
    assert metrics.tokens == len(scores.kl) == sum(len(example.kept) for example in examples)


def test_sums_are_over_the_tokens_of_each_example(student: LanguageModel, examples: list[Example]) -> None:
    scores = measure(student.module, examples, FINAL, batch_size=2)
    assert scores.sums(np.ones(len(scores.kl))).tolist() == [len(example.kept) for example in examples]
    alone = [measure(student.module, [example], FINAL, batch_size=1).kl.sum() for example in examples]
    assert scores.sums(scores.kl) == pytest.approx(alone, rel=1e-3)


def test_the_teacher_is_the_first_of_its_own_favourites(teacher: LanguageModel, examples: list[Example]) -> None:
    assert not measure(teacher.module, examples, FINAL, batch_size=2).rank.any()


# Answers


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Two and two.\nanswer: 4", "4"),
        ("answer:4", "4"),
        ("answer: 3, no: answer:  4 ", "4"),
        ("answer: the  cat\n\tsat ", "the cat sat"),
        ("4", "4"),
        ("  the   cat ", "the cat"),
        ("answer:", ""),
        ("", ""),
        ("Answer: 4", "Answer: 4"),
    ],
)
def test_the_answer_is_what_follows_the_last_marker(reply: str, answer: str) -> None:
    assert extract_answer(reply, EVALUATION) == answer


def test_the_marker_can_be_another(teacher: LanguageModel) -> None:
    assert extract_answer("so #### 4", EvaluationOptions(answer_marker="####")) == "4"


def written(model: LanguageModel, prompts: list) -> list[str]:
    """What the model writes to each prompt, taking the most likely token."""
    greedy = SAMPLING.model_copy(update={"sampling_temperature": 0.0})
    asked = [prompt.rendered.prompt for prompt in render_for(model, prompts, CaptureOptions())]
    *_, (_, replies) = generate_replies(model, asked, greedy, [0] * len(asked))
    return [model.tokenizer.decode([token for token in reply.tokens if token != 1]) for reply in replies]


def test_exact_match_counts_what_the_model_itself_writes(student: LanguageModel) -> None:
    prompts = from_strings(["where is the cat", "where is the mat", "hello", "said"])
    answers = [" ".join(text.split()) for text in written(student, prompts)]
    assert all(answers), "these prompts no longer bring replies to compare"
    half = from_records(
        [
            {"prompt": prompt.messages[0]["content"], "answer": answer if index % 2 else "something else"}
            for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
    )
    assert exact_match(student, half, SAMPLING, EVALUATION).tolist() == [False, True, False, True]
    assert exact_match(student, half[1:2], SAMPLING, EVALUATION).tolist() == [True]
    assert exact_match(student, half[:1], SAMPLING, EVALUATION).tolist() == [False]


def test_a_given_completion_does_not_help_the_model(student: LanguageModel) -> None:
    prompts = from_records([{"prompt": "2 + 2", "completion": "answer: 4", "answer": "4"}])
    assert exact_match(student, prompts, SAMPLING, EVALUATION).tolist() == [False]


def test_replies_are_scored_without_their_stop_token(student: LanguageModel) -> None:
    prompts = from_records([{"prompt": "2 + 2", "answer": "4"}, {"prompt": "2 + 3", "answer": "5"}])
    replies = [[*student.tokenizer.encode("well, answer: 4"), 1], student.tokenizer.encode("answer: 4")]
    found = right_answers(prompts, replies, student, EVALUATION)
    assert found.dtype == bool
    assert found.tolist() == [True, False]


def test_white_space_in_the_expected_answer_does_not_count(student: LanguageModel) -> None:
    prompts = from_records([{"prompt": "who sat", "answer": " the  cat\n"}])
    replies = [student.tokenizer.encode("answer: the cat")]
    assert right_answers(prompts, replies, student, EVALUATION).tolist() == [True]
