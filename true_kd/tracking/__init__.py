"""Experiment trackers: a run's curves, settings and proof to where its user looks at those of other runs.

One file per tracker, each of whose packages is optional and imported when it is asked for. A tracker gets numbers, and
the settings of an allow-list: never a path, a prompt, a reply or a token. It may fail as it likes: the run goes on
without it.
"""

from true_kd.tracking.reporting import TRACKERS, MissingTracker, Trackers, check_installed
from true_kd.tracking.runs import Run, Tracker

__all__ = ["TRACKERS", "MissingTracker", "Run", "Tracker", "Trackers", "check_installed"]
