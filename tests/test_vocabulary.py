"""Maps are compared, never sizes; what has no common meaning is refused, dropped or mapped by its text."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from true_kd.errors import VocabularyError
from true_kd.losses import compute_kd_loss
from true_kd.vocabulary import VocabularyMap, align_vocab_sizes, compare_vocabularies, require_match

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "said"]
checked_often = settings(max_examples=40, deadline=None)
permutations = st.permutations(range(len(WORDS)))


def numbered(words: list[str]) -> dict[str, int]:
    return {word: index for index, word in enumerate(words)}


def softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


# match --------------------------------------------------------------------------------------------------------------


def is_identity(found: VocabularyMap) -> bool:
    """True when every teacher id is the student's id of the same token."""
    return found.ids.tolist() == list(range(len(found.ids)))


def test_equal_maps_match_and_every_id_goes_to_itself() -> None:
    found = require_match(numbered(WORDS), numbered(WORDS), 8, 8)
    assert found.ids.tolist() == list(range(8))
    assert is_identity(found)
    assert found.differing == 0


@pytest.mark.parametrize(("teacher_size", "student_size"), [(12, 16), (16, 12), (8, 9), (9, 8)])
def test_equal_maps_match_whatever_padding_their_heads_have(teacher_size: int, student_size: int) -> None:
    found = require_match(numbered(WORDS), numbered(WORDS), teacher_size, student_size)
    assert len(found.ids) == teacher_size
    assert found.ids[:8].tolist() == list(range(8))
    assert found.ids.max() < student_size
    assert found.differing == 0


def test_padding_that_the_student_lacks_goes_nowhere() -> None:
    found = require_match(numbered(WORDS), numbered(WORDS), 12, 9)
    assert found.ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, -1, -1, -1]
    assert not is_identity(found)


def test_the_padding_of_qwen_vocabularies_is_no_difference() -> None:
    words = {str(index): index for index in range(151_665)}
    wide = require_match(words, dict(words), 152_064, 151_936)
    narrow = require_match(words, dict(words), 151_936, 152_064)
    assert wide.ids[:151_936].tolist() == list(range(151_936))
    assert (wide.ids[151_936:] == -1).all()
    assert is_identity(narrow)


def test_equal_sizes_with_different_maps_are_refused() -> None:
    with pytest.raises(VocabularyError, match="expected one map"):
        require_match(numbered(WORDS), numbered(WORDS[::-1]), 8, 8)


@checked_often
@given(order=permutations.filter(lambda order: order != sorted(order)))
def test_a_refusal_counts_the_differing_ids_and_shows_the_first(order) -> None:
    student = numbered([WORDS[index] for index in order])
    differing = [index for index, other in enumerate(order) if index != other]
    with pytest.raises(VocabularyError) as caught:
        require_match(numbered(WORDS), student, 8, 8)
    assert f"{len(differing)} of 8 common ids" in str(caught.value)
    first = differing[0]
    assert f"the first is {first}: {WORDS[first]!r} and {WORDS[order[first]]!r}" in str(caught.value)


def test_a_single_differing_id_is_enough_to_refuse() -> None:
    with pytest.raises(VocabularyError, match="1 of 8 common ids"):
        require_match(numbered(WORDS), numbered([*WORDS[:7], "shouted"]), 8, 8)


def test_a_refusal_says_what_to_do() -> None:
    with pytest.raises(VocabularyError, match="--vocab-strategy align"):
        require_match(numbered(WORDS), numbered(WORDS[::-1]), 8, 8)


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_token_that_only_one_of_the_two_knows_goes_nowhere(who: str) -> None:
    longer, shorter = numbered([*WORDS, "<think>"]), numbered(WORDS)
    teacher, student = (longer, shorter) if who == "teacher" else (shorter, longer)
    found = require_match(teacher, student, 12, 12)
    assert found.ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, -1, 9, 10, 11]


def test_maps_without_a_common_id_do_not_match() -> None:
    student = {word: index + 8 for index, word in enumerate(WORDS)}
    with pytest.raises(VocabularyError):
        require_match(numbered(WORDS), student, 16, 16)


# Other vocabularies -------------------------------------------------------------------------------------------------


@checked_often
@given(order=permutations)
def test_a_comparison_keeps_the_ids_that_agree_and_counts_the_others(order) -> None:
    student = numbered([WORDS[index] for index in order])
    found = compare_vocabularies(numbered(WORDS), student, 8, 8).map
    expected = [index if index == other else -1 for index, other in enumerate(order)]
    assert found.ids.tolist() == expected
    assert found.differing == expected.count(-1)


def test_what_lies_beyond_the_students_head_goes_nowhere() -> None:
    found = require_match(numbered(WORDS), numbered(WORDS[:5]), 8, 5)
    assert found.ids.tolist() == [0, 1, 2, 3, 4, -1, -1, -1]


AGREEING = compare_vocabularies(numbered(WORDS), numbered(WORDS), 8, 10)
OTHER_IDS = compare_vocabularies(numbered(WORDS), numbered(WORDS[::-1]), 8, 8)
APART = compare_vocabularies(numbered(WORDS), {word: index + 8 for index, word in enumerate(WORDS)}, 16, 16)


@pytest.mark.parametrize("strategy", ["auto", "match", "align", "truncate", "project"])
def test_nothing_has_to_be_mapped_between_maps_that_agree(strategy) -> None:
    assert AGREEING.way(strategy) is None
    assert AGREEING.way(strategy, force=True) is None


@pytest.mark.parametrize("compared", [AGREEING, OTHER_IDS, APART], ids=["agreeing", "other ids", "apart"])
def test_sorted_probabilities_are_what_was_asked_for_whatever_the_maps(compared) -> None:
    assert compared.way("uld") == "uld"


@pytest.mark.parametrize("compared", [OTHER_IDS, APART], ids=["other ids", "apart"])
def test_maps_that_differ_are_aligned_unless_another_way_is_named(compared) -> None:
    ways = {strategy: compared.way(strategy) for strategy in ("auto", "align", "project")}
    assert ways == {"auto": "align", "align": "align", "project": "project"}


@pytest.mark.parametrize("compared", [OTHER_IDS, APART], ids=["other ids", "apart"])
def test_unrelated_ids_are_paired_by_force_alone(compared) -> None:
    with pytest.raises(VocabularyError, match="--vocab-strategy align, models of one family, or --force"):
        compared.way("truncate")
    assert compared.way("truncate", force=True) == "truncate"


def test_force_does_not_make_a_match_of_maps_that_differ() -> None:
    with pytest.raises(VocabularyError) as caught:
        OTHER_IDS.way("match", force=True)
    assert "--force" not in str(caught.value)


def test_maps_without_a_common_id_are_said_to_have_none() -> None:
    with pytest.raises(VocabularyError, match="no common id, expected one map"):
        APART.way("match")


def test_ids_are_the_int32_that_targets_are_mapped_by() -> None:
    assert AGREEING.map.ids.dtype == np.int32
    assert VocabularyMap.of_student(9, 3).ids.dtype == np.int32


def test_targets_that_are_in_the_students_ids_stay_as_they_are() -> None:
    found = VocabularyMap.of_student(5, 3)
    assert (found.ids.tolist(), found.differing) == ([0, 1, 2, 3, 4], 3)


# Dense logits -------------------------------------------------------------------------------------------------------


def draw(seed: int, *shape: int) -> np.ndarray:
    return (3 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


@pytest.mark.parametrize(("teacher_width", "student_width"), [(7, 5), (5, 7), (6, 6)])
def test_truncating_logits_cuts_both_to_the_smaller_width(teacher_width: int, student_width: int) -> None:
    teacher, student = draw(1, 2, 3, teacher_width), draw(2, 2, 3, student_width)
    width = min(teacher_width, student_width)
    found = align_vocab_sizes(mx.array(teacher), mx.array(student))
    np.testing.assert_array_equal(np.array(found[0]), teacher[..., :width])
    np.testing.assert_array_equal(np.array(found[1]), student[..., :width])


def test_the_kd_loss_of_logits_that_differ_only_in_padding_is_zero() -> None:
    student = draw(1, 4, 5)
    teacher = np.concatenate([student, draw(2, 4, 2)], axis=-1)
    assert compute_kd_loss(*align_vocab_sizes(mx.array(teacher), mx.array(student)), 2.0).item() == 0.0


def test_the_kd_loss_takes_projected_logits_with_impossible_ids() -> None:
    id_map = np.array([3, 1, -1, 0, 1, 0, -1])
    teacher, student = align_vocab_sizes(mx.array(draw(1, 4, 7)), mx.array(draw(2, 4, 5)), "project", id_map)
    found, gradient = mx.value_and_grad(lambda x: compute_kd_loss(teacher, x, 2.0))(student)
    p, q = softmax(np.array(teacher) / 2), softmax(np.array(student) / 2)
    expected = 4 * np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(q)), 0).sum(axis=-1).mean()
    assert found.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(np.array(gradient), 2 * (q - p) / 4, rtol=1e-4, atol=1e-6)


@checked_often
@given(seed=st.integers(0, 2**32 - 1), id_map=st.lists(st.integers(-1, 4), min_size=9, max_size=9))
def test_projecting_logits_sums_the_probabilities_of_the_ids_that_go_together(seed, id_map) -> None:
    assume(max(id_map) >= 0)
    teacher, student = draw(seed, 2, 3, 9), draw(seed + 1, 2, 3, 5)
    found, unchanged = align_vocab_sizes(mx.array(teacher), mx.array(student), "project", np.array(id_map))
    expected = np.zeros((2, 3, 5))
    for index, target in enumerate(id_map):
        if target >= 0:
            expected[..., target] += softmax(teacher)[..., index]
    # Of the logits only differences matter: what was dropped leaves the kept probabilities in proportion.
    expected /= expected.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(softmax(np.array(found)), expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(np.array(unchanged), student)


def test_student_ids_that_get_nothing_have_no_probability() -> None:
    found, _ = align_vocab_sizes(mx.array(draw(1, 2, 4)), mx.array(draw(2, 2, 6)), "project", np.array([5, 0, 0, -1]))
    impossible = np.isneginf(np.array(found))
    assert impossible.tolist() == [[False, True, True, True, True, False]] * 2


def test_projecting_along_a_permutation_only_permutes() -> None:
    teacher, order = draw(1, 3, 8), np.random.default_rng(0).permutation(8)
    found, _ = align_vocab_sizes(mx.array(teacher), mx.array(draw(2, 3, 8)), "project", order)
    np.testing.assert_allclose(np.array(found)[:, order], teacher, rtol=1e-5, atol=1e-5)


def test_a_dropped_id_of_great_probability_does_not_wipe_out_the_others() -> None:
    teacher = np.array([[200.0, 1.0, 0.0]], dtype=np.float32)
    found, _ = align_vocab_sizes(mx.array(teacher), mx.zeros((1, 2)), "project", np.array([-1, 0, 1]))
    np.testing.assert_allclose(softmax(np.array(found)), softmax(teacher[:, 1:]), rtol=1e-4)


@pytest.mark.parametrize("id_map", [None, np.arange(6), np.arange(8)], ids=["none", "too short", "too long"])
def test_projecting_needs_a_map_as_long_as_the_teachers_vocabulary(id_map: np.ndarray | None) -> None:
    with pytest.raises(ValueError, match="expected id_map with 7 entries"):
        align_vocab_sizes(mx.zeros((2, 7)), mx.zeros((2, 9)), "project", id_map)


def test_a_map_to_ids_beyond_the_students_width_is_refused() -> None:
    with pytest.raises(ValueError, match="id_map"):
        align_vocab_sizes(mx.zeros((1, 3)), mx.zeros((1, 2)), "project", np.array([0, 1, 2]))


@pytest.mark.parametrize("strategy", ["match", "pad", ""])
def test_an_unknown_strategy_is_refused(strategy: str) -> None:
    with pytest.raises(ValueError, match="expected 'truncate' or 'project'"):
        align_vocab_sizes(mx.zeros((2, 7)), mx.zeros((2, 7)), strategy)
