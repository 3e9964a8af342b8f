"""What `true-kd init` lays out: the configs and prompts that come along, or one new domain to fill.

From the wheel, or from the checkout they are written in. What is there already is never written over.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from true_kd.errors import InputError
from true_kd.files import staging
from true_kd.layout import BASE, CONFIG_SCHEMA
from true_kd.prompts import SPLITS, check_domain_name, split_files
from true_kd.suggest import quote

_NAMES = ("configs", "prompts")
_TEMPLATE = Path(__file__).parent / "new_domain"


def source() -> Path:
    """The folder that holds the starter `configs` and `prompts`."""
    packaged = Path(__file__).parent / "starter_files"
    return packaged if packaged.is_dir() else Path(__file__).parents[1]


@dataclass(frozen=True)
class LaidOut:
    """What was written, and what was found there and left alone."""

    written: tuple[Path, ...]
    kept: tuple[Path, ...]


def lay_out(folder: Path) -> LaidOut:
    """Copy the starter files below `folder`.

    Raises
    ------
    InputError
        when a file lies where a folder belongs; nothing is written then.
    CannotWrite
        when a file cannot be written.
    """
    _refuse_files(folder, [folder / name for name in _NAMES])
    files = [file for name in _NAMES for file in sorted((source() / name).rglob("*")) if file.is_file()]
    return _copy({folder / file.relative_to(source()): file for file in files})


def lay_out_domain(folder: Path, prompts: Path, domain: str) -> LaidOut:
    """Lay out one new domain in the project in `folder`, and where there is none its base config as well.

    Parameters
    ----------
    prompts
        the project's folder of prompts, in which that of the domain goes.

    Raises
    ------
    InputError
        when the name cannot be one, the domain has prompts already, or something else lies where a folder belongs;
        nothing is written then.
    CannotWrite
        when a file cannot be written.
    """
    check_domain_name(domain)
    if domain == BASE.stem:
        raise InputError(
            f"domain {quote(domain)}: its config would be {BASE}, which holds for all. Choose another name."
        )
    own, configs = prompts / domain, folder / BASE.parent
    _refuse_files(folder, [configs, prompts, own])
    if own.is_symlink():
        raise InputError(f"{own}: a link, expected a folder of its own. Remove the link, or choose another name.")
    if own.is_dir() and (found := split_files(own, "train")):
        raise InputError(f"{found[0]}: the domain is there already, expected a new one. Choose another name.")
    laid_out = _copy(
        {
            folder / BASE: source() / BASE,
            configs / CONFIG_SCHEMA: source() / BASE.parent / CONFIG_SCHEMA,
            configs / f"{domain}.yaml": _TEMPLATE / "config.yaml",
        }
    )
    kept = [path for path in (own / "system.md",) if os.path.lexists(path)]
    kept += [path for split in SPLITS if own.is_dir() for path in split_files(own, split)]
    taken = {path.stem for path in kept}
    # The training prompts make it a domain: they come last.
    with staging(own, last="train.jsonl") as stage:
        new = [file for file in sorted(_TEMPLATE.iterdir()) if file.suffix != ".yaml" and file.stem not in taken]
        for file in new:
            stage.write(file.name, lambda path, file=file: shutil.copyfile(file, path))
    written = (*laid_out.written, *(own / file.name for file in new))
    return LaidOut(written, (*laid_out.kept, *kept))


def _refuse_files(folder: Path, below: Iterable[Path]) -> None:
    for place in (*reversed((folder, *folder.parents)), *below):
        if os.path.lexists(place) and not place.is_dir():
            raise InputError(f"{place}: a file is in the way, expected a folder. Choose another one, or rename it.")


def _copy(files: dict[Path, Path]) -> LaidOut:
    """Copy each file to its target, where there is none."""
    written, kept = [], []
    for target, file in files.items():
        if os.path.lexists(target):
            kept.append(target)
            continue
        with staging(target.parent) as stage:
            stage.write(target.name, lambda path, file=file: shutil.copyfile(file, path))
        written.append(target)
    return LaidOut(tuple(written), tuple(kept))
