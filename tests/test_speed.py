"""A speed is that of writing, one token after the other, and changes nothing of the model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import save_random_model

from true_kd.models import LanguageModel, ModelOptions, decoding_speed, open_model

PROMPTS = [[5, 6, 7], [8, 9], [10]]


class Counting(nn.Module):
    """A model that counts its calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module
        self.calls: list[tuple[int, ...]] = []

    @property
    def layers(self) -> list[nn.Module]:
        return self.inner.layers

    def make_cache(self) -> list[Any]:
        from mlx_lm.models.cache import make_prompt_cache

        return make_prompt_cache(self.inner)

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        self.calls.append(tokens.shape)
        return self.inner(tokens, cache=cache)


def test_each_token_is_written_by_itself(student: LanguageModel) -> None:
    counting = Counting(student.module)
    decoding_speed(counting, PROMPTS, 6)
    single = [shape for shape in counting.calls if shape == (1, 1)]
    # To each prompt and to the first once more, which warms up: six tokens are made from one before.
    assert len(single) >= 4 * 6
    assert all(shape[0] == 1 for shape in counting.calls), "one prompt at a time"


def test_a_speed_is_that_of_the_clock(student: LanguageModel) -> None:
    began = time.perf_counter()
    speed = decoding_speed(student.module, PROMPTS, 40)
    took = time.perf_counter() - began
    assert 0 < speed < np.inf
    assert 2 * 40 / speed <= took, "of three replies two take as long as the median, or longer"


def test_a_large_model_is_slower(student: LanguageModel, tmp_path: Path, tokenizer_folder: Path) -> None:
    sizes = {"hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 2048, "num_attention_heads": 8}
    folder = save_random_model(tmp_path / "large", tokenizer_folder, seed=5, **sizes)
    large = open_model(ModelOptions(model=str(folder)), "teacher")
    assert decoding_speed(large.module, PROMPTS, 12) < 0.8 * decoding_speed(student.module, PROMPTS, 12)


def test_a_stop_token_does_not_end_it(student: LanguageModel) -> None:
    """A student that would stop at once writes on: another speed would be that of reading."""
    weight = mx.zeros_like(student.module.model.embed_tokens.weight)
    weight[1] = 1.0
    student.module.model.embed_tokens.weight = weight
    counting = Counting(student.module)
    decoding_speed(counting, [[1, 1, 1]], 5)
    assert len([shape for shape in counting.calls if shape == (1, 1)]) >= 2 * 5


@pytest.mark.parametrize("tokens", [1, 7])
def test_one_prompt_is_enough(student: LanguageModel, tokens: int) -> None:
    assert decoding_speed(student.module, [[5]], tokens) > 0


def test_a_model_is_left_as_it_was(student: LanguageModel) -> None:
    tokens = mx.array([[5, 6, 7]])
    before = np.array(student.module(tokens))
    decoding_speed(student.module, PROMPTS, 4)
    assert np.array_equal(np.array(student.module(tokens)), before)


def test_random_numbers_are_left_as_they_were(student: LanguageModel) -> None:
    mx.random.seed(3)
    expected = np.array(mx.random.normal((4,)))
    mx.random.seed(3)
    decoding_speed(student.module, PROMPTS, 4)
    assert np.array_equal(np.array(mx.random.normal((4,))), expected)
