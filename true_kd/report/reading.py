"""What the report is made from: the finished domains under a folder, each with its control and its settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from true_kd import adapters
from true_kd.config import RunConfig
from true_kd.errors import InputError
from true_kd.reporting import KDResult, read_result

UNREADABLE = (
    f"its {adapters.METRICS} is damaged or of another version, or the adapter beside it has changed since. "
    "Distil it again."
)


@dataclass(frozen=True)
class Setting:
    """One key of the config that a domain ran with."""

    key: str
    """Dotted, as in `--set`."""
    value: str
    default: str
    """"-" for a key that this version does not know."""


@dataclass(frozen=True)
class Chapter:
    """One domain of the report."""

    result: KDResult
    control: KDResult | None
    """The record of the control that the proof compares with."""
    settings: tuple[Setting, ...]
    """All of them; empty where none were kept."""

    @property
    def changed(self) -> tuple[Setting, ...]:
        """The settings that are not the defaults."""
        return tuple(setting for setting in self.settings if setting.value != setting.default)

    @property
    def least_cosine(self) -> str | None:
        """What the certificate had to reach, as the settings tell."""
        return next((setting.value for setting in self.settings if setting.key == "fidelity.least_cosine"), None)


@dataclass(frozen=True)
class Finished:
    """What lies under a folder."""

    results: tuple[KDResult, ...]
    failures: Mapping[str, str]
    """Domains that have no result to show, with the reason."""


def find_finished(folder: Path) -> Finished:
    """The finished domains of an output folder, or the one whose own folder it is.

    Raises
    ------
    InputError
        where there is no such folder, or no finished domain in it.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise InputError(
            f"{folder}: {found}, expected the folder of a run. Run `true-kd distill` first, or name another."
        )
    if (folder / adapters.METRICS).exists():
        own = read_result(folder)
        if own is None:
            raise InputError(f"{folder}: cannot be reported, expected a finished domain: {UNREADABLE}")
        return Finished((own,), {})
    results, failures = _below(folder)
    if not results:
        raise InputError(f"{folder}: {_nothing(folder, failures)}")
    return Finished(tuple(results), failures)


def with_earlier(out: Path, results: Sequence[KDResult], failures: Mapping[str, str]) -> Finished:
    """The results and failures of a run, and beside them the domains that were finished in `out` before."""
    named = {result.domain for result in results} | set(failures)
    earlier, _ = _below(out) if out.is_dir() else ([], {})
    every = [*results, *(result for result in earlier if result.domain not in named)]
    return Finished(tuple(sorted(every, key=lambda result: result.domain)), dict(failures))


def read_chapter(result: KDResult) -> Chapter:
    """A result with what lies beside its adapter."""
    folder = Path(result.adapter_path)
    has_control = result.proof is not None and result.proof.control is not None
    return Chapter(
        result=result,
        control=read_result(folder / adapters.CONTROL) if has_control else None,
        settings=tuple(_settings(adapters.read_json(folder / adapters.RUN))),
    )


def _below(out: Path) -> tuple[list[KDResult], dict[str, str]]:
    summary = adapters.read_json(out / adapters.SUMMARY)
    told = summary.get("failed") if isinstance(summary, dict) else None
    failures = {str(name): str(why) for name, why in told.items()} if isinstance(told, dict) else {}
    results = []
    for folder in sorted(path for path in out.iterdir() if (path / adapters.METRICS).exists()):
        result = read_result(folder)
        if result is not None:
            results.append(result)
            failures.pop(result.domain, None)
        else:
            failures[folder.name] = UNREADABLE
    return results, failures


def _nothing(folder: Path, failures: Mapping[str, str]) -> str:
    deeper = sorted(path.parent.parent for path in folder.glob(f"*/*/{adapters.METRICS}"))
    if deeper:
        return f"no finished domain in it, expected the folder of a run. Try {deeper[0]}."
    if failures:
        name, why = next(iter(failures.items()))
        return f"no finished domain in it, expected at least one. {name}: {why}"
    return "no finished domain in it, expected at least one. Run `true-kd distill` first, or name another folder."


def _settings(config: Any) -> Iterator[Setting]:
    if not isinstance(config, dict):
        return
    defaults = dict(_flat(RunConfig().model_dump(mode="json")))
    for key, value in _flat(config):
        # Which domain it is stands above, and `fresh` says nothing of the result.
        if key not in ("domains", "fresh"):
            yield Setting(key, _spelled(value), _spelled(defaults[key]) if key in defaults else "-")


def _flat(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
