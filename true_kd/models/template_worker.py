"""The process that renders the chat templates of strangers; `templates` starts it, and nothing imports it.

It renders with transformers' own function, so that the text is what transformers makes of it. Once that is loaded it
gives up what a template has no use for: files, sockets, child processes and all but a little memory. Computing time
is measured anew for each conversation, and a template that uses it up ends the process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import resource
import sys
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

SECONDS = 2
"""Computing time of a conversation; templates in use take milliseconds."""
_MEMORY = 2**30
"""Bytes of address space, where the libraries take a quarter of it."""
_TEXT = 2**24
"""Characters of a rendered conversation."""
_SIZE = 8
"""Bytes that say how long a message between the processes is."""

_Render = Callable[[Mapping[str, Any]], str]


def serve(requests: int, answers: int) -> None:
    """Answer requests until there are no more; each is JSON behind its length, as are the answers.

    Parameters
    ----------
    requests, answers
        file descriptors. The first request holds the `path` to import from, and has no answer.
    """
    first = _receive(requests)
    if first is None:
        return
    sys.path[:] = first["path"]
    render = _load()
    # What is imported at the first use must be so before no file can be opened.
    _answer(render, {"chat_template": "{{ messages | tojson }}{{ strftime_now('%Y') }}{{ nothing.of_it }}"})
    _give_up_all()
    while (request := _receive(requests)) is not None:
        _limit_time()
        _send(answers, _answer(render, request))


def _load() -> _Render:
    """The function of transformers, without the rest of that library where it goes without: a third of the time."""
    found = importlib.util.find_spec("transformers")
    own = {"transformers": (), "transformers.utils": ("utils",)}
    for name, below in own.items():
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(place, *below) for place in found.submodule_search_locations]  # noqa: PTH118
        sys.modules[name] = package
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except (ImportError, AttributeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]
        from transformers.utils.chat_template_utils import render_jinja_template

    def render(request: Mapping[str, Any]) -> str:
        facts = {"messages": [], "tools": None, "add_generation_prompt": False, "variables": {}, **request}
        rendered, _ = render_jinja_template(
            conversations=[facts["messages"]],
            tools=facts["tools"],
            chat_template=facts["chat_template"],
            add_generation_prompt=facts["add_generation_prompt"],
            **facts["variables"],
        )
        return rendered[0]

    return render


def _answer(render: _Render, request: Mapping[str, Any]) -> dict[str, str]:
    try:
        text = render(request)
        if len(text) > _TEXT:
            return {"stopped": f"it wrote more than {_TEXT // 2**20} million characters"}
        return {"text": text}
    except MemoryError:
        return {"stopped": "it took more memory than any template needs"}
    except Exception as error:  # noqa: BLE001 - a template may fail in any way
        return {"refused": f"{error}"[:1000] or type(error).__name__}


def _give_up_all() -> None:
    for name, limit in (("NOFILE", 0), ("NPROC", 0), ("FSIZE", 0), ("CORE", 0), ("AS", _MEMORY)):
        # Not every system knows all of them, or lets them be lowered.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def _limit_time() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    limit = math.ceil(time.process_time()) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _receive(descriptor: int) -> dict[str, Any] | None:
    size = _read(descriptor, _SIZE)
    content = _read(descriptor, int.from_bytes(size, "big")) if size else None
    return json.loads(content) if content else None


def _read(descriptor: int, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = os.read(descriptor, size - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _send(descriptor: int, answer: Mapping[str, str]) -> None:
    content = json.dumps(answer).encode()
    left = memoryview(len(content).to_bytes(_SIZE, "big") + content)
    while left:
        left = left[os.write(descriptor, left) :]


if __name__ == "__main__":
    # What a library prints must not come between the answers.
    own = os.dup(1)
    os.dup2(2, 1)
    serve(0, own)
