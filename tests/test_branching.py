"""What a model says after a made-up continuation is what it says of the whole sequence read at once."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from families import FAMILIES, VOCAB, build

from true_kd.models import Branches, split_head
from true_kd.models.branching import Branch, Grid

LENGTH = 14


def sequence(seed: int, length: int = LENGTH) -> list[int]:
    """Some tokens."""
    return [int(token) for token in np.random.default_rng(seed).integers(1, VOCAB, length)]


def read_plainly(module: nn.Module, tokens: Sequence[int], asked: Sequence[Branch]) -> np.ndarray:
    """The log-probabilities after each continuation by a pass of its own, float64 [asked, vocab]."""
    rows = []
    for start, path in asked:
        logits = module(mx.array([[*tokens[:start], *path]]))[0, -1].astype(mx.float32)
        rows.append(np.array(logits - mx.logsumexp(logits)).astype(np.float64))
    return np.stack(rows)


def agree(module: nn.Module, tokens: Sequence[int], *questions: Sequence[Branch]) -> None:
    """Ask the same `Branches` one question after the other."""
    branches = Branches(module, split_head(module), tokens)
    for asked in questions:
        np.testing.assert_allclose(branches.logprobs(asked), read_plainly(module, tokens, asked), atol=2e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_continuations_are_read_as_the_whole_sequence_would_be(name: str) -> None:
    asked = [(0, (5,)), (3, (7, 8, 9)), (4, (1,)), (5, (2, 3)), (13, (4, 5, 6, 7)), (14, (9,)), (12, (11, 12))]
    agree(build(name), sequence(1), asked)


@pytest.mark.parametrize("grid", [Grid(1), Grid(16, 8, 8), Grid(4, 2, 32)], ids=str)
@pytest.mark.parametrize("name", ["llama tied", "gemma3 text", "mamba"])
def test_what_is_computed_together_changes_no_answer(name: str, grid: Grid) -> None:
    module, tokens = build(name), sequence(1)
    asked = [(0, (5,)), (3, (7, 8, 9)), (7, (1,)), (8, (2, 3)), (9, (1,) * 9), (14, (9,))]
    found = Branches(module, split_head(module), tokens, grid).logprobs(asked)
    np.testing.assert_allclose(found, read_plainly(module, tokens, asked), atol=2e-4)


@pytest.mark.parametrize("name", ["llama tied", "gemma3 text", "mamba"])
def test_it_does_not_matter_in_which_order_they_are_asked(name: str) -> None:
    module, tokens = build(name), sequence(2)
    asked = [(9, (5, 6)), (2, (7,)), (10, (1, 2, 3)), (2, (8, 9)), (11, (4,))]
    forward = Branches(module, split_head(module), tokens).logprobs(asked)
    backward = Branches(module, split_head(module), tokens).logprobs(asked[::-1])
    np.testing.assert_allclose(forward, backward[::-1], atol=2e-4)


@pytest.mark.parametrize("name", ["qwen3 tied", "gemma3 text", "falcon_h1"])
def test_more_continuations_than_fit_into_a_batch_are_all_read(name: str) -> None:
    asked = [(6 + number % 2, (1 + number, 2)[: 1 + number % 2]) for number in range(70)]
    agree(build(name), sequence(3), asked)


@pytest.mark.parametrize("name", ["qwen3 tied", "gemma3 text", "mamba"])
def test_a_continuation_at_the_start_has_nothing_before_it(name: str) -> None:
    agree(build(name), sequence(4), [(0, (5,)), (0, (6, 7)), (1, (8,))], [(0, (9, 1, 2, 3, 4, 5))])


@pytest.mark.parametrize("name", ["llama tied", "gemma3 text", "gemma3", "gemma2"])
def test_what_was_asked_before_leaves_no_trace(name: str) -> None:
    agree(build(name), sequence(5), [(8, (5, 6, 7))], [(8, (1,)), (9, (2,))], [(3, (4,))], [(8, (5, 6, 7))])


@pytest.mark.parametrize("name", ["llama tied", "gemma3 text"])
def test_a_long_sequence_is_cut_at_any_length(name: str) -> None:
    # Caches grow by 256 positions at a time.
    tokens = sequence(6, 270)
    agree(build(name, stretch=1.0), tokens, [(255, (1, 2)), (256, (3,)), (257, (4, 5, 6)), (270, (7,)), (269, (8, 9))])


def test_every_answer_is_a_distribution() -> None:
    module = build("qwen3 tied")
    found = Branches(module, split_head(module), sequence(7)).logprobs([(3, (1,)), (9, (2, 3))])
    assert found.shape == (2, VOCAB)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(axis=1), 1.0, atol=1e-5)


def test_nothing_asked_is_nothing_said() -> None:
    module = build("qwen3 tied")
    assert len(Branches(module, split_head(module), sequence(8)).logprobs([])) == 0


@pytest.mark.parametrize("name", ["gemma3 text", "gemma3n", "gemma3"])
def test_a_windowed_model_reads_its_sequence_once(name: str) -> None:
    module = build(name)
    read = []
    original = type(module).__call__

    class Counted(type(module)):  # type: ignore[misc]
        def __call__(self, inputs, *rest, **named):
            read.append(inputs.shape)
            return original(self, inputs, *rest, **named)

    split = split_head(module)
    module.__class__ = Counted
    branches = Branches(module, split, sequence(9))
    branches.logprobs([(12, (1,)), (13, (2, 3))])
    branches.logprobs([(10, (4,))])
    # Some families run their own code for the head as well: that reads single tokens.
    assert [shape for shape in read if shape[1] == LENGTH] == [(1, LENGTH)]
