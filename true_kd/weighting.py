"""What each response token weighs in the loss: by the teacher's entropy there, or by a reward that the data gives.

Weights are 1 on average over the training data, so that the learning rate means the same with and without them, and a
token's weight does not depend on the batch it falls in. Held-out measures are never weighted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from true_kd.errors import InputError
from true_kd.examples import Example
from true_kd.losses import WeighBy
from true_kd.prompts import Prompt


class NoReward(InputError):
    """A training record has no reward, and is to be weighed by it."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where}: no 'reward', expected one in every training record where losses.weigh_by is reward. Add it."
        )


def weigh_tokens(examples: Sequence[Example], prompts: Sequence[Prompt], weigh_by: WeighBy) -> list[Example]:
    """The training examples with their weights; `prompts` are those they came from, in the same order.

    Raises
    ------
    InputError
        when a reward is missing, or all weights are 0.
    """
    if weigh_by == "none":
        return list(examples)
    raw = [_raw_weights(example, prompt, weigh_by) for example, prompt in zip(examples, prompts, strict=True)]
    mean = float(np.mean(np.concatenate(raw)))
    if not mean > (_LEAST_ENTROPY if weigh_by == "entropy" else 0.0):
        found = "every reward is 0" if weigh_by == "reward" else "the teacher is sure of every token"
        raise InputError(f"losses.weigh_by {weigh_by}: {found}, expected some weight above 0. Write none instead.")
    return [
        replace(example, weights=(weights / mean).astype(np.float32))
        for example, weights in zip(examples, raw, strict=True)
    ]


_LEAST_ENTROPY = 1e-6
"""Nats per token: what is below is the rounding of targets and of float32, and would be all that is trained on."""


def _raw_weights(example: Example, prompt: Prompt, weigh_by: WeighBy) -> np.ndarray:
    if weigh_by == "reward":
        if prompt.reward is None:
            raise NoReward(prompt.where)
        return np.full(len(example.kept), prompt.reward)
    entropies = np.maximum(example.targets.entropies, 0.0)
    return entropies if weigh_by == "entropy" else 1.0 / (1.0 + entropies)
