"""How fast a model writes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import mlx.core as mx
import mlx.nn as nn


def decoding_speed(module: nn.Module, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """Tokens per second that a model writes to one prompt at a time, greedily: the median over prompts (token ids).

    `tokens` are written to each, past any stop token; reading the prompt is not counted, nor is a first reply that only
    warms up.
    """
    from mlx_lm.generate import generate_step

    rates = []
    for prompt in (prompts[0], *prompts):
        began = None
        for _ in generate_step(mx.array(list(prompt)), module, max_tokens=tokens + 1):
            if began is None:
                # The first token comes when the prompt was read.
                began = time.perf_counter()
        rates.append(tokens / (time.perf_counter() - (began or 0.0)))
    return median(rates[1:])
