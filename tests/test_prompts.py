"""What a prompt file means, and what is said about one that means nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from true_kd import json_lines
from true_kd.errors import PromptError
from true_kd.prompts import Prompt, from_records, from_strings, has_split, list_domains, load_prompts

USER = {"role": "user", "content": "Why is the sky blue?"}
REPLY = {"role": "assistant", "content": "Rayleigh scattering."}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"b": 1, "a": 2}}}]


def write(root: Path, name: str, content: str | bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def load(root: Path, *lines: object, system: str | None = None) -> list[Prompt]:
    write(root, "math/train.jsonl", "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    if system is not None:
        write(root, "math/system.md", system)
    return load_prompts(root, "math", "train")


def refusal(root: Path, *lines: object) -> str:
    with pytest.raises(PromptError) as caught:
        load(root, *lines)
    return str(caught.value).replace(str(root) + "/", "")


def test_a_reply_at_the_end_of_messages_is_the_completion(tmp_path: Path) -> None:
    (prompt,) = load(tmp_path, {"messages": [USER, REPLY]})
    assert prompt.messages == (USER,)
    assert prompt.completion == REPLY


def test_messages_that_end_with_the_user_leave_the_completion_to_the_teacher(tmp_path: Path) -> None:
    (prompt,) = load(tmp_path, {"messages": [USER, REPLY, USER]})
    assert prompt.messages == (USER, REPLY, USER)
    assert prompt.completion is None


def test_a_final_tool_call_without_content_is_a_completion_that_templates_can_render(tmp_path: Path) -> None:
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]
    (prompt,) = load(tmp_path, {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}]})
    assert prompt.completion == {"role": "assistant", "content": "", "tool_calls": calls}


def test_a_tool_result_is_part_of_the_prompt(tmp_path: Path) -> None:
    calls = [{"id": "1", "function": {"name": "look", "arguments": "{}"}}]
    result = {"role": "tool", "tool_call_id": "1", "content": ""}
    (prompt,) = load(tmp_path, {"messages": [USER, {"role": "assistant", "tool_calls": calls}, result]})
    assert prompt.messages is not None
    assert [message["role"] for message in prompt.messages] == ["user", "assistant", "tool"]


def test_prompt_and_completion_become_a_user_and_an_assistant_message(tmp_path: Path) -> None:
    (prompt,) = load(tmp_path, {"prompt": USER["content"], "completion": REPLY["content"]})
    assert prompt.messages == (USER,)
    assert prompt.completion == REPLY


def test_a_prompt_may_be_a_list_of_messages(tmp_path: Path) -> None:
    (prompt,) = load(tmp_path, {"prompt": [USER], "completion": "Scattering."})
    assert prompt.messages == (USER,)
    assert prompt.completion == {"role": "assistant", "content": "Scattering."}


def test_text_stays_raw(tmp_path: Path) -> None:
    (prompt,) = load(tmp_path, {"text": "  Once upon a time\n"}, system="Be brief.")
    assert prompt.text == "  Once upon a time\n"
    assert prompt.messages is None
    assert prompt.completion is None


def test_tools_and_answer_are_kept(tmp_path: Path) -> None:
    (prompt,) = load(tmp_path, {"messages": [USER], "tools": TOOLS, "answer": "42"})
    assert prompt.tools == tuple(TOOLS)
    assert prompt.answer == "42"


REWARDED = [
    {"messages": [USER, REPLY]},
    {"messages": [USER]},
    {"prompt": "Hi", "completion": "Hello."},
    {"prompt": [USER]},
    {"text": "Once upon a time"},
]


@pytest.mark.parametrize("record", REWARDED, ids=str)
@pytest.mark.parametrize("reward", [0, 1, 0.25, 1e-9, 12345678])
def test_a_reward_is_kept_as_a_number_in_every_form(tmp_path: Path, record: dict, reward: float) -> None:
    with_reward, without = load(tmp_path, {**record, "reward": reward}, record)
    assert with_reward.reward == reward
    assert isinstance(with_reward.reward, float)
    assert without.reward is None
    assert replace(with_reward, reward=None, where=without.where) == without
    assert from_records([{**record, "reward": reward}])[0].reward == reward


def test_a_reward_of_null_is_none(tmp_path: Path) -> None:
    assert load(tmp_path, {"prompt": "Hi", "reward": None})[0].reward is None


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -0.5, "1", True, [1.0]], ids=str)
def test_a_reward_that_is_no_weight_is_refused_in_records_too(reward: object) -> None:
    with pytest.raises(PromptError, match=r"train_prompts\[0\]: .*, expected .*\.$"):
        from_records([{"prompt": "Hi", "reward": reward}])


def test_null_means_absent(tmp_path: Path) -> None:
    (prompt,) = load(tmp_path, {"messages": None, "prompt": "Hi", "completion": None, "tools": None, "answer": None})
    assert prompt == Prompt(where=prompt.where, messages=({"role": "user", "content": "Hi"},))


def test_each_line_of_a_txt_file_is_a_prompt(tmp_path: Path) -> None:
    write(tmp_path, "math/train.txt", '\ufeffFirst {"a": "\\q":\r\n\r\n  Second\u2028line  \n')
    loaded = load_prompts(tmp_path, "math", "train")
    assert [prompt.messages[0]["content"] for prompt in loaded if prompt.messages] == [
        'First {"a": "\\q":',
        "Second\u2028line",
    ]
    assert loaded[1].where == f"{tmp_path}/math/train.txt:3"


def test_byte_order_mark_carriage_returns_and_blank_lines_are_tolerated(tmp_path: Path) -> None:
    write(tmp_path, "math/train.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n')
    assert [prompt.where[-1] for prompt in load_prompts(tmp_path, "math", "train")] == ["1", "3"]


def test_the_system_file_speaks_only_where_a_chat_has_no_system_message(tmp_path: Path) -> None:
    own = {"role": "system", "content": "Be long."}
    first, second, third = load(
        tmp_path, {"prompt": "Hi"}, {"messages": [own, USER]}, {"text": "x"}, system="\nBe brief.\n"
    )
    assert first.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    assert second.messages == (own, USER)
    assert third.messages is None


def test_an_empty_system_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"system\.md: empty, expected the system message"):
        load(tmp_path, {"prompt": "Hi"}, system=" \n")


def test_identity_tells_prompts_apart_by_all_but_their_place() -> None:
    record = {"messages": [USER, REPLY], "tools": TOOLS, "answer": "1"}
    first, second = from_records([record, record])
    assert first.identity() == second.identity()
    variants = [{**record, "answer": "2"}, {**record, "messages": [USER]}, {**record, "tools": []}, {"text": "x"}]
    assert len({first.identity(), *(prompt.identity() for prompt in from_records(variants))}) == 5


def test_a_reward_is_part_of_the_identity_and_its_absence_is_not() -> None:
    record = {"messages": [USER, REPLY], "tools": TOOLS, "answer": "1"}
    plain, null, one, two = (
        prompt.identity()
        for prompt in from_records(
            [record, {**record, "reward": None}, {**record, "reward": 1}, {**record, "reward": 2}]
        )
    )
    assert plain == null
    assert len({plain, one, two}) == 3
    assert list(json.loads(plain)) == ["messages", "text", "tools", "completion", "answer"]


@pytest.mark.parametrize(
    ("record", "identity"),
    [
        (
            {"prompt": "Hi", "completion": "Hello."},
            '{"messages":[{"role":"user","content":"Hi"}],"text":null,"tools":null,'
            '"completion":{"role":"assistant","content":"Hello."},"answer":null}',
        ),
        ({"text": "Hi"}, '{"messages":null,"text":"Hi","tools":null,"completion":null,"answer":null}'),
    ],
)
def test_the_identity_of_a_prompt_without_a_reward_is_what_fingerprints_were_made_of(record, identity) -> None:
    assert from_records([record])[0].identity() == identity


def test_identity_keeps_the_order_of_keys_that_templates_print() -> None:
    tools = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    one, other = from_records([{"prompt": "x", "tools": [tool]} for tool in tools])
    assert one.identity() != other.identity()


BAD_LINES = [
    ('{"prompt": "a"', ":2:15: expected ',' delimiter"),
    ("{'prompt': 1}", ":2:2: expected property name enclosed in double quotes. Write one JSON object"),
    ('["a"]', ":2:1: a list, expected a JSON object"),
    ("3", ":2:1: a number, expected a JSON object"),
    ('{"prompt": "a", "completon": "b"}', ":2:17: 'completon': unknown key; did you mean 'completion'?"),
    ('{"conversations": []}', ":2:2: 'conversations': unknown key, expected some of messages, prompt"),
    ("{}", ":2:1: no prompt, expected 'messages', 'prompt' or 'text'. Add one of them."),
    ('{"prompt": null}', ":2:1: no prompt, expected"),
    ('{"text": "a", "prompt": "b"}', ":2:2: 'text' together with 'prompt', expected"),
    ('{"text": "a", "tools": [{}]}', ":2:15: 'tools' together with 'text', expected 'reward' beside it. Remove"),
    ('{"messages": [{"role": "user", "content": "a"}], "completion": "b"}', ":2:50: 'completion' together with"),
    ('{"prompt": 3}', ":2:2: prompt: a number, expected a string. Put it in quotes."),
    ('{"prompt": " "}', ":2:2: prompt: empty, expected text. Write it"),
    ('{"text": ""}', ":2:2: text: empty"),
    ('{"prompt": "a", "completion": ["b"]}', ":2:17: completion: a list, expected a string"),
    ('{"prompt": "a", "completion": ""}', ":2:17: completion: empty"),
    ('{"prompt": "a", "answer": 42}', ":2:17: answer: a number, expected a string"),
    ('{"prompt": "a", "reward": "1"}', ":2:17: reward: a string, expected a number. Write one without quotes."),
    ('{"prompt": "a", "reward": true}', ":2:17: reward: a boolean, expected a number"),
    ('{"prompt": "a", "reward": [1]}', ":2:17: reward: a list, expected a number"),
    ('{"prompt": "a", "reward": -1}', ":2:17: reward: -1, expected a number from 0"),
    ('{"prompt": "a", "reward": 1' + "0" * 100 + "}", ":2:17: reward: 10000000000000000000, expected a number from 0"),
    ('{"text": "a", "reward": -0.5}', ":2:15: reward: -0.5, expected a number from 0"),
    ('{"prompt": "a", "reward": NaN}', ":2:27: 'NaN', expected a finite number"),
    ('{"prompt": "a", "reward": Infinity}', ":2:27: 'Infinity', expected a finite number"),
    ('{"prompt": "a", "reward": 1e999}', ":2:27: '1e999', expected a finite number"),
    ('{"prompt": "a", "rewrd": 1}', "'rewrd': unknown key; did you mean 'reward'?"),
    ('{"prompt": "a", "tools": {}}', ":2:17: tools: an object, expected a list of objects"),
    ('{"prompt": "a", "tools": ["b"]}', ":2:17: tools: a list, expected a list of objects"),
    ('{"messages": "a"}', ":2:2: messages: a string, expected a list of messages"),
    ('{"messages": []}', ":2:2: messages: an empty list, expected at least one message"),
    ('{"messages": ["a"]}', ":2:2: messages[0]: a string, expected an object with 'role'"),
    ('{"messages": [{"content": "a"}]}', ":2:2: messages[0]: no 'role', expected system, user, assistant or tool"),
    ('{"messages": [{"rol": "user", "content": "a"}]}', "messages[0]: no 'role' but 'rol', expected"),
    ('{"messages": [{"role": "usr", "content": "a"}]}', "messages[0].role: 'usr', expected system, user, assistant"),
    ('{"messages": [{"role": "usr", "content": "a"}]}', "did you mean 'user'?"),
    ('{"messages": [{"role": ["user"], "content": "a"}]}', "messages[0].role: a list, expected"),
    ('{"messages": [{"role": "user", "contnet": "a"}]}', "messages[0]: no 'content' but 'contnet', expected a string"),
    ('{"messages": [{"role": "user", "content": ""}]}', ":2:2: messages[0].content: empty"),
    ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "messages[0].content: a list, expected a str"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "messages: no user message, expected at least one"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}', "last message is empty"),
    ('{"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}', "tool_calls: in a user message"),
    ('{"messages": [{"role": "assistant", "tool_calls": [1]}]}', "tool_calls: a list, expected a list of objects"),
    ('{"prompt": [{"role": "assistant", "content": "a"}]}', ":2:2: prompt: ends with an assistant message"),
    ('{"prompt": "a", "prompt": "b"}', ":2:17: key 'prompt' twice in one object, expected once. Remove one."),
    ('{"prompt": "a", "tools": [{"x": "{", "x": 2}]}', ":2:38: key 'x' twice"),
    ('{"prompt": "NaN", "tools": [{"x": NaN}]}', ":2:35: 'NaN', expected a finite number"),
    ('{"prompt": "a", "tools": [{"x": -Infinity}]}', ":2:33: '-Infinity', expected a finite number"),
    ('{"prompt": "a", "tools": [{"x": 1e999}]}', ":2:33: '1e999', expected a finite number"),
    ('{"prompt": "a", "tools": [{"x": ' + "9" * 5000 + "}]}", ":2:33: '999"),
    ('{"prompt": "a\\\\ud83d \\ud83d"}', ":2:22: \\ud83d is not a character, expected text that UTF-8 can write"),
    ('{"prompt": "a\\u0000"}', ":2:14: \\u0000 is not a character"),
    ('{"prompt": "a", "tools": ' + "[" * 200 + "]" * 200 + "}", ":2:125: nested more than 100 levels deep"),
    ("[" * 100_000, ":2:101: nested more than 100 levels deep"),
]


@pytest.mark.parametrize(("line", "expected"), BAD_LINES)
def test_a_bad_line_is_named_by_file_line_and_column(tmp_path: Path, line: str, expected: str) -> None:
    message = refusal(tmp_path, {"prompt": "good"}, line)
    assert message.startswith("math/train.jsonl:2:")
    assert expected in message
    assert "\n" not in message
    assert message.endswith((".", "?"))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b'{"prompt": "a"}\n{"prompt": "\xc3\xa9\xff"}', ":2:14: byte 0xff is not UTF-8. Save it as UTF-8."),
        (b'\xef\xbb\xbf{"prompt": "\xff"}', ":1:13: byte 0xff is not UTF-8"),
        (b'{"prompt": "\xc3\xa9\x00"}', ":1:14: a NUL byte, expected text"),
        (b'{"prompt": "\xed\xa0\x80"}', ":1:13: byte 0xed is not UTF-8"),
        (b"\xff\xfe{\x00", ":1:1: byte 0xff is not UTF-8"),
        (b"", "train.jsonl: no prompts, expected one a line. Write some, or remove the file."),
        (b"\n \n", "train.jsonl: no prompts"),
    ],
)
def test_a_byte_that_is_no_text_is_named_by_its_place(tmp_path: Path, raw: bytes, expected: str) -> None:
    write(tmp_path, "math/train.jsonl", raw)
    with pytest.raises(PromptError) as caught:
        load_prompts(tmp_path, "math", "train")
    assert expected in str(caught.value)


def test_all_bad_lines_are_found_before_the_first_is_reported(tmp_path: Path) -> None:
    write(tmp_path, "math/train.jsonl", b'{}\n{"prompt": "fine"}\n\xff\n[]\n')
    with pytest.raises(PromptError) as caught:
        load_prompts(tmp_path, "math", "train")
    assert [line.split(":")[1] for line in caught.value.lines] == ["1", "3", "4"]


def test_a_line_too_long_is_refused_and_the_next_keeps_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", 40)
    fits = '{"prompt": "' + "x" * 26 + '"}'
    assert len(fits) == 40
    long = '{"prompt": "' + "x" * 500 + '"}'
    write(tmp_path, "math/train.jsonl", f"\ufeff{fits}\r\n{long}\n{fits}\n[]\n{long}")
    with pytest.raises(PromptError) as caught:
        load_prompts(tmp_path, "math", "train")
    places = [line.removeprefix(f"{tmp_path}/math/train.jsonl:").split(" ")[0] for line in caught.value.lines]
    assert places == ["2:", "4:1:", "5:"]


def test_a_hostile_line_is_refused_in_linear_time(tmp_path: Path) -> None:
    assert "expected" in refusal(tmp_path, '{"prompt": ' + '\\"' * 300_000 + "[" * 200)


def test_an_unknown_domain_is_answered_with_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path, "math/train.jsonl", '{"prompt": "a"}')
    write(tmp_path, "code/train.txt", "a")
    with pytest.raises(PromptError) as caught:
        load_prompts(tmp_path, "mth", "train")
    assert str(caught.value) == f"{tmp_path}/mth: no such domain; did you mean 'math'? Domains here: code, math."


@pytest.mark.parametrize(
    "name", ["", "..", "../math", "a/b", "Math", "-a", "_a", "a b", "math\n", "a" * 65, "mäth", "a\0"]
)
def test_a_domain_name_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path, "math/train.jsonl", '{"prompt": "a"}')
    with pytest.raises(PromptError, match="not a domain name, expected"):
        load_prompts(tmp_path / "math", name, "train")


def test_a_linked_domain_folder_must_stay_under_the_root(tmp_path: Path) -> None:
    write(tmp_path, "elsewhere/train.jsonl", '{"prompt": "a"}')
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "math").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PromptError, match="leads outside"):
        load_prompts(tmp_path / "prompts", "math", "train")


def test_domains_are_the_folders_with_a_train_file_in_order(tmp_path: Path) -> None:
    for name in ("b/train.txt", "a/train.jsonl", "c/valid.jsonl", "README.md"):
        write(tmp_path, name, "x")
    assert list_domains(tmp_path) == ["a", "b"]


def test_a_domain_folder_with_a_bad_name_is_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path, "My Math/train.txt", "x")
    with pytest.raises(PromptError, match="folder 'My Math' holds a train file but is not named like a domain"):
        list_domains(tmp_path)


def test_a_missing_root_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="nowhere: no such folder"):
        load_prompts(tmp_path / "nowhere", "math", "train")


def test_a_missing_split_is_an_error_that_can_be_asked_for_before(tmp_path: Path) -> None:
    write(tmp_path, "math/train.txt", "x")
    assert has_split(tmp_path, "math", "train")
    assert not has_split(tmp_path, "math", "valid")
    with pytest.raises(PromptError, match=r"valid\.jsonl: no such file, nor valid\.txt\. Write one prompt a line"):
        load_prompts(tmp_path, "math", "valid")


def test_two_files_of_one_split_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "math/train.txt", "x")
    with pytest.raises(PromptError, match=r"both train\.jsonl and train\.txt, expected one file per split\. Merge"):
        load(tmp_path, {"prompt": "a"})


def test_strings_become_prompts_with_a_place() -> None:
    first, second = from_strings(["a", "b"])
    assert first.messages == ({"role": "user", "content": "a"},)
    assert second.where == "train_prompts[1]"
    assert from_strings(["a"], "valid_prompts")[0].where == "valid_prompts[0]"


def test_a_prompt_does_not_change_with_the_record_it_came_from() -> None:
    record = {"messages": [dict(USER)]}
    (prompt,) = from_records([record])
    record["messages"][0]["content"] = "changed"
    assert prompt.messages == (USER,)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("one prompt", "train_prompts: one string, expected a list of strings. Write ['one prompt']."),
        ([], "train_prompts: empty, expected at least one prompt. Add some."),
        (["a", 3], "train_prompts[1]: a number, expected a string."),
        ([" "], "train_prompts[0]: prompt: empty"),
        (["\ud800"], "train_prompts[0]: \\ud800 is not a character"),
    ],
)
def test_bad_strings_are_named_by_position(values: object, expected: str) -> None:
    with pytest.raises(PromptError) as caught:
        from_strings(values)  # type: ignore[arg-type]
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("a", "train_prompts[0]: a string, expected an object."),
        ({"prompt": {1, 2}}, "train_prompts[0]: not plain JSON data (Object of type set is not JSON serializable)"),
        ({"prompt": "a", "tools": [{"x": float("nan")}]}, "train_prompts[0]: not plain JSON data"),
        ({"promt": "a"}, "train_prompts[0]: 'promt': unknown key; did you mean 'prompt'?"),
    ],
)
def test_bad_records_are_named_by_position(record: object, expected: str) -> None:
    with pytest.raises(PromptError) as caught:
        from_records([record])  # type: ignore[list-item]
    assert expected in str(caught.value)


def well_formed(prompt: Prompt) -> bool:
    return (prompt.messages is None) != (prompt.text is None) and bool(prompt.identity().encode("utf-8"))


json_keys = ["messages", "prompt", "completion", "text", "tools", "answer", "reward", "role", "content", "tool_calls"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(json_keys), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=80), suffix=st.sampled_from(["jsonl", "txt"]))
def test_any_bytes_are_prompts_or_a_prompt_error(tmp_path: Path, raw: bytes, suffix: str) -> None:
    for old in tmp_path.glob("math/*"):
        old.unlink()
    write(tmp_path, f"math/train.{suffix}", raw)
    try:
        loaded = load_prompts(tmp_path, "math", "train")
    except PromptError:
        return
    assert loaded
    assert all(map(well_formed, loaded))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=json_values, cut=st.integers(0, 200))
def test_any_json_and_any_piece_of_it_is_a_prompt_or_a_prompt_error(tmp_path: Path, value: object, cut: int) -> None:
    for line in (json.dumps(value), json.dumps(value)[:cut]):
        try:
            loaded = load(tmp_path, line)
        except PromptError:
            continue
        assert all(map(well_formed, loaded))
