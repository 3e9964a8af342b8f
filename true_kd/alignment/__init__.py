"""Teacher and student of different tokenizers: the teacher's distribution in the student's vocabulary.

What comes out are targets like any others, so that neither the cache nor training know of it. `aligner` has the
method, `spelling` what tokens stand for, `replies` the reading of a teacher, `compatibility` what to expect of a pair.
"""

from true_kd.alignment.aligner import Account
from true_kd.alignment.compatibility import Compatibility, MappedTargets, compare_spellings, sum_up
from true_kd.alignment.pairing import Pairing, pair
from true_kd.alignment.replies import Aligner, Alignment

__all__ = [
    "Account",
    "Aligner",
    "Alignment",
    "Compatibility",
    "MappedTargets",
    "Pairing",
    "compare_spellings",
    "pair",
    "sum_up",
]
