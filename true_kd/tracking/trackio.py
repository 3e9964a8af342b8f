"""Trackio: a local database, or a Space of the user's where TRACKIO_SPACE_ID names one; `trackio show` shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from true_kd.tracking.runs import PROJECT, Run, Tracker, Value


def start(run: Run) -> Tracker:
    """Begin a run, or go on with that of the same name."""
    import trackio

    began = trackio.init(
        project=PROJECT,
        name=run.name,
        config=dict(run.settings),
        resume="allow" if run.made else "never",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    return _Trackio(began)


class _Trackio:
    def __init__(self, run: Any) -> None:
        self._run = run
        self._step = 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)
        self._step = step

    def finish(self, summary: Mapping[str, Value], failed: bool) -> None:
        import trackio

        if summary:
            self._run.log(dict(summary), step=self._step)
        # Not the run's own finish, which trackio does not know of: at the end of the process it would do it again.
        trackio.finish()
