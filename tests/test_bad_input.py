"""Bad input as users and broken tools produce it, through the command line: some 400 cases in tables.

Each ends with exit code 2 and one to three lines on stderr that name the place and what to do, without a traceback or
a word of Python, and nothing at all is created or changed. Below the tables, properties and mutations of the readers:
whatever they are given, they answer with data or with such an error, soon and within bounds. `TRUE_KD_CHAOS=20` makes
those look at twenty times as many inputs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from test_finding import lay_run

from true_kd.config import Override, RunConfig, load_config
from true_kd.errors import MOST_LINES, ConfigError, InputError, PromptError
from true_kd.json_lines import Refusal, parse_line
from true_kd.prompts import check_domain_name, load_prompts

CHAOS = int(os.environ.get("TRUE_KD_CHAOS", "1"))
"""How many times as many inputs as by default the properties and mutations look at."""

PROMPTS = "".join(f"the cat number {number} sat on the mat\n" for number in range(6))
BASE = """\
teacher: {teacher}
student: {student}
training: {{iters: 2, batch_size: 4, max_seq_length: 64}}
capture: {{max_tokens: 4}}
lora: {{rank: 2}}
"""
USER = '{"role": "user", "content": "Hi"}'
REPLY = '{"role": "assistant", "content": "Hello."}'

# A line says what to do by an instruction, by a word that was probably meant, or by what belongs in that place.
FIX = re.compile(
    r"did you mean|expected |Domains here: |See `true-kd|"
    r"\b(Add|Change|Check|Choose|Convert|Create|Delete|Free|Fuse|Give|Go|Import|"
    r"Indent|Join|Keep|Leave|Lower|Merge|Move|Name|Put|Quote|Raise|Remove|Rename|Run|Save|Scale|Set|Shorten|Split|"
    r"Wait|Write)\b",
    re.IGNORECASE,
)
PYTHON = re.compile(r"Traceback|\b[A-Z]\w*(Error|Exception|Warning)\b|<class|object at 0x|NoneType|[Ee]rrno")


class Case(NamedTuple):
    """One bad input."""

    name: str
    """What it is, as the test's id."""
    bad: Any
    """The text, bytes, value or arguments that are wrong."""
    place: str
    """How the first line begins."""
    says: str = ""
    """What else stderr says."""


def tables(*cases: Case) -> pytest.MarkDecorator:
    """The cases of a test, each with its number: what rotates takes turns by it."""
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return pytest.mark.parametrize(("number", "case"), list(enumerate(cases)), ids=names)


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder: bytes of files, targets of links."""
    return {
        str(path.relative_to(folder)): (
            str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        )
        for path in folder.rglob("*")
    }


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_folder: Path, student_folder: Path) -> Path:
    """The current folder: a project of one good domain, ready to run."""
    folder = tmp_path / "project"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "base.yaml").write_text(BASE.format(teacher=teacher_folder, student=student_folder))
    (folder / "prompts" / "cats").mkdir(parents=True)
    (folder / "prompts" / "cats" / "train.txt").write_text(PROMPTS)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> Path:
    """A folder with an adapter of the student, as a run of the domain cats leaves it."""
    return lay_run(tmp_path_factory.mktemp("run"), "cats", teacher_folder, student_folder)


@pytest.fixture
def refused(cli: Callable[..., Any], project: Path) -> Callable[..., str]:
    """Calls the command line, checks that it refuses as it should, and returns what stderr says."""

    def call(*arguments: str) -> str:
        before = snapshot(project.parent)
        ended = cli(*arguments)
        assert ended.code == 2, ended
        lines = ended.err.splitlines()
        assert 1 <= len(lines) <= MOST_LINES, ended.err
        assert not PYTHON.search(ended.err), ended.err
        assert any(FIX.search(line) for line in lines), ended.err
        for line in lines:
            assert line.isprintable(), line
            assert 10 < len(line) < 700, line
            assert line.endswith((".", "?", "...")), line
        assert snapshot(project.parent) == before
        return ended.err

    return call


def check(case: Case, said: str) -> None:
    """That the first line begins with the place, and the text says what it should."""
    assert said.startswith(case.place), said
    assert case.says in said, said


RUNS: tuple[tuple[str, ...], ...] = (
    ("distill",),
    ("capture",),
    ("analyze",),
    ("sweep", "--grid", "training.checkpoint_every=5,6"),
)
"""The commands that begin with configs, prompts and models."""


# Config files.

DEEP = "\n".join("  " * depth + f"k{depth}:" for depth in range(40))
BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

TYPOS = [
    Case("typo in a group", "losses: {temprature: 3}\n", "bad.yaml:1 losses.temprature", "did you mean 'temperature'?"),
    Case("typo in a group's name", "loses: {alpha: 1}\n", "bad.yaml:1 loses: unknown key", "did you mean 'losses'?"),
    Case("typo in the teacher's key", "teacher:\n  modle: a/b\n", "bad.yaml:2 teacher.modle", "'model'?"),
    Case("typo in teacher", "seed: 1\nteachr: a/b\n", "bad.yaml:2 teachr: unknown key", "did you mean 'teacher'?"),
    Case("key of another group", "lora: {iters: 8}\n", "bad.yaml:1 lora.iters", "did you mean 'training.iters'?"),
    Case("key without its group", "\nalpha: 0.3\n", "bad.yaml:2 alpha", "did you mean 'losses.alpha'?"),
    Case("flag's name as key", "batch-size: 4\n", "bad.yaml:1 batch-size", "did you mean 'training.batch_size'?"),
    Case("dotted key", "lora.rank: 8\n", "bad.yaml:1 'lora.rank'", "lora"),
    Case("key in capitals", "SEED: 1\n", "bad.yaml:1 SEED", "did you mean 'seed'?"),
    Case("key in camel case", "training: {learningRate: 1}\n", "bad.yaml:1 training.learningRate", "'learning_rate'?"),
    Case("lora_alpha of other tools", "lora: {lora_alpha: 32}\n", "bad.yaml:1 lora.lora_alpha", "'scale'?"),
    Case("epochs of other tools", "training: {epochs: 3}\n", "bad.yaml:1 training.epochs", "'iters'? It counts"),
    Case(
        "steps of other tools", "training: {max_steps: 3}\n", "bad.yaml:1 training.max_steps", "did you mean 'iters'?"
    ),
    Case("token in a config", "hf_token: hf_abcdef\n", "bad.yaml:1 hf_token: unknown key", "run `hf auth login`"),
    Case("Cyrillic letter in a key", "sееd: 1\n", "bad.yaml:1 'sееd': unknown key", "\\u0435\\u0435d'"),
    Case("zero-width space in a key", '"seed\\u200b": 1\n', "bad.yaml:1 'seed\\u200b'", "'seed'?"),
    Case("full-width key", "ｓｅｅｄ: 1\n", "bad.yaml:1 'ｓｅｅｄ': unknown key", "Remove it."),
    Case("space around a key", "'seed ': 1\n", "bad.yaml:1 'seed '", "'seed'?"),
    Case("empty key", "'': 1\n", "bad.yaml:1 '': unknown key", "Remove it."),
    Case("very long key", f"{'k' * 900}: 1\n", "bad.yaml:1 'kkk", "unknown key"),
    Case("key of a thousand words", f"? {'word ' * 1000}\n: 1\n", "bad.yaml:1 ", "unknown key"),
    Case("dunder key", "__class__: 1\n", "bad.yaml:1 __class__: unknown key", "Remove it."),
    Case("model_config as key", "model_config: {extra: allow}\n", "bad.yaml:1 model_config: unknown key"),
    Case("key below a value", "seed:\n  value: 1\n", "bad.yaml:1 seed: a mapping, expected a whole number"),
    Case("key of a preset's settings", "targets: {kind: sparse}\n", "bad.yaml:1 targets.kind", "unknown key"),
    Case("two typos", "sed: 1\nlora: {rnk: 2}\n", "bad.yaml:2 lora.rnk", "bad.yaml:1 sed"),
    Case("ten typos", "".join(f"wrong{n}: 1\n" for n in range(10)), "bad.yaml:1 wrong0", "and 8 more, at bad.yaml:3"),
]

TYPES = [
    Case("number in quotes", "seed: '1'\n", "bad.yaml:1 seed: '1'", "Remove the quotes."),
    Case("number with a comma", "losses: {alpha: '0,5'}\n", "bad.yaml:1 losses.alpha: '0,5'", "expected a number"),
    Case("number with a unit", "memory_gb: 16GB\n", "bad.yaml:1 memory_gb: '16GB'", "expected a number"),
    Case("number with a per cent sign", "losses: {alpha: 70%}\n", "bad.yaml:1 losses.alpha: '70%'", "a number"),
    Case("fraction", "losses: {alpha: 1/2}\n", "bad.yaml:1 losses.alpha: '1/2'", "expected a number"),
    Case("power", "training: {learning_rate: 10^-4}\n", "bad.yaml:1 training.learning_rate: '10^-4'"),
    Case("exponent without a digit", "training: {learning_rate: 1e}\n", "bad.yaml:1 training.learning_rate: '1e'"),
    Case("exponent with a space", "training: {learning_rate: 1 e-4}\n", "bad.yaml:1 training.learning_rate: '1 e-4'"),
    Case("number with a lookalike", "seed: l0\n", "bad.yaml:1 seed: 'l0'", "expected a whole number"),
    Case("Arabic digits", "seed: ١٢\n", "bad.yaml:1 seed: '١٢'", "expected a whole number"),
    Case("minus sign of typographers", "seed: −1\n", "bad.yaml:1 seed: '−1'", "expected a whole number"),
    Case("curly quotes", "divergence: “forward_kl”\n", "bad.yaml:1 divergence", "'losses.divergence'?"),
    Case("environment variable", "seed: $SEED\n", "bad.yaml:1 seed: '$SEED'", "expected a whole number"),
    Case("template left in", "seed: {{ seed }}\n", "bad.yaml:1:8: ", "expected text"),
    Case("fraction of a step", "training: {iters: 10.5}\n", "bad.yaml:1 training.iters: 10.5", "a whole number"),
    Case("whole number with a point", "training: {iters: 10.0}\n", "bad.yaml:1 training.iters: 10.0", "Write 10."),
    Case("steps as an exponent", "training: {iters: 1e3}\n", "bad.yaml:1 training.iters: 1000.0", "Write 1000."),
    Case("bool for a number", "seed: true\n", "bad.yaml:1 seed: true", "expected a whole number"),
    Case("bool for a float", "losses: {alpha: false}\n", "bad.yaml:1 losses.alpha: false", "expected a number"),
    Case("bool for a draw temperature", "targets: {draw_temperature: true}\n", "bad.yaml:1 targets.draw_temperature"),
    Case("number for a bool", "fresh: 1\n", "bad.yaml:1 fresh: 1", "expected true or false"),
    Case("text for a bool", "report: 'true'\n", "bad.yaml:1 report: 'true'", "Remove the quotes."),
    Case("null for a number", "seed: null\n", "bad.yaml:1 seed: null", "expected a whole number"),
    Case("nothing for a number", "seed:\n", "bad.yaml:1 seed: null", "expected a whole number"),
    Case("null for a group", "losses:\n", "bad.yaml:1 losses: null", "expected a mapping of keys"),
    Case("number for a group", "training: 200\n", "bad.yaml:1 training: 200", "expected a mapping of keys"),
    Case("list for a group", "lora:\n  - rank: 8\n", "bad.yaml:1 lora: a list of 1", "expected a mapping of keys"),
    Case("text for a group", "capture: greedy\n", "bad.yaml:1 capture: 'greedy'", "expected a mapping of keys"),
    Case("list for a number", "seed: [1, 2]\n", "bad.yaml:1 seed: a list of 2", "expected a whole number"),
    Case("list for a model", "teacher: [a/b, c/d]\n", "bad.yaml:1 teacher: a list of 2", "a mapping of keys"),
    Case("number for a model", "teacher: 7\n", "bad.yaml:1 teacher: 7", "expected"),
    Case("null for a model", "student: null\n", "bad.yaml:1 student: null", "expected"),
    Case("empty name of a model", "student: ''\n", "bad.yaml:1 student.model: ''", "at least 1 character"),
    Case("number for a model's name", "student: {model: 7}\n", "bad.yaml:1 student.model: 7", "Put it in quotes."),
    Case("number for a revision", "teacher: {revision: 1.0}\n", "bad.yaml:1 teacher.revision: 1.0", "in quotes"),
    Case("mapping for a folder", "out: {path: x}\n", "bad.yaml:1 out: a mapping", "expected text"),
    Case("number for a folder", "out: 2024\n", "bad.yaml:1 out: 2024", "Put it in quotes."),
    Case("empty folder", "prompts: ''\n", "bad.yaml:1 prompts: ''", "at least 1 character"),
    Case("null for a folder", "out: ~\n", "bad.yaml:1 out: null", "expected text"),
    Case(
        "one domain without its list",
        "domains: cats\n",
        "bad.yaml:1 domains: 'cats'",
        "expected a list or 'all'. Write ['cats'].",
    ),
    Case("number among domains", "domains: [cats, 7]\n", "bad.yaml:1 domains[1]: 7", "Put it in quotes."),
    Case("mapping of domains", "domains: {cats: true}\n", "bad.yaml:1 domains: a mapping", "expected a list"),
    Case("one layer without its list", "lora: {keys: q_proj}\n", "bad.yaml:1 lora.keys: 'q_proj'", "Write ['q_proj']."),
    Case("null among layers", "lora:\n  keys:\n    - a\n    -\n", "bad.yaml:4 lora.keys[1]: null", "expected text"),
    Case("text for a budget", "targets: {bytes_per_token: small}\n", "bad.yaml:1 targets.bytes_per_token: 'small'"),
    Case("clock for a number", "training: {patience: 12:30}\n", "bad.yaml:1 training.patience: '12:30'"),
    Case("date for a number", "seed: 2024-01-31\n", "bad.yaml:1 seed: '2024-01-31'", "expected a whole number"),
    Case("version for a number", "losses: {alpha: 1.2.3}\n", "bad.yaml:1 losses.alpha: '1.2.3'", "expected a number"),
]

BOUNDS = [
    Case("alpha above 1", "losses: {alpha: 1.5}\n", "bad.yaml:1 losses.alpha: 1.5", "at most 1."),
    Case("alpha below 0", "losses: {alpha: -0.1}\n", "bad.yaml:1 losses.alpha: -0.1", "at least 0."),
    Case("alpha_end in per cent", "losses: {alpha_end: 70}\n", "bad.yaml:1 losses.alpha_end: 70", "at most 1"),
    Case("temperature 0", "losses: {temperature: 0}\n", "bad.yaml:1 losses.temperature: 0", "at least 0.5."),
    Case("temperature 100", "losses: {temperature: 100}\n", "bad.yaml:1 losses.temperature: 100", "at most 10."),
    Case("beta 1", "losses: {beta: 1}\n", "bad.yaml:1 losses.beta: 1", "at most 0.99."),
    Case("skew 0", "losses: {skew: 0}\n", "bad.yaml:1 losses.skew: 0", "at least 0.01."),
    Case("chunk 1", "losses: {chunk: 1}\n", "bad.yaml:1 losses.chunk: 1", "at least 16"),
    Case("no steps", "training: {iters: 0}\n", "bad.yaml:1 training.iters: 0", "at least 1."),
    Case("negative steps", "training: {iters: -200}\n", "bad.yaml:1 training.iters: -200", "at least 1."),
    Case("learning rate 0", "training: {learning_rate: 0}\n", "bad.yaml:1 training.learning_rate: 0", "above 0."),
    Case("learning rate 2", "training: {learning_rate: 2}\n", "bad.yaml:1 training.learning_rate: 2", "at most 1."),
    Case("warm-up in steps", "training: {warmup: 100}\n", "bad.yaml:1 training.warmup: 100", "at most 1."),
    Case("batch of none", "training: {batch_size: 0}\n", "bad.yaml:1 training.batch_size: 0", "at least 1."),
    Case("no length", "training: {max_seq_length: 1}\n", "bad.yaml:1 training.max_seq_length: 1", "at least"),
    Case("negative clipping", "training: {grad_clip: -1}\n", "bad.yaml:1 training.grad_clip: -1", "at least 0."),
    Case("no patience", "training: {patience: 0}\n", "bad.yaml:1 training.patience: 0", "at least 1"),
    Case("no accumulation", "training: {accumulate: 0}\n", "bad.yaml:1 training.accumulate: 0", "at least 1."),
    Case("rank 0", "lora: {rank: 0}\n", "bad.yaml:1 lora.rank: 0", "at least 1."),
    Case("scale 0", "lora: {scale: 0}\n", "bad.yaml:1 lora.scale: 0", "above 0."),
    Case("dropout 1", "lora: {dropout: 1}\n", "bad.yaml:1 lora.dropout: 1", "below 1."),
    Case("no layers", "lora: {num_layers: 0}\n", "bad.yaml:1 lora.num_layers: 0", "expected -1 for all layers"),
    Case("layers -2", "lora: {num_layers: -2}\n", "bad.yaml:1 lora.num_layers: -2", "at least -1."),
    Case("seed of 64 bits", "seed: 4294967296\n", "bad.yaml:1 seed: 4294967296", "below 2147483648."),
    Case("negative seed", "seed: -1\n", "bad.yaml:1 seed: -1", "at least 0."),
    Case("seed of 18 digits", "seed: 999999999999999999\n", "bad.yaml:1 seed: 999999999999999999", "below"),
    Case("memory in bytes", "memory_gb: 32000000000\n", "bad.yaml:1 memory_gb: 32000000000", "at most 1000000."),
    Case("no memory", "memory_gb: 0\n", "bad.yaml:1 memory_gb: 0", "above 0."),
    Case("top_p 0", "capture: {top_p: 0}\n", "bad.yaml:1 capture.top_p: 0", "above 0."),
    Case("replies of no tokens", "capture: {max_tokens: 0}\n", "bad.yaml:1 capture.max_tokens: 0", "at least 1."),
    Case(
        "sampling at 9",
        "capture: {sampling_temperature: 9}\n",
        "bad.yaml:1 capture.sampling_temperature: 9",
        "at most 5.",
    ),
    Case("threshold 0", "targets: {threshold: 0}\n", "bad.yaml:1 targets.threshold: 0", "at least 0.001"),
    Case(
        "draw temperature 3", "targets: {draw_temperature: 3}\n", "bad.yaml:1 targets.draw_temperature: 3", "expected"
    ),
    Case(
        "budget of one byte", "targets: {bytes_per_token: 1}\n", "bad.yaml:1 targets.bytes_per_token: 1", "at least 4"
    ),
    Case("share of nothing", "targets: {share: 0}\n", "bad.yaml:1 targets.share: 0", "above 0."),
    Case("cosine 2", "fidelity: {least_cosine: 2}\n", "bad.yaml:1 fidelity.least_cosine: 2", "at most 1."),
    Case("negative probe", "gate: {prompts: -1}\n", "bad.yaml:1 gate.prompts: -1", "at least 0."),
    Case("unknown divergence", "losses: {divergence: kl}\n", "bad.yaml:1 losses.divergence: 'kl'", "'forward_kl'"),
    Case(
        "divergence with a hyphen",
        "losses: {divergence: reverse-kl}\n",
        "bad.yaml:1 losses.divergence",
        "'reverse_kl'?",
    ),
    Case("unknown schedule", "training: {schedule: linear}\n", "bad.yaml:1 training.schedule: 'linear'", "'cosine'"),
    Case("schedule in capitals", "training: {schedule: Cosine}\n", "bad.yaml:1 training.schedule", "mean 'cosine'?"),
    Case("unknown preset", "targets: {preset: small}\n", "bad.yaml:1 targets.preset: 'small'", "Choose one."),
    Case("unknown strategy", "vocab_strategy: pad\n", "bad.yaml:1 vocab_strategy: 'pad'", "'truncate'"),
    Case("unknown control", "control: dpo\n", "bad.yaml:1 control: 'dpo'", "'sft'"),
    Case("unknown adapter type", "lora: {type: qlora}\n", "bad.yaml:1 lora.type: 'qlora'", "'lora'"),
    Case("unknown weighing", "losses: {weigh_by: loss}\n", "bad.yaml:1 losses.weigh_by: 'loss'", "'entropy'"),
    Case("unknown when_poor", "fidelity: {when_poor: ignore}\n", "bad.yaml:1 fidelity.when_poor", "'warn'"),
    Case("unknown dequantize", "teacher: {dequantize: 'yes'}\n", "bad.yaml:1 teacher.dequantize", "'always'"),
    Case("all of the domains in a list of words", "domains: everything\n", "bad.yaml:1 domains: 'everything'", "'all'"),
]

CONTRADICTIONS = [
    Case(
        "threshold beside a budget",
        "seed: 1\ntargets:\n  threshold: 0.1\n  bytes_per_token: 30\n",
        "bad.yaml:2 targets",
        "threshold and bytes_per_token are both given, expected one",
    ),
    Case(
        "threshold beside gigabytes",
        "targets: {threshold: 0.1, gigabytes: 2}\n",
        "bad.yaml:1 targets",
        "threshold and gigabytes are both given",
    ),
    Case("exact with a budget", "targets: {preset: exact, gigabytes: 2}\n", "bad.yaml:1 targets", "has no meaning"),
    Case("exact with a threshold", "targets: {preset: exact, threshold: 0.1}\n", "bad.yaml:1 targets", "no meaning"),
    Case("exact at a draw temperature", "targets: {preset: exact, draw_temperature: 2}\n", "bad.yaml:1 targets"),
]

SYNTAX = [
    Case("no for false", "fresh: no\n", "bad.yaml:1:8: 'no'", "Write false"),
    Case("On for true", "report: On\n", "bad.yaml:1:9: 'On'", "Write true"),
    Case("yes in a list", "domains: [yes]\n", "bad.yaml:1:11: 'yes'", "or quote it"),
    Case("octal", "seed: 010\n", "bad.yaml:1:7: '010'", "octal"),
    Case("leading zeros", "training: {iters: 0200}\n", "bad.yaml:1:19: '0200'", "Write 200"),
    Case("digits in groups", "training: {iters: 1_000}\n", "bad.yaml:1:19: '1_000'", "Write 1000"),
    Case("digits beyond 64 bits", f"seed: {'9' * 40}\n", "bad.yaml:1:7: '999", "at most 18 digits"),
    Case("five thousand digits", f"seed: {'9' * 5000}\n", "bad.yaml:1:7: '999", "at most 18 digits"),
    Case("not a number", "losses: {alpha: .nan}\n", "bad.yaml:1:17: '.nan'", "expected a finite number"),
    Case("NaN of JSON", "losses: {alpha: NaN}\n", "bad.yaml:1:17: 'NaN'", "expected a finite number"),
    Case("infinity", "training: {grad_clip: .inf}\n", "bad.yaml:1:23: '.inf'", "expected a finite number"),
    Case("minus infinity", "memory_gb: -Infinity\n", "bad.yaml:1:12: '-Infinity'", "expected a finite number"),
    Case("exponent beyond floats", "training: {learning_rate: 1e999}\n", "bad.yaml:1:27: '1e999'", "finite number"),
    Case("key twice", "seed: 1\nout: x\nseed: 2\n", "bad.yaml:3:1: key 'seed' again, first on line 1", "Keep one"),
    Case("key twice in a group", "lora:\n  rank: 1\n  rank: 2\n", "bad.yaml:3:3: key 'rank' again", "line 2"),
    Case("group twice", "lora: {rank: 1}\nseed: 1\nlora: {scale: 2.0}\n", "bad.yaml:3:1: key 'lora' again"),
    Case("key twice in JSON", '{"seed": 1, "seed": 2}\n', "bad.yaml:1:13: key 'seed' again"),
    Case("anchor", "seed: &s 1\n", "bad.yaml:1:7: anchor '&s'", "Remove it."),
    Case("alias", "seed: *s\n", "bad.yaml:1:7: alias '*s'", "Write the value out."),
    Case("bomb of aliases", BOMB, "bad.yaml:1:4: anchor '&a'", "and 31 more, at bad.yaml:2:8"),
    Case("merge key", "lora: {<<: {rank: 2}}\n", "bad.yaml:1:8: a merge key '<<'", "Write the keys out."),
    Case("star without quotes", "domains: *\n", "bad.yaml:1:1", "expected"),
    Case("python tag", "out: !!python/object/apply:os.system [touch pwned]\n", "bad.yaml:1:6: tag", "Remove it."),
    Case("own tag", "out: !env HOME\n", "bad.yaml:1:6: tag '!env'", "Remove it."),
    Case("include of other tools", "losses: !include losses.yaml\n", "bad.yaml:1:9: tag '!include'", "Remove it."),
    Case("binary tag", "out: !!binary aGVsbG8=\n", "bad.yaml:1:6: tag", "Remove it."),
    Case("tab before a key", "losses:\n\talpha: 1\n", "bad.yaml:2:1: ", "Indent with spaces."),
    Case("tab behind spaces", "losses:\n  \talpha: 1\n", "bad.yaml:2:3: ", "Indent with spaces."),
    Case("wrong indentation", "losses:\n  alpha: 1\n beta: 0.5\n", "bad.yaml:3:2: ", "Check indentation"),
    Case("key indented below a value", "seed: 1\n  out: x\n", "bad.yaml:2:6: ", "Check indentation"),
    Case("two values on a line", "seed: 1 out: x\n", "bad.yaml:1:12: ", "Check indentation"),
    Case("colon without a space", "seed:1\n", "bad.yaml:1:1: text", "Write 'key: value' lines."),
    Case("equals sign for a colon", "seed = 1\n", "bad.yaml:1:1: text", "Write 'key: value' lines."),
    Case("ini file", "[losses]\nalpha = 1\n", "bad.yaml:2:1: ", "Check"),
    Case("python file", "import os\nseed = 1\n", "bad.yaml:1:1: text", "Write 'key: value' lines."),
    Case("markdown fence", "```yaml\nseed: 1\n```\n", "bad.yaml:1:1: ", "Check"),
    Case("merge conflict", "<<<<<<< HEAD\nseed: 1\n=======\nseed: 2\n>>>>>>> b\n", "bad.yaml:2:5: ", "Check"),
    Case("page of a web site", "<!DOCTYPE html>\n<html><body>404: Not Found</body></html>\n", "bad.yaml:", "Check"),
    Case(
        "pointer of Git LFS", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "bad.yaml:1:1"
    ),
    Case("brackets of a list left open", "domains: [cats\nseed: 1\n", "bad.yaml:2:5: ", "Check"),
    Case("braces left open", "losses: {alpha: 1\n", "bad.yaml:2:1: ", "Check"),
    Case("brace too many", "losses: {alpha: 1}}\n", "bad.yaml:1:19: ", "Check"),
    Case("quote left open", "out: 'x\nseed: 1\n", "bad.yaml:3:1: ", "Check"),
    Case("quote inside quotes", "out: 'it's'\n", "bad.yaml:1:10: ", "Check"),
    Case("backslash in double quotes", 'out: "C:\\Users\\me"\n', "bad.yaml:1:11: ", "Check"),
    Case("at sign", "out: @here\n", "bad.yaml:1:6: ", "Check"),
    Case("percent sign", "out: %HOME%\n", "bad.yaml:1:6: ", "Check"),
    Case("backtick", "out: `pwd`\n", "bad.yaml:1:6: ", "Check"),
    Case("list at the top", "- seed: 1\n", "bad.yaml:1:1: a list", "Write 'key: value' lines."),
    Case("number at the top", "42\n", "bad.yaml:1:1: a number", "Write 'key: value' lines."),
    Case("text at the top", "hello\n", "bad.yaml:1:1: text", "Write 'key: value' lines."),
    Case("true at the top", "true\n", "bad.yaml:1:1: true or false", "Write 'key: value' lines."),
    Case("two documents", "seed: 1\n---\nseed: 2\n", "bad.yaml:2:1: a second document", "Remove the '---' line."),
    Case("directive", "%YAML 1.1\n---\nseed: 1\n", "bad.yaml:1:1: a % directive", "Remove it."),
    Case("directive of a huge version", f"%YAML {'9' * 400}.1\n---\nseed: 1\n", "bad.yaml:1:"),
    Case("number as key", "1: 2\n", "bad.yaml:1:1: '1' as a key", "Put it in quotes."),
    Case("null as key", "~: 2\n", "bad.yaml:1:1: '~' as a key", "Put it in quotes."),
    Case("list as key", "? [a, b]\n: 1\n", "bad.yaml:1:3: a list, mapping or alias as a key", "Write a plain word."),
    Case("deep mapping", DEEP, "bad.yaml:21:41: nested more than 20 levels deep", "Write it flatter."),
    Case("deep list", f"a: {'[' * 50_000}", "bad.yaml:1:23: nested more than 20 levels deep", "Write it flatter."),
    Case("deep pairs of brackets", f"a: {'[' * 300}{']' * 300}\n", "bad.yaml:1:23: nested more than 20 levels"),
    Case("deep dashes", "- " * 10_000, "bad.yaml:1:41: nested more than 20 levels deep", "Write it flatter."),
    Case("UTF-16", "seed: 1\n".encode("utf-16"), "bad.yaml:1:1: byte 0xff is not UTF-8", "Save the file as UTF-8."),
    Case("UTF-16 without its mark", "seed: 1\n".encode("utf-16-le"), "bad.yaml:1:2: ", "Remove it."),
    Case(
        "Latin-1", "out: caf\xe9\n".encode("latin-1"), "bad.yaml:1:9: byte 0xe9 is not UTF-8", "Save the file as UTF-8."
    ),
    Case("bytes of a picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "bad.yaml:1:1: byte 0x89 is not UTF-8"),
    Case("bytes of an archive", b"PK\x03\x04\0\0", "bad.yaml:1:3: ", "Remove it."),
    Case("bytes of a compressed file", b"\x1f\x8b\x08\0", "bad.yaml:1:2: byte 0x8b is not UTF-8"),
    Case("NUL", b"seed: 1\0\n", "bad.yaml:1:8: '\\x00' is not a printable character", "Remove it."),
    Case("NUL as an escape", 'out: "a\\0b"\n', "bad.yaml:1:6: '\\x00' is not a character", "Remove the escape."),
    Case("escape of a terminal", b"out: \x1b[31mred\n", "bad.yaml:1:6: '\\x1b' is not a printable character"),
    Case("lone surrogate", 'out: "\\ud800"\n', "bad.yaml:1:6: '\\ud800' is not a character", "Remove the escape."),
    Case("escape beyond Unicode", 'out: "\\UFFFFFFFF"\n', "bad.yaml:1:9: an escape", "Remove it."),
    Case("byte order mark in the middle", "seed: 1\n\ufeffout: x\n", "bad.yaml:2"),
    Case("more than a page", "# x\n" * 30_000, "bad.yaml: larger than 100 kB", "Shorten it."),
    Case("one value that is too long", f"out: {'x' * 100_001}", "bad.yaml: larger than 100 kB", "Shorten it."),
    Case("a folder with a name too long", f"prompts: {'x' * 5000}\n", "prompts 'xxx", "not a path"),
    Case("a home of nobody", "prompts: ~nobody-of-this-name/x\n", "prompts '~nobody-of-this-name/x': not a path"),
]

CONFIG_CALLS: tuple[tuple[str, ...], ...] = (
    *((*run, "-d", "cats") for run in RUNS),
    ("evaluate", "-d", "cats"),
    ("generate", "hi", "-d", "cats"),
    ("compare", "hi", "-d", "cats"),
    ("chat", "-d", "cats"),
)


@tables(*TYPOS, *TYPES, *BOUNDS, *CONTRADICTIONS, *SYNTAX)
def test_a_bad_config_is_refused_by_every_command_with_its_line(
    number: int, case: Case, refused, project: Path
) -> None:
    Path("bad.yaml").write_bytes(case.bad if isinstance(case.bad, bytes) else case.bad.encode())
    # Commands that read no prompts do not see a prompts folder that cannot be.
    calls = CONFIG_CALLS[:4] if case.place.startswith("prompts") else CONFIG_CALLS
    check(case, refused(*calls[number % len(calls)], "--config", "bad.yaml"))


DOMAIN_CONFIGS = [
    Case("typo", "losses:\n  alhpa: 1\n", "configs/cats.yaml:2 losses.alhpa", "did you mean 'alpha'?"),
    Case("out of bounds", "training: {iters: 0}\n", "configs/cats.yaml:1 training.iters: 0", "at least 1."),
    Case("syntax", "losses: {alpha: 1\n", "configs/cats.yaml:2:1: ", "Check"),
    Case("list", "- cats\n", "configs/cats.yaml:1:1: a list", "Write 'key: value' lines."),
    Case("bytes", b"\xff\xfe", "configs/cats.yaml:1:1: byte 0xff is not UTF-8", "Save"),
    Case("output folder", "out: elsewhere\n", "configs/cats.yaml:1 out: holds for a whole run", "Move it to base.yaml"),
    Case("prompts folder", "seed: 1\nprompts: p\n", "configs/cats.yaml:2 prompts: holds for a whole run", "Move it"),
    Case("cache", "cache: /tmp/c\n", "configs/cats.yaml:1 cache: holds for a whole run", "Move it"),
    Case("domains", "domains: [dogs]\n", "configs/cats.yaml:1 domains: holds for a whole run", "Move it"),
    Case("missing model", "student: ./nowhere\n", "student './nowhere': no such folder", "Check the path."),
    Case("unknown layers", "lora: {keys: [q_proj]}\n", "lora.keys: no layer", "did you mean 'self_attn.q_proj'?"),
    Case("no layers", "lora: {keys: []}\n", "lora.keys: no layer", "Expected some of"),
]


@tables(*DOMAIN_CONFIGS)
def test_a_bad_config_of_a_domain_is_refused_with_its_line(number: int, case: Case, refused, project: Path) -> None:
    Path("configs/cats.yaml").write_bytes(case.bad if isinstance(case.bad, bytes) else case.bad.encode())
    check(case, refused(("distill", "analyze")[number % 2], "-d", "cats"))


@pytest.mark.parametrize("suffix", [".yml", ".YML", ".YAML"])
def test_a_config_of_a_domain_under_another_suffix_is_not_passed_over(suffix: str, refused, project: Path) -> None:
    Path(f"configs/cats{suffix}").write_text("seed: 1\n")
    assert refused("distill", "-d", "cats").startswith(
        f"configs/cats{suffix}: not read, expected cats.yaml. Rename it."
    )


# Prompts and data.

GOOD = '{"prompt": "the cat sat"}'
AT = "prompts/cats/train.jsonl:2:"

JSON_LINES = [
    Case("no JSON", "hello", f"{AT}1: expected value", "Write one JSON object"),
    Case("cut short", '{"prompt": "a', f"{AT}12: unterminated string", "Write one JSON object"),
    Case("cut behind a colon", '{"prompt":', f"{AT}11: expected value", "Write one JSON object"),
    Case("comma at the end", '{"prompt": "a",}', f"{AT}1", "Write one JSON object"),
    Case("comma behind the object", '{"prompt": "a"},', f"{AT}16: extra data", "Write one JSON object"),
    Case("two objects on a line", '{"prompt": "a"}{"prompt": "b"}', f"{AT}16: extra data", "Write one JSON object"),
    Case("single quotes", "{'prompt': 'a'}", f"{AT}2: expected property name", "Write one JSON object"),
    Case("Python's None", '{"prompt": None}', f"{AT}12: expected value", "Write one JSON object"),
    Case("comment", "// a comment", f"{AT}1: expected value", "Write one JSON object"),
    Case("line break in a string", '{"prompt": "a\nb"}', f"{AT}12: ", "Write one JSON object"),
    Case("tab in a string", '{"prompt": "a\tb"}', f"{AT}14: invalid control character", "Write one JSON object"),
    Case("bad escape", '{"prompt": "C:\\Users"}', f"{AT}", "Write one JSON object"),
    Case("curly quotes", "{“prompt”: “a”}", f"{AT}2: expected property name", "Write one JSON object"),
    Case("page of a web site", "<html><body>403 Forbidden</body></html>", f"{AT}1: expected value"),
    Case("merge conflict", "<<<<<<< HEAD", f"{AT}1: expected value", "Write one JSON object"),
    Case("list", '["a", "b"]', f"{AT}1: a list", "Write one object a line."),
    Case("string", '"a"', f"{AT}1: a string", "Write one object a line."),
    Case("number", "3", f"{AT}1: a number", "Write one object a line."),
    Case("null", "null", f"{AT}1: null", "Write one object a line."),
    Case("true", "true", f"{AT}1: a boolean", "Write one object a line."),
    Case("bracket of a JSON file", "[", f"{AT}2: expected value", "Write one JSON object"),
    Case("empty object", "{}", f"{AT}1: no prompt", "Add one of them."),
    Case("prompt of null", '{"prompt": null}', f"{AT}1: no prompt", "Add one of them."),
    Case("all columns of null", '{"prompt": null, "text": null, "messages": null}', f"{AT}1: no prompt"),
    Case("typo in a key", '{"promt": "a"}', f"{AT}2: 'promt': unknown key", "did you mean 'prompt'?"),
    Case(
        "Alpaca's keys", '{"instruction": "a", "input": "", "output": "b"}', f"{AT}2: 'instruction'", "expected some of"
    ),
    Case("ShareGPT's keys", '{"conversations": [{"from": "human", "value": "a"}]}', f"{AT}2: 'conversations'"),
    Case(
        "key of another data set", '{"question": "a", "answer": "b"}', f"{AT}2: 'question': unknown key", "Remove it."
    ),
    Case("column of numbers beside", '{"id": 7, "prompt": "a"}', f"{AT}2: 'id': unknown key", "Remove it."),
    Case("key in capitals", '{"Prompt": "a"}', f"{AT}2: 'Prompt': unknown key", "did you mean 'prompt'?"),
    Case("key twice", '{"prompt": "a", "prompt": "b"}', f"{AT}17: key 'prompt' twice", "Remove one."),
    Case("prompt of a number", '{"prompt": 3}', f"{AT}2: prompt: a number", "Put it in quotes."),
    Case("prompt of a bool", '{"prompt": true}', f"{AT}2: prompt: a boolean", "Put it in quotes."),
    Case("prompt of an object", '{"prompt": {"text": "a"}}', f"{AT}2: prompt: an object", "expected a string"),
    Case("empty prompt", '{"prompt": ""}', f"{AT}2: prompt: empty", "remove the line."),
    Case("prompt of spaces", '{"prompt": " \\n\\t "}', f"{AT}2: prompt: empty", "remove the line."),
    Case("prompt of an empty list", '{"prompt": []}', f"{AT}2: prompt: an empty list", "Add a user message."),
    Case("prompt of strings", '{"prompt": ["a"]}', f"{AT}2: prompt[0]: a string", "Write it so."),
    Case(
        "prompt that ends with a reply", f'{{"prompt": [{USER}, {REPLY}]}}', f"{AT}2: prompt: ends with an", "Name the"
    ),
    Case("empty completion", '{"prompt": "a", "completion": ""}', f"{AT}17: completion: empty", "Write it"),
    Case("completion of a list", '{"prompt": "a", "completion": ["b"]}', f"{AT}17: completion: a list", "in quotes."),
    Case("completion alone", '{"completion": "b"}', f"{AT}1: no prompt", "Add one of them."),
    Case("text beside a prompt", '{"text": "a", "prompt": "b"}', f"{AT}2: 'text' together with 'prompt'", "Remove one"),
    Case("text beside messages", f'{{"messages": [{USER}], "text": "a"}}', f"{AT}", "'text' together with 'messages'"),
    Case("prompt beside messages", f'{{"messages": [{USER}], "prompt": "a"}}', f"{AT}", "'prompt' together with"),
    Case(
        "completion beside messages", f'{{"messages": [{USER}], "completion": "a"}}', f"{AT}", "Remove one of the two."
    ),
    Case("tools beside text", '{"text": "a", "tools": [{}]}', f"{AT}15: 'tools' together with 'text'", "Remove one"),
    Case("answer beside text", '{"text": "a", "answer": "b"}', f"{AT}15: 'answer' together with 'text'", "Remove one"),
    Case("empty text", '{"text": "  "}', f"{AT}2: text: empty", "remove the line."),
    Case("text of a list", '{"text": ["a"]}', f"{AT}2: text: a list", "Put it in quotes."),
    Case("messages of a string", '{"messages": "a"}', f"{AT}2: messages: a string", "expected a list of messages"),
    Case("messages as JSON in a string", '{"messages": "[{}]"}', f"{AT}2: messages: a string", "expected a list"),
    Case("no messages", '{"messages": []}', f"{AT}2: messages: an empty list", "Add a user message."),
    Case("message of a string", '{"messages": ["a"]}', f"{AT}2: messages[0]: a string", "Write it so."),
    Case("message of null", '{"messages": [null]}', f"{AT}2: messages[0]: null", "Write it so."),
    Case("message without a role", '{"messages": [{"content": "a"}]}', f"{AT}2: messages[0]: no 'role'", "Add it."),
    Case("message of ShareGPT", '{"messages": [{"from": "human", "value": "a"}]}', f"{AT}2: messages[0]: no 'role'"),
    Case("role of human", '{"messages": [{"role": "human", "content": "a"}]}', f"{AT}2: messages[0].role: 'human'"),
    Case(
        "typo in a role",
        '{"messages": [{"role": "asistant", "content": "a"}]}',
        f"{AT}2: messages[0].role",
        "'assistant'?",
    ),
    Case("role in capitals", '{"messages": [{"role": "User", "content": "a"}]}', f"{AT}2: messages[0].role", "'user'?"),
    Case(
        "role of developers",
        '{"messages": [{"role": "developer", "content": "a"}]}',
        f"{AT}2: messages[0].role",
        "expected",
    ),
    Case("role of a number", '{"messages": [{"role": 1, "content": "a"}]}', f"{AT}2: messages[0].role: a number"),
    Case("role of null", '{"messages": [{"role": null, "content": "a"}]}', f"{AT}2: messages[0]: no 'role'", "Add it."),
    Case("message without content", '{"messages": [{"role": "user"}]}', f"{AT}2: messages[0]: no 'content'", "Add it."),
    Case(
        "content in parts",
        '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
        f"{AT}2: messages[0].content",
        "Join",
    ),
    Case(
        "content of a number", '{"messages": [{"role": "user", "content": 1}]}', f"{AT}2: messages[0].content: a number"
    ),
    Case("empty content", '{"messages": [{"role": "user", "content": ""}]}', f"{AT}2: messages[0].content: empty"),
    Case(
        "no user message",
        '{"messages": [{"role": "system", "content": "a"}]}',
        f"{AT}2: messages: no user message",
        "Add it.",
    ),
    Case("reply alone", f'{{"messages": [{REPLY}]}}', f"{AT}2: messages: no user message", "Add it."),
    Case(
        "empty reply at the end",
        f'{{"messages": [{USER}, {{"role": "assistant", "content": " "}}]}}',
        f"{AT}2: messages: the last",
        "Write it",
    ),
    Case(
        "tool calls of a user",
        '{"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}',
        f"{AT}2: messages[0].tool_calls",
        "Remove it.",
    ),
    Case(
        "tool calls of a string",
        f'{{"messages": [{USER}, {{"role": "assistant", "tool_calls": "x"}}]}}',
        f"{AT}2: messages[1].tool_calls",
    ),
    Case(
        "tools of an object",
        '{"prompt": "a", "tools": {"name": "look"}}',
        f"{AT}17: tools: an object",
        "one object per tool.",
    ),
    Case("tools of names", '{"prompt": "a", "tools": ["look"]}', f"{AT}17: tools: a list", "one object per tool."),
    Case("tools of a string", '{"prompt": "a", "tools": "look"}', f"{AT}17: tools: a string", "one object per tool."),
    Case("answer of a number", '{"prompt": "a", "answer": 42}', f"{AT}17: answer: a number", "Put it in quotes."),
    Case("empty answer", '{"prompt": "a", "answer": ""}', f"{AT}17: answer: empty", "Write it"),
    Case("reward in quotes", '{"prompt": "a", "reward": "1"}', f"{AT}17: reward: a string", "without quotes."),
    Case("negative reward", '{"prompt": "a", "reward": -1}', f"{AT}17: reward: -1", "Scale it."),
    Case("reward beyond all bounds", '{"prompt": "a", "reward": 1e300}', f"{AT}17: reward: 1e+300", "Scale it."),
    Case("reward of NaN", '{"prompt": "a", "reward": NaN}', f"{AT}27: 'NaN'", "or null."),
    Case("reward of infinity", '{"prompt": "a", "reward": -Infinity}', f"{AT}27: '-Infinity'", "or null."),
    Case("float that overflows", '{"prompt": "a", "reward": 1e999}', f"{AT}27: '1e999'", "Write a smaller number"),
    Case(
        "number of 5000 digits", f'{{"prompt": "a", "reward": {"9" * 5000}}}', f"{AT}27: '999", "Write a smaller number"
    ),
    Case("lone surrogate", '{"prompt": "a\\ud800"}', f"{AT}14: \\ud800 is not a character", "Remove it."),
    Case(
        "surrogates in the wrong order",
        '{"prompt": "\\ude00\\ud83d"}',
        f"{AT}13: \\ude00 is not a character",
        "Remove it.",
    ),
    Case("NUL as an escape", '{"prompt": "\\u0000"}', f"{AT}13: \\u0000 is not a character", "Remove it."),
    Case("NUL", b'{"prompt": "a\0"}', f"{AT}14: a NUL byte", "Save it as UTF-8."),
    Case("Latin-1", b'{"prompt": "caf\xe9"}', f"{AT}16: byte 0xe9 is not UTF-8", "Save it as UTF-8."),
    Case("Windows quotes", b'{"prompt": "\x93a\x94"}', f"{AT}13: byte 0x93 is not UTF-8", "Save it as UTF-8."),
    Case("overlong UTF-8", b'{"prompt": "\xc0\xaf"}', f"{AT}13: byte 0xc0 is not UTF-8", "Save it as UTF-8."),
    Case("surrogate as UTF-8", b'{"prompt": "\xed\xa0\x80"}', f"{AT}13: byte 0xed is not UTF-8", "Save it as UTF-8."),
    Case("character cut short", b'{"prompt": "\xf0\x9f\x98', f"{AT}13: byte 0xf0 is not UTF-8", "Save it as UTF-8."),
    Case("byte order mark in the middle", b'\xef\xbb\xbf{"prompt": "a"}', f"{AT}1: ", "Write one JSON object"),
    Case(
        "deep lists",
        f'{{"prompt": "a", "tools": {"[" * 5000}',
        f"{AT}125: nested more than 100 levels deep",
        "flatter.",
    ),
    Case("deep objects", '{"a":' * 3000, f"{AT}501: nested more than 100 levels deep", "Write it flatter."),
    Case(
        "line of 10 MB",
        b'{"prompt": "' + b"x" * 10_000_001,
        "prompts/cats/train.jsonl:2: longer than 10 MB",
        "Split it",
    ),
    Case("gzip", b"\x1f\x8b\x08\x00", f"{AT}2: byte 0x8b is not UTF-8", "Save it as UTF-8."),
    Case("zip", b"PK\x03\x04\x14\x00", f"{AT}6: a NUL byte", "Save it as UTF-8."),
    Case("parquet", b"PAR1\x15\x04", f"{AT}1: expected value", "Write one JSON object"),
    Case("line of CSV", 'prompt,completion\n"a","b"', f"{AT}1: expected value", "train.jsonl:3:4"),
    Case("ten bad lines", "\n".join(["{}"] * 10), f"{AT}1: no prompt", "and 8 more, at prompts/cats/train.jsonl:4:1,"),
]


@tables(*JSON_LINES)
def test_a_bad_line_of_prompts_is_refused_with_line_and_column(number: int, case: Case, refused, project: Path) -> None:
    raw = case.bad if isinstance(case.bad, bytes) else case.bad.encode()
    Path("prompts/cats/train.txt").unlink()
    Path("prompts/cats/train.jsonl").write_bytes(b"%b\n%b\n%b\n" % (GOOD.encode(), raw, GOOD.encode()))
    check(case, refused(*RUNS[number % len(RUNS)], "-d", "cats"))


@tables(*JSON_LINES[::5])
def test_a_bad_line_of_a_prompts_file_is_refused_with_line_and_column(
    number: int, case: Case, refused, project: Path, adapter: Path
) -> None:
    raw = case.bad if isinstance(case.bad, bytes) else case.bad.encode()
    Path("asked.jsonl").write_bytes(b"%b\n%b\n" % (GOOD.encode(), raw))
    said = refused("generate", "--adapter", str(adapter), "--prompts-file", "asked.jsonl")
    check(case._replace(says=""), said.replace("asked.jsonl", "prompts/cats/train.jsonl"))


def one_prompt() -> None:
    Path("prompts/cats/train.txt").write_text("the cat sat\n")


def no_prompts() -> None:
    Path("prompts/cats/train.txt").write_text("\n \n\t\n")


def empty_file() -> None:
    Path("prompts/cats/train.txt").write_bytes(b"")


def two_train_files() -> None:
    Path("prompts/cats/train.jsonl").write_text(GOOD)


def two_valid_files() -> None:
    for name in ("valid.txt", "valid.jsonl"):
        Path("prompts/cats", name).write_text(GOOD)


def no_train_file() -> None:
    Path("prompts/cats/train.txt").rename("prompts/cats/training.txt")


def other_suffix() -> None:
    Path("prompts/cats/train.txt").rename("prompts/cats/train.json")


def folder_as_file() -> None:
    Path("prompts/cats/train.txt").unlink()
    Path("prompts/cats/train.jsonl").mkdir()


def broken_link() -> None:
    Path("prompts/cats/train.txt").unlink()
    Path("prompts/cats/train.txt").symlink_to("nowhere.txt")


def link_in_a_circle() -> None:
    Path("prompts/cats/train.txt").unlink()
    Path("prompts/cats/train.txt").symlink_to("train.txt")


def domain_outside() -> None:
    shutil.move("prompts/cats", "../cats")
    Path("prompts/cats").symlink_to("../../cats")


def domain_as_file() -> None:
    shutil.rmtree("prompts/cats")
    Path("prompts/cats").touch()


def no_prompts_folder() -> None:
    shutil.rmtree("prompts")


def prompts_as_file() -> None:
    shutil.rmtree("prompts")
    Path("prompts").touch()


def empty_valid() -> None:
    Path("prompts/cats/valid.txt").touch()


def bad_valid() -> None:
    Path("prompts/cats/valid.jsonl").write_text(f"{GOOD}\n{{}}\n")


def empty_system() -> None:
    Path("prompts/cats/system.md").write_text(" \n\n")


def system_of_bytes() -> None:
    Path("prompts/cats/system.md").write_bytes(b"Be brief.\nBe \xff.\n")


def system_with_nul() -> None:
    Path("prompts/cats/system.md").write_bytes(b"Be\0 brief.\n")


def text_in_latin1() -> None:
    Path("prompts/cats/train.txt").write_bytes(b"a\nb\ncaf\xe9\n")


def text_in_utf16() -> None:
    Path("prompts/cats/train.txt").write_bytes("a\nb\n".encode("utf-16"))


def text_with_nul() -> None:
    Path("prompts/cats/train.txt").write_bytes(b"a\nb\0c\n")


def system_folder() -> None:
    Path("prompts/cats/system.md").mkdir()


FOLDERS = [
    Case("one prompt", one_prompt, "prompts/cats: 1 prompt, expected two or more"),
    Case("only blank lines", no_prompts, "prompts/cats/train.txt: no prompts", "Write some"),
    Case("empty file", empty_file, "prompts/cats/train.txt: no prompts", "Write some"),
    Case("train.txt and train.jsonl", two_train_files, "prompts/cats: both train.jsonl and train.txt", "Merge them"),
    Case("valid.txt and valid.jsonl", two_valid_files, "prompts/cats: both valid.jsonl and valid.txt", "Merge them"),
    Case("no train file", no_train_file, "prompts/cats/train.jsonl: no such file, nor train.txt", "Write one prompt"),
    Case("train.json", other_suffix, "prompts/cats/train.jsonl: no such file, nor train.txt", "Write one prompt"),
    Case("folder for a file", folder_as_file, "prompts/cats/train.jsonl: cannot be read", "Check"),
    Case("link to nowhere", broken_link, "prompts/cats/train.txt: cannot be read", "Check"),
    Case("link to itself", link_in_a_circle, "prompts/cats/train.txt: cannot be read", "Check"),
    Case("link out of the prompts", domain_outside, "prompts/cats: leads outside prompts", "Move the prompts there."),
    Case("file for a domain", domain_as_file, "prompts/cats: no such domain", "Create prompts/cats/train.jsonl."),
    Case("no prompts folder", no_prompts_folder, "prompts 'prompts': no such folder", "`true-kd init`"),
    Case("file for the prompts folder", prompts_as_file, "prompts 'prompts': no such folder", "`true-kd init`"),
    Case("empty validation file", empty_valid, "prompts/cats/valid.txt: no prompts", "remove the file."),
    Case("bad validation file", bad_valid, "prompts/cats/valid.jsonl:2:1: no prompt", "Add one of them."),
    Case("empty system message", empty_system, "prompts/cats/system.md: empty", "remove the file."),
    Case("system message not UTF-8", system_of_bytes, "prompts/cats/system.md:2:4: byte 0xff is not UTF-8", "Save it"),
    Case("NUL in the system message", system_with_nul, "prompts/cats/system.md:1:3: a NUL byte", "Save it"),
    Case("folder for the system message", system_folder, "prompts/cats/system.md: cannot be read", "Check"),
    Case("text in Latin-1", text_in_latin1, "prompts/cats/train.txt:3:4: byte 0xe9 is not UTF-8", "Save it as UTF-8."),
    Case("text in UTF-16", text_in_utf16, "prompts/cats/train.txt:1:1: byte 0xff is not UTF-8", "Save it as UTF-8."),
    Case("NUL in the text", text_with_nul, "prompts/cats/train.txt:2:2: a NUL byte", "Save it as UTF-8."),
]


@tables(*FOLDERS)
def test_a_bad_prompts_folder_is_refused(number: int, case: Case, refused, project: Path) -> None:
    case.bad()
    check(case, refused(*RUNS[number % len(RUNS)], "-d", "cats"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_prompts_that_may_not_be_read_are_refused(refused, project: Path) -> None:
    Path("prompts/cats/train.txt").chmod(0)
    before = Path("prompts/cats/train.txt")
    try:
        ended = refused("distill", "-d", "cats")
    finally:
        before.chmod(0o644)
    assert ended.startswith("prompts/cats/train.txt: cannot be read")


# Domain names.

NAMES = {
    "parent": "../x",
    "parent of the root": "../../../../etc",
    "here": ".",
    "above": "..",
    "absolute": "/etc/passwd",
    "below": "cats/dogs",
    "below in Windows": "cats\\dogs",
    "drive": "C:",
    "slash at the end": "cats/",
    "hidden": ".cats",
    "suffix": "cats.yaml",
    "home": "~",
    "root's home": "~root",
    "NUL": "ca\0ts",
    "newline": "cats\ndogs",
    "carriage return": "cats\r",
    "tab": "cats\tdogs",
    "escape": "\x1b[31mcats",
    "bell": "cats\a",
    "delete": "cats\x7f",
    "300 bytes": "x" * 300,
    "65 letters": "x" * 65,
    "empty": "",
    "space": " ",
    "space at the end": "cats ",
    "space within": "my cats",
    "option": "-rf",
    "long option": "--all",
    "underscore first": "_cats",
    "device of Windows": "CON",
    "device with a suffix": "nul.txt",
    "lookalike": "саts",
    "full width": "ｃａｔｓ",
    "accent": "café",
    "combining accent": "cafe\u0301",
    "ligature": "ﬁsh",
    "emoji": "🐈",
    "right to left": "\u202estac",
    "zero-width space": "ca\u200bts",
    "byte order mark": "\ufeffcats",
    "Arabic digit": "٣",
    "surrogate": "ca\udcffts",
    "variable": "$HOME",
    "command": "$(touch pwned)",
    "backticks": "`touch pwned`",
    "semicolon": "cats;touch pwned",
    "pattern": "*",
    "one of many": "c?ts",
    "braces": "{cats}",
    "format": "%s",
    "per cent": "%2e%2e%2fx",
    "address": "https://example.com/cats",
    "embedded": "pocket:prompts",
    "two domains": "cats,dogs",
    "capitals": "CATS",
}
NAMED = (*RUNS, ("evaluate",), ("generate", "hi"), ("compare", "hi"), ("chat",))


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_hostile_domain_name_is_refused_by_every_command(name: str, refused, project: Path) -> None:
    number = list(NAMES.values()).index(name)
    said = refused(*NAMED[number % len(NAMED)], f"--domain={name}")
    assert said.startswith("domain ")
    assert "not a domain name, expected 1 to 64 lower-case letters" in said


@pytest.mark.parametrize("name", ["my cats", "CATS", ".cats", "-rf", "café", "$(touch pwned)", "C:", "cats.yaml"])
def test_a_folder_of_a_hostile_name_among_the_domains_is_refused(name: str, refused, project: Path) -> None:
    Path("prompts", name).mkdir()
    Path("prompts", name, "train.txt").write_text(PROMPTS)
    assert "is not named like a domain" in refused("distill", "--all")


# The command line.

D = ("distill", "-d", "cats")
USAGE = [
    Case("typo in a command", ["distil"], "true-kd: No such command 'distil'", "Did you mean 'distill'?"),
    Case("unknown command", ["train"], "true-kd: No such command 'train'", "See `true-kd --help`"),
    Case("command in capitals", ["DISTILL"], "true-kd: No such command 'DISTILL'"),
    Case("empty command", [""], "true-kd: No such command ''"),
    Case("command of control characters", ["\x1b[2J"], "true-kd: No such command", "See `true-kd --help`"),
    Case("long command", ["x" * 500], "true-kd: No such command 'xxx"),
    Case("option before the command", ["--domain", "cats", "distill"], "true-kd: No such option: --domain"),
    Case("typo in an option", ["distill", "--domian", "cats"], "true-kd: No such option: --domian", "--domain"),
    Case("typo in another option", [*D, "--temprature", "2"], "true-kd: No such option: --temprature", "--temperature"),
    Case(
        "option with underscores",
        [*D, "--learning_rate", "1e-4"],
        "true-kd: No such option: --learning_rate",
        "--learning-rate",
    ),
    Case("option of another command", ["capture", "--iters", "3"], "true-kd: No such option: --iters"),
    Case("unknown short option", [*D, "-q"], "true-kd: No such option: -q"),
    Case("short options in a row", ["distill", "-rf"], "true-kd: No such option: -r"),
    Case("domain without its option", ["distill", "cats"], "true-kd: ", "cats"),
    Case("option without a value", ["distill", "--domain"], "true-kd: Option '--domain' requires an argument"),
    Case("last option without a value", [*D, "--iters"], "true-kd: Option '--iters' requires an argument"),
    Case("value of a switch", [*D, "--fresh=yes"], "true-kd: Option '--fresh' does not take a value"),
    Case("word for a number", [*D, "--iters", "many"], "true-kd: Invalid value for '--iters'"),
    Case("fraction for a number", [*D, "--iters", "1.5"], "true-kd: Invalid value for '--iters'"),
    Case("exponent for a whole number", [*D, "--batch-size", "1e3"], "true-kd: Invalid value for '--batch-size'"),
    Case("empty number", [*D, "--seed", ""], "true-kd: Invalid value for '--seed'"),
    Case("hexadecimal number", [*D, "--rank", "0x10"], "true-kd: Invalid value for '--rank'"),
    Case("number with a comma", [*D, "--temperature", "1,5"], "true-kd: Invalid value for '--temperature'"),
    Case("number with a unit", [*D, "--memory-gb", "16GB"], "true-kd: Invalid value for '--memory-gb'"),
    Case("number with a newline", [*D, "--alpha", "0.5\n0.6"], "true-kd: Invalid value for '--alpha'"),
    Case("number with a NUL", [*D, "--alpha", "0.5\0"], "true-kd: Invalid value for '--alpha'"),
    Case("not a number", [*D, "--temperature", "nan"], "--temperature losses.temperature: nan", "a finite number"),
    Case("infinity", [*D, "--learning-rate", "inf"], "--learning-rate training.learning_rate: inf", "a finite number"),
    Case("temperature too low", [*D, "--temperature", "0.1"], "--temperature losses.temperature: 0.1", "at least 0.5."),
    Case("alpha too high", [*D, "--alpha", "1.1"], "--alpha losses.alpha: 1.1", "at most 1."),
    Case("no steps", [*D, "--iters", "0"], "--iters training.iters: 0", "at least 1."),
    Case("negative rank", [*D, "--rank", "-4"], "--rank lora.rank: -4", "at least 1."),
    Case("number of 30 digits", [*D, "--seed", "9" * 30], "--seed seed: an integer of more than 64 bits", "smaller"),
    Case("budget too small", [*D, "--cache-bytes", "1"], "--cache-bytes targets.bytes_per_token: 1.0", "at least 4"),
    Case("no budget", [*D, "--cache-gb", "0"], "--cache-gb targets.gigabytes: 0.0", "above 0."),
    Case("unknown divergence", [*D, "--divergence", "kl"], "--divergence losses.divergence: 'kl'", "'forward_kl'"),
    Case("unknown control", [*D, "--control", "dpo"], "--control control: 'dpo'", "'none'"),
    Case("unknown strategy", [*D, "--vocab-strategy", "pad"], "--vocab-strategy vocab_strategy: 'pad'", "'match'"),
    Case("empty output folder", [*D, "--out", ""], "--out out: ''", "at least 1 character"),
    Case("empty prompts folder", [*D, "--prompts", ""], "--prompts prompts: ''", "at least 1 character"),
    Case(
        "five bad values",
        [*D, "--alpha", "2", "--iters", "0", "--rank", "0", "--seed", "-1", "--temperature", "0"],
        "--",
        "... and 3 more, at --",
    ),
    Case("domain and all", [*D, "--all"], "--domain and --all: both given", "Leave one out."),
    Case("neither domain nor all", ["distill"], "no domain was named", "(cats)"),
    Case("unknown domain", ["capture", "-d", "cat"], "prompts/cat: no such domain", "did you mean 'cats'?"),
    Case(
        "seven unknown domains",
        ["distill", *(x for n in range(7) for x in ("-d", f"d{n}"))],
        "prompts/d0: no such domain",
        "... and 5 more, at prompts/d2",
    ),
    Case(
        "output folder is a file",
        [*D, "--out", "configs/base.yaml"],
        "--out 'configs/base.yaml': a file is in the way",
        "Choose another name.",
    ),
    Case(
        "output folder below a file",
        [*D, "--out", "configs/base.yaml/x"],
        "--out 'configs/base.yaml/x': a file is in the way",
    ),
    Case("output folder of 300 letters", [*D, "--out", "x" * 300], "out 'xxx", "not a path"),
    Case("output folder with a NUL", [*D, "--out", "a\0b"], "out 'a\\x00b'", "not a path"),
    Case(
        "output folder of nobody", [*D, "--out", "~nobody-of-this-name/x"], "out '~nobody-of-this-name/x'", "not a path"
    ),
    Case("output folder of a lone surrogate", [*D, "--out", "a\udc80"], "--out out: 'a\\udc80'", "UTF-8"),
    Case("no such config", [*D, "--config", "nope.yaml"], "--config 'nope.yaml': no such file", "expected a YAML file"),
    Case("folder as config", [*D, "--config", "configs"], "--config 'configs': a folder", "expected a YAML file"),
    Case("device as config", [*D, "--config", "/dev/null"], "--config '/dev/null': not a file", "expected a YAML file"),
    Case("empty config", [*D, "--config", ""], "--config '.': a folder", "expected a YAML file"),
    Case("config with a NUL", [*D, "--config", "a\0b"], "true-kd: Invalid value for '--config'"),
    Case("no such embedded config", [*D, "--config", "pocket:nope.yaml"], "--config", "expected a YAML file"),
    Case(
        "prompts as config",
        [*D, "--config", "prompts/cats/train.txt"],
        "prompts/cats/train.txt:1:1: text",
        "'key: value'",
    ),
    Case("set without a value", [*D, "--set"], "true-kd: Option '--set' requires an argument"),
    Case("set without an equals sign", [*D, "--set", "lora.rank"], "--set 'lora.rank': expected key.path=value"),
    Case("set of nothing", [*D, "--set", "lora.rank="], "--set 'lora.rank=': no value", "Write null for none."),
    Case("set of no key", [*D, "--set", "=3"], "--set '=3': expected key.path=value"),
    Case("set with a colon", [*D, "--set", "lora.rank: 3"], "--set 'lora.rank: 3': expected key.path=value"),
    Case("set with two dots", [*D, "--set", "lora..rank=3"], "--set 'lora..rank=3': expected key.path=value"),
    Case("set of an unknown key", [*D, "--set", "lora.rnk=3"], "--set lora.rnk: unknown key", "did you mean 'rank'?"),
    Case("set of a key without its group", [*D, "--set", "rank=3"], "--set rank: unknown key", "'lora.rank'?"),
    Case("set below a value", [*D, "--set", "seed.x=3"], "--set seed: a mapping, expected a whole number"),
    Case("set of a group", [*D, "--set", "lora=3"], "--set lora: 3", "expected a mapping of keys"),
    Case("set of a mapping", [*D, "--set", "lora={rank: 3}"], "--set 'lora': '{rank: 3}'", "Set one key at a time."),
    Case("set of a nested list", [*D, "--set", "lora.keys=[[a]]"], "--set 'lora.keys'", "a flat list"),
    Case("set with an open bracket", [*D, "--set", "lora.keys=[a"], "--set 'lora.keys'", "Check"),
    Case("set to no", [*D, "--set", "report=no"], "--set 'report': 'no'", "Write false"),
    Case("set to an octal", [*D, "--set", "seed=010"], "--set 'seed': '010'", "Write 10"),
    Case("set to infinity", [*D, "--set", "training.grad_clip=.inf"], "--set 'training.grad_clip': '.inf'", "finite"),
    Case("set to an alias", [*D, "--set", "out=*x"], "--set 'out': alias '*x'", "Write the value out."),
    Case("set to a tag", [*D, "--set", "out=!!python/name:os.system x"], "--set 'out': tag", "Remove it."),
    Case("set with a comment", [*D, "--set", "out=a # b"], "--set 'out': 'a # b'", "Quote it"),
    Case("set to a control character", [*D, "--set", "out=\x07"], "--set 'out': ", "Remove it."),
    Case("set to two documents", [*D, "--set", "out=a\n---\nb"], "--set 'out': ", "Remove the '---' line."),
    Case("set of a domain in a list", [*D, "--set", "domains=cats"], "--set domains: 'cats'", "Write ['cats']."),
    Case("set of deep brackets", [*D, "--set", f"out={'[' * 1000}"], "--set 'out': nested more than 20", "flatter."),
    Case("demo of a domain", ["demo", "--domain", "cats"], "true-kd: No such option: --domain"),
    Case("demo with a typo", ["demo", "--set", "training.itres=3"], "--set training.itres: unknown key", "'iters'?"),
    Case("demo over a file", ["demo", "--out", "configs/base.yaml"], "--out 'configs/base.yaml': a file is in the way"),
    Case("doctor with an argument", ["doctor", "now"], "true-kd: ", "now"),
    Case("init twice", ["init", "a", "b"], "true-kd: ", "b"),
    Case("init over a file", ["init", "configs/base.yaml"], "configs/base.yaml: a file is in the way", "Choose"),
    Case("init below a file", ["init", "configs/base.yaml/x"], "configs/base.yaml: a file is in the way"),
    Case("init with a NUL", ["init", "a\0b"], "FOLDER 'a\\x00b': not a path"),
    Case("init of nothing", ["init", ""], "FOLDER '': empty", "Write its path."),
    Case("init of 300 letters", ["init", "x" * 300], "FOLDER 'xxx", "not a path"),
    Case("init of nobody", ["init", "~nobody-of-this-name/x"], "FOLDER '~nobody", "not a path"),
    Case("analyze of no prompts", ["analyze", "-d", "cats", "--sample", "0"], "true-kd: Invalid value for '--sample'"),
    Case(
        "analyze with a parent that is not there",
        ["analyze", "-d", "cats", "--parent", "./nowhere"],
        "--parent './nowhere': no such folder",
    ),
    Case("analyze with an empty parent", ["analyze", "-d", "cats", "--parent", ""], "--parent ''", "expected"),
    Case("sweep of nothing", ["sweep", "-d", "cats"], "sweep: nothing to vary", "--temperature 1,2,4"),
    Case("sweep of one value", ["sweep", "-d", "cats", "--alpha", "0.5"], "sweep: nothing to vary"),
    Case(
        "sweep with an empty value",
        ["sweep", "-d", "cats", "--alpha", "0.1,,0.2"],
        "--alpha '0.1,,0.2': an empty value",
        "Write 1,2.",
    ),
    Case("sweep with a comma at the end", ["sweep", "-d", "cats", "--alpha", "0.1,"], "--alpha '0.1,': an empty value"),
    Case("sweep of nothing but commas", ["sweep", "-d", "cats", "--alpha", ","], "--alpha ',': an empty value"),
    Case("sweep of an empty list", ["sweep", "-d", "cats", "--alpha", ""], "--alpha '': an empty value"),
    Case(
        "sweep with spaces between",
        ["sweep", "-d", "cats", "--alpha", "0.1 0.2,0.3"],
        "--alpha losses.alpha: '0.1 0.2'",
        "expected a number",
    ),
    Case("sweep with semicolons", ["sweep", "-d", "cats", "--alpha", "0.1;0.2,0.3"], "--alpha losses.alpha: '0.1;0.2'"),
    Case("sweep with a bad word", ["sweep", "-d", "cats", "--alpha", "0.1,no"], "--alpha: 'no'", "Write false"),
    Case(
        "sweep out of bounds", ["sweep", "-d", "cats", "--alpha", "0.5,1.5"], "--alpha losses.alpha: 1.5", "at most 1."
    ),
    Case(
        "sweep of an unknown divergence",
        ["sweep", "-d", "cats", "--divergence", "forward_kl,kl"],
        "--divergence losses.divergence: 'kl'",
    ),
    Case(
        "sweep of a value twice",
        ["sweep", "-d", "cats", "--rank", "2,2"],
        "sweep: rank=2 comes twice",
        "Leave a value out.",
    ),
    Case(
        "sweep of a key twice",
        ["sweep", "-d", "cats", "--rank", "2,4", "--grid", "lora.rank=1,3"],
        "sweep: lora.rank is swept twice",
        "Merge",
    ),
    Case(
        "sweep of what the teacher says",
        ["sweep", "-d", "cats", "--grid", "capture.seed=1,2"],
        "--grid: capture.seed cannot be swept",
        "Set it with --set.",
    ),
    Case(
        "sweep of an unknown key",
        ["sweep", "-d", "cats", "--grid", "lora.rnk=1,2"],
        "--grid lora.rnk: unknown key",
        "did you mean 'rank'?",
    ),
    Case(
        "sweep of a key without values",
        ["sweep", "-d", "cats", "--grid", "lora.rank"],
        "--grid 'lora.rank'",
        "expected key.path=value",
    ),
    Case(
        "sweep of a thousand points",
        ["sweep", "-d", "cats", "--seed", ",".join(map(str, range(300)))],
        "sweep: 300 points",
        "Give fewer values.",
    ),
    Case(
        "sweep with an unknown control",
        ["sweep", "-d", "cats", "--rank", "1,2", "--control", "dpo"],
        "--control 'dpo': expected sft or none",
        "Choose one.",
    ),
    Case("evaluate of nothing", ["evaluate"], "adapters_kd: expected one of --domain NAME and --all", "none."),
    Case("evaluate of all of nothing", ["evaluate", "--all"], "adapters_kd: expected one of --domain NAME and --all"),
    Case(
        "evaluate of what is not there",
        ["evaluate", "-d", "cats"],
        "adapters_kd/cats: no such folder",
        "Run `true-kd distill",
    ),
    Case("evaluate of domain and all", ["evaluate", "-d", "cats", "--all"], "adapters_kd: expected one of"),
    Case(
        "evaluate over a file",
        ["evaluate", "-d", "cats", "--out", "configs/base.yaml"],
        "configs/base.yaml/cats: ",
        "expected an adapter",
    ),
    Case("report of nothing", ["report"], "adapters_kd: ", "expected"),
    Case("report of a file", ["report", "configs/base.yaml"], "configs/base.yaml", "expected"),
    Case("report of no run", ["report", "prompts"], "prompts: ", "expected"),
    Case("report of a NUL", ["report", "a\0b"], "FOLDER 'a\\x00b': not a path", "Write another."),
    Case("report into a folder", ["report", "--html", "configs"], "--html 'configs': a folder", "Add one to it."),
    Case(
        "report with a page and without",
        ["report", "--html", "x.html", "--no-html"],
        "--html 'x.html': together with --no-html",
        "Leave one",
    ),
    Case("report into a NUL", ["report", "--html", "a\0b"], "true-kd: Invalid value for '--html'"),
    Case("compare of nobody", ["compare", "hi"], "no domain was named", "--adapter PATH."),
    Case(
        "compare of an adapter that is not there",
        ["compare", "hi", "--adapter", "./nowhere"],
        "--adapter './nowhere': no such folder",
        "Check the path.",
    ),
    Case(
        "compare of a file",
        ["compare", "hi", "--adapter", "configs/base.yaml"],
        "--adapter 'configs/base.yaml': not a folder",
    ),
    Case(
        "compare of an empty folder",
        ["compare", "hi", "--adapter", "prompts"],
        "--adapter 'prompts': no adapters.safetensors in it",
    ),
    Case("compare of an adapter with a NUL", ["compare", "hi", "--adapter", "a\0b"], "--adapter 'a\\x00b': not a path"),
    Case(
        "compare of domain and adapter",
        ["compare", "hi", "-d", "cats", "--adapter", "x"],
        "--domain and --adapter: both given",
    ),
    Case(
        "compare with a teacher and without",
        ["compare", "hi", "-d", "cats", "--teacher", "x", "--no-teacher"],
        "--teacher and --no-teacher: both given",
    ),
    Case(
        "generate at a negative temperature",
        ["generate", "hi", "-d", "cats", "--temp", "-1"],
        "--temp sampling_temperature: -1.0",
        "at least 0.",
    ),
    Case(
        "generate at infinity",
        ["generate", "hi", "-d", "cats", "--temp", "inf"],
        "--temp sampling_temperature: inf",
        "finite",
    ),
    Case("generate with top-p 0", ["generate", "hi", "-d", "cats", "--top-p", "0"], "--top-p top_p: 0.0", "above 0."),
    Case(
        "generate of no tokens",
        ["generate", "hi", "-d", "cats", "-m", "0"],
        "--max-tokens max_tokens: 0",
        "at least 1.",
    ),
    Case(
        "generate with a negative seed",
        ["generate", "hi", "-d", "cats", "--seed", "-1"],
        "true-kd: Invalid value for '--seed'",
    ),
    Case(
        "generate with an adapter and an output folder",
        ["generate", "hi", "--adapter", "x", "--out", "y"],
        "--out: given with --adapter",
        "Leave one out.",
    ),
    Case("chat with an argument", ["chat", "hello"], "true-kd: ", "hello"),
    Case("chat of nobody", ["chat"], "no domain was named", "--domain NAME"),
    Case("cache with a typo", ["cache", "list"], "true-kd: No such command 'list'"),
    Case("cache info without a key", ["cache", "info"], "true-kd: Missing argument 'KEY'"),
    Case("cache info of no cache", ["cache", "info", "abc"], "cache 'abc': no such key", "See `true-kd cache ls`."),
    Case("cache info of an empty key", ["cache", "info", ""], "cache '': no such key", "See `true-kd cache ls`."),
    Case("cache info of a path", ["cache", "info", "../../etc"], "cache '../../etc': no such key"),
    Case(
        "cache in a file",
        ["cache", "ls", "--cache", "configs/base.yaml"],
        "configs/base.yaml: a file",
        "Give another --cache.",
    ),
    Case("cache of nowhere", ["cache", "ls", "--cache", ""], "--cache '': empty", "Write its path."),
    Case("cache with a NUL", ["cache", "ls", "--cache", "a\0b"], "--cache 'a\\x00b': not a path"),
    Case("prune of an age without a unit", ["cache", "prune", "--older-than", "30"], "age '30'", "30d"),
    Case("prune of a negative age", ["cache", "prune", "--older-than", "-3d"], "age '-3d'", "30d"),
    Case("prune of an endless age", ["cache", "prune", "--older-than", "9" * 400 + "d"], "age '999", "30d"),
    Case("prune to a size of words", ["cache", "prune", "--keep-size", "big"], "size 'big'", "10GB"),
    Case("prune to no number", ["cache", "prune", "--keep-size", "nanGB"], "size 'nanGB'", "10GB"),
    Case("prune of no cache", ["cache", "prune", "abc", "--yes"], "cache 'abc': no such key"),
    Case("verify of no cache", ["cache", "verify", "abc"], "cache 'abc': no such key"),
    Case("export without a folder", ["cache", "export", "abc"], "true-kd: Missing argument 'DEST'"),
    Case("export of no cache", ["cache", "export", "abc", "there"], "cache 'abc': no such key"),
    Case("import without a folder", ["cache", "import"], "true-kd: Missing argument 'SRC'"),
    Case("import of what is not there", ["cache", "import", "nowhere"], "nowhere", "expected"),
    Case("import of a file", ["cache", "import", "configs/base.yaml"], "configs/base.yaml", "expected"),
    Case("import of an empty name", ["cache", "import", ""], "SRC '': empty", "Write its path."),
    Case("import of a NUL", ["cache", "import", "a\0b"], "SRC 'a\\x00b': not a path"),
]


@tables(*USAGE)
def test_a_wrong_call_is_refused(number: int, case: Case, refused, project: Path) -> None:
    check(case, refused(*case.bad))


ASKED = [
    Case("empty prompt", [""], "prompt: empty", "Write what to ask."),
    Case("prompt of spaces", [" \n "], "prompt: empty", "Write what to ask."),
    Case("NUL in the prompt", ["a\0b"], "prompt", "Remove it."),
    Case("lone surrogate in the prompt", ["a\udcff"], "prompt", "Remove it."),
    Case("prompt and file", ["hi", "--prompts-file", "x.txt"], "--prompts-file: given with a prompt", "Leave one out."),
    Case("file that is not there", ["--prompts-file", "nope.txt"], "nope.txt: cannot be read", "Check"),
    Case("folder as file", ["--prompts-file", "configs"], "--prompts-file 'configs'", "Rename it."),
    Case("folder with a suffix", ["--prompts-file", "folder.txt"], "folder.txt: cannot be read", "Check"),
    Case("file of another suffix", ["--prompts-file", "a.csv"], "--prompts-file 'a.csv'", "Rename it."),
    Case("file with a NUL", ["--prompts-file", "a\0.txt"], "true-kd: Invalid value for '--prompts-file'"),
    Case("empty file", ["--prompts-file", "empty.txt"], "empty.txt: no prompts", "Write some"),
    Case("file of raw text", ["--prompts-file", "raw.jsonl"], "raw.jsonl:1: raw `text`", "expected `prompt`"),
]


@tables(*ASKED)
def test_a_prompt_that_is_none_is_refused(number: int, case: Case, refused, project: Path, adapter: Path) -> None:
    Path("folder.txt").mkdir()
    Path("empty.txt").touch()
    Path("raw.jsonl").write_text('{"text": "hello"}\n')
    check(case, refused("generate", "--adapter", str(adapter), *case.bad))


# Model folders.


class Files(NamedTuple):
    """How a good model folder is spoilt."""

    change: dict[str, Any]
    """Content by name; None removes the file, a dict is laid over its JSON, a function makes it of what is there."""
    remove: tuple[str, ...] = ()
    """Keys removed from config.json."""


def spoil(good: Path, name: str, files: Files) -> Path:
    """A copy of a model folder, spoilt."""
    folder = Path(shutil.copytree(good, name))
    for file, new in files.change.items():
        path = folder / file
        if new is None:
            path.unlink()
        elif isinstance(new, dict):
            path.write_text(json.dumps({**json.loads(path.read_text()), **new}))
        elif callable(new):
            path.write_bytes(new(path.read_bytes()))
        else:
            path.write_bytes(new)
    if files.remove:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in config.items() if key not in files.remove})
        )
    return folder


def header(text: bytes, length: int | None = None) -> bytes:
    """A safetensors file with a header and no data."""
    return struct.pack("<Q", len(text) if length is None else length) + text


def tensor(dtype: str = "F32", shape: Any = (2, 2), span: Any = (0, 16), name: str = "model.norm.weight") -> bytes:
    """A safetensors file of one tensor of 16 bytes."""
    return header(json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": span}}).encode()) + bytes(16)


CONFIG, WEIGHTS, TOKENIZER, TEMPLATE = "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
MODELS = [
    Case("no config.json", Files({CONFIG: None}), "no config.json"),
    Case("empty config.json", Files({CONFIG: b""}), "config.json"),
    Case("config.json cut short", Files({CONFIG: lambda old: old[: len(old) // 2]}), "config.json"),
    Case("config.json of text", Files({CONFIG: b"not json"}), "config.json"),
    Case("config.json of a list", Files({CONFIG: b"[]"}), "config.json"),
    Case("config.json of null", Files({CONFIG: b"null"}), "config.json"),
    Case("config.json of a string", Files({CONFIG: b'"qwen3"'}), "config.json"),
    Case("empty object", Files({CONFIG: b"{}"}), "config.json has no vocab_size"),
    Case("config.json not UTF-8", Files({CONFIG: b'{"model_type": "\xff"}'}), "config.json"),
    Case("config.json in UTF-16", Files({CONFIG: lambda old: old.decode().encode("utf-16")}), "UTF-8"),
    Case("deep config.json", Files({CONFIG: b"[" * 100_000}), "config.json"),
    Case(
        "pointer of Git LFS as config", Files({CONFIG: b"version https://git-lfs.github.com/spec/v1\n"}), "config.json"
    ),
    Case("unknown model_type", Files({CONFIG: {"model_type": "no_such_model"}}), "no_such_model"),
    Case("model_type of a path", Files({CONFIG: {"model_type": "../../evil"}}), "model_type"),
    Case("model_type of a module", Files({CONFIG: {"model_type": "os.path"}}), "Model type os.path not supported"),
    Case("model_type of a number", Files({CONFIG: {"model_type": 7}}), "model_type"),
    Case("no model_type", Files({}, ("model_type",)), "model_type"),
    Case("no vocab_size", Files({}, ("vocab_size",)), "vocab_size"),
    Case("no hidden_size", Files({}, ("hidden_size",)), "hidden_size"),
    Case("no num_hidden_layers", Files({}, ("num_hidden_layers",)), "num_hidden_layers"),
    Case("vocab_size of text", Files({CONFIG: {"vocab_size": "many"}}), "odd vocab_size"),
    Case("negative vocab_size", Files({CONFIG: {"vocab_size": -320}}), "odd vocab_size"),
    Case("absurd vocab_size", Files({CONFIG: {"vocab_size": 10**15}}), "vocab_size"),
    Case("vocab_size of another model", Files({CONFIG: {"vocab_size": 640}}), "Expected shape (640, "),
    Case("hidden_size of text", Files({CONFIG: {"hidden_size": "32"}}), "hidden_size"),
    Case("hidden_size 0", Files({CONFIG: {"hidden_size": 0}}), "division by zero"),
    Case("negative hidden_size", Files({CONFIG: {"hidden_size": -32}}), "cannot load it"),
    Case("hidden_size of another model", Files({CONFIG: {"hidden_size": 64}}), "model.embed_tokens.weight"),
    Case("absurd hidden_size", Files({CONFIG: {"hidden_size": 10**12}}), "hidden_size"),
    Case("no layers", Files({CONFIG: {"num_hidden_layers": 0}}), "model.layers.0"),
    Case("one layer more", Files({CONFIG: {"num_hidden_layers": 3}}), "model.layers.2"),
    Case("a billion layers", Files({CONFIG: {"num_hidden_layers": 10**9}}), "num_hidden_layers"),
    Case("heads 0", Files({CONFIG: {"num_attention_heads": 0}}), "division by zero"),
    Case("eos_token_id of text", Files({CONFIG: {"eos_token_id": "<|end|>"}}), "eos_token_id"),
    Case("quantization of text", Files({CONFIG: {"quantization": "q4"}}), "cannot load it"),
    Case("code in the folder", Files({CONFIG: {"model_file": "evil.py"}, "evil.py": b"open('pwned', 'w')"}), "evil.py"),
    Case("no weights", Files({WEIGHTS: None}), "no model*.safetensors"),
    Case("weights of pickle", Files({WEIGHTS: None, "pytorch_model.bin": b"\x80\x04."}), "no model*.safetensors"),
    Case("weights of GGUF", Files({WEIGHTS: None, "model.gguf": b"GGUF\x03\0\0\0"}), "no model*.safetensors"),
    Case("empty weights", Files({WEIGHTS: b""}), "model.safetensors"),
    Case("seven bytes of weights", Files({WEIGHTS: b"\0" * 7}), "model.safetensors"),
    Case("weights of garbage", Files({WEIGHTS: b"\xff" * 4000}), "model.safetensors"),
    Case("weights of zeros", Files({WEIGHTS: bytes(4000)}), "model.safetensors"),
    Case("weights of a web page", Files({WEIGHTS: b"<html><body>404</body></html>" * 20}), "model.safetensors"),
    Case(
        "pointer of Git LFS as weights",
        Files({WEIGHTS: b"version https://git-lfs.github.com/spec/v1\n"}),
        "model.safetensors",
    ),
    Case("half of the weights", Files({WEIGHTS: lambda old: old[: len(old) // 2]}), "model.safetensors"),
    Case("weights without their last byte", Files({WEIGHTS: lambda old: old[:-1]}), "model.safetensors"),
    Case("weights with a byte more", Files({WEIGHTS: lambda old: old + b"\0"}), "model.safetensors"),
    Case("header cut short", Files({WEIGHTS: lambda old: old[:200]}), "model.safetensors"),
    Case("header that is no JSON", Files({WEIGHTS: header(b"{nonsense}      ")}), "model.safetensors"),
    Case("header of a list", Files({WEIGHTS: header(b"[]      ")}), "model.safetensors"),
    Case("header longer than the file", Files({WEIGHTS: header(b"{}", 10**6)}), "model.safetensors"),
    Case("header of exabytes", Files({WEIGHTS: header(b"{}", 2**63)}), "model.safetensors"),
    Case("no tensors", Files({WEIGHTS: header(b"{}      ")}), "model.embed_tokens.weight"),
    Case("tensor of another name", Files({WEIGHTS: tensor(name="model.nrm.weight")}), "model.nrm.weight"),
    Case("tensor of an unknown type", Files({WEIGHTS: tensor("F13")}), "model.safetensors"),
    Case("tensor of a negative shape", Files({WEIGHTS: tensor(shape=(-2, -2))}), "model.safetensors"),
    Case("tensor larger than its bytes", Files({WEIGHTS: tensor(shape=(20, 2))}), "model.safetensors"),
    Case("tensor beyond the file", Files({WEIGHTS: tensor(shape=(20, 20), span=(0, 1600))}), "model.safetensors"),
    Case("tensor that ends before it begins", Files({WEIGHTS: tensor(span=(16, 0))}), "model.safetensors"),
    Case("no tokenizer", Files({TOKENIZER: None, TEMPLATE: None}), "no tokenizer"),
    Case("empty tokenizer", Files({TOKENIZER: b""}), "tokenizer"),
    Case("tokenizer of an empty object", Files({TOKENIZER: b"{}"}), "tokenizer"),
    Case("tokenizer of a list", Files({TOKENIZER: b"[]"}), "tokenizer"),
    Case("tokenizer of garbage", Files({TOKENIZER: b"\xff\0" * 90}), "tokenizer"),
    Case("tokenizer cut short", Files({TOKENIZER: lambda old: old[: len(old) // 2]}), "tokenizer"),
    Case("tokenizer of an unknown kind", Files({TOKENIZER: {"model": {"type": "Nope"}}}), "tokenizer"),
    Case("tokenizer_config.json cut short", Files({TEMPLATE: b"{"}), "tokenizer"),
    Case("tokenizer_config.json of a list", Files({TEMPLATE: b"[]"}), "tokenizer"),
    Case("template with a syntax error", Files({TEMPLATE: {"chat_template": "{% for m in messages %}"}}), "template"),
    Case("template with a stray brace", Files({TEMPLATE: {"chat_template": "{{ messages[0]"}}), "template"),
    Case("template of an unknown filter", Files({TEMPLATE: {"chat_template": "{{ messages | nope }}"}}), "template"),
    Case("template of an unknown tag", Files({TEMPLATE: {"chat_template": "{% nope %}"}}), "template"),
    Case("template that refuses", Files({TEMPLATE: {"chat_template": "{{ raise_exception('no!') }}"}}), "template"),
    Case("template that divides by zero", Files({TEMPLATE: {"chat_template": "{{ 1 // 0 }}"}}), "template"),
    Case("template that reads what is not there", Files({TEMPLATE: {"chat_template": "{{ a.b.c }}"}}), "template"),
    Case("template of a number", Files({TEMPLATE: {"chat_template": 7}}), "template"),
]


@tables(*MODELS)
def test_a_broken_model_folder_is_refused_before_anything_is_made(
    number: int, case: Case, refused, project: Path, teacher_folder: Path, student_folder: Path
) -> None:
    seam = ("teacher", "student")[number % 2]
    spoil({"teacher": teacher_folder, "student": student_folder}[seam], "broken", case.bad)
    said = refused("distill", "-d", "cats", f"--{seam}", "./broken")
    assert said.startswith((f"{seam} './broken': ", "prompts/cats/train.txt:1: the chat template of ./broken"))
    assert case.place in said


NO_MODELS = [
    Case("not there", "./nowhere", "no such folder", "Check the path."),
    Case("absolute and not there", "/nowhere/at/all", "no such folder", "Check the path."),
    Case("file", "configs/base.yaml", "no such folder", "Check the path."),
    Case("empty folder", "empty", "no config.json in this folder", "expected an mlx-lm model"),
    Case("folder of prompts", "prompts", "no config.json in this folder", "expected an mlx-lm model"),
    Case("one word", "qwen", "no such folder", "hub id like"),
    Case("three parts", "a/b/c", "no such folder", "hub id like"),
    Case("address", "https://huggingface.co/a/b", "no such folder", "hub id like"),
    Case("hub id with a space", "no body/no thing", "the hub refused it", "Check the id"),
    Case("hub id with two dots", "a..b/c", "the hub refused it", "Check the id"),
    Case("hub id too long", f"a/{'b' * 200}", "the hub refused it", "Check the id"),
    Case("hub id of control characters", "a/\x1b[31m", "the hub refused it", "Check the id"),
    Case("hub id never downloaded", "nobody/nothing", "not in the local hub cache", "Go online once"),
    Case("no such embedded model", "pocket:nope", "no such folder", "Check the path."),
    Case("embedded model above", "pocket:../../x", "no such folder", "Check the path."),
    Case("home of nobody", "~nobody-of-this-name/m", "not a path", "Write another."),
    Case("name of 5000 letters", "x" * 5000, "not a path", "Write another."),
    Case("newline", "a\nb", "no such folder", "Check the path."),
]


@pytest.mark.parametrize("seam", ["teacher", "student"])
@tables(*NO_MODELS)
def test_a_model_that_is_not_there_is_refused(number: int, case: Case, seam: str, refused, project: Path) -> None:
    Path("empty").mkdir()
    runs = (("distill",), ("analyze",)) if seam == "student" else RUNS
    check(case._replace(place=f"{seam} "), refused(*runs[number % len(runs)], "-d", "cats", f"--{seam}", case.bad))


def test_a_teacher_of_an_unknown_cache_is_refused(refused, project: Path) -> None:
    for key in ("abc", "", "../x", "0" * 16):
        assert "no such key" in refused("distill", "-d", "cats", "--teacher", f"cache:{key}")


@pytest.mark.parametrize("seam", ["teacher", "student"])
def test_an_adapter_folder_is_no_model(seam: str, refused, project: Path, adapter: Path) -> None:
    said = refused("distill", "-d", "cats", f"--{seam}", str(adapter))
    assert said.startswith(f"{seam} '{adapter}': no config.json in this folder")


ADAPTERS = [
    Case("not there", ["--set", "teacher.adapter=./nowhere"], "teacher.adapter 'nowhere': cannot be read", "Check"),
    Case("file", ["--set", "teacher.adapter=configs/base.yaml"], "teacher.adapter 'configs/base.yaml': cannot be read"),
    Case("folder of prompts", ["--set", "teacher.adapter=prompts"], "teacher.adapter 'prompts': cannot be read"),
    Case("student's", ["--set", "student.adapter=x"], "student.adapter: given", "Fuse the old one"),
    Case("of a teacher in a cache", ["--teacher", "cache:0", "--set", "teacher.adapter=x"], "cache '0': no such key"),
]


@tables(*ADAPTERS)
def test_a_teachers_adapter_that_is_none_is_refused(number: int, case: Case, refused, project: Path) -> None:
    check(case, refused("distill", "-d", "cats", *case.bad))


def test_models_of_other_vocabularies_are_refused(refused, project: Path, teacher_folder: Path) -> None:
    files = Files({TOKENIZER: lambda old: old.replace(b'"Z": ', b'"ZZ": ').replace(b'"Q": ', b'"QQ": ')})
    spoil(teacher_folder, "other", files)
    said = refused("distill", "-d", "cats", "--teacher", "./other", "--vocab-strategy", "match")
    assert "common ids stand for different tokens" in said


# Properties: data or an error, whatever the input.

SOON = 4.0
"""Seconds of a core that any of the readers may take for one input: some four times what the slowest takes here."""
LOOSE = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def examples(number: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Settings of a property with so many examples, times `CHAOS`."""
    return settings(max_examples=number * CHAOS, **LOOSE)


def loads_or_refuses(load: Callable[[], Any], kind: type[InputError], place: str) -> Any:
    """What `load` returns; None where it refuses as it may: soon, in lines that begin with the place."""
    loaded, refusal = None, None
    started = time.process_time()
    try:
        loaded = load()
    except kind as error:
        refusal = error
    assert time.process_time() - started < SOON
    if refusal is not None:
        lines = getattr(refusal, "lines", ()) or str(refusal).splitlines()
        assert [line for line in lines if not line.startswith(place) or "\n" in line] == []
        assert len(str(refusal).splitlines()) <= MOST_LINES
        assert len(str(refusal)) < 6000
    return loaded


def keys_of(options: BaseModel, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key of a config with its default, groups included."""
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        yield (*before, name), value
        if isinstance(value, BaseModel):
            yield from keys_of(value, (*before, name))
        else:
            # The words of a choice are right values too.
            yield from (((*before, name), word) for word in get_args(field.annotation) if isinstance(word, str))


KEYS = [(path, value) for path, value in keys_of(RunConfig()) if not isinstance(value, BaseModel)]
PATHS = sorted({path for path, _ in keys_of(RunConfig())})

wrong_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["", "auto", "null", "1", "1e-4", "cats", "a/b", "~", "../x", "\x00", "\ud800", "é", "no"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
settings_of_keys = st.lists(
    st.sampled_from(KEYS).map(lambda pair: (pair[0], plain_value(pair[1])))
    | st.tuples(st.sampled_from(PATHS), wrong_values)
    | st.tuples(
        st.lists(st.sampled_from(["lora", "model", "rank", "x", "sed"]), min_size=1, max_size=3).map(tuple),
        wrong_values,
    ),
    max_size=8,
)


def plain_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def as_tree(pairs: list[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    """Nested dicts of the pairs; a later one goes over an earlier one."""
    tree: dict[str, Any] = {}
    for path, value in pairs:
        below = tree
        for key in path[:-1]:
            if not isinstance(below.get(key), dict):
                below[key] = {}
            below = below[key]
        below[path[-1]] = value
    return tree


@examples(150)
@given(pairs=settings_of_keys)
def test_any_values_under_any_keys_are_a_config_or_faults_with_their_line(tmp_path: Path, pairs: list) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(json.dumps(as_tree(pairs), indent=1))
    config = loads_or_refuses(lambda: load_config(path, None, []), ConfigError, f"{path}:")
    if config is not None:
        path.write_text(json.dumps(config.model_dump(mode="json")))
        assert load_config(path, None, []) == config


@examples(60)
@given(pairs=settings_of_keys, word=st.sampled_from(["--set", "--alpha"]))
def test_any_overrides_are_a_config_or_faults_with_their_flag(tmp_path: Path, pairs: list, word: str) -> None:
    path = tmp_path / "base.yaml"
    path.touch()
    given_values = [Override(word, key, value) for key, value in pairs]
    loads_or_refuses(lambda: load_config(path, None, given_values), ConfigError, word)


SNIPPETS = [
    *(b": ", b"\n", b"\n  ", b"\t", b"- ", b"? ", b"[", b"]", b"{", b"}", b",", b"'", b'"', b"#", b"|", b">", b"---\n"),
    *(
        b"&a ",
        b"*a",
        b"<<: ",
        b"!!python/name:os ",
        b"%YAML 9.9\n",
        b"\\",
        b'"\\ud800"',
        b'"\\U00110000"',
        b"\0",
        b"\xff",
    ),
    *(
        b"\xef\xbb\xbf",
        b"\xc2\x85",
        b"\xe2\x80\xa8",
        b"no",
        b"010",
        b"1e999",
        b".nan",
        b"9" * 400,
        b"0x",
        b"12:30",
        b"null",
    ),
    *(b"[" * 200, b"{a: " * 60, b"seed: 1\n", b"losses:\n", b'{"prompt": "a"}', b'"role": "user",', b"\\u0000", b"-0"),
]
places = st.integers(0, 5000)
mutations = st.lists(
    st.tuples(st.just("insert"), places, st.sampled_from(SNIPPETS))
    | st.tuples(st.just("flip"), places, st.integers(1, 255))
    | st.tuples(st.just("drop"), places, st.integers(1, 40))
    | st.tuples(st.just("repeat"), places, st.integers(1, 60))
    | st.tuples(st.just("cut"), places, st.none()),
    min_size=1,
    max_size=4,
)


def mutate(raw: bytes, changes: list[tuple[str, int, Any]]) -> bytes:
    """The bytes after each change in turn, its place taken modulo their number."""
    for kind, place, what in changes:
        at = place % (len(raw) + 1)
        match kind:
            case "insert":
                raw = raw[:at] + what + raw[at:]
            case "flip" if raw:
                at %= len(raw)
                raw = raw[:at] + bytes([raw[at] ^ what]) + raw[at + 1 :]
            case "drop":
                raw = raw[:at] + raw[at + what :]
            case "repeat":
                raw = raw[:at] + 2 * raw[at : at + what] + raw[at + what :]
            case "cut":
                raw = raw[:at]
    return raw


CONFIGS = [path.read_bytes() for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))]
CONFIGS.append(json.dumps(RunConfig().model_dump(mode="json"), indent=2).encode())


@examples(250)
@given(raw=st.sampled_from(CONFIGS), changes=mutations)
def test_a_mutated_config_is_a_config_or_faults_with_their_line(tmp_path: Path, raw: bytes, changes: list) -> None:
    path = tmp_path / "base.yaml"
    path.write_bytes(mutate(raw, changes))
    config = loads_or_refuses(lambda: load_config(path, None, []), ConfigError, f"{path}:")
    assert config is None or isinstance(config, RunConfig)


RECORDS = [
    b'{"prompt": "the cat sat", "completion": "on the mat", "answer": "mat", "reward": 0.5}\n' * 2,
    f'{{"messages": [{USER}, {REPLY}], "tools": [{{"type": "function", "function": {{"name": "look"}}}}]}}\n'.encode(),
    '{"text": "Zoë said \\"miaow\\" \\ud83d\\ude00 🐈"}\n{"prompt": "x", "tools": null}\n'.encode(),
    f'{{"prompt": [{USER}], "completion": "b"}}\r\n\r\n{{"prompt": "c", "reward": 1e3}}\r\n'.encode(),
]


@examples(250)
@given(raw=st.sampled_from(RECORDS), changes=mutations, suffix=st.sampled_from([".jsonl", ".jsonl", ".jsonl", ".txt"]))
def test_mutated_data_are_prompts_or_faults_with_their_line(
    tmp_path: Path, raw: bytes, changes: list, suffix: str
) -> None:
    folder = tmp_path / "prompts" / "cats"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder / f"train{suffix}"
    path.write_bytes(mutate(raw, changes))
    prompts = loads_or_refuses(lambda: load_prompts(folder.parent, "cats", "train"), PromptError, f"{path}:")
    for prompt in prompts or ():
        assert (prompt.messages is None) != (prompt.text is None)
        prompt.identity().encode("utf-8")


@examples(200)
@given(line=st.sampled_from(RECORDS), changes=mutations)
def test_a_mutated_line_is_an_object_or_a_refusal_with_a_column_on_it(line: bytes, changes: list) -> None:
    text = mutate(line.splitlines()[0], changes).decode("utf-8", "replace")
    refusal = None
    try:
        parsed = parse_line(text)
    except Refusal as error:
        refusal = error
    if refusal is None:
        assert isinstance(parsed, dict)
    else:
        assert refusal.column is None or 1 <= refusal.column <= len(text) + 1
        assert refusal.message.endswith(".")


@examples(200)
@given(name=st.text(max_size=70) | st.text("abcxyz09-_./\\~ \0\n", max_size=12))
def test_any_domain_name_is_that_of_a_folder_right_below_or_refused(tmp_path: Path, name: str) -> None:
    refusal = None
    try:
        check_domain_name(name)
    except PromptError as error:
        refusal = error
    if refusal is not None:
        assert str(refusal).isprintable()
        return
    assert (tmp_path / name).parent == tmp_path
    assert os.path.normpath(tmp_path / name) == str(tmp_path / name)
    assert name.lower() == name


WORDS = [
    *("distill", "capture", "analyze", "sweep", "evaluate", "report", "compare", "generate", "chat", "cache", "cats"),
    *("ls", "info", "verify", "prune", "export", "import", "-d", "--domain", "--all", "--config", "--set", "--out"),
    *("--teacher", "--student", "--alpha", "--iters", "--json", "--adapter", "--html", "--cache", "--fresh", "--yes"),
    *(
        "--",
        "-",
        "-x",
        "",
        " ",
        "0.5",
        "1,2",
        "nan",
        "-1",
        "lora.rank=8",
        "lora.rnk=8",
        "=",
        "a/b",
        "..",
        "/",
        "~",
        "*",
    ),
    *("a\0b", "\udcff", "é", "\x1b[0m", "9" * 30, "cache:0", "pocket:x", "x.yaml", "--help-me", "nowhere", "2w", "1GB"),
]


@examples(100)
@given(words=st.lists(st.sampled_from(WORDS), max_size=7))
def test_any_words_in_an_empty_folder_end_well_and_make_nothing(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = cli(*words)
    assert ended.code in (0, 2), ended
    assert len(ended.err.splitlines()) <= MOST_LINES, ended
    assert not PYTHON.search(ended.err), ended
    assert (ended.code == 2) == bool(ended.err), ended
    assert snapshot(tmp_path) == {}


# Bounds.

MEGABYTE = 1_000_000
PAGE = 99_000
LONG_CONFIGS = {
    "keys": b"".join(b"k%d: 1\n" % number for number in range(8_000)),
    "one key many times": b"seed: 1\n" * (PAGE // 8),
    "bad words": b"a: no\n" * (PAGE // 6),
    "aliases": BOMB.encode() + b"z: [" + b"*i, " * (PAGE // 4 - 200) + b"]\n",
    "anchors": b"- &a b\n" * (PAGE // 7),
    "tags": b"- !!python/name:os x\n" * (PAGE // 21),
    "brackets": b"[" * PAGE,
    "dashes": b"- " * (PAGE // 2),
    "one word": b"a: " + b"x" * PAGE,
    "one key": b"x" * PAGE + b": a",
    "backslashes": b'a: "' + b"\\\\" * (PAGE // 2) + b'"',
    "spaces": b" " * PAGE,
    "newlines": b"\n" * PAGE,
    "tokens": b"a: " + b"token=" * (PAGE // 6),
}


@pytest.mark.parametrize("raw", LONG_CONFIGS.values(), ids=LONG_CONFIGS)
def test_the_longest_config_of_anything_is_answered_soon(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_bytes(raw)
    loads_or_refuses(lambda: load_config(path, None, []), ConfigError, f"{path}:")


LONG_LINES = {
    "brackets": b"[" * MEGABYTE,
    "objects": b'{"a":' * (MEGABYTE // 5),
    "keys": b"{" + b"".join(b'"k%d": 1, ' % number for number in range(80_000)) + b'"prompt": "a"}',
    "one key many times": b"{" + b'"prompt": "a", ' * (MEGABYTE // 15) + b'"prompt": "a"}',
    "quotes": b'"' * MEGABYTE,
    "backslashes": b'{"prompt": "' + b"\\" * MEGABYTE,
    "surrogates": b'{"prompt": "' + b"\\ud800" * (MEGABYTE // 6) + b'"}',
    "digits": b'{"prompt": ' + b"9" * MEGABYTE + b"}",
    "minus signs": b"-" * MEGABYTE,
    "messages": b'{"messages": [' + b'{"role": "user", "content": "a"}, ' * (MEGABYTE // 34) + b"1]}",
    "lines": b"{}\n" * (MEGABYTE // 3),
    "bytes that are no text": b"\xff\n" * (MEGABYTE // 2),
    "tokens": b'{"' + b"token=" * (MEGABYTE // 6) + b'": 1}',
}


@pytest.mark.parametrize("raw", LONG_LINES.values(), ids=LONG_LINES)
def test_a_megabyte_of_anything_as_data_is_answered_soon(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cats" / "train.jsonl"
    path.parent.mkdir()
    path.write_bytes(raw)
    loads_or_refuses(lambda: load_prompts(tmp_path, "cats", "train"), PromptError, f"{path}:")


@pytest.mark.parametrize("name", ["aliases", "bad words"])
def test_the_memory_of_a_config_is_bounded_by_its_size(name: str, tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_bytes(LONG_CONFIGS[name])
    assert peak_of(lambda: load_config(path, None, [])) < 30e6


@pytest.mark.parametrize("name", ["brackets", "keys", "surrogates", "lines", "bytes that are no text"])
def test_the_memory_of_data_is_bounded_by_its_size(name: str, tmp_path: Path) -> None:
    path = tmp_path / "cats" / "train.jsonl"
    path.parent.mkdir()
    path.write_bytes(LONG_LINES[name])
    assert peak_of(lambda: load_prompts(tmp_path, "cats", "train")) < 30e6


def peak_of(load: Callable[[], Any]) -> int:
    """The most bytes that Python's objects take while an input is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            load()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
