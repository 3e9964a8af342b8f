"""SwanLab: online where its user is logged in, else offline in the output folder, for `swanlab sync`.

Of what it collects by itself (hardware, runtime, packages, git, the terminal) nothing is recorded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from true_kd.tracking.runs import PROJECT, Run, Tracker, Value

_FOLDER = "swanlog"


def start(run: Run) -> Tracker:
    """Begin a run, or online go on with that of the same id."""
    import swanlab

    nothing = {"hardware": False, "runtime": False, "requirements": False, "git": False, "monitor": False}
    settings = swanlab.Settings(
        interactive=False,
        probe=swanlab.Settings.Probe(conda=False, swanlab=False, **nothing),
        terminal=swanlab.Settings.Terminal(proxy_type="none"),
    )
    mode = os.environ.get("SWANLAB_MODE") or ("online" if _has_key() else "offline")
    began = swanlab.init(
        project=os.environ.get("SWANLAB_PROJECT") or PROJECT,
        name=run.name,
        id=run.id if mode == "online" else None,
        resume="allow" if mode == "online" else None,
        config=dict(run.settings),
        log_dir=str(run.root / _FOLDER),
        mode=mode,
        settings=settings,
    )
    return _SwanLab(began)


def _has_key() -> bool:
    root = os.environ.get("SWANLAB_ROOT") or os.environ.get("SWANLAB_SAVE_DIR") or "~/.swanlab"
    return bool(os.environ.get("SWANLAB_API_KEY")) or (Path(root).expanduser() / ".netrc").is_file()


class _SwanLab:
    def __init__(self, run: Any) -> None:
        self._run = run
        self._step = 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)
        self._step = step

    def finish(self, summary: Mapping[str, Value], failed: bool) -> None:
        numbers = {name: value for name, value in summary.items() if not isinstance(value, str)}
        if numbers:
            self._run.log(numbers, step=self._step)
        self._run.config.update({name: value for name, value in summary.items() if isinstance(value, str)})
        if failed:
            self._run.finish(state="crashed", error="the domain failed")
        else:
            self._run.finish()
