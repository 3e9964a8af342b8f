"""docs/examples.md holds: its blocks run as they stand, in their order; and a notebook finds what it says there."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from true_kd import KDConfig, KDResult, TrueKnowledgeDistiller

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "true_kd" / "docs" / "examples.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n", 1)[0]: part for part in PAGE.split("\n## ")[1:]}
TRAINS = ("distill", "sweep", "evaluate")


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[section], flags=re.DOTALL)


def commands(section: str) -> list[list[str]]:
    lines = "\n".join(blocks(section, "shell")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's reader is: an empty folder, but for the checkout's `true_kd`, and the files the page writes."""
    place = tmp_path_factory.mktemp("examples")
    (place / "true_kd").symlink_to(ROOT / "true_kd")
    return place


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples build on each other: one folder, and one cache."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TRUE_KD_CACHE", str(folder / "cache"))


def follow(section: str, cli: Callable[..., Any]) -> list[str]:
    """Write a section's files and run its commands; returns what each said."""
    for name, text in re.findall(r"\nFile `([^`]+)`[^\n]*:\n\n```\w+\n(.*?)```", SECTIONS[section], flags=re.DOTALL):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    said = []
    for words in commands(section):
        if words[0] == "true-kd":
            # The two ways in which the page says that this differs from its reader.
            ended = cli(*words[1:], *(("--set", "isolate=false") if words[1] in TRAINS else ()))
            assert ended.code == 0, ended.err
            said.append(ended.out)
            continue
        assert words[0] == "mlx_lm.generate"
        line = [sys.executable, "-m", "mlx_lm", "generate", *words[1:]]
        ran = subprocess.run(line, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        said.append(ran.stdout)
    return said


def test_the_page_has_the_five_examples_and_the_notebook() -> None:
    assert [name[:2] for name in SECTIONS] == ["1.", "2.", "3.", "4.", "5.", "In"]


@pytest.mark.slow
def test_one_domain(folder: Path, cli: Callable[..., Any]) -> None:
    planned, _, measured, table = follow("1. One domain", cli)
    assert "task" in planned
    assert json.loads(measured)["domains"]["task"]["verdict"]["sentence"].startswith("task:")
    assert "task" in table
    assert (folder / "adapters_kd/pocket/task/adapters.safetensors").is_file()
    assert (folder / "adapters_kd/pocket/report.html").is_file()


@pytest.mark.slow
def test_a_domain_of_your_own_and_all_domains_and_a_sweep(folder: Path, cli: Callable[..., Any]) -> None:
    [said] = follow("2. A domain of your own", cli)
    assert "chores" in said
    first = folder / "adapters_kd/chores/adapters.safetensors"
    made = first.stat().st_mtime_ns
    both = follow("3. All domains", cli)
    assert "bugs" in both[1]
    assert first.stat().st_mtime_ns == made, "a finished domain is not done again"
    assert (folder / "adapters_kd/bugs/adapters.safetensors").is_file()
    [swept] = follow("4. A sweep", cli)
    assert "chores: take temperature=" in " ".join(swept.split())
    assert len(list((folder / "adapters_kd/sweep").glob("temperature=*/chores/adapters.safetensors"))) == 4
    assert (folder / "adapters_kd/sweep/sweep.json").is_file()


@pytest.mark.slow
def test_an_adapter_in_use(folder: Path, cli: Callable[..., Any]) -> None:
    if not (folder / "adapters_kd/pocket/task").is_dir():
        follow("1. One domain", cli)
    compared, generated, by_mlx = follow("5. Use an adapter", cli)
    assert compared
    names: dict[str, Any] = {}
    [source] = blocks("5. Use an adapter", "python")
    exec(source, names)
    # One adapter, three ways: the same most likely words.
    assert names["reply"].split() == generated.split()
    assert " ".join(names["reply"].split()) in " ".join(by_mlx.split())


# In a notebook


def run_cell() -> tuple[KDResult, TrueKnowledgeDistiller]:
    """Run the page's cell."""
    names: dict[str, Any] = {}
    [source] = blocks("In a notebook", "python")
    exec(source, names)
    return names["result"], names["distiller"]


@pytest.fixture
def untouched() -> Iterator[None]:
    """Signals are heard as in a notebook, not as the command line has it; and so they are at the end."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    outside = [signal.getsignal(number) for number in numbers], sys.unraisablehook
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = sys.__unraisablehook__
    before = [signal.getsignal(number) for number in numbers], sys.unraisablehook
    yield
    assert ([signal.getsignal(number) for number in numbers], sys.unraisablehook) == before
    signal.signal(signal.SIGINT, outside[0][0])
    sys.unraisablehook = outside[1]


def test_a_cell_is_quiet_and_its_result_is_short(
    untouched: None, capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    result, distiller = run_cell()
    assert capfd.readouterr() == ("", "")
    assert "\n" not in repr(result)
    assert len(repr(result)) < 200
    assert repr(result).startswith("KDResult(domain='greetings', kl=")
    assert len(repr(distiller)) < 200
    assert "'pocket:teacher', 'pocket:student'" in repr(distiller)
    shown = result._repr_markdown_()
    assert result.proof.verdict.sentence in shown
    for before, after in ((result.before.kl, result.after.kl), (result.before.ce, result.after.ce)):
        assert f"| {before:.4f} | {after:.4f} |" in shown
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {4}


def test_a_cell_works_in_a_running_loop_and_in_a_thread(untouched: None) -> None:
    async def cell() -> str:
        return run_cell()[0].domain

    async def beside() -> tuple[str, int]:
        ticks = 0
        work = asyncio.ensure_future(asyncio.to_thread(lambda: again("threaded").domain))
        while not work.done():
            await asyncio.sleep(0)
            ticks += 1
        return await work, ticks

    assert asyncio.run(cell()) == "greetings"
    name, ticks = asyncio.run(beside())
    assert name == "threaded"
    assert ticks > 1, "the loop goes on meanwhile"


PROMPTS = ["Say hello.", "Say good night.", "Say thank you."] * 4


def again(domain: str, **values: Any) -> KDResult:
    usual = {"training": {"iters": 4}, "rank": 2, "out": "adapters_kd/notebook", "isolate": False, "report": False}
    config = KDConfig(**{**usual, **values})
    return TrueKnowledgeDistiller("pocket:teacher", "pocket:student", config).distill_domain(domain, PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("isolate", [False, True])
def test_an_interrupt_leaves_a_usable_state_and_the_same_cell_goes_on(
    isolate: bool, untouched: None, folder: Path
) -> None:
    domain = f"stopped_{isolate}".lower()
    training = {"iters": 60, "checkpoint_every": 5, "validate_every": 60}
    settings = {"training": training, "isolate": isolate}
    place = folder / "adapters_kd/notebook" / domain
    over = threading.Event()

    def press_stop() -> None:
        while not over.is_set() and not list(place.glob("checkpoint_*")):
            time.sleep(0.01)
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    button = threading.Thread(target=press_stop)
    button.start()
    # As a notebook keeps it: with its traceback, and the frames of what was broken off.
    kept: BaseException | None = None
    try:
        again(domain, **settings)
    except KeyboardInterrupt as interrupt:
        kept = interrupt
    finally:
        over.set()
        button.join()
    assert kept is not None
    reached = max(int(path.name.partition("_")[2]) for path in place.glob("checkpoint_*"))
    assert reached < 60
    # The locks are free, and the cell goes on where it was.
    assert len(again(domain, **settings).steps) == 60
