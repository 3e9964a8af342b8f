"""From the events of a run to its trackers; what goes wrong in one of them is a line, and that tracker is left out."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from true_kd import events
from true_kd.errors import EnvironmentProblem
from true_kd.jobs import parse_label
from true_kd.stopping import uninterrupted
from true_kd.suggest import printable, redact
from true_kd.tracking import mlflow, swanlab, tensorboard, trackio, wandb
from true_kd.tracking.runs import (
    Run,
    Tracker,
    Value,
    proof_metrics,
    settings_of,
    step_metrics,
    validation_metrics,
)

TRACKERS: Mapping[str, tuple[str, Callable[[Run], Tracker]]] = {
    "trackio": ("trackio", trackio.start),
    "tensorboard": ("tensorboardX", tensorboard.start),
    "wandb": ("wandb", wandb.start),
    "swanlab": ("swanlab", swanlab.start),
    "mlflow": ("mlflow", mlflow.start),
}
"""Each tracker: the module that it needs, and what starts a run of it."""


class MissingTracker(EnvironmentProblem):
    """The package of a tracker is not installed."""

    def __init__(self, name: str, module: str) -> None:
        super().__init__(
            f"--report-to {name}: the module {module} is not installed, expected it. "
            f"Run `pip install 'true-kd[{name}]'`, or leave the tracker out."
        )


def check_installed(names: Sequence[str]) -> None:
    """Raise `MissingTracker` for the first of the trackers whose package is not here."""
    for name in names:
        module, _ = TRACKERS[name]
        if importlib.util.find_spec(module) is None:
            raise MissingTracker(name, module)


class Trackers:
    """The trackers of a command; `note` takes its events, in their order."""

    def __init__(self, names: Sequence[str], root: Path) -> None:
        """`root` is the output folder of the command."""
        self._names = list(dict.fromkeys(names))
        self._root = root
        self._running: dict[str, Tracker] = {}
        self._domain: str | None = None
        self._point = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _ in self._end({}, failed=kind is not None):
            pass

    def note(self, event: events.Event) -> list[str]:
        """Tell of an event; returns a line for each tracker that fails at it, and is left out from then on."""
        if not self._names:
            return []
        # A tracker may hold locks of its own, or be halfway through a file.
        with uninterrupted():
            return list(self._note(event))

    def _note(self, event: events.Event) -> Iterator[str]:
        match event:
            case events.PointStarted(point):
                self._point = point
            case events.TrainingStarted(config=config) if config is not None:
                yield from self._start(event)
            case events.Stepped(label, step):
                yield from self._log(label, step_metrics(step), step.iteration)
            case events.Validated(label, validation):
                yield from self._log(label, validation_metrics(validation), validation.iteration)
            case events.DomainFinished(result) if result.domain == self._domain:
                yield from self._end({} if result.proof is None else proof_metrics(result.proof), failed=False)
            case events.DomainFailed(domain) if domain == self._domain:
                yield from self._end({}, failed=True)

    def _start(self, event: events.TrainingStarted) -> Iterator[str]:
        domain, _ = parse_label(event.domain)
        if domain == self._domain:
            return  # its control, which is reported in the same run
        yield from self._end({}, failed=False)
        self._domain = domain
        run = Run(
            name=f"{domain} {self._point}".strip(),
            id=f"{domain}-{event.run_digest[:12]}",
            made=event.made,
            settings=settings_of(event.config, event.data),
            root=self._root,
            folder=event.config.out_folder / domain,
        )
        for name in list(self._names):
            _, start = TRACKERS[name]
            with _Guarded(name) as guarded:
                self._running[name] = start(run)
            yield from self._without(name, guarded)

    def _log(self, label: str, metrics: Mapping[str, float], step: int) -> Iterator[str]:
        domain, is_control = parse_label(label)
        if domain != self._domain:
            return
        named = {f"control/{name}": value for name, value in metrics.items()} if is_control else metrics
        for name, tracker in list(self._running.items()):
            with _Guarded(name) as guarded:
                tracker.log(named, step)
            yield from self._without(name, guarded)

    def _end(self, summary: Mapping[str, Value], failed: bool) -> Iterator[str]:
        self._domain = None
        for name, tracker in list(self._running.items()):
            with _Guarded(name) as guarded:
                tracker.finish(summary, failed)
            self._running.pop(name)
            yield from self._without(name, guarded)

    def _without(self, name: str, guarded: _Guarded) -> Iterator[str]:
        """Leave out a tracker that failed."""
        if guarded.line:
            self._names.remove(name)
            self._running.pop(name, None)
            yield guarded.line


class _Guarded(contextlib.AbstractContextManager):
    """A call into a tracker: what it prints is not shown, what it raises is kept as a line."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._silence = contextlib.ExitStack()
        self.line = ""

    def __enter__(self) -> Self:
        sink = io.StringIO()
        self._silence.enter_context(contextlib.redirect_stdout(sink))
        self._silence.enter_context(contextlib.redirect_stderr(sink))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._silence.close()
        if not isinstance(error, (Exception, SystemExit)):
            return False
        said = " ".join(redact(str(error)).split())[:200]
        what = f"{type(error).__name__}{f' ({said})' if said else ''}"
        self.line = printable(f"--report-to {self._name}: {what}; the run goes on without it.")
        return True
