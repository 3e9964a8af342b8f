"""What a run will do, take and leave, said before it begins: nothing is written, and no weights are opened."""

from __future__ import annotations

import contextlib
import heapq
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import mlx.nn as nn

from true_kd.cache import TargetCache
from true_kd.capture import TeacherPrompt, render_for, teacher_identity
from true_kd.checkpoints import KEPT
from true_kd.errors import CacheError, TrueKDError, let_go, shared_exit_code
from true_kd.examples import render
from true_kd.jobs import Job
from true_kd.losses import chunk_rows
from true_kd.memory import StepMemory, budget_bytes
from true_kd.models import (
    LoraOptions,
    ModelOptions,
    ModelTokenizer,
    UnknownDepth,
    add_lora,
    open_skeleton,
    open_tokenizer,
    trainable,
)
from true_kd.options import record
from true_kd.pipeline.steps import group_by_teacher, identify_jobs
from true_kd.planning.lengths import Basis, Lengths, find_lengths
from true_kd.planning.machines import Fit, find_fits, weight_bytes
from true_kd.planning.rehearsal import ROUNDS, Costs, StudentWork, rehearse_student, rehearse_teacher
from true_kd.planning.reuse import Reuse, find_reuse
from true_kd.shards import estimate_bytes
from true_kd.targets import HiddenTargets, TargetSettings
from true_kd.teacher import Teacher, WeightsWanted, choose_targets
from true_kd.training import Room


@record
class DomainForecast:
    """What a run will do for one domain. Memory and disk in bytes; None for what nobody can say."""

    domain: str
    train_examples: int
    valid_examples: int
    train_tokens: int
    """Prompt and response tokens, once through the data."""
    train_response_tokens: int
    """Those of them that count in the loss."""
    truncated: int
    """Examples whose response will be cut at training.max_seq_length."""
    dropped: int
    """Examples that will be left out."""
    cached: int
    """Replies in the cache."""
    to_score: int
    """Replies of the data that the teacher will read."""
    to_write: int
    """Replies that the teacher will write."""
    reply_tokens: int
    """Tokens that a reply to be written is taken to have."""
    basis: Basis
    """How these are known: nothing is to be written (known), as long as replies of this domain in the cache are on
    average (sample), or as capture.max_tokens allows (bound), so that all that follows from them is too much."""
    cache_bytes: int
    """Of all its targets."""
    new_cache_bytes: int
    """Of those that are still to come."""
    bytes_per_token: float
    bytes_known: bool
    """Whether that is measured on targets of this teacher that are in the cache, or a guess."""
    folder_bytes: int
    """That the domain's folder takes at most: adapter, checkpoints, what they go on from, and a control's."""
    trainable_parameters: int
    capture_peak: int | None
    """Of the teacher's phase; 0 where the teacher is not needed."""
    training_peak: int | None
    """Of the student's phase."""
    seconds: Mapping[str, float] | None
    """Per phase: capture, training, evaluation, control and starting; None where nothing was rehearsed."""
    reuse: Reuse
    notes: tuple[str, ...] = ()
    """What else to know, in words."""


@record
class Forecast:
    """What a run will do."""

    domains: tuple[DomainForecast, ...]
    failures: Mapping[str, str]
    """What keeps a domain from being run, by its name."""
    exit_code: int
    """0, or what a run of these domains would fail with."""
    budget: int
    """Bytes that the student's phase may take."""
    free: Mapping[str, int]
    """Bytes free on the disk, by folder: that of the cache, and that of the adapters."""
    fits: tuple[Fit, ...]
    """What fits Macs of some sizes, for the models of the first domain; empty where that was not asked for."""
    seconds: float | None
    """Of everything."""


STARTING = 2.5
"""Seconds that a process of the run takes before it begins: two of them are imports, measured on two idle cores."""
REPORT_BYTES = 5_000_000
"""Of report.html, nearly all of it plotly.js."""


def forecast(
    jobs: Sequence[Job], failures: Mapping[str, TrueKDError], with_probe: bool = True, with_fits: bool = True
) -> Forecast:
    """What `distill` will do with these jobs.

    Parameters
    ----------
    failures
        those of planning: see `jobs.plan`.
    with_probe
        rehearse both phases for minutes and memory: see `rehearsal`.

    Raises
    ------
    TrueKDError
        when no domain can be run at all.
    """
    jobs, refused = identify_jobs(jobs, failures)
    looks = _Looks()
    found: dict[str, DomainForecast] = {}
    wrong = dict(refused)
    for group in group_by_teacher(jobs):
        for job in group:
            try:
                found[job.domain] = _forecast_domain(job, group, looks, with_probe)
            except TrueKDError as error:
                let_go(error)
                wrong[job.domain] = error
    config = jobs[0].config
    seconds = [sum(each.seconds.values()) for each in found.values() if each.seconds is not None]
    return Forecast(
        domains=tuple(found[job.domain] for job in jobs if job.domain in found),
        failures={domain: str(error) for domain, error in wrong.items()},
        exit_code=shared_exit_code(wrong.values()),
        budget=budget_bytes(config.memory_gb),
        free={str(folder): _free(folder) for folder in (config.cache_folder, config.out_folder)},
        fits=tuple(_fits(jobs[0], found[jobs[0].domain], looks)) if with_fits and jobs[0].domain in found else (),
        seconds=sum(seconds) if len(seconds) == len(found) else None,
    )


class _Looks:
    """What is found of models, once each."""

    def __init__(self) -> None:
        self.tokenizer = cache(open_tokenizer)
        self.student = cache(_open_student)
        self.teacher = cache(partial(Teacher, may_open=False))
        self.opened: set[ModelOptions] = set()
        """Teachers whose opening is in the forecast of a domain before."""


def _open_student(options: ModelOptions, lora: LoraOptions) -> nn.Module:
    skeleton = open_skeleton(options, "student")
    add_lora(skeleton, lora)
    return skeleton


@dataclass
class _Domain:
    """A job, and what is known of it."""

    job: Job
    teacher: Teacher
    student: ModelTokenizer
    settings: TargetSettings
    cache: TargetCache
    train: Sequence[TeacherPrompt]
    valid: Sequence[TeacherPrompt]
    lengths: Lengths
    notes: list[str] = field(default_factory=list)

    @property
    def missing(self) -> list[TeacherPrompt]:
        """Prompts whose replies are to come, each once."""
        asked = {prompt.key: prompt for prompt in (*self.train, *self.valid)}
        return [prompt for key, prompt in asked.items() if key not in self.cache]

    def reply(self, prompt: TeacherPrompt) -> int:
        """Tokens of a reply."""
        return self.lengths.lengths[prompt.key]

    def length(self, prompt: TeacherPrompt) -> int:
        """Tokens of a prompt and its reply."""
        return len(prompt.rendered.prompt) + self.reply(prompt)


def _forecast_domain(job: Job, group: Sequence[Job], looks: _Looks, with_probe: bool) -> DomainForecast:
    domain = _look_at(job, group, looks)
    lengths, config = domain.lengths, job.config
    reuse = find_reuse(job)
    rate, known = _bytes_per_token(domain)
    missing = domain.missing
    new_tokens = sum(map(domain.reply, missing))
    module = looks.student(config.student, config.lora)
    parameters = sum(array.size for array in trainable(module).values())
    train, valid = lengths.train, lengths.valid
    capture_peak: int | None = None if missing else 0
    training_peak, seconds = None, None
    if with_probe and train.examples and valid.examples:
        try:
            capture_peak, training_peak, seconds = _rehearse(domain, module, reuse, missing, looks)
        except (UnknownDepth, TrueKDError) as error:
            let_go(error)
            domain.notes.append(f"no estimate of time and memory: {error}")
    if not (train.examples and valid.examples):
        domain.notes.append("no example is left to train or to validate on: the run will refuse this domain")
    if config.targets.has_budget and missing and not known:
        domain.notes.append("the budget on disk sets the threshold once the teacher has answered a few prompts")
    if job.alignment and missing:
        domain.notes.append("the teacher reads each reply again for a student of another tokenizer: not in the time")
    arms = 2 if config.control != "none" else 1
    return DomainForecast(
        domain=job.domain,
        train_examples=len(train.examples),
        valid_examples=len(valid.examples),
        train_tokens=sum(map(len, train.examples)),
        train_response_tokens=sum(len(example.kept) for example in train.examples),
        truncated=train.truncated + valid.truncated,
        dropped=sum(split.too_long + split.unwritable for split in (train, valid)),
        cached=lengths.cached,
        to_score=lengths.given,
        to_write=lengths.to_write,
        reply_tokens=lengths.reply_tokens,
        basis=lengths.basis,
        cache_bytes=round(rate * lengths.response_tokens),
        new_cache_bytes=round(rate * new_tokens),
        bytes_per_token=rate,
        bytes_known=known,
        folder_bytes=0 if reuse.finished else arms * _folder_bytes(parameters, config.training.iters, job),
        trainable_parameters=parameters,
        capture_peak=capture_peak,
        training_peak=0 if reuse.finished else training_peak,
        seconds={} if reuse.finished else seconds,
        reuse=reuse,
        notes=tuple(domain.notes),
    )


def _look_at(job: Job, group: Sequence[Job], looks: _Looks) -> _Domain:
    teacher = looks.teacher(job.teacher.options, job.config.cache_folder)
    student = looks.tokenizer(job.config.student, "student")
    settings = _settings(job, group, teacher)
    cached = TargetCache(job.config.cache_folder, teacher_identity(teacher.text, settings, job.alignment))
    train = render_for(teacher.text, job.train_prompts, job.config.capture)
    valid = render_for(teacher.text, job.valid_prompts, job.config.capture)
    lengths = find_lengths(job, cached, train, valid, student, settings)
    return _Domain(job, teacher, student, settings, cached, train, valid, lengths)


def _settings(job: Job, group: Sequence[Job], teacher: Teacher) -> TargetSettings:
    """The settings of the targets: as the options have them where a budget was not measured yet."""
    choosing = choose_targets([job], teacher, group)
    try:
        while True:
            next(choosing)
    except StopIteration as done:
        return done.value[job.domain]
    except WeightsWanted:
        return job.config.targets.settings


def _bytes_per_token(domain: _Domain) -> tuple[float, bool]:
    """What a response token takes on disk, and whether that was measured on targets of this teacher."""
    keys = [prompt.key for prompt in (*domain.train, *domain.valid) if prompt.key in domain.cache]
    if keys and (tokens := domain.cache.stored_tokens(keys)):
        return domain.cache.size(keys) / tokens, True
    settings, vocab = domain.settings, domain.teacher.text.size
    allowed = domain.job.config.targets.bytes_per_token
    if settings.kind == "hidden":
        with contextlib.suppress(CacheError):
            return 2.0 * settings.share * _width(domain), True
    mean = max(1.0, domain.lengths.response_tokens / max(1, len(domain.lengths.lengths)))
    guess = estimate_bytes(
        TYPICAL_ENTRIES[settings.draw_temperature], settings, vocab, mean, domain.job.config.capture.shard_prompts
    )
    return guess if allowed is None else min(guess, allowed), False


TYPICAL_ENTRIES = {1.0: 2.0, 2.0: 12.0, 4.0: 60.0}
"""Entries of a token by the temperature that they are drawn for: the middle of the teachers in docs/cache.md."""


def _width(domain: _Domain) -> int:
    """Numbers in a hidden state of the teacher."""
    weight = dict(open_skeleton(domain.job.teacher.options, "teacher").named_modules())
    for name in ("lm_head", "model.embed_tokens", "embed_tokens", "transformer.wte"):
        layer = weight.get(name)
        if layer is not None:
            return layer.weight.shape[-1] * (32 // layer.bits if "scales" in layer else 1)
    raise CacheError("the teacher's output head has no known name.")


def _folder_bytes(parameters: int, iters: int, job: Job) -> int:
    """Adapters and checkpoints; the newest of these also have Adam's two moments and the best weights."""
    saved = -(-iters // job.config.training.checkpoint_every)
    return 4 * parameters * (1 + saved + 3 * min(KEPT, saved))


def _rehearse(
    domain: _Domain, module: nn.Module, reuse: Reuse, missing: Sequence[TeacherPrompt], looks: _Looks
) -> tuple[int, int, dict[str, float]]:
    """Peak bytes of both phases, and seconds."""
    config, job = domain.job.config, domain.job
    seconds = {"capture": 0.0, "training": 0.0, "evaluation": 0.0, "control": 0.0, "starting": 0.0}
    capture_peak = 0
    if missing:
        costs = rehearse_teacher(
            job.teacher.options,
            _heaviest(domain, missing),
            domain.lengths.lengths,
            config.capture,
            domain.settings,
            budget_bytes(None),
        )
        capture_peak = round(costs["peak"])
        seconds["capture"] = _capture_seconds(domain, missing, costs)
        if job.teacher.options not in looks.opened:
            looks.opened.add(job.teacher.options)
            seconds["starting"] += STARTING
            seconds["capture"] += costs["opening"]
    if reuse.finished:
        return capture_peak, 0, seconds
    examples = domain.lengths.train.examples
    held = _head_bytes(domain)
    budget = budget_bytes(config.memory_gb) - held
    vocab = domain.student.size
    chunk = chunk_rows(config.losses.chunk, vocab)
    dense = isinstance(examples[0].targets, HiddenTargets)
    memory = StepMemory.of(module, vocab, chunk, config.training.grad_checkpoint, dense)
    room = Room(memory, weight_bytes(module), budget)
    student, pairs = domain.student, zip(job.valid_prompts, domain.valid, strict=True)
    tasks = [pair for pair in pairs if config.evaluation.exact_match and pair[0].answer is not None]
    checkable = [render(prompt, student.tokenizer, student.stop_ids, student.name).prompt for prompt, _ in tasks]
    replies = [domain.reply(asked) for _, asked in tasks]
    work = StudentWork(
        config=config,
        train=examples,
        valid=domain.lengths.valid.examples,
        checkable=checkable,
        replies=replies,
        room=room,
        budget=budget_bytes(config.memory_gb),
    )
    costs = rehearse_student(work)
    _add_student_seconds(seconds, work, costs, replies, reuse)
    peaks = ("measuring", "answering", "certifying", "training")
    return capture_peak, round(max(costs[name] for name in peaks)) + held, seconds


def _head_bytes(domain: _Domain) -> int:
    """Of the teacher's output head, where targets are its hidden states and it is in the cache."""
    held = domain.cache.head_path
    return held.stat().st_size if held else 0


def _heaviest(domain: _Domain, prompts: Sequence[TeacherPrompt]) -> list[TeacherPrompt]:
    """Of the prompts that are answered together those that take most, and of those with replies some to read."""
    config = domain.job.config.capture
    asked = [prompt for prompt in prompts if prompt.rendered.response is None]
    groups = [asked[at : at + config.shard_prompts] for at in range(0, len(asked), config.shard_prompts)]
    heaviest = max(groups, key=lambda group: sum(map(domain.length, group)), default=[])
    given = sorted((prompt for prompt in prompts if prompt.rendered.response is not None), key=domain.length)
    return [*heaviest[: ROUNDS * config.batch_size], *given[:: max(1, len(given) // 8)], *given[-1:]]


def _capture_seconds(domain: _Domain, missing: Sequence[TeacherPrompt], costs: Costs) -> float:
    config = domain.job.config.capture
    written = [prompt for prompt in missing if prompt.rendered.response is None]
    given = [prompt for prompt in missing if prompt.rendered.response is not None]
    read = sum(len(prompt.rendered.prompt) + len(prompt.rendered.response or ()) for prompt in given)
    steps = sum(
        decoding_steps([domain.reply(prompt) for prompt in written[at : at + config.shard_prompts]], config.batch_size)
        for at in range(0, len(written), config.shard_prompts)
    )
    prompts = sum(len(prompt.rendered.prompt) for prompt in written)
    return costs["scored_token"] * read + costs["prompt_token"] * prompts + costs["step"] * steps


def decoding_steps(replies: Sequence[int], width: int) -> int:
    """Steps in which replies of so many tokens are written, `width` at a time, a new one as soon as one ends."""
    ends: list[int] = []
    for tokens in replies:
        start = heapq.heappop(ends) if len(ends) == width else 0
        heapq.heappush(ends, start + tokens)
    return max(ends, default=0)


def _add_student_seconds(
    seconds: dict[str, float], work: StudentWork, costs: Costs, replies: Sequence[int], reuse: Reuse
) -> None:
    """Add what training and measuring take, as the run books it."""
    config, options = work.config, work.config.training
    held_out = costs["valid_token"] * sum(map(len, work.valid))
    answers = costs["step"] * decoding_steps(replies, config.capture.batch_size)
    answers += costs["prompt_token"] * sum(map(len, work.checkable))
    measured = held_out + answers + costs["speed"]
    left = options.iters - reuse.iteration
    validations = len({*range(options.validate_every, options.iters + 1, options.validate_every), options.iters})
    certified = costs["certified_token"] * _certified_tokens(work)
    trained = costs["trained_token"] * sum(
        len(part) * max(map(len, part)) for parts in work.steps[reuse.iteration :] for part in parts
    )
    validating = held_out * validations * left / options.iters
    seconds["starting"] += STARTING + costs["opening"]
    seconds["evaluation"] += 2 * measured + costs["opening"] + (certified + validating if left else 0.0)
    seconds["training"] += trained
    if reuse.control:
        whole = trained if reuse.iteration == 0 else trained * options.iters / max(1, left)
        seconds["control"] += whole + held_out * (validations + 2) + measured + 3 * costs["opening"]


def _certified_tokens(work: StudentWork) -> int:
    """Tokens of the held-out examples that the certificate looks at."""
    counted = tokens = 0
    for example in work.valid:
        if counted >= work.config.fidelity.tokens:
            break
        counted, tokens = counted + len(example.kept), tokens + len(example)
    return tokens


def _fits(job: Job, found: DomainForecast, looks: _Looks) -> list[Fit]:
    teacher = looks.tokenizer(job.teacher.options, "teacher")
    needed = found.to_write + found.to_score > 0
    prompts = [render(prompt, teacher.tokenizer, teacher.stop_ids, teacher.name).prompt for prompt in job.train_prompts]
    tokens = max(map(len, prompts)) + found.reply_tokens
    vocabs = (teacher.size, looks.tokenizer(job.config.student, "student").size)
    return find_fits(job.config, vocabs, tokens, needed)


def _free(folder: Path) -> int:
    """Bytes free where a folder is, or will be."""
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(place).free
