"""The plain student, the student with its adapter and the teacher on one prompt, with the same seed, token by token.

Teacher and student are never in memory together. That the base side is the base is not assumed but proved: its weights
and its logits must be, to the last bit, those of a second opening of the student without adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from true_kd.adapters import load_adapter
from true_kd.config import RunConfig
from true_kd.errors import TrueKDError, VocabularyError
from true_kd.examples import render
from true_kd.jobs import find_teacher
from true_kd.models import (
    LanguageModel,
    ModelOptions,
    ModelTokenizer,
    SamplingOptions,
    describe,
    open_model,
    open_tokenizer,
    release_memory,
    token_pieces,
)
from true_kd.models.streaming import read_logits, stream_reply
from true_kd.prompts import Prompt
from true_kd.vocabulary import require_match


class NotTheBase(TrueKDError):
    """The side that should be the plain student is not, or cannot be shown to be. Exit code 5."""

    exit_code = 5

    def __init__(self, student: str, found: str) -> None:
        super().__init__(
            f"base side {student}: {found}, expected the plain student. Do not trust this comparison; please report it."
        )


@dataclass(frozen=True)
class Side:
    """What one model wrote, and how far it stands from another at each token of that."""

    name: Literal["base", "adapted", "teacher"]
    model: str
    tokens: tuple[int, ...]
    """The stop token included."""
    pieces: tuple[str, ...]
    """What each token adds to the text; nothing for the stop token."""
    finished: Literal["stop", "length"]
    kl: tuple[float, ...]
    """At each token, in nats, temperature 1, over the whole vocabulary."""
    measure: str
    """What `kl` is: "KL(teacher || base)"."""

    @property
    def text(self) -> str:
        """The reply."""
        return "".join(self.pieces)

    @property
    def mean_kl(self) -> float:
        """Mean of `kl`."""
        return float(np.mean(self.kl))


@dataclass(frozen=True)
class BaseProof:
    """What shows that the base side is the plain student, and that the adapter is not nothing."""

    tensors: int
    """Weights of the base side; none of them is an adapter's."""
    digest: str
    """SHA-256 of their names and bytes; the second opening has the same."""
    tokens: int
    """Those of the base's reply; both openings give them the same logits to the last bit."""
    largest_change: float
    """The most by which the adapter moves one of these logits; 0 for an adapter that changes nothing."""


@dataclass(frozen=True)
class Comparison:
    """The sides on one prompt."""

    base: Side
    adapted: Side
    teacher: Side | None
    """None where its weights are not here, or it was not asked."""
    base_on_teacher: tuple[float, ...]
    """KL(teacher || base) at each token of the teacher's text, beside KL(teacher || adapted) of `teacher.kl`: both
    students on the same text. Empty without a teacher."""
    proof: BaseProof

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know before trusting what they see."""
        if self.proof.largest_change > 0:
            return ()
        return (
            "The adapter changes nothing: at every token of the base's text its logits are the base's. Was it trained?",
        )

    @property
    def sides(self) -> tuple[Side, ...]:
        """Those there are, in the order they are shown."""
        return (self.base, self.adapted, *([self.teacher] if self.teacher else []))


def compare(
    config: RunConfig, folder: Path, prompt: Prompt, options: SamplingOptions, seed: int, with_teacher: bool = True
) -> Comparison:
    """Have the plain student, the student with the adapter of a folder and the teacher reply to a prompt.

    Each model is asked by its own chat template. On the host the logits of up to four texts are kept, 16 bytes times
    tokens times vocabulary: 620 MB for 256 tokens of 152k. The student is opened twice and the teacher once. Without a
    teacher (`with_teacher` false, or a teacher that only a cache knows) both sides bear KL(adapted || base).

    Raises
    ------
    NotTheBase
        when the base side is not the plain student.
    VocabularyError
        when teacher and student do not share a vocabulary.
    TrueKDError
        when a model cannot be opened, or the prompt not be rendered.
    """
    stages = compare_in_stages(config, folder, prompt, options, seed, with_teacher)
    while True:
        try:
            next(stages)
        except StopIteration as end:
            return end.value


def compare_in_stages(
    config: RunConfig, folder: Path, prompt: Prompt, options: SamplingOptions, seed: int, with_teacher: bool = True
) -> Generator[str, None, Comparison]:
    """What `compare` does; yields the name of each model before it is opened."""
    asking = _Asking(prompt, options, seed)
    source = find_teacher(config) if with_teacher else None
    has_teacher = source is not None and bool(describe(source.options, "teacher").weights)
    if has_teacher:
        _check_vocabularies(open_tokenizer(source.options, "teacher"), open_tokenizer(config.student, "student"))
    yield config.student.model
    students = _write_students(config.student, folder, asking)
    release_memory()
    theirs = None
    if has_teacher:
        yield source.name
        theirs = _ask_teacher(source.options, asking, students)
        release_memory()
    yield config.student.model
    measured = _measure_again(config.student, folder, asking, students, theirs)
    release_memory()
    return _put_together(students, theirs, measured)


@dataclass(frozen=True)
class Weights:
    """The weights of a model, all but read."""

    names: tuple[str, ...]
    digest: str
    """SHA-256 of names, types, shapes and bytes."""


def read_weights(module: nn.Module) -> Weights:
    """Names and digest of all weights of a module."""
    arrays = dict(sorted(tree_flatten(module.parameters())))
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(memoryview(mx.contiguous(array)))
    return Weights(tuple(arrays), digest.hexdigest())


def check_plain(student: str, weights: Weights) -> None:
    """Raise `NotTheBase` when there is an adapter among the weights."""
    found = [name for name in weights.names if name.rpartition(".")[2] in ("lora_a", "lora_b")]
    if found:
        raise NotTheBase(student, f"{len(found)} tensors of an adapter in it, such as {found[0]}")


def check_same(student: str, first: Weights, again: Weights, logits: np.ndarray, logits_again: np.ndarray) -> None:
    """Raise `NotTheBase` unless two openings of the plain student agree in weights and logits, to the last bit."""
    check_plain(student, first)
    check_plain(student, again)
    if first != again:
        raise NotTheBase(student, "its weights are not those of a second opening without adapter")
    # As bits: a NaN is not equal to itself.
    if not np.array_equal(logits.view(np.uint32), logits_again.view(np.uint32)):
        raise NotTheBase(student, "its logits are not those of a second opening without adapter")


def put_on(model: LanguageModel, folder: Path) -> None:
    """Put the adapter of a folder on an opened student, ready to speak.

    Raises
    ------
    CacheError
        when it is not an adapter of this student.
    """
    load_adapter(model.module, folder)
    # The adapter's layers are new, and with dropout would be in training mode.
    model.module.eval()


def token_kl(logits: np.ndarray, others: np.ndarray) -> tuple[float, ...]:
    """KL(one || other) at each token, in nats, at temperature 1, from logits [tokens, vocab] of each.

    Where the vocabularies differ in length, what one of them has more is padding, and is left out of both.
    """
    width = min(logits.shape[-1], others.shape[-1])
    found: list[float] = []
    for start in range(0, len(logits), _ROWS):
        one, other = (_logprobs(array[start : start + _ROWS, :width]) for array in (logits, others))
        weights = np.exp(one)
        gaps = np.where(weights > 0, one - other, 0.0)
        found += np.maximum(0.0, np.sum(weights * gaps, axis=-1)).tolist()
    return tuple(found)


_ROWS = 64
"""Tokens at a time: 78 MB of float64 for a vocabulary of 152k."""


def _logprobs(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _check_vocabularies(teacher: ModelTokenizer, student: ModelTokenizer) -> None:
    try:
        require_match(teacher.ids, student.ids, teacher.size, student.size)
    except VocabularyError as error:
        raise VocabularyError(
            f"teacher {teacher.name} and student {student.name}: ids of theirs stand for different tokens, expected "
            "one vocabulary to measure the KL in. Give --no-teacher to compare the student with and without adapter."
        ) from error


@dataclass(frozen=True)
class _Asking:
    """What all models are asked alike."""

    prompt: Prompt
    options: SamplingOptions
    seed: int

    def tokens(self, model: ModelTokenizer) -> list[int]:
        """The prompt by a model's own chat template."""
        return render(self.prompt, model.tokenizer, model.stop_ids, model.name).prompt

    def write(self, model: LanguageModel) -> _Written:
        """A model's reply and its logits."""
        asked = self.tokens(model)
        written = list(stream_reply(model, asked, self.options, self.seed))
        tokens = [token.id for token in written]
        finished = written[-1].finished
        pieces = token_pieces(model.tokenizer, tokens[: -1 if finished == "stop" else None])
        pieces += [""] * (len(tokens) - len(pieces))
        return _Written(model.name, tokens, pieces, finished, read_logits(model.module, asked, tokens))

    def read(self, model: LanguageModel, written: _Written) -> np.ndarray:
        """A model's logits on what another wrote."""
        if max(written.tokens) >= model.size:
            raise VocabularyError(
                f"{model.name}: token {max(written.tokens)} in the reply of {written.model}, expected one below its "
                f"vocabulary of {model.size:,}. Ask for another reply with --seed or --temp."
            )
        return read_logits(model.module, self.tokens(model), written.tokens)


@dataclass(frozen=True)
class _Written:
    model: str
    tokens: Sequence[int]
    pieces: Sequence[str]
    finished: Literal["stop", "length"]
    logits: np.ndarray
    """float32 [tokens, vocab], of the model that wrote it."""


@dataclass(frozen=True)
class _Students:
    base: _Written
    adapted: _Written
    weights: Weights
    """Of the base side, read before there was an adapter."""
    base_kl: tuple[float, ...]
    """KL(adapted || base) on the base's text."""
    largest_change: float


def _write_students(student: ModelOptions, folder: Path, asking: _Asking) -> _Students:
    model = open_model(student, "student")
    weights = read_weights(model.module)
    check_plain(model.name, weights)
    base = asking.write(model)
    put_on(model, folder)
    adapted = asking.write(model)
    moved = asking.read(model, base)
    return _Students(base, adapted, weights, token_kl(moved, base.logits), float(np.abs(moved - base.logits).max()))


@dataclass(frozen=True)
class _Theirs:
    own: _Written
    base_kl: tuple[float, ...]
    """KL(teacher || base) on the base's text."""
    adapted_kl: tuple[float, ...]
    """KL(teacher || adapted) on the adapted student's."""


def _ask_teacher(teacher: ModelOptions, asking: _Asking, students: _Students) -> _Theirs:
    model = open_model(teacher, "teacher")
    base_kl, adapted_kl = (
        token_kl(asking.read(model, written), written.logits) for written in (students.base, students.adapted)
    )
    return _Theirs(asking.write(model), base_kl, adapted_kl)


@dataclass(frozen=True)
class _Measured:
    adapted_kl: tuple[float, ...]
    base_kl: tuple[float, ...]


def _measure_again(
    student: ModelOptions, folder: Path, asking: _Asking, students: _Students, theirs: _Theirs | None
) -> _Measured:
    """The second opening of the student: it proves the base side, and measures what needed the others' texts.

    Returns KL(teacher || adapted) and KL(teacher || base) on the teacher's text; without one KL(adapted || base) on
    the adapted student's text, and nothing.
    """
    model = open_model(student, "student")
    check_same(
        model.name,
        students.weights,
        read_weights(model.module),
        students.base.logits,
        asking.read(model, students.base),
    )
    if theirs is None:
        return _Measured(token_kl(students.adapted.logits, asking.read(model, students.adapted)), ())
    base_kl = token_kl(theirs.own.logits, asking.read(model, theirs.own))
    put_on(model, folder)
    return _Measured(token_kl(theirs.own.logits, asking.read(model, theirs.own)), base_kl)


def _put_together(students: _Students, theirs: _Theirs | None, measured: _Measured) -> Comparison:
    base, adapted = students.base, students.adapted
    proof = BaseProof(len(students.weights.names), students.weights.digest, len(base.tokens), students.largest_change)
    if theirs is None:
        measure = "KL(adapted || base)"
        sides = (
            _side("base", base, students.base_kl, measure),
            _side("adapted", adapted, measured.adapted_kl, measure),
            None,
        )
    else:
        sides = (
            _side("base", base, theirs.base_kl, "KL(teacher || base)"),
            _side("adapted", adapted, theirs.adapted_kl, "KL(teacher || adapted)"),
            _side("teacher", theirs.own, measured.adapted_kl, "KL(teacher || adapted)"),
        )
    return Comparison(*sides, measured.base_kl, proof)


def _side(name: Literal["base", "adapted", "teacher"], written: _Written, kl: tuple[float, ...], measure: str) -> Side:
    return Side(name, written.model, tuple(written.tokens), tuple(written.pieces), written.finished, kl, measure)
