"""One domain after the other: its config, its prompts, and what models make of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from true_kd.config import Override, RunConfig, base_path, load_config
from true_kd.errors import Problems, TrueKDError
from true_kd.jobs import read_domain, refuse_links
from true_kd.preflight.content import check_content
from true_kd.preflight.findings import DomainReport, Finding, Sheet
from true_kd.preflight.tokens import Models, check_tokens
from true_kd.prompts import SPLITS, Prompt, check_domain_name, has_split, load_prompts
from true_kd.suggest import did_you_mean


def examine(
    base: Path | None, domains: Sequence[str], overrides: Sequence[Override], show: int
) -> Iterator[DomainReport]:
    """What is wrong with each domain, and its first `show` training prompts as the student will see them.

    Nothing is written or downloaded, and no error is raised for what a domain's files hold.
    """
    models = Models()
    for domain in domains:
        yield _examine(base, domain, overrides, show, models)


def find_stray_configs(base: Path | None, domains: Sequence[str]) -> list[Finding]:
    """Files beside the base config that look like a domain's, and are of none of `domains`: nothing reads them."""
    path = base_path(base)
    sheet = Sheet()
    for other in sorted(path.parent.glob("*.yaml")):
        if other != path and other.stem not in domains:
            hint = did_you_mean(other.stem, domains) or f", expected one of {', '.join(domains)}. Rename or remove it."
            sheet.warning("config", f"{other}: is read for no domain{hint}")
    return sheet.findings


def _examine(base: Path | None, domain: str, overrides: Sequence[Override], show: int, models: Models) -> DomainReport:
    sheet = Sheet()
    config = _load(base, domain, overrides, sheet)
    # Without the domain's own file the place of the prompts is the same: it holds for a whole run.
    placed = config or _load(base, None, overrides, Sheet())
    prompts = None
    if placed is None:
        sheet.not_checked(f"the prompts of {domain}: the config says where they are, and cannot be read.")
    else:
        prompts = _read(placed, domain, sheet)
    if config is None or prompts is None:
        if prompts is not None:
            sheet.not_checked(f"what models make of the prompts of {domain}: the config cannot be read.")
        return DomainReport(domain, tuple(sheet.findings), tuple(sheet.unchecked), None, ())
    try:
        refuse_links(config.out_folder / domain)
    except TrueKDError as error:
        sheet.refused("config", error)
    train, valid = prompts
    check_content(train, valid, config, sheet)
    counts, examples = check_tokens(train, valid, config, models, show, sheet)
    return DomainReport(domain, tuple(sheet.findings), tuple(sheet.unchecked), counts, tuple(examples))


def _load(base: Path | None, domain: str | None, overrides: Sequence[Override], sheet: Sheet) -> RunConfig | None:
    try:
        if domain is not None:
            check_domain_name(domain)
        config = load_config(base, domain, overrides)
        # A path that none can be is a fault of the config, and shows when it is asked for.
        for folder in ("prompts_folder", "out_folder", "cache_folder"):
            getattr(config, folder)
        return config
    except TrueKDError as error:
        sheet.refused("config", error)
        return None


def _read(config: RunConfig, domain: str, sheet: Sheet) -> tuple[list[Prompt], list[Prompt]] | None:
    """Training and validation prompts; None, and every bad line of both, where they cannot be read."""
    root = config.prompts_folder
    try:
        return read_domain(root, domain)
    except TrueKDError as error:
        sheet.refused("prompts", error)
    for split in SPLITS:
        # A run ends at the first file that is wrong; here the lines of the other are wanted as well.
        try:
            if root.is_dir() and has_split(root, domain, split):
                load_prompts(root, domain, split)
        except Problems as error:
            sheet.refused("prompts", error)
    return None
