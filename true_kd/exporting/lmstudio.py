"""Where LM Studio looks for models: `<root>/models/<publisher>/<model>/`."""

from __future__ import annotations

import re
from pathlib import Path

from true_kd.errors import InputError
from true_kd.exporting import fused
from true_kd.exporting.folders import destination
from true_kd.exporting.reading import Adapter

PUBLISHER = "true-kd"


def place(adapter: Adapter, output: str | None) -> Path:
    """The folder of the model, below `output` or LM Studio's own folder where it is there.

    Raises
    ------
    InputError
        where LM Studio is not installed and no folder is named.
    """
    if output is not None:
        root = destination(output)
    else:
        root = Path("~/.lmstudio").expanduser()
        if not root.is_dir():
            raise InputError(
                "--to lmstudio: no ~/.lmstudio here, expected LM Studio's folder. Give --output FOLDER; the model goes "
                f"to FOLDER/models/{PUBLISHER}/."
            )
    return root / "models" / PUBLISHER / model_name(adapter)


def model_name(adapter: Adapter) -> str:
    """Student and domain, of characters that any file system takes."""
    student = adapter.student.model.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    return re.sub(r"[^\w.-]+", "-", f"{student}-{adapter.name}")


EXPORTER = fused.EXPORTER
