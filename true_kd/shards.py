"""One file of the cache: replies and their targets as safetensors, packed to the bit.

Arrays of all replies lie end to end, with their lengths; the realised tokens are the first entries of their rows and
are not stored again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from true_kd.files import open_plain
from true_kd.targets import (
    HiddenTargets,
    SparseTargets,
    TargetSettings,
    TeacherHead,
    TeacherTargets,
    join,
    pack_bits,
    pack_sorted,
    unpack_bits,
    unpack_sorted,
    width_of,
)
from true_kd.targets.sparse import TAIL_TEMPERATURES
from true_kd.targets.values import DRAWN_BITS, LOGPROB_BITS, TAIL_BITS, from_drawn, to_drawn

_FINISHED = ("stop", "length", "given")
_KEY_BYTES = 16


@dataclass(frozen=True)
class CachedReply:
    """What the teacher said to one prompt, and its distribution at the tokens of it that count."""

    tokens: np.ndarray
    """int32 [N], the stop token included when the reply ended by itself."""
    finished: str
    """`stop`, `length` (cut at max_tokens) or `given` (the data's own completion)."""
    targets: TeacherTargets
    """Of M tokens."""
    kept: np.ndarray
    """int32 [M], ascending: the tokens that the targets are of; all of them unless `targets.share` is below 1, or the
    teacher cuts the text otherwise."""
    account: np.ndarray | None = None
    """float32 [1 + ways]: the share of the tokens at which the teacher's distribution could be mapped into the
    student's vocabulary, and where its probability went there, means over these tokens (`alignment.Account`); None
    where nothing had to be mapped."""


def pack_replies(replies: Mapping[str, CachedReply]) -> bytes:
    """A shard's bytes; keys are 32 hexadecimal digits."""
    items = list(replies.values())
    lengths = np.array([len(item.tokens) for item in items])
    mask = np.concatenate([np.isin(np.arange(len(item.tokens)), item.kept) for item in items])
    tokens = np.concatenate([item.tokens for item in items])
    numbers = {"replies": len(items), "tokens": len(tokens), "length_bits": width_of(int(lengths.max()))}
    tensors = {
        "keys": np.frombuffer(bytes.fromhex("".join(replies)), dtype=np.uint8),
        "finished": np.array([_FINISHED.index(item.finished) for item in items], dtype=np.uint8),
        "lengths": pack_bits(lengths, numbers["length_bits"]),
    }
    stored = ~mask
    if isinstance(items[0].targets, SparseTargets):
        targets = join([item.targets for item in items if len(item.targets)] or [items[0].targets])
        _pack_sparse(targets, numbers, tensors)
    else:
        tensors["states"] = np.concatenate([item.targets.states for item in items])
        numbers["kind"], stored = "hidden", np.ones_like(mask)
    accounts = [item.account for item in items if item.account is not None]
    if accounts:
        numbers["ways"] = len(accounts[0])
        tensors["accounts"] = np.concatenate(accounts).astype(np.float16)
    if not mask.all():
        tensors["mask"] = pack_bits(mask, 1)
    if stored.any():
        numbers["token_bits"] = width_of(int(tokens.max()))
        tensors["tokens"] = pack_bits(tokens[stored], numbers["token_bits"])
    return save(tensors, metadata={"layout": json.dumps(numbers, separators=(",", ":"))})


def _pack_sparse(targets: SparseTargets, numbers: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    counts = np.diff(targets.offsets)
    order = np.lexsort((targets.ids, targets.rows))
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    label_places = places[targets.offsets[:-1]] - targets.offsets[:-1]
    exact, codes = targets.exact[order], targets.logprob_codes[order]
    lower, upper = pack_sorted(targets.ids[order].astype(np.int64), counts, targets.vocab_size)
    numbers |= {
        "kind": "sparse",
        "rows": len(targets),
        "count_bits": width_of(int(counts.max(initial=0))),
        "vocab_size": targets.vocab_size,
        "draw_temperature": targets.draw_temperature,
        "threshold": targets.threshold,
    }
    if targets.is_ranked:
        numbers["ranked"] = 1
    tensors |= {
        "counts": pack_bits(counts, numbers["count_bits"]),
        "label_places": pack_bits(label_places, numbers["count_bits"]),
        "ids_lower": lower,
        "ids_upper": upper,
        "exact": pack_bits(exact, 1),
        "exact_logprobs": codes[exact],
        "drawn_logprobs": pack_bits(to_drawn(codes[~exact]), DRAWN_BITS),
        "tails": pack_bits(targets.tail_codes.ravel(), TAIL_BITS),
    }


def estimate_bytes(
    entries: float, settings: TargetSettings, vocab_size: int, reply_tokens: float, shard_replies: int
) -> float:
    """Bytes per response token of a shard of sparse targets with that many entries per kept token."""
    ids = width_of(vocab_size - 1)
    id_bits = min(ids, 2 + math.log2(vocab_size / entries))
    value_bits = min(entries, 2.0) * LOGPROB_BITS + max(entries - 2.0, 0.0) * DRAWN_BITS
    row = entries * (id_bits + 1) + value_bits + 2 * width_of(round(2 * entries)) + len(TAIL_TEMPERATURES) * TAIL_BITS
    share = max(settings.share, min(1.0, 1.0 / reply_tokens))  # one token of each reply at least
    token = share * row + (0.0 if share == 1.0 else 1 + (1 - share) * ids)
    reply = _KEY_BYTES + 1 + width_of(round(2 * reply_tokens)) / 8
    return token / 8 + (reply + _HEADER_BYTES / shard_replies) / reply_tokens


_HEADER_BYTES = 1000
"""A shard's header and its line in the manifest, about."""


def read_keys(path: Path) -> list[str]:
    """The keys of a shard in their order, unverified; none where there is no such file, or it is no shard.

    Raises
    ------
    CannotRead
        when it is there, and cannot be read.
    """
    try:
        with open_plain(path) as opened:
            tensors, numbers = _map_tensors(np.memmap(opened, dtype=np.uint8, mode="r"))
        return _keys(tensors["keys"], numbers["replies"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def unpack_replies(content: np.ndarray, keys: Iterable[str], head: TeacherHead | None) -> dict[str, CachedReply]:
    """Some replies of a shard, whose bytes are `content` (uint8, mapped into memory).

    `head` goes to targets that are hidden states; they stay on disk until they are used.

    Raises
    ------
    KeyError, ValueError, TypeError
        when the content is not a shard's, or lacks a key.
    """
    tensors, numbers = _map_tensors(content)
    place = {key: index for index, key in enumerate(_keys(tensors["keys"], numbers["replies"]))}
    finished = tensors["finished"]
    if len(finished) != len(place) or finished.max(initial=0) >= len(_FINISHED):
        raise ValueError("replies without an end")
    lengths = unpack_bits(tensors["lengths"], numbers["length_bits"], 0, len(place)).astype(np.int64)
    ends = np.cumsum(lengths)
    if lengths.sum() != numbers["tokens"]:
        raise ValueError(f"{lengths.sum()} tokens, expected {numbers['tokens']}")
    mask = np.ones(numbers["tokens"], dtype=bool)
    if "mask" in tensors:
        mask = unpack_bits(tensors["mask"], 1, 0, numbers["tokens"]).astype(bool)
    rows = np.concatenate([[0], np.cumsum(mask)])
    reader = _SparseReader(tensors, numbers) if numbers["kind"] == "sparse" else None
    if rows[-1] != (numbers["rows"] if reader else len(tensors["states"])):
        raise ValueError(f"targets of another number of tokens than {rows[-1]}")
    accounts = tensors["accounts"].reshape(len(place), numbers["ways"]) if "accounts" in tensors else None
    if accounts is not None and not np.isfinite(accounts).all():
        raise ValueError("shares that are not finite numbers")
    found = {}
    for key in keys:
        index = place[key]
        start, stop = int(ends[index] - lengths[index]), int(ends[index])
        kept = np.flatnonzero(mask[start:stop]).astype(np.int32)
        tokens = np.zeros(stop - start, dtype=np.int32)
        if reader is not None:
            targets: TeacherTargets = reader.read(int(rows[start]), int(rows[stop]))
            tokens[kept] = targets.labels
            loose, first = ~mask[start:stop], start - int(rows[start])
        else:
            states = tensors["states"][rows[start] : rows[stop]]
            # A few rows at a time: a mask of all of them would be gigabytes.
            if not all(np.isfinite(states[at : at + 64]).all() for at in range(0, len(states), 64)):
                raise ValueError("hidden states that are not finite numbers")
            targets = HiddenTargets(states, head)
            loose, first = np.ones(stop - start, dtype=bool), start
        if loose.any():
            tokens[loose] = unpack_bits(tensors["tokens"], numbers["token_bits"], first, int(loose.sum()))
        account = accounts[index].astype(np.float32) if accounts is not None else None
        found[key] = CachedReply(tokens, _FINISHED[int(finished[index])], targets, kept, account)
    return found


class _SparseReader:
    """The rows of a shard's sparse targets, unpacked where they are wanted."""

    def __init__(self, tensors: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> None:
        self._tensors, self._numbers = tensors, numbers
        rows, bits = numbers["rows"], numbers["count_bits"]
        self._counts = unpack_bits(tensors["counts"], bits, 0, rows).astype(np.int64)
        self._label_places = unpack_bits(tensors["label_places"], bits, 0, rows).astype(np.int64)
        if (self._label_places >= self._counts).any():
            raise ValueError("a token without its own entry")
        self._ends = np.concatenate([[0], np.cumsum(self._counts)])
        # Exact entries before each byte of the flags, which say where an entry's log-probability lies.
        self._exact_before = np.concatenate([[0], np.cumsum(np.bitwise_count(tensors["exact"]), dtype=np.int64)])

    def read(self, start: int, stop: int) -> SparseTargets:
        first, last = int(self._ends[start]), int(self._ends[stop])
        tensors, numbers, limit = self._tensors, self._numbers, int(self._numbers["vocab_size"])
        ids = unpack_sorted(tensors["ids_lower"], tensors["ids_upper"], self._counts, limit, start, stop)
        exact = unpack_bits(tensors["exact"], 1, first, last - first).astype(bool)
        offsets = self._ends[start : stop + 1] - first
        before = int(self._exact_before[first // 8])
        before += int(unpack_bits(tensors["exact"], 1, first - first % 8, first % 8).sum())
        codes = np.zeros(last - first, dtype=np.uint8)
        codes[exact] = tensors["exact_logprobs"][before : before + int(exact.sum())]
        drawn = unpack_bits(tensors["drawn_logprobs"], DRAWN_BITS, first - before, int((~exact).sum()))
        codes[~exact] = from_drawn(drawn)
        # The realised token comes first in its row.
        labels = offsets[:-1] + self._label_places[start:stop]
        is_label = np.zeros(last - first, dtype=bool)
        is_label[labels] = True
        order = np.lexsort((~is_label, np.repeat(np.arange(stop - start), self._counts[start:stop])))
        knots = len(TAIL_TEMPERATURES)
        tails = unpack_bits(tensors["tails"], TAIL_BITS, start * knots, (stop - start) * knots)
        return SparseTargets(
            offsets=offsets.astype(np.int32),
            ids=ids[order].astype(np.int32),
            logprob_codes=codes[order],
            exact=exact[order],
            tail_codes=tails.reshape(-1, knots).astype(np.uint16),
            draw_temperature=float(numbers["draw_temperature"]),
            threshold=float(numbers["threshold"]),
            vocab_size=limit,
            is_ranked=bool(numbers.get("ranked", 0)),
        )


def _keys(flat: np.ndarray, count: int) -> list[str]:
    if flat.ndim != 1 or len(flat) != _KEY_BYTES * count:
        raise ValueError(f"keys of {len(flat)} bytes, expected {count} of {_KEY_BYTES}")
    text = flat.tobytes().hex()
    return [text[at : at + 2 * _KEY_BYTES] for at in range(0, len(text), 2 * _KEY_BYTES)]


_DTYPES = {"U8": np.uint8, "F16": np.float16}


def _map_tensors(content: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Views of a safetensors file's tensors, and the numbers that say how they are packed.

    The safetensors library reads whole tensors into memory, which for hidden states is gigabytes.

    Raises
    ------
    KeyError, ValueError, TypeError
        when it is no such file, or its header contradicts itself.
    """
    size = int.from_bytes(content[:8].tobytes(), "little")
    if size > len(content) - 8:
        raise ValueError(f"a header of {size} bytes in a file of {len(content)}")
    try:
        header = json.loads(content[8 : 8 + size].tobytes())
        numbers = json.loads(header.pop("__metadata__")["layout"])
    except (RecursionError, AttributeError) as error:
        raise ValueError("a header that is not a shard's") from error
    _check_numbers(numbers, 8 * len(content))
    tensors = {}
    for name, entry in header.items():
        (start, stop), shape, dtype = entry["data_offsets"], entry["shape"], np.dtype(_DTYPES[entry["dtype"]])
        if not all(type(value) is int and 0 <= value <= len(content) for value in (start, stop, *shape)):
            raise ValueError(f"{name}: numbers out of bounds")
        if math.prod(shape) * dtype.itemsize != stop - start or 8 + size + stop > len(content):
            raise ValueError(f"{name}: {stop - start} bytes for the shape {shape}")
        if len(shape) != (2 if name == "states" else 1):
            raise ValueError(f"{name}: the shape {shape}")
        tensors[name] = content[8 + size + start : 8 + size + stop].view(dtype).reshape(shape)
    return tensors, numbers


_KINDS = ("sparse", "hidden")
_MOST_IDS = 2**25
"""Largest vocabulary that a shard may claim."""


def _check_numbers(numbers: Mapping[str, Any], bits: int) -> None:
    """Raise ValueError where a number cannot be that of a shard of so many bits."""
    if not isinstance(numbers, dict) or numbers.get("kind") not in _KINDS:
        raise ValueError("targets of an unknown kind")
    for name, value in numbers.items():
        if name == "kind":
            continue
        if name in ("draw_temperature", "threshold"):
            if type(value) not in (int, float) or not 0 < value <= max(TAIL_TEMPERATURES):
                raise ValueError(f"{name}: {value!r}")
            continue
        most = _MOST_IDS if name == "vocab_size" else bits
        if type(value) is not int or not 0 <= value <= most:
            raise ValueError(f"{name}: {value!r}, expected a number up to {most}")
    if numbers["kind"] == "sparse" and numbers["draw_temperature"] not in TAIL_TEMPERATURES:
        raise ValueError(f"draw_temperature: {numbers['draw_temperature']!r}")
