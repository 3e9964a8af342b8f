"""TensorBoard: event files in each domain's folder, which `tensorboard --logdir adapters_kd` finds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from true_kd.tracking.runs import Run, Tracker, Value

FOLDER = "tensorboard"
"""Inside a domain's folder."""
_FLUSH = 5
"""Seconds after which a number is in the file."""


def start(run: Run) -> Tracker:
    """Begin a file of events; those that an earlier part wrote of later steps are void, as they are made again."""
    from tensorboardX import SummaryWriter

    folder = run.folder / FOLDER
    if folder.is_symlink():
        raise OSError(f"{FOLDER} is a link, expected a folder of its own")
    # The names of files tell seconds alone.
    suffix = f".{run.made}"
    purged = run.made + 1 if run.made else 0
    writer = SummaryWriter(str(folder), purge_step=purged, flush_secs=_FLUSH, filename_suffix=suffix)
    table = ["| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in run.settings.items())]
    writer.add_text("settings", "\n".join(table), run.made)
    return _TensorBoard(writer)


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._step = 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._step = step

    def finish(self, summary: Mapping[str, Value], failed: bool) -> None:
        for name, value in summary.items():
            if isinstance(value, str):
                self._writer.add_text(name, value, self._step)
            else:
                self._writer.add_scalar(name, value, self._step)
        self._writer.close()
