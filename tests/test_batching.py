"""Every example once an epoch, in an order that seed and step alone decide; no prompt or padding token is trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from pydantic import ValidationError

from true_kd.batching import Batch, BatchOptions, BatchOrder, collate, epoch_batches
from true_kd.examples import Example, make_example
from true_kd.losses import (
    BatchTargets,
    HeadTargets,
    LossOptions,
    Objective,
    TokenTargets,
    compute_kd_loss,
    head_losses,
    token_losses,
)
from true_kd.losses.divergences import ForwardKL, ReverseKL
from true_kd.targets import HiddenTargets, SparseTargets, TargetSettings, TeacherHead, encode

VOCAB = 30
PROMPT_IDS = range(1, 15)
RESPONSE_IDS = range(15, VOCAB)
checked_often = settings(max_examples=30, deadline=None)
ragged = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=7)
some_lengths = st.lists(st.integers(1, 200), min_size=1, max_size=60)
some_options = st.builds(BatchOptions, batch_size=st.integers(1, 9), bucket=st.integers(1, 5))
seeds = st.integers(0, 2**32 - 1)


def draw_example(seed: int, prompt: int, response: int, vocab: int = VOCAB, share: float = 1.0) -> Example:
    """An example whose prompt and response have no id in common, neither of them the padding's; about a `share` of the
    response counts."""
    rng = np.random.default_rng(seed)
    opening = rng.choice(PROMPT_IDS, prompt).tolist()
    reply = rng.choice(RESPONSE_IDS, response).astype(np.int32)
    logits = mx.array((3 * rng.normal(size=(response, vocab))).astype(np.float32))
    settings = TargetSettings("sparse", float(rng.choice([0.02, 0.3])), 2.0, share)
    targets = encode(logits, mx.array(reply), rng.random(response, dtype=np.float32), settings)
    kept = np.sort(rng.permutation(response)[: max(1, round(share * response))]).astype(np.int32)
    example = make_example(opening, reply, targets.take(kept), kept, f"example {seed}", 1000)
    assert example is not None
    return example


def draw_examples(lengths: list[tuple[int, int]], vocab: int = VOCAB, share: float = 1.0) -> list[Example]:
    return [draw_example(seed, prompt, response, vocab, share) for seed, (prompt, response) in enumerate(lengths)]


TEACHER_WIDTH = 8


def teacher_head(vocab: int) -> TeacherHead:
    weight = mx.random.normal((vocab, TEACHER_WIDTH), key=mx.random.key(0))
    return TeacherHead(lambda states: states.astype(mx.float32) @ weight.T)


def with_hidden_states(examples: list[Example], head: TeacherHead) -> list[Example]:
    """The examples with a teacher's hidden states for targets."""
    rng = np.random.default_rng(0)
    states = [rng.normal(size=(len(example.kept), TEACHER_WIDTH)).astype(np.float16) for example in examples]
    return [replace(example, targets=HiddenTargets(each, head)) for example, each in zip(examples, states, strict=True)]


FINAL = LossOptions().final


def kd_of(logits: mx.array, targets: BatchTargets, temperature: float) -> mx.array:
    """T^2 * KL of each token."""
    objective = Objective(ForwardKL(), temperature, 1.0, None)
    return token_losses(logits, mx.zeros(len(logits), dtype=mx.int32), targets, objective)[0]


def kinds_of(examples: list[Example], width: int) -> np.ndarray:
    """What each position of the padded batch holds, from the lengths alone."""
    rows = []
    for example in examples:
        kinds = ["prompt"] * len(example.prompt) + ["response"] * len(example.response)
        rows.append(kinds + ["padding"] * (width - len(kinds)))
    return np.array(rows)


# Which tokens are trained -------------------------------------------------------------------------------------------


@checked_often
@given(lengths=ragged)
def test_no_prompt_and_no_padding_token_is_trained_and_every_response_token_is_once(lengths) -> None:
    examples = draw_examples(lengths)
    batch = collate(examples, 2.0)
    sequences, width = batch.tokens.shape
    kinds = kinds_of(examples, width)
    rows = np.array(batch.rows)
    assert (rows % width < width - 1).all(), "the next token of the last position is another sequence's"
    trained = Counter(kinds.reshape(-1)[rows + 1].tolist())
    assert trained == {"response": sum(response for _, response in lengths)}
    assert len(set(rows.tolist())) == len(rows)
    assert Counter(kinds.reshape(-1).tolist())["response"] == len(rows) == batch.response_tokens
    assert batch.padded_tokens == sequences * width


@checked_often
@given(lengths=ragged)
def test_every_row_predicts_its_label_which_is_the_next_token(lengths) -> None:
    examples = draw_examples(lengths)
    batch = collate(examples, 2.0)
    following = np.array(batch.tokens).reshape(-1)[np.array(batch.rows) + 1]
    np.testing.assert_array_equal(following, np.array(batch.labels))
    np.testing.assert_array_equal(following, np.concatenate([example.response for example in examples]))
    assert set(following.tolist()) <= set(RESPONSE_IDS)


@checked_often
@given(lengths=ragged)
def test_sequences_are_padded_on_the_right_to_the_longest(lengths) -> None:
    examples = draw_examples(lengths)
    tokens = np.array(collate(examples, 2.0).tokens)
    assert tokens.shape == (len(examples), max(map(len, examples)))
    for row, example in zip(tokens, examples, strict=True):
        np.testing.assert_array_equal(row[: len(example)], example.tokens)
        assert not row[len(example) :].any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_targets_of_a_batch_are_those_of_its_examples_in_order(temperature: float) -> None:
    examples = draw_examples([(3, 4), (9, 1), (2, 6)])
    targets = collate(examples, temperature).targets
    row = 0
    for example in examples:
        weights, logprobs = example.targets.at_temperature(temperature)
        for start, stop in zip(example.targets.offsets[:-1], example.targets.offsets[1:], strict=True):
            count = stop - start
            np.testing.assert_array_equal(np.array(targets.ids[row])[:count], example.targets.ids[start:stop])
            np.testing.assert_array_equal(np.array(targets.weights[row])[:count], weights[start:stop])
            np.testing.assert_array_equal(np.array(targets.logprobs[row])[:count], logprobs[start:stop])
            assert not targets.weights[row, count:].any()
            assert not targets.logprobs[row, count:].any()
            row += 1
    assert row == len(targets.ids)


@checked_often
@given(lengths=ragged, share=st.sampled_from([0.2, 0.5, 0.9]))
def test_of_responses_that_count_in_part_only_the_tokens_that_count_are_trained(lengths, share) -> None:
    examples = draw_examples(lengths, share=share)
    batch = collate(examples, 2.0)
    width = batch.tokens.shape[1]
    expected = [
        (number * width + len(example.prompt) + at - 1, example.response[at])
        for number, example in enumerate(examples)
        for at in example.kept.tolist()
    ]
    assert list(zip(np.array(batch.rows).tolist(), np.array(batch.labels).tolist(), strict=True)) == expected
    following = np.array(batch.tokens).reshape(-1)[np.array(batch.rows) + 1]
    np.testing.assert_array_equal(following, np.array(batch.labels))
    assert batch.response_tokens == len(expected) == len(batch.targets.ids)
    assert batch.sequence_tokens == sum(prompt + response for prompt, response in lengths)
    np.testing.assert_array_equal(np.array(batch.targets.ids[:, 0]), np.array(batch.labels))


def test_a_part_of_a_response_has_the_losses_that_the_whole_has_there() -> None:
    logits = mx.array(np.random.default_rng(1).normal(size=(10, VOCAB)).astype(np.float32))
    whole = draw_example(5, 3, 10)
    kept = np.array([1, 4, 5, 9], dtype=np.int32)
    part = make_example(whole.prompt.tolist(), whole.response, whole.targets.take(kept), kept, "part", 1000)
    expected = kd_of(logits, collate([whole], 2.0).targets, 2.0)
    found = kd_of(logits[mx.array(kept)], collate([part], 2.0).targets, 2.0)
    np.testing.assert_allclose(np.array(found), np.array(expected)[kept], rtol=1e-6)


def test_entries_can_be_weighed_otherwise() -> None:
    examples = draw_examples([(3, 4), (9, 1), (2, 6)])

    def weigh_drawn(targets: SparseTargets, temperature: float) -> tuple[np.ndarray, np.ndarray]:
        weights, logprobs = targets.at_temperature(temperature)
        return np.where(targets.exact, 0.0, weights).astype(np.float32), logprobs

    plain, drawn = collate(examples, 2.0).targets, collate(examples, 2.0, weigh_drawn).targets
    exact = np.array(drawn.weights) == 0
    assert exact.any()
    assert not exact.all()
    np.testing.assert_array_equal(np.array(drawn.weights), np.where(exact, 0.0, np.array(plain.weights)))
    np.testing.assert_array_equal(np.array(drawn.ids), np.array(plain.ids))


def test_entries_without_an_id_in_the_students_vocabulary_have_no_weight_and_a_harmless_id() -> None:
    examples = draw_examples([(3, 4), (9, 1), (2, 6)])
    id_map = np.where(np.arange(VOCAB) % 2, -1, np.arange(VOCAB)).astype(np.int32)
    mapped = [replace(example, targets=example.targets.with_ids(id_map)) for example in examples]
    for temperature in (1.0, 2.0, 5.0):
        whole, part = collate(examples, temperature).targets, collate(mapped, temperature).targets
        dropped = np.array(whole.ids) % 2 == 1
        assert dropped.any()
        np.testing.assert_array_equal(np.array(part.ids), np.where(dropped, 0, whole.ids))
        np.testing.assert_array_equal(np.array(part.weights), np.where(dropped, 0, whole.weights))


@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_hidden_states_of_a_batch_are_those_of_its_examples_in_order(temperature: float, share: float) -> None:
    examples = with_hidden_states(draw_examples([(3, 4), (9, 1), (2, 6)], share=share), teacher_head(VOCAB))
    batch = collate(examples, temperature)
    states = np.concatenate([example.targets.states for example in examples])
    assert isinstance(batch.targets, HeadTargets)
    assert batch.targets.temperature == temperature
    assert batch.targets.hidden.dtype == mx.float16
    np.testing.assert_array_equal(np.array(batch.targets.hidden), states)
    assert len(batch.rows) == len(batch.labels) == len(states) == batch.response_tokens


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_batch_of_hidden_states_has_the_dense_loss(temperature: float) -> None:
    head = teacher_head(VOCAB)
    batch = collate(with_hidden_states(draw_examples([(3, 4), (9, 1), (2, 6)]), head), temperature)
    student = mx.array(np.random.default_rng(1).normal(size=(11, VOCAB)).astype(np.float32))
    teacher = head.logprobs(batch.targets.hidden, 1.0)
    found = mx.mean(kd_of(student, batch.targets, temperature)).item()
    assert found == pytest.approx(compute_kd_loss(teacher, student, temperature).item(), rel=1e-4)


def test_hidden_states_in_the_students_ids_keep_them_in_the_batch() -> None:
    head, backwards = teacher_head(VOCAB), np.arange(VOCAB, dtype=np.int32)[::-1].copy()
    examples = with_hidden_states(draw_examples([(3, 4), (9, 1), (2, 6)]), head)
    mapped = [replace(example, targets=example.targets.with_ids(backwards)) for example in examples]
    student = mx.array(np.random.default_rng(1).normal(size=(11, VOCAB)).astype(np.float32))
    plain = kd_of(student, collate(examples, 2.0).targets, 2.0)
    found = kd_of(student[:, ::-1], collate(mapped, 2.0).targets, 2.0)
    np.testing.assert_allclose(np.array(found), np.array(plain), rtol=1e-4)


def losses_of(
    student: nn.Module, batch: Batch, objective: Objective = FINAL
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Sums of the losses of a batch through a whole model, and the gradient of their total."""

    def sums(tokens: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        logits = student(tokens)
        logits = logits.reshape(-1, logits.shape[-1])[batch.rows]
        parts = token_losses(logits, batch.labels, batch.targets, objective)
        kd, ce = (mx.sum(batch.weights * part) for part in parts)
        return objective.alpha * kd + (1 - objective.alpha) * ce, kd, ce

    values, gradient = nn.value_and_grad(student, sums)(batch.tokens)
    return np.array([value.item() for value in values]), {
        name: np.array(value) for name, value in tree_flatten(gradient)
    }


@pytest.mark.parametrize("kind", ["entries", "some tokens", "hidden states"])
def test_padding_and_neighbours_change_neither_losses_nor_gradients(student, kind: str) -> None:
    examples = draw_examples([(3, 4), (9, 1), (2, 12), (5, 5)], vocab=320, share=0.4 if kind == "some tokens" else 1.0)
    if kind == "hidden states":
        examples = with_hidden_states(examples, teacher_head(320))
    values, gradient = losses_of(student.module, collate(examples, 2.0))
    alone = [losses_of(student.module, collate([example], 2.0)) for example in examples]
    np.testing.assert_allclose(values, sum(part for part, _ in alone), rtol=1e-5)
    for name, value in gradient.items():
        expected = sum(part[name] for _, part in alone)
        np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max() + 1e-7, err_msg=name)
    assert len(gradient) > 10


def test_the_content_of_padding_reaches_no_row(student) -> None:
    batch = collate(draw_examples([(3, 4), (9, 1), (2, 12)], vocab=320), 2.0)
    tokens = np.array(batch.tokens)
    other = np.where(tokens == 0, 17, tokens)
    assert (other != tokens).sum() == 3 * 14 - 7 - 10 - 14
    rows = [np.array(student.module(mx.array(ids)).reshape(-1, 320)[batch.rows]) for ids in (tokens, other)]
    np.testing.assert_allclose(*rows, atol=1e-5)


@pytest.mark.parametrize("multiple", [1, 16])
def test_the_fast_path_takes_a_batch_as_it_is(multiple: int) -> None:
    batch = collate(draw_examples([(3, 4), (9, 1), (2, 6)]), 2.0, multiple=multiple)
    rng = np.random.default_rng(0)
    hidden = mx.array(rng.normal(size=(len(batch.rows), 8)).astype(np.float32))
    head = mx.array(rng.normal(size=(VOCAB, 8)).astype(np.float32))
    sums, gradient, _ = head_losses(
        lambda states: states @ head.T, hidden, batch.labels, batch.targets, batch.weights, FINAL
    )
    kd, ce = token_losses((hidden @ head.T)[:11], batch.labels[:11], batch.targets.rows(0, 11), FINAL)
    assert sums.kd.item() == pytest.approx(mx.sum(kd).item(), rel=1e-5)
    assert sums.ce.item() == pytest.approx(mx.sum(ce).item(), rel=1e-5)
    assert gradient.shape == hidden.shape


# Padding to a multiple, and weights -----------------------------------------------------------------------------------


KINDS = ["entries", "some tokens", "hidden states"]


def examples_of(kind: str, vocab: int = VOCAB) -> list[Example]:
    examples = draw_examples(
        [(3, 4), (9, 1), (2, 12), (5, 5)], vocab=vocab, share=0.4 if kind == "some tokens" else 1.0
    )
    return with_hidden_states(examples, teacher_head(vocab)) if kind == "hidden states" else examples


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("multiple", [1, 7, 32])
def test_shapes_are_multiples_and_what_only_pads_weighs_nothing(multiple: int, kind: str) -> None:
    examples = examples_of(kind)
    batch, bare = collate(examples, 2.0, multiple=multiple), collate(examples, 2.0)
    assert batch.tokens.shape[1] % multiple == len(batch.rows) % multiple == 0
    assert batch.tokens.shape[1] < bare.tokens.shape[1] + multiple
    assert len(batch.rows) < len(bare.rows) + multiple
    assert len(batch.labels) == len(batch.weights) == len(batch.targets.arrays[0]) == len(batch.rows)
    if isinstance(batch.targets, TokenTargets):
        assert batch.targets.ids.shape[1] % multiple == 0
        assert not batch.targets.weights[batch.response_tokens :].any()
        assert not batch.targets.exact[batch.response_tokens :].any()
    assert not batch.weights[batch.response_tokens :].any()
    assert batch.weights[: batch.response_tokens].tolist() == [1.0] * batch.response_tokens
    assert (batch.response_tokens, batch.sequence_tokens) == (bare.response_tokens, bare.sequence_tokens)
    assert batch.padded_tokens == batch.tokens.size
    assert np.array(batch.rows).max(initial=0) < batch.tokens.size


@pytest.mark.parametrize("objective", [FINAL, replace(FINAL, divergence=ReverseKL())], ids=["forward", "reverse"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_to_a_multiple_changes_neither_losses_nor_gradients(student, kind: str, objective: Objective) -> None:
    examples = examples_of(kind, vocab=320)
    values, gradient = losses_of(student.module, collate(examples, 2.0), objective)
    found, padded = losses_of(student.module, collate(examples, 2.0, multiple=32), objective)
    np.testing.assert_allclose(found, values, rtol=1e-5)
    for name, value in gradient.items():
        np.testing.assert_allclose(padded[name], value, rtol=1e-3, atol=1e-4 * np.abs(value).max() + 1e-7, err_msg=name)


def test_weights_of_a_batch_are_those_of_its_examples_in_order() -> None:
    examples = examples_of("some tokens")
    rng = np.random.default_rng(0)
    weighed = [replace(example, weights=rng.random(len(example.kept), dtype=np.float32)) for example in examples]
    batch = collate(weighed, 2.0, multiple=8)
    expected = np.concatenate([example.weights for example in weighed])
    np.testing.assert_array_equal(np.array(batch.weights)[: len(expected)], expected)
    assert not batch.weights[len(expected) :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_made_of_its_arrays(kind: str) -> None:
    batch, other = collate(examples_of(kind), 2.0), collate(examples_of(kind)[::-1], 2.0)
    again = batch.with_arrays(other.arrays)
    assert all(one is each for one, each in zip(again.arrays, other.arrays, strict=True))
    assert (again.response_tokens, again.padded_tokens) == (batch.response_tokens, batch.padded_tokens)
    assert type(again.targets) is type(batch.targets)
    values, expected = (
        [mx.sum(kd_of(mx.zeros((len(each.rows), VOCAB)), each.targets, 2.0)).item()] for each in (again, other)
    )
    assert values == expected


# Order --------------------------------------------------------------------------------------------------------------


@checked_often
@given(lengths=some_lengths, options=some_options, seed=seeds, epoch=st.integers(0, 5))
def test_an_epoch_has_every_example_exactly_once_the_last_partial_batch_included(lengths, options, seed, epoch) -> None:
    batches = epoch_batches(lengths, options, seed, epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    full, rest = divmod(len(lengths), options.batch_size)
    assert sorted(map(len, batches), reverse=True) == [options.batch_size] * full + ([rest] if rest else [])


@checked_often
@given(lengths=some_lengths, options=some_options, seed=seeds)
def test_the_micro_batches_of_each_epoch_have_every_example_once(lengths, options, seed) -> None:
    order, per_epoch = BatchOrder(lengths, options, seed), -(-len(lengths) // options.batch_size)
    for epoch in range(3):
        batches = [order[epoch * per_epoch + step] for step in range(per_epoch)]
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        assert batches == epoch_batches(lengths, options, seed, epoch)


@checked_often
@given(lengths=some_lengths, options=some_options, seed=seeds, steps=st.lists(st.integers(0, 50), max_size=12))
def test_the_batch_of_a_step_is_the_same_whenever_it_is_asked_for(lengths, options, seed, steps) -> None:
    """A run that goes on from a checkpoint meets the batches that it would have met."""
    order = BatchOrder(lengths, options, seed)
    for step in steps:
        np.random.seed(step)
        mx.random.seed(step)
        assert order[step] == BatchOrder(lengths, options, seed)[step]


def test_batching_leaves_the_global_random_state_alone() -> None:
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    epoch_batches(list(range(1, 40)), BatchOptions(), 0, 0)
    assert np.random.random() == expected


def test_seeds_and_epochs_differ_in_order() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 64).tolist()
    orders = {
        tuple(map(tuple, epoch_batches(lengths, BatchOptions(), seed, epoch)))
        for seed in range(4)
        for epoch in range(3)
    }
    assert len(orders) == 12


def test_an_epoch_is_not_sorted_by_length() -> None:
    lengths = list(range(1, 257))
    for bucket in (1, 16, 1000):
        batches = epoch_batches(lengths, BatchOptions(bucket=bucket), 3, 0)
        middles = [np.mean([lengths[index] for index in batch]) for batch in batches]
        assert middles != sorted(middles)
        assert abs(np.corrcoef(middles, np.arange(len(middles)))[0, 1]) < 0.5


def padding_share(lengths: list[int], batches: list[list[int]]) -> float:
    computed = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    return 1 - sum(lengths) / computed


@pytest.mark.parametrize("seed", range(5))
def test_bucketing_pads_less_than_a_random_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = (20 + rng.lognormal(4, 1, 300)).astype(int).tolist()
    order = rng.permutation(300).tolist()
    random = padding_share(lengths, [order[at : at + 4] for at in range(0, 300, 4)])
    bucketed = padding_share(lengths, epoch_batches(lengths, BatchOptions(), seed, 0))
    assert bucketed < random / 2


def test_a_larger_bucket_pads_less() -> None:
    lengths = (20 + np.random.default_rng(0).lognormal(4, 1, 400)).astype(int).tolist()
    shares = [padding_share(lengths, epoch_batches(lengths, BatchOptions(bucket=size), 0, 0)) for size in (1, 4, 100)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 3 * shares[2]


def test_examples_of_equal_length_are_mixed_anew_each_epoch() -> None:
    partners = {frozenset(batch) for epoch in range(10) for batch in epoch_batches([7] * 16, BatchOptions(), 0, epoch)}
    assert len(partners) > 20


def test_fewer_examples_than_a_batch_are_one_batch_every_step() -> None:
    order = BatchOrder([5, 9, 2], BatchOptions(batch_size=8), 0)
    for step in range(5):
        assert sorted(order[step]) == [0, 1, 2]


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"max_seq_length": 0}, {"bucket": 0}, {"batch_size": 2.0}], ids=str)
def test_batch_options_out_of_bounds_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        BatchOptions(**bad)


def test_sequences_of_fewer_than_8_tokens_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_seq_length"):
        BatchOptions(max_seq_length=7)
