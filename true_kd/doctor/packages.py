"""The versions that are installed, against what they need of each other and against those known to be bad."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from true_kd.backend import versions
from true_kd.doctor.verdicts import Check

SHOWN = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-metal", "tokenizers", "safetensors", "huggingface-hub", "jinja2")
"""Packages whose versions are told besides those of `backend.versions`, where they are installed."""


@dataclass(frozen=True)
class Fault:
    """Versions of a package that are known to be bad."""

    package: str
    before: str
    """The first version that was seen to be good."""
    why: str
    evidence: str


KNOWN_BAD = (
    # 0.31.3 runs it, 0.32.2 has a gate before it, those between were not looked at. The gate:
    # https://github.com/ml-explore/mlx-lm/commit/bfa25a16f9c5285257e3494fc05e9f8d009a422a
    Fault("mlx-lm", "0.32.2", "it runs the Python file that a model's config names", "CVE-2026-5843"),
    # https://github.com/pydantic/pydantic-ai/pull/6310
    Fault("transformers", "5.3.0", "a model's config can make it download and run code", "CVE-2026-4372"),
    # https://github.com/huggingface/transformers/pull/45122
    Fault("transformers", "5.5.0", "a model's config can override trust_remote_code", "CVE-2026-5241"),
    # https://github.com/pallets/jinja/security/advisories/GHSA-cpwx-vrp4-4pq7
    Fault("jinja2", "3.1.6", "a chat template can leave its sandbox", "CVE-2025-27516"),
    # https://github.com/tox-dev/filelock/pull/461
    Fault("filelock", "3.20.1", "a lock file can be made to truncate another file", "CVE-2025-68146"),
)
"""Each with its evidence. Where true-kd guards against one by itself, `mlx_lm.generate` and others still do not."""


def check_packages(read: Callable[[str], str | None] | None = None) -> Iterator[Check]:
    """What is installed, and each version that should not be. `read` gives the version of a package, None for none."""
    read = read or installed
    found = versions()
    shown = found | {name: number for name in SHOWN if (number := read(name)) is not None}
    system = shown.pop("platform")
    yield Check("system", "ok", system)
    yield Check("versions", "ok", ", ".join(f"{name} {number}" for name, number in shown.items()))
    yield from find_faults(read)
    yield from find_conflicts(read, _requirements())
    yield from find_two_backends(read)


def installed(package: str) -> str | None:
    """The version of an installed package; None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def find_faults(read: Callable[[str], str | None]) -> Iterator[Check]:
    """Installed versions that are known to be bad."""
    for fault in KNOWN_BAD:
        number = read(fault.package)
        if number is not None and _is_before(number, fault.before):
            yield Check(
                fault.package,
                "problem",
                f"{number}: {fault.why} ({fault.evidence})",
                f"Run pip install --upgrade '{fault.package}>={fault.before}'.",
            )


def _is_before(number: str, other: str) -> bool:
    try:
        return Version(number) < Version(other)
    except InvalidVersion:
        return False


_OWNERS = ("true-kd", "mlx", "mlx-lm", "transformers")
_WITH_EXTRAS = ("mlx",)
"""Whose extras are looked at as well: the backends, each of which must be of the very version of mlx."""


def _requirements() -> Mapping[str, Sequence[str]]:
    found = {}
    for owner in _OWNERS:
        try:
            found[owner] = distribution(owner).requires or ()
        except PackageNotFoundError:
            continue
    return found


def find_conflicts(read: Callable[[str], str | None], requirements: Mapping[str, Sequence[str]]) -> Iterator[Check]:
    """Installed versions that another package does not take, as it says itself."""
    for owner, texts in requirements.items():
        for text in texts:
            try:
                wanted = Requirement(text)
            except InvalidRequirement:
                continue
            number = read(wanted.name)
            extras = {"", *(f"{name}" for name in ("cpu", "cuda12", "cuda13") if owner in _WITH_EXTRAS)}
            applies = wanted.marker is None or any(
                wanted.marker.evaluate({**default_environment(), "extra": extra}) for extra in extras
            )
            if not applies or number is None or wanted.specifier.contains(number, prereleases=True):
                continue
            yield Check(
                wanted.name,
                "problem",
                f"{number}, and {owner} {read(owner) or ''} needs {wanted.specifier}".replace("  ", " "),
                f"Run pip install '{wanted.name}{wanted.specifier}'.",
            )


def find_two_backends(read: Callable[[str], str | None]) -> Iterator[Check]:
    """The backends for CPU and CUDA, both installed: they ship one file of the same name, and one of them wins."""
    others = [name for name in ("mlx-cuda-12", "mlx-cuda-13") if read(name) is not None]
    if others and read("mlx-cpu") is not None:
        # Measured with pip and mlx 0.32.4: libmlx.so is the CPU's, in whatever order they are installed.
        yield Check(
            "backends",
            "problem",
            f"mlx-cpu and {' and '.join(others)} are both installed, and overwrite each other's libmlx.so",
            f"Run pip uninstall mlx-cpu, then pip install --force-reinstall --no-deps {others[0]}.",
        )
