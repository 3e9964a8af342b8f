"""A chat template writes what transformers would have it write, and can do nothing else: neither run code, nor look
around, nor go on for ever."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from true_kd.errors import InputError
from true_kd.examples import TemplateOverrunError, render
from true_kd.models import TemplateRefusal, TemplateStopped, apply_template, templates
from true_kd.models.templates import close_worker, render_template
from true_kd.prompts import Prompt

DATE = "26 Jul 2024"
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "b": [1, 2.5, None, "é<&>"]}}}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "  Be brief.\n"},
    {"role": "user", "content": "Wo ist die Kätzchen-🐈? <b>&amp;</b> {{ 7 * 7 }}"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hmm",
        "tool_calls": [{"function": {"name": "look", "arguments": {"where": "mat", "deep": {"a": [True, None]}}}}],
    },
    {"role": "tool", "content": '{"cat": 1}'},
    {"role": "user", "content": "Thanks"},
]
LINUX = sys.platform == "linux"


def rendered(template: str, messages: list[dict[str, Any]] | None = None, **variables: Any) -> str:
    """What the template makes of some turns."""
    return render_template(
        template, TURNS if messages is None else messages, None, variables, add_generation_prompt=True
    )


@pytest.fixture(scope="module")
def load(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Any]:
    """Opens the tokenizer with another chat template."""
    from mlx_lm.utils import load_tokenizer

    def load(template: Any) -> Any:
        folder = tmp_path_factory.mktemp("tokenizer") / "copy"
        shutil.copytree(tokenizer_folder, folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        return load_tokenizer(folder, {"trust_remote_code": False})

    return load


# As transformers renders them. The first four are laid out as those of the large families are.

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.reasoning_content is defined and enable_thinking %}
        {{- '\\n<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>' }}
    {%- endif %}
    {{- '\\n' + message.content }}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' ~ call.arguments | tojson ~ '}' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}{{ ns.last }}
"""
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% elif m['role'] == 'nobody' %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
HEADERS = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}{%- endif %}{{- 'Today: ' + date_string }}"
    "{%- for message in messages %}{%- if message.role == 'tool' %}{{- '<|ipython|>' }}"
    "{%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}{%- endif %}"
    "{%- else %}{{- '<|' + message['role'] + '|>\\n' + message['content'] | trim + '<|eot|>' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if tools %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}{%- endif %}"
)
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
)
PARTS = (
    "{% macro part(value, depth=0) %}{% if value is mapping %}{% for k, v in value | dictsort %}"
    "{{ '  ' * depth }}{{ k }}:"
    "{{ part(v, depth + 1) }}{% endfor %}{% elif value is string %}{{ value | upper }}"
    "{% else %}{{ value }}{% endif %}{% endmacro %}"
    "{% for m in messages %}{% if loop.index > 4 %}{% break %}{% elif m.role == 'system' %}{% continue %}{% endif %}"
    "{{ loop.cycle('a', 'b') }}{{ loop.last }}{{ part(m) }}{% endfor %}"
    "{% for call in messages | selectattr('tool_calls', 'defined') | map(attribute='tool_calls') | first %}"
    "{{ call.function.arguments.items() | list | string | length }}{% endfor %}"
    "{{ messages | map(attribute='role') | unique | join(', ') }}{{ '%s-%05.2f' | format('x', 2.5) }}"
    "{{ 'a\\nb' | indent(2) }}{{ dict(a=1) }}{{ range(3) | list }}{{ [3, 1] | sort | tojson }}{{ not_there }}"
    "{{ messages[1].content | e }}{{ messages[1].content.split('?')[-1] }}{{ none is none }}{{ 7 // 2 ** 2 }}"
)
ORDINARY = {
    "ChatML": CHATML,
    "brackets": BRACKETS,
    "headers": HEADERS,
    "generation": GENERATION,
    "loops, macros and filters": PARTS,
    "by name": [{"name": "default", "template": BRACKETS}, {"name": "tool_use", "template": CHATML}],
}


@pytest.mark.parametrize("tools", [None, [LOOK, LOOK]], ids=["no tools", "tools"])
@pytest.mark.parametrize("opens", [True, False], ids=["for a reply", "whole"])
@pytest.mark.parametrize("template", ORDINARY.values(), ids=ORDINARY.keys())
def test_the_tokens_are_those_of_transformers(load, template: Any, opens: bool, tools: list | None) -> None:
    tokenizer = load(template)
    mine = apply_template(tokenizer, TURNS, tools, DATE, add_generation_prompt=opens)
    others = tokenizer.apply_chat_template(TURNS, tools=tools, add_generation_prompt=opens, date_string=DATE)
    assert mine == list(others)
    assert len(mine) > 40


@pytest.mark.parametrize("template", [CHATML, BRACKETS, HEADERS, GENERATION, PARTS])
def test_the_text_is_that_of_transformers_to_the_byte(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = {"bos_token": "<s>", "eos_token": "</s>", "enable_thinking": True}
    [expected], _ = render_jinja_template([TURNS], [LOOK], None, template, add_generation_prompt=True, **variables)
    assert render_template(template, TURNS, [LOOK], variables, add_generation_prompt=True) == expected


def test_today_is_the_users_day() -> None:
    from datetime import datetime

    before = datetime.now()
    assert rendered("{{ strftime_now('%Y-%m-%d') }}") in {f"{day:%Y-%m-%d}" for day in (before, datetime.now())}


def test_half_a_character_passes_through() -> None:
    assert rendered("{{ messages[0].content }}", [{"role": "user", "content": "a\ud83d"}]) == "a\ud83d"


def test_what_a_template_gives_as_its_reason_is_told() -> None:
    with pytest.raises(TemplateRefusal, match="only user and assistant roles"):
        rendered(BRACKETS, [{"role": "nobody", "content": ""}])


def test_templates_that_are_python_of_mlx_lm_are_called_as_ever(load) -> None:
    tokenizer = load(BRACKETS)
    tokenizer._chat_template = lambda messages, **_: f"the cat {len(messages)}"
    assert apply_template(tokenizer, TURNS, None, DATE, add_generation_prompt=True) == list(
        tokenizer.encode("the cat 5")
    )


# Attempts to run code or to look around.

ESCAPES = {
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class walk by attr": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "class walk by item": "{{ ''['__class__']['__base__']['__subclasses__']() }}",
    "class walk by map": "{{ ['']|map(attribute='__class__')|map(attribute='__base__')|list }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.popen('touch CANARY') }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "globals of joiner by attr": "{{ joiner|attr('__init__')|attr('__globals__') }}",
    "globals of an own function": "{{ raise_exception.__globals__['json'].__loader__ }}",
    "code of an own function": "{{ strftime_now.__code__.co_consts }}",
    "the template itself": "{{ self.__init__.__globals__.__builtins__['open']('CANARY', 'w') }}",
    "the context": "{{ self._TemplateReference__context.environment.compile_expression('1') }}",
    "the frame of a loop": "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "format string": "{{ '{0.__class__.__mro__[1].__subclasses__}'.format('') }}",
    "format map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    "namespace": "{{ namespace(__class__=1) }}",
    "dict from keys": "{{ dict.__class__.__base__ }}",
    "import of a module": "{{ __import__('os').system('touch CANARY') }}",
    "builtins by name": "{{ __builtins__.open('CANARY', 'w') }}",
    "open": "{{ open('CANARY', 'w').write('x') }}",
    "include": "{% include 'CANARY' %}",
    "include of a template": "{% include '/etc/passwd' %}",
    "import": "{% import 'CANARY' as x %}",
    "from import": "{% from '/etc/passwd' import x %}",
    "extends": "{% extends '/etc/passwd' %}",
    "environment": "{{ environ['HOME'] }}{{ os.environ }}",
    "config of web frameworks": "{{ config.items() }}{{ request.application.__globals__ }}",
    "changing a message": "{% set _ = messages[0].update({'content': 'x'}) %}{{ messages.append(1) }}",
}


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES.keys())
def test_no_template_runs_code_or_looks_around(template: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    text = outcome(template.replace("CANARY", str(canary)))
    assert text is None or text == ""
    assert not canary.exists()


def outcome(template: str) -> str | None:
    """What a template writes; None where it is refused."""
    try:
        return rendered(template)
    except TemplateRefusal:
        return None


def test_a_template_that_escapes_is_told_why() -> None:
    with pytest.raises(TemplateRefusal, match="unsafe"):
        rendered(ESCAPES["class walk"])


# Attempts to hang, or to take all memory.

FOR_EVER = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "sorting": "{% for a in range(99999) %}{% set x = range(99999) | sort | last %}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
}
TOO_MUCH = {
    "a long string": "{{ 'a' * 10**9 }}",
    "an endless string": "{{ 'a' * 10**18 }}",
    "a padded string": "{{ 'a' | center(10**10) }}",
    "a padded format": "{{ '{:>9999999999}'.format('a') }}",
    "a padded percent": "{{ '%9999999999d' % 1 }}",
    "a doubled list": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "nested lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x | tojson }}",
    "a long list": "{{ range(99999) | list * 99999 }}",
    "much text": "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "lines of a batch": "{{ [1] | batch(10**10, 0) | list }}",
    "an indent": "{{ [1] | tojson(indent=10**10) }}",
    "a byte array": "{{ (1).to_bytes(10**10, 'big') }}",
    "text of 20 MB": "{{ 'a' * 20000000 }}",
    "a template of 2 MB": "x" * 2**21,
}


@pytest.mark.parametrize("template", [*FOR_EVER.values(), *TOO_MUCH.values()], ids=[*FOR_EVER, *TOO_MUCH])
def test_no_template_goes_on_for_ever_or_takes_all_memory(template: str) -> None:
    rendered("{{ 1 }}")
    started = time.monotonic()
    with pytest.raises((TemplateStopped, TemplateRefusal)):
        rendered(template)
    # Two seconds of computing; the rest is room for a machine that does other things as well.
    assert time.monotonic() - started < 20
    assert rendered("{{ messages | length }}") == "5"


REFUSED = {
    "a large range": "{{ range(10**9) | list }}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "parentheses": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "no template": "{% for %}",
    "a division by nothing": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("template", REFUSED.values(), ids=REFUSED.keys())
def test_what_python_stops_by_itself_is_a_refusal(template: str) -> None:
    with pytest.raises((TemplateRefusal, TemplateStopped)):
        rendered(template)
    assert rendered("{{ messages | length }}") == "5"


def test_a_long_conversation_is_no_attack() -> None:
    turn = {"role": "user", "content": "a word and another one " * 100}
    text = rendered(CHATML, [turn, {**turn, "role": "assistant"}] * 1000)
    assert len(text) > 4_000_000


def test_a_template_that_is_stopped_is_the_models_fault_in_one_line(load) -> None:
    prompt = Prompt("train.jsonl:3", messages=({"role": "user", "content": "hello"},))
    with pytest.raises(TemplateOverrunError) as caught:
        render(prompt, load(TOO_MUCH["a long string"]), [1], "some/model")
    text = str(caught.value)
    assert text.startswith("train.jsonl:3: the chat template of some/model was stopped")
    assert text.endswith("choose another model.")
    assert isinstance(caught.value, InputError)
    assert "\n" not in text


# The process that renders.


def worker() -> int:
    """Its process id."""
    rendered("{{ 1 }}")
    [running] = templates._running
    return running.process.pid


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_the_process_that_renders_has_no_secrets_and_can_open_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_plantedplantedplanted")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    close_worker()
    place = Path("/proc") / str(worker())
    assert b"planted" not in (place / "environ").read_bytes()
    limits = {line[:26].strip(): line[26:].split()[0] for line in (place / "limits").read_text().splitlines()}
    assert {limits[f"Max {name}"] for name in ("open files", "processes", "file size", "core file size")} == {"0"}
    assert int(limits["Max address space"]) == 2**30


def test_one_process_renders_all_conversations() -> None:
    assert worker() == worker()


def test_when_somebody_ends_that_process_another_takes_its_place() -> None:
    before = worker()
    os.kill(before, signal.SIGKILL)
    assert rendered("{{ messages[4].content }}") == "Thanks"
    assert worker() != before


def test_a_forked_process_has_one_of_its_own() -> None:
    before = worker()
    child = os.fork()
    if child == 0:
        os._exit(0 if rendered("{{ 'child' }}") == "child" and worker() != before else 1)
    assert rendered("{{ 'parent' }}") == "parent"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert worker() == before


def test_the_process_ends_with_the_one_that_it_renders_for() -> None:
    script = (
        "import os, signal\n"
        "from true_kd.models import templates\n"
        "print(templates.render_template('{{ 1 }}', [], None, {}, add_generation_prompt=False))\n"
        "print(templates._running[0].process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    text, pid = ended.stdout.split()
    assert text == "1"
    deadline = time.monotonic() + 20
    while is_running(int(pid)) and time.monotonic() < deadline:
        os.sched_yield()
    assert not is_running(int(pid))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # One that nobody waits for is there as a name alone.
    return not LINUX or b") Z " not in (Path("/proc") / str(pid) / "stat").read_bytes()
