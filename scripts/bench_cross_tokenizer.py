"""Whether a student of another tokenizer gains from the teacher's distribution, and by which strategy most.

The teacher answers once. From the same text, for as many steps, a student is trained by cross-entropy alone (`sft`) and
by each of the strategies. Shown are bits per byte, the lower the better, of held-out replies of the teacher and of
held-out text that no model wrote: means over the seeds with the 95 % interval over seeds, and how much worse than
`align` each is with the 95 % interval over the held-out prompts, of the seeds' mean. Each way of training has the best
of the given learning rates and alphas, by other held-out replies than those it is measured on.

    python scripts/bench_cross_tokenizer.py --teacher pocket:teacher --student STRANGER
    python scripts/bench_cross_tokenizer.py --teacher BABYLLAMA --student STORIES260K --stories tinystories_1000.json

STRANGER is a folder that `build_stranger.py` wrote; without `--stories` the prompts are those of the pocket tasks.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import true_kd  # noqa: F401 - loads a fast BLAS before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pocket_tasks

from true_kd.alignment import Aligner
from true_kd.alignment.aligner import Way
from true_kd.alignment.tables import LEAST
from true_kd.batching import BatchOptions, epoch_batches
from true_kd.cache import TargetCache
from true_kd.capture import CaptureOptions, TeacherPrompt, capture, render_for, teacher_identity
from true_kd.evaluation import Resampled
from true_kd.examples import Example, make_example, render
from true_kd.losses import LossOptions, compute_ce_loss
from true_kd.models import (
    Branches,
    LanguageModel,
    LoraOptions,
    ModelOptions,
    add_lora,
    open_model,
    open_tokenizer,
    release_memory,
    split_head,
)
from true_kd.prompts import Prompt, from_records
from true_kd.shards import CachedReply
from true_kd.targets import TargetOptions
from true_kd.training import TrainingOptions, train

STRATEGIES: tuple[str, ...] = ("sft", "align", "project", "truncate", "uld")
LONGEST = 512
"""Tokens of a sequence, at most."""


@dataclass(frozen=True)
class Text:
    """Held-out text in the student's tokens."""

    prompt: list[int]
    tokens: list[int]
    size: int
    """Bytes of `tokens`."""


@dataclass(frozen=True)
class Data:
    """What all students are trained and measured on."""

    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    reference: Sequence[tuple[Prompt, str]]
    """Prompts and text that no model wrote."""


def read_stories(path: Path, count: int, held_out: int) -> Data:
    """Openings of stories as prompts; other stories as they go on."""
    stories = json.loads(path.read_text(encoding="utf-8"))
    # Many stories begin alike: a prompt that is asked twice has the same reply, and would be trained on and held out.
    unlike = {tuple(story.split(" ")[:8]): story for story in stories}.values()
    words = [story.split(" ") for story in unlike if len(story.split(" ")) > 20]
    openings = from_records([{"prompt": " ".join(each[:8])} for each in words])
    rest = [" " + " ".join(each[8:])[:240].encode()[:240].decode(errors="ignore") for each in words]
    last = count + held_out
    return Data(openings[:count], openings[count:last], list(zip(openings, rest, strict=True))[last : last + held_out])


def make_tasks(count: int, held_out: int, domain: str) -> Data:
    """Pocket tasks of a domain; the ideal replies to other tasks."""
    rng = random.Random(f"cross tokenizer {domain}")
    drawn = [
        pocket_tasks.generate_unique(domain, rng, many, held_out=held)
        for many, held in ((count, False), (2 * held_out, True))
    ]
    train, test = (from_records([{"prompt": task.prompt} for task in tasks]) for tasks in drawn)
    replies = [task.reply for task in drawn[1]]
    return Data(train, test[:held_out], list(zip(test, replies, strict=True))[held_out:])


def write_replies(
    teacher: LanguageModel, asked: Sequence[TeacherPrompt], options: CaptureOptions, root: Path
) -> list[CachedReply]:
    """What the teacher says, in its own tokens."""
    settings = TargetOptions(preset="tiny").settings
    cache = TargetCache(root, teacher_identity(teacher, settings))
    for _ in capture(teacher, asked, cache, options, settings):
        pass
    found = cache.read(dict.fromkeys(prompt.key for prompt in asked))
    return [found[prompt.key] for prompt in asked]


def make_examples(
    way: Way,
    teacher: LanguageModel,
    student: LanguageModel,
    prompts: Sequence[Prompt],
    asked: Sequence[TeacherPrompt],
    replies: Sequence[CachedReply],
    least: float,
) -> list[Example]:
    """The replies with the teacher's distribution in the student's vocabulary."""
    aligner, split = Aligner(way, teacher, student, least), split_head(teacher.module)
    settings = TargetOptions().settings
    examples = []
    for prompt, item, reply in zip(prompts, asked, replies, strict=True):
        opening, response = item.rendered.prompt, reply.tokens.tolist()
        branches = Branches(teacher.module, split, [*opening, *response])
        found = aligner.score(branches, opening, (response, reply.finished), item.key, settings)
        ours = render(prompt, student.tokenizer, student.stop_ids, student.name).prompt
        example = make_example(ours, found.tokens, found.targets, found.kept, prompt.where, LONGEST)
        examples += [example] if example else []
    return examples


def teacher_texts(
    aligner: Aligner,
    student: LanguageModel,
    prompts: Sequence[Prompt],
    asked: Sequence[TeacherPrompt],
    replies: Sequence[CachedReply],
) -> list[Text]:
    """Held-out replies of the teacher in the student's tokens."""
    texts = []
    for prompt, item, reply in zip(prompts, asked, replies, strict=True):
        retold = aligner.retell(reply.tokens.tolist(), item.rendered.prompt)
        ours = render(prompt, student.tokenizer, student.stop_ids, student.name).prompt
        texts.append(Text(ours, retold.ours, retold.our_bytes))
    return [text for text in texts if text.size]


def reference_texts(aligner: Aligner, student: LanguageModel, reference: Sequence[tuple[Prompt, str]]) -> list[Text]:
    """Text that no model wrote in the student's tokens."""
    texts = []
    for prompt, written in reference:
        ours = render(prompt, student.tokenizer, student.stop_ids, student.name).prompt
        continues = not student.tokenizer.has_chat_template
        texts.append(Text(ours, aligner.student_spelling.encode(written.encode(), continues), len(written.encode())))
    return texts


def bits(student: LanguageModel, texts: Sequence[Text]) -> np.ndarray:
    """Bits that a student takes to say each text."""
    found = np.zeros(len(texts))
    lengths = [len(text.prompt) + len(text.tokens) for text in texts]
    for group in epoch_batches(lengths, BatchOptions(batch_size=16), 0, 0):
        width = max(lengths[at] for at in group)
        tokens = np.zeros((len(group), width), dtype=np.int32)
        labels = np.full((len(group), width), -100, dtype=np.int32)
        for row, at in enumerate(group):
            text = texts[at]
            tokens[row, : lengths[at]] = [*text.prompt, *text.tokens]
            labels[row, len(text.prompt) - 1 : lengths[at] - 1] = text.tokens
        logits = student.module(mx.array(tokens))
        for row, at in enumerate(group):
            nats = compute_ce_loss(logits[row], mx.array(labels[row])).item() * len(texts[at].tokens)
            found[at] = nats / np.log(2)
    return found


def trained(
    options: ModelOptions, examples: Sequence[Example], training: TrainingOptions, losses: LossOptions, seed: int
) -> LanguageModel:
    """A student with a new adapter, trained."""
    student = open_model(options, "student")
    mx.random.seed(seed)
    add_lora(student.module, LoraOptions())
    for _ in train(student.module, examples, training, losses, seed):
        pass
    student.module.eval()
    return student


def objectives(strategy: str, alphas: Sequence[float]) -> list[LossOptions]:
    """What to choose from: at temperature 1, at which bits are counted; for sorted probabilities as their authors
    do, cross-entropy and 1.5 times the distance."""
    if strategy == "sft":
        return [LossOptions(alpha=0.0, temperature=1.0)]
    if strategy == "uld":
        return [LossOptions(alpha=0.75, temperature=1.0, divergence="total_variation")]
    return [LossOptions(alpha=alpha, temperature=1.0) for alpha in alphas]


def spread(values: Sequence[float]) -> str:
    """A mean with its 95 % interval over the seeds, by Student's t."""
    reach = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), 2.0)
    if len(values) < 2:
        return f"{mean(values):.4f}"
    half = reach * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.4f} ({mean(values) - half:.4f} to {mean(values) + half:.4f})"


def per_byte(found: Sequence[np.ndarray], sizes: Sequence[int]) -> str:
    """Bits per byte of each kind of text."""
    return ", ".join(f"{each.sum() / size:.4f}" for each, size in zip(found, sizes, strict=True))


def behind(own: np.ndarray, best: np.ndarray, texts: Sequence[Text]) -> str:
    """How many bits per byte more, of the seeds' mean, with the 95 % interval over the texts."""
    columns = {"more": (own - best).mean(axis=0), "bytes": np.array([text.size for text in texts], dtype=float)}
    found = Resampled(columns).estimate(lambda sums: sums["more"] / sums["bytes"])
    if found is None or found.low is None:
        return "-"
    return f"{found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def table(name: str, texts: Sequence[Text], base: np.ndarray, measured: Mapping[str, np.ndarray]) -> str:
    """A Markdown table of one kind of text; `measured` has bits by seed and text."""
    size = sum(text.size for text in texts)
    lines = [f"| {name} | bits per byte | more than align |", "|---|---|---|"]
    lines.append(f"| student as it comes | {base.sum() / size:.4f} | |")
    for strategy, found in measured.items():
        per_seed = [float(each.sum() / size) for each in found]
        lead = "" if strategy == "align" or "align" not in measured else behind(found, measured["align"], texts)
        lines.append(f"| {strategy} | {spread(per_seed)} | {lead} |")
    return "\n".join(lines)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--stories", type=Path, help="JSON list of texts")
    parser.add_argument("--domain", default="thinking", choices=list(pocket_tasks.DOMAINS))
    parser.add_argument("--train", type=int, default=320)
    parser.add_argument("--held-out", type=int, default=96)
    parser.add_argument("--max-tokens", type=int, default=180)
    parser.add_argument("--top-p", type=float, default=1.0, help="of the teacher's sampling, at temperature 1")
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--least", type=float, default=LEAST, help="ask the teacher about beginnings this likely")
    parser.add_argument("--cache", type=Path, help="Keep the teacher's replies here")
    arguments = parser.parse_args()

    if arguments.stories:
        data = read_stories(arguments.stories, arguments.train, 2 * arguments.held_out)
    else:
        data = make_tasks(arguments.train, 2 * arguments.held_out, arguments.domain)
    theirs, ours = ModelOptions(model=arguments.teacher), ModelOptions(model=arguments.student)
    teacher, student = open_model(theirs, "teacher"), open_model(ours, "student")
    capturing = CaptureOptions(
        max_tokens=arguments.max_tokens, sampling_temperature=1.0, top_p=arguments.top_p, batch_size=32
    )
    prompts = [*data.train, *data.held_out]
    asked = render_for(open_tokenizer(theirs, "teacher"), prompts, capturing)
    with tempfile.TemporaryDirectory() as folder:
        replies = write_replies(teacher, asked, capturing, arguments.cache or Path(folder))

    split = len(data.train)
    aligner = Aligner("align", teacher, student)
    written = teacher_texts(aligner, student, prompts[split:], asked[split:], replies[split:])
    chosen_by, texts = written[: len(written) // 2], written[len(written) // 2 :]
    reference = reference_texts(aligner, student, data.reference)
    kinds = (texts, reference)
    base = [bits(student, kind) for kind in kinds]
    sizes = [sum(text.size for text in kind) for kind in kinds]
    print(f"student as it comes: bits per byte {per_byte(base, sizes)}", flush=True)
    examples: dict[str, list[Example]] = {}
    for way in dict.fromkeys("align" if strategy == "sft" else strategy for strategy in arguments.strategies):
        started = time.perf_counter()
        examples[way] = make_examples(
            way, teacher, student, data.train, asked[:split], replies[:split], arguments.least
        )
        tokens = sum(len(example.kept) for example in examples[way])
        print(f"{way}: {tokens:,} tokens in {time.perf_counter() - started:.0f} s", flush=True)
    del teacher, student
    release_memory()

    measured: list[dict[str, np.ndarray]] = [{}, {}]
    for strategy in arguments.strategies:
        own = examples["align" if strategy == "sft" else strategy]

        def run(seed: int, rate: float, losses: LossOptions, own: Sequence[Example] = own) -> list[np.ndarray]:
            training = TrainingOptions(
                iters=arguments.iters, batch_size=arguments.batch_size, learning_rate=rate, max_seq_length=LONGEST
            )
            model = trained(ours, own, training, losses, seed)
            return [bits(model, kind) for kind in (chosen_by, *kinds)]

        first, *others = arguments.seeds
        tried = [
            (rate, losses, run(first, rate, losses))
            for rate in arguments.learning_rates
            for losses in objectives(strategy, arguments.alphas)
        ]
        rate, losses, best = min(tried, key=lambda each: each[2][0].sum())
        found = [best, *(run(seed, rate, losses) for seed in others)]
        for at, kind in enumerate(measured):
            kind[strategy] = np.array([each[at + 1] for each in found])
        means = [kind[strategy].mean(axis=0) for kind in measured]
        print(
            f"{strategy}: learning rate {rate:g}, alpha {losses.alpha:g}, bits per byte {per_byte(means, sizes)}",
            flush=True,
        )

    print()
    print(table("held-out replies of the teacher", texts, base[0], measured[0]), end="\n\n")
    print(table("text that no model wrote", reference, base[1], measured[1]), end="\n\n")
    print(
        f"Teacher {Path(arguments.teacher).name}, student {Path(arguments.student).name}; {len(data.train)} prompts, "
        f"{arguments.iters} steps of {arguments.batch_size}, seeds {', '.join(map(str, arguments.seeds))}."
    )


if __name__ == "__main__":
    main()
