"""All checks in their order, the longest last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from true_kd.config import NoConfigs, RunConfig, load_config
from true_kd.doctor.mac import check_mac
from true_kd.doctor.machine import check_blas, check_device, check_disks, check_files, check_memory
from true_kd.doctor.packages import check_packages
from true_kd.doctor.surroundings import check_hub, check_locks, check_proxies
from true_kd.doctor.trial import try_matmul, try_model
from true_kd.doctor.verdicts import Check, Verdict
from true_kd.errors import Problems, TrueKDError
from true_kd.models import hub_access


def examine_machine() -> Iterator[Check]:
    """Everything that is checked, as it is found."""
    yield from check_packages()
    yield check_device()
    yield check_blas()
    yield check_memory()
    yield check_files()
    yield from check_mac()
    config, faults = _config()
    yield from faults
    folders: dict[str, Path] = {}
    for name, place in (("target cache", "cache_folder"), ("output folder", "out_folder")):
        try:
            folders[name] = getattr(config, place)
        except TrueKDError as error:
            yield Check(name, "problem", str(error), "Set it to a folder that can be.")
    hub = hub_access()
    yield from check_disks({**folders, "hub cache": hub.cache})
    yield from check_hub(hub)
    yield from check_proxies()
    yield from check_locks(folders)
    yield try_matmul()
    yield try_model()


def verdict_of(checks: Iterable[Check]) -> Verdict:
    """The worst of several."""
    found = {check.verdict for check in checks}
    return "problem" if "problem" in found else "warning" if "warning" in found else "ok"


def _config() -> tuple[RunConfig, list[Check]]:
    """The config of the current folder, for where its runs write; the default one where there is none."""
    try:
        return load_config(None, None, ()), []
    except NoConfigs:
        return RunConfig(), []
    except TrueKDError as error:
        count = len(error.lines) if isinstance(error, Problems) else 1
        problems = f"{count} problem{'s' * (count != 1)}"
        return RunConfig(), [
            Check("config", "warning", f"configs/base.yaml has {problems}", "Run true-kd validate, which lists them.")
        ]
