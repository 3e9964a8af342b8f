"""The prompts that ship with true-kd: enough of them, well formed, and no two alike."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pytest

from true_kd.prompts import SPLITS, Prompt, list_domains, load_prompts

ROOT = Path(__file__).parent.parent / "prompts"
DOMAINS = ("action", "debug", "memory", "reflection", "task", "thinking")
MINIMUM = {"train": 120, "valid": 24}
TOO_ALIKE = 0.35
"""Jaccard similarity of word 3-shingles from which two prompts count as one with a word changed."""


@cache
def prompts_of(domain: str, split: str) -> list[Prompt]:
    return load_prompts(ROOT, domain, split)


def words(prompt: Prompt) -> list[str]:
    messages = prompt.messages or ()
    asked = " ".join(message["content"] for message in messages if message["role"] == "user")
    return re.findall(r"\w+", (prompt.text or asked).lower())


def shingles(found: list[str]) -> frozenset[tuple[str, ...]]:
    return frozenset(tuple(found[start : start + 3]) for start in range(max(1, len(found) - 2)))


def alike(prompts: list[tuple[str, list[str]]]) -> list[str]:
    """The pairs of places whose words open alike or overlap too much, found through an index of shingles."""
    pairs: list[str] = []
    openings: dict[tuple[str, ...], str] = {}
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    seen: list[frozenset[tuple[str, ...]]] = []
    for number, (where, found) in enumerate(prompts):
        opening = tuple(found[:8])
        if opening in openings:
            pairs.append(f"{openings[opening]} and {where} open with the same words: {' '.join(opening)}")
        openings.setdefault(opening, where)
        own = shingles(found)
        shared = Counter(other for shingle in own for other in holders[shingle])
        for other, count in shared.items():
            similarity = count / (len(own) + len(seen[other]) - count)
            if similarity >= TOO_ALIKE:
                pairs.append(f"{prompts[other][0]} and {where} share {similarity:.0%} of their 3-word pieces")
        for shingle in own:
            holders[shingle].append(number)
        seen.append(own)
    return pairs


def test_the_shipped_domains_are_the_six() -> None:
    assert list_domains(ROOT) == list(DOMAINS)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_a_shipped_domain_has_enough_prompts(domain: str, split: str) -> None:
    assert len(prompts_of(domain, split)) >= MINIMUM[split]


@pytest.mark.parametrize("domain", DOMAINS)
def test_shipped_prompts_vary_in_length(domain: str) -> None:
    lengths = sorted(len(words(prompt)) for split in SPLITS for prompt in prompts_of(domain, split))
    tenth = len(lengths) // 10
    short, long = lengths[tenth], lengths[-tenth - 1]
    assert long >= 1.5 * short, f"four in five prompts have between {short} and {long} words"
    assert len(set(lengths)) >= 15


def test_no_two_shipped_prompts_are_alike() -> None:
    places = [
        (prompt.where.removeprefix(f"{ROOT}/"), words(prompt))
        for domain in DOMAINS
        for split in SPLITS
        for prompt in prompts_of(domain, split)
    ]
    assert alike(places) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Sort this list of numbers by size for me", "Sort this list of numbers by size for him"),
        ("Please explain at length why the sea is salt and cold", "Tell me why the sea is salt and cold"),
        ("Hi", "hi!"),
    ],
)
def test_the_check_sees_two_prompts_that_are_alike(one: str, other: str) -> None:
    assert alike([("a", re.findall(r"\w+", one.lower())), ("b", re.findall(r"\w+", other.lower()))])


def test_the_check_lets_two_different_prompts_pass() -> None:
    assert not alike(
        [
            ("a", ["how", "tall", "is", "the", "tower", "in", "paris"]),
            ("b", ["why", "is", "the", "sky", "so", "blue", "today"]),
        ]
    )
