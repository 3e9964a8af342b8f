"""Renders a model's chat template where it can neither hang, nor take all memory, nor reach files or the network.

A template is a program by whoever made the model. The sandbox of transformers keeps it from running code, but not from
nested loops or `'a' * 10**9`. So it runs in a process of its own, `template_worker`, with limits that the system
enforces and without the secrets of the environment; what it writes is what transformers would have written.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from true_kd.models import template_worker

_LONGEST = 2**20
"""Characters of a template; the longest in use have some 30,000."""
_WORKER = template_worker.__file__
_PATIENCE = 60.0
"""Seconds until an answer counts as none, where the computing time does not end it before: a machine that swaps."""
_LARGEST = 2**28
"""Bytes of an answer."""
_KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL", "SYSTEMROOT")
"""Variables that the worker gets of the environment: none that could hold a secret."""


class TemplateRefusal(ValueError):
    """A template does not take a conversation; the text is its reason."""


class TemplateStopped(ValueError):
    """A template went beyond its limits; the text says of what."""


def apply_template(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    date: str,
    *,
    add_generation_prompt: bool,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation by the chat template of mlx-lm's tokenizer; `date` for those that print one.

    `variables` are more for the template, plain data.

    Raises
    ------
    TemplateRefusal
        when the template fails on the conversation.
    TemplateStopped
        when it computes, stores or writes too much.
    """
    given = None if tools is None else list(tools)
    if is_coded(tokenizer):
        more = {"date_string": date, **(variables or {})}
        try:
            return list(
                tokenizer.apply_chat_template(
                    list(messages), tools=given, add_generation_prompt=add_generation_prompt, **more
                )
            )
        except (TypeError, ValueError, KeyError) as error:
            raise TemplateRefusal(str(error)) from error
    text = template_text(
        tokenizer, messages, given, date, add_generation_prompt=add_generation_prompt, variables=variables
    )
    return list(tokenizer._tokenizer(text, add_special_tokens=False)["input_ids"])


def is_coded(tokenizer: Any) -> bool:
    """Whether the chat template of mlx-lm's tokenizer is code of a library, and none of the model's maker."""
    from transformers import PreTrainedTokenizerBase

    return tokenizer._chat_template is not None or (
        type(tokenizer._tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    )


def template_text(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    date: str,
    *,
    add_generation_prompt: bool,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation by a tokenizer's own chat template, where one is written for it.

    Raises as `apply_template` does; also where there is none.
    """
    inner = tokenizer._tokenizer
    try:
        template = inner.get_chat_template(None, tools)
    except ValueError as error:
        raise TemplateRefusal(str(error)) from error
    known = {**inner.special_tokens_map, "enable_thinking": tokenizer.has_thinking, "date_string": date}
    return render_template(
        template, messages, tools, {**known, **(variables or {})}, add_generation_prompt=add_generation_prompt
    )


def bind_template(tokenizer: Any, date: str) -> None:
    """Have mlx-lm's own code render this tokenizer's template as `apply_template` does, within its limits."""
    if is_coded(tokenizer):
        return

    def apply(
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> list[int]:
        assert tokenize, "text is asked for with images alone"
        return apply_template(
            tokenizer, messages, tools, date, add_generation_prompt=add_generation_prompt, variables=variables
        )

    tokenizer.apply_chat_template = apply


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
) -> str:
    """What a chat template makes of a conversation; all of it plain data. Raises as `apply_template` does."""
    if not isinstance(template, str):
        raise TemplateRefusal("it is no text")
    if len(template) > _LONGEST:
        raise TemplateStopped(f"it is {len(template):,} characters long")
    request = {
        "chat_template": template,
        # As transformers has it: for a template, what is null is not there.
        "messages": [{key: part for key, part in message.items() if part is not None} for message in messages],
        "tools": tools,
        "variables": dict(variables),
        "add_generation_prompt": add_generation_prompt,
    }
    answer = _ask(json.dumps(request).encode())
    if "text" in answer:
        return answer["text"]
    if "stopped" in answer:
        raise TemplateStopped(answer["stopped"])
    raise TemplateRefusal(answer["refused"])


class _Worker:
    """A process that renders, and the pipes to it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        # A session of its own: Ctrl-C in the terminal is for us, and it ends when we close its pipe.
        self.process = subprocess.Popen(
            [sys.executable, "-I", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environment, "OPENBLAS_NUM_THREADS": "1"},
            cwd="/",
            start_new_session=True,
        )
        self.send(json.dumps({"path": [str(Path(place).absolute()) for place in sys.path]}).encode())

    def send(self, content: bytes) -> None:
        self.process.stdin.write(len(content).to_bytes(8, "big") + content)
        self.process.stdin.flush()

    def receive(self) -> dict[str, str]:
        """The answer; EOFError where the process has ended, TimeoutError where it gives none."""
        deadline = time.monotonic() + _PATIENCE
        size = int.from_bytes(self._read(8, deadline), "big")
        if size > _LARGEST:
            raise TimeoutError
        return json.loads(self._read(size, deadline))

    def _read(self, size: int, deadline: float) -> bytes:
        parts = bytearray()
        source = self.process.stdout.fileno()
        waiting = select.poll()
        waiting.register(source, select.POLLIN)
        while len(parts) < size:
            if not waiting.poll(1000 * max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            part = os.read(source, size - len(parts))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    def end(self) -> int:
        """Stop the process; returns its exit status, negative for a signal."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.stdout.close()
        if self.owner != os.getpid():
            # A copy that a fork made: the process is the parent's.
            self.process.returncode = 0
            return 0
        try:
            return self.process.wait(0.5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


_lock = threading.Lock()
_running: list[_Worker] = []


def _ask(request: bytes) -> dict[str, str]:
    """The worker's answer; another is started where there is none, or somebody else ended it."""
    with _lock:
        for last in (False, True):
            status = None
            worker = _worker()
            try:
                worker.send(request)
                answer = worker.receive()
                _running.append(worker)
                return answer
            except TimeoutError:
                return {"stopped": "it did not come to its end"}
            except (EOFError, BrokenPipeError):
                status = worker.end()
                if status == -signal.SIGXCPU:
                    return {"stopped": f"it computed for more than {template_worker.SECONDS} seconds"}
                if last:
                    return {"stopped": f"it ended the process that renders it (status {status})"}
            finally:
                # Also after a signal: what comes next would be taken for the answer to another.
                if worker not in _running and status is None:
                    worker.end()
    raise AssertionError("the second answer is the last")


def _worker() -> _Worker:
    """The running worker, which is the caller's until it is put back; a copy that a fork made is let go."""
    while _running:
        worker = _running.pop()
        if worker.owner == os.getpid():
            return worker
        worker.end()
    return _Worker()


@atexit.register
def close_worker() -> None:
    """End the process that renders; the next template starts another."""
    with _lock:
        while _running:
            _running.pop().end()
