"""What goes into the cache comes out bit for bit, and damage costs only the shard that it hit."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from filelock import FileLock

from true_kd import cache as cache_module
from true_kd.cache import CachedReply, CacheIdentity, TargetCache, default_root, reply_key
from true_kd.errors import CacheError
from true_kd.targets import TargetOptions, encode

IDENTITY = CacheIdentity({"teacher": "a" * 64, "stop_ids": [1], "sampling": {"seed": 0}})
VOCAB = 40


def make_reply(seed: int, length: int = 5, finished: str = "stop", draw_temperature: float = 2.0) -> CachedReply:
    rng = np.random.default_rng(seed)
    logits = mx.array(rng.normal(0, 3, (length, VOCAB)).astype(np.float32))
    tokens = rng.integers(0, VOCAB, length).astype(np.int32)
    options = TargetOptions(draw_temperature=draw_temperature)
    uniforms = rng.random(length, dtype=np.float32)
    return CachedReply(tokens, finished, encode(logits, mx.array(tokens), uniforms, options))


def assert_same(found: CachedReply, expected: CachedReply) -> None:
    assert found.finished == expected.finished
    assert found.targets.draw_temperature == expected.targets.draw_temperature
    pairs = {"tokens": (found.tokens, expected.tokens)}
    for name, array in expected.targets.arrays().items():
        pairs[name] = (found.targets.arrays()[name], array)
    for name, (one, other) in pairs.items():
        assert one.dtype == other.dtype, name
        assert one.shape == other.shape, name
        assert one.tobytes() == other.tobytes(), name


def shard_of(cache: TargetCache, key: str) -> Path:
    """The file that holds a reply, as the manifest says."""
    for line in (cache.folder / "manifest.jsonl").read_text().splitlines():
        record = json.loads(line)
        if key in record["keys"]:
            return cache.folder / record["shard"]
    raise AssertionError(f"{key} is not in the manifest")


@pytest.fixture
def two_shards(tmp_path: Path) -> TargetCache:
    """A cache with the replies `a` and `b` in one shard and `c` in another."""
    cache = TargetCache(tmp_path, IDENTITY)
    cache.add({"a": make_reply(1), "b": make_reply(2)})
    cache.add({"c": make_reply(3)})
    return cache


def test_replies_come_back_bit_for_bit(tmp_path: Path) -> None:
    replies = {
        "one token": make_reply(1, 1),
        "ended": make_reply(2, 7),
        "cut": make_reply(3, 20, "length"),
        "given": make_reply(4, 3, "given"),
    }
    TargetCache(tmp_path, IDENTITY).add(replies)
    found = TargetCache(tmp_path, IDENTITY).read(replies)
    assert found.keys() == replies.keys()
    for key, expected in replies.items():
        assert_same(found[key], expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3, 2.0, 10.0])
def test_the_draw_temperature_comes_back_exactly(tmp_path: Path, temperature: float) -> None:
    TargetCache(tmp_path, IDENTITY).add({"a": make_reply(1, draw_temperature=temperature)})
    found = TargetCache(tmp_path, IDENTITY).read(["a"])["a"].targets
    assert found.draw_temperature == temperature


def test_some_replies_of_several_shards_are_read_by_their_keys(two_shards: TargetCache) -> None:
    found = two_shards.read(["c", "b"])
    assert found.keys() == {"b", "c"}
    assert_same(found["b"], make_reply(2))
    assert_same(found["c"], make_reply(3))


def test_an_empty_cache_holds_nothing_and_writes_nothing(tmp_path: Path) -> None:
    assert "a" not in TargetCache(tmp_path, IDENTITY)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_opened_later_sees_what_was_added(two_shards: TargetCache, tmp_path: Path) -> None:
    reopened = TargetCache(tmp_path, IDENTITY)
    assert all(key in reopened for key in "abc")
    assert "d" not in reopened


@pytest.mark.parametrize(
    "facts",
    [
        {"teacher": "b" * 64, "stop_ids": [1], "sampling": {"seed": 0}},
        {"teacher": "a" * 64, "stop_ids": [1, 2], "sampling": {"seed": 0}},
        {"teacher": "a" * 64, "stop_ids": [1], "sampling": {"seed": 1}},
        {"teacher": "a" * 64, "stop_ids": [1], "sampling": {"seed": 0}, "targets": {}},
    ],
)
def test_a_changed_fact_of_the_identity_misses(two_shards: TargetCache, tmp_path: Path, facts: dict) -> None:
    other = TargetCache(tmp_path, CacheIdentity(facts))
    assert not any(key in other for key in "abc")


def test_the_order_of_facts_does_not_matter() -> None:
    assert CacheIdentity(dict(reversed(IDENTITY.facts.items()))).key == IDENTITY.key


def test_files_of_another_format_version_miss(
    two_shards: TargetCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
    assert "a" not in TargetCache(tmp_path, IDENTITY)


def test_the_folder_says_whose_replies_it_holds(two_shards: TargetCache) -> None:
    written = json.loads((two_shards.folder / "identity.json").read_text())
    assert written == {"format": cache_module.FORMAT, **IDENTITY.facts}


def flip(position: float) -> Callable[[Path], None]:
    def damage(shard: Path) -> None:
        content = bytearray(shard.read_bytes())
        content[int(position * (len(content) - 1))] ^= 0x10
        shard.write_bytes(content)

    return damage


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


DAMAGES = {
    "first byte": flip(0.0),
    "a byte in the middle": flip(0.5),
    "last byte": flip(1.0),
    "truncated": truncate,
    "empty": lambda shard: shard.write_bytes(b""),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_shard_counts_as_absent_and_the_other_stays(
    two_shards: TargetCache, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(shard_of(two_shards, "a"))
    reopened = TargetCache(tmp_path, IDENTITY)
    assert "a" not in reopened
    assert "b" not in reopened
    assert "c" in reopened
    assert_same(reopened.read(["c"])["c"], make_reply(3))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_replies_of_a_damaged_shard_can_be_added_again(
    two_shards: TargetCache, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(shard_of(two_shards, "a"))
    TargetCache(tmp_path, IDENTITY).add({"a": make_reply(1), "b": make_reply(2)})
    reopened = TargetCache(tmp_path, IDENTITY)
    assert all(key in reopened for key in "abc")
    assert_same(reopened.read(["b"])["b"], make_reply(2))


def test_a_part_of_a_damaged_shard_can_be_added_again(two_shards: TargetCache, tmp_path: Path) -> None:
    truncate(shard_of(two_shards, "a"))
    TargetCache(tmp_path, IDENTITY).add({"b": make_reply(2)})
    reopened = TargetCache(tmp_path, IDENTITY)
    assert "a" not in reopened
    assert_same(reopened.read(["b"])["b"], make_reply(2))


def test_a_reply_added_again_is_found_though_a_later_shard_that_had_it_is_damaged(tmp_path: Path) -> None:
    cache = TargetCache(tmp_path, IDENTITY)
    cache.add({"a": make_reply(1)})
    cache.add({"a": make_reply(1), "b": make_reply(2)})
    for shard in cache.folder.glob("*.safetensors"):
        truncate(shard)
    TargetCache(tmp_path, IDENTITY).add({"a": make_reply(1)})
    assert "a" in TargetCache(tmp_path, IDENTITY)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_after_a_reply_was_found_is_an_error_when_it_is_read(
    two_shards: TargetCache, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    reopened = TargetCache(tmp_path, IDENTITY)
    assert "a" in reopened
    damage(shard_of(two_shards, "a"))
    with pytest.raises(CacheError, match="captured anew"):
        reopened.read(["a"])


def test_half_a_manifest_line_costs_only_its_own_shard(two_shards: TargetCache, tmp_path: Path) -> None:
    manifest = two_shards.folder / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    reopened = TargetCache(tmp_path, IDENTITY)
    assert "a" in reopened
    assert "b" in reopened
    assert "c" not in reopened


def test_half_a_manifest_line_does_not_spoil_the_next_one(two_shards: TargetCache, tmp_path: Path) -> None:
    manifest = two_shards.folder / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    TargetCache(tmp_path, IDENTITY).add({"d": make_reply(4)})
    reopened = TargetCache(tmp_path, IDENTITY)
    assert [key for key in "abcd" if key in reopened] == ["a", "b", "d"]


@pytest.mark.parametrize("line", [b"null", b"[]", b"3", b'{"shard": "x"}', b"\xff\xfe", b"{", b'{"keys": 1}'])
def test_manifest_lines_that_mean_nothing_are_passed_over(two_shards: TargetCache, tmp_path: Path, line: bytes) -> None:
    manifest = two_shards.folder / "manifest.jsonl"
    manifest.write_bytes(line + b"\n" + manifest.read_bytes())
    reopened = TargetCache(tmp_path, IDENTITY)
    assert all(key in reopened for key in "abc")


def test_a_manifest_line_cannot_name_a_file_outside_the_folder(two_shards: TargetCache, tmp_path: Path) -> None:
    shutil.move(shard_of(two_shards, "c"), tmp_path / "outside.safetensors")
    manifest = two_shards.folder / "manifest.jsonl"
    inside = shard_of(two_shards, "c").name
    manifest.write_text(manifest.read_text().replace(inside, "../outside.safetensors"))
    assert "c" not in TargetCache(tmp_path, IDENTITY)


def test_a_shard_without_a_manifest_line_does_not_exist(two_shards: TargetCache, tmp_path: Path) -> None:
    manifest = two_shards.folder / "manifest.jsonl"
    manifest.write_text(manifest.read_text().splitlines(keepends=True)[0])
    assert "c" not in TargetCache(tmp_path, IDENTITY)


def test_two_caches_open_on_one_folder_lose_nothing_of_each_other(tmp_path: Path) -> None:
    first, second = TargetCache(tmp_path, IDENTITY), TargetCache(tmp_path, IDENTITY)
    first.add({"a": make_reply(1)})
    second.add({"b": make_reply(2)})
    first.add({"c": make_reply(3)})
    reopened = TargetCache(tmp_path, IDENTITY)
    assert all(key in reopened for key in "abc")
    for key, expected in {"a": make_reply(1), "b": make_reply(2), "c": make_reply(3)}.items():
        assert_same(reopened.read([key])[key], expected)


def test_writers_side_by_side_lose_nothing(tmp_path: Path) -> None:
    replies = {f"{writer} {count}": make_reply(10 * writer + count) for writer in range(4) for count in range(5)}

    def write(writer: int) -> None:
        cache = TargetCache(tmp_path, IDENTITY)
        for count in range(5):
            key = f"{writer} {count}"
            cache.add({key: replies[key]})

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reopened = TargetCache(tmp_path, IDENTITY)
    found = reopened.read(replies)
    for key, expected in replies.items():
        assert key in reopened
        assert_same(found[key], expected)


def test_adding_waits_for_another_process_that_adds(two_shards: TargetCache, tmp_path: Path) -> None:
    before = (two_shards.folder / "manifest.jsonl").read_bytes()
    reply = make_reply(4)
    adding = threading.Thread(target=lambda: TargetCache(tmp_path, IDENTITY).add({"d": reply}))
    with FileLock(two_shards.folder / ".lock"):
        adding.start()
        adding.join(timeout=0.3)
        assert (two_shards.folder / "manifest.jsonl").read_bytes() == before
    adding.join()
    assert "d" in TargetCache(tmp_path, IDENTITY)


def test_adding_the_same_replies_twice_keeps_one_file(two_shards: TargetCache, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in two_shards.folder.glob("*.safetensors")}
    TargetCache(tmp_path, IDENTITY).add({"a": make_reply(1), "b": make_reply(2)})
    assert {path.name: path.read_bytes() for path in two_shards.folder.glob("*.safetensors")} == before


def test_the_size_counts_each_shard_once(two_shards: TargetCache) -> None:
    files = two_shards.folder.glob("*.safetensors")
    assert two_shards.size(["a", "b", "c"]) == sum(path.stat().st_size for path in files)
    assert two_shards.size(["a", "b"]) == shard_of(two_shards, "a").stat().st_size


def test_keys_tell_apart_what_the_teacher_is_given() -> None:
    given = [
        ([1, 2], None),
        ([1, 2], []),
        ([1, 2], [3]),
        ([1], [2, 3]),
        ([1, 2, 3], None),
        ([2, 1], None),
        ([12], None),
    ]
    assert len({reply_key(prompt, response) for prompt, response in given}) == len(given)


def test_a_key_is_the_same_for_the_same_tokens() -> None:
    assert reply_key(iter([1, 2]), (3,)) == reply_key([1, 2], [3])


def test_the_variable_names_the_folder_of_all_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUE_KD_CACHE", str(tmp_path / "mine"))
    assert default_root() == tmp_path / "mine"


def test_the_variable_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRUE_KD_CACHE", "~/mine")
    assert default_root() == tmp_path / "mine"


def test_without_the_variable_the_cache_lies_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRUE_KD_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root().is_relative_to(tmp_path)
    assert default_root().name == "true-kd"
