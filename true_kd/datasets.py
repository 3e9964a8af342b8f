"""From a job's prompts and the teacher's cached targets to the examples that the student trains and validates on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from true_kd.alignment import sum_up
from true_kd.cache import TargetCache
from true_kd.capture import TeacherPrompt
from true_kd.errors import CacheError, InputError
from true_kd.examples import Example, make_example, render
from true_kd.jobs import Job
from true_kd.models import LanguageModel, ModelTokenizer, load_head
from true_kd.prompts import Prompt
from true_kd.reporting import DataCounts
from true_kd.shards import CachedReply
from true_kd.targets import TeacherHead
from true_kd.vocabulary import VocabularyMap
from true_kd.weighting import weigh_tokens


@dataclass(frozen=True)
class DomainData:
    """What a domain's student meets."""

    train: list[Example]
    valid: list[Example]
    checkable: list[Prompt]
    """Validation prompts with an answer."""
    given: bool
    """Whether the validation replies are the data's own, all of them, not written by the teacher."""
    counts: DataCounts


def build_data(job: Job, student: LanguageModel) -> DomainData:
    """Read the job's targets and lay them out in the student's tokens.

    The prompt is rendered by the student's own chat template, since that is what it will meet; the reply is the
    teacher's, id by id.

    Raises
    ------
    InputError
        when no training or no validation example is left.
    """
    targets, config = job.targets, job.config
    keys = [prompt.key for prompt in (*targets.train, *targets.valid)]
    replies = read_replies(targets.cache, keys)
    splits = {
        "train": build_split(job, job.train_prompts, targets.train, replies, student),
        "valid": build_split(job, job.valid_prompts, targets.valid, replies, student),
    }
    examples = {name: split.examples for name, split in splits.items()}
    for name, found in examples.items():
        if not found:
            raise InputError(
                f"none of the {splits[name].prompts} {name} examples can be trained, expected at least one: "
                f"{splits[name].too_long} prompts leave no room for a reply within training.max_seq_length="
                f"{config.training.max_seq_length}, {splits[name].unwritable} replies have tokens that the student "
                "lacks. Raise the former, or choose a nearer student."
            )
    checkable = [prompt for prompt in job.valid_prompts if prompt.answer is not None]
    counts = DataCounts(
        train_examples=len(examples["train"]),
        valid_examples=len(examples["valid"]),
        train_response_tokens=sum(len(example.kept) for example in examples["train"]),
        train_tokens=sum(len(example) for example in examples["train"]),
        truncated=sum(split.truncated for split in splits.values()),
        dropped=sum(split.too_long + split.unwritable for split in splits.values()),
        cut_replies=sum(replies[key].finished == "length" for key in keys),
        differing_ids=job.vocabulary.differing,
        cache_bytes=targets.cache.size(keys),
        cache_tokens=targets.cache.stored_tokens(keys),
        mapped=sum_up(replies.values(), job.alignment.way) if job.alignment else None,
    )
    train = weigh_tokens(examples["train"], splits["train"].used, config.losses.weigh_by)
    given = all(replies[prompt.key].finished == "given" for prompt in targets.valid)
    return DomainData(train, examples["valid"], checkable, given, counts)


def sample_data(
    job: Job, prompts: Sequence[Prompt], asked: Sequence[TeacherPrompt], cache: TargetCache, student: LanguageModel
) -> tuple[list[Example], bool]:
    """Examples of some captured prompts of a job, and whether all their replies are the data's own."""
    replies = read_replies(cache, [prompt.key for prompt in asked])
    examples = build_split(job, prompts, asked, replies, student).examples
    return examples, all(reply.finished == "given" for reply in replies.values())


def read_replies(cache: TargetCache, keys: Sequence[str]) -> dict[str, CachedReply]:
    """The replies of some keys with targets that can be read, hidden states by the head that is stored beside them.

    Raises
    ------
    CacheError
        when they, or the head, are not what was captured.
    """
    stored = cache.head_path
    try:
        head = TeacherHead(load_head(stored)) if stored else None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CacheError(
            f"{stored}: has its digest and is no output head ({error}), expected one. Run `true-kd cache verify "
            "--remove`, and run again: it will be captured anew."
        ) from error
    return cache.read(dict.fromkeys(keys), head)


@dataclass
class Split:
    """Training or validation prompts as the student meets them, and what had to be cut or left out."""

    prompts: int
    examples: list[Example] = field(default_factory=list)
    used: list[Prompt] = field(default_factory=list)
    """The prompt of each example."""
    truncated: int = 0
    """Examples whose response was cut."""
    too_long: int = 0
    """Prompts that leave no room for a reply."""
    unwritable: int = 0
    """Replies with tokens that the student lacks, or none that it and the teacher spell alike."""


def build_split(
    job: Job,
    prompts: Sequence[Prompt],
    asked: Sequence[TeacherPrompt],
    replies: Mapping[str, CachedReply],
    student: ModelTokenizer,
) -> Split:
    """The examples of some prompts of a job, whose vocabulary map is known, from the replies to them by key."""
    split = Split(len(prompts))
    for prompt, item in zip(prompts, asked, strict=True):
        laid = lay_out(prompt, replies[item.key], student, job.vocabulary, job.config.training.max_seq_length)
        if not laid.example:
            is_writable = laid.is_writable and len(replies[item.key].kept) > 0
            split.unwritable += not is_writable
            split.too_long += is_writable
            continue
        split.truncated += laid.cut > 0
        split.used.append(prompt)
        split.examples.append(laid.example)
    return split


@dataclass(frozen=True)
class LaidOut:
    """A prompt and the reply to it in the student's tokens."""

    opening: list[int]
    """The prompt, ready for the reply."""
    example: Example | None
    """What is trained; None where nothing can be."""
    is_writable: bool
    """Whether the student has an id for every token of the reply."""
    cut: int
    """Tokens at the end of the reply that find no room."""


def lay_out(
    prompt: Prompt, reply: CachedReply, student: ModelTokenizer, vocabulary: VocabularyMap, max_seq_length: int
) -> LaidOut:
    """The example that the student makes of a prompt and the teacher's reply to it.

    Raises
    ------
    InputError
        when the student's chat template refuses the prompt.
    """
    opening = render(prompt, student.tokenizer, student.stop_ids, student.name).prompt
    own = _in_student_ids(reply, vocabulary)
    if own is None:
        return LaidOut(opening, None, False, 0)
    example = make_example(opening, own.tokens, own.targets, own.kept, prompt.where, max_seq_length)
    left = 0 if example is None else len(example.response)
    return LaidOut(opening, example, True, len(own.tokens) - left)


def _in_student_ids(reply: CachedReply, vocabulary: VocabularyMap) -> CachedReply | None:
    """The reply in the student's vocabulary; None when it has a token there is no id for."""
    tokens = vocabulary.ids[reply.tokens]
    if (tokens < 0).any():
        return None
    return replace(reply, tokens=tokens, targets=reply.targets.with_ids(vocabulary.ids))
