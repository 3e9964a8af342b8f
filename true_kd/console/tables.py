"""The tables that commands end with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from true_kd.evaluation import Estimate
from true_kd.gate import Headroom
from true_kd.proof import Lead, ModelScores, Proof
from true_kd.ranking import Recommendation, Row
from true_kd.reporting import KDResult
from true_kd.suggest import percent, printable


def results_table(results: Sequence[KDResult], arrow: str = "→") -> Table:
    """How much nearer each domain's student came to the teacher, and how sure that is."""
    proofs = [result.proof for result in results if result.proof is not None]
    columns: dict[str, Callable[[KDResult, Proof], str]] = {
        "KL to teacher": lambda result, proof: _change(proof.student.kl, proof.adapted.kl, arrow, ".3f"),
        "gap closed": lambda result, proof: interval(proof.gap_closed.kl),
    }
    if any(proof.control for proof in proofs):
        columns["by SFT"] = lambda result, proof: interval(proof.control_gap_closed and proof.control_gap_closed.kl)
    columns["top-1"] = lambda result, proof: _change(
        proof.student.top1_agreement, proof.adapted.top1_agreement, arrow, ".0%"
    )
    if any(proof.tasks for proof in proofs):
        columns["exact match (teacher)"] = lambda result, proof: _answers(proof, arrow)
    table = _table("domain", *columns)
    table.add_column("adapter", overflow="fold")
    for result in results:
        cells = ["-" if result.proof is None else show(result, result.proof) for show in columns.values()]
        _add(table, result.domain, *cells, result.adapter_path)
    return table


def interval(estimate: Estimate | None) -> str:
    """A share with its interval: "71 % (64-77)"."""
    if estimate is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return percent(estimate.value)
    low, high = (percent(end).removesuffix("%") for end in (estimate.low, estimate.high))
    return f"{percent(estimate.value)} ({low} to {high})"


def _change(before: Estimate, after: Estimate, arrow: str, form: str) -> str:
    return f"{before.value:{form}} {arrow} {after.value:{form}}"


def _answers(proof: Proof, arrow: str) -> str:
    before, after, teacher = (model.exact_match for model in (proof.student, proof.adapted, proof.teacher))
    if before is None or after is None:
        return "-"
    return f"{_change(before, after, arrow, '.0%')} ({'-' if teacher is None else f'{teacher.value:.0%}'})"


def proof_table(domain: str, proof: Proof) -> Table:
    """The models of a proof side by side, each measure with its interval."""
    models = {
        "student": proof.student,
        "SFT control": proof.control,
        "distilled": proof.adapted,
        "teacher": proof.teacher,
    }
    shown = {name: model for name, model in models.items() if model is not None}
    table = _table(domain, *shown)
    rows: dict[str, Callable[[ModelScores], str]] = {
        "KL to the teacher, nats": lambda model: _spread(model.kl, ".3f"),
        "perplexity": lambda model: _perplexity(model.perplexity),
        "top-1 agreement": lambda model: interval(model.top1_agreement),
        "top-5 agreement": lambda model: interval(model.top5_agreement),
        "exact match": lambda model: interval(model.exact_match),
        "parameters": lambda model: "-" if model.parameters is None else f"{model.parameters:,}",
        "MB on disk": lambda model: "-" if model.bytes is None else f"{model.bytes / 1e6:,.1f}",
        "tokens/s": lambda model: "-" if model.tokens_per_second is None else f"{model.tokens_per_second:,.0f}",
    }
    for name, show in rows.items():
        _add(table, name, *(show(model) for model in shown.values()))
    closed = {"SFT control": proof.control_gap_closed, "distilled": proof.gap_closed}
    cells = [interval(closed[name].kl) if closed.get(name) else "" for name in shown]
    _add(table, "gap closed (KL)", *cells)
    kept = proof.retention.exact_match or proof.retention.likelihood
    _add(table, "of the teacher kept", *(interval(kept) if name == "distilled" else "" for name in shown))
    if proof.against_control is not None:
        ahead = _lead(proof.against_control.kl)
        _add(table, "ahead of SFT, nats", *(ahead if name == "distilled" else "" for name in shown))
    return table


def headroom_table(headrooms: Mapping[str, Headroom]) -> Table:
    """What each domain has to gain."""
    table = _table("domain", "KL to gain", "agreement", "teacher's entropy", "right: student", "teacher", "where")
    for name, found in headrooms.items():
        worst = max(found.by_position, key=lambda stretch: stretch.kl * stretch.tokens)
        _add(
            table,
            name,
            _spread(found.kl, ".3f"),
            interval(found.top1_agreement),
            f"{found.entropy:.3f}",
            interval(found.student_right),
            interval(found.teacher_right),
            f"tokens {worst.start}-{worst.stop - 1}" if worst.stop - worst.start > 1 else f"token {worst.start}",
        )
    return table


def sweep_table(found: Recommendation) -> Table:
    """The settings of a sweep, the nearest to the teacher first; those that cannot be told from the best are marked."""
    table = _table(found.domain, "KL to teacher", "behind the best", "top-1", "exact match", "")
    for row in found.rows:
        _add(
            table,
            row.setting + (f" ({row.seeds} seeds)" if row.seeds > 1 else ""),
            _spread(row.kl, ".3f"),
            "" if row.setting == found.best else _spread(row.behind, ".3f"),
            interval(row.top1_agreement),
            interval(row.exact_match),
            _mark(found, row),
        )
    return table


def _mark(found: Recommendation, row: Row) -> str:
    if row.setting == found.best:
        return "best"
    return "as good" if row.as_good else ""


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(printable(cell)) for cell in cells))


def _spread(estimate: Estimate, form: str) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def _perplexity(estimate: Estimate | None) -> str:
    return "over 10^6" if estimate is None or estimate.value > 1e6 else _spread(estimate, ".3f")


def _lead(lead: Lead) -> str:
    sure = "" if lead.sureness is None else f", {lead.sureness:.0%} sure"
    return f"{_spread(lead.by, '+.3f')}{sure}"
