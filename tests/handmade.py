"""Examples, scores and proofs made by hand, without any model: each number of them is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from true_kd.evaluation import TokenScores
from true_kd.examples import Example
from true_kd.gate import Headroom, weigh_up
from true_kd.proof import Measured, Proof, prove
from true_kd.sizes import ModelSize
from true_kd.targets import TargetSettings, encode

VOCAB = 128
WHOLE = TargetSettings("sparse", 1e-30, 2.0, 1.0)
"""Every id is kept exactly, its log-probability in eight bits."""


class Letters:
    """A tokenizer whose ids are the numbers of the letters."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(index) for index in ids)

    @property
    def detokenizer(self) -> Any:
        from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer

        return NaiveStreamingDetokenizer(self)


LETTERS = Letters()


def example(
    reply: str, sure: float | Sequence[float] = 0.5, kept: Sequence[int] | None = None, where: str = "here:1"
) -> Example:
    """A reply of one token a letter, of each of which the teacher is `sure`; all other ids are equally likely."""
    places = np.arange(len(reply)) if kept is None else np.array(kept)
    labels = np.array([ord(letter) for letter in reply], dtype=np.int32)
    chances = np.broadcast_to(np.asarray(sure, dtype=np.float64), len(places))
    logits = np.repeat(np.log((1 - chances) / (VOCAB - 1))[:, None], VOCAB, axis=1)
    logits[np.arange(len(places)), labels[places]] = np.log(chances)
    targets = encode(
        mx.array(logits.astype(np.float32)), mx.array(labels[places]), np.zeros(len(places), dtype=np.float32), WHOLE
    )
    weights = np.ones(len(places), dtype=np.float32)
    prompt = np.array(LETTERS.encode(f"say {reply}"), dtype=np.int32)
    return Example(prompt, labels, targets, places.astype(np.int32), weights, where)


def entropy_of(sure: float) -> float:
    """What a teacher of `example` leaves open at a token, nats."""
    return float(-sure * np.log(sure) - (1 - sure) * np.log((1 - sure) / (VOCAB - 1)))


def examples(count: int, length: int = 6, sure: float = 0.5) -> list[Example]:
    """Replies of other letters each, all of one length."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        example("".join(letters[(at + place) % 26] for place in range(length)), sure, where=f"prompts.jsonl:{at + 1}")
        for at in range(count)
    ]


Values = float | Sequence[float] | np.ndarray
"""One for all tokens, or one for each."""


def scores(of: Sequence[Example], kl: Values, nll: Values = 1.0, rank: Values = 0) -> TokenScores:
    """Scores of a model on examples."""
    example_of = np.concatenate([np.full(len(one.kept), at) for at, one in enumerate(of)])
    kl, nll, rank = (np.broadcast_to(np.asarray(values), len(example_of)) for values in (kl, nll, rank))
    return TokenScores(
        kd=4.0 * kl,
        nll=nll.astype(np.float64),
        kl=kl.astype(np.float64),
        rank=rank.astype(np.int64),
        example=example_of,
        position=np.concatenate([one.kept for one in of]).astype(np.int64),
    )


def by_example(of: Sequence[Example], values: Sequence[float]) -> np.ndarray:
    """A value for each example, at each of its tokens."""
    return np.concatenate([np.full(len(one.kept), value) for one, value in zip(of, values, strict=True)])


def right(count: int, of: int) -> np.ndarray:
    """Answers of which the first `count` are right."""
    return np.arange(of) < count


STUDENT, TEACHER = ModelSize(1000, 4000, 50.0), ModelSize(20_000, 80_000, 10.0)
ADAPTER = ModelSize(100, 400)
"""What an adapter adds."""
ADAPTED = ModelSize(1100, 4400, 40.0)


def headroom(
    of: Sequence[Example], student: TokenScores, teacher_right: Any = None, student_right: Any = None
) -> Headroom:
    """What there is to learn where the teacher wrote the replies."""
    return weigh_up(of, student, LETTERS, False, teacher_right, student_right)


def proof(
    of: Sequence[Example],
    student: TokenScores,
    adapted: TokenScores,
    control: TokenScores | None = None,
    answers: dict[str, np.ndarray] | None = None,
    teacher: ModelSize = TEACHER,
    domain: str = "cats",
) -> Proof:
    """What scores come to; `answers` are the right ones by model, the teacher among them if it has any."""
    found = answers or {}
    return prove(
        domain,
        of,
        Measured(student, found.get("student"), STUDENT),
        Measured(adapted, found.get("adapted"), ADAPTED),
        Measured(control, found.get("control"), ADAPTED) if control is not None else None,
        found.get("teacher"),
        teacher,
        headroom(of, student, found.get("teacher"), found.get("student")),
        LETTERS,
    )


def usual_proof(domain: str = "cats", control: bool = False, tasks: int = 0) -> Proof:
    """A proof of a student that came nearer: from a KL of about 0.5 to 0.2, and with the control to 0.3."""
    of = examples(12)
    spread = by_example(of, np.linspace(0.8, 1.2, 12).tolist())
    answers = {"student": 0.0, "adapted": 0.5, "control": 0.25, "teacher": 1.0} if tasks else {}
    if not control:
        answers.pop("control", None)
    return proof(
        of,
        scores(of, 0.5 * spread, 1.5, 1),
        scores(of, 0.2 * spread**2, 1.1, 0),
        scores(of, 0.3 * spread, 1.2, 0) if control else None,
        {name: right(round(share * tasks), tasks) for name, share in answers.items()},
        domain=domain,
    )
