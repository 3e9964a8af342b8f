"""What a run is doing, told to other terminals: a small file beside its lock, gone with the run, and who reads it.

Nothing depends on that file: where it cannot be written, the run goes on without it. Reading takes no lock and writes
nothing.
"""

from true_kd.status.publishing import published
from true_kd.status.reading import read_status
from true_kd.status.records import FILE, FORMAT, LOCK, DomainStatus, Progress, Running, Stage, Status, status_schema

__all__ = [
    "FILE",
    "FORMAT",
    "LOCK",
    "DomainStatus",
    "Progress",
    "Running",
    "Stage",
    "Status",
    "published",
    "read_status",
    "status_schema",
]
