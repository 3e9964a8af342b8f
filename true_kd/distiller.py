"""The Python API: a thin face on `pipeline.distill`, which does the same for the command line."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from true_kd import events, jobs, pipeline, prompts
from true_kd.config import KDConfig, RunConfig
from true_kd.errors import InputError, TrueKDError
from true_kd.jobs import Job
from true_kd.models import ModelOptions
from true_kd.reporting import KDResult
from true_kd.tracking import Trackers, check_installed
from true_kd.validation import validate

Prompts = Sequence[str] | Sequence[Mapping[str, Any]]
"""Plain strings, or records as the lines of a prompt file hold them."""


class DistillationFailed(TrueKDError):
    """Some domains failed. `results` has those that did not, `failures` the error of each that did."""

    def __init__(self, results: dict[str, KDResult], failures: dict[str, Exception]) -> None:
        self.results = results
        self.failures = failures
        super().__init__("\n".join(f"{domain}: {error}" for domain, error in failures.items()))


class TrueKnowledgeDistiller:
    """Distils a teacher into LoRA adapters of a student, one per domain.

    >>> distiller = TrueKnowledgeDistiller("pocket:teacher", "pocket:student", KDConfig(iters=100))
    >>> result = distiller.distill_domain("sums", ["What is 2 + 2?", "What is 3 + 5?"])  # doctest: +SKIP
    >>> result.before.kl, result.after.kl, result.adapter_path  # doctest: +SKIP

    Parameters
    ----------
    teacher_model_id, student_model_id
        hub ids, local folders or embedded models; None takes those of `config`.
    config
        everything else; `KDConfig()` where none is given.
    """

    def __init__(
        self,
        teacher_model_id: str | Path | None = None,
        student_model_id: str | Path | None = None,
        config: RunConfig | None = None,
    ) -> None:
        config = KDConfig() if config is None else config
        if not isinstance(config, RunConfig):
            raise InputError(f"config: {type(config).__name__}, expected a KDConfig. Write KDConfig(iters=100).")
        # A revision and an adapter in `config` are those of the model named there.
        models = {
            seam: validate(
                ModelOptions,
                {**getattr(config, seam).model_dump(), "model": str(name), "revision": None, "adapter": None},
                lambda _, seam=seam: f"{seam}_model_id",
            )
            for seam, name in (("teacher", teacher_model_id), ("student", student_model_id))
            if name is not None
        }
        self.config = config.model_copy(update=models)

    def __repr__(self) -> str:
        models = f"{self.config.teacher.model!r}, {self.config.student.model!r}"
        return f"{type(self).__name__}({models}, out={self.config.out!r})"

    def distill_domain(
        self, domain: str, train_prompts: Prompts | None = None, valid_prompts: Prompts | None = None
    ) -> KDResult:
        """Distil one domain.

        Parameters
        ----------
        train_prompts
            None reads them from `<config.prompts>/<domain>/`.
        valid_prompts
            None reads them beside the training prompts, or holds out a tenth of those that are given.

        Raises
        ------
        TrueKDError
            whatever stopped the domain.
        """
        results, failures = self._run([self._job(domain, train_prompts, valid_prompts)], {})
        for error in failures.values():
            raise error
        return results[domain]

    def distill_all(self, domains: Sequence[str] | Mapping[str, Prompts] | None = None) -> dict[str, KDResult]:
        """Distil several domains with one opening of the teacher.

        Parameters
        ----------
        domains
            names of domains to read from `config.prompts`, or training prompts by name; None takes every domain
            that has prompts.

        Raises
        ------
        DistillationFailed
            at the end, when a domain failed; the others are done all the same.
        """
        if domains is None:
            domains = prompts.list_domains(self.config.prompts_folder)
        if isinstance(domains, str):
            raise InputError(f"distill_all: one string, expected a list of domains. Write [{domains!r}].")
        given = domains if isinstance(domains, Mapping) else dict.fromkeys(domains)
        if not given:
            raise InputError("distill_all: no domain, expected at least one. Name it, or create its folder of prompts.")
        todo, refused = [], {}
        for domain, train in given.items():
            try:
                todo.append(self._job(domain, train, None))
            except TrueKDError as error:
                refused[domain] = error
        if not todo:
            jobs.refuse(refused)
        results, failures = self._run(todo, refused)
        if failures:
            raise DistillationFailed(results, failures)
        return results

    def _job(self, domain: str, train: Prompts | None, valid: Prompts | None) -> Job:
        prompts.check_domain_name(domain)
        jobs.refuse_links(self.config.out_folder / domain)
        if train is None:
            return Job(domain, self.config, *jobs.read_domain(self.config.prompts_folder, domain))
        read = _read(train, "train_prompts")
        if valid is None:
            return Job(domain, self.config, *jobs.hold_out(read, "train_prompts"))
        return Job(domain, self.config, read, _read(valid, "valid_prompts"))

    def _run(
        self, todo: Sequence[Job], refused: Mapping[str, TrueKDError]
    ) -> tuple[dict[str, KDResult], dict[str, Exception]]:
        check_installed(self.config.report_to)
        # Closed here and not by a destructor: in that, Python would drop a second interrupt while a child still stops.
        with (
            Trackers(self.config.report_to, self.config.out_folder) as trackers,
            contextlib.closing(pipeline.distill(todo, refused)) as running,
        ):
            for event in running:
                for line in trackers.note(event):
                    warnings.warn(line, stacklevel=4)
                if isinstance(event, events.RunFinished):
                    return {result.domain: result for result in event.results}, dict(event.failures)
        raise AssertionError("distill ended without RunFinished")


def _read(given: Prompts, name: str) -> list[prompts.Prompt]:
    if isinstance(given, str) or any(isinstance(item, str) for item in given):
        return prompts.from_strings(given, name)
    return prompts.from_records(given, name)
