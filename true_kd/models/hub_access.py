"""How the hub is reached from here: what huggingface_hub itself would use, without showing any of its secrets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HubAccess:
    """What a download would use."""

    token_from: str
    """Where its token comes from; "" where there is none. The token itself is not kept."""
    cache: Path
    """Folder of downloaded models."""
    offline: bool
    endpoint: str


def hub_access() -> HubAccess:
    """What huggingface_hub finds in the environment and its files."""
    from huggingface_hub import constants, get_token

    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    named = next((name for name in names if os.environ.get(name, "").strip()), "the token file")
    return HubAccess(
        token_from=named if get_token() else "",
        cache=Path(constants.HF_HUB_CACHE),
        offline=bool(constants.HF_HUB_OFFLINE),
        endpoint=constants.ENDPOINT,
    )
