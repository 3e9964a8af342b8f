"""Which checkable tasks a model gets right."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from true_kd.evaluation.options import EvaluationOptions
from true_kd.examples import render
from true_kd.models import LanguageModel, ModelTokenizer, SamplingOptions, generate_replies
from true_kd.prompts import Prompt


def exact_match(
    model: LanguageModel, prompts: Sequence[Prompt], sampling: SamplingOptions, evaluation: EvaluationOptions
) -> np.ndarray:
    """Whether the model, taking the most likely token each time, gets each prompt with an `answer` right; [prompts]."""
    greedy = sampling.model_copy(update={"sampling_temperature": 0.0})
    rendered = [render(prompt, model.tokenizer, model.stop_ids, model.name).prompt for prompt in prompts]
    written = deque(generate_replies(model, rendered, greedy, [0] * len(rendered)), maxlen=1)
    _, replies = written.pop()
    return right_answers(prompts, (reply.tokens for reply in replies), model, evaluation)


def right_answers(
    prompts: Sequence[Prompt], replies: Iterable[Sequence[int]], model: ModelTokenizer, evaluation: EvaluationOptions
) -> np.ndarray:
    """Whether each reply (token ids) gives the answer of its prompt; bool [prompts]."""
    stop = set(model.stop_ids)
    return np.array(
        [
            gives_answer(
                model.tokenizer.decode([token for token in reply if token not in stop]), prompt.answer or "", evaluation
            )
            for prompt, reply in zip(prompts, replies, strict=True)
        ],
        dtype=bool,
    )


def gives_answer(reply: str, answer: str, evaluation: EvaluationOptions) -> bool:
    """Whether a reply gives an answer."""
    return extract_answer(reply, evaluation) == _squeezed(answer)


def extract_answer(reply: str, evaluation: EvaluationOptions) -> str:
    """The answer a reply gives, white space squeezed."""
    return _squeezed(reply.rpartition(evaluation.answer_marker)[2])


def _squeezed(text: str) -> str:
    return " ".join(text.split())
