"""Writes replies in batches, each from a random stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from pydantic import Field

from true_kd.files import digest_json
from true_kd.models.opening import LanguageModel
from true_kd.options import Options, PositiveInt
from true_kd.stopping import uninterrupted


class SamplingOptions(Options):
    """How text is drawn from a model."""

    sampling_temperature: float = Field(default=0.7, ge=0.0, le=5.0)
    """Randomness of the drawn text; 0 takes the most likely token each time. Not the loss's temperature."""
    top_p: float = Field(default=0.95, gt=0.0, le=1.0)
    """Draw from the smallest set of tokens with this much probability."""
    max_tokens: PositiveInt = 512
    """Longest reply, in tokens."""
    batch_size: PositiveInt = 16
    """Replies written at a time."""


@dataclass
class Reply:
    """A reply in the making. `tokens` ends with the stop token when `finished` is `stop`."""

    tokens: list[int] = field(default_factory=list)
    finished: Literal["", "stop", "length"] = ""


@dataclass(frozen=True)
class DecodingStep:
    """One token for each reply still being written. `logits` are log-probabilities before sampling, each [vocab]."""

    index: list[int]
    tokens: list[int]
    logits: list[mx.array]


# mlx-lm's gemma2 spreads the mask of a padded batch along the heads (seen in 0.32.2): wrong logits, or a ValueError.
_UNBATCHED = ("gemma2",)


def generate_replies(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    seeds: Sequence[int],
    lengths: Sequence[int] | None = None,
) -> Iterator[tuple[DecodingStep, list[Reply]]]:
    """Write a reply to each prompt (token ids), batched; yields after every decoding step.

    Parameters
    ----------
    seeds
        one a prompt: each reply has a random stream of its own, so that what is drawn for a prompt does not depend on
        its neighbours in the batch.
    lengths
        the tokens after which each reply is cut, one a prompt; None for `options.max_tokens`.
    """
    from mlx_lm.generate import BatchGenerator

    width = 1 if getattr(model.module, "model_type", "") in _UNBATCHED else options.batch_size
    samplers = [keyed_sampler(options, seed) for seed in seeds] if options.sampling_temperature > 0 else None
    replies = [Reply() for _ in prompts]
    # Half made, it would leave Metal's wired limit as it set it, and fail in its own `__del__` (seen in 0.32.2).
    with uninterrupted():
        generator = BatchGenerator(
            model.module,
            stop_tokens=[[stop] for stop in model.stop_ids],
            completion_batch_size=width,
            prefill_batch_size=min(width, 8),  # mlx-lm's own default
        )
    try:
        handles = generator.insert(
            [list(prompt) for prompt in prompts],
            list(lengths or [options.max_tokens] * len(prompts)),
            samplers=samplers,
        )
        order = {handle: index for index, handle in enumerate(handles)}
        while responses := generator.next_generated():
            step = DecodingStep(
                [order[response.uid] for response in responses],
                [response.token for response in responses],
                [response.logprobs for response in responses],
            )
            for response in responses:
                reply = replies[order[response.uid]]
                reply.tokens.append(response.token)
                reply.finished = response.finish_reason or ""
            yield step, replies
    finally:
        generator.close()


def cache_bytes(module: nn.Module, sequences: int, tokens: int) -> int:
    """Bytes of the keys and values that a model keeps of so many sequences of so many tokens; nothing is computed."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(module)
    # Lazy: the shapes are known when the graph is.
    module(mx.zeros((sequences, tokens), dtype=mx.int32), cache=cache)
    return sum(part.nbytes for part in cache)


def keyed_sampler(options: SamplingOptions, seed: int) -> Callable[[mx.array], mx.array]:
    """Draws a token from log-probabilities [rows, vocab], from a random stream that depends on `seed` alone."""
    state = {"key": mx.random.key(seed)}

    def sample(logprobs: mx.array) -> mx.array:
        state["key"], key = mx.random.split(state["key"])
        return mx.random.categorical(_nucleus(logprobs, options.top_p) / options.sampling_temperature, key=key)

    return sample


def _nucleus(logprobs: mx.array, top_p: float) -> mx.array:
    if top_p >= 1.0:
        return logprobs
    from mlx_lm.sample_utils import apply_top_p

    return apply_top_p(logprobs, top_p)


def seed_of(text: str) -> int:
    """A 32-bit seed that depends on nothing but `text`."""
    return int(digest_json(text)[:8], 16)


def uniforms_of(text: str, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) that depend on nothing but `text`; longer draws begin with shorter ones."""
    return np.random.default_rng(int(digest_json(text)[:16], 16)).random(count, dtype=np.float32)
