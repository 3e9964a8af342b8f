"""From a budget on disk to a threshold: how many entries a teacher's own tokens need is measured on a few replies.

The measurement is kept beside the caches, so that an edited prompt does not move the threshold and with it the
identity of everything captured before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from true_kd.capture import CaptureOptions, TeacherPrompt, response_states, sampling_facts
from true_kd.errors import InputError
from true_kd.files import TEMPORARY, digest_json, make_folder, read_record, write_record
from true_kd.manifest import left_over, remove_left_over, take_lock
from true_kd.models import LanguageModel, ModelTokenizer, Reply, generate_replies, seed_of, split_head
from true_kd.shards import estimate_bytes
from true_kd.targets import TargetOptions, TargetSettings, count_entries

THRESHOLDS = tuple(max(0.001, float(f"{0.5 / 2 ** (step / 2):.3g}")) for step in range(19))
"""The thresholds a budget chooses from, coarsest first: 0.5 to 0.001 in steps of the square root of 2."""

_MOST_BYTES = 2**16
_PROMPTS = 32
_TOKENS = 1024


@dataclass(frozen=True)
class Demand:
    """How much a teacher's replies would take at each of THRESHOLDS."""

    entries: tuple[float, ...]
    """Mean entries per kept token."""
    reply_tokens: float
    """Mean length of a reply."""
    tokens: int
    """Tokens it was measured on."""


@dataclass(frozen=True)
class BudgetChoice:
    """The settings that a budget allows."""

    settings: TargetSettings
    bytes_per_token: float
    """As expected."""
    gigabytes: float
    """As expected over the replies it was chosen for."""
    tokens: int
    """Tokens it was measured on."""


def choose_settings(
    options: TargetOptions,
    capture: CaptureOptions,
    vocab_size: int,
    replies: int,
    demand: Demand,
    total_tokens: float | None = None,
) -> BudgetChoice:
    """The finest settings whose targets fit the budget of `options`, over so many replies.

    `total_tokens` are those of all replies that share `options.gigabytes`; None where these are all.

    Raises
    ------
    InputError
        when no threshold is coarse enough, with the smallest budget that would do.
    """
    base = options.settings
    tokens = replies * demand.reply_tokens
    total_tokens = tokens if total_tokens is None else total_tokens
    allowed = math.inf if options.bytes_per_token is None else options.bytes_per_token
    if options.gigabytes is not None:
        allowed = min(allowed, options.gigabytes * 1e9 / total_tokens)
    sizes = [
        estimate_bytes(entries, base, vocab_size, demand.reply_tokens, capture.shard_prompts)
        for entries in demand.entries
    ]
    fitting = [index for index, size in enumerate(sizes) if size <= allowed]
    if not fitting:
        least = math.ceil(10 * sizes[0]) / 10
        by_tokens = options.bytes_per_token is not None and options.bytes_per_token <= allowed
        needed = least * total_tokens / 1e9
        digit = 10.0 ** (math.floor(math.log10(needed)) - 1)
        gigabytes = math.ceil(needed / digit) * digit
        if by_tokens:
            given, wanted = f"{allowed:g} bytes per token", f"{least:.1f}"
        else:
            given, wanted = f"{options.gigabytes:g} GB", f"{gigabytes:.2g} GB, {least:.1f} bytes per token,"
        raise InputError(
            f"cache budget: {given}, expected at least {wanted} for this teacher's replies with "
            f"targets.draw_temperature={base.draw_temperature:g}. Give more, or draw for a lower temperature."
        )
    finest = fitting[-1]
    settings = replace(base, threshold=THRESHOLDS[finest])
    return BudgetChoice(settings, sizes[finest], sizes[finest] * tokens / 1e9, demand.tokens)


def demand_path(options: TargetOptions, capture: CaptureOptions, text: ModelTokenizer, root: Path) -> Path:
    """Where the measurement of a teacher under these settings is kept, in the folder of all caches."""
    facts = {
        "teacher": text.digest,
        "targets": {**asdict(options.settings), "threshold": None},
        "sampling": sampling_facts(text, capture),
        "thresholds": THRESHOLDS,
    }
    return root / f"demand-{digest_json(facts)[:16]}.json"


def read_demand(path: Path) -> Demand | None:
    """A measurement made before; None where there is none, or it is not as it was written."""
    try:
        record = read_record(path, _MOST_BYTES) or {}
        demand = Demand(
            tuple(float(value) for value in record["entries"]), float(record["reply_tokens"]), int(record["tokens"])
        )
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    numbers = (*demand.entries, demand.reply_tokens)
    sound = len(demand.entries) == len(THRESHOLDS) and all(0 < value < math.inf for value in numbers)
    return demand if sound else None


def write_demand(path: Path, demand: Demand) -> None:
    """Write what `read_demand` reads."""
    write_record(path, asdict(demand))


def keep_demand(path: Path, demand: Demand) -> None:
    """Keep a measurement for later runs, in the folder of all caches; what kills have left of such goes."""
    make_folder(path.parent)
    with take_lock(path.parent):
        names = [name for name in left_over(path.parent, ()) if name.startswith(TEMPORARY)]
        remove_left_over(path.parent, [name for name in names if name.endswith(path.suffix)])
        write_demand(path, demand)


def measure(
    teacher: LanguageModel, prompts: Sequence[TeacherPrompt], options: CaptureOptions, base: TargetSettings
) -> Demand:
    """Count the entries that some of the prompts' replies need at each threshold."""
    places = np.unique(np.linspace(0, len(prompts) - 1, _PROMPTS).round().astype(int))
    sample = [prompts[place] for place in places]
    given = [prompt for prompt in sample if prompt.rendered.response is not None]
    asked = [prompt for prompt in sample if prompt.rendered.response is None]
    counts: list[np.ndarray] = []
    lengths = [len(prompt.rendered.response or ()) for prompt in given]
    split = split_head(teacher.module)
    for prompt in given:
        response = (prompt.rendered.response or [])[: max(_TOKENS // len(given), 32)]
        counts.append(_count(split.head(response_states(split, prompt, response)), mx.array(response), base))
    if asked:
        seeds = [seed_of(f"{options.seed} {prompt.key}") for prompt in asked]
        replies: Sequence[Reply] = ()
        for made, drafts in generate_replies(teacher, [prompt.rendered.prompt for prompt in asked], options, seeds):
            replies = drafts
            if sum(len(count) for count in counts) < 2 * _TOKENS:
                counts.append(_count(mx.stack(made.logits), mx.array(made.tokens), base))
        lengths += [len(reply.tokens) for reply in replies]
    table = np.concatenate(counts)
    kept = max(1, round(base.share * len(table)))
    entries = np.sort(table, axis=0)[-kept:].mean(axis=0)
    return Demand(tuple(float(value) for value in entries), float(np.mean(lengths)), len(table))


def _count(logits: mx.array, labels: mx.array, base: TargetSettings) -> np.ndarray:
    """Entries of each token at each threshold, [tokens, thresholds]."""
    columns = [count_entries(logits, labels, replace(base, threshold=threshold)) for threshold in THRESHOLDS]
    return np.stack(columns, axis=1)
