"""Settings are ranked by their KL on the same prompts, and what chance can explain is not called a difference."""

from __future__ import annotations

import numpy as np
import pytest

from true_kd.errors import TrueKDError
from true_kd.proof import PromptScores
from true_kd.ranking import Run, recommend

COUNT = 30
NOISE = np.random.default_rng(0).normal(size=(8, COUNT))


def scores(
    kl: float, noise: int = 0, spread: float = 0.0, right: float | None = None, **changes: object
) -> PromptScores:
    """An adapter whose KL a token is `kl` on average, with an own deviation on each prompt."""
    tokens = np.full(COUNT, 10)
    sums = tokens * (kl + spread * (NOISE[noise] - NOISE[noise].mean()))
    answers = {} if right is None else {"adapted": tuple(bool(at < right * COUNT) for at in range(COUNT))}
    record = {
        "where": tuple(f"valid.jsonl:{at}" for at in range(COUNT)),
        "tokens": tuple(tokens.tolist()),
        "kl": {"adapted": tuple(sums.tolist())},
        "nll": {},
        "agreed": {"adapted": (8,) * COUNT},
        "right": answers,
    }
    return PromptScores(**{**record, **changes})


def test_the_nearest_comes_first_and_is_taken() -> None:
    found = recommend("cats", [Run("far", False, scores(0.4)), Run("near", False, scores(0.1))])
    assert found.best == "near"
    assert [row.setting for row in found.rows] == ["near", "far"]
    assert [row.kl.value for row in found.rows] == pytest.approx([0.1, 0.4])
    assert found.rows[1].behind.value == pytest.approx(0.3)
    assert found.sentence == "cats: take near (KL 0.100 nats per token)."


def test_what_chance_explains_is_as_good() -> None:
    runs = [
        Run("best", False, scores(0.100, 1, 0.05)),
        Run("chance", False, scores(0.102, 2, 0.05)),
        Run("worse", False, scores(0.2, 3, 0.05)),
    ]
    found = recommend("cats", runs)
    assert {row.setting: row.as_good for row in found.rows} == {"best": True, "chance": True, "worse": False}
    assert "as good within chance: chance" in found.sentence


def test_a_small_difference_on_every_prompt_is_a_difference() -> None:
    """Prompts differ much more than the settings do: in pairs that is seen all the same."""
    runs = [Run("best", False, scores(0.100, 1, 0.05)), Run("worse", False, scores(0.102, 1, 0.05))]
    assert not recommend("cats", runs).rows[1].as_good


def test_repetitions_count_as_one_setting() -> None:
    runs = [Run("a", False, scores(0.1)), Run("a", False, scores(0.3)), Run("b", False, scores(0.15))]
    found = recommend("cats", runs)
    assert found.best == "b"
    assert {row.setting: row.seeds for row in found.rows} == {"a": 2, "b": 1}
    assert {row.setting: row.kl.value for row in found.rows} == pytest.approx({"a": 0.2, "b": 0.15})


@pytest.mark.parametrize(
    ("control", "says"),
    [
        (0.2, "Plain fine-tuning is behind by 0.100"),
        (0.05, "Plain fine-tuning is nearer to the teacher by 0.050"),
        (0.1, "Plain fine-tuning is as good within chance"),
    ],
)
def test_the_control_is_ranked_and_never_taken(control: float, says: str) -> None:
    runs = [Run("sft", True, scores(control, 1, 0.001)), Run("kd", False, scores(0.1, 2, 0.001))]
    found = recommend("cats", runs)
    assert found.best == "kd"
    assert says in found.sentence


def test_answers_are_shown_where_there_are_any() -> None:
    one = Run("a", False, scores(0.1, right=0.5))
    assert recommend("cats", [one]).rows[0].exact_match.value == 0.5
    two = Run("a", False, scores(0.1, right=1.0))
    assert recommend("cats", [one, two]).rows[0].exact_match.value == 0.75
    assert recommend("cats", [Run("a", False, scores(0.1))]).rows[0].exact_match is None


@pytest.mark.parametrize(
    "changes", [{"where": ("elsewhere",) * COUNT}, {"tokens": (9,) * COUNT}], ids=["where", "tokens"]
)
def test_runs_on_other_prompts_are_not_compared(changes: dict[str, object]) -> None:
    with pytest.raises(TrueKDError, match="different prompts"):
        recommend("cats", [Run("a", False, scores(0.1)), Run("b", False, scores(0.2, **changes))])
