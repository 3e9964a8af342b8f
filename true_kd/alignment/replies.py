"""A reply of the teacher in the student's tokens, with the teacher's distribution at each of them.

The text is what the teacher wrote without the token that ends it; the student's tokens are its own way of writing that
text, and its own end of a reply. Spaces that SentencePiece adds in front of a text are no part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from true_kd.alignment.aligner import Account, Place, Text, Way
from true_kd.alignment.compatibility import Compatibility, compare_spellings
from true_kd.alignment.spelling import Spelling, indent
from true_kd.alignment.tables import LEAST, Tables
from true_kd.errors import VocabularyError
from true_kd.examples import TEMPLATE_DATE
from true_kd.files import digest_json
from true_kd.models import (
    Branches,
    ModelOptions,
    ModelTokenizer,
    TemplateRefusal,
    TemplateStopped,
    apply_template,
    seed_of,
    uniforms_of,
)
from true_kd.shards import CachedReply
from true_kd.suggest import quote
from true_kd.targets import TargetSettings, encode, join

_VERSION = 2
"""Of what the ways come to; part of a cache's identity."""


@dataclass(frozen=True)
class Alignment:
    """That targets are in the vocabulary of another tokenizer than the teacher's, and whose."""

    way: Way
    student: ModelOptions
    tokenizer: str
    """Digest of the student's tokenizer."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the targets depend on besides the teacher: students of one tokenizer share them."""
        return {"way": self.way, "tokenizer": self.tokenizer, "version": _VERSION}


def find_alignment(way: Way, options: ModelOptions, teacher: ModelTokenizer, student: ModelTokenizer) -> Alignment:
    """What aligning two tokenizers depends on.

    Raises
    ------
    VocabularyError
        when the tokens of one cannot be read as text.
    """
    Spelling(teacher)
    layout = Spelling(student).layout
    has_template = bool(student.tokenizer.has_chat_template)
    facts = [layout, student.stop_ids, _reply_end(student), student.size, has_template]
    return Alignment(way, options, digest_json(facts))


class Aligner:
    """Retells the replies of one teacher in the tokens of one student."""

    def __init__(self, way: Way, teacher: ModelTokenizer, student: ModelTokenizer, least: float = LEAST) -> None:
        """`least` is the probability from which on the teacher is asked about a beginning."""
        self.way = way
        self._least = least
        self.student = student
        self.teacher_spelling, self.student_spelling = Spelling(teacher), Spelling(student)

    @cached_property
    def _tables(self) -> Tables:
        return Tables(self.teacher_spelling, self.student_spelling, _reply_end(self.student), self._least)

    @property
    def compatibility(self) -> Compatibility:
        """What the two tokenizers share."""
        return compare_spellings(self.teacher_spelling, self.student_spelling)

    def retell(self, response: Sequence[int], opening: Sequence[int], text: str | None = None) -> Text:
        """A reply in the tokens of both.

        Parameters
        ----------
        response
            the teacher's tokens.
        opening, text
            the tokens before them, and the whole text where the data is plain text: what the student predicts of it
            begins after its own first token.
        """
        theirs, ours = self.teacher_spelling, self.student_spelling
        if beyond := [token for token in response if token >= theirs.model.size]:
            raise VocabularyError(
                f"teacher {quote(theirs.model.name)}: token {beyond[0]} of its tokenizer, expected one below the "
                f"{theirs.model.size:,} of its output head. Remove what it stands for from the data."
            )
        if text is not None:
            tokens = ours.known(self.student.tokenizer.encode(text))
            shift = self._start(ours, tokens, 1, text) - self._start(theirs, [*opening, *response], len(opening), text)
            return Text(self._tables, response, tokens[1:], shift)
        spelled = b"".join(theirs.written(token) for token in response)
        added = theirs.adds_space and bool(theirs.model.tokenizer.has_chat_template) and spelled.startswith(b" ")
        content = spelled[added:]
        continues = not self.student.tokenizer.has_chat_template or content.startswith(b" ")
        tokens = ours.known(ours.encode(content, continues))
        shift = added - (indent(ours.join(tokens)) - indent(content))
        if response and response[-1] in theirs.stop and self._tables.stop_id is not None:
            tokens.append(self._tables.stop_id)
        return Text(self._tables, response, tokens, shift, added=max(0, -shift))

    @staticmethod
    def _start(spelling: Spelling, tokens: Sequence[int], count: int, text: str) -> int:
        """Bytes of a text before what is predicted of it: those of its first tokens, without an added space."""
        pieces = [spelling.pieces[token] or b"" for token in tokens]
        return len(b"".join(pieces[:count])) - (indent(b"".join(pieces)) - indent(text.encode()))

    def score(
        self,
        branches: Branches,
        opening: Sequence[int],
        reply: tuple[Sequence[int], str],
        key: str,
        settings: TargetSettings,
        text: str | None = None,
    ) -> CachedReply:
        """Targets of a reply (the teacher's tokens, and how it ended) to an opening, in the student's vocabulary.

        `branches` has the teacher read the opening and the reply.
        """
        response, finished = reply
        retold = self.retell(response, opening, text)
        first = len(opening) - 1
        rows = _Rows(lambda start, stop: branches.logits(first + start, first + stop), len(response))
        tokens, uniforms = np.array(retold.ours, dtype=np.int32), uniforms_of(key, max(1, len(retold.ours)))
        parts, total = [], Account()
        for group in _groups(retold.places):
            spread = self._spread(retold, group, rows, branches, len(opening), key)
            found, accounts = zip(*spread, strict=True)
            index = [place.index for place in group]
            with np.errstate(divide="ignore"):
                logits = mx.array(np.log(np.stack(found)).astype(np.float32))
            parts.append(encode(logits, mx.array(tokens[index]), uniforms[index], settings, self.way == "uld"))
            for account in accounts:
                total += account
        if not parts:
            row = encode(mx.zeros((1, self.student.size)), mx.array([0]), uniforms[:1], settings, self.way == "uld")
            parts = [row.first(0)]
        kept = np.array([place.index for place in retold.places], dtype=np.int32)
        account = np.concatenate([[len(kept) / max(len(tokens), 1)], total.shares(len(kept))]).astype(np.float32)
        return CachedReply(tokens, finished, join(parts), kept, account)

    def _spread(
        self, retold: Text, places: Sequence[Place], rows: _Rows, branches: Branches, start: int, key: str
    ) -> list[tuple[np.ndarray, Account]]:
        if self.way != "align":
            return [self._by_rule(rows(place.before)) for place in places]
        seed = seed_of(key)
        running = [retold.spread(place, rows, np.random.default_rng([seed, place.index])) for place in places]
        done: dict[int, tuple[np.ndarray, Account]] = {}
        wanted: dict[int, list[tuple[int, tuple[int, ...]]]] = {}

        def go_on(at: int, answers: Sequence[np.ndarray] | None) -> None:
            try:
                wanted[at] = running[at].send(answers)
            except StopIteration as end:
                done[at] = end.value

        for at in range(len(running)):
            go_on(at, None)
        while wanted:
            asked: dict[tuple[int, tuple[int, ...]], None] = {}
            waiting = {}
            while wanted and len(asked) < _QUESTIONS:
                at = next(iter(wanted))
                waiting[at] = wanted.pop(at)
                asked |= dict.fromkeys(waiting[at])
            said = np.exp(branches.logprobs([(start + before, path) for before, path in asked]))
            answers = dict(zip(asked, said, strict=True))
            for at, mine in waiting.items():
                go_on(at, [answers[each] for each in mine])
        return [done[at] for at in range(len(running))]

    def _by_rule(self, probs: np.ndarray) -> tuple[np.ndarray, Account]:
        """The teacher's distribution by a rule that looks at no text; which is that of the token it is about to write,
        or has begun."""
        found = np.zeros(self.student.size)
        if self.way == "uld":
            ordered = -np.sort(-probs)[: len(found)]
            found[: len(ordered)] = ordered
        elif self.way == "truncate":
            width = min(len(found), len(probs))
            found[:width] = probs[:width]
        else:
            matched = self._tables.matched
            found = np.bincount(self._tables.same[matched], probs[matched], minlength=len(found))
        kept = float(found.sum())
        if kept <= 0:
            return np.full(len(found), 1.0 / len(found)), Account(nowhere=1.0)
        return found / kept, Account(matched=kept, nowhere=max(0.0, 1.0 - kept))


class _Rows:
    """The teacher's probabilities at each token of a reply, computed as they are asked for."""

    _CHUNK = 64

    def __init__(self, logits: Callable[[int, int], mx.array], count: int) -> None:
        self._logits = logits
        self._count = count
        self._chunks: dict[int, np.ndarray] = {}

    def __call__(self, at: int) -> np.ndarray:
        number = at // self._CHUNK
        if number not in self._chunks:
            if len(self._chunks) > 2:
                del self._chunks[min(self._chunks)]
            logits = self._logits(number * self._CHUNK, min(self._count, (number + 1) * self._CHUNK))
            self._chunks[number] = np.array(mx.softmax(logits.astype(mx.float32), axis=-1, precise=True))
        return self._chunks[number][at - number * self._CHUNK]


_TOGETHER = 32
"""Places whose questions to the teacher are put together."""
_QUESTIONS = 128
"""Of these so many are asked at a time, or a few more: each is answered with the teacher's whole vocabulary."""


def _groups(places: Sequence[Place]) -> Iterator[Sequence[Place]]:
    for start in range(0, len(places), _TOGETHER):
        yield places[start : start + _TOGETHER]


def _reply_end(student: ModelTokenizer) -> int | None:
    """The token that the student's chat template ends a reply with, or the first that would end one."""
    stop = student.stop_ids
    if student.tokenizer.has_chat_template:
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        try:
            tokens = apply_template(student.tokenizer, said, None, TEMPLATE_DATE, add_generation_prompt=False)
        except (TemplateRefusal, TemplateStopped):
            tokens = []
        ends = [token for token in tokens if token in stop]
        if ends:
            return ends[-1]
    return stop[0] if stop else None
