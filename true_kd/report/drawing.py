"""How the figures of the report are drawn with plotly: axes, colours, and estimates as dots with whiskers.

A figure carries no title, legend or theme: the page writes those around it, so that they wrap, and follow light and
dark, as text does. Its colours are of middle lightness, with a contrast of at least 3 to a white and a near-black page.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from true_kd.evaluation import Estimate
from true_kd.report.formats import percent

if TYPE_CHECKING:
    import plotly.graph_objects as go

Role = Literal["student", "control", "adapted", "teacher", "total", "kd", "ce"]

COLOURS: Mapping[Role, str] = {
    "student": "#868e9b",
    "control": "#cc7414",
    "adapted": "#2f7fd8",
    "teacher": "#2b9a5f",
    "total": "#2f7fd8",
    "kd": "#9560d6",
    "ce": "#129595",
}

NAMES: Mapping[Role, str] = {
    "student": "student before",
    "control": "plain fine-tuning",
    "adapted": "distilled",
    "teacher": "teacher",
    "total": "total",
    "kd": "KD part",
    "ce": "CE part",
}

_RULE = "rgba(128,128,128,0.25)"
"""Of grids and dividing lines: faint on a light page and on a dark one."""


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    name: str
    colour: str
    mark: Literal["line", "dash", "dot", "ring"] = "line"


@dataclass(frozen=True)
class Figure:
    """A plot and the words around it."""

    title: str
    note: str
    legend: tuple[Key, ...]
    plot: go.Figure

    @property
    def height(self) -> int:
        """Pixels."""
        return int(self.plot.layout.height)


def whiskers(
    rows: Sequence[tuple[str, Mapping[Role, Estimate | None]]], roles: Sequence[Role], within: Sequence[float]
) -> go.Figure:
    """Estimates as dots with their intervals, in percent: one row each, the models of a row below each other.

    `within` are percentages that the axis reaches in any case.
    """
    traces, ends = [], []
    for role in roles:
        found = [(row, own[role]) for row, (_, own) in enumerate(rows) if own.get(role)]
        values = [_percent_of(estimate.value) for _, estimate in found]
        lows = [_percent_of(estimate.value if estimate.low is None else estimate.low) for _, estimate in found]
        highs = [_percent_of(estimate.value if estimate.high is None else estimate.high) for _, estimate in found]
        ends += [*values, *lows, *highs]
        traces.append(
            {
                "name": NAMES[role],
                "x": values,
                "y": [row + _offset(role, rows[row][1], len(roles)) for row, _ in found],
                "mode": "markers",
                "marker": {"color": COLOURS[role], "size": 9, "symbol": "diamond" if role == "teacher" else "circle"},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [short(high - value) for high, value in zip(highs, values, strict=True)],
                    "arrayminus": [short(value - low) for low, value in zip(lows, values, strict=True)],
                    "color": COLOURS[role],
                    "thickness": 2,
                    "width": 4,
                },
                "customdata": [_spelled(rows[row][0], NAMES[role], estimate) for row, estimate in found],
                "hovertemplate": "%{customdata}<extra></extra>",
            }
        )
    low, high = min([*ends, *within]), max([*ends, *within])
    room = 0.03 * (high - low)
    count = max(len(rows), 1)
    figure = draw(
        traces,
        40 + (22 * len(roles) + 12) * count,
        hovermode="closest",
        xaxis={"range": [low - room, high + room], "ticksuffix": "%", "zeroline": low < 0},
        yaxis={
            "range": [count - 0.5, -0.5],
            "tickvals": list(range(len(rows))),
            "ticktext": [html.escape(label if len(label) <= 24 else f"{label[:23]}…") for label, _ in rows],
            "showgrid": False,
        },
    )
    for row in range(1, len(rows)):
        figure.add_hline(row - 0.5, line={"color": _RULE, "width": 1}, layer="below")
    return figure


def _offset(role: Role, row: Mapping[Role, Estimate | None], most: int) -> float:
    """Where a model's dot lies in its row, of height 1 and with room for `most`: those there are keep to the middle."""
    there = [name for name, estimate in row.items() if estimate]
    return 0.8 / most * (there.index(role) - (len(there) - 1) / 2)


def _spelled(label: str, name: str, estimate: Estimate) -> str:
    span = ""
    if estimate.low is not None and estimate.high is not None:
        span = f" ({percent(estimate.low)} to {percent(estimate.high)})"
    return f"{html.escape(label)}, {name}: {percent(estimate.value)}{html.escape(span)}"


def draw(
    traces: Sequence[Mapping[str, Any]],
    height: int,
    along: str = "",
    hovermode: str = "x unified",
    reach: int = 60,
    xaxis: Mapping[str, Any] | None = None,
    yaxis: Mapping[str, Any] | None = None,
) -> go.Figure:
    """A plot of scatter traces; `along` names the x axis, `reach` is how near in pixels the pointer must come."""
    import plotly.graph_objects as go

    axis = {"automargin": True, "showline": False, "zeroline": False, "fixedrange": True, "gridcolor": _RULE}
    return go.Figure(
        [go.Scatter(cliponaxis=False, showlegend=False, **trace) for trace in traces],
        go.Layout(
            template=go.layout.Template(),
            height=height,
            autosize=True,
            margin={"l": 8, "r": 14, "t": 10, "b": 8},
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            hovermode=hovermode,
            hoverdistance=reach,
            hoverlabel={"bgcolor": "#23272f", "bordercolor": "#23272f", "font": {"color": "#f1f3f6", "size": 12}},
            font={"family": "inherit", "size": 12, "color": "#808080"},
            dragmode=False,
            xaxis={
                **axis,
                "ticklabelstandoff": 5,
                "spikethickness": 1,
                **({"title": {"text": along, "standoff": 8}} if along else {}),
                **(xaxis or {}),
            },
            yaxis={**axis, **(yaxis or {})},
        ),
    )


def _percent_of(value: float) -> float:
    return short(100 * value)


def short(value: float) -> float:
    """Enough digits for any screen."""
    return float(f"{value:.4g}")
