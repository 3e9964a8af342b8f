"""Shows a comparison: replies side by side, each token on a ground that is the darker the further the models part.

Without colours the tokens of highest KL are named below each text instead, which is also what a pipe gets, without any
escape code.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from heapq import nlargest
from itertools import zip_longest
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from true_kd.comparing import BaseProof, Comparison, Side
from true_kd.suggest import printable, quote

BOUNDS = (0.1, 0.3, 1.0, 3.0)
"""Nats at which a token takes the next shade; below the first it has none."""

# Black on yellow to red, ever darker: readable on light and dark terminals, and without telling red from green.
_STYLES = ("", "black on color(229)", "black on color(221)", "black on color(209)", "black on color(203)")
_NAMES = {"base": "base", "adapted": "with adapter", "teacher": "teacher"}
_WIDE = 100
_NAMED = 4


def show_comparison(comparison: Comparison, notes: Sequence[str]) -> None:
    """Print a comparison to stdout, and notes below it."""
    console = _console()
    if console is None:
        for side in comparison.sides:
            _say(f"{_title(side)}\n{side.text}\n")
            _say("".join(f"{line}\n" for line in _facts(side, comparison)))
        for line in (*notes, *comparison.warnings, _proved(comparison.proof, comparison.base.model)):
            _say(line)
        return
    shades = console.color_system is not None
    texts = {side.name: _shaded(side) if shades else Text(printable(side.text)) for side in comparison.sides}
    if console.width >= _WIDE:
        table = Table(expand=True, pad_edge=False, header_style="bold", show_edge=False)
        for side in comparison.sides:
            table.add_column(Text(printable(_title(side))), ratio=1, overflow="fold")
        table.add_row(*texts.values(), end_section=True)
        facts = [_facts(side, comparison) for side in comparison.sides]
        for line in zip_longest(*facts, fillvalue=""):
            table.add_row(*(Text(printable(cell)) for cell in line))
        console.print(table)
    else:
        for side in comparison.sides:
            console.print(Text(printable(_title(side)), "bold"))
            console.print(texts[side.name])
            for line in _facts(side, comparison):
                console.print(Text(printable(line), "dim"))
            console.print()
    if shades:
        console.print(_legend())
    for line in (*notes, *comparison.warnings, _proved(comparison.proof, comparison.base.model)):
        console.print(Text(printable(line)))


def _console() -> Console | None:
    """Where stdout is a terminal: with colours unless NO_COLOR is set; None where it is none, or can do nothing."""
    if not sys.stdout.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        return None
    plain = bool(os.environ.get("NO_COLOR"))
    return Console(color_system=None if plain else "auto", no_color=plain, highlight=False)


def _say(text: str) -> None:
    typer.echo(printable(text))


def _title(side: Side) -> str:
    return f"{_NAMES[side.name]} ({side.model})"


def _step(kl: float) -> int:
    return sum(kl >= bound for bound in BOUNDS)


def _marks(side: Side) -> Iterator[tuple[str, float]]:
    """Pieces of the text, each with the highest KL of the tokens that make it; the end of the reply is the last one."""
    highest = 0.0
    for piece, kl in zip(side.pieces, side.kl, strict=True):
        highest = max(highest, kl)
        if piece:
            yield piece, highest
            highest = 0.0
    yield "", highest


def _shaded(side: Side) -> Text:
    text = Text()
    for piece, kl in _marks(side):
        style = _STYLES[_step(kl)]
        if not piece:
            end = "end" if side.finished == "stop" else ""
            text.append(f" {end}" if end and style else "", style)
        elif style:
            # The ground of a line's end has no width: a sign stands for it.
            text.append(printable(piece.replace("\n", "↵\n")), style)
        else:
            text.append(printable(piece))
    return text


def _legend() -> Text:
    text = Text("KL at each token, in nats: ")
    names = (f"below {BOUNDS[0]:g}", *(f"from {bound:g}" for bound in BOUNDS))
    for name, style in zip(names, _STYLES, strict=True):
        text.append(f" {name} ", style)
    return text


def _facts(side: Side, comparison: Comparison) -> list[str]:
    """What a person reads below a side's text."""
    before = f", {sum(comparison.base_on_teacher) / len(side.tokens):.3f} without adapter" * (side.name == "teacher")
    lines = [f"{side.measure}: {side.mean_kl:.3f} on average over {_count(len(side.tokens))}{before}"]
    high = [at for at in nlargest(_NAMED, range(len(side.kl)), key=side.kl.__getitem__) if side.kl[at] >= BOUNDS[0]]
    if high:
        named = (f"{_token(side, at)} {side.kl[at]:.2f}" for at in sorted(high))
        lines.append(f"highest: {', '.join(named)}")
    if side.finished == "length":
        lines.append(f"cut after {_count(len(side.tokens))} (--max-tokens)")
    reference = comparison.teacher or comparison.base
    if side is not reference:
        lines.append(_parting(side, reference))
    return lines


def _token(side: Side, at: int) -> str:
    if at == len(side.tokens) - 1 and side.finished == "stop":
        return "the end"
    return quote(side.pieces[at])


def _parting(side: Side, other: Side) -> str:
    """Where two texts part."""
    whose = {"teacher": "the teacher's", "base": "the base's"}[other.name]
    pairs = zip(side.tokens, other.tokens, strict=False)
    at = next((at for at, (one, two) in enumerate(pairs) if one != two), min(len(side.tokens), len(other.tokens)))
    if at == len(side.tokens) == len(other.tokens):
        return f"the same text as {whose}"
    if at in (len(side.tokens), len(other.tokens)):
        return f"{whose} text as far as both go, {_count(at)}"
    return f"parts from {whose} text at token {at + 1}: {_token(side, at)}, there {_token(other, at)}"


def _count(tokens: int) -> str:
    return f"{tokens:,} token{'s' * (tokens != 1)}"


def _proved(proof: BaseProof, student: str) -> str:
    moves = f" The adapter moves them by up to {proof.largest_change:.3g}." if proof.largest_change else ""
    return (
        f"The base side is {student} itself: its {proof.tensors} weight tensors (SHA-256 {proof.digest[:12]}) and its "
        f"logits at {_count(proof.tokens)} are, bit for bit, those of a second opening without adapter.{moves}"
    )


def comparison_facts(comparison: Comparison) -> dict[str, Any]:
    """A comparison for programs."""
    return {
        "sides": {side.name: _side(side) for side in comparison.sides},
        "base_on_teacher": [_number(kl) for kl in comparison.base_on_teacher],
        "base_proof": vars(comparison.proof),
    }


def _side(side: Side) -> dict[str, Any]:
    tokens = zip(side.tokens, side.pieces, side.kl, strict=True)
    return {
        "model": side.model,
        "text": side.text,
        "finish_reason": side.finished,
        "measure": side.measure,
        "mean_kl": _number(side.mean_kl),
        "tokens": [{"id": token, "text": piece, "kl": _number(kl)} for token, piece, kl in tokens],
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
