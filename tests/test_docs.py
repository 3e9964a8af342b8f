"""The docs hold together: all pages are listed, links lead somewhere, and the flags and keys they name exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from true_kd.config import RunConfig
from true_kd.options import Options

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "true_kd" / "docs"
PAGES = sorted(DOCS.glob("*.md"))
INDEX = DOCS / "README.md"

every_page = pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)


def links(page: Path) -> list[str]:
    """Where the relative links of a page lead."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def test_every_page_is_in_the_index_once() -> None:
    listed = [Path(link).name for link in links(INDEX) if not link.startswith("..")]
    assert len(listed) == len(set(listed))
    there = {page.name for page in PAGES} - {INDEX.name}
    assert there == set(listed)


def anchors(page: Path) -> set[str]:
    """The names that a page's headings have on GitHub."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@every_page
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@cache
def flags() -> frozenset[str]:
    """Every flag of every command."""
    import typer

    from true_kd.cli import COMMANDS, make_app

    found = {"--help", "--version"}

    def walk(command: object) -> None:
        for parameter in command.params:
            found.update(word for word in (*parameter.opts, *parameter.secondary_opts) if word.startswith("--"))
        for inner in getattr(command, "commands", {}).values():
            walk(inner)

    for name in COMMANDS:
        walk(typer.main.get_command(make_app([name])))
    return frozenset(found)


# Flags of other programs, on the lines where these are named.
OTHERS = re.compile(r"mlx_lm|pip |python |pytest|hf |ollama|llama|convert_|make |git |apt|gguf", re.IGNORECASE)


def flags_named(page: Path) -> Iterator[str]:
    """The flags that a page names, but those of other programs."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if "pip install" not in line and ("true-kd" in line or not OTHERS.search(line)):
            yield from re.findall(r"(?<![\w-])--[a-z][\w-]*", line)


@every_page
def test_every_flag_that_a_page_names_exists(page: Path) -> None:
    of_pip = {"--force-reinstall", "--no-deps"}
    assert sorted(set(flags_named(page)) - flags() - of_pip) == []


@cache
def keys() -> frozenset[str]:
    """Every key of the config, with its group: "losses.temperature"."""

    def walk(model: type[Options], prefix: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield f"{prefix}{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, Options):
                yield from walk(field.annotation, f"{prefix}{name}.")

    return frozenset(walk(RunConfig, ""))


GROUPS = sorted({key.partition(".")[0] for key in keys() if "." in key})


@every_page
def test_every_key_of_the_config_that_a_page_names_exists(page: Path) -> None:
    # A longer dotted name is a field of a record, or a module.
    named = set(
        re.findall(rf"(?<![\w./])((?:{'|'.join(GROUPS)})\.[a-z]\w*)(?![\w./(])", page.read_text(encoding="utf-8"))
    )
    files = {name for name in named if Path(name).suffix in (".md", ".py", ".json", ".safetensors", ".yaml", ".gguf")}
    assert sorted(named - files - keys()) == []


def test_the_checks_find_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("`true-kd distill --temprature 2` sets `losses.temprature`; see [there](nowhere.md#a).\n")
    assert set(flags_named(page)) - flags() == {"--temprature"}
    assert links(page) == ["nowhere.md#a"]
    with pytest.raises(AssertionError, match="temprature"):
        test_every_key_of_the_config_that_a_page_names_exists(page)
    with pytest.raises(AssertionError, match=re.escape("nowhere.md")):
        test_every_relative_link_leads_somewhere(page)
