"""Unsigned integers of any width, end to end in bytes, least significant bit first; and sorted ids in fewer bits.

Ids that ascend within a row are kept by the code of Elias and Fano (1974): the lower bits as they are, the upper ones
as a bitmap with a one per id. It takes about 2 + log2(limit / count) bits an id, and any row can be read alone.
"""

from __future__ import annotations

import numpy as np

_MOST = 25
"""Widest value: with a shift of up to 7 it still lies within the 4 bytes that are gathered for it."""


def width_of(largest: int) -> int:
    """Bits that hold the numbers from 0 to `largest`; at least 1."""
    return max(1, int(largest).bit_length())


def pack_bits(values: np.ndarray, width: int) -> np.ndarray:
    """Values below 2^width as uint8 [ceil(count * width / 8)].

    Raises
    ------
    ValueError
        when a value does not fit, or `width` is not 1 to 25.
    """
    if not 1 <= width <= _MOST:
        raise ValueError(f"width {width}: expected 1 to {_MOST} bits")
    if values.size and (int(values.min()) < 0 or int(values.max()) >> width):
        raise ValueError(f"values {int(values.min())} to {int(values.max())}: do not fit in {width} bits")
    values = np.ascontiguousarray(values, dtype="<u4")
    bits = np.unpackbits(values.view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
    return np.packbits(bits[:, :width].ravel(), bitorder="little")


def unpack_bits(packed: np.ndarray, width: int, start: int, count: int) -> np.ndarray:
    """Values `start` to `start + count` as uint32; only the bytes they lie in are read.

    Raises
    ------
    ValueError
        when `packed` is too short to hold them.
    """
    if not 1 <= width <= _MOST:
        raise ValueError(f"width {width}: expected 1 to {_MOST} bits")
    if start < 0 or count < 0:
        raise ValueError(f"{count} values from {start}: expected numbers of 0 or more")
    if (start + count) * width > 8 * len(packed):
        raise ValueError(f"{len(packed)} bytes: too few for {start + count} values of {width} bits")
    at = start * width + np.arange(count, dtype=np.int64) * width
    return _gather(packed, at, np.full(count, width)).astype(np.uint32)


def pack_sorted(ids: np.ndarray, counts: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids below `limit`, never descending within a row, as two streams of bits, uint8: lower and upper bits.

    `counts` [rows] says how many ids each row has.
    """
    widths = _lower_widths(counts, limit)
    each = np.repeat(widths, counts)
    starts = np.cumsum(each) - each
    of = np.repeat(np.arange(len(ids)), each)
    bits = ids[of] >> (np.arange(len(of)) - starts[of]) & 1
    ends = np.cumsum(_upper_lengths(counts, widths, limit))
    upper = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    upper[_places(counts, widths, limit) + (ids >> each)] = 1
    return np.packbits(bits.astype(np.uint8), bitorder="little"), np.packbits(upper, bitorder="little")


def unpack_sorted(
    lower: np.ndarray, upper: np.ndarray, counts: np.ndarray, limit: int, start: int, stop: int
) -> np.ndarray:
    """The ids of rows `start` to `stop`, int64 end to end; `counts` are those of all rows.

    Raises
    ------
    ValueError
        when the streams are too short, or do not hold as many ids as `counts` says.
    """
    if counts.sum() > 8 * len(upper):
        raise ValueError(f"{len(upper)} bytes: too few for {counts.sum()} ids")
    widths = _lower_widths(counts, limit)
    lengths = _upper_lengths(counts, widths, limit)
    mine, each = counts[start:stop], np.repeat(widths[start:stop], counts[start:stop])
    first = int(np.sum(widths[:start] * counts[:start]))
    low = _gather(lower, first + np.cumsum(each) - each, each)
    first_bit, last_bit = int(lengths[:start].sum()), int(lengths[:stop].sum())
    if last_bit > 8 * len(upper):
        raise ValueError(f"{len(upper)} bytes: too few for {last_bit} bits")
    bits = np.unpackbits(upper[first_bit // 8 : -(-last_bit // 8)], bitorder="little")[first_bit % 8 :]
    ones = np.flatnonzero(bits[: last_bit - first_bit])
    if len(ones) != mine.sum():
        raise ValueError(f"{len(ones)} ids, expected {mine.sum()}")
    ids = (ones - _places(mine, widths[start:stop], limit) << each) + low
    if len(ids) and not 0 <= ids.min() <= ids.max() < limit:
        raise ValueError(f"an id beyond the {limit} of the vocabulary")
    return ids


def _lower_widths(counts: np.ndarray, limit: int) -> np.ndarray:
    """Lower bits of the ids of each row: those of limit / count."""
    return np.floor(np.log2(np.maximum(limit / np.maximum(counts, 1), 1.0))).astype(np.int64)


def _upper_lengths(counts: np.ndarray, widths: np.ndarray, limit: int) -> np.ndarray:
    """Bits of each row's bitmap: a one per id, and a zero per step of the upper bits."""
    return np.where(counts > 0, counts + (limit - 1 >> widths), 0)


def _places(counts: np.ndarray, widths: np.ndarray, limit: int) -> np.ndarray:
    """Where in the bitmaps, laid end to end, each id's one would stand if its upper bits were 0."""
    lengths = _upper_lengths(counts, widths, limit)
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(np.cumsum(lengths) - lengths, counts) + within


def _gather(packed: np.ndarray, at: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Values of `widths` bits that start at the bits `at`, which ascend; int64."""
    if not len(at):
        return np.zeros(0, dtype=np.int64)
    first, last = int(at[0]) // 8, -(-int(at[-1] + widths[-1]) // 8)
    if last > len(packed):
        raise ValueError(f"{len(packed)} bytes: too few for {int(at[-1] + widths[-1])} bits")
    window = np.zeros(last - first + 4, dtype=np.int64)
    window[: last - first] = packed[first:last]
    byte, shift = (at >> 3) - first, at & 7
    words = window[byte] | window[byte + 1] << 8 | window[byte + 2] << 16 | window[byte + 3] << 24
    return words >> shift & (1 << widths) - 1
