"""The sparse teacher is unbiased at every temperature, to within what its two number formats and its spline leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from itertools import chain, pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from true_kd.errors import ModelError
from true_kd.losses import ForwardKL, Objective, TokenTargets, compute_kd_loss, head_losses, token_losses
from true_kd.shards import CachedReply, pack_replies, unpack_replies
from true_kd.targets import (
    HiddenTargets,
    SparseTargets,
    TargetOptions,
    TargetSettings,
    TeacherHead,
    count_entries,
    encode,
    join,
    pack_bits,
    pack_sorted,
    unpack_bits,
    unpack_sorted,
    width_of,
)
from true_kd.targets.encoding import _blocked, _sum_chunk
from true_kd.targets.sparse import TAIL_TEMPERATURES, _spline
from true_kd.targets.values import (
    LEAST_LOGPROB,
    LOGPROBS,
    from_drawn,
    logprob_codes,
    tail_codes,
    tail_logs,
    to_drawn,
)

VOCAB = 60
SIZES = (500, 4_000, 152_000)
HALF_TAIL_STEP = 33.0 / 1023 / 2
"""Nats: what ten bits between -20 and 13 leave of the logarithm of a tail."""
DRAW_TEMPERATURES = (1.0, 2.0, 4.0)
every_draw_temperature = pytest.mark.parametrize("draw_temperature", DRAW_TEMPERATURES)
every_temperature = pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 10.0])
checked_often = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)
scales = st.floats(0.0, 8.0)
draw_temperatures = st.sampled_from(DRAW_TEMPERATURES)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def log_sum(logs: np.ndarray) -> float:
    """Logarithm of the sum of exponentials."""
    largest = logs.max()
    return float(largest + np.log(np.exp(logs - largest).sum()))


def softened(logits: np.ndarray, temperature: float) -> np.ndarray:
    """The teacher's distribution at a temperature, float64."""
    return np.exp(log_softmax(logits.astype(np.float64) / temperature))


def draw_logits(seed: int, tokens: int, vocab: int = VOCAB, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=(tokens, vocab))).astype(np.float32)


def draw_labels(seed: int, tokens: int, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed + 1).integers(0, vocab, tokens).astype(np.int32)


def kept(threshold: float = 0.02, draw_temperature: float = 2.0) -> TargetSettings:
    return TargetSettings("sparse", threshold, draw_temperature, 1.0)


ALL_EXACT = kept(threshold=1e-30)


def compress(
    logits: np.ndarray,
    settings: TargetSettings,
    *,
    labels: np.ndarray | None = None,
    uniforms: np.ndarray | None = None,
    seed: int = 0,
) -> SparseTargets:
    """`encode` with labels and uniforms drawn where they do not matter."""
    labels = draw_labels(seed, len(logits), logits.shape[1]) if labels is None else labels
    uniforms = np.random.default_rng(seed + 2).random(len(logits), dtype=np.float32) if uniforms is None else uniforms
    return encode(mx.array(logits), mx.array(labels), uniforms, settings)


def compress_one(logits: np.ndarray, settings: TargetSettings, *, label: int, uniforms: np.ndarray) -> SparseTargets:
    """One token encoded with each of some uniforms."""
    rows = np.repeat(logits.reshape(1, -1), len(uniforms), axis=0)
    return compress(rows, settings, labels=np.full(len(uniforms), label, dtype=np.int32), uniforms=uniforms)


def even_uniforms(count: int) -> np.ndarray:
    """Uniforms that divide [0, 1) evenly: a mean over them is the expectation up to one part in `count`."""
    return ((np.arange(count) + 0.5) / count).astype(np.float32)


def row_sums(targets: SparseTargets, values: np.ndarray) -> np.ndarray:
    return np.bincount(targets.rows, values, minlength=len(targets))


def mean_weights(targets: SparseTargets, temperature: float) -> np.ndarray:
    """Weights of the ids at a temperature, the mean over the tokens."""
    weights, _ = targets.at_temperature(temperature)
    return np.bincount(targets.ids, weights, minlength=targets.vocab_size) / len(targets)


def spread(targets: SparseTargets, values: np.ndarray, vocab: int = VOCAB) -> np.ndarray:
    """Values of entries as a dense [tokens, vocab] array, those of one id added, 0 where there is no entry."""
    dense = np.zeros((len(targets), vocab))
    np.add.at(dense, (targets.rows, targets.ids), values)
    return dense


def padded(targets: SparseTargets, temperature: float) -> TokenTargets:
    """Targets of the loss, one row a token."""
    weights, logprobs = targets.at_temperature(temperature)
    counts = np.diff(targets.offsets)
    filled = np.arange(counts.max())[None] < counts[:, None]
    arrays = []
    parts = ((targets.ids, np.int32), (weights, np.float32), (logprobs, np.float32), (targets.exact, np.bool_))
    for values, dtype in parts:
        array = np.zeros(filled.shape, dtype=dtype)
        array[filled] = values
        arrays.append(mx.array(array))
    return TokenTargets(*arrays)


def kl_of(student: np.ndarray, targets: TokenTargets, temperature: float) -> np.ndarray:
    """T^2 * KL of each token."""
    labels = mx.zeros(len(student), dtype=mx.int32)
    objective = Objective(ForwardKL(), temperature, 1.0, None)
    return np.array(token_losses(mx.array(student), labels, targets, objective)[0])


def mean_slope(student: np.ndarray, targets: TokenTargets, temperature: float) -> np.ndarray:
    """Derivative of the KL with respect to the student's softened logits, the mean over the tokens."""
    rows = len(targets.ids)
    logits, labels = mx.array(np.repeat(student, rows, axis=0)), mx.zeros(rows, dtype=mx.int32)
    objective = Objective(ForwardKL(), temperature, 1.0, None)
    _, slope, _ = head_losses(lambda states: states, logits, labels, targets, mx.ones(rows), objective)
    return np.array(slope).mean(axis=0) / temperature


def half_steps(logprobs: np.ndarray, exact: np.ndarray | bool = True) -> np.ndarray:
    """How far the code of a log-probability can be from it, nats: half a code, of drawn ids two; three at the end."""
    codes = 255 * np.sqrt(np.minimum(logprobs / LEAST_LOGPROB, 1.0))
    half = np.where(exact, 0.5, np.maximum(2.0, codes - 252.0))
    beyond = np.maximum(LEAST_LOGPROB - np.maximum(logprobs, -1e4), 0.0)
    return -LEAST_LOGPROB * half * (2 * codes + 2 * half) / 255**2 + beyond


def all_exact(logprobs: np.ndarray) -> np.ndarray:
    """The codes of log-probabilities of ids that are kept exactly."""
    return logprob_codes(logprobs, np.ones(logprobs.shape, dtype=bool))


def same(left: SparseTargets, right: SparseTargets) -> bool:
    """Whether every field is equal to the bit."""
    pairs = [(getattr(left, field.name), getattr(right, field.name)) for field in fields(SparseTargets)]
    return all(
        one.dtype == other.dtype and np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other
        for one, other in pairs
    )


# What is kept -------------------------------------------------------------------------------------------------------


@checked_often
@given(seed=seeds, scale=scales, draw_temperature=draw_temperatures)
def test_the_realised_token_comes_first_in_its_row_and_is_kept_exactly_once(seed, scale, draw_temperature) -> None:
    labels = draw_labels(seed, 5)
    targets = compress(
        draw_logits(seed, 5, scale=scale), kept(draw_temperature=draw_temperature), labels=labels, seed=seed
    )
    assert len(targets) == 5
    np.testing.assert_array_equal(targets.labels, labels)
    others = np.delete(np.arange(len(targets.ids)), targets.offsets[:-1])
    within = np.diff(targets.rows[others]) == 0
    assert (np.diff(targets.ids[others])[within] >= 0).all(), "the others ascend"
    assert targets.exact[targets.offsets[:-1]].all()
    assert row_sums(targets, targets.ids == labels[targets.rows]).tolist() == [1.0] * 5


@checked_often
@given(seed=seeds, scale=scales, draw_temperature=draw_temperatures)
def test_an_id_is_either_kept_exactly_once_or_drawn(seed, scale, draw_temperature) -> None:
    logits = draw_logits(seed, 5, scale=scale)
    targets = compress(logits, kept(0.1, draw_temperature), seed=seed)
    exact, drawn = spread(targets, targets.exact), spread(targets, ~targets.exact)
    assert exact.max() == 1
    assert not (exact * drawn).any()
    assert targets.ids.min() >= 0
    assert targets.ids.max() < VOCAB


@every_draw_temperature
@pytest.mark.parametrize("threshold", [0.001, 0.02, 0.2])
def test_ids_above_the_threshold_are_kept_exactly_and_of_the_others_only_the_label(
    draw_temperature: float, threshold: float
) -> None:
    logits, labels = draw_logits(1, 30, vocab=2000), draw_labels(1, 30, vocab=2000)
    targets = compress(logits, kept(threshold, draw_temperature), labels=labels)
    share = np.maximum(softened(logits, 1.0), softened(logits, draw_temperature)) / threshold
    exact = spread(targets, targets.exact, vocab=2000).astype(bool)
    share[np.arange(30), labels] = 2.0
    undecided = np.abs(share - 1.0) < 1e-4
    np.testing.assert_array_equal(exact[~undecided], share[~undecided] >= 1.0)


def test_an_id_that_is_likely_only_when_softened_is_kept_exactly() -> None:
    logits = np.array([[8.0, 0.0, 0.0, 0.0]], dtype=np.float32)
    assert softened(logits, 1.0)[0, 1] < 0.01 < softened(logits, 2.0)[0, 1]
    assert compress(logits, kept(0.01), labels=np.array([0], dtype=np.int32)).exact.tolist() == [True] * 4
    assert compress(logits, kept(0.01, 1.0), labels=np.array([0], dtype=np.int32)).exact.sum() == 1


def test_an_id_that_is_likely_only_at_temperature_one_is_kept_exactly() -> None:
    logits = draw_logits(1, 1, vocab=4000, scale=1.0)
    logits[0, 17] = 10.0
    assert softened(logits, 4.0)[0, 17] < 0.02 < softened(logits, 1.0)[0, 17]
    targets = compress(logits, kept(draw_temperature=4.0), labels=np.array([3], dtype=np.int32))
    assert targets.ids[targets.exact].tolist() == [3, 17]


def test_stored_logprobs_are_those_of_the_whole_vocabulary_never_renormalised() -> None:
    logits = draw_logits(1, 50)
    targets = compress(logits, kept(0.3))
    expected = log_softmax(logits)[targets.rows, targets.ids]
    assert (np.abs(targets.logprobs - expected) <= 3 * half_steps(expected, targets.exact)).all()
    assert row_sums(targets, np.exp(targets.logprobs)).min() < 0.8


def test_the_most_likely_id_of_the_targets_is_the_teachers() -> None:
    logits = draw_logits(1, 200, vocab=1000, scale=4.0)
    labels = logits.argsort(axis=-1)[:, -2].astype(np.int32)
    found = np.array(padded(compress(logits, kept(), labels=labels), 1.0).best())
    np.testing.assert_array_equal(found, logits.argmax(axis=-1))


@every_draw_temperature
def test_only_differences_along_the_vocabulary_matter(draw_temperature: float) -> None:
    logits, settings = draw_logits(1, 20), kept(draw_temperature=draw_temperature)
    logits = np.round(logits * 64) / 64
    assert same(compress(logits + np.float32(8), settings), compress(logits, settings))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_logits_are_encoded_in_float32(dtype: mx.Dtype) -> None:
    logits = mx.array(draw_logits(1, 20)).astype(dtype)
    labels, uniforms = mx.array(draw_labels(1, 20)), even_uniforms(20)
    half = encode(logits, labels, uniforms, kept())
    assert same(half, encode(logits.astype(mx.float32), labels, uniforms, kept()))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_distribution_are_refused(value: float) -> None:
    logits = draw_logits(1, 5)
    logits[3, 7] = value
    with pytest.raises(ModelError, match="finite"):
        compress(logits, kept())
    with pytest.raises(ModelError, match="finite"):
        compress(np.full((1, VOCAB), -np.inf, dtype=np.float32), kept())


@every_temperature
def test_weights_of_exact_ids_are_their_probability_and_do_not_sum_to_one(temperature: float) -> None:
    logits = draw_logits(1, 50)
    targets = compress(logits, kept(0.1))
    weights, logprobs = targets.at_temperature(temperature)
    np.testing.assert_allclose(weights[targets.exact], np.exp(logprobs[targets.exact]), rtol=1e-5)
    missing = 1.0 - row_sums(targets, np.where(targets.exact, weights, 0.0))
    np.testing.assert_allclose(missing, targets.tail_mass(temperature), atol=1e-6)


# The sample of the tail ---------------------------------------------------------------------------------------------


@checked_often
@given(seed=seeds, scale=scales, draw_temperature=draw_temperatures, threshold=st.floats(0.005, 0.5))
def test_drawn_entries_of_a_row_weigh_the_same_at_the_draw_temperature(
    seed, scale, draw_temperature, threshold
) -> None:
    targets = compress(draw_logits(seed, 8, scale=scale), kept(threshold, draw_temperature), seed=seed)
    weights, _ = targets.at_temperature(draw_temperature)
    for token in range(8):
        row = slice(targets.offsets[token], targets.offsets[token + 1])
        drawn = weights[row][~targets.exact[row]]
        assert drawn.size == 0 or np.ptp(drawn) == 0


@checked_often
@given(seed=seeds, scale=scales, draw_temperature=draw_temperatures)
def test_where_the_tail_is_drawn_for_certain_weights_sum_to_one_at_the_draw_temperature(
    seed, scale, draw_temperature
) -> None:
    targets = compress(draw_logits(seed, 8, scale=scale), kept(0.02, draw_temperature), seed=seed)
    sums = row_sums(targets, targets.at_temperature(draw_temperature)[0])
    certain = targets.tail_mass(draw_temperature) > 1.05 * 0.02
    np.testing.assert_allclose(sums[certain], 1.0, atol=1e-6)


@pytest.mark.parametrize("peak", [5.0, 6.5, 9.0])
@every_draw_temperature
def test_a_tail_below_the_threshold_is_drawn_as_often_as_its_mass_asks(draw_temperature: float, peak: float) -> None:
    logits, count = draw_logits(4, 1, scale=0.5), 4000
    logits[0, 3] = draw_temperature * peak
    tail = 1.0 - softened(logits, draw_temperature)[0, 3]
    settings = kept(0.45, draw_temperature)
    assert tail < 0.45
    targets = compress_one(logits, settings, label=3, uniforms=even_uniforms(count))
    assert set(np.diff(targets.offsets)) == {1, 2}
    assert (~targets.exact).mean() * len(targets.ids) / count == pytest.approx(tail / 0.45, abs=1.5 / count)
    sums = row_sums(targets, targets.at_temperature(draw_temperature)[0])
    assert sums.min() < 1.0 < sums.max(), "a token is not renormalised"
    assert sums.mean() == pytest.approx(1.0, abs=0.04 * tail + 0.45 / count)


@checked_often
@given(seed=seeds, scale=scales, threshold=st.floats(0.001, 0.5), draw_temperature=draw_temperatures)
def test_one_entry_is_drawn_for_each_threshold_of_the_tail_and_200_at_most(
    seed, scale, threshold, draw_temperature
) -> None:
    logits = draw_logits(seed, 8, vocab=400, scale=scale)
    targets = compress(logits, kept(threshold, draw_temperature), seed=seed)
    exact = spread(targets, targets.exact, vocab=400)
    tail = (softened(logits, draw_temperature) * (1 - exact)).sum(axis=-1)
    drawn = row_sums(targets, ~targets.exact)
    wanted = tail / threshold
    assert (np.abs(drawn - np.minimum(wanted, 200)) <= np.where(wanted < 1, 1.0, 0.5) + 1e-3).all()


@pytest.mark.parametrize("uniform", [0.0, 0.999999, float(np.nextafter(np.float32(1), np.float32(0)))])
@every_draw_temperature
def test_uniforms_at_the_ends_draw_like_any_other(uniform: float, draw_temperature: float) -> None:
    targets = compress(
        np.zeros((1, 1000), dtype=np.float32),
        kept(draw_temperature=draw_temperature),
        uniforms=np.array([uniform], dtype=np.float32),
    )
    assert abs((~targets.exact).sum() - 50) <= 1
    assert row_sums(targets, targets.at_temperature(draw_temperature)[0])[0] == pytest.approx(1.0, abs=1e-6)


def test_a_nearly_uniform_teacher_is_drawn_200_times() -> None:
    targets = compress(draw_logits(1, 3, vocab=5000, scale=0.1), kept(0.001), uniforms=even_uniforms(3))
    assert row_sums(targets, ~targets.exact).tolist() == [200.0] * 3
    np.testing.assert_allclose(row_sums(targets, targets.at_temperature(2.0)[0]), 1.0, atol=1e-5)


def test_an_id_that_is_drawn_twice_has_two_entries() -> None:
    # A tail of 0.79 is drawn from three times, so that 0.263 is one draw, and an id of 0.29 is more than that.
    probabilities = np.array([0.21, 0.29, 0.30 - 1e-3, 0.1, 0.1 + 1e-3])
    settings = kept(0.3, 1.0)
    targets = compress_one(np.log(probabilities).astype(np.float32), settings, label=0, uniforms=even_uniforms(400))
    assert row_sums(targets, ~targets.exact).tolist() == [3.0] * 400
    twice = spread(targets, ~targets.exact, vocab=5) == 2
    assert twice[:, 1].mean() == pytest.approx(0.29 / (0.79 / 3) - 1, abs=0.01)
    assert twice[:, 2].any()


def test_ids_far_below_the_others_are_drawn_as_often_as_their_mass_asks() -> None:
    """Each is less than float32 can add to the sum of those before it."""
    logits = np.where(np.arange(100_000) < 50_000, 0.0, -6.0).astype(np.float32)
    targets = compress_one(logits, kept(0.01, 1.0), label=0, uniforms=even_uniforms(64))
    expected = 64 * 100 * softened(logits, 1.0)[50_000:].sum()
    assert expected > 15
    assert (targets.ids >= 50_000).sum() == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("vocab", [127, 128, 129, 255, 256, 257, 700])
def test_ids_are_drawn_alike_wherever_they_lie(vocab: int) -> None:
    targets = compress_one(np.zeros(vocab, dtype=np.float32), kept(0.2), label=0, uniforms=even_uniforms(4 * vocab))
    times = np.bincount(targets.ids[~targets.exact], minlength=vocab)
    assert times[0] == 0
    np.testing.assert_allclose(times[1:], times.sum() / (vocab - 1), atol=3)


@pytest.mark.parametrize("label", [0, 3, 127, 128, 255, 299])
@every_draw_temperature
def test_a_label_of_the_tail_is_not_drawn_besides(draw_temperature: float, label: int) -> None:
    logits = draw_logits(1, 1, vocab=300, scale=0.3)
    logits[0, label] = 0.9 * draw_temperature
    uniforms = np.concatenate([even_uniforms(200), np.arange(64, dtype=np.float32) / 64])
    targets = compress_one(logits, kept(0.05, draw_temperature), label=label, uniforms=uniforms)
    assert label not in targets.ids[~targets.exact]
    assert label in compress_one(logits, kept(0.05, draw_temperature), label=7, uniforms=uniforms).ids


@every_draw_temperature
def test_at_the_largest_uniform_no_impossible_id_is_drawn(draw_temperature: float) -> None:
    logits = np.full((300, 300), -np.inf, dtype=np.float32)
    logits[:, 5] = 0.0
    logits[:, 200] = -4.0 * draw_temperature - np.linspace(0.0, 15.0, 300)
    uniforms = np.full(300, np.nextafter(np.float32(1), np.float32(0)))
    labels = np.full(300, 200, dtype=np.int32)
    targets = compress(logits, kept(draw_temperature=draw_temperature), labels=labels, uniforms=uniforms)
    assert set(targets.ids.tolist()) == {5, 200}


# Unbiasedness -------------------------------------------------------------------------------------------------------

GRID = 2000
WIDE = 200


@cache
def over_the_grid(draw_temperature: float, scale: float) -> tuple[np.ndarray, SparseTargets]:
    """One token's logits, and its targets with uniforms from all over [0, 1)."""
    logits = draw_logits(7, 1, vocab=WIDE, scale=scale)
    settings = kept(0.03, draw_temperature)
    return logits, compress_one(logits, settings, label=3, uniforms=even_uniforms(GRID))


def slack(targets: SparseTargets, logits: np.ndarray, temperature: float) -> np.ndarray:
    """By how much the logarithm of each id's mean weight may be off: rounding, and where the tail is interpolated what
    that adds, nats [vocab]."""
    beta, of_draw = 1.0 / temperature, 1.0 / targets.draw_temperature
    logprobs = log_softmax(logits)[0]
    exact = np.zeros(len(logprobs), dtype=bool)
    exact[targets.ids[targets.exact]] = True
    share = softened(logits, temperature)[0]
    tail = HALF_TAIL_STEP
    if temperature != targets.draw_temperature:
        spline = _spline(beta)
        tail = np.abs(spline[1:]).sum() * HALF_TAIL_STEP + (0.014 if spline.max() < 1.0 - 1e-9 else 0.0)
    total = (share[exact] * half_steps(logprobs)[exact] * beta).sum() + share[~exact].sum() * tail
    drawn_head = (softened(logits, targets.draw_temperature)[0] * half_steps(logprobs) * of_draw)[exact].sum()
    reweighed = abs(beta - of_draw) * half_steps(logprobs, False)
    own = np.where(exact, beta * half_steps(logprobs), reweighed + HALF_TAIL_STEP)
    return own + total + drawn_head


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 10.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
@every_draw_temperature
def test_averaged_over_the_uniforms_the_weights_are_the_probabilities(
    draw_temperature: float, scale: float, temperature: float
) -> None:
    logits, targets = over_the_grid(draw_temperature, scale)
    mean, expected = mean_weights(targets, temperature), softened(logits, temperature)[0]
    assert len(set(targets.ids[~targets.exact])) > 100
    largest = np.maximum.reduceat(targets.at_temperature(temperature)[0], targets.offsets[:-1]).max()
    allowed = expected * np.expm1(slack(targets, logits, temperature)) + 2 * largest / GRID
    assert (np.abs(mean - expected) <= allowed).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
@every_draw_temperature
def test_averaged_over_the_uniforms_weights_sum_to_one(draw_temperature: float, scale: float) -> None:
    logits, targets = over_the_grid(draw_temperature, scale)
    for temperature in (0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 10.0):
        allowed = (softened(logits, temperature)[0] * np.expm1(slack(targets, logits, temperature))).sum()
        assert mean_weights(targets, temperature).sum() == pytest.approx(1.0, abs=allowed)


@every_draw_temperature
def test_more_draws_come_nearer_at_a_temperature_the_sample_was_not_drawn_for(draw_temperature: float) -> None:
    logits = draw_logits(7, 1, vocab=400, scale=1.0)
    expected = softened(logits, 3.0)[0, :200].sum()
    errors = []
    for threshold in (0.2, 0.02):
        targets = compress_one(logits, kept(threshold, draw_temperature), label=0, uniforms=even_uniforms(300))
        weights = np.where(targets.ids < 200, targets.at_temperature(3.0)[0], 0.0)
        errors.append(np.abs(row_sums(targets, weights) - expected).mean())
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize(
    ("draw_temperature", "temperature"), [(1.0, 1.0), (2.0, 1.0), (2.0, 2.0), (2.0, 3.0), (4.0, 4.0), (4.0, 2.0)]
)
def test_the_sparse_kl_averaged_over_the_uniforms_is_the_dense_kl(draw_temperature: float, temperature: float) -> None:
    teacher, student = draw_logits(7, 1, scale=1.5), draw_logits(8, 1, scale=1.5)
    targets = compress_one(teacher, kept(0.04, draw_temperature), label=3, uniforms=even_uniforms(1500))
    sparse = kl_of(np.repeat(student, 1500, axis=0), padded(targets, temperature), temperature)
    dense = compute_kd_loss(mx.array(teacher), mx.array(student), temperature).item()
    assert sparse.std() > 0
    assert sparse.mean() == pytest.approx(dense, rel=0.05)


@pytest.mark.parametrize(
    ("draw_temperature", "temperature"),
    [(1.0, 1.0), (1.0, 1.5), (2.0, 1.0), (2.0, 2.0), (2.0, 3.0), (4.0, 1.0), (4.0, 2.0), (4.0, 4.0), (4.0, 7.0)],
)
def test_the_sparse_gradient_averaged_over_the_uniforms_is_the_dense_gradient(
    draw_temperature: float, temperature: float
) -> None:
    teacher, student = draw_logits(7, 1, vocab=WIDE, scale=2.0), draw_logits(8, 1, vocab=WIDE, scale=2.0)
    dense = softened(student, temperature)[0] - softened(teacher, temperature)[0]
    errors = []
    for count in (1, 1000):
        targets = compress_one(teacher, kept(0.03, draw_temperature), label=3, uniforms=even_uniforms(count))
        slope = mean_slope(student, padded(targets, temperature), temperature)
        errors.append(np.linalg.norm(slope - dense) / np.linalg.norm(dense))
    assert errors[1] < (0.02 if temperature == draw_temperature else 0.05)
    assert errors[1] < errors[0] / 5


def test_the_gradient_of_the_exact_ids_alone_would_be_biased() -> None:
    teacher, student = draw_logits(7, 1, vocab=WIDE, scale=1.0), draw_logits(8, 1, vocab=WIDE, scale=1.0)
    targets = compress_one(teacher, kept(0.03), label=3, uniforms=even_uniforms(500))
    with_tail = padded(targets, 2.0)
    exact = padded(replace(targets, ids=np.where(targets.exact, targets.ids, -1)), 2.0)
    top = exact.weights / mx.sum(exact.weights, axis=-1, keepdims=True)
    top_k = TokenTargets(mx.maximum(exact.ids, 0), top, exact.logprobs, exact.exact)
    dense = softened(student, 2.0)[0] - softened(teacher, 2.0)[0]
    unbiased, biased = (mean_slope(student, each, 2.0) for each in (with_tail, top_k))
    assert np.linalg.norm(unbiased - dense) < 0.02 * np.linalg.norm(dense)
    assert np.linalg.norm(biased - dense) > np.linalg.norm(dense)


# Every temperature: the interpolation of the tail -------------------------------------------------------------------


@pytest.mark.parametrize(("index", "temperature"), [*enumerate(TAIL_TEMPERATURES, 1)])
def test_the_spline_is_exact_at_the_stored_temperatures(index: int, temperature: float) -> None:
    np.testing.assert_allclose(_spline(1.0 / temperature), np.arange(6) == index, atol=1e-12)


@given(temperature=st.floats(0.5, 10.0), cubic=st.lists(st.floats(-10, 10), min_size=4, max_size=4))
def test_the_spline_reproduces_cubics_in_one_over_the_temperature(temperature, cubic) -> None:
    knots = np.array([0.0, *(1.0 / stored for stored in TAIL_TEMPERATURES)])
    values = np.polynomial.Polynomial(cubic)(knots)
    expected = np.polynomial.Polynomial(cubic)(1.0 / temperature)
    assert values @ _spline(1.0 / temperature) == pytest.approx(expected, abs=1e-9)


@given(temperature=st.floats(0.5, 10.0))
def test_the_weights_of_the_spline_sum_to_one(temperature) -> None:
    assert _spline(1.0 / temperature).sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("stored", TAIL_TEMPERATURES)
def test_the_spline_has_no_jump_and_no_kink(stored: float) -> None:
    values = np.random.default_rng(0).normal(size=6)
    around = [1.0 / stored + step for step in (-2e-4, -1e-4, 0.0, 1e-4, 2e-4)]
    below, left, middle, right, above = (values @ _spline(beta) for beta in around)
    assert abs(right - left) < 0.05
    assert right - middle == pytest.approx(middle - left, abs=1e-4)
    assert above - right == pytest.approx(left - below, abs=1e-3)


BETWEEN = (0.6, 0.7, 0.85, 1.2, 1.33, 1.5, 1.75, 2.5, 2.8, 3.4, 5.0, 6.0, 7.0, 9.0, 10.0)


def made_up(kind: str, sharpness: float, vocab: int) -> np.ndarray:
    """Log-probabilities of a teacher, float64 [vocab]."""
    rng = np.random.default_rng(0)
    kinds: dict[str, Callable[[], np.ndarray]] = {
        "normal": lambda: sharpness * rng.normal(size=vocab),
        "laplace": lambda: sharpness * rng.laplace(size=vocab),
        "zipf": lambda: -sharpness * np.log(np.arange(1, vocab + 1)),
        "peak over normal": lambda: np.append(2 * rng.normal(size=vocab - 1), sharpness),
        "two steps": lambda: rng.normal(size=vocab) + sharpness * (np.arange(vocab) < vocab // 10),
        "impossible ids": lambda: np.where(np.arange(vocab) < sharpness * vocab, -np.inf, 2 * rng.normal(size=vocab)),
    }
    return log_softmax(kinds[kind]())


@cache
def errors_of_the_spline(kind: str, sharpness: float, vocab: int, draw_temperature: float = 2.0) -> dict[float, float]:
    """By temperature, how far the logarithm of the whole sum is off, nats; ids above the threshold are known."""
    logprobs = made_up(kind, sharpness, vocab)
    softer = np.exp(logprobs / draw_temperature - log_sum(logprobs / draw_temperature))
    exact = (softer >= 0.02) | (np.exp(logprobs) >= 0.02) | (np.arange(len(logprobs)) == logprobs.argmax())
    head, tail = logprobs[exact], logprobs[~exact]
    at_knots = [log_sum(tail / stored) for stored in TAIL_TEMPERATURES]
    knots = np.array([np.log(len(tail)), *np.clip(at_knots, -20.0, 13.0)])
    found = {}
    for temperature in BETWEEN:
        whole = np.logaddexp(log_sum(head / temperature), knots @ _spline(1.0 / temperature))
        found[temperature] = abs(whole - log_sum(logprobs / temperature))
    return found


MADE_UP = (
    *(("normal", sharpness) for sharpness in (0.3, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)),
    *(("laplace", sharpness) for sharpness in (0.5, 1.0, 2.0)),
    *(("zipf", sharpness) for sharpness in (0.7, 1.0, 1.3, 2.0)),
    *(("peak over normal", sharpness) for sharpness in (8.0, 14.0, 20.0)),
)


@pytest.mark.parametrize(("kind", "sharpness"), MADE_UP)
def test_between_the_stored_temperatures_the_whole_sum_is_off_by_no_more_than_stated(
    kind: str, sharpness: float
) -> None:
    for vocab in SIZES:
        errors = errors_of_the_spline(kind, sharpness, vocab)
        if (kind, sharpness, vocab) != ("zipf", 1.0, 152_000):
            assert max(errors.values()) < 0.11
        assert max(error for temperature, error in errors.items() if temperature > 1) < 0.08


@pytest.mark.parametrize(
    ("kind", "sharpness", "vocab"),
    [("zipf", 1.0, 152_000), ("two steps", 6.0, 152_000), ("impossible ids", 0.9, 4_000)],
)
def test_of_harder_teachers_the_whole_sum_is_off_by_no_more_than_stated(
    kind: str, sharpness: float, vocab: int
) -> None:
    assert max(errors_of_the_spline(kind, sharpness, vocab).values()) < 0.28


def test_between_the_stored_temperatures_the_whole_sum_is_off_by_little_on_average() -> None:
    errors = [errors_of_the_spline(*teacher, vocab) for teacher in MADE_UP for vocab in SIZES]
    above = [error for found in errors for temperature, error in found.items() if temperature > 1]
    assert np.mean([error for found in errors for error in found.values()]) < 0.0055
    assert np.mean(above) < 0.004


@pytest.mark.parametrize(("kind", "sharpness"), MADE_UP)
@every_draw_temperature
def test_the_tail_mass_at_any_temperature_is_right_to_rounding_and_interpolation(
    draw_temperature: float, kind: str, sharpness: float
) -> None:
    logprobs = made_up(kind, sharpness, 4_000)
    logits = logprobs[None].astype(np.float32)
    targets = compress(logits, kept(draw_temperature=draw_temperature), labels=np.array([7], dtype=np.int32))
    kept_ids = targets.ids[targets.exact]
    for temperature in (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0):
        expected = 1.0 - softened(logits, temperature)[0, kept_ids].sum()
        head = (softened(logits, temperature)[0] * half_steps(logprobs) / temperature)[kept_ids].sum()
        rounding = np.abs(_spline(1.0 / temperature)).sum() * HALF_TAIL_STEP
        allowed = expected * np.expm1(rounding + 0.11) * (1.0 - expected) + head + 1e-6
        assert targets.tail_mass(temperature)[0] == pytest.approx(expected, abs=allowed)


@pytest.mark.parametrize("temperature", [0.7, 1.5, 3.0, 6.0, 9.0, 10.0])
def test_ids_kept_exactly_are_no_part_of_the_tail(temperature: float) -> None:
    logits = np.where(np.arange(VOCAB) < 54, 0.0, -3.0).astype(np.float32)[None]
    targets = compress(logits, kept(0.01), labels=np.array([0], dtype=np.int32))
    assert targets.exact.sum() == 54
    tail = softened(logits, temperature)[0, 54:].sum()
    rounding = np.abs(_spline(1.0 / temperature)).sum() * HALF_TAIL_STEP + half_steps(np.array([-7.0]))[0]
    assert targets.tail_mass(temperature)[0] == pytest.approx(tail, rel=np.expm1(rounding))


# The two number formats ---------------------------------------------------------------------------------------------


@given(logprob=st.floats(LEAST_LOGPROB, 0.0))
def test_a_log_probability_comes_back_to_within_half_a_step(logprob) -> None:
    given = np.array([logprob])
    assert np.abs(LOGPROBS[all_exact(given)] - given) <= half_steps(given)


@pytest.mark.parametrize(
    ("least", "largest", "absolute", "relative"),
    [(0.985, 0.995, 0.003, 1.0), (0.45, 0.55, 0.011, 1.0), (0.0009, 0.0011, 1.0, 0.07), (1e-17, 1.0, 0.011, 0.18)],
)
def test_probabilities_come_back_as_near_as_stated(least: float, largest: float, absolute, relative) -> None:
    probabilities = np.exp(np.linspace(np.log(least), np.log(largest), 20_000))
    found = np.exp(LOGPROBS[all_exact(np.log(probabilities))])
    assert np.abs(found - probabilities).max() <= absolute
    assert np.abs(found / probabilities - 1).max() <= relative


@given(st.lists(st.floats(-60.0, 0.0), min_size=2, max_size=20))
def test_codes_of_log_probabilities_are_monotone(logprobs) -> None:
    found = LOGPROBS[all_exact(np.sort(np.array(logprobs)))]
    assert (np.diff(found) >= 0).all()


@given(code=st.integers(0, 255))
def test_every_code_of_a_log_probability_is_that_of_its_value(code) -> None:
    assert all_exact(LOGPROBS[[code]]) == code


@pytest.mark.parametrize(
    ("logprob", "stored"), [(0.0, 0.0), (1e-6, 0.0), (-np.inf, LEAST_LOGPROB), (-1e9, LEAST_LOGPROB)]
)
def test_log_probabilities_out_of_range_are_stored_as_the_nearest(logprob: float, stored: float) -> None:
    assert LOGPROBS[all_exact(np.array([logprob]))] == stored


@given(logprob=st.floats(-60.0, 0.0))
def test_the_code_of_a_drawn_id_comes_back_from_its_six_bits(logprob) -> None:
    code = logprob_codes(np.array([logprob]), np.array([False]))
    assert code.dtype == np.uint8
    assert to_drawn(code) < 64
    assert from_drawn(to_drawn(code)) == code
    assert np.abs(LOGPROBS[code] - max(logprob, LEAST_LOGPROB)) <= 1.01 * half_steps(
        np.array([max(logprob, -40.0)]), False
    )


@pytest.mark.parametrize("around", [-4.0, -8.0, -16.0])
def test_the_log_probability_of_a_drawn_id_comes_back_without_bias(around: float) -> None:
    logprobs = around + np.linspace(-2.0, 2.0, 100_001)
    found = LOGPROBS[logprob_codes(logprobs, np.zeros(len(logprobs), dtype=bool))]
    code = -2.0 * np.sqrt(LEAST_LOGPROB * around) / 255
    assert abs((found - logprobs).mean()) < abs(0.2 * code)


@given(log=st.floats(-20.0, 13.0))
def test_the_logarithm_of_a_tail_comes_back_to_within_half_a_step(log) -> None:
    assert np.abs(tail_logs(tail_codes(np.array([log]))) - log) <= HALF_TAIL_STEP * (1 + 1e-9)


def test_half_a_step_of_a_tail_is_as_small_as_stated() -> None:
    assert np.expm1(HALF_TAIL_STEP) < 0.0163


@given(st.lists(st.floats(-30.0, 20.0), min_size=2, max_size=20))
def test_codes_of_tails_are_monotone_and_fit_in_ten_bits(logs) -> None:
    codes = tail_codes(np.sort(np.array(logs)))
    assert (np.diff(codes.astype(int)) >= 0).all()
    assert codes.max() < 1024


def test_tails_out_of_range_are_stored_as_the_nearest() -> None:
    np.testing.assert_allclose(tail_logs(tail_codes(np.array([-np.inf, -69.0, 14.0]))), [-20.0, -20.0, 13.0])


def test_the_largest_tail_of_262_144_ids_is_in_range() -> None:
    logs = np.log([262_144.0])
    assert np.abs(tail_logs(tail_codes(logs)) - logs) <= HALF_TAIL_STEP


# Packing ------------------------------------------------------------------------------------------------------------


@given(data=st.data(), width=st.integers(1, 25))
def test_packed_numbers_come_back_from_any_stretch(data, width) -> None:
    values = np.array(data.draw(st.lists(st.integers(0, 2**width - 1), max_size=50)), dtype=np.uint32)
    start = data.draw(st.integers(0, len(values)))
    count = data.draw(st.integers(0, len(values) - start))
    packed = pack_bits(values, width)
    assert packed.dtype == np.uint8
    assert len(packed) == -(-len(values) * width // 8)
    found = unpack_bits(packed, width, start, count)
    assert found.dtype == np.uint32
    np.testing.assert_array_equal(found, values[start : start + count])


def test_the_largest_number_of_every_width_survives() -> None:
    for width in range(1, 26):
        values = np.array([2**width - 1, 0, 2**width - 1, 2**width - 1, 0, 1, 2**width - 1])
        np.testing.assert_array_equal(unpack_bits(pack_bits(values, width), width, 0, 7), values)


def test_packing_is_least_significant_bit_first() -> None:
    assert pack_bits(np.array([1, 2, 3, 4]), 3).tolist() == [0b11_010_001, 0b1000]


@pytest.mark.parametrize("width", [-1, 0, 26, 32])
def test_widths_that_cannot_be_read_back_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match="1 to 25"):
        pack_bits(np.array([0]), width)


@pytest.mark.parametrize(("value", "width"), [(2, 1), (256, 8), (-1, 8), (2**25, 25), (2**31, 25)])
def test_numbers_that_do_not_fit_are_refused(value: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"fit in {width} bits"):
        pack_bits(np.array([0, value]), width)


def test_a_number_of_more_than_32_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="fit in 8 bits"):
        pack_bits(np.array([2**32 + 3]), 8)


@pytest.mark.parametrize(
    ("start", "count", "reason"), [(0, 9, "too few"), (8, 1, "too few"), (-1, 2, "0 or more"), (0, -1, "0 or more")]
)
def test_stretches_that_the_bytes_do_not_hold_are_refused(start: int, count: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        unpack_bits(pack_bits(np.arange(8), 8), 8, start, count)


@st.composite
def rows_of_ids(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """The size of a vocabulary, and rows of its ids that never descend."""
    limit = draw(st.integers(1, 2**20))
    rows = st.lists(st.lists(st.integers(0, limit - 1), max_size=12).map(sorted), max_size=8)
    return limit, draw(rows)


@given(data=st.data(), given_rows=rows_of_ids())
def test_sorted_ids_come_back_from_any_stretch_of_rows(data, given_rows) -> None:
    limit, rows = given_rows
    counts = np.array([len(row) for row in rows], dtype=np.int64)
    lower, upper = pack_sorted(np.array([*chain(*rows)], dtype=np.int32), counts, limit)
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    assert unpack_sorted(lower, upper, counts, limit, start, stop).tolist() == list(chain(*rows[start:stop]))


def test_sorted_ids_take_the_bits_that_are_stated() -> None:
    rng, limit = np.random.default_rng(0), 151_936
    for count in (5, 20, 60):
        rows = np.sort(rng.integers(0, limit, (200, count)), axis=1)
        packed = pack_sorted(rows.ravel(), np.full(200, count), limit)
        per_id = 8 * sum(map(len, packed)) / rows.size
        assert per_id <= 2 + np.log2(limit / count) + 0.1


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 151_936, 262_144])
def test_the_first_and_last_ids_of_a_vocabulary_can_be_packed(vocab: int) -> None:
    ids = np.array([0, vocab - 1, 0, 0, vocab - 1, vocab - 1])
    counts = np.array([2, 0, 4, 0])
    packed = pack_sorted(ids, counts, vocab)
    np.testing.assert_array_equal(unpack_sorted(*packed, counts, vocab, 0, 4), ids)


def test_streams_of_sorted_ids_that_do_not_fit_their_counts_are_refused() -> None:
    ids, counts = np.array([3, 60, 7, 7, 90]), np.array([2, 3])
    lower, upper = pack_sorted(ids, counts, 100)
    with pytest.raises(ValueError, match="too few"):
        unpack_sorted(lower[:1], upper, counts, 100, 0, 2)
    with pytest.raises(ValueError, match="too few"):
        unpack_sorted(lower, upper[:1], counts, 100, 0, 2)
    with pytest.raises(ValueError, match="ids, expected"):
        unpack_sorted(lower, np.zeros_like(upper), counts, 100, 0, 2)


@given(largest=st.integers(0, 2**25 - 1))
def test_the_width_of_a_number_is_the_least_that_holds_it(largest) -> None:
    width = width_of(largest)
    assert width >= 1
    assert largest < 2**width
    assert width == 1 or largest >= 2 ** (width - 1)


@pytest.mark.parametrize("vocab", [151_936, 262_144])
def test_ids_of_18_bits_survive_their_file(vocab: int) -> None:
    assert width_of(vocab - 1) == 18
    logits, labels = draw_logits(1, 3, vocab=vocab, scale=2.0), np.array([vocab - 1, 0, 131_072], dtype=np.int32)
    targets = compress(logits, kept(), labels=labels)
    reply = CachedReply(labels, "stop", targets, np.arange(3, dtype=np.int32))
    content = np.frombuffer(pack_replies({"0" * 32: reply}), dtype=np.uint8)
    [found] = unpack_replies(content, ["0" * 32], None).values()
    np.testing.assert_array_equal(found.tokens, labels)
    assert same(found.targets, targets)


# Corners ------------------------------------------------------------------------------------------------------------


@checked_often
@given(seed=seeds, scale=scales, draw_temperature=draw_temperatures)
def test_equal_arguments_give_equal_targets(seed, scale, draw_temperature) -> None:
    logits, settings = draw_logits(seed, 6, scale=scale), kept(draw_temperature=draw_temperature)
    assert same(compress(logits, settings, seed=3), compress(logits, settings, seed=3))


@every_temperature
def test_equal_targets_give_equal_weights(temperature: float) -> None:
    targets = compress(draw_logits(1, 20), kept())
    for one, other in zip(targets.at_temperature(temperature), targets.at_temperature(temperature), strict=True):
        assert one.tobytes() == other.tobytes()


def test_other_uniforms_give_another_sample_of_the_same_tail() -> None:
    logits, labels = draw_logits(1, 20, scale=1.0), draw_labels(1, 20)
    first, second = (
        compress(logits, kept(0.1), labels=labels, uniforms=np.full(20, uniform, dtype=np.float32))
        for uniform in (0.1, 0.6)
    )
    assert not np.array_equal(first.ids, second.ids)
    np.testing.assert_array_equal(first.tail_codes, second.tail_codes)
    np.testing.assert_array_equal(first.ids[first.exact], second.ids[second.exact])


@every_draw_temperature
@pytest.mark.parametrize("vocab", [1, 60, 128, 1000])
def test_an_accelerator_sums_what_the_processor_does(draw_temperature: float, vocab: int) -> None:
    blocks = _blocked(mx.array(draw_logits(1, 6, vocab=vocab)))
    settings = kept(draw_temperature=draw_temperature)
    on_processor = _sum_chunk(np.array(blocks), settings, np)
    for one, other in zip(on_processor, _sum_chunk(blocks, settings, mx), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, np.array(other), rtol=1e-5, atol=1e-7)


@checked_often
@given(seed=seeds, scale=scales, draw_temperature=draw_temperatures, vocab=st.integers(1, 700))
def test_a_token_is_encoded_the_same_whatever_its_neighbours(seed, scale, draw_temperature, vocab) -> None:
    logits, labels = draw_logits(seed, 6, vocab=vocab, scale=scale), draw_labels(seed, 6, vocab=vocab)
    uniforms = np.random.default_rng(seed).random(6, dtype=np.float32)
    settings = kept(draw_temperature=draw_temperature)
    together = compress(logits, settings, labels=labels, uniforms=uniforms)
    for token in range(6):
        row = slice(token, token + 1)
        alone = compress(logits[row], settings, labels=labels[row], uniforms=uniforms[row])
        assert same(alone, together.take(np.array([token])))


def test_a_vocabulary_of_151_936_ids_survives() -> None:
    logits = draw_logits(1, 2, vocab=151_936, scale=2.0)
    targets = compress(logits, kept(), labels=np.array([151_935, 0], dtype=np.int32))
    assert targets.ids.max() == 151_935
    assert (np.abs(np.diff(targets.offsets) - 51) <= 1).all()
    # Each half of the vocabulary has its share of the sample, to within two draws of the 50.
    low = row_sums(targets, np.where(targets.ids < 75_968, targets.at_temperature(2.0)[0], 0))
    np.testing.assert_allclose(low, softened(logits, 2.0)[:, :75_968].sum(axis=-1), atol=0.04)


@checked_often
@given(seed=seeds, scale=scales, temperature=st.floats(1.0, 10.0), draw_temperature=draw_temperatures)
def test_where_every_id_is_kept_the_targets_are_dense_to_rounding_at_every_temperature(
    seed, scale, temperature, draw_temperature
) -> None:
    logits = draw_logits(seed, 4, scale=scale)
    targets = compress(logits, kept(1e-30, draw_temperature), seed=seed)
    assert targets.exact.all()
    assert len(targets.ids) == 4 * VOCAB
    weights, logprobs = (spread(targets, values) for values in targets.at_temperature(temperature))
    expected = log_softmax(logits.astype(np.float64) / temperature)
    # A runner-up that shares the favourite's code takes the next one: three half steps.
    steps = 3 * half_steps(log_softmax(logits)) / temperature
    allowed = steps + (np.exp(expected) * np.expm1(steps)).sum(axis=-1, keepdims=True) + 1e-3
    assert (np.abs(logprobs - expected) <= allowed).all()
    assert (np.abs(weights - np.exp(expected)) <= np.exp(expected) * np.expm1(allowed) + 1e-6).all()
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, atol=1e-3)


@cache
def without_a_tail() -> list[SparseTargets]:
    """Targets of every id, of teachers of several sizes and sharpnesses."""
    found = [
        compress(draw_logits(1, 60, vocab=vocab, scale=scale), kept(1e-30, draw_temperature))
        for vocab in (5, 20, 60, 500)
        for scale in (0.5, 2.0, 4.0)
        for draw_temperature in DRAW_TEMPERATURES
    ]
    assert all(targets.exact.all() for targets in found)
    return found


@pytest.mark.parametrize("temperature", [0.5, 0.55, 0.6, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0])
def test_where_every_id_is_kept_no_mass_is_left_for_a_tail(temperature: float) -> None:
    assert max(targets.tail_mass(temperature).max() for targets in without_a_tail()) < 1e-4


@every_temperature
@pytest.mark.parametrize("label", [4, 7], ids=["the label is the certain id", "the label is impossible"])
def test_a_teacher_that_is_certain_has_one_entry_of_weight_one(temperature: float, label: int) -> None:
    logits = np.full((1, VOCAB), -np.inf, dtype=np.float32)
    logits[0, 4] = 2.5
    targets = compress(logits, kept(), labels=np.array([label], dtype=np.int32))
    weights, logprobs = targets.at_temperature(temperature)
    assert sorted(targets.ids) == sorted({4, label})
    # An impossible id is stored as one of e^-40.
    floor = np.exp(LEAST_LOGPROB / temperature)
    np.testing.assert_allclose(spread(targets, weights)[0], np.arange(VOCAB) == 4, atol=1.01 * floor + 1e-6)
    assert np.isfinite(logprobs).all()


@every_draw_temperature
def test_impossible_ids_are_never_drawn(draw_temperature: float) -> None:
    logits = draw_logits(1, 50, vocab=500, scale=1.0)
    logits[:, ::2] = -np.inf
    targets = compress(logits, kept(0.05, draw_temperature), labels=np.full(50, 3, dtype=np.int32))
    assert (targets.ids % 2 == 1).all()
    for temperature in (0.5, 1.0, 2.0, 4.0, 8.0):
        weights, logprobs = targets.at_temperature(temperature)
        assert np.isfinite(weights).all()
        assert np.isfinite(logprobs).all()
    np.testing.assert_allclose(row_sums(targets, targets.at_temperature(draw_temperature)[0]), 1.0, atol=1e-6)


@pytest.mark.parametrize("gap", [30.0, 60.0, 90.0, 500.0, 1e5])
@every_draw_temperature
def test_a_tail_that_underflows_is_a_tail_of_nothing(gap: float, draw_temperature: float) -> None:
    logits = draw_logits(1, 6, vocab=1000, scale=0.5)
    logits[:, 3] = gap
    targets = compress(logits, kept(draw_temperature=draw_temperature), labels=np.full(6, 3, dtype=np.int32))
    for temperature in (0.5, 0.7, 1.0, 1.5, 2.0):
        weights, logprobs = targets.at_temperature(temperature)
        assert np.isfinite(logprobs).all()
        np.testing.assert_allclose(weights[targets.exact], 1.0, atol=1e-3 + 1000 * np.exp(-gap / temperature))
        assert (targets.tail_mass(temperature) < 1e-3 + 1000 * np.exp(-gap / temperature)).all()


@every_draw_temperature
def test_a_vocabulary_of_one_id_has_one_entry_of_weight_one(draw_temperature: float) -> None:
    settings = kept(0.5, draw_temperature)
    targets = compress(np.array([[3.0], [-8.0]], dtype=np.float32), settings, labels=np.zeros(2, dtype=np.int32))
    assert targets.ids.tolist() == [0, 0]
    for temperature in (0.5, 1.0, 3.0, 10.0):
        weights, logprobs = targets.at_temperature(temperature)
        np.testing.assert_allclose(weights, 1.0, atol=1e-6)
        np.testing.assert_allclose(logprobs, 0.0, atol=1e-6)


def test_without_a_tail_nothing_is_drawn() -> None:
    assert compress(np.array([[1.0, 0.5, 0.0]], dtype=np.float32), kept()).exact.tolist() == [True] * 3


@checked_often
@given(seed=seeds, scale=scales, draw_temperature=draw_temperatures, threshold=st.floats(0.002, 0.5))
def test_entries_are_counted_as_they_will_be(seed, scale, draw_temperature, threshold) -> None:
    logits, labels = draw_logits(seed, 8, vocab=400, scale=scale), draw_labels(seed, 8, vocab=400)
    settings = kept(threshold, draw_temperature)
    counted = count_entries(mx.array(logits), mx.array(labels), settings)
    entries = np.diff(compress(logits, settings, labels=labels, seed=seed).offsets)
    whole = counted == np.rint(counted)
    np.testing.assert_array_equal(counted[whole], entries[whole])
    assert (np.abs(counted - entries) < 1).all()


@every_draw_temperature
def test_on_average_as_many_entries_are_kept_as_counted(draw_temperature: float) -> None:
    logits, labels = draw_logits(1, 400, vocab=300, scale=3.0), draw_labels(1, 400, vocab=300)
    logits[:, 17] += 10.0 * draw_temperature
    settings = kept(0.45, draw_temperature)
    entries = np.diff(compress(logits, settings, labels=labels).offsets)
    counted = count_entries(mx.array(logits), mx.array(labels), settings)
    assert (counted != np.rint(counted)).mean() > 0.5
    assert entries.mean() == pytest.approx(counted.mean(), rel=0.03)


# Entropy ------------------------------------------------------------------------------------------------------------


def entropy_of(logits: np.ndarray) -> np.ndarray:
    """Of the teacher's distribution at temperature 1, float64 nats."""
    p = softened(logits, 1.0)
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(axis=-1)


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 6.0])
def test_where_every_id_is_kept_the_entropy_is_that_of_the_dense_distribution(scale: float) -> None:
    logits = draw_logits(1, 50, scale=scale)
    found = compress(logits, ALL_EXACT).entropies
    assert found.shape == (50,)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, entropy_of(logits), rtol=0.03, atol=0.02)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.5])
@every_draw_temperature
def test_averaged_over_the_uniforms_the_entropy_is_that_of_the_dense_distribution(
    draw_temperature: float, scale: float
) -> None:
    logits, labels = draw_logits(7, 1, vocab=WIDE, scale=scale), 3
    targets = compress_one(logits, kept(0.1, draw_temperature), label=labels, uniforms=even_uniforms(500))
    assert targets.tail_mass(1.0)[0] > 0.1
    assert targets.entropies.std() > 0
    # A flat teacher's ids share one code of a drawn log-probability, which reweighs them all by the same error.
    rounding = 0.02 if draw_temperature == 1.0 else 0.06
    assert targets.entropies.mean() == pytest.approx(entropy_of(logits)[0], rel=rounding)


@pytest.mark.parametrize("draw_temperature", [1.0, 2.0])
def test_over_many_teachers_the_entropy_has_no_bias(draw_temperature: float) -> None:
    logits = draw_logits(1, 2000, vocab=WIDE, scale=1.5)
    errors = compress(logits, kept(0.1, draw_temperature)).entropies - entropy_of(logits)
    noise = errors.std() / np.sqrt(len(errors))
    assert noise < 0.02
    # Six bits of a drawn log-probability and ten of the tail leave some thousandths.
    assert abs(errors.mean()) < 4 * noise + 0.015


def test_a_teacher_that_is_certain_has_no_entropy() -> None:
    logits = np.full((2, VOCAB), -np.inf, dtype=np.float32)
    logits[:, 4] = 0.0
    targets = compress(logits, kept(), labels=np.array([4, 7], dtype=np.int32))
    np.testing.assert_allclose(targets.entropies, 0.0, atol=1e-6)


def test_taken_tokens_keep_their_entropies() -> None:
    targets = compress(draw_logits(1, 10), kept())
    np.testing.assert_array_equal(targets.take(np.array([7, 2])).entropies, targets.entropies[[7, 2]])
    assert targets.first(0).entropies.shape == (0,)


# Taking apart and putting together ----------------------------------------------------------------------------------


@checked_often
@given(seed=seeds, tokens=st.lists(st.integers(0, 9), max_size=12))
def test_take_gives_the_entries_of_the_tokens_in_their_order(seed, tokens) -> None:
    targets = compress(draw_logits(seed, 10), kept(), seed=seed)
    taken = targets.take(np.array(tokens, dtype=np.int64))
    assert len(taken) == len(tokens)
    assert same(replace(taken, tail_codes=targets.tail_codes), replace(targets, **entries_of(taken)))
    for position, token in enumerate(tokens):
        mine = slice(taken.offsets[position], taken.offsets[position + 1])
        whole = slice(targets.offsets[token], targets.offsets[token + 1])
        for name in ("ids", "logprob_codes", "exact"):
            np.testing.assert_array_equal(getattr(taken, name)[mine], getattr(targets, name)[whole])
        np.testing.assert_array_equal(taken.tail_codes[position], targets.tail_codes[token])


def entries_of(targets: SparseTargets) -> dict[str, np.ndarray]:
    return {name: getattr(targets, name) for name in ("offsets", "ids", "logprob_codes", "exact")}


@every_temperature
def test_taken_tokens_have_the_weights_they_had(temperature: float) -> None:
    targets = compress(draw_logits(1, 10), kept())
    dense = [spread(targets, values) for values in targets.at_temperature(temperature)]
    taken = targets.take(np.array([7, 2, 2]))
    for whole, values in zip(dense, taken.at_temperature(temperature), strict=True):
        np.testing.assert_array_equal(spread(taken, values), whole[[7, 2, 2]])


@pytest.mark.parametrize("count", [0, 1, 7, 10])
def test_the_first_tokens_are_those_taken_from_the_start(count: int) -> None:
    targets = compress(draw_logits(1, 10), kept())
    assert same(targets.first(count), targets.take(np.arange(count)))


@checked_often
@given(seed=seeds, cuts=st.lists(st.integers(1, 9), max_size=4, unique=True))
def test_joined_parts_are_the_whole(seed, cuts) -> None:
    logits, labels = draw_logits(seed, 10), draw_labels(seed, 10)
    uniforms = np.random.default_rng(seed).random(10, dtype=np.float32)
    parts = [
        compress(logits[start:stop], kept(), labels=labels[start:stop], uniforms=uniforms[start:stop])
        for start, stop in pairwise([0, *sorted(cuts), 10])
    ]
    assert same(join(parts), compress(logits, kept(), labels=labels, uniforms=uniforms))


def test_joining_what_take_took_apart_is_the_whole() -> None:
    targets = compress(draw_logits(1, 10), kept(0.1, 1.0))
    assert same(join([targets.take(np.array([token])) for token in range(10)]), targets)


def test_a_part_of_no_token_adds_nothing() -> None:
    targets = compress(draw_logits(1, 10), kept())
    assert same(join([targets.first(0), targets, targets.first(0)]), targets)


def test_with_ids_gives_each_entry_its_id_in_the_other_vocabulary() -> None:
    targets = compress(draw_logits(1, 10), kept())
    id_map = np.random.default_rng(0).permutation(VOCAB).astype(np.int32)
    mapped = targets.with_ids(id_map)
    np.testing.assert_array_equal(mapped.labels, id_map[targets.labels])
    for before, after in zip(targets.at_temperature(2.0), mapped.at_temperature(2.0), strict=True):
        np.testing.assert_array_equal(spread(mapped, after)[:, id_map], spread(targets, before))


def half_of_the_ids() -> np.ndarray:
    """A map to a vocabulary that lacks the odd ids."""
    return np.where(np.arange(VOCAB) % 2, -1, np.arange(VOCAB)).astype(np.int32)


@every_temperature
@pytest.mark.parametrize("settings", [kept(), kept(0.1, 1.0), ALL_EXACT], ids=["sampled", "few", "all exact"])
def test_entries_without_an_id_leave_their_mass_unassigned(temperature: float, settings: TargetSettings) -> None:
    targets = compress(draw_logits(1, 10), settings)
    mapped = targets.with_ids(half_of_the_ids())
    weights, logprobs = targets.at_temperature(temperature)
    mapped_weights, mapped_logprobs = mapped.at_temperature(temperature)
    np.testing.assert_array_equal(mapped_weights, np.where(targets.ids % 2, 0, weights))
    np.testing.assert_array_equal(mapped_logprobs, logprobs)
    np.testing.assert_array_equal(mapped.tail_mass(temperature), targets.tail_mass(temperature))
    assert (mapped.ids[targets.ids % 2 == 1] == -1).all()


def test_a_token_may_lose_all_its_mass_without_harm_to_the_others() -> None:
    logits = np.full((3, VOCAB), -np.inf, dtype=np.float32)
    logits[np.arange(3), [4, 5, 4]] = 0.0
    targets = compress(logits, kept(), labels=np.array([4, 5, 4], dtype=np.int32)).with_ids(half_of_the_ids())
    for temperature in (1.0, 2.0, 3.0):
        np.testing.assert_allclose(targets.at_temperature(temperature)[0], [1.0, 0.0, 1.0], atol=1e-6)


def test_mapping_twice_is_mapping_by_both() -> None:
    targets = compress(draw_logits(1, 10), kept())
    backwards = np.arange(VOCAB, dtype=np.int32)[::-1].copy()
    there_and_back = targets.with_ids(half_of_the_ids()).with_ids(backwards).with_ids(backwards)
    assert same(there_and_back, targets.with_ids(half_of_the_ids()))


def test_targets_of_no_token_can_be_mapped_and_softened() -> None:
    nothing = compress(draw_logits(1, 2), kept()).take(np.arange(0)).with_ids(np.arange(VOCAB))
    assert len(nothing) == 0
    assert [len(values) for values in nothing.at_temperature(3.0)] == [0, 0]


# Hidden states ------------------------------------------------------------------------------------------------------

WIDTH = 24


def hidden_targets(tokens: int = 7) -> tuple[HiddenTargets, np.ndarray]:
    """Targets by hidden states, and the logits that they stand for, float64."""
    weight, states = draw_logits(2, VOCAB, WIDTH, 0.5), draw_logits(3, tokens, WIDTH, 1.0).astype(np.float16)
    head = TeacherHead(lambda given: given.astype(mx.float32) @ mx.array(weight).T)
    return HiddenTargets(states, head), states.astype(np.float64) @ weight.T.astype(np.float64)


@every_temperature
def test_the_head_gives_the_log_probabilities_of_every_id(temperature: float) -> None:
    targets, logits = hidden_targets()
    found = np.array(targets.head.logprobs(mx.array(targets.states), temperature))
    np.testing.assert_allclose(found, log_softmax(logits / temperature), rtol=1e-5, atol=1e-5)


@every_temperature
def test_the_head_gives_the_whole_vocabularys_probabilities_in_other_ids(temperature: float) -> None:
    targets, logits = hidden_targets()
    id_map = np.random.default_rng(0).permutation(VOCAB).astype(np.int32)
    id_map[id_map >= 40] = -1
    id_map[id_map >= 0] += 2
    mapped = targets.with_ids(id_map)
    found = np.array(mapped.head.logprobs(mx.array(mapped.states), temperature))
    assert found.shape == (7, id_map.max() + 1)
    expected = np.full(found.shape, -np.inf)
    expected[:, id_map[id_map >= 0]] = log_softmax(logits / temperature)[:, id_map >= 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_student_that_has_the_first_ids_alone_leaves_the_rest_unassigned() -> None:
    targets, logits = hidden_targets()
    id_map = np.where(np.arange(VOCAB) < 45, np.arange(VOCAB), -1).astype(np.int32)
    found = np.array(targets.with_ids(id_map).head.logprobs(mx.array(targets.states), 1.0))
    np.testing.assert_allclose(found, log_softmax(logits)[:, :45], rtol=1e-5, atol=1e-5)


def test_of_two_ids_with_one_new_id_the_lower_counts() -> None:
    targets, logits = hidden_targets()
    id_map = np.arange(VOCAB, dtype=np.int32)
    id_map[30] = 10
    found = np.array(targets.with_ids(id_map).head.logprobs(mx.array(targets.states), 1.0))
    np.testing.assert_allclose(found[:, 10], log_softmax(logits)[:, 10], rtol=1e-5, atol=1e-5)
    assert (found[:, 30] == -np.inf).all()


def test_a_vocabulary_with_the_same_ids_needs_no_map() -> None:
    targets, logits = hidden_targets()
    mapped = targets.with_ids(np.arange(VOCAB, dtype=np.int32))
    found = np.array(mapped.head.logprobs(mx.array(mapped.states), 1.0))
    np.testing.assert_allclose(found, log_softmax(logits), rtol=1e-5, atol=1e-5)


def test_mapping_hidden_targets_twice_is_mapping_by_both() -> None:
    targets, _ = hidden_targets()
    backwards = np.arange(VOCAB, dtype=np.int32)[::-1].copy()
    once, twice = targets.with_ids(half_of_the_ids()), targets.with_ids(half_of_the_ids()).with_ids(backwards)
    states = mx.array(targets.states)
    found, expected = (np.array(targets.head.logprobs(states, 1.0)) for targets in (twice, once))
    assert found.shape == (7, VOCAB)
    np.testing.assert_array_equal(found[:, ::-1][:, : expected.shape[1]], expected)


def test_one_map_gives_one_head() -> None:
    targets, _ = hidden_targets()
    id_map = half_of_the_ids()
    assert targets.first(2).with_ids(id_map).head is targets.take(np.array([5])).with_ids(id_map).head


@pytest.mark.parametrize("tokens", [1, 64, 65, 200])
def test_the_entropy_of_hidden_states_is_that_of_their_logits(tokens: int) -> None:
    targets, logits = hidden_targets(tokens)
    assert targets.entropies.dtype == np.float64
    np.testing.assert_allclose(targets.entropies, entropy_of(logits), rtol=1e-4)


def test_hidden_states_of_no_token_have_no_entropy() -> None:
    assert hidden_targets()[0].first(0).entropies.shape == (0,)


def test_what_has_no_id_adds_no_entropy() -> None:
    targets, logits = hidden_targets()
    p = softened(logits, 1.0)[:, ::2]
    expected = -(p * np.log(p)).sum(axis=-1)
    np.testing.assert_allclose(targets.with_ids(half_of_the_ids()).entropies, expected, rtol=1e-4)
    sparse = compress(logits.astype(np.float32), ALL_EXACT).with_ids(half_of_the_ids())
    np.testing.assert_allclose(sparse.entropies, expected, rtol=0.03, atol=0.02)


def test_without_a_head_the_states_can_still_be_mapped_and_taken_apart() -> None:
    targets = replace(hidden_targets()[0], head=None).with_ids(half_of_the_ids()).take(np.array([1, 4])).first(1)
    assert targets.head is None
    assert len(targets) == 1


def test_hidden_targets_are_taken_apart_by_token() -> None:
    targets, _ = hidden_targets()
    assert len(targets) == 7
    np.testing.assert_array_equal(targets.take(np.array([5, 0, 5])).states, targets.states[[5, 0, 5]])
    np.testing.assert_array_equal(targets.first(3).states, targets.states[:3])
    assert len(targets.take(np.arange(0))) == 0


def test_the_first_hidden_states_are_not_copied() -> None:
    targets, _ = hidden_targets()
    assert np.shares_memory(targets.first(3).states, targets.states)


# Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("tiny", TargetSettings("sparse", 0.2, 1.0, 1.0)),
        ("default", TargetSettings("sparse", 0.02, 2.0, 1.0)),
        ("hot", TargetSettings("sparse", 0.0085, 4.0, 1.0)),
        ("exact", TargetSettings("hidden", 0.0, 1.0, 1.0)),
    ],
)
def test_a_preset_says_all_that_targets_depend_on(preset: str, settings: TargetSettings) -> None:
    assert TargetOptions(preset=preset).settings == settings


def test_without_any_option_the_preset_is_the_default_one() -> None:
    assert TargetOptions().settings == TargetOptions(preset="default").settings


@pytest.mark.parametrize("preset", ["tiny", "default", "hot"])
def test_what_is_set_besides_wins_over_the_preset(preset: str) -> None:
    of_preset = TargetOptions(preset=preset).settings
    chosen = TargetOptions(preset=preset, threshold=0.3, draw_temperature=4.0, share=0.5).settings
    assert chosen == replace(of_preset, threshold=0.3, draw_temperature=4.0, share=0.5)
    assert TargetOptions(preset=preset, threshold=0.3).settings == replace(of_preset, threshold=0.3)


def test_a_share_of_hidden_states_can_be_kept() -> None:
    assert TargetOptions(preset="exact", share=0.25).settings.share == 0.25


@pytest.mark.parametrize("draw_temperature", [1, 2, 4, 1.0, 2.0, 4.0])
def test_a_draw_temperature_may_be_written_without_a_point(draw_temperature: float) -> None:
    settings = TargetOptions(draw_temperature=draw_temperature).settings
    assert isinstance(settings.draw_temperature, float)
    assert settings.draw_temperature == draw_temperature


@pytest.mark.parametrize(
    "bad",
    [
        {"preset": "huge"},
        {"threshold": 0.0},
        {"threshold": 0.0009},
        {"threshold": 0.51},
        {"draw_temperature": 0.5},
        {"draw_temperature": 3.0},
        {"draw_temperature": 8.0},
        {"draw_temperature": "2"},
        {"draw_temperature": True},
        {"share": 0.0},
        {"share": 1.01},
        {"bytes_per_token": 3.9},
        {"gigabytes": 0.0},
        {"max_draws": 50},
    ],
    ids=str,
)
def test_target_options_out_of_bounds_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        TargetOptions(**bad)


@pytest.mark.parametrize("budget", [{"bytes_per_token": 20.0}, {"gigabytes": 1.5}], ids=str)
def test_a_budget_picks_the_threshold_and_cannot_be_given_with_one(budget: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=f"threshold and {next(iter(budget))}"):
        TargetOptions(threshold=0.1, **budget)
    with pytest.raises(ValidationError, match="preset exact"):
        TargetOptions(preset="exact", **budget)
    for preset in ("tiny", "default", "hot"):
        assert TargetOptions(preset=preset, **budget).settings == TargetOptions(preset=preset).settings
