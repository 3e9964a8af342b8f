"""The teacher's distribution over the student's next token, where the two have different tokenizers.

Both tokenizers' tokens of one text are laid side by side by the bytes they spell. Where a student's token begins, the
teacher gives a distribution over its own tokens; each of these is the beginning of a text, and the student's first
token of that text gets its probability. Four cases:

- The student writes the teacher's token as one token of its own, or as several: the (first) token gets it.
- The student's token holds several of the teacher's: the product of their conditional probabilities, as in approximate
  likelihood matching (Minixhofer et al., 2025, arXiv:2503.20083). Along the text itself these are at hand. Another
  beginning is *asked about*, that is, the teacher reads it and says how it goes on, where the student's first token
  depends on that: where it may become one that the teacher lacks (one that it has it would have written at once), and
  where BPE cuts it otherwise as it goes on. Of beginnings less likely than `tables.LEAST` only some are, drawn at
  random, and stand for the others: so the result is right in the mean.
- The student's token begins inside one of the teacher's: of the teacher's tokens there, those that agree with the text
  so far (Phan et al., 2024, arXiv:2410.09303), renormalised.
- A beginning that the student would have cut otherwise together with its token before cannot follow that token: it is
  left out, and the rest renormalised. Without this a teacher of letters teaches a student of words to spell.

All probability is accounted for: `Account` says how much went each way. What the result is not: it takes the teacher's
own way of cutting a text for the only one, and inside one of the teacher's tokens nothing is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from true_kd.alignment.tables import Tables

Way = Literal["align", "uld", "truncate", "project"]
"""How the teacher's distribution comes into the student's vocabulary. `align`: see above. `uld`: its probabilities
alone, sorted (Boizard et al., 2024, arXiv:2402.12030). `truncate`: id by id, whatever they stand for. `project`: each
token to the one of the same spelling, and those without are dropped."""

_BLOCK = 512
"""Tokens whose probabilities are summed up together, to draw from them."""
DEEPEST = 32
"""Teacher's tokens that are asked about one after the other, at most."""

Asked = list[tuple[int, tuple[int, ...]]]
"""Places in the text, as teacher's tokens before them, and what shall follow there instead."""
Answers = Sequence[np.ndarray]
"""Probabilities of the teacher's next token, one array an asked beginning."""


@dataclass
class Account:
    """Where the teacher's probability went at one of the student's tokens; shares that add up to 1."""

    matched: float = 0.0
    """To a token of the student's that spells the same."""
    split: float = 0.0
    """To the first of several tokens that the student spells it with."""
    chained: float = 0.0
    """To tokens that hold several of the teacher's."""
    drawn: float = 0.0
    """To tokens that unlikely beginnings become, some drawn for all."""
    merged: float = 0.0
    """To nothing: the student would have drawn it into its token before."""
    nowhere: float = 0.0
    """To nothing: special tokens that the student has no counterpart of, and padding."""

    def add(self, way: str, mass: float) -> None:
        """Count a share."""
        setattr(self, way, getattr(self, way) + mass)

    def __iadd__(self, other: Account) -> Account:
        for name, mass in vars(other).items():
            self.add(name, mass)
        return self

    def in_shares(self) -> Account:
        """The same, adding up to 1."""
        total = sum(vars(self).values()) or 1.0
        return Account(**{name: mass / total for name, mass in vars(self).items()})

    def shares(self, places: int) -> np.ndarray:
        """float32 [ways], the means over so many places."""
        return np.array(list(vars(self).values()), dtype=np.float32) / max(places, 1)


@dataclass(frozen=True)
class Place:
    """Where one of the student's tokens begins in the teacher's text."""

    index: int
    """Which of the student's tokens."""
    before: int
    """Teacher's tokens that end there or before."""
    inside: bytes
    """What of the teacher's next token the student has written by then; empty where both begin a token."""
    ahead: bytes
    """What the student's token spells before the teacher's first, such as the space that SentencePiece adds."""


class Text:
    """One reply in the tokens of both, and where the student's begin in the teacher's."""

    def __init__(
        self, tables: Tables, theirs: Sequence[int], ours: Sequence[int], shift: int = 0, added: int = 0
    ) -> None:
        """`shift` is how many of the teacher's bytes come before the student's first; below 0 the other way round, and
        then `added` of them are spaces that the student puts in front of any text."""
        self.theirs, self.ours = list(theirs), list(ours)
        self._tables = tables
        self.written = [tables.teacher.written(token) for token in self.theirs]
        """What each of the teacher's tokens adds to the text."""
        our_pieces = [tables.student.written(token) for token in self.ours]
        self._their_ends = np.cumsum([0, *map(len, self.written)])
        self._our_ends = np.cumsum([0, *map(len, our_pieces)])
        self._their_text, self._our_text = b"".join(self.written), b"".join(our_pieces)
        self.places = list(self._places(shift, added))
        """Of the student's tokens that the two texts agree on."""

    @property
    def our_bytes(self) -> int:
        """Bytes that the student's tokens spell."""
        return len(self._our_text)

    def _places(self, shift: int, added: int) -> Generator[Place, None, None]:
        theirs, ours = self._their_text, self._our_text
        alike = _common(ours[max(0, -shift) :], theirs[max(0, shift) :]) + max(0, -shift)
        # After a stretch that the two spell otherwise they are alike again, counted from the end.
        behind = len(theirs) - len(ours)
        after = max(len(ours) - _common(ours[::-1], theirs[::-1]), alike, alike + shift - behind)
        for index in range(len(self.ours)):
            start, stop = int(self._our_ends[index]), int(self._our_ends[index + 1])
            if stop <= alike:
                at = start + shift
            elif start >= after:
                at = start + behind
            else:
                continue
            if stop == start and at != len(theirs):
                continue
            if stop == start:
                before = int(np.searchsorted(self._their_ends, at, side="left"))
            else:
                before = int(np.searchsorted(self._their_ends, at, side="right")) - 1
            if at >= 0:
                if before < len(self.theirs):
                    yield Place(index, before, theirs[int(self._their_ends[before]) : at], b"")
            elif self.theirs and (at + stop > start or at + stop == start < added):
                # What ends before the teacher's first token is known only where it is there in any case.
                yield Place(index, 0, b"", ours[start : start - at])

    def spread(self, place: Place, probs: Callable[[int], np.ndarray], rng: np.random.Generator) -> Spreading:
        """The teacher's distribution over the student's tokens at a place.

        A generator: yields beginnings to ask about, is sent the answers, and returns probabilities, float64 [student
        ids], which add up to 1, and the account of them. `probs` gives the teacher's at each of its tokens, `rng`
        draws from what is unlikely.
        """
        return _Spread(self, self._tables, place, probs, rng).run()

    def label_before(self, place: Place) -> int:
        """The student's token before a place; -1 where there is none, or it is a special one."""
        label = self.ours[place.index - 1] if place.index else -1
        return label if label >= 0 and self._tables.student.pieces[label] else -1


Spreading = Generator[Asked, Answers, tuple[np.ndarray, Account]]


@dataclass(frozen=True)
class _Beginning:
    """The beginning of a text from a place on that the teacher may write."""

    mass: float
    text: bytes
    path: tuple[int, ...]
    """In the teacher's tokens."""
    drawn: bool = False
    """Whether it stands for others."""


class _Spread:
    """The distribution at one place in the making."""

    def __init__(
        self, text: Text, tables: Tables, place: Place, probs: Callable[[int], np.ndarray], rng: np.random.Generator
    ) -> None:
        self._tables = tables
        self._theirs, self._written = text.theirs, text.written
        self._place = place
        self._probs = probs
        self._rng = rng
        self._label = text.ours[place.index]
        self._piece = tables.student.pieces[self._label] or b""
        self._before = text.label_before(place)
        piece = tables.student.pieces[self._before] if self._before >= 0 else None
        # How the teacher writes the student's token before: what follows may still become a longer one.
        self._path_before = tables.teacher.split(piece) if piece and not place.inside else ()
        self._found = np.zeros(tables.student.model.size)
        self._account = Account()

    def run(self) -> Spreading:
        asked = self._choose(self._follow_text())
        for _ in range(DEEPEST):
            if not asked:
                break
            answers = yield [(self._place.before, beginning.path) for beginning in asked]
            deeper: list[_Beginning] = []
            for beginning, probs in zip(asked, answers, strict=True):
                self._branch_off(beginning, probs, deeper)
            asked = self._choose(deeper)
        for beginning in asked:
            self._give(beginning)
        kept = self._found.sum()
        if kept <= 0:  # the text itself is all that is left
            self._found[self._label], kept = 1.0, 1.0
        return self._found / kept, self._account.in_shares()

    def _choose(self, waiting: list[_Beginning]) -> list[_Beginning]:
        """Those that are likely enough to be asked about, and some of the others for all of them."""
        least = self._tables.least
        unlikely = [beginning for beginning in waiting if beginning.mass < least]
        drawn = self._draw(np.array([beginning.mass for beginning in unlikely]), least)
        return [beginning for beginning in waiting if beginning.mass >= least] + [
            replace(unlikely[at], mass=least, drawn=True) for at in drawn
        ]

    def _draw(self, masses: np.ndarray, each: float) -> np.ndarray:
        """Indices of probabilities below `each`, drawn so that those drawn, with `each` instead, have the same mean:
        systematic sampling, which draws as many as belong to the sum, or one more."""
        if not len(masses):
            return np.zeros(0, dtype=np.int64)
        # Sums of blocks first: most of a large vocabulary is never looked at.
        edges = np.arange(0, len(masses), _BLOCK)
        ends = np.cumsum(np.add.reduceat(masses, edges, dtype=np.float64))
        start = self._rng.random()
        points = (np.arange(1, int(ends[-1] / each + start) + 1) - start) * each
        found = []
        for block, point in zip(np.minimum(np.searchsorted(ends, points), len(edges) - 1), points, strict=True):
            inside = np.cumsum(masses[edges[block] : edges[block] + _BLOCK], dtype=np.float64)
            before = ends[block - 1] if block else 0.0
            found.append(edges[block] + min(np.searchsorted(inside, point - before), len(inside) - 1))
        return np.array(found, dtype=np.int64)

    def _follow_text(self) -> list[_Beginning]:
        """Give out what branches off the text until the label is written; returns what is to be asked about."""
        at, place = self._place.before, self._place
        on = _Beginning(1.0, place.ahead, ())
        asked: list[_Beginning] = []
        while at < len(self._theirs):
            probs, realised = self._probs(at), self._theirs[at]
            piece = self._written[at]
            if on.path:
                own = self._branch_off(on, probs, asked, realised)
            elif place.inside:
                own, piece = self._start_inside(probs, realised), piece[len(place.inside) :]
            else:
                own = self._start(probs, realised, asked)
            on = _Beginning(own, on.text + piece, (*on.path, realised))
            at += 1
            if not piece or (len(on.text) >= len(self._piece) and not self._may_grow(on)):
                break
        self._add(self._label, on.mass, self._way_to(self._label, on))
        return asked

    def _start(self, probs: np.ndarray, realised: int, asked: list[_Beginning]) -> float:
        """Where a token of the teacher begins: all of its tokens at once, and the likely ones by themselves."""
        tables = self._tables
        likely = np.flatnonzero(probs >= tables.looked_at)
        rest = probs.copy()
        rest[likely] = 0.0
        rest[realised] = 0.0
        start = _Beginning(1.0, self._place.ahead, ())
        if not self._place.ahead:
            for at in self._draw(rest[tables.growing], tables.looked_at):
                self._decide(start, int(tables.growing[at]), tables.looked_at, asked, drawn=True)
            rest[tables.growing] = 0.0
        # Those that have none are counted last, and left out.
        given = np.bincount(tables.counted_after(self._place.ahead), rest, minlength=len(self._found) + 1)
        self._found += given[:-1]
        matched, nowhere = float(rest[tables.matched].sum()), float(given[-1])
        self._account.matched += matched
        self._account.split += max(0.0, float(rest.sum()) - matched - nowhere)
        self._account.nowhere += nowhere
        for token in likely:
            if token != realised:
                self._decide(start, int(token), float(probs[token]), asked)
        return float(probs[realised])

    def _start_inside(self, probs: np.ndarray, realised: int) -> float:
        """Inside a token of the teacher's: those that agree with the text so far."""
        ids, firsts = self._tables.continuing(self._place.inside)
        others = ids != realised
        mass = float(probs[ids].sum())
        if mass <= 0 or others.all():  # none agrees, or the text is inside the name of a special token
            return 1.0
        shares = probs[ids] / mass
        known = others & (firsts >= 0)
        self._found += np.bincount(firsts[known], shares[known], minlength=len(self._found))
        self._account.split += float(shares[known].sum())
        self._account.nowhere += float(shares[others & (firsts < 0)].sum())
        return float(shares[~others].sum())

    def _branch_off(
        self, on: _Beginning, probs: np.ndarray, asked: list[_Beginning], realised: int | None = None
    ) -> float:
        """Give out how a beginning goes on: the likely tokens by themselves, and some of the others for all of them.
        Returns what is left for the token of the text, where it is on the text."""
        masses, least = on.mass * probs, self._tables.looked_at
        own = 0.0
        if realised is not None:
            own, masses[realised] = float(masses[realised]), 0.0
        likely = np.flatnonzero(masses >= least)
        for token in likely:
            self._decide(on, int(token), float(masses[token]), asked)
        masses[likely] = 0.0
        for token in self._draw(masses, least):
            self._decide(on, int(token), least, asked, drawn=True)
        return own

    def _decide(self, on: _Beginning, token: int, mass: float, asked: list[_Beginning], drawn: bool = False) -> None:
        """Give out the probability of a beginning and one more token, or ask about it."""
        piece = self._tables.teacher.pieces[token]
        is_end = token in self._tables.teacher.stop or not piece
        if is_end and on.path:
            self._give(_Beginning(mass, on.text, on.path, drawn or on.drawn))
        elif is_end:
            self._add(int(self._tables.first[token]), mass, "matched")
        else:
            longer = _Beginning(mass, on.text + piece, (*on.path, token), drawn or on.drawn)
            if self._may_grow(longer):
                asked.append(longer)
            else:
                self._give(longer)

    def _may_grow(self, beginning: _Beginning) -> bool:
        """Whether the student's first token of a beginning depends on how it goes on: it may become a token that the
        teacher lacks, or be cut otherwise."""
        if self._place.inside or self._place.ahead:
            return False
        openings = self._tables.openings
        if beginning.path in openings or (self._path_before and (*self._path_before, *beginning.path) in openings):
            return True
        text, path = beginning.text, beginning.path
        is_broken = self._before >= 0 and self._tables.is_broken(self._before, text, path)
        return is_broken or self._tables.is_recut(text, path)

    def _give(self, beginning: _Beginning) -> None:
        """The probability of a beginning to the token that the student writes it with."""
        if beginning.mass > 0:
            token = self._tables.follow(self._before, beginning.text) if beginning.text else -1
            is_merged = token < 0 and self._tables.first_of(beginning.text) >= 0
            self._add(token, beginning.mass, "merged" if is_merged else self._way_to(token, beginning))

    def _way_to(self, token: int, beginning: _Beginning) -> str:
        """How a beginning comes to one of the student's tokens: by how much of the teacher's first that spells."""
        if beginning.drawn:
            return "drawn"
        first = self._tables.teacher.written(beginning.path[0]) if beginning.path else b""
        rest = len(self._place.ahead) + len(first) - len(self._place.inside)
        spelled = len(self._tables.student.written(token)) if token >= 0 else 0
        return "split" if spelled < rest else "matched" if spelled == rest else "chained"

    def _add(self, token: int, mass: float, way: str) -> None:
        if token < 0:
            self._account.add(way if way == "merged" else "nowhere", mass)
            return
        self._found[token] += mass
        self._account.add(way, mass)


def _common(one: bytes, other: bytes) -> int:
    """Bytes at the beginning of both that are the same."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(np.frombuffer(one[:length], np.uint8) != np.frombuffer(other[:length], np.uint8))
    return int(differing[0]) if len(differing) else length
