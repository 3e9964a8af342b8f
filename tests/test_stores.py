"""What is said of caches is true, what is removed was theirs, and a stranger's files are never believed or followed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import pytest
from filelock import FileLock
from test_cache import killed_at, line_of
from test_shards import KINDS, assert_same, key_of, make_reply

from true_kd import stores
from true_kd.budget import Demand, write_demand
from true_kd.cache import FORMAT, CacheIdentity, TargetCache
from true_kd.errors import CacheError, InputError, TrueKDError
from true_kd.files import digest_file, digest_json, write_record
from true_kd.manifest import TEACHER, read_manifest
from true_kd.models.stand_in import read_stand_in, write_stand_in
from true_kd.sizes import ModelSize, write_size
from true_kd.stores import checking
from true_kd.targets import TargetOptions

A, B, C, D = (key_of(name) for name in "abcd")
SEEDS = {A: 1, B: 2, C: 3, D: 4}
HEAD = "head.safetensors"


def identity_of(options: dict | None = None, teacher: str = "a", name: str = "some/teacher") -> CacheIdentity:
    """The identity that a run with these options would give its cache."""
    settings = asdict(TargetOptions(**(options or {})).settings)
    return CacheIdentity({"teacher": teacher * 64, "targets": settings}, {"teacher": name})


IDENTITY = identity_of()


def fill(root: Path, groups: list[list[str]], identity: CacheIdentity = IDENTITY) -> Path:
    """A cache with a shard for each group of keys; its folder."""
    cache = TargetCache(root, identity)
    for group in groups:
        cache.add({key: make_reply(SEEDS[key]) for key in group})
    return cache.folder


def add_head(cache: TargetCache) -> None:
    """An output head as `save_head` writes it."""
    cache.add_head(
        lambda path: mx.save_safetensors(str(path), {"weight": mx.zeros((40, 24))}, metadata={"packing": "{}"})
    )


def present(root: Path, identity: CacheIdentity = IDENTITY) -> list[str]:
    """The keys that a run would find."""
    cache = TargetCache(root, identity)
    return [key for key in (A, B, C, D) if key in cache]


def content(folder: Path) -> dict[str, bytes | str]:
    """All that is below a folder, but for locks; links by where they lead."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if (path.is_symlink() or path.is_file()) and path.name != ".lock"
    }


def rewrite(folder: Path, alter: Callable[[dict], object]) -> None:
    """Change each line of a manifest, as one who knows how its check is made."""
    identity = digest_json(json.loads((folder / "identity.json").read_text()))[:16]
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    for line in lines:
        del line["check"]
        alter(line)
    (folder / "manifest.jsonl").write_bytes(b"".join(line_of(line, identity) + b"\n" for line in lines))


def shards_of(folder: Path) -> list[Path]:
    """The files of a cache in the manifest's order."""
    key = folder.name if stores.reading.is_key(folder.name) else IDENTITY.folder_name
    return [folder / name for name in read_manifest(folder, key)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one cache: A and B in one shard, C in another."""
    fill(tmp_path / "root", [[A, B], [C]])
    return tmp_path / "root"


@pytest.fixture
def folder(root: Path) -> Path:
    """The folder of that cache."""
    return root / IDENTITY.folder_name


def age(folder: Path, days: float) -> None:
    """Let a cache be unused for so long."""
    for name in ("manifest.jsonl", "identity.json"):
        if (folder / name).exists():
            then = (folder / name).stat().st_mtime - 86400 * days
            os.utime(folder / name, (then, then))


# Looking.


def test_a_cache_is_described_as_it_was_written(root: Path, folder: Path) -> None:
    [store] = stores.scan(root).stores
    assert (store.key, store.folder, store.format) == (IDENTITY.folder_name, folder, FORMAT)
    assert store.settings == IDENTITY.facts["targets"]
    assert (store.replies, store.tokens, len(store.shards)) == (3, 15, 2)
    assert store.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert store.bytes_per_token == sum(path.stat().st_size for path in shards_of(folder)) / 15
    assert store.teacher == "some/teacher"
    assert store.created is not None
    assert (store.stray, store.others) == ((), ())


def test_the_folder_is_named_by_the_digest_of_what_identity_json_holds(folder: Path) -> None:
    written = json.loads((folder / "identity.json").read_text())
    assert folder.name == IDENTITY.folder_name == digest_json(written)[:16]


def test_the_head_counts_in_the_size_and_not_per_token(tmp_path: Path) -> None:
    identity = identity_of({"preset": "exact"})
    cache = TargetCache(tmp_path, identity)
    cache.add({A: make_reply(1, preset="exact")})
    before = stores.read_store(cache.folder)
    add_head(cache)
    after = stores.read_store(cache.folder)
    assert after.bytes > before.bytes + 3000
    assert after.bytes_per_token == before.bytes_per_token
    assert len(after.shards) == 1


def test_a_root_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert stores.scan(tmp_path / "nowhere") == stores.Scan(tmp_path / "nowhere", (), {})


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a file, expected the folder"):
        stores.scan(tmp_path / "file")


def test_the_last_used_comes_first_and_reading_is_use(root: Path, folder: Path) -> None:
    other = fill(root, [[D]], identity_of(teacher="b"))
    age(folder, 3)
    assert [store.folder for store in stores.scan(root).stores] == [other, folder]
    age(other, 1)
    TargetCache(root, IDENTITY).read([A])
    assert [store.folder for store in stores.scan(root).stores] == [folder, other]


def test_a_cache_of_another_format_is_listed_and_not_interpreted(root: Path) -> None:
    written = {"format": 1, "teacher": "c" * 64}
    old = root / digest_json(written)[:16]
    old.mkdir()
    (old / "identity.json").write_text(json.dumps(written))
    (old / "manifest.jsonl").write_text('{"shard": "0123456789abcdef.safetensors"}\n')
    (old / "0123456789abcdef.safetensors").write_bytes(b"old")
    store = stores.find(root, old.name)
    assert (store.format, store.is_current, store.replies, store.stray) == (1, False, 0, ())
    assert store.teacher == "c" * 12
    assert list(stores.verify(store)) == []


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"file": "../x.safetensors", "sha256": "' + b"0" * 64 + b'", "replies": 1, "tokens": 1}',
        b'{"file": "0123456789abcdef.safetensors", "sha256": "' + b"0" * 64 + b'", "replies": 1e999, "tokens": 1}',
        b'{"file": "0123456789abcdef.safetensors", "sha256": "' + b"0" * 64 + b'", "replies": -1, "tokens": 1}',
        b'{"file": "0123456789abcdef.safetensors", "sha256": "'
        + b"0" * 64
        + b'", "replies": 1, "tokens": 1'
        + b"0" * 99,
        b'{"file": "0123456789abcdef.safetensors", "sha256": "'
        + b"0" * 64
        + b'", "replies": 1, "tokens": 1'
        + b"0" * 99
        + b"}",
        b'{"file": "", "sha256": "' + b"0" * 64 + b'", "replies": 1, "tokens": 1}',
        b'{"file": "identity.json", "sha256": "' + b"0" * 64 + b'", "replies": 1, "tokens": 1}',
    ],
    ids=["deep", "path", "infinite", "negative", "torn", "huge", "nameless", "another file"],
)
def test_hostile_lines_of_a_manifest_count_for_nothing(line: bytes, root: Path, folder: Path) -> None:
    with (folder / "manifest.jsonl").open("ab") as manifest:
        manifest.write(line + b"\n")
    [store] = stores.scan(root).stores
    assert (store.replies, store.tokens) == (3, 15)
    assert present(root) == [A, B, C]


@pytest.mark.parametrize(
    ("written", "teacher"),
    [
        (b"", "a" * 12),
        (b"null", "a" * 12),
        (b"[" * 100_000, "a" * 12),
        (b'{"teacher": 3, "created": 4}', "a" * 12),
        (b'{"teacher": "", "created": "yesterday"}', "a" * 12),
        (b'{"teacher": "x\\ud800\\u001b[2J\\ny", "created": []}', "x\\ud800\\x1b[2J y"),
        (b'{"teacher": "' + b"x" * 2_000_000 + b'"}', "a" * 12),
        (b'{"teacher": "' + b"x" * 2_000 + b'"}', "x" * 200),
    ],
    ids=["empty", "null", "deep", "numbers", "texts", "codes", "too large", "long"],
)
def test_nothing_depends_on_about_json(written: bytes, teacher: str, root: Path, folder: Path) -> None:
    (folder / "about.json").write_bytes(written)
    [store] = stores.scan(root).stores
    assert (store.teacher, store.created) == (teacher, None)


def linked(folder: Path) -> None:
    folder.rename(folder.parent.parent / "elsewhere")
    folder.symlink_to(folder.parent.parent / "elsewhere")


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def leading_out(path: Path) -> None:
    path.symlink_to(path.parent.parent.parent / "outside")


NO_CACHES: dict[str, Callable[[Path], object]] = {
    "a link": linked,
    "no identity": lambda folder: (folder / "identity.json").unlink(),
    "an empty identity": lambda folder: (folder / "identity.json").write_bytes(b""),
    "half an identity": lambda folder: os.truncate(folder / "identity.json", 40),
    "another identity": lambda folder: (folder / "identity.json").write_text('{"format": 2, "teacher": "b"}'),
    "a list": lambda folder: (folder / "identity.json").write_text("[2]"),
    "no format": lambda folder: (folder / "identity.json").write_text('{"teacher": "a"}'),
    "a format that is a text": lambda folder: (folder / "identity.json").write_text('{"format": "2"}'),
    "not a number": lambda folder: (folder / "identity.json").write_text('{"format": 2, "teacher": NaN}'),
    "a surrogate": lambda folder: (folder / "identity.json").write_text('{"format": 2, "teacher": "\\ud800"}'),
    "too many digits": lambda folder: (folder / "identity.json").write_text(f'{{"format": {"9" * 5000}}}'),
    "no end": lambda folder: (folder / "identity.json").write_text('{"format":' + "[" * 100_000),
    "too large": lambda folder: (folder / "identity.json").write_text('{"format": 2}' + " " * 2_000_000),
    "an identity elsewhere": replaced("identity.json", leading_out),
    "a pipe": replaced("identity.json", os.mkfifo),
    "a folder for an identity": replaced("identity.json", Path.mkdir),
    "a manifest elsewhere": replaced("manifest.jsonl", leading_out),
    "a folder for a manifest": replaced("manifest.jsonl", Path.mkdir),
}


@pytest.mark.parametrize("spoil", NO_CACHES.values(), ids=NO_CACHES.keys())
def test_what_only_looks_like_a_cache_is_left_alone(spoil: Callable[[Path], object], root: Path, folder: Path) -> None:
    shutil.copy(folder / "identity.json", root.parent / "outside")
    spoil(folder)
    before = content(root.parent)
    found = stores.scan(root)
    assert found.stores == ()
    assert list(found.refused) == [folder.name]
    assert found.refused[folder.name].endswith("true-kd leaves it alone.")
    assert found.refused[folder.name].isprintable()
    assert stores.prune(stores.plan_pruning(found.stores, older_than=0, keep_bytes=0)).stores == ()
    with pytest.raises(CacheError):
        stores.find(root, folder.name)
    assert content(root.parent) == before


@pytest.mark.parametrize("name", ["0123456789abcde", "0123456789abcdef0", "0123456789ABCDEF", "notes", ".tmp-x"])
def test_a_folder_of_another_name_is_not_even_looked_at(name: str, root: Path, folder: Path) -> None:
    folder.rename(root / name)
    assert stores.scan(root) == stores.Scan(root, (), {})


def test_a_folder_that_a_kill_left_with_its_lock_alone_is_passed_over(root: Path) -> None:
    (root / "0123456789abcdef").mkdir()
    (root / "0123456789abcdef" / ".lock").touch()
    assert stores.scan(root).refused == {}


# Names.


def test_the_start_of_a_key_is_enough(root: Path, folder: Path) -> None:
    assert stores.find(root, folder.name[:3]).folder == folder
    assert stores.find(root, folder.name.upper()).folder == folder


def test_a_start_of_several_keys_names_them(root: Path) -> None:
    names = [fill(root, [[A]], CacheIdentity({"teacher": str(number)})).name for number in range(40)]
    start = next(name[0] for name in names if sum(other[0] == name[0] for other in names) > 1)
    with pytest.raises(InputError, match="keys begin so, expected one") as caught:
        stores.find(root, start)
    assert sum(name in str(caught.value) for name in names if name[0] == start) > 1
    assert not any(name in str(caught.value) for name in names if name[0] != start)


@pytest.mark.parametrize("key", ["", "x", "..", "/", "0" * 17, "*", "\0", "a" * 1000])
def test_an_unknown_key_is_refused_with_those_there_are(key: str, root: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="no such key") as caught:
        stores.find(root, key)
    assert folder.name in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


# Verifying.


def found_in(folder: Path) -> dict[str, str]:
    """What `verify` says of each file that is not whole."""
    found = stores.verify(stores.read_store(folder))
    return {finding.file: finding.state for finding in found if finding.state != "whole"}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_whole_caches_of_every_kind_are_whole(tmp_path: Path, options: dict) -> None:
    cache = TargetCache(tmp_path, identity_of(options))
    cache.add({A: make_reply(1, 1, **options), B: make_reply(2, 9, "length", **options)})
    if options.get("preset") == "exact":
        add_head(cache)
    findings = list(stores.verify(stores.read_store(cache.folder)))
    assert {finding.state for finding in findings} == {"whole"}
    assert sum(finding.replies for finding in findings) == 2


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte": (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xff"), "damaged"),
    "truncated": (lambda path: os.truncate(path, 100), "damaged"),
    "empty": (lambda path: os.truncate(path, 0), "damaged"),
    "gone": (Path.unlink, "missing"),
    "a link": (lambda path: path.rename(path.parent.parent / "x") and path.symlink_to("../x"), "damaged"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "damaged"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "damaged"),
}


@pytest.mark.parametrize(("damage", "state"), DAMAGES.values(), ids=DAMAGES.keys())
def test_each_damaged_file_is_named(damage: Callable[[Path], object], state: str, folder: Path) -> None:
    second = shards_of(folder)[1]
    damage(second)
    assert found_in(folder) == {second.name: state}


def forgeries(payload: bytes) -> dict[str, bytes]:
    """Shards made of a good one by changing its header; by what was changed."""
    size = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + size])
    metadata = header.pop("__metadata__")
    numbers = json.loads(metadata["layout"])

    def packed(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + payload[8 + size :]

    def shard(tensors: dict, layout: object) -> bytes:
        return packed(json.dumps({"__metadata__": {"layout": layout}, **tensors}).encode())

    made = {
        f"header {text[:9]!r}": packed(text) for text in (b"", b"null", b"3", b"[]", b"{}", b"\xff", b"[" * 100_000)
    }
    made |= {f"layout {text[:9]}": shard(header, text) for text in ("", "null", "3", "[]", "{}", "[" * 100_000)}
    for name, entry in header.items():
        others = {other: value for other, value in header.items() if other != name}
        made[f"no {name}"] = shard(others, metadata["layout"])
        for changed in ({"dtype": "F32"}, {"shape": [2**70]}, {"shape": [2**40]}, {"data_offsets": [0, 2**40]}):
            made[f"{name} {changed}"] = shard({**header, name: {**entry, **changed}}, metadata["layout"])
    for name, number in numbers.items():
        made[f"no {name}"] = shard(header, json.dumps({key: numbers[key] for key in numbers if key != name}))
        for value in (None, [], "3", 1.5, -1, 0, 1, 64, 2**31, 2**45, 2**63, 2**70, float("nan"), float("inf")):
            if value != number:
                made[f"{name} {value}"] = shard(header, json.dumps({**numbers, name: value}))
    return made


@pytest.mark.parametrize("options", [{"share": 0.6}, {"preset": "exact"}], ids=["sparse", "hidden"])
def test_a_forged_shard_with_the_right_digest_is_damaged(options: dict, tmp_path: Path) -> None:
    cache = TargetCache(tmp_path, identity_of(options))
    replies = {key: make_reply(SEEDS[key], 4 + SEEDS[key], **options) for key in (A, B, C)}
    name, tokens = "0123456789abcdef.safetensors", sum(len(reply.tokens) for reply in replies.values())
    cache.add(replies)
    payload = shards_of(cache.folder)[0].read_bytes()
    taken = {}
    for what, forged in forgeries(payload).items():
        cache.add_file(name, len(replies), tokens, lambda path, forged=forged: path.write_bytes(forged))
        store = stores.read_store(cache.folder)
        [finding] = [each for each in stores.verify(store) if each.file == name]
        if finding.state != "damaged" or not finding.reason.isprintable():
            taken[what] = finding
    # Narrower tokens are other tokens, and as good as any.
    assert taken.keys() <= {"token_bits 1"}


def test_a_shard_of_other_settings_or_counts_is_damaged(folder: Path, root: Path) -> None:
    cache = TargetCache(root, IDENTITY)
    cache.add({D: make_reply(4, preset="hot")})
    assert found_in(folder) == {shards_of(folder)[-1].name: "damaged"}
    rewrite(folder, lambda line: line.update(tokens=line["tokens"] + 1))
    assert set(found_in(folder).values()) == {"damaged"}
    assert len(found_in(folder)) == 3


def test_hidden_states_without_their_head_are_no_whole_cache(tmp_path: Path) -> None:
    cache = TargetCache(tmp_path, identity_of({"preset": "exact"}))
    cache.add({A: make_reply(1, preset="exact")})
    assert found_in(cache.folder) == {HEAD: "missing"}
    add_head(cache)
    assert found_in(cache.folder) == {}
    os.truncate(cache.folder / HEAD, 50)
    assert found_in(cache.folder) == {HEAD: "damaged"}


def test_what_kills_left_behind_is_stray_and_no_damage(folder: Path) -> None:
    (folder / ".tmp-abc.safetensors").touch()
    (folder / "manifest.jsonl").write_bytes((folder / "manifest.jsonl").read_bytes()[:-9])
    second = max(folder.glob("[0-9a-f]*.safetensors"), key=lambda path: path not in shards_of(folder))
    assert found_in(folder) == {".tmp-abc.safetensors": "stray", second.name: "stray"}
    assert not any(finding.is_damage for finding in stores.verify(stores.read_store(folder)))


def test_dropping_what_is_damaged_leaves_just_that_to_be_captured_again(root: Path, folder: Path) -> None:
    first, second = shards_of(folder)
    cache = TargetCache(root, IDENTITY)
    cache.add({D: make_reply(4)})
    os.truncate(first, 100)
    shards_of(folder)[2].unlink()
    store = stores.read_store(folder)
    gone = stores.drop_damaged(store, list(stores.verify(store)))
    assert len(gone) == 2
    assert found_in(folder) == {}
    assert present(root) == [C]
    assert sorted(folder.glob("*.safetensors")) == [second]
    fill(root, [[A, B], [D]])
    assert present(root) == [A, B, C, D]


def test_a_file_that_was_mended_since_is_not_dropped(root: Path, folder: Path) -> None:
    os.truncate(shards_of(folder)[0], 100)
    store = stores.read_store(folder)
    findings = list(stores.verify(store))
    fill(root, [[A, B]])
    assert stores.drop_damaged(store, findings) == ()
    assert present(root) == [A, B, C]


def test_a_cache_that_another_process_writes_to_is_not_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_PATIENCE", 0.0)
    (folder / ".tmp-x").touch()
    os.truncate(shards_of(folder)[0], 100)
    store = stores.read_store(folder)
    before = content(folder)
    with FileLock(folder / ".lock"):
        for change in (
            lambda: stores.drop_damaged(store, list(stores.verify(store))),
            lambda: stores.prune(stores.plan_pruning([store])),
            lambda: stores.prune(stores.plan_pruning([store], [store])),
        ):
            with pytest.raises(TrueKDError, match="another process is writing") as caught:
                change()
            assert caught.value.exit_code == 3
    assert content(folder) == before


# Pruning.


@pytest.fixture
def three(tmp_path: Path) -> list[stores.Store]:
    """Caches that were used 10, 20 and 30 days ago, the last used first."""
    for days, key in ((10, A), (20, B), (30, C)):
        age(fill(tmp_path / "root", [[key]], identity_of(teacher=f"{days // 10}")), days)
    return list(stores.scan(tmp_path / "root").stores)


def going(plan: stores.Pruning, every: list[stores.Store]) -> list[int]:
    """The places of the caches that go."""
    return [every.index(store) for store in plan.stores]


def test_without_a_rule_no_cache_goes(three: list[stores.Store]) -> None:
    assert stores.plan_pruning(three) == stores.Pruning((), {})


def test_named_caches_go_and_rules_choose_among_them(three: list[stores.Store]) -> None:
    assert going(stores.plan_pruning(three, three[:2]), three) == [0, 1]
    assert going(stores.plan_pruning(three, three[:2], older_than=15 * 86400), three) == [1]
    assert going(stores.plan_pruning(three, three[:2], keep_bytes=0), three) == [0, 1]


@pytest.mark.parametrize(("days", "gone"), [(5, [0, 1, 2]), (15, [1, 2]), (25, [2]), (40, [])])
def test_caches_go_by_age(days: float, gone: list[int], three: list[stores.Store]) -> None:
    assert going(stores.plan_pruning(three, older_than=days * 86400), three) == gone


def test_the_longest_unused_go_until_the_rest_is_small_enough(three: list[stores.Store]) -> None:
    sizes = [store.bytes for store in three]
    assert going(stores.plan_pruning(three, keep_bytes=sum(sizes)), three) == []
    assert going(stores.plan_pruning(three, keep_bytes=sum(sizes) - 1), three) == [2]
    assert going(stores.plan_pruning(three, keep_bytes=sizes[0]), three) == [1, 2]
    assert going(stores.plan_pruning(three, keep_bytes=0), three) == [0, 1, 2]
    assert going(stores.plan_pruning(three, older_than=25 * 86400, keep_bytes=sizes[0] + sizes[1]), three) == [2]


def test_a_small_cache_stays_though_a_larger_one_was_used_later(three: list[stores.Store]) -> None:
    fill(three[0].folder.parent, [[B, C, D]], identity_of(teacher="1"))
    age(three[0].folder, 10)
    every = list(stores.scan(three[0].folder.parent).stores)
    assert going(stores.plan_pruning(every, keep_bytes=every[0].bytes - 1), every)[0] == 0
    assert len(going(stores.plan_pruning(every, keep_bytes=every[0].bytes - 1), every)) < 3


def test_named_caches_make_room_for_the_others(three: list[stores.Store]) -> None:
    assert going(stores.plan_pruning(three, three[:2], keep_bytes=three[2].bytes), three) == [0, 1]
    assert going(stores.plan_pruning(three, three[:2], keep_bytes=three[2].bytes + three[0].bytes), three) == [1]


def test_planning_removes_nothing(three: list[stores.Store]) -> None:
    root = three[0].folder.parent
    (three[0].folder / ".tmp-x").touch()
    before = content(root)
    assert stores.plan_pruning(stores.scan(root).stores, older_than=0).bytes > 0
    assert content(root) == before


def test_a_pruned_cache_is_gone_and_the_others_are_as_they_were(three: list[stores.Store]) -> None:
    root = three[0].folder.parent
    kept = content(three[0].folder)
    done = stores.prune(stores.plan_pruning(three, older_than=15 * 86400))
    assert going(done, three) == [1, 2]
    assert done.bytes == three[1].bytes + three[2].bytes
    assert [path.name for path in root.iterdir()] == [three[0].key]
    assert content(three[0].folder) == kept


def test_a_cache_that_was_used_since_stays(three: list[stores.Store]) -> None:
    plan = stores.plan_pruning(three, older_than=15 * 86400)
    TargetCache(three[1].folder.parent, identity_of(teacher="2")).read([B])
    assert going(stores.prune(plan), three) == [2]
    assert three[1].folder.exists()


def test_left_over_files_go_and_the_replies_stay(root: Path, folder: Path) -> None:
    (folder / ".tmp-x.safetensors").write_bytes(b"12345")
    (folder / "0123456789abcdef.safetensors").write_bytes(b"123")
    before = stores.read_store(folder)
    done = stores.prune(stores.plan_pruning([before]))
    assert done.bytes == 8
    assert {path.name for path in done.strays} == {".tmp-x.safetensors", "0123456789abcdef.safetensors"}
    after = stores.read_store(folder)
    assert (after.stray, after.last_used) == ((), before.last_used)
    assert present(root) == [A, B, C]


def test_a_file_that_got_its_line_since_is_no_left_over(root: Path, folder: Path) -> None:
    manifest = (folder / "manifest.jsonl").read_bytes()
    (folder / "manifest.jsonl").write_bytes(manifest[:-9])
    plan = stores.plan_pruning([stores.read_store(folder)])
    assert len(plan.strays) == 1
    (folder / "manifest.jsonl").write_bytes(manifest)
    assert stores.prune(plan).strays == {}
    assert present(root) == [A, B, C]


def test_what_is_not_of_true_kd_stays_even_in_a_pruned_cache(root: Path, folder: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (folder / "notes.txt").write_text("mine")
    (folder / ".DS_Store").touch()
    (folder / "0123456789abcdef.safetensors").symlink_to(outside / "kept")
    (folder / ".tmp-link").symlink_to(outside)
    (folder / ".tmp-folder").mkdir()
    store = stores.read_store(folder)
    assert store.stray == ()
    assert store.others == (".tmp-folder", ".tmp-link", "0123456789abcdef.safetensors", "notes.txt")
    stores.prune(stores.plan_pruning([store], [store]))
    assert sorted(path.name for path in folder.iterdir()) == sorted(store.others)
    assert content(outside) == {"kept": b"kept"}


@pytest.mark.parametrize(
    ("text", "seconds"), [("30d", 2592000), ("12h", 43200), ("2w", 1209600), ("5m", 300), ("1.5 d", 129600), ("0d", 0)]
)
def test_ages_are_read(text: str, seconds: float) -> None:
    assert stores.parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1y", "1e9d", "٣d", "9" * 99 + "d", "nan d", "30d\0"])
def test_what_is_no_age_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected minutes, hours, days or weeks") as caught:
        stores.parse_age(text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("10GB", 10**10),
        ("1.5 kB", 1500),
        ("2gib", 2**31),
        ("0B", 0),
        ("700b", 700),
        ("1TB", 10**12),
        ("3MiB", 3 * 2**20),
    ],
)
def test_sizes_are_read(text: str, length: int) -> None:
    assert stores.parse_size(text) == length


@pytest.mark.parametrize("text", ["", "10", "GB", "-1GB", "1iB", "1PB", "1e3GB", "9" * 99 + "GB", "inf GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected kB, MB, GB or TB"):
        stores.parse_size(text)


# From one machine to another.


@pytest.fixture
def exported(root: Path, folder: Path, tmp_path: Path) -> Path:
    """What the cache of `root` is as an export."""
    stores.export_store(stores.read_store(folder), tmp_path / "export")
    return tmp_path / "export"


def test_an_exported_and_imported_cache_has_the_same_replies(root: Path, exported: Path, tmp_path: Path) -> None:
    moved = stores.import_store(exported, tmp_path / "there")
    assert (moved.folder, moved.files, moved.replies, moved.present) == (
        tmp_path / "there" / IDENTITY.folder_name,
        2,
        3,
        0,
    )
    ours, theirs = (TargetCache(place, IDENTITY).read([A, B, C]) for place in (root, tmp_path / "there"))
    for key in (A, B, C):
        assert_same(theirs[key], ours[key])
    one, other = (stores.scan(place).stores[0] for place in (root, tmp_path / "there"))
    assert (one.teacher, one.created, one.files) == (other.teacher, other.created, other.files)
    assert found_in(moved.folder) == {}


def test_hidden_states_travel_with_their_head(tmp_path: Path) -> None:
    identity = identity_of({"preset": "exact"})
    cache = TargetCache(tmp_path / "root", identity)
    add_head(cache)
    cache.add({A: make_reply(1, preset="exact")})
    stores.export_store(stores.read_store(cache.folder), tmp_path / "export")
    stores.import_store(tmp_path / "export", tmp_path / "there")
    there = TargetCache(tmp_path / "there", identity)
    assert A in there
    assert digest_file(there.head_path) == digest_file(cache.head_path)


def test_an_export_has_the_files_of_the_manifest_and_no_others(folder: Path, tmp_path: Path) -> None:
    (folder / ".tmp-x").touch()
    (folder / "notes.txt").touch()
    (folder / "0123456789abcdef.safetensors").touch()
    with (folder / "manifest.jsonl").open("ab") as manifest:
        manifest.write(b'{"file": "half')
    shards = [path.name for path in shards_of(folder)]
    (tmp_path / "export").mkdir()
    stores.export_store(stores.read_store(folder), tmp_path / "export")
    expected = {*shards, "identity.json", "about.json", "manifest.jsonl"}
    assert {path.name for path in (tmp_path / "export").iterdir()} == expected
    assert len((tmp_path / "export" / "manifest.jsonl").read_text().splitlines()) == 2


def test_a_copy_made_by_hand_can_be_imported(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / folder.name)
    stores.import_store(tmp_path / folder.name, tmp_path / "there")
    assert present(tmp_path / "there") == [A, B, C]


OCCUPIED: dict[str, Callable[[Path], object]] = {
    "a file": Path.touch,
    "a folder with a file": lambda path: (path.mkdir(), (path / "x").touch()),
    "a link": lambda path: path.symlink_to(path.parent / "nowhere"),
    "a link to an empty folder": lambda path: ((path.parent / "empty").mkdir(), path.symlink_to(path.parent / "empty")),
}


@pytest.mark.parametrize("occupy", OCCUPIED.values(), ids=OCCUPIED.keys())
def test_an_export_never_takes_a_place_that_is_taken(
    occupy: Callable[[Path], object], folder: Path, tmp_path: Path
) -> None:
    occupy(tmp_path / "export")
    before = content(tmp_path)
    with pytest.raises(InputError, match="Choose another"):
        stores.export_store(stores.read_store(folder), tmp_path / "export")
    assert content(tmp_path) == before


def test_an_export_goes_neither_among_the_caches_nor_into_the_current_folder(
    root: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    before = content(tmp_path)
    for place in (root / "export", folder / "export", root, Path(), Path("..") / root.name / "x"):
        with pytest.raises(InputError, match="Choose another"):
            stores.export_store(stores.read_store(folder), place)
    assert content(tmp_path) == before


def test_a_damaged_cache_is_not_exported(folder: Path, tmp_path: Path) -> None:
    os.truncate(shards_of(folder)[1], 100)
    before = content(tmp_path)
    with pytest.raises(CacheError, match="verify --remove"):
        stores.export_store(stores.read_store(folder), tmp_path / "export")
    assert content(tmp_path) == before
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_cache_without_replies_or_of_another_format_is_not_exported(root: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.jsonl").unlink()
    with pytest.raises(InputError, match="holds no replies"):
        stores.export_store(stores.read_store(folder), tmp_path / "export")
    written = {"format": FORMAT + 1}
    newer = root / digest_json(written)[:16]
    newer.mkdir()
    (newer / "identity.json").write_text(json.dumps(written))
    with pytest.raises(InputError, match="upgrade this one"):
        stores.export_store(stores.read_store(newer), tmp_path / "export")


def test_two_exports_do_not_write_one_folder(folder: Path, tmp_path: Path) -> None:
    staging = tmp_path / f".tmp-export-{folder.name}"
    staging.mkdir()
    with FileLock(staging / ".lock"), pytest.raises(TrueKDError, match="another process") as caught:
        stores.export_store(stores.read_store(folder), tmp_path / "export")
    assert caught.value.exit_code == 3
    stores.export_store(stores.read_store(folder), tmp_path / "export")
    (tmp_path / f".tmp-export-{folder.name}").mkdir()
    (tmp_path / f".tmp-export-{folder.name}" / "thesis.txt").touch()
    with pytest.raises(InputError, match="in the way"):
        stores.export_store(stores.read_store(folder), tmp_path / "other")


def test_an_import_adds_what_the_cache_lacks_and_leaves_the_rest(exported: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    fill(there, [[C], [A, D]])
    before = content(there)
    moved = stores.import_store(exported, there)
    assert (moved.files, moved.replies, moved.present) == (1, 2, 1)
    assert present(there) == [A, B, C, D]
    after = content(there)
    manifest = f"{IDENTITY.folder_name}/manifest.jsonl"
    assert {name: after[name] for name in before if name != manifest} == {
        name: text for name, text in before.items() if name != manifest
    }
    assert after[manifest].startswith(before[manifest])
    assert stores.import_store(exported, there).files == 0
    assert content(there) == after


def test_an_import_mends_what_is_damaged(root: Path, folder: Path, exported: Path) -> None:
    os.truncate(shards_of(folder)[0], 100)
    shards_of(folder)[1].unlink()
    assert stores.import_store(exported, root).files == 2
    assert present(root) == [A, B, C]
    assert found_in(folder) == {}


def altered_shard(folder: Path, alter: Callable[[Path], object]) -> None:
    alter(shards_of(folder)[1])


def renamed(name: str) -> Callable[[Path], None]:
    """Lead a line of the manifest to a file elsewhere, which is whole."""

    def change(folder: Path) -> None:
        shard = shards_of(folder)[1]
        if name.startswith("../"):
            shutil.copy(shard, folder / name)
        rewrite(folder, lambda line: line.update(file=name) if line["file"] == shard.name else None)

    return change


def reidentified(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        identity = json.loads((folder / "identity.json").read_text())
        change(identity)
        (folder / "identity.json").write_text(json.dumps(identity))

    return alter


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def keyed(folder: Path) -> None:
    """A copy by hand whose identity was changed."""
    reidentified(lambda identity: identity.update(teacher="b" * 64))(folder)
    folder.rename(folder.parent / IDENTITY.folder_name)
    folder.symlink_to(folder.parent / IDENTITY.folder_name)


TRICKS: dict[str, tuple[Callable[[Path], object], type[TrueKDError]]] = {
    "a byte of a shard": (lambda folder: altered_shard(folder, DAMAGES["a byte"][0]), CacheError),
    "a missing shard": (lambda folder: altered_shard(folder, lambda path: path.unlink()), CacheError),
    "a link for a shard": (lambda folder: altered_shard(folder, DAMAGES["a link"][0]), CacheError),
    "a pipe for a shard": (lambda folder: altered_shard(folder, DAMAGES["a pipe"][0]), CacheError),
    "a way up": (renamed("../0123456789abcdef.safetensors"), CacheError),
    "a whole path": (renamed("/etc/passwd"), CacheError),
    "identity.json as a shard": (renamed("identity.json"), CacheError),
    "the lock as a shard": (renamed(".lock"), CacheError),
    "no name": (renamed(""), CacheError),
    "a nul": (renamed("\0"), CacheError),
    "huge counts": (lambda folder: rewrite(folder, lambda line: line.update(replies=10**30)), CacheError),
    "other counts": (lambda folder: rewrite(folder, lambda line: line.update(replies=9)), CacheError),
    "a digit of a count": (
        lambda folder: replace_text(folder / "manifest.jsonl", '"tokens": 10', '"tokens": 11'),
        CacheError,
    ),
    "another share": (reidentified(lambda identity: identity["targets"].update(share=0.5)), CacheError),
    "another teacher": (reidentified(lambda identity: identity.update(teacher="b" * 64)), CacheError),
    "no digest": (lambda folder: rewrite(folder, lambda line: line.update(sha256="")), CacheError),
    "no manifest": (lambda folder: (folder / "manifest.jsonl").unlink(), CacheError),
    "an empty manifest": (lambda folder: (folder / "manifest.jsonl").write_bytes(b""), InputError),
    "half a line": (lambda folder: os.truncate(folder / "manifest.jsonl", 200), CacheError),
    "a manifest that is a pipe": (replaced("manifest.jsonl", os.mkfifo), CacheError),
    "a manifest elsewhere": (replaced("manifest.jsonl", leading_out), CacheError),
    "a manifest without end": (lambda folder: (folder / "manifest.jsonl").write_bytes(b"[" * 100_000), CacheError),
    "no identity": (lambda folder: (folder / "identity.json").unlink(), InputError),
    "an identity that is a pipe": (replaced("identity.json", os.mkfifo), CacheError),
    "other settings": (reidentified(lambda identity: identity["targets"].update(threshold=0.3)), CacheError),
    "no settings": (reidentified(lambda identity: identity.update(targets=None)), CacheError),
    "another key than the folder's name": (keyed, CacheError),
    "an older format": (reidentified(lambda identity: identity.update(format=FORMAT - 1)), InputError),
    "a newer format": (reidentified(lambda identity: identity.update(format=FORMAT + 1)), InputError),
    "a huge format": (reidentified(lambda identity: identity.update(format=10**4000)), InputError),
}


@pytest.mark.parametrize(("trick", "refusal"), TRICKS.values(), ids=TRICKS.keys())
def test_an_import_of_anything_else_than_a_whole_cache_is_refused_and_writes_nothing(
    trick: Callable[[Path], object], refusal: type[TrueKDError], exported: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    fill(there, [[D]])
    trick(exported)
    before = content(there)
    with pytest.raises(refusal) as caught:
        stores.import_store(exported, there)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    assert content(there) == before


def test_an_import_writes_through_no_link(root: Path, folder: Path, exported: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for spoil in (
        lambda there: there.symlink_to(outside),
        lambda there: (there.mkdir(), (there / "manifest.jsonl").symlink_to(outside / "new")),
        lambda there: (there.mkdir(), (there / "identity.json").symlink_to(outside / "new")),
        lambda there: (there.mkdir(), (there / "notes.txt").touch()),
        Path.touch,
    ):
        place = tmp_path / "there"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        spoil(place / IDENTITY.folder_name)
        with pytest.raises(CacheError, match="leaves it alone"):
            stores.import_store(exported, place)
        assert list(outside.iterdir()) == []


def test_a_link_for_a_shard_is_replaced_and_not_followed(exported: Path, tmp_path: Path) -> None:
    there = fill(tmp_path / "there", [[D]])
    (tmp_path / "outside").write_text("mine")
    (there / shards_of(exported)[0].name).symlink_to(tmp_path / "outside")
    stores.import_store(exported, tmp_path / "there")
    assert (tmp_path / "outside").read_text() == "mine"
    assert present(tmp_path / "there") == [A, B, C, D]


# What travels beside the replies.

DEMAND = "demand-0123456789abcdef.json"
SIZE = "size-0123456789abcdef.json"


def stand_in(path: Path, config: bytes = b"{}") -> str:
    """Write a teacher without its weights; its digest."""
    write_stand_in(path, {"config.json": config, "tokenizer.json": b"{}"}, {"model.safetensors": "e" * 64})
    return read_stand_in(path).digest


@pytest.fixture
def known(tmp_path: Path) -> TargetCache:
    """A cache that knows its teacher, what a budget needs of it, and how large it is."""
    teacher = stand_in(tmp_path / "stand-in")
    facts = {**IDENTITY.facts, "teacher": teacher}
    cache = TargetCache(tmp_path / "known", CacheIdentity(facts, IDENTITY.about))
    cache.add({A: make_reply(1)})
    cache.keep(TEACHER, stand_in)
    cache.keep(DEMAND, lambda path: write_demand(path, Demand((2.0, 3.5), 4.5, 9)))
    cache.keep(SIZE, lambda path: write_size(path, ModelSize(1000, 4000, 12.5)))
    return cache


def test_a_teacher_its_demand_and_its_size_travel_with_the_replies(known: TargetCache, tmp_path: Path) -> None:
    store = stores.read_store(known.folder)
    assert (len(store.files), len(store.shards), store.stray, store.others) == (4, 1, (), ())
    assert found_in(known.folder) == {}
    stores.export_store(store, tmp_path / "export")
    moved = stores.import_store(tmp_path / "export", tmp_path / "there")
    assert (moved.files, moved.replies) == (4, 1)
    for name in (TEACHER, DEMAND, SIZE):
        assert (moved.folder / name).read_bytes() == (known.folder / name).read_bytes()
    assert stores.import_store(tmp_path / "export", tmp_path / "there").present == 4
    (moved.folder / TEACHER).write_bytes(b"x")
    assert stores.import_store(tmp_path / "export", tmp_path / "there").files == 1
    assert found_in(moved.folder) == {}
    stores.prune(stores.plan_pruning(stores.scan(tmp_path / "there").stores, keep_bytes=0))
    assert not moved.folder.exists()


def test_the_teacher_of_a_cache_is_found_by_the_start_of_its_key(known: TargetCache, root: Path) -> None:
    assert stores.find_teacher(known.folder.parent, known.folder.name[:3]) == (known.folder / TEACHER, "some/teacher")
    with pytest.raises(InputError, match=r"Run `true-kd capture` again"):
        stores.find_teacher(root, IDENTITY.folder_name)
    with pytest.raises(InputError, match="no such key"):
        stores.find_teacher(known.folder.parent, "")
    (known.folder / TEACHER).unlink()
    with pytest.raises(CacheError, match=r"missing .* Import it again"):
        stores.find_teacher(known.folder.parent, known.folder.name)


def without_weights(path: Path) -> None:
    write_stand_in(path, {"config.json": b"{}", "tokenizer.json": b"{}"}, {})


FALSE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "another teacher": (TEACHER, lambda path: stand_in(path, b"{ }")),
    "no weights": (TEACHER, without_weights),
    "no stand-in": (TEACHER, lambda path: path.write_bytes(b"\x02" + bytes(7) + b"{}")),
    "a link": (TEACHER, leading_out),
    "no numbers": (DEMAND, lambda path: write_record(path, {"entries": ["1"], "reply_tokens": 1, "tokens": 1})),
    "a negative demand": (DEMAND, lambda path: write_demand(path, Demand((-1.0,), 1.0, 1))),
    "an endless demand": (DEMAND, lambda path: path.write_text('{"entries": [Infinity], "reply_tokens": 1}')),
    "half a demand": (DEMAND, lambda path: write_record(path, {"entries": [1.0], "reply_tokens": 1.0})),
    "a changed demand": (DEMAND, lambda path: path.write_text('{"entries": [1.0], "reply_tokens": 1.0, "tokens": 1}')),
    "no demand": (DEMAND, lambda path: path.write_text("[" * 60_000)),
    "a huge demand": (DEMAND, lambda path: path.write_bytes(b" " * 100_000)),
    "a negative size": (SIZE, lambda path: path.write_text('{"parameters": -1, "bytes": 1}')),
    "a size of words": (SIZE, lambda path: path.write_text('{"parameters": "1", "bytes": 1}')),
    "an endless speed": (
        SIZE,
        lambda path: path.write_text('{"parameters": 1, "bytes": 1, "tokens_per_second": Infinity}'),
    ),
    "no size": (SIZE, lambda path: path.write_text("[" * 16_000)),
    "a huge size": (SIZE, lambda path: path.write_bytes(b" " * 100_000)),
}


@pytest.mark.parametrize(("name", "forge"), FALSE.values(), ids=FALSE.keys())
def test_a_forged_teacher_demand_or_size_with_the_right_digest_is_not_imported(
    name: str, forge: Callable[[Path], object], known: TargetCache, tmp_path: Path
) -> None:
    stores.export_store(stores.read_store(known.folder), tmp_path / "export")
    path = tmp_path / "export" / name
    path.unlink()
    forge(path)
    sha256 = digest_file(path) if path.is_file() else "0" * 64
    rewrite(tmp_path / "export", lambda line: line.update(sha256=sha256) if line["file"] == name else None)
    with pytest.raises(CacheError, match="Nothing was imported") as caught:
        stores.import_store(tmp_path / "export", tmp_path / "there")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    "name",
    [
        "demand-x.json",
        "demand-0123456789abcdef.json/x",
        "Teacher.safetensors",
        "../" + DEMAND,
        "size-x.json",
        "../" + SIZE,
    ],
)
def test_no_other_names_travel(name: str, known: TargetCache, tmp_path: Path) -> None:
    stores.export_store(stores.read_store(known.folder), tmp_path / "export")
    rewrite(tmp_path / "export", lambda line: line.update(file=name) if line["file"] == DEMAND else None)
    with pytest.raises(CacheError, match="names no file of a cache"):
        stores.import_store(tmp_path / "export", tmp_path / "there")


# Kills.


def test_a_kill_at_any_moment_of_an_import_leaves_only_whole_replies(exported: Path, tmp_path: Path) -> None:
    mx.synchronize()
    for operation in range(200):
        there = tmp_path / str(operation)
        killed = killed_at(operation, lambda there=there: stores.import_store(exported, there))
        found = present(there)
        assert found in ([], [A, B], [A, B, C])
        for key, reply in TargetCache(there, IDENTITY).read(found).items():
            assert_same(reply, make_reply(SEEDS[key]))
        stores.import_store(exported, there)
        assert present(there) == [A, B, C]
        every = stores.scan(there)
        assert every.refused == {}
        stores.prune(stores.plan_pruning(every.stores))
        assert found_in(there / IDENTITY.folder_name) == {}
        shutil.rmtree(there)
        if not killed:
            break
    else:
        raise AssertionError("never came to its end")
    assert operation > 20


def test_a_kill_at_any_moment_of_an_export_leaves_it_whole_or_not_there(tmp_path: Path) -> None:
    mx.synchronize()
    store = stores.read_store(fill(tmp_path / "root", [[A, B, C]]))
    place = tmp_path / "exports"
    seen = set()
    for operation in range(200):
        place.mkdir()
        killed = killed_at(operation, lambda: stores.export_store(store, place / "export"))
        seen.add((place / "export").exists())
        if not (place / "export").exists():
            stores.export_store(store, place / "export")
        assert [path.name for path in place.iterdir()] == ["export"]
        stores.import_store(place / "export", place / "there")
        assert present(place / "there") == [A, B, C]
        shutil.rmtree(place)
        if not killed:
            break
    else:
        raise AssertionError("never came to its end")
    assert operation > 20
    assert seen == {True, False}


def test_a_kill_at_any_moment_of_pruning_leaves_a_cache_or_what_can_be_pruned(tmp_path: Path) -> None:
    mx.synchronize()
    for operation in range(100):
        root = tmp_path / str(operation)
        folder = fill(root, [[A, B], [C]])
        store = stores.read_store(folder)
        killed = killed_at(operation, lambda store=store: stores.prune(stores.plan_pruning([store], [store])))
        assert present(root) in ([], [A, B, C])
        every = stores.scan(root)
        assert every.refused == {}
        stores.prune(stores.plan_pruning(every.stores, every.stores))
        assert content(root) == {}
        if not killed:
            break
    else:
        raise AssertionError("never came to its end")
    assert operation > 5
