"""A few held-out prompts are compared before all is captured: once, without waste, and one model at a time."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import save_random_model
from test_pipeline import EXACT, SLACK, Place, Run, active_memory, metrics_of, plan_of, size_of

from true_kd import events
from true_kd.capture import CaptureOptions, render_for
from true_kd.errors import ModelError, shared_exit_code
from true_kd.evaluation import EvaluationOptions, extract_answer
from true_kd.gate import Headroom, NothingToTeach
from true_kd.manifest import SHARD, read_manifest
from true_kd.models import ModelOptions, SamplingOptions, generate_replies, open_model
from true_kd.pipeline import capture
from true_kd.prompts import from_strings

TRAIN = tuple(f"say hello to {count} cats on the mat" for count in range(12))
VALID = tuple(f"who said hello to cat {count}" for count in range(3))


@pytest.fixture
def place(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Place:
    """A place with one domain, `a`, that is probed on two of its prompts."""
    place = Place(tmp_path, teacher_folder, student_folder, gate={"prompts": 2})
    place.write("a", TRAIN, VALID)
    return place


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A random model some hundred times the size of the others: 12 MB."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768, "num_attention_heads": 4}
    return save_random_model(tmp_path_factory.mktemp("large"), tokenizer_folder, seed=5, **sizes)


@pytest.fixture(autouse=True, scope="module")
def fast_collection() -> Iterator[None]:
    """What tests import is set aside, as in test_pipeline."""
    gc.freeze()
    yield
    gc.unfreeze()


def headroom_of(run: Run, domain: str = "a") -> Headroom:
    [found] = [event.headroom for event in run.of(events.Probed) if event.domain == domain]
    return found


def replies_in(place: Place) -> int:
    [folder] = [path.parent for path in (place.root / "cache").glob("*/manifest.jsonl")]
    return sum(file.replies for name, file in read_manifest(folder).items() if SHARD.fullmatch(name))


def was_probed(run: Run, domain: str = "a") -> bool:
    """Whether a sample was captured before all."""
    return any(event.domain == domain and event.is_probe for event in run.of(events.Captured))


# When


def test_a_sample_is_compared_before_all_is_captured(place: Place) -> None:
    run = place.run("a")
    assert run.failures == {}
    steps = [type(event) for event in run.events]
    steps = [step for at, step in enumerate(steps) if step not in steps[:at][-1:]]
    assert steps[: steps.index(events.TrainingStarted) + 1] == [
        events.TeacherOpening,
        events.Captured,
        events.Probed,
        events.TeacherOpening,
        events.Captured,
        events.TeacherFreed,
        events.TrainingStarted,
    ]
    assert steps[-2:] == [events.DomainFinished, events.RunFinished]
    assert headroom_of(run).prompts == 2


def test_what_the_sample_captured_is_not_captured_again(place: Place) -> None:
    run = place.run("a")
    of_sample, of_all = (
        [event.progress for event in run.of(events.Captured) if event.is_probe == is_probe]
        for is_probe in (True, False)
    )
    assert (of_sample[0].done, of_sample[-1].done, of_sample[-1].total) == (0, 2, 2)
    assert (of_all[0].done, of_all[-1].done, of_all[-1].total) == (2, 15, 15)
    assert replies_in(place) == 15


def test_an_adapter_is_the_same_with_and_without_a_probe(place: Place) -> None:
    place.config["lora"] = {"rank": 2, "dropout": 0.3}
    assert was_probed(place.run("a"))
    weights, metrics = place.weights(), metrics_of(place)["result"]
    plain = place.run("a", gate__prompts=0, fresh=True, cache=str(place.root / "another cache"))
    assert not was_probed(plain)
    assert place.weights() == weights
    assert metrics_of(place)["result"]["proof"] == metrics["proof"]


@pytest.mark.parametrize("count", [5, 6])
def test_a_domain_of_few_prompts_is_not_probed(count: int, place: Place) -> None:
    """Five and three are no more than four times the two of a sample; nine are."""
    place.write("a", TRAIN[:count], VALID)
    run = place.run("a")
    assert was_probed(run) is (count == 6)
    assert len(run.of(events.TeacherOpening)) == (2 if count == 6 else 1)


def test_what_was_captured_before_is_not_probed(place: Place) -> None:
    place.run("a")
    run = place.run("a", fresh=True)
    assert not was_probed(run)
    assert run.of(events.TeacherOpening) == []
    assert headroom_of(run).prompts == 3, "all of them are compared"


def test_a_finished_domain_is_not_probed(place: Place) -> None:
    place.run("a")
    assert place.run("a").of(events.Probed) == []


def test_without_a_probe_all_held_out_prompts_are_compared_when_they_are_captured(place: Place) -> None:
    run = place.run("a", gate__prompts=0)
    assert headroom_of(run).prompts == 3
    kinds = [type(event) for event in run.events]
    assert kinds.index(events.TeacherFreed) < kinds.index(events.Probed) < kinds.index(events.Stepped)
    assert kinds.count(events.TeacherOpening) == 1


def test_a_capture_alone_is_not_probed(place: Place) -> None:
    seen = list(capture(*plan_of(place, "a")))
    assert not any(isinstance(event, events.Probed) for event in seen)
    assert replies_in(place) == 15


def test_more_prompts_than_there_are_make_a_sample_of_all(place: Place) -> None:
    place.write("a", [f"{text} {more}" for text in TRAIN for more in "abcde"], VALID)
    run = place.run("a", gate__prompts=10)
    assert headroom_of(run).prompts == 3


def test_a_headroom_on_all_prompts_is_in_the_proof(place: Place) -> None:
    run = place.run("a")
    proof = run.results["a"].proof
    assert proof.headroom.prompts == proof.examples == 3
    assert headroom_of(run).prompts == 2
    assert proof.headroom.kl == proof.student.kl


# One model at a time


def test_the_teacher_is_opened_twice_at_most_for_all_domains(place: Place) -> None:
    for domain in ("b", "c"):
        place.write(domain, [f"{text} {domain}" for text in TRAIN], [f"{text} {domain}" for text in VALID])
    run = place.run("a", "b", "c")
    assert len(run.of(events.TeacherOpening)) == 2
    assert [event.domain for event in run.of(events.Probed)] == ["a", "b", "c"]
    assert run.failures == {}


def test_the_teacher_is_gone_when_the_student_is_compared(place: Place, large_folder: Path) -> None:
    place.config["teacher"] = str(large_folder)
    held = active_memory()
    seen = [active_memory() - held for event in place.start("a") if isinstance(event, events.Probed)]
    assert len(seen) == 1
    assert seen[0] < SLACK


def test_the_student_is_gone_when_the_teacher_is_opened_again(place: Place, large_folder: Path) -> None:
    place.config["student"] = str(large_folder)
    held = active_memory()
    seen = [active_memory() - held for event in place.start("a") if isinstance(event, events.TeacherOpening)]
    assert len(seen) == 2
    assert max(seen) < SLACK


def test_students_of_several_domains_are_compared_one_at_a_time(
    place: Place, large_folder: Path, tmp_path: Path
) -> None:
    place.config["student"] = str(large_folder)
    place.write("b", [f"{text} b" for text in TRAIN], VALID)
    (place.root / "b.yaml").write_text(f"student: {place.root / 'twin'}\n")
    (place.root / "twin").symlink_to(large_folder)
    held = active_memory()
    seen = [active_memory() - held for event in place.start("a", "b") if isinstance(event, events.Probed)]
    assert len(seen) == 2
    assert max(seen) < size_of(large_folder) + SLACK


# What it decides


def refusing(place: Place, teacher_folder: Path, **gate: Any) -> Place:
    """The place with a domain `same`, whose student is the teacher itself, measured without the noise of a sample."""
    place.config["targets"] = EXACT
    place.write("same", [f"{text} again" for text in TRAIN], [f"{text} again" for text in VALID])
    (place.root / "same.yaml").write_text(json.dumps({"student": str(teacher_folder), "gate": gate}))
    return place


def test_a_domain_with_nothing_to_learn_is_refused_before_it_is_captured_and_the_other_goes_on(
    place: Place, teacher_folder: Path
) -> None:
    run = refusing(place, teacher_folder, when_no_better="refuse").run("same", "a")
    error = run.failures["same"]
    assert isinstance(error, NothingToTeach)
    assert shared_exit_code([error]) == 2
    assert "already says what the teacher says" in run.summary["failed"]["same"]
    assert headroom_of(run, "same").standing == "same"
    assert list(run.results) == ["a"]
    assert replies_in(place) == 2 + 15, "of the refused domain only the sample"
    assert [path.name for path in (place.out / "same").iterdir()] == []


def test_the_command_line_ends_with_the_code_of_an_input_that_is_refused(
    cli, place: Place, teacher_folder: Path
) -> None:
    place.config |= {"gate": {"prompts": 2, "when_no_better": "refuse"}, "targets": EXACT}
    (place.root / "base.yaml").write_text(json.dumps({**place.config, "student": str(teacher_folder)}))
    ended = cli("distill", "-d", "a", "--config", str(place.root / "base.yaml"))
    assert ended.code == 2
    assert ended.err.startswith("a: failed. gate: the student already says what the teacher says")
    assert ended.err.count("\n") == 1
    assert "a: the student already says what the teacher says" in ended.out


def test_a_warning_lets_the_domain_go_on(place: Place, teacher_folder: Path) -> None:
    run = refusing(place, teacher_folder, when_no_better="warn").run("same")
    assert run.failures == {}
    assert headroom_of(run, "same").standing == "same"
    assert run.results["same"].proof.verdict.outcome == "nothing to learn"


def test_without_a_probe_the_refusal_comes_before_the_training(place: Place, teacher_folder: Path) -> None:
    run = refusing(place, teacher_folder, when_no_better="refuse").run("same", "a", gate__prompts=0)
    assert isinstance(run.failures["same"], NothingToTeach)
    assert not (place.out / "same" / "adapters.safetensors").exists()
    assert all(event.domain == "a" for event in run.of(events.Stepped))
    assert list(run.results) == ["a"]


def answered_by(folder: Path, prompts: Sequence[str], greedy: SamplingOptions) -> list[dict[str, Any]]:
    """Prompts with what a model writes to them as their answer."""
    model = open_model(ModelOptions(model=str(folder)), "teacher")
    asked = [item.rendered.prompt for item in render_for(model, from_strings(list(prompts)), CaptureOptions())]
    *_, (_, replies) = generate_replies(model, asked, greedy, [0] * len(asked))
    texts = [
        model.tokenizer.decode([token for token in reply.tokens if token not in model.stop_ids]) for reply in replies
    ]
    return [
        {"prompt": prompt, "answer": extract_answer(text, EvaluationOptions())}
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def test_right_answers_say_who_is_better(place: Place, teacher_folder: Path, student_folder: Path) -> None:
    place.config["capture"] = {"max_tokens": 4, "sampling_temperature": 0.0}
    greedy = SamplingOptions(sampling_temperature=0.0, max_tokens=4)
    for folder, standing, shares in ((teacher_folder, "better", (1.0, 0.0)), (student_folder, "no better", (0.0, 1.0))):
        asked = [f"who said hello to cat {number}" for number in range(5)]
        place.write("a", TRAIN, answered_by(folder, asked, greedy))
        run = place.run("a", cache=str(place.root / standing), fresh=True, gate__prompts=0)
        found = headroom_of(run)
        assert found.standing == standing
        assert (found.teacher_right.value, found.student_right.value) == shares
        assert run.results["a"].proof.headroom.standing == standing
        assert run.results["a"].proof.tasks == 5


def test_a_few_answers_say_nothing(place: Place) -> None:
    place.write("a", TRAIN, [{"prompt": text, "answer": "here"} for text in VALID])
    assert headroom_of(place.run("a")).standing == "unknown"


def test_replies_of_the_data_say_who_is_better(place: Place) -> None:
    given = [{"prompt": text, "completion": "the cat sat on the mat"} for text in VALID]
    place.write("a", TRAIN, given)
    run = place.run("a")
    found = headroom_of(run)
    assert found.standing == ("better" if found.teacher_nll < found.student_nll else "no better")
    place.write("a", TRAIN, [*given[:1], *VALID[1:]])
    assert headroom_of(place.run("a", cache=str(place.root / "another"))).standing == "unknown", "some are its own"


def test_a_change_of_the_gate_finds_the_run_finished(place: Place) -> None:
    place.run("a")
    assert place.run("a", gate__prompts=0, gate__when_no_better="refuse").results["a"].unchanged


# What goes wrong


def test_a_sample_that_leaves_no_room_for_a_reply_says_nothing_of_its_domain(place: Place) -> None:
    place.write("b", TRAIN, ["the cat sat on the mat " * 20] * 2 + [VALID[0]])
    run = place.run("b", "a", training__max_seq_length=60)
    assert run.failures == {}
    assert run.results["b"].proof.examples == 1


def test_a_student_that_cannot_be_opened_fails_its_domain_alone(place: Place, tokenizer_folder: Path) -> None:
    cut = save_random_model(place.root / "cut", tokenizer_folder, seed=2)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    place.write("b", [f"{text} b" for text in TRAIN], VALID)
    (place.root / "b.yaml").write_text(f"student: {cut}\n")
    run = place.run("b", "a")
    assert isinstance(run.failures["b"], ModelError)
    assert list(run.results) == ["a"]
    assert replies_in(place) == 2 + 15 - len(VALID[:2]), (
        "the two share their sample, and of `b` nothing else is captured"
    )


def test_a_student_whose_weights_are_damaged_is_refused_before_all_is_captured(
    place: Place, tokenizer_folder: Path
) -> None:
    poisoned = save_random_model(place.root / "poisoned", tokenizer_folder, seed=2)
    weights = mx.load(str(poisoned / "model.safetensors"))
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    mx.save_safetensors(str(poisoned / "model.safetensors"), weights)
    run = place.run("a", student__model=str(poisoned))
    assert isinstance(run.failures["a"], ModelError)
    assert [event.headroom.standing for event in run.of(events.Probed)] == [], "nothing can be said of it"
    assert replies_in(place) == 2


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_sample_whose_head_is_damaged_is_mended(damage: str, place: Place) -> None:
    """Hidden states of the sample are in the cache, and what reads them is not."""
    place.config["targets"] = EXACT
    place.run("a")
    [head] = (place.root / "cache").glob("*/head.safetensors")
    if damage == "gone":
        head.unlink()
    else:
        head.write_bytes(head.read_bytes()[:-1])
    place.write("a", [f"{text} anew" for text in TRAIN], VALID)
    run = place.run("a")
    assert run.failures == {}
    assert headroom_of(run).prompts == 2


def test_a_run_that_is_stopped_in_its_probe_goes_on(place: Place) -> None:
    expected = place.run("a")
    weights = place.weights()
    elsewhere = {"cache": str(place.root / "another"), "out": str(place.root / "another out")}
    for event in place.start("a", **elsewhere):
        if isinstance(event, events.Probed):
            break
    run = place.run("a", **elsewhere)
    assert (place.root / "another out" / "a" / "adapters.safetensors").read_bytes() == weights
    assert headroom_of(run) == headroom_of(expected)
