"""What a cache of so many bytes keeps of the teacher: gradient and KL against full logits, beside other formats.

The teacher answers a domain's prompts; over some 1,000 tokens of its replies each format stands in for the full
distribution. Shown per temperature: the cosine and the norm ratio between the adapter's KD gradient from the format
and from full logits, and the KL that the format gives as a ratio to the true one. Bytes are of whole files, manifest
and all, for true-kd's presets; of other formats, what they store per token.

    python scripts/bench_cache.py                                     # the pocket pair, all six domains
    python scripts/bench_cache.py --config configs/base.yaml --domains thinking --teacher PATH --student PATH
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import true_kd  # noqa: F401 - loads a fast BLAS before mlx

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip
from mlx.utils import tree_flatten

from true_kd import jobs, pocket
from true_kd.batching import Batch, collate
from true_kd.cache import CacheIdentity, TargetCache
from true_kd.capture import capture, render_for
from true_kd.config import Override
from true_kd.examples import Example, make_example
from true_kd.fidelity import FidelityOptions, certify
from true_kd.losses import ForwardKL, LossOptions, Objective, token_losses
from true_kd.models import LanguageModel, add_lora, open_model
from true_kd.targets import TargetOptions, width_of

TEMPERATURES = (1.0, 2.0, 4.0)
CrossKL = Callable[[mx.array, mx.array, float], mx.array]
"""Student logits and teacher log-probabilities at temperature 1, both [tokens, vocab], to KL per token."""


def full(student: mx.array, teacher: mx.array, temperature: float) -> mx.array:
    """KL over the whole vocabulary."""
    mine, theirs = _soften(student, temperature), _soften(teacher, temperature)
    return mx.sum(mx.exp(theirs) * (theirs - mine), axis=-1)


def top_k(count: int) -> CrossKL:
    """The likely ids with their probabilities, and nothing for the rest."""

    def kl(student: mx.array, teacher: mx.array, temperature: float) -> mx.array:
        ids = _top(teacher, count)
        theirs = mx.take_along_axis(_soften(teacher, temperature), ids, axis=-1)
        mine = mx.take_along_axis(_soften(student, temperature), ids, axis=-1)
        return mx.sum(mx.exp(theirs) * (theirs - mine), axis=-1)

    return kl


def top_k_renormalised(count: int) -> CrossKL:
    """The likely ids, their probabilities scaled to sum to 1: also what DistillKit does with `missing: zero`."""

    def kl(student: mx.array, teacher: mx.array, temperature: float) -> mx.array:
        ids = _top(teacher, count)
        theirs = _soften(mx.take_along_axis(teacher, ids, axis=-1), temperature)
        mine = mx.take_along_axis(_soften(student, temperature), ids, axis=-1)
        return mx.sum(mx.exp(theirs) * (theirs - mine), axis=-1)

    return kl


def top_k_bucket(count: int) -> CrossKL:
    """The likely ids and one bucket for all others; away from temperature 1 the bucket's mass is softened as if it
    were one id, as DistillKit's `missing: symmetric_uniform` does."""

    def kl(student: mx.array, teacher: mx.array, temperature: float) -> mx.array:
        ids = _top(teacher, count)
        raw = mx.take_along_axis(teacher, ids, axis=-1)
        rest = mx.log(mx.maximum(1.0 - mx.sum(mx.exp(raw), axis=-1, keepdims=True), 1e-12))
        theirs = _soften(mx.concatenate([raw, rest], axis=-1), temperature)
        mine = mx.take_along_axis(_soften(student, temperature), ids, axis=-1)
        left = mx.log(mx.maximum(1.0 - mx.sum(mx.exp(mine), axis=-1, keepdims=True), 1e-6))
        return mx.sum(mx.exp(theirs) * (theirs - mx.concatenate([mine, left], axis=-1)), axis=-1)

    return kl


def both_renormalised(count: int) -> CrossKL:
    """Softmaxes of teacher and student over the teacher's likely ids alone, as mlx-lm's dwq compares them."""

    def kl(student: mx.array, teacher: mx.array, temperature: float) -> mx.array:
        ids = _top(teacher, count)
        theirs = _soften(mx.take_along_axis(teacher, ids, axis=-1), temperature)
        mine = _soften(mx.take_along_axis(student, ids, axis=-1), temperature)
        return mx.sum(mx.exp(theirs) * (theirs - mine), axis=-1)

    return kl


# Bytes per token of the peers: values in two bytes, ids at their width; dwq stores four and two bytes an entry.
PEERS: dict[str, tuple[Callable[[int], CrossKL], int, Callable[[int], float]]] = {
    "top-k, k = 16": (top_k, 16, lambda bits: 16 * (16 + bits) / 8),
    "top-k, k = 64": (top_k, 64, lambda bits: 64 * (16 + bits) / 8),
    "top-k renormalised, k = 16": (top_k_renormalised, 16, lambda bits: 16 * (16 + bits) / 8),
    "top-k renormalised, k = 64": (top_k_renormalised, 64, lambda bits: 64 * (16 + bits) / 8),
    "top-k and a bucket, k = 64": (top_k_bucket, 64, lambda bits: 64 * (16 + bits) / 8 + 2),
    "mlx-lm dwq, k = 1024": (both_renormalised, 1024, lambda bits: 6144.0),
    # Recommended settings, values taken as exact: 16 or 1 in two bytes, the rest by 6 or 3 polynomial terms of four.
    "DistillKit k = 128, zero": (top_k_renormalised, 128, lambda bits: 16 * 2 + 6 * 4 + 128 * bits / 8),
    "DistillKit k = 128, symmetric": (top_k_bucket, 128, lambda bits: 16 * 2 + 6 * 4 + 128 * bits / 8),
    "DistillKit k = 50, zero": (top_k_renormalised, 50, lambda bits: 2 + 3 * 4 + 50 * bits / 8),
    "DistillKit k = 50, symmetric": (top_k_bucket, 50, lambda bits: 2 + 3 * 4 + 50 * bits / 8),
}

PRESETS: dict[str, TargetOptions] = {
    "**tiny**": TargetOptions(preset="tiny"),
    "**default**": TargetOptions(),
    "**hot**": TargetOptions(preset="hot"),
    "draw 2, threshold 0.1": TargetOptions(threshold=0.1),
    "draw 2, threshold 0.05": TargetOptions(threshold=0.05),
    "draw 2, threshold 0.01": TargetOptions(threshold=0.01),
    "draw 4, threshold 0.02": TargetOptions(preset="hot", threshold=0.02),
}


@dataclass(frozen=True)
class Subject:
    """A student with an adapter, and what the teacher said."""

    student: LanguageModel
    teacher: LanguageModel
    examples: dict[str, list[Example]]
    """By preset."""
    sizes: dict[str, float]
    """Bytes per token on disk, by preset."""

    @property
    def tokens(self) -> int:
        """Response tokens that are compared."""
        return sum(len(example.kept) for example in next(iter(self.examples.values())))


def prepare(config: Path, domains: Sequence[str], overrides: list[Override], tokens: int) -> Subject:
    """Let the teacher answer each domain in turn, and keep its answers in every format."""
    planned, failures = jobs.plan(config, domains, overrides)
    if failures:
        jobs.refuse(failures)
    first = planned[0].config
    teacher, student = open_model(first.teacher, "teacher"), open_model(first.student, "student")
    asked = []
    for job in planned:
        rendered = render_for(teacher, job.train_prompts, first.capture)
        asked += list(zip(job.train_prompts, rendered, strict=True))[: 512 // len(planned)]
    examples, sizes = {}, {}
    for name, options in PRESETS.items():
        with tempfile.TemporaryDirectory() as root:
            cache = TargetCache(Path(root), CacheIdentity({"bench": name}))
            for _ in capture(teacher, [item for _, item in asked], cache, first.capture, options.settings):
                pass
            replies = cache.read(dict.fromkeys(item.key for _, item in asked))
            written = sum(len(reply.tokens) for reply in replies.values())
            sizes[name] = sum(path.stat().st_size for path in cache.folder.iterdir()) / written
        examples[name] = _spread(
            [
                make_example(
                    item.rendered.prompt,
                    replies[item.key].tokens,
                    replies[item.key].targets,
                    replies[item.key].kept,
                    prompt.where,
                    first.training.max_seq_length,
                )
                for prompt, item in asked
            ],
            tokens,
        )
    mx.random.seed(0)
    add_lora(student.module, first.lora)
    student.module.eval()
    return Subject(student, teacher, examples, sizes)


def _spread(examples: Sequence[Example | None], tokens: int) -> list[Example]:
    """Examples of so many tokens, taken evenly from all."""
    found = [example for example in examples if example]
    total = sum(len(example.kept) for example in found)
    step = max(1, total // tokens)
    return found[::step]


def gradient(subject: Subject, per_token: Callable[[Batch, mx.array], mx.array], preset: str, temperature: float):
    """The adapter's gradient of the mean T^2 KL, float64 [parameters], and that mean."""
    module = subject.student.module
    total, tokens = None, subject.tokens
    value = 0.0
    for start in range(0, len(subject.examples[preset]), 8):
        batch = collate(subject.examples[preset][start : start + 8], temperature)

        def objective(batch: Batch = batch) -> mx.array:
            logits = module(batch.tokens)
            logits = logits.reshape(-1, logits.shape[-1])[batch.rows].astype(mx.float32)
            return temperature**2 * mx.sum(per_token(batch, logits)) / tokens

        loss, part = nn.value_and_grad(module, objective)()
        flat = np.concatenate([np.array(leaf, dtype=np.float64).ravel() for _, leaf in tree_flatten(part)])
        total = flat if total is None else total + flat
        value += loss.item()
    return total, value


def compare(subject: Subject) -> list[tuple[str, float, list[str]]]:
    """A row per format: name, bytes per token, and a cell per temperature."""
    any_preset = next(iter(PRESETS))
    bits = width_of(subject.teacher.size - 1)

    def dense(kl: CrossKL, temperature: float) -> Callable[[Batch, mx.array], mx.array]:
        def per_token(batch: Batch, logits: mx.array) -> mx.array:
            theirs = subject.teacher.module(batch.tokens)
            theirs = theirs.reshape(-1, theirs.shape[-1])[batch.rows].astype(mx.float32)
            width = min(theirs.shape[-1], logits.shape[-1])
            return kl(logits[:, :width], mx.stop_gradient(_soften(theirs[:, :width], 1.0)), temperature)

        return per_token

    def sparse(batch: Batch, logits: mx.array, temperature: float) -> mx.array:
        objective = Objective(ForwardKL(), temperature, 1.0, None)
        soft_kl, _ = token_losses(logits, batch.labels, batch.targets, objective)
        return soft_kl / temperature**2

    truth = {at: gradient(subject, dense(full, at), any_preset, at) for at in TEMPERATURES}
    rows = []
    for name in PRESETS:
        cells = []
        for at in TEMPERATURES:
            found = gradient(subject, lambda *given, at=at: sparse(*given, at), name, at)
            estimate = certify(
                subject.student.module,
                subject.examples[name],
                LossOptions(temperature=at).final,
                8,
                FidelityOptions(tokens=10**6),
                1,
                1,
            )
            cells.append(f"{_cell(found, truth[at])} ({estimate.cosine:.4f})")
        rows.append((name, subject.sizes[name], cells))
    for name, (make, count, size) in PEERS.items():
        kl = make(min(count, subject.teacher.size))
        cells = [_cell(gradient(subject, dense(kl, at), any_preset, at), truth[at]) for at in TEMPERATURES]
        rows.append((name, size(bits), cells))
    return rows


def _cell(found: tuple[np.ndarray, float], truth: tuple[np.ndarray, float]) -> str:
    (mine, kl), (theirs, true_kl) = found, truth
    lengths = np.linalg.norm(mine), np.linalg.norm(theirs)
    return f"{mine @ theirs / math.prod(lengths):.4f}, {lengths[0] / lengths[1]:.3f}, {kl / true_kl:.3f}"


def _soften(values: mx.array, temperature: float) -> mx.array:
    scaled = values / temperature
    return scaled - mx.logsumexp(scaled, axis=-1, keepdims=True)


def _top(teacher: mx.array, count: int) -> mx.array:
    return mx.argsort(-teacher, axis=-1)[:, :count]


def entropies(subject: Subject) -> str:
    """The teacher's mean entropy at each temperature, which decides how much a faithful cache needs."""
    sums, tokens = np.zeros(len(TEMPERATURES)), 0
    for example in next(iter(subject.examples.values())):
        logits = subject.teacher.module(mx.array(example.tokens)[None])[0][mx.array(example.rows)].astype(mx.float32)
        for at, temperature in enumerate(TEMPERATURES):
            logprobs = _soften(logits, temperature)
            sums[at] -= mx.sum(mx.exp(logprobs) * logprobs).item()
        tokens += len(example.rows)
    return ", ".join(f"{value:.2f} nats at T = {at:g}" for at, value in zip(TEMPERATURES, sums / tokens, strict=True))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(pocket.BASE))
    parser.add_argument("--teacher", help="Instead of the config's.")
    parser.add_argument("--student", help="Instead of the config's.")
    parser.add_argument("--prompts", help="Folder of prompts instead of the config's.")
    parser.add_argument("--domains", nargs="+", default=["action", "debug", "memory", "reflection", "task", "thinking"])
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="Any other key of the config.")
    arguments = parser.parse_args()
    from true_kd.validation import parse_override

    named = {"teacher": arguments.teacher, "student": arguments.student, "prompts": arguments.prompts}
    given = [Override(f"--{name}", (name,), value) for name, value in named.items() if value]
    given += [Override("--set", *parse_override(text)) for text in arguments.set]
    subject = prepare(arguments.config, arguments.domains, given, arguments.tokens)
    print(f"Teacher {subject.teacher.name} ({subject.teacher.size:,} ids), student {subject.student.name}, ", end="")
    print(f"{subject.tokens:,} tokens of {', '.join(arguments.domains)}. Entropy of the teacher: {entropies(subject)}.")
    print("\nEach cell: cosine, norm ratio, KL ratio; in brackets the cosine that the certificate estimates.\n")
    print("| format | bytes/token |" + "".join(f" T = {at:g} |" for at in TEMPERATURES))
    print("|---|---|" + "---|" * len(TEMPERATURES))
    for name, size, cells in compare(subject):
        print(f"| {name} | {size:,.1f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
