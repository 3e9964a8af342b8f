"""`evaluate`, `analyze` and `sweep`: what an adapter is worth, what there is to gain, and which settings are best."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from true_kd.adapters import RUN
from true_kd.cli.flags import (
    AsJson,
    ConfigFile,
    Domains,
    Everything,
    Fresh,
    Out,
    Prompts,
    ReportTo,
    Sets,
    Student,
    Teacher,
    flag,
    offers,
    overrides,
)
from true_kd.cli.output import say_json
from true_kd.config import SHORT_NAMES, Override, load_config
from true_kd.errors import InputError, TrueKDError, shared_exit_code
from true_kd.suggest import percent
from true_kd.validation import parse_override
from true_kd.yaml_file import read_value

if TYPE_CHECKING:
    from true_kd import events
    from true_kd.alignment import Compatibility, MappedTargets
    from true_kd.gate import ParentComparison


def evaluate(
    domain: Domains = None,
    everything: Annotated[bool, typer.Option("--all", help="Every domain that has an adapter.")] = False,
    config: ConfigFile = None,
    out: Out = None,
    prompts: Prompts = None,
    control: Annotated[str | None, flag("control", "--control")] = None,
    as_json: AsJson = False,
    sets: Sets = None,
) -> int:
    """Measure adapters anew: student, student with adapter and teacher on the held-out prompts.

    Each adapter is measured under the settings of its own run, which run.json beside it holds.
    """
    from true_kd import events, finding, jobs, layout, pipeline
    from true_kd.console import proof_table

    folder = finding.output_folder(out, config)
    there = layout.domains_in(folder)
    named = there if everything else list(dict.fromkeys(domain or []))
    if not named or (everything and domain):
        listed = ", ".join(there) or "none"
        raise InputError(f"{folder}: expected one of --domain NAME and --all. Adapters here: {listed}.")
    given = overrides({"prompts": prompts, "control": control}, sets)
    planned, failures = [], {}
    for name in named:
        # The folder may have moved since its run.
        here = [*given, Override("--out", ("out",), str(folder))]
        try:
            found = finding.find_domain(name, str(folder), None, here)
        except TrueKDError as error:
            failures[name] = error
            continue
        ready, refused = jobs.plan(found.folder / RUN, [name], here)
        planned, failures = planned + ready, failures | refused
    if not planned:
        jobs.refuse(failures)
    end = _watch(pipeline.evaluate(planned, failures), events.EvaluationFinished, as_json)
    if as_json:
        say_json({"domains": {name: asdict(proof) for name, proof in end.proofs.items()}, **_failed(end.failures)})
    else:
        for name, proof in end.proofs.items():
            _print(proof_table(name, proof))
            typer.echo(proof.verdict.sentence)
    return shared_exit_code(end.failures.values())


def analyze(
    domain: Domains = None,
    everything: Everything = False,
    config: ConfigFile = None,
    teacher: Teacher = None,
    student: Student = None,
    prompts: Prompts = None,
    vocab_strategy: Annotated[str | None, flag("vocab_strategy", "--vocab-strategy")] = None,
    sample: Annotated[int, typer.Option("--sample", min=1, help="Held-out prompts of each domain to look at.")] = 32,
    parent: Annotated[
        str | None,
        typer.Option(
            "--parent", metavar="MODEL", help="The model a quantised teacher was made from: says what that cost."
        ),
    ] = None,
    as_json: AsJson = False,
    sets: Sets = None,
) -> int:
    """Say what each domain has to gain, before hours of capture: the most promising first."""
    from true_kd import events, jobs, pipeline
    from true_kd.console import headroom_table

    flags = {"teacher": teacher, "student": student, "prompts": prompts, "vocab_strategy": vocab_strategy}
    given = overrides(flags, sets)
    given.append(Override("--sample", ("gate", "prompts"), sample))
    domains = jobs.choose_domains(config, domain or [], everything, given)
    planned, failures = jobs.plan(config, domains, given)
    if not planned:
        jobs.refuse(failures)
    end = _watch(pipeline.analyze(planned, failures, parent), events.AnalysisFinished, as_json)
    if as_json:
        say_json(
            {
                "domains": {name: asdict(headroom) for name, headroom in end.headrooms.items()},
                "parents": {name: asdict(comparison) for name, comparison in end.parents.items()},
                "tokenizers": {
                    name: {**asdict(shared), **asdict(mapped)} for name, (shared, mapped) in end.tokenizers.items()
                },
                **_failed(end.failures),
            }
        )
        return shared_exit_code(end.failures.values())
    if end.headrooms:
        _print(headroom_table(end.headrooms))
        _say_headrooms(end)
    _say_tokenizers(end.tokenizers)
    _say_parents(end.parents)
    return shared_exit_code(end.failures.values())


def sweep(
    domain: Domains = None,
    everything: Everything = False,
    config: ConfigFile = None,
    temperature: Annotated[str | None, typer.Option("--temperature", metavar="A,B", help="Values to try.")] = None,
    alpha: Annotated[str | None, typer.Option("--alpha", metavar="A,B", help="Values to try.")] = None,
    divergence: Annotated[
        str | None,
        typer.Option("--divergence", metavar="A,B", help="Values to try.", autocompletion=offers("divergence")),
    ] = None,
    learning_rate: Annotated[str | None, typer.Option("--learning-rate", metavar="A,B", help="Values to try.")] = None,
    iters: Annotated[str | None, typer.Option("--iters", metavar="A,B", help="Values to try.")] = None,
    rank: Annotated[str | None, typer.Option("--rank", metavar="A,B", help="Values to try.")] = None,
    seed: Annotated[
        str | None, typer.Option("--seed", metavar="A,B", help="Repetitions: settings are compared by their mean.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="KEY.PATH=A,B", help="Values to try for any key of losses, training or lora."),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            "--control",
            help="sft: try plain fine-tuning on the same text as well.",
            autocompletion=offers("control"),
        ),
    ] = None,
    teacher: Teacher = None,
    student: Student = None,
    prompts: Prompts = None,
    out: Out = None,
    fresh: Fresh = False,
    report_to: ReportTo = None,
    as_json: AsJson = False,
    sets: Sets = None,
) -> int:
    """Distil under all combinations of some settings from one cache, and say which is best.

    A value alone sets what it says for all points: `--iters 100`.
    """
    from true_kd import events, jobs
    from true_kd import sweep as sweeping
    from true_kd.console import sweep_table
    from true_kd.tracking import Trackers, check_installed

    swept = {
        "temperature": temperature,
        "alpha": alpha,
        "divergence": divergence,
        "learning_rate": learning_rate,
        "iters": iters,
        "rank": rank,
        "seed": seed,
    }
    axes, fixed = [], {}
    for name, text in swept.items():
        if text is None:
            continue
        axis = _axis(f"--{name.replace('_', '-')}", SHORT_NAMES[name], text)
        if len(axis.values) > 1:
            axes.append(axis)
        else:
            fixed[name] = axis.values[0]
    axes += [_axis("--grid", *parse_override(text, "--grid")) for text in grid or ()]
    if control not in (None, "none", "sft"):
        raise InputError(f"--control {control!r}: expected sft or none. Choose one.")
    given = {"teacher": teacher, "student": student, "prompts": prompts, "out": out, "fresh": fresh or None, **fixed}
    given["report_to"] = report_to or None
    shared = overrides(given, sets)
    points = sweeping.grid(axes, with_control=control == "sft")
    domains = jobs.choose_domains(config, domain or [], everything, shared)
    settings = load_config(config, None, shared)
    check_installed(settings.report_to)
    with Trackers(settings.report_to, settings.out_folder) as trackers:
        running = sweeping.sweep(config, domains, shared, points)
        end = _watch(running, events.SweepFinished, as_json, trackers.note)
    if as_json:
        say_json({"domains": {each.domain: asdict(each) for each in end.recommendations}, **_failed(end.failures)})
    else:
        for each in end.recommendations:
            _print(sweep_table(each))
            typer.echo(each.sentence)
        for name, error in end.failures.items():
            typer.echo(f"{name}: {error}", err=True)
        if end.recommendations:
            typer.echo(f"Table: {end.table}. Each point's adapters lie beside it.")
    return shared_exit_code(end.failures.values())


def _axis(flag_name: str, path: Any, value: Any) -> Any:
    """An axis from what was written: "1,2,4", or for `--grid` what the value of `--set` would be."""
    from true_kd.sweep import Axis

    if not isinstance(value, str):
        return Axis(flag_name, path, tuple(value) if isinstance(value, list) else (value,))
    parts = [part.strip() for part in value.split(",")]
    values = [read_value(part, flag_name) for part in parts if part]
    if not all(parts):
        raise InputError(f"{flag_name} {value!r}: an empty value, expected values with commas between. Write 1,2.")
    return Axis(flag_name, path, tuple(values))


def _watch(
    running: Iterable[events.Event],
    last: type,
    as_json: bool,
    note: Callable[[events.Event], list[str]] = lambda _: [],
) -> Any:
    """Show a run's events, on stderr where stdout is for programs; returns the last.

    `note` is told of each, and says what is to be warned of.
    """
    from true_kd.console import make_view

    # Closed before a signal's last line is printed: by then a run that was stopped is.
    with make_view(sys.stderr if as_json else sys.stdout) as view, contextlib.closing(running):
        for event in running:
            if isinstance(event, last):
                return event
            for line in note(event):
                typer.echo(line, err=True)
            view.show(event)
    raise AssertionError(f"a run ended without {last.__name__}")


def _say_headrooms(end: events.AnalysisFinished) -> None:
    for name, headroom in end.headrooms.items():
        typer.echo(f"{name}: {headroom.why}.")
        if headroom.missed:
            shown = ", ".join(f"{missed.text!r} {missed.share:.0%}" for missed in headroom.missed)
            typer.echo(f"  most of the KL is at: {shown}")
        if headroom.first_miss is not None:
            typer.echo(f"  they first differ after {headroom.first_miss:.0%} of a reply (median)")


def _say_tokenizers(tokenizers: Mapping[str, tuple[Compatibility, MappedTargets]]) -> None:
    for name, (shared, mapped) in tokenizers.items():
        typer.echo(
            f"{name}: {shared.shared:,} tokens are in both vocabularies, "
            f"{percent(shared.shared / shared.teacher_tokens)} of the teacher's {shared.teacher_tokens:,} and "
            f"{percent(shared.shared / shared.student_tokens)} of the student's {shared.student_tokens:,}"
        )
        typer.echo(
            f"  {mapped.way}: targets at {percent(mapped.positions)} of the student's tokens; of the teacher's "
            f"probability {percent(mapped.matched)} goes to the same token, {percent(mapped.split)} to the first of "
            f"several, {percent(mapped.chained)} to one that holds several of the teacher's"
        )
        typer.echo(
            f"  {percent(mapped.drawn)} to tokens that unlikely texts become, some drawn for all; "
            f"{percent(mapped.merged)} cannot follow and {percent(mapped.nowhere)} has no counterpart"
        )


def _say_parents(parents: Mapping[str, ParentComparison]) -> None:
    for name, found in parents.items():
        span = "" if found.kl.low is None else f" ({found.kl.low:.3f} to {found.kl.high:.3f})"
        typer.echo(
            f"{name}: the teacher is {found.kl.value:.3f} nats per token{span} from its parent, top-1 agreement "
            f"{found.top1_agreement.value:.1%}, on {found.replies} replies"
        )


def _failed(failures: Mapping[str, Exception]) -> dict[str, Any]:
    return {"failed": {name: str(error) for name, error in failures.items()}}


def _print(table: Any) -> None:
    from true_kd.console import make_console

    make_console(sys.stdout).print(table)
