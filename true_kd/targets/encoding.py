"""From the teacher's logits to sparse targets.

Passes over the whole vocabulary are made on the device and give sums over blocks of ids. Which ids are kept follows on
the host from those sums and from the logits of the few blocks that hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int

from true_kd.errors import ModelError
from true_kd.targets.options import TargetSettings
from true_kd.targets.sparse import TAIL_TEMPERATURES, SparseTargets
from true_kd.targets.values import DRAWN_BITS, LOGPROB_BITS, logprob_codes, tail_codes

_BLOCK = 128
"""Ids per block."""

_MOST_DRAWS = 200
"""Draws per token at most, for teachers that are nearly uniform: what lies below the threshold then gets fewer."""

_CHUNK = 2**18
"""Logits that a processor handles at a time, so that the passes over them stay in its cache."""


def encode(
    logits: Float[mx.array, "tokens vocab"],
    labels: Int[mx.array, " tokens"],
    uniforms: np.ndarray,
    settings: TargetSettings,
    is_ranked: bool = False,
) -> SparseTargets:
    """Compress the teacher's logits at some tokens.

    Parameters
    ----------
    logits
        unnormalised, or log-probabilities: only differences along the vocabulary matter.
    labels
        the realised tokens, kept whatever their probability.
    uniforms
        float [tokens] in [0, 1): the random start of each token's systematic sample. The caller derives them from
        what is encoded, so that the same tokens always give the same targets.
    is_ranked
        whether the logits are those of ranks, not of tokens.

    Raises
    ------
    ModelError
        when a token has no finite distribution.
    """
    blocks = _blocked(logits)
    sums = _sum_blocks(blocks, np.array(labels), settings)
    draws, start = sums.draws(settings), uniforms.astype(np.float64)
    rows, places, rests = _find_draws(sums.tails, draws, start)

    # The blocks that hold an exact id (the realised token's among them) or a draw, and their logits.
    wanted, drawn_at = np.unique(
        np.concatenate([np.flatnonzero(sums.exact), rows * sums.exact.shape[1] + places]), return_inverse=True
    )
    drawn_at = drawn_at[np.count_nonzero(sums.exact) :]
    of, block = np.divmod(wanted, sums.exact.shape[1])
    found = np.array(blocks.reshape(-1, _BLOCK)[mx.array(wanted)].astype(mx.float32)).astype(np.float64)
    ids = block[:, None] * _BLOCK + np.arange(_BLOCK)
    exact = (found >= sums.cut[of, None]) | (ids == np.array(labels)[of, None])

    exact_at, exact_place = np.nonzero(exact)
    tail = np.where(exact, 0.0, np.exp((found - sums.top[of, None]) / settings.draw_temperature))
    drawn_place = _find_places(np.cumsum(tail, axis=1), drawn_at, rests)

    at = np.concatenate([exact_at, drawn_at])
    place = np.concatenate([exact_place, drawn_place])
    is_exact = np.arange(len(at)) < len(exact_at)
    rows, ids = of[at], ids[at, place]
    order = np.lexsort((ids, ids != np.array(labels)[rows], rows))  # the realised token comes first in its row
    rows, at, place, is_exact = rows[order], at[order], place[order], is_exact[order]
    kept = found[at, place] - (sums.top + np.log(sums.totals[:, TAIL_TEMPERATURES.index(1.0)]))[rows]
    return SparseTargets(
        offsets=np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(labels)))]).astype(np.int32),
        ids=ids[order].astype(np.int32),
        logprob_codes=_codes(kept, is_exact, rows),
        exact=is_exact,
        tail_codes=tail_codes(np.log(np.maximum(sums.tail_sums(rows, kept, is_exact, settings), 1e-30))),
        draw_temperature=settings.draw_temperature,
        threshold=settings.threshold,
        vocab_size=logits.shape[1],
        is_ranked=is_ranked,
    )


def _find_places(ends: np.ndarray, drawn_at: np.ndarray, rests: np.ndarray) -> np.ndarray:
    """The place in its block of each draw: the first whose cumulative tail reaches `rests`; `ends` is [blocks, ids].

    The device's sums may differ from these in the last place: a draw never goes beyond its block's last tail id.
    """
    last = ends[:, -1]
    share = np.minimum(rests / np.maximum(last[drawn_at], 1e-300), 1.0)
    # All blocks are searched at once: block b of the cumulative sums, scaled to 1, lies from b to b + 1.
    blocks = np.arange(len(ends))
    scaled = np.where(last > 0, 1.0, 0.0)[:, None] * ends / np.maximum(last, 1e-300)[:, None] + blocks[:, None]
    places = np.searchsorted(scaled.ravel(), share + drawn_at) - drawn_at * ends.shape[1]
    return np.clip(places, np.argmax(ends > 0, axis=1)[drawn_at], np.argmax(ends >= last[:, None], axis=1)[drawn_at])


def _codes(kept: np.ndarray, exact: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Codes of log-probabilities, of which the most likely id of a token has the smallest to itself."""
    codes = logprob_codes(kept, exact)
    largest = np.full(rows[-1] + 1, -np.inf)
    np.maximum.at(largest, rows, kept)
    best = kept == largest[rows]
    least = np.full(rows[-1] + 1, 255)
    np.minimum.at(least, rows, codes)
    tied = ~best & (codes == least[rows])
    return codes + np.where(tied, np.where(exact, 1, 1 << LOGPROB_BITS - DRAWN_BITS), 0).astype(np.uint8)


def count_entries(
    logits: Float[mx.array, "tokens vocab"], labels: Int[mx.array, " tokens"], settings: TargetSettings
) -> np.ndarray:
    """Entries that `encode` would keep per token, without drawing them; expected, where the tail is small."""
    sums = _sum_blocks(_blocked(logits), np.array(labels), settings)
    return sums.exact.sum(axis=1) + sums.draws(settings)


def join(parts: Sequence[SparseTargets]) -> SparseTargets:
    """The targets of consecutive stretches of tokens as one."""
    ends = np.cumsum([0] + [part.offsets[-1] for part in parts])
    offsets = [part.offsets[1:] + start for part, start in zip(parts, ends[:-1], strict=True)]
    return replace(
        parts[0],
        offsets=np.concatenate([[0], *offsets]).astype(np.int32),
        **{
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("ids", "logprob_codes", "exact", "tail_codes")
        },
    )


@dataclass(frozen=True)
class _Sums:
    """What passes over the whole vocabulary give; powers of p are relative to the most likely id's."""

    top: np.ndarray
    """float64 [tokens], the largest logit."""
    totals: np.ndarray
    """float64 [tokens, K], sums of p^(1/T) at each of TAIL_TEMPERATURES."""
    cut: np.ndarray
    """float64 [tokens], the least logit that is kept exactly."""
    exact: np.ndarray
    """int [tokens, blocks], exact ids in each block, the realised token among them."""
    tails: np.ndarray
    """float64 [tokens, blocks], sums of p^(1/T) at the draw temperature over the other ids."""

    def draws(self, settings: TargetSettings) -> np.ndarray:
        """float64 [tokens], draws from the tail: its share over the threshold; below 1 the probability of one."""
        total = self.totals[:, TAIL_TEMPERATURES.index(settings.draw_temperature)]
        wanted = self.tails.sum(axis=1) / (settings.threshold * total)
        return np.where(wanted < 1.0, wanted, np.minimum(np.rint(wanted), _MOST_DRAWS))

    def tail_sums(self, rows: np.ndarray, kept: np.ndarray, exact: np.ndarray, settings: TargetSettings) -> np.ndarray:
        """Sums of p^(1/T) over the tail at the stored temperatures, [tokens, K]; `kept` are log-probabilities."""
        shift = np.log(self.totals[:, TAIL_TEMPERATURES.index(1.0)])
        at_draw = self.tails.sum(axis=1) * np.exp(-shift / settings.draw_temperature)
        tails = np.empty_like(self.totals)
        for column, temperature in enumerate(TAIL_TEMPERATURES):
            head = np.bincount(rows, np.where(exact, np.exp(kept / temperature), 0.0), minlength=len(self.top))
            tails[:, column] = self.totals[:, column] * np.exp(-shift / temperature) - head
            if temperature == settings.draw_temperature:
                tails[:, column] = at_draw
        return tails


def _blocked(logits: mx.array) -> mx.array:
    """The logits as [tokens, blocks, _BLOCK], filled up with impossible ids."""
    missing = -logits.shape[1] % _BLOCK
    if missing:
        logits = mx.pad(logits, ((0, 0), (0, missing)), constant_values=-float("inf"))
    return logits.reshape(len(logits), -1, _BLOCK)


def _sum_blocks(blocks: mx.array, labels: np.ndarray, settings: TargetSettings) -> _Sums:
    if mx.default_device() == mx.cpu:
        # numpy's exponential is some ten times as fast as MLX's there.
        dense = np.array(blocks.astype(mx.float32))
        step = max(1, _CHUNK // (dense.shape[1] * _BLOCK))
        with np.errstate(invalid="ignore"):  # what is not finite is refused below
            parts = [_sum_chunk(dense[at : at + step], settings, np) for at in range(0, len(dense), step)]
        top, totals, cut, exact, tails = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    else:
        arrays = _sum_chunk(blocks.astype(mx.float32), settings, mx)
        mx.eval(arrays)
        top, totals, cut, exact, tails = (np.array(array) for array in arrays)
    if not (np.isfinite(top).all() and np.isfinite(totals).all()):
        raise ModelError("teacher: its logits are not finite numbers, expected a distribution. Choose another model.")
    # The realised token is exact whatever its probability.
    rows, block, place = np.arange(len(labels)), labels // _BLOCK, labels % _BLOCK
    own = np.array(blocks[mx.array(rows), mx.array(block), mx.array(place)].astype(mx.float32)).astype(np.float64)
    unlikely = own < cut
    exact, tails = exact.astype(np.int64), tails.astype(np.float64)
    exact[rows[unlikely], block[unlikely]] += 1
    taken = np.exp((own - top) / settings.draw_temperature)[unlikely]
    left = tails[rows[unlikely], block[unlikely]] - taken
    # Less than rounding leaves is nothing: the block has no other tail id.
    tails[rows[unlikely], block[unlikely]] = np.where(left > 1e-6 * taken, left, 0.0)
    return _Sums(top.astype(np.float64), totals.astype(np.float64), cut.astype(np.float64), exact, tails)


def _sum_chunk(logits: Any, settings: TargetSettings, xp: Any) -> tuple[Any, Any, Any, Any, Any]:
    """The arrays of `_Sums`, the realised token not looked at; `xp` is numpy or mlx.core."""
    top = xp.max(logits, axis=(1, 2))
    power = xp.exp((logits - top[:, None, None]) * (1.0 / TAIL_TEMPERATURES[0]))
    totals, softened = [], power
    for temperature in TAIL_TEMPERATURES:
        totals.append(xp.sum(power, axis=(1, 2)))
        if temperature == settings.draw_temperature:
            softened = power
        power = power * power
    totals = xp.stack(totals, axis=1)
    least = [
        temperature * xp.log(settings.threshold * totals[:, TAIL_TEMPERATURES.index(temperature)])
        for temperature in {1.0, settings.draw_temperature}
    ]
    cut = top + (xp.minimum(*least) if len(least) == 2 else least[0])
    exact = logits >= cut[:, None, None]
    tails = xp.sum(xp.where(exact, 0.0, softened), axis=2)
    return top, totals, cut, xp.sum(exact, axis=2), tails


def _find_draws(tails: np.ndarray, draws: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The token and the block of each draw, and how far into the block's tail it lies.

    Systematic sampling: the cumulative tail, scaled to `draws`, is met at every whole number, `start` further on.
    """
    ends = np.cumsum(tails, axis=1)
    mass = ends[:, -1]
    counts = np.where(mass > 0, np.floor(draws + start), 0).astype(np.int64)
    rows = np.repeat(np.arange(len(draws)), counts)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts) + 1
    at = np.minimum((number - start[rows]) / draws[rows], 1.0) * mass[rows]
    # All rows are searched at once: row r of the cumulative sums, scaled to 1, lies from r to r + 1.
    scaled = ends / np.maximum(mass, 1e-300)[:, None] + np.arange(len(draws))[:, None]
    places = np.searchsorted(scaled.ravel(), at / mass[rows] + rows) - rows * tails.shape[1]
    last = tails.shape[1] - 1 - np.argmax(tails[:, ::-1] > 0, axis=1)
    places = np.clip(places, 0, last[rows])
    return rows, places, at - (ends[rows, places] - tails[rows, places])
