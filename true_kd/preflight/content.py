"""What can be said of prompts without any model: twins, leaks, rewards, and answers that no reply can give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from true_kd.config import RunConfig
from true_kd.evaluation import EvaluationOptions, gives_answer
from true_kd.files import digest_json
from true_kd.preflight.findings import Sheet
from true_kd.prompts import Prompt
from true_kd.suggest import quote
from true_kd.weighting import NoReward


def check_content(train: Sequence[Prompt], valid: Sequence[Prompt], config: RunConfig, sheet: Sheet) -> None:
    """Note what is wrong with prompts as they are written."""
    _check_leaks(train, valid, sheet)
    for prompts in (train, valid):
        _check_twins(prompts, sheet)
    if config.losses.weigh_by == "reward":
        for prompt in train:
            if prompt.reward is None:
                sheet.refused("reward", NoReward(prompt.where))
    if config.evaluation.exact_match:
        for prompt in valid:
            _check_answer(prompt, config.evaluation, sheet)


def _check_leaks(train: Sequence[Prompt], valid: Sequence[Prompt], sheet: Sheet) -> None:
    """Held-out prompts that training sees, whatever reply follows."""
    seen = {_opening(prompt): prompt.where for prompt in reversed(train)}
    for prompt in valid:
        if (twin := seen.get(_opening(prompt))) is not None:
            sheet.problem(
                "leak",
                f"{prompt.where}: the same prompt as {twin}, which is trained on, expected one held out from training: "
                "what is measured on it is no proof. Remove one of the two.",
            )


def _opening(prompt: Prompt) -> str:
    """A prompt without its reply; white space does not make another of it."""
    messages = None if prompt.messages is None else [_squeezed(message) for message in prompt.messages]
    text = None if prompt.text is None else " ".join(prompt.text.split())
    return digest_json([messages, text, prompt.tools])


def _squeezed(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": " ".join(message["content"].split())}


def _check_twins(prompts: Sequence[Prompt], sheet: Sheet) -> None:
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.identity(), []).append(prompt)
    for first, *others in groups.values():
        if not others:
            continue
        places = ", ".join(other.where.rpartition(":")[2] for other in others[:_NAMED])
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        what = "prompt and reply" if first.completion else "prompt"
        sheet.warning(
            "duplicate",
            f"{first.where}: the same {what} again in line {places}{more}, expected each once: it counts "
            f"{len(others) + 1} times, and its reply is one and the same. Remove the others.",
        )


_NAMED = 5


def _check_answer(prompt: Prompt, evaluation: EvaluationOptions, sheet: Sheet) -> None:
    if prompt.answer is None:
        return
    if not gives_answer(f"{evaluation.answer_marker} {prompt.answer}", prompt.answer, evaluation):
        sheet.problem(
            "answer",
            f"{prompt.where}: answer {quote(prompt.answer)} holds {quote(evaluation.answer_marker)}, after which the "
            "grading begins, expected what follows it: no reply can be right. Leave it out, or change "
            "evaluation.answer_marker.",
        )
        return
    content = (prompt.completion or {}).get("content")
    if content and not gives_answer(content, prompt.answer, evaluation):
        sheet.problem(
            "answer",
            f"{prompt.where}: the completion does not give the answer {quote(prompt.answer)}, expected it after "
            f"{quote(evaluation.answer_marker)} or alone. Correct one of the two.",
        )
