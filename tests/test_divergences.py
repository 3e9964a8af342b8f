"""Each divergence is its paper's, zero where teacher and student agree, and, where sampled, bounded entry by entry."""

from __future__ import annotations

from math import log
from typing import get_args

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from textbook import CASES, SAMPLED, Case, jensen_shannon, kl, softmax

from true_kd.losses import DIVERGENCES, Divergence
from true_kd.losses.divergences import DivergenceName, JensenShannon, SkewedKL, SkewedReverseKL

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_sampled = pytest.mark.parametrize("case", SAMPLED.values(), ids=SAMPLED.keys())
checked_often = settings(max_examples=25, deadline=None)
some_logits = hnp.arrays(np.float32, (3, 7), elements=st.floats(-20, 20, width=32))


def terms(divergence: Divergence, gaps: np.ndarray) -> np.ndarray:
    """What entries of these gaps add per unit of the teacher's probability."""
    given = mx.array(gaps.astype(np.float32))
    return np.array(divergence.weigh(given, mx.ones(given.shape), mx.exp(given))[0], dtype=np.float64)


def slopes(divergence: Divergence, gaps: np.ndarray) -> np.ndarray:
    """Derivative of each term with respect to its gap."""
    given = mx.array(gaps.astype(np.float32))
    return np.array(divergence.weigh(given, mx.ones(given.shape), mx.exp(given))[1], dtype=np.float64)


def summed(divergence: Divergence, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """What a divergence comes to by its terms."""
    return (p * terms(divergence, np.log(q) - np.log(p))).sum(axis=-1)


def test_every_name_of_the_options_makes_a_divergence_and_has_a_definition() -> None:
    assert set(get_args(DivergenceName)) == set(DIVERGENCES) == {case.name for case in CASES.values()}


BY_HAND = {
    "forward_kl": 0.5 * log(4 / 3),
    "reverse_kl": 0.25 * log(1 / 2) + 0.75 * log(3 / 2),
    "jensen_shannon 0.5": 0.5 * (0.5 * log(4 / 3) + 0.5 * log(4 / 5)) + 0.5 * (0.25 * log(2 / 3) + 0.75 * log(6 / 5)),
    "skewed_kl 0.1": 0.5 * log(0.5 / 0.275) + 0.5 * log(0.5 / 0.725),
    "skewed_reverse_kl 0.1": 0.25 * log(0.25 / 0.475) + 0.75 * log(0.75 / 0.525),
    "total_variation": 0.25,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_value_of_two_ids_is_that_by_hand(name: str) -> None:
    p, q = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    assert CASES[name].definition(p, q) == pytest.approx(BY_HAND[name], rel=1e-12)
    assert summed(CASES[name].divergence, p, q) == pytest.approx(BY_HAND[name], rel=1e-6)


@every_case
@checked_often
@given(teacher=some_logits, student=some_logits)
def test_the_sum_of_the_terms_is_the_papers_definition(case: Case, teacher, student) -> None:
    p, q = softmax(teacher), softmax(student)
    np.testing.assert_allclose(summed(case.divergence, p, q), case.definition(p, q), rtol=2e-5, atol=2e-6)


@every_case
def test_every_term_is_zero_where_teacher_and_student_agree(case: Case) -> None:
    assert np.abs(terms(case.divergence, np.zeros(3))).max() < 1e-7


@every_case
@checked_often
@given(teacher=some_logits, student=some_logits)
def test_no_divergence_is_negative_beyond_rounding(case: Case, teacher, student) -> None:
    assert summed(case.divergence, softmax(teacher), softmax(student)).min() > -2e-6


@every_case
def test_a_divergence_is_larger_the_further_apart_the_two_are(case: Case) -> None:
    teacher, step = np.random.default_rng(0).normal(size=(2, 50, 20))
    p = softmax(3 * teacher)
    found = [summed(case.divergence, p, softmax(3 * teacher + far * step)).mean() for far in (0.1, 0.5, 1.0, 3.0)]
    assert found == sorted(found)
    assert found[0] > 0


@pytest.mark.parametrize("name", ["jensen_shannon 0.5", "total_variation"])
@checked_often
@given(teacher=some_logits, student=some_logits)
def test_jensen_shannon_and_total_variation_are_symmetric(name: str, teacher, student) -> None:
    divergence, p, q = CASES[name].divergence, softmax(teacher), softmax(student)
    np.testing.assert_allclose(summed(divergence, p, q), summed(divergence, q, p), rtol=2e-5, atol=2e-6)


def entropy_of(share: float) -> float:
    return -share * log(share) - (1 - share) * log(1 - share)


BOUNDS = {
    "jensen_shannon 0.01": entropy_of(0.01),
    "jensen_shannon 0.2": entropy_of(0.2),
    "jensen_shannon 0.5": log(2),
    "jensen_shannon 0.9": entropy_of(0.9),
    "skewed_kl 0.1": -log(0.1),
    "skewed_kl 0.6": -log(0.6),
    "skewed_reverse_kl 0.1": -log(0.1),
    "skewed_reverse_kl 0.6": -log(0.6),
    "total_variation": 1.0,
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounded_divergences_keep_their_bound_and_reach_it_where_the_two_have_nothing_in_common(name: str) -> None:
    divergence = CASES[name].divergence
    rng = np.random.default_rng(0)
    p, q = softmax(30 * rng.normal(size=(200, 9))), softmax(30 * rng.normal(size=(200, 9)))
    found = summed(divergence, p, q)
    assert found.max() < BOUNDS[name] * (1 + 1e-5)
    apart = np.array([0.5, 0.5, 1e-30, 1e-30])
    assert summed(divergence, apart, apart[::-1]) == pytest.approx(BOUNDS[name], rel=1e-5)


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Teacher and student of 50 tokens, some nats apart."""
    teacher, step = np.random.default_rng(0).normal(size=(2, 50, 20))
    return softmax(2 * teacher), softmax(2 * teacher + step)


def test_jensen_shannon_over_a_small_beta_is_forward_kl(pair: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = pair
    errors = [np.abs(summed(JensenShannon(beta), p, q) / beta / kl(p, q) - 1).mean() for beta in (0.3, 0.03, 0.003)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


def test_jensen_shannon_over_what_beta_lacks_of_one_is_reverse_kl(pair: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = pair
    rests = (0.3, 0.03, 0.003)
    errors = [np.abs(summed(JensenShannon(1 - rest), p, q) / rest / kl(q, p) - 1).mean() for rest in rests]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


def test_with_little_skew_the_skewed_divergences_are_forward_and_reverse_kl(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    p, q = pair
    np.testing.assert_allclose(summed(SkewedKL(1e-4), p, q), kl(p, q), rtol=2e-3)
    np.testing.assert_allclose(summed(SkewedReverseKL(1e-4), p, q), kl(q, p), rtol=2e-3)


def test_the_skewed_divergences_are_each_others_mirror(pair: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = pair
    np.testing.assert_allclose(summed(SkewedReverseKL(0.2), p, q), summed(SkewedKL(0.2), q, p), rtol=1e-4)


def test_jensen_shannon_turned_round_has_what_beta_lacks_of_one(pair: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = pair
    np.testing.assert_allclose(summed(JensenShannon(0.3), p, q), jensen_shannon(q, p, 0.7), rtol=1e-4)


STEEPEST = {
    "forward_kl": 1.0,
    "jensen_shannon 0.01": 0.01,
    "jensen_shannon 0.2": 0.2,
    "jensen_shannon 0.5": 0.5,
    "jensen_shannon 0.9": 0.9,
    "skewed_kl 0.1": 1.0,
    "skewed_kl 0.6": 1.0,
    # The largest that y log(1 + 1 / y) - y / (1 + y) becomes, times (1 - skew) / skew.
    "skewed_reverse_kl 0.1": 0.2162 * 9,
    "skewed_reverse_kl 0.6": 0.2162 * 2 / 3,
    "total_variation": 1.0,
}


@every_sampled
def test_what_an_entry_adds_to_the_gradient_per_unit_of_weight_is_bounded(case: Case) -> None:
    bound = STEEPEST[next(name for name, other in SAMPLED.items() if other is case)]
    gaps = np.concatenate([np.linspace(-100, 100, 20_001), [-1e4, 1e4, -3e38, 3e38]])
    assert np.abs(slopes(case.divergence, gaps)).max() <= bound * (1 + 1e-4)


def test_of_reverse_kl_it_has_no_bound() -> None:
    assert slopes(CASES["reverse_kl"].divergence, np.array([20.0])) > 1e9


@every_sampled
def test_an_id_that_the_teacher_all_but_excludes_adds_next_to_nothing(case: Case) -> None:
    q = np.array([1e-6, 0.01, 0.5, 1.0])
    added = [np.abs(p * terms(case.divergence, np.log(q) - np.log(p))).max() for p in (1e-6, 1e-9, 1e-12, 1e-20, 1e-30)]
    assert added == sorted(added, reverse=True)
    assert added[0] < 1e-3
    assert added[-1] < 1e-25


@every_case
def test_the_slope_of_the_terms_is_their_derivative(case: Case) -> None:
    gaps = np.linspace(-12, 12, 480) + 0.013
    step = 1e-2
    up, down = terms(case.divergence, gaps + step), terms(case.divergence, gaps - step)
    expected = (up - down) / (2 * step)
    smooth = np.abs(gaps) > step
    found = slopes(case.divergence, gaps)
    np.testing.assert_allclose(found[smooth], expected[smooth], rtol=2e-3, atol=2e-3)


@every_sampled
@pytest.mark.parametrize("gap", [-3e38, -1e4, -81.0, 81.0, 1e4, 3e38])
def test_extreme_gaps_stay_finite(case: Case, gap: float) -> None:
    assert np.isfinite(terms(case.divergence, np.array([gap]))).all()
    assert np.isfinite(slopes(case.divergence, np.array([gap]))).all()
