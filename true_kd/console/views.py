"""A run on the screen, event by event."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from true_kd import events
from true_kd.budget import BudgetChoice
from true_kd.capture import CaptureProgress
from true_kd.console.tables import results_table
from true_kd.errors import TrueKDError
from true_kd.evaluation import EvalMetrics
from true_kd.fidelity import Fidelity
from true_kd.gate import Headroom
from true_kd.reporting import DataCounts, KDResult, peak_memory
from true_kd.suggest import in_bytes, printable, redact
from true_kd.training import StepMetrics

_LINES_PER_STAGE = 10


class LineView:
    """One line per report; about ten reports per stage."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._reported: tuple[str, int] = ("", -1)
        self._iters = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, event: events.Event) -> None:
        """Show one event."""
        match event:
            case events.TeacherOpening(model):
                self.say(f"teacher {model}: opening")
            case events.CacheDamaged(domain, file, replies):
                lost = f", {replies:,} {'reply' if replies == 1 else 'replies'}" if replies else ""
                self.say(f"{domain}: {file} was damaged or gone{lost}; what is needed of it is captured again")
            case events.TeacherBusy(model, holder):
                self.say(f"teacher {model}: waiting for {holder}, which captures from it")
            case events.StudentUnknown(domain, why):
                self.say(f"{domain}: captured for students of the teacher's own tokenizer: {why}")
            case events.Captured(domain, progress, is_probe):
                self.captured(f"{domain} probe" if is_probe else domain, progress)
            case events.CaptureReused(domain, replies):
                self.say(f"{domain}: {replies} replies of the teacher are in the cache")
            case events.Probed(domain, headroom):
                self.say(f"{domain}: {_probed(headroom)}")
            case events.ParentCompared(domain, parent, replies):
                self.say(f"{domain}: compared with {parent} on {replies} replies")
            case events.PointStarted(point, number, total):
                self.say(f"point {number} of {total}: {point}")
            case events.Evaluated(domain, _, kept):
                note = "" if kept else "; not kept: the adapter is of other prompts or settings, or of a run cut short"
                self.say(f"{domain}: measured{note}")
            case events.Proving(domain, prompts):
                self.say(f"{domain}: comparing student, adapter and teacher on {prompts} held-out prompts")
            case events.TeacherFreed(memory):
                self.say(f"teacher freed, {memory / 2**20:.0f} MB still held")
            case events.TrainingStarted(domain, iters, data, made, _, _):
                self._iters = iters
                if made:
                    self.say(f"{domain}: goes on from the checkpoint of iteration {made}")
                self.say(
                    f"{domain}: training on {data.train_response_tokens:,} of {data.train_tokens:,} tokens "
                    f"({data.train_examples} examples, {data.valid_examples} held out)"
                )
                if data.truncated or data.dropped or data.cut_replies:
                    self.say(f"{domain}: {_losses_of_data(data)}")
                if data.differing_ids:
                    self.say(f"{domain}: {data.differing_ids:,} ids stand for different tokens in teacher and student")
            case events.BudgetChosen(choice):
                self.say(_budget(choice))
            case events.DomainCaptured(domain, replies, tokens, size, per_token, folder):
                self.say(
                    f"{domain}: {replies} replies, {tokens:,} tokens, {in_bytes(size)} ({per_token:,.0f} bytes/token) "
                    f"in {folder}"
                )
            case events.CaptureFinished(domains, failures, seconds):
                self.say(f"{len(domains)} captured, {len(failures)} failed, {seconds:.0f} s")
            case events.Certified(domain, fidelity, poor):
                self.say(f"{domain}: {_certificate(fidelity)}")
                self.say(f"{domain}: {_certified_size(fidelity, poor)}")
            case events.DivergenceCoarsened(domain, divergence, tail_mass):
                self.say(
                    f"{domain}: {divergence} from sampled targets: the ids kept exactly one by one, all others "
                    f"({tail_mass:.1%} of the distribution) as one; with targets.preset exact each by itself"
                )
            case events.CheckpointsReplaced(domain, newest):
                self.say(
                    f"{domain}: starts anew; the checkpoints here, up to iteration {newest}, are of other settings, "
                    "prompts or models, and are replaced"
                )
            case events.AdapterDamaged(domain, folder, damage):
                self.say(f"{domain}: damaged {folder}: {damage}; distilled again")
            case events.CheckpointsDamaged(domain, damaged, made):
                place = f"goes on from that of iteration {made}" if made else "starts anew"
                for each in damaged:
                    self.say(f"{domain}: damaged {each}")
                self.say(f"{domain}: {place}")
            case events.MemoryShort(domain, _, weights, budget, _) if weights >= budget:
                self.say(
                    f"{domain}: the student's weights alone take {in_bytes(weights)}, expected less than "
                    f"{in_bytes(budget)} (--memory-gb): raise it, or choose a smaller or quantised student"
                )
            case events.MemoryShort(domain, need, _, budget, recomputes):
                remedy = "" if recomputes else "set training.grad_checkpoint=true, or "
                self.say(
                    f"{domain}: the longest example alone takes about {in_bytes(need)}, expected at most "
                    f"{in_bytes(budget)} (--memory-gb): {remedy}lower --max-seq-length"
                )
            case events.Stepped(domain, step):
                self.stepped(domain, step)
            case events.Validated(domain, validation):
                self.say(f"{domain}: iteration {validation.iteration}: {_validation(validation.metrics)}")
            case events.DomainFinished(result):
                self.finished(result)
            case events.DomainFailed(domain, error, trace):
                self.failed(domain, error, trace)
            case events.RunFinished(results, failures, summary, seconds, report):
                self.summed_up(results, seconds)
                page = f" Report: {report}" if report else ""
                self.say(f"{len(results)} done, {len(failures)} failed. Summary: {summary}{page}")

    def say(self, line: str) -> None:
        """Print a line as it is."""
        self.console.print(printable(line), markup=False, highlight=False, emoji=False, soft_wrap=True)

    def captured(self, domain: str, progress: CaptureProgress) -> None:
        """Report a capture now and then, and its end."""
        if self._is_due(f"capture {domain}", progress.done, progress.total):
            self.say(f"{domain}: captured {progress.done}/{progress.total} replies, {_rate(progress)}")

    def stepped(self, domain: str, step: StepMetrics) -> None:
        """Report a step now and then."""
        if self._is_due(f"train {domain}", step.iteration, self._iters):
            self.say(f"{domain}: {step.iteration}/{self._iters} {_step(step)}")

    def finished(self, result: KDResult) -> None:
        """Report a domain's end."""
        what = "unchanged since" if result.unchanged else "finished"
        self.say(f"{result.domain}: {what} {result.finished_at}: {result.adapter_path}")
        if result.proof is not None:
            self.say(result.proof.verdict.sentence)
        learns = result.proof is None or result.proof.verdict.outcome != "nothing to learn"
        if learns and result.after.loss >= result.before.loss:
            self.say(
                f"{result.domain}: the adapter brought the student no nearer to the teacher (validation loss "
                f"{result.before.loss:.4f} before, {result.after.loss:.4f} after). Try a lower learning rate, or more "
                "and other prompts."
            )

    def failed(self, domain: str, error: Exception, trace: str) -> None:
        """Report a failure on stderr; a bug keeps its traceback."""
        is_bug = not isinstance(error, TrueKDError) or os.environ.get("TRUE_KD_DEBUG") == "1"
        print(printable(redact(f"{domain}: failed. {trace if is_bug else error}")), file=sys.stderr)

    def summed_up(self, results: Sequence[KDResult], seconds: float) -> None:
        """Print the table of all domains."""
        if results:
            self.console.print(results_table(results, "->" if self.console.options.ascii_only else "→"))
            done = [result for result in results if not result.unchanged]
            phases = peak_memory(done)
            named = {"with the teacher": phases.capture, "with the student": phases.training}
            peaks = [f"{in_bytes(peak)} {who}" for who, peak in named.items() if peak]
            self.say(f"{seconds:.0f} s" + (f", peak memory {' and, apart from it, '.join(peaks)}" if peaks else ""))

    def _is_due(self, stage: str, done: int, total: int) -> bool:
        mark = (stage, done * _LINES_PER_STAGE // max(total, 1))
        if mark == self._reported:
            return False
        self._reported = mark
        return True


class LiveView(LineView):
    """Bars with counts, tokens per second, losses and time left; finished stages stay as lines above them."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        # Where the terminal is narrow the bar gives way, never the count or the time left.
        columns = [
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=24),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        ]
        if console.width < 105:
            del columns[1]
        self._progress = Progress(
            *columns,
            console=console,
            transient=True,
            redirect_stderr=sys.stderr.isatty(),
        )
        self._task: TaskID | None = None
        self._stage = ""
        self._shown_at = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def captured(self, domain: str, progress: CaptureProgress) -> None:
        """Move the capture bar."""
        self._move(f"{domain} capture", progress.done, progress.total, _rate(progress))
        if progress.done == progress.total:
            super().captured(domain, progress)

    def stepped(self, domain: str, step: StepMetrics) -> None:
        """Move the training bar."""
        self._move(f"{domain} train", step.iteration, self._iters, _short_step(step, self.console.width))

    def summed_up(self, results: Sequence[KDResult], seconds: float) -> None:
        """Print the table below the last bar."""
        self._progress.stop()
        super().summed_up(results, seconds)

    def _move(self, stage: str, done: int, total: int, detail: str) -> None:
        if stage != self._stage:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._stage, self._shown_at = stage, 0.0
            self._task = self._progress.add_task(stage, total=total, detail="")
        if self._task is not None and (time.monotonic() - self._shown_at > 0.05 or done == total):
            self._progress.update(self._task, completed=done, detail=detail)
            self._shown_at = time.monotonic()


def make_view(stream: TextIO | None = None) -> LineView:
    """The view that fits a stream; None stands for stdout."""
    console = make_console(stream)
    return LiveView(console) if console.is_terminal else LineView(console)


def make_console(stream: TextIO | None = None) -> Console:
    """A console that fits a stream: no escape code leaves it where that is no terminal."""
    stream = stream or sys.stdout
    if not stream.isatty():
        # Wide enough that no row of a table is ever folded in a file or a pipe.
        return Console(file=stream, color_system=None, force_terminal=False, width=1000)
    if os.environ.get("TERM") in ("dumb", "unknown"):
        return Console(file=stream, color_system=None, force_terminal=False)
    plain = bool(os.environ.get("NO_COLOR"))
    return Console(file=stream, color_system=None if plain else "auto", no_color=plain, highlight=False)


def _losses_of_data(data: DataCounts) -> str:
    """What of the data is not trained, or not validated on; of training and held-out prompts together."""
    used = data.train_examples + data.valid_examples
    prompts = used + data.dropped
    return (
        f"{data.cut_replies:,} of {prompts:,} replies cut at capture.max_tokens, {data.truncated:,} of {used:,} "
        f"examples cut at training.max_seq_length, {data.dropped:,} of {prompts:,} prompts dropped (no room for a "
        "reply, or tokens that the student lacks)"
    )


def _probed(headroom: Headroom) -> str:
    warning = "" if headroom.standing in ("better", "unknown") else "; distilling it may bring nothing"
    gap = f"KL {headroom.kl.value:.3f}, top-1 agreement {headroom.top1_agreement.value:.0%}"
    return f"{headroom.why}{warning} ({gap}, {headroom.prompts} prompt{'' if headroom.prompts == 1 else 's'})"


def _budget(choice: BudgetChoice) -> str:
    return (
        f"cache budget: targets.threshold {choice.settings.threshold:.3g}, about {choice.bytes_per_token:,.0f} "
        f"bytes/token, {in_bytes(round(1e9 * choice.gigabytes))} in all"
    )


def _certificate(fidelity: Fidelity) -> str:
    return (
        f"targets at T = {fidelity.temperature:g}: gradient {fidelity.angle:.1f}° off (cosine {fidelity.cosine:.4f}), "
        f"tail {fidelity.tail_mass:.1%}, KD floor {fidelity.kl_floor:.1g}"
    )


def _certified_size(fidelity: Fidelity, poor: bool) -> str:
    worst = "".join(
        f"; most sampled at {place.where} token {place.token} ({place.tail_mass:.0%})"
        for place in fidelity.worst[:1]
        if place.tail_mass > 0
    )
    return (
        f"{'poor ' if poor else ''}targets of {fidelity.bytes_per_token:,.0f} bytes/token, "
        f"{in_bytes(fidelity.cache_bytes)}{worst}"
    )


def _rate(progress: CaptureProgress) -> str:
    if not progress.tokens:
        return "from the cache" if progress.done == progress.total else "reading prompts"
    return f"{progress.tokens / progress.seconds:,.0f} tok/s"


def _short_step(step: StepMetrics, width: int) -> str:
    parts = f" (kd {step.kd:.3f} ce {step.ce:.3f})" if width >= 80 else ""
    return f"loss {step.total:.3f}{parts} {step.tokens_per_second / 1000:.1f}k tok/s"


def _step(step: StepMetrics) -> str:
    return (
        f"loss {step.total:.4f} kd {step.kd:.4f} ce {step.ce:.4f} lr {step.learning_rate:.2e} "
        f"{step.tokens_per_second:,.0f} tok/s"
    )


def _validation(metrics: EvalMetrics) -> str:
    return (
        f"validation loss {metrics.loss:.4f}, KL {metrics.kl:.4f}, CE {metrics.ce:.4f}, "
        f"top-1 {metrics.top1_agreement:.1%}"
    )
