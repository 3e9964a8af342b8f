"""What the tokenizers of a teacher and a student say about each other, computed once for all texts."""

from __future__ import annotations

from bisect import bisect_left
from functools import cached_property, lru_cache

import numpy as np

from true_kd.alignment.spelling import Spelling

LEAST = 0.03
"""Probability from which on a beginning is asked about in any case. In `scripts/bench_cross_tokenizer.py` 0.01 taught a
student no more, and 0.1 less."""
LOOKED_AT = 0.003
"""Probability from which on a token is decided by itself in any case."""
_REMEMBERED = 2**18
"""Answers about short texts that are kept: the same come again and again."""


class Tables:
    """What two spellings say about each other, once for all texts."""

    def __init__(self, teacher: Spelling, student: Spelling, stop_id: int | None, least: float = LEAST) -> None:
        """`stop_id` is what the student ends a reply with, `least` the probability of a beginning to ask about."""
        self.least = least
        self.looked_at = min(LOOKED_AT, least)
        self.teacher = teacher
        self.student = student
        self.stop_id = stop_id if stop_id is not None and stop_id < student.model.size else None

    @cached_property
    def first(self) -> np.ndarray:
        """int32 [teacher ids], the student's first token of what each spells, -1 for none."""
        found = np.full(self.teacher.model.size, -1, dtype=np.int32)
        for index, piece in enumerate(self.teacher.pieces):
            if piece:
                found[index] = self.first_of(piece)
        names = {name: index for index, name in self.student.special.items() if index < self.student.model.size}
        for index, name in self.teacher.special.items():
            if index < len(found):
                found[index] = names.get(name, -1)
        for index in self.teacher.stop:
            if self.stop_id is not None and index < len(found):
                found[index] = self.stop_id
        return found

    @cached_property
    def same(self) -> np.ndarray:
        """int32 [teacher ids], the student's token of the same spelling, -1 for none; of special ones as in `first`."""
        ids = self.student.ids
        found = [ids.get(piece, -1) if piece else self.first[at] for at, piece in enumerate(self.teacher.pieces)]
        for index in self.teacher.stop:
            if index < len(found):
                found[index] = self.first[index]
        return np.array(found, dtype=np.int32)

    @lru_cache(maxsize=4)  # noqa: B019 - a process opens few tokenizers
    def counted_after(self, ahead: bytes) -> np.ndarray:
        """`first` of each where the student spells `ahead` in one stretch with it; the student's size for none."""
        found = self.first.copy()
        for index, piece in enumerate(self.teacher.pieces):
            if ahead and piece and index not in self.teacher.stop:
                found[index] = self.first_of(ahead + piece)
        return np.where(found >= 0, found, self.student.model.size)

    @cached_property
    def matched(self) -> np.ndarray:
        """The teacher's tokens that the student has too."""
        return np.flatnonzero(self.same >= 0)

    def first_of(self, text: bytes) -> int:
        """The first token that the student writes a beginning with, -1 for none."""
        tokens = self.student.split(text)
        return tokens[0] if tokens else -1

    @cached_property
    def openings(self) -> set[tuple[int, ...]]:
        """Every beginning, in the teacher's tokens, of a token that the student has and the teacher lacks."""
        found: set[tuple[int, ...]] = set()
        known = self.teacher.ids
        for piece in self.student.ids:
            if piece not in known:
                path = self.teacher.split(piece)
                found.update(path[:count] for count in range(1, len(path)))
        return found

    @cached_property
    def growing(self) -> np.ndarray:
        """The teacher's tokens that may become one that the student has and the teacher lacks."""
        return np.array(sorted(path[0] for path in self.openings if len(path) == 1), dtype=np.int64)

    @cached_property
    def _sorted(self) -> tuple[list[bytes], np.ndarray]:
        order = sorted((piece, index) for index, piece in enumerate(self.teacher.pieces) if piece)
        return [piece for piece, _ in order], np.array([index for _, index in order], dtype=np.int64)

    @lru_cache(maxsize=_REMEMBERED)  # noqa: B019 - as long as the tables live
    def continuing(self, inside: bytes) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's tokens that begin with `inside` and go on, and the student's first token of what goes on."""
        pieces, ids = self._sorted
        start = bisect_left(pieces, inside)
        stop = start
        while stop < len(pieces) and pieces[stop].startswith(inside):
            stop += 1
        chosen = [at for at in range(start, stop) if len(pieces[at]) > len(inside)]
        firsts = [self.first_of(pieces[at][len(inside) :]) for at in chosen]
        return ids[chosen], np.array(firsts, dtype=np.int32)

    @lru_cache(maxsize=_REMEMBERED)  # noqa: B019 - as long as the tables live
    def follow(self, before: int, text: bytes) -> int:
        """The student's token that `text` begins with after its token `before` (-1: after none).

        -1 where the two would have been cut otherwise.
        """
        piece = self.student.pieces[before] if before >= 0 else None
        if piece and self.student.split(piece) == (before,):
            tokens = self.student.split(piece + text)
            if tokens:
                return tokens[1] if tokens[0] == before else -1
        return self.first_of(text)

    @lru_cache(maxsize=_REMEMBERED)  # noqa: B019 - as long as the tables live
    def is_recut(self, text: bytes, path: tuple[int, ...]) -> bool:
        """Whether the student's first token of a beginning may be another one, once that goes on."""
        tokens, tail = self.student.split(text), text
        tried = _after_space(text)
        for at, token in enumerate(tokens):
            tail = tail[len(self.student.spelled(token)) :]
            tried += self._breaking(token, tail)
            # What is left of the next one, when that is broken, may come to this one.
            if at + 1 < len(tokens) and not self._are_close(token, tokens[at + 1]):
                break
        return self._is_cut_otherwise(-1, text, path, tried)

    @lru_cache(maxsize=_REMEMBERED)  # noqa: B019 - as long as the tables live
    def is_broken(self, before: int, text: bytes, path: tuple[int, ...]) -> bool:
        """Whether what follows a beginning may change how the student cuts it from its token before."""
        return self._is_cut_otherwise(before, text, path, self._breaking(before, text) + _after_space(text))

    def _is_cut_otherwise(self, before: int, text: bytes, path: tuple[int, ...], tried: list[bytes]) -> bool:
        """Whether the student cuts a beginning otherwise after its token before (-1: after none) where one of `tried`
        follows that the teacher can write after the same tokens of its own."""
        piece, cut = self.student.spelled(before) if before >= 0 else b"", self.follow(before, text)
        path = (*self.teacher.split(piece), *path)
        return any(
            self.teacher.split(piece + text + added)[: len(path)] == path and self.follow(before, text + added) != cut
            for added in tried
        )

    @lru_cache(maxsize=_REMEMBERED)  # noqa: B019 - as long as the tables live
    def _are_close(self, token: int, other: int) -> bool:
        """Whether some token lies over the end of a token and a part of the next."""
        one, two = self.student.spelled(token), self.student.spelled(other)
        parts = ((one[start:], two[:stop]) for start in range(len(one)) for stop in range(1, len(two)))
        return any(left + right in self.student.ids for left, right in parts)

    def _breaking(self, token: int, tail: bytes) -> list[bytes]:
        """What draws the end of a token into another where it comes after it and `tail`."""
        found = self.student.breaking(token)
        return [other[len(tail) :] for other in found if len(other) > len(tail) and other.startswith(tail)]


def _after_space(text: bytes) -> list[bytes]:
    """What may come after white space and change how it is cut: most tokenizers draw the last space to a word."""
    return [b"a", b" ", b"\n"] if text[-1:].isspace() else []
