"""A shard gives back every bit of what it was given, reads no more than it must, and damage in it has one shape."""

from __future__ import annotations

import contextlib
import json
import mmap
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load, save

from true_kd.files import digest_json
from true_kd.shards import CachedReply, estimate_bytes, pack_replies, read_keys, unpack_replies
from true_kd.targets import HiddenTargets, SparseTargets, TargetOptions, TeacherHead, TeacherTargets, encode
from true_kd.targets.sparse import TAIL_TEMPERATURES
from true_kd.targets.values import TAIL_BITS, logprob_codes

VOCAB = 40
KINDS = {
    "all tails": {},
    "the draw's tail": {"preset": "tiny"},
    "hot": {"preset": "hot"},
    "another threshold": {"threshold": 0.1, "draw_temperature": 1.0},
    "half of the tokens": {"share": 0.5},
    "half of the tokens, the draw's tail": {"share": 0.5, "preset": "tiny"},
    "hidden": {"preset": "exact"},
    "half of the tokens, hidden": {"share": 0.5, "preset": "exact"},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())


def key_of(name: object) -> str:
    """A key such as replies have."""
    return digest_json(name)[:32]


def make_reply(seed: int, length: int = 5, finished: str = "stop", **options: Any) -> CachedReply:
    """A reply of random tokens with the targets of a random teacher."""
    chosen = TargetOptions(**options).settings
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, length).astype(np.int32)
    if chosen.kind == "hidden":
        targets: TeacherTargets = HiddenTargets(rng.normal(0, 3, (length, 24)).astype(np.float16), None)
    else:
        logits = mx.array(rng.normal(0, 3, (length, VOCAB)).astype(np.float32))
        targets = encode(logits, mx.array(tokens), rng.random(length, dtype=np.float32), chosen)
    kept = np.sort(rng.permutation(length)[: max(1, round(chosen.share * length))]).astype(np.int32)
    return CachedReply(tokens, finished, targets.take(kept) if chosen.share < 1 else targets, kept)


def assert_same(found: CachedReply, expected: CachedReply) -> None:
    """Every field equal to the bit, of the same type and shape."""
    assert found.finished == expected.finished
    assert type(found.targets) is type(expected.targets)
    pairs = {name: (getattr(found, name), getattr(expected, name)) for name in ("tokens", "kept")}
    for field in fields(expected.targets):
        if field.name != "head":
            pairs[field.name] = (getattr(found.targets, field.name), getattr(expected.targets, field.name))
    for name, (one, other) in pairs.items():
        if isinstance(other, np.ndarray):
            assert one.dtype == other.dtype, name
            assert one.shape == other.shape, name
            assert one.tobytes() == other.tobytes(), name
        else:
            assert type(one) is type(other), name
            assert one == other, name


def mapped(folder: Path, payload: bytes) -> np.ndarray:
    """The bytes of a shard as the cache hands them over."""
    (folder / "shard.safetensors").write_bytes(payload)
    return np.memmap(folder / "shard.safetensors", dtype=np.uint8, mode="r")


def round_trip(folder: Path, replies: Mapping[str, CachedReply]) -> dict[str, CachedReply]:
    return unpack_replies(mapped(folder, pack_replies(replies)), replies, None)


# Round trips


@every_kind
def test_replies_come_back_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    replies = {
        key_of("one token"): make_reply(1, 1, **options),
        key_of("ended"): make_reply(2, 7, **options),
        key_of("cut"): make_reply(3, 64, "length", **options),
        key_of("one token, given"): make_reply(4, 1, "given", **options),
        key_of("long"): make_reply(5, 300, "given", **options),
        key_of("two tokens"): make_reply(6, 2, "length", **options),
    }
    found = round_trip(tmp_path, replies)
    assert found.keys() == replies.keys()
    for key, expected in replies.items():
        assert_same(found[key], expected)


@every_kind
@pytest.mark.parametrize("finished", ["stop", "length", "given"])
def test_a_reply_of_one_token_comes_back(tmp_path: Path, options: dict[str, Any], finished: str) -> None:
    reply = make_reply(1, 1, finished, **options)
    assert_same(round_trip(tmp_path, {key_of(1): reply})[key_of(1)], reply)


@every_kind
def test_any_of_the_replies_can_be_read_in_any_order(tmp_path: Path, options: dict[str, Any]) -> None:
    replies = {key_of(seed): make_reply(seed, 1 + 5 * seed, **options) for seed in range(8)}
    content = mapped(tmp_path, pack_replies(replies))
    for wanted in ([5, 2, 7], [0], [7], [3, 3], list(reversed(range(8)))):
        found = unpack_replies(content, [key_of(seed) for seed in wanted], None)
        assert found.keys() == {key_of(seed) for seed in wanted}
        for seed in wanted:
            assert_same(found[key_of(seed)], replies[key_of(seed)])


@st.composite
def shards(draw: st.DrawFn) -> dict[str, CachedReply]:
    """Replies of one cache: any lengths, any tokens kept, any values that an encoder could give."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    vocab = draw(st.sampled_from([1, 2, 3, 127, 128, 320, 65_536, 65_537, 151_936, 2**25]))
    hidden, width = draw(st.booleans()), draw(st.integers(1, 9))
    most = draw(st.sampled_from([1, 3, 9, 200]))
    numbers = {
        "draw_temperature": draw(st.sampled_from([1.0, 2.0, 4.0])),
        "threshold": draw(st.floats(0.001, 0.5)),
        "vocab_size": vocab,
    }
    replies = {}
    for number, length in enumerate(draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))):
        count = draw(st.integers(0, length))
        kept = np.sort(rng.permutation(length)[:count]).astype(np.int32)
        tokens = rng.integers(0, vocab, length).astype(np.int32)
        if hidden:
            states = rng.integers(0, 2**16, (count, width), dtype=np.uint16).view(np.float16)
            states[~np.isfinite(states)] = 0
            targets: TeacherTargets = HiddenTargets(states, None)
        else:
            targets = sparse_rows(rng, tokens[kept], most, numbers)
        replies[key_of(number)] = CachedReply(tokens, draw(st.sampled_from(["stop", "length", "given"])), targets, kept)
    return replies


def sparse_rows(rng: np.random.Generator, labels: np.ndarray, most: int, numbers: dict[str, Any]) -> SparseTargets:
    """Rows of up to `most` entries: the label, which is exact, and others by ascending id, some drawn twice."""
    rows = []
    for label in labels:
        ids = np.unique(rng.integers(0, numbers["vocab_size"], rng.integers(1, most + 1)))
        ids = ids[ids != label]
        exact = rng.random(len(ids)) < 0.5
        codes = logprob_codes(rng.uniform(-45, 0, len(ids)), exact)
        times = np.where(exact, 1, rng.integers(1, 3, len(ids)))
        own = logprob_codes(rng.uniform(-45, 0, 1), np.array([True]))
        parts = (([label], ids), (own, codes), ([True], exact))
        rows.append([np.concatenate([first, np.repeat(rest, times)]) for first, rest in parts])
    ids, codes, exact = ([row[column] for row in rows] for column in range(3))
    return SparseTargets(
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int32),
        ids=np.concatenate([[], *ids]).astype(np.int32),
        logprob_codes=np.concatenate([[], *codes]).astype(np.uint8),
        exact=np.concatenate([[], *exact]).astype(bool),
        tail_codes=rng.integers(0, 2**TAIL_BITS, (len(labels), len(TAIL_TEMPERATURES)), dtype=np.uint16),
        **numbers,
    )


@settings(max_examples=80, deadline=None)
@given(replies=shards())
def test_whatever_the_arrays_hold_comes_back(replies: dict[str, CachedReply]) -> None:
    found = unpack_replies(np.frombuffer(pack_replies(replies), dtype=np.uint8), replies, None)
    for key, expected in replies.items():
        assert_same(found[key], expected)


@pytest.mark.parametrize("preset", ["default", "exact"])
def test_tokens_without_targets_come_back_too(tmp_path: Path, preset: str) -> None:
    reply = make_reply(1, 50, share=0.1, preset=preset)
    found = round_trip(tmp_path, {key_of(1): reply})[key_of(1)]
    assert len(found.kept) == len(found.targets) == 5
    assert found.tokens.tolist() == reply.tokens.tolist()


def test_the_head_goes_to_hidden_targets(tmp_path: Path) -> None:
    replies = {key_of(1): make_reply(1, preset="exact")}
    head = TeacherHead(lambda states: states)
    [found] = unpack_replies(mapped(tmp_path, pack_replies(replies)), replies, head).values()
    assert found.targets.head is head


def test_the_same_replies_give_the_same_bytes() -> None:
    one, other = ({key_of(seed): make_reply(seed) for seed in range(3)} for _ in range(2))
    assert pack_replies(one) == pack_replies(other)


@pytest.mark.parametrize("finished", ["", "given up"])
def test_a_reply_that_ended_in_an_unknown_way_is_refused(finished: str) -> None:
    with pytest.raises(ValueError, match="in tuple"):
        pack_replies({key_of(1): make_reply(1, finished=finished)})


# What is on disk


@every_kind
def test_a_shard_is_a_safetensors_file(tmp_path: Path, options: dict[str, Any]) -> None:
    replies = {key_of(seed): make_reply(seed, 9, **options) for seed in range(3)}
    mapped(tmp_path, pack_replies(replies))
    with safe_open(tmp_path / "shard.safetensors", framework="numpy") as opened:
        layout = json.loads(opened.metadata()["layout"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    assert (layout["replies"], layout["tokens"]) == (3, 27)
    assert layout["kind"] == ("hidden" if options.get("preset") == "exact" else "sparse")
    assert tensors["keys"].tobytes().hex() == "".join(replies)


@pytest.mark.parametrize("options", [{}, {"preset": "tiny"}, {"preset": "hot"}, {"share": 0.4}], ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.0, 6.0])
def test_a_shard_is_as_large_as_it_was_estimated(options: dict[str, Any], scale: float) -> None:
    chosen = TargetOptions(**options).settings
    rng, vocab, length, count = np.random.default_rng(5), 5000, 64, 32
    replies, entries = {}, []
    for number in range(count):
        logits = mx.array(rng.normal(0, scale, (length, vocab)).astype(np.float32))
        tokens = np.array(mx.random.categorical(logits, key=mx.random.key(number))).astype(np.int32)
        targets = encode(logits, mx.array(tokens), rng.random(length, dtype=np.float32), chosen)
        kept = np.arange(max(1, round(chosen.share * length)), dtype=np.int32)
        replies[key_of(number)] = CachedReply(tokens, "stop", targets.take(kept), kept)
        entries.append(len(replies[key_of(number)].targets.ids) / len(kept))
    found = len(pack_replies(replies)) / (count * length)
    assert found == pytest.approx(estimate_bytes(np.mean(entries), chosen, vocab, length, count), rel=0.1)


def test_realised_tokens_are_not_stored_twice() -> None:
    assert "tokens" not in load(pack_replies({key_of(1): make_reply(1, 50)}))


def test_hidden_targets_take_two_bytes_a_number() -> None:
    tensors = load(pack_replies({key_of(1): make_reply(1, 50, preset="exact")}))
    assert tensors["states"].nbytes == 50 * 24 * 2
    assert tensors["tokens"].nbytes == -(-50 * 6 // 8)


# Reading no more than is wanted


def test_hidden_states_stay_in_the_file(tmp_path: Path) -> None:
    replies = {key_of(seed): make_reply(seed, 20, preset="exact") for seed in range(3)}
    for found in round_trip(tmp_path, replies).values():
        for states in (
            found.targets.states,
            found.targets.first(7).states,
            found.targets.with_ids(np.arange(9)).states,
        ):
            assert isinstance(states, np.memmap)
            assert not states.flags.owndata
            assert not states.flags.writeable
            base = states
            while isinstance(base, np.ndarray):
                base = base.base
            assert isinstance(base, mmap.mmap)


def peak_of(read: Callable[[], object]) -> int:
    """Bytes that numpy and Python hold at most while `read` runs."""
    tracemalloc.start()
    try:
        kept = read()
        _, peak = tracemalloc.get_traced_memory()
        del kept
    finally:
        tracemalloc.stop()
    return peak


def test_reading_a_reply_of_hidden_states_does_not_load_the_shard(tmp_path: Path) -> None:
    states = np.zeros((1000, 2048), dtype=np.float16)
    tokens = np.arange(1000, dtype=np.int32)
    reply = CachedReply(tokens, "stop", HiddenTargets(states, None), tokens)
    content = mapped(tmp_path, pack_replies({key_of(seed): reply for seed in range(4)}))
    assert len(content) > 16_000_000
    assert peak_of(lambda: unpack_replies(content, [key_of(2)], None)) < 500_000


def test_reading_a_sparse_reply_does_not_unpack_the_shard(tmp_path: Path) -> None:
    one = make_reply(1, 2000, threshold=0.005)
    content = mapped(tmp_path, pack_replies({key_of(seed): one for seed in range(40)}))
    assert len(content) > 4_000_000
    # Whole, its entries alone would be 16 MB.
    assert peak_of(lambda: unpack_replies(content, [key_of(3)], None)) < 5 * len(content)


def test_reading_makes_no_array_of_tokens_by_vocabulary(tmp_path: Path) -> None:
    vocab, rng = 151_936, np.random.default_rng(1)
    tokens = rng.integers(0, vocab, 500).astype(np.int32)
    targets = sparse_rows(rng, tokens, 30, {"vocab_size": vocab, "draw_temperature": 2.0, "threshold": 0.02})
    reply = CachedReply(tokens, "stop", targets, np.arange(500, dtype=np.int32))
    content = mapped(tmp_path, pack_replies({key_of(seed): reply for seed in range(4)}))
    assert peak_of(lambda: unpack_replies(content, [key_of(seed) for seed in range(4)], None)) < 500 * vocab / 10


# Damage


def test_the_keys_are_read_in_their_order(tmp_path: Path) -> None:
    replies = {key_of(seed): make_reply(seed) for seed in (3, 1, 2)}
    mapped(tmp_path, pack_replies(replies))
    assert read_keys(tmp_path / "shard.safetensors") == list(replies)


def test_there_are_no_keys_in_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert read_keys(tmp_path / "nowhere") == []
    assert read_keys(tmp_path) == []


def test_a_key_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(REFUSALS, match=key_of(2)):
        unpack_replies(mapped(tmp_path, pack_replies({key_of(1): make_reply(1)})), [key_of(2)], None)


GOOD = {key_of(seed): make_reply(seed, 4 + seed, share=0.6) for seed in range(3)}
HIDDEN = {key_of(seed): make_reply(seed, 4 + seed, preset="exact") for seed in range(3)}


def altered(payload: bytes, alter: Callable[[dict[str, Any], dict[str, Any]], Any]) -> bytes:
    """A shard whose header and layout (the numbers of the packing) `alter` has changed in place, or replaced."""
    size = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + size])
    layout = json.loads(header["__metadata__"]["layout"])
    other = alter(header, layout)
    if other is None:
        header["__metadata__"]["layout"] = json.dumps(layout)
    text = json.dumps(header if other is None else other).encode() if not isinstance(other, bytes) else other
    return len(text).to_bytes(8, "little") + text + payload[8 + size :]


def with_layout(text: str) -> Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]:
    return lambda header, layout: {**header, "__metadata__": {"layout": text}}


def with_numbers(**numbers: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda header, layout: layout.update(numbers)


def without_number(name: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda header, layout: layout.pop(name) and None


def with_tensor(name: str, **entry: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda header, layout: header[name].update(entry)


def without_tensor(name: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda header, layout: header.pop(name) and None


BAD_HEADERS: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "no header": lambda header, layout: b"",
    "half a header": lambda header, layout: b'{"keys": {"dtype"',
    "bytes that are no text": lambda header, layout: b"\xff\xfe{}",
    "a header that is null": lambda header, layout: b"null",
    "a header that is a number": lambda header, layout: b"3",
    "a header that is a text": lambda header, layout: b'"header"',
    "a header that is a list": lambda header, layout: [header],
    "a header without end": lambda header, layout: b"[" * 100_000,
    "no metadata": lambda header, layout: {name: entry for name, entry in header.items() if name[0] != "_"},
    "metadata that is a list": lambda header, layout: {**header, "__metadata__": []},
    "no layout": lambda header, layout: {**header, "__metadata__": {}},
    "a layout that is no text": lambda header, layout: {**header, "__metadata__": {"layout": 3}},
    "a layout that is no JSON": with_layout("{"),
    "a layout that is a number": with_layout("3"),
    "a layout that is a list": with_layout("[]"),
    "a layout that is null": with_layout("null"),
    "a layout without end": with_layout("[" * 100_000),
    "a tensor that is a number": lambda header, layout: {**header, "keys": 3},
    "a tensor that is a list": lambda header, layout: {**header, "keys": []},
    "an empty tensor": lambda header, layout: {**header, "keys": {}},
}
BAD_ENTRIES: dict[str, dict[str, Any]] = {
    "an unknown dtype": {"dtype": "F32"},
    "a dtype that is a list": {"dtype": ["U8"]},
    "a shape that is a text": {"shape": "7"},
    "a shape without bounds": {"shape": [2**70]},
    "a shape of more than there is": {"shape": [2**45]},
    "offsets beyond the end": {"data_offsets": [2**40, 2**41]},
    "offsets without bounds": {"data_offsets": [2**70, 2**71]},
    "offsets that are fractions": {"data_offsets": [0.5, 2.5]},
    "offsets that are a number": {"data_offsets": 3},
    "three offsets": {"data_offsets": [0, 1, 2]},
    "no offsets": {"data_offsets": []},
}
BAD_NUMBERS = [None, [], {}, "3", 1.5, -1, 0, 1, 64, 2**45, 2**63, 2**70, float("nan"), float("inf"), -float("inf")]


def hostile_shards(payload: bytes) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Shards made of a good one that cannot be read, and such as may make sense by chance; what is wrong, and bytes."""
    size = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + size])
    numbers = json.loads(header.pop("__metadata__")["layout"])
    senseless = dict(BAD_HEADERS)
    for name in header:
        senseless[f"no {name}"] = without_tensor(name)
        senseless |= {f"{name}: {fault}": with_tensor(name, **entry) for fault, entry in BAD_ENTRIES.items()}
    doubtful = {f"no {name}": without_number(name) for name in numbers}
    for name in numbers:
        doubtful |= {f"{name}: {value}": with_numbers(**{name: value}) for value in BAD_NUMBERS}
        for other in numbers:
            if "bits" in other:
                doubtful[f"many {name}, no {other}"] = with_numbers(**{name: 2**45, other: 0})
    doubtful["nothing"] = with_numbers(replies=0, tokens=0, rows=0)
    return tuple({name: altered(payload, alter) for name, alter in cases.items()} for cases in (senseless, doubtful))


REFUSALS = (KeyError, ValueError, TypeError)
both_kinds = pytest.mark.parametrize("replies", [GOOD, HIDDEN], ids=["sparse", "hidden"])


def what_escapes(read: Callable[[bytes], object], payloads: Mapping[str, bytes], refusals: tuple) -> dict[str, str]:
    """How shards end that are neither read nor refused as they should be."""
    found = {}
    for name, payload in payloads.items():
        try:
            read(payload)
        except refusals:
            continue
        except (Exception, MemoryError) as error:  # noqa: BLE001 - whatever it is
            found[name] = type(error).__name__
    return found


def unpack(payload: bytes) -> dict[str, CachedReply]:
    return unpack_replies(np.frombuffer(payload, dtype=np.uint8), GOOD, None)


@both_kinds
def test_a_hostile_shard_is_read_or_refused_as_documented(replies: dict[str, CachedReply]) -> None:
    senseless, doubtful = hostile_shards(pack_replies(replies))
    assert what_escapes(unpack, senseless | doubtful, REFUSALS) == {}


@both_kinds
def test_a_senseless_shard_is_not_read(replies: dict[str, CachedReply]) -> None:
    senseless, _ = hostile_shards(pack_replies(replies))
    read = []
    for name, payload in senseless.items():
        with contextlib.suppress(Exception):
            unpack(payload)
            read.append(name)
    assert read == []


@both_kinds
def test_the_keys_of_a_hostile_shard_do_no_harm(tmp_path: Path, replies: dict[str, CachedReply]) -> None:
    path = tmp_path / "shard"

    def keys(payload: bytes) -> None:
        path.write_bytes(payload)
        assert set(read_keys(path)) <= set(GOOD)

    senseless, doubtful = hostile_shards(pack_replies(replies))
    assert what_escapes(keys, senseless | doubtful, ()) == {}


@pytest.mark.parametrize(
    "numbers",
    [
        {"replies": 2},
        {"replies": 4},
        {"rows": 0},
        {"rows": 5},
        {"kind": "hidden"},
        {"tokens": 14},
        {"tokens": 16},
    ],
    ids=str,
)
def test_numbers_that_contradict_each_other_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(REFUSALS):
        unpack(altered(pack_replies(GOOD), with_numbers(**numbers)))


def test_states_of_fewer_tokens_are_refused() -> None:
    with pytest.raises(REFUSALS):
        unpack(altered(pack_replies(HIDDEN), with_tensor("states", shape=[2, 24], data_offsets=[0, 96])))


SPARSE_SHARD = pack_replies(GOOD)


@both_kinds
def test_no_beginning_of_a_shard_passes_for_the_whole(replies: dict[str, CachedReply]) -> None:
    payload = pack_replies(replies)
    for length in range(0, len(payload), 3):
        with pytest.raises(REFUSALS):
            unpack(payload[:length])


# None between 2^20 and 2^45: what asks for so much memory should fail, not get it.
NUMBERS = st.sampled_from([-1, 0, 1, 3, 7, 25, 26, 32, 33, 64, 1000, 2**20, 2**45, 2**63, 2**64, 2**70])
VALUES = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=3), st.just([]), st.just({}), st.lists(NUMBERS)
)


@st.composite
def hostile_bytes(draw: st.DrawFn, payload: bytes) -> bytes:
    """A shard with some of its header's values replaced, or some of its header's bytes."""
    size = int.from_bytes(payload[:8], "little")
    if draw(st.booleans()):
        content = bytearray(payload)
        for _ in range(draw(st.integers(1, 3))):
            content[draw(st.integers(0, 7 + size))] = draw(st.integers(0, 255))
        return bytes(content)

    def alter(header: dict[str, Any], layout: dict[str, Any]) -> None:
        for _ in range(draw(st.integers(1, 2))):
            place = draw(st.sampled_from([layout, *(entry for name, entry in header.items() if name[0] != "_")]))
            place[draw(st.sampled_from(sorted(place)))] = draw(VALUES)

    return altered(payload, alter)


@settings(max_examples=300, deadline=None)
@example(payload=altered(pack_replies(GOOD), with_numbers(replies=0, tokens=0)))
@given(payload=st.one_of(hostile_bytes(SPARSE_SHARD), hostile_bytes(pack_replies(HIDDEN))))
def test_a_header_of_any_content_is_read_or_refused_as_documented(payload: bytes) -> None:
    with contextlib.suppress(*REFUSALS):
        unpack(payload)


def test_a_file_of_the_safetensors_library_is_no_shard() -> None:
    with pytest.raises(REFUSALS):
        unpack(save({"weight": np.zeros(3)}))


# Targets in another vocabulary than the teacher's


def test_where_the_probability_went_is_kept_with_each_reply() -> None:
    shares = [np.array([0.5, 0.25, 0.125, 0.125, 0, 0], dtype=np.float32), np.array([1, 0, 0, 0, 0, 0], np.float32)]
    replies = {key_of(at): replace(make_reply(at), account=account) for at, account in enumerate(shares)}
    found = unpack_replies(np.frombuffer(pack_replies(replies), dtype=np.uint8), list(replies)[::-1], None)
    for key, reply in replies.items():
        np.testing.assert_array_equal(found[key].account, reply.account)
        assert_same(found[key], reply)


def test_replies_of_one_vocabulary_have_no_account() -> None:
    replies = {key_of(1): make_reply(1)}
    assert (
        unpack_replies(np.frombuffer(pack_replies(replies), dtype=np.uint8), replies, None)[key_of(1)].account is None
    )


def test_ranks_stay_ranks() -> None:
    reply = make_reply(1)
    replies = {key_of(1): replace(reply, targets=replace(reply.targets, is_ranked=True))}
    found = unpack_replies(np.frombuffer(pack_replies(replies), dtype=np.uint8), replies, None)
    assert_same(found[key_of(1)], replies[key_of(1)])
    assert found[key_of(1)].targets.is_ranked


def test_a_reply_may_have_targets_at_some_of_its_tokens_and_at_none() -> None:
    reply = make_reply(1)
    none = np.zeros(0, dtype=np.int32)
    replies = {key_of(1): reply, key_of(2): replace(reply, targets=reply.targets.take(none), kept=none)}
    found = unpack_replies(np.frombuffer(pack_replies(replies), dtype=np.uint8), replies, None)
    assert found[key_of(2)].tokens.tolist() == reply.tokens.tolist()
    assert (len(found[key_of(2)].targets), len(found[key_of(2)].kept)) == (0, 0)


def test_shares_that_are_no_numbers_are_damage() -> None:
    replies = {key_of(1): replace(make_reply(1), account=np.full(6, np.nan, dtype=np.float32))}
    with pytest.raises(ValueError, match="shares that are not finite"):
        unpack_replies(np.frombuffer(pack_replies(replies), dtype=np.uint8), replies, None)
