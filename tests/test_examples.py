"""The model's own template renders the prompt; what counts is the response, up to its first stop token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from true_kd.errors import InputError
from true_kd.examples import Example, TemplateError, make_example, render
from true_kd.prompts import Prompt
from true_kd.targets import HiddenTargets, SparseTargets, TargetSettings, TeacherHead, encode

WHERE = "prompts/math/train.jsonl:12"
PAD, END = 0, 1
USER = {"role": "user", "content": "the cat sat"}
REPLY = {"role": "assistant", "content": "hello world"}
TURNS = ({"role": "system", "content": "said"}, USER, REPLY, {"role": "user", "content": "on the mat"})
TOOLS = ({"type": "function", "function": {"name": "look", "parameters": {"b": 1, "a": [2, {"c": 3}]}}},)

PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
OPENS_WITH_A_THOUGHT = PLAIN + "{% if add_generation_prompt %}<|assistant|>hmm {% endif %}"
WITHOUT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    + PLAIN
    + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITHOUT_STOP = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def load(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Any]:
    """Opens the tokenizer with another chat template, or with none."""
    from mlx_lm.utils import load_tokenizer

    def load(template: str | None) -> Any:
        folder = tmp_path_factory.mktemp("tokenizer") / "copy"
        shutil.copytree(tokenizer_folder, folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("chat_template")
        if template is not None:
            config["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(folder)

    return load


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    """The tokenizer as it is."""
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def plain(load) -> Any:
    """The tokenizer without a chat template."""
    return load(None)


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


# Prompts that the teacher answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [(USER,), TURNS], ids=["one message", "several turns"])
def test_a_prompt_is_what_the_chat_template_makes_of_it(tokenizer, messages) -> None:
    rendered = render(Prompt(WHERE, messages=messages), tokenizer, [END], "model")
    assert rendered.prompt == tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)
    assert rendered.response is None


def test_a_prompt_ends_where_the_assistant_begins(tokenizer) -> None:
    rendered = render(Prompt(WHERE, messages=TURNS), tokenizer, [END], "model")
    expected = "".join(f"<|{turn['role']}|>{turn['content']}<|end|>\n" for turn in TURNS) + "<|assistant|>"
    assert tokenizer.decode(rendered.prompt) == expected
    assert rendered.prompt == ids(tokenizer, expected)


def test_tools_are_given_to_the_template(tokenizer) -> None:
    rendered = render(Prompt(WHERE, messages=(USER,), tools=TOOLS), tokenizer, [END], "model")
    text = tokenizer.decode(rendered.prompt)
    assert text.startswith("<tools>")
    assert json.loads(text[len("<tools>") : text.index("<|user|>")]) == TOOLS[0]


def test_a_template_that_refuses_a_conversation_is_named_with_its_reason(load) -> None:
    with pytest.raises(TemplateError) as caught:
        render(Prompt(WHERE, messages=TURNS), load(WITHOUT_SYSTEM), [END], "some-model")
    assert str(caught.value).startswith(f"{WHERE}: the chat template of some-model refuses it (no system role here)")


def test_rendering_leaves_the_prompt_as_it_was(tokenizer) -> None:
    prompt = Prompt(WHERE, messages=TURNS, tools=TOOLS, completion=REPLY)
    before = prompt.identity()
    render(prompt, tokenizer, [END], "model")
    assert prompt.identity() == before


# Completions that the teacher scores --------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [(USER,), TURNS], ids=["one message", "several turns"])
def test_a_completion_ends_at_its_stop_token(tokenizer, messages) -> None:
    rendered = render(Prompt(WHERE, messages=messages, completion=REPLY), tokenizer, [END], "model")
    assert rendered.prompt == tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)
    assert rendered.response == [*ids(tokenizer, "hello world"), END]


def test_prompt_and_completion_are_the_template_of_the_whole_conversation(tokenizer) -> None:
    rendered = render(Prompt(WHERE, messages=TURNS, completion=REPLY), tokenizer, [END], "model")
    whole = tokenizer.apply_chat_template([*TURNS, REPLY], add_generation_prompt=False)
    together = rendered.prompt + rendered.response
    assert whole[: len(together)] == together
    assert tokenizer.decode(whole[len(together) :]) == "\n"


def test_a_completion_ends_at_the_first_of_several_stop_tokens(tokenizer) -> None:
    completion = {"role": "assistant", "content": "hello<|pad|>world<|end|>the mat"}
    prompt = Prompt(WHERE, messages=(USER,), completion=completion)
    assert render(prompt, tokenizer, [END], "model").response == ids(tokenizer, "hello<|pad|>world<|end|>")
    assert render(prompt, tokenizer, [PAD, END], "model").response == ids(tokenizer, "hello<|pad|>")


def test_a_stop_token_that_the_template_lacks_is_added(load) -> None:
    tokenizer = load(WITHOUT_STOP)
    rendered = render(Prompt(WHERE, messages=(USER,), completion=REPLY), tokenizer, [END, PAD], "model")
    assert rendered.response == [*ids(tokenizer, "hello world"), END]


def test_a_model_without_stop_tokens_gets_none(load) -> None:
    tokenizer = load(WITHOUT_STOP)
    rendered = render(Prompt(WHERE, messages=(USER,), completion=REPLY), tokenizer, [], "model")
    assert rendered.response == ids(tokenizer, "hello world")


def test_where_the_template_prints_a_given_reply_otherwise_its_own_text_is_the_response(load) -> None:
    tokenizer = load(OPENS_WITH_A_THOUGHT)
    rendered = render(Prompt(WHERE, messages=(USER,), completion=REPLY), tokenizer, [END], "model")
    assert tokenizer.decode(rendered.prompt).endswith("<|assistant|>hmm ")
    assert rendered.response == [*ids(tokenizer, "hello world"), END]


def test_a_tool_call_that_does_not_follow_its_prompt_is_refused(load) -> None:
    calls = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}
    with pytest.raises(TemplateError, match=f"^{WHERE}: .*tool calls"):
        render(Prompt(WHERE, messages=(USER,), completion=calls), load(OPENS_WITH_A_THOUGHT), [END], "model")


def test_a_reply_of_text_and_tool_calls_never_loses_its_calls(load) -> None:
    template = OPENS_WITH_A_THOUGHT.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}")
    calls = {**REPLY, "tool_calls": [{"function": {"name": "mat", "arguments": "{}"}}]}
    tokenizer = load(template)
    try:
        rendered = render(Prompt(WHERE, messages=(USER,), completion=calls), tokenizer, [END], "model")
    except TemplateError:
        return
    assert "mat" in tokenizer.decode(rendered.response)


# Raw text and models without a template -----------------------------------------------------------------------------


def test_in_text_every_token_but_the_first_is_the_response(tokenizer) -> None:
    rendered = render(Prompt(WHERE, text="the cat sat on the mat"), tokenizer, [END], "model")
    assert rendered.prompt + rendered.response == tokenizer.encode("the cat sat on the mat")
    assert len(rendered.prompt) == 1


def test_text_is_neither_ended_nor_cut_at_stop_tokens(tokenizer) -> None:
    rendered = render(Prompt(WHERE, text="the cat<|end|>sat"), tokenizer, [END], "model")
    assert rendered.prompt + rendered.response == ids(tokenizer, "the cat<|end|>sat")


@pytest.mark.parametrize("text", ["", "t"])
def test_text_of_fewer_than_two_tokens_is_refused(tokenizer, text: str) -> None:
    with pytest.raises(InputError, match=f"^{WHERE}: .*expected two or more"):
        render(Prompt(WHERE, text=text), tokenizer, [END], "model")


def test_without_a_chat_template_a_single_user_message_stands_as_it_is(plain) -> None:
    rendered = render(Prompt(WHERE, messages=(USER,)), plain, [END], "model")
    assert rendered.prompt == plain.encode("the cat sat")
    assert rendered.response is None


def test_without_a_chat_template_a_completion_follows_raw_and_is_ended(plain) -> None:
    rendered = render(Prompt(WHERE, messages=(USER,), completion=REPLY), plain, [END], "model")
    assert rendered.prompt == plain.encode("the cat sat")
    assert rendered.response == [*ids(plain, "hello world"), END]


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt(WHERE, messages=TURNS),
        Prompt(WHERE, messages=({"role": "system", "content": "said"},)),
        Prompt(WHERE, messages=(USER,), tools=TOOLS),
    ],
    ids=["several messages", "a system message", "tools"],
)
def test_without_a_chat_template_anything_more_is_refused_with_its_place(plain, prompt: Prompt) -> None:
    with pytest.raises(TemplateError) as caught:
        render(prompt, plain, [END], "some-model")
    assert str(caught.value).startswith(f"{WHERE}: the chat template of some-model")
    assert "no chat template" in str(caught.value)


def test_a_template_error_is_the_users_to_mend() -> None:
    assert TemplateError(WHERE, "model", "reason").exit_code == 2


# Examples -----------------------------------------------------------------------------------------------------------


def draw_targets(tokens: int) -> SparseTargets:
    rng = np.random.default_rng(tokens)
    logits = mx.array(rng.normal(size=(tokens, 20)).astype(np.float32))
    labels = mx.array(rng.integers(0, 20, tokens).astype(np.int32))
    return encode(logits, labels, rng.random(tokens, dtype=np.float32), TargetSettings("sparse", 0.1, 2.0, 1.0))


def all_of(response: int) -> np.ndarray:
    return np.arange(response, dtype=np.int32)


def draw_example(prompt: int, response: int, limit: int = 1000) -> Example | None:
    opening, reply = list(range(100, 100 + prompt)), list(range(200, 200 + response))
    return make_example(opening, reply, draw_targets(response), all_of(response), WHERE, limit)


def draw_part(prompt: int, response: int, kept: list[int], limit: int = 1000) -> Example | None:
    """An example whose targets are of some tokens of its response."""
    opening, reply = list(range(100, 100 + prompt)), list(range(200, 200 + response))
    return make_example(opening, reply, draw_targets(len(kept)), np.array(kept, dtype=np.int32), WHERE, limit)


@st.composite
def some_of_a_response(draw: st.DrawFn) -> tuple[int, list[int]]:
    """The length of a response, and the tokens of it that count, ascending."""
    response = draw(st.integers(1, 12))
    return response, sorted(draw(st.sets(st.integers(0, response - 1), min_size=1)))


@settings(max_examples=40, deadline=None)
@given(prompt=st.integers(1, 12), response=st.integers(1, 12))
def test_rows_and_mask_point_at_the_response_and_nothing_else(prompt: int, response: int) -> None:
    example = draw_example(prompt, response)
    assert example is not None
    assert len(example) == len(example.tokens) == len(example.loss_mask) == prompt + response
    np.testing.assert_array_equal(example.tokens[example.loss_mask], example.response)
    np.testing.assert_array_equal(example.tokens[~example.loss_mask], example.prompt)
    np.testing.assert_array_equal(example.tokens[example.rows + 1], example.response)
    np.testing.assert_array_equal(np.flatnonzero(example.loss_mask), example.rows + 1)


@settings(max_examples=40, deadline=None)
@given(prompt=st.integers(1, 8), response=st.integers(1, 8), limit=st.integers(1, 20))
def test_truncation_keeps_the_prompt_and_cuts_response_and_targets_together(
    prompt: int, response: int, limit: int
) -> None:
    example = draw_example(prompt, response, limit)
    if limit <= prompt:
        assert example is None
        return
    assert example is not None
    kept = min(response, limit - prompt)
    assert example.prompt.tolist() == list(range(100, 100 + prompt))
    assert example.response.tolist() == list(range(200, 200 + kept))
    assert len(example.targets) == kept
    entries = draw_targets(response).offsets[kept]
    for name in ("ids", "logprob_codes", "exact"):
        np.testing.assert_array_equal(getattr(example.targets, name), getattr(draw_targets(response), name)[:entries])
    assert len(example) <= limit


@settings(max_examples=60, deadline=None)
@given(prompt=st.integers(1, 8), part=some_of_a_response())
def test_of_a_response_that_counts_in_part_the_rest_is_context_alone(prompt: int, part: tuple[int, list[int]]) -> None:
    response, kept = part
    example = draw_part(prompt, response, kept)
    assert example is not None
    assert len(example) == len(example.tokens) == len(example.loss_mask) == prompt + response
    assert np.flatnonzero(example.loss_mask).tolist() == [prompt + at for at in kept]
    assert example.labels.tolist() == [200 + at for at in kept]
    np.testing.assert_array_equal(example.tokens[example.loss_mask], example.labels)
    np.testing.assert_array_equal(example.tokens[example.rows + 1], example.labels)
    assert len(example.rows) == len(example.targets) == len(kept)


@settings(max_examples=60, deadline=None)
@given(prompt=st.integers(1, 8), part=some_of_a_response(), limit=st.integers(1, 20))
def test_truncation_leaves_the_targets_of_the_tokens_that_are_left(
    prompt: int, part: tuple[int, list[int]], limit: int
) -> None:
    response, kept = part
    left = [at for at in kept if at < limit - prompt]
    example = draw_part(prompt, response, kept, limit)
    if not left:
        assert example is None
        return
    assert example is not None
    assert example.kept.tolist() == left
    assert example.response.tolist() == list(range(200, 200 + min(response, limit - prompt)))
    assert example.labels.tolist() == [200 + at for at in left]
    np.testing.assert_array_equal(example.targets.labels, draw_targets(len(kept)).labels[: len(left)])


def test_a_response_of_which_no_token_that_counts_is_left_gives_no_example() -> None:
    assert draw_part(5, 6, [3, 5], limit=8) is None
    example = draw_part(5, 6, [3, 5], limit=9)
    assert example is not None
    assert example.labels.tolist() == [203]
    assert len(example) == 9


def test_hidden_states_are_cut_with_the_response() -> None:
    states = np.arange(12, dtype=np.float16).reshape(4, 3)
    targets = HiddenTargets(states, TeacherHead(lambda given: given))
    example = make_example([1, 2], [5, 6, 7, 8, 9], targets, np.array([0, 2, 3, 4], dtype=np.int32), WHERE, 6)
    assert example is not None
    assert example.labels.tolist() == [5, 7, 8]
    np.testing.assert_array_equal(example.targets.states, states[:3])


@pytest.mark.parametrize("limit", [3, 4, 5])
def test_a_prompt_that_leaves_no_room_gives_no_example(limit: int) -> None:
    assert draw_example(5, 3, limit) is None
    assert draw_example(limit - 1, 3, limit) is not None


def test_without_prompt_or_response_there_is_no_example() -> None:
    assert make_example([], [1, 2], draw_targets(2), all_of(2), WHERE, 10) is None
    assert make_example([1, 2], [], draw_targets(1), all_of(0), WHERE, 10) is None


def test_a_response_may_come_as_an_array() -> None:
    example = make_example([1], np.array([2, 3], dtype=np.int32), draw_targets(2), all_of(2), WHERE, 10)
    assert example is not None
    assert example.response.tolist() == [2, 3]
    assert example.where == WHERE


def test_ids_are_int32_whatever_they_came_as() -> None:
    example = make_example([1], np.array([2, 3], dtype=np.int64), draw_targets(2), all_of(2), WHERE, 10)
    assert example is not None
    assert example.tokens.dtype == np.int32
