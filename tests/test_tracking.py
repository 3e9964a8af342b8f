"""Experiment trackers: what they are told, and that nothing they do ends a run.

tensorboard's writer is in the test extra. The other packages run for real where they are installed, offline.
"""

from __future__ import annotations

import importlib
import json
import os
import sqlite3
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from test_pipeline import Place

from true_kd import KDConfig, TrueKnowledgeDistiller, events
from true_kd.config import RunConfig, load_config
from true_kd.reporting import KDResult
from true_kd.tracking import TRACKERS, MissingTracker, Trackers, check_installed
from true_kd.tracking.runs import _model_name, proof_metrics, settings_of, step_metrics, validation_metrics

SECRETS = ("hf_abcdefghijklmnopqrstuv", "swordfish", "jane.doe", "say hello to", "who said hello")
"""What is planted in paths, addresses, prompts and replies, and may reach no tracker."""


@pytest.fixture(scope="module")
def seen(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> tuple[Place, list[events.Event]]:
    """The events of a run with a control, whose paths and prompts hold what nobody is to see."""
    root = tmp_path_factory.mktemp("jane.doe")
    place = Place(root, root / "swordfish" / "teacher", student_folder, control="sft")
    (root / "swordfish").mkdir()
    (root / "swordfish" / "teacher").symlink_to(teacher_folder)
    place.config["training"] |= {"iters": 3}
    place.write("a")
    return place, list(place.start("a"))


class Noted:
    """A tracker in a list."""

    def __init__(self) -> None:
        self.runs: list[Any] = []
        self.logged: list[tuple[int, Mapping[str, float]]] = []
        self.finished: list[tuple[Mapping[str, Any], bool]] = []

    def start(self, run: Any) -> Noted:
        self.runs.append(run)
        return self

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.logged.append((step, metrics))

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None:
        self.finished.append((summary, failed))


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    """Stands for trackio: a package of somebody else's."""
    told = Noted()
    monkeypatch.setattr("true_kd.tracking.reporting.TRACKERS", {**TRACKERS, "trackio": ("json", told.start)})
    return told


def replay(seen: tuple[Place, list[events.Event]], *names: str, root: Path | None = None) -> list[str]:
    """Tell trackers of a run; what they warn of."""
    place, happened = seen
    with Trackers(names, root or place.out) as trackers:
        return [line for event in happened for line in trackers.note(event)]


# What they are told


def test_the_config_names_the_trackers_that_there_are() -> None:
    [kind, _] = get_args(RunConfig.model_fields["report_to"].annotation)
    assert set(get_args(kind)) == set(TRACKERS)


def test_a_domain_is_one_run_with_all_its_numbers(seen: tuple[Place, list[events.Event]], noted: Noted) -> None:
    assert replay(seen, "trackio") == []
    [run] = noted.runs
    steps = {kind: [each for each in seen[1] if isinstance(each, kind)] for kind in (events.Stepped, events.Validated)}
    own = [event for event in steps[events.Stepped] if event.domain == "a"]
    assert (run.name, run.made, len(own)) == ("a", 0, 3)
    expected = [(event.step.iteration, step_metrics(event.step)) for event in own]
    assert [each for each in noted.logged if "train/loss" in each[1]] == expected
    control = [step for step, metrics in noted.logged if "control/train/loss" in metrics]
    assert control == [1, 2, 3]
    validated = [event for event in steps[events.Validated] if event.domain == "a"]
    assert [each for each in noted.logged if "valid/kl" in each[1]] == [
        (event.validation.iteration, validation_metrics(event.validation)) for event in validated
    ]
    [(summary, failed)] = noted.finished
    result = seen[1][-1].results[0]
    assert (summary, failed) == (proof_metrics(result.proof), False)
    assert summary["proof/adapted_kl"] == result.proof.adapted.kl.value
    assert summary["proof/outcome"] == result.proof.verdict.outcome


def test_a_run_that_goes_on_has_the_same_id_and_another_one_has_not(place_of_one: Place, noted: Noted) -> None:
    def start(**changes: Any) -> Iterator[events.Event]:
        with Trackers(["trackio"], place_of_one.out) as trackers:
            for event in place_of_one.start("a", **changes):
                trackers.note(event)
                yield event

    for event in start():
        if isinstance(event, events.Stepped) and event.step.iteration == 3:
            break
    assert noted.finished == [({}, True)], "a run that is broken off is no finished one"
    list(start())
    list(start(seed=1))
    first, second, other = noted.runs
    assert (first.made, second.made, other.made) == (0, 2, 0)
    assert first.id == second.id != other.id


@pytest.fixture
def place_of_one(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Place:
    place = Place(tmp_path, teacher_folder, student_folder)
    place.config["training"] |= {"iters": 4}
    place.write("a")
    return place


def test_a_domain_that_fails_is_a_failed_run(seen: tuple[Place, list[events.Event]], noted: Noted) -> None:
    place, happened = seen
    upto = next(at for at, event in enumerate(happened) if isinstance(event, events.Stepped))
    failed = events.DomainFailed("a", RuntimeError("hf_abcdefghijklmnopqrstuv"))
    assert replay((place, [*happened[: upto + 1], failed]), "trackio") == []
    assert noted.finished == [({}, True)]


def test_what_is_finished_already_is_not_told_again(seen: tuple[Place, list[events.Event]], noted: Noted) -> None:
    place, happened = seen
    result: KDResult = happened[-1].results[0]
    replay((place, [events.DomainFinished(result), events.DomainFailed("b", RuntimeError())]), "trackio")
    assert noted.runs == noted.logged == noted.finished == []


def test_the_points_of_a_sweep_are_runs_of_their_own(seen: tuple[Place, list[events.Event]], noted: Noted) -> None:
    place, happened = seen
    points = [each for name in ("alpha=0", "alpha=1") for each in (events.PointStarted(name, 1, 2), *happened)]
    replay((place, points), "trackio")
    assert [run.name for run in noted.runs] == ["a alpha=0", "a alpha=1"]


def test_no_path_token_prompt_or_reply_reaches_a_tracker(
    seen: tuple[Place, list[events.Event]], noted: Noted, tmp_path: Path
) -> None:
    replay(seen, "trackio")
    told = json.dumps([dict(noted.runs[0].settings), noted.runs[0].name, noted.logged, noted.finished])
    for secret in (*SECRETS[2:], str(seen[0].root), "jane"):
        assert secret not in told, secret
    # A folder's last part alone, and of an address no user and no token.
    config = load_config(write_config(tmp_path, teacher="/home/jane.doe/models/big"), None, [])
    data = next(event for event in seen[1] if isinstance(event, events.TrainingStarted)).data
    assert settings_of(config, data)["teacher.model"] == "big"
    # No config holds such an address; were there one, it would be told without its secrets.
    for model in ("https://jane.doe:swordfish@host/x?token=swordfish1", "~jane.doe/hf_abcdefghijklmnopqrstuv"):
        assert not any(secret in _model_name(model) for secret in SECRETS)
    config = load_config(write_config(tmp_path, teacher="mlx-community/Qwen2.5-7B-Instruct-4bit"), None, [])
    assert settings_of(config, data)["teacher.model"] == "mlx-community/Qwen2.5-7B-Instruct-4bit"


def write_config(folder: Path, **values: Any) -> Path:
    (folder / "base.yaml").write_text(json.dumps(values))
    return folder / "base.yaml"


# What they may do


class Failing(Noted):
    """A tracker that fails at one of its calls."""

    def __init__(self, at: str, error: BaseException) -> None:
        super().__init__()
        self._at, self._error = at, error

    def _fail(self, what: str) -> None:
        print("noise of a library")
        if what == self._at:
            raise self._error

    def start(self, run: Any) -> Failing:
        self._fail("start")
        return self

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        super().log(metrics, step)
        self._fail("log" if step == 2 else "")

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None:
        self._fail("finish")


@pytest.mark.parametrize("at", ["start", "log", "finish"])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("cannot reach https://jane.doe:swordfish@host\nwith hf_abcdefghijklmnopqrstuv\x1b[31m"),
        SystemExit(1),
        OSError(28, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_tracker_that_fails_is_one_line_and_left_out(
    at: str,
    error: BaseException,
    seen: tuple[Place, list[events.Event]],
    noted: Noted,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing = Failing(at, error)
    both = {"wandb": ("json", failing.start), "trackio": ("json", noted.start)}
    monkeypatch.setattr("true_kd.tracking.reporting.TRACKERS", both)
    [line] = replay(seen, "wandb", "trackio")
    assert line.startswith(f"--report-to wandb: {type(error).__name__}")
    assert line.endswith("the run goes on without it.")
    assert line.isprintable()
    assert not any(secret in line for secret in SECRETS)
    told = [step for step, _ in failing.logged].count(2)
    assert told == {"start": 0, "log": 1}.get(at, told)
    assert at != "finish" or told > 1
    assert noted.finished[0][0] != {}, "the other one hears all of it"
    assert capsys.readouterr() == ("", "")


def test_a_stop_is_no_failure_of_a_tracker(
    seen: tuple[Place, list[events.Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing("log", KeyboardInterrupt())
    monkeypatch.setattr("true_kd.tracking.reporting.TRACKERS", {"wandb": ("json", failing.start)})
    with pytest.raises(KeyboardInterrupt):
        replay(seen, "wandb")


def test_a_missing_package_is_refused_before_anything_runs(
    cli: Callable[..., Any], place_of_one: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = {name: (f"no_such_{name}", start) for name, (_, start) in TRACKERS.items()}
    monkeypatch.setattr("true_kd.tracking.reporting.TRACKERS", missing)
    with pytest.raises(MissingTracker, match=r"pip install 'true-kd\[wandb\]'"):
        check_installed(["wandb"])
    base = write_config(place_of_one.root, **place_of_one.config, report_to=["mlflow"])
    for flags in (("--report-to", "swanlab"), ()):
        ended = cli("distill", "-d", "a", "--config", str(base), *flags)
        assert (ended.code, ended.out, len(ended.err.splitlines())) == (4, "", 1)
        assert f"pip install 'true-kd[{'swanlab' if flags else 'mlflow'}]'" in ended.err
    assert not place_of_one.out.exists()


def test_an_unknown_tracker_is_refused(cli: Callable[..., Any], place_of_one: Place) -> None:
    base = write_config(place_of_one.root, **place_of_one.config)
    ended = cli("distill", "-d", "a", "--config", str(base), "--report-to", "wandbb")
    assert (ended.code, ended.out) == (2, "")
    assert "--report-to" in ended.err
    assert "wandb" in ended.err


def test_a_tracker_changes_neither_the_run_nor_what_is_finished(
    cli: Callable[..., Any], place_of_one: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_of_one.run("a")
    weights = place_of_one.weights()
    base = write_config(place_of_one.root, **place_of_one.config)
    ended = cli("distill", "-d", "a", "--config", str(base), "--report-to", "tensorboard", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["domains"]["a"]["unchanged"]
    assert place_of_one.weights() == weights


def test_python_reports_as_the_command_line_does(
    place_of_one: Place, noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing("log", RuntimeError("no route"))
    both = {"wandb": ("json", failing.start), "trackio": ("json", noted.start)}
    monkeypatch.setattr("true_kd.tracking.reporting.TRACKERS", both)
    config = KDConfig(**place_of_one.config, report_to=("wandb", "trackio"))
    with pytest.warns(UserWarning, match=r"--report-to wandb: RuntimeError \(no route\)"):
        result = TrueKnowledgeDistiller(config=config).distill_domain("a")
    assert [run.name for run in noted.runs] == ["a"]
    assert noted.finished == [(proof_metrics(result.proof), False)]


# The real ones


def installed(name: str) -> ModuleType:
    return pytest.importorskip(name, reason=f"{name} is an extra")


def records(path: Path) -> Iterator[bytes]:
    """The records of a file of TensorFlow's: length, its sum, content, its sum."""
    content, at = path.read_bytes(), 0
    while at < len(content):
        [length] = struct.unpack("<Q", content[at : at + 8])
        yield content[at + 12 : at + 12 + length]
        at += 16 + length


def test_tensorboard_has_the_curves(seen: tuple[Place, list[events.Event]]) -> None:
    installed("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    place, happened = seen
    assert replay(seen, "tensorboard") == []
    [path] = (place.out / "a" / "tensorboard").iterdir()
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records(path):
        event = Event.FromString(record)
        for value in event.summary.value:
            curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    steps = [event.step for event in happened if isinstance(event, events.Stepped) and event.domain == "a"]
    assert [step for step, _ in curves["train/loss"]] == [1, 2, 3]
    assert [value for _, value in curves["train/loss"]] == pytest.approx([step.total for step in steps])
    assert [step for step, _ in curves["control/train/loss"]] == [1, 2, 3]
    result: KDResult = happened[-1].results[0]
    [(_, kl)] = curves["proof/adapted_kl"]
    assert kl == pytest.approx(result.proof.adapted.kl.value)
    content = path.read_bytes()
    for secret in (*SECRETS, str(place.root)):
        assert secret.encode() not in content, secret


def test_tensorboard_writes_through_no_link(seen: tuple[Place, list[events.Event]], tmp_path: Path) -> None:
    installed("tensorboardX")
    from true_kd.tracking import Run
    from true_kd.tracking.tensorboard import start

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tensorboard").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is a link"):
        start(Run("a", "a-1", 0, {}, tmp_path, tmp_path / "a"))
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, in which nobody is logged in anywhere."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "SWANLAB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "jane.doe"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path, pattern: str) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob(pattern) if path.is_file())


def test_trackio_has_the_curves(seen: tuple[Place, list[events.Event]], offline: Path) -> None:
    installed("trackio")
    assert replay(seen, "trackio") == []
    [database] = offline.rglob("true-kd.db")
    with sqlite3.connect(database) as found:
        rows = found.execute("select step, metrics from metrics order by id").fetchall()
    logged = [(step, json.loads(metrics)) for step, metrics in rows]
    assert [step for step, metrics in logged if "train/loss" in metrics] == [1, 2, 3]
    assert any("proof/adapted_kl" in metrics for _, metrics in logged)
    assert not any(secret.encode() in database.read_bytes() for secret in SECRETS)


def test_wandb_stays_offline_and_tells_nothing_of_its_user(
    seen: tuple[Place, list[events.Event]], offline: Path
) -> None:
    installed("wandb")
    (offline / "out").mkdir()
    assert replay(seen, "wandb", root=offline / "out") == []
    [folder] = (offline / "out" / "wandb").glob("offline-run-*")
    written = contents(folder, "*.wandb")
    for name in (b"train/loss", b"control/train/loss", b"proof/adapted_kl", b"losses.temperature"):
        assert name in written, name
    for secret in (*SECRETS, str(offline)):
        assert secret.encode() not in written, secret


def test_swanlab_stays_offline(seen: tuple[Place, list[events.Event]], offline: Path) -> None:
    installed("swanlab")
    (offline / "out").mkdir()
    assert replay(seen, "swanlab", root=offline / "out") == []
    written = contents(offline / "out" / "swanlog", "*.swanlab")
    for name in (b"train/loss", b"proof/adapted_kl"):
        assert name in written, name
    assert b"losses.temperature" in contents(offline / "out" / "swanlog", "config.yaml")
    assert not any(secret.encode() in written for secret in SECRETS if secret != "jane.doe")


def test_mlflow_has_the_curves_and_one_run_goes_on(seen: tuple[Place, list[events.Event]], offline: Path) -> None:
    for name in ("mlflow", "sqlalchemy", "alembic"):
        installed(name)
    _, happened = seen
    assert replay(seen, "mlflow", root=offline) == []
    client = importlib.import_module("mlflow").MlflowClient(tracking_uri=f"sqlite:///{offline / 'mlflow.db'}")
    [experiment] = [each for each in client.search_experiments() if each.name == "true-kd"]
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("a", "FINISHED")
    steps = [event.step for event in happened if isinstance(event, events.Stepped) and event.domain == "a"]
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [(step.iteration, step.total) for step in steps]
    assert "proof/adapted_kl" in run.data.metrics
    assert not any(secret in json.dumps([run.data.params, run.data.tags]) for secret in SECRETS[1:])
