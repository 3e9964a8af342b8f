"""The configs and prompts that `true-kd init` lays out: from the wheel, or from the checkout they are written in."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from true_kd.errors import InputError
from true_kd.files import CannotWrite

_NAMES = ("configs", "prompts")


def source() -> Path:
    """The folder that holds the starter `configs` and `prompts`."""
    packaged = Path(__file__).parent / "starter_files"
    return packaged if packaged.is_dir() else Path(__file__).parents[1]


def lay_out(folder: Path) -> tuple[list[Path], list[Path]]:
    """Copy the starter files below `folder`; returns those written, and those found there and left alone.

    Raises
    ------
    InputError
        when a file lies where a folder belongs; nothing is written then.
    CannotWrite
        when a file cannot be written.
    """
    for place in (*reversed((folder, *folder.parents)), *(folder / name for name in _NAMES)):
        if os.path.lexists(place) and not place.is_dir():
            raise InputError(f"{place}: a file is in the way, expected a folder. Choose another one, or rename it.")
    written, kept = [], []
    for name in _NAMES:
        for file in sorted((source() / name).rglob("*")):
            target = folder / file.relative_to(source())
            if not file.is_file():
                continue
            if target.exists():
                kept.append(target)
                continue
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
            except OSError as error:
                raise CannotWrite(target, error) from error
            written.append(target)
    return written, kept
