"""A run's work, one job per domain: its config, its prompts, and what its result depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from true_kd import adapters, prompts, stores
from true_kd.alignment import Alignment
from true_kd.cache import TargetCache
from true_kd.capture import TeacherPrompt
from true_kd.config import Override, RunConfig, load_config
from true_kd.errors import InputError, Problems, PromptError, TrueKDError, few_lines, shared_exit_code
from true_kd.files import digest_json
from true_kd.losses import LossOptions
from true_kd.models import ModelOptions
from true_kd.prompts import Prompt
from true_kd.proof import Proof
from true_kd.reporting import FORMAT
from true_kd.sizes import ModelSize
from true_kd.suggest import quote
from true_kd.vocabulary import VocabularyMap


class DomainsRefused(TrueKDError):
    """Nothing of a run can be done, for several reasons; one line each, the first of every domain before the others."""

    def __init__(self, failures: Mapping[str, TrueKDError]) -> None:
        found = [error.lines if isinstance(error, Problems) else (str(error),) for error in failures.values()]
        in_turn = chain.from_iterable(zip_longest(*found))
        super().__init__(few_lines(list(dict.fromkeys(line for line in in_turn if line is not None))))
        self.exit_code = shared_exit_code(failures.values())


def refuse(failures: Mapping[str, TrueKDError]) -> NoReturn:
    """Raise what stopped every domain: the error itself where it is one and the same."""
    errors = list(failures.values())
    if len({str(error) for error in errors}) == 1:
        raise errors[0]
    raise DomainsRefused(failures)


HELD_OUT = 0.1
"""Share of the training prompts that validate a domain without a validation file."""


@dataclass(frozen=True)
class TeacherSource:
    """Where a job's teacher is, and what it is called."""

    options: ModelOptions
    """Those of the config, but for `cache:KEY`: then the path of the stand-in in that cache."""
    name: str
    """As the config has it, but for `cache:KEY`: then as it was called where it was captured."""


_OF_CACHE = "cache:"


def find_teacher(config: RunConfig) -> TeacherSource:
    """Where the teacher of a config is: it may be the one that a cache's replies are of, without its weights.

    Raises
    ------
    TrueKDError
        when `cache:KEY` is not the start of one cache's key, or that cache is damaged or does not know its teacher.
    """
    options = config.teacher
    if not options.model.startswith(_OF_CACHE):
        return TeacherSource(options, options.model)
    path, name = stores.find_teacher(config.cache_folder, options.model.removeprefix(_OF_CACHE))
    return TeacherSource(options.model_copy(update={"model": str(path)}), name)


@dataclass(frozen=True)
class CapturedTargets:
    """Where the teacher's targets of a job lie, and what capturing them took."""

    cache: TargetCache
    train: Sequence[TeacherPrompt]
    valid: Sequence[TeacherPrompt]
    seconds: float
    peak_memory: int
    """Bytes, of the teacher's phase so far."""
    right: np.ndarray | None
    """bool [tasks], which checkable validation tasks the teacher's replies get right; None where there are none, or the
    data wrote some of the replies."""
    teacher_size: ModelSize


_CONTROL = " (SFT control)"


def parse_label(label: str) -> tuple[str, bool]:
    """The domain that a job's label names, and whether the job is its control."""
    return label.removesuffix(_CONTROL), label.endswith(_CONTROL)


@dataclass
class Job:
    """One domain of a run, on its way from prompts to result."""

    domain: str
    config: RunConfig
    train_prompts: Sequence[Prompt]
    valid_prompts: Sequence[Prompt]
    teacher: TeacherSource | None = None
    teacher_digest: str = ""
    """Of the teacher's files, as `student_digest` is of the student's."""
    student_digest: str = ""
    vocabulary: VocabularyMap | None = None
    """From the ids of the targets to the student's."""
    alignment: Alignment | None = None
    """How targets come into the student's vocabulary, where the teacher's is another."""
    targets: CapturedTargets | None = None
    was_probed: bool = False
    """Whether teacher and student were compared before all was captured."""
    is_control: bool = False

    @property
    def folder(self) -> Path:
        """Where the adapter goes."""
        folder = self.config.out_folder / self.domain
        return folder / adapters.CONTROL if self.is_control else folder

    @property
    def knows_text(self) -> bool:
        """Whether the targets say how likely the teacher finds each token of the text: by a rule that looks at no text
        they do not."""
        return self.alignment is None or self.alignment.way == "align"

    @property
    def label(self) -> str:
        """What a run's reports call it."""
        return f"{self.domain}{_CONTROL}" if self.is_control else self.domain

    def control(self) -> Job:
        """The same student trained as long on the same text of the teacher, by cross-entropy alone."""
        weigh_by = "reward" if self.config.losses.weigh_by == "reward" else "none"
        # At temperature 1, so that what its curves say of the teacher is the KL that all else is compared by.
        plain = LossOptions(alpha=0.0, temperature=1.0, weigh_by=weigh_by, chunk=self.config.losses.chunk)
        config = self.config.model_copy(update={"losses": plain, "control": "none"})
        return replace(self, config=config, is_control=True)

    @cached_property
    def run_digest(self) -> str:
        """What the adapter depends on: models, prompts and every option but those that say where things lie, what they
        may take, or what is measured of them. The digests of the models are known by now."""
        options = identifying_options(self.config)
        options["vocab_strategy"] = self.alignment.way if self.alignment else "match"
        aligned = {"alignment": self.alignment.facts} if self.alignment else {}
        return digest_json(
            {
                "format": FORMAT,
                **aligned,
                "options": options,
                "teacher": self.teacher_digest,
                "student": self.student_digest,
                "train": [prompt.identity() for prompt in self.train_prompts],
                "valid": [prompt.identity() for prompt in self.valid_prompts],
            }
        )

    def lacks_control(self, proof: Proof) -> bool:
        """Whether a control is wanted that a proof does not have."""
        return self.config.control != "none" and proof.control is None

    @property
    def proof_digest(self) -> str:
        """What the proof depends on besides the adapter."""
        return digest_json(self.config.evaluation.model_dump(mode="json"))


def identifying_options(config: RunConfig) -> dict[str, Any]:
    """The options that an adapter depends on, besides its models and prompts: see `Job.run_digest`."""
    found = config.model_dump(
        mode="json",
        exclude={
            **dict.fromkeys(("out", "cache", "fresh", "isolate", "domains", "prompts", "memory_gb", "report_to"), True),
            **dict.fromkeys(("evaluation", "gate", "control", "report"), True),
            **{seam: {"model", "revision", "adapter"} for seam in ("teacher", "student")},
            "force": True,
        },
    )
    if found["vocab_strategy"] == "auto":
        # What it comes to follows from the models: where these agree, to the same as this.
        found["vocab_strategy"] = "match"
    return found


def choose_domains(
    base: Path | None, named: Sequence[str], everything: bool, overrides: Sequence[Override]
) -> list[str]:
    """The domains of a run: those named, or all that have prompts, or those of the base config.

    Raises
    ------
    InputError
        when nothing says which, or both ways are used at once.
    """
    if named and everything:
        raise InputError("--domain and --all: both given, expected one. Leave one out.")
    if named:
        return list(dict.fromkeys(named))
    config = load_config(base, None, overrides)
    root = config.prompts_folder
    everything = everything or config.domains == "all"
    if config.domains and not everything:
        return list(dict.fromkeys(config.domains))
    found = prompts.list_domains(root) if root.is_dir() else []
    if everything and found:
        return found
    if everything:
        raise InputError(f"{root}: no domain here, expected folders with a train.jsonl. Run `true-kd init`.")
    listed = f" ({', '.join(found)})" if found else ""
    raise InputError(f"no domain was named, expected --domain NAME or --all{listed}.")


def plan(
    base: Path | None, domains: Sequence[str], overrides: Sequence[Override]
) -> tuple[list[Job], dict[str, TrueKDError]]:
    """A job per domain, and the error of each domain whose config or prompts cannot be read."""
    jobs, failures = [], {}
    for domain in domains:
        try:
            prompts.check_domain_name(domain)
            config = load_config(base, domain, overrides)
            refuse_links(config.out_folder / domain)
            train, valid = read_domain(config.prompts_folder, domain)
            jobs.append(Job(domain, config, train, valid))
        except TrueKDError as error:
            failures[domain] = error
    return jobs, failures


def refuse_links(folder: Path) -> None:
    """A domain's folder and the locks beside it are true-kd's to write and to delete: none may be somewhere else."""
    locks = folder.parent.glob(".lock*")
    for place in (folder, folder / adapters.CONTROL, *folder.glob("checkpoint_*"), *locks):
        if place.is_symlink():
            raise InputError(
                f"{quote(str(place))}: a link, expected a place of its own, because true-kd writes and deletes in it. "
                "Remove the link, or choose another --out."
            )


def read_domain(root: Path, domain: str) -> tuple[list[Prompt], list[Prompt]]:
    """Training and validation prompts of a domain; without a validation file, a tenth of the former is held out."""
    if not root.is_dir():
        raise PromptError([f"prompts {quote(str(root))}: no such folder. Run `true-kd init`, or give --prompts."])
    train = prompts.load_prompts(root, domain, "train")
    if prompts.has_split(root, domain, "valid"):
        return train, prompts.load_prompts(root, domain, "valid")
    return hold_out(train, f"{root / domain}")


def hold_out(train: Sequence[Prompt], where: str) -> tuple[list[Prompt], list[Prompt]]:
    """A tenth of the prompts, chosen by their content so that adding others does not move them, and the rest."""
    if len(train) < 2:
        raise PromptError([f"{where}: {len(train)} prompt, expected two or more: one is held out for validation."])
    order = sorted(range(len(train)), key=lambda index: digest_json(train[index].identity()))
    held = set(order[: max(1, round(HELD_OUT * len(train)))])
    return (
        [prompt for index, prompt in enumerate(train) if index not in held],
        [prompt for index, prompt in enumerate(train) if index in held],
    )
