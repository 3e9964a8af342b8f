"""Finds the teacher that a cache's replies are of, as far as the cache knows it: all but its weights."""

from __future__ import annotations

from pathlib import Path

from true_kd.errors import CacheError, InputError
from true_kd.manifest import TEACHER
from true_kd.stores.checking import check_file
from true_kd.stores.reading import find
from true_kd.stores.transfer import other_format


def find_teacher(root: Path, prefix: str) -> tuple[Path, str]:
    """The stand-in of a teacher, proved to be that of the cache whose key begins with `prefix`, and its name.

    Raises
    ------
    InputError
        when there is not just one such cache, or it has no stand-in.
    CacheError
        when it is damaged.
    """
    store = find(root, prefix)
    if not store.is_current:
        raise InputError(other_format(store.folder, store.format))
    if TEACHER not in store.files:
        raise InputError(
            f"{store.folder}: no {TEACHER} in it, expected what stands in for the teacher. Run `true-kd capture` again "
            "where the teacher is, and export and import the cache again."
        )
    finding = check_file(store.folder, store.files[TEACHER], store.identity)
    if finding.state != "whole":
        raise CacheError(
            f"{store.folder / TEACHER}: {finding.state} ({finding.reason}), expected the teacher of this cache. Import "
            "it again."
        )
    return store.folder / TEACHER, store.teacher
