"""The command line as its users meet it, mistakes first: one line, the right exit code, nothing left behind."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from test_pipeline import TIMED

from true_kd import cli as command_line
from true_kd import pocket
from true_kd.cli import running
from true_kd.config import SHORT_NAMES, load_config
from true_kd.errors import EnvironmentProblem, InputError
from true_kd.jobs import DomainsRefused
from true_kd.models import ModelOptions

ROOT = Path(__file__).parents[1]
COMMANDS = (
    *("distill", "capture", "demo", "evaluate", "analyze", "sweep"),
    *("report", "compare", "chat", "generate", "cache", "plan", "init", "domains", "config", "validate", "doctor"),
    *("serve", "push", "export", "status"),
)
DOMAINS = ("action", "debug", "memory", "reflection", "task", "thinking")
PROMPTS = "".join(f"the cat number {number} sat on the mat\n" for number in range(6))


def lay_out(folder: Path, teacher: Path | str, student: Path | str) -> Path:
    """A project of two domains, small enough to be distilled in a fraction of a second."""
    (folder / "configs").mkdir(parents=True)
    base = {
        "teacher": str(teacher),
        "student": str(student),
        "cache": str(folder / "cache"),
        "training": {"iters": 2, "batch_size": 4, "max_seq_length": 64},
        "capture": {"max_tokens": 4},
        "lora": {"rank": 2},
        # Three seconds a process; tests/test_apart.py is where they are apart.
        "isolate": False,
    }
    (folder / "configs" / "base.yaml").write_text(json.dumps(base))
    for domain in ("cats", "dogs"):
        (folder / "prompts" / domain).mkdir(parents=True)
        (folder / "prompts" / domain / "train.txt").write_text(PROMPTS.replace("cat", domain))
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_folder: Path, student_folder: Path) -> Path:
    """The current folder: a project of the domains cats and dogs, ready to run."""
    folder = lay_out(tmp_path / "project", teacher_folder, student_folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with nothing in it."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def tree(folder: Path) -> set[str]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def only_line(text: str) -> str:
    """The one line that `text` is."""
    assert text.endswith("\n")
    [line] = text.splitlines()
    assert line.isprintable(), line
    assert 10 < len(line) < 600
    return line


def refused(ended, code: int = 2) -> str:
    """The one line on stderr of a call that did nothing; stdout is empty."""
    assert (ended.code, ended.out) == (code, ""), ended
    return only_line(ended.err)


# Usage.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["distil"], "Did you mean 'distill'? See"),
        (["distill", "--domian", "cats"], "--domain"),
        (["distill", "--temprature", "2"], "--temperature"),
        (["distill", "cats"], "cats"),
        (["distill", "--domain"], "--domain"),
        (["distill", "-d", "cats", "--set"], "--set"),
        (["distill", "-d", "cats", "--iters", "many"], "--iters"),
        (["distill", "-d", "cats", "--iters", "1.5"], "--iters"),
        (["distill", "-d", "cats", "--iters", "1e3"], "--iters"),
        (["distill", "-d", "cats", "--seed", ""], "--seed"),
        (["distill", "-d", "cats", "--memory-gb", "lots"], "--memory-gb"),
        (["distill", "-d", "cats", "--patience", "2.5"], "--patience"),
        (["distill", "-d", "cats", "--temperature", "hot"], "--temperature"),
        (["distill", "-d", "cats", "--learning-rate", "1e-4x"], "--learning-rate"),
        (["distill", "-d", "cats", "--fresh=yes"], "--fresh"),
        (["--verbose"], "--verbose"),
        (["--", "-x"], "-x"),
        (["doctor", "now"], "now"),
        (["init", "a", "b"], "b"),
        (["demo", "--domain", "cats"], "--domain"),
    ],
    ids=" ".join,
)
def test_a_wrong_call_ends_in_one_line_that_names_the_culprit(arguments, says, cli, project: Path) -> None:
    before = tree(project)
    line = refused(cli(*arguments))
    assert says in line
    assert line.startswith("true-kd: ")
    assert line.endswith("See `true-kd --help`.")
    assert tree(project) == before


def test_without_arguments_the_help_is_shown_as_it_is_laid_out(cli) -> None:
    assert cli() == cli("--help")
    assert "Commands:" in [line.strip() for line in cli().out.splitlines()]


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_commands_and_exit_codes(flag: str, cli) -> None:
    ended = cli(flag)
    assert (ended.code, ended.err) == (0, "")
    assert all(f"\n  {command} " in ended.out for command in COMMANDS)
    words = " ".join(ended.out.split())
    assert command_line.EXIT_CODES in words
    for code in ("0 done", "1 run failed", "2 input", "3 locked", "4 environment", "5 integrity", "130 Ctrl-C"):
        assert code in words


def test_the_help_of_distill_explains_every_flag(cli) -> None:
    words = " ".join(cli("distill", "--help").out.split())
    for name in SHORT_NAMES:
        _, _, after = words.partition(f"--{name.replace('_', '-')} ")
        assert "default: " in after.partition(" --")[0], name
    for flag in ("--domain", "--all", "--config", "--set"):
        assert f"{flag} " in words


@pytest.mark.parametrize(("flag", "bound"), [("--memory-gb", "above 0"), ("--patience", "at least 1")])
def test_the_help_of_distill_tells_a_bound_on_one_side(flag: str, bound: str, cli) -> None:
    words = " ".join(cli("distill", "--help").out.split())
    assert bound in words.partition(f"{flag} ")[2].partition(" --")[0]


def test_version_is_that_of_the_distribution(cli) -> None:
    ended = cli("--version")
    assert (ended.code, ended.out, ended.err) == (0, f"true-kd {version('true-kd')}\n", "")


def test_the_module_runs_like_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "true_kd", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"true-kd {version('true-kd')}\n", "")


def test_help_imports_neither_mlx_lm_nor_transformers() -> None:
    code = (
        "import sys; sys.argv = ['true-kd', 'distill', '--help']\n"
        "from true_kd.__main__ import main\n"
        "try: main()\n"
        "finally: print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    loaded = set(done.stderr.split())
    assert done.returncode == 0
    assert "true_kd.cli" in loaded
    assert loaded.isdisjoint({"mlx_lm", "transformers", "huggingface_hub", "tokenizers", "torch"})


# Which domains.


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc", "a/b", "a\\b", "a\0b", "x" * 300, "", " ", ".", "..", "~", "a\nb", "\x1b[31m", "é", "-d"],
    ids=lambda name: ascii(name[:8]),
)
@pytest.mark.parametrize("given_by", ["flag", "config"])
def test_a_hostile_domain_name_is_refused_and_touches_nothing(name: str, given_by: str, cli, project: Path) -> None:
    arguments = ["--domain", name]
    if given_by == "config":
        base = json.loads(Path("configs/base.yaml").read_text())
        Path("configs/base.yaml").write_text(json.dumps({**base, "domains": [name]}))
        arguments = []
    before, beside = tree(project), tree(project.parent)
    line = refused(cli("distill", *arguments))
    assert "not a domain name" in line or "is not a character" in line
    assert (tree(project), tree(project.parent)) == (before, beside)


def test_an_unknown_domain_is_refused_with_the_one_that_was_meant(cli, project: Path) -> None:
    line = refused(cli("distill", "-d", "cat"))
    assert line == "prompts/cat: no such domain; did you mean 'cats'? Domains here: cats, dogs."


def test_an_unknown_domain_like_none_lists_those_there_are(cli, project: Path) -> None:
    assert refused(cli("distill", "-d", "quux")) == "prompts/quux: no such domain. Domains here: cats, dogs."


def test_a_domain_in_capitals_is_refused_with_the_one_that_was_meant(cli, project: Path) -> None:
    assert "'cats'" in refused(cli("distill", "-d", "Cats"))


def test_when_every_domain_is_refused_each_is_told(cli, project: Path) -> None:
    before = tree(project)
    ended = cli("distill", "-d", "cat", "-d", "dog")
    assert (ended.code, ended.out) == (2, "")
    assert [line.partition(":")[0] for line in ended.err.splitlines()] == ["prompts/cat", "prompts/dog"]
    assert tree(project) == before


def test_what_is_wrong_with_every_domain_is_told_once(cli, project: Path) -> None:
    assert "losses.alpha" in refused(cli("distill", "--all", "--alpha", "7"))
    assert "no such folder" in refused(cli("distill", "--all", "--teacher", "./nowhere"))


def test_domains_that_are_refused_for_different_reasons_end_in_code_1() -> None:
    wrong, missing = InputError("cats: wrong."), EnvironmentProblem("dogs: missing.")
    assert DomainsRefused({"cats": missing}).exit_code == 4
    both = DomainsRefused({"cats": wrong, "dogs": missing})
    assert (both.exit_code, str(both)) == (1, "cats: wrong.\ndogs: missing.")


def test_domain_and_all_exclude_each_other(cli, project: Path) -> None:
    assert refused(cli("distill", "-d", "cats", "--all")).startswith("--domain and --all: both given")


def test_neither_domain_nor_all_lists_the_choices(cli, project: Path) -> None:
    assert refused(cli("distill")) == "no domain was named, expected --domain NAME or --all (cats, dogs)."


def test_without_configs_one_line_says_init(cli, empty: Path) -> None:
    for arguments in (["--all"], ["-d", "cats"], []):
        assert "Run `true-kd init`" in refused(cli("distill", *arguments))
    assert tree(empty) == set()


@pytest.mark.parametrize("arguments", [["--all"], ["-d", "cats"]], ids=" ".join)
def test_without_prompts_one_line_says_init(arguments: list[str], cli, project: Path) -> None:
    shutil.rmtree("prompts")
    line = refused(cli("distill", *arguments))
    assert line.startswith(("prompts: no domain here", "prompts 'prompts': no such folder."))
    assert "`true-kd init`" in line


# Bad configs.


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"losses: {temprature: 3}\n", "mine.yaml:1 losses.temprature: unknown key; did you mean 'temperature'?"),
        (b"seed: 1\nlosses:\n  alpha: 2\n", "mine.yaml:3 losses.alpha: 2, expected a number at most 1."),
        (b"seed: '1'\n", "mine.yaml:1 seed: '1', expected a whole number. Remove the quotes."),
        (b"fresh: yes\n", "mine.yaml:1:8: 'yes', expected true or false."),
        (b"seed: 1\nseed: 2\n", "mine.yaml:2:1: key 'seed' again, first on line 1."),
        (b"- seed\n", "mine.yaml:1:1: a list, expected a mapping at the top."),
        (b"seed: [1\n", "mine.yaml:2:1: "),
        (b"seed:\t1\n\tx: 2", "mine.yaml:"),
        (bytes(range(256)), "mine.yaml:"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "mine.yaml:1:1: byte 0x89 is not UTF-8."),
        (b"PK\x03\x04\0\0", "mine.yaml:1:"),
        (b"a" * 2_000_000, "mine.yaml: larger than 100 kB"),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else "",
)
@pytest.mark.parametrize("as_domain", [False, True], ids=["base", "domain"])
def test_a_bad_config_ends_in_one_line_with_its_place(content, says, as_domain: bool, cli, project: Path) -> None:
    name = "configs/cats.yaml" if as_domain else "mine.yaml"
    Path(name).write_bytes(content)
    before = tree(project)
    line = refused(cli("distill", "-d", "cats", *([] if as_domain else ["--config", name])))
    assert (says.replace("mine.yaml", name) in line) or (as_domain and "fresh" in line)
    assert tree(project) == before


def test_a_config_that_is_not_there_is_refused(cli, project: Path) -> None:
    assert refused(cli("distill", "--all", "--config", "nope.yaml")).startswith("--config 'nope.yaml': no such file")


def test_a_folder_as_config_is_called_a_folder(cli, project: Path) -> None:
    line = refused(cli("distill", "--all", "--config", "configs"))
    assert line.startswith("--config 'configs': a folder, expected a YAML file")


def test_a_domain_file_that_would_not_be_read_is_refused(cli, project: Path) -> None:
    Path("configs/cats.yml").write_text("seed: 1\n")
    line = refused(cli("distill", "-d", "cats"))
    assert line == "configs/cats.yml: not read, expected cats.yaml. Rename it."


@pytest.mark.parametrize("key", ["domains", "prompts", "out", "cache", "fresh"])
def test_a_run_wide_key_in_a_domain_file_is_refused(key: str, cli, project: Path) -> None:
    Path("configs/cats.yaml").write_text(f"seed: 1\n{key}: null\n")
    line = refused(cli("distill", "-d", "cats"))
    assert line.startswith(f"configs/cats.yaml:2 {key}: holds for a whole run, not for one domain.")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("losses.temprature=3", "--set losses.temprature: unknown key; did you mean 'temperature'?"),
        ("temperature=3", "--set temperature: unknown key; did you mean 'losses.temperature'?"),
        ("losses.temperature=20", "--set losses.temperature: 20, expected a number at most 10."),
        ("losses.temperature=warm", "--set losses.temperature: 'warm', expected a number."),
        ("losses.temperature=.inf", "'.inf', expected a finite number"),
        ("training.iters=1e3", "--set training.iters: 1000.0, expected a whole number. Write 1000."),
        ("losses=3", "--set losses: 3, expected a mapping of keys."),
        ("losses.alpha", "'losses.alpha': expected key.path=value."),
        ("losses.alpha=", "no value, expected one after '='."),
        ("=3", "expected key.path=value."),
        ("a..b=3", "expected key.path=value."),
        ("", "expected key.path=value."),
        ("lora.keys=[[1]]", "expected one value or a flat list."),
        ("lora.keys={a: 1}", "expected one value or a flat list."),
        ("seed=no", "'no', expected true or false."),
        ("domains=cats", "--set domains: 'cats', expected a list or 'all'."),
        ("seed.deeper.still=1", "--set seed"),
        ("out=" + "x" * 100 + ": y", "expected "),
    ],
    ids=lambda value: value[:24],
)
def test_a_bad_set_ends_in_one_line(setting: str, says: str, cli, project: Path) -> None:
    before = tree(project)
    assert says in refused(cli("distill", "-d", "cats", "--set", setting))
    assert tree(project) == before


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--temperature", "0.49", "losses.temperature: 0.49, expected a number at least 0.5."),
        ("--temperature", "nan", "losses.temperature: nan, expected a finite number."),
        ("--alpha", "1.01", "losses.alpha: 1.01, expected a number at most 1."),
        ("--iters", "0", "training.iters: 0, expected a number at least 1."),
        ("--learning-rate", "0", "training.learning_rate: 0.0, expected a number above 0."),
        ("--batch-size", "-1", "training.batch_size: -1, expected a number at least 1."),
        ("--max-seq-length", "0", "training.max_seq_length: 0, expected a number at least "),
        ("--rank", "0", "lora.rank: 0, expected a number at least 1."),
        ("--seed", "-1", "seed: -1, expected a number at least 0."),
        ("--patience", "0", "training.patience: 0, expected a number at least 1."),
        ("--memory-gb", "0", "memory_gb: 0.0, expected a number above 0."),
        ("--memory-gb", "-1", "memory_gb: -1.0, expected a number above 0."),
        ("--memory-gb", "inf", "memory_gb: inf, expected a finite number."),
        ("--divergence", "KL", "losses.divergence: 'KL', expected 'forward_kl', 'reverse_kl', "),
        ("--divergence", "", "losses.divergence: '', expected 'forward_kl', 'reverse_kl', "),
        (
            "--vocab-strategy",
            "mach",
            "vocab_strategy: 'mach', expected 'auto', 'match', 'align', 'uld', 'truncate' or 'project'",
        ),
        ("--out", "", "out: '', expected at least 1 characters."),
        ("--teacher", "", "teacher.model: '', expected at least 1 characters."),
        ("--student", "", "student.model: '', expected at least 1 characters."),
        ("--iters", "9" * 30, "training.iters: an integer of more than 64 bits"),
    ],
)
def test_a_flag_out_of_bounds_is_named_with_its_key(flag: str, value: str, says: str, cli, project: Path) -> None:
    before = tree(project)
    assert refused(cli("distill", "-d", "cats", flag, value)).startswith(f"{flag} {says}")
    assert tree(project) == before


def test_a_misspelt_divergence_is_answered_with_the_one_that_was_meant(cli, project: Path) -> None:
    before = tree(project)
    line = refused(cli("distill", "-d", "cats", "--divergence", "revers_kl"))
    assert line.startswith("--divergence losses.divergence: 'revers_kl', expected ")
    assert line.endswith("did you mean 'reverse_kl'?")
    assert tree(project) == before


@pytest.mark.parametrize("value", ["32000000000", "1e300"], ids=["as bytes", "huge"])
def test_a_budget_of_memory_that_no_machine_has_is_no_bug_of_ours(value: str, cli, project: Path) -> None:
    before = tree(project)
    line = refused(cli("distill", "-d", "cats", "--memory-gb", value))
    assert line.startswith("--memory-gb memory_gb: ")
    assert "expected a number at most " in line
    assert tree(project) == before


def test_five_bad_flags_are_two_lines_and_the_places_of_the_others(cli, project: Path) -> None:
    flags = ["--temperature", "0", "--alpha", "2", "--iters", "0", "--rank", "0", "--seed", "-1"]
    ended = cli("distill", "-d", "cats", *flags)
    lines = ended.err.splitlines()
    assert (ended.code, len(lines)) == (2, 3)
    told = " ".join(lines)
    assert lines[2].startswith("... and 3 more, at --")
    assert all(flag in told for flag in flags[::2])


# Bad prompts.


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "train.jsonl: no prompts"),
        ('{"prompt": "a"}\n', "1 prompt, expected two or more"),
        ('{"prompt": "a"}\n{"promt": "b"}\n', "train.jsonl:2:2: 'promt': unknown key; did you mean 'prompt'?"),
        ('{"prompt": "a"}\n{"prompt": \n', "train.jsonl:2:"),
        ("\0\0\0\n", "a NUL byte"),
    ],
)
def test_bad_prompts_end_in_one_line_with_their_place(content: str, says: str, cli, project: Path) -> None:
    Path("prompts/cats/train.txt").unlink()
    Path("prompts/cats/train.jsonl").write_text(content)
    before = tree(project)
    assert says in refused(cli("distill", "-d", "cats"))
    assert tree(project) == before


# Bad models.


def broken(folder: Path, **files: bytes | None) -> Path:
    """A copy of a model with some files replaced, or removed."""
    copy = Path(shutil.copytree(folder, "broken"))
    for name, content in files.items():
        path = copy / name.replace("__", ".")
        path.unlink() if content is None else path.write_bytes(content)
    return copy


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"config__json": None}, "no config.json in this folder"),
        ({"config__json": b"{"}, "mlx-lm cannot load it"),
        ({"config__json": b"[]"}, "mlx-lm cannot load it"),
        ({"config__json": b"{}"}, "mlx-lm cannot load it"),
        ({"config__json": b'{"model_type": "no_such", "vocab_size": 320}'}, "no_such"),
        ({"model__safetensors": None}, "no model*.safetensors"),
        ({"model__safetensors": b""}, "mlx-lm cannot load it"),
        ({"model__safetensors": b"\xff" * 4000}, "mlx-lm cannot load it"),
        ({"tokenizer__json": b"{}"}, "mlx-lm cannot load it"),
        ({"tokenizer__json": b"\0" * 50}, "mlx-lm cannot load it"),
        ({"tokenizer_config__json": b"{"}, "mlx-lm cannot load it"),
        ({"tokenizer__json": None, "tokenizer_config__json": None}, "no tokenizer in broken, expected one of "),
    ],
    ids=lambda value: (
        " ".join(f"{name}={content!r:.16}" for name, content in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_a_broken_teacher_ends_in_one_line(files, says, cli, project: Path, teacher_folder: Path) -> None:
    copy = broken(teacher_folder, **files)
    ended = cli("distill", "-d", "cats", "--teacher", str(copy))
    assert ended.code == 2
    line = only_line(ended.err)
    assert line.removeprefix("cats: failed. ").startswith(f"teacher '{copy}': ")
    assert says in line


@pytest.mark.parametrize("seam", ["teacher", "student"])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./nowhere", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("configs/base.yaml", "no such folder"),
        ("prompts", "no config.json in this folder"),
        ("a/b/c", "no such folder"),
        ("model", "no such folder"),
        ("pocket:nope", "no such folder"),
        ("nobody/nothing", "not in the local hub cache, and the hub cannot be reached"),
        ("no body/no thing", "the hub refused it"),
    ],
)
def test_a_model_that_is_not_there_ends_in_one_line(seam: str, name: str, says: str, cli, project: Path) -> None:
    line = refused(cli("distill", "-d", "cats", f"--{seam}", name))
    assert line.startswith(f"{seam} '{name}': ")
    assert says in line


def test_a_model_that_is_not_there_leaves_nothing_behind(cli, project: Path) -> None:
    before = tree(project)
    refused(cli("distill", "-d", "cats", "--teacher", "./nowhere"))
    assert tree(project) == before


@pytest.mark.parametrize(
    "name",
    ["a\nb", "./\x1b[31m", "x" * 300, "~nobody-of-this-name/model"],
    ids=["newline", "escape", "long", "no home"],
)
@pytest.mark.parametrize(("flag", "place"), [("--teacher", "teacher '"), ("--config", "--config '")])
def test_a_strange_name_of_a_model_or_config_ends_in_one_line(flag, place, name: str, cli, project: Path) -> None:
    assert refused(cli("distill", "-d", "cats", flag, name)).startswith(place)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x" * 300, "not a path (File name too long)"),
        ("~nobody-of-this-name/x", "not a path (Could not determine home directory.)"),
        ("nowhere", "no such folder"),
        ("configs/base.yaml", "no such folder"),
    ],
    ids=lambda value: value[:24],
)
def test_a_strange_prompts_folder_ends_in_one_line(name: str, says: str, cli, project: Path) -> None:
    line = refused(cli("distill", "-d", "cats", "--prompts", name))
    assert line.startswith("prompts '")
    assert says in line


def test_models_of_different_vocabularies_end_in_one_line(cli, project: Path, teacher_folder: Path) -> None:
    tokenizer = (teacher_folder / "tokenizer.json").read_text().replace('"Z": ', '"ZZ": ').encode()
    copy = broken(teacher_folder, tokenizer__json=tokenizer)
    for strategy, remedy in {"match": "align, models of one family.", "truncate": "or --force to pair"}.items():
        ended = cli("distill", "-d", "cats", "--teacher", str(copy), "--vocab-strategy", strategy)
        line = only_line(ended.err)
        assert ended.code == 2
        assert "common ids stand for different tokens" in line
        assert remedy in line


# Where things cannot be written.


@pytest.mark.parametrize(
    ("out", "code", "says"),
    [
        ("afile", 2, "a file is in the way"),
        ("afile/below", 2, "a file is in the way"),
        ("configs/base.yaml", 2, "a file is in the way"),
        ("x" * 300, 2, "not a path (File name too long)"),
        ("/proc/here", 4, "cannot be written"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_output_folder_that_cannot_be_made_ends_in_one_line(
    out: str, code: int, says: str, cli, project: Path
) -> None:
    Path("afile").touch()
    before = tree(project)
    assert says in refused(cli("distill", "-d", "cats", "--out", out), code=code)
    assert tree(project) == before


def test_a_cache_that_cannot_be_written_is_no_bug_of_ours(cli, project: Path) -> None:
    Path("afile").touch()
    ended = cli("distill", "-d", "cats", "--set", "cache=afile")
    assert ended.code == 4
    assert only_line(ended.err).startswith("cats: failed. afile: cannot be written")
    assert "opening" not in ended.out


def test_a_cache_below_a_home_that_is_not_there_is_no_bug_of_ours(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUE_KD_CACHE", "~nobody-of-this-name/cache")
    ended = cli("doctor")
    assert (ended.code, ended.err) == (4, "")
    assert "problem  target cache: $TRUE_KD_CACHE '~nobody-of-this-name/cache'" in ended.out


def test_a_file_where_the_adapter_folder_belongs_is_no_bug_of_ours(cli, project: Path) -> None:
    Path("adapters_kd").mkdir()
    Path("adapters_kd/cats").touch()
    ended = cli("distill", "-d", "cats")
    assert ended.code == 4
    assert only_line(ended.err).startswith("cats: failed. adapters_kd/cats: cannot be written")
    assert "opening" not in ended.out


def test_a_current_folder_that_was_removed_is_no_bug_of_ours(cli, empty: Path) -> None:
    empty.rmdir()
    refused(cli("distill", "-d", "cats"))


def test_a_folder_in_use_by_another_run_ends_in_one_line_and_code_3(cli, finished: Path) -> None:
    with FileLock("adapters_kd/.lock"):
        line = refused(cli("distill", "-d", "cats"), code=3)
    assert line.startswith("adapters_kd: in use by another true-kd run.")
    assert cli("distill", "-d", "cats").code == 0


# A run.


@pytest.fixture(scope="module")
def done(cli, tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> SimpleNamespace:
    """A project whose two domains were distilled, then asked for again."""
    folder = lay_out(tmp_path_factory.mktemp("run") / "project", teacher_folder, student_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        first = cli("distill", "--all", "--config", "configs/base.yaml")
        again = cli("distill", "-d", "cats", "-d", "dogs", "-d", "cats")
    return SimpleNamespace(folder=folder, first=first, again=again)


@pytest.fixture
def finished(done: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of the project whose domains are done, with its cache of replies."""
    folder = Path(shutil.copytree(done.folder, tmp_path / "finished"))
    base = json.loads((folder / "configs" / "base.yaml").read_text())
    (folder / "configs" / "base.yaml").write_text(json.dumps({**base, "cache": str(folder / "cache")}))
    monkeypatch.chdir(folder)
    return folder


def test_a_run_ends_with_code_0_and_a_table_of_its_domains(done: SimpleNamespace) -> None:
    assert (done.first.code, done.first.err) == (0, "")
    lines = done.first.out.splitlines()
    header = next(index for index, line in enumerate(lines) if line.startswith("domain "))
    assert [line.split()[0] for line in lines[header + 1 : header + 3]] == ["cats", "dogs"]
    written = "Summary: adapters_kd/kd_summary.json Report: adapters_kd/report.html"
    assert lines[-1] == f"2 done, 0 failed. {written}"


def test_a_run_leaves_adapters_and_a_summary(done: SimpleNamespace) -> None:
    out = done.folder / "adapters_kd"
    for domain in ("cats", "dogs"):
        names = {path.name for path in (out / domain).iterdir() if path.is_file()}
        assert names == {"adapters.safetensors", "adapter_config.json", *TIMED}
    assert set(json.loads((out / "kd_summary.json").read_text())["domains"]) == {"cats", "dogs"}
    assert (out / "report.html").is_file()


def test_off_a_terminal_each_report_is_a_line_of_plain_text(done: SimpleNamespace) -> None:
    for text in (done.first.out, done.again.out):
        assert "\x1b" not in text
        assert "\r" not in text
        assert all(line.strip() for line in text.splitlines())
    reports = [line for line in done.first.out.splitlines() if line.startswith("cats: ")]
    assert sum("captured" in line for line in reports) <= 11
    assert sum(" loss " in line and "kd" in line for line in reports) == 2


def test_the_same_run_again_does_nothing_and_says_so(done: SimpleNamespace) -> None:
    assert (done.again.code, done.again.err) == (0, "")
    assert "cats: unchanged since " in done.again.out
    assert "dogs: unchanged since " in done.again.out
    assert "opening" not in done.again.out
    unchanged, verdict = [line for line in done.again.out.splitlines() if line.startswith("cats: ")]
    assert unchanged.startswith("cats: unchanged since ")
    assert verdict in done.first.out.splitlines()


def test_the_saved_config_of_a_domain_repeats_its_run(finished: Path, cli) -> None:
    ended = cli("distill", "--config", "adapters_kd/cats/run.json")
    assert ended.code == 0
    assert "cats: unchanged since " in ended.out
    assert "dogs" not in ended.out


def test_fresh_does_a_finished_domain_again_without_asking_the_teacher(cli, finished: Path) -> None:
    ended = cli("distill", "-d", "cats", "--fresh")
    assert (ended.code, ended.err) == (0, "")
    assert "cats: finished " in ended.out
    assert "cats: 6 replies of the teacher are in the cache" in ended.out
    assert "captured" not in ended.out
    assert not any(line.startswith("teacher ") for line in ended.out.splitlines()), "neither opened nor freed"


def test_the_home_sign_in_out_means_the_home_folder(
    cli, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    before = tree(finished)
    ended = cli("distill", "-d", "cats", "--set", "out=~/adapters")
    assert ended.code == 0
    assert (tmp_path / "home" / "adapters" / "cats" / "adapters.safetensors").is_file()
    out = f"{tmp_path}/home/adapters"
    assert ended.out.splitlines()[-1].endswith(f"Summary: {out}/kd_summary.json Report: {out}/report.html")
    assert tree(finished) == before


def test_every_flag_goes_over_the_files(cli, project: Path, teacher_folder: Path, student_folder: Path) -> None:
    Path("configs/cats.yaml").write_text("losses: {temperature: 9.0, alpha: 0.1}\ntraining: {iters: 9}\nseed: 9\n")
    shutil.copytree("prompts", "mine")
    given = {
        "teacher": str(student_folder),
        "student": str(teacher_folder),
        "divergence": "jensen_shannon",
        "temperature": "3.5",
        "alpha": "0.25",
        "iters": "1",
        "patience": "7",
        "learning-rate": "3e-5",
        "batch-size": "3",
        "max-seq-length": "48",
        "rank": "3",
        "memory-gb": "1.5",
        "cache-bytes": "200",
        "cache-gb": "1",
        "prompts": "mine",
        "out": "elsewhere",
        "control": "sft",
        "vocab-strategy": "truncate",
        "seed": "4",
    }
    assert set(inspect.signature(running.distill).parameters) == {
        *(name.replace("-", "_") for name in given),
        *("domain", "everything", "config", "sets", "force", "fresh", "report_to", "as_json"),
    }
    flags = [part for name, value in given.items() for part in (f"--{name}", value)]
    ended = cli("distill", "-d", "cats", *flags, "--set", "capture.max_tokens=3", "--set", "training.iters=2")
    assert ended.code == 0, ended
    config = load_config(Path("elsewhere/cats/run.json"), None, [])
    for name, value in given.items():
        found = config
        for key in SHORT_NAMES[name.replace("-", "_")]:
            found = getattr(found, str(key))
        wanted = ModelOptions(model=value) if isinstance(found, ModelOptions) else type(found)(value)
        assert found == (2 if name == "iters" else wanted), name
    assert config.capture.max_tokens == 3
    assert Path("elsewhere/cats/control_sft/adapters.safetensors").is_file()


def test_the_base_config_may_name_the_domains(cli, finished: Path) -> None:
    base = json.loads(Path("configs/base.yaml").read_text())
    Path("configs/base.yaml").write_text(json.dumps({**base, "domains": ["dogs"]}))
    ended = cli("distill")
    assert (ended.code, ended.out.count(": unchanged since ")) == (0, 1)
    assert "dogs: unchanged since " in ended.out


# A run of which a part fails.


def break_config() -> None:
    Path("configs/dogs.yaml").write_text("losses: {alpha: 7}\n")


def break_prompts() -> None:
    Path("prompts/dogs/train.txt").write_bytes(b"\xff\n")


def break_room() -> None:
    Path("prompts/dogs/train.txt").write_text("a b c d e f g h i j " * 40 + "\n" + "k l m n o p q r s t " * 40)


def break_model() -> None:
    Path("configs/dogs.yaml").write_text("student: ./nowhere\n")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (break_config, "dogs: failed. configs/dogs.yaml:1 losses.alpha: 7, expected a number at most 1."),
        (break_prompts, "dogs: failed. prompts/dogs/train.txt:1:1: byte 0xff is not UTF-8. Save it as UTF-8."),
        (break_room, "dogs: failed. none of the 1 train examples can be trained"),
        (break_model, "dogs: failed. student './nowhere': no such folder"),
    ],
    ids=["config", "prompts", "length", "model"],
)
def test_when_one_domain_fails_the_other_is_done(spoil: Callable[[], None], says: str, cli, finished: Path) -> None:
    spoil()
    ended = cli("distill", "--all", "--fresh")
    assert ended.code == 2, ended
    assert "cats: finished " in ended.out
    assert only_line(ended.err).startswith(says)
    assert ended.out.splitlines()[-1].startswith("1 done, 1 failed.")
    summary = json.loads(Path("adapters_kd/kd_summary.json").read_text())
    assert (list(summary["domains"]), list(summary["failed"])) == (["cats"], ["dogs"])


# Debugging and signals.


def test_debug_shows_where_an_error_was_raised(cli, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUE_KD_DEBUG", "1")
    ended = cli("distill", "-d", "cats", "--alpha", "2")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("Traceback (most recent call last):\n")
    assert "--alpha losses.alpha: 2.0, expected a number at most 1." in ended.err
    monkeypatch.setenv("TRUE_KD_DEBUG", "0")
    refused(cli("distill", "-d", "cats", "--alpha", "2"))


def hear_ctrl_c() -> None:
    """For a child process: what a shell starts in the background does not hear it, nor do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop_at(words: str, arguments: list[str], folder: Path) -> tuple[int, str]:
    """Exit code and stderr of a Python command in a folder that gets Ctrl-C when it prints these words."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear_ctrl_c,
    ) as process:
        for line in process.stdout:
            if words in line:
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    return process.returncode, err


@pytest.fixture(scope="module")
def interrupted(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> SimpleNamespace:
    """A training that got Ctrl-C at its first report."""
    folder = lay_out(tmp_path_factory.mktemp("stopped") / "project", teacher_folder, student_folder)
    arguments = ["-m", "true_kd", "distill", "-d", "cats", "--iters", "1000000"]
    code, err = stop_at("1/1000000", arguments, folder)
    return SimpleNamespace(code=code, err=err, folder=folder)


def test_ctrl_c_ends_with_code_130_and_no_traceback(interrupted: SimpleNamespace) -> None:
    assert interrupted.code == 130
    assert "Traceback" not in interrupted.err


def test_ctrl_c_is_confirmed_in_a_last_line(interrupted: SimpleNamespace) -> None:
    kept = "Finished domains, captured replies and checkpoints are kept: run it again to go on."
    assert interrupted.err.lstrip("\n") == f"true-kd: stopped by Ctrl-C. {kept}\n"


def test_after_ctrl_c_the_folder_is_free_and_has_no_half_written_file(
    interrupted: SimpleNamespace, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(interrupted.folder)
    assert not list(Path("adapters_kd").rglob(".tmp-*"))
    assert cli("distill", "-d", "cats").code == 0


def test_when_the_reader_went_away_nothing_more_is_said() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "true_kd", "distill", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (1, b"")


# Capturing alone.


@pytest.fixture(scope="module")
def captured(
    cli, tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> SimpleNamespace:
    """A project whose two domains were captured, and what that left."""
    folder = lay_out(tmp_path_factory.mktemp("capture") / "project", teacher_folder, student_folder)
    before = tree(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ended = cli("capture", "--all", "--set", "student=./nonsense")
    return SimpleNamespace(folder=folder, ended=ended, before=before, after=tree(folder))


def test_a_capture_ends_with_code_0_and_says_what_each_domain_takes(captured: SimpleNamespace) -> None:
    assert (captured.ended.code, captured.ended.err) == (0, "")
    lines = captured.ended.out.splitlines()
    assert sum("opening" in line for line in lines) == 1
    for domain in ("cats", "dogs"):
        [line] = [line for line in lines if line.startswith(f"{domain}: 6 replies, 24 tokens, ")]
        assert " bytes/token) in " in line
        assert Path(line.rpartition(" in ")[2]).is_dir()
    assert lines[-1].startswith("2 captured, 0 failed, ")


def test_a_capture_without_the_student_says_for_whom_it_captures(captured: SimpleNamespace) -> None:
    lines = [line for line in captured.ended.out.splitlines() if "./nonsense" in line]
    assert len(lines) == 2
    for domain, line in zip(("cats", "dogs"), lines, strict=True):
        assert line.startswith(
            f"{domain}: captured for students of the teacher's own tokenizer: student './nonsense': "
        )


def test_a_capture_for_a_student_of_another_tokenizer_needs_it(cli, project: Path) -> None:
    before = tree(project)
    said = refused(cli("capture", "-d", "cats", "--student", "./nonsense", "--vocab-strategy", "align"))
    assert said.startswith("student './nonsense': no such folder")
    assert tree(project) == before


def test_a_capture_leaves_nothing_but_a_cache(captured: SimpleNamespace) -> None:
    assert {name.partition("/")[0] for name in captured.after - captured.before} == {"cache"}
    assert captured.before <= captured.after


def test_after_a_capture_distill_does_not_open_the_teacher_and_gives_the_same_adapter(
    captured: SimpleNamespace, done: SimpleNamespace, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(captured.folder, tmp_path / "captured"))
    base = json.loads((folder / "configs" / "base.yaml").read_text())
    (folder / "configs" / "base.yaml").write_text(json.dumps({**base, "cache": str(folder / "cache")}))
    monkeypatch.chdir(folder)
    ended = cli("distill", "--all")
    assert (ended.code, ended.err) == (0, "")
    assert "opening" not in ended.out
    for domain in ("cats", "dogs"):
        adapter = Path("adapters_kd") / domain / "adapters.safetensors"
        assert adapter.read_bytes() == (done.folder / adapter).read_bytes()


def test_a_second_capture_opens_nothing(cli, finished: Path) -> None:
    before = tree(finished)
    ended = cli("capture", "--all")
    assert (ended.code, ended.err) == (0, "")
    assert "opening" not in ended.out
    assert "cats: 6 replies of the teacher are in the cache" in ended.out
    assert ended.out.splitlines()[-1].startswith("2 captured, 0 failed, ")
    assert tree(finished) == before


@pytest.mark.parametrize("spoil", [break_config, break_prompts])
def test_when_one_domain_cannot_be_captured_the_other_is(spoil: Callable[[], None], cli, project: Path) -> None:
    spoil()
    ended = cli("capture", "--all")
    assert ended.code == 2
    assert only_line(ended.err).startswith("dogs: failed. ")
    assert "cats: 6 replies, " in ended.out
    assert ended.out.splitlines()[-1].startswith("1 captured, 1 failed, ")


def test_when_no_domain_can_be_captured_each_is_told_and_nothing_is_done(cli, project: Path) -> None:
    before = tree(project)
    assert "losses.alpha" in refused(cli("capture", "--all", "--set", "losses.alpha=7"))
    assert "no domain was named" in refused(cli("capture"))
    assert "no such domain" in refused(cli("capture", "-d", "cat"))
    assert tree(project) == before


def test_a_missing_teacher_of_a_capture_is_told_once(cli, project: Path) -> None:
    before = tree(project)
    assert "no such folder" in refused(cli("capture", "--all", "--teacher", "./nowhere"))
    assert tree(project) == before


def test_a_capture_into_a_place_that_cannot_be_written_ends_in_one_line(cli, project: Path) -> None:
    Path("afile").touch()
    line = refused(cli("capture", "-d", "cats", "--set", "cache=afile"), code=4)
    assert line.startswith("afile: cannot be written")


@pytest.mark.parametrize("flag", ["--out", "--temperature", "--seed", "--fresh"])
def test_a_capture_has_no_flag_that_means_nothing_to_it(flag: str, cli, project: Path) -> None:
    assert flag in refused(cli("capture", "-d", "cats", flag, "1"))


def test_the_help_of_capture_explains_every_flag(cli) -> None:
    words = " ".join(cli("capture", "--help").out.split())
    for name in ("teacher", "student", "cache-bytes", "cache-gb", "prompts", "vocab-strategy"):
        assert "default: " in words.partition(f"--{name} ")[2].partition(" --")[0], name
    for flag in ("--domain", "--all", "--config", "--set"):
        assert f"{flag} " in words


def test_every_flag_of_a_capture_goes_over_the_files(cli, project: Path, student_folder: Path) -> None:
    shutil.copytree("prompts", "mine")
    Path("mine/cats/train.txt").write_text("hello\nhello to the world\nsaid the cat\n")
    given = {"teacher": str(student_folder), "student": str(student_folder)}
    given |= {"cache-bytes": "1000", "cache-gb": "0.01", "prompts": "mine", "vocab-strategy": "match"}
    assert set(inspect.signature(running.capture_command).parameters) == {
        *(name.replace("-", "_") for name in given),
        *("domain", "everything", "config", "sets", "as_json"),
    }
    flags = [part for name, value in given.items() for part in (f"--{name}", value)]
    ended = cli("capture", "-d", "cats", *flags, "--set", "capture.max_tokens=3")
    assert (ended.code, ended.err) == (0, "")
    assert f"teacher {student_folder}: opening" in ended.out
    assert "cache budget: targets.threshold " in ended.out
    assert "cats: 3 replies, " in ended.out


def test_a_capture_that_got_ctrl_c_goes_on_where_it_was(cli, project: Path) -> None:
    slow = {"max_tokens": 100, "batch_size": 1, "shard_prompts": 1}
    settings = [part for name, value in slow.items() for part in ("--set", f"capture.{name}={value}")]
    arguments = ["-m", "true_kd", "capture", "-d", "cats", *settings]
    code, err = stop_at("captured 2/6", arguments, project)
    assert (code, err.strip().count("\n")) == (130, 0), err
    assert "stopped by Ctrl-C" in err
    ended = cli("capture", "-d", "cats", *settings)
    assert ended.code == 0
    first = next(line for line in ended.out.splitlines() if line.startswith("cats: captured "))
    assert int(first.split()[2].partition("/")[0]) >= 2
    assert "cats: captured 6/6 replies" in ended.out


# Budgets and certificates.


@pytest.mark.parametrize("command", ["distill", "capture"])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cache-bytes", "3"], "--cache-bytes targets.bytes_per_token: 3.0, expected a number at least 4."),
        (["--cache-gb", "0"], "--cache-gb targets.gigabytes: 0.0, expected a number above 0."),
        (["--cache-bytes", "nan"], "targets.bytes_per_token: nan, expected a finite number."),
        (["--cache-gb", "much"], "--cache-gb"),
        (["--cache-bytes", "30", "--set", "targets.threshold=0.1"], "threshold and bytes_per_token are both given"),
        (["--cache-gb", "1", "--set", "targets.threshold=0.1"], "threshold and gigabytes are both given"),
        (["--cache-gb", "1", "--set", "targets.preset=exact"], "gigabytes has no meaning with preset exact"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_budget_that_makes_no_sense_ends_in_one_line(
    arguments: list[str], says: str, command: str, cli, project: Path
) -> None:
    before = tree(project)
    assert says in refused(cli(command, "-d", "cats", *arguments))
    assert tree(project) == before


@pytest.mark.parametrize("command", ["distill", "capture"])
def test_a_budget_that_is_too_small_ends_in_one_line_that_says_the_least(command: str, cli, project: Path) -> None:
    ended = cli(command, "-d", "cats", "--cache-bytes", "5")
    assert ended.code == 2
    line = only_line(ended.err)
    assert line.startswith("cats: failed. cache budget: 5 bytes per token, expected at least ")
    least = line.partition("at least ")[2].partition(" ")[0]
    assert cli(command, "-d", "cats", "--cache-bytes", least).code == 0


def give_replies() -> list[str]:
    """Replies long enough to judge the targets of cats by, and flags under which these are poor."""
    reply = "the cat sat on the mat and said hello to the world " * 2
    for split, count in (("train", 4), ("valid", 12)):
        lines = [json.dumps({"prompt": f"hello {number}", "completion": reply}) for number in range(count)]
        Path(f"prompts/cats/{split}.jsonl").write_text("\n".join(lines))
    Path("prompts/cats/train.txt").unlink()
    return ["--max-seq-length", "256", "--temperature", "4", "--set", "targets.preset=tiny"]


def test_poor_targets_end_in_one_line_and_leave_the_adapter_as_it_was(cli, finished: Path) -> None:
    before = {path: path.read_bytes() for path in Path("adapters_kd/cats").rglob("*") if path.is_file()}
    ended = cli("distill", "-d", "cats", *give_replies())
    assert ended.code == 2
    line = only_line(ended.err)
    assert line.count("cats") == 1
    assert "the gradient from them has a cosine of " in line
    assert "expected at least 0.9" in line
    assert "cats: poor targets of " in ended.out
    assert {path: path.read_bytes() for path in Path("adapters_kd/cats").rglob("*") if path.is_file()} == before


def test_poor_targets_of_a_budget_are_answered_with_a_larger_one(cli, project: Path) -> None:
    ended = cli("distill", "-d", "cats", *give_replies(), "--cache-bytes", "40")
    line = only_line(ended.err)
    assert "expected at least 0.9" in line
    assert "--cache-bytes" in line
    assert "targets.threshold" not in line


def test_poor_targets_are_trained_on_and_told_where_a_warning_is_asked_for(cli, project: Path) -> None:
    ended = cli("distill", "-d", "cats", *give_replies(), "--set", "fidelity.when_poor=warn")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    told = next(index for index, line in enumerate(lines) if line.startswith("cats: poor targets of "))
    assert lines[told - 1].startswith("cats: targets at T = 4: gradient ")
    assert "prompts/cats/valid.jsonl:" in lines[told]
    assert "cats: finished " in ended.out


# init and doctor.


def test_init_lays_out_a_project_that_knows_six_domains(cli, empty: Path) -> None:
    ended = cli("init")
    assert (ended.code, ended.err) == (0, "")
    assert "0 already there and kept." in ended.out
    assert {path.name for path in (empty / "prompts").iterdir()} >= set(DOMAINS)
    assert load_config(None, "thinking", []).teacher.model == "mlx-community/Qwen2.5-7B-Instruct-4bit"
    assert refused(cli("distill")).endswith(f"({', '.join(DOMAINS)}).")


def test_init_copies_every_byte(cli, empty: Path) -> None:
    cli("init", "new/place")
    for name in ("configs", "prompts"):
        written = tree(empty / "new/place" / name)
        assert written == tree(ROOT / name)
        files = [file for file in written if (ROOT / name / file).is_file()]
        assert all(
            (empty / "new/place" / name / file).read_bytes() == (ROOT / name / file).read_bytes() for file in files
        )


def test_init_again_keeps_what_is_there_and_brings_what_is_missing(cli, empty: Path) -> None:
    cli("init")
    Path("configs/base.yaml").write_text("seed: 12\n")
    Path("configs/task.yaml").unlink()
    ended = cli("init")
    assert ended.out.startswith(".: 1 files written, ")
    assert Path("configs/base.yaml").read_text() == "seed: 12\n"
    assert Path("configs/task.yaml").is_file()


@pytest.mark.parametrize("folder", ["afile", "afile/below", "."], ids=["a file", "below a file", "prompts is a file"])
def test_init_where_a_file_is_in_the_way_ends_in_one_line_and_writes_nothing(folder: str, cli, empty: Path) -> None:
    Path("afile").touch()
    Path("prompts").touch()
    line = refused(cli("init", folder))
    assert line.startswith("prompts: a file is in the way" if folder == "." else "afile: a file is in the way")
    assert tree(empty) == {"afile", "prompts"}


def test_init_where_nothing_can_be_written_ends_in_one_line(cli, empty: Path) -> None:
    assert "/proc/here" in refused(cli("init", "/proc/here"), code=4)


def test_init_elsewhere_says_where_to_go_next(cli, empty: Path) -> None:
    assert cli("init", "new").out.endswith("Next: cd new && true-kd distill --domain thinking\n")


def test_demo_says_which_command_it_is(cli, empty: Path) -> None:
    if not pocket.locate("pocket:teacher", "teacher").is_dir():
        pytest.skip("the pocket models are not built yet")
    ended = cli("demo", "--set", "losses.alpha=7")
    assert ended.out == "true-kd demo is: true-kd distill --all --config pocket:configs/base.yaml\n"
    assert only_line(ended.err).startswith("--set losses.alpha: 7,")


# The overview


@pytest.mark.parametrize("name", command_line.COMMANDS)
def test_the_overview_says_of_a_command_what_its_own_help_says(name: str, cli) -> None:
    summary = command_line.COMMANDS[name][2].rstrip(".")
    shown = " ".join(cli(name, "--help").out.split())
    assert shown.startswith(f"Usage: true-kd {name}")
    opening = summary.partition(":")[0].partition(",")[0].partition(";")[0]
    assert opening in shown, "the first words of the docstring"
    assert name in [line.split()[0] for line in cli("--help").out.splitlines() if line.strip()]


def test_the_overview_imports_no_command() -> None:
    code = (
        "import sys; sys.argv = ['true-kd', '--help']\n"
        "from true_kd.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in sys.modules if name.startswith('true_kd.cli.')], 'pydantic' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "['true_kd.cli.completion'] False"
