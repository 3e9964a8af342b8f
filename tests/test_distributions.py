"""Every form of the teacher gives the losses of the dense definition: exactly, or over many draws on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from textbook import CASES, SAMPLED, Case, kl, log_softmax, slope, softmax

from true_kd.batching import collate
from true_kd.examples import Example
from true_kd.losses import (
    BatchTargets,
    HeadTargets,
    Objective,
    RankedTargets,
    Softened,
    TokenTargets,
    head_losses,
    token_losses,
)
from true_kd.losses.divergences import ForwardKL, ReverseKL
from true_kd.targets import TargetSettings, TeacherHead, encode

VOCAB = 24
ROWS = 6
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_sampled = pytest.mark.parametrize("case", SAMPLED.values(), ids=SAMPLED.keys())
# 1 and 2 have shortcuts of their own.
every_temperature = pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.7])


def draw_logits(seed: int, *shape: int, scale: float = 2.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def draw_labels(seed: int, rows: int, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, rows).astype(np.int32)


def covering(teacher: np.ndarray, temperature: float) -> TokenTargets:
    """Targets with an exact entry for every id."""
    logprobs = log_softmax(teacher, temperature).astype(np.float32)
    ids = np.broadcast_to(np.arange(teacher.shape[-1], dtype=np.int32), teacher.shape)
    return TokenTargets(
        mx.array(ids), mx.array(np.exp(logprobs)), mx.array(logprobs), mx.ones(teacher.shape, dtype=mx.bool_)
    )


def by_head(teacher: np.ndarray, temperature: float) -> HeadTargets:
    """Targets whose hidden states are the logits."""
    return HeadTargets(mx.array(teacher), TeacherHead(lambda states: states), temperature)


FORMS = {"entries": covering, "hidden states": by_head}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def measured(student: np.ndarray, targets: BatchTargets, case: Case, temperature: float) -> np.ndarray:
    """T^2 times the divergence of each token."""
    objective = Objective(case.divergence, temperature, 1.0, None)
    labels = mx.zeros(len(student), dtype=mx.int32)
    return np.array(token_losses(mx.array(student), labels, targets, objective)[0], dtype=np.float64)


def gradient_at(student: np.ndarray, targets: BatchTargets, case: Case, temperature: float) -> np.ndarray:
    """Derivative of T^2 times the divergence with respect to the student's logits."""
    objective = Objective(case.divergence, temperature, 1.0, 512)
    labels, weights = mx.zeros(len(student), dtype=mx.int32), mx.ones(len(student))
    _, found, _ = head_losses(lambda states: states, mx.array(student), labels, targets, weights, objective)
    return np.array(found, dtype=np.float64)


def dense_gradient(teacher: np.ndarray, student: np.ndarray, case: Case, temperature: float) -> np.ndarray:
    """The derivative of the definition, by finite differences in float64."""
    return slope(lambda logits: case.between(teacher, logits, temperature).sum(), student)


# The student --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.7, 10.0])
def test_the_student_is_softened_by_the_temperature_and_is_also_there_as_it_is(temperature: float) -> None:
    logits = draw_logits(1, ROWS, VOCAB, scale=9.0)
    both = Softened.both(mx.array(logits), temperature)
    for found, at in zip(both, (temperature, 1.0), strict=True):
        np.testing.assert_allclose(np.array(found.logprobs), log_softmax(logits, at), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.array(found.powers / found.sums), softmax(logits, at), rtol=1e-4, atol=1e-7)
        ids = draw_labels(2, ROWS)[:, None]
        expected = np.take_along_axis(log_softmax(logits, at), ids, axis=-1)
        np.testing.assert_allclose(np.array(found.logprobs_at(mx.array(ids))), expected, rtol=1e-5, atol=1e-5)


# The whole vocabulary -----------------------------------------------------------------------------------------------


@every_form
@every_temperature
@every_case
def test_over_the_whole_vocabulary_the_value_is_the_definition(case: Case, temperature: float, form) -> None:
    teacher, student = draw_logits(1, ROWS, VOCAB), draw_logits(2, ROWS, VOCAB)
    found = measured(student, form(teacher, temperature), case, temperature)
    np.testing.assert_allclose(found, case.between(teacher, student, temperature), rtol=1e-4, atol=1e-5)


@every_form
@every_temperature
@every_case
def test_over_the_whole_vocabulary_the_gradient_is_the_slope_of_the_definition(
    case: Case, temperature: float, form
) -> None:
    teacher, student = draw_logits(1, 3, 9), draw_logits(2, 3, 9)
    found = gradient_at(student, form(teacher, temperature), case, temperature)
    expected = dense_gradient(teacher, student, case, temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * max(1.0, np.abs(expected).max()))


@every_form
@every_temperature
@every_case
def test_a_student_that_is_its_teacher_has_neither_loss_nor_gradient(case: Case, temperature: float, form) -> None:
    teacher = draw_logits(1, ROWS, VOCAB)
    targets = form(teacher, temperature)
    np.testing.assert_allclose(measured(teacher, targets, case, temperature), 0.0, atol=1e-5 * max(1, temperature))
    if case.name != "total_variation":  # which has a kink there
        np.testing.assert_allclose(gradient_at(teacher, targets, case, temperature), 0.0, atol=1e-5)


@every_form
@every_case
def test_a_constant_added_to_the_logits_changes_nothing(case: Case, form) -> None:
    teacher, student = draw_logits(1, ROWS, VOCAB), draw_logits(2, ROWS, VOCAB)
    plain, shifted = form(teacher, 2.0), form(teacher - np.float32(64), 2.0)
    for measure in (measured, gradient_at):
        expected = measure(student, plain, case, 2.0)
        found = measure(student + np.float32(32), shifted, case, 2.0)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@every_form
@every_temperature
@every_case
def test_extreme_logits_leave_values_and_gradients_finite(case: Case, temperature: float, form) -> None:
    teacher, student = draw_logits(1, ROWS, VOCAB, scale=1e4), draw_logits(2, ROWS, VOCAB, scale=1e4)
    targets = form(teacher, temperature)
    assert np.isfinite(measured(student, targets, case, temperature)).all()
    assert np.isfinite(gradient_at(student, targets, case, temperature)).all()


@every_temperature
@every_case
def test_ids_that_the_teacher_excludes_leave_values_and_gradients_finite(case: Case, temperature: float) -> None:
    teacher, student = draw_logits(1, ROWS, VOCAB), draw_logits(2, ROWS, VOCAB)
    teacher[:, ::3] = -np.inf
    targets = by_head(teacher, temperature)
    found = measured(student, targets, case, temperature)
    gradient = gradient_at(student, targets, case, temperature)
    assert np.isfinite(gradient).all()
    if case.divergence.sampled:
        expected = case.between(teacher, student, temperature)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        expected = dense_gradient(teacher, student, case, temperature)
        np.testing.assert_allclose(gradient, expected, atol=1e-4 * max(1.0, np.abs(expected).max()))
    else:
        assert np.isfinite(found).all()
        assert (found > 0).all()


@pytest.mark.parametrize(("gap", "expected"), [(79.0, 38.81), (100.0, 42.81)])
def test_reverse_kl_does_not_vanish_where_the_teacher_all_but_excludes_what_the_student_says(
    gap: float, expected: float
) -> None:
    """Below the least probability of float32, exp(-87), it takes the teacher's for that."""
    teacher, student = np.array([[0.0, -gap]], dtype=np.float32), np.zeros((1, 2), dtype=np.float32)
    assert measured(student, by_head(teacher, 1.0), CASES["reverse_kl"], 1.0)[0] == pytest.approx(expected, rel=0.01)


# Entries ------------------------------------------------------------------------------------------------------------


def entries_of(case: Case, temperature: float, seed: int = 1) -> tuple[TokenTargets, np.ndarray]:
    """Sparse targets of some random tokens, and the student's logits there."""
    teacher, student = draw_logits(seed, ROWS, VOCAB), draw_logits(seed + 1, ROWS, VOCAB)
    example = encoded(teacher, draw_labels(seed, ROWS), np.random.default_rng(seed), 0.1, temperature)
    return collate([example], temperature).targets, student


def encoded(
    teacher: np.ndarray, labels: np.ndarray, rng: np.random.Generator, threshold: float, temperature: float
) -> Example:
    """A reply of some tokens with what the cache keeps of them, drawn for the temperature."""
    uniforms = rng.random(len(labels), dtype=np.float32)
    targets = encode(
        mx.array(teacher), mx.array(labels), uniforms, TargetSettings("sparse", threshold, temperature, 1.0)
    )
    kept = np.arange(len(labels), dtype=np.int32)
    return Example(np.array([0], np.int32), labels, targets, kept, np.ones(len(labels), np.float32), "drawn")


def changed(targets: TokenTargets, columns: Sequence[int] | np.ndarray, padding: int) -> TokenTargets:
    """The entries in another order, with entries of no weight after them."""
    arrays = [array[:, mx.array(np.asarray(columns))] for array in targets.arrays]
    empty = [mx.full((array.shape[0], padding), 3).astype(array.dtype) for array in arrays]
    empty[1], empty[2] = mx.zeros(empty[1].shape), mx.full(empty[2].shape, -5.0)
    empty[3] = mx.zeros(empty[3].shape, dtype=mx.bool_)
    return targets.with_arrays([mx.concatenate(pair, axis=-1) for pair in zip(arrays, empty, strict=True)])


@every_case
def test_neither_the_order_of_entries_nor_entries_of_no_weight_change_anything(case: Case) -> None:
    targets, student = entries_of(case, 2.0)
    assert not targets.exact.all()
    columns = np.random.default_rng(0).permutation(targets.ids.shape[1])
    for measure in (measured, gradient_at):
        found = measure(student, changed(targets, columns, 5), case, 2.0)
        np.testing.assert_allclose(found, measure(student, targets, case, 2.0), rtol=1e-4, atol=1e-5)


@every_sampled
def test_an_entry_that_was_drawn_twice_counts_twice(case: Case) -> None:
    student = draw_logits(2, 1, 5)
    twice = TokenTargets(
        mx.array([[3, 1, 1]]),
        mx.array([[0.5, 0.2, 0.3]]),
        mx.array([[-0.7, -1.0, -1.0]]),
        mx.array([[True, False, False]]),
    )
    once = TokenTargets(mx.array([[3, 1]]), mx.array([[0.5, 0.5]]), mx.array([[-0.7, -1.0]]), mx.array([[True, False]]))
    for measure in (measured, gradient_at):
        found, expected = (measure(student, targets, case, 1.0) for targets in (twice, once))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@every_case
def test_the_gradient_of_entries_is_the_derivative_of_their_value(case: Case) -> None:
    targets, student = entries_of(case, 2.0)
    step, found = 1e-2, gradient_at(student, targets, case, 2.0)
    direction = np.random.default_rng(3).normal(size=student.shape).astype(np.float32)
    up, down = (measured(student + sign * step * direction, targets, case, 2.0) for sign in (1, -1))
    np.testing.assert_allclose((found * direction).sum(axis=-1), (up - down) / (2 * step), rtol=5e-3, atol=5e-3)


@every_sampled
def test_an_entry_adds_no_more_to_the_gradient_than_some_times_its_weight(case: Case) -> None:
    """Whatever the student thinks of it: that is what keeps the noise of a sample within bounds."""
    targets, student = entries_of(case, 1.0)
    student = 40 * student
    whole = gradient_at(student, targets, case, 1.0)
    weights = np.array(targets.weights, dtype=np.float64)
    for column in range(weights.shape[1]):
        kept = mx.array(np.arange(weights.shape[1]) != column)
        without = TokenTargets(targets.ids, targets.weights * kept, targets.logprobs, targets.exact)
        added = np.abs(whole - gradient_at(student, without, case, 1.0)).sum(axis=-1)
        assert (added <= 2 * 2.0 * weights[:, column] + 1e-5).all()


# Over many draws ----------------------------------------------------------------------------------------------------


@every_temperature
@every_sampled
def test_averaged_over_all_that_could_be_drawn_a_single_entry_gives_value_and_gradient(
    case: Case, temperature: float
) -> None:
    """One row for each id, weighed by one over the chance of drawing it: their mean by these chances is exact."""
    teacher, student = draw_logits(1, 1, VOCAB), draw_logits(2, 1, VOCAB)
    chance = np.random.default_rng(3).dirichlet(np.ones(VOCAB))
    logprobs = log_softmax(teacher, temperature)[0]
    targets = TokenTargets(
        mx.arange(VOCAB)[:, None],
        mx.array((np.exp(logprobs) / chance).astype(np.float32)[:, None]),
        mx.array(logprobs.astype(np.float32)[:, None]),
        mx.zeros((VOCAB, 1), dtype=mx.bool_),
    )
    students = np.repeat(student, VOCAB, axis=0)
    value = chance @ measured(students, targets, case, temperature)
    gradient = chance @ gradient_at(students, targets, case, temperature)
    assert value == pytest.approx(case.between(teacher, student, temperature)[0], rel=1e-4)
    expected = dense_gradient(teacher, student, case, temperature)[0]
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


TOKENS, WIDE = 2500, 150


@cache
def cached(temperature: float) -> tuple[np.ndarray, np.ndarray, TokenTargets]:
    """Teachers of many tokens whose tail is most of them, students, and what a coarse cache keeps: a draw a token."""
    teacher = draw_logits(1, TOKENS, WIDE, scale=1.2 * temperature)
    student = teacher + draw_logits(2, TOKENS, WIDE, scale=0.7 * temperature)
    example = encoded(teacher, draw_labels(3, TOKENS, WIDE), np.random.default_rng(4), 0.1, temperature)
    assert example.targets.tail_mass(temperature).mean() > 0.7
    return teacher, student, collate([example], temperature).targets


def score(errors: np.ndarray) -> float:
    """Standard errors between the mean of independent errors and zero."""
    return float(errors.mean() / (errors.std() / np.sqrt(len(errors))))


@cache
def dense(case: Case, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Value and gradient of each token from the whole of its teacher."""
    teacher, student, _ = cached(temperature)
    gradient = gradient_at(student, by_head(teacher, temperature), case, temperature)
    return case.between(teacher, student, temperature), gradient


def errors_of(targets: TokenTargets, case: Case, temperature: float) -> dict[str, np.ndarray]:
    """By how much each token's value and gradient miss the dense ones; the gradient along three directions."""
    teacher, student, _ = cached(temperature)
    value, gradient = dense(case, temperature)
    missed = gradient_at(student, targets, case, temperature) - gradient
    directions = {"itself": gradient, "the teacher": teacher, "a random one": draw_logits(5, WIDE)}
    return {
        "value": measured(student, targets, case, temperature) - value,
        **{f"gradient along {name}": (missed * along).sum(axis=-1) for name, along in directions.items()},
    }


def unrounded(temperature: float) -> TokenTargets:
    """The cache's targets with the log-probabilities that were rounded into it."""
    teacher, _, targets = cached(temperature)
    logprobs = np.take_along_axis(log_softmax(teacher, temperature), np.array(targets.ids), axis=-1)
    return replace(targets, logprobs=mx.array(logprobs.astype(np.float32)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@every_sampled
def test_a_coarse_cache_gives_value_and_gradient_without_bias(case: Case, temperature: float) -> None:
    scores = {name: score(errors) for name, errors in errors_of(unrounded(temperature), case, temperature).items()}
    assert max(map(abs, scores.values())) < 4, scores


@every_sampled
def test_the_rounding_of_the_cache_shifts_value_and_gradient_by_little(case: Case) -> None:
    """The kink of total variation feels it most: some 3 % of its gradient at temperature 2, 9 % at 1."""
    value, gradient = dense(case, 2.0)
    whole = {"value": value, "gradient along itself": np.square(gradient).sum(axis=-1)}
    found = errors_of(cached(2.0)[2], case, 2.0)
    for name, each in whole.items():
        noise = 4 * found[name].std() / np.sqrt(TOKENS)
        assert abs(found[name].mean()) < noise + 0.04 * each.mean(), name


@every_sampled
def test_the_exact_ids_alone_would_be_biased(case: Case) -> None:
    """So the test above would see a bias."""
    targets = cached(2.0)[2]
    top = replace(targets, weights=mx.where(targets.exact, targets.weights, 0.0))
    errors = errors_of(top, case, 2.0)
    assert abs(score(errors["value"])) > 15
    assert abs(score(errors["gradient along itself"])) > 15


# What no sample can give --------------------------------------------------------------------------------------------

KNOWN = 5
REVERSE = CASES["reverse_kl"]


def partly_exact(teacher: np.ndarray, temperature: float) -> TokenTargets:
    """The likely ids exactly, and two drawn entries."""
    logprobs = log_softmax(teacher, temperature)
    ids = np.argsort(-logprobs, axis=-1)[:, : KNOWN + 2].astype(np.int32)
    found = np.take_along_axis(logprobs, ids, axis=-1)
    weights = np.exp(found)
    rest = 1.0 - weights[:, :KNOWN].sum(axis=-1, keepdims=True)
    weights[:, KNOWN:] = rest / 2
    exact = np.broadcast_to(np.arange(KNOWN + 2) < KNOWN, ids.shape)
    return TokenTargets(
        mx.array(ids), mx.array(weights.astype(np.float32)), mx.array(found.astype(np.float32)), mx.array(exact)
    )


def lumped(teacher: np.ndarray, student: np.ndarray, temperature: float) -> np.ndarray:
    """T^2 times reverse KL between the likely ids and all others as one, float64."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    ids = np.argsort(-p, axis=-1)[:, :KNOWN]
    p, q = (np.take_along_axis(values, ids, axis=-1) for values in (p, q))
    p, q = (np.concatenate([values, 1.0 - values.sum(axis=-1, keepdims=True)], axis=-1) for values in (p, q))
    return temperature**2 * kl(q, p)


@every_temperature
def test_reverse_kl_takes_exact_entries_one_by_one_and_the_rest_as_one(temperature: float) -> None:
    teacher, student = draw_logits(1, ROWS, VOCAB), draw_logits(2, ROWS, VOCAB)
    found = measured(student, partly_exact(teacher, temperature), REVERSE, temperature)
    np.testing.assert_allclose(found, lumped(teacher, student, temperature), rtol=1e-3, atol=1e-4)


@every_temperature
def test_the_gradient_of_the_stand_in_is_the_slope_of_its_value(temperature: float) -> None:
    teacher, student = draw_logits(1, 3, 9), draw_logits(2, 3, 9)
    found = gradient_at(student, partly_exact(teacher, temperature), REVERSE, temperature)
    expected = slope(lambda logits: lumped(teacher, logits, temperature).sum(), student)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4 * max(1.0, np.abs(expected).max()))


@every_temperature
def test_the_stand_in_is_no_more_than_the_whole_divergence(temperature: float) -> None:
    teacher, student = draw_logits(1, 300, VOCAB), draw_logits(2, 300, VOCAB)
    found = measured(student, partly_exact(teacher, temperature), REVERSE, temperature)
    whole = REVERSE.between(teacher, student, temperature)
    assert (found <= whole + 1e-4).all()
    assert (found >= -1e-4).all()
    assert 0.2 * whole.mean() < found.mean() < whole.mean()


@every_temperature
def test_the_stand_in_is_zero_where_the_student_is_the_teacher(temperature: float) -> None:
    teacher = draw_logits(1, ROWS, VOCAB)
    targets = partly_exact(teacher, temperature)
    np.testing.assert_allclose(measured(teacher, targets, REVERSE, temperature), 0.0, atol=1e-5 * max(1, temperature))
    np.testing.assert_allclose(gradient_at(teacher, targets, REVERSE, temperature), 0.0, atol=1e-5)


def test_the_stand_in_says_nothing_about_the_order_within_the_tail() -> None:
    teacher, student = draw_logits(1, 1, VOCAB), draw_logits(2, 1, VOCAB)
    tail = np.argsort(-teacher[0])[KNOWN:]
    shuffled = student.copy()
    shuffled[0, tail] = student[0, np.random.default_rng(0).permutation(tail)]
    targets = partly_exact(teacher, 1.0)
    found, expected = (measured(logits, targets, REVERSE, 1.0) for logits in (shuffled, student))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_stand_in_does_not_look_at_what_was_drawn() -> None:
    targets, student = entries_of(REVERSE, 2.0)
    without = replace(targets, weights=mx.where(targets.exact, targets.weights, 0.0))
    for measure in (measured, gradient_at):
        found, expected = (measure(student, each, REVERSE, 2.0) for each in (without, targets))
        np.testing.assert_array_equal(found, expected)


def test_where_nothing_is_left_for_the_rest_the_stand_in_is_finite() -> None:
    teacher, student = draw_logits(1, ROWS, VOCAB, scale=60.0), draw_logits(2, ROWS, VOCAB, scale=60.0)
    for at in (student, teacher):
        targets = partly_exact(teacher, 1.0)
        assert np.isfinite(measured(at, targets, REVERSE, 1.0)).all()
        assert np.isfinite(gradient_at(at, targets, REVERSE, 1.0)).all()


# Taking apart -------------------------------------------------------------------------------------------------------


@every_form
def test_rows_and_arrays_are_those_of_the_tokens(form) -> None:
    targets = form(draw_logits(1, ROWS, VOCAB), 2.0)
    for whole, part in zip(targets.arrays, targets.rows(2, 5).arrays, strict=True):
        np.testing.assert_array_equal(np.array(whole)[2:5], np.array(part))
    again = targets.with_arrays(targets.arrays)
    assert type(again) is type(targets)
    assert all(one is other for one, other in zip(again.arrays, targets.arrays, strict=True))
    student = draw_logits(2, ROWS, VOCAB)
    for measure in (measured, gradient_at):
        found = measure(student, again, CASES["forward_kl"], 2.0)
        np.testing.assert_array_equal(found, measure(student, targets, CASES["forward_kl"], 2.0))


def test_a_teacher_that_is_sure_of_the_label_has_cross_entropy_for_forward_kl() -> None:
    logits, labels = draw_logits(1, ROWS, VOCAB), draw_labels(2, ROWS)
    found = measured(logits, TokenTargets.of_labels(mx.array(labels)), CASES["forward_kl"], 1.0)
    np.testing.assert_allclose(found, -log_softmax(logits)[np.arange(ROWS), labels], rtol=1e-5)


def test_forward_kl_can_be_sampled_and_reverse_kl_cannot() -> None:
    assert ForwardKL().sampled
    assert not ReverseKL().sampled
    assert set(SAMPLED) == set(CASES) - {"reverse_kl"}


# Probabilities without their tokens ---------------------------------------------------------------------------------


def ranked(teacher: np.ndarray, temperature: float) -> RankedTargets:
    """The teacher's probabilities, the largest first."""
    return RankedTargets(covering(-np.sort(-teacher, axis=-1), temperature))


@every_temperature
def test_sorted_probabilities_are_compared_as_their_authors_do(temperature: float) -> None:
    teacher, student = draw_logits(1, ROWS, VOCAB), draw_logits(2, ROWS, VOCAB)
    found = measured(student, ranked(teacher, temperature), CASES["total_variation"], temperature)
    one, other = (np.sort(softmax(logits, temperature), axis=-1) for logits in (teacher, student))
    distance = np.abs(one - other).sum(axis=-1)
    np.testing.assert_allclose(found, temperature**2 * distance / 2, rtol=1e-4, atol=1e-6)


@every_case
def test_sorted_probabilities_do_not_care_whose_they_are(case: Case) -> None:
    teacher = draw_logits(1, ROWS, VOCAB)
    shuffled = np.random.default_rng(3).permuted(teacher, axis=-1)
    np.testing.assert_allclose(measured(shuffled, ranked(teacher, 2.0), case, 2.0), 0.0, atol=1e-5)


@every_case
def test_the_slope_of_sorted_probabilities_is_that_of_sorted_logits(case: Case) -> None:
    teacher, student = draw_logits(1, ROWS, VOCAB), draw_logits(2, ROWS, VOCAB)
    order = np.argsort(-student, axis=-1)
    expected = np.zeros_like(student, dtype=np.float64)
    sorted_student = np.take_along_axis(student, order, axis=-1)
    plain = covering(-np.sort(-teacher, axis=-1), 2.0)
    np.put_along_axis(expected, order, gradient_at(sorted_student, plain, case, 2.0), axis=-1)
    np.testing.assert_allclose(gradient_at(student, ranked(teacher, 2.0), case, 2.0), expected, rtol=1e-4, atol=1e-6)


def test_encoded_ranks_reach_the_loss_as_ranks() -> None:
    teacher, labels = -np.sort(-draw_logits(1, ROWS, VOCAB), axis=-1), draw_labels(2, ROWS)
    settings = TargetSettings("sparse", 0.001, 1.0, 1.0)
    targets = encode(mx.array(teacher), mx.array(labels), np.zeros(ROWS), settings, is_ranked=True)
    kept = np.arange(ROWS, dtype=np.int32)
    example = Example(np.array([1]), labels, targets, kept, np.ones(ROWS, dtype=np.float32), "here")
    found = collate([example], 1.0).targets
    assert isinstance(found, RankedTargets)
    assert found.best().tolist() == labels.tolist(), "whose the largest probability is, is not known"
    assert isinstance(found.rows(1, 3), RankedTargets)
    assert isinstance(found.with_arrays(found.arrays), RankedTargets)
    student = draw_logits(3, ROWS, VOCAB)
    close = measured(student, ranked(teacher, 1.0), CASES["total_variation"], 1.0)
    np.testing.assert_allclose(measured(student, found, CASES["total_variation"], 1.0), close, atol=0.05)
