"""What tokenizers make of a domain's prompts: whether templates take them, and what of each reply is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np

from true_kd import stores
from true_kd.alignment import Aligner, Alignment, Pairing, pair
from true_kd.cache import CacheIdentity, TargetCache
from true_kd.capture import TeacherPrompt, render_for, teacher_identity
from true_kd.config import RunConfig
from true_kd.datasets import LaidOut, lay_out
from true_kd.errors import InputError, TrueKDError
from true_kd.evaluation import right_answers
from true_kd.examples import TemplateOverrunError, render
from true_kd.jobs import find_teacher
from true_kd.models import (
    ModelOptions,
    ModelTokenizer,
    NotDownloaded,
    open_tokenizer_here,
    token_pieces,
)
from true_kd.preflight.findings import Counts, Sheet, ShownExample, ShownToken
from true_kd.prompts import Prompt
from true_kd.shards import CachedReply
from true_kd.suggest import percent, quote
from true_kd.targets import HiddenTargets
from true_kd.vocabulary import VocabStrategy, VocabularyMap


class Models:
    """The tokenizers of all domains, each opened once, and each pair of vocabularies compared once."""

    def __init__(self) -> None:
        self.open = cache(open_tokenizer_here)
        self.pair = cache(self._pair)
        self.aligner = cache(self._aligner)

    def _pair(self, teacher: ModelOptions, student: ModelOptions, strategy: VocabStrategy, force: bool) -> Pairing:
        return pair(self.open(teacher, "teacher"), self.open(student, "student"), student, strategy, force)

    def _aligner(self, teacher: ModelOptions, alignment: Alignment) -> Aligner:
        theirs, ours = self.open(teacher, "teacher"), self.open(alignment.student, "student")
        return Aligner(alignment.way, theirs, ours)

    def try_open(self, options: ModelOptions, seam: str, sheet: Sheet) -> ModelTokenizer | None:
        """A tokenizer, or None and a note."""
        try:
            return self.open(options, seam)
        except NotDownloaded as error:
            sheet.not_checked(f"what needs the {seam}'s tokenizer: {error}")
        except TrueKDError as error:
            sheet.refused("model", error)
        return None


@dataclass
class Met:
    """What tokenizers make of one prompt."""

    prompt: Prompt
    asked: TeacherPrompt | None = None
    """For the teacher; None where its tokenizer is not here, or refuses."""
    reply: CachedReply | None = None
    """The reply, by the teacher's ids, as far as it is there."""
    opening: list[int] | None = None
    """For the student; None where it is not here, or refuses."""
    laid: LaidOut | None = None
    is_cached: bool = False


@dataclass
class _Tally:
    """Numbers over the prompts of a domain."""

    cut: list[tuple[int, int, str]] = field(default_factory=list)
    """Of replies whose end finds no room: how much is cut, of how many tokens, and where."""
    replies: int = 0
    short: list[tuple[int, str]] = field(default_factory=list)
    """Of prompts that leave less room than a reply may take: how much, and where."""


def check_tokens(
    train: Sequence[Prompt], valid: Sequence[Prompt], config: RunConfig, models: Models, show: int, sheet: Sheet
) -> tuple[Counts, list[ShownExample]]:
    """Note what is wrong with prompts as tokens; returns how many there are, and the first of them to look at."""
    met = [Met(prompt) for prompt in (*train, *valid)]
    student = models.try_open(config.student, "student", sheet)
    teacher, paired, aligner = _open_teacher(config, models, student, sheet)
    if teacher is not None:
        _ask(met, teacher, config, sheet)
        _look_up(met, teacher, aligner, config, paired, sheet)
    elif student is not None:
        _assume(met, student, config, sheet)
    tally = _Tally()
    if student is not None:
        vocabulary = paired.vocabulary if paired else VocabularyMap.of_student(student.size, 0)
        for one in met:
            if not _lay_out(one, student, vocabulary, config, tally, sheet):
                break
        _tell(tally, config, sheet)
        if config.evaluation.exact_match:
            _check_answers(valid, student, config, sheet)
    if teacher is not None:
        _check_replies(met, aligner.student if aligner else teacher, config, sheet)
    counts = Counts(
        train_prompts=len(train),
        valid_prompts=len(valid),
        given=sum(one.prompt.completion is not None or one.prompt.text is not None for one in met),
        cached=sum(one.is_cached for one in met),
        prompt_tokens=sum(len(one.opening or ()) for one in met),
        trained_tokens=sum(len(one.laid.example.kept) for one in met[: len(train)] if one.laid and one.laid.example),
        truncated=len(tally.cut),
    )
    shown = [_show(one, student, config) for one in met[: min(show, len(train))] if student and one.opening]
    return counts, shown


def _open_teacher(
    config: RunConfig, models: Models, student: ModelTokenizer | None, sheet: Sheet
) -> tuple[ModelTokenizer | None, Pairing | None, Aligner | None]:
    """The teacher's tokenizer, how it goes with the student's, and what brings replies from the one to the other where
    they differ; each as far as it is there."""
    try:
        source = find_teacher(config)
    except TrueKDError as error:
        sheet.refused("model", error)
        return None, None, None
    teacher = models.try_open(source.options, "teacher", sheet)
    if teacher is None or student is None:
        sheet.not_checked("whether the vocabularies of teacher and student agree: it takes both tokenizers.")
        return teacher and replace(teacher, name=source.name), None, None
    try:
        paired = models.pair(source.options, config.student, config.vocab_strategy, config.force)
        paired.check(config.targets, config.losses)
    except TrueKDError as error:
        sheet.refused("vocabulary", error)
        return replace(teacher, name=source.name), None, None
    aligner = None
    if paired.alignment:
        aligner = models.aligner(source.options, paired.alignment)
        sheet.warning(
            "vocabulary",
            f"teacher {quote(source.name)} and student {quote(config.student.model)}: {paired.vocabulary.differing:,} "
            f"ids stand for different tokens, expected none; vocab_strategy {paired.alignment.way} maps the teacher's "
            "distribution into the student's vocabulary. `true-kd analyze` shows how well; models of one family lose "
            "nothing.",
        )
    return replace(teacher, name=source.name), paired, aligner


def _ask(met: Sequence[Met], teacher: ModelTokenizer, config: RunConfig, sheet: Sheet) -> None:
    """Render every prompt for the teacher."""
    for one in met:
        try:
            [one.asked] = render_for(teacher, [one.prompt], config.capture)
        except InputError as error:
            sheet.refused("template", error)
            if isinstance(error, TemplateOverrunError):
                sheet.not_checked(f"prompts after {one.prompt.where} with the template of {teacher.name}.")
                return


def _look_up(
    met: Sequence[Met],
    teacher: ModelTokenizer,
    aligner: Aligner | None,
    config: RunConfig,
    paired: Pairing | None,
    sheet: Sheet,
) -> None:
    """Read the replies that the cache holds; it is neither made nor touched."""
    try:
        store = _find_cache(teacher, config, paired.alignment if paired else None)
        there = [one for one in met if store and one.asked and one.asked.key in store]
        replies = store.read(dict.fromkeys(one.asked.key for one in there), note_use=False) if there else {}
    except TrueKDError as error:
        sheet.not_checked(f"what the cache holds: {error}")
        replies, there = {}, []
    for one in there:
        one.reply, one.is_cached = replies[one.asked.key], True
    for one in met:
        if one.reply is None and one.asked and one.asked.rendered.response is not None:
            rendered = one.asked.rendered
            tokens = rendered.response
            if aligner is not None:
                tokens = aligner.retell(tokens, rendered.prompt, one.asked.text).ours
            one.reply = _without_targets(tokens)


def _find_cache(teacher: ModelTokenizer, config: RunConfig, alignment: Alignment | None) -> TargetCache | None:
    """The cache that a run would use; None where a budget has not chosen one yet, or may choose any of several."""
    options, root = config.targets, config.cache_folder
    if not options.has_budget:
        return TargetCache(root, teacher_identity(teacher, options.settings, alignment))
    wanted = {name: getattr(options.settings, name) for name in ("kind", "share", "draw_temperature")}
    found = [
        store
        for store in (stores.scan(root).stores if root.is_dir() else ())
        if store.is_current
        and store.identity.get("teacher") == teacher.digest
        and store.identity.get("alignment") == (alignment.facts if alignment else None)
        and all(store.settings.get(name) == value for name, value in wanted.items())
    ]
    if len(found) != 1:
        return None
    facts = {name: fact for name, fact in found[0].identity.items() if name != "format"}
    return TargetCache(root, CacheIdentity(facts))


def _assume(met: Sequence[Met], student: ModelTokenizer, config: RunConfig, sheet: Sheet) -> None:
    """Where the teacher's tokenizer is not here, take the data's replies as the student's would cut them."""
    assumed = False
    for one in met:
        if one.prompt.completion is None and one.prompt.text is None:
            continue
        try:
            rendered = render(one.prompt, student.tokenizer, student.stop_ids, student.name)
        except InputError:
            continue  # told where it is laid out
        one.reply, assumed = _without_targets(rendered.response), True
    if assumed:
        sheet.not_checked("how the teacher cuts the data's replies into tokens: the student's stand in for them.")


def _without_targets(tokens: Sequence[int]) -> CachedReply:
    """A reply of the data as it will lie in the cache, without what the teacher will say of it."""
    count = len(tokens)
    nothing = HiddenTargets(np.zeros((count, 0), dtype=np.float16), None)
    return CachedReply(np.array(tokens, dtype=np.int32), "given", nothing, np.arange(count, dtype=np.int32))


def _lay_out(
    one: Met, student: ModelTokenizer, vocabulary: VocabularyMap, config: RunConfig, tally: _Tally, sheet: Sheet
) -> bool:
    """Lay a prompt out for the student; False where no other should be tried."""
    prompt, limit = one.prompt, config.training.max_seq_length
    try:
        if one.reply is None:
            one.opening = render(prompt, student.tokenizer, student.stop_ids, student.name).prompt
        else:
            one.laid = lay_out(prompt, one.reply, student, vocabulary, limit)
            one.opening = one.laid.opening
    except InputError as error:
        sheet.refused("template", error)
        if isinstance(error, TemplateOverrunError):
            sheet.not_checked(f"prompts after {prompt.where} with the template of {student.name}.")
            return False
        return True
    length = len(one.opening)
    if length >= limit:
        sheet.problem(
            "length",
            f"{prompt.where}: the prompt has {length:,} tokens, expected fewer than training.max_seq_length={limit}: "
            "nothing of its reply is trained. Shorten it, or raise --max-seq-length.",
        )
        return True
    if one.laid is None:
        if limit - length < config.capture.max_tokens:
            tally.short.append((limit - length, prompt.where))
        return True
    tally.replies += 1
    if not one.laid.is_writable:
        sheet.problem(
            "vocabulary",
            f"{prompt.where}: the reply has tokens that the student {quote(student.name)} lacks, expected none: it is "
            "left out. Choose a nearer student, or remove the line.",
        )
    elif one.laid.example is None:
        sheet.problem(
            "length",
            f"{prompt.where}: 0 trained tokens, expected one at least: none of those that count lies within "
            f"training.max_seq_length={limit}. Raise --max-seq-length, or shorten the prompt.",
        )
    elif one.laid.cut:
        tally.cut.append((one.laid.cut, len(one.reply.tokens), prompt.where))
    return True


def _tell(tally: _Tally, config: RunConfig, sheet: Sheet) -> None:
    """Say what was counted over all prompts."""
    limit = config.training.max_seq_length
    if tally.cut:
        cut, of, where = max(tally.cut)
        sheet.warning(
            "length",
            f"{where}: {cut:,} of the {of:,} tokens of the reply find no room within training.max_seq_length={limit}, "
            f"expected all: the worst of {len(tally.cut)} cut among {tally.replies} replies "
            f"({percent(len(tally.cut) / tally.replies)}). Raise --max-seq-length by {cut}, or shorten them.",
        )
    if tally.short:
        room, where = min(tally.short)
        sheet.warning(
            "length",
            f"{where}: leaves {room:,} tokens for the teacher's reply, the least of {len(tally.short)} prompts that "
            f"leave fewer than capture.max_tokens={config.capture.max_tokens}: longer replies will be cut off. Raise "
            "--max-seq-length, or lower capture.max_tokens.",
        )


def _check_answers(valid: Sequence[Prompt], student: ModelTokenizer, config: RunConfig, sheet: Sheet) -> None:
    """Note answers that the student cannot write so that the grading knows them again."""
    known = {finding.message.partition(": ")[0] for finding in sheet.findings if finding.kind == "answer"}
    for prompt in valid:
        if prompt.answer is None or prompt.where in known:
            continue
        # The shortest reply that could be right.
        tokens = list(student.tokenizer.encode(prompt.answer, add_special_tokens=False))
        if not right_answers([prompt], [tokens], student, config.evaluation)[0]:
            written = student.tokenizer.decode(tokens)
            sheet.problem(
                "answer",
                f"{prompt.where}: answer {quote(prompt.answer)} comes out of the student's tokenizer as "
                f"{quote(written)}, expected the same: no reply can be right. Write it otherwise.",
            )
        elif len(tokens) > config.capture.max_tokens:
            sheet.problem(
                "answer",
                f"{prompt.where}: the answer takes {len(tokens):,} tokens, expected no more than "
                f"capture.max_tokens={config.capture.max_tokens}: no reply can be right. Shorten it, or raise that.",
            )


def _check_replies(met: Sequence[Met], teacher: ModelTokenizer, config: RunConfig, sheet: Sheet) -> None:
    """Note replies that say nothing, and those that the teacher could not finish."""
    stop = set(teacher.stop_ids)
    there = [one for one in met if one.reply is not None]
    for one in there:
        if teacher.tokenizer.decode([token for token in one.reply.tokens.tolist() if token not in stop]).strip():
            continue
        if one.reply.finished == "given":
            sheet.problem(
                "reply",
                f"{one.prompt.where}: the reply is empty once the chat template of {teacher.name} has printed it, "
                "expected text. Write it, or remove the line.",
            )
        else:
            sheet.warning(
                "reply",
                f"{one.prompt.where}: the teacher's reply in the cache is empty, expected text. Change or remove the "
                "prompt.",
            )
    long = [one for one in there if one.reply.finished == "length"]
    if long:
        sheet.warning(
            "reply",
            f"{long[0].prompt.where}: the teacher's reply ends at capture.max_tokens={config.capture.max_tokens}, the "
            f"first of {len(long)} ({percent(len(long) / len(there))}), expected it to end by itself. Raise it: the "
            "student learns to stop from replies that do.",
        )


def _show(one: Met, student: ModelTokenizer, config: RunConfig) -> ShownExample:
    """A prompt as the student meets it in training."""
    example = one.laid.example if one.laid else None
    tokens = one.opening if example is None else example.tokens.tolist()
    trained = [False] * len(tokens) if example is None else example.loss_mask.tolist()
    pieces = token_pieces(student.tokenizer, tokens)
    note = ""
    if one.reply is None:
        note = "The teacher will write its reply here."
    elif example is None:
        note = "Nothing of it is trained."
    elif not one.is_cached and config.targets.settings.share < 1.0:
        note = "Which of these tokens are trained is for the teacher to say (targets.share)."
    return ShownExample(
        where=one.prompt.where,
        reply="teacher" if one.reply is None else "data" if one.reply.finished == "given" else "cache",
        prompt_tokens=len(one.opening),
        trained_tokens=sum(trained),
        cut_tokens=one.laid.cut if one.laid else 0,
        tokens=tuple(ShownToken(*token) for token in zip(tokens, pieces, trained, strict=True)),
        note=note,
    )
