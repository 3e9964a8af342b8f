"""The losses agree with float64 arithmetic, and the fast path with the dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jaxtyping import TypeCheckError, config
from pydantic import ValidationError

from true_kd.losses import (
    BatchTargets,
    HeadTargets,
    LossOptions,
    LossSums,
    TokenTargets,
    compute_ce_loss,
    compute_kd_loss,
    dense_losses,
    head_losses,
    target_kd,
)
from true_kd.targets import TeacherHead

VOCAB = 40
every_temperature = pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
some_logits = hnp.arrays(np.float32, (3, 7), elements=st.floats(-30, 30, width=32))
some_temperature = st.floats(0.5, 10.0)
checked_often = settings(max_examples=30, deadline=None)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def reference_kd(teacher: np.ndarray, student: np.ndarray, temperature: float) -> np.ndarray:
    """T^2 * KL of each position in float64, with 0 * log 0 = 0."""
    log_p = log_softmax(teacher.astype(np.float64) / temperature)
    log_q = log_softmax(student.astype(np.float64) / temperature)
    possible = np.isfinite(log_p)
    gap = np.where(possible, log_p, 0.0) - log_q
    return temperature**2 * (np.exp(log_p) * np.where(possible, gap, 0.0)).sum(axis=-1)


def reference_ce(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy of each position in float64."""
    return -np.take_along_axis(log_softmax(logits), labels[..., None], axis=-1)[..., 0]


def slope(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-4) -> np.ndarray:
    """Central finite differences of `function` in float64."""
    at = at.astype(np.float64)
    found = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        found[index] = (function(up) - function(down)) / (2 * step)
    return found


def draw_logits(seed: int, *shape: int, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def rounding(temperature: float) -> float:
    """What float32 leaves of a KL of nought: logits to 30 are divided by T, and the KL multiplied by T^2."""
    return 1e-5 * max(temperature, 1.0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """The functions as users run them, without the tests' check of the annotations."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


# The dense reference ------------------------------------------------------------------------------------------------


@every_temperature
@pytest.mark.parametrize("shape", [(8, VOCAB), (2, 4, VOCAB), (VOCAB,)])
def test_the_kd_loss_is_the_float64_value(temperature: float, shape: tuple[int, ...]) -> None:
    teacher, student = draw_logits(1, *shape), draw_logits(2, *shape)
    found = compute_kd_loss(mx.array(teacher), mx.array(student), temperature).item()
    assert found == pytest.approx(reference_kd(teacher, student, temperature).mean(), rel=1e-5)


@checked_often
@given(teacher=some_logits, student=some_logits, temperature=some_temperature)
def test_the_kd_loss_is_the_float64_value_for_any_logits(teacher, student, temperature) -> None:
    found = compute_kd_loss(mx.array(teacher), mx.array(student), temperature).item()
    expected = reference_kd(teacher, student, temperature).mean()
    assert found == pytest.approx(expected, rel=1e-5, abs=rounding(temperature))


@every_temperature
def test_the_kd_loss_survives_large_logits(temperature: float) -> None:
    teacher, student = draw_logits(1, 5, VOCAB, scale=1e4), draw_logits(2, 5, VOCAB, scale=1e4)
    found = compute_kd_loss(mx.array(teacher), mx.array(student), temperature).item()
    assert found == pytest.approx(reference_kd(teacher, student, temperature).mean(), rel=1e-5)


@checked_often
@given(logits=some_logits, temperature=some_temperature)
def test_the_kd_loss_of_equal_logits_is_zero(logits, temperature) -> None:
    assert compute_kd_loss(mx.array(logits), mx.array(logits), temperature).item() == 0.0


@checked_often
@given(logits=some_logits, temperature=some_temperature, shift=st.floats(-30, 30, width=32))
def test_a_constant_added_to_the_logits_changes_no_kd_loss(logits, temperature, shift) -> None:
    found = compute_kd_loss(mx.array(logits), mx.array(logits + np.float32(shift)), temperature).item()
    assert found == pytest.approx(0.0, abs=2 * rounding(temperature))


@checked_often
@given(teacher=some_logits, student=some_logits, temperature=some_temperature)
def test_the_kd_loss_is_never_negative_beyond_rounding(teacher, student, temperature) -> None:
    assert compute_kd_loss(mx.array(teacher), mx.array(student), temperature).item() >= -rounding(temperature)


def test_the_kd_loss_points_from_the_teacher_to_the_student() -> None:
    teacher, student = draw_logits(1, 4, VOCAB), draw_logits(2, 4, VOCAB)
    found = compute_kd_loss(mx.array(teacher), mx.array(student), 1.0).item()
    forward, reverse = reference_kd(teacher, student, 1.0).mean(), reference_kd(student, teacher, 1.0).mean()
    assert abs(forward - reverse) > 0.1
    assert found == pytest.approx(forward, rel=1e-5)


@every_temperature
def test_teacher_logits_of_minus_infinity_have_no_probability(temperature: float) -> None:
    teacher, student = draw_logits(1, 3, 9), draw_logits(2, 3, 9)
    teacher[:, ::3] = -np.inf
    value, gradient = mx.value_and_grad(lambda x: compute_kd_loss(mx.array(teacher), x, temperature))(mx.array(student))
    assert value.item() == pytest.approx(reference_kd(teacher, student, temperature).mean(), rel=1e-5)
    expected = slope(lambda x: reference_kd(teacher, x, temperature).mean(), student)
    np.testing.assert_allclose(np.array(gradient), expected, atol=1e-5)


def test_for_small_logits_the_kd_gradient_hardly_depends_on_the_temperature() -> None:
    teacher, student = mx.array(draw_logits(1, 6, VOCAB, scale=0.02)), mx.array(draw_logits(2, 6, VOCAB, scale=0.02))
    norms = [
        mx.linalg.norm(mx.grad(compute_kd_loss, argnums=1)(teacher, student, temperature)).item()
        for temperature in (1.0, 2.0, 5.0, 10.0)
    ]
    assert norms == pytest.approx([norms[0]] * 4, rel=0.03)


def test_at_a_high_temperature_the_kd_loss_is_half_the_mean_squared_distance_of_centred_logits() -> None:
    teacher, student = draw_logits(1, 6, VOCAB, scale=0.1), draw_logits(2, 6, VOCAB, scale=0.1)
    gap = (teacher - student).astype(np.float64)
    expected = 0.5 * np.square(gap - gap.mean(axis=-1, keepdims=True)).mean()
    assert compute_kd_loss(mx.array(teacher), mx.array(student), 10.0).item() == pytest.approx(expected, rel=0.01)


@every_temperature
def test_the_kd_gradient_is_the_slope_of_the_float64_value(temperature: float) -> None:
    teacher, student = draw_logits(1, 3, 9), draw_logits(2, 3, 9)
    gradient = mx.grad(lambda x: compute_kd_loss(mx.array(teacher), x, temperature))(mx.array(student))
    expected = slope(lambda x: reference_kd(teacher, x, temperature).mean(), student)
    np.testing.assert_allclose(np.array(gradient), expected, rtol=1e-4, atol=1e-6)


def test_the_teacher_gets_no_gradient() -> None:
    teacher, student = mx.array(draw_logits(1, 3, 9)), mx.array(draw_logits(2, 3, 9))
    to_teacher, to_student = mx.grad(compute_kd_loss, argnums=(0, 1))(teacher, student, 2.0)
    assert not to_teacher.any()
    assert to_student.any()


@pytest.mark.usefixtures("unchecked")
def test_logits_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 6\).*align_vocab_sizes"):
        compute_kd_loss(mx.zeros((2, 5)), mx.zeros((2, 6)), 1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        compute_kd_loss(mx.zeros((2, 5)), mx.zeros((2, 5)), temperature)


@pytest.mark.parametrize("shape", [(8, VOCAB), (2, 4, VOCAB)])
def test_the_ce_loss_is_the_float64_value(shape: tuple[int, ...]) -> None:
    logits = draw_logits(1, *shape)
    labels = np.random.default_rng(2).integers(0, VOCAB, shape[:-1])
    found = compute_ce_loss(mx.array(logits), mx.array(labels)).item()
    assert found == pytest.approx(reference_ce(logits, labels).mean(), rel=1e-5)


def test_the_ce_loss_survives_large_logits() -> None:
    logits, labels = draw_logits(1, 8, VOCAB, scale=1e4), np.arange(8)
    found = compute_ce_loss(mx.array(logits), mx.array(labels)).item()
    assert found == pytest.approx(reference_ce(logits, labels).mean(), rel=1e-5)


@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignored_positions_count_neither_above_nor_below_the_fraction_bar(ignore_index: int) -> None:
    logits = draw_logits(1, 8, VOCAB)
    labels = np.array([5, 9, 11, 30, 2, 4, 39, 0])
    ignored = np.array([True, False, False, True, False, True, False, False])
    found = compute_ce_loss(mx.array(logits), mx.array(np.where(ignored, ignore_index, labels)), ignore_index).item()
    assert found == pytest.approx(reference_ce(logits[~ignored], labels[~ignored]).mean(), rel=1e-5)


def test_where_every_position_is_ignored_the_ce_loss_and_its_gradient_are_zero() -> None:
    labels = mx.array([-100, -100, -100])
    value, gradient = mx.value_and_grad(compute_ce_loss)(mx.array(draw_logits(1, 3, VOCAB)), labels)
    assert value.item() == 0.0
    assert not gradient.any()


def test_the_ce_gradient_is_the_slope_of_the_float64_value_and_zero_where_ignored() -> None:
    logits, labels = draw_logits(1, 4, 9), np.array([2, -100, 8, 0])
    gradient = mx.grad(compute_ce_loss)(mx.array(logits), mx.array(labels))
    counts = labels >= 0
    expected = slope(lambda x: reference_ce(x[counts], labels[counts]).mean(), logits)
    np.testing.assert_allclose(np.array(gradient), expected, rtol=1e-4, atol=1e-6)
    assert not gradient[1].any()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_logits_are_computed_in_float32(dtype: mx.Dtype) -> None:
    teacher, student = (mx.array(draw_logits(seed, 8, VOCAB)).astype(dtype) for seed in (1, 2))
    labels = np.arange(8)
    kd, ce = compute_kd_loss(teacher, student, 2.0), compute_ce_loss(student, mx.array(labels))
    as_read = [np.array(logits.astype(mx.float32)) for logits in (teacher, student)]
    assert kd.dtype == ce.dtype == mx.float32
    assert kd.item() == pytest.approx(reference_kd(*as_read, 2.0).mean(), rel=1e-5)
    assert ce.item() == pytest.approx(reference_ce(as_read[1], labels).mean(), rel=1e-5)


def test_annotated_shapes_are_checked_under_pytest() -> None:
    with pytest.raises(TypeCheckError, match="targets"):
        compute_ce_loss(mx.zeros((2, 3, 5)), mx.zeros((2, 4), dtype=mx.int32))


def test_annotated_dtypes_are_checked_under_pytest() -> None:
    with pytest.raises(TypeCheckError, match="targets"):
        compute_ce_loss(mx.zeros((2, 5)), mx.zeros((2,)))


def test_annotated_fields_are_checked_under_pytest() -> None:
    with pytest.raises(TypeCheckError, match="logprobs"):
        TokenTargets(mx.zeros((2, 5), dtype=mx.int32), mx.zeros((2, 5)), mx.zeros((3, 5)))


# The fast path ------------------------------------------------------------------------------------------------------

WIDTH = 32


def whole_vocabulary(teacher: np.ndarray, temperature: float) -> TokenTargets:
    """Targets with an entry for every id."""
    logprobs = log_softmax(teacher / temperature).astype(np.float32)
    ids = np.broadcast_to(np.arange(teacher.shape[-1], dtype=np.int32), teacher.shape)
    return TokenTargets(mx.array(ids), mx.array(np.exp(logprobs)), mx.array(logprobs))


def few_entries(seed: int, rows: int, entries: int = 6) -> TokenTargets:
    """Targets with some ids of each row, the weights of a row summing to 1 or, where ids were dropped, to less."""
    rng = np.random.default_rng(seed)
    ids = np.sort(np.stack([rng.permutation(VOCAB)[:entries] for _ in range(rows)]), axis=-1).astype(np.int32)
    weights = (rng.dirichlet(np.ones(entries), rows) * rng.uniform(0.2, 1.0, (rows, 1))).astype(np.float32)
    return TokenTargets(mx.array(ids), mx.array(weights), mx.array(-5 * rng.random((rows, entries)).astype(np.float32)))


TEACHER_WIDTH = 24


def by_hidden_states(
    seed: int, rows: int, temperature: float = 2.0, id_map: np.ndarray | None = None, vocab: int = VOCAB
) -> tuple[HeadTargets, np.ndarray]:
    """Targets by a teacher's hidden states, and the logits in its own vocabulary that they stand for, float64."""
    weight = draw_logits(seed, vocab, TEACHER_WIDTH, scale=0.5)
    states = draw_logits(seed + 1, rows, TEACHER_WIDTH, scale=1.0).astype(np.float16)
    on_device = mx.array(weight)
    head = TeacherHead(lambda given: given.astype(mx.float32) @ on_device.T)
    head = head if id_map is None else head.in_ids(id_map)
    return HeadTargets(mx.array(states), head, temperature), states.astype(np.float64) @ weight.T.astype(np.float64)


def some_hidden_states(seed: int, rows: int) -> HeadTargets:
    """Targets by hidden states of a teacher that lacks some ids of the student, and has some that the student lacks."""
    id_map = np.random.default_rng(seed).permutation(50).astype(np.int32) - 5
    return by_hidden_states(seed, rows, id_map=np.where((id_map >= 0) & (id_map < VOCAB - 3), id_map, -1), vocab=50)[0]


every_kind = pytest.mark.parametrize("kind", ["entries", "hidden states"])


def draw_targets(kind: str, seed: int, rows: int) -> BatchTargets:
    """Targets of either kind, whose weights leave some of the mass unassigned."""
    return few_entries(seed, rows) if kind == "entries" else some_hidden_states(seed, rows)


def draw_head(seed: int) -> nn.Linear:
    head = nn.Linear(WIDTH, VOCAB, bias=False)
    head.weight = mx.array(draw_logits(seed, VOCAB, WIDTH, scale=0.5))
    return head


def draw_hidden(seed: int, rows: int) -> mx.array:
    return mx.array(draw_logits(seed, rows, WIDTH, scale=1.0))


def draw_labels(seed: int, rows: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, VOCAB, rows).astype(np.int32))


def values(sums: LossSums) -> list[float]:
    return [sums.total.item(), sums.kd.item(), sums.ce.item()]


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("rows", "chunk"), [(37, 16), (32, 16), (37, 512), (1, 16), (17, 16)])
def test_the_fast_path_over_the_whole_vocabulary_is_the_dense_loss(alpha: float, rows: int, chunk: int) -> None:
    head, hidden, labels = draw_head(1), draw_hidden(2, rows), draw_labels(3, rows)
    teacher = draw_logits(4, rows, VOCAB)
    options = LossOptions(temperature=2.0, alpha=alpha, chunk=chunk)

    def dense(hidden: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        kd = rows * compute_kd_loss(mx.array(teacher), head(hidden), 2.0)
        ce = rows * compute_ce_loss(head(hidden), labels)
        return alpha * kd + (1 - alpha) * ce, kd, ce

    expected, expected_gradient = mx.value_and_grad(dense)(hidden)
    sums, gradient = head_losses(head, hidden, labels, whole_vocabulary(teacher, 2.0), options)
    assert values(sums) == pytest.approx([value.item() for value in expected], rel=1e-5)
    np.testing.assert_allclose(np.array(gradient), np.array(expected_gradient), rtol=1e-4, atol=1e-5)


@checked_often
@given(teacher=some_logits, student=some_logits, temperature=some_temperature)
def test_sparse_targets_over_the_whole_vocabulary_give_the_float64_kl_of_every_token(
    teacher, student, temperature
) -> None:
    found = target_kd(mx.array(student), whole_vocabulary(teacher, temperature), temperature)
    expected = reference_kd(teacher, student, temperature)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-5, atol=3 * rounding(temperature))


@every_temperature
def test_hidden_states_give_the_dense_loss(temperature: float) -> None:
    targets, teacher = by_hidden_states(4, 9, temperature)
    student = mx.array(draw_logits(2, 9, VOCAB))
    found = target_kd(student, targets, temperature)
    np.testing.assert_allclose(np.array(found), reference_kd(teacher, np.array(student), temperature), rtol=1e-4)
    dense = compute_kd_loss(mx.array(teacher.astype(np.float32)), student, temperature)
    assert mx.mean(found).item() == pytest.approx(dense.item(), rel=1e-5)


def in_student_ids(teacher: np.ndarray, id_map: np.ndarray, width: int) -> np.ndarray:
    """A teacher's logits laid out in the student's ids, -inf where there is none."""
    laid_out = np.full((len(teacher), width), -np.inf)
    laid_out[:, id_map[id_map >= 0]] = teacher[:, id_map >= 0]
    return laid_out


@every_temperature
@pytest.mark.parametrize("width", [VOCAB, VOCAB + 7], ids=["as wide", "a wider student"])
def test_hidden_states_in_permuted_ids_give_the_dense_loss_of_the_permuted_logits(
    temperature: float, width: int
) -> None:
    id_map = np.random.default_rng(0).permutation(width)[:VOCAB].astype(np.int32)
    targets, teacher = by_hidden_states(4, 9, temperature, id_map)
    student = mx.array(draw_logits(2, 9, width))
    found = mx.mean(target_kd(student, targets, temperature)).item()
    permuted = mx.array(in_student_ids(teacher, id_map, width).astype(np.float32))
    assert found == pytest.approx(compute_kd_loss(permuted, student, temperature).item(), rel=1e-4)


def test_hidden_states_of_a_narrower_teacher_give_the_dense_loss_without_a_map() -> None:
    targets, teacher = by_hidden_states(4, 9)
    student = mx.array(draw_logits(2, 9, VOCAB + 7))
    permuted = mx.array(in_student_ids(teacher, np.arange(VOCAB), VOCAB + 7).astype(np.float32))
    found = mx.mean(target_kd(student, targets, 2.0)).item()
    assert found == pytest.approx(compute_kd_loss(permuted, student, 2.0).item(), rel=1e-4)


@every_temperature
@pytest.mark.parametrize("width", [30, VOCAB, VOCAB + 7])
def test_ids_that_the_student_lacks_are_left_out_and_their_mass_is_not_handed_on(
    temperature: float, width: int
) -> None:
    id_map = np.random.default_rng(0).permutation(VOCAB).astype(np.int32)
    id_map[(id_map >= 25) | (np.arange(VOCAB) % 4 == 0)] = -1
    targets, teacher = by_hidden_states(4, 9, temperature, id_map)
    student = draw_logits(2, 9, width)
    log_p, log_q = log_softmax(teacher / temperature), log_softmax(student.astype(np.float64) / temperature)
    shared = id_map >= 0
    terms = np.exp(log_p[:, shared]) * (log_p[:, shared] - log_q[:, id_map[shared]])
    found = np.array(target_kd(mx.array(student), targets, temperature))
    np.testing.assert_allclose(found, temperature**2 * terms.sum(axis=-1), rtol=1e-4, atol=1e-4)


@every_temperature
def test_a_student_that_is_its_teacher_has_no_loss(temperature: float) -> None:
    targets, teacher = by_hidden_states(4, 9, temperature)
    found = np.array(target_kd(mx.array(teacher.astype(np.float32)), targets, temperature))
    np.testing.assert_allclose(found, 0.0, atol=rounding(temperature))


@every_kind
@every_temperature
def test_the_slope_is_the_derivative_of_the_kl(temperature: float, kind: str) -> None:
    targets = draw_targets(kind, 4, 9)
    scaled = mx.array(draw_logits(2, 9, VOCAB)) / temperature

    def kl(scaled: mx.array) -> mx.array:
        return mx.sum(targets.cross(scaled - mx.logsumexp(scaled, axis=-1, keepdims=True)))

    found = targets.slope(mx.softmax(scaled, axis=-1))
    np.testing.assert_allclose(np.array(found), np.array(mx.grad(kl)(scaled)), rtol=1e-4, atol=1e-6)


def test_entries_of_one_id_add_up() -> None:
    logprobs = mx.array(log_softmax(draw_logits(2, 1, 5)).astype(np.float32))
    twice = TokenTargets(mx.array([[3, 1, 1]]), mx.array([[0.5, 0.2, 0.3]]), mx.array([[-0.7, -1.0, -1.0]]))
    once = TokenTargets(mx.array([[3, 1]]), mx.array([[0.5, 0.5]]), mx.array([[-0.7, -1.0]]))
    assert twice.cross(logprobs).item() == pytest.approx(once.cross(logprobs).item(), rel=1e-6)
    np.testing.assert_allclose(*(np.array(each.slope(mx.exp(logprobs))) for each in (twice, once)), atol=1e-7)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("rows", "chunk"), [(37, 16), (32, 16), (37, 512), (1, 16)])
def test_the_fast_path_over_hidden_states_is_the_dense_loss(alpha: float, rows: int, chunk: int) -> None:
    head, hidden, labels = draw_head(1), draw_hidden(2, rows), draw_labels(3, rows)
    targets, teacher = by_hidden_states(4, rows)
    teacher = mx.array(teacher.astype(np.float32))

    def dense(hidden: mx.array) -> mx.array:
        kd, ce = compute_kd_loss(teacher, head(hidden), 2.0), compute_ce_loss(head(hidden), labels)
        return rows * (alpha * kd + (1 - alpha) * ce)

    expected, expected_gradient = mx.value_and_grad(dense)(hidden)
    sums, gradient = head_losses(head, hidden, labels, targets, LossOptions(alpha=alpha, chunk=chunk))
    assert sums.total.item() == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(np.array(gradient), np.array(expected_gradient), rtol=1e-3, atol=1e-5)


def test_the_teachers_head_gets_no_gradient_and_its_student_does() -> None:
    weight, hidden = mx.array(draw_logits(5, VOCAB, TEACHER_WIDTH, scale=0.5)), draw_hidden(2, 9)
    states = mx.array(draw_logits(6, 9, TEACHER_WIDTH))

    def total(student: mx.array) -> mx.array:
        targets = HeadTargets(states, TeacherHead(lambda given: given @ weight.T), 2.0)
        return dense_losses(hidden @ student.T, draw_labels(3, 9), targets, LossOptions()).total

    student = draw_head(1).weight
    gradient = mx.grad(total)(student)
    assert gradient.shape == student.shape
    assert mx.abs(gradient).max().item() > 0


def test_the_best_entry_is_the_most_likely_of_those_the_student_has() -> None:
    targets = TokenTargets(
        ids=mx.array([[7, 2, 9], [0, 4, 0], [5, 6, 0]]),
        weights=mx.array([[0.3, 0.5, 0.2], [0.0, 0.4, 0.0], [0.1, 0.1, 0.0]]),
        logprobs=mx.array([[-1.2, -0.7, -1.6], [-0.1, -0.9, 0.0], [-3.0, -2.0, 0.0]]),
    )
    assert targets.best().tolist() == [2, 4, 6]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_best_of_hidden_states_is_the_most_likely_of_those_the_student_has(temperature: float) -> None:
    targets, teacher = by_hidden_states(4, 200, temperature)
    assert targets.best().tolist() == teacher.argmax(axis=-1).tolist()
    id_map = np.random.default_rng(0).permutation(VOCAB).astype(np.int32)
    id_map[id_map >= 20] = -1
    mapped, _ = by_hidden_states(4, 200, temperature, id_map)
    expected = in_student_ids(teacher, id_map, 20).argmax(axis=-1)
    assert mapped.best().tolist() == expected.tolist()


@every_kind
@pytest.mark.parametrize("cut", [1, 10, 16, 22])
def test_splitting_the_rows_changes_nothing(cut: int, kind: str) -> None:
    head, hidden, labels, targets = draw_head(1), draw_hidden(2, 23), draw_labels(3, 23), draw_targets(kind, 4, 23)
    options = LossOptions(chunk=16)
    whole, gradient = head_losses(head, hidden, labels, targets, options)
    first, first_gradient = head_losses(head, hidden[:cut], labels[:cut], targets.rows(0, cut), options)
    second, second_gradient = head_losses(head, hidden[cut:], labels[cut:], targets.rows(cut, 23), options)
    assert [a + b for a, b in zip(values(first), values(second), strict=True)] == pytest.approx(values(whole), rel=1e-5)
    joined = mx.concatenate([first_gradient, second_gradient])
    np.testing.assert_allclose(np.array(joined), np.array(gradient), rtol=1e-4, atol=1e-6)


@every_kind
def test_the_chunk_changes_nothing_but_memory(kind: str) -> None:
    head, hidden, labels, targets = draw_head(1), draw_hidden(2, 50), draw_labels(3, 50), draw_targets(kind, 4, 50)
    small, small_gradient = head_losses(head, hidden, labels, targets, LossOptions(chunk=16))
    large, large_gradient = head_losses(head, hidden, labels, targets, LossOptions(chunk=512))
    assert values(small) == pytest.approx(values(large), rel=1e-5)
    np.testing.assert_allclose(np.array(small_gradient), np.array(large_gradient), rtol=1e-4, atol=1e-6)


def test_entries_of_weight_zero_change_nothing() -> None:
    head, hidden, labels, targets = draw_head(1), draw_hidden(2, 9), draw_labels(3, 9), few_entries(4, 9)
    padding = mx.zeros((9, 5))
    padded = TokenTargets(
        mx.concatenate([targets.ids, padding.astype(mx.int32)], axis=-1),
        mx.concatenate([targets.weights, padding], axis=-1),
        mx.concatenate([targets.logprobs, padding], axis=-1),
    )
    bare, bare_gradient = head_losses(head, hidden, labels, targets, LossOptions())
    found, gradient = head_losses(head, hidden, labels, padded, LossOptions())
    assert values(found) == pytest.approx(values(bare), rel=1e-6)
    np.testing.assert_allclose(np.array(gradient), np.array(bare_gradient), rtol=1e-5, atol=1e-6)


@every_kind
def test_dense_losses_are_the_fast_path_with_another_way_to_the_gradient(kind: str) -> None:
    head, hidden, labels, targets = draw_head(1), draw_hidden(2, 23), draw_labels(3, 23), draw_targets(kind, 4, 23)
    options = LossOptions(temperature=3.0, alpha=0.4, chunk=16)
    sums, gradient = head_losses(head, hidden, labels, targets, options)
    dense = dense_losses(head(hidden), labels, targets, options)
    dense_gradient = mx.grad(lambda states: dense_losses(head(states), labels, targets, options).total)(hidden)
    assert values(sums) == pytest.approx(values(dense), rel=1e-5)
    np.testing.assert_allclose(np.array(gradient), np.array(dense_gradient), rtol=1e-4, atol=1e-6)


def test_dense_losses_give_the_head_its_gradient() -> None:
    hidden, labels, targets = draw_hidden(2, 9), draw_labels(3, 9), few_entries(4, 9)
    weight = np.array(draw_head(1).weight)
    gradient = mx.grad(lambda w: dense_losses(hidden @ w.T, labels, targets, LossOptions()).total)(mx.array(weight))
    ids, weights = np.array(targets.ids), np.array(targets.weights, dtype=np.float64)

    def total(weight: np.ndarray) -> float:
        logits = np.array(hidden, dtype=np.float64) @ weight.T
        taken = np.take_along_axis(log_softmax(logits / 2.0), ids, axis=-1)
        kd = 4.0 * (weights * (np.array(targets.logprobs, dtype=np.float64) - taken)).sum()
        return 0.7 * kd + 0.3 * reference_ce(logits, np.array(labels)).sum()

    some = np.s_[3:5, :4]

    def total_of_some(part: np.ndarray) -> float:
        changed = weight.astype(np.float64)
        changed[some] = part
        return total(changed)

    np.testing.assert_allclose(np.array(gradient)[some], slope(total_of_some, weight[some]), rtol=1e-4, atol=1e-5)


@every_kind
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_head_passes_the_gradient_of_its_unpacked_weights(bits: int, kind: str) -> None:
    packed = draw_head(1).to_quantized(group_size=32, bits=bits)
    assert isinstance(packed, nn.QuantizedLinear)
    unpacked = mx.dequantize(packed.weight, packed.scales, packed.biases, group_size=32, bits=bits)
    hidden, labels, targets = draw_hidden(2, 23), draw_labels(3, 23), draw_targets(kind, 4, 23)
    options = LossOptions(chunk=16)
    sums, gradient = head_losses(packed, hidden, labels, targets, options)
    expected, expected_gradient = head_losses(lambda states: states @ unpacked.T, hidden, labels, targets, options)
    assert values(sums) == pytest.approx(values(expected), rel=1e-4)
    np.testing.assert_allclose(np.array(gradient), np.array(expected_gradient), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "arrays"), [("entries", 12), ("hidden states", 18)])
@pytest.mark.parametrize("training", [False, True], ids=["alone", "within a gradient, as in training"])
def test_no_array_of_tokens_by_vocabulary_outlives_a_chunk(training: bool, kind: str, arrays: int) -> None:
    """Of the 32 chunks, so many arrays of one chunk by the vocabulary are there at a time."""
    rows, vocab = 1024, 2048
    head = nn.Linear(WIDTH, vocab, bias=False)
    hidden, labels, targets = draw_hidden(2, rows), draw_labels(3, rows), few_entries(4, rows)
    mx.eval(head.parameters(), hidden, labels, targets.ids, targets.weights, targets.logprobs)
    if kind == "hidden states":
        targets = by_hidden_states(4, rows, id_map=np.arange(vocab, dtype=np.int32)[::-1].copy(), vocab=vocab)[0]
        mx.eval(targets.hidden, targets.rows(0, 1).cross(mx.zeros((1, vocab))))

    def objective(hidden: mx.array) -> tuple[mx.array, mx.array]:
        sums, gradient = head_losses(head, mx.stop_gradient(hidden), labels, targets, LossOptions(chunk=32))
        return mx.sum(hidden * mx.stop_gradient(gradient)), sums.total

    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.value_and_grad(objective)(hidden) if training else objective(hidden))
    assert mx.get_peak_memory() - before < arrays * 32 * vocab * 4


@every_kind
def test_half_precision_states_get_a_gradient_of_their_own_type(kind: str) -> None:
    head, labels, targets = draw_head(1), draw_labels(3, 23), draw_targets(kind, 4, 23)
    hidden = draw_hidden(2, 23).astype(mx.bfloat16)
    head.weight = head.weight.astype(mx.bfloat16)
    sums, gradient = head_losses(head, hidden, labels, targets, LossOptions(chunk=16))
    logits = head(hidden).astype(mx.float32)
    assert gradient.dtype == mx.bfloat16
    assert values(sums) == pytest.approx(values(dense_losses(logits, labels, targets, LossOptions())), rel=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": 0.49},
        {"temperature": 10.01},
        {"temperature": "2"},
        {"alpha": -0.01},
        {"alpha": 1.01},
        {"alpha": float("nan")},
        {"alpha": True},
        {"chunk": 0},
        {"chunk": 16.0},
        {"temprature": 2.0},
    ],
    ids=str,
)
def test_loss_options_out_of_bounds_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        LossOptions(**bad)


def test_a_chunk_of_fewer_than_16_tokens_is_refused() -> None:
    with pytest.raises(ValidationError, match="chunk"):
        LossOptions(chunk=15)


def test_the_bounds_of_loss_options_are_allowed() -> None:
    for temperature in (0.5, 10.0):
        for alpha in (0.0, 1.0):
            options = LossOptions(temperature=temperature, alpha=alpha)
            assert (options.temperature, options.alpha) == (temperature, alpha)
