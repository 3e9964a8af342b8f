"""`true-kd serve` over real HTTP: what it answers, what it refuses to open, fetch or compute, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_cli import hear_ctrl_c, only_line, refused
from test_finding import lay_run

from true_kd.cli.asking import Asking
from true_kd.cli.publishing import _announce, _open
from true_kd.errors import EnvironmentProblem, InputError
from true_kd.finding import is_public, public_name
from true_kd.models import LanguageModel
from true_kd.models.serving import ModelServer, Served, ServingFailed
from true_kd.pocket import locate

ASK = "say hello to the cat"
HELLO = [{"role": "user", "content": ASK}]
PAGE = "http://localhost:3000"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the output of a run of the domain cats, with the pocket pair; its student is told to be brief."""
    root = tmp_path_factory.mktemp("served")
    teacher, student = locate("pocket:teacher", "teacher"), locate("pocket:student", "student")
    lay_run(root / "adapters_kd", "cats", teacher, student, prompts=str(root / "prompts"))
    (root / "prompts" / "cats").mkdir(parents=True)
    (root / "prompts" / "cats" / "system.md").write_text("be brief")
    return root


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[ModelServer]:
    """A server of cats and of its plain student, at work."""
    out = str(place / "adapters_kd")
    asking = Asking.of(domain="cats", adapter=None, out=out, config=None, student=None, system=None)
    served = [Served("cats", lambda: _open(asking, plain=False)), Served("plain", lambda: _open(asking, plain=True))]
    ready = threading.Event()
    with ModelServer(served, "127.0.0.1", 0, [PAGE]) as running:
        thread = threading.Thread(target=running.serve, args=(ready.set,))
        thread.start()
        assert ready.wait(60)
        yield running
        running.shutdown()
        thread.join(60)
    assert not thread.is_alive()


def asked(server: ModelServer, path: str, body: object = None, **headers: str) -> SimpleNamespace:
    """The answer to a request: a POST where there is a body."""
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, content, headers)
    found = connection.getresponse()
    text = found.read().decode()
    connection.close()
    return SimpleNamespace(status=found.status, headers=found.headers, text=text)


def reply(server: ModelServer, **body: object) -> str:
    """What a model says to ASK."""
    answer = asked(server, "/v1/chat/completions", {"messages": HELLO, "max_tokens": 12, **body})
    assert answer.status == 200, answer
    return json.loads(answer.text)["choices"][0]["message"]["content"]


def generated(cli, place: Path, *arguments: str) -> str:
    """What `true-kd generate` says to ASK, without a system message."""
    where = ("-d", "cats", "--out", str(place / "adapters_kd"), "--system", "")
    ended = cli("generate", ASK, *where, "-m", "12", "--json", *arguments)
    assert ended.code == 0, ended
    return json.loads(ended.out)["text"]


# Answers


def test_the_served_models_are_listed_and_nothing_else(server: ModelServer) -> None:
    listed = json.loads(asked(server, "/v1/models").text)["data"]
    assert [model["id"] for model in listed] == ["cats", "plain"]
    assert asked(server, "/health").status == 200


@pytest.mark.parametrize(("model", "arguments"), [("cats", []), ("default_model", []), ("plain", ["--base"])])
def test_a_reply_is_that_of_generate(model: str, arguments: list[str], server: ModelServer, cli, place: Path) -> None:
    assert reply(server, model=model) == generated(cli, place, *arguments)


def test_the_plain_student_is_another_than_the_adapted_one(server: ModelServer) -> None:
    assert reply(server, model="plain") != reply(server, model="cats") == reply(server)


def test_a_seed_is_served_by_mlx_lms_other_path_and_says_the_same(server: ModelServer) -> None:
    assert reply(server, seed=1) == reply(server)


def test_a_stream_says_the_same_in_parts(server: ModelServer) -> None:
    answer = asked(server, "/v1/chat/completions", {"messages": HELLO, "max_tokens": 12, "stream": True})
    assert answer.headers["Content-Type"] == "text/event-stream"
    parts = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert parts.pop() == "[DONE]"
    assert len(parts) > 3
    said = [json.loads(part)["choices"][0]["delta"].get("content", "") for part in parts]
    assert "".join(said) == reply(server)


def test_many_at_once_are_all_answered(server: ModelServer) -> None:
    alone = reply(server)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(reply(server))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [alone] * 6


# Refusals


def test_no_other_model_is_opened(server: ModelServer, student_folder: Path) -> None:
    for other in (str(student_folder), "mlx-community/Qwen2.5-3B-Instruct-4bit", "../plain", "", "cats/", None, 5, []):
        answer = asked(server, "/v1/chat/completions", {"messages": HELLO, "model": other})
        assert (answer.status, "not served here, expected one of: cats, plain." in answer.text) == (404, True), other


def test_neither_adapters_nor_draft_models_are_opened(server: ModelServer, place: Path) -> None:
    for name in ("adapters", "draft_model"):
        answer = asked(server, "/v1/chat/completions", {"messages": HELLO, name: str(place / "adapters_kd" / "cats")})
        assert (answer.status, f"{name}: given, expected none" in answer.text) == (404, True)


def test_the_address_of_an_image_is_not_fetched(server: ModelServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as secret:
        secret.settimeout(0.5)
        url = f"http://127.0.0.1:{secret.getsockname()[1]}/metadata"
        for part in ({"type": "image_url", "image_url": {"url": url}}, {"type": "input_image", "image_url": url}):
            answer = asked(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}]})
            assert answer.status == 400, answer
        with pytest.raises(TimeoutError):
            secret.accept()


@pytest.mark.parametrize(
    "body",
    [
        {"stop": 5},
        {"stop": [5]},
        {"stop": [""]},
        {"top_k": 10**6},
        {"logit_bias": {"-1": 1.0}},
        {"logit_bias": {"9" * 30: 1.0}},
        {"logit_bias": {"one": 1.0}},
        {"seed": -1},
        {"seed": 2**64},
        {"temperature": "hot"},
        {"max_tokens": 0},
        {"messages": [{"role": "user", "content": [5]}]},
        {"messages": ["hello"]},
        {"messages": "hello"},
        {"messages": [{"content": "hello"}]},
        {"tools": [5]},
        {"tools": "calculator"},
        {"chat_template_kwargs": {"chat_template": "{% for a in range(99999) %}{% endfor %}"}},
        {"chat_template_kwargs": {"tools": []}},
        {"chat_template_kwargs": []},
    ],
    ids=str,
)
def test_what_would_harm_is_refused_and_the_next_is_answered(body: dict[str, object], server: ModelServer) -> None:
    answer = asked(server, "/v1/chat/completions", {"messages": HELLO, "max_tokens": 2, **body})
    assert (answer.status, "error" in json.loads(answer.text)) == (400, True)
    assert asked(server, "/health").status == 200
    assert reply(server, max_tokens=1)


def test_ids_end_with_the_vocabulary(server: ModelServer) -> None:
    for beyond, status in ((0, 400), (1, 200)):
        size = server.vocab_size - beyond
        for body in ({"top_k": size, "temperature": 1.0}, {"logit_bias": {str(size): 1.0}}):
            answer = asked(server, "/v1/chat/completions", {"messages": HELLO, "max_tokens": 2, **body})
            assert answer.status == status, (body, answer)


@pytest.mark.parametrize("prompt", [["a", "b"], [1, 2], "", 5, {}], ids=str)
def test_a_raw_prompt_is_one_text(prompt: object, server: ModelServer) -> None:
    assert asked(server, "/v1/completions", {"prompt": prompt}).status == 400
    answer = asked(server, "/v1/completions", {"prompt": "the cat", "max_tokens": 3})
    assert (answer.status, json.loads(answer.text)["usage"]["completion_tokens"]) == (200, 3)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 400),
        (b"hello", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b'{"temperature": NaN}', 400),
        (b'{"temperature": 1e999}', 400),
        (b"[" * 10**5, 400),
        (b'{"a":' * 10**5, 400),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_json_is_refused(raw: bytes, status: int, server: ModelServer) -> None:
    assert asked(server, "/v1/chat/completions", raw).status == status


@pytest.mark.parametrize(("length", "status"), [("-1", 411), ("x", 411), ("1000000000000", 413), ("²", 411)])
def test_a_request_has_a_length_that_can_be_read(length: str, status: int, server: ModelServer) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {length}\r\n\r\n".encode("latin-1", "replace")
        )
        assert int(connection.recv(100).split()[1]) == status


def test_web_pages_may_ask_only_where_that_was_allowed(server: ModelServer) -> None:
    for path, body in (("/v1/models", None), ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1})):
        assert asked(server, path, body, Origin="https://example.com").status == 403
        assert asked(server, path, body, Origin="null").status == 403
        allowed = asked(server, path, body, Origin=PAGE)
        assert (allowed.status, allowed.headers["Access-Control-Allow-Origin"]) == (200, PAGE)
        assert asked(server, path, body).headers["Access-Control-Allow-Origin"] is None


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:80", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
    ],
)
def test_a_name_that_leads_here_from_elsewhere_is_not_answered(host: str, status: int, server: ModelServer) -> None:
    assert asked(server, "/v1/models", Host=host).status == status


def test_it_ends_where_nothing_can_be_answered_any_more(place: Path) -> None:
    out = str(place / "adapters_kd")
    asking = Asking.of(domain="cats", adapter=None, out=out, config=None, student=None, system=None)
    with (
        ModelServer([Served("cats", lambda: _open(asking, plain=False))], "127.0.0.1", 0) as server,
        pytest.raises(ServingFailed),
    ):
        # The thread ends as after an exception in it, which no request is known to cause.
        server.serve(lambda: server.replies._thread.stop_and_join())


@pytest.mark.slow
def test_a_template_without_end_costs_its_request_alone(place: Path) -> None:
    out = str(place / "adapters_kd")
    asking = Asking.of(domain="cats", adapter=None, out=out, config=None, student=None, system=None)

    def opened() -> LanguageModel:
        model = _open(asking, plain=True)
        loop = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
        model.tokenizer._tokenizer.chat_template = (
            "{% if messages[0].content == 'loop' %}" + loop + "{% endif %}{{ messages[0].content }}"
        )
        return model

    with ModelServer([Served("cats", opened)], "127.0.0.1", 0) as server:
        ready = threading.Event()
        thread = threading.Thread(target=server.serve, args=(ready.set,))
        thread.start()
        assert ready.wait(60)
        ask = {"messages": [{"role": "user", "content": "loop"}], "max_tokens": 2}
        answer = asked(server, "/v1/chat/completions", ask)
        assert (answer.status, "computed for more than" in answer.text) == (404, True)
        assert reply(server, max_tokens=1, chat_template_kwargs={"enable_thinking": False, "other": "x"})
        server.shutdown()
        thread.join(60)


# Addresses and names


def test_a_port_that_is_taken_and_an_address_elsewhere_are_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match=rf"--port {port}: in use, expected a free one"):
            ModelServer([], "127.0.0.1", port)
    for host in ("192.0.2.1", "no such host"):
        with pytest.raises(InputError, match="not an address of this machine"):
            ModelServer([], host, 0)


def test_beyond_this_machine_there_is_a_warning(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(place / "adapters_kd")
    asking = Asking.of(domain="cats", adapter=None, out=out, config=None, student=None, system=None)
    for host, warned in (("0.0.0.0", True), ("127.0.0.1", False)):
        with ModelServer([Served("cats", lambda: _open(asking, plain=False))], host, 0) as server:
            _announce(server, asking, base=False)
            assert server.may_ask("evil.example", None) is warned
        assert ("Anybody who reaches this address can use it" in capsys.readouterr().err) is warned


def test_a_model_is_called_by_what_it_is_called_elsewhere(student_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert public_name(str(student_folder)) == student_folder.name
    assert public_name("a/model-4bit") == "a/model-4bit"
    assert is_public("pocket:student")
    assert not any(map(is_public, ("/a/b", "../b", "./b", "~/b", "a/b/c", "model", "a/..", "a\\b")))
    (tmp_path / "a" / "model-4bit").mkdir(parents=True)
    assert public_name("a/model-4bit") == "model-4bit"


# The command


def test_mistakes_end_in_one_line(cli, place: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    assert "did you mean 'cats'" in refused(cli("serve", "-d", "cat"))
    assert "--port" in refused(cli("serve", "-d", "cats", "--port", "70000"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert "in use" in refused(cli("serve", "-d", "cats", "--port", str(other.getsockname()[1])), 4)
    assert "no such folder" in refused(cli("serve", "-d", "cats", "--port", "0", "--student", "nowhere"))
    shutil.copytree("adapters_kd/cats", tmp_path / "cats")
    weights = bytearray((tmp_path / "cats" / "adapters.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "cats" / "adapters.safetensors").write_bytes(weights)
    assert "is not what its config says" in refused(cli("serve", "--adapter", str(tmp_path / "cats")), 5)


@pytest.mark.slow
def test_it_says_how_to_ask_and_ctrl_c_ends_it_in_the_middle_of_a_reply(place: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "true_kd", "serve", "-d", "cats", "--port", "0"],
        cwd=place,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear_ctrl_c,
    ) as process:
        lines = []
        while not lines or not lines[-1].startswith("Try: "):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        assert "System message of cats, which the client has to send as below: be brief\n" in lines
        curl = shlex.split(lines[-1].removeprefix("Try: "))
        assert curl[0] == "curl"
        port = int(re.search(r":(\d+)/v1", curl[1])[1])
        body = json.loads(curl[-1])
        assert body["messages"][0] == {"role": "system", "content": "be brief"}
        # With a seed mlx-lm writes one reply to its end before it looks up.
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        long = {**body, "stream": True, "seed": 1, "max_tokens": 10**6}
        connection.request("POST", "/v1/chat/completions", json.dumps(long))
        assert connection.getresponse().read(50)
        # Nor does who says nothing keep it.
        silent = socket.create_connection(("127.0.0.1", port))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        connection.close()
        silent.close()
    assert (process.returncode, out) == (130, ""), err
    [*requests, last] = err.splitlines(keepends=True)
    assert only_line(last) == "true-kd: stopped by Ctrl-C."
    assert all('"POST /v1/chat/completions HTTP/1.1" 200' in line for line in requests)
