"""Where a project's things lie unless it says otherwise, and what the files of an adapter folder are called.

Imports nothing of weight, because a shell that completes a name waits for it.
"""

from __future__ import annotations

from pathlib import Path

BASE = Path("configs") / "base.yaml"
"""The base file that is read when `--config` names no other."""
PROMPTS = "prompts"
"""The folder of prompts where no config names another."""
OUT = "adapters_kd"
"""The folder of the adapters where no config names another."""

CONFIG_SCHEMA = "config.schema.json"
"""The JSON schema of a config: beside the configs of a project, for editors, and in `schemas/` of this package."""

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
METRICS = "kd_metrics.json"
LINES = "metrics.jsonl"
RUN = "run.json"
SUMMARY = "kd_summary.json"
REPORT = "report.html"
SWEEP = "sweep"
"""Folder inside an output folder that holds one output folder per point of a sweep."""
CONTROL = "control_sft"
"""Folder inside that of a domain: the adapter of the control, with the files of a domain of its own."""


def holds_adapter(folder: Path) -> bool:
    """Whether the files of an adapter are there."""
    return all((folder / name).is_file() for name in (WEIGHTS, CONFIG))


def domains_in(root: Path) -> list[str]:
    """The names of the folders in an output folder that hold an adapter, sorted."""
    return sorted(path.name for path in root.iterdir() if holds_adapter(path)) if root.is_dir() else []
