"""From a prompt and a reply to the tokens that are trained.

Owns the chat template's rendering, the next-token shift, truncation, and which tokens count. A token counts when it
is part of the response, its stop token included, and the cache keeps targets for it; prompt tokens never count. In
`text` data every token but the first is the response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from true_kd.errors import InputError
from true_kd.models import TemplateRefusal, TemplateStopped, apply_template
from true_kd.prompts import Prompt
from true_kd.targets import TeacherTargets


@dataclass(frozen=True)
class Rendered:
    """A prompt as token ids of one tokenizer, with the reply that the data brings, if any."""

    prompt: list[int]
    response: list[int] | None
    """None where the teacher writes the reply."""


@dataclass(frozen=True)
class Example:
    """A prompt, its response and the teacher's targets at the response tokens that count."""

    prompt: Int[np.ndarray, " prompt"]
    response: Int[np.ndarray, " response"]
    targets: TeacherTargets
    kept: Int[np.ndarray, " counted"]
    """Positions in the response that count, ascending: all, unless the cache keeps a share of them."""
    weights: Float[np.ndarray, " counted"]
    """What each token that counts weighs in the loss, 1 on average over the training data."""
    where: str

    @property
    def tokens(self) -> Int[np.ndarray, " sequence"]:
        """Prompt and response as one sequence."""
        return np.concatenate([self.prompt, self.response])

    @property
    def rows(self) -> Int[np.ndarray, " counted"]:
        """Positions of `tokens` whose next token counts: where the model predicts the response."""
        return np.flatnonzero(self.loss_mask[1:])

    @property
    def labels(self) -> Int[np.ndarray, " counted"]:
        """The tokens that count."""
        return self.response[self.kept]

    @property
    def loss_mask(self) -> Bool[np.ndarray, " sequence"]:
        """True at the tokens that count, all of which are the response's."""
        mask = np.zeros(len(self), dtype=bool)
        mask[len(self.prompt) + self.kept] = True
        return mask

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


class TemplateError(InputError):
    """A prompt cannot be rendered by the model's chat template."""

    def __init__(self, where: str, model: str, reason: str) -> None:
        super().__init__(
            f"{where}: the chat template of {model} refuses it ({reason}). Change the prompt, use an instruct model, "
            "or give raw `text`."
        )


class TemplateOverrunError(InputError):
    """A model's chat template computes, stores or writes more than any template needs."""

    def __init__(self, where: str, model: str, reason: str) -> None:
        super().__init__(
            f"{where}: the chat template of {model} was stopped, because {reason}. Such a template is broken or "
            "hostile: choose another model."
        )


def render(prompt: Prompt, tokenizer: Any, stop_ids: Sequence[int], model: str) -> Rendered:
    """Token ids of a prompt by a model's own chat template, ready for a reply.

    A tokenizer without a chat template takes a single user message as it stands, as `mlx_lm.generate` does.

    Raises
    ------
    TemplateError
        when the template fails on the conversation, or there is none for a conversation of several messages.
    TemplateOverrunError
        when the template had to be stopped.
    """
    if prompt.text is not None:
        tokens = list(tokenizer.encode(prompt.text))
        if len(tokens) < 2:
            raise InputError(f"{prompt.where}: a text of {len(tokens)} token, expected two or more. Remove the line.")
        return Rendered(tokens[:1], tokens[1:])
    messages = [dict(message) for message in prompt.messages or ()]
    if not tokenizer.has_chat_template:
        return _render_plain(prompt, messages, tokenizer, stop_ids, model)
    opening = _apply(prompt, messages, tokenizer, model, add_generation_prompt=True)
    if prompt.completion is None:
        return Rendered(opening, None)
    whole = _apply(prompt, [*messages, dict(prompt.completion)], tokenizer, model, add_generation_prompt=False)
    if prompt.completion.get("tool_calls"):
        silent = {key: value for key, value in prompt.completion.items() if key != "tool_calls"}
        if whole == _apply(prompt, [*messages, silent], tokenizer, model, add_generation_prompt=False):
            raise TemplateError(prompt.where, model, "it does not print the tool calls of the completion")
    # Templates that print earlier turns otherwise than the last one: the completion's own text is the reply.
    follows = whole[: len(opening)] == opening
    response = whole[len(opening) :] if follows else _encode_content(prompt, tokenizer, model)
    return Rendered(opening, _ended(response, stop_ids))


def _apply(
    prompt: Prompt, messages: list[dict[str, Any]], tokenizer: Any, model: str, *, add_generation_prompt: bool
) -> list[int]:
    tools = [_plain(tool) for tool in prompt.tools] if prompt.tools else None
    try:
        return apply_template(tokenizer, messages, tools, TEMPLATE_DATE, add_generation_prompt=add_generation_prompt)
    except TemplateRefusal as error:
        raise TemplateError(prompt.where, model, " ".join(str(error).split())[:160]) from error
    except TemplateStopped as error:
        raise TemplateOverrunError(prompt.where, model, str(error)) from error


TEMPLATE_DATE = "26 Jul 2024"
"""The day that Llama's templates print where they cannot ask the clock: with that of today the cache would miss
everything tomorrow."""


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _render_plain(
    prompt: Prompt, messages: list[dict[str, Any]], tokenizer: Any, stop_ids: Sequence[int], model: str
) -> Rendered:
    if len(messages) != 1 or messages[0]["role"] != "user" or prompt.tools:
        raise TemplateError(prompt.where, model, "it has no chat template")
    opening = list(tokenizer.encode(str(messages[0]["content"])))
    if prompt.completion is None:
        return Rendered(opening, None)
    return Rendered(opening, _ended(_encode_content(prompt, tokenizer, model), stop_ids))


def _encode_content(prompt: Prompt, tokenizer: Any, model: str) -> list[int]:
    completion = prompt.completion or {}
    content = completion.get("content")
    if not content or completion.get("tool_calls"):
        raise TemplateError(prompt.where, model, "a completion with tool calls does not follow its prompt")
    return list(tokenizer.encode(content, add_special_tokens=False))


def _ended(response: list[int], stop_ids: Sequence[int]) -> list[int]:
    """`response` up to its first stop token, which is added where it is missing."""
    for index, token in enumerate(response):
        if token in stop_ids:
            return response[: index + 1]
    return [*response, stop_ids[0]] if stop_ids else response


def make_example(
    prompt: Sequence[int],
    response: Sequence[int] | Int[np.ndarray, " response"],
    targets: TeacherTargets,
    kept: Int[np.ndarray, " counted"],
    where: str,
    max_seq_length: int,
) -> Example | None:
    """An example of at most `max_seq_length` tokens: the response is cut at its end; None where none of it is left."""
    room = max_seq_length - len(prompt)
    kept = kept[kept < room]
    if room <= 0 or not prompt or not len(kept):
        return None
    return Example(
        np.asarray(prompt, dtype=np.int32),
        np.asarray(response[:room], dtype=np.int32),
        targets.first(len(kept)),
        kept,
        np.ones(len(kept), dtype=np.float32),
        where,
    )
