"""The page on troubleshooting quotes what the code says, names what there is, and covers what people run into."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from true_kd import cli
from true_kd.config import RunConfig

PACKAGE = Path(__file__).parents[1] / "true_kd"
PAGE = (PACKAGE / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^### `(.+)`$", PAGE, flags=re.MULTILINE)
SECTIONS = ["Install", "Models", "Configs and prompts", "Memory", "Disk", "Quality", "Interrupted runs"]

VALUE = "\0"
"""Stands in an f-string for what is filled in."""


def texts() -> str:
    """Every string of the package but docstrings and comments, one a line."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
                found.append("".join(parts).replace("\n", " "))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                found.append(node.value.replace("\n", " "))
    return "\n".join(found)


TEXTS = texts()


def is_said(quoted: str) -> bool:
    """Whether some message of the package holds the fragment, "…" standing for values."""
    pattern = ".*".join(re.escape(part).replace("\\ ", " ") for part in quoted.split("…"))
    return re.search(pattern, TEXTS) is not None


@pytest.mark.parametrize("quoted", QUOTED, ids=lambda text: text[:40])
def test_each_quoted_message_is_said_by_the_package(quoted: str) -> None:
    assert is_said(quoted)
    assert len(re.sub(r"[^a-z]", "", quoted)) >= 8, "too short to find anything by"


def test_a_message_that_nobody_says_is_not_found() -> None:
    assert not is_said("the teacher has left the building")
    assert not is_said("the chat template of … refuses it kindly (…")


def test_every_heading_below_a_section_quotes_a_message() -> None:
    assert re.findall(r"^## (.+)$", PAGE, flags=re.MULTILINE) == SECTIONS
    assert len(QUOTED) == len(re.findall(r"^###", PAGE, flags=re.MULTILINE)) > 40
    assert len(set(QUOTED)) == len(QUOTED)


def test_every_entry_says_something() -> None:
    for entry in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        body = re.split(r"^## ", entry.partition("\n")[2], flags=re.MULTILINE)[0]
        assert len(body.split()) >= 8, entry


def test_the_links_at_its_head_lead_to_its_sections() -> None:
    linked = re.findall(r"^- \[(.+)\]\(#(.+)\)$", PAGE, flags=re.MULTILINE)
    assert [name for name, _ in linked] == SECTIONS
    assert all(anchor == name.lower().replace(" ", "-") for name, anchor in linked)


def test_the_commands_it_names_are_there() -> None:
    named = set(re.findall(r"`true-kd ([a-z]+)", PAGE))
    assert named
    assert named <= set(cli.COMMANDS)
    for name in re.findall(r"`true-kd cache ([a-z]+)", PAGE):
        assert f"def {name.replace('import', 'import_')}" in (PACKAGE / "cli" / "caches.py").read_text() or (
            f'"{name}"' in (PACKAGE / "cli" / "caches.py").read_text()
        )


def test_the_keys_it_names_are_keys_of_a_config() -> None:
    dotted = set(re.findall(r"`((?:training|capture|targets|losses|gate|evaluation)\.[a-z_]+)", PAGE))
    assert len(dotted) > 8
    for name in dotted:
        group, key = name.split(".")
        assert key in type(getattr(RunConfig(), group)).model_fields, name


def test_the_flags_it_names_are_flags_of_a_run(cli) -> None:
    known = cli("distill", "--help").out
    named = set(re.findall(r"`(--[a-z-]+)", PAGE)) - {"--force-reinstall"}
    assert {flag for flag in named if flag not in known} == set()
