"""The figures of the report, one function each.

Each takes the records of a run and gives a plot with the words around it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from true_kd.evaluation import Estimate
from true_kd.proof import PositionScores, Proof
from true_kd.report.drawing import COLOURS, NAMES, Figure, Key, Role, draw, short, whiskers
from true_kd.report.formats import places
from true_kd.report.reading import Chapter
from true_kd.reporting import KDResult

_HELD_OUT = "total, held out"

_RAW_POINTS = 800
"""Points of a curve that are drawn, at most."""

_SMOOTHED_FROM = 40
"""Steps from which on a curve is smoothed."""


def training_curves(result: KDResult) -> Figure:
    """The losses of every step, smoothed where there are many, and the objective on the held-out prompts."""
    steps = [step.iteration for step in result.steps]
    smoothed = len(steps) >= _SMOOTHED_FROM
    traces: list[dict[str, Any]] = []
    parts: tuple[Role, ...] = ("kd", "ce", "total")
    curves = {role: np.array([getattr(step, role) for step in result.steps]) for role in parts}
    for role in parts:
        line = {"color": COLOURS[role], "width": 2.4 if role == "total" else 1.6}
        shown = _smooth(curves[role]) if smoothed else curves[role]
        if smoothed:
            faint = {"line": {**line, "width": 1}, "opacity": 0.3, "hoverinfo": "skip", "hovertemplate": None}
            traces.append({"name": role, **_curve(steps, curves[role]), **faint})
        traces.append({"name": NAMES[role], **_curve(steps, shown), "line": line})
    traces.append(
        {
            "name": _HELD_OUT,
            "x": [point.iteration for point in result.validations],
            "y": [short(point.metrics.loss) for point in result.validations],
            "mode": "markers",
            "marker": {"color": COLOURS["total"], "size": 9, "symbol": "circle-open", "line": {"width": 2}},
            "hovertemplate": "%{y:.3f}",
        }
    )
    values = [*np.concatenate(list(curves.values())), *(point.metrics.loss for point in result.validations)]
    keys = [Key(NAMES[role], COLOURS[role]) for role in reversed(parts)]
    note = "Nats per response token, by optimizer step" + (
        "; faint: each step, strong: their running mean." if smoothed else "."
    )
    return Figure(
        "Training loss",
        note,
        (*keys, Key(_HELD_OUT, COLOURS["total"], "ring")),
        draw(traces, 270, "iteration", reach=4, xaxis=_steps_axis(steps[-1]), yaxis=_losses_axis(values)),
    )


def validation_curves(chapter: Chapter) -> Figure:
    """KL to the teacher and cross-entropy on the held-out prompts, beside those of the control."""
    runs: dict[Role, KDResult] = {"adapted": chapter.result}
    if chapter.control is not None:
        runs["control"] = chapter.control
    traces, values = [], []
    for measure, dash in (("ce", "dot"), ("kl", "solid")):
        for role, run in reversed(runs.items()):
            found = [getattr(point.metrics, measure) for point in run.validations]
            values += found
            traces.append(
                {
                    "name": f"{NAMES[role]}, {measure.upper()}",
                    "x": [point.iteration for point in run.validations],
                    "y": [short(value) for value in found],
                    "mode": "lines+markers",
                    "line": {"color": COLOURS[role], "width": 2 if measure == "kl" else 1.5, "dash": dash},
                    "marker": {
                        "size": [10 if point.iteration == run.best_iteration else 5 for point in run.validations],
                        "line": {"width": 0},
                        "opacity": 1,
                    },
                    "hovertemplate": "%{y:.3f}",
                }
            )
    keys = [
        Key(f"{NAMES[role]}, {words}", COLOURS[role], mark)
        for role in runs
        for words, mark in (("KL", "line"), ("CE", "dash"))
    ]
    return Figure(
        "On held-out prompts",
        "KL to the teacher at temperature 1, and cross-entropy on its text, nats per token; the large mark is the "
        "iteration that was kept.",
        tuple(keys),
        draw(traces, 270, "iteration", xaxis=_steps_axis(len(chapter.result.steps)), yaxis=_losses_axis(values)),
    )


def by_position(stretches: Sequence[PositionScores]) -> Figure:
    """Mean KL to the teacher by the place in the reply, before and after."""
    roles: list[Role] = ["student", "adapted"]
    if all(stretch.control is not None for stretch in stretches):
        roles.insert(1, "control")
    labels = [places(stretch.start, stretch.stop) for stretch in stretches]
    counts = [f"{stretch.tokens:,}" for stretch in stretches]
    traces = [
        {
            "name": NAMES[role],
            "x": labels,
            "y": [short(getattr(stretch, role)) for stretch in stretches],
            "customdata": counts,
            "mode": "lines+markers",
            "line": {"color": COLOURS[role], "width": 2, "dash": "dot" if role == "control" else "solid"},
            "marker": {"size": 7},
            "hovertemplate": "%{y:.3f} (%{customdata} tokens)",
        }
        for role in roles
    ]
    return Figure(
        "KL by place in the reply",
        "Nats per token to the teacher; places are counted from 0, in stretches that double.",
        tuple(Key(NAMES[role], COLOURS[role], "dash" if role == "control" else "line") for role in roles),
        draw(traces, 270, "token of the reply", xaxis={"type": "category"}, yaxis={"rangemode": "tozero"}),
    )


def agreement(proof: Proof) -> Figure:
    """How often the models want the teacher's token, and get a task right, with intervals."""
    models = {"student": proof.student, "control": proof.control, "adapted": proof.adapted, "teacher": proof.teacher}
    rows: list[tuple[str, dict[Role, Estimate | None]]] = []
    for label, measure in (("top-1", "top1_agreement"), ("top-5", "top5_agreement"), ("exact match", "exact_match")):
        found: dict[Role, Estimate | None] = {
            role: getattr(model, measure)
            for role, model in models.items()
            # The teacher agrees with itself.
            if model is not None and (role != "teacher" or measure == "exact_match")
        }
        if any(found.values()):
            rows.append((label, found))
    shown = dict.fromkeys(role for _, found in rows for role, estimate in found.items() if estimate)
    return Figure(
        "Agreement with the teacher",
        "Share of response tokens at which the teacher's first choice is the model's, or among its five"
        + ("; share of tasks answered right" if proof.tasks else "")
        + f".{_about_bars(rows)}",
        tuple(Key(NAMES[role], COLOURS[role], "dot") for role in shown),
        whiskers(rows, tuple(shown), (90.0, 100.0)),
    )


def overview(chapters: Sequence[Chapter]) -> Figure:
    """The share of the gap that was closed in each domain, with intervals."""
    rows: list[tuple[str, dict[Role, Estimate | None]]] = []
    for chapter in chapters:
        proof = chapter.result.proof
        if proof is not None:
            control = proof.control_gap_closed.kl if proof.control_gap_closed else None
            rows.append((chapter.result.domain, {"control": control, "adapted": proof.gap_closed.kl}))
    shown = dict.fromkeys(role for _, found in rows for role, estimate in found.items() if estimate)
    return Figure(
        "Share of the KL to the teacher that was closed",
        f"100% is the teacher itself, below 0% leads away from it.{_about_bars(rows)}",
        tuple(Key(NAMES[role], COLOURS[role], "dot") for role in shown),
        whiskers(rows, tuple(shown), (0.0, 100.0)),
    )


def _curve(steps: Sequence[int], values: np.ndarray) -> dict[str, Any]:
    every = -(-len(steps) // _RAW_POINTS)
    return {
        "x": list(steps[::every]),
        "y": [short(value) for value in values[::every]],
        "mode": "lines",
        "hovertemplate": "%{y:.3f}",
    }


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the curve, shorter towards its ends."""
    reach = max(2, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    own = np.minimum(reach, np.minimum(at, len(values) - 1 - at))
    return (sums[at + own + 1] - sums[at - own]) / (2 * own + 1)


def _steps_axis(last: int) -> dict[str, Any]:
    """From before the first iteration to the last; whole numbers only."""
    return {"range": [-0.03 * last, 1.03 * last], **({"dtick": 1} if last < 8 else {})}


def _losses_axis(values: Sequence[float]) -> dict[str, Any]:
    """Logarithmic where losses fall far, from zero where they do not."""
    low, high = min(values), max(values)
    if 0 < low < high / 20:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
        return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return {"rangemode": "tozero"}


def _about_bars(rows: Sequence[tuple[str, Mapping[Role, Estimate | None]]]) -> str:
    known = any(estimate and estimate.low is not None for _, row in rows for estimate in row.values())
    return " Bars: 95% intervals." if known else ""
