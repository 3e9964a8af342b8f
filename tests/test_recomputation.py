"""Gradient checkpointing that changes memory and time, and nothing else."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from true_kd.models import LoraOptions, add_lora, trainable
from true_kd.models.recomputation import recompute_layers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
GEMMA4 = {
    "sliding_window": 4,
    "sliding_window_pattern": 2,
    "num_kv_shared_layers": 1,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "global_head_dim": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "gemma2": {},
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2},
    "phi3": {},
    "gemma4_text": GEMMA4,
}
TOKENS = mx.array([[5, 9, 2, 7, 11, 3, 8, 1], [4, 4, 6, 0, 63, 20, 30, 2]])


def model(family: str, **changes: Any) -> nn.Module:
    """A random model of a family."""
    code = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(7)
    module = code.Model(code.ModelArgs.from_dict({"model_type": family, **SIZES, **FAMILIES[family], **changes}))
    mx.eval(module.parameters())
    return module


def student(family: str, options: LoraOptions | None = None, **changes: Any) -> nn.Module:
    """A random model with an adapter whose both factors are random, in training mode."""
    module = model(family, **changes)
    add_lora(module, options or LoraOptions(rank=4))
    for _, part in module.named_modules():
        if "lora_b" in part:
            part.lora_b = 0.1 * mx.random.normal(part.lora_b.shape)
    module.train()
    return module


def gradients(module: nn.Module) -> dict[str, mx.array]:
    """Gradient of a loss over the logits, and the loss as "loss"."""
    mx.random.seed(11)
    loss, gradient = nn.value_and_grad(module, lambda: mx.sum(mx.square(module(TOKENS))))()
    mx.eval(loss, gradient)
    return {**dict(tree_flatten(gradient)), "loss": loss}


def assert_equal(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not mx.array_equal(found[name], value)]
    assert different == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_bit_for_bit_those_without(family: str, dropout: float) -> None:
    module = student(family, LoraOptions(rank=4, dropout=dropout))
    expected = gradients(module)
    recompute_layers(module)
    assert_equal(gradients(module), expected)
    assert_equal(gradients(module), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_compiled_step_has_the_gradients_without(dropout: float) -> None:
    module = student("qwen3", LoraOptions(rank=4, dropout=dropout))
    expected = gradients(module)
    recompute_layers(module)
    state = [module.state, mx.random.state]
    compiled = mx.compile(nn.value_and_grad(module, lambda: mx.sum(mx.square(module(TOKENS)))), state, state)
    for _ in range(2):
        mx.random.seed(11)
        loss, gradient = compiled()
        found = {**dict(tree_flatten(gradient)), "loss": loss}
        assert all(mx.allclose(found[name], value, rtol=1e-4, atol=1e-4) for name, value in expected.items())


def test_random_numbers_after_a_step_are_those_without() -> None:
    module = student("qwen3", LoraOptions(rank=4, dropout=0.3))
    gradients(module)
    expected = mx.random.uniform(shape=(4,))
    recompute_layers(module)
    gradients(module)
    assert mx.array_equal(mx.random.uniform(shape=(4,)), expected)


def test_gradients_of_some_layers_only_and_of_all_weights_are_those_without() -> None:
    for options in (LoraOptions(rank=4, num_layers=1), LoraOptions(rank=4, type="dora", keys=("self_attn.q_proj",))):
        module = student("qwen3", options)
        expected = gradients(module)
        recompute_layers(module)
        assert_equal(gradients(module), expected)
    whole = model("llama")
    whole.train()
    expected = gradients(whole)
    recompute_layers(whole)
    assert_equal(gradients(whole), expected)


def test_a_quantised_student_has_the_gradients_without() -> None:
    module = model("qwen3", hidden_size=64, intermediate_size=64, head_dim=32)
    nn.quantize(module, group_size=32, bits=4)
    add_lora(module, LoraOptions(rank=4))
    module.train()
    expected = gradients(module)
    recompute_layers(module)
    assert_equal(gradients(module), expected)


def test_a_float16_student_has_the_gradients_without() -> None:
    module = student("llama")
    module.set_dtype(mx.float16)
    expected = gradients(module)
    recompute_layers(module)
    assert_equal(gradients(module), expected)


def test_doing_it_twice_is_doing_it_once() -> None:
    module = student("qwen3")
    recompute_layers(module)
    kinds = [type(layer) for layer in module.layers]
    recompute_layers(module)
    assert [type(layer) for layer in module.layers] == kinds


def test_another_model_of_the_same_class_is_untouched() -> None:
    module, other = student("qwen3"), student("qwen3")
    kind = type(other.layers[0])
    call = kind.__call__
    recompute_layers(module)
    assert type(other.layers[0]) is kind
    assert kind.__call__ is call
    assert all(isinstance(layer, kind) and type(layer) is not kind for layer in module.layers)


def test_names_of_parameters_and_the_saved_adapter_are_as_before(tmp_path: Path) -> None:
    module = student("gemma3_text")
    names = [name for name, _ in tree_flatten(module.parameters())]
    mx.save_safetensors(str(tmp_path / "before.safetensors"), trainable(module))
    text = repr(module)
    recompute_layers(module)
    gradients(module)
    assert [name for name, _ in tree_flatten(module.parameters())] == names
    assert repr(module) == text
    mx.save_safetensors(str(tmp_path / "after.safetensors"), trainable(module))
    assert (tmp_path / "after.safetensors").read_bytes() == (tmp_path / "before.safetensors").read_bytes()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_generation_with_caches_gives_the_same_tokens(mode: str) -> None:
    from mlx_lm.generate import generate_step

    def tokens(module: nn.Module) -> list[int]:
        getattr(module, mode)()
        return [int(token) for token, _ in generate_step(TOKENS[0], module, max_tokens=6)]

    module = student("gemma3_text")
    expected = tokens(module)
    recompute_layers(module)
    assert tokens(module) == expected


class Remembering(nn.Module):
    """A layer that writes into what it is given, as some do while training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def __call__(self, states: mx.array, shared: dict[str, int]) -> mx.array:
        shared["calls"] = shared.get("calls", 0) + 1
        return self.linear(states) * shared["calls"]


def test_a_layer_that_writes_into_its_arguments_runs_once() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [Remembering()]

    module, shared = Model(), {}
    recompute_layers(module)
    nn.value_and_grad(module, lambda: mx.sum(module.layers[0](mx.ones((2, 4)), shared)))()
    assert shared == {"calls": 1}


PEAK = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import true_kd, mlx.core as mx, mlx.nn as nn
import test_recomputation as toy
from true_kd.models.recomputation import recompute_layers
module = toy.student("qwen3", hidden_size=64, num_hidden_layers=8, intermediate_size=256)
mx.eval(module.parameters())
recompute_layers(module) if sys.argv[2] == "True" else None
mx.set_memory_limit(1)  # no running ahead: the peak is what is needed
tokens = mx.zeros((4, 256), dtype=mx.int32)
start = mx.get_active_memory()
mx.reset_peak_memory()
loss, gradient = nn.value_and_grad(module, lambda: mx.sum(mx.square(module.model(tokens))))()
mx.eval(loss, gradient)
print(mx.get_peak_memory() - start)
"""


def test_the_peak_of_eight_layers_is_less_than_half() -> None:
    def peak(recompute: bool) -> int:
        command = [sys.executable, "-c", PEAK, json.dumps([str(Path(__file__).parent)]), str(recompute)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(run.stdout)

    with_all, with_one = peak(False), peak(True)
    assert with_one < 0.5 * with_all


def test_no_graph_stays_behind_in_the_parameters() -> None:
    module = student("qwen3", LoraOptions(rank=4, dropout=0.3))
    recompute_layers(module)
    gradients(module)
    before = mx.get_active_memory()
    for _ in range(3):
        gradients(module)
    assert mx.get_active_memory() - before < 4096
