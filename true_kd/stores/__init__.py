"""The caches of a root as their owner sees them: what is there, whether it is whole, what can go, and where to.

Nothing on disk is believed. A cache is a real folder, named by 16 hexadecimal digits, whose identity.json has just
that digest; inside it only plain files of the names that true-kd gives are read or removed. Everything else in a root
is left alone, no link is followed, and whoever changes a cache holds its lock.
"""

from true_kd.stores.checking import Finding, check_file, drop_damaged, verify
from true_kd.stores.lending import find_teacher
from true_kd.stores.pruning import Pruning, parse_age, parse_size, plan_pruning, prune
from true_kd.stores.reading import Scan, Store, find, read_identity, read_store, scan
from true_kd.stores.transfer import Moved, export_store, import_store

__all__ = [
    "Finding",
    "Moved",
    "Pruning",
    "Scan",
    "Store",
    "check_file",
    "drop_damaged",
    "export_store",
    "find",
    "find_teacher",
    "import_store",
    "parse_age",
    "parse_size",
    "plan_pruning",
    "prune",
    "read_identity",
    "read_store",
    "scan",
    "verify",
]
