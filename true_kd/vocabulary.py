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

VocabStrategy = Literal["match", "truncate", "project"]
"""`match`: the maps must agree (default). `truncate`: keep the ids on which they agree. `project`: map by token."""


@dataclass(frozen=True)
class VocabularyMap:
    """Sends the teacher's token ids to the student's."""

    ids: np.ndarray
    """int32 [teacher ids]: the student's id of each teacher id, or -1."""
    differing: int
    """How many ids stand for different tokens in the two vocabularies."""


def map_vocabulary(
    teacher: Mapping[str, int],
    student: Mapping[str, int],
    teacher_size: int,
    student_size: int,
    strategy: VocabStrategy,
) -> VocabularyMap:
    """Compare two token-to-id maps and say where each teacher id goes.

    Parameters
    ----------
    teacher_size, student_size
        rows of the output heads, padding included. Padding ids are nobody's token; those both heads have go to
        themselves. A token that only one of the two knows goes nowhere.

    Raises
    ------
    VocabularyError
        under `match`, when an id stands for two different tokens; under the other strategies, when nothing is shared.
    """
    teacher_tokens = {index: token for token, index in teacher.items()}
    student_tokens = {index: token for token, index in student.items()}
    shared = teacher_tokens.keys() & student_tokens.keys()
    different = sorted(index for index in shared if teacher_tokens[index] != student_tokens[index])
    if strategy == "match" and different:
        first = different[0]
        raise VocabularyError(
            f"teacher and student vocabularies: {len(different):,} of {len(shared):,} common ids stand for different "
            f"tokens (the first is {first}: {teacher_tokens[first]!r} and {student_tokens[first]!r}), expected one "
            "map. Choose models of one family, or --vocab-strategy project to map by token text."
        )
    ids = np.full(teacher_size, -1, dtype=np.int32)
    for index in range(teacher_size):
        token = teacher_tokens.get(index)
        if strategy == "project":
            ids[index] = -1 if token is None else student.get(token, -1)
        elif token == student_tokens.get(index):
            # The same token in both, or padding in both.
            ids[index] = index
    ids[ids >= student_size] = -1
    if not any(ids[index] >= 0 for index in teacher_tokens if index < teacher_size):
        raise VocabularyError(
            f"teacher and student vocabularies: no common token under --vocab-strategy {strategy}. "
            "Choose models whose tokenizers are related."
        )
    return VocabularyMap(ids, len(different))


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
