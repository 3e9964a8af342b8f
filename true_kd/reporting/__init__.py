"""What a run leaves to read: `kd_metrics.json` per domain and `kd_summary.json` over all of them.

`KDResult` is the same record in Python; it is what the files are written from and read back into.
"""

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
    "KDResult",
    "PeakMemory",
    "Summary",
    "Validation",
    "find_damage",
    "now",
    "peak_memory",
    "read_result",
    "refresh_summary",
    "schema",
    "summarize",
    "write_result",
    "write_summary",
]
