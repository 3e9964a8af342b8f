"""The hub, proxies, and who works in the folders of a run; secrets are looked for and never shown."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from true_kd.doctor.verdicts import Check
from true_kd.errors import TrueKDError
from true_kd.locks import Lock
from true_kd.models import HubAccess
from true_kd.suggest import redact

_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")


def check_hub(hub: HubAccess) -> Iterator[Check]:
    """Whether models can be downloaded."""
    if hub.token_from:
        yield Check("hub token", "ok", f"there, from {hub.token_from}; it is not shown")
    else:
        yield Check("hub token", "ok", "none; gated models need one (hf auth login)")
    if hub.offline:
        yield Check(
            "hub",
            "warning",
            "HF_HUB_OFFLINE is set",
            "Models that are not downloaded yet cannot be opened. Unset it to download them.",
        )
    else:
        yield Check("hub", "ok", host_of(hub.endpoint))


def check_proxies(environment: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """Which proxies downloads go through, without the names and passwords in them."""
    for name in _PROXIES:
        value = environment.get(name) or environment.get(name.lower())
        if value:
            yield Check("proxy", "ok", f"{name} is {host_of(value)}")


def host_of(address: str) -> str:
    """Host and port of an address, and nothing else of it."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        port = "" if parts.port is None else f":{parts.port}"
        return redact(f"{parts.hostname}{port}") if parts.hostname else "set, and no address"
    except ValueError:
        return "set, and no address"


def check_locks(folders: Mapping[str, Path]) -> Iterator[Check]:
    """Who works in the folders of a run."""
    for what, folder in folders.items():
        held = []
        for path in sorted(folder.glob(".lock*")) if folder.is_dir() else ():
            if path.suffix == ".json" or path.is_symlink() or not path.is_file():
                continue
            lock = Lock(path)
            try:
                if not lock.try_out():
                    held.append(lock.holder)
            except TrueKDError:
                continue  # a folder that cannot be written: said of its disk
        if held:
            yield Check(
                f"{what} lock",
                "warning",
                f"{folder} is in use by {', '.join(dict.fromkeys(held))}",
                "A second run there ends with exit code 3. Wait for it, or choose another --out.",
            )
