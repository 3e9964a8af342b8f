"""How long it will take: from the pace of the last steps, and from what finished domains took besides their steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

_WINDOW = 64
"""Steps that the pace is measured over: a validation or two are among them, a pause is soon forgotten."""
_LEAST = 3
"""Steps before anything is said."""


class Pace:
    """The pace of one stage."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque(maxlen=_WINDOW)

    def mark(self, done: int) -> None:
        """So much is done by now."""
        self._marks.append((self._clock(), done))

    @property
    def seconds(self) -> float | None:
        """For one step; None until there are a few."""
        (began, first), (ended, last) = self._marks[0], self._marks[-1]
        return (ended - began) / (last - first) if last - first >= _LEAST else None

    def left(self, count: int) -> float | None:
        """For so many steps."""
        seconds = self.seconds if self._marks else None
        return None if seconds is None else seconds * max(count, 0)


class Outlook:
    """How long a run's domains will take."""

    def __init__(self, steps: Mapping[str, Sequence[int]], clock: Callable[[], float] = time.monotonic) -> None:
        """`steps` are the iterations that each domain is trained for, of its control as well where it gets one."""
        self._steps = steps
        self._clock = clock
        self._per_step: float | None = None
        self._measuring: float | None = None
        self._besides: list[float] = []
        self._since = 0.0
        self._began: float | None = None
        self._trained = 0.0
        self._arms = 0

    def start(self, is_control: bool) -> None:
        """A domain's training was announced, or that of its control; the student is measured next."""
        self._since = self._clock()
        if not is_control:
            self._began, self._trained, self._arms = self._since, 0.0, 0
        self._arms += 1

    def step(self, pace: Pace, is_first: bool) -> None:
        """A step was made."""
        now = self._clock()
        if is_first and self._arms == 1:
            self._measuring = now - self._since
        elif not is_first:
            self._trained += now - self._since
        self._since = now
        self._per_step = pace.seconds or self._per_step

    def finish(self) -> None:
        """The domain at hand is finished or failed."""
        if self._began is not None:
            self._besides.append(self._clock() - self._began - self._trained)
        self._began = None

    def domain_left(self, domain: str, stage_left: float | None) -> float | None:
        """For the domain at hand, while it trains."""
        if stage_left is None or self._per_step is None or self._measuring is None:
            return None
        further = self._steps[domain][self._arms :]
        return stage_left + self._measuring + sum(steps * self._per_step + self._measuring for steps in further)

    def others_left(self, domains: Sequence[str]) -> float | None:
        """For domains that are still to come."""
        if self._per_step is None or self._measuring is None:
            return None
        besides = sum(self._besides) / len(self._besides) if self._besides else None
        total = 0.0
        for domain in domains:
            steps = self._steps[domain]
            total += sum(steps) * self._per_step
            # A first measuring and a proof; of a control the proof alone.
            total += (1 + len(steps)) * self._measuring if besides is None else besides
        return total
