"""The losses agree with float64 arithmetic, and the fast path with the dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jaxtyping import TypeCheckError, config
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear
from pydantic import ValidationError
from textbook import CASES, Case, cross_entropy, log_softmax, slope

from true_kd.config import load_config
from true_kd.errors import ConfigError
from true_kd.losses import (
    BatchTargets,
    ForwardKL,
    HeadTargets,
    LossOptions,
    LossSums,
    Objective,
    TokenTargets,
    chunk_rows,
    chunks,
    compute_ce_loss,
    compute_kd_loss,
    head_losses,
    token_losses,
)
from true_kd.losses.divergences import JensenShannon, SkewedKL, SkewedReverseKL
from true_kd.targets import TeacherHead

VOCAB = 40
every_temperature = pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
some_logits = hnp.arrays(np.float32, (3, 7), elements=st.floats(-30, 30, width=32))
some_temperature = st.floats(0.5, 10.0)
checked_often = settings(max_examples=30, deadline=None)


def reference_kd(teacher: np.ndarray, student: np.ndarray, temperature: float) -> np.ndarray:
    """T^2 * KL of each position in float64, with 0 * log 0 = 0, however large the logits."""
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    possible = np.isfinite(log_p)
    gap = np.where(possible, log_p, 0.0) - log_q
    return temperature**2 * (np.exp(log_p) * np.where(possible, gap, 0.0)).sum(axis=-1)


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


@every_case
@every_temperature
def test_value_and_gradient_are_those_of_the_definition(temperature: float, case: Case) -> None:
    teacher, student = draw_logits(1, 3, 9), draw_logits(2, 3, 9)
    value, gradient = mx.value_and_grad(lambda x: compute_kd_loss(mx.array(teacher), x, temperature, case.divergence))(
        mx.array(student)
    )
    assert value.item() == pytest.approx(case.between(teacher, student, temperature).mean(), rel=1e-5)
    expected = slope(lambda x: case.between(teacher, x, temperature).mean(), student)
    np.testing.assert_allclose(np.array(gradient), expected, rtol=5e-4, atol=2e-6 * max(1.0, np.abs(expected).max()))


def test_without_a_divergence_it_is_forward_kl() -> None:
    teacher, student = mx.array(draw_logits(1, 3, 9)), mx.array(draw_logits(2, 3, 9))
    assert compute_kd_loss(teacher, student, 2.0).item() == compute_kd_loss(teacher, student, 2.0, ForwardKL()).item()


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
    assert found == pytest.approx(cross_entropy(logits, labels).mean(), rel=1e-5)


def test_the_ce_loss_survives_large_logits() -> None:
    logits, labels = draw_logits(1, 8, VOCAB, scale=1e4), np.arange(8)
    found = compute_ce_loss(mx.array(logits), mx.array(labels)).item()
    assert found == pytest.approx(cross_entropy(logits, labels).mean(), rel=1e-5)


@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignored_positions_count_neither_above_nor_below_the_fraction_bar(ignore_index: int) -> None:
    logits = draw_logits(1, 8, VOCAB)
    labels = np.array([5, 9, 11, 30, 2, 4, 39, 0])
    ignored = np.array([True, False, False, True, False, True, False, False])
    found = compute_ce_loss(mx.array(logits), mx.array(np.where(ignored, ignore_index, labels)), ignore_index).item()
    assert found == pytest.approx(cross_entropy(logits[~ignored], labels[~ignored]).mean(), rel=1e-5)


def test_where_every_position_is_ignored_the_ce_loss_and_its_gradient_are_zero() -> None:
    labels = mx.array([-100, -100, -100])
    value, gradient = mx.value_and_grad(compute_ce_loss)(mx.array(draw_logits(1, 3, VOCAB)), labels)
    assert value.item() == 0.0
    assert not gradient.any()


def test_the_ce_gradient_is_the_slope_of_the_float64_value_and_zero_where_ignored() -> None:
    logits, labels = draw_logits(1, 4, 9), np.array([2, -100, 8, 0])
    gradient = mx.grad(compute_ce_loss)(mx.array(logits), mx.array(labels))
    counts = labels >= 0
    expected = slope(lambda x: cross_entropy(x[counts], labels[counts]).mean(), logits)
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
    assert ce.item() == pytest.approx(cross_entropy(as_read[1], labels).mean(), rel=1e-5)


def test_annotated_shapes_are_checked_under_pytest() -> None:
    with pytest.raises(TypeCheckError, match="targets"):
        compute_ce_loss(mx.zeros((2, 3, 5)), mx.zeros((2, 4), dtype=mx.int32))


def test_annotated_dtypes_are_checked_under_pytest() -> None:
    with pytest.raises(TypeCheckError, match="targets"):
        compute_ce_loss(mx.zeros((2, 5)), mx.zeros((2,)))


def test_annotated_fields_are_checked_under_pytest() -> None:
    with pytest.raises(TypeCheckError, match="logprobs"):
        TokenTargets(
            mx.zeros((2, 5), dtype=mx.int32), mx.zeros((2, 5)), mx.zeros((3, 5)), mx.zeros((2, 5), dtype=mx.bool_)
        )


# The fast path ------------------------------------------------------------------------------------------------------

WIDTH = 32


def objective(
    case: Case | None = None, temperature: float = 2.0, alpha: float = 0.7, chunk: int | None = 16
) -> Objective:
    return Objective(case.divergence if case else ForwardKL(), temperature, alpha, chunk)


def whole_vocabulary(teacher: np.ndarray, temperature: float) -> TokenTargets:
    """Targets with an entry for every id."""
    logprobs = log_softmax(teacher, temperature).astype(np.float32)
    ids = np.broadcast_to(np.arange(teacher.shape[-1], dtype=np.int32), teacher.shape)
    exact = mx.ones(teacher.shape, dtype=mx.bool_)
    return TokenTargets(mx.array(ids), mx.array(np.exp(logprobs)), mx.array(logprobs), exact)


def few_entries(seed: int, rows: int, entries: int = 6) -> TokenTargets:
    """Targets with some ids of each row, half of them drawn; their weights sum to less than 1."""
    rng = np.random.default_rng(seed)
    ids = np.sort(np.stack([rng.permutation(VOCAB)[:entries] for _ in range(rows)]), axis=-1).astype(np.int32)
    weights = (rng.dirichlet(np.ones(entries), rows) * rng.uniform(0.2, 0.9, (rows, 1))).astype(np.float32)
    exact = np.broadcast_to(np.arange(entries) < entries // 2, ids.shape)
    logprobs = np.where(exact, np.log(weights), -5 * rng.random((rows, entries))).astype(np.float32)
    return TokenTargets(mx.array(ids), mx.array(weights), mx.array(logprobs), mx.array(exact))


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


def draw_weights(seed: int, rows: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).uniform(0.0, 3.0, rows).astype(np.float32))


def values(sums: LossSums) -> list[float]:
    return [sums.total.item(), sums.kd.item(), sums.ce.item()]


def kd_of(student: mx.array, targets: BatchTargets, temperature: float) -> mx.array:
    """T^2 * KL of each token."""
    labels = mx.zeros(len(student), dtype=mx.int32)
    return token_losses(student, labels, targets, objective(temperature=temperature))[0]


def dense_total(
    logits: mx.array, labels: mx.array, teacher: mx.array, given: Objective
) -> tuple[mx.array, mx.array, mx.array]:
    """The sums by the dense losses; differentiable."""
    kd = len(logits) * compute_kd_loss(teacher, logits, given.temperature, given.divergence)
    ce = len(logits) * compute_ce_loss(logits, labels)
    return given.alpha * kd + (1 - given.alpha) * ce, kd, ce


@every_kind
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@every_case
def test_the_fast_path_is_the_dense_loss_and_its_gradient(case: Case, alpha: float, kind: str) -> None:
    rows, given = 21, objective(case, alpha=alpha)
    head, hidden, labels, weights = draw_head(1), draw_hidden(2, rows), draw_labels(3, rows), mx.ones(rows)
    hidden_targets, logits = by_hidden_states(4, rows)
    targets = hidden_targets if kind == "hidden states" else whole_vocabulary(logits, 2.0)
    teacher = mx.array(logits.astype(np.float32))
    (total, kd, ce), expected = mx.value_and_grad(lambda states: dense_total(head(states), labels, teacher, given))(
        hidden
    )
    sums, gradient, parameters = head_losses(head, hidden, labels, targets, weights, given)
    assert values(sums) == pytest.approx([total.item(), kd.item(), ce.item()], rel=1e-4)
    np.testing.assert_allclose(np.array(gradient), np.array(expected), rtol=1e-3, atol=3e-5)
    assert parameters == {}


@every_case
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.7])
def test_the_gradient_at_the_hidden_states_is_the_slope_of_the_float64_value(temperature: float, case: Case) -> None:
    rows, given = 3, objective(case, temperature, alpha=0.6)
    head, labels, weights = draw_head(1), draw_labels(3, rows), draw_weights(5, rows)
    weight, teacher = np.array(head.weight, dtype=np.float64), draw_logits(4, rows, VOCAB)
    hidden = draw_hidden(2, rows)
    _, gradient, _ = head_losses(head, hidden, labels, whole_vocabulary(teacher, temperature), weights, given)

    def total(part: np.ndarray) -> float:
        states = np.array(hidden, dtype=np.float64)
        states[:, :5] = part
        logits = states @ weight.T
        kd, ce = case.between(teacher, logits, temperature), cross_entropy(logits, np.array(labels))
        return float((np.array(weights) * (0.6 * kd + 0.4 * ce)).sum())

    expected = slope(total, np.array(hidden)[:, :5])
    found = np.array(gradient)[:, :5]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-5 * max(1.0, np.abs(expected).max()))


FORWARD = CASES["forward_kl"]


@pytest.mark.parametrize(
    ("case", "rows", "chunk"),
    [
        *((case, 37, 16) for case in CASES.values()),
        *((FORWARD, *size) for size in ((32, 16), (37, 32), (37, None), (1, 16), (17, 16))),
    ],
)
@every_kind
def test_the_chunk_changes_nothing_but_memory(case: Case, kind: str, rows: int, chunk: int | None) -> None:
    head, hidden, labels, weights = draw_head(1), draw_hidden(2, rows), draw_labels(3, rows), draw_weights(5, rows)
    targets = draw_targets(kind, 4, rows)
    found, gradient, _ = head_losses(head, hidden, labels, targets, weights, objective(case, chunk=chunk))
    expected, expected_gradient, _ = head_losses(head, hidden, labels, targets, weights, objective(case, chunk=1000))
    assert values(found) == pytest.approx(values(expected), rel=1e-5)
    np.testing.assert_allclose(np.array(gradient), np.array(expected_gradient), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("chunk", "vocab"), [(16, 10**6), (700, 50), (None, 50), (None, 60_000), (None, 10**7)])
def test_a_chunk_is_as_asked_for_or_as_large_as_memory_allows(chunk: int | None, vocab: int) -> None:
    rows = chunk_rows(chunk, vocab)
    assert rows >= 16
    assert rows == chunk or rows % 16 == 0
    assert rows == chunk or rows == 16 or rows * vocab * 4 <= 128_000_000


@pytest.mark.parametrize("rows", [1, 16, 17, 48])
def test_chunks_are_all_the_rows_in_their_order(rows: int) -> None:
    found = list(chunks(draw_head(1), draw_hidden(2, rows), objective()))
    assert [at for rows in found for at in range(rows.start, rows.stop)] == list(range(rows))
    assert all(before.stop == after.start for before, after in pairwise(found))
    assert max(rows.stop - rows.start for rows in found) <= 16


@pytest.mark.parametrize(
    ("case", "cut"), [*((case, 10) for case in CASES.values()), *((FORWARD, cut) for cut in (1, 16, 22))]
)
@every_kind
def test_splitting_the_rows_changes_nothing(cut: int, kind: str, case: Case) -> None:
    head, hidden, labels, weights = draw_head(1), draw_hidden(2, 23), draw_labels(3, 23), draw_weights(5, 23)
    targets, given = draw_targets(kind, 4, 23), objective(case)
    whole, gradient, _ = head_losses(head, hidden, labels, targets, weights, given)
    sums, parts = LossSums.zero(), []
    for start, stop in ((0, cut), (cut, 23)):
        rows = slice(start, stop)
        each, part, _ = head_losses(head, hidden[rows], labels[rows], targets.rows(start, stop), weights[rows], given)
        sums, parts = sums + each, [*parts, part]
    assert values(sums) == pytest.approx(values(whole), rel=1e-5)
    np.testing.assert_allclose(np.array(mx.concatenate(parts)), np.array(gradient), rtol=1e-4, atol=2e-6)


@every_case
@every_kind
def test_rows_of_no_weight_change_nothing_and_get_no_gradient(kind: str, case: Case) -> None:
    head, hidden, labels = draw_head(1), draw_hidden(2, 23), draw_labels(3, 23)
    targets, given = draw_targets(kind, 4, 23), objective(case)
    weights = mx.array(np.where(np.arange(23) < 9, np.array(draw_weights(5, 23)), 0.0).astype(np.float32))
    found, gradient, _ = head_losses(head, hidden, labels, targets, weights, given)
    bare, bare_gradient, _ = head_losses(head, hidden[:9], labels[:9], targets.rows(0, 9), weights[:9], given)
    assert values(found) == pytest.approx(values(bare), rel=1e-5)
    np.testing.assert_allclose(np.array(gradient[:9]), np.array(bare_gradient), rtol=1e-4, atol=2e-6)
    assert not gradient[9:].any()


@every_case
@every_kind
def test_weights_multiply_the_losses_and_the_gradient_of_their_tokens(kind: str, case: Case) -> None:
    head, hidden, labels, weights = draw_head(1), draw_hidden(2, 23), draw_labels(3, 23), draw_weights(5, 23)
    targets, given = draw_targets(kind, 4, 23), objective(case)
    plain, plain_gradient, _ = head_losses(head, hidden, labels, targets, mx.ones(23), given)
    found, gradient, _ = head_losses(head, hidden, labels, targets, weights, given)
    kd, ce = token_losses(head(hidden), labels, targets, given)
    assert values(plain)[1:] == pytest.approx([mx.sum(kd).item(), mx.sum(ce).item()], rel=1e-5)
    assert values(found)[1:] == pytest.approx([mx.sum(weights * kd).item(), mx.sum(weights * ce).item()], rel=1e-4)
    assert found.total.item() == pytest.approx(0.7 * found.kd.item() + 0.3 * found.ce.item(), rel=1e-5)
    expected = np.array(weights)[:, None] * np.array(plain_gradient)
    np.testing.assert_allclose(np.array(gradient), expected, rtol=1e-3, atol=1e-5)


def test_the_sums_of_no_tokens_are_zero() -> None:
    assert values(LossSums.zero()) == [0.0, 0.0, 0.0]


def test_alpha_may_be_an_array() -> None:
    head, hidden, labels, weights = draw_head(1), draw_hidden(2, 9), draw_labels(3, 9), draw_weights(5, 9)
    targets = few_entries(4, 9)
    found, gradient, _ = head_losses(
        head, hidden, labels, targets, weights, Objective(ForwardKL(), 2.0, mx.array(0.3), 16)
    )
    expected, expected_gradient, _ = head_losses(head, hidden, labels, targets, weights, objective(alpha=0.3))
    assert values(found) == pytest.approx(values(expected), rel=1e-6)
    np.testing.assert_allclose(np.array(gradient), np.array(expected_gradient), rtol=1e-5, atol=1e-6)


# The teacher's ids and the student's --------------------------------------------------------------------------------


@checked_often
@given(teacher=some_logits, student=some_logits, temperature=some_temperature)
def test_sparse_targets_over_the_whole_vocabulary_give_the_float64_kl_of_every_token(
    teacher, student, temperature
) -> None:
    found = kd_of(mx.array(student), whole_vocabulary(teacher, temperature), temperature)
    expected = reference_kd(teacher, student, temperature)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-5, atol=3 * rounding(temperature))


@every_temperature
def test_hidden_states_give_the_dense_loss(temperature: float) -> None:
    targets, teacher = by_hidden_states(4, 9, temperature)
    student = mx.array(draw_logits(2, 9, VOCAB))
    found = kd_of(student, targets, temperature)
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
    found = mx.mean(kd_of(student, targets, temperature)).item()
    permuted = mx.array(in_student_ids(teacher, id_map, width).astype(np.float32))
    assert found == pytest.approx(compute_kd_loss(permuted, student, temperature).item(), rel=1e-4)


@every_case
def test_hidden_states_of_a_narrower_teacher_give_the_dense_loss_without_a_map(case: Case) -> None:
    targets, teacher = by_hidden_states(4, 9)
    student = mx.array(draw_logits(2, 9, VOCAB + 7))
    permuted = mx.array(in_student_ids(teacher, np.arange(VOCAB), VOCAB + 7).astype(np.float32))
    found = mx.mean(token_losses(student, draw_labels(3, 9), targets, objective(case))[0]).item()
    assert found == pytest.approx(compute_kd_loss(permuted, student, 2.0, case.divergence).item(), rel=1e-4)


@every_temperature
@pytest.mark.parametrize("width", [30, VOCAB, VOCAB + 7])
def test_ids_that_the_student_lacks_are_left_out_and_their_mass_is_not_handed_on(
    temperature: float, width: int
) -> None:
    id_map = np.random.default_rng(0).permutation(VOCAB).astype(np.int32)
    id_map[(id_map >= 25) | (np.arange(VOCAB) % 4 == 0)] = -1
    targets, teacher = by_hidden_states(4, 9, temperature, id_map)
    student = draw_logits(2, 9, width)
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    shared = id_map >= 0
    terms = np.exp(log_p[:, shared]) * (log_p[:, shared] - log_q[:, id_map[shared]])
    found = np.array(kd_of(mx.array(student), targets, temperature))
    np.testing.assert_allclose(found, temperature**2 * terms.sum(axis=-1), rtol=1e-4, atol=1e-4)


@every_temperature
def test_a_student_that_is_its_teacher_has_no_loss(temperature: float) -> None:
    targets, teacher = by_hidden_states(4, 9, temperature)
    found = np.array(kd_of(mx.array(teacher.astype(np.float32)), targets, temperature))
    np.testing.assert_allclose(found, 0.0, atol=rounding(temperature))


def test_the_best_entry_is_the_most_likely_of_those_the_student_has() -> None:
    targets = TokenTargets(
        ids=mx.array([[7, 2, 9], [0, 4, 0], [5, 6, 0]]),
        weights=mx.array([[0.3, 0.5, 0.2], [0.0, 0.4, 0.0], [0.1, 0.1, 0.0]]),
        logprobs=mx.array([[-1.2, -0.7, -1.6], [-0.1, -0.9, 0.0], [-3.0, -2.0, 0.0]]),
        exact=mx.ones((3, 3), dtype=mx.bool_),
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


# The head -----------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_head_passes_the_gradient_of_its_unpacked_weights(bits: int, kind: str) -> None:
    packed = draw_head(1).to_quantized(group_size=32, bits=bits)
    assert isinstance(packed, nn.QuantizedLinear)
    unpacked = mx.dequantize(packed.weight, packed.scales, packed.biases, group_size=32, bits=bits)
    given = (draw_hidden(2, 23), draw_labels(3, 23), draw_targets(kind, 4, 23), draw_weights(5, 23), objective())
    sums, gradient, _ = head_losses(packed, *given)
    expected, expected_gradient, _ = head_losses(lambda states: states @ unpacked.T, *given)
    assert values(sums) == pytest.approx(values(expected), rel=1e-4)
    np.testing.assert_allclose(np.array(gradient), np.array(expected_gradient), rtol=1e-3, atol=1e-4)


@every_kind
def test_half_precision_states_get_a_gradient_of_their_own_type(kind: str) -> None:
    head, labels, targets, weights = draw_head(1), draw_labels(3, 23), draw_targets(kind, 4, 23), draw_weights(5, 23)
    hidden = draw_hidden(2, 23).astype(mx.bfloat16)
    head.weight = head.weight.astype(mx.bfloat16)
    sums, gradient, _ = head_losses(head, hidden, labels, targets, weights, objective())
    kd, ce = token_losses(head(hidden), labels, targets, objective())
    assert gradient.dtype == mx.bfloat16
    assert values(sums)[1:] == pytest.approx([mx.sum(weights * part).item() for part in (kd, ce)], rel=1e-4)


def lora() -> nn.Module:
    layer = LoRALinear.from_base(draw_head(1), r=3, scale=2.0)
    layer.lora_b = mx.array(draw_logits(9, *layer.lora_b.shape, scale=0.3))
    layer.freeze()
    layer.unfreeze(keys=["lora_a", "lora_b"])
    return layer


def quantised_lora() -> nn.Module:
    layer = LoRALinear.from_base(draw_head(1).to_quantized(group_size=32, bits=8), r=3, scale=2.0)
    layer.lora_b = mx.array(draw_logits(9, *layer.lora_b.shape, scale=0.3))
    layer.freeze()
    layer.unfreeze(keys=["lora_a", "lora_b"])
    return layer


def dora() -> nn.Module:
    layer = DoRALinear.from_base(draw_head(1), r=3, scale=2.0)
    layer.lora_b = mx.array(draw_logits(9, *layer.lora_b.shape, scale=0.3))
    layer.freeze()
    layer.unfreeze(keys=["lora_a", "lora_b", "m"])
    return layer


def biased() -> nn.Module:
    layer = nn.Linear(WIDTH, VOCAB, bias=True)
    layer.weight, layer.bias = draw_head(1).weight, mx.array(draw_logits(9, VOCAB))
    return layer


TRAINED: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "linear": (lambda: draw_head(1), {"weight"}),
    "linear with a bias": (biased, {"weight", "bias"}),
    "lora": (lora, {"lora_a", "lora_b"}),
    "lora on a quantised head": (quantised_lora, {"lora_a", "lora_b"}),
    "dora": (dora, {"lora_a", "lora_b", "m"}),
}


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("case", [CASES["forward_kl"], CASES["jensen_shannon 0.5"]], ids=["forward KL", "JS"])
@pytest.mark.parametrize("cap", [None, 3.0], ids=["plain", "soft-capped"])
def test_the_gradient_of_a_trained_head_is_that_of_the_dense_loss(kind: str, case: Case, cap: float | None) -> None:
    make, names = TRAINED[kind]
    layer, rows, given = make(), 37, objective(case)
    hidden, labels, weights = draw_hidden(2, rows), draw_labels(3, rows), mx.ones(rows)
    targets, teacher = by_hidden_states(4, rows)
    before = {name: np.array(value) for name, value in tree_flatten(layer.parameters())}

    def head(states: mx.array) -> mx.array:
        return layer(states) if cap is None else cap * mx.tanh(layer(states) / cap)

    def dense() -> mx.array:
        return dense_total(head(hidden), labels, mx.array(teacher.astype(np.float32)), given)[0]

    _, expected = nn.value_and_grad(layer, dense)()
    _, expected_states = mx.value_and_grad(
        lambda states: dense_total(head(states), labels, mx.array(teacher.astype(np.float32)), given)[0]
    )(hidden)
    _, states, parameters = head_losses(head, hidden, labels, targets, weights, given, layer)
    found = dict(tree_flatten(parameters))
    assert set(found) == names
    for name, value in tree_flatten(expected):
        scale = np.abs(np.array(value)).max()
        np.testing.assert_allclose(np.array(found[name]), np.array(value), rtol=1e-3, atol=1e-4 * scale, err_msg=name)
    np.testing.assert_allclose(np.array(states), np.array(expected_states), rtol=1e-3, atol=1e-4)
    after = dict(tree_flatten(layer.parameters()))
    assert set(after) == set(before)
    assert all((np.array(after[name]) == value).all() for name, value in before.items())


def test_a_layer_without_trainable_parameters_has_no_gradient() -> None:
    layer = draw_head(1)
    layer.freeze()
    given = (draw_hidden(2, 20), draw_labels(3, 20), few_entries(4, 20), mx.ones(20), objective())
    assert tree_flatten(head_losses(layer, *given, layer)[2]) == []


# Memory -------------------------------------------------------------------------------------------------------------


def peak_of(compute: Callable[[], object]) -> int:
    """Bytes that a computation takes beyond what is there already."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(compute())
    return mx.get_peak_memory() - before


ARRAYS = {"forward_kl": 16, "skewed_kl 0.1": 18, "total_variation": 18}
"""Of one chunk by the vocabulary, with a teacher's hidden states; the divergences with two exponentials take 28."""


@every_kind
@pytest.mark.parametrize(
    ("name", "training"),
    [(name, True) for name in ("forward_kl", "reverse_kl", "jensen_shannon 0.5", "skewed_kl 0.1", "total_variation")]
    + [("forward_kl", False)],
)
def test_no_array_of_tokens_by_vocabulary_outlives_a_chunk(name: str, training: bool, kind: str) -> None:
    """Of the 32 chunks, so many arrays of one chunk by the vocabulary are there at a time."""
    rows, vocab = 1024, 2048
    head = nn.Linear(WIDTH, vocab, bias=False)
    hidden, labels, targets, weights = draw_hidden(2, rows), draw_labels(3, rows), few_entries(4, rows), mx.ones(rows)
    if kind == "hidden states":
        targets = by_hidden_states(4, rows, id_map=np.arange(vocab, dtype=np.int32)[::-1].copy(), vocab=vocab)[0]
    given = objective(CASES[name], chunk=32)
    mx.eval(head.parameters(), hidden, labels, weights, targets.arrays)
    mx.eval(token_losses(head(hidden[:1]), labels[:1], targets.rows(0, 1), given))

    def surrogate(hidden: mx.array) -> tuple[mx.array, mx.array]:
        sums, gradient, _ = head_losses(head, mx.stop_gradient(hidden), labels, targets, weights, given)
        return mx.sum(hidden * mx.stop_gradient(gradient)), sums.total

    peak = peak_of(lambda: mx.value_and_grad(surrogate)(hidden) if training else surrogate(hidden))
    assert peak < (10 if kind == "entries" else ARRAYS.get(name, 28)) * 32 * vocab * 4


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon 0.5"])
def test_of_a_large_vocabulary_not_a_quarter_of_the_logits_is_in_memory(name: str) -> None:
    rows, vocab, width = 1024, 60_000, 16
    head, hidden = nn.Linear(width, vocab, bias=False), draw_hidden(2, rows)[:, :width]
    labels, targets, weights = draw_labels(3, rows), few_entries(4, rows), mx.ones(rows)
    mx.eval(head.parameters(), hidden, labels, weights, targets.arrays)
    peak = peak_of(lambda: head_losses(head, hidden, labels, targets, weights, objective(CASES[name]))[1])
    assert peak < rows * vocab * 4 / 4


# Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"divergence": "kl"},
        {"divergence": "forward-kl"},
        {"temperature": 0.49},
        {"temperature": 10.01},
        {"temperature": "2"},
        {"temperature_end": 0.4},
        {"temperature_end": 11.0},
        {"alpha": -0.01},
        {"alpha": 1.01},
        {"alpha": float("nan")},
        {"alpha": True},
        {"alpha_end": -0.01},
        {"alpha_end": 1.01},
        {"beta": 0.0},
        {"beta": 1.0},
        {"skew": 0.0},
        {"skew": 1.0},
        {"weigh_by": "length"},
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
            options = LossOptions(temperature=temperature, alpha=alpha, beta=0.01, skew=0.99)
            assert (options.temperature, options.alpha) == (temperature, alpha)


@pytest.mark.parametrize("name", sorted({case.name for case in CASES.values()}))
def test_the_options_choose_the_divergence_with_its_parameters(name: str) -> None:
    found = LossOptions(divergence=name, beta=0.3, skew=0.4).final.divergence
    if name == "jensen_shannon":
        assert found == JensenShannon(0.3)
    elif name.startswith("skewed"):
        assert found in (SkewedKL(0.4), SkewedReverseKL(0.4))
    assert type(found) is type(next(case for case in CASES.values() if case.name == name).divergence)


def test_without_any_option_it_is_hintons_loss() -> None:
    final = LossOptions().final
    assert (final.divergence, final.temperature, final.alpha, final.chunk) == (ForwardKL(), 2.0, 0.7, None)
    assert LossOptions().weigh_by == "none"


def test_what_has_no_end_stays() -> None:
    options = LossOptions(temperature=3.0, alpha=0.4)
    assert options.at(0.0) == options.at(0.37) == options.at(1.0) == options.final
    assert options.hottest == 3.0


def test_temperature_and_alpha_go_along_a_line_to_their_ends() -> None:
    options = LossOptions(temperature=4.0, temperature_end=1.0, alpha=0.25, alpha_end=0.75)
    found = [(options.at(progress).temperature, options.at(progress).alpha) for progress in (0.0, 0.5, 1.0)]
    assert found == [(4.0, 0.25), (2.5, 0.5), (1.0, 0.75)]
    assert options.final == options.at(1.0)


bounds_of_alpha, bounds_of_temperature = st.floats(0.0, 1.0), st.floats(0.5, 10.0)


@checked_often
@given(
    start=bounds_of_temperature,
    end=bounds_of_temperature,
    alpha=bounds_of_alpha,
    alpha_end=bounds_of_alpha,
    progress=st.floats(0.0, 1.0),
)
def test_no_step_is_hotter_than_the_hottest(start, end, alpha, alpha_end, progress) -> None:
    options = LossOptions(temperature=start, temperature_end=end, alpha=alpha, alpha_end=alpha_end)
    found = options.at(progress)
    assert options.hottest == max(start, end)
    assert min(start, end) * (1 - 1e-12) <= found.temperature <= options.hottest * (1 + 1e-12)
    assert min(alpha, alpha_end) - 1e-12 <= found.alpha <= max(alpha, alpha_end) + 1e-12


@pytest.mark.parametrize(
    ("start", "end"),
    [(4.0, 1.0), (2.0, 3.7), (1.6, 0.6)],
)
def test_the_run_begins_and_ends_on_the_numbers_that_were_given(start: float, end: float) -> None:
    options = LossOptions(temperature=start, temperature_end=end)
    assert (options.at(0.0).temperature, options.final.temperature) == (start, end)


@pytest.mark.parametrize(
    ("alpha", "alpha_end", "distils"),
    [(0.0, None, False), (0.0, 0.0, False), (0.0, 0.1, True), (0.1, 0.0, True), (0.7, None, True), (1.0, 0.5, True)],
)
def test_a_run_distils_unless_alpha_stays_at_zero(alpha: float, alpha_end: float | None, distils: bool) -> None:
    assert LossOptions(alpha=alpha, alpha_end=alpha_end).distils is distils


def test_a_config_has_the_keys_of_the_losses(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    written = {
        "divergence": "jensen_shannon",
        "temperature": 3.0,
        "temperature_end": 1.0,
        "alpha": 0.2,
        "alpha_end": 0.9,
        "beta": 0.25,
        "skew": 0.3,
        "weigh_by": "certainty",
        "chunk": 64,
    }
    path.write_text("losses:\n" + "".join(f"  {key}: {value}\n" for key, value in written.items()))
    found = load_config(path, None, []).losses
    assert found == LossOptions(**written)
    assert set(written) == set(LossOptions.model_fields)


def test_a_divergence_that_is_misspelt_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text("losses:\n  divergence: jensen_shanon\n")
    with pytest.raises(ConfigError, match=r"base\.yaml:2 losses\.divergence.*jensen_shannon"):
        load_config(path, None, [])
