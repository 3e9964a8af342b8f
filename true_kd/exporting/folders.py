"""A folder that is there when it is whole, with a record of what was exported and how it was checked."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from true_kd.errors import InputError
from true_kd.files import TEMPORARY, CannotWrite, expand, flush, make_folder, sync_folder
from true_kd.locks import hold

RECORD = "true_kd_export.json"
"""What was exported, from what, and how far it is from the original; it also marks a folder that may be replaced."""
_LOCK = ".lock"


def destination(name: str) -> Path:
    """The folder that a user's name stands for, as a path whose last part is its name."""
    if not name.strip():
        raise InputError("--output '': empty, expected a folder. Write its path.")
    path = expand(name, "--output")
    return path if path.name not in ("", "..") else path.resolve()


def check_destination(folder: Path, force: bool) -> None:
    """Refuse a place where something lies that is not to be lost; `force` gives up an earlier export alone.

    Raises
    ------
    InputError
        with what lies there.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise InputError(f"{folder}: is there and no folder, expected a new or empty one. Choose another --output.")
    if folder.samefile(Path.cwd()):
        raise InputError(f"{folder}: is the current folder, expected one of its own. Choose another --output.")
    count = sum(1 for _ in folder.iterdir())
    if not count:
        return
    if not (folder / RECORD).is_file():
        raise InputError(
            f"{folder}: holds {count} entries and is no earlier export, expected a new or empty folder. "
            "Choose another --output."
        )
    if not force:
        raise InputError(f"{folder}: is an earlier export, expected a new folder. Give --force to replace it.")


@contextlib.contextmanager
def new_folder(folder: Path, force: bool) -> Iterator[Path]:
    """An empty folder beside `folder`, which takes its name and place when the block ends, and is gone if it fails.

    Raises
    ------
    InputError
        see `check_destination`.
    LockedError
        when another process writes the same export.
    CannotWrite
        when the disk is full, or the place cannot be written.
    """
    check_destination(folder, force)
    stage = folder.parent / f"{TEMPORARY}export-{folder.name}"
    if os.path.lexists(stage) and (stage.is_symlink() or not stage.is_dir()):
        raise InputError(f"{stage}: is in the way, expected nothing of this name. Move it, or choose another place.")
    made = [place for place in folder.parents if not place.exists()]
    try:
        make_folder(stage)
        with hold(stage / _LOCK):
            _clear(stage)
            try:
                yield stage
                _take_place(stage, folder)
            finally:
                if stage.exists():
                    shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise CannotWrite(folder, error) from error
    finally:
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()


def _clear(stage: Path) -> None:
    """Remove what a kill has left."""
    for path in stage.iterdir():
        if path.name.startswith(_LOCK):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _take_place(stage: Path, folder: Path) -> None:
    for path in stage.glob(f"{_LOCK}*"):
        path.unlink()
    for path in sorted(stage.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                flush(file.fileno())
    sync_folder(stage)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=TEMPORARY)) if folder.exists() else None
    if aside is not None:
        folder.rename(aside / folder.name)
    stage.rename(folder)
    sync_folder(folder.parent)
    if aside is not None:
        shutil.rmtree(aside)
