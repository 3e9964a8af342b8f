"""mlx-lm's own HTTP server, for the models it is given and for no others.

As it comes, that server opens whatever folder or repository a request names, fetches whatever address a request gives
for an image, lets every web page read its answers, and stops answering for good after some malformed requests. So each
request is looked at before mlx-lm sees it: it may name the served models alone, and ask only what cannot do harm.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import math
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from true_kd.errors import EnvironmentProblem, InputError, TrueKDError
from true_kd.models.opening import LanguageModel, file_limits_kept, release_memory
from true_kd.suggest import quote

_DEFAULT = "default_model"
"""What mlx-lm's server calls the model that a request gets which names none."""

_LONGEST = 2**24
"""Bytes of a request; a conversation of a million tokens has some five million."""

_PATIENCE = 120
"""Seconds that a client may keep silent in the middle of its request."""


@dataclass(frozen=True)
class Served:
    """A model that requests may name."""

    name: str
    open: Callable[[], LanguageModel]
    """Opens it; in memory is one at a time, the first one to begin with."""


class _TextPart(BaseModel):
    """A part of a message; of an image, mlx-lm would fetch the address."""

    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(strict=True)
    role: str
    content: str | list[_TextPart] | None = None


class _Request(BaseModel):
    """What of a request could do harm; mlx-lm checks the rest."""

    model_config = ConfigDict(strict=True)
    # Code in a tokenizer's template is sandboxed, but one from a stranger could still compute without end.
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None
    logit_bias: dict[str, float] | None = None
    messages: list[_Message] | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    role_mapping: dict[str, str] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | list[Annotated[str, Field(min_length=1)]] | None = None
    tools: list[dict[str, Any]] | None = None
    top_k: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class _Refusal:
    """Why a request gets no answer of a model: the HTTP status, and the reason."""

    status: int
    reason: str


def check_request(body: Mapping[str, Any], names: Sequence[str], vocab_size: int) -> _Refusal | None:
    """What is wrong with the body of a request, None where mlx-lm may see it.

    Parameters
    ----------
    names
        of the models that it may name.
    vocab_size
        rows of their output head: mlx-lm writes a bias for an id beyond it to memory that is not its own.
    """
    model = body.get("model", _DEFAULT)
    known = ", ".join(names)
    if model != _DEFAULT and model not in names:
        return _Refusal(404, f"model {quote(str(model))}: not served here, expected one of: {known}.")
    if body.get("adapters") is not None:
        return _Refusal(404, f"adapters: given, expected none. Choose by `model`, one of: {known}.")
    if body.get("draft_model", _DEFAULT) not in (_DEFAULT, None):
        return _Refusal(404, "draft_model: given, expected none. Leave it out.")
    try:
        asked = _Request.model_validate(dict(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return _Refusal(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}.")
    if "chat_template" in (asked.chat_template_kwargs or ()):
        return _Refusal(400, "chat_template_kwargs.chat_template: given, expected none: the model's own is used.")
    if asked.top_k >= vocab_size:
        return _Refusal(400, f"top_k: {asked.top_k}, expected less than {vocab_size}.")
    strays = [name for name in asked.logit_bias or () if not (name.isdecimal() and int(name) < vocab_size)]
    if strays:
        return _Refusal(400, f"logit_bias: {quote(strays[0])}, expected token ids below {vocab_size}.")
    return None


def read_body(raw: bytes) -> dict[str, Any]:
    """The JSON object of a request; ValueError with the reason where it is none, or holds NaN."""
    try:
        body = json.loads(raw, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(body, dict):
        raise ValueError("expected a JSON object")
    return body


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


class ServingFailed(TrueKDError):
    """The thread that computes replies has ended."""

    def __init__(self) -> None:
        super().__init__("serve: the thread that writes replies has ended, expected it to go on. Start it again.")


class _Models:
    """What mlx-lm's server takes its model from: of the served ones, that which a request names.

    They are opened in the thread that computes with them, as arrays that are not computed yet belong to a thread.
    """

    def __init__(self, served: Sequence[Served], settings: argparse.Namespace) -> None:
        self.cli_args = settings
        self.vocab_size: Future[int] = Future()
        """Rows of the output head, which the plain student and the one with adapter share."""
        self.thread = 0
        """The system's number of the thread that computes."""
        self._served = {one.name: one for one in served}
        self.reset()

    def reset(self) -> None:
        """Let go of the open model."""
        self.model_key: tuple[str, None, None] | None = None
        self.model: Any = None
        self.tokenizer: Any = None
        self.processor = None
        self.draft_model = None
        self.is_batchable = False

    def load_default(self) -> None:
        """Open the first of the served models; what goes wrong is for who waits for it."""
        self.thread = threading.get_native_id()
        try:
            self.vocab_size.set_result(self._open(next(iter(self._served.values()))))
        except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
            self.vocab_size.set_exception(error)

    def load(self, name: str, _adapter: None = None, _draft: str | None = None) -> tuple[Any, Any]:
        """The model of that name and its tokenizer; KeyError where none is served by it."""
        one = next(iter(self._served.values())) if name == _DEFAULT else self._served[name]
        if self.model_key != (one.name, None, None):
            self.reset()
            release_memory()
            self._open(one)
        return self.model, self.tokenizer

    def _open(self, one: Served) -> int:
        from mlx_lm.models.cache import make_prompt_cache

        opened = one.open()
        self.model, self.tokenizer, self.model_key = opened.module, opened.tokenizer, (one.name, None, None)
        self.is_batchable = all(hasattr(layer, "merge") for layer in make_prompt_cache(opened.module))
        return opened.size


class _Replies:
    """mlx-lm's thread that computes replies; those that are being written can be ended."""

    def __init__(self, models: _Models) -> None:
        from mlx_lm.server import LRUPromptCache, ResponseGenerator

        self.cli_args = models.cli_args
        self._models = models
        self._thread = ResponseGenerator(models, LRUPromptCache(models.cli_args.prompt_cache_size))
        self._open: list[Any] = []

    @property
    def is_healthy(self) -> bool:
        """Whether it still runs."""
        return self._thread.is_healthy

    def generate(self, request: Any, options: Any, progress_callback: Any = None) -> Any:
        """As mlx-lm's."""
        context, tokens = self._thread.generate(request, options, progress_callback)
        self._open = [*(one for one in self._open if not one._should_stop), context]
        return context, tokens

    def end(self) -> None:
        """Stop writing, and wait for the thread to end."""
        for context in self._open:
            context.stop()
        self._thread.stop_and_join()
        _wait_for_end(self._models.thread)


def _wait_for_end(thread: int) -> None:
    """Wait until a thread that Python has joined is gone.

    By then it has done with Python, but MLX frees what it compiled there, which needs Python to be still at work: a
    process that left in that moment was aborted (mlx 0.32.4 on Linux, half of the times that Ctrl-C came in a reply).
    """
    place = Path(f"/proc/self/task/{thread}")
    for _ in range(600):
        time.sleep(0.05)
        if not place.exists():
            return


def _settings(origins: Sequence[str]) -> argparse.Namespace:
    """The options of mlx-lm's server, at its own defaults but for `origins`: who of the web may read answers."""
    from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START

    return argparse.Namespace(
        model=None,
        adapter_path=None,
        draft_model=None,
        num_draft_tokens=3,
        trust_remote_code=False,
        allowed_origins=list(origins),
        chat_template="",
        use_default_chat_template=False,
        chat_template_args={},
        temp=0.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        max_tokens=512,
        decode_concurrency=32,
        prompt_concurrency=8,
        prefill_step_size=2048,
        prompt_cache_size=10,
        prompt_cache_bytes=None,
        kv_bits=None,
        kv_group_size=64,
        quantized_kv_start=DEFAULT_QUANTIZED_KV_START,
        pipeline=False,
    )


class ModelServer(ThreadingHTTPServer):
    """Holds the port from the start; `serve` opens the first model and answers until it is stopped."""

    # Threads that are cut off in the middle of their work can take the whole process with them.
    daemon_threads = False
    # Else a second server could share the port where the system allows it.
    allow_reuse_port = False

    def __init__(self, served: Sequence[Served], host: str, port: int, origins: Sequence[str] = ()) -> None:
        """Take the port; 0 for any that is free.

        Raises
        ------
        EnvironmentProblem
            when the port is in use, or is not for everybody.
        InputError
            when the host is no address of this machine.
        """
        self.names = [one.name for one in served]
        self._served = served
        self._host = host
        self._origins = tuple(origins)
        self._replies: _Replies | None = None
        self._connections: set[Any] = set()
        self._is_ending = False
        self.vocab_size = 0
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, _, _, _, address = found[0]
            self.is_loopback = ip_address(address[0]).is_loopback
            super().__init__(address, _handler())
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                what = "in use" if error.errno == errno.EADDRINUSE else "not for every user"
                raise EnvironmentProblem(f"--port {port}: {what}, expected a free one. Give another --port.") from error
            raise InputError(
                f"--host {quote(host)}: not an address of this machine ({error.strerror}). Give another --host."
            ) from error

    def server_bind(self) -> None:
        """Take the address, without the look-up of its name that may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    @property
    def url(self) -> str:
        """Where the API is."""
        shown = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{shown}:{self.server_port}/v1"

    @property
    def replies(self) -> _Replies:
        """What writes the replies; only while it serves."""
        assert self._replies is not None, "requests are answered while it serves"
        return self._replies

    def serve(self, ready: Callable[[], None]) -> None:
        """Open the first model, call `ready`, and answer until an exception, such as that of Ctrl-C, ends it.

        Raises
        ------
        ServingFailed
            when nothing can be answered any more; and whatever opening the first model raises.
        """
        models = _Models(self._served, _settings(self._origins))
        self._replies = _Replies(models)
        try:
            self.vocab_size = models.vocab_size.result()
            ready()
            self.serve_forever(poll_interval=0.2)
        finally:
            self._is_ending = True
            # Whoever waits for a client waits no more, and `server_close` can wait for them.
            for connection in list(self._connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._replies.end()
            # One of them may have been made and not started.
            with contextlib.suppress(RuntimeError):
                self.server_close()

    def service_actions(self) -> None:
        """Between requests: see that they can still be answered."""
        if not self.replies.is_healthy:
            raise ServingFailed

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, and know of the connection until that is done."""
        self._connections.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, whatever becomes of the thread that took the connection: Ctrl-C may have come meanwhile."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news, nor is what the end of all breaks off."""
        if not self._is_ending and not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    def may_ask(self, host: str | None, origin: str | None) -> bool:
        """Whether a request with these headers is answered: none of a web page that was not allowed to ask.

        A page elsewhere can have its own name lead to this machine; so a loopback address is asked for by its name.
        """
        if origin is not None and origin not in self._origins:
            return False
        if not self.is_loopback or host is None:
            return True
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        return name.strip("[]").lower() in {"localhost", "127.0.0.1", "::1", self._host.lower()}


def _handler() -> type:
    """mlx-lm's handler of requests, behind a look at each."""
    with file_limits_kept():
        from mlx_lm.server import APIHandler

    class Handler(APIHandler):
        """See the module."""

        timeout = _PATIENCE
        server_version = "true-kd"
        sys_version = ""

        def __init__(self, request: Any, client: Any, server: ModelServer) -> None:
            super().__init__(server.replies, request, client, server, system_fingerprint="true-kd")

        def do_OPTIONS(self) -> None:
            if self._welcome():
                super().do_OPTIONS()

        def do_GET(self) -> None:
            if self._welcome():
                super().do_GET()

        def do_POST(self) -> None:
            if not self._welcome():
                return
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal():
                self._refuse(_Refusal(411, "Content-Length: none, expected the bytes of the request."))
                return
            if int(length) > _LONGEST:
                self._refuse(_Refusal(413, f"request of {int(length):,} bytes, expected {_LONGEST:,} at most."))
                return
            raw = self.rfile.read(int(length))
            try:
                refusal = check_request(read_body(raw), self.server.names, self.server.vocab_size)
            except ValueError as error:
                refusal = _Refusal(400, f"request: no JSON that can be answered ({error}).")
            if refusal is not None:
                self._refuse(refusal)
                return
            self.rfile = io.BytesIO(raw)
            super().do_POST()

        def handle_models_request(self) -> None:
            """The served models; mlx-lm's would list all that were ever downloaded, and local paths."""
            shown = [{"id": name, "object": "model", "created": self.created} for name in self.server.names]
            self._answer(200, {"object": "list", "data": shown})

        def _welcome(self) -> bool:
            welcome = self.server.may_ask(self.headers.get("Host"), self.headers.get("Origin"))
            if not welcome:
                self._refuse(_Refusal(403, "asked by a web page that may not. Allow its address by --allow-origin."))
            return welcome

        def _refuse(self, refusal: _Refusal) -> None:
            self._answer(refusal.status, {"error": refusal.reason})

        def _answer(self, status: int, value: Mapping[str, Any]) -> None:
            content = json.dumps(value).encode()
            self._set_completion_headers(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler
