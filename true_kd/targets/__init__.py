"""The teacher's distribution at each response token: how it is thinned, stored and softened to any temperature.

Two kinds of `TeacherTargets`: `SparseTargets` keep the likely ids and a sample of the others, `HiddenTargets` keep the
teacher's last hidden state, from which its output head gives back every logit.
"""

from true_kd.targets.encoding import count_entries, encode, join
from true_kd.targets.hidden import HiddenTargets, TeacherHead
from true_kd.targets.options import Preset, TargetOptions, TargetSettings
from true_kd.targets.packing import pack_bits, pack_sorted, unpack_bits, unpack_sorted, width_of
from true_kd.targets.sparse import TAIL_TEMPERATURES, SparseTargets

TeacherTargets = SparseTargets | HiddenTargets
"""What one example carries at its N counted tokens; both kinds have `len`, `take`, `with_ids`."""

__all__ = [
    "TAIL_TEMPERATURES",
    "HiddenTargets",
    "Preset",
    "SparseTargets",
    "TargetOptions",
    "TargetSettings",
    "TeacherHead",
    "TeacherTargets",
    "count_entries",
    "encode",
    "join",
    "pack_bits",
    "pack_sorted",
    "unpack_bits",
    "unpack_sorted",
    "width_of",
]
