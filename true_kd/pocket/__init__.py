"""The embedded pocket models, their prompts and their configs: data, named as `pocket:<path>` wherever a path goes."""

from __future__ import annotations

from pathlib import Path, PurePath

from true_kd.files import expand

_FOLDER = Path(__file__).parent
PREFIX = "pocket:"
BASE = "pocket:configs/base.yaml"
"""The config of `true-kd demo`."""


def locate(name: str, what: str) -> Path:
    """The path behind `name`: inside this package for `pocket:teacher` and the like, else `name` as it stands.

    `what` names the setting in messages.
    """
    below = PurePath(name.removeprefix(PREFIX))
    if name.startswith(PREFIX) and not below.is_absolute() and ".." not in below.parts:
        return expand(str(_FOLDER / below), what)
    return expand(name, what)
