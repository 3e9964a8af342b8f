"""A reply token by token: what mlx-lm would write, the same for the same seed, and no token read twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from families import VOCAB, build

from true_kd.models import LanguageModel, SamplingOptions, token_pieces
from true_kd.models.streaming import Recollection, Token, read_logits, stream_reply

PROMPT = [2, 40, 50, 60, 3]
GREEDY = SamplingOptions(sampling_temperature=0.0, max_tokens=24)
DRAWN = SamplingOptions(sampling_temperature=1.0, top_p=1.0, max_tokens=24)


def written(model: LanguageModel, prompt: Sequence[int] = PROMPT, options: SamplingOptions = GREEDY, **more: Any):
    return list(stream_reply(model, prompt, options, more.pop("seed", 0), **more))


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


# One reply


def test_a_greedy_reply_is_that_of_mlx_lm(student: LanguageModel) -> None:
    from mlx_lm import generate

    for first in range(40, 60):
        prompt = [2, first, 3]
        expected = generate(student.module, student.tokenizer, prompt, max_tokens=GREEDY.max_tokens)
        assert "".join(token.text for token in written(student, prompt)) == expected


def test_the_same_seed_draws_the_same_text_and_another_seed_another(student: LanguageModel) -> None:
    replies = [ids(written(student, options=DRAWN, seed=seed)) for seed in (3, 3, 4)]
    assert replies[0] == replies[1] != replies[2]


def test_the_random_state_of_mlx_is_left_alone(student: LanguageModel) -> None:
    mx.random.seed(5)
    expected = mx.random.uniform().item()
    mx.random.seed(5)
    written(student, options=DRAWN)
    assert mx.random.uniform().item() == expected


def test_a_nucleus_keeps_to_the_likely_tokens(student: LanguageModel) -> None:
    narrow = DRAWN.model_copy(update={"top_p": 1e-6})
    assert ids(written(student, options=narrow)) == ids(written(student))


def test_the_last_token_says_why_there_are_no_more(student: LanguageModel) -> None:
    cut = written(student)
    assert [token.finished for token in cut] == [""] * 23 + ["length"]
    # A model whose first token is its stop token: every id is one.
    student.tokenizer.eos_token_ids = set(range(320))
    [stop] = written(student)
    assert (stop.finished, stop.text) == ("stop", "")


def test_the_texts_of_the_tokens_are_those_of_the_whole(student: LanguageModel) -> None:
    hot = DRAWN.model_copy(update={"sampling_temperature": 5.0, "max_tokens": 60})
    tokens = written(student, options=hot)
    pieces = token_pieces(student.tokenizer, ids(tokens))
    # mlx-lm writes "!" for ids that no token has, of which a random model draws some.
    text = "".join(token.text for token in tokens)
    assert text.replace("!", "") == "".join(pieces).replace("!", "")
    assert "" in pieces, "characters of several tokens"


# A conversation


KINDS_OF_CACHE = ("qwen3 tied", "gemma2", "gemma3 text", "mamba")
"""Families whose caches can be trimmed at will, that slide over the text, and that hold a state alone."""


class NoText:
    """A tokenizer that knows no stop token and no text."""

    eos_token_ids = frozenset([VOCAB])
    last_segment = ""

    @property
    def detokenizer(self) -> NoText:
        return self

    def reset(self) -> None:
        pass

    def add_token(self, token: int) -> None:
        pass

    def finalize(self) -> None:
        pass


def endless(module: nn.Module) -> LanguageModel:
    return LanguageModel("endless", NoText(), VOCAB, "", module)


@pytest.mark.parametrize("family", KINDS_OF_CACHE)
def test_what_was_read_before_changes_no_reply(family: str) -> None:
    model = endless(build(family))
    kept = Recollection(model.module)
    short = GREEDY.model_copy(update={"max_tokens": 6})
    first = ids(written(model, PROMPT, short, recollection=kept))
    assert first == ids(written(model, PROMPT, short))
    longer = [*PROMPT, *first, 7, 8, 9]
    assert len(kept.tokens) == len(PROMPT) + len(first)
    assert ids(written(model, longer, short, recollection=kept)) == ids(written(model, longer, short))
    # As where a template prints an earlier turn otherwise: part of what was read holds no longer.
    other = [*PROMPT, *first[:3], 11, 12]
    assert ids(written(model, other, short, recollection=kept)) == ids(written(model, other, short))
    assert ids(written(model, other[:4], short, recollection=kept)) == ids(written(model, other[:4], short))


def test_a_turn_reads_what_is_new_only(student: LanguageModel) -> None:
    kept = Recollection(student.module)
    reply = ids(written(student, recollection=kept))
    assert kept.tokens == (*PROMPT, *reply)
    unread, layers = kept.begin([*PROMPT, *reply, 7, 8])
    assert unread == [7, 8]
    assert layers[0].offset == len(PROMPT) + len(reply)


def test_the_same_prompt_again_reads_its_last_token(student: LanguageModel) -> None:
    kept = Recollection(student.module)
    first = written(student, recollection=kept)
    assert written(student, recollection=kept) == first
    assert kept.begin(PROMPT)[0] == PROMPT[-1:]


def test_a_reply_that_nobody_waits_for_is_kept_as_far_as_it_went(student: LanguageModel) -> None:
    kept = Recollection(student.module)
    stream = stream_reply(student, PROMPT, GREEDY, 0, kept)
    begun = ids([next(stream), next(stream), next(stream)])
    stream.close()
    assert kept.tokens == (*PROMPT, *begun)
    longer = [*PROMPT, *begun, 7]
    assert written(student, longer, recollection=kept) == written(student, longer)


class Stopped(nn.Module):
    """A model that gets Ctrl-C in its forward pass."""

    def __init__(self, inner: nn.Module, at: int) -> None:
        super().__init__()
        self.inner = inner
        self.left = at

    @property
    def layers(self) -> Any:
        return self.inner.layers

    def __call__(self, *inputs: Any, **named: Any) -> mx.array:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.inner(*inputs, **named)


@pytest.mark.parametrize("at", [1, 2, 3, 6])
def test_after_ctrl_c_within_the_model_all_is_read_again(at: int, student: LanguageModel) -> None:
    stopped = replace(student, module=Stopped(student.module, at))
    kept = Recollection(stopped.module)
    with pytest.raises(KeyboardInterrupt):
        written(stopped, recollection=kept)
    assert kept.tokens == ()
    assert written(stopped, recollection=kept) == written(student)


# Reading


@pytest.mark.parametrize("family", KINDS_OF_CACHE)
def test_logits_that_are_read_back_are_those_of_the_whole(family: str) -> None:
    module = build(family)
    reply = [int(token) for token in np.random.default_rng(0).integers(0, 320, 90)]
    found = read_logits(module, PROMPT, reply)
    whole = np.array(module(mx.array([[*PROMPT, *reply]]))[0].astype(mx.float32))
    expected = whole[len(PROMPT) - 1 : -1]
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_what_was_drawn_greedily_has_the_highest_logits(student: LanguageModel) -> None:
    reply = ids(written(student))
    assert read_logits(student.module, PROMPT, reply).argmax(axis=-1).tolist() == reply
    assert read_logits(student.module, PROMPT[:1], reply[:1]).shape == (1, 320)
