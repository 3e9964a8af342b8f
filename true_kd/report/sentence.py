"""All domains in one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from true_kd.proof.records import Outcome, Place
from true_kd.reporting import KDResult

_ALONE: Mapping[Outcome, str] = {
    "helped": "Distillation helped in {}",
    "mixed": "Distillation led nearer to the teacher, but to fewer tasks right, in {}",
    "unclear": "It is unclear whether distillation helped in {}",
    "hurt": "Distillation hurt in {}",
    "nothing to learn": "There was nothing to learn from the teacher in {}",
}

_OTHERS: Mapping[Outcome, str] = {
    "mixed": "it led nearer to the teacher, but to fewer tasks right, in {}",
    "unclear": "it is unclear in {}",
    "hurt": "it hurt in {}",
    "nothing to learn": "there was nothing to learn in {}",
}

_NAMED = 6
"""Domains that are named one by one, at most."""


def headline(results: Sequence[KDResult], failures: Mapping[str, str]) -> str:
    """What came of all domains, in one sentence."""
    measured = {result.domain: result.proof.verdict for result in results if result.proof is not None}
    unmeasured = [result.domain for result in results if result.proof is None]
    outcomes: dict[Outcome, list[str]] = {}
    for domain, verdict in measured.items():
        outcomes.setdefault(verdict.outcome, []).append(domain)
    parts = []
    if len(measured) == 1:
        outcome, names = next(iter(outcomes.items()))
        parts.append(_ALONE[outcome].format(names[0]))
    elif measured:
        helped = outcomes.pop("helped", [])
        how_many = "all" if len(helped) == len(measured) else f"{len(helped)} of" if helped else "none of"
        parts.append(f"Distillation helped in {how_many} {len(measured)} domains{_bracketed(helped)}")
        parts += [words.format(_listed(outcomes[name])) for name, words in _OTHERS.items() if name in outcomes]
    parts += _against_control([verdict.against_control for verdict in measured.values()], len(measured))
    if unmeasured:
        words = f"whether it helped was not measured in {_listed(unmeasured)}"
        parts.append(words if parts else f"W{words[1:]}")
    if failures:
        words = f"{len(failures)} {'domain' if len(failures) == 1 else 'domains'} failed{_bracketed(failures)}"
        parts.append(words)
    return "; ".join(parts or ["No domain was distilled"]) + "."


def _against_control(places: Iterable[Place | None], domains: int) -> list[str]:
    counts = {place: 0 for place in ("ahead", "level", "behind")}
    for place in places:
        if place is not None:
            counts[place] += 1
    found = {place: count for place, count in counts.items() if count}
    if not found:
        return []
    words = {"ahead": "ahead of plain fine-tuning", "level": "level with plain fine-tuning"}
    words["behind"] = "behind plain fine-tuning"
    if len(found) == 1:
        place, count = next(iter(found.items()))
        where = "" if domains == 1 else " in all" if count == domains else f" in {count}"
        return [f"{words[place]}{where}"]
    first, *others = found.items()
    return [", ".join([f"{words[first[0]]} in {first[1]}", *(f"{place} in {count}" for place, count in others)])]


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    if len(names) > _NAMED:
        names = [*names[: _NAMED - 1], f"{len(names) - _NAMED + 1} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _bracketed(names: Iterable[str]) -> str:
    names = list(names)
    return f" ({_listed(names)})" if names else ""
