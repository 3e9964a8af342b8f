"""`validate` and `doctor`: what is wrong before a run, with configs and prompts, and with the machine."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from true_kd.cli.flags import (
    AsJson,
    ConfigFile,
    Domains,
    Everything,
    Force,
    Prompts,
    Sets,
    Student,
    Teacher,
    flag,
    overrides,
)
from true_kd.cli.output import colour_console, line_width, say_json
from true_kd.errors import Problems
from true_kd.suggest import printable, redact

if TYPE_CHECKING:
    from rich.console import Console

    from true_kd.doctor import Check
    from true_kd.preflight import DomainReport, Finding, ShownExample, ShownToken


def validate(
    domain: Domains = None,
    everything: Everything = False,
    config: ConfigFile = None,
    teacher: Teacher = None,
    student: Student = None,
    prompts: Prompts = None,
    max_seq_length: Annotated[int | None, flag("max_seq_length", "--max-seq-length")] = None,
    vocab_strategy: Annotated[str | None, flag("vocab_strategy", "--vocab-strategy")] = None,
    force: Force = False,
    sets: Sets = None,
    show: Annotated[
        int, typer.Option("--show", min=0, help="Training prompts of each domain to show as the student meets them.")
    ] = 2,
    as_json: AsJson = False,
) -> int:
    """Find all that is wrong with configs and prompts, and show which tokens are trained.

    All domains are looked at unless some are named. Nothing is written, downloaded or trained. Exit code 2 where
    there is a problem, 0 where there are none or only warnings.
    """
    from true_kd.config import NoConfigs
    from true_kd.jobs import choose_domains
    from true_kd.preflight import Sheet, examine, find_stray_configs, sum_up

    flags = {"teacher": teacher, "student": student, "prompts": prompts}
    flags |= {"max_seq_length": max_seq_length, "vocab_strategy": vocab_strategy, "force": force or None}
    given, named = overrides(flags, sets), domain or []
    sheet, domains, told = Sheet(), [], set()
    try:
        domains = choose_domains(config, named, everything or not named, given)
    except NoConfigs:
        raise
    except Problems as error:
        # The list is what was asked for: here it is not cut to a few lines.
        sheet.refused("config", error)
    findings = sheet.findings if named or not domains else find_stray_configs(config, domains)
    reports: list[DomainReport] = []
    console = colour_console()
    if not as_json:
        _show_findings(findings, told)
    for report in examine(config, domains, given, show):
        reports.append(report)
        if not as_json:
            _show_domain(report, told, console)
    whole = sum_up(findings, reports)
    if as_json:
        say_json(asdict(whole))
    else:
        where = f" in {_domains(reports)}" if reports else ""
        _say(f"{_number(whole.problems, 'problem')}, {_number(whole.warnings, 'warning')}{where}.")
    return 2 if whole.problems else 0


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _domains(reports: Sequence[DomainReport]) -> str:
    return reports[0].domain if len(reports) == 1 else f"{len(reports)} domains"


def _say(line: str) -> None:
    typer.echo(printable(line))


def _show_domain(report: DomainReport, told: set[str], console: Console | None) -> None:
    """Print what was found of a domain, without what was told of another already."""
    _say(f"{report.domain}: {_holdings(report)}")
    _show_findings(report.findings, told)
    for line in report.unchecked:
        if line not in told:
            told.add(line)
            _say(f"not checked: {line}")
    for number, example in enumerate(report.examples):
        if number == 0 and report.domain not in told:
            told.add(report.domain)
            _say("")
        _show_example(example, console)
    if report.examples:
        _say(_LEGEND if console is None else _COLOUR_LEGEND)
    _say("")


def _show_findings(findings: Sequence[Finding], told: set[str]) -> None:
    for finding in findings:
        if finding.message not in told:
            told.add(finding.message)
            _say(finding.message if finding.severity == "problem" else f"warning: {finding.message}")


def _holdings(report: DomainReport) -> str:
    counts = report.counts
    if counts is None:
        return "cannot be read whole."
    known = f"{counts.given:,} replies in the data, {counts.cached:,} prompts in the cache"
    tokens = f", {counts.prompt_tokens:,} prompt tokens, {counts.trained_tokens:,} trained so far"
    return (
        f"{counts.train_prompts:,} to train, {counts.valid_prompts:,} held out; {known}"
        f"{tokens if counts.prompt_tokens else ''}."
    )


_TRAINED, _READ = "+ ", ". "
"""How the lines of a token that is trained begin, and of one that is only read: no text of a prompt comes first."""

_LEGEND = "(Lines with + are trained, those with . only read; ↵ is a line end.)"
_COLOUR_LEGEND = "(Highlighted tokens are trained, the others only read; ↵ is a line end.)"

# Two grounds in turn, so that each token is seen; black on yellow is readable on light and dark terminals.
_GROUNDS = ("black on color(229)", "black on color(221)")
_PLAIN = ("", "dim")
_LINE_END = "↵"
_WRITTEN_OUT = str.maketrans({letter: ascii(letter)[1:-1] for letter in (_LINE_END, "\t", "\u2028", "\u2029")})


def _show_example(example: ShownExample, console: Console | None) -> None:
    whose = {"data": "the data's reply", "cache": "the teacher's reply, as cached", "teacher": "no reply yet"}
    _say(f"{example.where} ({whose[example.reply]})")
    if console is None:
        for line in _marked(example.tokens):
            _say(line)
    else:
        _colour(example.tokens, console)
    cut = f", {example.cut_tokens:,} cut off" if example.cut_tokens else ""
    _say(
        f"= {_number(example.prompt_tokens, 'token')} of prompt, {example.trained_tokens:,} trained{cut}."
        f"{' ' if example.note else ''}{example.note}"
    )


def _marked(tokens: Sequence[ShownToken]) -> Iterator[str]:
    """The text in lines, each with a mark of whether its tokens are trained; broken between tokens, where they fit."""
    from rich.cells import cell_len, chop_cells

    width = max(line_width(), 20) - len(_TRAINED)
    for trained, run in groupby(tokens, key=lambda token: token.trained):
        mark, line = _TRAINED if trained else _READ, ""
        for token in run:
            for part in _visible(token.text).splitlines(keepends=True):
                if line and cell_len(line) + cell_len(part.rstrip("\n")) > width:
                    yield mark + line
                    line = ""
                line += part
                while line.endswith("\n") or cell_len(line) > width:
                    first, *_ = chop_cells(line.rstrip("\n"), width)
                    yield mark + first
                    line = line.removeprefix(first).removeprefix("\n")
        if line:
            yield mark + line


def _visible(text: str) -> str:
    """The text of a token with a sign before each end of line; what else could pass for one is written out."""
    return printable(text).translate(_WRITTEN_OUT).replace("\n", f"{_LINE_END}\n")


def _colour(tokens: Sequence[ShownToken], console: Console) -> None:
    from rich.text import Text

    text = Text()
    for number, token in enumerate(tokens):
        styles = _GROUNDS if token.trained else _PLAIN
        text.append(_visible(token.text), styles[number % 2])
    # The terminal breaks the lines: rich would drop the white space there.
    console.print(text, soft_wrap=True)


def doctor(as_json: AsJson = False) -> int:
    """Check this machine: versions, device, memory, disk, hub, and a small computation; what to paste into an issue.

    Exit code 4 where there is a problem, 0 where there are none or only warnings.
    """
    from true_kd.doctor import Diagnosis, examine_machine, verdict_of

    checks = []
    console = colour_console()
    for check in examine_machine():
        checks.append(check)
        if not as_json:
            _show_check(check, console)
    verdict = verdict_of(checks)
    if as_json:
        say_json(asdict(Diagnosis(verdict, tuple(checks))))
    else:
        counts = {name: sum(check.verdict == name for check in checks) for name in ("problem", "warning")}
        _say(f"{_number(counts['problem'], 'problem')}, {_number(counts['warning'], 'warning')}.")
    return 4 if verdict == "problem" else 0


_COLUMN = 9
_VERDICT_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def _show_check(check: Check, console: Console | None) -> None:
    """A check as people read it: the verdict, what was found, and below it what to do."""
    width = max(line_width(), 30) - _COLUMN
    lines = [f"{check.name}: {check.found}", *([check.advice] if check.advice else ())]
    wrap = partial(textwrap.wrap, width=width, break_long_words=False, break_on_hyphens=False)
    first, *others = [part for line in lines for part in wrap(printable(redact(line)))]
    if console is None:
        typer.echo(f"{check.verdict:<{_COLUMN}}{first}")
    else:
        from rich.text import Text

        text = Text.assemble((f"{check.verdict:<{_COLUMN}}", _VERDICT_STYLES[check.verdict]), first)
        console.print(text, soft_wrap=True)
    for line in others:
        typer.echo(f"{'':<{_COLUMN}}{line}")
