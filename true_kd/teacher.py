"""The teacher's phase of one domain: render, look into the cache, and capture what it lacks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from true_kd import events
from true_kd.alignment import Aligner, Alignment
from true_kd.budget import Demand, choose_settings, demand_path, keep_demand, measure, read_demand, write_demand
from true_kd.cache import TargetCache
from true_kd.capture import CaptureOptions, TeacherPrompt, capture, render_for, teacher_identity
from true_kd.errors import ModelError, TrueKDError
from true_kd.evaluation import EvaluationOptions, right_answers
from true_kd.files import make_folder
from true_kd.jobs import CapturedTargets, Job
from true_kd.locks import Lock
from true_kd.manifest import SIZE, TEACHER
from true_kd.models import (
    LanguageModel,
    ModelOptions,
    ModelTokenizer,
    describe,
    open_model,
    open_tokenizer,
    release_memory,
    save_stand_in,
)
from true_kd.prompts import Prompt
from true_kd.sizes import ModelSize, machine, measure_size, read_size, size_file, write_size
from true_kd.suggest import quote
from true_kd.targets import TargetOptions, TargetSettings


class WeightsWanted(BaseException):
    """The teacher has to answer, and may not in this process: no error, and nothing that a domain fails of."""


class Teacher:
    """The teacher's tokenizer, and its weights from the moment they are needed: never, where all is in the cache."""

    def __init__(self, options: ModelOptions, caches: Path, may_open: bool = True) -> None:
        self.options = options
        self._may_open = may_open
        self.text = open_tokenizer(options, "teacher")
        self.has_weights = bool(describe(options, "teacher").weights)
        """False for a teacher that only a cache knows: it says no more than it has said."""
        self._model: LanguageModel | None = None
        self._aligners: dict[Alignment, Aligner] = {}
        self._lock = Lock(caches / f".lock-teacher-{self.text.digest[:16]}")

    def reserve(self) -> Generator[events.Event, None, None]:
        """See to it that no other process captures from this teacher; what one has captured is in the cache by now.

        Raises
        ------
        WeightsWanted
            when the teacher may not be opened here.
        """
        if not self._may_open:
            raise WeightsWanted
        if self._lock.is_held:
            return
        make_folder(self._lock.path.parent)
        if not self._lock.acquire():
            yield events.TeacherBusy(self.options.model, self._lock.holder)
            self._lock.acquire(patience=-1)

    @property
    def is_open(self) -> bool:
        """Whether the weights are in memory."""
        return self._model is not None

    def open(self) -> LanguageModel:
        """The model, opened at the first call."""
        if self._model is None:
            self._model = open_model(self.options, "teacher")
        return self._model

    def aligner(self, alignment: Alignment | None) -> Aligner | None:
        """What brings replies into the tokens of a student, made at the first call; None where nothing has to."""
        if alignment is None:
            return None
        if alignment not in self._aligners:
            student = open_tokenizer(alignment.student, "student")
            self._aligners[alignment] = Aligner(alignment.way, self.text, student)
        return self._aligners[alignment]

    def reader(self, alignment: Alignment | None) -> ModelTokenizer:
        """The tokenizer that reads the replies of a cache."""
        aligner = self.aligner(alignment)
        return self.text if aligner is None else aligner.student

    def keep_stand_in(self, cache: TargetCache) -> None:
        """Have a cache know all of the teacher but its weights."""
        if self.has_weights:
            cache.keep(TEACHER, lambda path: save_stand_in(self.options, self.text.digest, path))

    def close(self) -> bool:
        """Free the weights, for other processes as well; returns whether they had been opened."""
        opened, self._model = self.is_open, None
        release_memory()
        self._lock.release()
        return opened


def choose_targets(
    group: Sequence[Job], teacher: Teacher, everyone: Sequence[Job]
) -> Generator[events.Event, None, dict[str, TargetSettings]]:
    """How much each domain keeps: by its own options, or by what a budget allows over all that share it.

    `everyone` are the jobs of the run with this teacher, those included that are finished: a total is shared among
    all of them, so that a run that is resumed comes to the same.

    Raises
    ------
    InputError
        when a budget is too small, or was never measured and the teacher's weights are not here.
    """
    chosen = {job.domain: job.config.targets.settings for job in group}
    shares = _share_budgets(everyone, teacher)
    wanted = {_way(job) for job in group}
    totals: dict[float | None, float] = {}
    demands: dict[_Way, Demand] = {}
    for way, jobs in shares.items():
        total = way[0].gigabytes
        if total not in {mine[0].gigabytes for mine in wanted}:
            continue
        demands[way] = yield from _measured(way, jobs, teacher)
        totals[total] = totals.get(total, 0.0) + len(jobs.keys) * demands[way].reply_tokens
    for way in [way for way in shares if way in wanted]:
        (options, capturing), demand = way, demands[way]
        choice = choose_settings(
            options, capturing, teacher.text.size, len(shares[way].keys), demand, totals[options.gigabytes]
        )
        yield events.BudgetChosen(choice)
        if teacher.has_weights:
            # It travels with the replies, so that the budget chooses the same where the teacher is not.
            name = demand_path(options, capturing, teacher.text, shares[way].root).name
            for alignment in {job.alignment for job in group if _way(job) == way}:
                kept = TargetCache(shares[way].root, teacher_identity(teacher.text, choice.settings, alignment))
                kept.keep(name, partial(write_demand, demand=demand))
        chosen.update({job.domain: choice.settings for job in group if _way(job) == way})
    return chosen


_Way = tuple[TargetOptions, CaptureOptions]
"""Jobs that keep and capture alike need alike."""


@dataclass
class _Asked:
    """The prompts that share a budget and a way of capturing."""

    model: str
    root: Path
    prompts: list[TeacherPrompt] = field(default_factory=list)

    @property
    def keys(self) -> set[str]:
        return {prompt.key for prompt in self.prompts}


def _way(job: Job) -> _Way:
    return job.config.targets, job.config.capture


def _share_budgets(jobs: Sequence[Job], teacher: Teacher) -> dict[_Way, _Asked]:
    shares: dict[_Way, _Asked] = {}
    for job in jobs:
        if job.config.targets.has_budget:
            asked = shares.setdefault(_way(job), _Asked(job.config.teacher.model, job.config.cache_folder))
            with contextlib.suppress(TrueKDError):  # a domain that cannot be rendered fails in its own turn
                asked.prompts += render_for(teacher.text, [*job.train_prompts, *job.valid_prompts], job.config.capture)
    return {way: asked for way, asked in shares.items() if asked.prompts}


def _measured(way: _Way, asked: _Asked, teacher: Teacher) -> Generator[events.Event, None, Demand]:
    options, capturing = way
    path = demand_path(options, capturing, teacher.text, asked.root)
    demand = _find_demand(path)
    if demand is not None:
        return demand
    if not teacher.has_weights:
        raise ModelError(
            f"teacher {quote(asked.model)}: its weights are not here, and no cache knows what it needs of a budget on "
            "disk. Capture with a budget where the teacher is, and import that, or set targets.threshold instead."
        )
    yield from teacher.reserve()
    demand = _find_demand(path)
    if demand is not None:
        return demand
    if not teacher.is_open:
        yield events.TeacherOpening(teacher.options.model)
    demand = measure(teacher.open(), asked.prompts, capturing, options.settings)
    keep_demand(path, demand)
    return demand


def _find_demand(path: Path) -> Demand | None:
    """A measurement made before, here or where one of the caches here comes from."""
    places = [path, *sorted(path.parent.glob(f"{'[0-9a-f]' * 16}/{path.name}"))]
    return next((demand for place in places if (demand := read_demand(place))), None)


def capture_domain(
    job: Job, teacher: Teacher, settings: TargetSettings
) -> Generator[events.Event, None, CapturedTargets]:
    """Fill the cache with what it lacks of the teacher's replies to a domain's prompts; returns where they lie.

    Raises
    ------
    ModelError
        when it lacks something, and the teacher's weights are not here.
    """
    started = time.perf_counter()
    config = job.config
    cache = TargetCache(config.cache_folder, teacher_identity(teacher.text, settings, job.alignment))
    train = render_for(teacher.text, job.train_prompts, config.capture)
    valid = render_for(teacher.text, job.valid_prompts, config.capture)
    asked = {prompt.key for prompt in (*train, *valid)}
    keep_size = partial(_keep_size, cache, teacher, [prompt.rendered.prompt for prompt in valid], config.evaluation)
    if teacher.has_weights:
        yield from mend(job.domain, cache, any(key not in cache for key in asked))
    missing = _count_missing(cache, asked)
    needed = missing > 0 or lacks_head(cache, settings)
    if needed and not teacher.has_weights:
        raise _refusal(job, cache, missing, len(asked))
    if needed:
        yield from teacher.reserve()
        cache.refresh()
        needed = _count_missing(cache, asked) > 0 or lacks_head(cache, settings)
    if needed:
        if not teacher.is_open:
            yield events.TeacherOpening(config.teacher.model)
        model = teacher.open()
        teacher.keep_stand_in(cache)
        # Before the replies: when all of them are there, the teacher is not opened again for it.
        keep_size()
        aligner = teacher.aligner(job.alignment)
        for progress in capture(model, [*train, *valid], cache, config.capture, settings, aligner=aligner):
            yield events.Captured(job.domain, progress)
    else:
        teacher.keep_stand_in(cache)
        yield events.CaptureReused(job.domain, len(asked))
    size = keep_size()
    return CapturedTargets(
        cache=cache,
        train=train,
        valid=valid,
        seconds=time.perf_counter() - started,
        peak_memory=mx.get_peak_memory() if needed else 0,
        right=teacher_answers(job.valid_prompts, valid, cache, teacher.reader(job.alignment), config.evaluation),
        teacher_size=size,
    )


def mend(domain: str, cache: TargetCache, lacking: bool) -> Iterator[events.CacheDamaged]:
    """Rid a cache of what is damaged before it is filled, and say so; `lacking` is whether a reply is missing."""
    for loss in cache.mend(lacking):
        yield events.CacheDamaged(domain, cache.folder / loss.file, loss.replies)


def _count_missing(cache: TargetCache, keys: Iterable[str]) -> int:
    return sum(key not in cache for key in keys)


def lacks_head(cache: TargetCache, settings: TargetSettings) -> bool:
    """Whether a cache of hidden states is without the teacher's head that reads them."""
    return settings.kind == "hidden" and cache.head_path is None


def _refusal(job: Job, cache: TargetCache, missing: int, total: int) -> ModelError:
    """What to say where a teacher that only a cache knows is asked for more than that."""
    known, name = Path(job.teacher.options.model).parent.name, cache.folder.name
    verb = "is" if missing == 1 else "are"
    lacks = f"{missing} of the {total} prompts {verb} not" if missing else "its output head is not"
    if not missing:
        remedy = "Import that cache again."
    elif name == known:
        remedy = "Capture with these prompts and configs where the teacher is, and import the cache again."
    elif job.alignment:
        remedy = (
            f"Set targets as `true-kd cache info {known[:8]}` shows them; the student has another tokenizer than the "
            "teacher, so that it takes a cache captured with this --student, where the teacher is."
        )
    else:
        remedy = f"Set targets as `true-kd cache info {known[:8]}` shows them, or capture so where the teacher is."
    where = f"in cache {name[:8]}" + ("" if name == known else ", that of this run's targets")
    return ModelError(
        f"teacher {quote(job.config.teacher.model)}: its weights are not here, and {lacks} {where}. {remedy}"
    )


def teacher_answers(
    prompts: Sequence[Prompt],
    asked: Sequence[TeacherPrompt],
    cache: TargetCache,
    reader: ModelTokenizer,
    evaluation: EvaluationOptions,
) -> np.ndarray | None:
    """Which of the prompts with an answer the teacher's captured replies get right, bool [tasks]; `reader` has the
    tokenizer that the cache holds them in.

    None where there are none, or the data wrote some of the replies itself.
    """
    tasks = [(prompt, at) for at, prompt in enumerate(prompts) if prompt.answer is not None]
    replies = cache.read(dict.fromkeys(asked[at].key for _, at in tasks)) if tasks else {}
    if not tasks or not evaluation.exact_match or any(reply.finished == "given" for reply in replies.values()):
        return None
    written = [replies[asked[at].key].tokens for _, at in tasks]
    return right_answers([prompt for prompt, _ in tasks], written, reader, evaluation)


def _keep_size(
    cache: TargetCache, teacher: Teacher, prompts: Sequence[Sequence[int]], evaluation: EvaluationOptions
) -> ModelSize:
    """The teacher's size, measured while its weights are open, and found in the cache afterwards."""
    name = size_file(machine())
    found = _find_size(cache, name)
    wanted = evaluation.speed_tokens > 0
    if teacher.is_open and (found.parameters is None or (wanted and found.tokens_per_second is None)):
        found = measure_size(teacher.open(), teacher.options, "teacher", prompts, evaluation.speed_tokens)
        cache.add_file(name, 0, 0, lambda path: write_size(path, found))
    return found


def _find_size(cache: TargetCache, name: str) -> ModelSize:
    """The teacher's size as measured here, else as measured elsewhere, else nothing."""
    for other in (name, *cache.names(SIZE)):
        path = cache.path_of(other)
        with contextlib.suppress(ValueError, OSError):
            if path is not None:
                return read_size(path)
    return ModelSize()
