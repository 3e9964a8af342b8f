"""Whether the targets of a teacher are in a student's vocabulary by themselves, and how they get there otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from true_kd.alignment.replies import Alignment, find_alignment
from true_kd.errors import InputError
from true_kd.losses import LossOptions
from true_kd.models import ModelOptions, ModelTokenizer
from true_kd.targets import TargetOptions
from true_kd.vocabulary import VocabStrategy, VocabularyMap, compare_vocabularies


@dataclass(frozen=True)
class Pairing:
    """A teacher and a student by their tokenizers."""

    vocabulary: VocabularyMap
    """From the ids of the targets to the student's."""
    alignment: Alignment | None
    """How targets come into the student's vocabulary; None where they are in it by themselves."""

    def check(self, targets: TargetOptions, losses: LossOptions) -> None:
        """Raise InputError where options have no meaning for such a pair."""
        if self.alignment is None:
            return
        way = self.alignment.way
        if targets.settings.kind == "hidden":
            raise InputError(
                "targets.preset exact: keeps hidden states, and the vocabularies of teacher and student differ, "
                f"expected another preset, which vocab_strategy {way} can map. Choose default or hot."
            )
        if way == "uld" and losses.distils and losses.divergence != "total_variation":
            raise InputError(
                f"losses.divergence {losses.divergence}: with vocab_strategy uld, expected total_variation, which of "
                "sorted probabilities is half the distance of its authors. Set --divergence total_variation."
            )


def pair(
    teacher: ModelTokenizer, student: ModelTokenizer, options: ModelOptions, strategy: VocabStrategy, force: bool
) -> Pairing:
    """Compare two vocabularies; `options` are the student's.

    Raises
    ------
    VocabularyError
        when the strategy does not allow what they are.
    """
    compared = compare_vocabularies(teacher.ids, student.ids, teacher.size, student.size)
    way = compared.way(strategy, force)
    if way is None:
        return Pairing(compared.map, None)
    alignment = find_alignment(way, options, teacher, student)
    return Pairing(VocabularyMap.of_student(student.size, compared.map.differing), alignment)
