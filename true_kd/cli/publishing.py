"""`serve` and `push`: the result of a run for others, over HTTP or on the Hugging Face hub."""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from true_kd.cli.flags import AsJson
from true_kd.cli.output import say_json
from true_kd.cli.talking import Adapter, ConfigFile, Domain, Out, Plain, Student
from true_kd.errors import InputError
from true_kd.suggest import in_bytes, printable, quote

if TYPE_CHECKING:
    from true_kd.cli.asking import Asking
    from true_kd.models import LanguageModel
    from true_kd.models.serving import ModelServer
    from true_kd.publishing import Destination, Parcel


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
    """Serve the student with its adapter over HTTP.

    It is mlx-lm's own server, for clients on this machine; Ctrl-C ends it. It speaks OpenAI's API, at
    /v1/chat/completions, /v1/completions and /v1/models. Requests may name this student and its plain form, and no
    other model.
    """
    from true_kd.adapters import require_whole
    from true_kd.cli.asking import Asking
    from true_kd.finding import public_name
    from true_kd.models.serving import ModelServer, Served

    asking = Asking.of(domain=domain, adapter=adapter, out=out, config=config, student=student, system=None)
    found = asking.found
    served = [Served(public_name(found.config.student.model), lambda: _open(asking, plain=True))]
    if not base:
        require_whole(found.folder)
        name = found.domain or found.folder.resolve().name
        name = f"{name}-adapter" if name == served[0].name else name
        served.insert(0, Served(name, lambda: _open(asking, plain=False)))
    with ModelServer(served, host, port, allow_origin or ()) as server:
        server.serve(lambda: _announce(server, asking, base))
    return 0


def push(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Where to upload: OWNER/NAME.")],
    domain: Domain = None,
    adapter: Adapter = None,
    out: Out = None,
    config: ConfigFile = None,
    student: Student = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            metavar="OWNER/NAME",
            help="The student's id on the hub, if the run had it under another name.",
            show_default=False,
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository public; else it is private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="A branch instead of main.", show_default=False)
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", help="What the commit says of itself.", show_default=False)
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            "--license", metavar="ID", help="The adapter's licence, instead of the student's.", show_default=False
        ),
    ] = None,
    with_report: Annotated[
        bool, typer.Option("--with-report", help="Add report.html, which shows held-out prompts and replies.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show files and card, and upload nothing: no network, no token.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Upload an adapter to the Hugging Face hub, with a model card.

    The repository is private, unless --public is given. The weights, the adapter's config, its measurements and the
    card are all that goes; no checkpoint, prompt or path.
    The token is that of `hf auth login`, or HF_TOKEN.
    """
    from true_kd.cli.asking import Asking
    from true_kd.publishing import Destination, Wishes, check_destination, packed, upload

    to = Destination(repo, revision, public)
    check_destination(to)
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,40}", license):
        raise InputError(
            f"--license {quote(license)}: not an identifier of the hub, such as apache-2.0. Write another."
        )
    asking = Asking.of(domain=domain, adapter=adapter, out=out, config=config, student=student, system=None)
    summary = message or f"Upload the adapter of {asking.found.domain or asking.found.folder.resolve().name}"
    with packed(asking.found, Wishes(repo, base_model, license, with_report)) as parcel:
        facts = {"repo": repo, "revision": revision or "main", "files": parcel.sizes, "warnings": list(parcel.warnings)}
        if not as_json:
            for warning in parcel.warnings:
                say(f"Warning: {warning}")
        if dry_run:
            if as_json:
                say_json({**facts, "dry_run": True, "private": not public, "card": parcel.card})
            else:
                _show(parcel, to)
            return 0
        done = upload(parcel, to, summary)
        if as_json:
            done_facts = {
                "private": done.is_private,
                "created": done.is_new,
                "unchanged": done.is_unchanged,
                "url": done.url,
                "commit": done.commit,
            }
            say_json({**facts, "dry_run": False, **done_facts, "card": parcel.card})
            return 0
        typer.echo(done.url)
        what = "all of it was there before" if done.is_unchanged else _listed(parcel)
        say(f"{'Private' if done.is_private else 'Public'}, {what}: {done.commit}")
        if public and done.is_private:
            say("It was private before and stays so: its owner can change that on the hub.")
    return 0


def _show(parcel: Parcel, to: Destination) -> None:
    """What would be uploaded, file by file, and the card whole."""
    kind = "public" if to.is_public else "private"
    typer.echo(f"Would upload to {to.repo} ({kind}, branch {to.revision or 'main'}):")
    for name, size in parcel.sizes.items():
        typer.echo(f"  {size:>13,} bytes  {name}")
    typer.echo("")
    typer.echo(printable(parcel.card), nl=False)


def _listed(parcel: Parcel) -> str:
    return f"{len(parcel.names)} files of {in_bytes(sum(parcel.sizes.values()))}"


def _open(asking: Asking, plain: bool) -> LanguageModel:
    """The student, its chat template rendered as for training."""
    from true_kd.examples import TEMPLATE_DATE
    from true_kd.models import bind_template

    model = asking.open(plain)
    bind_template(model.tokenizer, TEMPLATE_DATE)
    return model


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
