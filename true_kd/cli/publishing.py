"""`serve` and `push`: the result of a run for others, over HTTP or on the Hugging Face hub."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from true_kd.cli.talking import Adapter, ConfigFile, Domain, Out, Plain, Student
from true_kd.suggest import printable

if TYPE_CHECKING:
    from true_kd.cli.asking import Asking
    from true_kd.models.serving import ModelServer


def serve(
    domain: Domain = None,
    adapter: Adapter = None,
    out: Out = None,
    config: ConfigFile = None,
    student: Student = None,
    base: Plain = False,
    host: Annotated[str, typer.Option("--host", help="Address to answer at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to answer at; 0 for any free one.")
    ] = 8080,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin",
            metavar="ORIGIN",
            help="A web page that may ask, such as http://localhost:3000; repeat it for several.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Serve the student with its adapter over HTTP, for this machine's clients: mlx-lm's own server, Ctrl-C ends it.

    It speaks OpenAI's API, at /v1/chat/completions, /v1/completions and /v1/models. Requests may name this student
    and its plain form, and no other model.
    """
    from true_kd.adapters import require_whole
    from true_kd.cli.asking import Asking
    from true_kd.finding import public_name
    from true_kd.models.serving import ModelServer, Served

    asking = Asking.of(domain=domain, adapter=adapter, out=out, config=config, student=student, system=None)
    found = asking.found
    served = [Served(public_name(found.config.student.model), lambda: asking.open(plain=True))]
    if not base:
        require_whole(found.folder)
        name = found.domain or found.folder.resolve().name
        name = f"{name}-adapter" if name == served[0].name else name
        served.insert(0, Served(name, lambda: asking.open(plain=False)))
    with ModelServer(served, host, port, allow_origin or ()) as server:
        server.serve(lambda: _announce(server, asking, base))
    return 0


def _announce(server: ModelServer, asking: Asking, base: bool) -> None:
    """Tell where the server answers, and how to ask it."""
    how = "without its adapter" if base else f"with {asking.found.folder}"
    say(f"{asking.found.config.student.model} {how}: {server.url} (Ctrl-C ends it)")
    say(f"Models: {', '.join(server.names)}")
    if not server.is_loopback:
        say(
            "Anybody who reaches this address can use it: there is no password and no encryption. "
            "Leave --host away to answer this machine alone."
        )
    messages = [{"role": "user", "content": "Hello"}]
    if asking.system is not None:
        messages.insert(0, {"role": "system", "content": asking.system})
        say(f"System message of {asking.found.domain}, which the client has to send as below: {asking.system}")
    elif asking.found.domain is not None:
        say(f"No system message is known of {asking.found.domain}: send none.")
    body = json.dumps({"model": server.names[0], "messages": messages}, ensure_ascii=False)
    say(f"Try: curl {server.url}/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}")


def say(line: str) -> None:
    """A line for people, on stderr."""
    typer.echo(printable(line), err=True)
