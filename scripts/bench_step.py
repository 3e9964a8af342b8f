"""What one optimizer step of a LoRA student costs: true-kd's beside those of its peers, in seconds and in memory.

`lora` is the step of mlx_lm.lora (CE on full logits), `kd` that of `true_kd.training.train`, `dense` KD on full logits
of teacher and student, `dwq` mlx-lm's dwq loss on 1,024 cached logits, `body` the student without head and loss: the
floor. `lora`, `dense` and `body` are compiled as mlx_lm's trainer compiles its step; its dwq does not compile.

Time: one process per shape holds all variants and runs them in turn; shown is the median over rounds of a round's
ratio to `lora`. Memory: a process for each variant; the peak of a step above weights and optimizer state, so that the
batch and what it carries of the teacher count, and in brackets what the resident set grew by.

    python scripts/bench_step.py --json steps.jsonl                    # picks up where it was stopped
    python scripts/bench_step.py --vocab 32000 --sequence 256 512 --share 0.5 --variants lora kd body
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from step_variants import VARIANTS, Bench

import mlx.core as mx  # isort: skip - after true_kd, which loads a fast BLAS before it
from mlx.utils import tree_flatten

# Arrays of [sequence, vocab] in float32 that a step holds at its peak, measured and rounded up.
ARRAYS = {"lora": 5.0, "kd": 1.5, "dense": 11.0, "dwq": 6.0, "body": 0.5}

FEW = ("lora", "kd", "body")
GRID = (
    # Vocabulary, sequence and share of it that is response; variants timed; variants whose memory is measured.
    # `dense` and `dwq` cost the same at any share.
    ((151_936, 256, 0.5), VARIANTS, VARIANTS),
    ((151_936, 1024, 0.25), FEW, ()),
    ((32_000, 1024, 0.5), VARIANTS, VARIANTS),
    ((128_256, 1024, 0.5), FEW, FEW),
    ((151_936, 1024, 0.5), VARIANTS, VARIANTS),
    ((151_936, 1024, 1.0), FEW, ()),
    ((151_936, 2048, 0.5), FEW, FEW),
)


@dataclass(frozen=True)
class Shape:
    """A student and a batch."""

    vocab: int
    sequence: int
    share: float
    """Of the sequence that is response."""
    batch_size: int
    hidden: int
    layers: int

    def __str__(self) -> str:
        return f"V = {self.vocab:,}, S = {self.sequence:,}, {self.share:.0%} response"


@dataclass(frozen=True)
class Work:
    """What one process measures."""

    kind: str
    """time or memory."""
    shape: Shape
    variants: tuple[str, ...]
    rounds: int
    compiled: bool
    device: str


Values = dict[tuple[Shape, str], float]
"""Median seconds or peak bytes of a variant at a shape."""


def measure_time(work: Work) -> dict[str, list[float]]:
    """Seconds of each round of each variant."""
    bench = Bench(**asdict(work.shape))
    steps = {variant: bench.step_of(variant, bench.student()) for variant in work.variants}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    for turn in range(work.rounds):
        first = turn % len(steps)
        for variant in work.variants[first:] + work.variants[:first]:
            if mx.default_device() != mx.cpu:
                steps[variant]()  # untimed: the allocator keeps large buffers there, and they shall be its own
            start = time.perf_counter()
            steps[variant]()
            seconds[variant].append(time.perf_counter() - start)
    return seconds


def measure_memory(work: Work) -> dict[str, float]:
    """Bytes of one step above weights and optimizer state, by MLX and by the resident set."""
    mx.set_cache_limit(0)
    bench = Bench(**asdict(work.shape))
    module = bench.student()
    adam = 2 * sum(leaf.nbytes for _, leaf in tree_flatten(module.trainable_parameters()))
    below = adam + sum(leaf.nbytes for _, leaf in tree_flatten(module.parameters()))
    step = bench.step_of(work.variants[0], module)
    gc.collect()
    with contextlib.suppress(OSError):
        # Linux forgets the peak so far: making the weights took more memory than they take.
        Path("/proc/self/clear_refs").write_text("5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    mx.reset_peak_memory()
    step()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    return {"peak": mx.get_peak_memory() - below, "resident": grown}


def run(work: Work, results: Path | None) -> dict[str, Any]:
    """What a fresh process finds, or found in an earlier run; nothing where it fails or is killed."""
    key = json.loads(json.dumps(asdict(work)))
    for line in results.read_text().splitlines() if results and results.exists() else ():
        if json.loads(line)["work"] == key:
            return json.loads(line)["found"]
    command = [sys.executable, __file__, "--work", json.dumps(key)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        print(f"{work.kind} of {work.shape}, {', '.join(work.variants)}: exit code {ended.returncode}", file=sys.stderr)
        return {}
    found = json.loads(ended.stdout.splitlines()[-1])
    if results:
        with results.open("a") as file:
            file.write(json.dumps({"work": key, "found": found}) + "\n")
    return found


def fits(work: Work, variant: str) -> bool:
    """Whether a step is likely to fit into four fifths of the memory; says so where not."""
    memory = mx.device_info().get("memory_size") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shape = work.shape
    need = 4 * shape.vocab * (ARRAYS[variant] * shape.batch_size * shape.sequence + shape.hidden)
    if need > 0.8 * memory:
        print(f"{work.kind} of {shape}: {variant} would take some {need / 1e9:.0f} GB, left out", file=sys.stderr)
    return need <= 0.8 * memory


def show_times(todo: Sequence[Work], results: Path | None) -> Values:
    """Print a row per shape."""
    names = [name for name in VARIANTS if name != "lora" and any(name in work.variants for work in todo)]
    print_row("time / lora", ["lora, s", *names])
    print_row("---", ["---"] * (1 + len(names)))
    medians: Values = {}
    for work in todo:
        found = run(work, results)
        medians.update({(work.shape, name): statistics.median(seconds) for name, seconds in found.items()})
        cells = [f"{medians[work.shape, 'lora']:.3f}" if found else "-"]
        for name in names:
            ratios = [one / other for one, other in zip(found.get(name, ()), found.get("lora", ()), strict=False)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "-")
        print_row(str(work.shape), cells)
    return medians


def show_memory(todo: Sequence[Work], results: Path | None) -> Values:
    """Print a row per shape."""
    names = [name for name in VARIANTS if any(name in work.variants for work in todo)]
    print_row("step memory, MB", [*names, "kd / lora", "kd / body"])
    print_row("---", ["---"] * (len(names) + 2))
    peaks: Values = {}
    for work in todo:
        cells = dict.fromkeys(names, "-")
        for name in work.variants:
            if found := run(replace(work, variants=(name,)), results):
                peaks[work.shape, name] = found["peak"]
                cells[name] = f"{found['peak'] / 1e6:,.1f} ({found['resident'] / 1e6:,.1f})"
        ratios = [ratio(peaks, (work.shape, "kd"), (work.shape, other)) for other in ("lora", "body")]
        print_row(str(work.shape), [*cells.values(), *ratios])
    return peaks


def print_row(name: str, cells: Sequence[str]) -> None:
    """Print a line of a markdown table."""
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def ratio(values: Values, above: tuple[Shape, str], below: tuple[Shape, str]) -> str:
    """One value by another, where both were measured."""
    return f"{values[above] / values[below]:.2f}" if above in values and below in values else "-"


def show_growth(found: dict[str, Values]) -> None:
    """Print what the largest vocabulary costs against the smallest, where all else is the same."""
    for kind, values in found.items():
        shapes = sorted({shape for shape, _ in values}, key=lambda shape: shape.vocab)
        for least in shapes:
            alike = [shape for shape in shapes if replace(shape, vocab=least.vocab) == least]
            most = alike[-1]
            if least is alike[0] and least.vocab < most.vocab:
                grown = {name: ratio(values, (most, name), (least, name)) for name in VARIANTS}
                listed = ", ".join(f"{name} {times}" for name, times in grown.items() if times != "-")
                print(
                    f"\nFrom {least.vocab:,} to {most.vocab:,} ids, {most.vocab / least.vocab:.2f} times as many, ",
                    end="",
                )
                print(f"at S = {least.sequence:,} and {least.share:.0%} response, {kind} grows by: {listed}.")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", nargs="+", type=int, help="With any of these three their product is measured.")
    parser.add_argument("--sequence", nargs="+", type=int)
    parser.add_argument("--share", nargs="+", type=float, help="Shares of the sequence that are response.")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--kinds", nargs="+", choices=("time", "memory"), default=("time", "memory"))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="As where there is no g++.")
    parser.add_argument("--json", type=Path, help="Gets a line per measurement; what it has is not measured again.")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        given = json.loads(arguments.work)
        work = Work(**{**given, "shape": Shape(**given["shape"]), "variants": tuple(given["variants"])})
        if not work.compiled:
            mx.disable_compile()
        print(json.dumps(measure_time(work) if work.kind == "time" else measure_memory(work)))
        return
    grid = GRID
    if arguments.vocab or arguments.sequence or arguments.share:
        lists = arguments.vocab or [151_936], arguments.sequence or [1024], arguments.share or [0.5]
        grid = tuple((shape, VARIANTS, VARIANTS) for shape in itertools.product(*lists))
    print(
        f"Qwen3, {arguments.layers} layers, {arguments.hidden} wide, tied head, LoRA, batch {arguments.batch_size}, ",
        end="",
    )
    print(f"{mx.default_device()}{', nothing compiled' if arguments.no_compile else ''}.", flush=True)
    found: dict[str, Values] = {}
    for kind in arguments.kinds:
        todo = []
        for sizes, *variants in grid:
            shape = Shape(*sizes, arguments.batch_size, arguments.hidden, arguments.layers)
            rounds = arguments.rounds if kind == "time" else 1
            work = Work(kind, shape, (), rounds, not arguments.no_compile, str(mx.default_device()))
            asked = [name for name in variants[kind == "memory"] if name in ("lora", *arguments.variants)]
            todo.append(replace(work, variants=tuple(name for name in asked if fits(work, name))))
        print()
        show = show_times if kind == "time" else show_memory
        found[kind] = show([work for work in todo if work.variants], arguments.json)
    show_growth(found)


if __name__ == "__main__":
    main()
