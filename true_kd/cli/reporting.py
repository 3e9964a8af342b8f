"""`report`: the page of a run built again, and on the terminal its verdicts, a table and sparklines."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from true_kd.cli.flags import AsJson, Domains
from true_kd.cli.output import say_json
from true_kd.errors import InputError
from true_kd.suggest import did_you_mean, printable, quote

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from true_kd.report import Finished
    from true_kd.reporting import KDResult


_UNBOUNDED = 10_000


def report(
    folder: Annotated[
        str | None,
        typer.Argument(help="The folder of a run, or of one domain in it; the base config's `out` if left away."),
    ] = None,
    domain: Domains = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the page here.", show_default=False)] = None,
    no_html: Annotated[bool, typer.Option("--no-html", help="Write no page.")] = False,
    as_json: AsJson = False,
) -> int:
    """Build the report of finished domains again: report.html in their folder, and the gist of it here."""
    from true_kd.adapters import REPORT
    from true_kd.console import make_console
    from true_kd.files import expand
    from true_kd.finding import output_folder
    from true_kd.report import build_report, find_finished, save_report

    if html is not None and no_html:
        raise InputError(f"--html {quote(str(html))}: together with --no-html, expected one of them. Leave one away.")
    if html is not None and html.is_dir():
        raise InputError(f"--html {quote(str(html))}: a folder, expected the name of a file. Add one to it.")
    root = output_folder() if folder is None else expand(folder, "FOLDER")
    found = _limit(find_finished(root), domain or [], root)
    path = None if no_html else save_report(html or root / REPORT, build_report(found.results, found.failures))
    if as_json:
        say_json(_records(found))
    else:
        show(make_console(sys.stdout), found.results, found.failures, path)
    return 0


def show(console: Console, results: Sequence[KDResult], failures: Mapping[str, str], page: Path | None) -> None:
    """Print verdicts, table and sparklines as wide as the console is, and where the page lies."""
    from true_kd.console import results_table

    plain = _is_plain(console)
    for result in results:
        _say(console, result.proof.verdict.sentence if result.proof else f"{result.domain}: not measured.")
    for domain, why in failures.items():
        _say(console, f"{domain}: failed: {why}")
    console.print()
    table = results_table(results, "->" if plain else "→")
    if console.measure(table, options=console.options.update_width(_UNBOUNDED)).maximum > console.width:
        table = _stacked(table)
    console.print(table)
    for result in results:
        console.print()
        for line in curves(result, console.width, plain):
            _say(console, line)
    if page is not None:
        console.print()
        console.print(printable(f"Report: {page}"), markup=False, highlight=False, emoji=False, soft_wrap=True)


def curves(result: KDResult, width: int, plain: bool) -> list[str]:
    """Sparklines of a domain: its training loss, and its KL by place in the reply before and after."""
    losses = [step.total for step in result.steps]
    room = max(8, min(40, width - 36))
    lines = [f"{result.domain}", _line("training loss", losses, losses, room, plain)]
    if result.proof is not None:
        before = [stretch.student for stretch in result.proof.by_position]
        after = [stretch.adapted for stretch in result.proof.by_position]
        lines.append(_line("KL before", before, [0.0, *before, *after], room, plain))
        lines.append(_line("KL after", after, [0.0, *before, *after], room, plain))
        last = result.proof.by_position[-1].stop - 1
        lines.append(f"  (KL by place in the reply, from token 0 to {last})")
    return lines


def sparkline(values: Sequence[float], scale: Sequence[float], width: int, plain: bool) -> str:
    """Values as blocks, at most `width` of them; `scale` holds what the lowest and the highest block stand for."""
    blocks = "_.:-=+*#" if plain else "▁▂▃▄▅▆▇█"
    low, high = min(scale), max(scale)
    count = min(width, len(values))
    ends = [len(values) * at // count for at in range(count + 1)]
    means = [sum(values[start:stop]) / (stop - start) for start, stop in pairwise(ends)]
    step = (high - low) / len(blocks) or 1.0
    return "".join(blocks[max(0, min(len(blocks) - 1, int((mean - low) / step)))] for mean in means)


def _line(name: str, values: Sequence[float], scale: Sequence[float], width: int, plain: bool) -> str:
    drawn = sparkline(values, scale, width, plain)
    return f"  {name:<14}{drawn}  {values[0]:.3f} {'->' if plain else '→'} {values[-1]:.3f}"


def _is_plain(console: Console) -> bool:
    """Whether only ASCII can be shown."""
    return console.options.ascii_only or (console.is_terminal and os.environ.get("TERM") in ("dumb", "unknown"))


def _say(console: Console, line: str) -> None:
    console.print(printable(line), markup=False, highlight=False, emoji=False)


def _stacked(table: Table) -> Table:
    """The same cells one below the other, for consoles that are too narrow."""
    from rich.table import Table

    stacked = Table(box=None, pad_edge=False, show_header=False)
    stacked.add_column(no_wrap=True)
    stacked.add_column(overflow="fold")
    names = [str(column.header) for column in table.columns]
    for first, *others in zip(*(column.cells for column in table.columns), strict=True):
        stacked.add_row(first, "")
        for name, cell in zip(names[1:], others, strict=True):
            stacked.add_row(f"  {name}", cell)
    return stacked


def _limit(found: Finished, named: Sequence[str], root: Path) -> Finished:
    """Only the domains that were named; all where none was."""
    if not named:
        return found
    known = {result.domain: result for result in found.results}
    for domain in named:
        if domain not in known:
            why = f"{found.failures[domain]}" if domain in found.failures else "no finished domain of this name"
            hint = did_you_mean(domain, known) or "."
            raise InputError(f"{root}: --domain {quote(domain)}: {why}{hint} Domains here: {', '.join(known)}.")
    return type(found)(tuple(known[domain] for domain in dict.fromkeys(named)), {})


def _records(found: Finished) -> dict[str, Any]:
    """The part of kd_summary.json that tells of these domains."""
    from true_kd.reporting import FORMAT, summarize

    domains = {result.domain: asdict(summarize(result)) for result in found.results}
    return {"format": FORMAT, "domains": domains, "failed": dict(found.failures)}
