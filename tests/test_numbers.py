"""Numbers: NaN and infinity, planted anywhere, stop a run in one line and with the last good adapter; nothing saved has
any of them, no curve is of no tokens, and what is cut is counted before training.

`TRUE_KD_CHAOS` multiplies how many steps are planted at, and how many bytes of targets are changed.
"""

from __future__ import annotations

import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import save_random_model
from mlx.utils import tree_map_with_path
from test_pipeline import ASK, CHECK, SCORED, WEIGHTS, Place

from true_kd import events
from true_kd.adapters import METRICS, check_adapter, checkpoint_folder, checkpoints, save_adapter
from true_kd.batching import collate
from true_kd.checkpoints import RECORD, STATE, find_start
from true_kd.console import LineView, make_console, proof_table
from true_kd.errors import CacheError, InputError, ModelError, NonFiniteLossError, TrueKDError
from true_kd.files import digest_file, read_record, write_record
from true_kd.losses import DIVERGENCES, LossOptions, token_losses
from true_kd.manifest import HEAD, SHARD, load_manifest, write_manifest
from true_kd.models import LoraOptions, ModelOptions, add_lora, open_model, trainable
from true_kd.reporting import DataCounts, read_result
from true_kd.shards import read_keys, unpack_replies
from true_kd.stores import checking
from true_kd.stores.reading import read_store
from true_kd.targets import SparseTargets
from true_kd.targets.sparse import TAIL_TEMPERATURES
from true_kd.targets.values import LOGPROB_BITS, TAIL_BITS, tail_logs

CHAOS = max(1, int(os.environ.get("TRUE_KD_CHAOS", "1")))
VALUES = {"NaN": math.nan, "+Inf": math.inf, "-Inf": -math.inf}
STEPS = 6
TRAINING = {"iters": STEPS, "validate_every": 3, "checkpoint_every": 2, "learning_rate": 0.01, "batch_size": 5}
TOKENS = mx.array([[7, 8, 9, 10, 11]])
HELD_OUT = tuple({"prompt": prompt, "completion": "said hello to the world"} for prompt in CHECK)


def lay_out(root: Path, teacher: Path, student: Path, **training: Any) -> Place:
    place = Place(root, teacher, student)
    place.write("a", SCORED, HELD_OUT)
    place.config["training"] = {**TRAINING, **training}
    place.config["fidelity"] = {"tokens": 1}
    return place


# What is looked at after each run


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} in JSON")


def parse(text: str) -> Any:
    """Strict JSON, whose numbers all are."""

    def number(digits: str) -> float:
        assert math.isfinite(float(digits)), digits
        return float(digits)

    return json.loads(text, parse_constant=refuse_constant, parse_float=number)


def assert_all_numbers_are_finite(*folders: Path) -> int:
    """In every tensor and every JSON file below some folders; gives how many files that were."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        assert not path.name.startswith(".tmp-"), path
        if path.suffix == ".safetensors":
            for name, value in mx.load(str(path)).items():
                assert not mx.issubdtype(value.dtype, mx.floating) or mx.all(mx.isfinite(value)).item(), (path, name)
        elif path.suffix == ".json":
            parse(path.read_text())
        elif path.suffix == ".jsonl":
            [parse(line) for line in path.read_text().splitlines()]
    return len(files)


def logits_by_mlx_lm(student: Path, folder: Path) -> mx.array:
    """What mlx-lm itself makes of a student and the adapter in a folder."""
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    module = load_adapters(load_model(student)[0], str(folder))
    module.eval()
    return module(TOKENS)


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in mx.load(str(path)).items()}


def assert_same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].tobytes() == value.tobytes(), name


def assert_one_line(error: Exception, code: int) -> None:
    assert isinstance(error, TrueKDError), error
    assert error.exit_code == code
    assert len(str(error).splitlines()) == 1


class Usual:
    """A run in which all numbers are finite, whose adapter is known after each step."""

    def __init__(self, root: Path, teacher: Path, student: Path) -> None:
        self.models = teacher, student
        self.place = lay_out(root, teacher, student, checkpoint_every=1)
        run = self.place.run("a")
        assert run.failures == {}
        self.result = run.results["a"]
        folder = self.place.out / "a"
        self.weights = {at: tensors(path / WEIGHTS) for at, path in checkpoints(folder).items()}
        opened = open_model(ModelOptions(model=str(student)), "student").module
        mx.random.seed(0)
        add_lora(opened, LoraOptions(rank=2))
        self.weights[0] = {name: np.array(value) for name, value in trainable(opened).items()}
        self.losses = {validation.iteration: validation.metrics.loss for validation in self.result.validations[1:]}
        assert list(self.losses) == [3, 6]

    def again(self, root: Path, **training: Any) -> Place:
        """A place for the same run, whose teacher has answered already."""
        place = lay_out(root, *self.models, **training)
        shutil.copytree(self.place.root / "cache", root / "cache")
        return place

    def kept(self, seen: list[events.Event]) -> dict[str, np.ndarray]:
        """The adapter to be kept by a run of these events: the best that was validated, else the last proven."""
        made = [event.step.iteration for event in seen if isinstance(event, events.Stepped)]
        validated = [event.validation.iteration for event in seen if isinstance(event, events.Validated)]
        if validated[1:]:
            return self.weights[min(validated[1:], key=self.losses.__getitem__)]
        return self.weights[max(0, made[-1] - 1) if made else 0]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> Usual:
    return Usual(tmp_path_factory.mktemp("usual"), teacher_folder, student_folder)


# Planted in a run


def inside(run: Generator, name: str) -> Any:
    """The local variable of a name in the innermost of a run's generators that has one."""
    found: list[Any] = []
    level: Any = run
    while inspect.isgenerator(level):
        if name in level.gi_frame.f_locals:
            found.append(level.gi_frame.f_locals[name])
        # What a run tells of itself is told by a generator that passes on the events of another.
        level = level.gi_yieldfrom or level.gi_frame.f_locals.get("running")
    return found[-1]


def changed(value: mx.array, number: float) -> mx.array:
    """A copy with another number in its first place."""
    flat = value.flatten()
    flat[0] = number
    return flat.reshape(value.shape)


def in_frozen_weight(run: Generator, number: float) -> None:
    inside(run, "student").module.model.layers[1].mlp.down_proj.linear.weight[0, 0] = number


def in_final_norm(run: Generator, number: float) -> None:
    inside(run, "student").module.model.norm.weight[3] = number


def in_adapter(run: Generator, number: float) -> None:
    layer = inside(run, "student").module.model.layers[0].self_attn.q_proj
    layer.lora_b = changed(layer.lora_b, number)


def in_moment(which: str) -> Callable[[Generator, float], None]:
    def plant(run: Generator, number: float) -> None:
        optimizer = inside(run, "state").optimizer
        seen = []

        def change(path: str, value: mx.array) -> mx.array:
            if path.endswith(f".{which}") and not seen:
                seen.append(path)
                return changed(value, number)
            return value

        optimizer.state = tree_map_with_path(change, optimizer.state)
        assert len(seen) == 1

    return plant


def in_token_weights(run: Generator, number: float) -> None:
    for example in inside(run, "data").train:
        example.weights[0] = number


PLANTS: dict[str, Callable[[Generator, float], None]] = {
    "a frozen weight": in_frozen_weight,
    "the final norm": in_final_norm,
    "the adapter": in_adapter,
    "a first moment": in_moment("m"),
    "a second moment": in_moment("v"),
    "the weights of tokens": in_token_weights,
}
AT = (1, 2, 3, 4, 5)
"""Before the first validation and after; where a validation follows, a checkpoint, or neither."""


def planted_cases() -> list[Any]:
    cases = []
    for number, (where, value) in enumerate(itertools.product(PLANTS, VALUES)):
        count = 2 if value == "NaN" else 1
        steps = [AT[(number + 2 * place) % 4] for place in range(count)] if CHAOS == 1 else AT[: 2 * CHAOS]
        if where == "the weights of tokens":
            steps = [at for at in steps if at + 2 <= STEPS]  # later ones come into no step
        cases += [pytest.param(where, value, at, id=f"{value} in {where} after step {at}") for at in steps]
    return cases


def run_with(place: Place, where: str, value: str, at: int) -> list[events.Event]:
    """The events of a run in which a number is planted after a step."""
    seen, running = [], place.start("a")
    for event in running:
        seen.append(event)
        if isinstance(event, events.Stepped) and event.step.iteration == at:
            PLANTS[where](running, VALUES[value])
    return seen


STOPPED = re.compile(
    r"iteration (\d+): (.+) is not a finite number, so training stopped\. The last good weights are in "
)


@pytest.mark.parametrize(("where", "value", "at"), planted_cases())
def test_a_number_that_is_not_finite_stops_a_run_with_the_last_good_adapter(
    where: str, value: str, at: int, usual: Usual, tmp_path: Path
) -> None:
    place = usual.again(tmp_path)
    seen = run_with(place, where, value, at)
    [error] = [event.error for event in seen if isinstance(event, events.DomainFailed)]
    assert isinstance(error, NonFiniteLossError)
    assert_one_line(error, 1)
    folder = place.out / "a"
    iteration, what = STOPPED.match(str(error)).groups()
    # The micro-batch of the next step is laid out already, and has the weights of its tokens.
    latest = at + 2 if where == "the weights of tokens" else at + 1
    assert at <= int(iteration) <= latest
    assert what in {
        "the loss",
        "the KD loss",
        "the CE loss",
        "the gradient",
        "the optimizer's step",
        "the optimizer's state",
        "the validation loss",
        "the adapter",
    }
    assert str(folder) in str(error)
    assert_same(tensors(folder / WEIGHTS), usual.kept(seen))
    check_adapter(folder)
    assert mx.all(mx.isfinite(logits_by_mlx_lm(usual.models[1], folder))).item()
    assert not (folder / METRICS).exists()
    assert parse((place.out / "kd_summary.json").read_text())["failed"] == {"a": str(error)}
    assert assert_all_numbers_are_finite(place.out, place.root / "cache") > 5
    whole = {at: tensors(path / WEIGHTS) for at, path in checkpoints(folder).items()}
    for iteration, weights in whole.items():
        assert_same(weights, usual.weights[iteration])


def test_the_same_command_after_a_planted_number_ends_as_if_there_had_been_none(usual: Usual, tmp_path: Path) -> None:
    place = usual.again(tmp_path)
    run_with(place, "a second moment", "NaN", 4)
    run = place.run("a")
    assert run.failures == {}
    assert [event.made for event in run.of(events.TrainingStarted)] == [2]
    assert_same(tensors(place.out / "a" / WEIGHTS), usual.weights[usual.result.best_iteration])
    assert run.results["a"].after == usual.result.after


def test_a_stop_where_a_number_is_not_finite_leaves_no_checkpoint_with_it(usual: Usual, tmp_path: Path) -> None:
    place = usual.again(tmp_path)
    running = place.start("a")
    for event in running:
        if isinstance(event, events.Stepped) and event.step.iteration == 3:
            PLANTS["a first moment"](running, math.nan)
            with pytest.raises(KeyboardInterrupt):
                running.throw(KeyboardInterrupt())
            break
    assert set(checkpoints(place.out / "a")) == {2}
    assert_all_numbers_are_finite(place.out)
    assert place.run("a").failures == {}
    assert_same(tensors(place.out / "a" / WEIGHTS), usual.weights[usual.result.best_iteration])


def test_a_control_that_is_not_finite_leaves_what_was_distilled(usual: Usual, tmp_path: Path) -> None:
    place = usual.again(tmp_path)
    place.config["control"] = "sft"
    seen, running = [], place.start("a")
    for event in running:
        seen.append(event)
        if isinstance(event, events.Stepped) and event.domain != "a" and event.step.iteration == 2:
            in_frozen_weight(running, math.nan)
    [error] = [event.error for event in seen if isinstance(event, events.DomainFailed)]
    assert isinstance(error, NonFiniteLossError)
    assert "control_sft" in str(error)
    assert not (place.out / "a" / "control_sft" / METRICS).exists()
    assert read_result(place.out / "a").proof.control is None
    assert_same(tensors(place.out / "a" / WEIGHTS), usual.weights[usual.result.best_iteration])
    assert_all_numbers_are_finite(place.out)


# Of a run's own making


DIVERGING = {
    "a step that is too large": {"training": {"learning_rate": 1.0, "grad_clip": 0.0, "warmup": 0.0}, "scale": 1e30},
    "a gradient that no float32 holds": {"training": {}, "scale": 1e25},
}


@pytest.mark.parametrize("case", DIVERGING)
def test_a_run_that_diverges_says_so_in_one_line_each_time(
    case: str, usual: Usual, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = usual.again(tmp_path, **DIVERGING[case]["training"])
    place.config["lora"] = {"rank": 2, "scale": DIVERGING[case]["scale"]}
    (place.root / "base.yaml").write_text(json.dumps(place.config))
    monkeypatch.chdir(place.root)
    kept = []
    for _ in range(2):
        ended = cli("distill", "-d", "a", "--config", "base.yaml")
        assert ended.code == 1
        [line] = ended.err.splitlines()
        assert STOPPED.match(line.removeprefix("a: failed. "))
        kept.append(tensors(place.out / "a" / WEIGHTS))
        assert mx.all(mx.isfinite(logits_by_mlx_lm(usual.models[1], place.out / "a"))).item()
        assert not (place.out / "a" / METRICS).exists()
        assert_all_numbers_are_finite(place.out)
    assert_same(kept[1], kept[0])


def test_a_run_that_goes_on_from_weights_that_nothing_proved_does_not_keep_them(usual: Usual, tmp_path: Path) -> None:
    """They are finite, and so they are a place to go on from; the loss with them is not."""
    place = usual.again(tmp_path, validate_every=100)
    for event in place.start("a"):
        if isinstance(event, events.Stepped) and event.step.iteration == 5:
            break
    folder = place.out / "a"
    for name in tensors(folder / "checkpoint_4" / WEIGHTS):
        forge(folder / "checkpoint_4", WEIGHTS, name, lambda value: mx.full(value.shape, 3e38))
    assert not mx.all(mx.isfinite(logits_by_mlx_lm(usual.models[1], folder / "checkpoint_4"))).item()
    run = place.run("a")
    assert isinstance(run.failures["a"], NonFiniteLossError)
    assert [event.made for event in run.of(events.TrainingStarted)] == [4]
    assert_same(tensors(folder / WEIGHTS), usual.weights[0])
    assert list(checkpoints(folder)) == [2]
    assert_all_numbers_are_finite(place.out)
    again = place.run("a")
    assert again.failures == {}
    assert [event.made for event in again.of(events.TrainingStarted)] == [2], "and not to the same end"


def overflowing(folder: Path, tokenizer: Path, factor: float) -> Path:
    """A student whose hidden states are finite, and whose logits are `factor` times as large as usual."""
    save_random_model(folder, tokenizer, seed=2)
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * factor
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def test_a_student_whose_logits_overflow_is_refused_as_it_is(
    usual: Usual, tokenizer_folder: Path, tmp_path: Path
) -> None:
    place = usual.again(tmp_path)
    student = overflowing(tmp_path / "hot", tokenizer_folder, 3e38)
    [error] = place.run("a", student__model=str(student)).failures.values()
    assert_one_line(error, 2)
    assert "student" in str(error)
    assert not (place.out / "a" / WEIGHTS).exists()


def test_a_perplexity_that_no_number_holds_is_null_and_told_in_a_few_letters(
    usual: Usual, tokenizer_folder: Path, tmp_path: Path
) -> None:
    place = usual.again(tmp_path)
    student = overflowing(tmp_path / "hot", tokenizer_folder, 300.0)
    run = place.run("a", student__model=str(student), training__iters=1)
    assert run.failures == {}
    result = parse((place.out / "a" / METRICS).read_text())["result"]
    assert result["before"]["ce"] > 710
    assert result["proof"]["student"]["perplexity"] is None
    out = io.StringIO()
    make_console(out).print(proof_table("a", run.results["a"].proof))
    assert "over 10^6" in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) < 120
    assert_all_numbers_are_finite(place.out)


# In the teacher


@pytest.mark.parametrize(
    ("where", "preset", "value"),
    [
        ("model.layers.1.mlp.down_proj.weight", "default", "NaN"),
        ("model.layers.1.mlp.down_proj.weight", "default", "-Inf"),
        ("model.layers.1.mlp.down_proj.weight", "exact", "+Inf"),
        ("model.embed_tokens.weight", "default", "+Inf"),
        ("model.embed_tokens.weight", "exact", "NaN"),
        ("model.embed_tokens.weight", "exact", "-Inf"),
    ],
)
def test_a_teacher_whose_logits_are_not_finite_is_refused_in_one_line(
    where: str, preset: str, value: str, usual: Usual, tokenizer_folder: Path, tmp_path: Path
) -> None:
    teacher = save_random_model(tmp_path / "poisoned", tokenizer_folder, seed=1, hidden_size=48)
    weights = mx.load(str(teacher / "model.safetensors"))
    # The last row of the embedding is that of an id that no text has: it only ever is a logit.
    weights[where][-1, 0] = VALUES[value]
    mx.save_safetensors(str(teacher / "model.safetensors"), weights)
    place = lay_out(tmp_path, *usual.models)
    place.config |= {"teacher": str(teacher), "targets": {"preset": preset}}
    place.write("a", [*SCORED, *ASK[:1]], HELD_OUT)
    [error] = place.run("a").failures.values()
    assert_one_line(error, 2)
    assert isinstance(error, ModelError)
    assert "teacher" in str(error)
    assert "finite" in str(error)
    assert not (place.out / "a" / WEIGHTS).exists()
    assert_all_numbers_are_finite(place.out, place.root / "cache")


# In the cache


@pytest.fixture(scope="module")
def exact(usual: Usual, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run from hidden states that were captured."""
    place = lay_out(tmp_path_factory.mktemp("exact"), *usual.models, iters=1)
    place.config["targets"] = {"preset": "exact"}
    assert place.run("a").failures == {}
    return place


def reseal(folder: Path, name: str) -> None:
    """Have the manifest bear the digest of a file as it is."""
    manifest = load_manifest(folder)
    files = {**manifest.files, name: replace(manifest.files[name], sha256=digest_file(folder / name))}
    write_manifest(folder, folder.name, files.values())


def copy_of(place: Place, root: Path) -> tuple[Place, Path]:
    """The place with a copy of its cache, and the folder of the one teacher in that."""
    other = Place(root, Path(place.config["teacher"]), Path(place.config["student"]))
    other.config |= {"targets": place.config["targets"], "training": place.config["training"]}
    other.write("a", SCORED, HELD_OUT)
    shutil.copytree(place.root / "cache", root / "cache")
    [folder] = [path.parent for path in (root / "cache").glob(f"*/{HEAD}")]
    return other, folder


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_hidden_state_that_is_not_finite_is_refused_though_its_digest_is_right(
    place: str, value: str, exact: Place, tmp_path: Path
) -> None:
    other, folder = copy_of(exact, tmp_path)
    [name] = [name for name in load_manifest(folder).files if SHARD.fullmatch(name)]
    content = bytearray((folder / name).read_bytes())
    length = int.from_bytes(content[:8], "little")
    start, stop = json.loads(content[8 : 8 + length])["states"]["data_offsets"]
    at = {"first": start, "middle": (start + stop) // 4 * 2, "last": stop - 2}[place] + 8 + length
    content[at : at + 2] = np.float16(VALUES[value]).tobytes()
    (folder / name).write_bytes(content)
    reseal(folder, name)
    [error] = other.run("a").failures.values()
    assert isinstance(error, CacheError)
    assert_one_line(error, 5)
    assert "hidden states that are not finite" in str(error)
    assert not (other.out / "a" / WEIGHTS).exists()
    remedied(other, folder, name, place == "first" and value == "NaN")


def test_a_head_that_is_not_finite_is_refused_though_its_digest_is_right(exact: Place, tmp_path: Path) -> None:
    for value, number in VALUES.items():
        other, folder = copy_of(exact, tmp_path / value)
        arrays, metadata = mx.load(str(folder / HEAD), return_metadata=True)
        arrays["weight"][5, 5] = number
        mx.save_safetensors(str(folder / HEAD), arrays, metadata=metadata)
        reseal(folder, HEAD)
        [error] = other.run("a").failures.values()
        assert isinstance(error, CacheError)
        assert_one_line(error, 5)
        assert "not finite" in str(error)
        remedied(other, folder, HEAD, value == "NaN")


def remedied(place: Place, folder: Path, name: str, runs: bool) -> None:
    """What the message says to do helps: the file is found damaged and dropped, and captured anew."""
    findings = list(checking.verify(read_store(folder)))
    assert [finding.file for finding in findings if finding.is_damage] == [name]
    assert checking.drop_damaged(read_store(folder), findings) == (name,)
    if runs:
        assert place.run("a").failures == {}
    assert_all_numbers_are_finite(place.root / "cache", place.out)


def test_every_code_of_a_log_probability_and_of_a_tail_stands_for_a_finite_number() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10 * CHAOS):
        targets = random_sparse(rng)
        assert_decodes_to_finite_numbers(targets)
    assert np.isfinite(tail_logs(np.arange(2**TAIL_BITS))).all()


def random_sparse(rng: np.random.Generator) -> SparseTargets:
    """Sparse targets of any codes there are."""
    counts = rng.integers(1, 9, 12)
    total = int(counts.sum())
    return SparseTargets(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        ids=rng.integers(0, 320, total).astype(np.int32),
        logprob_codes=rng.choice([0, 1, 2**LOGPROB_BITS - 1, *rng.integers(0, 2**LOGPROB_BITS, 4)], total).astype(
            np.uint8
        ),
        exact=rng.random(total) < rng.choice([0.0, 0.5, 1.0]),
        tail_codes=rng.choice(
            [0, 2**TAIL_BITS - 1, *rng.integers(0, 2**TAIL_BITS, 3)], (12, len(TAIL_TEMPERATURES))
        ).astype(np.uint16),
        draw_temperature=float(rng.choice([1.0, 2.0, 4.0])),
        threshold=float(rng.choice([0.001, 0.02, 0.5])),
        vocab_size=320,
    )


def assert_decodes_to_finite_numbers(targets: SparseTargets) -> None:
    for temperature in (0.5, 0.7, 1.0, 2.0, 3.3, 10.0):
        weights, logprobs = targets.at_temperature(temperature)
        assert np.isfinite(weights).all()
        assert np.isfinite(logprobs).all()
        assert np.isfinite(targets.tail_mass(temperature)).all()
    assert np.isfinite(targets.entropies).all()
    assert np.isfinite(targets.label_logprobs(targets.labels)).all()
    assert np.isfinite(targets.drawn_chance).all()


def test_any_bytes_of_sparse_targets_are_finite_numbers_or_no_shard(usual: Usual) -> None:
    [shard] = [path for path in (usual.place.root / "cache").rglob("*") if SHARD.fullmatch(path.name)]
    keys, original = read_keys(shard), shard.read_bytes()
    header = json.loads(original[8 : 8 + int.from_bytes(original[:8], "little")])
    data = 8 + int.from_bytes(original[:8], "little")
    codes = [header[name]["data_offsets"] for name in ("exact_logprobs", "drawn_logprobs", "tails", "ids_lower")]
    everything = [[0, len(original) - data]]
    rng, decoded = np.random.default_rng(1), 0
    for trial in range(8 * CHAOS):
        content = np.frombuffer(bytearray(original), dtype=np.uint8)
        for start, stop in codes if trial % 2 else everything:
            at = data + rng.integers(start, stop, 1 + int(rng.integers(20)))
            content[at] = rng.integers(0, 256, len(at))
        try:
            replies = unpack_replies(content, keys, None)
        except (ValueError, KeyError, TypeError):
            continue
        decoded += 1
        for reply in replies.values():
            assert_decodes_to_finite_numbers(reply.targets)
    assert decoded >= 4 * CHAOS


# In a checkpoint


@pytest.fixture(scope="module")
def halfway(usual: Usual, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that was stopped with two whole checkpoints, of steps 2 and 4."""
    place = usual.again(tmp_path_factory.mktemp("halfway"))
    for event in place.start("a"):
        if isinstance(event, events.Stepped) and event.step.iteration == 5:
            break
    assert {at for at, folder in checkpoints(place.out / "a").items() if (folder / RECORD).exists()} == {2, 4}
    return place


def forge(folder: Path, name: str, ending: str, change: Callable[[mx.array], mx.array]) -> None:
    """Change a checkpoint's tensor whose name ends so, and have the record bear the new digest."""
    arrays = mx.load(str(folder / name))
    chosen = next(key for key in sorted(arrays) if key.endswith(ending))
    arrays[chosen] = change(arrays[chosen])
    mx.save_safetensors(str(folder / name), arrays)
    record = read_record(folder / RECORD)
    write_record(folder / RECORD, {**record, "sha256": {**record["sha256"], name: digest_file(folder / name)}})


FORGED = {
    "a first moment": (STATE, ".m"),
    "a second moment": (STATE, ".v"),
    "the best adapter": (STATE, "lora_b"),
    "the adapter": (WEIGHTS, "lora_a"),
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("where", FORGED)
def test_a_checkpoint_with_a_number_that_is_not_finite_is_passed_over_though_its_digests_are_right(
    where: str, value: str, halfway: Place, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    shutil.copytree(halfway.out / "a", folder)
    digest = read_record(checkpoint_folder(folder, 4) / RECORD)["run_digest"]
    assert find_start(folder, digest).made == 4
    # There is no best before the first validation.
    for newest, older in ((4, 2), (2, 0))[: 1 if where == "the best adapter" else 2]:
        forge(checkpoint_folder(folder, newest), *FORGED[where], lambda array: changed(array, VALUES[value]))
        start = find_start(folder, digest)
        assert start.made == older
        assert "not finite" in start.damaged[-1]


@pytest.mark.parametrize("where", ["a second moment", "the adapter"][:CHAOS])
def test_a_run_whose_newest_checkpoint_is_not_finite_goes_on_from_the_one_before(
    where: str, usual: Usual, halfway: Place, tmp_path: Path
) -> None:
    place = usual.again(tmp_path)
    shutil.copytree(halfway.out, place.out)
    forge(place.out / "a" / "checkpoint_4", *FORGED[where], lambda array: changed(array, math.nan))
    run = place.run("a")
    assert run.failures == {}
    [told] = run.of(events.CheckpointsDamaged)
    assert (told.made, len(told.damaged)) == (2, 1)
    assert_same(tensors(place.out / "a" / WEIGHTS), usual.weights[usual.result.best_iteration])
    assert_all_numbers_are_finite(place.out)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_record_with_a_number_that_is_not_finite_is_damaged(literal: str, halfway: Place, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(halfway.out / "a", folder)
    record = checkpoint_folder(folder, 4) / RECORD
    digest = read_record(record)["run_digest"]
    changed_text, count = re.subn(r'"total": [0-9.e-]+', f'"total": {literal}', record.read_text(), count=1)
    assert count == 1
    record.write_text(changed_text)
    start = find_start(folder, digest)
    assert (start.made, len(start.damaged)) == (2, 1)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "1e999"])
def test_metrics_with_a_number_that_is_not_finite_are_no_result(literal: str, usual: Usual, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(usual.place.out / "a", folder)
    text, count = re.subn(r'"loss": [0-9.e-]+', f'"loss": {literal}', (folder / METRICS).read_text(), count=1)
    assert count == 1
    assert read_result(folder) is not None
    (folder / METRICS).write_text(text)
    assert read_result(folder) is None


@pytest.mark.parametrize("number", [math.nan, math.inf, 3e38])
def test_an_adapter_whose_losses_are_not_finite_is_refused_when_it_is_measured(
    number: float, usual: Usual, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the digests of a sound one."""
    place = usual.again(tmp_path)
    shutil.copytree(usual.place.out, place.out)
    arrays = {name: mx.full(value.shape, number) for name, value in mx.load(str(place.out / "a" / WEIGHTS)).items()}
    save_adapter(place.out / "a", arrays, LoraOptions(rank=2), str(usual.models[1]), {})
    (place.out / "a" / METRICS).unlink()
    monkeypatch.chdir(place.root)
    ended = cli("evaluate", "-d", "a", "--out", str(place.out))
    assert ended.code == 2
    [line] = ended.err.splitlines()
    assert "adapter" in line
    assert "not a finite number" in line


# No tokens


def stopping_teacher(folder: Path, tokenizer: Path) -> Path:
    """A teacher that finds each id as likely as any other: the first of them ends its replies."""
    save_random_model(folder, tokenizer, seed=1, hidden_size=48)
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.norm.weight"] = mx.zeros_like(weights["model.norm.weight"])
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [0, 1]}))
    return folder


def sure_teacher(folder: Path, tokenizer: Path) -> Path:
    """A teacher that has no doubt."""
    return overflowing(folder, tokenizer, 1e6)


LONG = "the cat sat on the mat " * 20
REFUSED: dict[str, dict[str, Any]] = {
    "an empty completion": {"train": [{"prompt": "hi", "completion": ""}]},
    "a completion of blanks": {"train": [{"prompt": "hi", "completion": " \n"}]},
    "a completion without content": {
        "train": [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]}]
    },
    "a text of one token": {"train": [{"text": "a"}]},
    "no prompt": {"train": []},
    "prompts that are too long": {"train": [{"prompt": LONG, "completion": "hi"}], "training": {"max_seq_length": 60}},
    "held-out prompts that are too long": {
        "valid": [{"prompt": LONG, "completion": "hi"}],
        "training": {"max_seq_length": 60},
    },
    "rewards of zero": {
        "train": [{**record, "reward": 0} for record in SCORED],
        "losses": {"weigh_by": "reward"},
    },
    "no rewards": {"losses": {"weigh_by": "reward"}},
    "a teacher without doubt": {"teacher": sure_teacher, "losses": {"weigh_by": "entropy"}},
}
"""What leaves nothing to train on."""


@pytest.mark.parametrize("case", REFUSED)
def test_data_without_a_token_to_train_on_is_refused_in_one_line(
    case: str, usual: Usual, tokenizer_folder: Path, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dict(REFUSED[case])
    place = lay_out(tmp_path, *usual.models, **given.get("training", {}))
    place.write("a", given.get("train", SCORED), given.get("valid", HELD_OUT))
    if "teacher" in given:
        place.config["teacher"] = str(given["teacher"](tmp_path / "teacher", tokenizer_folder))
    place.config["losses"] = given.get("losses", {})
    (place.root / "base.yaml").write_text(json.dumps(place.config))
    monkeypatch.chdir(place.root)
    ended = cli("distill", "-d", "a", "--config", "base.yaml")
    assert ended.code == 2, ended
    assert len(ended.err.splitlines()) == 1, ended.err
    assert " loss " not in ended.out
    assert not (place.out / "a" / METRICS).exists()
    assert not (place.out / "a" / WEIGHTS).exists()


TRAINED: dict[str, dict[str, Any]] = {
    "a token a reply": {"capture": {"max_tokens": 1}, "targets": {"share": 0.01}, "tokens": 5},
    "a share of long replies": {"train": SCORED, "targets": {"share": 0.01}, "tokens": 5},
    "a teacher that stops at once": {
        "teacher": stopping_teacher,
        "capture": {"max_tokens": 4, "sampling_temperature": 0.0},
        "tokens": 5,
    },
    "one reward above zero": {
        "train": [{**record, "reward": int(at == 0)} for at, record in enumerate(SCORED)],
        "losses": {"weigh_by": "reward"},
    },
}
"""What leaves little: each with the tokens that are left, where that is known."""


@pytest.mark.parametrize("case", TRAINED)
def test_a_curve_is_of_the_tokens_that_were_told(
    case: str, usual: Usual, tokenizer_folder: Path, tmp_path: Path
) -> None:
    given = TRAINED[case]
    place = lay_out(tmp_path, *usual.models, iters=2)
    place.write("a", given.get("train", ASK), given.get("valid", CHECK))
    if "teacher" in given:
        place.config["teacher"] = str(given["teacher"](tmp_path / "teacher", tokenizer_folder))
    place.config |= {name: given[name] for name in ("capture", "targets", "losses") if name in given}
    run = place.run("a")
    assert run.failures == {}
    result = run.results["a"]
    assert result.data.train_response_tokens == given.get("tokens", result.data.train_response_tokens) > 0
    for step in result.steps:
        assert step.response_tokens == result.data.train_response_tokens, "a batch is all of the data here"
        assert step.grad_norm > 0
        assert step.total > 0
    assert result.after.tokens > 0
    assert_all_numbers_are_finite(place.out)


# What is cut


def test_what_is_cut_and_dropped_is_counted_and_told_before_the_first_step(usual: Usual, tmp_path: Path) -> None:
    place = lay_out(tmp_path, *usual.models, max_seq_length=60)
    cut = {"prompt": "hi", "completion": LONG}
    dropped = {"prompt": LONG, "completion": "hi"}
    place.write("a", [*SCORED, cut, cut | {"prompt": "ho"}, dropped, ASK[0]], [*HELD_OUT, cut, dropped])
    seen = place.run("a").events
    [(at, started)] = [(at, event) for at, event in enumerate(seen) if isinstance(event, events.TrainingStarted)]
    assert at < min(number for number, event in enumerate(seen) if isinstance(event, events.Stepped))
    counts = started.data
    assert (counts.train_examples, counts.valid_examples) == (len(SCORED) + 3, len(HELD_OUT) + 1)
    assert (counts.truncated, counts.dropped, counts.cut_replies) == (3, 2, 1)
    assert told(started) == (
        "a: 1 of 13 replies cut at capture.max_tokens, 3 of 11 examples cut at training.max_seq_length, 2 of 13 "
        "prompts dropped (no room for a reply, or tokens that the student lacks)"
    )


def told(started: events.TrainingStarted) -> str:
    out = io.StringIO()
    LineView(make_console(out)).show(started)
    return out.getvalue().splitlines()[1]


def test_a_run_of_which_nothing_is_cut_says_nothing_of_it(usual: Usual) -> None:
    counts: DataCounts = usual.result.data
    assert (counts.truncated, counts.dropped, counts.cut_replies) == (0, 0, 0)
    out = io.StringIO()
    LineView(make_console(out)).show(events.TrainingStarted("a", STEPS, counts))
    assert len(out.getvalue().splitlines()) == 1


# At the ends of what is allowed


EXTREMES: dict[str, dict[str, Any]] = {
    "nothing of the teacher": {"losses": {"alpha": 0.0, "temperature": 10.0}, "training": {"learning_rate": 1e-300}},
    "nothing but the teacher": {"losses": {"alpha": 1.0, "temperature": 0.5}, "training": {"learning_rate": 1.0}},
    "from end to end": {
        "losses": {"alpha": 0.0, "alpha_end": 1.0, "temperature": 0.5, "temperature_end": 10.0},
        "training": {"grad_clip": 1e-30, "learning_rate": 1.0},
    },
    "no memory": {"memory_gb": 1e-300, "losses": {"temperature": 10.0, "divergence": "jensen_shannon", "beta": 0.01}},
    "all memory": {"memory_gb": 1e6, "losses": {"divergence": "skewed_reverse_kl", "skew": 0.99}},
    "a scale of nothing": {"lora": {"rank": 2, "scale": 1e-300}, "training": {"grad_clip": 1e300}},
    "all exactly": {"targets": {"preset": "exact"}, "losses": {"divergence": "total_variation", "temperature": 10.0}},
}


@pytest.mark.parametrize("case", EXTREMES)
def test_numbers_at_the_ends_of_what_is_allowed_give_finite_metrics(case: str, usual: Usual, tmp_path: Path) -> None:
    given = {name: dict(value) if isinstance(value, dict) else value for name, value in EXTREMES[case].items()}
    place = usual.again(tmp_path, iters=2, warmup=0.0, **given.pop("training", {}))
    place.config |= given
    run = place.run("a")
    assert run.failures == {}
    record = parse((place.out / "a" / METRICS).read_text())
    assert len(record["curves"]["total"]) == 2
    assert_all_numbers_are_finite(place.out, place.root / "cache")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 10.0])
def test_the_loss_of_logits_as_large_as_a_float_holds_is_finite_with_each_divergence(
    divergence: str, temperature: float, examples: list[Any]
) -> None:
    objective = LossOptions(divergence=divergence, temperature=temperature).final
    batch = collate(examples, temperature)
    rng = np.random.default_rng(0)
    for size in (1e-38, 1.0, 1e4, 1e30):
        logits = mx.array((size * rng.standard_normal((len(batch.labels), 320))).astype(np.float32))
        kd, ce = token_losses(logits, batch.labels, batch.targets, objective)
        assert mx.all(mx.isfinite(kd)).item(), size
        assert mx.all(mx.isfinite(ce)).item(), size


@pytest.fixture(scope="module")
def examples(usual: Usual) -> list[Any]:
    """The examples of the usual run."""
    running = usual.place.start("a", fresh=True, out=str(usual.place.root / "elsewhere"))
    for event in running:
        if isinstance(event, events.TrainingStarted):
            return inside(running, "data").train
    raise AssertionError


@pytest.mark.parametrize(
    "name", ["training__grad_clip", "lora__scale", "memory_gb", "training__learning_rate", "losses__alpha"]
)
@pytest.mark.parametrize("value", VALUES)
def test_an_option_that_is_not_finite_is_refused(name: str, value: str, usual: Usual) -> None:
    with pytest.raises(InputError):
        usual.place.run("a", **{name: VALUES[value]})
