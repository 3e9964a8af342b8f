"""The comparison of teacher and student on a few held-out prompts, before the teacher answers all others.

What the teacher writes here goes to the cache and is not written again. Teacher and student are open one after the
other, never together.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

from true_kd import events
from true_kd.alignment import Compatibility, MappedTargets, sum_up
from true_kd.cache import TargetCache, reply_key
from true_kd.capture import TeacherPrompt, capture, render_for, teacher_identity
from true_kd.datasets import read_replies, sample_data
from true_kd.errors import InputError, TrueKDError, let_go
from true_kd.evaluation import exact_match, measure
from true_kd.examples import Example, Rendered, make_example
from true_kd.gate import Headroom, ParentComparison, check_sound, compare_with_parent, weigh_up
from true_kd.jobs import Job
from true_kd.models import LanguageModel, ModelOptions, open_model, release_memory
from true_kd.prompts import Prompt
from true_kd.suggest import quote
from true_kd.targets import TargetSettings
from true_kd.teacher import Teacher, choose_targets, lacks_head, mend, teacher_answers
from true_kd.vocabulary import require_match

_WORTHWHILE = 4
"""How many times the prompts of a probe must be left to capture for it to come first: it opens the teacher twice."""


def probe(
    group: Sequence[Job], teacher: Teacher, settings: Mapping[str, TargetSettings]
) -> Generator[events.Event, None, dict[str, Headroom | Exception]]:
    """Compare teacher and student of those jobs of one teacher that have much left to capture.

    Returns
    -------
    dict
        by domain what there is to learn, or what stands against finding out; domains that were not probed are not here.
    """
    samples: dict[str, Sample] = {}
    found: dict[str, Headroom | Exception] = {}
    for job in group:
        try:
            sample = Sample(job, teacher, settings[job.domain], job.config.gate.prompts)
            if sample.is_worthwhile(job, teacher):
                samples[job.domain] = sample
                yield from sample.capture(teacher)
        except Exception as error:  # noqa: BLE001 - a domain fails alone, be it by a bug
            let_go(error)
            found[job.domain] = error
    chosen = [job for job in group if job.domain in samples and job.domain not in found]
    if chosen:
        teacher.close()
    found |= yield from compare_samples(chosen, samples, teacher)
    # Of a sample that says nothing nothing follows: the domain may have longer replies elsewhere.
    return {domain: each for domain, each in found.items() if not isinstance(each, EmptySample)}


def sample_all(
    group: Sequence[Job], teacher: Teacher, everyone: Sequence[Job]
) -> Generator[events.Event, None, tuple[dict[str, Sample], dict[str, Headroom | Exception]]]:
    """The samples of all jobs of one teacher, captured; and by domain what stands against it."""
    samples: dict[str, Sample] = {}
    refused: dict[str, Headroom | Exception] = {}
    try:
        alike = [job for job in everyone if job.teacher.options == teacher.options]
        settings = yield from choose_targets(group, teacher, alike)
    except TrueKDError as error:
        let_go(error)
        return samples, {job.domain: error for job in group}
    for job in group:
        try:
            sample = Sample(job, teacher, settings[job.domain], job.config.gate.prompts)
            yield from sample.capture(teacher)
            samples[job.domain] = sample
        except Exception as error:  # noqa: BLE001 - a domain fails alone, be it by a bug
            let_go(error)
            refused[job.domain] = error
    return samples, refused


def compare_samples(
    jobs: Sequence[Job], samples: Mapping[str, Sample], teacher: Teacher
) -> Generator[events.Event, None, dict[str, Headroom | Exception]]:
    """Measure each job's student on its captured sample; the teacher's weights are gone by now."""
    found: dict[str, Headroom | Exception] = {}
    students: dict[ModelOptions, list[Job]] = {}
    for job in jobs:
        students.setdefault(job.config.student, []).append(job)
    for options, theirs in students.items():
        try:
            student = open_model(options, "student")
        except TrueKDError as error:
            let_go(error)
            found |= {job.domain: error for job in theirs}
            continue
        for job in theirs:
            try:
                headroom = samples[job.domain].compare(student, teacher)
            except Exception as error:  # noqa: BLE001 - a domain fails alone, be it by a bug
                let_go(error)
                found[job.domain] = error
                continue
            job.was_probed = True
            found[job.domain] = headroom
            yield events.Probed(job.domain, headroom)
        del student
        release_memory()
    return found


def compare_with_parents(
    jobs: Sequence[Job], samples: Mapping[str, Sample], teacher: Teacher, parent: Teacher
) -> Generator[events.Event, None, dict[str, ParentComparison]]:
    """Measure a teacher against its parent on what it wrote to the samples; the two are open one after the other.

    Raises
    ------
    VocabularyError
        when the two do not mean the same by an id.
    """
    ids, theirs = parent.text, teacher.text
    require_match(ids.ids, theirs.ids, ids.size, theirs.size)
    teacher.close()
    scored = {}
    for job in jobs:
        if not parent.is_open:
            yield events.TeacherOpening(parent.options.model)
        scored[job.domain] = samples[job.domain].scored_by(parent)
    parent.close()
    found = {}
    for job in jobs:
        if not teacher.is_open:
            yield events.TeacherOpening(teacher.options.model)
        training = job.config.training
        final = job.config.losses.final
        scores = measure(teacher.open().module, scored[job.domain], final, training.batch_size)
        check_sound(scores, f"teacher {quote(teacher.options.model)}")
        found[job.domain] = compare_with_parent(scored[job.domain], scores)
        yield events.ParentCompared(job.domain, parent.options.model, len(scored[job.domain]))
    teacher.close()
    return found


class EmptySample(InputError):
    """No reply of a sample can be measured."""

    def __init__(self, domain: str, prompts: int, limit: int) -> None:
        super().__init__(
            f"{domain}: of its first {prompts} validation prompts none leaves room for a reply within "
            f"training.max_seq_length={limit} that the student can write, expected one at least. Raise it, or --sample."
        )


class Sample:
    """The first held-out prompts of a domain, and what the teacher replies to them."""

    def __init__(self, job: Job, teacher: Teacher, settings: TargetSettings, count: int) -> None:
        self._job = job
        self._settings = settings
        self._cache = TargetCache(job.config.cache_folder, teacher_identity(teacher.text, settings, job.alignment))
        self._prompts: list[Prompt] = list(job.valid_prompts[:count])
        self._asked: list[TeacherPrompt] = render_for(teacher.text, self._prompts, job.config.capture)

    def is_worthwhile(self, job: Job, teacher: Teacher) -> bool:
        """Whether so much is left to capture that a look at the sample should come first."""
        if not self._asked or not teacher.has_weights:
            return False
        everything = render_for(teacher.text, [*job.train_prompts, *job.valid_prompts], job.config.capture)
        missing = {prompt.key for prompt in everything if prompt.key not in self._cache}
        return len(missing) > _WORTHWHILE * len(self._asked)

    def capture(self, teacher: Teacher) -> Generator[events.Event, None, None]:
        """Have the teacher reply, as far as the cache lacks it."""
        if teacher.has_weights:
            yield from mend(self._job.domain, self._cache, any(prompt.key not in self._cache for prompt in self._asked))
        if self._is_captured():
            return
        yield from teacher.reserve()
        self._cache.refresh()
        if self._is_captured():
            return
        if not teacher.is_open:
            yield events.TeacherOpening(self._job.config.teacher.model)
        config = self._job.config
        teacher.keep_stand_in(self._cache)
        aligner = teacher.aligner(self._job.alignment)
        for progress in capture(
            teacher.open(), self._asked, self._cache, config.capture, self._settings, aligner=aligner
        ):
            yield events.Captured(self._job.domain, progress, is_probe=True)

    def _is_captured(self) -> bool:
        return not lacks_head(self._cache, self._settings) and all(prompt.key in self._cache for prompt in self._asked)

    def scored_by(self, parent: Teacher) -> list[Example]:
        """The sample's replies, as another model with the same ids scores them; no longer than training takes them."""
        config = self._job.config
        replies = self._cache.read([prompt.key for prompt in self._asked])
        given = [
            TeacherPrompt(rendered, reply_key(rendered.prompt, rendered.response))
            for asked in self._asked
            for rendered in [Rendered(asked.rendered.prompt, replies[asked.key].tokens.tolist())]
        ]
        cache = TargetCache(config.cache_folder, teacher_identity(parent.text, self._settings))
        for _ in capture(parent.open(), given, cache, config.capture, self._settings):
            pass
        scored = read_replies(cache, [prompt.key for prompt in given])
        examples = [
            make_example(
                asked.rendered.prompt,
                scored[asked.key].tokens,
                scored[asked.key].targets,
                scored[asked.key].kept,
                prompt.where,
                config.training.max_seq_length,
            )
            for asked, prompt in zip(given, self._prompts, strict=True)
        ]
        found = [example for example in examples if example is not None]
        if not found:
            raise EmptySample(self._job.domain, len(self._prompts), config.training.max_seq_length)
        return found

    def mapped(self, teacher: Teacher) -> tuple[Compatibility, MappedTargets] | None:
        """How the tokenizers of teacher and student go together on the sample; None where they are one."""
        aligner = teacher.aligner(self._job.alignment)
        if aligner is None:
            return None
        replies = self._cache.read(dict.fromkeys(prompt.key for prompt in self._asked))
        return aligner.compatibility, sum_up(replies.values(), aligner.way)

    def compare(self, student: LanguageModel, teacher: Teacher) -> Headroom:
        """What the student's scores on the replies say.

        Raises
        ------
        InputError
            when no prompt of the sample leaves room for a reply.
        """
        config = self._job.config
        examples, given = sample_data(self._job, self._prompts, self._asked, self._cache, student)
        if not examples:
            raise EmptySample(self._job.domain, len(self._prompts), config.training.max_seq_length)
        scores = measure(student.module, examples, config.losses.final, config.training.batch_size)
        check_sound(scores, f"student {quote(config.student.model)}")
        reader = teacher.reader(self._job.alignment)
        taught = teacher_answers(self._prompts, self._asked, self._cache, reader, config.evaluation)
        checkable = [prompt for prompt in self._prompts if prompt.answer is not None]
        right = exact_match(student, checkable, config.capture, config.evaluation) if taught is not None else None
        return weigh_up(examples, scores, student.tokenizer, given and self._job.knows_text, taught, right)
