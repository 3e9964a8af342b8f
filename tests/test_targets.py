"""The sparse teacher is exact where it says so, unbiased elsewhere, and the same at every temperature."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from true_kd.losses import TokenTargets, compute_kd_loss, sparse_kd
from true_kd.targets import TargetOptions, TeacherTargets, encode, join

EXACT = 255
VOCAB = 60
ALL_EXACT = TargetOptions(threshold=1e-30)
every_draw_temperature = pytest.mark.parametrize("draw_temperature", [1.0, 2.0])
every_unbiased_temperature = pytest.mark.parametrize(
    ("draw_temperature", "temperature"), [(1.0, 1.0), (2.0, 1.0), (2.0, 2.0)]
)
checked_often = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)
scales = st.floats(0.0, 8.0)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softened(logits: np.ndarray, temperature: float) -> np.ndarray:
    """The teacher's distribution at a temperature, float64."""
    return np.exp(log_softmax(logits.astype(np.float64) / temperature))


def draw_logits(seed: int, tokens: int, vocab: int = VOCAB, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=(tokens, vocab))).astype(np.float32)


def draw_labels(seed: int, tokens: int, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed + 1).integers(0, vocab, tokens).astype(np.int32)


def compress(
    logits: np.ndarray,
    options: TargetOptions,
    *,
    labels: np.ndarray | None = None,
    uniforms: np.ndarray | None = None,
    seed: int = 0,
) -> TeacherTargets:
    """`encode` with labels and uniforms drawn where they do not matter."""
    labels = draw_labels(seed, len(logits), logits.shape[1]) if labels is None else labels
    uniforms = np.random.default_rng(seed + 2).random(len(logits), dtype=np.float32) if uniforms is None else uniforms
    return encode(mx.array(logits), mx.array(labels), uniforms, options)


def rows_of(targets: TeacherTargets) -> np.ndarray:
    """The token that each entry belongs to."""
    return np.repeat(np.arange(len(targets)), np.diff(targets.offsets))


def row_sums(targets: TeacherTargets, values: np.ndarray) -> np.ndarray:
    return np.bincount(rows_of(targets), values, minlength=len(targets))


def spread(targets: TeacherTargets, values: np.ndarray, vocab: int = VOCAB) -> np.ndarray:
    """Values of entries as a dense [tokens, vocab] array, 0 where there is no entry."""
    dense = np.zeros((len(targets), vocab))
    dense[rows_of(targets), targets.ids] = values
    return dense


def even_uniforms(count: int) -> np.ndarray:
    """Uniforms that divide [0, 1) evenly: a mean over them is the expectation up to one part in `count`."""
    return ((np.arange(count) + 0.5) / count).astype(np.float32)


def padded(targets: TeacherTargets, temperature: float) -> TokenTargets:
    """Targets of the loss, one row a token."""
    weights, logprobs = targets.at_temperature(temperature)
    counts = np.diff(targets.offsets)
    filled = np.arange(counts.max())[None] < counts[:, None]
    arrays = []
    for values, dtype in ((targets.ids, np.int32), (weights, np.float32), (logprobs, np.float32)):
        array = np.zeros(filled.shape, dtype=dtype)
        array[filled] = values
        arrays.append(mx.array(array))
    return TokenTargets(*arrays)


def same(left: TeacherTargets, right: TeacherTargets) -> bool:
    """Whether every array and the draw temperature are equal to the bit."""
    return left.draw_temperature == right.draw_temperature and all(
        value.dtype == right.arrays()[name].dtype and np.array_equal(value, right.arrays()[name])
        for name, value in left.arrays().items()
    )


# What is kept -------------------------------------------------------------------------------------------------------


@checked_often
@given(seed=seeds, scale=scales, draw_temperature=st.sampled_from([0.5, 1.0, 2.0, 10.0]))
def test_ids_ascend_and_are_unique_and_the_label_is_among_them(seed, scale, draw_temperature) -> None:
    logits, labels = draw_logits(seed, 5, scale=scale), draw_labels(seed, 5)
    targets = compress(logits, TargetOptions(draw_temperature=draw_temperature), labels=labels, seed=seed)
    assert len(targets) == 5
    for token in range(5):
        ids = targets.ids[targets.offsets[token] : targets.offsets[token + 1]]
        assert (np.diff(ids) > 0).all()
        assert labels[token] in ids
        assert ids.min() >= 0
        assert ids.max() < VOCAB


def test_likely_ids_are_kept_exactly_and_of_the_others_only_the_label() -> None:
    logits, labels = draw_logits(1, 20, vocab=2000), draw_labels(1, 20, vocab=2000)
    targets = compress(logits, TargetOptions(threshold=0.005), labels=labels)
    plain, flat = softened(logits, 1.0) >= 0.005, softened(logits, 2.0) >= 0.005
    assert (plain & ~flat).any()
    likely = plain | flat
    likely[np.arange(20), labels] = True
    exact = spread(targets, targets.draws == EXACT, vocab=2000).astype(bool)
    np.testing.assert_array_equal(exact, likely)


def test_an_id_that_is_likely_only_when_softened_is_kept_exactly() -> None:
    logits = np.array([[8.0, 0.0, 0.0, 0.0]], dtype=np.float32)
    assert softened(logits, 1.0)[0, 1] < 0.01 < softened(logits, 2.0)[0, 1]
    targets = compress(logits, TargetOptions(threshold=0.01), labels=np.array([0], dtype=np.int32))
    assert targets.draws.tolist() == [EXACT] * 4


@every_unbiased_temperature
def test_ids_kept_exactly_weigh_their_probability(draw_temperature: float, temperature: float) -> None:
    logits = draw_logits(1, 50)
    targets = compress(logits, TargetOptions(draw_temperature=draw_temperature))
    weights, _ = targets.at_temperature(temperature)
    exact = targets.draws == EXACT
    expected = softened(logits, temperature)[rows_of(targets), targets.ids][exact]
    np.testing.assert_allclose(weights[exact], expected, rtol=2e-5)


def test_stored_logprobs_are_those_of_the_whole_vocabulary_never_renormalised() -> None:
    logits = draw_logits(1, 50)
    targets = compress(logits, TargetOptions(threshold=0.3))
    expected = log_softmax(logits)[rows_of(targets), targets.ids]
    np.testing.assert_allclose(targets.logprobs, expected, rtol=1e-5, atol=1e-6)


@every_draw_temperature
def test_only_differences_along_the_vocabulary_matter(draw_temperature: float) -> None:
    logits, options = draw_logits(1, 20), TargetOptions(draw_temperature=draw_temperature)
    shifted = compress(logits + np.float32(8), options)
    plain = compress(logits, options)
    np.testing.assert_array_equal(shifted.ids, plain.ids)
    np.testing.assert_allclose(shifted.at_temperature(2.0)[0], plain.at_temperature(2.0)[0], rtol=1e-3, atol=1e-6)


def test_half_precision_logits_are_encoded_in_float32() -> None:
    logits = mx.array(draw_logits(1, 20)).astype(mx.bfloat16)
    labels, uniforms = mx.array(draw_labels(1, 20)), even_uniforms(20)
    half = encode(logits, labels, uniforms, TargetOptions())
    assert same(half, encode(logits.astype(mx.float32), labels, uniforms, TargetOptions()))


# The sample of the tail ---------------------------------------------------------------------------------------------


@checked_often
@given(seed=seeds, scale=scales, draw_temperature=st.sampled_from([0.5, 1.0, 2.0, 10.0]))
def test_weights_of_a_row_sum_to_one_at_the_draw_temperature(seed, scale, draw_temperature) -> None:
    logits = draw_logits(seed, 8, scale=scale)
    targets = compress(logits, TargetOptions(draw_temperature=draw_temperature), seed=seed)
    np.testing.assert_allclose(row_sums(targets, targets.at_temperature(draw_temperature)[0]), 1.0, atol=1e-4)


@checked_often
@given(seed=seeds, scale=scales, temperature=st.floats(0.5, 10.0).filter(lambda value: value not in (1.0, 2.0)))
def test_weights_of_a_row_sum_to_one_at_temperatures_other_than_one(seed, scale, temperature) -> None:
    targets = compress(draw_logits(seed, 8, scale=scale), TargetOptions(draw_temperature=2.0), seed=seed)
    np.testing.assert_allclose(row_sums(targets, targets.at_temperature(temperature)[0]), 1.0, atol=1e-5)


@checked_often
@given(seed=seeds, scale=scales, threshold=st.floats(0.001, 0.5), max_draws=st.integers(1, 254))
def test_the_draws_of_a_row_stand_for_the_mass_of_its_tail(seed, scale, threshold, max_draws) -> None:
    logits = draw_logits(seed, 8, scale=scale)
    targets = compress(logits, TargetOptions(threshold=threshold, max_draws=max_draws), seed=seed)
    sampled = targets.draws != EXACT
    drawn = row_sums(targets, np.where(sampled, targets.draws, 0))
    exact = row_sums(targets, np.where(sampled, 0.0, softened(logits, 2.0)[rows_of(targets), targets.ids]))
    np.testing.assert_allclose(drawn * targets.draw_mass, 1 - exact, atol=1e-5)
    assert drawn.max() <= max_draws


@pytest.mark.parametrize("uniform", [0.999999, float(np.nextafter(np.float32(1), np.float32(0)))])
def test_a_uniform_just_below_one_draws_no_more_than_any_other(uniform: float) -> None:
    targets = compress(
        np.zeros((1, 1000), dtype=np.float32), TargetOptions(), uniforms=np.array([uniform], dtype=np.float32)
    )
    assert row_sums(targets, targets.at_temperature(2.0)[0])[0] == pytest.approx(1.0, abs=1e-3)


@every_unbiased_temperature
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_averaged_over_the_uniforms_the_weights_are_the_probabilities(
    draw_temperature: float, temperature: float, scale: float
) -> None:
    count = 2000
    logits = np.repeat(draw_logits(7, 1, scale=scale), count, axis=0)
    options = TargetOptions(threshold=0.04, draw_temperature=draw_temperature)
    targets = compress(logits, options, labels=np.full(count, 3, dtype=np.int32), uniforms=even_uniforms(count))
    mean = spread(targets, targets.at_temperature(temperature)[0]).mean(axis=0)
    expected = softened(logits[:1], temperature)[0]
    sampled = np.ones(VOCAB, dtype=bool)
    sampled[targets.ids[targets.draws == EXACT]] = False
    assert sampled.sum() > 20
    largest = targets.at_temperature(temperature)[0].max()
    assert (np.abs(mean - expected) <= 1e-4 * expected + 2 * largest / count).all()


def test_averaged_over_random_uniforms_the_weights_are_the_probabilities() -> None:
    count = 4000
    logits = np.repeat(draw_logits(7, 1, scale=1.0), count, axis=0)
    targets = compress(logits, TargetOptions(threshold=0.04), labels=np.full(count, 3, dtype=np.int32), seed=11)
    weights = spread(targets, targets.at_temperature(1.0)[0])
    expected = softened(logits[:1], 1.0)[0]
    tolerance = 5 * weights.std(axis=0) / np.sqrt(count) + 1e-4 * expected
    assert (np.abs(weights.mean(axis=0) - expected) <= tolerance).all()


@every_unbiased_temperature
def test_the_sparse_kl_averaged_over_many_draws_is_the_dense_kl(draw_temperature: float, temperature: float) -> None:
    count = 1500
    teacher, student = draw_logits(7, 1, scale=1.5), draw_logits(8, 1, scale=1.5)
    options = TargetOptions(threshold=0.04, draw_temperature=draw_temperature)
    labels = np.full(count, 3, dtype=np.int32)
    targets = compress(np.repeat(teacher, count, axis=0), options, labels=labels, seed=5)
    sparse = np.array(sparse_kd(mx.array(np.repeat(student, count, axis=0)), padded(targets, temperature), temperature))
    dense = compute_kd_loss(mx.array(teacher), mx.array(student), temperature).item()
    assert sparse.std() > 0
    assert sparse.mean() == pytest.approx(dense, abs=5 * sparse.std() / np.sqrt(count) + 1e-4 * dense)


def test_the_kl_of_the_kept_ids_alone_would_be_biased() -> None:
    count = 500
    teacher, student = draw_logits(7, 1, scale=1.5), draw_logits(8, 1, scale=1.5)
    targets = compress(np.repeat(teacher, count, axis=0), TargetOptions(threshold=0.04), uniforms=even_uniforms(count))
    with_tail = padded(targets, 2.0)
    weights, _ = targets.at_temperature(2.0)
    exact = np.where(targets.draws == EXACT, weights, 0).astype(np.float32)
    kept = exact / row_sums(targets, exact)[rows_of(targets)]
    shape = np.arange(with_tail.ids.shape[1])[None] < np.diff(targets.offsets)[:, None]
    top_k = np.zeros(shape.shape, dtype=np.float32)
    top_k[shape] = kept
    dense = compute_kd_loss(mx.array(teacher), mx.array(student), 2.0).item()
    students = mx.array(np.repeat(student, count, axis=0))
    unbiased = mx.mean(sparse_kd(students, with_tail, 2.0)).item()
    biased = mx.mean(sparse_kd(students, TokenTargets(with_tail.ids, mx.array(top_k), with_tail.logprobs), 2.0)).item()
    assert abs(unbiased - dense) < 0.01 * dense
    assert abs(biased - dense) > 0.1 * dense


def test_more_draws_come_nearer_at_a_temperature_the_sample_was_not_drawn_for() -> None:
    logits = np.repeat(draw_logits(7, 1, vocab=400, scale=1.0), 300, axis=0)
    expected = softened(logits[:1], 4.0)[0]
    errors = []
    for threshold in (0.2, 0.02):
        options = TargetOptions(threshold=threshold)
        targets = compress(logits, options, uniforms=even_uniforms(300), labels=np.zeros(300, dtype=np.int32))
        weights = spread(targets, targets.at_temperature(4.0)[0], vocab=400)
        errors.append(np.abs(weights[:, :200].sum(axis=1) - expected[:200].sum()).mean())
    assert errors[1] < errors[0] / 2


@checked_often
@given(seed=seeds, scale=scales, temperature=st.floats(0.5, 10.0), draw_temperature=st.sampled_from([1.0, 2.0, 7.5]))
def test_where_every_id_is_kept_the_targets_are_dense_at_every_temperature(
    seed, scale, temperature, draw_temperature
) -> None:
    logits = draw_logits(seed, 4, scale=scale)
    options = ALL_EXACT.model_copy(update={"draw_temperature": draw_temperature})
    targets = compress(logits, options, seed=seed)
    weights, logprobs = targets.at_temperature(temperature)
    expected = log_softmax(logits.astype(np.float64) / temperature)
    assert (targets.draws == EXACT).all()
    assert len(targets.ids) == 4 * VOCAB
    np.testing.assert_allclose(logprobs.reshape(4, VOCAB), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(weights.reshape(4, VOCAB), np.exp(expected), rtol=1e-3, atol=1e-6)


# Corners ------------------------------------------------------------------------------------------------------------


def test_equal_uniforms_give_equal_targets() -> None:
    logits = draw_logits(1, 20)
    assert same(compress(logits, TargetOptions(), seed=3), compress(logits, TargetOptions(), seed=3))


def test_other_uniforms_give_another_sample() -> None:
    logits, labels = draw_logits(1, 20, scale=1.0), draw_labels(1, 20)
    options = TargetOptions(threshold=0.1)
    first = compress(logits, options, labels=labels, uniforms=np.full(20, 0.1, dtype=np.float32))
    second = compress(logits, options, labels=labels, uniforms=np.full(20, 0.6, dtype=np.float32))
    assert not np.array_equal(first.ids, second.ids)


def test_a_vocabulary_of_151_936_ids_survives() -> None:
    logits = draw_logits(1, 2, vocab=151_936, scale=2.0)
    targets = compress(logits, TargetOptions(), labels=np.array([151_935, 0], dtype=np.int32))
    assert targets.ids.max() == 151_935
    assert (np.diff(targets.offsets) <= 202).all()
    for temperature in (0.7, 2.0):
        sums = row_sums(targets, targets.at_temperature(temperature)[0])
        np.testing.assert_allclose(sums, 1.0, atol=1e-4)
    # Each half of the vocabulary has its share of the sample, to within two draws of the 200.
    low = row_sums(targets, np.where(targets.ids < 75_968, targets.at_temperature(2.0)[0], 0))
    np.testing.assert_allclose(low, softened(logits, 2.0)[:, :75_968].sum(axis=-1), atol=0.01)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("label", [4, 7], ids=["the label is the certain id", "the label is impossible"])
def test_a_teacher_that_is_certain_has_one_entry_of_weight_one(temperature: float, label: int) -> None:
    logits = np.full((1, VOCAB), -np.inf, dtype=np.float32)
    logits[0, 4] = 2.5
    targets = compress(logits, TargetOptions(), labels=np.array([label], dtype=np.int32))
    weights, logprobs = targets.at_temperature(temperature)
    assert sorted(targets.ids) == sorted({4, label})
    np.testing.assert_allclose(spread(targets, weights)[0], np.arange(VOCAB) == 4, atol=1e-6)
    assert np.isfinite(logprobs).all()


def test_the_kd_loss_against_a_certain_teacher_is_cross_entropy() -> None:
    logits, student = np.full((1, VOCAB), -np.inf, dtype=np.float32), draw_logits(1, 1)
    logits[0, 4] = 2.5
    targets = compress(logits, TargetOptions(), labels=np.array([7], dtype=np.int32))
    found = sparse_kd(mx.array(student), padded(targets, 2.0), 2.0).item()
    assert found == pytest.approx(-4.0 * log_softmax(student / 2.0)[0, 4], rel=1e-5)


@pytest.mark.parametrize("max_draws", [1, 50, 254])
def test_a_uniform_teacher_is_drawn_max_draws_times(max_draws: int) -> None:
    options = TargetOptions(threshold=0.001, max_draws=max_draws)
    targets = compress(np.zeros((3, 2000), dtype=np.float32), options, uniforms=even_uniforms(3))
    drawn = row_sums(targets, np.where(targets.draws == EXACT, 0, targets.draws))
    assert drawn.tolist() == [max_draws] * 3
    np.testing.assert_allclose(row_sums(targets, targets.at_temperature(2.0)[0]), 1.0, atol=1e-3)


def test_without_a_tail_nothing_is_drawn() -> None:
    targets = compress(np.array([[1.0, 0.5, 0.0]], dtype=np.float32), TargetOptions())
    assert targets.draws.tolist() == [EXACT] * 3


@pytest.mark.parametrize(
    "bad",
    [{"threshold": 0.0}, {"threshold": 0.51}, {"draw_temperature": 0.4}, {"max_draws": 0}, {"max_draws": 255}],
    ids=str,
)
def test_target_options_out_of_bounds_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        TargetOptions(**bad)


# Taking apart and putting together ----------------------------------------------------------------------------------


@checked_often
@given(seed=seeds, tokens=st.lists(st.integers(0, 9), max_size=12))
def test_take_gives_the_entries_of_the_tokens_in_their_order(seed, tokens) -> None:
    targets = compress(draw_logits(seed, 10), TargetOptions(), seed=seed)
    taken = targets.take(np.array(tokens, dtype=np.int64))
    assert len(taken) == len(tokens)
    for position, token in enumerate(tokens):
        mine = slice(taken.offsets[position], taken.offsets[position + 1])
        whole = slice(targets.offsets[token], targets.offsets[token + 1])
        for name in ("ids", "logprobs", "draws"):
            np.testing.assert_array_equal(getattr(taken, name)[mine], getattr(targets, name)[whole])
        assert taken.draw_mass[position] == targets.draw_mass[token]
        assert taken.log_partition[position] == targets.log_partition[token]


def test_taken_tokens_have_the_weights_they_had() -> None:
    targets = compress(draw_logits(1, 10), TargetOptions())
    dense = [spread(targets, values) for values in targets.at_temperature(3.0)]
    taken = targets.take(np.array([7, 2, 2]))
    for whole, values in zip(dense, taken.at_temperature(3.0), strict=True):
        np.testing.assert_array_equal(spread(taken, values), whole[[7, 2, 2]])


@checked_often
@given(seed=seeds, cuts=st.lists(st.integers(1, 9), max_size=4, unique=True))
def test_joined_parts_are_the_whole(seed, cuts) -> None:
    logits, labels = draw_logits(seed, 10), draw_labels(seed, 10)
    uniforms = np.random.default_rng(seed).random(10, dtype=np.float32)
    edges = [0, *sorted(cuts), 10]
    parts = [
        compress(logits[start:stop], TargetOptions(), labels=labels[start:stop], uniforms=uniforms[start:stop])
        for start, stop in pairwise(edges)
    ]
    assert same(join(parts), compress(logits, TargetOptions(), labels=labels, uniforms=uniforms))


def test_the_arrays_and_the_draw_temperature_are_all_there_is() -> None:
    targets = compress(draw_logits(1, 10), TargetOptions(draw_temperature=3.0))
    assert same(TeacherTargets(**targets.arrays(), draw_temperature=3.0), targets)


def test_with_ids_gives_each_entry_its_id_in_the_other_vocabulary() -> None:
    targets = compress(draw_logits(1, 10), TargetOptions())
    id_map = np.random.default_rng(0).permutation(VOCAB).astype(np.int32)
    mapped = targets.with_ids(id_map)
    for before, after in zip(targets.at_temperature(2.0), mapped.at_temperature(2.0), strict=True):
        np.testing.assert_array_equal(spread(mapped, after)[:, id_map], spread(targets, before))


def half_of_the_ids() -> np.ndarray:
    """A map to a vocabulary that lacks the odd ids."""
    return np.where(np.arange(VOCAB) % 2, -1, np.arange(VOCAB)).astype(np.int32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("options", [TargetOptions(), ALL_EXACT], ids=["sampled", "all exact"])
def test_entries_without_an_id_leave_their_mass_unassigned(temperature: float, options: TargetOptions) -> None:
    targets = compress(draw_logits(1, 10), options)
    mapped = targets.with_ids(half_of_the_ids())
    weights, _ = targets.at_temperature(temperature)
    np.testing.assert_array_equal(mapped.at_temperature(temperature)[0], np.where(targets.ids % 2, 0, weights))
    assert (mapped.ids[targets.ids % 2 == 1] == -1).all()


def test_a_token_may_lose_all_its_mass_without_harm_to_the_others() -> None:
    logits = np.full((3, VOCAB), -np.inf, dtype=np.float32)
    logits[np.arange(3), [4, 5, 4]] = 0.0
    targets = compress(logits, TargetOptions(), labels=np.array([4, 5, 4], dtype=np.int32))
    for temperature in (1.0, 2.0, 3.0):
        assert targets.with_ids(half_of_the_ids()).at_temperature(temperature)[0].tolist() == [1.0, 0.0, 1.0]


def test_mapping_twice_is_mapping_by_both() -> None:
    targets = compress(draw_logits(1, 10), TargetOptions())
    backwards = np.arange(VOCAB, dtype=np.int32)[::-1].copy()
    there_and_back = targets.with_ids(half_of_the_ids()).with_ids(backwards).with_ids(backwards)
    assert same(there_and_back, targets.with_ids(half_of_the_ids()))


def test_targets_of_no_token_can_be_mapped() -> None:
    nothing = compress(draw_logits(1, 2), TargetOptions()).take(np.arange(0))
    assert len(nothing.with_ids(np.arange(VOCAB))) == 0
