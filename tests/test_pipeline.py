"""The whole job: what a run leaves, what it does not do twice, and what one bad domain does to the others."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import TEMPLATE, save_random_model

from true_kd import events
from true_kd.adapters import load_adapter
from true_kd.capture import CaptureOptions, render_for
from true_kd.config import Override
from true_kd.datasets import build_data
from true_kd.errors import InputError, LockedError, ModelError, NonFiniteLossError, PromptError, VocabularyError
from true_kd.evaluation import EvaluationOptions, evaluate, extract_answer
from true_kd.jobs import plan
from true_kd.models import ModelOptions, SamplingOptions, generate_replies, open_model
from true_kd.pipeline import capture, distill
from true_kd.prompts import from_records, from_strings
from true_kd.reporting import KDResult
from true_kd.training import StepMetrics

WEIGHTS = "adapters.safetensors"
TIMED = ("kd_metrics.json", "run.json", "metrics.jsonl")
"""Files of a domain that hold times and places."""
ASK = tuple(f"say hello to {count} cats on the mat" for count in range(5))
CHECK = tuple(f"who said hello to cat {count}" for count in range(2))
SCORED = tuple({"prompt": prompt, "completion": "the cat sat on the mat"} for prompt in ASK)


class Place:
    """A folder to run in: a config, prompts, an output folder and a cache."""

    def __init__(self, root: Path, teacher: Path, student: Path, **config: Any) -> None:
        self.root = root
        self.out = root / "out"
        self.config = {
            "teacher": str(teacher),
            "student": str(student),
            "prompts": str(root / "prompts"),
            "out": str(self.out),
            "cache": str(root / "cache"),
            "capture": {"max_tokens": 4},
            "training": {"iters": 2, "validate_every": 2, "checkpoint_every": 2, "learning_rate": 0.01},
            "lora": {"rank": 2},
            # What is measured with a clock differs from run to run, and takes its time.
            "evaluation": {"speed_tokens": 0},
            # Five megabytes a run.
            "report": False,
            # Three seconds a process; tests/test_apart.py is where they are apart.
            "isolate": False,
            **config,
        }

    def write(self, domain: str, train: Sequence[Any] = ASK, valid: Sequence[Any] | None = CHECK) -> None:
        """Prompt files of a domain: strings are prompts, mappings are records."""
        folder = self.root / "prompts" / domain
        folder.mkdir(parents=True, exist_ok=True)
        for split, prompts in (("train", train), ("valid", valid)):
            if prompts is not None:
                records = [{"prompt": item} if isinstance(item, str) else item for item in prompts]
                (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def start(self, *domains: str, config: Path | None = None, **changes: Any) -> Iterator[events.Event]:
        """Begin a run; changes are written `training__iters=6`."""
        base = config or self.root / "base.yaml"
        if config is None:
            base.write_text(json.dumps(self.config))
        overrides = [Override("--set", tuple(name.split("__")), value) for name, value in changes.items()]
        return distill(*plan(base, domains, overrides))

    def run(self, *domains: str, **changes: Any) -> Run:
        return Run(list(self.start(*domains, **changes)))

    def weights(self, domain: str = "a") -> bytes:
        return (self.out / domain / WEIGHTS).read_bytes()


def steady_lines(content: bytes) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl without what a clock measured."""
    lines = map(json.loads, content.decode().splitlines())
    return [{name: value for name, value in line.items() if name not in StepMetrics.MEASURED} for line in lines]


class Run:
    """The events of a run that came to its end."""

    def __init__(self, seen: list[events.Event]) -> None:
        self.events = seen
        self.end: events.RunFinished = seen[-1]
        self.results: dict[str, KDResult] = {result.domain: result for result in self.end.results}
        self.failures: Mapping[str, Exception] = self.end.failures

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def captured_tokens(self) -> dict[str, int]:
        """Response tokens that the teacher was asked for, by domain."""
        asked = {event.domain: event.progress.tokens for event in self.of(events.Captured)}
        return asked | {event.domain: 0 for event in self.of(events.CaptureReused)}

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.end.summary.read_text())


@pytest.fixture
def place(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Place:
    """A place with one domain, `a`."""
    place = Place(tmp_path, teacher_folder, student_folder)
    place.write("a")
    return place


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> tuple[Place, Run]:
    """A run of domain `a` that is only looked at."""
    place = Place(tmp_path_factory.mktemp("finished"), teacher_folder, student_folder)
    place.config["training"]["iters"] = 4
    place.write("a")
    return place, place.run("a")


@pytest.fixture
def done(tmp_path: Path, finished: tuple[Place, Run]) -> Place:
    """A copy of the finished run, to go on from."""
    original, _ = finished
    shutil.copytree(original.root, tmp_path / "copy")
    config = {name: original.config[name] for name in ("teacher", "student", "training")}
    return Place(tmp_path / "copy", **config)


def metrics_of(place: Place) -> dict[str, Any]:
    return json.loads((place.out / "a" / "kd_metrics.json").read_text())


def plan_of(place: Place, *domains: str) -> tuple[list, dict]:
    base = place.root / "base.yaml"
    base.write_text(json.dumps(place.config))
    return plan(base, domains, [])


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True, scope="module")
def fast_collection(finished: tuple[Place, Run]) -> Iterator[None]:
    """What tests import is set aside: looking through it takes a quarter of the time of each run here."""
    gc.freeze()
    yield
    gc.unfreeze()


# What a run leaves


def test_every_promised_file_is_there(finished: tuple[Place, Run]) -> None:
    place, run = finished
    adapter = {WEIGHTS, "adapter_config.json"}
    assert {path.name for path in (place.out / "a").iterdir()} == {
        *adapter,
        "checkpoint_2",
        "checkpoint_4",
        *TIMED,
    }
    for checkpoint in ("checkpoint_2", "checkpoint_4"):
        assert {path.name for path in (place.out / "a" / checkpoint).iterdir()} == adapter
    assert run.end.summary == place.out / "kd_summary.json"
    assert run.results["a"].adapter_path == str(place.out / "a")


def test_a_report_lies_beside_the_summary_unless_it_is_left_out(place: Place) -> None:
    assert place.run("a").end.report is None
    assert not (place.out / "report.html").exists()
    del place.config["report"]
    run = place.run("a")
    assert run.results["a"].unchanged, "a report is made of a finished run as well"
    assert run.end.report == place.out / "report.html"
    assert "<html" in (place.out / "report.html").read_text()


def test_a_run_of_which_nothing_came_has_no_report(place: Place) -> None:
    del place.config["report"]
    place.write("a", ["the cat sat on the mat " * 20] * 2, ["hi"])
    run = place.run("a", training__max_seq_length=60)
    assert list(run.failures) == ["a"]
    assert run.end.report is None


def test_the_last_step_is_validated_and_saved_whatever_the_interval(place: Place) -> None:
    run = place.run("a", training__iters=3)
    assert [validation.iteration for validation in run.results["a"].validations] == [0, 2, 3]
    assert {path.name for path in (place.out / "a").glob("checkpoint_*")} == {"checkpoint_2", "checkpoint_3"}


def test_the_metrics_hold_the_curves(finished: tuple[Place, Run]) -> None:
    place, run = finished
    curves, timings = (metrics_of(place)[name] for name in ("curves", "timings"))
    for name, values in {**curves, **timings}.items():
        assert len(values) == 4, name
        assert all(value > 0 for value in values), name
    assert {"total", "kd", "ce", "learning_rate", "response_tokens"} < set(curves)
    assert set(timings) == {"seconds", "tokens_per_second", "peak_memory"}
    assert curves["iteration"] == [1, 2, 3, 4]
    assert curves["total"] == [event.step.total for event in run.of(events.Stepped)]


def test_the_metrics_hold_the_validations(finished: tuple[Place, Run]) -> None:
    place, run = finished
    found = metrics_of(place)["result"]
    assert [validation["iteration"] for validation in found["validations"]] == [0, 2, 4]
    assert found["before"] == found["validations"][0]["metrics"]
    for validation, event in zip(found["validations"], run.of(events.Validated), strict=True):
        assert validation["metrics"]["kl"] == event.validation.metrics.kl
        assert set(validation["metrics"]) == {"loss", "kd", "ce", "kl", "top1_agreement", "tokens"}
    assert found["data"]["train_examples"] == len(ASK)
    assert found["trainable_parameters"] > 0
    assert found["proof"]["tasks"] == 0
    assert found["proof"]["student"]["exact_match"] is None


def test_the_summary_holds_every_domain(finished: tuple[Place, Run]) -> None:
    _, run = finished
    assert run.summary["failed"] == {}
    assert list(run.summary["domains"]) == ["a"]
    found = run.summary["domains"]["a"]
    assert found["after"]["loss"] == run.results["a"].after.loss
    assert found["training_loss"]["first"]["kd"] == run.results["a"].steps[0].kd


def test_distilling_brings_the_student_nearer_to_the_teacher(finished: tuple[Place, Run]) -> None:
    _, run = finished
    assert run.results["a"].after.loss < run.results["a"].before.loss
    assert run.results["a"].after.kl < run.results["a"].before.kl


def test_nothing_temporary_is_left(finished: tuple[Place, Run]) -> None:
    place, _ = finished
    assert [path for path in place.root.rglob(".tmp*")] == []


# Reproducing a run


def test_two_runs_with_one_seed_give_the_same_bytes(place: Place) -> None:
    place.config["lora"] = {"rank": 2, "dropout": 0.3}
    place.run("a")
    first = place.weights()
    # Captured again as well, and after other use of the random state.
    mx.random.seed(99)
    place.run("a", fresh=True, cache=str(place.root / "another cache"))
    assert place.weights() == first


def test_another_seed_gives_another_adapter_from_the_same_targets(done: Place) -> None:
    first = done.weights()
    run = done.run("a", seed=1)
    assert run.captured_tokens == {"a": 0}
    assert done.weights() != first


def test_run_json_is_a_config_that_finds_the_run_finished(finished: tuple[Place, Run]) -> None:
    place, _ = finished
    again = Run(list(place.start("a", config=place.out / "a" / "run.json")))
    assert again.results["a"].unchanged


def test_run_json_is_a_config_that_reproduces_the_run(place: Place) -> None:
    place.run("a", training__learning_rate=3e-5, losses__alpha=0.4, lora__keys=["self_attn.q_proj"])
    elsewhere = str(place.root / "elsewhere")
    list(place.start("a", config=place.out / "a" / "run.json", out=elsewhere))
    assert (Path(elsewhere) / "a" / WEIGHTS).read_bytes() == place.weights()


def worse_and_worse(place: Place, **valid: str) -> Run:
    """A run whose last step is not its best: the more it learns one reply, the worse it is at another."""
    place.write("a", SCORED, [{"prompt": "hi", "completion": "said hello to the world", **valid}])
    place.config["losses"] = {"alpha": 0.0}
    place.config["training"] = {"validate_every": 1, "checkpoint_every": 1, "iters": 8, "learning_rate": 0.03}
    return place.run("a")


def test_the_weights_kept_are_the_best_by_validation(place: Place) -> None:
    run = worse_and_worse(place)
    result = run.results["a"]
    losses = {validation.iteration: validation.metrics.loss for validation in result.validations[1:]}
    best = min(losses, key=losses.get)
    assert best != 8, "the last step is no longer worse than an earlier one"
    assert result.best_iteration == best, losses
    assert result.after.loss == losses[best]
    assert place.weights() == (place.out / "a" / f"checkpoint_{best}" / WEIGHTS).read_bytes()
    assert place.weights() != (place.out / "a" / "checkpoint_8" / WEIGHTS).read_bytes()


def test_answers_are_compared_with_the_weights_that_are_kept(place: Place, student_folder: Path) -> None:
    worse_and_worse(place)
    best, last = (written_with(place.out / "a" / folder, student_folder) for folder in ("", "checkpoint_8"))
    assert best != last, "the best and the last adapter no longer answer differently"
    assert worse_and_worse(place, answer=best).results["a"].proof.adapted.exact_match.value == 1.0
    assert worse_and_worse(place, answer=last).results["a"].proof.adapted.exact_match.value == 0.0


def written_with(adapter: Path, student_folder: Path) -> str:
    """What the adapted student answers to `hi`, taking the most likely token each time."""
    student = open_model(ModelOptions(model=str(student_folder)), "student")
    load_adapter(student.module, adapter)
    [asked] = render_for(student, from_strings(["hi"]), CaptureOptions())
    greedy = SamplingOptions(sampling_temperature=0.0, max_tokens=4)
    *_, (_, [reply]) = generate_replies(student, [asked.rendered.prompt], greedy, [0])
    text = student.tokenizer.decode([token for token in reply.tokens if token not in student.stop_ids])
    return extract_answer(text, EvaluationOptions())


def test_the_adapter_on_disk_measures_as_the_result_says(place: Place, student_folder: Path) -> None:
    jobs, failures = plan_of(place, "a")
    run = Run(list(distill(jobs, failures)))
    student = open_model(ModelOptions(model=str(student_folder)), "student")
    data = build_data(jobs[0], student)
    assert evaluate(student.module, data.valid, jobs[0].config.losses.final, 4) == run.results["a"].before
    load_adapter(student.module, place.out / "a")
    assert evaluate(student.module, data.valid, jobs[0].config.losses.final, 4) == run.results["a"].after


# Doing nothing twice


def test_a_finished_domain_is_skipped_and_nothing_is_touched(finished: tuple[Place, Run]) -> None:
    place, _ = finished
    before = files_of(place.out / "a")
    run = place.run("a")
    assert run.results["a"].unchanged
    assert [type(event) for event in run.events] == [events.DomainFinished, events.RunFinished]
    assert files_of(place.out / "a") == before


def test_the_result_of_a_skipped_domain_is_that_of_its_run(finished: tuple[Place, Run]) -> None:
    place, run = finished
    first = run.results["a"]
    again = place.run("a").results["a"]
    assert (again.before, again.after, again.steps, again.validations) == (
        first.before,
        first.after,
        first.steps,
        first.validations,
    )


@pytest.mark.parametrize(
    "change",
    [{"training__iters": 5}, {"losses__temperature": 3.0}, {"fresh": True}],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_option_runs_the_domain_again(done: Place, change: dict[str, Any]) -> None:
    assert not done.run("a", **change).results["a"].unchanged


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_changed_prompt_runs_the_domain_again_and_captures_only_itself(done: Place, split: str) -> None:
    prompts = {"train": ASK, "valid": CHECK}
    prompts[split] = ("say something else", *prompts[split][1:])
    done.write("a", **prompts)
    run = done.run("a")
    assert not run.results["a"].unchanged
    assert 0 < run.captured_tokens["a"] <= 4


def test_a_changed_model_runs_the_domain_again(place: Place, tokenizer_folder: Path) -> None:
    changing = save_random_model(place.root / "changing", tokenizer_folder, seed=2)
    place.config["student"] = str(changing)
    place.run("a")
    save_random_model(changing, tokenizer_folder, seed=3)
    run = place.run("a")
    assert not run.results["a"].unchanged
    assert run.captured_tokens == {"a": 0}


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped byte": flip_a_byte,
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "no config": lambda folder: (folder / "adapter_config.json").unlink(),
    "half of the metrics": lambda folder: (folder / "kd_metrics.json").write_text(
        (folder / "kd_metrics.json").read_text()[:200]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_adapter_is_made_again_as_it_was(done: Place, damage: Callable[[Path], object]) -> None:
    before = files_of(done.out / "a")
    damage(done.out / "a")
    run = done.run("a")
    assert not run.results["a"].unchanged
    after = files_of(done.out / "a")
    assert after.keys() == before.keys()
    for name in (WEIGHTS, "adapter_config.json", f"checkpoint_4/{WEIGHTS}"):
        assert after[name] == before[name]


def test_where_things_lie_does_not_make_a_run_another(finished: tuple[Place, Run]) -> None:
    place, _ = finished
    moved = place.root / "moved"
    shutil.copytree(place.root / "prompts", moved)
    assert place.run("a", prompts=str(moved), cache=str(place.root / "no cache here")).results["a"].unchanged


def test_a_run_that_was_stopped_is_taken_up_and_ends_as_if_it_had_not_been(done: Place) -> None:
    expected = done.weights()
    for event in done.start("a", fresh=True):
        if isinstance(event, events.Stepped) and event.step.iteration == 3:
            break
    assert not (done.out / "a" / "kd_metrics.json").exists()
    run = done.run("a")
    assert not run.results["a"].unchanged
    assert run.captured_tokens == {"a": 0}
    assert done.weights() == expected


def test_checkpoints_of_a_longer_run_do_not_stay(done: Place) -> None:
    done.run("a", training__iters=2)
    assert {path.name for path in (done.out / "a").glob("checkpoint_*")} == {"checkpoint_2"}


def test_domains_share_the_targets_of_their_common_prompts(place: Place) -> None:
    place.write("b", ASK[:6], CHECK)
    run = place.run("a", "b")
    assert run.captured_tokens["a"] > 0
    assert run.captured_tokens["b"] == 0


def test_the_cache_goes_where_the_variable_says(place: Place, own_cache: Path) -> None:
    del place.config["cache"]
    place.run("a")
    assert len(list(own_cache.glob("*/manifest.jsonl"))) == 1


def test_the_capture_of_what_is_cached_takes_no_memory(done: Place) -> None:
    """As `KDResult.capture_peak_memory` says: 0 where everything was in the cache."""
    assert done.run("a", seed=1).results["a"].capture_peak_memory == 0


# What is kept of the teacher

KEPT = {
    "tiny": {"preset": "tiny"},
    "exact": {"preset": "exact"},
    "half of the tokens": {"share": 0.5},
    "half of the tokens, exact": {"preset": "exact", "share": 0.5},
}
EXACT = {"preset": "exact"}


@pytest.mark.parametrize("targets", KEPT.values(), ids=KEPT.keys())
def test_a_student_learns_whatever_is_kept(place: Place, targets: dict[str, Any]) -> None:
    place.config |= {"targets": targets, "training": {"iters": 4, "learning_rate": 0.01}}
    place.write("a", SCORED, SCORED[:2])
    run = place.run("a")
    assert run.failures == {}
    result = run.results["a"]
    assert result.after.loss < result.before.loss
    assert result.data.train_response_tokens == len(SCORED) * (4 if "share" in targets else 7)


def dense_kl(teacher_folder: Path, student_folder: Path, prompts: Sequence[Any], temperature: float) -> float:
    """The mean of KL(teacher || student) over given replies, from all logits of both; nats."""
    teacher, student = (
        open_model(ModelOptions(model=str(path)), "teacher") for path in (teacher_folder, student_folder)
    )
    found = []
    for asked in render_for(teacher, from_records(prompts), CaptureOptions()):
        tokens = mx.array([[*asked.rendered.prompt, *asked.rendered.response]])
        rows = slice(len(asked.rendered.prompt) - 1, tokens.shape[1] - 1)
        one, other = (model.module(tokens)[0, rows] / temperature for model in (teacher, student))
        one, other = (logits - mx.logsumexp(logits, axis=-1, keepdims=True) for logits in (one, other))
        found += mx.sum(mx.exp(one) * (one - other), axis=-1).tolist()
    return float(np.mean(found))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_hidden_states_measure_the_true_divergence(
    place: Place, teacher_folder: Path, student_folder: Path, temperature: float
) -> None:
    place.config |= {"targets": EXACT, "losses": {"temperature": temperature}}
    place.write("a", SCORED, SCORED[:3])
    before = place.run("a").results["a"].before
    assert before.kl == pytest.approx(dense_kl(teacher_folder, student_folder, SCORED[:3], 1.0), rel=2e-3)
    expected = temperature**2 * dense_kl(teacher_folder, student_folder, SCORED[:3], temperature)
    assert before.kd == pytest.approx(expected, rel=2e-3)


def test_hidden_states_of_a_quantised_teacher_can_be_learnt_from(place: Place, quantised_folder: Path) -> None:
    """The teacher packed, the student another model: the stored head is a quantised one."""
    place.config |= {"targets": EXACT, "teacher": {"model": str(quantised_folder), "dequantize": "never"}}
    place.config["training"]["iters"] = 4
    result = place.run("a").results["a"]
    assert result.after.kl != result.before.kl
    [head] = (place.root / "cache").glob("*/head.safetensors")
    assert "scales" in mx.load(str(head))


def test_other_presets_are_captured_apart_and_found_again(place: Place) -> None:
    assert place.run("a").captured_tokens["a"] > 0
    assert place.run("a", targets__preset="exact").captured_tokens["a"] > 0
    assert place.run("a", targets__preset="default", fresh=True).captured_tokens["a"] == 0
    assert place.run("a", targets__preset="exact", fresh=True).captured_tokens["a"] == 0
    assert len(list((place.root / "cache").glob("*/manifest.jsonl"))) == 2


def test_a_damaged_shard_is_captured_again_alone(place: Place) -> None:
    place.config["capture"] |= {"shard_prompts": 2}
    place.run("a")
    weights = place.weights()
    shards = sorted((place.root / "cache").glob("*/*.safetensors"))
    before = [shard.read_bytes() for shard in shards]
    shards[0].write_bytes(before[0][:-1])
    run = place.run("a", fresh=True)
    assert 0 < run.captured_tokens["a"] <= 2 * 4
    assert [shard.read_bytes() for shard in shards] == before
    assert place.weights() == weights


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_head_that_is_damaged_is_written_again(place: Place, damage: str) -> None:
    place.config["targets"] = EXACT
    place.run("a")
    weights = place.weights()
    [head] = (place.root / "cache").glob("*/head.safetensors")
    if damage == "gone":
        head.unlink()
    else:
        head.write_bytes(head.read_bytes()[:-1])
    run = place.run("a", fresh=True)
    assert run.failures == {}
    assert place.weights() == weights


def test_what_was_captured_before_is_not_captured_again(place: Place) -> None:
    place.write("b", ASK[:2], CHECK)
    seen = list(capture(*plan_of(place, "a", "b")))
    assert not place.out.exists(), "no student was asked for"
    assert [event.domain for event in seen if isinstance(event, events.DomainCaptured)] == ["a", "b"]
    assert seen[-1].domains == ("a", "b")
    assert place.run("a", "b").captured_tokens == {"a": 0, "b": 0}


# Domains that fail


def test_a_bad_prompt_file_fails_its_domain_alone(place: Place) -> None:
    place.write("b")
    (place.root / "prompts" / "b" / "train.jsonl").write_text('{"prompt": "hi"}\n{"promt": "hi"}\n')
    run = place.run("b", "a")
    assert isinstance(run.failures["b"], PromptError)
    assert "train.jsonl:2" in run.summary["failed"]["b"]
    assert list(run.summary["domains"]) == ["a"]
    assert not run.results["a"].unchanged
    assert not (place.out / "b").exists()


def test_a_domain_that_does_not_exist_fails_alone(place: Place) -> None:
    run = place.run("nowhere", "a")
    assert isinstance(run.failures["nowhere"], PromptError)
    assert list(run.results) == ["a"]


def test_prompts_that_leave_no_room_for_a_reply_fail_their_domain_alone(place: Place) -> None:
    place.write("b", ["the cat sat on the mat " * 20, "hello to the world " * 20], ["hi"])
    run = place.run("b", "a", training__max_seq_length=60)
    assert isinstance(run.failures["b"], InputError)
    assert "max_seq_length=60" in run.summary["failed"]["b"]
    assert list(run.summary["domains"]) == ["a"]


def test_a_prompt_that_leaves_no_room_is_left_out_and_counted(place: Place) -> None:
    place.write("a", [*ASK, "the cat sat on the mat " * 20])
    data = place.run("a", training__max_seq_length=60).results["a"].data
    assert (data.train_examples, data.dropped) == (len(ASK), 1)


def test_a_reply_that_has_too_little_room_is_cut_and_counted(place: Place) -> None:
    place.write("a", [*SCORED, {"prompt": "hi", "completion": "the cat sat on the mat " * 20}])
    data = place.run("a", training__max_seq_length=60).results["a"].data
    assert (data.train_examples, data.truncated, data.dropped) == (len(SCORED) + 1, 1, 0)


@pytest.fixture
def picky_teacher(tmp_path: Path, teacher_folder: Path) -> Path:
    """The random teacher with a chat template that refuses a system message, as Gemma's does."""
    folder = tmp_path / "picky"
    folder.mkdir()
    for file in teacher_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": refusal + TEMPLATE}))
    return folder


def test_prompts_that_the_teacher_refuses_fail_their_domain_alone(place: Place, picky_teacher: Path) -> None:
    place.config["teacher"] = str(picky_teacher)
    place.write("b")
    (place.root / "prompts" / "b" / "system.md").write_text("be brief")
    run = place.run("b", "a")
    assert isinstance(run.failures["b"], InputError)
    assert "no system message" in run.summary["failed"]["b"]
    assert list(run.results) == ["a"]


def test_a_student_that_diverges_fails_its_domain_alone_and_keeps_weights_that_were_good(place: Place) -> None:
    place.write("b")
    (place.root / "b.yaml").write_text("training: {learning_rate: 1.0, grad_clip: 0, warmup: 0}\nlora: {scale: 1e30}\n")
    run = place.run("b", "a")
    assert isinstance(run.failures["b"], NonFiniteLossError)
    assert str(place.out / "b") in run.summary["failed"]["b"]
    assert {path.name for path in (place.out / "b").iterdir()} >= {WEIGHTS, "adapter_config.json", "run.json"}
    from mlx_lm import load

    kept, _ = load(place.config["student"], adapter_path=str(place.out / "b"))
    assert np.isfinite(np.array(kept(mx.array([[5, 6, 7]])))).all()
    assert list(run.summary["domains"]) == ["a"]


def test_a_student_whose_weights_are_damaged_is_refused_as_it_is(place: Place, tokenizer_folder: Path) -> None:
    poisoned = save_random_model(place.root / "poisoned", tokenizer_folder, seed=2)
    weights = mx.load(str(poisoned / "model.safetensors"))
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    mx.save_safetensors(str(poisoned / "model.safetensors"), weights)
    run = place.run("a", student__model=str(poisoned))
    assert isinstance(run.failures["a"], ModelError)
    assert not (place.out / "a" / WEIGHTS).exists()


def test_a_failed_domain_is_not_taken_for_finished(done: Place) -> None:
    done.write("a", ["the cat sat on the mat " * 20, "hello to the world " * 20])
    run = done.run("a", training__max_seq_length=60)
    assert list(run.failures) == ["a"]
    assert run.summary["domains"] == {}


def test_the_summary_keeps_domains_that_were_finished_before(done: Place) -> None:
    done.write("b")
    run = done.run("b")
    assert list(run.results) == ["b"]
    assert list(run.summary["domains"]) == ["a", "b"]


def test_a_model_of_one_domain_that_is_missing_fails_it_alone(place: Place) -> None:
    place.write("b")
    (place.root / "b.yaml").write_text("student: ./nowhere\n")
    run = place.run("b", "a")
    assert isinstance(run.failures["b"], ModelError)
    assert list(run.results) == ["a"]


def test_a_missing_model_stops_the_run_before_any_work(place: Place) -> None:
    place.config["student"] = "./nowhere"
    with pytest.raises(ModelError, match=r"student './nowhere'"):
        place.run("a")
    assert not (place.root / "cache").exists()


# Memory


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A random model some hundred times the size of the student: 12 MB."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768, "num_attention_heads": 4}
    return save_random_model(tmp_path_factory.mktemp("large"), tokenizer_folder, seed=5, **sizes)


def size_of(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


SLACK = 1 << 20
"""Bytes that may be held besides a model: batches, random state."""


def active_memory() -> int:
    gc.collect()
    return mx.get_active_memory()


def test_the_teacher_is_gone_before_the_student_is_opened(place: Place, large_folder: Path) -> None:
    place.config["teacher"] = str(large_folder)
    held = active_memory()
    run = place.run("a")
    [freed] = run.of(events.TeacherFreed)
    assert freed.active_memory - held < SLACK
    kinds = [type(event) for event in run.events]
    assert kinds.index(events.TeacherFreed) < kinds.index(events.TrainingStarted)


def test_training_needs_less_memory_than_teacher_and_student(place: Place, large_folder: Path) -> None:
    place.config["teacher"] = str(large_folder)
    result = place.run("a").results["a"]
    assert result.capture_peak_memory > size_of(large_folder)
    assert result.training_peak_memory < size_of(large_folder)


def test_the_teacher_is_gone_though_a_domain_failed_in_capture(
    place: Place, picky_teacher: Path, tokenizer_folder: Path, large_folder: Path
) -> None:
    (picky_teacher / "model.safetensors").write_bytes((large_folder / "model.safetensors").read_bytes())
    (picky_teacher / "config.json").write_bytes((large_folder / "config.json").read_bytes())
    place.config["teacher"] = str(picky_teacher)
    place.write("b")
    (place.root / "prompts" / "b" / "system.md").write_text("be brief")
    held = active_memory()
    run = place.run("b", "a")
    assert list(run.failures) == ["b"]
    [freed] = run.of(events.TeacherFreed)
    assert freed.active_memory - held < SLACK


def test_the_student_of_a_failed_domain_is_gone_before_the_next_is_opened(place: Place, large_folder: Path) -> None:
    place.config["student"] = str(large_folder)
    place.write("b", ["the cat sat on the mat " * 20, "hello to the world " * 20], ["hi"])
    held = active_memory()
    at_start = {}
    for event in place.start("b", "a", training__max_seq_length=60):
        if isinstance(event, events.TrainingStarted):
            at_start[event.domain] = active_memory() - held
    assert at_start.keys() == {"a"}
    assert at_start["a"] < size_of(large_folder) + SLACK


def test_students_are_opened_one_at_a_time(place: Place, large_folder: Path) -> None:
    place.config["student"] = str(large_folder)
    place.write("b")
    held = active_memory()
    at_start = {}
    for event in place.start("b", "a"):
        if isinstance(event, events.TrainingStarted):
            at_start[event.domain] = active_memory() - held
    assert at_start.keys() == {"a", "b"}
    assert max(at_start.values()) < size_of(large_folder) + SLACK
    gc.collect()
    assert active_memory() - held < SLACK


def test_a_teacher_is_opened_once_for_all_domains(place: Place) -> None:
    place.write("b")
    assert len(place.run("a", "b").of(events.TeacherOpening)) == 1


# Vocabularies


@pytest.fixture(scope="module")
def foreign_tokenizer(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A tokenizer of as many ids, trained on another text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    ours = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ours.get_vocab_size(),
        special_tokens=["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["quick brown foxes jumped over lazy dogs while zebras waited"] * 20, trainer)
    assert tokenizer.get_vocab_size() == ours.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_bytes((tokenizer_folder / "tokenizer_config.json").read_bytes())
    return folder


def vocabulary_of(folder: Path) -> dict[str, int]:
    return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]


def test_another_vocabulary_of_equal_size_is_refused_before_any_capture(
    place: Place, foreign_tokenizer: Path, tokenizer_folder: Path
) -> None:
    place.config["teacher"] = str(save_random_model(place.root / "foreign", foreign_tokenizer, seed=1))
    ours, theirs = vocabulary_of(tokenizer_folder), vocabulary_of(foreign_tokenizer)
    differing = len(ours.items() - theirs.items())
    assert 0 < differing < len(ours)
    seen = []
    for strategy in ("match", "truncate"):
        with pytest.raises(VocabularyError, match=rf"\b{differing} of {len(ours)} common ids"):
            seen.extend(place.start("a", vocab_strategy=strategy))
    assert seen == []
    assert not (place.root / "cache").exists()


@pytest.fixture
def permuted_teacher(tmp_path: Path, teacher_folder: Path) -> Path:
    """The random teacher with other ids for the same tokens: it says the same, in another numbering."""
    folder = tmp_path / "permuted"
    folder.mkdir()
    for file in teacher_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    special = 6
    new_id = np.arange(320)
    new_id[special : len(vocabulary)] = special + np.random.default_rng(7).permutation(len(vocabulary) - special)
    tokenizer["model"]["vocab"] = {token: int(new_id[index]) for token, index in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    weights = mx.load(str(folder / "model.safetensors"))
    rows = np.array(weights["model.embed_tokens.weight"])
    weights["model.embed_tokens.weight"] = mx.array(rows[np.argsort(new_id)])
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


@pytest.mark.parametrize("strategy", ["auto", "project", "truncate", "uld"])
def test_a_student_of_another_vocabulary_is_distilled_by_every_strategy(
    place: Place, foreign_tokenizer: Path, strategy: str
) -> None:
    place.config["student"] = str(save_random_model(place.root / "foreign", foreign_tokenizer, seed=2))
    place.config["training"]["iters"] = 6
    place.write("a", SCORED, SCORED[:3])
    losses = {"divergence": "total_variation"} if strategy == "uld" else {}
    place.config["losses"] = losses
    run = place.run("a", vocab_strategy=strategy, force=strategy == "truncate")
    assert run.failures == {}
    found = run.results["a"]
    assert found.after.loss < found.before.loss
    assert found.data.mapped.way == ("align" if strategy == "auto" else strategy)
    assert found.data.mapped.positions == 1.0
    assert (found.data.train_examples, found.data.dropped) == (len(SCORED), 0)


def test_an_adapter_across_tokenizers_is_found_finished_by_the_next_run(place: Place, foreign_tokenizer: Path) -> None:
    place.config["student"] = str(save_random_model(place.root / "foreign", foreign_tokenizer, seed=2))
    place.write("a", SCORED, SCORED[:3])
    assert not place.run("a").results["a"].unchanged
    again = place.run("a")
    assert again.results["a"].unchanged
    assert again.of(events.TeacherOpening) == []


def test_students_of_one_tokenizer_share_what_was_aligned_for_it(place: Place, foreign_tokenizer: Path) -> None:
    place.write("a", SCORED, SCORED[:3])
    for seed in (2, 3):
        place.config["student"] = str(save_random_model(place.root / f"foreign{seed}", foreign_tokenizer, seed=seed))
        run = place.run("a")
        assert not run.results["a"].unchanged
        assert len(run.of(events.TeacherOpening)) == (seed == 2)


def test_a_student_of_the_teachers_tokenizer_shares_nothing_with_another(place: Place, foreign_tokenizer: Path) -> None:
    place.write("a", SCORED, SCORED[:3])
    place.run("a")
    place.config["student"] = str(save_random_model(place.root / "foreign", foreign_tokenizer, seed=2))
    place.run("a")
    assert len([folder for folder in (place.root / "cache").iterdir() if folder.is_dir()]) == 2


def test_what_knows_no_text_is_not_held_against_the_student_by_it(place: Place, foreign_tokenizer: Path) -> None:
    place.config["student"] = str(save_random_model(place.root / "foreign", foreign_tokenizer, seed=2))
    place.config |= {"losses": {"divergence": "total_variation"}, "gate": {"when_no_better": "refuse"}}
    place.write("a", SCORED, SCORED[:3])
    assert place.run("a", vocab_strategy="uld").failures == {}


def test_naming_the_default_strategy_changes_nothing(place: Place, foreign_tokenizer: Path) -> None:
    place.config["student"] = str(save_random_model(place.root / "foreign", foreign_tokenizer, seed=2))
    place.write("a", SCORED, SCORED[:3])
    place.run("a")
    assert place.run("a", vocab_strategy="align").results["a"].unchanged
    assert not place.run("a", vocab_strategy="project").results["a"].unchanged


def test_a_share_of_the_tokens_does_not_change_how_many_could_be_mapped(place: Place, foreign_tokenizer: Path) -> None:
    place.config["student"] = str(save_random_model(place.root / "foreign", foreign_tokenizer, seed=2))
    place.config["targets"] = {"share": 0.5}
    place.write("a", SCORED, SCORED[:3])
    assert place.run("a").results["a"].data.mapped.positions == 1.0


def test_sorted_probabilities_are_compared_by_the_distance_of_their_authors_alone(place: Place) -> None:
    with pytest.raises(InputError, match=r"losses\.divergence forward_kl: with vocab_strategy uld"):
        place.run("a", vocab_strategy="uld")


def test_a_permuted_vocabulary_is_refused_where_it_must_match(place: Place, permuted_teacher: Path) -> None:
    place.config["teacher"] = str(permuted_teacher)
    with pytest.raises(VocabularyError, match="--vocab-strategy align"):
        place.run("a", vocab_strategy="match")


def test_a_vocabulary_of_one_domain_that_differs_fails_it_alone(place: Place, permuted_teacher: Path) -> None:
    place.write("b")
    (place.root / "b.yaml").write_text(f"teacher: {permuted_teacher}\nvocab_strategy: match\n")
    run = place.run("b", "a")
    assert isinstance(run.failures["b"], VocabularyError)
    assert list(run.results) == ["a"]


@pytest.mark.parametrize("strategy", ["project", "align"])
def test_mapping_a_permuted_vocabulary_distils_the_same_teacher(
    place: Place, permuted_teacher: Path, strategy: str
) -> None:
    place.config["training"]["iters"] = 4
    place.write("a", SCORED, SCORED[:3])
    expected = place.run("a").results["a"]
    place.config["teacher"] = str(permuted_teacher)
    found = place.run("a", vocab_strategy=strategy).results["a"]
    assert not found.unchanged
    assert found.data.train_response_tokens == expected.data.train_response_tokens
    assert found.before.ce == pytest.approx(expected.before.ce, rel=1e-6), "the same text in the student's ids"
    # Some ids are sampled, and with other ids others are; ids that spell nothing have no counterpart.
    assert found.before.kl == pytest.approx(expected.before.kl, rel=0.2)
    assert found.after.kl < found.before.kl


def test_hidden_states_are_not_mapped(place: Place, permuted_teacher: Path) -> None:
    place.config |= {"targets": EXACT, "teacher": str(permuted_teacher)}
    with pytest.raises(InputError, match=r"targets\.preset exact: keeps hidden states"):
        place.run("a")
    assert not (place.root / "cache").exists()


def test_a_reply_that_the_student_cannot_write_is_left_out(place: Place, tokenizer_folder: Path) -> None:
    lacking_student(place, tokenizer_folder, "Ġmat")
    other = {"prompt": "hi", "completion": "the cat sat"}
    place.write("a", [*SCORED[:2], *[other] * 2], [other])
    data = place.run("a").results["a"].data
    assert (data.train_examples, data.dropped, data.mapped) == (2, 2, None)


def lacking_student(place: Place, tokenizer_folder: Path, token: str) -> None:
    """Give the place a student whose vocabulary lacks one token of the teacher's, and is the same but for that."""
    folder = save_random_model(place.root / "lacking", tokenizer_folder, seed=2)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    del vocabulary[token]
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [pair for pair in merges if "".join(pair) != token and token not in pair]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    place.config["student"] = str(folder)


@pytest.mark.parametrize("strategy", ["auto", "truncate"])
def test_a_checkable_reply_that_the_student_cannot_write_does_not_stop_the_domain(
    place: Place, tokenizer_folder: Path, strategy: str
) -> None:
    lacking_student(place, tokenizer_folder, "Ġmat")
    other = {"prompt": "hi", "completion": "the cat sat", "answer": "the cat sat"}
    place.write("a", [other] * 4, [other, {**SCORED[0], "answer": "the cat sat on the mat"}])
    run = place.run("a", vocab_strategy=strategy)
    assert run.failures == {}
    assert run.results["a"].proof.tasks == 2
    assert run.results["a"].proof.teacher.exact_match is None, "the data wrote the replies, not the teacher"


@pytest.mark.parametrize("preset", ["default", "exact"])
@pytest.mark.parametrize(("teacher_rows", "student_rows"), [(320, 352), (352, 320)])
def test_heads_with_more_padding_rows_just_work(
    place: Place, tokenizer_folder: Path, teacher_rows: int, student_rows: int, preset: str
) -> None:
    place.config["targets"] = {"preset": preset}
    teacher = save_random_model(place.root / "teacher", tokenizer_folder, seed=1, vocab_size=teacher_rows)
    student = save_random_model(place.root / "student", tokenizer_folder, seed=2, vocab_size=student_rows)
    place.config["training"]["iters"] = 4
    place.config |= {"teacher": str(teacher), "student": str(student)}
    place.write("a", SCORED, SCORED[:2])
    result = place.run("a").results["a"]
    assert (result.data.train_examples, result.data.dropped) == (len(SCORED), 0)
    assert result.after.loss < result.before.loss


def test_a_quantised_student_gets_an_adapter(place: Place, quantised_folder: Path) -> None:
    place.config["training"]["iters"] = 4
    place.config["student"] = {"model": str(quantised_folder), "dequantize": "never"}
    result = place.run("a").results["a"]
    assert result.after.loss < result.before.loss


# Prompts and folders


def test_a_domain_of_plain_text_lines_holds_out_a_tenth(place: Place) -> None:
    folder = place.root / "prompts" / "plain"
    folder.mkdir()
    (folder / "train.txt").write_text("".join(f"say hello to cat {count}\n" for count in range(20)))
    data = place.run("plain").results["plain"].data
    assert (data.train_examples, data.valid_examples) == (18, 2)


def test_all_kinds_of_prompts_go_together(place: Place) -> None:
    kinds = [
        "say hello",
        SCORED[0],
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {"text": "the cat sat on the mat"},
        {"prompt": "call", "tools": [{"type": "function", "function": {"name": "sit"}}]},
    ]
    place.write("a", kinds, kinds[:3])
    data = place.run("a").results["a"].data
    assert (data.train_examples, data.valid_examples, data.dropped) == (len(kinds), 3, 0)


def test_a_folder_in_use_is_refused(place: Place) -> None:
    running = place.start("a")
    next(running)
    with pytest.raises(LockedError, match="in use"):
        place.run("a")
    running.close()


@pytest.mark.parametrize("end", ["finished", "stopped", "refused"])
def test_a_folder_is_free_after_a_run(place: Place, end: str) -> None:
    if end == "finished":
        place.run("a")
    elif end == "stopped":
        running = place.start("a")
        next(running)
        running.close()
    else:
        with pytest.raises(ModelError):
            place.run("a", teacher__model="./nowhere")
    assert place.run("a").failures == {}


def test_a_run_prints_nothing(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.run("a")
    assert capsys.readouterr() == ("", "")


def test_domains_may_differ_in_options(place: Place) -> None:
    place.write("b")
    (place.root / "b.yaml").write_text("training: {iters: 1}\nlora: {rank: 3}\n")
    run = place.run("a", "b")
    assert {name: len(result.steps) for name, result in run.results.items()} == {"a": 2, "b": 1}
