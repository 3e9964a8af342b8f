"""What goes into the cache comes out bit for bit, damage and kills cost what they hit, and the key holds what counts.

The last part is the table of what changes the key of a reply and what does not, each case made on a real model folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import TEMPLATE
from filelock import FileLock
from hypothesis import example, given, settings
from test_shards import (
    GOOD,
    altered,
    assert_same,
    hostile_bytes,
    hostile_shards,
    key_of,
    make_reply,
    peak_of,
    what_escapes,
    with_numbers,
)

from true_kd import cache as cache_module
from true_kd.cache import CacheIdentity, TargetCache, default_root, reply_key
from true_kd.capture import render_for, teacher_identity
from true_kd.errors import CacheError
from true_kd.jobs import plan
from true_kd.manifest import parse_line, read_manifest
from true_kd.shards import CachedReply, pack_replies, read_keys
from true_kd.targets import HiddenTargets, TargetOptions
from true_kd.teacher import Teacher

IDENTITY = CacheIdentity({"teacher": "a" * 64, "targets": {"kind": "sparse"}})
A, B, C, D = (key_of(name) for name in "abcd")


def shard_of(cache: TargetCache, key: str) -> Path:
    """The whole file that holds a reply."""
    [found] = [cache.folder / name for name in read_manifest(cache.folder) if key in read_keys(cache.folder / name)]
    return found


def present(root: Path, keys: Iterable[str] = (A, B, C, D), identity: CacheIdentity = IDENTITY) -> list[str]:
    """The keys that a cache opened now has."""
    cache = TargetCache(root, identity)
    return [key for key in keys if key in cache]


@pytest.fixture
def two_shards(tmp_path: Path) -> TargetCache:
    """A cache with the replies A and B in one shard and C in another."""
    cache = TargetCache(tmp_path, IDENTITY)
    cache.add({A: make_reply(1), B: make_reply(2)})
    cache.add({C: make_reply(3)})
    return cache


def test_replies_come_back_bit_for_bit(tmp_path: Path) -> None:
    replies = {
        key_of("one token"): make_reply(1, 1),
        key_of("ended"): make_reply(2, 7),
        key_of("cut"): make_reply(3, 20, "length"),
        key_of("given"): make_reply(4, 3, "given"),
    }
    TargetCache(tmp_path, IDENTITY).add(replies)
    found = TargetCache(tmp_path, IDENTITY).read(replies)
    assert found.keys() == replies.keys()
    for key, expected in replies.items():
        assert_same(found[key], expected)


def test_some_replies_of_several_shards_are_read_by_their_keys(two_shards: TargetCache) -> None:
    found = two_shards.read([C, B])
    assert found.keys() == {B, C}
    assert_same(found[B], make_reply(2))
    assert_same(found[C], make_reply(3))


def test_hidden_states_are_read_from_the_file_when_they_are_used(tmp_path: Path) -> None:
    states, tokens = np.zeros((2000, 2048), dtype=np.float16), np.arange(2000, dtype=np.int32)
    reply = CachedReply(tokens, "stop", HiddenTargets(states, None), tokens)
    TargetCache(tmp_path, IDENTITY).add({A: reply, B: reply})
    cache = TargetCache(tmp_path, IDENTITY)
    assert cache.size([A]) > 16_000_000
    assert isinstance(cache.read([A])[A].targets.states, np.memmap)
    assert peak_of(lambda: TargetCache(tmp_path, IDENTITY).read([B])) < 1_000_000


def test_an_empty_cache_holds_nothing_and_writes_nothing(tmp_path: Path) -> None:
    assert present(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_cache_opened_later_sees_what_was_added(two_shards: TargetCache, tmp_path: Path) -> None:
    assert present(tmp_path) == [A, B, C]


@pytest.mark.parametrize(
    "facts",
    [
        {"teacher": "b" * 64, "targets": {"kind": "sparse"}},
        {"teacher": "a" * 64, "targets": {"kind": "hidden"}},
        {"teacher": "a" * 64, "targets": {"kind": "sparse", "share": 1.0}},
        {"teacher": "a" * 64},
        {"teacher": "a" * 64, "targets": {"kind": "sparse"}, "adapter": None},
    ],
)
def test_a_changed_fact_of_the_identity_misses(two_shards: TargetCache, tmp_path: Path, facts: dict) -> None:
    assert present(tmp_path, identity=CacheIdentity(facts)) == []


def test_the_order_of_facts_does_not_matter() -> None:
    assert CacheIdentity(dict(reversed(IDENTITY.facts.items()))).key == IDENTITY.key


def test_what_is_noted_for_people_is_no_part_of_the_identity(two_shards: TargetCache, tmp_path: Path) -> None:
    named = replace(IDENTITY, about={"teacher": "another name"})
    assert present(tmp_path, identity=named) == [A, B, C]
    (two_shards.folder / "about.json").unlink()
    assert present(tmp_path) == [A, B, C]


def test_files_of_another_format_version_miss(
    two_shards: TargetCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
    assert present(tmp_path) == []


def test_the_folder_says_whose_replies_it_holds(two_shards: TargetCache) -> None:
    written = json.loads((two_shards.folder / "identity.json").read_text())
    assert written == {"format": cache_module.FORMAT, **IDENTITY.facts}


def test_the_manifest_counts_what_is_there(two_shards: TargetCache) -> None:
    files = read_manifest(two_shards.folder).values()
    assert [(file.replies, file.tokens) for file in files] == [(2, 10), (1, 5)]


def test_reading_changes_no_file(two_shards: TargetCache, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in two_shards.folder.iterdir()}
    TargetCache(tmp_path, IDENTITY).read([A, C])
    assert {path.name: path.read_bytes() for path in two_shards.folder.iterdir()} == before


# Damage


def flip(position: float) -> Callable[[Path], None]:
    def damage(shard: Path) -> None:
        content = bytearray(shard.read_bytes())
        content[int(position * (len(content) - 1))] ^= 0x10
        shard.write_bytes(content)

    return damage


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


def make_folder_of(shard: Path) -> None:
    shard.unlink()
    shard.mkdir()


DAMAGES = {
    "first byte": flip(0.0),
    "a byte of the header": flip(0.2),
    "a byte in the middle": flip(0.5),
    "last byte": flip(1.0),
    "truncated": truncate,
    "a byte too many": lambda shard: shard.write_bytes(shard.read_bytes() + b"\0"),
    "only its beginning": lambda shard: shard.write_bytes(shard.read_bytes()[:7]),
    "zeros": lambda shard: shard.write_bytes(bytes(shard.stat().st_size)),
    "empty": lambda shard: shard.write_bytes(b""),
    "deleted": Path.unlink,
}
every_damage = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())


@every_damage
def test_a_damaged_shard_counts_as_absent_and_the_other_stays(
    two_shards: TargetCache, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(shard_of(two_shards, A))
    assert present(tmp_path) == [C]
    assert_same(TargetCache(tmp_path, IDENTITY).read([C])[C], make_reply(3))


@every_damage
def test_replies_of_a_damaged_shard_can_be_added_again(
    two_shards: TargetCache, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    before = {path.name: path.read_bytes() for path in two_shards.folder.glob("*.safetensors")}
    damage(shard_of(two_shards, A))
    TargetCache(tmp_path, IDENTITY).add({A: make_reply(1), B: make_reply(2)})
    assert present(tmp_path) == [A, B, C]
    assert {path.name: path.read_bytes() for path in two_shards.folder.glob("*.safetensors")} == before


def test_a_shard_is_written_anew_not_over_the_old_one(two_shards: TargetCache, tmp_path: Path) -> None:
    """Another process may have it mapped into memory."""
    shard = shard_of(two_shards, A)
    truncate(shard)
    damaged = shard.read_bytes()
    with shard.open("rb") as held:
        TargetCache(tmp_path, IDENTITY).add({A: make_reply(1), B: make_reply(2)})
        assert held.read() == damaged
    assert shard.read_bytes() != damaged


@every_damage
def test_damage_after_a_reply_was_found_is_an_error_when_it_is_read(
    two_shards: TargetCache, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    reopened = TargetCache(tmp_path, IDENTITY)
    assert A in reopened
    damage(shard_of(two_shards, A))
    with pytest.raises(CacheError, match="captured anew"):
        reopened.read([A])
    assert_same(reopened.read([C])[C], make_reply(3))


def test_a_folder_in_place_of_a_shard_counts_as_absent(two_shards: TargetCache, tmp_path: Path) -> None:
    make_folder_of(shard_of(two_shards, A))
    assert present(tmp_path) == [C]


def test_a_part_of_a_damaged_shard_can_be_added_again(two_shards: TargetCache, tmp_path: Path) -> None:
    truncate(shard_of(two_shards, A))
    TargetCache(tmp_path, IDENTITY).add({B: make_reply(2)})
    assert present(tmp_path) == [B, C]
    assert_same(TargetCache(tmp_path, IDENTITY).read([B])[B], make_reply(2))


def test_a_reply_added_again_is_found_though_a_later_shard_that_had_it_is_damaged(tmp_path: Path) -> None:
    cache = TargetCache(tmp_path, IDENTITY)
    cache.add({A: make_reply(1)})
    cache.add({A: make_reply(1), B: make_reply(2)})
    for shard in cache.folder.glob("*.safetensors"):
        truncate(shard)
    TargetCache(tmp_path, IDENTITY).add({A: make_reply(1)})
    assert present(tmp_path) == [A]


@every_damage
@pytest.mark.parametrize("damaged", [0, 1], ids=["the earlier", "the later"])
def test_a_reply_of_two_shards_is_there_while_one_of_them_is_whole(
    tmp_path: Path, damage: Callable[[Path], None], damaged: int
) -> None:
    cache = TargetCache(tmp_path, IDENTITY)
    cache.add({A: make_reply(1), B: make_reply(2)})
    cache.add({A: make_reply(1), C: make_reply(3)})
    damage([shard_of(cache, B), shard_of(cache, C)][damaged])
    assert present(tmp_path) == [[A, C], [A, B]][damaged]
    assert_same(TargetCache(tmp_path, IDENTITY).read([A])[A], make_reply(1))


def forge(cache: TargetCache, payload: bytes) -> None:
    """Put other bytes in the place of the only shard, and their digest into the manifest."""
    [file] = read_manifest(cache.folder).values()
    (cache.folder / file.name).write_bytes(payload)
    forged = replace(file, sha256=hashlib.sha256(payload).hexdigest())
    (cache.folder / "manifest.jsonl").write_bytes(forged.line(cache.folder.name))
    cache.refresh()


@pytest.fixture(scope="module")
def forged(tmp_path_factory: pytest.TempPathFactory) -> TargetCache:
    """A cache of one shard, to be forged again and again."""
    cache = TargetCache(tmp_path_factory.mktemp("forged"), IDENTITY)
    cache.add(GOOD)
    return cache


def test_a_shard_whose_digest_is_right_and_whose_content_is_not_is_read_or_a_cache_error(forged: TargetCache) -> None:
    def read(payload: bytes) -> None:
        forge(forged, payload)
        forged.read(GOOD)

    senseless, doubtful = hostile_shards(pack_replies(GOOD))
    assert what_escapes(read, senseless | doubtful, (CacheError,)) == {}


@settings(max_examples=100, deadline=None)
@example(payload=altered(pack_replies(GOOD), with_numbers(replies=0, tokens=0)))
@given(payload=hostile_bytes(pack_replies(GOOD)))
def test_any_content_with_a_right_digest_is_read_or_a_cache_error(forged: TargetCache, payload: bytes) -> None:
    forge(forged, payload)
    with contextlib.suppress(CacheError):
        forged.read(GOOD)


# The manifest


def test_half_a_manifest_line_costs_only_its_own_shard(two_shards: TargetCache, tmp_path: Path) -> None:
    manifest = two_shards.folder / "manifest.jsonl"
    whole = manifest.read_bytes()
    second = whole.index(b"\n") + 1
    for length in range(second, len(whole) - 1):
        manifest.write_bytes(whole[:length])
        assert present(tmp_path) == [A, B]
    manifest.write_bytes(whole[:-1])
    assert present(tmp_path) == [A, B, C]


@pytest.mark.parametrize("missing", [1, 20, 100])
def test_half_a_manifest_line_does_not_spoil_the_next_one(
    two_shards: TargetCache, tmp_path: Path, missing: int
) -> None:
    manifest = two_shards.folder / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-missing])
    TargetCache(tmp_path, IDENTITY).add({D: make_reply(4)})
    assert present(tmp_path) == ([A, B, C, D] if missing == 1 else [A, B, D])


def line_of(record: dict[str, Any], key: str = IDENTITY.folder_name) -> bytes:
    """A manifest line with a right check, whatever it says."""
    canonical = json.dumps({"cache": key, **record}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    check = hashlib.sha256(canonical.encode(errors="surrogatepass")).hexdigest()[:16]
    return json.dumps({**record, "check": check}).encode()


GOOD_LINE = {"file": "0123456789abcdef.safetensors", "sha256": "0" * 64, "replies": 1, "tokens": 5}
SENSELESS = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"3",
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "without end": b"[" * 100_000,
    "another object": b'{"shard": "x"}',
    **{
        f"{name}: {value!r}"[:40]: line_of({**GOOD_LINE, name: value})
        for name, values in {
            "file": [
                None, 3, "", ".", "..", "x", "../0123456789abcdef.safetensors", "/tmp/0123456789abcdef.safetensors",
                "sub/0123456789abcdef.safetensors", "0123456789abcdef.safetensors\n", "0123456789ABCDEF.safetensors",
                "manifest.jsonl", "identity.json", "\0.safetensors", "\ud800",
            ],
            "sha256": [None, 3, "", "0" * 63, "0" * 65, "G" * 64, "A" * 64, []],
            "replies": [None, "1", 1.0, True, -1, float("inf"), float("nan"), 2**70],
            "tokens": [None, "1", 1.0, False, -1, [], 2**70],
        }.items()
        for value in values
    },
}  # fmt: skip


def test_a_manifest_line_comes_back_as_it_was() -> None:
    key = IDENTITY.folder_name
    file = parse_line(line_of(GOOD_LINE), key)
    assert file is not None
    assert file.line(key) == line_of(GOOD_LINE) + b"\n"
    assert parse_line(line_of({**GOOD_LINE, "file": "head.safetensors"}), key) is not None


def test_a_manifest_line_of_another_cache_counts_for_nothing(two_shards: TargetCache, tmp_path: Path) -> None:
    """The keys of replies do not know their teacher: another teacher's shards would pass for this one's."""
    other = CacheIdentity({**IDENTITY.facts, "teacher": "b" * 64})
    shutil.copytree(two_shards.folder, tmp_path / other.folder_name)
    assert present(tmp_path, identity=other) == []
    assert parse_line(line_of(GOOD_LINE), other.folder_name) is None


@pytest.mark.parametrize("line", SENSELESS.values(), ids=SENSELESS.keys())
def test_manifest_lines_that_mean_nothing_are_passed_over(two_shards: TargetCache, tmp_path: Path, line: bytes) -> None:
    assert parse_line(line, IDENTITY.folder_name) is None
    manifest = two_shards.folder / "manifest.jsonl"
    manifest.write_bytes(line + b"\n" + manifest.read_bytes())
    assert present(tmp_path) == [A, B, C]


def test_a_manifest_line_cannot_name_a_file_outside_the_folder(two_shards: TargetCache, tmp_path: Path) -> None:
    inside = shard_of(two_shards, C)
    shutil.move(inside, tmp_path / "fedcba9876543210.safetensors")
    manifest = two_shards.folder / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace(inside.name, "../fedcba9876543210.safetensors"))
    assert present(tmp_path) == [A, B]


def test_a_shard_without_a_manifest_line_does_not_exist(two_shards: TargetCache, tmp_path: Path) -> None:
    manifest = two_shards.folder / "manifest.jsonl"
    manifest.write_text(manifest.read_text().splitlines(keepends=True)[0])
    assert present(tmp_path) == [A, B]


def test_a_manifest_line_without_its_shard_is_a_miss(two_shards: TargetCache, tmp_path: Path) -> None:
    manifest = two_shards.folder / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes() + line_of(GOOD_LINE) + b"\n")
    assert present(tmp_path) == [A, B, C]


# The teacher's output head


def test_the_head_is_written_once(tmp_path: Path) -> None:
    written = []

    def write(path: Path) -> None:
        written.append(path)
        path.write_bytes(b"a head")

    cache = TargetCache(tmp_path, IDENTITY)
    assert cache.head_path is None
    cache.add_head(write)
    cache.add_head(write)
    TargetCache(tmp_path, IDENTITY).add_head(write)
    assert len(written) == 1
    found = TargetCache(tmp_path, IDENTITY).head_path
    assert found == cache.head_path == cache.folder / "head.safetensors"
    assert found.read_bytes() == b"a head"


@every_damage
def test_a_damaged_head_is_no_head_and_is_written_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    TargetCache(tmp_path, IDENTITY).add_head(lambda path: path.write_bytes(b"a long enough head"))
    damage(tmp_path / IDENTITY.folder_name / "head.safetensors")
    cache = TargetCache(tmp_path, IDENTITY)
    assert cache.head_path is None
    cache.add_head(lambda path: path.write_bytes(b"a new head"))
    assert TargetCache(tmp_path, IDENTITY).head_path.read_bytes() == b"a new head"


def test_the_head_is_no_shard(two_shards: TargetCache, tmp_path: Path) -> None:
    """Not even one that could be read as such."""
    two_shards.add_head(lambda path: path.write_bytes(pack_replies({D: make_reply(4)})))
    assert present(tmp_path) == [A, B, C]


# Several writers


def test_two_caches_open_on_one_folder_lose_nothing_of_each_other(tmp_path: Path) -> None:
    first, second = TargetCache(tmp_path, IDENTITY), TargetCache(tmp_path, IDENTITY)
    first.add({A: make_reply(1)})
    second.add({B: make_reply(2)})
    first.add({C: make_reply(3)})
    assert present(tmp_path) == [A, B, C]
    for key, expected in {A: make_reply(1), B: make_reply(2), C: make_reply(3)}.items():
        assert_same(TargetCache(tmp_path, IDENTITY).read([key])[key], expected)


def test_what_others_have_added_is_seen_when_asked_for(tmp_path: Path) -> None:
    first, second = TargetCache(tmp_path, IDENTITY), TargetCache(tmp_path, IDENTITY)
    first.add({A: make_reply(1)})
    assert A not in second
    second.refresh()
    assert A in second
    assert_same(second.read([A])[A], make_reply(1))


def test_what_others_have_mended_is_seen_when_asked_for(two_shards: TargetCache, tmp_path: Path) -> None:
    truncate(shard_of(two_shards, A))
    reopened = TargetCache(tmp_path, IDENTITY)
    assert A not in reopened
    TargetCache(tmp_path, IDENTITY).add({A: make_reply(1), B: make_reply(2)})
    reopened.refresh()
    assert A in reopened
    assert_same(reopened.read([A])[A], make_reply(1))


def test_what_others_have_removed_is_missed_when_asked_for(two_shards: TargetCache, tmp_path: Path) -> None:
    reopened = TargetCache(tmp_path, IDENTITY)
    manifest = two_shards.folder / "manifest.jsonl"
    manifest.write_text(manifest.read_text().splitlines(keepends=True)[0])
    reopened.refresh()
    assert [key for key in (A, B, C) if key in reopened] == [A, B]


def test_replies_that_another_finished_in_another_order_can_still_be_read(tmp_path: Path) -> None:
    """One name, other bytes: the shard that is read is no longer the one that was written."""
    first, second = TargetCache(tmp_path, IDENTITY), TargetCache(tmp_path, IDENTITY)
    first.add({A: make_reply(1), B: make_reply(2)})
    second.add({B: make_reply(2), A: make_reply(1)})
    for cache in (first, second):
        assert_same(cache.read([A])[A], make_reply(1))


def test_replies_that_another_rounded_otherwise_can_still_be_read(tmp_path: Path) -> None:
    """Another batch size or device gives other last bits; either is the teacher's."""
    first, second = TargetCache(tmp_path, IDENTITY), TargetCache(tmp_path, IDENTITY)
    one, other = make_reply(1, 5), make_reply(2, 5)
    first.add({A: one})
    second.add({A: other})
    assert_same(first.read([A])[A], one)
    assert_same(second.read([A])[A], other)


def test_writers_side_by_side_lose_nothing(tmp_path: Path) -> None:
    replies = {key_of([writer, count]): make_reply(10 * writer + count) for writer in range(4) for count in range(5)}

    def write(writer: int) -> None:
        cache = TargetCache(tmp_path, IDENTITY)
        for count in range(5):
            key = key_of([writer, count])
            cache.add({key: replies[key]})

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert present(tmp_path, replies) == list(replies)
    for key, found in TargetCache(tmp_path, IDENTITY).read(replies).items():
        assert_same(found, replies[key])


def test_adding_waits_for_another_process_that_adds(two_shards: TargetCache, tmp_path: Path) -> None:
    before = (two_shards.folder / "manifest.jsonl").read_bytes()
    reply = make_reply(4)
    adding = threading.Thread(target=lambda: TargetCache(tmp_path, IDENTITY).add({D: reply}))
    with FileLock(two_shards.folder / ".lock"):
        adding.start()
        adding.join(timeout=0.3)
        assert (two_shards.folder / "manifest.jsonl").read_bytes() == before
    adding.join()
    assert present(tmp_path) == [A, B, C, D]


def test_adding_the_same_replies_twice_keeps_one_file(two_shards: TargetCache, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in two_shards.folder.glob("*.safetensors")}
    TargetCache(tmp_path, IDENTITY).add({A: make_reply(1), B: make_reply(2)})
    assert {path.name: path.read_bytes() for path in two_shards.folder.glob("*.safetensors")} == before


def test_the_size_counts_each_shard_once(two_shards: TargetCache) -> None:
    files = two_shards.folder.glob("*.safetensors")
    assert two_shards.size([A, B, C]) == sum(path.stat().st_size for path in files)
    assert two_shards.size([A, B]) == shard_of(two_shards, A).stat().st_size


# Kills

FILE_OPERATIONS = {"open", "os.rename", "os.chmod", "os.mkdir", "os.remove", "fcntl.flock", "fcntl.lockf"}


def killed_at(operation: int, work: Callable[[], None]) -> bool:
    """Do `work` in a process of its own, which a SIGKILL ends before its n-th file operation; False if it has fewer.

    The process is a fork, in which MLX does not work.
    """
    process = os.fork()
    if process == 0:
        left = operation

        def count(event: str, _: tuple[Any, ...]) -> None:
            nonlocal left
            if event in FILE_OPERATIONS:
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        signal.alarm(20)
        sys.addaudithook(count)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    end = os.waitstatus_to_exitcode(status)
    assert end in (0, -signal.SIGKILL)
    return end != 0


@pytest.mark.parametrize(
    ("held", "damaged", "added"),
    [([], False, [C]), ([A, B], False, [C]), ([], True, [A, B])],
    ids=["the first shard", "another shard", "a damaged shard"],
)
def test_a_kill_at_any_file_operation_leaves_all_or_nothing_of_the_shard_in_hand(
    tmp_path: Path, held: list[str], damaged: bool, added: list[str]
) -> None:
    expected = {A: make_reply(1), B: make_reply(2), C: make_reply(3)}
    shard = {key: expected[key] for key in added}
    (tmp_path / "before").mkdir()
    if held or damaged:
        TargetCache(tmp_path / "before", IDENTITY).add({A: expected[A], B: expected[B]})
    if damaged:
        truncate(shard_of(TargetCache(tmp_path / "before", IDENTITY), A))
    came_through = set()
    for operation in range(100):
        root = tmp_path / str(operation)
        shutil.copytree(tmp_path / "before", root)
        killed = killed_at(operation, lambda root=root: TargetCache(root, IDENTITY).add(shard))
        found = present(root)
        assert found in (held, [*held, *added])
        came_through.add(found == [*held, *added])
        for key, reply in TargetCache(root, IDENTITY).read(found).items():
            assert_same(reply, expected[key])
        # And whatever the kill left lying about is in nobody's way.
        TargetCache(root, IDENTITY).add(shard)
        assert present(root) == [*held, *added]
        for key, reply in TargetCache(root, IDENTITY).read([*held, *added]).items():
            assert_same(reply, expected[key])
        if not killed:
            break
    else:
        raise AssertionError("never came to its end")
    assert operation > 5
    assert came_through == {True, False}


# Keys


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


def test_keys_of_written_replies_tell_apart_how_they_were_drawn() -> None:
    sampling = [None, {"seed": 0}, {"seed": 1}, {"seed": 0, "top_p": 0.5}]
    assert len({reply_key([1, 2], None, facts) for facts in sampling}) == len(sampling)
    assert len({reply_key([1, 2], [3], facts) for facts in sampling}) == 1


def test_a_key_is_the_same_for_the_same_tokens() -> None:
    assert reply_key(iter([1, 2]), (3,)) == reply_key([1, 2], [3])
    assert reply_key(np.array([1, 2]).tolist(), None) == reply_key([1, 2], None, {})


# What changes the key of a reply, and what does not

SIT = {"type": "function", "function": {"name": "sit", "parameters": {"mat": "string", "cat": "string"}}}
SAY = {"type": "function", "function": {"name": "say", "parameters": {"word": "string"}}}
CALL = {"type": "function", "function": {"name": "sit", "arguments": {"mat": "red"}}}
RECORDS: dict[str, dict[str, Any]] = {
    "asked": {"prompt": "say hello to the cat"},
    "chat": {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "where is the mat"},
        ]
    },
    "tools": {"prompt": "who sat", "tools": [SIT, SAY]},
    "given": {"prompt": "where is the cat", "completion": "the cat sat on the mat"},
    "called": {
        "messages": [
            {"role": "user", "content": "sit"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "sat"},
            {"role": "assistant", "content": "it sat"},
        ],
        "tools": [SIT],
    },
    "text": {"text": "the cat sat on the mat and said hello"},
}
HELD_OUT = {"held out": {"prompt": "hi"}}
ALL = frozenset((*RECORDS, *HELD_OUT))
WRITTEN = frozenset(("asked", "chat", "tools", "held out"))
"""The prompts whose reply the teacher writes; the data brings those of the others."""

CALLS = "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}"
PRINTS_CALLS = TEMPLATE.replace("<|end|>", f"{CALLS}<|end|>")


class Scene:
    """A teacher's folder, a domain's prompts and a run's config, each free to be changed."""

    def __init__(self, root: Path, original: Path) -> None:
        self.root, self.original = root, original
        self.model = root / "models" / "teacher"
        shutil.copytree(original, self.model)
        self.edit("tokenizer_config.json", chat_template=PRINTS_CALLS)
        self.teacher: dict[str, Any] = {}
        self.config: dict[str, Any] = {"student": str(original), "out": str(root / "out"), "cache": str(root / "cache")}
        self.domain, self.domain_config = "a", {}
        self.train, self.valid = json.loads(json.dumps(RECORDS)), json.loads(json.dumps(HELD_OUT))
        self.system: str | None = None
        self.format = cache_module.FORMAT

    def edit(self, name: str, /, **changes: Any) -> None:
        """Change keys of a JSON file of the model folder, which may be new."""
        path = self.model / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))

    def set(self, path: str, value: Any) -> None:
        """Set an option of the run."""
        *groups, name = path.split(".")
        place = self.config
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value

    def move(self, to: Path) -> None:
        """The model folder under another name."""
        to.parent.mkdir(parents=True, exist_ok=True)
        self.model = self.model.rename(to)

    def entries(self) -> dict[str, tuple[str, str]]:
        """Where the reply to each prompt is looked for: the cache's folder and the key."""
        shutil.rmtree(self.root / "prompts", ignore_errors=True)
        folder = self.root / "prompts" / self.domain
        folder.mkdir(parents=True)
        for split, records in (("train", self.train), ("valid", self.valid)):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records.values()))
        if self.system is not None:
            (folder / "system.md").write_text(self.system)
        teacher = {"model": str(self.model), **self.teacher}
        config = {"prompts": str(folder.parent), "teacher": teacher, **self.config}
        (self.root / "base.yaml").write_text(json.dumps(config))
        if self.domain_config:
            (self.root / f"{self.domain}.yaml").write_text(json.dumps(self.domain_config))
        jobs, failures = plan(self.root / "base.yaml", [self.domain], [])
        assert failures == {}
        [job] = jobs
        text = Teacher(job.config.teacher, job.config.cache_folder).text
        prompts = render_for(text, [*job.train_prompts, *job.valid_prompts], job.config.capture)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache_module, "FORMAT", self.format)
            name = teacher_identity(text, job.config.targets.settings).folder_name
        return {
            name_of_prompt: (name, prompt.key)
            for name_of_prompt, prompt in zip([*self.train, *self.valid], prompts, strict=True)
        }


Change = Callable[[Scene], object]


def both(*changes: Change) -> Change:
    return lambda scene: [change(scene) for change in changes]


def option(path: str, value: Any) -> Change:
    return lambda scene: scene.set(path, value)


def teacher_option(name: str, value: Any) -> Change:
    return lambda scene: scene.teacher.update({name: value})


def edit(file: str, /, **changes: Any) -> Change:
    return lambda scene: scene.edit(file, **changes)


def write(name: str, text: str) -> Change:
    def change(scene: Scene) -> None:
        (scene.model / name).parent.mkdir(exist_ok=True)
        (scene.model / name).write_text(text)

    return change


def prompt(name: str, /, **changes: Any) -> Change:
    """A record with other values; None leaves a key out."""

    def change(scene: Scene) -> None:
        record = {**scene.train[name], **changes}
        scene.train[name] = {key: value for key, value in record.items() if value is not None}

    return change


def message(record: str, index: int, /, **changes: Any) -> Change:
    return lambda scene: scene.train[record]["messages"][index].update(changes)


def messages(name: str, order: list[int]) -> Change:
    """Some of the messages of a record, in the given order."""

    def change(scene: Scene) -> None:
        record = scene.train[name]
        record["messages"] = [record["messages"][index] for index in order]

    return change


def system(text: str) -> Change:
    return lambda scene: setattr(scene, "system", text)


def weights(alter: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> Change:
    def change(scene: Scene) -> None:
        file = scene.model / "model.safetensors"
        altered = {name: mx.array(value) for name, value in alter(mx.load(str(file))).items()}
        mx.eval(altered)
        mx.save_safetensors(str(file), altered)

    return change


def one_value(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    arrays["model.norm.weight"] = arrays["model.norm.weight"].at[7].add(2.0**-10)
    return arrays


def quantise(bits: int, group_size: int = 32) -> Change:
    def change(scene: Scene) -> None:
        from mlx_lm.utils import load_model, quantize_model, save_config, save_model

        module, config = quantize_model(*load_model(scene.original), group_size, bits)
        save_model(scene.model, module)
        save_config(config, scene.model / "config.json")

    return change


def tokenizer(alter: Callable[[dict[str, Any]], object]) -> Change:
    def change(scene: Scene) -> None:
        path = scene.model / "tokenizer.json"
        content = json.loads(path.read_text())
        alter(content)
        path.write_text(json.dumps(content))

    return change


def rename_token(content: dict[str, Any]) -> None:
    """Another text for the id of a byte that occurs nowhere in the prompts."""
    vocabulary = content["model"]["vocab"]
    vocabulary["new"] = vocabulary.pop("\u0143")


def swap_tokens(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["Q"], vocabulary["Z"] = vocabulary["Z"], vocabulary["Q"]


def add_token(content: dict[str, Any]) -> None:
    content["added_tokens"].append({**content["added_tokens"][0], "id": 299, "content": "<|new|>"})


def another_model(scene: Scene) -> None:
    from conftest import save_random_model

    shutil.rmtree(scene.model)
    save_random_model(scene.model, scene.original, seed=77)
    scene.edit("tokenizer_config.json", chat_template=PRINTS_CALLS)


def hub_layout(scene: Scene) -> None:
    """The folder as the hub's cache has it: links to files that are named by their digests."""
    blobs, snapshot = scene.root / "blobs", scene.root / "snapshots" / ("0" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in scene.model.iterdir():
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.move(file, blob)
        (snapshot / file.name).symlink_to(blob)
    scene.model = snapshot


def touch(scene: Scene) -> None:
    for file in scene.model.iterdir():
        os.utime(file, (1e9, 1e9))
        file.chmod(0o600)


def link(scene: Scene) -> None:
    (scene.root / "link").symlink_to(scene.model)
    scene.model = scene.root / "link"


def reorder(scene: Scene) -> None:
    scene.train = dict(reversed(scene.train.items()))


def swap_splits(scene: Scene) -> None:
    scene.train, scene.valid = scene.valid, scene.train


def by_its_values(preset: str, other: str) -> Change:
    """The settings of a preset, spelled out on top of another."""
    meant = TargetOptions(preset=preset).settings
    values = {"threshold": meant.threshold, "draw_temperature": meant.draw_temperature, "share": meant.share}
    return lambda scene: scene.set("targets", {"preset": other, **values})


def only_own_system_messages(scene: Scene) -> None:
    scene.train = {name: scene.train[name] for name in ("chat", "text")}
    scene.valid = {"chat": scene.train["chat"]}


NEW_TEMPLATE = PRINTS_CALLS.replace("<|assistant|>", "<|assistant|> ")
HIDDEN_STATES = option("targets.preset", "exact")
GREEDY = option("capture.sampling_temperature", 0.0)

MISSES: dict[str, tuple[Change, frozenset[str] | set[str]] | tuple[Change, frozenset[str] | set[str], Change]] = {
    # The teacher's files
    "one value of the weights": (weights(one_value), ALL),
    "weights of half precision": (
        weights(lambda arrays: {name: value.astype(mx.float16) for name, value in arrays.items()}), ALL
    ),
    "another model": (another_model, ALL),
    "a second file of weights": (
        lambda scene: mx.save_safetensors(str(scene.model / "model-2.safetensors"), {"model.norm.weight": mx.ones(32)}),
        ALL,
    ),
    "quantised to 4 bits": (quantise(4), ALL),
    "quantised to 8 bits, no longer 4": (quantise(8), ALL, quantise(4)),
    "quantised in other groups": (quantise(4, 64), ALL, quantise(4)),
    "config: rope_theta": (edit("config.json", rope_theta=500.0), ALL),
    "config: rms_norm_eps": (edit("config.json", rms_norm_eps=1e-5), ALL),
    "config: activations quantised": (edit("config.json", quantize_activations=True), ALL),
    "config: stop tokens": (edit("config.json", eos_token_id=[1, 2]), ALL),
    "generation_config: stop tokens": (edit("generation_config.json", eos_token_id=[1, 2]), ALL),
    "generation_config: other stop tokens": (
        edit("generation_config.json", eos_token_id=3), ALL, edit("generation_config.json", eos_token_id=2)
    ),
    "the text of a token": (tokenizer(rename_token), ALL),
    "the ids of two tokens": (tokenizer(swap_tokens), ALL),
    "one merge less": (tokenizer(lambda content: content["model"]["merges"].pop()), ALL),
    "a new token": (tokenizer(add_token), ALL),
    "how text is cut before merging": (
        tokenizer(lambda content: content["pre_tokenizer"].update(add_prefix_space=True)), ALL
    ),
    "the end-of-text token": (edit("tokenizer_config.json", eos_token="<|pad|>"), ALL),
    "the chat template": (edit("tokenizer_config.json", chat_template=NEW_TEMPLATE), ALL),
    "a line break in the chat template": (edit("tokenizer_config.json", chat_template=PRINTS_CALLS + "\n"), ALL),
    "a chat template in a file of its own": (write("chat_template.jinja", NEW_TEMPLATE), ALL),
    "the chat template's own file": (
        write("chat_template.jinja", NEW_TEMPLATE), ALL, write("chat_template.jinja", PRINTS_CALLS)
    ),
    "a template for tools": (
        write("additional_chat_templates/tool_use.jinja", NEW_TEMPLATE),
        {"tools", "called"},
        write("chat_template.jinja", PRINTS_CALLS),
    ),
    "special_tokens_map.json": (edit("special_tokens_map.json", unk_token="<|pad|>"), ALL),
    "added_tokens.json": (write("added_tokens.json", "{}"), ALL),
    # Prompts: that prompt only
    "a word": (prompt("asked", prompt="say hello to the mat"), {"asked"}),
    "a capital letter": (prompt("asked", prompt="Say hello to the cat"), {"asked"}),
    "a space at the end": (prompt("asked", prompt="say hello to the cat "), {"asked"}),
    "an accent spelled in two": (
        prompt("asked", prompt="caf\u0065\u0301"), {"asked"}, prompt("asked", prompt="caf\u00e9")
    ),
    "a new prompt": (lambda scene: scene.train.update({"new": {"prompt": "who is there"}}), {"new"}),
    "a held-out prompt": (lambda scene: scene.valid.update({"held out": {"prompt": "hello"}}), {"held out"}),
    "content of the system message": (message("chat", 0, content="be kind"), {"chat"}),
    "content of an earlier turn": (message("chat", 2, content="hello you"), {"chat"}),
    "content of the last turn": (message("chat", 3, content="where is the cat"), {"chat"}),
    "a role": (message("chat", 0, role="user"), {"chat"}),
    "order of messages": (messages("chat", [0, 3, 2, 1]), {"chat"}),
    "a message less": (messages("chat", [0, 3]), {"chat"}),
    "a message more": (messages("chat", [0, 1, 2, 1, 2, 3]), {"chat"}),
    "no system message": (messages("chat", [1, 2, 3]), {"chat"}),
    "the domain's system message": (system("be brief"), ALL - {"chat", "text"}),
    "another system message of the domain": (system("be kind"), ALL - {"chat", "text"}, system("be brief")),
    "a tool's name": (prompt("tools", tools=[{**SIT, "function": {"name": "stand"}}, SAY]), {"tools"}),
    "order of tools": (prompt("tools", tools=[SAY, SIT]), {"tools"}),
    "order of a tool's keys": (prompt("tools", tools=[dict(reversed(SIT.items())), SAY]), {"tools"}),
    "a tool less": (prompt("tools", tools=[SIT]), {"tools"}),
    "no tools": (prompt("tools", tools=None), {"tools"}),
    "tools for a reply that is given": (prompt("given", tools=[SIT]), {"given"}),
    "a tool call's argument": (
        message("called", 1, tool_calls=[{**CALL, "function": {"name": "sit", "arguments": {"mat": "blue"}}}]),
        {"called"},
    ),
    "a tool's result": (message("called", 2, content="sat down"), {"called"}),
    "the prompt of a given reply": (prompt("given", prompt="where was the cat"), {"given"}),
    "a given reply": (prompt("given", completion="the cat sat on a mat"), {"given"}),
    "a space at the end of a given reply": (prompt("given", completion="the cat sat on the mat "), {"given"}),
    "a given reply in a conversation": (message("called", 3, content="it sat down"), {"called"}),
    "a reply that is no longer given": (prompt("given", completion=None), {"given"}),
    "a reply that is given": (prompt("asked", completion="hello"), {"asked"}),
    "another text": (prompt("text", text="the cat sat on the mat and said hello you"), {"text"}),
    "a text that begins otherwise": (prompt("text", text=" the cat sat on the mat and said hello"), {"text"}),
    "a prompt in place of a text": (prompt("text", text=None, prompt=RECORDS["text"]["text"]), {"text"}),
    # Sampling: what the teacher writes, and not what is given
    "sampling_temperature": (option("capture.sampling_temperature", 0.8), WRITTEN),
    "greedy": (GREEDY, WRITTEN),
    "no longer greedy": (option("capture.sampling_temperature", 0.1), WRITTEN, GREEDY),
    "top_p": (option("capture.top_p", 0.9), WRITTEN),
    "seed of the sampling": (option("capture.seed", 1), WRITTEN),
    "max_tokens": (option("capture.max_tokens", 511), WRITTEN),
    "max_tokens, greedy": (option("capture.max_tokens", 511), WRITTEN, GREEDY),
    "sampling by the domain's config": (lambda scene: scene.domain_config.update(capture={"seed": 1}), WRITTEN),
    # How much is kept
    "preset tiny": (option("targets.preset", "tiny"), ALL),
    "preset hot": (option("targets.preset", "hot"), ALL),
    "preset exact": (HIDDEN_STATES, ALL),
    "threshold": (option("targets.threshold", 0.03), ALL),
    "threshold, preset tiny": (option("targets.threshold", 0.02), ALL, option("targets.preset", "tiny")),
    "draw_temperature": (option("targets.draw_temperature", 1.0), ALL),
    "share": (option("targets.share", 0.5), ALL),
    "another share": (option("targets.share", 0.51), ALL, option("targets.share", 0.5)),
    "share of hidden states": (option("targets.share", 0.5), ALL, HIDDEN_STATES),
    "version of the format": (lambda scene: setattr(scene, "format", scene.format + 1), ALL),
}  # fmt: skip

HITS: dict[str, tuple[Change] | tuple[Change, Change]] = {
    # Where things lie, and what they are called
    "out": (option("out", "another/place"),),
    "cache": (option("cache", "another/place"),),
    "domain": (lambda scene: setattr(scene, "domain", "b-2"),),
    "the model folder's name": (lambda scene: scene.move(scene.root / "models" / "another name"),),
    "the model folder's place": (lambda scene: scene.move(scene.root / "else" / "where" / "teacher"),),
    "a link to the model folder": (link,),
    "the hub's layout of a model": (hub_layout,),
    "a relative path to the model": (
        lambda scene: setattr(scene, "model", os.path.relpath(scene.model)),  # type: ignore[arg-type]
    ),
    "a revision of a local folder": (teacher_option("revision", "main"),),
    "times and modes of files": (touch,),
    "a model card": (write("README.md", "a model card"),),
    "a licence": (write("LICENSE", "Apache-2.0"),),
    "weights that mlx-lm does not read": (write("consolidated.safetensors", "weights"),),
    "weights of PyTorch": (write("pytorch_model.bin", "weights"),),
    "an index of weights": (write("model.safetensors.index.json", "{}"),),
    "weights in a folder": (write("original/model.safetensors", "weights"),),
    "a file of the system": (write(".DS_Store", "view"),),
    # The run
    "learning rate": (option("training.learning_rate", 0.01),),
    "iters": (option("training.iters", 3),),
    "schedule": (option("training.schedule", "constant"),),
    "batch size": (option("training.batch_size", 3),),
    "accumulate": (option("training.accumulate", 3),),
    "max_seq_length": (option("training.max_seq_length", 64),),
    "alpha": (option("losses.alpha", 0.1),),
    "temperature": (option("losses.temperature", 4.0),),
    "chunk of the loss": (option("losses.chunk", 64),),
    "rank": (option("lora.rank", 3),),
    "kind of adapter": (option("lora.type", "dora"),),
    "seed of the run": (option("seed", 5),),
    "fresh": (option("fresh", True),),
    "student": (option("student", "some/student"),),
    "vocab_strategy": (option("vocab_strategy", "project"),),
    "exact_match": (option("evaluation.exact_match", False),),
    "answer_marker": (option("evaluation.answer_marker", "so:"),),
    "tokens to measure a speed by": (option("evaluation.speed_tokens", 0),),
    "the gate": (both(option("gate.prompts", 3), option("gate.when_no_better", "refuse")),),
    "a control": (option("control", "sft"),),
    "a report": (option("report", False),),
    "the certificate": (both(option("fidelity.tokens", 300), option("fidelity.when_poor", "warn")),),
    "replies written at a time": (option("capture.batch_size", 3),),
    "replies in a shard": (option("capture.shard_prompts", 3),),
    "dequantize": (teacher_option("dequantize", "never"),),
    "dequantize a quantised teacher": (teacher_option("dequantize", "always"), quantise(4)),
    # The same, written otherwise
    **{
        f"preset {preset} by its values, upon {other}": (by_its_values(preset, other), option("targets.preset", preset))
        for preset in ("tiny", "default", "hot")
        for other in ("tiny", "default", "hot")
    },
    "the preset by its name": (option("targets.preset", "default"),),
    "a whole number for a draw temperature": (option("targets.draw_temperature", 2),),
    "a whole number for a share": (option("targets.share", 1),),
    "a whole number for a temperature": (
        option("capture.sampling_temperature", 1), option("capture.sampling_temperature", 1.0)
    ),
    "the sampling's defaults": (both(option("capture.seed", 0), option("capture.top_p", 0.95)),),
    "top_p of greedy text": (option("capture.top_p", 0.5), GREEDY),
    "seed of greedy text": (option("capture.seed", 5), GREEDY),
    "the domain's config in place of the base": (
        lambda scene: (scene.config.pop("capture"), scene.domain_config.update(capture={"seed": 4})),
        option("capture.seed", 4),
    ),
    # Prompts
    "order of prompts": (reorder,),
    "prompts that are gone": (lambda scene: [scene.train.pop(name) for name in ("asked", "called", "text")],),
    "a prompt that is there twice": (lambda scene: scene.train.update(again=scene.train["asked"]),),
    "a prompt of both splits": (lambda scene: scene.valid.update(again=scene.train["given"]),),
    "the splits": (swap_splits,),
    "an answer": (prompt("asked", answer="hello"),),
    "another answer": (prompt("tools", answer="the mat"), prompt("tools", answer="the cat")),
    "a key that the template does not print": (message("chat", 1, name="Ida"),),
    "an empty list of tools": (prompt("asked", tools=[]),),
    "order of a record's keys": (
        lambda scene: scene.train.update(given=dict(reversed(scene.train["given"].items()))),
    ),
    "a prompt as messages": (
        prompt("asked", prompt=None, messages=[{"role": "user", "content": "say hello to the cat"}]),
    ),
    "a completion as messages": (
        prompt(
            "given", prompt=None, completion=None,
            messages=[
                {"role": "user", "content": "where is the cat"},
                {"role": "assistant", "content": "the cat sat on the mat"},
            ],
        ),
    ),
    "a tool call with a null": (message("called", 1, name=None),),
    "the domain's system message where each prompt has its own": (system("be kind"), only_own_system_messages),
}  # fmt: skip


@pytest.fixture(scope="module")
def base_entries(tmp_path_factory: pytest.TempPathFactory, student_folder: Path) -> dict[str, tuple[str, str]]:
    """Where the replies of the scene lie that nothing was changed in."""
    return Scene(tmp_path_factory.mktemp("base"), student_folder).entries()


def missing_after(
    scene: Scene, change: Change, before: Change | None, unchanged: dict[str, tuple[str, str]]
) -> set[str]:
    """The prompts whose replies are looked for where none lay before the change."""
    if before is not None:
        before(scene)
        unchanged = scene.entries()
    change(scene)
    return {name for name, entry in scene.entries().items() if entry not in unchanged.values()}


def test_every_prompt_of_the_scene_has_a_reply_of_its_own(base_entries: dict[str, tuple[str, str]]) -> None:
    assert base_entries.keys() == ALL
    assert len(set(base_entries.values())) == len(ALL)
    assert len(MISSES) >= 40
    assert len(HITS) >= 20


@pytest.mark.parametrize("case", MISSES.values(), ids=MISSES.keys())
def test_what_changes_a_reply_misses_it(
    tmp_path: Path, student_folder: Path, base_entries: dict[str, tuple[str, str]], case: tuple[Any, ...]
) -> None:
    change, misses, before = (*case, None)[:3]
    assert missing_after(Scene(tmp_path, student_folder), change, before, base_entries) == misses


@pytest.mark.parametrize("case", HITS.values(), ids=HITS.keys())
def test_what_does_not_change_a_reply_finds_it(
    tmp_path: Path, student_folder: Path, base_entries: dict[str, tuple[str, str]], case: tuple[Any, ...]
) -> None:
    change, before = (*case, None)[:2]
    assert missing_after(Scene(tmp_path, student_folder), change, before, base_entries) == set()


def test_a_separate_file_of_quantisation_settings_misses(tmp_path: Path, student_folder: Path) -> None:
    """mlx-lm takes the quantisation from it where config.json has none: see `mlx_lm.utils.load_model`."""
    scene = Scene(tmp_path, student_folder)
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32}
    scene.edit("hf_quant_config.json", **settings)
    unchanged = scene.entries()
    scene.edit("hf_quant_config.json", **{**settings, "quant_method": "gptq"})
    assert not set(scene.entries().values()) & set(unchanged.values())


def test_an_edit_that_keeps_size_and_time_of_a_file_misses(tmp_path: Path, student_folder: Path) -> None:
    scene = Scene(tmp_path, student_folder)
    unchanged = scene.entries()
    file = scene.model / "model.safetensors"
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not set(scene.entries().values()) & set(unchanged.values())


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
