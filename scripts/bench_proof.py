"""Whether distillation beats plain fine-tuning on the same text for as many steps, over several seeds.

For each seed every domain is distilled with its control (`--control sft`), by the commands' own code. Shown are
student, control, distilled and teacher on the held-out prompts, means over the seeds, and the paired difference between
distilled and control with its 95 % interval over the prompts; the last row has the prompts of all domains.

    python scripts/bench_proof.py                                       # the pocket models, six domains, three seeds
    python scripts/bench_proof.py --config configs/base.yaml -d thinking --seeds 0 --out proof
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import true_kd  # noqa: F401 - loads a fast BLAS before mlx
from true_kd import events, jobs, pipeline
from true_kd.config import Override
from true_kd.evaluation import Estimate, Resampled
from true_kd.prompts import list_domains
from true_kd.proof import PromptScores

MODELS = ("student", "control", "adapted", "teacher")


@dataclass(frozen=True)
class Measured:
    """One domain, averaged over the seeds prompt by prompt."""

    domain: str
    columns: Mapping[str, np.ndarray]
    """Sums over each prompt's tokens by measure and model, and `tokens`."""
    answers: Mapping[str, np.ndarray]
    """Share of the seeds that answered each task right, by model."""
    by_seed: tuple[float, ...]
    """How much nearer to the teacher the distilled student is than the control, by seed, nats per token."""


def run(config: Path, domains: Sequence[str], seed: int, out: Path, cache: Path) -> Iterator[tuple[str, PromptScores]]:
    """Distil with the control under one seed; yields each domain's scores."""
    given = [
        Override("--seed", ("seed",), seed),
        Override("--out", ("out",), str(out / f"seed_{seed}")),
        Override("--control", ("control",), "sft"),
        Override("--set", ("cache",), str(cache)),
    ]
    planned, failures = jobs.plan(config, domains, given)
    jobs.refuse(failures) if failures else None
    for event in pipeline.distill(planned):
        if isinstance(event, events.DomainFailed):
            raise event.error
        if isinstance(event, events.DomainFinished) and event.result.proof is not None:
            yield event.result.domain, event.result.proof.prompts
            print(f"seed {seed}: {event.result.proof.verdict.sentence}", flush=True)


def average(domain: str, scores: Sequence[PromptScores]) -> Measured:
    """The means over the seeds, which were measured on the same prompts."""
    tokens = np.array(scores[0].tokens, dtype=np.float64)
    columns = {"tokens": tokens, "teacher kl": np.zeros(len(tokens)), "teacher agreed": tokens}
    for model in MODELS[:-1]:
        for measure in ("kl", "agreed"):
            columns[f"{model} {measure}"] = np.mean([getattr(each, measure)[model] for each in scores], axis=0)
    names = [name for name in MODELS if all(name in each.right for each in scores)]
    answers = {name: np.mean([np.array(each.right[name], dtype=float) for each in scores], axis=0) for name in names}
    leads = [float(np.sum(each.kl["control"]) - np.sum(each.kl["adapted"])) / float(tokens.sum()) for each in scores]
    return Measured(domain, columns, answers, tuple(leads))


def pool(found: Sequence[Measured]) -> Measured:
    """The prompts of all domains together."""
    columns = {name: np.concatenate([each.columns[name] for each in found]) for name in found[0].columns}
    names = [name for name in MODELS if all(name in each.answers for each in found)]
    answers = {name: np.concatenate([each.answers[name] for each in found]) for name in names}
    tokens = [each.columns["tokens"].sum() for each in found]
    seeds = tuple(
        float(np.average(leads, weights=tokens)) for leads in zip(*(each.by_seed for each in found), strict=True)
    )
    return Measured("all", columns, answers, seeds)


def table(found: Sequence[Measured]) -> str:
    """Three Markdown tables: KL, agreement and exact match, a row per domain."""
    kl = [_compare(each.domain, each.columns, "kl", -1.0, ".3f") for each in found]
    agreed = [_compare(each.domain, each.columns, "agreed", 1.0, ".1%") for each in found]
    answers = []
    for each in found:
        if "adapted" in each.answers:
            columns = {f"{model} right": shares for model, shares in each.answers.items()}
            columns["tokens"] = np.ones(len(each.answers["adapted"]))
            answers.append(_compare(each.domain, columns, "right", 1.0, ".1%"))
    by_seed = "; ".join(f"{each.domain} {_list(each.by_seed)}" for each in found)
    return "\n".join(
        [
            *("\nKL to the teacher, nats per token\n", _HEAD, *kl),
            *("\ntop-1 agreement\n", _HEAD, *agreed),
            *("\nexact match\n", _HEAD, *answers),
            f"\nKL ahead of the control by seed: {by_seed}",
        ]
    )


_HEAD = "| domain | student | SFT control | distilled | teacher | distilled ahead by |\n|---|---|---|---|---|---|"


def _compare(domain: str, columns: Mapping[str, np.ndarray], measure: str, sign: float, form: str) -> str:
    """A row: the mean of each model, and by how much the distilled one is better than the control."""
    prompts = Resampled(columns)
    known = [model for model in MODELS if f"{model} {measure}" in columns]
    means = {
        model: prompts.estimate(lambda sums, model=model: sums[f"{model} {measure}"] / sums["tokens"])
        for model in known
    }
    ahead = prompts.estimate(
        lambda sums: sign * (sums[f"adapted {measure}"] - sums[f"control {measure}"]) / sums["tokens"]
    )
    cells = [_show(estimate, form) for estimate in (*(means.get(model) for model in MODELS), ahead)]
    return f"| {domain} | {' | '.join(cells)} |"


def _show(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return "-"
    span = "" if estimate.low is None else f" ({estimate.low:{form}} to {estimate.high:{form}})"
    return f"{estimate.value:{form}}{span}"


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.4f}" for value in values)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("pocket:configs/base.yaml"))
    parser.add_argument("-d", "--domains", nargs="*")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="Keep the adapters here; runs that it has are not made again.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        domains = arguments.domains or list_domains(jobs.load_config(arguments.config, None, ()).prompts_folder)
        scores: dict[str, list[PromptScores]] = {}
        for seed in arguments.seeds:
            for domain, found in run(arguments.config, domains, seed, out, out / "cache"):
                scores.setdefault(domain, []).append(found)
    found = [average(domain, each) for domain, each in sorted(scores.items())]
    print(table([*found, pool(found)] if len(found) > 1 else found))


if __name__ == "__main__":
    main()
