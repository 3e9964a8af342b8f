"""Under what terms teacher and student stand, and what these ask of an adapter that was distilled from the one for the
other. What is not known is said to be not known; nothing here is legal advice.

The terms were read on the publishers' pages and in the licence files of their repositories; `link` is where.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from true_kd import pocket
from true_kd.finding import is_public
from true_kd.models import read_card


@dataclass(frozen=True)
class Licence:
    """Terms of a model."""

    id: str
    """The hub's own identifier, or under `license: other` its `license_name`."""
    name: str
    link: str = ""
    is_hub_id: bool = True
    """Whether `license:` of a model card takes it as it stands."""
    restricts: str = ""
    """What it forbids or limits where its model is the teacher; empty where distilling is left free."""
    is_non_commercial: bool = False
    """Whether it allows its model, and what is made from it, no other use than research and the like."""
    asks: str = ""
    """What it asks of a model that is made from it or from its outputs."""
    notices: tuple[str, ...] = ()
    """What such a model's card has to say."""
    prefix: str = ""
    """How the name of such a model has to begin."""


def _llama(version: str) -> Licence:
    """From 3.1 on, section 1.b.i of each: outputs may train other models, which then bear the name."""
    return Licence(
        f"llama{version}",
        f"Llama {version} Community License",
        f"https://www.llama.com/llama{version.replace('.', '_')}/license/",
        asks='A model made with Llama or with its outputs has a name that begins with Llama, shows "Built with Llama", '
        "and comes with a copy of the agreement; its acceptable use policy holds.",
        notices=(
            "Built with Llama.",
            f"Llama {version} is licensed under the Llama {version} Community License, Copyright © Meta Platforms, "
            "Inc. All Rights Reserved.",
        ),
        prefix="Llama",
    )


_NON_COMMERCIAL = "It allows non-commercial use alone, which holds for what is made from its outputs as well."

LICENCES: Mapping[str, Licence] = {
    licence.id: licence
    for licence in (
        Licence("apache-2.0", "Apache 2.0", "https://www.apache.org/licenses/LICENSE-2.0"),
        Licence("mit", "MIT", "https://opensource.org/license/mit"),
        Licence("bsd-3-clause", "BSD 3-Clause", "https://opensource.org/license/bsd-3-clause"),
        # Sections 1.b.v of both: "You will not use the Llama Materials or any output or results of the Llama Materials
        # to improve any other large language model", Llama itself and its derivatives excepted.
        Licence(
            "llama2",
            "Llama 2 Community License",
            "https://ai.meta.com/llama/license/",
            restricts="It forbids to use Llama 2 or its outputs to improve any other language model than Llama 2 and "
            "its derivatives.",
            notices=(
                "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All "
                "Rights Reserved.",
            ),
        ),
        Licence(
            "llama3",
            "Meta Llama 3 Community License",
            "https://www.llama.com/llama3/license/",
            restricts="It forbids to use Llama 3 or its outputs to improve any other language model than Llama 3 and "
            "its derivatives.",
            asks='A model made with Llama 3 has a name that begins with Llama 3, shows "Built with Meta Llama 3", '
            "and comes with a copy of the agreement.",
            notices=(
                "Built with Meta Llama 3.",
                "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc. "
                "All Rights Reserved.",
            ),
            prefix="Llama-3",
        ),
        _llama("3.1"),
        _llama("3.2"),
        _llama("3.3"),
        _llama("4"),
        # Qwen2.5 in 3B; section on use: research and evaluation, and the notice for models that outputs trained.
        Licence(
            "qwen-research",
            "Qwen Research License",
            "https://huggingface.co/Qwen/Qwen2.5-3B-Instruct/blob/main/LICENSE",
            is_hub_id=False,
            restricts=_NON_COMMERCIAL,
            is_non_commercial=True,
            asks='A model made with Qwen or with its outputs shows "Built with Qwen" or "Improved using Qwen", and '
            "comes with a copy of the agreement and a notice.",
            notices=(
                "Built with Qwen.",
                "Qwen is licensed under the Qwen RESEARCH LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights "
                "Reserved.",
            ),
        ),
        # Qwen2.5 in 72B: https://huggingface.co/Qwen/Qwen2.5-72B-Instruct/discussions/18 on outputs.
        Licence(
            "qwen",
            "Qwen License",
            "https://huggingface.co/Qwen/Qwen2.5-72B-Instruct/blob/main/LICENSE",
            is_hub_id=False,
            asks='A model made with Qwen or with its outputs shows "Built with Qwen" or "Improved using Qwen"; beyond '
            "100 million monthly users commercial use needs a licence of its own.",
            notices=(
                "Built with Qwen.",
                "Qwen is licensed under the Qwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights Reserved.",
            ),
        ),
        # Section 1.1(e): a model that outputs trained to perform similarly is a "Model Derivative"; up to Gemma 3.
        Licence(
            "gemma",
            "Gemma Terms of Use",
            "https://ai.google.dev/gemma/terms",
            restricts="A model distilled from Gemma or trained on its outputs is a Model Derivative: the terms and the "
            "prohibited use policy go with it, whatever the licence of the student.",
            asks="Whoever gets it gets a copy of the terms, and is bound by the prohibited use policy.",
            notices=(
                "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.",
            ),
        ),
        Licence(
            "mrl",
            "Mistral AI Research License",
            "https://mistral.ai/licenses/MRL-0.1.md",
            is_hub_id=False,
            restricts="It allows research alone, for the model, for derivatives and for outputs.",
            is_non_commercial=True,
        ),
        # Section 5.b, as in Llama 2.
        Licence(
            "tencent-hunyuan-community",
            "Tencent Hunyuan Community License",
            "https://huggingface.co/tencent/Hunyuan-Large/blob/main/LICENSE.txt",
            is_hub_id=False,
            restricts="It forbids to use Hunyuan or its outputs to improve any other language model.",
        ),
        Licence(
            "cc-by-nc-4.0",
            "CC BY-NC 4.0",
            "https://creativecommons.org/licenses/by-nc/4.0/",
            restricts=_NON_COMMERCIAL,
            is_non_commercial=True,
        ),
    )
}

# Of the publishers' own names, which those of conversions end with. Where a family changed its terms with a version,
# only the versions that are known are here.
_FAMILIES: tuple[tuple[str, str], ...] = (
    (r"qwen2\.5-(vl-|coder-|omni-)?3b\b", "qwen-research"),
    (r"qwen2(\.5)?-(vl-)?72b\b", "qwen"),
    (r"qwen2\.5-(coder-|math-)?(0\.5|1\.5|7|14|32)b\b", "apache-2.0"),
    (r"qwen3-(coder-)?[\d.]+b\b", "apache-2.0"),
    (r"llama-2-", "llama2"),
    (r"meta-llama-3-", "llama3"),
    *((rf"^(meta-)?llama-{version.replace('.', '[.]')}-\d", f"llama{version}") for version in ("3.1", "3.2", "3.3")),
    (r"^llama-4-", "llama4"),
    (r"^(code)?gemma-(1\.1-|2-|3-)?\d+(b|m)\b", "gemma"),
    (r"^ministral-8b-instruct-2410\b|^mistral-large-", "mrl"),
    (r"^(mistral-7b|mixtral-8x\d+b)-", "apache-2.0"),
    (r"^gpt-oss-", "apache-2.0"),
    (r"^smollm\d?-", "apache-2.0"),
    (r"^phi-(3|3\.5|4)", "mit"),
    (r"^hunyuan-", "tencent-hunyuan-community"),
)

_TEXTS: tuple[tuple[str, str], ...] = (
    (r"qwen research license", "qwen-research"),
    (r"qwen license agreement", "qwen"),
    (r"llama 2 community license", "llama2"),
    (r"meta llama 3 community license", "llama3"),
    *(
        (rf"llama {version.replace('.', '[.]')} community license", f"llama{version}")
        for version in ("3.1", "3.2", "3.3", "4")
    ),
    (r"gemma terms of use", "gemma"),
    (r"mistral ai research license", "mrl"),
    (r"tencent hunyuan community license", "tencent-hunyuan-community"),
    (r"apache license\s+version 2\.0", "apache-2.0"),
    (r"\bmit license\b", "mit"),
)
"""How the texts of licences begin."""

_MOST = 2**17
"""Bytes of a licence that are looked at."""


@dataclass(frozen=True)
class FoundLicence:
    """The licence of one model."""

    id: str | None
    """None where nothing says which it is."""
    source: str
    """How it is known, in words."""
    link: str = ""

    @property
    def terms(self) -> Licence | None:
        """What is known of it."""
        return LICENCES.get(self.id or "")

    @property
    def shown(self) -> str:
        """In words."""
        if self.id is None:
            return f"not known ({self.source})"
        return f"{self.terms.name if self.terms else self.id} ({self.source})"


def find_licence(model: str, folder: Path | None) -> FoundLicence:
    """The licence of a model: by the card or the licence file in its folder, else by the name of its family.

    Parameters
    ----------
    model
        its name, as the config has it.
    folder
        where its files lie; None where they are not on this machine.
    """
    if model.startswith(pocket.PREFIX):
        return FoundLicence("apache-2.0", "part of true-kd")
    card = read_card(folder) if folder is not None else {}
    named = card.get("license")
    named = named[0] if isinstance(named, list) and named else named
    if named == "other" or not isinstance(named, str):
        named = card.get("license_name") or None
    if isinstance(named, str) and re.fullmatch(r"[\w.+-]{1,60}", named):
        link = card.get("license_link")
        safe = isinstance(link, str) and re.fullmatch(r"https://[\w./%~+#-]{1,200}", link)
        return FoundLicence(_same(named), "by its model card", link if safe else "")
    for path in sorted(folder.glob("LICEN[CS]E*")) if folder is not None else ():
        if found := _by_text(path):
            return FoundLicence(found, f"by its {path.name} file")
    base = card.get("base_model")
    bases = [name for name in (base if isinstance(base, list) else [base]) if isinstance(name, str)]
    for name in (model, *bases):
        if (is_public(name) or folder is not None) and (found := _by_family(name)):
            return FoundLicence(found, "by the name of its family, not looked up")
    return FoundLicence(None, "no model card or licence file of it is here")


def _same(name: str) -> str:
    """The identifier that a card means: some spell it otherwise."""
    lower = name.lower()
    aliases = {"tongyi-qianwen": "qwen", "tongyi-qianwen-research": "qwen-research", "apache2.0": "apache-2.0"}
    return aliases.get(lower, lower)


def _by_family(model: str) -> str | None:
    name = model.rstrip("/").rpartition("/")[2].lower()
    return next((licence for pattern, licence in _FAMILIES if re.search(pattern, name)), None)


def _by_text(path: Path) -> str | None:
    try:
        if not path.is_file() or path.stat().st_size > _MOST:
            return None
        opening = " ".join(path.read_text(encoding="utf-8", errors="replace")[:2000].split()).lower()
    except OSError:
        return None
    return next((licence for pattern, licence in _TEXTS if re.search(pattern, opening)), None)


def warnings(teacher: FoundLicence, student: FoundLicence, repo: str, own: str | None = None) -> list[str]:
    """What whoever publishes should look at before: one sentence or two each. `own` is the licence they chose."""
    found = []
    if teacher.id is None:
        found.append("The teacher's licence is not known: look whether it allows to train other models on its outputs.")
    elif teacher.terms is None:
        found.append(f"What the teacher's licence {teacher.id} says of its outputs is not known: read it first.")
    elif teacher.terms.restricts:
        found.append(f"The teacher's licence ({teacher.terms.name}) restricts distillation. {teacher.terms.restricts}")
    if student.id is None:
        found.append("The student's licence is not known: an adapter is made from it, look whether it may be shared.")
    elif student.terms is not None and student.terms.is_non_commercial:
        found.append(f"The student's licence ({student.terms.name}) holds for its adapters. {student.terms.restricts}")
    if own not in (None, student.id) and student.terms is not None and (student.terms.restricts or student.terms.asks):
        found.append(f"--license {own}: the student's licence ({student.terms.name}) holds for its adapters as well.")
    for terms in _terms(teacher, student):
        if terms.prefix and not repo.rpartition("/")[2].lower().startswith(terms.prefix.lower()):
            found.append(f"{terms.name}: the name of the repository has to begin with {terms.prefix}.")
    return found


def notices(teacher: FoundLicence, student: FoundLicence) -> list[str]:
    """Lines that the licences want on the card."""
    return list(dict.fromkeys(line for terms in _terms(teacher, student) for line in terms.notices))


def duties(teacher: FoundLicence, student: FoundLicence) -> list[str]:
    """What the licences ask and restrict, for the card."""
    lines = []
    for terms in _terms(teacher, student):
        restricts = terms.restricts if terms is teacher.terms or terms.is_non_commercial else ""
        said = " ".join(filter(None, (restricts, terms.asks)))
        lines += [f"{terms.name}: {said}"] if said else []
    return lines


def _terms(*found: FoundLicence) -> Iterable[Licence]:
    return dict.fromkeys(one.terms for one in found if one.terms is not None)
