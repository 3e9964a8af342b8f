"""What a run leaves to read: `metrics.jsonl` and `kd_metrics.json` per domain, `kd_summary.json` over all of them.

`KDResult` is the same record in Python; it is what the files are written from and read back into.
"""

from true_kd.reporting.lines import Finish, MetricsFile, Start, line_schema, lines_of, read_lines, settle
from true_kd.reporting.metrics import FORMAT, find_damage, read_result, write_result
from true_kd.reporting.records import DataCounts, KDResult, Validation
from true_kd.reporting.summary import (
    DomainSummary,
    PeakMemory,
    Summary,
    now,
    peak_memory,
    refresh_summary,
    schema,
    summarize,
    write_summary,
)

__all__ = [
    "FORMAT",
    "DataCounts",
    "DomainSummary",
    "Finish",
    "KDResult",
    "MetricsFile",
    "PeakMemory",
    "Start",
    "Summary",
    "Validation",
    "find_damage",
    "line_schema",
    "lines_of",
    "now",
    "peak_memory",
    "read_lines",
    "read_result",
    "refresh_summary",
    "schema",
    "settle",
    "summarize",
    "write_result",
    "write_summary",
]
