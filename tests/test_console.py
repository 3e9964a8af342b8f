"""A run on the screen: lines of plain text in a pipe, bars on a terminal, and colour only where it is wanted."""

from __future__ import annotations

import io
import re
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
from handmade import usual_proof
from rich.console import Console
from rich.table import Table

from true_kd import events
from true_kd.budget import THRESHOLDS, BudgetChoice
from true_kd.capture import CaptureProgress
from true_kd.console import LineView, LiveView, headroom_table, make_view, proof_table
from true_kd.errors import InputError, PromptError
from true_kd.evaluation import Estimate, EvalMetrics
from true_kd.fidelity import Fidelity, Position
from true_kd.reporting import DataCounts, KDResult, Validation
from true_kd.targets import TargetOptions
from true_kd.training import StepMetrics

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
METRICS = EvalMetrics(loss=2.5, kd=2.0, ce=3.0, kl=0.75, top1_agreement=0.5, tokens=40)
COUNTS = DataCounts(
    train_examples=9,
    valid_examples=1,
    train_response_tokens=1234,
    train_tokens=56789,
    truncated=0,
    dropped=0,
    cut_replies=0,
    differing_ids=0,
    cache_bytes=100,
)
PROOF = usual_proof("cats")
CHECKED = usual_proof("cats", control=True, tasks=8)
RESULT = KDResult(
    domain="cats",
    teacher="a/b",
    student="c/d",
    adapter_path="adapters_kd/cats",
    data=COUNTS,
    before=METRICS,
    after=replace(METRICS, loss=1.25, kl=0.25, top1_agreement=0.9),
    best_iteration=2,
    steps=(),
    validations=(),
    seconds={},
    capture_peak_memory=3 * 2**30,
    training_peak_memory=2**30,
    trainable_parameters=10,
    finished_at="2026-01-01T00:00:00+00:00",
    proof=PROOF,
)
SUMMARY = Path("adapters_kd/kd_summary.json")
FIDELITY = Fidelity(
    temperature=2.0,
    tokens=380,
    tail_mass=0.0914,
    kl_floor=0.0123,
    cosine=0.9993,
    worst=(Position("prompts/cats/valid.jsonl:3", 7, 0.951), Position("prompts/cats/valid.jsonl:1", 0, 0.5)),
    bytes_per_token=20.9,
    cache_bytes=32_123,
)
CHOICE = BudgetChoice(TargetOptions(threshold=0.25).settings, 28.4, 0.0000844, 676)


def step(iteration: int) -> StepMetrics:
    """An optimizer step."""
    return StepMetrics(
        iteration=iteration,
        total=1.5,
        kd=1.0,
        ce=2.0,
        learning_rate=1e-4,
        grad_norm=0.5,
        response_tokens=50,
        padded_tokens=100,
        seconds=0.1,
        tokens_per_second=1000.0,
        peak_memory=2**30,
    )


def finished(*results: KDResult, failures: dict[str, Exception] | None = None) -> events.RunFinished:
    """The end of a run."""
    return events.RunFinished(results, failures or {}, SUMMARY, 12.0)


def shown(*shown_events: events.Event, width: int = 80) -> str:
    """What the events look like in a pipe."""
    out = io.StringIO()
    with LineView(Console(file=out, width=width, highlight=False)) as view:
        for event in shown_events:
            view.show(event)
    return out.getvalue()


WHOLE_RUN = (
    events.DomainFailed("dogs", PromptError(["prompts/dogs/train.txt:1:1: byte 0xff is not UTF-8."])),
    events.TeacherOpening("a/b"),
    events.CaptureReused("birds", 6),
    *(events.Captured("cats", CaptureProgress(done, 10, done * 7, 0.5)) for done in range(11)),
    events.TeacherFreed(2**20),
    events.TrainingStarted("cats", 20, COUNTS),
    events.Validated("cats", Validation(0, METRICS)),
    *(events.Stepped("cats", step(iteration)) for iteration in range(1, 21)),
    events.Validated("cats", Validation(20, METRICS)),
    events.DomainFinished(RESULT),
    finished(RESULT, failures={"dogs": InputError("x")}),
)


class Screen(io.StringIO):
    """A stdout that says of itself that it is a terminal, or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def on_stdout(monkeypatch: pytest.MonkeyPatch, *shown_events: events.Event, terminal: bool, **environment: str) -> str:
    """What the events, or a whole run, write to stdout in an environment."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    screen = Screen(terminal)
    monkeypatch.setattr("sys.stdout", screen)
    with make_view() as view:
        for event in shown_events or WHOLE_RUN:
            view.show(event)
    return screen.getvalue()


# Lines.


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (events.TeacherOpening("a/b"), "teacher a/b: opening"),
        (events.Captured("cats", CaptureProgress(0, 9, 0, 0.0)), "cats: captured 0/9 replies, reading prompts"),
        (events.Captured("cats", CaptureProgress(9, 9, 0, 0.0)), "cats: captured 9/9 replies, from the cache"),
        (events.Captured("cats", CaptureProgress(9, 9, 5000, 2.0)), "cats: captured 9/9 replies, 2,500 tok/s"),
        (events.CaptureReused("cats", 6), "cats: 6 replies of the teacher are in the cache"),
        (events.TeacherFreed(5 * 2**20), "teacher freed, 5 MB still held"),
        (
            events.TrainingStarted("cats", 20, COUNTS),
            "cats: training on 1,234 of 56,789 tokens (9 examples, 1 held out)",
        ),
        (
            events.Validated("cats", Validation(7, METRICS)),
            "cats: iteration 7: validation loss 2.5000, KL 0.7500, CE 3.0000, top-1 50.0%",
        ),
        (
            events.DomainFinished(RESULT),
            f"cats: finished {RESULT.finished_at}: adapters_kd/cats\n{PROOF.verdict.sentence}",
        ),
        (
            events.DomainFinished(replace(RESULT, unchanged=True)),
            f"cats: unchanged since {RESULT.finished_at}: adapters_kd/cats\n{PROOF.verdict.sentence}",
        ),
        (
            events.DomainFinished(replace(RESULT, proof=None)),
            f"cats: finished {RESULT.finished_at}: adapters_kd/cats",
        ),
        (events.Proving("cats", 12), "cats: comparing student, adapter and teacher on 12 held-out prompts"),
        (
            events.Probed("cats", PROOF.headroom),
            f"cats: {PROOF.headroom.why} (KL 0.500, top-1 agreement 0%, 12 prompts)",
        ),
        (
            events.Probed("cats", replace(PROOF.headroom, standing="no better", why="it is no better")),
            "cats: it is no better; distilling it may bring nothing (KL 0.500, top-1 agreement 0%, 12 prompts)",
        ),
        (
            events.Probed("cats", replace(PROOF.headroom, standing="same", why="it is the same")),
            "cats: it is the same; distilling it may bring nothing (KL 0.500, top-1 agreement 0%, 12 prompts)",
        ),
        (events.Evaluated("cats", PROOF, kept=True), "cats: measured"),
        (
            events.Evaluated("cats", PROOF, kept=False),
            "cats: measured; not kept: the adapter is of other prompts or settings, or of a run cut short",
        ),
        (events.ParentCompared("cats", "a/parent", 9), "cats: compared with a/parent on 9 replies"),
        (events.PointStarted("alpha=0.5", 2, 4), "point 2 of 4: alpha=0.5"),
        (finished(failures={"cats": InputError("x")}), f"0 done, 1 failed. Summary: {SUMMARY}"),
        (
            replace(finished(), report=Path("adapters_kd/report.html")),
            f"0 done, 0 failed. Summary: {SUMMARY} Report: adapters_kd/report.html",
        ),
        (
            events.BudgetChosen(CHOICE),
            "cache budget: targets.threshold 0.25, about 28 bytes/token, 84.4 kB in all",
        ),
        (
            events.DomainCaptured("cats", 72, 1538, 32_123, 20.9, Path("cache/0123")),
            "cats: 72 replies, 1,538 tokens, 32.1 kB (21 bytes/token) in cache/0123",
        ),
        (events.CaptureFinished(("cats",), {"dogs": InputError("x")}, 6.4), "1 captured, 1 failed, 6 s"),
        (
            events.Certified("cats", FIDELITY, poor=False),
            "cats: targets at T = 2: gradient 2.1° off (cosine 0.9993), tail 9.1%, KD floor 0.01\n"
            "cats: targets of 21 bytes/token, 32.1 kB; most sampled at prompts/cats/valid.jsonl:3 token 7 (95%)",
        ),
        (
            events.TrainingStarted("cats", 20, COUNTS, made=12),
            "cats: goes on from the checkpoint of iteration 12\n"
            "cats: training on 1,234 of 56,789 tokens (9 examples, 1 held out)",
        ),
        (
            events.DivergenceCoarsened("cats", "reverse_kl", 0.0914),
            "cats: reverse_kl from sampled targets: the ids kept exactly one by one, all others (9.1% of the "
            "distribution) as one; with targets.preset exact each by itself",
        ),
        (
            events.MemoryShort("cats", 3_200_000_000, 1_000_000_000, 2_000_000_000, recomputes=False),
            "cats: the longest example alone takes about 3.2 GB, expected at most 2.0 GB (--memory-gb): set "
            "training.grad_checkpoint=true, or lower --max-seq-length",
        ),
        (
            events.MemoryShort("cats", 3_200_000_000, 1_000_000_000, 2_000_000_000, recomputes=True),
            "cats: the longest example alone takes about 3.2 GB, expected at most 2.0 GB (--memory-gb): lower "
            "--max-seq-length",
        ),
        (
            events.MemoryShort("cats", 3_200_000_000, 2_500_000_000, 2_000_000_000, recomputes=False),
            "cats: the student's weights alone take 2.5 GB, expected less than 2.0 GB (--memory-gb): raise it, or "
            "choose a smaller or quantised student",
        ),
        (
            events.CheckpointsReplaced("cats", 900),
            "cats: starts anew; the checkpoints here, up to iteration 900, are of other settings, prompts or models, "
            "and are replaced",
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_each_event_is_a_line_or_two(event: events.Event, line: str) -> None:
    assert shown(event) == f"{line}\n"


def test_poor_targets_are_told_with_the_places_that_are_worst() -> None:
    first, second = shown(events.Certified("cats", replace(FIDELITY, cosine=0.5), poor=True)).splitlines()
    assert first.startswith("cats: targets at T = 2: gradient 60.0° off (cosine 0.5000), ")
    assert second.startswith("cats: poor targets of 21 bytes/token, 32.1 kB; most sampled at ")
    assert second.endswith("prompts/cats/valid.jsonl:3 token 7 (95%)")


def test_exact_targets_are_told_without_noise() -> None:
    exact = replace(
        FIDELITY, worst=(), cosine=1.0, tail_mass=0.0, kl_floor=0.0, bytes_per_token=7168.0, cache_bytes=3 * 10**9
    )
    assert shown(events.Certified("cats", exact, poor=False)) == (
        "cats: targets at T = 2: gradient 0.0° off (cosine 1.0000), tail 0.0%, KD floor 0\n"
        "cats: targets of 7,168 bytes/token, 3.0 GB\n"
    )


@pytest.mark.parametrize(
    ("size", "text"),
    [(999, "999 bytes"), (1000, "1.0 kB"), (1_250_000, "1.2 MB"), (2 * 10**9, "2.0 GB"), (3 * 10**12, "3000.0 GB")],
)
def test_sizes_are_in_the_units_of_the_budget(size: int, text: str) -> None:
    assert f" {text} " in shown(events.DomainCaptured("cats", 1, 1000, size, 5.0, Path("cache")))


def test_the_threshold_of_a_budget_can_be_copied_into_a_config() -> None:
    for threshold in THRESHOLDS:
        choice = replace(CHOICE, settings=replace(CHOICE.settings, threshold=threshold))
        line = shown(events.BudgetChosen(choice))
        assert float(line.partition("targets.threshold ")[2].partition(",")[0]) == threshold


@pytest.mark.parametrize("loss", [2.5, 3.0])
def test_an_adapter_that_brought_nothing_is_told(loss: float) -> None:
    *_, last = shown(events.DomainFinished(replace(RESULT, after=replace(METRICS, loss=loss)))).splitlines()
    assert last.startswith(
        "cats: the adapter brought the student no nearer to the teacher "
        f"(validation loss 2.5000 before, {loss:.4f} after). Try "
    )


def test_what_was_cut_or_dropped_is_told_when_training_starts() -> None:
    counts = replace(COUNTS, truncated=2, dropped=3, cut_replies=4)
    second = shown(events.TrainingStarted("cats", 20, counts)).splitlines()[1]
    assert second == (
        "cats: 4 of 13 replies cut at capture.max_tokens, 2 of 10 examples cut at training.max_seq_length, 3 of 13 "
        "prompts dropped (no room for a reply, or tokens that the student lacks)"
    )


@pytest.mark.parametrize(("iters", "lines"), [(1, 1), (2, 2), (10, 10), (200, 11), (12345, 11)])
def test_a_stage_reports_about_ten_times_and_at_its_end(iters: int, lines: int) -> None:
    steps = [events.Stepped("cats", step(iteration)) for iteration in range(1, iters + 1)]
    reported = shown(events.TrainingStarted("cats", iters, COUNTS), *steps).splitlines()[1:]
    assert len(reported) == lines
    assert reported[-1].startswith(f"cats: {iters}/{iters} loss 1.5000 kd 1.0000 ce 2.0000 lr 1.00e-04 ")


def test_a_run_that_goes_on_reports_its_end_as_well() -> None:
    steps = [events.Stepped("cats", step(iteration)) for iteration in range(13, 21)]
    reported = shown(events.TrainingStarted("cats", 20, COUNTS, made=12), *steps).splitlines()[2:]
    assert [line.split()[1] for line in reported] == ["13/20", "14/20", "16/20", "18/20", "20/20"]


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_divergence_or_a_budget_means_is_told_everywhere(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = (
        events.TrainingStarted("cats", 20, COUNTS, made=12),
        events.DivergenceCoarsened("cats", "reverse_kl", 0.1),
        events.MemoryShort("cats", 3, 1, 2, recomputes=False),
        events.Stepped("cats", step(13)),
        finished(RESULT),
    )
    text = ESCAPE.sub("", on_stdout(monkeypatch, *seen, terminal=terminal, TERM="xterm-256color"))
    for words in ("goes on from the checkpoint of iteration 12", "reverse_kl from sampled targets", "(--memory-gb)"):
        assert words in text


def test_the_second_domain_reports_like_the_first() -> None:
    both = [event for name in ("cats", "dogs") for event in (events.Captured(name, CaptureProgress(0, 4, 0, 0.0)),)]
    assert [line.partition(":")[0] for line in shown(*both).splitlines()] == ["cats", "dogs"]


def test_a_long_line_is_left_to_the_terminal_to_break() -> None:
    path = "x" * 300
    assert shown(events.DomainFinished(replace(RESULT, adapter_path=path, proof=None))).count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "[bold]x[/bold]",
        "[/]",
        "runs[a]/x",
        "{0}",
        "100%",
        "prompts/cats/train.jsonl:100:12: no prompt",
    ],
)
def test_text_of_the_user_is_printed_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(events.TeacherOpening(text)) == f"teacher {text}: opening\n"
    shown(events.DomainFailed("cats", InputError(text)))
    assert capsys.readouterr().err == f"cats: failed. {text}\n"


def test_no_escape_code_of_a_message_reaches_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\x1b" not in shown(events.TeacherOpening("model \x1b[31mred"))
    shown(events.DomainFailed("cats", InputError("model \x1b[31mred")))
    assert capsys.readouterr().err == "cats: failed. model \\x1b[31mred\n"


# Failures.


def raised(error: Exception) -> events.DomainFailed:
    """The failure of a domain by an error that was raised."""
    try:
        raise error
    except type(error) as caught:
        return events.DomainFailed("cats", caught, "".join(traceback.format_exception(caught)))


def test_a_failure_goes_to_stderr_and_leaves_stdout_to_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(raised(InputError("no room."))) == ""
    assert capsys.readouterr() == ("", "cats: failed. no room.\n")


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    shown(raised(ZeroDivisionError("division by zero")))
    text = capsys.readouterr().err
    assert text.startswith("cats: failed. Traceback (most recent call last):\n")
    assert "in raised" in text
    assert text.rstrip().endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize(("value", "wanted"), [("1", True), ("0", False), ("", False)])
def test_with_debugging_on_an_error_of_the_user_has_one_too(
    value: str, wanted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRUE_KD_DEBUG", value)
    shown(raised(InputError("no room.")))
    text = capsys.readouterr().err
    assert ("in raised" in text) is wanted
    assert "no room." in text


@pytest.mark.parametrize("terminal", [True, False])
def test_the_file_that_stderr_was_sent_to_gets_the_failures(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Screen(terminal=False)
    monkeypatch.setattr("sys.stderr", log)
    text = on_stdout(monkeypatch, raised(InputError("no room.")), terminal=terminal, TERM="xterm-256color")
    assert log.getvalue() == "cats: failed. no room.\n"
    assert "failed" not in text


# The table.


def test_the_table_says_how_much_nearer_each_domain_came() -> None:
    lines = [line.rstrip() for line in shown(finished(RESULT, replace(RESULT, domain="dogs"))).splitlines()]
    assert lines[0].split() == ["domain", "KL", "to", "teacher", "gap", "closed", "top-1", "adapter"]
    closed = PROOF.gap_closed.kl
    span = f"{closed.value:.0%} ({100 * closed.low:.0f} to {100 * closed.high:.0f})"
    after = f"{PROOF.adapted.kl.value:.3f}"
    assert lines[1].split() == ["cats", "0.500", "→", after, *span.split(), "0%", "→", "100%", "adapters_kd/cats"]
    assert lines[2].split()[0] == "dogs"
    assert lines[3] == "12 s, peak memory 3.2 GB with the teacher and, apart from it, 1.1 GB with the student"
    assert lines[4] == f"2 done, 0 failed. Summary: {SUMMARY}"


def test_the_table_has_exact_matches_where_a_domain_has_checkable_tasks() -> None:
    checked = replace(RESULT, proof=usual_proof("cats", tasks=8))
    lines = shown(finished(checked, replace(RESULT, domain="dogs")), width=200).splitlines()
    assert "exact match (teacher)" in lines[0]
    assert "0% → 50% (100%)" in lines[1]
    assert lines[2].split()[-2:] == ["-", "adapters_kd/cats"]
    assert "exact match" not in shown(finished(RESULT))


@pytest.mark.parametrize(
    "result",
    [
        replace(RESULT, adapter_path="/home/someone/projects/assistant/adapters_kd/cats"),
        replace(
            RESULT,
            domain="reflection",
            adapter_path="adapters_kd/reflection",
            proof=CHECKED,
        ),
    ],
    ids=["long path", "with exact match and a control"],
)
def test_a_row_of_the_table_is_one_line_in_a_pipe(result: KDResult, monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_stdout(monkeypatch, finished(result), terminal=False)
    [row] = [line for line in text.splitlines() if line.startswith(f"{result.domain} ")]
    assert row.endswith(result.adapter_path)


def test_the_table_has_the_control_where_a_domain_has_one() -> None:
    lines = shown(finished(replace(RESULT, proof=CHECKED), RESULT), width=200).splitlines()
    assert "by SFT" in lines[0]
    control = CHECKED.control_gap_closed.kl
    assert f"{control.value:.0%} ({100 * control.low:.0f} to {100 * control.high:.0f})" in lines[1]
    assert " - " in lines[2]
    assert "by SFT" not in shown(finished(RESULT), width=200)


def test_a_share_without_an_interval_is_told_alone() -> None:
    few = replace(PROOF, gap_closed=replace(PROOF.gap_closed, kl=Estimate(0.6)))
    assert " 60% " in shown(finished(replace(RESULT, proof=few)))
    none = replace(PROOF, gap_closed=replace(PROOF.gap_closed, kl=None))
    assert " - " in shown(finished(replace(RESULT, proof=none)))


def test_a_result_without_a_proof_has_its_row() -> None:
    lines = shown(finished(replace(RESULT, proof=None), replace(RESULT, domain="dogs"))).splitlines()
    assert lines[1].split() == ["cats", "-", "-", "-", "adapters_kd/cats"]


def cells_of(table: Table) -> dict[str, list[str]]:
    """The rows of a table, by their first cell."""
    out = io.StringIO()
    Console(file=out, width=400).print(table)
    rows = [re.split(r"\s{2,}", line.rstrip()) for line in out.getvalue().splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_a_proof_sets_the_models_side_by_side() -> None:
    found = cells_of(proof_table("cats", CHECKED))
    assert found["cats"] == ["student", "SFT control", "distilled", "teacher"]
    for name, measure, form in (
        ("KL to the teacher, nats", "kl", ".3f"),
        ("perplexity", "perplexity", ".3f"),
        ("top-1 agreement", "top1_agreement", ".0%"),
        ("exact match", "exact_match", ".0%"),
    ):
        for cell, model in zip(
            found[name], (CHECKED.student, CHECKED.control, CHECKED.adapted, CHECKED.teacher), strict=True
        ):
            assert cell.split()[0] == f"{getattr(model, measure).value:{form}}", name
    assert found["parameters"] == ["1,000", "1,100", "1,100", "20,000"]
    assert found["tokens/s"] == ["50", "40", "40", "10"]
    assert [cell.split()[0] for cell in found["gap closed (KL)"]] == [
        f"{gap.kl.value:.0%}" for gap in (CHECKED.control_gap_closed, CHECKED.gap_closed)
    ]
    assert found["of the teacher kept"][0].startswith("50% (")
    assert found["ahead of SFT, nats"][0].startswith(f"+{CHECKED.against_control.kl.by.value:.3f} (")
    assert found["ahead of SFT, nats"][0].endswith(", 100% sure")


def test_a_proof_without_control_and_tasks_has_no_words_for_them() -> None:
    found = cells_of(proof_table("cats", PROOF))
    assert found["cats"] == ["student", "distilled", "teacher"]
    assert set(found["exact match"]) == {"-"}
    assert "ahead of SFT, nats" not in found
    assert found["of the teacher kept"][0].split()[0] == f"{PROOF.retention.likelihood.value:.0%}"


def test_what_is_not_known_of_the_teacher_is_a_dash() -> None:
    unknown = replace(PROOF, teacher=replace(PROOF.teacher, parameters=None, bytes=None, tokens_per_second=None))
    found = cells_of(proof_table("cats", unknown))
    assert [found[name][-1] for name in ("parameters", "MB on disk", "tokens/s")] == ["-"] * 3


def test_domains_are_listed_with_what_they_have_to_gain() -> None:
    found = cells_of(headroom_table({"cats": CHECKED.headroom, "dogs": PROOF.headroom}))
    kl, _, entropy, student, teacher, *where = found["cats"]
    assert kl.startswith("0.500 (")
    assert entropy == f"{CHECKED.headroom.entropy:.3f}"
    assert (student.split()[0], teacher.split()[0]) == ("0%", "100%")
    assert where[0].startswith("token")
    assert found["dogs"][3:5] == ["-", "-"]


@pytest.mark.parametrize("path", ["exp[lr]/cats", "exp[/lr]/cats", "x[bold]/cats"])
def test_the_table_shows_the_path_as_it_is(path: str) -> None:
    assert path in shown(finished(replace(RESULT, adapter_path=path)))


def test_a_terminal_without_unicode_gets_its_table() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    LineView(Console(file=out, width=80)).show(finished(RESULT))


# Terminals and pipes.


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "xterm-256color", "COLORTERM": "truecolor"}])
def test_a_pipe_gets_lines_without_a_single_escape_code(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = on_stdout(monkeypatch, terminal=False, **environment)
    assert "\x1b" not in text
    assert "\r" not in text
    assert text.splitlines()[-1] == f"1 done, 1 failed. Summary: {SUMMARY}"
    assert all(line.strip() for line in text.splitlines())


def test_a_terminal_gets_bars_in_colour_and_the_table_below(monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_stdout(monkeypatch, terminal=True, TERM="xterm-256color")
    assert COLOUR.search(text)
    assert "cats train" in text
    assert text.index("cats train") < text.index("KL to teacher")
    assert ESCAPE.sub("", text).splitlines()[-1] == f"1 done, 1 failed. Summary: {SUMMARY}"


def test_a_terminal_gets_its_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_stdout(monkeypatch, terminal=True, TERM="xterm-256color")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_a_terminal_gets_its_cursor_back_after_an_error() -> None:
    out = io.StringIO()

    def stop() -> None:
        with LiveView(Console(file=out, force_terminal=True, width=80)) as view:
            view.show(events.TrainingStarted("cats", 9, COUNTS))
            view.show(events.Stepped("cats", step(1)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


def test_a_terminal_shows_a_capture_alone_as_bars_and_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = (
        events.TeacherOpening("a/b"),
        events.BudgetChosen(CHOICE),
        *(events.Captured("cats", CaptureProgress(done, 10, done * 7, 0.5)) for done in range(11)),
        events.TeacherFreed(2**20),
        events.DomainCaptured("cats", 10, 70, 1500, 21.4, Path("cache/0123")),
        events.CaptureFinished(("cats",), {}, 3.0),
    )
    text = on_stdout(monkeypatch, *seen, terminal=True, TERM="xterm-256color")
    lines = [line.strip() for line in re.split(r"[\r\n]+", ESCAPE.sub("", text))]
    assert "1 captured, 0 failed, 3 s" in lines
    assert any(line.startswith("cache budget: ") for line in lines)
    assert "\x1b[2K" in text[text.rindex("cats capture") :], "the last bar is wiped away"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_no_color_takes_all_colour_from_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_stdout(monkeypatch, terminal=True, TERM="xterm-256color", NO_COLOR="1")
    assert COLOUR.findall(text) == []
    assert "cats train" in text


def test_an_empty_no_color_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert COLOUR.search(on_stdout(monkeypatch, terminal=True, TERM="xterm-256color", NO_COLOR=""))


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_dumb_terminal_gets_no_escape_code(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in on_stdout(monkeypatch, terminal=True, TERM=term)


def test_a_dumb_terminal_gets_the_lines_of_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cats: 20/20 loss" in on_stdout(monkeypatch, terminal=True, TERM="dumb")


def test_forced_colour_in_a_pipe_moves_no_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_stdout(monkeypatch, terminal=False, FORCE_COLOR="1")
    assert ESCAPE.findall(COLOUR.sub("", text)) == []
