"""What the machine has of memory, what a step needs, and how a micro-batch is cut to fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st

from true_kd import memory
from true_kd.memory import (
    CACHE_SHARE,
    CUDA_SHARE,
    HOST_SHARE,
    METAL_SHARE,
    StepMemory,
    budget_bytes,
    default_budget,
    host_memory,
    set_guards,
    split_micro_batch,
)
from true_kd.models import LoraOptions, add_lora
from true_kd.models.recomputation import recompute_layers

# The machine.


def grouped(folder: Path, membership: str, limits: dict[str, str]) -> Path:
    """The files of a machine whose process is in some control groups."""
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "self" / "cgroup").write_text(membership)
    for name, limit in limits.items():
        path = folder / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")
    return folder


@pytest.mark.parametrize(
    ("membership", "limits", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "1000000"}, 1_000_000),
        ("0::/a/b\n", {"a/b/memory.max": "700000", "a/memory.max": "1000000"}, 700_000),
        ("0::/\n", {"memory.max": "500000"}, 500_000),
        ("0::/a\n", {"other/memory.max": "5"}, None),
        ("5:cpu:/x\n4:memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": "300000"}, 300_000),
        ("4:memory:/of/the/host\n", {"memory/memory.limit_in_bytes": "200000"}, 200_000),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("0::/../a\n", {"memory.max": "100000"}, 100_000),
    ],
)
def test_the_smallest_limit_around_the_process_counts(
    membership: str, limits: dict[str, str], expected: int | None, tmp_path: Path
) -> None:
    machine = host_memory(tmp_path / "nothing")
    assert machine > 2**28
    assert host_memory(grouped(tmp_path, membership, limits)) == (expected or machine)


def test_gigabytes_are_decimal_and_none_is_the_default() -> None:
    assert budget_bytes(1.5) == 1_500_000_000
    assert budget_bytes(None) == default_budget()


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="of a machine that computes on its CPU")
def test_a_cpu_gets_a_share_of_the_host() -> None:
    assert default_budget() == int(HOST_SHARE * host_memory())


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"max_recommended_working_set_size": 10_000, "memory_size": 16_000}, int(METAL_SHARE * 10_000)),
        ({"total_memory": 10_000, "free_memory": 5_000}, int(CUDA_SHARE * 10_000)),
        ({"device_name": "says nothing of memory"}, int(HOST_SHARE * host_memory())),
    ],
)
def test_a_gpu_gets_a_share_of_what_it_reports(
    info: dict[str, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert default_budget() == expected


def test_guards_on_metal_wire_less_than_all_that_is_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[str, int] = {}
    for name in ("memory", "cache", "wired"):
        monkeypatch.setattr(mx, f"set_{name}_limit", lambda limit, name=name: limits.update({name: limit}))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 10_000})
    set_guards(20_000)
    assert limits == {"memory": 20_000, "cache": int(CACHE_SHARE * 20_000), "wired": int(METAL_SHARE * 10_000)}
    set_guards(4_000)
    assert limits["wired"] == 4_000


def test_guards_off_metal_leave_wiring_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: pytest.fail("wired"))
    before = mx.set_memory_limit(10**9)
    set_guards(2 * 10**9)
    assert mx.set_memory_limit(before) == 2 * 10**9


# The step.

VOCAB = 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def student(options: LoraOptions | None = None, bits: int = 0, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """A random student with an adapter."""
    from mlx_lm.models import qwen3

    module = qwen3.Model(qwen3.ModelArgs.from_dict({"model_type": "qwen3", **SIZES}))
    module.set_dtype(dtype)
    if bits:
        nn.quantize(module, group_size=32, bits=bits)
    add_lora(module, options or LoraOptions(rank=8))
    module.train()
    mx.eval(module.parameters())
    return module


def needed(module: nn.Module, sequences: int, width: int) -> int:
    """Measured peak bytes of a body's gradient above what was there before."""
    tokens = mx.zeros((sequences, width), dtype=mx.int32)
    mx.eval(tokens)
    # At the least limit MLX does not run ahead: what it takes is what it needs.
    limit = mx.set_memory_limit(1)
    try:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(nn.value_and_grad(module, lambda: mx.sum(mx.square(module.model(tokens))))())
        return mx.get_peak_memory() - before
    finally:
        mx.set_memory_limit(limit)


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="the constants are of MLX's CPU allocator")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("sequences", "width"), [(4, 64), (2, 256)])
@pytest.mark.parametrize(
    ("options", "bits"), [(LoraOptions(rank=8), 0), (LoraOptions(rank=8, num_layers=3), 0), (LoraOptions(rank=8), 4)]
)
def test_the_estimate_is_near_the_measurement(
    options: LoraOptions, bits: int, sequences: int, width: int, recompute: bool
) -> None:
    module = student(options, bits)
    if recompute:
        recompute_layers(module)
    estimate = StepMemory.of(module, VOCAB, 16, recompute)
    # A measurement without optimizer and accumulated gradient.
    found = replace(estimate, fixed=estimate.fixed // 4).bytes(sequences, width, 0)
    assert 0.8 < found / needed(module, sequences, width) < 1.5


def test_the_estimate_is_the_same_for_another_model_of_the_structure() -> None:
    assert StepMemory.of(student(), VOCAB, 16, False) == StepMemory.of(student(), VOCAB, 16, False)


def test_recomputation_half_precision_and_fewer_adapted_layers_need_less() -> None:
    whole = StepMemory.of(student(), VOCAB, 16, False).bytes(2, 128, 100)
    assert StepMemory.of(student(), VOCAB, 16, True).bytes(2, 128, 100) < 0.5 * whole
    assert StepMemory.of(student(dtype=mx.bfloat16), VOCAB, 16, False).bytes(2, 128, 100) < whole
    assert StepMemory.of(student(LoraOptions(rank=8, num_layers=2)), VOCAB, 16, False).bytes(2, 128, 100) < whole


def test_dropout_unpacked_weights_and_a_dense_teacher_need_more() -> None:
    plain = StepMemory.of(student(), VOCAB, 16, False)
    assert StepMemory.of(student(LoraOptions(rank=8, dropout=0.1)), VOCAB, 16, False).token > plain.token
    quantised = StepMemory.of(student(bits=4), VOCAB, 16, False)
    dora = LoraOptions(rank=8, type="dora", keys=("self_attn.q_proj",))
    assert StepMemory.of(student(dora, bits=4), VOCAB, 16, False).fixed >= 6 * 64 * 64 * 4
    assert quantised.token == plain.token
    assert StepMemory.of(student(), VOCAB, 16, False, dense_teacher=True).logits > plain.logits


def test_a_loss_larger_than_a_layer_counts_by_its_chunk() -> None:
    huge = StepMemory.of(student(), 10**6, 16, True)
    assert huge.bytes(1, 64, 16) - huge.bytes(1, 64, 8) > 0.9 * 8 * 10**6 * 4 * memory.SPARSE_COPIES
    assert huge.bytes(1, 64, 40) - huge.bytes(1, 64, 16) == 24 * huge.row


def test_experts_count_as_often_as_a_token_passes_one() -> None:
    from mlx_lm.models import qwen3_moe

    def with_experts(chosen: int) -> StepMemory:
        config = {"num_experts": 4, "num_experts_per_tok": chosen, "decoder_sparse_step": 1, "mlp_only_layers": []}
        config |= {"moe_intermediate_size": 64, "norm_topk_prob": True, "model_type": "qwen3_moe"}
        module = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(SIZES | config))
        add_lora(module, LoraOptions(rank=4))
        return StepMemory.of(module, VOCAB, 16, False)

    one, two, three = (with_experts(chosen).token for chosen in (1, 2, 3))
    assert three - two == pytest.approx(two - one)
    assert two > one


# The cut.

STEP = StepMemory(token=10.0, pair=0.1, live_token=5.0, live_pair=0.2, row=3, logits=40.0, chunk=16, fixed=1000)
sequences = st.lists(st.tuples(st.integers(1, 200), st.integers(0, 100)), max_size=12)


def needs(part: list[int], batch: list[tuple[int, int]]) -> int:
    return STEP.bytes(len(part), max(batch[at][0] for at in part), sum(batch[at][1] for at in part))


def cut(batch: list[tuple[int, int]], budget: int) -> list[list[int]]:
    return split_micro_batch([length for length, _ in batch], [rows for _, rows in batch], STEP, budget)


@given(sequences, st.integers(0, 60_000))
def test_each_sequence_is_in_one_part_that_fits_or_stands_alone(batch: list[tuple[int, int]], budget: int) -> None:
    parts = cut(batch, budget)
    assert sorted(at for part in parts for at in part) == list(range(len(batch)))
    assert all(part and (len(part) == 1 or needs(part, batch) <= budget) for part in parts)


@given(sequences.filter(bool))
def test_what_fits_is_not_cut_and_what_does_not_is(batch: list[tuple[int, int]]) -> None:
    everything = list(range(len(batch)))
    whole = needs(everything, batch)
    assert cut(batch, whole) == [everything]
    assert len(cut(batch, whole - 1)) > 1 or len(batch) == 1


@given(sequences, st.integers(0, 60_000), st.integers(0, 60_000))
def test_more_memory_never_makes_more_parts(batch: list[tuple[int, int]], budget: int, more: int) -> None:
    assert len(cut(batch, budget + more)) <= len(cut(batch, budget))


@given(sequences, st.integers(0, 60_000))
def test_no_fewer_parts_of_neighbours_in_length_would_fit(batch: list[tuple[int, int]], budget: int) -> None:
    order = sorted(range(len(batch)), key=lambda at: batch[at][0])
    fewest = [0]
    for stop in range(1, len(order) + 1):
        starts = [start for start in range(stop) if stop - start == 1 or needs(order[start:stop], batch) <= budget]
        fewest.append(1 + min(fewest[start] for start in starts))
    assert len(cut(batch, budget)) == fewest[-1]


def test_a_part_has_no_more_tokens_than_are_allowed_but_for_a_single_sequence() -> None:
    memory = StepMemory(0.0, 0.0, 0.0, 0.0, 0, 0.0, 16, 0)
    lengths = [100, 50, 60, 900]
    parts = split_micro_batch(lengths, [1] * 4, memory, 10**12, most_tokens=200)
    assert all(len(part) == 1 or len(part) * max(lengths[at] for at in part) <= 200 for part in parts)
    assert sorted(at for part in parts for at in part) == [0, 1, 2, 3]
    assert split_micro_batch(lengths, [1] * 4, memory, 10**12) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_quantised_layer_is_as_wide_as_it_was(bits: int) -> None:
    from true_kd.memory import _linear_widths

    layer = nn.QuantizedLinear(1536, 64, bits=bits, group_size=64)
    assert _linear_widths(layer) == (1536, 64)
