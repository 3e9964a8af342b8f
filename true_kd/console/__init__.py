"""Shows a run's events and results: live bars on a terminal, one line per report anywhere else.

No escape code leaves this package when its stream is no terminal; with NO_COLOR set, nothing is coloured.
"""

from true_kd.console.tables import headroom_table, interval, proof_table, results_table, sweep_table
from true_kd.console.views import LineView, LiveView, make_console, make_view

__all__ = [
    "LineView",
    "LiveView",
    "headroom_table",
    "interval",
    "make_console",
    "make_view",
    "proof_table",
    "results_table",
    "sweep_table",
]
