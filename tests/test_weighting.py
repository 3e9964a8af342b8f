"""Tokens weigh 1 on average over the training data, and in proportion to what they are weighed by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import mlx.core as mx
import numpy as np
import pytest

from true_kd.errors import InputError
from true_kd.examples import Example, make_example
from true_kd.losses import LossOptions, WeighBy
from true_kd.prompts import Prompt, from_records
from true_kd.targets import HiddenTargets, TargetSettings, TeacherHead, encode
from true_kd.weighting import weigh_tokens

VOCAB = 50
EVERY_ID = TargetSettings("sparse", 1e-30, 2.0, 1.0)
by_teacher = pytest.mark.parametrize("weigh_by", ["entropy", "certainty"])


def draw_logits(lengths: Sequence[int]) -> list[np.ndarray]:
    """The teacher's logits of some replies, from sharp tokens to flat ones."""
    rng = np.random.default_rng(0)
    return [
        (rng.uniform(0.2, 6.0, (length, 1)) * rng.normal(size=(length, VOCAB))).astype(np.float32) for length in lengths
    ]


def make(logits: np.ndarray, kind: str, room: int = 1000) -> Example:
    length = len(logits)
    labels, kept = np.arange(length, dtype=np.int32), np.arange(length, dtype=np.int32)
    targets = encode(mx.array(logits), mx.array(labels), np.full(length, 0.5, dtype=np.float32), EVERY_ID)
    if kind == "hidden states":
        targets = HiddenTargets(logits.astype(np.float16), TeacherHead(lambda states: states))
    example = make_example([1, 2, 3], labels, targets, kept, "made up", room)
    assert example is not None
    return example


def entropies(logits: np.ndarray) -> np.ndarray:
    """Float64 nats."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(axis=-1, keepdims=True)
    return -(p * np.log(p)).sum(axis=-1)


def prompts_of(rewards: Sequence[float | None]) -> list[Prompt]:
    return from_records([{"prompt": f"question {number}", "reward": reward} for number, reward in enumerate(rewards)])


def weights_of(examples: Sequence[Example]) -> np.ndarray:
    return np.concatenate([example.weights for example in examples])


LENGTHS = (3, 11, 1, 7)
NO_REWARDS = prompts_of([None] * len(LENGTHS))
every_kind = pytest.mark.parametrize("kind", ["entries", "hidden states"])


@pytest.fixture
def examples() -> list[Example]:
    """Replies of several lengths."""
    return [make(logits, "entries") for logits in draw_logits(LENGTHS)]


def test_by_default_every_token_weighs_the_same(examples: list[Example]) -> None:
    found = weigh_tokens(examples, NO_REWARDS, LossOptions().weigh_by)
    assert all(one is other for one, other in zip(found, examples, strict=True))
    assert weights_of(found).tolist() == [1.0] * sum(LENGTHS)


@pytest.mark.parametrize("weigh_by", get_args(WeighBy))
def test_a_token_weighs_1_on_average_over_the_data(examples: list[Example], weigh_by: WeighBy) -> None:
    found = weigh_tokens(examples, prompts_of([0.5, 2, 0, 1.5]), weigh_by)
    assert weights_of(found).mean() == pytest.approx(1.0, rel=1e-6)
    assert weights_of(found).dtype == np.float32
    assert [len(example.weights) for example in found] == list(LENGTHS)


@pytest.mark.parametrize("weigh_by", get_args(WeighBy))
def test_nothing_but_the_weights_changes(examples: list[Example], weigh_by: WeighBy) -> None:
    found = weigh_tokens(examples, prompts_of([1, 2, 3, 4]), weigh_by)
    for one, other in zip(found, examples, strict=True):
        assert replace(one, weights=other.weights).targets is other.targets
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert (one.kept is other.kept, one.where) == (True, other.where)
        assert other.weights.tolist() == [1.0] * len(other.kept)


@every_kind
def test_weighed_by_entropy_a_token_weighs_as_much_as_the_teacher_is_unsure(kind: str) -> None:
    logits = draw_logits(LENGTHS)
    found = weights_of(weigh_tokens([make(each, kind) for each in logits], NO_REWARDS, "entropy"))
    expected = entropies(np.concatenate(logits))
    # Sparse log-probabilities have eight bits, hidden states eleven.
    np.testing.assert_allclose(found, expected / expected.mean(), rtol=0.05, atol=0.02)


@every_kind
def test_weighed_by_certainty_a_token_weighs_one_over_one_and_the_entropy(kind: str) -> None:
    logits = draw_logits(LENGTHS)
    found = weights_of(weigh_tokens([make(each, kind) for each in logits], NO_REWARDS, "certainty"))
    expected = 1.0 / (1.0 + entropies(np.concatenate(logits)))
    np.testing.assert_allclose(found, expected / expected.mean(), rtol=0.02)


def test_unsure_tokens_weigh_more_by_entropy_and_less_by_certainty(examples: list[Example]) -> None:
    by_entropy, by_certainty = (
        weights_of(weigh_tokens(examples, NO_REWARDS, weigh_by)) for weigh_by in ("entropy", "certainty")
    )
    np.testing.assert_array_equal(np.argsort(by_entropy), np.argsort(-by_certainty))


def test_weighed_by_reward_every_token_of_a_reply_weighs_as_its_record_says(examples: list[Example]) -> None:
    found = weigh_tokens(examples, prompts_of([1, 0, 2.5, 4]), "reward")
    mean = (1 * 3 + 0 * 11 + 2.5 * 1 + 4 * 7) / 22
    for example, reward, length in zip(found, (1, 0, 2.5, 4), LENGTHS, strict=True):
        np.testing.assert_allclose(example.weights, [reward / mean] * length, rtol=1e-6)


@by_teacher
def test_the_weight_of_a_token_does_not_depend_on_its_neighbours(examples: list[Example], weigh_by: WeighBy) -> None:
    found = weigh_tokens(examples, NO_REWARDS, weigh_by)
    turned = weigh_tokens(examples[::-1], NO_REWARDS, weigh_by)[::-1]
    np.testing.assert_allclose(weights_of(found), weights_of(turned), rtol=1e-6)


def test_a_reply_that_was_cut_is_weighed_by_what_is_left() -> None:
    logits = draw_logits(LENGTHS)
    cut = [make(each, "entries", room=3 + 5) for each in logits]
    found = weigh_tokens(cut, prompts_of([1, 1, 1, 3]), "reward")
    assert [len(example.weights) for example in found] == [3, 5, 1, 5]
    assert weights_of(found).mean() == pytest.approx(1.0, rel=1e-6)


def refusal(examples: list[Example], rewards: Sequence[float | None], weigh_by: WeighBy) -> str:
    with pytest.raises(InputError) as caught:
        weigh_tokens(examples, prompts_of(rewards), weigh_by)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_missing_reward_is_named_by_its_record(examples: list[Example]) -> None:
    message = refusal(examples, [1, 2, None, 4], "reward")
    assert message.startswith("train_prompts[2]: no 'reward', expected one in every training record")


def test_rewards_that_are_all_zero_are_refused(examples: list[Example]) -> None:
    assert "losses.weigh_by reward: every reward is 0, expected" in refusal(examples, [0, 0, 0.0, 0], "reward")


def test_a_teacher_that_is_sure_of_every_token_cannot_weigh_by_entropy() -> None:
    logits = np.full((4, VOCAB), -100.0, dtype=np.float32)
    logits[np.arange(4), np.arange(4)] = 1000.0
    examples = [make(logits, "hidden states")]
    assert "the teacher is sure of every token" in refusal(examples, [None], "entropy")
    assert weigh_tokens(examples, prompts_of([None]), "certainty")[0].weights.tolist() == [1.0] * 4


def test_as_many_prompts_as_examples_are_expected(examples: list[Example]) -> None:
    with pytest.raises(ValueError, match="zip"):
        weigh_tokens(examples, NO_REWARDS[:2], "entropy")
