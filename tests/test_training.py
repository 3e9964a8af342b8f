"""Training follows the gradient of the objective, touches the adapter alone, and is a function of its seed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from families import FAMILIES, VOCAB, build
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from true_kd.batching import collate
from true_kd.examples import Example
from true_kd.losses import LossOptions
from true_kd.models import LoraOptions, ModelOptions, add_lora, open_model, trainable
from true_kd.targets import HiddenTargets, SparseTargets, TargetOptions, TeacherHead, encode
from true_kd.targets.values import logprob_codes
from true_kd.training import (
    Gradients,
    NonFinite,
    Room,
    StepMetrics,
    TrainingOptions,
    TrainingState,
    learning_rate_at,
    sum_gradients,
    train,
)
from true_kd.training.options import compiles_gradient

TOKENS = 300
"""Ids that examples use; the models have 320 rows."""
LOSSES = LossOptions()


def random_examples(count: int, seed: int = 0, share: float = 1.0) -> list[Example]:
    """Examples of differing lengths with a random teacher's sparse targets at a share of their responses."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        prompt, response = rng.integers(6, TOKENS, 3 + index % 4), rng.integers(6, TOKENS, 2 + index % 5)
        logits = mx.array(rng.normal(0, 3, (len(response), 320)).astype(np.float32))
        uniforms = rng.random(len(response), dtype=np.float32)
        targets = encode(logits, mx.array(response), uniforms, TargetOptions().settings)
        kept = np.sort(rng.permutation(len(response))[: max(1, round(share * len(response)))]).astype(np.int32)
        reply = response.astype(np.int32)
        weights = np.ones(len(kept), dtype=np.float32)
        examples.append(Example(prompt.astype(np.int32), reply, targets.take(kept), kept, weights, f"example {index}"))
    return examples


def with_exact_targets(
    example: Example, vocab: int, seed: int, kind: str = "hidden states"
) -> tuple[Example, mx.array]:
    """The example with a random teacher's whole distribution, and its log-probabilities at the loss temperature."""
    count = len(example.kept)
    logits = np.random.default_rng(seed).normal(0, 3, (count, vocab))
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    if kind == "hidden states":
        targets = HiddenTargets(logprobs.astype(np.float16), TeacherHead(lambda states: states))
        softened = targets.head.logprobs(mx.array(targets.states), LOSSES.temperature)
    else:
        targets = SparseTargets(
            offsets=np.arange(count + 1, dtype=np.int32) * vocab,
            ids=np.tile(np.arange(vocab, dtype=np.int32), count),
            logprob_codes=logprob_codes(logprobs.reshape(-1), np.ones(count * vocab, dtype=bool)),
            exact=np.ones(count * vocab, dtype=bool),
            tail_codes=np.zeros((count, 5), dtype=np.uint16),
            draw_temperature=LOSSES.temperature,
            threshold=0.02,
            vocab_size=vocab,
        )
        softened = mx.array(targets.at_temperature(LOSSES.temperature)[1].reshape(count, vocab))
    return replace(example, targets=targets), softened


def adapted(folder: Path, seed: int = 0, **lora: object) -> nn.Module:
    """The model in a folder with a fresh adapter; also sets MLX's random state, as a run does."""
    module = open_model(ModelOptions(model=str(folder)), "student").module
    mx.random.seed(seed)
    add_lora(module, LoraOptions(**{"rank": 4, **lora}))
    return module


def run(
    module: nn.Module, examples: Sequence[Example], losses: LossOptions = LOSSES, seed: int = 0, **options: object
) -> list[StepMetrics]:
    chosen = TrainingOptions(**{"iters": 4, "learning_rate": 1e-2, "warmup": 0.0, **options})
    return list(train(module, examples, chosen, losses, seed))


def flat(parameters: dict) -> np.ndarray:
    """All numbers of a tree of parameters, by name."""
    return np.concatenate([np.array(value).ravel() for _, value in sorted(tree_flatten(parameters))])


def assert_equal_parameters(one: nn.Module, other: nn.Module) -> None:
    assert trainable(one).keys() == trainable(other).keys()
    for name, value in trainable(one).items():
        assert mx.array_equal(value, trainable(other)[name]), name


# What a step does


def test_the_loss_falls(student_folder: Path) -> None:
    module = adapted(student_folder)
    metrics = run(module, random_examples(8), iters=20, batch_size=8)
    assert metrics[-1].total < 0.8 * metrics[0].total
    assert metrics[-1].kd < metrics[0].kd
    assert metrics[-1].ce < metrics[0].ce


@pytest.mark.parametrize(("alpha", "moves"), [(0.0, "ce"), (1.0, "kd")])
def test_each_term_can_be_trained_alone(student_folder: Path, alpha: float, moves: str) -> None:
    metrics = run(adapted(student_folder), random_examples(8), LossOptions(alpha=alpha), iters=20, batch_size=8)
    assert getattr(metrics[-1], moves) < 0.8 * getattr(metrics[0], moves)
    assert all(step.total == pytest.approx(getattr(step, moves), rel=1e-6) for step in metrics)


def test_a_step_reports_what_it_did(student_folder: Path) -> None:
    examples = random_examples(4, share=0.5)
    [step] = run(adapted(student_folder), examples, iters=1, batch_size=2, accumulate=2)
    assert step.iteration == 1
    assert step.response_tokens == sum(len(example.kept) for example in examples) < sum(map(len, examples))
    assert sum(map(len, examples)) <= step.padded_tokens <= 4 * max(map(len, examples))
    assert step.total == pytest.approx(LOSSES.alpha * step.kd + (1 - LOSSES.alpha) * step.ce, rel=1e-5)
    assert 0 < step.tokens_per_second <= step.padded_tokens / step.seconds
    assert step.learning_rate == learning_rate_at(1, TrainingOptions(iters=1, learning_rate=1e-2, warmup=0.0))
    assert step.peak_memory > sum(value.nbytes for value in trainable(adapted(student_folder)).values())


@pytest.mark.parametrize("lora", [{}, {"type": "dora"}, {"dropout": 0.5}, {"keys": ("self_attn.v_proj",)}])
def test_everything_but_the_adapter_stays_bit_identical(student_folder: Path, lora: dict) -> None:
    module = adapted(student_folder, **lora)
    names = trainable(module).keys()
    before = {name: np.array(value) for name, value in tree_flatten(module.parameters())}
    run(module, random_examples(4))
    changed = set()
    for name, value in tree_flatten(module.parameters()):
        if np.array(value).tobytes() != before[name].tobytes():
            changed.add(name)
    assert changed == set(names)


def test_accumulating_micro_batches_equals_the_large_batch(student_folder: Path) -> None:
    # Four examples: every step has all of them, whatever the seed makes of their order.
    examples = random_examples(4)
    assert len({len(example.response) for example in examples}) > 1
    large, small = adapted(student_folder), adapted(student_folder)
    at_once = run(large, examples, batch_size=4)
    in_parts = run(small, examples, batch_size=2, accumulate=2)
    one_by_one = run(adapted(student_folder), examples, batch_size=1, accumulate=4)
    for name in ("total", "kd", "ce", "grad_norm", "response_tokens"):
        expected = [getattr(step, name) for step in at_once]
        assert [getattr(step, name) for step in in_parts] == pytest.approx(expected, rel=1e-4), name
        assert [getattr(step, name) for step in one_by_one] == pytest.approx(expected, rel=1e-4), name
    np.testing.assert_allclose(flat(trainable(small)), flat(trainable(large)), atol=2e-4)


def test_the_loss_does_not_depend_on_the_chunk(student_folder: Path) -> None:
    examples = random_examples(12)
    whole = run(adapted(student_folder), examples, LossOptions(chunk=1000), batch_size=12)
    parts = run(adapted(student_folder), examples, LossOptions(chunk=16), batch_size=12)
    assert sum(len(example.response) for example in examples) > 2 * 16
    assert [step.total for step in parts] == pytest.approx([step.total for step in whole], rel=1e-4)
    assert [step.grad_norm for step in parts] == pytest.approx([step.grad_norm for step in whole], rel=1e-3)


# The gradient, against a dense reference


def reference_gradient(module: nn.Module, examples: Sequence[Example], teachers: Sequence[mx.array]) -> dict:
    """Of the objective over the tokens that count, on dense logits of one unpadded example at a time."""
    tokens = sum(len(example.kept) for example in examples)
    temperature = LOSSES.temperature

    def objective() -> mx.array:
        total = mx.array(0.0)
        for example, soft in zip(examples, teachers, strict=True):
            logits = module(mx.array(example.tokens)[None])[0]
            logits = logits[len(example.prompt) - 1 : -1][mx.array(example.kept)]
            ce = mx.sum(nn.losses.cross_entropy(logits, mx.array(example.response[example.kept])))
            student = logits / temperature - mx.logsumexp(logits / temperature, axis=-1, keepdims=True)
            kd = temperature**2 * mx.sum(mx.exp(soft) * (soft - student))
            total = total + LOSSES.alpha * kd + (1 - LOSSES.alpha) * ce
        return total / tokens

    _, gradient = nn.value_and_grad(module, objective)()
    return gradient


def gradient_of_training(module: nn.Module, examples: Sequence[Example], **options: object) -> tuple[np.ndarray, float]:
    """The gradient that reaches the optimizer, up to a factor, and the norm that is reported.

    Clipped far below Adam's epsilon, the first update is a multiple of the gradient itself.
    """
    before = flat(trainable(module))
    [step] = run(module, examples, iters=1, batch_size=len(examples), grad_clip=1e-9, learning_rate=1.0, **options)
    return before - flat(trainable(module)), step.grad_norm


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def assert_dense_gradient(module: nn.Module, kind: str, **options: object) -> None:
    """The gradient of a step is that of dense logits, with an adapter that is no longer fresh."""
    # A fresh adapter's lora_b is zero, and with it the gradient of lora_a.
    module.update(tree_map(lambda value: value + 0.02 * mx.random.normal(value.shape), module.trainable_parameters()))
    pairs = [with_exact_targets(example, VOCAB, index, kind) for index, example in enumerate(random_examples(3))]
    examples, teachers = [example for example, _ in pairs], [teacher for _, teacher in pairs]
    expected = flat(reference_gradient(module, examples, teachers))
    found, norm = gradient_of_training(module, examples, **options)
    assert norm == pytest.approx(np.linalg.norm(expected), rel=1e-3)
    assert cosine(found, expected) > 0.999


@pytest.fixture(scope="module")
def untied_folder(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random student with an output head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    for file in student_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    weights = mx.load(str(folder / "model.safetensors"))
    weights["lm_head.weight"] = 0.3 * mx.random.normal((320, 32), key=mx.random.key(5))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        ("student_folder", {}),
        ("student_folder", {"type": "dora"}),
        ("student_folder", {"keys": ("model.embed_tokens",)}),
        ("student_folder", {"keys": ("model.embed_tokens", "mlp.up_proj"), "type": "dora"}),
        ("untied_folder", {}),
        ("untied_folder", {"keys": ("lm_head",)}),
        ("untied_folder", {"keys": ("lm_head", "self_attn.q_proj")}),
        ("untied_folder", {"keys": ("model.embed_tokens",)}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join([value.get("type", ""), *value.get("keys", ())]),
)
@pytest.mark.parametrize("kind", ["entries", "hidden states"])
def test_the_gradient_is_that_of_the_dense_objective(
    request: pytest.FixtureRequest, model: str, lora: dict, kind: str
) -> None:
    assert_dense_gradient(adapted(request.getfixturevalue(model), **lora), kind)


@pytest.mark.parametrize("kind", ["entries", "hidden states"])
def test_tokens_of_the_response_that_do_not_count_add_nothing_to_the_gradient(student_folder: Path, kind: str) -> None:
    module = adapted(student_folder)
    drawn = random_examples(4, share=0.5)
    pairs = [with_exact_targets(example, 320, index, kind) for index, example in enumerate(drawn)]
    examples, teachers = [example for example, _ in pairs], [teacher for _, teacher in pairs]
    assert any(len(example.kept) < len(example.response) for example in examples)
    expected = flat(reference_gradient(module, examples, teachers))
    found, norm = gradient_of_training(module, examples)
    assert norm == pytest.approx(np.linalg.norm(expected), rel=1e-3)
    assert cosine(found, expected) > 0.999


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma3n"}))
def test_the_gradient_of_every_family_is_that_of_the_dense_objective(family: str) -> None:
    module = build(family)
    mx.random.seed(6)
    add_lora(module, LoraOptions(rank=4, keys=FAMILIES[family].keys))
    assert_dense_gradient(module, "entries")


@pytest.mark.parametrize("family", ["qwen2 tied", "qwen2 untied", "gemma2", "cohere"])
def test_a_trained_output_head_of_a_family_gets_the_dense_gradient(family: str) -> None:
    """Of full fine-tuning: an embedding that is tied to the head gets the sum of what both do."""
    module = build(family)
    module.freeze()
    head = module.lm_head if family.endswith("untied") else module.model.embed_tokens
    head.unfreeze()
    module.model.layers[-1].unfreeze()
    assert_dense_gradient(module, "hidden states")


def test_a_frozen_quantised_student_gets_the_dense_gradient() -> None:
    module = build("qwen2 tied")
    nn.quantize(module, group_size=32, bits=4)
    mx.random.seed(6)
    add_lora(module, LoraOptions(rank=4))
    assert_dense_gradient(module, "entries")


@pytest.mark.parametrize("kind", ["entries", "hidden states"])
def test_a_compiled_step_has_the_gradient_of_the_dense_objective(kind: str) -> None:
    module = build("qwen2 tied")
    mx.random.seed(6)
    add_lora(module, LoraOptions(rank=4))
    assert_dense_gradient(module, kind, compile="always")


def test_prompt_tokens_add_nothing_to_the_gradient(student_folder: Path) -> None:
    def cross_entropy_gradient(module: nn.Module, example: Example, first: int) -> np.ndarray:
        def objective() -> mx.array:
            logits = module(mx.array(example.tokens)[None])[0, first - 1 : -1]
            return mx.sum(nn.losses.cross_entropy(logits, mx.array(example.tokens[first:])))

        return flat(nn.value_and_grad(module, objective)()[1])

    [*_, example] = random_examples(4)
    module = adapted(student_folder)
    response_only = cross_entropy_gradient(module, example, first=len(example.prompt))
    everything = cross_entropy_gradient(module, example, first=1)
    before = flat(trainable(module))
    options = {"iters": 1, "batch_size": 1, "grad_clip": 1e-9, "learning_rate": 1.0}
    [step] = run(module, [example], LossOptions(alpha=0.0), **options)
    found = before - flat(trainable(module))
    assert cosine(found, response_only) > 0.999
    assert step.grad_norm == pytest.approx(np.linalg.norm(response_only) / len(example.response), rel=1e-3)
    assert cosine(found, everything) < 0.99


def test_padding_adds_nothing_to_the_gradient(student_folder: Path) -> None:
    short, long = random_examples(4)[0], random_examples(4)[3]
    assert len(long) > len(short)
    [together] = run(adapted(student_folder), [short, long], iters=1, batch_size=2)
    [apart] = run(adapted(student_folder), [short, long], iters=1, batch_size=1, accumulate=2)
    assert together.padded_tokens > apart.padded_tokens
    assert together.grad_norm == pytest.approx(apart.grad_norm, rel=1e-4)
    assert together.total == pytest.approx(apart.total, rel=1e-5)


# Clipping


def test_the_gradient_is_clipped_before_it_moves_anything(student_folder: Path) -> None:
    module = adapted(student_folder)
    before = flat(trainable(module))
    rate, clip = 1.0, 1e-10
    [step] = run(module, random_examples(4), iters=1, batch_size=4, learning_rate=rate, grad_clip=clip)
    moved = np.linalg.norm(flat(trainable(module)) - before)
    # Adam's first step is rate * 0.1 * g / (sqrt(0.001) * |g| + 1e-8), so at most this for a gradient of that norm.
    assert 0 < moved <= 1.01 * rate * 0.1 * clip / 1e-8
    assert step.grad_norm > 1e-3, "reported before clipping"


def test_clipping_above_the_norm_does_nothing(student_folder: Path) -> None:
    off, wide = adapted(student_folder), adapted(student_folder)
    metrics = run(off, random_examples(4), grad_clip=0.0)
    run(wide, random_examples(4), grad_clip=2.0 * max(step.grad_norm for step in metrics))
    assert_equal_parameters(off, wide)


# The learning rate


def schedule_of(**options: object) -> list[float]:
    chosen = TrainingOptions(**{"learning_rate": 1e-3, **options})
    return [learning_rate_at(iteration, chosen) for iteration in range(1, chosen.iters + 1)]


def test_the_learning_rate_warms_up_along_a_line() -> None:
    rates = schedule_of(iters=100, warmup=0.1)
    assert rates[:10] == pytest.approx([1e-3 * step / 10 for step in range(1, 11)])


def test_the_cosine_falls_to_a_tenth_of_the_peak() -> None:
    rates = schedule_of(iters=100, warmup=0.1)
    assert max(rates) == pytest.approx(1e-3)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[54] == pytest.approx((1e-3 + 1e-4) / 2), "half-way between the end of the warm-up and the last step"
    assert rates[-1] == pytest.approx(1e-4)


def test_a_constant_schedule_stays_at_the_peak() -> None:
    assert schedule_of(iters=20, warmup=0.1, schedule="constant")[2:] == [1e-3] * 18


@given(iters=st.integers(1, 300), warmup=st.floats(0, 1), schedule=st.sampled_from(["cosine", "constant"]))
def test_the_learning_rate_is_above_zero_and_at_most_the_peak(iters: int, warmup: float, schedule: str) -> None:
    rates = schedule_of(iters=iters, warmup=warmup, schedule=schedule)
    assert all(0 < rate <= 1e-3 * (1 + 1e-12) for rate in rates)


def test_the_schedule_reaches_the_optimizer(student_folder: Path) -> None:
    """In the linear regime of Adam (see above) the length of the first update is in proportion to the rate."""
    moved = []
    for warmup in (0.0, 0.5):
        module = adapted(student_folder)
        before = flat(trainable(module))
        chosen = TrainingOptions(iters=8, learning_rate=1.0, warmup=warmup, schedule="constant", grad_clip=1e-9)
        next(train(module, random_examples(4), chosen, LOSSES, 0))
        moved.append(np.linalg.norm(flat(trainable(module)) - before))
    assert moved[1] == pytest.approx(moved[0] / 4, rel=0.02)


# Seeds


def test_the_same_seed_gives_the_same_parameters(student_folder: Path) -> None:
    one, other = adapted(student_folder), adapted(student_folder)
    assert [step.total for step in run(one, random_examples(8), seed=3)] == [
        step.total for step in run(other, random_examples(8), seed=3)
    ]
    assert_equal_parameters(one, other)


def test_another_seed_gives_another_order(student_folder: Path) -> None:
    one, other = adapted(student_folder), adapted(student_folder)
    run(one, random_examples(8), seed=3)
    run(other, random_examples(8), seed=4)
    assert not np.array_equal(flat(trainable(one)), flat(trainable(other)))


def test_another_seed_gives_another_adapter_to_begin_with(student_folder: Path) -> None:
    one, other = adapted(student_folder, seed=1), adapted(student_folder, seed=2)
    assert not np.array_equal(flat(trainable(one)), flat(trainable(other)))


def test_dropout_is_drawn_from_the_seed(student_folder: Path) -> None:
    trained = []
    for seed, dropout in ((0, 0.5), (0, 0.5), (0, 0.0)):
        module = adapted(student_folder, seed=seed, dropout=dropout)
        run(module, random_examples(4))
        trained.append(module)
    assert_equal_parameters(trained[0], trained[1])
    assert not np.array_equal(flat(trainable(trained[0])), flat(trainable(trained[2])))


def test_dropout_is_on_after_the_caller_switched_it_off(student_folder: Path) -> None:
    """Validation between two steps leaves the model in evaluation mode."""
    trained = []
    options = TrainingOptions(iters=4, learning_rate=1e-2)
    for validates in (False, True):
        module = adapted(student_folder, dropout=0.5)
        for _ in train(module, random_examples(4), options, LOSSES, 0):
            if validates:
                module.eval()
        trained.append(module)
    assert_equal_parameters(trained[0], trained[1])


# What is not finite


def poison(module: nn.Module, value: float) -> None:
    module.model.layers[1].mlp.down_proj.linear.weight[0, 0] = value


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_a_loss_that_is_not_finite_stops_before_anything_moves(student_folder: Path, value: float) -> None:
    module = adapted(student_folder)
    poison(module, value)
    if value == 1e38:
        module.model.layers[0].mlp.down_proj.linear.weight *= 1e38
    before = flat(trainable(module))
    with pytest.raises(NonFinite) as stopped:
        run(module, random_examples(4))
    assert stopped.value.iteration == 1
    assert np.array_equal(flat(trainable(module)), before)


def test_the_parameters_of_the_last_good_step_are_kept(student_folder: Path) -> None:
    module = adapted(student_folder)
    steps = train(module, random_examples(4), TrainingOptions(iters=6, learning_rate=1e-2), LOSSES, 0)
    for _ in range(3):
        next(steps)
    kept = flat(trainable(module))
    poison(module, math.nan)
    with pytest.raises(NonFinite) as stopped:
        next(steps)
    assert stopped.value.iteration == 4
    assert np.array_equal(flat(trainable(module)), kept)
    assert np.isfinite(kept).all()


def test_a_gradient_that_is_not_finite_is_named(student_folder: Path) -> None:
    """Its square is more than float32 can hold, while the loss is finite."""
    module = adapted(student_folder, scale=1e25)
    with pytest.raises(NonFinite, match="gradient"):
        run(module, random_examples(4))


# Going on


def snapshot(module: nn.Module, state: TrainingState) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """Copies of the adapter and of the state."""
    weights, arrays = trainable(module), state.arrays()
    return {name: mx.array(value) for name, value in weights.items()}, {name: mx.array(arrays[name]) for name in arrays}


def without_clock(step: StepMetrics) -> StepMetrics:
    return replace(step, **dict.fromkeys(StepMetrics.MEASURED, 0))


@pytest.mark.parametrize(
    ("lora", "options", "losses"),
    [
        ({"dropout": 0.5}, {"accumulate": 2}, {}),
        ({"type": "dora", "dropout": 0.2}, {}, {"alpha_end": 0.1}),
        ({"num_layers": 1}, {"schedule": "constant", "grad_clip": 0.0}, {"temperature_end": 1.0}),
        ({"keys": ("model.embed_tokens", "mlp.up_proj")}, {}, {"divergence": "jensen_shannon"}),
        ({"dropout": 0.5}, {"grad_checkpoint": True}, {}),
        ({"dropout": 0.5}, {"compile": "always", "accumulate": 2}, {"alpha_end": 0.1}),
        ({}, {"compile": "always", "grad_checkpoint": True}, {}),
    ],
    ids=["dropout", "dora", "one layer", "embedding", "recomputed", "compiled", "compiled and recomputed"],
)
def test_training_goes_on_from_any_step_bit_for_bit(
    student_folder: Path, lora: dict, options: dict, losses: dict
) -> None:
    examples = random_examples(5)
    chosen = TrainingOptions(**{"iters": 6, "learning_rate": 1e-2, "warmup": 0.4, "batch_size": 2, **options})
    objective = LossOptions(**losses)
    module = adapted(student_folder, seed=3, **lora)
    state = TrainingState(module, chosen)
    kept = [snapshot(module, state)]
    steps = []
    for step in train(module, examples, chosen, objective, 7, state):
        steps.append(without_clock(step))
        kept.append(snapshot(module, state))
    assert [step.iteration for step in steps] == list(range(1, 7))
    for made in (0, 1, 3, 5, 6):
        weights, arrays = kept[made]
        other = adapted(student_folder, seed=99, **lora)
        other.load_weights(list(weights.items()), strict=False)
        mx.random.seed(1234)
        again = TrainingState(other, chosen)
        again.restore(made, arrays)
        found = list(train(other, examples, chosen, objective, 7, again))
        assert [without_clock(step) for step in found] == steps[made:]
        assert_equal_parameters(other, module)
        assert again.iteration == 6
        end = again.arrays()
        assert all(mx.array_equal(end[name], value) for name, value in kept[-1][1].items())


def test_the_loop_goes_on_with_the_state_it_was_left_with(student_folder: Path) -> None:
    """Breaking out of the generator and asking for another is the same as not having stopped."""
    one, other = adapted(student_folder, dropout=0.5), adapted(student_folder, dropout=0.5)
    chosen = TrainingOptions(iters=6, learning_rate=1e-2)
    mx.random.seed(5)
    whole = [without_clock(step) for step in train(one, random_examples(5), chosen, LOSSES, 0)]
    mx.random.seed(5)
    state, found = TrainingState(other, chosen), []
    while state.iteration < 6:
        found.append(without_clock(next(train(other, random_examples(5), chosen, LOSSES, 0, state))))
    assert found == whole
    assert_equal_parameters(one, other)
    assert list(train(other, random_examples(5), chosen, LOSSES, 0, state)) == []


@pytest.mark.parametrize("compile", ["never", "always"])
def test_what_a_state_gave_stays_as_it_was(student_folder: Path, compile: str) -> None:
    module = adapted(student_folder, dropout=0.5)
    chosen = TrainingOptions(iters=3, learning_rate=1e-2, compile=compile)
    state = TrainingState(module, chosen)
    given = state.arrays()
    before = {name: np.array(value) for name, value in given.items()}
    list(train(module, random_examples(4), chosen, LOSSES, 0, state))
    changed = {name for name, value in given.items() if not np.array_equal(np.array(value), before[name])}
    assert changed == set()


@pytest.mark.parametrize("compile", ["never", "always"])
def test_weights_that_were_taken_at_a_step_stay_as_they_were(student_folder: Path, compile: str) -> None:
    """They are what is kept as the best, without a copy."""
    module = adapted(student_folder)
    steps = train(module, random_examples(4), TrainingOptions(iters=4, compile=compile), LOSSES, 0)
    next(steps)
    taken = trainable(module)
    before = {name: np.array(value) for name, value in taken.items()}
    list(steps)
    assert all(np.array_equal(np.array(taken[name]), value) for name, value in before.items())
    assert any(not np.array_equal(np.array(trainable(module)[name]), value) for name, value in before.items())


@pytest.mark.parametrize("compile", ["never", "always"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_that_is_not_finite_is_not_applied(student_folder: Path, compile: str, accumulate: int) -> None:
    module = adapted(student_folder)
    chosen = TrainingOptions(iters=4, batch_size=1, accumulate=accumulate, learning_rate=1e-2, compile=compile)
    state = TrainingState(module, chosen)
    steps = train(module, random_examples(6), chosen, LOSSES, 0, state)
    next(steps)
    next(steps)
    before = flat(trainable(module))
    poison(module, math.nan)
    with pytest.raises(NonFinite) as stopped:
        next(steps)
    assert (stopped.value.iteration, state.iteration) == (3, 2)
    assert np.array_equal(flat(trainable(module)), before)


# Compiled steps


@pytest.mark.parametrize("targets", ["sampled", "hidden states"])
@pytest.mark.parametrize("options", [{}, {"accumulate": 3, "batch_size": 2}, {"grad_checkpoint": True}], ids=str)
def test_a_compiled_run_is_the_plain_one_to_rounding(student_folder: Path, targets: str, options: dict) -> None:
    examples = random_examples(7, share=0.8)
    if targets == "hidden states":
        examples = [with_exact_targets(example, 320, at)[0] for at, example in enumerate(examples)]
    losses = LossOptions(alpha_end=0.1, divergence="skewed_kl")
    plain, compiled = (
        run(adapted(student_folder), examples, losses, compile=compile, learning_rate=1e-3, **options)
        for compile in ("never", "always")
    )
    for one, other in zip(plain, compiled, strict=True):
        assert (one.response_tokens, one.learning_rate) == (other.response_tokens, other.learning_rate)
        assert other.padded_tokens % 32 == 0
        for name in ("total", "kd", "ce", "grad_norm"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-3)


def test_what_is_compiled_is_not_compiled_again_when_alpha_changes(student_folder: Path) -> None:
    """Alpha is an argument of the compiled step: with it baked in, the first value would stay."""
    losses = LossOptions(alpha=1.0, alpha_end=0.0)
    steps = run(adapted(student_folder), random_examples(4), losses, compile="always", iters=5, batch_size=4)
    for at, step in enumerate(steps):
        alpha = 1.0 - at / 4
        assert step.total == pytest.approx(alpha * step.kd + (1 - alpha) * step.ce, rel=1e-4)


@pytest.mark.parametrize(
    ("compile", "losses", "expected"),
    [
        ("always", {}, True),
        ("always", {"alpha_end": 0.1}, True),
        ("always", {"temperature_end": 1.0}, False),
        ("never", {}, False),
    ],
)
def test_a_step_is_compiled_where_it_would_not_be_compiled_each_time(
    compile: str, losses: dict, expected: bool
) -> None:
    assert compiles_gradient(TrainingOptions(compile=compile), LossOptions(**losses)) is expected


# Micro-batches and the room they have


@pytest.mark.parametrize("compile", ["never", "always"])
def test_the_sums_over_micro_batches_are_those_of_the_whole(student_folder: Path, compile: str) -> None:
    module = adapted(student_folder)
    module.update(tree_map(lambda value: value + 0.02 * mx.random.normal(value.shape), module.trainable_parameters()))
    examples = random_examples(6)
    gradients, objective = Gradients(module, compile == "always"), LOSSES.final
    multiple = 32 if compile == "always" else 1
    whole, slope = gradients(collate(examples, objective.temperature, multiple=multiple), objective)
    halves = [
        gradients(collate(part, objective.temperature, multiple=multiple), objective)
        for part in (examples[:2], examples[2:])
    ]
    for name in ("total", "kd", "ce"):
        parts = sum(getattr(sums, name).item() for sums, _ in halves)
        assert parts == pytest.approx(getattr(whole, name).item(), rel=1e-5)
    found = sum(flat(part) for _, part in halves)
    assert np.linalg.norm(found - flat(slope)) < 1e-4 * np.linalg.norm(found)
    batches = [collate(part, objective.temperature) for part in (examples[:2], examples[2:])]
    sums, mean = sum_gradients(Gradients(module), batches, objective, tokens=10)
    assert sums.total.item() == pytest.approx(whole.total.item(), rel=1e-5)
    assert np.linalg.norm(10 * flat(mean) - flat(slope)) < 1e-4 * np.linalg.norm(found)


def room_for(module: nn.Module, examples: Sequence[Example], budget: int) -> Room:
    return Room.of(module, examples, TrainingOptions(), LOSSES, budget)


def test_a_micro_batch_that_fits_is_left_whole_and_in_its_order(student_folder: Path) -> None:
    examples = random_examples(6)
    assert room_for(adapted(student_folder), examples, 10**9).cut(examples) == [examples]


def test_without_room_each_example_stands_alone(student_folder: Path) -> None:
    examples = random_examples(6)
    parts = room_for(adapted(student_folder), examples, 0).cut(examples)
    assert sorted(part[0].where for part in parts) == sorted(example.where for example in examples)
    assert [len(part) for part in parts] == [1] * 6


def test_what_fits_alone_by_its_need_stands_alone_and_no_more(student_folder: Path) -> None:
    module, examples = adapted(student_folder), random_examples(8)
    need = room_for(module, examples, 0).need(examples)
    counts = [len(room_for(module, examples, budget).cut(examples)) for budget in range(need, 2 * need, need // 16)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] >= 1
    weights = sum(value.nbytes for _, value in tree_flatten(module.parameters()))
    assert need > weights
    assert room_for(module, examples, 0).need(examples[:1]) < need, "a shorter one"


@pytest.mark.parametrize("share", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "batch_size": 3}, {"compile": "always"}], ids=str)
def test_a_step_in_parts_is_the_whole_step(student_folder: Path, share: float, options: dict) -> None:
    examples = random_examples(8)
    chosen = TrainingOptions(**{"iters": 3, "learning_rate": 1e-3, "batch_size": 8, **options})
    found = []
    for parted in (False, True):
        module = adapted(student_folder)
        room = None
        if parted:
            whole = Room.of(module, examples, chosen, LOSSES, 0).need(examples)
            room = Room.of(module, examples, chosen, LOSSES, int(share * 1.2 * whole))
        found.append((list(train(module, examples, chosen, LOSSES, 0, room=room)), flat(trainable(module))))
    (one, before), (other, after) = found
    for whole_step, step in zip(one, other, strict=True):
        assert step.response_tokens == whole_step.response_tokens
        for name in ("total", "kd", "ce", "grad_norm"):
            assert getattr(step, name) == pytest.approx(getattr(whole_step, name), rel=1e-4)
    assert np.linalg.norm(after - before) < 1e-3 * np.linalg.norm(before)


def test_what_is_measured_is_told_apart_from_what_is_the_same_each_time(student_folder: Path) -> None:
    names = {item.name for item in fields(StepMetrics)}
    assert set(StepMetrics.MEASURED) == {"seconds", "tokens_per_second", "peak_memory"} < names
    one, other = (run(adapted(student_folder), random_examples(4)) for _ in range(2))
    assert [without_clock(step) for step in one] == [without_clock(step) for step in other]
