"""Adapter quality against bytes per token: the same students trained from caches of several sizes and from full logits.

For each domain, temperature and seed the student is trained from full logits (targets.preset exact) and from each
sparse setting, on the same batches from the same start. Shown is the held-out KL to the teacher over the whole
vocabulary, from its hidden states, as a ratio to that of full logits: the geometric mean over domains and seeds.

    python scripts/bench_quality.py                                    # the pocket models, all domains, three seeds
    python scripts/bench_quality.py --config configs/base.yaml -d thinking --seeds 0 --temperatures 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import true_kd  # noqa: F401 - loads a fast BLAS before mlx
from true_kd import jobs
from true_kd.config import Override
from true_kd.datasets import DomainData, build_data
from true_kd.evaluation import evaluate
from true_kd.models import add_lora, open_model, open_tokenizer, release_memory
from true_kd.teacher import Teacher, capture_domain
from true_kd.training import train
from true_kd.vocabulary import require_match

FULL = "full logits"
SETTINGS: dict[str, dict[str, object]] = {
    FULL: {"preset": "exact"},
    "tiny": {"preset": "tiny", "draw_temperature": 1.0},
    "draw 2, threshold 0.1": {"threshold": 0.1, "draw_temperature": 2.0},
    "draw 2, threshold 0.05": {"threshold": 0.05, "draw_temperature": 2.0},
    "default": {"preset": "default", "draw_temperature": 2.0},
    "hot": {"preset": "hot", "draw_temperature": 4.0},
    "default, half of the tokens": {"preset": "default", "draw_temperature": 2.0, "share": 0.5},
    "default, a fifth of the tokens": {"preset": "default", "draw_temperature": 2.0, "share": 0.2},
}


@dataclass(frozen=True)
class Run:
    """One student trained, measured on the held-out tokens."""

    settings: str
    domain: str
    temperature: float
    seed: int
    kl: float
    """KL(teacher || student) over the whole vocabulary at temperature 1, nats per token."""
    soft_kl: float
    """T^2 times the KL at the run's temperature, nats per token."""
    bytes_per_token: float
    """Cache files of the domain over its response tokens."""


def plan_job(config: Path, domain: str, cache: Path, values: dict[str, object], temperature: float, seed: int):
    """A job as the command line would make it."""
    given = [Override("--set", ("targets", key), value) for key, value in values.items()]
    given += [
        Override("--temperature", ("losses", "temperature"), temperature),
        Override("--seed", ("seed",), seed),
        Override("--set", ("cache",), str(cache)),
    ]
    planned, failures = jobs.plan(config, [domain], given)
    jobs.refuse(failures) if failures else None
    return planned[0]


def captured_data(job: jobs.Job, teacher: Teacher, student) -> tuple[DomainData, float]:
    """A domain's examples, captured where the cache lacks them, and the bytes per token they take."""
    capturing = capture_domain(job, teacher, job.config.targets.settings)
    while True:
        try:
            next(capturing)
        except StopIteration as done:
            job.targets = done.value
            break
    theirs = open_tokenizer(job.config.student, "student")
    job.vocabulary = require_match(teacher.text.ids, theirs.ids, teacher.text.size, theirs.size)
    data = build_data(job, student)
    examples = [*data.train, *data.valid]
    return data, data.counts.cache_bytes / sum(len(example.response) for example in examples)


def measure(config: Path, domain: str, temperature: float, seed: int, names: list[str], cache: Path) -> Iterator[Run]:
    """Train from each of the settings; the judge is always the teacher's full distribution."""
    judge = None
    for name in names:
        job = plan_job(config, domain, cache, SETTINGS[name], temperature, seed)
        student = open_model(job.config.student, "student")
        teacher = Teacher(job.config.teacher, job.config.cache_folder)
        data, size = captured_data(job, teacher, student)
        judge = judge or data.valid
        import mlx.core as mx

        mx.random.seed(seed)
        add_lora(student.module, job.config.lora)
        for _ in train(student.module, data.train, job.config.training, job.config.losses, seed):
            pass
        metrics = evaluate(student.module, judge, job.config.losses.final, 32)
        yield Run(name, domain, temperature, seed, metrics.kl, metrics.kd, size)
        del student
        release_memory()


def table(runs: list[Run]) -> str:
    """Ratios to full logits as a Markdown table, a row per setting."""
    base = {(run.domain, run.temperature, run.seed): run for run in runs if run.settings == FULL}
    temperatures = sorted({run.temperature for run in runs})
    head = "".join(f" T = {at:g}: KL, KL at T |" for at in temperatures)
    lines = [f"| cache | bytes/token |{head}", "|---|---|" + "---|" * len(temperatures)]
    for name in dict.fromkeys(run.settings for run in runs):
        mine = [run for run in runs if run.settings == name]
        cells = []
        for at in temperatures:
            pairs = [(run, base[run.domain, at, run.seed]) for run in mine if run.temperature == at]
            if not pairs:
                cells.append(" - |")
                continue
            ratios = [
                np.exp(np.mean([np.log(getattr(run, kind) / getattr(full, kind)) for run, full in pairs]))
                for kind in ("kl", "soft_kl")
            ]
            cells.append(f" {ratios[0]:.3f}, {ratios[1]:.3f} |")
        size = np.mean([run.bytes_per_token for run in mine])
        lines.append(f"| {name} | {size:,.1f} |" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("pocket:configs/base.yaml"))
    every = ["action", "debug", "memory", "reflection", "task", "thinking"]
    parser.add_argument("-d", "--domains", nargs="*", default=every)
    parser.add_argument("--temperatures", nargs="*", type=float, default=[1.0, 2.0])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--json", type=Path, help="Keep every run here; those it has are not done again.")
    arguments = parser.parse_args()
    names = list(dict.fromkeys([FULL, *arguments.settings]))
    runs: list[Run] = []
    if arguments.json and arguments.json.exists():
        runs = [Run(**record) for record in json.loads(arguments.json.read_text())]
    with tempfile.TemporaryDirectory() as cache:
        for seed in arguments.seeds:
            for temperature in arguments.temperatures:
                for domain in arguments.domains:
                    place = (domain, temperature, seed)
                    known = {run.settings for run in runs if (run.domain, run.temperature, run.seed) == place}
                    todo = [name for name in names if name not in known]
                    if not todo:
                        continue
                    todo = list(dict.fromkeys([FULL, *todo]))
                    found = list(measure(arguments.config, domain, temperature, seed, todo, Path(cache)))
                    found = [run for run in found if run.settings not in known]
                    runs += found
                    shown = ", ".join(f"{run.settings} {run.kl:.4f}" for run in found)
                    print(f"seed {seed}, T {temperature:g}, {domain}: {shown}", flush=True)
                    if arguments.json:
                        arguments.json.write_text(json.dumps([asdict(run) for run in runs], indent=1))
    print(f"\n{table(runs)}\n")
    print(f"Domains {', '.join(arguments.domains)}; seeds {', '.join(map(str, arguments.seeds))}.")


if __name__ == "__main__":
    main()
