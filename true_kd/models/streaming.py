"""Speaks with one model through mlx-lm's own generation: writes a reply token by token, or reads one back.

The reply is a function of model, prompt, options and seed: its random stream is its own, and MLX's global one is left
alone. What a model has read of a conversation can be kept, so that each turn costs its own tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from true_kd.models.generation import SamplingOptions, keyed_sampler
from true_kd.models.opening import LanguageModel


@dataclass(frozen=True)
class Token:
    """One token of a reply."""

    id: int
    text: str
    """What it adds to the text: nothing for a stop token, nor for all but the last of those that share a character."""
    finished: Literal["", "stop", "length"]
    """Of the last token: why there are no more."""


class Recollection:
    """What a model has read of a conversation, in mlx-lm's key-value caches."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._layers: list[Any] = []
        # None while the model reads or writes: what comes of an interruption there is not known, and not used.
        self._tokens: list[int] | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that need not be read again."""
        return tuple(self._tokens or ())

    def begin(self, prompt: Sequence[int]) -> tuple[list[int], list[Any]]:
        """What is still to be read of a prompt, at least one token, and the caches that hold the rest of it."""
        from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

        held, self._tokens = self._tokens or [], None
        shared = 0
        while shared < min(len(held), len(prompt) - 1) and held[shared] == prompt[shared]:
            shared += 1
        extra = len(held) - shared
        if not shared or (extra and not can_trim_prompt_cache(self._layers)):
            self._layers, shared = make_prompt_cache(self._module), 0
        elif extra:
            trim_prompt_cache(self._layers, extra)
        return list(prompt[shared:]), self._layers

    def pause(self, tokens: list[int] | None) -> None:
        """Note what the caches hold by now; None where the model goes on."""
        self._tokens = tokens


def stream_reply(
    model: LanguageModel,
    prompt: Sequence[int],
    options: SamplingOptions,
    seed: int,
    recollection: Recollection | None = None,
) -> Iterator[Token]:
    """Write a reply to a prompt (token ids), of at most `options.max_tokens`; yields each token as it is drawn.

    `recollection`, of the same model, holds what it has read before, and afterwards this turn as well.
    """
    from mlx_lm.generate import generate_step

    kept = recollection or Recollection(model.module)
    unread, layers = kept.begin(prompt)
    drawn = generate_step(
        mx.array(unread),
        model.module,
        max_tokens=options.max_tokens,
        sampler=keyed_sampler(options, seed) if options.sampling_temperature > 0 else None,
        prompt_cache=layers,
    )
    detokenizer = model.tokenizer.detokenizer
    detokenizer.reset()
    stops = set(model.stop_ids)
    known = list(prompt)
    for count, (token, _) in enumerate(drawn, 1):
        # By the time mlx-lm hands a token out, the model has read it.
        known.append(token)
        stopped = token in stops
        finished = "stop" if stopped else "length" if count == options.max_tokens else ""
        if not stopped:
            detokenizer.add_token(token)
        if finished:
            detokenizer.finalize()
        kept.pause(known)
        yield Token(token, detokenizer.last_segment, finished)
        if finished:
            return
        kept.pause(None)


def read_logits(module: nn.Module, prompt: Sequence[int], reply: Sequence[int]) -> np.ndarray:
    """The logits from which a model would draw each token of a reply: float32 [tokens, vocab], on the host.

    They take 4 bytes times tokens times vocabulary; on the device there are those of `_ROWS` tokens at a time, and of
    the prompt none at all.
    """
    from mlx_lm.models.cache import make_prompt_cache

    layers = make_prompt_cache(module)
    before, read = list(prompt[:-1]), [prompt[-1], *reply[:-1]]
    for start in range(0, len(before), _PREFILL):
        # The logits are lazy, and never computed.
        module(mx.array([before[start : start + _PREFILL]]), cache=layers)
        mx.eval([layer.state for layer in layers])
    found: np.ndarray | None = None
    for start in range(0, len(reply), _ROWS):
        logits = module(mx.array([read[start : start + _ROWS]]), cache=layers)[0].astype(mx.float32)
        if found is None:
            found = np.empty((len(reply), logits.shape[-1]), dtype=np.float32)
        found[start : start + _ROWS] = np.array(logits)
    assert found is not None, "a reply has at least one token"
    return found


_ROWS = 64
"""Tokens whose logits are computed together: 39 MB of them for a vocabulary of 152k."""
_PREFILL = 2048
"""Prompt tokens read at a time, as mlx-lm does by default."""
