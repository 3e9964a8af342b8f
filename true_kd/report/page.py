"""Fills the page: words and figures of every domain into one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from true_kd import __version__, adapters
from true_kd.files import write_atomic
from true_kd.report import figures, formats
from true_kd.report.drawing import COLOURS, NAMES, Figure, Role
from true_kd.report.reading import Chapter, read_chapter, with_earlier
from true_kd.report.sentence import headline
from true_kd.report.tokens import LEVELS, shade
from true_kd.reporting import KDResult, now, peak_memory
from true_kd.suggest import printable

_FILES = Path(__file__).parent

_PHASES = {
    "capture": "teacher's replies",
    "training": "training",
    "evaluation": "evaluation",
    "control": "plain fine-tuning",
}


def write_report(out: Path, results: Sequence[KDResult], failures: Mapping[str, str]) -> Path:
    """Write report.html over a run's results, its failures, and domains finished in `out` before.

    Raises
    ------
    CannotWrite
        where the file cannot be written.
    """
    every = with_earlier(out, results, failures)
    return save_report(out / adapters.REPORT, build_report(every.results, every.failures))


def save_report(path: Path, page: str) -> Path:
    """Write a page, whole or not at all."""
    write_atomic(path, lambda temporary: temporary.write_text(page, encoding="utf-8", newline="\n"))
    return path


def build_report(results: Sequence[KDResult], failures: Mapping[str, str]) -> str:
    """The page over some domains, complete; what lies beside their adapters is read."""
    chapters = [read_chapter(result) for result in results]
    plotly, script = _plotly(), (_FILES / "page.js").read_text(encoding="utf-8")
    measured = [chapter for chapter in chapters if chapter.result.proof is not None]
    return _template().render(
        title=headline(results, failures),
        chapters=chapters,
        failures=failures,
        overview=figures.overview(measured) if len(measured) > 1 else None,
        models=sorted({(result.teacher, result.student) for result in results}),
        has_control=any(chapter.result.proof.control for chapter in measured),
        has_tasks=any(chapter.result.proof.tasks for chapter in measured),
        made=now(),
        version=__version__,
        plotly=Markup(plotly),
        script=Markup(script),
        policy=_policy(plotly, script),
    )


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _policy(*scripts: str) -> str:
    """What a browser may do with the page: run these scripts and no other, and load nothing."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


@cache
def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(_FILES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: _text(value) if type(value) is str else value,
    )
    environment.globals |= {
        "figures": figures,
        "colours": COLOURS,
        "names": NAMES,
        "levels": LEVELS,
        "phases": _phases,
        "memory": _memory,
    }
    environment.filters |= {
        "amount": formats.amount,
        "cosine": formats.cosine,
        "data": _data,
        "duration": formats.duration,
        "number": formats.number,
        "percent": formats.percent,
        "points": formats.points,
        "ratio": formats.ratio,
        "shade": shade,
        "share": formats.share,
        "short_place": _short_place,
        "size": formats.size,
        "spoken": _spoken,
        "standings": _standings,
    }
    return environment.get_template("page.html.jinja")


_TURNS = {ord(letter): f"\\u{ord(letter):04x}" for letter in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}


def _text(text: str) -> str:
    """Text without the characters that a prompt may hold and a page must not: controls, half surrogate pairs, and
    those that turn the order of what follows."""
    return printable(text).translate(_TURNS)


def _data(figure: Figure) -> Markup:
    """A figure as JSON that can stand inside a script element: no character of it can end one."""
    text = figure.plot.to_json()
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _spoken(result: KDResult) -> str:
    """The verdict, as it reads below the name of its domain."""
    assert result.proof is not None
    sentence = result.proof.verdict.sentence.removeprefix(f"{result.domain}: ")
    return f"{sentence[:1].upper()}{sentence[1:]}"


def _standings(chapter: Chapter) -> list[tuple[Role, Any]]:
    """The models that were measured, in the order of the table."""
    proof = chapter.result.proof
    assert proof is not None
    rows: list[tuple[Role, Any]] = [("student", proof.student), ("control", proof.control)]
    rows += [("adapted", proof.adapted), ("teacher", proof.teacher)]
    return [(role, scores) for role, scores in rows if scores is not None]


def _phases(result: KDResult) -> list[tuple[str, str, float]]:
    """Name, time in words, and share of the longest, of each phase that took time."""
    longest = max(result.seconds.values(), default=0.0)
    return [
        (_PHASES.get(name, name), formats.duration(seconds), seconds / longest)
        for name, seconds in result.seconds.items()
        if seconds > 0
    ]


def _memory(result: KDResult) -> list[tuple[str, str, float]]:
    """Name, peak in words, and share of the larger, of both phases."""
    peaks = peak_memory([result])
    named = (("with the teacher", peaks.capture), ("with the student", peaks.training))
    return [(words, formats.size(peak), peak / peaks.run) for words, peak in named if peak]


def _short_place(where: str) -> str:
    """The last two parts of "folder/domain/valid.jsonl:36": enough to find it, and nothing about the machine."""
    return "/".join(where.replace("\\", "/").split("/")[-2:])
