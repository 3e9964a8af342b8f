"""`true-kd cache` as its users meet it: what it prints, its exit codes, and mistakes in one line."""

from __future__ import annotations

import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from test_cli import lay_out, only_line, refused
from test_stores import IDENTITY, A, B, C, D, age, content, fill, identity_of, present, shards_of

from true_kd import pocket, stores
from true_kd.cache import FORMAT
from true_kd.files import digest_json
from true_kd.manifest import SHARD, TEACHER

KEY = IDENTITY.folder_name
COMMANDS = ("ls", "info", "verify", "prune", "export", "import")


@pytest.fixture
def folder(own_cache: Path) -> Path:
    """The folder of a cache in $TRUE_KD_CACHE: A and B in one shard, C in another."""
    return fill(own_cache, [[A, B], [C]])


def said(ended) -> str:
    """What a call that went well printed."""
    assert (ended.code, ended.err) == (0, ""), ended
    return ended.out


# What is printed.


def test_the_help_names_the_commands_and_what_they_do(cli) -> None:
    assert cli("cache") == cli("cache", "--help")
    lines = said(cli("cache")).splitlines()
    for command in COMMANDS:
        [line] = [line for line in lines if line.strip().startswith(f"{command} ")]
        assert line.endswith("."), line
        assert not line.endswith("..."), line
        assert "--cache PATH" in said(cli("cache", command, "--help"))


def test_the_caches_of_a_root_are_listed(cli, folder: Path, own_cache: Path) -> None:
    lines = said(cli("cache", "ls")).splitlines()
    assert lines[0].split() == ["key", "teacher", "targets", "replies", "tokens", "size", "B/token", "used"]
    words = lines[1].split()
    assert words[:6] == [KEY[:8], "teacher", "0.02", "T2", "3", "15"]
    assert words[-2:] == ["0", "min"]
    assert lines[2].startswith("1 cache, ")
    assert lines[2].endswith(f" in {own_cache}")


def test_keys_are_shown_as_long_as_tells_them_apart(cli, own_cache: Path) -> None:
    for name in ("0123456789aaaaaa", "0123456789abbbbb"):
        (own_cache / name).mkdir(parents=True)
        (own_cache / name / "identity.json").write_text("{}")
    assert "0 caches" in said(cli("cache", "ls"))
    from true_kd.cli.caches import _digits

    assert _digits(["0123456789aaaaaa", "0123456789abbbbb"]) == 12
    assert _digits(["0123456789aaaaaa"]) == 8


def test_programs_get_json(cli, folder: Path) -> None:
    [listed] = json.loads(said(cli("cache", "ls", "--json")))
    assert (listed["key"], listed["replies"], listed["tokens"], listed["shards"]) == (KEY, 3, 15, 2)
    assert listed["identity"]["targets"] == IDENTITY.facts["targets"]
    assert listed["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    shown = json.loads(said(cli("cache", "info", KEY, "--json")))
    assert shown == {**listed, "findings": []}
    checked = json.loads(said(cli("cache", "verify", "--json")))
    assert [finding["state"] for finding in checked["caches"][KEY]["findings"]] == ["whole", "whole"]
    assert json.loads(said(cli("cache", "ls", "--json", "--cache", "nowhere"))) == []


def test_info_tells_all_about_one_cache(cli, folder: Path) -> None:
    shown = dict(line.split(maxsplit=1) for line in said(cli("cache", "info", KEY[:4])).splitlines())
    assert (shown["key"], shown["folder"], shown["teacher"]) == (KEY, str(folder), "some/teacher")
    assert (shown["shards"], shown["replies"], shown["tokens"], shown["state"]) == ("2", "3", "15", "whole")
    assert shown["targets"] == ", ".join(f"{name} {value}" for name, value in IDENTITY.facts["targets"].items())
    assert shown["digest"] == "a" * 64


def test_info_names_what_is_damaged(cli, folder: Path) -> None:
    first, second = shards_of(folder)
    os.truncate(first, 100)
    second.unlink()
    lines = said(cli("cache", "info", KEY)).splitlines()
    assert "state      2 of 2 files damaged or missing" in lines
    assert f"damaged    {first.name} (its digest is not the manifest's)" in lines
    assert f"missing    {second.name} (no such file)" in lines


def test_another_cache_than_the_default_one_is_looked_at(cli, folder: Path, tmp_path: Path) -> None:
    for command in ("ls", "verify", "prune"):
        assert str(tmp_path / "nowhere") in said(cli("cache", command, "--cache", str(tmp_path / "nowhere")))
    assert KEY in refused(cli("cache", "info", "zz"))
    assert "expected a folder with caches" in refused(cli("cache", "info", KEY, "--cache", str(tmp_path)))


def test_a_cache_of_another_format_is_shown_as_one(cli, folder: Path, own_cache: Path) -> None:
    written = {"format": 1, "teacher": "b" * 64}
    old = own_cache / digest_json(written)[:16]
    old.mkdir()
    (old / "identity.json").write_text(json.dumps(written))
    assert "format 1" in said(cli("cache", "ls"))
    assert "format 1, of another version" in said(cli("cache", "info", old.name))
    assert f"{old.name}: format 1, of another version of true-kd; not checked" in said(cli("cache", "verify"))
    assert {listed["format"] for listed in json.loads(said(cli("cache", "ls", "--json")))} == {1, FORMAT}


def test_what_a_stranger_wrote_has_no_power_over_the_terminal(cli, folder: Path) -> None:
    (folder / "about.json").write_text(json.dumps({"teacher": "\x1b[2J\x07evil\n\u202e"}))
    for command in (["ls"], ["info", KEY], ["prune", KEY]):
        out = said(cli("cache", *command))
        assert "\x1b" not in out
        assert "\x07" not in out


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_table_fits_the_terminal(width: int, folder: Path) -> None:
    import fcntl

    fill(folder.parent, [[D]], identity_of({"preset": "hot"}, name="mlx-community/Qwen2.5-72B-Instruct-8bit"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    done = subprocess.run(
        [sys.executable, "-m", "true_kd", "cache", "ls"],
        stdout=theirs,
        stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": str(width)},
        check=False,
    )
    shown = os.read(ours, 65536).decode()
    os.close(theirs)
    os.close(ours)
    assert (done.returncode, done.stderr) == (0, b"")
    table = shown.splitlines()[:-1]
    assert all(len(line.replace("\x1b[1m", "").replace("\x1b[0m", "").rstrip()) <= width for line in table), shown
    assert "2.5-72B" in shown
    assert KEY[:8] in shown
    assert ("replies" in shown) == (width >= 78)


# Verify.


def test_damage_is_named_and_ends_with_5(cli, folder: Path, own_cache: Path) -> None:
    first, second = shards_of(folder)
    os.truncate(first, 100)
    second.unlink()
    (folder / ".tmp-x").touch()
    ended = cli("cache", "verify", KEY[:5])
    assert ended.code == 5
    assert ended.out.splitlines() == [
        f"{KEY}/{first.name}: damaged (its digest is not the manifest's), 2 replies",
        f"{KEY}/{second.name}: missing (no such file), 1 reply",
        f"{KEY}/.tmp-x: stray (a temporary file); see `true-kd cache prune`",
        f"{KEY}: 0 of 2 files whole, 3 replies",
    ]
    line = only_line(ended.err)
    assert line.startswith(f"{own_cache}: 2 files damaged or missing, expected none. Run `true-kd cache verify")
    assert cli("cache", "verify", "--json").code == 5


def test_what_is_damaged_is_removed_on_request(cli, folder: Path, own_cache: Path) -> None:
    os.truncate(shards_of(folder)[0], 100)
    ended = cli("cache", "verify", "--remove")
    assert ended.code == 5
    assert "2 replies; dropped" in ended.out
    assert only_line(ended.err).endswith("1 file dropped: the next run captures again what was lost.")
    assert said(cli("cache", "verify")) == f"{KEY}: 1 of 1 files whole, 1 reply\n"
    assert present(own_cache) == [C]


def test_an_identity_that_was_changed_is_damage_and_a_link_is_not(cli, folder: Path, own_cache: Path) -> None:
    (own_cache / "0123456789abcdef").symlink_to(folder)
    out = said(cli("cache", "verify"))
    assert out == f"{KEY}: 2 of 2 files whole, 3 replies\n"
    assert "0123456789abcdef: a link" in said(cli("cache", "ls"))
    (folder / "identity.json").write_text('{"format": 2}')
    ended = cli("cache", "verify")
    assert ended.code == 5
    assert "1 folder not as named" in only_line(ended.err)
    assert KEY in ended.out


# Prune.


def test_pruning_only_tells_until_it_is_told_yes(cli, folder: Path, own_cache: Path) -> None:
    age(folder, 40)
    (fill(own_cache, [[D]], identity_of(teacher="b")) / ".tmp-x").write_bytes(b"12345")
    before = content(own_cache)
    out = said(cli("cache", "prune", "--older-than", "30d"))
    assert f"would go: {KEY} (some/teacher, " in out
    assert "used 40 d ago" in out
    assert "/.tmp-x (left by a killed run, 5 B)" in out
    assert out.endswith("Nothing was removed: add --yes.\n")
    assert content(own_cache) == before
    out = said(cli("cache", "prune", "--older-than", "30d", "--yes"))
    assert f"removed: {KEY}" in out
    assert "freed" in out.splitlines()[-1]
    assert not folder.exists()
    assert present(own_cache, identity_of(teacher="b")) == [D]
    assert "nothing to remove" in said(cli("cache", "prune", "--older-than", "30d", "--yes"))


def test_caches_are_pruned_by_name_and_by_size(cli, folder: Path, own_cache: Path) -> None:
    other = fill(own_cache, [[D]], identity_of(teacher="b"))
    age(folder, 1)
    assert "nothing to remove" in said(cli("cache", "prune", "--keep-size", "1GB", "-y"))
    said(cli("cache", "prune", "--keep-size", f"{sum(path.stat().st_size for path in other.iterdir())}B", "-y"))
    assert (folder.exists(), other.exists()) == (False, True)
    said(cli("cache", "prune", other.name[:6], "--yes"))
    assert not other.exists()


def test_a_pruned_folder_with_files_of_others_is_said_to_stay(cli, folder: Path) -> None:
    (folder / "notes.txt").touch()
    assert f"kept: {folder}, for what is not true-kd's in it" in said(cli("cache", "prune", KEY, "--yes"))
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


# Export and import.


def test_a_cache_goes_from_one_machine_to_another(cli, folder: Path, tmp_path: Path) -> None:
    out = said(cli("cache", "export", KEY[:6], str(tmp_path / "disk" / "export")))
    assert out.startswith(f"{KEY}: 3 replies, ")
    assert out.endswith("There: true-kd cache import export\n")
    out = said(cli("cache", "import", str(tmp_path / "disk" / "export"), "--cache", str(tmp_path / "there")))
    assert out.startswith(f"{KEY}: 3 replies, ")
    assert present(tmp_path / "there") == [A, B, C]
    out = said(cli("cache", "import", str(tmp_path / "disk" / "export"), "--cache", str(tmp_path / "there")))
    assert out.startswith(f"{KEY}: 0 replies, 0 B copied")
    assert out.endswith("; nothing new in 2 files\n")


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["list"], "list"),
        (["ls", "x"], "x"),
        (["info"], "KEY"),
        (["info", ""], "''"),
        (["info", "x\x1b[31m"], "no such key"),
        (["verify", "x"], "no such key"),
        (["prune", "x"], "no such key"),
        (["prune", "--older-than", "month"], "'month'"),
        (["prune", "--keep-size", "small"], "'small'"),
        (["prune", "--older-than"], "--older-than"),
        (["export", KEY], "DEST"),
        (["export", KEY, ""], "DEST"),
        (["export", KEY, "a\0b"], "DEST"),
        (["export", KEY, "x" * 300], "DEST"),
        (["export", "x", "out"], "no such key"),
        (["import"], "SRC"),
        (["import", "nowhere"], "no such folder"),
        (["import", "."], "identity.json"),
        (["ls", "--cache", ""], "--cache"),
        (["ls", "--cache", "~nobody-there/x"], "--cache"),
        (["ls", "--cache", "afile"], "a file, expected"),
        (["ls", "--jsno"], "--json"),
    ],
    ids=lambda value: ascii(" ".join(value))[:40] if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_line(
    arguments: list[str], says: str, cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("afile").touch()
    before = content(tmp_path)
    assert says in refused(cli("cache", *arguments))
    assert content(tmp_path) == before


def test_integrity_and_trouble_with_the_disk_have_exit_codes_of_their_own(cli, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "afile").touch()
    refused(cli("cache", "export", KEY, str(tmp_path / "afile" / "below")), code=4)
    os.truncate(shards_of(folder)[0], 100)
    assert "verify --remove" in refused(cli("cache", "export", KEY, str(tmp_path / "export")), code=5)
    refused(cli("cache", "import", str(folder), "--cache", str(tmp_path / "there")), code=5)
    assert not (tmp_path / "there").exists()
    assert not (tmp_path / "export").exists()


def test_the_commands_import_no_mlx_lm(folder: Path) -> None:
    code = (
        "import sys; sys.argv = ['true-kd', 'cache', 'verify']\n"
        "from true_kd.__main__ import main\n"
        "try: main()\n"
        "finally: print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stderr.split()).isdisjoint({"mlx_lm", "transformers", "huggingface_hub", "tokenizers"})


# A whole run.


def test_a_run_on_another_machine_needs_no_teacher(
    cli, tmp_path: Path, teacher_folder: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lay_out(tmp_path / "project", teacher_folder, student_folder))
    assert cli("distill", "-d", "cats").code == 0
    [listed] = json.loads(said(cli("cache", "ls", "--json", "--cache", "cache")))
    assert listed["replies"] == 6
    assert listed["teacher"] == teacher_folder.name
    assert said(cli("cache", "verify", "--cache", "cache")).endswith("files whole, 6 replies\n")
    said(cli("cache", "export", listed["key"], "export", "--cache", "cache"))
    said(cli("cache", "import", "export", "--cache", "there"))
    assert (
        "6 replies of the teacher are in the cache"
        in cli("distill", "-d", "cats", "--fresh", "--set", "cache=there").out
    )
    for path in Path("there", listed["key"]).iterdir():
        if SHARD.fullmatch(path.name):
            os.truncate(path, 50)
    assert cli("cache", "verify", "--remove", "--cache", "there").code == 5
    again = cli("distill", "-d", "cats", "--fresh", "--set", "cache=there")
    assert (again.code, "captured 6/6 replies" in again.out) == (0, True)
    assert said(cli("cache", "verify", "--cache", "there")).endswith("files whole, 6 replies\n")


# A whole run where the teacher is not.


def first_machine(tmp_path: Path) -> Path:
    """The project of a machine that has the teacher, a folder of its own."""
    teacher = tmp_path / "models" / "Big-7B"
    shutil.copytree(pocket.locate("pocket:teacher", "teacher"), teacher)
    return lay_out(tmp_path / "project", teacher, "pocket:student")


def carry(cli, key: str, tmp_path: Path) -> list[str]:
    """Export a cache, lose the teacher and all caches, and import it; the line that import ends with, as arguments."""
    out = said(cli("cache", "export", key, str(tmp_path / "export"), "--cache", "cache"))
    assert out.splitlines()[-1].startswith(f"       true-kd distill --teacher cache:{key[:8]}")
    shutil.rmtree(tmp_path / "models", ignore_errors=True)
    shutil.rmtree("cache")
    out = said(cli("cache", "import", str(tmp_path / "export"), "--cache", "cache"))
    assert said(cli("cache", "verify", "--cache", "cache")).endswith("files whole, 6 replies\n")
    return out.splitlines()[-1].rpartition("true-kd ")[2].split()


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ([], []),
        (["--set", "targets.preset=exact"], ["--set", "targets.preset=exact"]),
        (["--set", "targets.preset=tiny", "--set", "targets.share=0.5"], None),
        (["--cache-bytes", "30"], ["--cache-bytes", "N"]),
    ],
    ids=["default", "exact", "tiny share", "budget"],
)
def test_a_cache_trains_where_the_teacher_is_not(
    flags: list[str], hint: list[str] | None, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(first_machine(tmp_path))
    assert cli("distill", "-d", "cats", "--out", "one", *flags).code == 0
    [listed] = json.loads(said(cli("cache", "ls", "--json", "--cache", "cache")))
    way = carry(cli, listed["key"], tmp_path)
    assert way[:3] == ["distill", "--teacher", f"cache:{listed['key'][:8]}"]
    assert way[3:] == (flags if hint is None else hint)
    before = content(Path("cache"))
    way = [*way[:3], *flags]
    ended = cli(*way, "-d", "cats", "--out", "two")
    assert (ended.code, "6 replies of the teacher are in the cache" in ended.out) == (0, True), ended
    assert Path("two/cats/adapters.safetensors").read_bytes() == Path("one/cats/adapters.safetensors").read_bytes()
    assert content(Path("cache")) == before
    one, two = (json.loads(Path(out, "cats", "adapter_config.json").read_text()) for out in ("one", "two"))
    # The digest of all the rest, the teacher's name included.
    assert one["true_kd"].pop("check") != two["true_kd"].pop("check")
    assert (two["true_kd"].pop("teacher"), Path(one["true_kd"].pop("teacher")).name) == ("Big-7B", "Big-7B")
    assert one == two
    assert json.loads(Path("two/cats/run.json").read_text())["teacher"]["model"] == way[2]
    assert "cats: unchanged since" in cli(*way, "-d", "cats", "--out", "one").out


@pytest.fixture
def carried(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A project whose teacher is gone, and the key of the cache that it left."""
    monkeypatch.chdir(first_machine(tmp_path))
    assert cli("capture", "-d", "cats").code == 0
    [listed] = json.loads(said(cli("cache", "ls", "--json", "--cache", "cache")))
    carry(cli, listed["key"], tmp_path)
    return listed["key"]


def test_what_a_cache_lacks_is_not_made_up_where_the_teacher_is_not(cli, carried: str) -> None:
    train = Path("prompts/cats/train.txt")
    train.write_text(train.read_text().replace("\n", ", please\n", 1))
    before = content(Path("cache"))
    unknown = (("--set", "targets.preset=hot"), "6 of the 6 prompts are not in cache")
    unmeasured = (("--cache-bytes", "20"), "no cache knows what it needs of a budget")
    for flags, says in (((), f"1 of the 6 prompts is not in cache {carried[:8]}."), unknown, unmeasured):
        for command in ("distill", "capture"):
            ended = cli(command, "-d", "cats", "--teacher", f"cache:{carried[:4]}", *flags)
            line = only_line(ended.err)
            assert ended.code == 2
            assert f"teacher 'cache:{carried[:4]}': its weights are not here, and {says}" in line
    assert content(Path("cache")) == before
    assert list(Path("adapters_kd/cats").iterdir()) == []
    assert cli("distill", "-d", "dogs", "--teacher", f"cache:{carried}").code == 2


def test_a_teacher_that_no_cache_knows_is_one_line(cli, carried: str) -> None:
    for name, says in (("cache:zz", carried), ("cache:", carried), ("cache:../x", carried)):
        assert says in refused(cli("distill", "-d", "cats", "--teacher", name))
        assert says in refused(cli("capture", "-d", "cats", "--teacher", name))
    keys = [carried, *(fill(Path("cache"), [[A]], identity_of(teacher=digit)).name for digit in "0123456789abcdef")]
    [shared, *_] = [key[0] for key in keys if sum(other[0] == key[0] for other in keys) > 1]
    assert "keys begin so, expected one" in refused(cli("distill", "-d", "cats", "--teacher", f"cache:{shared}"))
    stranger = cli("distill", "-d", "cats", "--teacher", f"cache:{keys[1]}")
    assert f"no {TEACHER} in it" in refused(stranger)
    assert "no such folder" in refused(cli("distill", "-d", "cats", "--student", f"cache:{carried}"))
    adapter = ("--set", "teacher.adapter=x")
    assert "Leave it out" in refused(cli("distill", "-d", "cats", "--teacher", f"cache:{carried}", *adapter))
    os.truncate(Path("cache", carried, TEACHER), 100)
    assert "Import it again" in refused(cli("distill", "-d", "cats", "--teacher", f"cache:{carried}"), code=5)
    assert cli("cache", "verify", "--remove", "--cache", "cache").code == 5
    assert f"no {TEACHER} in it" in refused(cli("distill", "-d", "cats", "--teacher", f"cache:{carried}"))
    assert not Path("adapters_kd").exists()


def test_a_lost_output_head_is_written_again_or_missed(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(first_machine(tmp_path))
    flags = ("-d", "cats", "--fresh", "--set", "targets.preset=exact")
    assert cli("distill", *flags).code == 0
    adapter = Path("adapters_kd/cats/adapters.safetensors")
    [head], trained = Path("cache").glob("*/head.safetensors"), adapter.read_bytes()
    for harm in (Path.unlink, lambda path: os.truncate(path, 100)):
        harm(head)
        assert cli("distill", *flags).code == 0
        assert adapter.read_bytes() == trained
        assert cli("cache", "verify", "--cache", "cache").code == 0
    head.unlink()
    line = only_line(cli("distill", *flags, "--teacher", f"cache:{head.parent.name}").err)
    assert f"its output head is not in cache {head.parent.name[:8]}. Import that cache again." in line


def test_the_hint_of_an_import_has_no_word_of_the_stranger_who_wrote_the_identity() -> None:
    from true_kd.cli.caches import _way_to_use
    from true_kd.manifest import StoredFile

    targets = {"threshold": "1; x", "draw_temperature": 4.0, "; rm -r x": 1.0, "share": 0.5}
    files = {TEACHER: StoredFile(TEACHER, "a" * 64, 0, 0)}
    store = stores.Store(Path("0" * 16), {"format": FORMAT, "targets": targets}, files, {}, (), "", None, 0.0)
    assert _way_to_use(store, "00") == (
        "true-kd distill --teacher cache:00 --set targets.draw_temperature=4.0 --set targets.share=0.5"
    )
