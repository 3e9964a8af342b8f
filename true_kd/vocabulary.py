"""Whether teacher and student mean the same by a token id, and what is done where they do not.

Maps are compared, never sizes: two vocabularies of equal size may differ in every id, and two of one family may
differ only in the padding rows of their output heads (Qwen2.5 has 151,936 and 152,064 rows over one map).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np

from true_kd.errors import VocabularyError

VocabStrategy = Literal["auto", "match", "align", "uld", "truncate", "project"]
"""`auto`: match where the maps agree, else align. `match`: the maps must agree. `align`, `uld`, `truncate`, `project`:
see `true_kd.alignment`; `truncate` where the maps agree is `match`."""


@dataclass(frozen=True)
class VocabularyMap:
    """Sends the teacher's token ids to the student's."""

    ids: np.ndarray
    """int32 [teacher ids]: the student's id of each teacher id, or -1."""
    differing: int
    """How many ids stand for different tokens in the two vocabularies."""

    @classmethod
    def of_student(cls, size: int, differing: int) -> VocabularyMap:
        """Of targets that are in the student's ids already."""
        return cls(np.arange(size, dtype=np.int32), differing)


@dataclass(frozen=True)
class Vocabularies:
    """How the token-to-id maps of a teacher and a student compare."""

    map: VocabularyMap
    """Each id that stands for the same in both, or pads both heads, to itself."""
    common: int
    """Ids that both know."""
    shared: int
    """Those of them that stand for the same token."""
    example: str
    """The first id that does not, and its two tokens."""

    @property
    def agree(self) -> bool:
        """Whether the maps agree wherever both know an id."""
        return self.map.differing == 0 and self.shared > 0

    def way(
        self, strategy: VocabStrategy, force: bool = False
    ) -> Literal["align", "uld", "truncate", "project"] | None:
        """How targets come into the student's vocabulary; None where they are in it by themselves.

        Raises
        ------
        VocabularyError
            when the strategy takes maps that agree, and they do not.
        """
        if self.agree and strategy != "uld":
            return None
        if strategy == "match" or (strategy == "truncate" and not force):
            raise VocabularyError(self._refusal(strategy))
        return "align" if strategy == "auto" else strategy

    def _refusal(self, strategy: str) -> str:
        if not self.common:
            found = "no common id"
        else:
            found = (
                f"{self.map.differing:,} of {self.common:,} common ids stand for different tokens (the first is "
                f"{self.example})"
            )
        force = ", or --force to pair unrelated tokens all the same" if strategy == "truncate" else ""
        return (
            f"teacher and student vocabularies: {found}, expected one map for --vocab-strategy {strategy}. Choose "
            f"--vocab-strategy align, models of one family{force}."
        )


def compare_vocabularies(
    teacher: Mapping[str, int], student: Mapping[str, int], teacher_size: int, student_size: int
) -> Vocabularies:
    """Compare two token-to-id maps, id by id.

    Parameters
    ----------
    teacher_size, student_size
        rows of the output heads, padding included. Padding ids are nobody's token; those both heads have go to
        themselves. A token that only one of the two knows goes nowhere.
    """
    teacher_tokens = {index: token for token, index in teacher.items()}
    student_tokens = {index: token for token, index in student.items()}
    common = teacher_tokens.keys() & student_tokens.keys()
    different = sorted(index for index in common if teacher_tokens[index] != student_tokens[index])
    ids = np.full(teacher_size, -1, dtype=np.int32)
    for index in range(min(teacher_size, student_size)):
        # The same token in both, or padding in both.
        if teacher_tokens.get(index) == student_tokens.get(index):
            ids[index] = index
    first = next(iter(different), None)
    example = "" if first is None else f"{first}: {teacher_tokens[first]!r} and {student_tokens[first]!r}"
    return Vocabularies(VocabularyMap(ids, len(different)), len(common), len(common) - len(different), example)


def require_match(
    teacher: Mapping[str, int], student: Mapping[str, int], teacher_size: int, student_size: int
) -> VocabularyMap:
    """The map between vocabularies that must agree.

    Raises
    ------
    VocabularyError
        when they do not.
    """
    compared = compare_vocabularies(teacher, student, teacher_size, student_size)
    compared.way("match")
    return compared.map


def align_vocab_sizes(
    teacher_logits: mx.array,
    student_logits: mx.array,
    strategy: Literal["truncate", "project"] = "truncate",
    id_map: np.ndarray | None = None,
) -> tuple[mx.array, mx.array]:
    """Bring dense logits of two vocabularies to one width.

    `truncate` cuts both to the smaller width: right when the maps agree there and the rest is padding. `project`
    gives each student id the summed probability of the teacher ids that `id_map` sends to it (-1: dropped), in the
    student's full width; student ids that get none have logit -inf.

    Raises
    ------
    ValueError
        for an unknown strategy, or `project` without an `id_map` as long as the teacher's vocabulary.
    """
    if strategy == "truncate":
        width = min(teacher_logits.shape[-1], student_logits.shape[-1])
        return teacher_logits[..., :width], student_logits[..., :width]
    if strategy != "project":
        raise ValueError(f"strategy {strategy!r}: expected 'truncate' or 'project'")
    width = student_logits.shape[-1]
    if id_map is None or len(id_map) != teacher_logits.shape[-1] or np.max(id_map) >= width:
        raise ValueError(
            f"strategy 'project': expected id_map with {teacher_logits.shape[-1]} entries, each below {width} or -1"
        )
    kept = np.flatnonzero(np.asarray(id_map) >= 0)
    logits = teacher_logits.astype(mx.float32)[..., mx.array(kept)]
    shift = mx.max(logits, axis=-1, keepdims=True)
    projected = mx.zeros((*logits.shape[:-1], width))
    projected = projected.at[..., mx.array(np.asarray(id_map)[kept])].add(mx.exp(logits - shift))
    return mx.log(projected) + shift, student_logits
