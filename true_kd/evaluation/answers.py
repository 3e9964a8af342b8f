"""How near a model is to the teacher on held-out examples, and how many checkable tasks it gets right."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from pydantic import Field

from true_kd.batching import collate
from true_kd.examples import Example, render
from true_kd.losses import ForwardKL, Objective, chunks, token_losses
from true_kd.models import LanguageModel, ModelTokenizer, SamplingOptions, generate_replies, split_head
from true_kd.options import Options
from true_kd.prompts import Prompt


class EvaluationOptions(Options):
    """What is measured on the validation prompts."""

    exact_match: bool = True
    """Where validation prompts carry an `answer`, let the student write and compare."""
    answer_marker: str = Field(default="answer:", min_length=1)
    """The answer is what follows the last occurrence of this in a reply, or the whole reply where it does not occur."""


@dataclass(frozen=True)
class EvalMetrics:
    """A model against the teacher, means over the response tokens of held-out examples."""

    loss: float
    """The training objective, nats."""
    kd: float
    """T^2 times the divergence at the loss temperature, nats."""
    ce: float
    """Cross-entropy on the teacher's text, nats per token; exp of it is the perplexity."""
    kl: float
    """KL(teacher || student) at temperature 1, nats."""
    top1_agreement: float
    """Share of tokens at which model and teacher find the same token most likely."""
    tokens: int


def evaluate(student: nn.Module, examples: Sequence[Example], objective: Objective, batch_size: int) -> EvalMetrics:
    """Measure a model on examples. Leaves it in evaluation mode."""
    student.eval()
    split = split_head(student)
    sums = np.zeros(4)
    order = sorted(range(len(examples)), key=lambda index: len(examples[index]))
    plainly = replace(objective, divergence=ForwardKL(), temperature=1.0)
    for start in range(0, len(order), batch_size):
        group = [examples[index] for index in order[start : start + batch_size]]
        soft, plain = collate(group, objective.temperature), collate(group, 1.0)
        states = split.states_at(soft.tokens, soft.rows)
        for rows in chunks(split.head, states, objective):
            logits, labels = split.head(states[rows]), soft.labels[rows]
            teacher = plain.targets.rows(rows.start, rows.stop)
            kd, ce = token_losses(logits, labels, soft.targets.rows(rows.start, rows.stop), objective)
            kl, _ = token_losses(logits, labels, teacher, plainly)
            agreement = mx.argmax(logits, axis=-1) == teacher.best()
            parts = [mx.sum(part) for part in (kd, ce, kl, agreement)]
            mx.eval(parts)
            sums += [part.item() for part in parts]
    tokens = sum(len(example.kept) for example in examples)
    kd, ce, kl, agreement = (float(value) for value in sums / tokens)
    loss = objective.alpha * kd + (1 - objective.alpha) * ce
    return EvalMetrics(loss=loss, kd=kd, ce=ce, kl=kl, top1_agreement=agreement, tokens=tokens)


def exact_match(
    model: LanguageModel, prompts: Sequence[Prompt], sampling: SamplingOptions, evaluation: EvaluationOptions
) -> float:
    """Share of prompts with an `answer` that the model, taking the most likely token each time, gets right."""
    greedy = sampling.model_copy(update={"sampling_temperature": 0.0})
    rendered = [render(prompt, model.tokenizer, model.stop_ids, model.name).prompt for prompt in prompts]
    written = deque(generate_replies(model, rendered, greedy, [0] * len(rendered)), maxlen=1)
    _, replies = written.pop()
    return score_answers(prompts, (reply.tokens for reply in replies), model, evaluation)


def score_answers(
    prompts: Sequence[Prompt], replies: Iterable[Sequence[int]], model: ModelTokenizer, evaluation: EvaluationOptions
) -> float:
    """Share of replies (token ids) whose answer is that of their prompt."""
    stop = set(model.stop_ids)
    right = [
        extract_answer(model.tokenizer.decode([token for token in reply if token not in stop]), evaluation)
        == _squeezed(prompt.answer or "")
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    return sum(right) / len(right)


def extract_answer(reply: str, evaluation: EvaluationOptions) -> str:
    """The answer a reply gives, white space squeezed."""
    return _squeezed(reply.rpartition(evaluation.answer_marker)[2])


def _squeezed(text: str) -> str:
    return " ".join(text.split())
