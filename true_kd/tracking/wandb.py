"""Weights & Biases: online where its user is logged in, else offline in the output folder, for `wandb sync`.

Of what wandb collects by itself (host, user, program, git, packages, hardware) nothing is sent.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from true_kd.tracking.runs import PROJECT, Run, Tracker, Value

_HOST = "https://api.wandb.ai"
_OFFLINE = ("offline", "dryrun", "disabled")


def start(run: Run) -> Tracker:
    """Begin a run, or go on with that of the same id."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        host="",
        username="",
        email="",
        program="",
        program_abspath="",
        program_relpath="",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    began = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or PROJECT,
        name=run.name,
        id=run.id,
        resume="allow",
        config=dict(run.settings),
        dir=str(run.root),
        mode=_mode(),
        settings=settings,
        reinit="finish_previous",
    )
    began.define_metric("iteration")
    began.define_metric("*", step_metric="iteration")
    return _Wandb(began)


def _mode() -> str | None:
    """None leaves it to wandb, which knows its user; without a key it would ask for one."""
    if os.environ.get("WANDB_MODE") in _OFFLINE or _has_key():
        return None
    return "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _HOST).hostname
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return host is not None and netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class _Wandb:
    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        # Not by wandb's own step, which never goes back: the control counts anew.
        self._run.log({**metrics, "iteration": step})

    def finish(self, summary: Mapping[str, Value], failed: bool) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=int(failed))
