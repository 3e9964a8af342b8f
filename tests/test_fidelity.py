"""The certificate says of cached targets what full logits would say, refuses poor ones, and changes nothing itself."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_pipeline import WEIGHTS, Place, Run, files_of

from true_kd import events
from true_kd.batching import collate
from true_kd.errors import PoorTargetsError
from true_kd.evaluation import evaluate
from true_kd.examples import Example
from true_kd.fidelity import Fidelity, FidelityOptions, Position, certify
from true_kd.files import read_record, write_record
from true_kd.losses import Divergence, ForwardKL, LossOptions, Objective, compute_kd_loss
from true_kd.losses.divergences import JensenShannon, ReverseKL, SkewedReverseKL
from true_kd.manifest import SHARD
from true_kd.models import LoraOptions, ModelOptions, add_lora, open_model
from true_kd.reporting import read_result
from true_kd.targets import HiddenTargets, SparseTargets, TargetOptions, TargetSettings, TeacherHead, encode
from true_kd.training import Gradients, sum_gradients

PROMPT, RESPONSE, COUNT = 6, 40, 8
ALL = FidelityOptions(tokens=10**6)
FORWARD_KL = ForwardKL()


@dataclass(frozen=True, eq=False)
class Subject:
    """A random student with an adapter, and what a random teacher thinks of random replies."""

    student: nn.Module
    tokens: np.ndarray
    """int32 [COUNT, PROMPT + RESPONSE]."""
    logits: np.ndarray
    """The teacher's at the response tokens, float32 [COUNT, RESPONSE, vocab]."""

    @cache  # noqa: B019 - lives as long as the module's fixtures
    def examples(self, settings: TargetSettings, seed: int = 0) -> list[Example]:
        """The replies with sparse targets; a sample of the tail per seed."""
        rng = np.random.default_rng(seed)
        found = []
        for number, (tokens, logits) in enumerate(zip(self.tokens, self.logits, strict=True)):
            response, uniforms = tokens[PROMPT:], rng.random(RESPONSE, dtype=np.float32)
            targets = encode(mx.array(logits), mx.array(response), uniforms, settings)
            kept = np.arange(RESPONSE, dtype=np.int32)
            weights = np.ones(RESPONSE, dtype=np.float32)
            found.append(Example(tokens[:PROMPT], response, targets, kept, weights, f"prompts:{number}"))
        return found

    @cache  # noqa: B019
    def true_gradient(self, temperature: float, divergence: Divergence = FORWARD_KL) -> tuple[np.ndarray, float]:
        """The adapter's gradient of the mean T^2 divergence over the whole vocabulary, float64, and that mean."""
        teacher = mx.array(self.logits)

        def loss() -> mx.array:
            logits = self.student(mx.array(self.tokens))[:, PROMPT - 1 : -1]
            return compute_kd_loss(teacher, logits, temperature, divergence)

        value, gradient = nn.value_and_grad(self.student, loss)()
        return flat(gradient), value.item()

    def gradient(
        self, examples: Sequence[Example], temperature: float, divergence: Divergence = FORWARD_KL
    ) -> tuple[np.ndarray, float]:
        """The adapter's gradient of the mean KD loss as training has it, float64, and that mean."""
        count = sum(len(example.kept) for example in examples)
        objective = Objective(divergence, temperature, 1.0, None)
        sums, gradient = sum_gradients(Gradients(self.student), [collate(examples, temperature)], objective, count)
        return flat(gradient), sums.kd.item() / count


def flat(gradient: Any) -> np.ndarray:
    return np.concatenate([np.array(leaf).astype(np.float64).ravel() for _, leaf in tree_flatten(gradient)])


def cosine_of(left: np.ndarray, right: np.ndarray) -> float:
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


def degrees(cosine: float) -> float:
    return math.degrees(math.acos(min(1.0, max(0.0, cosine))))


def keep(threshold: float = 0.02, draw_temperature: float = 2.0) -> TargetSettings:
    return TargetOptions(threshold=threshold, draw_temperature=draw_temperature).settings


def certified(
    subject: Subject,
    examples: Sequence[Example],
    temperature: float = 2.0,
    batch_size: int = 8,
    divergence: Divergence = FORWARD_KL,
    **options: Any,
) -> Fidelity:
    """The certificate of all the examples."""
    given = FidelityOptions(**options) if options else ALL
    objective = Objective(divergence, temperature, 0.7, None)
    return certify(subject.student, examples, objective, batch_size, given, 6400, 320)


@pytest.fixture(scope="module")
def subject(teacher_folder: Path, student_folder: Path) -> Subject:
    teacher = open_model(ModelOptions(model=str(teacher_folder)), "teacher").module
    student = open_model(ModelOptions(model=str(student_folder)), "student").module
    tokens = np.random.default_rng(7).integers(6, 300, (COUNT, PROMPT + RESPONSE)).astype(np.int32)
    logits = np.array(teacher(mx.array(tokens))[:, PROMPT - 1 : -1].astype(mx.float32))
    mx.random.seed(0)
    add_lora(student, LoraOptions(rank=4))
    student.eval()
    return Subject(student, tokens, logits)


# The cosine


SETTINGS = {
    "threshold 0.2 drawn for 2": keep(0.2),
    "threshold 0.05 drawn for 2": keep(0.05),
    "preset default": TargetOptions().settings,
    "preset hot": TargetOptions(preset="hot").settings,
    "preset tiny": TargetOptions(preset="tiny").settings,
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_estimated_angle_is_near_that_to_the_gradient_from_full_logits(
    temperature: float, settings: TargetSettings, subject: Subject
) -> None:
    truth, _ = subject.true_gradient(temperature)
    true, estimated = [], []
    for seed in range(3):
        examples = subject.examples(settings, seed)
        true.append(degrees(cosine_of(subject.gradient(examples, temperature)[0], truth)))
        estimated.append(certified(subject, examples, temperature).angle)
    # Of some degrees it may say twice as many, but hardly fewer than there are; of noise alone, that it is noise.
    assert 0.75 * np.mean(true) - 0.5 < np.mean(estimated) < 2.0 * np.mean(true) + 0.5, (true, estimated)


@pytest.mark.parametrize("preset", ["default", "hot"])
def test_the_estimated_angle_is_hardly_larger_than_the_true_one(preset: str, subject: Subject) -> None:
    """Otherwise sound targets are refused: here those of preset default, at a true cosine of 0.93."""
    truth, _ = subject.true_gradient(2.0)
    samples = [subject.examples(TargetOptions(preset=preset).settings, seed) for seed in range(3)]
    true = [degrees(cosine_of(subject.gradient(examples, 2.0)[0], truth)) for examples in samples]
    estimated = [certified(subject, examples).angle for examples in samples]
    assert np.mean(estimated) < 1.15 * np.mean(true), (true, estimated)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_a_finer_threshold_raises_the_cosine(temperature: float, subject: Subject) -> None:
    found = [
        np.mean([certified(subject, subject.examples(keep(threshold), seed), temperature).cosine for seed in range(2)])
        for threshold in (0.3, 0.03, 0.003)
    ]
    assert found == sorted(found)
    assert found[0] < found[-1]


def with_hidden(example: Example) -> Example:
    """The example with hidden states that stand for logits themselves."""
    states = np.random.default_rng(0).normal(0, 3, (len(example.kept), 320)).astype(np.float16)
    return replace(example, targets=HiddenTargets(states, TeacherHead(lambda states: states)))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_hidden_states_are_certified_as_exact(temperature: float, subject: Subject) -> None:
    found = certified(subject, [with_hidden(example) for example in subject.examples(keep())], temperature)
    assert (found.cosine, found.angle, found.tail_mass, found.kl_floor) == (1.0, 0.0, 0.0, 0.0)
    assert (found.tokens, found.temperature) == (COUNT * RESPONSE, temperature)


def test_where_nothing_was_drawn_nothing_is_noise(subject: Subject) -> None:
    examples = subject.examples(keep(0.02))
    only_exact = [replace(example, targets=without_draws(example.targets)) for example in examples]
    found = certified(subject, only_exact, 1.0)
    assert (found.cosine, found.kl_floor) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-6))


def without_draws(targets: SparseTargets) -> SparseTargets:
    """Targets whose tail is empty."""
    counts = np.bincount(targets.rows, targets.exact, minlength=len(targets))
    return replace(
        targets,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        ids=targets.ids[targets.exact],
        logprob_codes=targets.logprob_codes[targets.exact],
        exact=targets.exact[targets.exact],
        tail_codes=np.zeros_like(targets.tail_codes),
    )


@pytest.fixture(scope="module")
def sure(subject: Subject) -> Subject:
    """With a teacher so sure that nothing of its tail is drawn at temperature 1; at 4 the tail is 90 % of it."""
    logits, labels = subject.logits * 0.3, subject.tokens[:, PROMPT:, None].astype(np.int64)
    np.put_along_axis(logits, labels, logits.max(axis=-1, keepdims=True) + 12.0, axis=-1)
    return replace(subject, logits=logits)


def test_a_tail_that_was_never_drawn_is_seen_where_it_weighs(sure: Subject) -> None:
    examples = sure.examples(TargetOptions(preset="tiny").settings)
    true = cosine_of(sure.gradient(examples, 4.0)[0], sure.true_gradient(4.0)[0])
    assert true < 0.9
    assert certified(sure, examples, 4.0).cosine < true


def test_a_tail_that_was_never_drawn_raises_the_floor(sure: Subject) -> None:
    examples = sure.examples(TargetOptions(preset="tiny").settings)
    _, truth = sure.true_gradient(4.0)
    _, found = sure.gradient(examples, 4.0)
    assert found < 0.8 * truth
    assert certified(sure, examples, 4.0).kl_floor > 0.05 * truth


@pytest.mark.parametrize(
    "missing",
    [
        0.3,
        0.8,
    ],
)
def test_ids_that_the_student_lacks_are_no_fault_of_the_sample(missing: float, subject: Subject) -> None:
    """Full logits have no more to say of them: their mass is left unassigned either way."""
    id_map = np.where(np.random.default_rng(1).random(320) < missing, -1, np.arange(320)).astype(np.int32)
    examples = subject.examples(keep(0.02))
    mapped = [replace(example, targets=example.targets.with_ids(id_map)) for example in examples]
    full = [replace(example, targets=example.targets.with_ids(id_map)) for example in subject.examples(keep(0.001))]
    true = degrees(cosine_of(subject.gradient(mapped, 2.0)[0], subject.gradient(full, 2.0)[0]))
    assert 0.75 * true < certified(subject, mapped).angle < 2.0 * true


# Other divergences


@pytest.mark.parametrize("divergence", [JensenShannon(0.5), SkewedReverseKL(0.1)], ids=["JS", "skewed"])
@pytest.mark.parametrize(
    ("temperature", "settings"),
    [(1.0, keep(0.05)), (2.0, keep()), (4.0, TargetOptions(preset="hot").settings)],
    ids=["1", "2", "4"],
)
def test_the_angle_of_another_divergence_is_near_that_to_its_gradient_from_full_logits(
    temperature: float, settings: TargetSettings, divergence: Divergence, subject: Subject
) -> None:
    truth, _ = subject.true_gradient(temperature, divergence)
    true, estimated = [], []
    for seed in range(2):
        examples = subject.examples(settings, seed)
        true.append(degrees(cosine_of(subject.gradient(examples, temperature, divergence)[0], truth)))
        estimated.append(certified(subject, examples, temperature, divergence=divergence).angle)
    assert 0.75 * np.mean(true) - 0.5 < np.mean(estimated) < 2.0 * np.mean(true) + 0.5, (true, estimated)


@pytest.mark.parametrize("settings", [keep(0.2), keep()], ids=["coarse", "default"])
def test_the_floor_of_jensen_shannon_is_the_spread_of_its_value_over_other_draws(
    settings: TargetSettings, subject: Subject
) -> None:
    divergence = JensenShannon(0.5)
    objective = Objective(divergence, 2.0, 1.0, None)
    _, truth = subject.true_gradient(2.0, divergence)
    samples = [subject.examples(settings, seed) for seed in range(8)]
    spread = math.sqrt(np.mean([(mean_kd(subject, examples, objective) - truth) ** 2 for examples in samples]))
    floor = np.mean([certified(subject, examples, divergence=divergence).kl_floor for examples in samples[:2]])
    assert 0.7 * spread < floor < 3.0 * spread


def test_a_divergence_that_no_sample_gives_is_certified_by_forward_kl(subject: Subject) -> None:
    examples = subject.examples(keep(0.1))
    found = certified(subject, examples, divergence=ReverseKL())
    assert found == certified(subject, examples)
    assert found != certified(subject, examples, divergence=JensenShannon(0.5))


# The rest of the certificate


@pytest.mark.parametrize(
    ("temperature", "settings"),
    [(2.0, keep(0.2)), (2.0, keep()), (4.0, keep()), (4.0, TargetOptions(preset="hot").settings)],
    ids=["2 coarse", "2 default", "4 default", "4 hot"],
)
def test_the_floor_is_the_spread_of_the_kl_over_other_draws(
    temperature: float, settings: TargetSettings, subject: Subject
) -> None:
    _, truth = subject.true_gradient(temperature)
    samples = [subject.examples(settings, seed) for seed in range(8)]
    objective = LossOptions(temperature=temperature).final
    spread = math.sqrt(np.mean([(mean_kd(subject, examples, objective) - truth) ** 2 for examples in samples]))
    floor = np.mean([certified(subject, examples, temperature).kl_floor for examples in samples[:2]])
    # A systematic sample is a little better than the independent draws that the floor assumes.
    assert 0.7 * spread < floor < 3.0 * spread


def mean_kd(subject: Subject, examples: Sequence[Example], objective: Objective) -> float:
    return evaluate(subject.student, examples, objective, COUNT).kd


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0])
def test_the_tail_mass_is_what_the_exact_ids_leave_of_the_dense_distribution(
    temperature: float, subject: Subject
) -> None:
    examples = subject.examples(keep())
    found = certified(subject, examples, temperature)
    assert found.tail_mass == pytest.approx(np.mean(true_tails(subject, examples, temperature)), abs=0.01)


def true_tails(subject: Subject, examples: Sequence[Example], temperature: float) -> np.ndarray:
    """Mass of the teacher's softened distribution beyond the exact ids, [COUNT, RESPONSE]."""
    powers = np.exp((subject.logits - subject.logits.max(axis=-1, keepdims=True)).astype(np.float64) / temperature)
    probabilities = powers / powers.sum(axis=-1, keepdims=True)
    tails = np.ones((len(examples), RESPONSE))
    for number, example in enumerate(examples):
        rows, ids = example.targets.rows[example.targets.exact], example.targets.ids[example.targets.exact]
        np.subtract.at(tails[number], rows, probabilities[number][rows, ids])
    return tails


def test_the_worst_positions_are_those_with_the_most_tail_mass(subject: Subject) -> None:
    examples = subject.examples(keep())
    tails = true_tails(subject, examples, 2.0)
    for place in certified(subject, examples).worst:
        at = int(place.where.removeprefix("prompts:")), place.token
        assert place.tail_mass == pytest.approx(tails[at], abs=0.02)
        assert np.count_nonzero(tails > tails[at] + 0.02) <= 3
    masses = [place.tail_mass for place in certified(subject, examples).worst]
    assert masses == sorted(masses, reverse=True)
    assert len(masses) == 3


def test_the_worst_positions_are_counted_in_the_whole_reply_where_a_share_is_kept(subject: Subject) -> None:
    kept = np.array([3, 11, 37], dtype=np.int32)
    whole = subject.examples(keep())
    some = [
        replace(example, targets=example.targets.take(kept), kept=kept, weights=example.weights[kept])
        for example in whole
    ]
    found = certified(subject, some)
    assert found.tokens == COUNT * 3
    for place in found.worst:
        number = int(place.where.removeprefix("prompts:"))
        assert place.token in kept
        assert place.tail_mass == whole[number].targets.tail_mass(2.0)[place.token]


@pytest.mark.parametrize(("asked", "looked_at"), [(1, 40), (40, 40), (41, 80), (200, 200), (10**6, 320)])
def test_the_first_replies_are_looked_at_until_there_are_tokens_enough(
    asked: int, looked_at: int, subject: Subject
) -> None:
    found = certified(subject, subject.examples(keep()), tokens=asked)
    assert found.tokens == looked_at
    assert {int(place.where.removeprefix("prompts:")) for place in found.worst} <= set(range(looked_at // RESPONSE))


def test_bytes_are_those_of_the_cache(subject: Subject) -> None:
    found = certify(subject.student, subject.examples(keep())[:1], LossOptions().final, 8, ALL, 5000, 100)
    assert (found.cache_bytes, found.bytes_per_token) == (5000, 50.0)


# What it does to the run


def test_the_same_targets_have_the_same_certificate(subject: Subject) -> None:
    examples = subject.examples(keep())
    first = certified(subject, examples)
    mx.random.seed(5)
    np.random.default_rng(5).random()
    assert certified(subject, examples) == first


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_size_of_batches_changes_nothing(batch_size: int, subject: Subject) -> None:
    examples = subject.examples(keep(0.1))
    expected, found = certified(subject, examples), certified(subject, examples, batch_size=batch_size)
    assert found.cosine == pytest.approx(expected.cosine, abs=1e-4)
    assert found.kl_floor == pytest.approx(expected.kl_floor, rel=1e-3)


def test_the_weight_of_the_kd_loss_and_the_chunks_change_nothing(subject: Subject) -> None:
    examples = subject.examples(keep(0.1))
    other = certify(subject.student, examples, LossOptions(alpha=0.1, chunk=32).final, 8, ALL, 6400, 320)
    assert other.cosine == pytest.approx(certified(subject, examples).cosine, abs=1e-4)


def test_weights_and_random_state_are_left_as_they_were(subject: Subject, student_folder: Path) -> None:
    student = open_model(ModelOptions(model=str(student_folder)), "student").module
    mx.random.seed(3)
    add_lora(student, LoraOptions(rank=4, dropout=0.3))
    student.train()
    before = {name: np.array(value) for name, value in tree_flatten(student.parameters())}
    state = [np.array(value) for value in mx.random.state]
    certify(student, subject.examples(keep()), LossOptions().final, 8, ALL, 1, 1)
    assert all((np.array(value) == before[name]).all() for name, value in tree_flatten(student.parameters()))
    assert all((np.array(value) == old).all() for value, old in zip(mx.random.state, state, strict=True))
    assert not student.training


@pytest.mark.parametrize(
    ("cosine", "tokens", "when_poor", "poor", "refuses"),
    [
        (0.8, 200, "refuse", True, True),
        (0.8, 199, "refuse", True, False),
        (0.8, 200, "warn", True, False),
        (0.9, 200, "refuse", False, False),
        (1.0, 200, "refuse", False, False),
    ],
)
def test_poor_targets_are_refused_where_there_are_tokens_enough_to_say_so(
    cosine: float, tokens: int, when_poor: str, poor: bool, refuses: bool
) -> None:
    options = FidelityOptions(when_poor=when_poor)
    found = Fidelity(2.0, tokens, 0.5, 0.1, cosine, (), 20.0, 1000)
    assert (found.is_poor(options), found.refuses(options)) == (poor, refuses)


@pytest.mark.parametrize(("cosine", "angle"), [(1.0, 0.0), (math.sqrt(0.5), 45.0), (0.0, 90.0)])
def test_the_angle_is_in_degrees(cosine: float, angle: float) -> None:
    assert Fidelity(2.0, 1, 0.0, 0.0, cosine, (), 1.0, 1).angle == pytest.approx(angle)


# A run


LONG = "the cat sat on the mat and said hello to the world " * 3
GIVEN = [{"prompt": f"say hello to {count} cats", "completion": LONG} for count in range(16)]
POOR = {"targets": {"preset": "tiny"}, "losses": {"temperature": 4.0}}


@pytest.fixture(autouse=True, scope="module")
def fast_collection() -> Iterator[None]:
    """What tests import is set aside: looking through it takes a quarter of the time of each run here."""
    gc.freeze()
    yield
    gc.unfreeze()


def prepare(root: Path, teacher: Path, student: Path) -> Place:
    """A place with a domain `a`, of which ten replies are held out."""
    place = Place(root, teacher, student)
    place.config["training"] = {"iters": 2, "batch_size": 16, "learning_rate": 0.01}
    place.write("a", GIVEN[:6], GIVEN[6:])
    return place


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> tuple[Place, Run]:
    """A run on good targets that is only looked at."""
    place = prepare(tmp_path_factory.mktemp("finished"), teacher_folder, student_folder)
    return place, place.run("a")


@pytest.fixture
def place(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Place:
    """A place where nothing was done yet."""
    return prepare(tmp_path, teacher_folder, student_folder)


def certificate_of(run: Run) -> events.Certified:
    [event] = run.of(events.Certified)
    return event


def test_the_certificate_comes_before_the_first_step(finished: tuple[Place, Run]) -> None:
    kinds = [type(event) for event in finished[1].events]
    assert kinds.index(events.Certified) < kinds.index(events.Stepped)


def test_good_targets_are_not_called_poor(finished: tuple[Place, Run]) -> None:
    event = certificate_of(finished[1])
    assert not event.poor
    assert event.fidelity.cosine > 0.95
    assert event.fidelity.tokens == finished[1].results["a"].before.tokens


def test_poor_targets_stop_a_domain_before_it_trains(place: Place) -> None:
    place.config |= POOR
    run = place.run("a")
    error = run.failures["a"]
    assert isinstance(error, PoorTargetsError)
    assert error.exit_code == 2
    assert "\n" not in str(error)
    event = certificate_of(run)
    assert event.poor
    assert event.fidelity.tokens >= 200
    assert f"{event.fidelity.cosine:.3f}" in str(error)
    assert run.of(events.Stepped) == []
    assert files_of(place.out / "a") == {}


def test_an_earlier_adapter_outlives_a_refusal(finished: tuple[Place, Run], place: Place) -> None:
    shutil.copytree(finished[0].out, place.out)
    before = files_of(place.out / "a")
    assert WEIGHTS in before
    place.config |= POOR
    assert isinstance(place.run("a").failures["a"], PoorTargetsError)
    assert files_of(place.out / "a") == before


def test_poor_targets_are_trained_on_where_a_warning_is_asked_for(place: Place) -> None:
    place.config |= POOR | {"fidelity": {"when_poor": "warn"}}
    run = place.run("a")
    assert certificate_of(run).poor
    assert len(run.results["a"].steps) == 2


def test_few_tokens_only_warn(place: Place) -> None:
    place.config |= POOR
    place.write("a", GIVEN[:6], GIVEN[6:8])
    run = place.run("a")
    assert certificate_of(run).poor
    assert certificate_of(run).fidelity.tokens < 200
    assert "a" in run.results


def test_a_run_on_the_teachers_text_alone_is_not_refused_for_its_targets(place: Place) -> None:
    place.config |= POOR | {"losses": {"temperature": 4.0, "alpha": 0.0}}
    assert "a" in place.run("a").results


def test_exact_targets_are_certified_as_such_in_a_run(place: Place) -> None:
    place.config |= {**POOR, "targets": {"preset": "exact"}}
    found = certificate_of(place.run("a")).fidelity
    assert (found.cosine, found.tail_mass, found.kl_floor) == (1.0, 0.0, 0.0)


def test_the_certificate_is_in_the_metrics_and_the_summary(finished: tuple[Place, Run]) -> None:
    place, run = finished
    expected = certificate_of(run).fidelity
    assert run.results["a"].fidelity == expected
    written = json.loads((place.out / "a" / "kd_metrics.json").read_text())["result"]["fidelity"]
    assert written["cosine"] == expected.cosine
    assert [Position(**place) for place in written["worst"]] == list(expected.worst)
    assert run.summary["domains"]["a"]["fidelity"] == written
    assert read_result(place.out / "a").fidelity == expected


def test_metrics_of_a_version_without_certificates_are_read(finished: tuple[Place, Run], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished[0].out / "a", tmp_path / "a"))
    result = read_result(folder)
    record = read_record(folder / "kd_metrics.json")
    del record["result"]["fidelity"], record["result"]["data"]["cache_tokens"]
    write_record(folder / "kd_metrics.json", record)
    assert read_result(folder) == replace(result, fidelity=None, data=replace(result.data, cache_tokens=0))


def test_the_certificate_does_not_change_the_adapter(place: Place) -> None:
    place.config["lora"] = {"rank": 2, "dropout": 0.3}
    found, adapters = [], []
    for count in (1, 10**6):
        found.append(certificate_of(place.run("a", fidelity__tokens=count)).fidelity.tokens)
        adapters.append(place.weights())
    assert found[0] < found[1]
    assert adapters[0] == adapters[1]


def test_the_bytes_of_the_certificate_are_those_of_the_shards(finished: tuple[Place, Run]) -> None:
    place, run = finished
    shards = sum(path.stat().st_size for path in (place.root / "cache").rglob("*") if SHARD.fullmatch(path.name))
    found = certificate_of(run).fidelity
    assert found.cache_bytes == shards
    assert found.bytes_per_token == shards / run.results["a"].data.cache_tokens


def test_replies_of_others_in_the_shards_do_not_raise_the_bytes_per_token(
    finished: tuple[Place, Run], place: Place
) -> None:
    shutil.copytree(finished[0].root / "cache", place.root / "cache")
    place.write("b", GIVEN[:2], GIVEN[2:4])
    run = place.run("b")
    assert run.of(events.CaptureReused)
    found = certificate_of(run).fidelity.bytes_per_token
    assert found < 1.5 * certificate_of(finished[1]).fidelity.bytes_per_token


def test_the_gradient_is_that_of_the_adapter_which_the_run_trains(place: Place) -> None:
    """Another adapter has another certificate of the same targets."""
    place.config |= {"targets": {"threshold": 0.1}, "fidelity": {"when_poor": "warn"}}
    whole = certificate_of(place.run("a")).fidelity
    some = certificate_of(place.run("a", lora__keys=["self_attn.q_proj"])).fidelity
    assert some.tail_mass == whole.tail_mass
    assert some.kl_floor == whole.kl_floor
    assert some.cosine != whole.cosine
