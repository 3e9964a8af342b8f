"""What the talking commands share: which model is asked, what it is asked, and its replies as they are written."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from true_kd import stopping
from true_kd.comparing import put_on
from true_kd.config import Override
from true_kd.errors import InputError, PromptError
from true_kd.examples import render
from true_kd.files import expand
from true_kd.finding import FoundAdapter, domains_in, find_domain, find_folder, output_folder, system_message
from true_kd.memory import budget_bytes, set_guards
from true_kd.models import LanguageModel, SamplingOptions, open_model
from true_kd.models.streaming import Recollection, Token, stream_reply
from true_kd.prompts import Prompt, from_records, load_file
from true_kd.suggest import printable, quote
from true_kd.validation import validate


@dataclass(frozen=True)
class Asking:
    """Which adapter is asked, and under which system message."""

    found: FoundAdapter
    system: str | None

    @classmethod
    def of(
        cls,
        *,
        domain: str | None,
        adapter: str | None,
        out: str | None,
        config: Path | None,
        student: str | None,
        system: str | None,
        teacher: str | None = None,
    ) -> Asking:
        """What the flags name.

        Raises
        ------
        InputError
            when they name nothing, or there is no such adapter.
        """
        if domain is not None and adapter is not None:
            raise InputError("--domain and --adapter: both given, expected one. Leave one out.")
        if adapter is not None:
            if out is not None or config is not None:
                raise InputError(
                    f"{'--config' if out is None else '--out'}: given with --adapter, which says where the adapter is. "
                    "Leave one out."
                )
            found = find_folder(adapter, teacher, student)
        elif domain is not None:
            models = {"teacher": teacher, "student": student}
            given = [Override(f"--{seam}", (seam,), model) for seam, model in models.items() if model is not None]
            found = find_domain(domain, out, config, given)
        else:
            known = domains_in(output_folder(out, config))
            listed = f" ({', '.join(known[:12])})" if known else ""
            raise InputError(f"no domain was named, expected --domain NAME{listed} or --adapter PATH.")
        return cls(found, system_message(found) if system is None else system.strip() or None)

    def prompt(self, record: dict[str, Any], name: str) -> Prompt:
        """A record of the form of a prompt file's lines as a prompt to reply to: see `openings`."""
        [prompt] = self.openings(from_records([record], name))
        return prompt

    def openings(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Prompts to reply to, without the replies they bring, under the system message where they have none."""
        raw = [prompt.where for prompt in prompts if prompt.messages is None]
        if raw:
            raise PromptError([f"{where}: raw `text`, expected `prompt` or `messages` to reply to." for where in raw])
        return [replace(prompt, messages=self._opened(prompt.messages), completion=None) for prompt in prompts]

    def _opened(self, messages: Sequence[Any]) -> tuple[Any, ...]:
        if self.system is None or any(message["role"] == "system" for message in messages):
            return tuple(messages)
        return ({"role": "system", "content": self.system}, *messages)

    def open(self, plain: bool) -> LanguageModel:
        """The student, with its adapter unless it is to be plain; it keeps to the memory that its run was given."""
        set_guards(budget_bytes(self.found.config.memory_gb))
        model = open_model(self.found.config.student, "student")
        if not plain:
            put_on(model, self.found.folder)
        return model


class Reply:
    """A reply as it is written, token by token, and what there is to say of it afterwards."""

    def __init__(
        self,
        asking: Asking,
        model: LanguageModel,
        prompt: Prompt,
        options: SamplingOptions,
        seed: int,
        recollection: Recollection | None = None,
    ) -> None:
        self._asked = render(prompt, model.tokenizer, model.stop_ids, model.name).prompt
        self._drawn = stream_reply(model, self._asked, options, seed, recollection)
        self._tokens: list[Token] = []
        self._first = self._last = 0.0

    def __iter__(self) -> Iterator[Token]:
        for token in self._drawn:
            self._last = time.perf_counter()
            self._first = self._first or self._last
            self._tokens.append(token)
            yield token

    @property
    def text(self) -> str:
        """So far."""
        return "".join(token.text for token in self._tokens)

    def facts(self) -> dict[str, Any]:
        """The finished reply for programs. The reading of the prompt is not in its speed."""
        count, seconds = len(self._tokens), self._last - self._first
        return {
            "text": self.text,
            "tokens": count,
            "prompt_tokens": len(self._asked),
            "finish_reason": self._tokens[-1].finished,
            "tokens_per_second": round((count - 1) / seconds, 2) if count > 1 and seconds > 0 else None,
        }


class Conversation:
    """What was said so far."""

    def __init__(self, asking: Asking, model: LanguageModel, options: SamplingOptions, seed: int) -> None:
        self._asking = asking
        self._model = model
        self._options = options
        self._seed = seed
        self._messages: list[dict[str, str]] = []
        self._recollection = Recollection(model.module)

    def answer(self, said: str) -> None:
        """Print the reply to what was said; Ctrl-C stops it, and what was written counts as the reply."""
        turns = [*self._messages, {"role": "user", "content": said}]
        try:
            prompt = self._asking.prompt({"messages": turns}, "message")
        except PromptError as error:
            typer.echo(printable(str(error)), err=True)
            return
        # Each turn draws on: with the same seed two turns would begin with the same random numbers.
        seed = self._seed + len(self._messages) // 2
        reply = Reply(self._asking, self._model, prompt, self._options, seed, self._recollection)
        try:
            for token in reply:
                typer.echo(printable(token.text), nl=False)
            typer.echo("")
        except KeyboardInterrupt as interrupt:
            stopping.answer(interrupt)
            typer.echo(" [stopped]")
        if reply.text:
            self._messages = [*turns, {"role": "assistant", "content": reply.text}]


HELP = "q or Ctrl-D quits, r forgets the conversation, h shows this; Ctrl-C stops a reply. All else is for the student."


def greet(found: FoundAdapter, model: LanguageModel, plain: bool) -> None:
    """Tell whoever types what they talk to."""
    how = "without its adapter" if plain else f"with {found.folder}"
    hint(f"{model.name} {how}. {HELP}")


def hint(line: str) -> None:
    """Say something to whoever types; a pipe gets replies only."""
    if sys.stdin.isatty():
        typer.echo(printable(line))


def end_line() -> None:
    """Leave the line on which somebody was to type."""
    if sys.stdin.isatty():
        typer.echo("")


def read_line() -> str:
    """The next thing that is said.

    Raises
    ------
    EOFError
        when nothing more is said.
    """
    if not sys.stdin.isatty():
        line = _from_stdin(sys.stdin.readline)
        if not line:
            raise EOFError
        return line
    with contextlib.suppress(ImportError):
        # Has `input` edit lines and remember them.
        import readline  # noqa: F401
    return input(">> ")


def _from_stdin(read: Any) -> str:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise InputError("stdin: not UTF-8, expected text. Save it as UTF-8.") from error


def read_prompt(given: str | None, command: str) -> str:
    """The prompt of a command line; None where it has none, which is that of stdin, as is "-".

    Raises
    ------
    InputError
        when there is none there either, or it is empty.
    """
    if given is None and sys.stdin.isatty():
        raise InputError(f'no prompt, expected one. Write true-kd {command} "..." or pipe it in.')
    text = _from_stdin(sys.stdin.read).rstrip("\n") if given in (None, "-") else given
    if not text.strip():
        raise InputError("prompt: empty, expected text. Write what to ask.")
    return text


def read_prompts(given: Path) -> list[Prompt]:
    """The prompts of a file: lines of JSON, or prompts as they stand."""
    path = expand(str(given), "--prompts-file")
    if path.suffix not in (".jsonl", ".txt"):
        raise InputError(f"--prompts-file {quote(str(path))}: expected a file that ends in .jsonl or .txt. Rename it.")
    return load_file(path)


def sampling_options(temp: float, top_p: float | None, max_tokens: int) -> SamplingOptions:
    """The options of these flags; ConfigError for values out of bounds."""
    given = {"sampling_temperature": temp, "max_tokens": max_tokens, **({} if top_p is None else {"top_p": top_p})}
    flags = {"sampling_temperature": "--temp", "max_tokens": "--max-tokens", "top_p": "--top-p"}
    return validate(SamplingOptions, given, lambda path: flags[str(path[0])])
