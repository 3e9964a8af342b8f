"""No damage to a cache is ever believed: whatever happens to its files, a reply is what it was, or missing, and mended.

The environment variable TRUE_KD_CHAOS multiplies how much is tried.
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_cache import FILE_OPERATIONS, killed_at, line_of
from test_pipeline import Place
from test_shards import assert_same, key_of, make_reply, peak_of
from test_stores import identity_of

from true_kd import events, stores
from true_kd.budget import Demand, keep_demand, read_demand, write_demand
from true_kd.cache import ABOUT, IDENTITY, CacheIdentity, Loss, TargetCache
from true_kd.console import make_view
from true_kd.errors import CacheError, TrueKDError
from true_kd.files import CannotWrite, digest_file
from true_kd.manifest import HEAD, LOCK, MANIFEST, SHARD, TEACHER, StoredFile, load_manifest, parse_line, parse_manifest
from true_kd.models.stand_in import read_stand_in, write_stand_in
from true_kd.shards import CachedReply
from true_kd.sizes import ModelSize, read_size, write_size

CHAOS = max(1, int(os.environ.get("TRUE_KD_CHAOS", "1")))
"""How many times as much is tried."""
DEMAND, SIZE = "demand-0123456789abcdef.json", "size-0123456789abcdef.json"
PAGE = 4096


@pytest.fixture(autouse=True, scope="module")
def nothing_hangs() -> Iterator[None]:
    """Whatever waits for ever, on a pipe or a lock, ends these tests."""
    signal.alarm(600 * CHAOS)
    yield
    signal.alarm(0)


class Scene:
    """A cache with all that a cache can hold, to be damaged and put back again."""

    def __init__(self, root: Path, preset: str, teacher: bytes) -> None:
        self.root = root
        root.mkdir()
        digest = stand_in(root / "stand-in", teacher)
        usual = identity_of({"preset": preset})
        self.identity = CacheIdentity({**usual.facts, "teacher": digest}, usual.about)
        long = {key_of("long"): make_reply(len(teacher), 700 if preset == "default" else 300, preset=preset)}
        seed = 100 * len(teacher)
        self.groups = [
            {key_of(name): make_reply(seed + name, 4 + name, preset=preset) for name in range(3)},
            {key_of(name): make_reply(seed + name, 4 + name, "length", preset=preset) for name in range(3, 5)},
            long,
        ]
        self._teacher = teacher
        self._looks = 0
        self.folder = self.fill().folder
        self.pristine = self.content()
        self.order = [name for name in load_manifest(self.folder).files if SHARD.fullmatch(name)]

    @property
    def replies(self) -> dict[str, CachedReply]:
        return {key: reply for group in self.groups for key, reply in group.items()}

    def fill(self) -> TargetCache:
        """What a run does: mend the cache, and add what it lacks."""
        cache = TargetCache(self.root, self.identity)
        cache.mend(any(key not in cache for group in self.groups for key in group))
        cache.keep(TEACHER, lambda path: stand_in(path, self._teacher) and None)
        cache.keep(DEMAND, lambda path: write_demand(path, Demand((2.0, 3.5), 4.5, 9)))
        cache.keep(SIZE, lambda path: write_size(path, ModelSize(1000, 4000, 12.5)))
        cache.add_head(lambda path: path.write_bytes(np.arange(9000, dtype=np.uint16).tobytes()))
        for group in self.groups:
            if missing := {key: reply for key, reply in group.items() if key not in cache}:
                cache.add(missing)
        return cache

    def content(self) -> dict[str, bytes]:
        """All files of the folder but its lock."""
        return {path.name: path.read_bytes() for path in sorted(self.folder.iterdir()) if path.name != LOCK}

    def write(self, name: str, content: bytes) -> None:
        (self.folder / name).write_bytes(content)

    def restore(self) -> None:
        """Put everything back as it was."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        for name, content in self.pristine.items():
            self.write(name, content)

    def look(self) -> set[str]:
        """Open the cache and read all that it says it has; what is missing. Anything wrong that is read fails here."""
        cache = TargetCache(self.root, self.identity)
        there = [key for key in self.replies if key in cache]
        self._looks += 1
        # Unpacking takes most of the time, and the same bytes unpack to the same replies.
        read = [key for key in there if self._looks % 16 == 0 or not self._is_as_it_was(key)]
        for key, found in cache.read(read).items():
            assert_same(found, self.replies[key])
        for name in (HEAD, TEACHER, DEMAND, SIZE):
            if path := cache.path_of(name):
                assert path.read_bytes() == self.pristine[name]
        missing = {name for name in (HEAD, TEACHER, DEMAND, SIZE) if cache.path_of(name) is None}
        return missing | (self.replies.keys() - set(there))

    def lost_with(self, name: str) -> set[str]:
        """What is missing where a file is damaged."""
        return set(self.groups[self.order.index(name)]) if name in self.order else {name}

    def _is_as_it_was(self, key: str) -> bool:
        [name] = [name for name, group in zip(self.order, self.groups, strict=True) if key in group]
        path = self.folder / name
        return path.is_file() and path.read_bytes() == self.pristine[name]

    def heal(self) -> None:
        """Do what the next run does; everything is as it was then."""
        self.fill()
        assert self.look() == set()
        now = self.content()
        assert now.keys() == self.pristine.keys()
        assert sorted(now[MANIFEST].splitlines()) == sorted(self.pristine[MANIFEST].splitlines())
        assert {name for name in now if now[name] != self.pristine[name]} <= {MANIFEST, ABOUT}


def stand_in(path: Path, config: bytes) -> str:
    """Write a teacher without its weights; its digest."""
    write_stand_in(path, {"config.json": config, "tokenizer.json": b"{}"}, {"model.safetensors": "e" * 64})
    return read_stand_in(path).digest


@pytest.fixture(scope="module")
def memory_folder() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of damages are flushed to it."""
    shared = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(prefix="true-kd-damage-", dir=shared if os.access(shared, os.W_OK) else None))
    yield place
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def whole(memory_folder: Path) -> Scene:
    """A cache of sampled targets."""
    return Scene(memory_folder / "default", "default", b"{}")


@pytest.fixture(scope="module")
def hidden(memory_folder: Path) -> Scene:
    """A cache of hidden states."""
    return Scene(memory_folder / "exact", "exact", b"{}")


@pytest.fixture
def scene(whole: Scene) -> Iterator[Scene]:
    """The cache of sampled targets, which may be damaged."""
    yield whole
    whole.restore()


@pytest.fixture(params=["sampled", "hidden"])
def either(request: pytest.FixtureRequest, whole: Scene, hidden: Scene) -> Iterator[Scene]:
    """One of the two, which may be damaged."""
    chosen = whole if request.param == "sampled" else hidden
    yield chosen
    chosen.restore()


@pytest.fixture(scope="module")
def other(memory_folder: Path) -> Scene:
    """The same replies' keys in the cache of another teacher."""
    return Scene(memory_folder / "other", "default", b"{ }")


def flips(content: bytes) -> Iterator[tuple[str, bytes]]:
    """All single bits of a file flipped, one at a time."""
    for place in range(len(content)):
        for bit in range(8):
            yield f"byte {place}, bit {bit}", flipped(content, 8 * place + bit)


def flipped(content: bytes, bit: int) -> bytes:
    return content[: bit // 8] + bytes([content[bit // 8] ^ (1 << bit % 8)]) + content[bit // 8 + 1 :]


# Every byte of the small files


def test_every_bit_of_a_manifest_is_noticed_and_costs_no_more_than_two_files(whole: Scene) -> None:
    content = whole.pristine[MANIFEST]
    good = parse_manifest(content, whole.folder.name)
    assert len(good.files) == 7
    for where, damaged in flips(content):
        found = parse_manifest(damaged, whole.folder.name)
        assert found.files.items() < good.files.items(), where
        # The end of a line that is lost takes two.
        assert len(found.files) >= len(good.files) - 2, where
        assert found.spoiled or found.unfinished, where


def test_a_cache_with_a_changed_byte_in_its_manifest_gives_no_wrong_reply_and_is_mended(scene: Scene) -> None:
    content, rng = scene.pristine[MANIFEST], random.Random(1)
    for place in range(0, len(content), max(1, 4 // CHAOS)):
        scene.write(MANIFEST, flipped(content, 8 * place + rng.randrange(8)))
        assert scene.look() != set(), place
        if place % 32 == 0:
            scene.heal()
            scene.restore()


def test_every_bit_of_an_identity_is_noticed_where_it_is_believed_and_the_next_run_mends_it(scene: Scene) -> None:
    content = scene.pristine[IDENTITY]
    for number, (where, damaged) in enumerate(flips(content)):
        scene.write(IDENTITY, damaged)
        with pytest.raises(CacheError, match="next run with this teacher"):
            stores.read_store(scene.folder)
        if number % max(1, 64 // CHAOS) == 0:
            assert scene.look() == set(), where
            assert list(stores.scan(scene.root).refused) == [scene.folder.name]
            scene.heal()
            assert list(stores.scan(scene.root).refused) == []


def test_no_bit_of_an_exported_identity_or_manifest_can_be_changed(scene: Scene, tmp_path: Path) -> None:
    stores.export_store(stores.read_store(scene.folder), tmp_path / "export")
    for name in (IDENTITY, MANIFEST):
        path = tmp_path / "export" / name
        content = path.read_bytes()
        for number, (where, damaged) in enumerate(flips(content)):
            if number % max(1, 61 // CHAOS) == 0:
                path.write_bytes(damaged)
                with pytest.raises(TrueKDError):
                    stores.import_store(tmp_path / "export", tmp_path / "there")
                assert not (tmp_path / "there").exists(), where
        path.write_bytes(content)


def test_every_bit_of_what_a_budget_or_a_size_says_is_noticed(scene: Scene, tmp_path: Path) -> None:
    write_demand(tmp_path / DEMAND, Demand(tuple(float(value) for value in range(1, 20)), 4.5, 9))
    good = read_demand(tmp_path / DEMAND)
    assert good is not None
    for number, (where, damaged) in enumerate(flips((tmp_path / DEMAND).read_bytes())):
        if number % 5 < CHAOS:
            (tmp_path / DEMAND).write_bytes(damaged)
            assert read_demand(tmp_path / DEMAND) is None, where
    for name in (DEMAND, SIZE):
        for number, (where, damaged) in enumerate(flips(scene.pristine[name])):
            if number % 7 < CHAOS:
                scene.write(name, damaged)
                assert TargetCache(scene.root, scene.identity).path_of(name) is None, where
        scene.heal()
    assert read_size(scene.folder / SIZE) == ModelSize(1000, 4000, 12.5)


def test_no_bit_of_what_is_noted_for_people_does_any_harm(scene: Scene) -> None:
    for number, (where, damaged) in enumerate(flips(scene.pristine[ABOUT])):
        scene.write(ABOUT, damaged)
        store = stores.read_store(scene.folder)
        assert store.teacher.isprintable(), where
        if number % max(1, 32 // CHAOS) == 0:
            assert scene.look() == set()
            scene.heal()


# Large files


LARGE = ("shard 0", "shard 1", "shard 2", HEAD, TEACHER)


def name_of(scene: Scene, what: str) -> str:
    return scene.order[int(what[-1])] if what.startswith("shard") else what


def each_is_noticed(scene: Scene, name: str, damages: Iterator[tuple[str, bytes]], heal_each: int) -> int:
    """Damage a file in many ways; it and nothing else is missing each time. Returns how many there were."""
    lost, count = scene.lost_with(name), 0
    for where, damaged in damages:
        assert damaged != scene.pristine[name]
        scene.write(name, damaged)
        assert scene.look() == lost, where
        if count % heal_each == 0:
            scene.heal()
            scene.restore()
        count += 1
    return count


@pytest.mark.parametrize("what", LARGE)
def test_a_flipped_bit_anywhere_costs_its_own_file_and_is_mended(either: Scene, what: str) -> None:
    name = name_of(either, what)
    rng, content = random.Random(what), either.pristine[name]
    bits = [rng.randrange(8 * len(content)) for _ in range(220 * CHAOS)]
    damages = ((f"bit {bit}", flipped(content, bit)) for bit in bits)
    assert each_is_noticed(either, name, damages, 44) == 220 * CHAOS


@pytest.mark.parametrize("what", LARGE)
def test_a_file_cut_anywhere_costs_its_own_and_is_mended(either: Scene, what: str) -> None:
    name = name_of(either, what)
    content = either.pristine[name]
    lengths = sorted({0, 1, 7, 8, 9, *np.linspace(0, len(content) - 1, 64 * CHAOS).astype(int).tolist()})
    damages = ((f"cut at {length}", content[:length]) for length in lengths)
    assert each_is_noticed(either, name, damages, 16) >= 64


@pytest.mark.parametrize("what", LARGE)
def test_lost_pages_and_what_is_written_behind_the_end_are_noticed_and_mended(either: Scene, what: str) -> None:
    name = name_of(either, what)
    content = either.pristine[name]

    def damages() -> Iterator[tuple[str, bytes]]:
        for start in range(0, len(content), PAGE):
            page = content[start : start + PAGE]
            if any(page):
                yield f"page at {start}", content[:start] + bytes(len(page)) + content[start + PAGE :]
        for tail in (b"\0", b"\n", content[:100], content):
            yield f"{len(tail)} bytes more", content + tail

    assert each_is_noticed(either, name, damages(), 2) >= 5


# Something else in a file's place


def another(scene: Scene, name: str, content: bytes) -> None:
    scene.write(name, content)


def moved_away(scene: Scene, name: str) -> Path:
    return (scene.folder / name).rename(scene.root / "aside")


PLACES: dict[str, Callable[[Scene, str], object]] = {
    "nothing": lambda scene, name: (scene.folder / name).unlink(),
    "an empty folder": lambda scene, name: ((scene.folder / name).unlink(), (scene.folder / name).mkdir()),
    "a pipe": lambda scene, name: ((scene.folder / name).unlink(), os.mkfifo(scene.folder / name)),
    "a link to what it was": lambda scene, name: (scene.folder / name).symlink_to(moved_away(scene, name)),
    "a link to nowhere": lambda scene, name: (
        (scene.folder / name).unlink(),
        (scene.folder / name).symlink_to(scene.root / "nowhere"),
    ),
    "a link to itself": lambda scene, name: (
        (scene.folder / name).unlink(),
        (scene.folder / name).symlink_to(scene.folder / name),
    ),
    "a link to a device": lambda scene, name: (
        (scene.folder / name).unlink(),
        (scene.folder / name).symlink_to("/dev/zero"),
    ),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("what", [*LARGE, DEMAND, SIZE])
def test_what_lies_in_the_place_of_a_file_is_as_if_absent_and_gives_way(
    scene: Scene, what: str, place: Callable[[Scene, str], object]
) -> None:
    name = name_of(scene, what)
    lost = scene.lost_with(name)
    place(scene, name)
    assert scene.look() == lost
    scene.heal()
    (scene.root / "aside").unlink(missing_ok=True)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("name", [IDENTITY, ABOUT])
def test_what_lies_in_the_place_of_a_description_gives_way_or_does_no_harm(
    scene: Scene, name: str, place: Callable[[Scene, str], object]
) -> None:
    place(scene, name)
    assert scene.look() == set()
    scene.fill()
    assert scene.look() == set()
    assert stores.read_store(scene.folder).replies == len(scene.replies)
    (scene.root / "aside").unlink(missing_ok=True)


@pytest.mark.parametrize("place", list(PLACES.values())[1:], ids=list(PLACES)[1:])
def test_what_lies_in_the_place_of_a_manifest_is_refused_and_left_alone(
    scene: Scene, place: Callable[[Scene, str], object]
) -> None:
    place(scene, MANIFEST)
    with pytest.raises(CacheError, match=r"manifest\.jsonl"):
        TargetCache(scene.root, scene.identity)
    assert os.path.lexists(scene.folder / MANIFEST)
    with pytest.raises(CacheError):
        stores.read_store(scene.folder)
    (scene.root / "aside").unlink(missing_ok=True)


def test_a_folder_with_files_in_the_place_of_a_shard_is_somebodys_and_stays(scene: Scene) -> None:
    name = name_of(scene, "shard 0")
    (scene.folder / name).unlink()
    (scene.folder / name).mkdir()
    (scene.folder / name / "thesis.txt").touch()
    assert scene.look() == set(scene.groups[0])
    with pytest.raises(CannotWrite):
        scene.fill()
    assert (scene.folder / name / "thesis.txt").exists()
    assert scene.look() == set(scene.groups[0])


def test_a_lost_manifest_is_said_to_be_lost_and_the_replies_are_captured_again(scene: Scene) -> None:
    for lose in (Path.unlink, lambda path: path.write_bytes(b"")):
        lose(scene.folder / MANIFEST)
        assert scene.look() >= scene.replies.keys()
        assert TargetCache(scene.root, scene.identity).mend(lacking=True) == [Loss(MANIFEST, len(scene.replies))]
        scene.heal()


# Files of another cache


def test_no_file_of_another_cache_is_believed(scene: Scene, other: Scene) -> None:
    for mine in scene.order:
        for foreign in other.order:
            scene.write(mine, other.pristine[foreign])
            assert scene.look() == scene.lost_with(mine)
            scene.heal()
            scene.restore()
    for name in (TEACHER, MANIFEST, IDENTITY):
        scene.write(name, other.pristine[name])
        assert scene.look() == {TEACHER: {TEACHER}, IDENTITY: set()}.get(name, {*scene.replies, *NAMES})
        scene.heal()
        scene.restore()


NAMES = (HEAD, TEACHER, DEMAND, SIZE)


def test_the_whole_content_of_another_cache_is_not_believed(scene: Scene, other: Scene) -> None:
    """Both have replies of the same keys, which do not know their teacher."""
    assert scene.replies.keys() == other.replies.keys()
    for kept in ((), (IDENTITY,)):
        shutil.rmtree(scene.folder)
        shutil.copytree(other.folder, scene.folder)
        for name in kept:
            scene.write(name, scene.pristine[name])
        assert scene.look() == {*scene.replies, *NAMES}
        scene.heal()
        scene.restore()


def test_a_shard_of_another_cache_that_no_line_names_is_not_adopted(scene: Scene, other: Scene) -> None:
    for name in other.order:
        scene.write(name, other.pristine[name])
    assert scene.look() == set()
    scene.heal()


def test_shards_that_changed_places_are_both_noticed(scene: Scene) -> None:
    one, two = (name_of(scene, what) for what in ("shard 0", "shard 1"))
    scene.write(one, scene.pristine[two])
    scene.write(two, scene.pristine[one])
    assert scene.look() == {*scene.groups[0], *scene.groups[1]}
    losses = TargetCache(scene.root, scene.identity).mend(lacking=True)
    assert losses == [Loss(one, len(scene.groups[0])), Loss(two, len(scene.groups[1]))]
    scene.heal()


# Kills


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


def test_a_kill_at_any_file_operation_leaves_nothing_behind_the_next_run(memory_folder: Path) -> None:
    identity, reply = identity_of(), {key_of("a"): make_reply(1)}
    clean = memory_folder / "clean"
    TargetCache(clean, identity).add(reply)
    for operation in range(200):
        root = memory_folder / f"killed-{operation}"
        killed = killed_at(operation, lambda root=root: TargetCache(root, identity).add(reply))
        cache = TargetCache(root, identity)
        # A kill is no damage, and is not said to be any.
        assert cache.mend(lacking=True) == []
        if key_of("a") not in cache:
            cache.add(reply)
        assert listing(root) == listing(clean), operation
        assert (root / identity.folder_name / MANIFEST).read_bytes() == (
            clean / identity.folder_name / MANIFEST
        ).read_bytes()
        if not killed:
            break
    assert 10 < operation < 199


def test_a_kill_while_a_cache_is_mended_is_mended(scene: Scene) -> None:
    for operation in range(200):
        scene.restore()
        scene.write(name_of(scene, "shard 0"), b"")
        scene.write(MANIFEST, flipped(scene.pristine[MANIFEST], 8 * (len(scene.pristine[MANIFEST]) - 20)))
        scene.write(".tmp-x.safetensors", b"half")
        scene.write(IDENTITY, b"{")
        missing = scene.look()
        killed = killed_at(operation, lambda: TargetCache(scene.root, scene.identity).mend(lacking=True))
        assert scene.look() == missing
        scene.heal()
        if not killed:
            break
    assert 10 < operation < 199


def test_a_kill_while_a_measurement_is_kept_leaves_nothing_behind_the_next_one(memory_folder: Path) -> None:
    demand = Demand(tuple(float(value) for value in range(1, 20)), 4.5, 9)
    for operation in range(100):
        root = memory_folder / f"demand-{operation}"
        killed = killed_at(operation, lambda root=root: keep_demand(root / DEMAND, demand))
        assert read_demand(root / DEMAND) in (None, demand)
        keep_demand(root / DEMAND, demand)
        assert read_demand(root / DEMAND) == demand
        assert listing(root) == {DEMAND, LOCK}
        if not killed:
            break
    assert 5 < operation < 99


def test_what_somebody_else_has_left_in_the_folder_stays(scene: Scene) -> None:
    for name in ("notes.txt", "backup.safetensors"):
        scene.write(name, b"mine")
    (scene.folder / ".tmp-folder").mkdir()
    (scene.folder / ".tmp-link").symlink_to(scene.root)
    scene.write(".tmp-half.safetensors", b"half")
    scene.fill()
    assert not (scene.folder / ".tmp-half.safetensors").exists()
    assert {".tmp-folder", ".tmp-link", "notes.txt", "backup.safetensors"} <= listing(scene.folder)


# Disks that fail


def without_room(limit: int, work: Callable[[], bool]) -> bool:
    """What `work` returns in a process of its own, in which no file may grow beyond a limit, and MLX does not work."""
    mx.synchronize()
    process = os.fork()
    if process == 0:
        code = 2
        signal.alarm(60)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            code = 0 if work() else 1
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 1)
    return code == 0


def is_added(cache: TargetCache, key: str, reply: CachedReply) -> bool:
    """Add a reply; False where the disk has no room for it, and neither the cache nor its message claims it then."""
    try:
        cache.add({key: reply})
    except CannotWrite as error:
        return key in cache or "needed" not in str(error)
    return key in cache


def test_no_room_for_a_shard_or_its_line_leaves_the_cache_as_it_was(memory_folder: Path) -> None:
    cache = TargetCache(memory_folder / "full", identity_of())
    for number in range(24):
        cache.add({key_of(number): make_reply(number, 2)})
    manifest, key, reply = cache.folder / MANIFEST, key_of("new"), make_reply(99, 2)
    length, before = manifest.stat().st_size, {path.name: path.read_bytes() for path in cache.folder.iterdir()}
    line = length // 24
    assert length > 2 * max(path.stat().st_size for path in cache.folder.glob("*.safetensors"))
    limits = [*range(1, length, length // 12), *range(length, length + line, 5)]
    for limit in limits:
        assert not without_room(limit, lambda: is_added(cache, key, reply))
        assert {path.name: path.read_bytes() for path in cache.folder.iterdir()} == before, limit
    assert without_room(length + line + 5, lambda: is_added(cache, key, reply))
    assert key in TargetCache(cache.folder.parent, identity_of())


@pytest.mark.parametrize("function", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EXDEV, errno.EACCES], ids=os.strerror)
def test_any_call_to_the_disk_that_fails_adds_nothing_and_says_so(
    memory_folder: Path, monkeypatch: pytest.MonkeyPatch, function: str, fault: int
) -> None:
    real = getattr(os, function)
    for filled in (False, True):
        for failing in range(20):
            root = Path(tempfile.mkdtemp(dir=memory_folder))
            cache = TargetCache(root, identity_of())
            if filled:
                cache.add({key_of("a"): make_reply(1)})
            shards, left = set(root.rglob("*.safetensors")), failing

            def fail(*arguments: Any, **others: Any) -> Any:
                nonlocal left
                left -= 1
                if left == -1:
                    raise OSError(fault, os.strerror(fault))
                return real(*arguments, **others)

            with monkeypatch.context() as patch:
                patch.setattr(os, function, fail)
                try:
                    cache.add({key_of("b"): make_reply(2)})
                    added = True
                except CannotWrite as error:
                    assert os.strerror(fault) in str(error)  # noqa: PT017 - it need not fail
                    added = False
            again = TargetCache(root, identity_of())
            assert [key_of("b") in cache, key_of("b") in again] == [added, added]
            if not added:
                assert set(root.rglob("*.safetensors")) == shards
                assert list(root.rglob(".tmp-*")) == []
                again.add({key_of("b"): make_reply(2)})
                assert key_of("b") in again
            if left >= 0:
                break
        assert left >= 0
        assert failing > 0


def test_a_cache_that_cannot_be_written_is_read_though_something_in_it_is_damaged(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    scene.write(name_of(scene, "shard 0"), b"")
    scene.write(".tmp-x.safetensors", b"")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        patch.setattr(os, "unlink", refuse)
        cache = TargetCache(scene.root, scene.identity)
        cache.mend(lacking=True)
        assert scene.look() == set(scene.groups[0])


# Several processes


def test_kills_among_processes_that_fill_one_cache_cost_nothing_that_was_added(memory_folder: Path) -> None:
    rng = random.Random(7)
    replies = {key_of(["together", number]): make_reply(number) for number in range(24)}
    for turn in range(10 * CHAOS):
        root = memory_folder / f"together-{turn}"
        root.mkdir()
        fates = [rng.randrange(3, 400) for _ in range(3)] + [None]
        processes = []
        for number, fate in enumerate(fates):
            order = list(replies)
            random.Random(100 * turn + number).shuffle(order)
            processes.append(start_filling(root, {key: replies[key] for key in order}, fate))
        ends = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        assert ends[-1] == 0
        assert set(ends) <= {0, -signal.SIGKILL}
        folder = root / identity_of().folder_name
        manifest = load_manifest(folder)
        assert manifest.spoiled == 0
        for name, file in manifest.files.items():
            assert digest_file(folder / name) == file.sha256
        cache = TargetCache(root, identity_of())
        for key, found in cache.read(replies).items():
            assert_same(found, replies[key])
        assert cache.mend(lacking=False) == [] or len(stores.read_store(folder).stray) == 0
        assert stores.read_store(folder).stray == ()
        assert {finding.state for finding in stores.verify(stores.read_store(folder))} == {"whole"}


def start_filling(root: Path, replies: dict[str, CachedReply], fate: int | None) -> int:
    """A process that adds what is missing of some replies, one at a time; killed at its n-th file operation if asked.

    It is a fork, in which MLX does not work.
    """
    mx.synchronize()
    process = os.fork()
    if process:
        return process
    left = fate

    def count(event: str, _: tuple[Any, ...]) -> None:
        nonlocal left
        if left is not None and event in FILE_OPERATIONS:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    signal.alarm(60)
    sys.addaudithook(count)
    try:
        cache = TargetCache(root, identity_of())
        cache.mend(lacking=True)
        for key, reply in replies.items():
            cache.refresh()
            if key not in cache:
                cache.add({key: reply})
        os._exit(0)
    finally:
        os._exit(1)


# Whole runs


KINDS: dict[str, Callable[[Path], object]] = {
    "a bit": lambda path: path.write_bytes(flipped(path.read_bytes(), 4000)),
    "the keys": lambda path: path.write_bytes(zero_keys(path.read_bytes())),
    "cut": lambda path: os.truncate(path, 500),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": Path.unlink,
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "another": lambda path: path.write_bytes(max(path.parent.glob("[0-9a-f]*.safetensors")).read_bytes()),
}


def zero_keys(content: bytes) -> bytes:
    size = int.from_bytes(content[:8], "little")
    start, stop = (8 + size + offset for offset in json.loads(content[8 : 8 + size])["keys"]["data_offsets"])
    return content[:start] + bytes(stop - start) + content[stop:]


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> tuple[Place, bytes, dict[str, bytes]]:
    """A place after a run: its adapter, and the files of its cache."""
    place = Place(tmp_path_factory.mktemp("ran"), teacher_folder, student_folder)
    place.config["capture"] = {"max_tokens": 4, "shard_prompts": 3, "batch_size": 1}
    place.write("a")
    place.run("a")
    return place, place.weights(), cache_files(place)


def cache_files(place: Place) -> dict[str, bytes]:
    files = (path for path in place.root.glob("cache/*/*") if path.name != LOCK)
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.parametrize("damage", KINDS.values(), ids=KINDS.keys())
def test_a_run_says_which_shard_is_damaged_and_captures_that_alone(
    ran: tuple[Place, bytes, dict[str, bytes]], damage: Callable[[Path], object]
) -> None:
    place, weights, before = ran
    shard = Path(min(name for name in before if SHARD.fullmatch(Path(name).name)))
    file = load_manifest(shard.parent).files[shard.name]
    damage(shard)
    run = place.run("a", fresh=True)
    assert run.of(events.CacheDamaged) == [events.CacheDamaged("a", shard, file.replies)]
    assert run.captured_tokens == {"a": file.tokens}
    assert place.weights() == weights
    after = cache_files(place)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {str(shard.parent / MANIFEST)}
    again = place.run("a", fresh=True)
    assert again.of(events.CacheDamaged) == []
    assert again.captured_tokens == {"a": 0}


def test_a_run_says_that_a_manifest_is_damaged_and_captures_what_it_does_not_name(
    ran: tuple[Place, bytes, dict[str, bytes]],
) -> None:
    place, weights, before = ran
    [manifest] = [Path(name) for name in before if Path(name).name == MANIFEST]
    shards = [file for file in load_manifest(manifest.parent).files.values() if SHARD.fullmatch(file.name)]
    line = shards[1].line(manifest.parent.name)
    manifest.write_bytes(manifest.read_bytes().replace(line, line.replace(b'"replies": ', b'"replies": 1')))
    run = place.run("a", fresh=True)
    assert run.of(events.CacheDamaged) == [events.CacheDamaged("a", manifest, shards[1].replies)]
    assert run.captured_tokens == {"a": shards[1].tokens}
    assert place.weights() == weights
    assert cache_files(place).keys() == before.keys()


# Any bytes


KEY = "0123456789abcdef"
FILES = st.builds(
    StoredFile,
    st.one_of(st.just(HEAD), st.from_regex(SHARD, fullmatch=True), st.just(DEMAND)),
    st.text("0123456789abcdef", min_size=64, max_size=64),
    st.integers(0, 2**53 - 1),
    st.integers(0, 2**53 - 1),
)
WORDS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=120 * CHAOS, deadline=None)
@given(file=FILES)
def test_every_line_that_is_written_is_read_as_it_was(file: StoredFile) -> None:
    assert parse_line(file.line(KEY).removesuffix(b"\n"), KEY) == file
    assert parse_line(file.line(KEY).removesuffix(b"\n"), "fedcba9876543210") is None


@settings(max_examples=200 * CHAOS, deadline=None)
@example(line=b"")
@example(line=b"[" * 100_000)
@example(line=b'{"file": "head.safetensors", "sha256": "' + b"0" * 64 + b'", "replies": ' + b"1" * 100_000 + b"}")
@given(line=st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode(errors="surrogatepass")))
def test_any_bytes_are_no_line(line: bytes) -> None:
    assert parse_line(line, KEY) is None


@settings(max_examples=200 * CHAOS, deadline=None)
@given(
    file=FILES,
    changes=st.dictionaries(st.sampled_from(["file", "sha256", "replies", "tokens", "check", "x"]), WORDS, min_size=1),
)
def test_a_line_with_a_right_check_and_other_words_is_read_only_where_it_could_have_been_written(
    file: StoredFile, changes: dict[str, Any]
) -> None:
    record = {"file": file.name, "sha256": file.sha256, "replies": file.replies, "tokens": file.tokens, **changes}
    line = line_of(record, KEY)
    found = parse_line(line, KEY)
    assert found is None or found.line(KEY) == line + b"\n"


@settings(max_examples=200 * CHAOS, deadline=None)
@given(file=FILES, data=st.data())
def test_a_line_with_any_bytes_replaced_is_none(file: StoredFile, data: st.DataObject) -> None:
    line = file.line(KEY).removesuffix(b"\n")
    start = data.draw(st.integers(0, len(line)))
    stop = data.draw(st.integers(start, min(len(line), start + 8)))
    changed = line[:start] + data.draw(st.binary(max_size=8)) + line[stop:]
    assert parse_line(changed, KEY) == (file if changed == line else None)


NO_LINES = st.binary(max_size=80).filter(lambda part: b"\n" not in part)


@settings(max_examples=120 * CHAOS, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parts=st.lists(FILES | NO_LINES, max_size=12), data=st.data())
def test_a_manifest_of_lines_and_anything_else_names_what_its_whole_lines_name(
    parts: list[StoredFile | bytes], data: st.DataObject
) -> None:
    expected: dict[str, StoredFile] = {}
    for part in parts:
        if isinstance(part, StoredFile):
            expected.pop(part.name, None)
            expected[part.name] = part
    content = b"".join(part.line(KEY) if isinstance(part, StoredFile) else part + b"\n" for part in parts)
    found = parse_manifest(content, KEY)
    assert list(found.files.items()) == list(expected.items())
    assert found.spoiled == sum(isinstance(part, bytes) for part in parts)
    cut = parse_manifest(content[: data.draw(st.integers(0, len(content)))], KEY)
    assert set(cut.files.values()) <= {part for part in parts if isinstance(part, StoredFile)}


def test_a_manifest_of_whatever_size_takes_little_memory(tmp_path: Path) -> None:
    hostile = {
        "deep": b"[" * 2**22,
        "long": b'"' + b"x" * 2**22,
        "lines": b"\n" * 2**18,
        "numbers": (b"1" * 5000 + b"\n") * 500,
        "zeros": bytes(2**22),
    }
    for name, content in hostile.items():
        (tmp_path / MANIFEST).write_bytes(content)
        assert peak_of(lambda: load_manifest(tmp_path, KEY)) < 2**27, name
        assert load_manifest(tmp_path, KEY).files == {}


def test_a_manifest_larger_than_any_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(CacheError, match="larger than 256 MiB"):
        load_manifest(tmp_path, KEY)


def test_the_line_that_is_shown_names_the_file_and_what_it_held(tmp_path: Path) -> None:
    shown = io.StringIO()
    with make_view(shown) as view:
        view.show(events.CacheDamaged("a", tmp_path / HEAD, 0))
        view.show(events.CacheDamaged("a", tmp_path / MANIFEST, 64))
    first, second = shown.getvalue().splitlines()
    assert first == f"a: {tmp_path / HEAD} was damaged or gone; what is needed of it is captured again"
    assert "manifest.jsonl was damaged or gone, 64 replies; " in second
