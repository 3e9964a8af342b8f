"""Heads come off every family of mlx-lm as they were, by the model's own code, and a plain one can be stored."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from families import FAMILIES, SIZES, VOCAB, build
from mlx.utils import tree_flatten, tree_map

from true_kd.errors import ModelError
from true_kd.models import (
    LanguageModel,
    LoraOptions,
    ModelOptions,
    Split,
    add_lora,
    load_head,
    open_model,
    save_head,
    split_head,
    trainable,
)

WIDTH = SIZES["hidden_size"]
PLAIN = [name for name, family in FAMILIES.items() if family.plain]
NOT_PLAIN = [name for name, family in FAMILIES.items() if not family.plain]
SOME_TOKENS = mx.array([[5, 17, 99, 0, 42, 63], [1, 1, 2, 3, 5, 8]])
SOME_ROWS = mx.array([1, 4, 5, 6, 11])

any_family = pytest.mark.parametrize("name", FAMILIES)


def logits_of(module: nn.Module, tokens: mx.array = SOME_TOKENS) -> mx.array:
    return module(tokens).astype(mx.float32)


def assert_parts_give_the_whole(split: Split, module: nn.Module, within: float = 1e-5) -> None:
    states, expected = split.body(SOME_TOKENS), logits_of(module)
    assert mx.allclose(split.head(states).astype(mx.float32), expected, rtol=within, atol=within)
    rows = split.head(split.states_at(SOME_TOKENS, SOME_ROWS)).astype(mx.float32)
    assert mx.allclose(rows, expected.reshape(-1, VOCAB)[SOME_ROWS], rtol=within, atol=within)


def adapted(name: str, keys: tuple[str, ...] | None = None, kind: str = "lora") -> nn.Module:
    """A model that bears an adapter which changes it."""
    module = build(name)
    add_lora(module, LoraOptions(type=kind, rank=2, scale=1.0, keys=keys or FAMILIES[name].keys))
    module.update(tree_map(lambda value: value + 0.1 * mx.random.normal(value.shape), module.trainable_parameters()))
    module.eval()
    return module


def operations(*arrays: mx.array) -> list[str]:
    """Names of what MLX would compute for some arrays."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return [line.split('"')[1] for line in text.getvalue().splitlines() if "shape=rectangle" in line]


# Parts and whole


@any_family
def test_a_head_comes_off_any_family(name: str) -> None:
    module = build(name)
    split = split_head(module)
    assert (split.layer, split.plain) == (FAMILIES[name].layer, FAMILIES[name].plain)
    assert split.body(SOME_TOKENS).shape == (2, 6, WIDTH)
    assert_parts_give_the_whole(split, module)


@any_family
def test_a_head_takes_states_of_any_shape(name: str) -> None:
    split = split_head(build(name))
    states = mx.random.normal((2, 3, WIDTH))
    logits = split.head(states)
    assert logits.shape == (2, 3, VOCAB)
    for shape in ((6,), (1, 6), (3, 2), (2, 1, 3)):
        assert split.head(states.reshape(*shape, WIDTH)).shape == (*shape, VOCAB)
        assert mx.allclose(split.head(states.reshape(*shape, WIDTH)).reshape(logits.shape), logits, atol=1e-5)
    assert mx.allclose(split.head(states[1, 2]), logits[1, 2], atol=1e-5)


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_a_head_does_beyond_its_layer_is_large_in_the_zoo(name: str) -> None:
    module = build(name)
    split = split_head(module)
    [layer] = [layer for found, layer in module.named_modules() if found == split.layer]
    states = split.body(SOME_TOKENS)
    linear = getattr(layer, "as_linear", layer)(states)
    assert mx.abs(linear - split.head(states)).max() > 0.05 * mx.abs(linear).max()


@pytest.mark.parametrize("stretch", [0.01, 1.0, 3.0, 10.0, 20.0])
def test_a_soft_capped_head_is_never_taken_for_a_plain_one(stretch: float) -> None:
    module = build("gemma2", stretch=stretch)
    split = split_head(module)
    assert not split.plain
    everything = mx.arange(VOCAB)[:, None]
    assert mx.allclose(split.head(split.body(everything)), logits_of(module, everything), rtol=1e-5, atol=1e-5)


def test_a_head_of_zeros_is_not_called_plain() -> None:
    """Zeros are zeros before and after soft-capping."""
    module = build("nanochat")
    module.lm_head.weight = mx.zeros_like(module.lm_head.weight)
    split = split_head(module)
    assert not split.plain
    module.lm_head.weight = mx.random.normal(module.lm_head.weight.shape)
    assert_parts_give_the_whole(split, module)


@pytest.mark.parametrize("name", ["cohere", "gemma2", "gpt_neox", "llama tied", "minicpm untied", "phi"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bfloat16", "float16"])
def test_a_head_comes_off_in_half_precision(name: str, dtype: mx.Dtype) -> None:
    module = build(name)
    module.set_dtype(dtype)
    split = split_head(module)
    assert (split.layer, split.plain) == (FAMILIES[name].layer, FAMILIES[name].plain)
    assert_parts_give_the_whole(split, module, within=4e-2)


# mlx-lm's MiniCPM multiplies by the weights of a tied embedding as they are stored, which fails for packed ones.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "minicpm tied"])
def test_a_head_comes_off_a_quantised_model(name: str) -> None:
    module = build(name)
    nn.quantize(
        module,
        group_size=32,
        bits=4,
        class_predicate=lambda _, layer: isinstance(layer, (nn.Linear, nn.Embedding)) and layer.weight.shape[-1] >= 32,
    )
    split = split_head(module)
    assert (split.layer, split.plain) == (FAMILIES[name].layer, FAMILIES[name].plain)
    assert_parts_give_the_whole(split, module)


@any_family
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_head_comes_off_an_adapted_model(name: str, kind: str) -> None:
    module = adapted(name, kind=kind)
    split = split_head(module)
    assert (split.layer, split.plain) == (FAMILIES[name].layer, FAMILIES[name].plain)
    assert_parts_give_the_whole(split, module)


ADAPTED_HEADS = [
    (name, FAMILIES[name].layer)
    for name in ("cohere", "gemma2", "gemma3", "granite untied", "gpt_neox", "llama tied", "llama untied", "phi")
]


@pytest.mark.parametrize(("name", "key"), ADAPTED_HEADS)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_head_comes_off_with_its_adapter(name: str, key: str, kind: str) -> None:
    module = adapted(name, (key,), kind)
    assert any(found.startswith(f"{key}.") for found in trainable(module))
    split = split_head(module)
    assert (split.layer, split.plain) == (key, FAMILIES[name].plain)
    assert_parts_give_the_whole(split, module)


@pytest.mark.parametrize("name", ["llama untied", "llama tied", "gemma2"])
def test_parts_see_what_is_done_to_the_module_later(name: str) -> None:
    module = build(name)
    split = split_head(module)
    add_lora(module, LoraOptions(rank=2, keys=(split.layer,)))
    module.update(tree_map(lambda value: value + 0.1, module.trainable_parameters()))
    module.eval()
    assert_parts_give_the_whole(split, module)


# Gradients


def assert_gradients_are_those_of_the_whole(module: nn.Module, split: Split) -> None:
    """One pass through the model, against head and body apart, joined by the gradient at the states."""
    weights = mx.random.normal((len(SOME_ROWS), VOCAB), key=mx.random.key(3))

    def loss(logits: mx.array) -> mx.array:
        return mx.sum(weights * mx.logsumexp(logits, axis=-1, keepdims=True) - weights * logits)

    def dense() -> mx.array:
        return loss(module(SOME_TOKENS).reshape(-1, VOCAB)[SOME_ROWS])

    states = split.states_at(SOME_TOKENS, SOME_ROWS)
    at_states = mx.grad(lambda states: loss(split.head(states)))(states)

    def apart() -> mx.array:
        through_body = mx.sum(split.states_at(SOME_TOKENS, SOME_ROWS) * at_states)
        return through_body + loss(split.head(states))

    _, expected = nn.value_and_grad(module, dense)()
    _, found = nn.value_and_grad(module, apart)()
    found = dict(tree_flatten(found))
    for name, value in tree_flatten(expected):
        assert mx.allclose(found[name], value, rtol=1e-3, atol=1e-4 * mx.abs(value).max().item() + 1e-7), name
    assert any(mx.any(value != 0).item() for value in found.values())


@any_family
def test_the_gradients_through_the_parts_are_those_of_the_whole(name: str) -> None:
    module = build(name)
    assert_gradients_are_those_of_the_whole(module, split_head(module))


@pytest.mark.parametrize(("name", "key"), ADAPTED_HEADS)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_gradients_of_an_adapted_head_are_those_of_the_whole(name: str, key: str, kind: str) -> None:
    module = adapted(name, (key,), kind)
    assert_gradients_are_those_of_the_whole(module, split_head(module))


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "llama tied"])
def test_a_head_can_be_compiled_and_checkpointed(name: str) -> None:
    split = split_head(build(name))
    states = split.states_at(SOME_TOKENS, SOME_ROWS)
    expected = split.head(states)
    assert mx.allclose(mx.compile(split.head)(states), expected, rtol=1e-5, atol=1e-5)
    cotangent = mx.random.normal(expected.shape)
    _, [gradient] = mx.vjp(split.head, [states], [cotangent])
    _, [recomputed] = mx.vjp(mx.checkpoint(split.head), [states], [cotangent])
    assert mx.allclose(recomputed, gradient, rtol=1e-5, atol=1e-5)


# What is computed, and what is left alone


class Asking(nn.Module):
    """A model that asks which layers are in it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Embedding(VOCAB, WIDTH)
        self.out = nn.Linear(WIDTH, VOCAB)

    def __call__(self, tokens: mx.array) -> mx.array:
        states = self.body(tokens)
        return self.out(states) if "out" in self else self.body.as_linear(states)


def test_a_part_taken_out_is_still_in_the_model() -> None:
    module = Asking()
    split = split_head(module)
    assert (split.layer, split.plain) == ("out", True)
    assert_parts_give_the_whole(split, module)


@any_family
def test_neither_part_does_the_work_of_the_other(name: str) -> None:
    module = build(name)
    split = split_head(module)
    states = split.body(SOME_TOKENS)
    body = operations(states)
    mx.eval(states)
    head, whole = operations(split.head(states)), operations(module(SOME_TOKENS))
    # The head reshapes its states on the way in and out.
    assert len(body) + len(head) <= len(whole) + 4
    assert len(head) < 14


@any_family
def test_splitting_changes_nothing_in_the_model(name: str) -> None:
    module = build(name)
    module.freeze()
    module.layers[-1].unfreeze()
    before = logits_of(module)
    modules, parameters = module.named_modules(), dict(tree_flatten(module.parameters()))
    attributes = {found: dict(vars(part)) for found, part in modules}
    unfrozen = list(trainable(module))
    split = split_head(module)
    mx.eval(split.head(split.body(SOME_TOKENS)))
    assert [(found, id(part)) for found, part in module.named_modules()] == [
        (found, id(part)) for found, part in modules
    ]
    assert {found: dict(vars(part)) for found, part in module.named_modules()} == attributes
    after = dict(tree_flatten(module.parameters()))
    assert list(after) == list(parameters)
    assert all(mx.array_equal(after[found], value) for found, value in parameters.items())
    assert list(trainable(module)) == unfrozen
    assert mx.array_equal(logits_of(module), before)


@pytest.mark.parametrize("training", [True, False])
def test_splitting_leaves_the_mode_as_it_was(student: LanguageModel, training: bool) -> None:
    student.module.train(training)
    split_head(student.module)
    assert student.module.training is training


@pytest.mark.parametrize("training", [True, False])
def test_the_proof_holds_with_dropout(student: LanguageModel, training: bool) -> None:
    add_lora(student.module, LoraOptions(rank=2, dropout=0.5, keys=("model.embed_tokens", "self_attn.q_proj")))
    student.module.train(training)
    assert split_head(student.module).plain


# What cannot be taken apart


class Mixing(nn.Module):
    """Logits of a token that depend on those before, after all hidden states are there."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def __call__(self, tokens: mx.array) -> mx.array:
        return mx.cumsum(self.head(self.embedding(tokens)), axis=1)


@pytest.mark.parametrize("module", [nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10)), Mixing()])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_cannot_be_taken_apart_is_refused(module: nn.Module, training: bool) -> None:
    module.train(training)
    with pytest.raises(ModelError, match="expected a body and an output head") as refusal:
        split_head(module)
    assert "\n" not in str(refusal.value)
    assert module.training is training


# Heads on disk

QUANTISED = {
    "as it is": None,
    "4 bits": {"bits": 4, "group_size": 32},
    "8 bits": {"bits": 8, "group_size": 32},
    "2 bits": {"bits": 2, "group_size": 32},
    "mxfp4": {"mode": "mxfp4"},
    "mxfp8": {"mode": "mxfp8"},
    "nvfp4": {"mode": "nvfp4"},
}


def head_and_copy(module: nn.Module, folder: Path) -> tuple[mx.array, Callable[[mx.array], mx.array], mx.array]:
    """Hidden states of a model, its head as it was saved and read again, and the model's own logits."""
    split = split_head(module)
    assert split.plain
    save_head(module, folder / "head.safetensors")
    return split.body(SOME_TOKENS), load_head(folder / "head.safetensors"), logits_of(module)


@pytest.mark.parametrize("packing", QUANTISED.values(), ids=QUANTISED.keys())
@pytest.mark.parametrize("layer", ["embedding", "linear", "linear with bias"])
def test_a_saved_head_gives_the_models_logits(tmp_path: Path, layer: str, packing: dict | None) -> None:
    module = build("qwen2 tied" if layer == "embedding" else "qwen2 untied")
    if layer == "linear with bias":
        module.lm_head.bias = mx.random.normal((VOCAB,))
    if packing is not None:
        nn.quantize(module, **packing)
    states, head, expected = head_and_copy(module, tmp_path)
    assert mx.allclose(head(states), expected, rtol=1e-5, atol=1e-5)
    # As they are stored: 11 bits a number.
    assert mx.allclose(head(states.astype(mx.float16)).astype(mx.float32), expected, rtol=3e-3, atol=2e-2)


@pytest.mark.parametrize("name", PLAIN)
def test_the_saved_head_of_any_family_gives_its_logits(tmp_path: Path, name: str) -> None:
    states, head, expected = head_and_copy(build(name), tmp_path)
    assert mx.allclose(head(states), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("packing", [None, {"bits": 4, "group_size": 32}], ids=["as it is", "4 bits"])
def test_a_saved_head_of_half_precision_stays_so(tmp_path: Path, dtype: mx.Dtype, packing: dict | None) -> None:
    module = build("qwen2 untied")
    module.set_dtype(dtype)
    if packing is not None:
        nn.quantize(module, **packing)
    states, head, expected = head_and_copy(module, tmp_path)
    stored = mx.load(str(tmp_path / "head.safetensors"))
    assert {array.dtype for array in stored.values()} <= {dtype, mx.uint32}
    assert mx.allclose(head(states.astype(mx.float16)).astype(mx.float32), expected, rtol=2e-2, atol=5e-2)


def test_a_saved_head_takes_no_more_than_its_own_arrays(tmp_path: Path, quantised_folder: Path) -> None:
    packed, unpacked = (
        open_model(ModelOptions(model=str(quantised_folder), dequantize=choice), "teacher").module
        for choice in ("never", "always")
    )
    sizes = []
    for module in (packed, unpacked):
        save_head(module, tmp_path / "head.safetensors")
        sizes.append((tmp_path / "head.safetensors").stat().st_size)
    whole = 320 * 32 * 4
    assert whole < sizes[1] < whole + 300
    assert sizes[0] < whole / 4, "4 bits, and a scale and a bias of 32 values"


def test_a_saved_head_is_the_same_to_the_byte_each_time(tmp_path: Path, student: LanguageModel) -> None:
    for name in ("one.safetensors", "other.safetensors"):
        save_head(student.module, tmp_path / name)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "other.safetensors").read_bytes()


def test_a_saved_head_does_not_need_its_model(tmp_path: Path, student_folder: Path) -> None:
    module = open_model(ModelOptions(model=str(student_folder)), "teacher").module
    states, head, expected = head_and_copy(module, tmp_path)
    mx.eval(states, expected)
    module.update(tree_map(mx.zeros_like, module.parameters()))
    del module
    assert mx.allclose(head(states), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2 tied", "qwen2 untied"])
def test_a_head_with_an_adapter_is_not_saved(tmp_path: Path, name: str) -> None:
    module = adapted(name, (FAMILIES[name].layer,))
    with pytest.raises(ModelError, match=r"its output head is a LoRA\w+, expected a plain linear layer"):
        save_head(module, tmp_path / "head.safetensors")
    assert not (tmp_path / "head.safetensors").exists()


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_a_head_that_is_more_than_its_layer_is_not_saved(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"with soft-capping or scaling, expected a plain linear layer"):
        save_head(build(name), tmp_path / "head.safetensors")
    assert not (tmp_path / "head.safetensors").exists()


def test_a_model_without_an_output_layer_has_no_head_to_save(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="output head"):
        save_head(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10)), tmp_path / "head.safetensors")
    assert not (tmp_path / "head.safetensors").exists()
