"""docs/memory.md holds: its numbers follow from its formulas, and these are what the code reckons with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from true_kd.config import KDConfig
from true_kd.memory import StepMemory
from true_kd.models import LoraOptions, ModelOptions, add_lora, cache_bytes, open_skeleton, trainable
from true_kd.planning.forecast import TYPICAL_ENTRIES
from true_kd.planning.machines import find_fits, weight_bytes
from true_kd.shards import estimate_bytes
from true_kd.targets import TargetOptions

PAGE = (Path(__file__).parents[1] / "true_kd" / "docs" / "memory.md").read_text(encoding="utf-8")
RUNS = {"rank": 16, "batch": 16, "tokens": 768, "sequences": 1, "bytes_per_token": 42, "response_tokens": 400_000}
RUNS |= {"saved": 2}
TEACHER = {"layers": 28, "hidden": 3584, "inner": 18944, "heads": 28, "kv_heads": 4, "ids": 152064, "tied": False}
STUDENT = {"layers": 36, "hidden": 2048, "inner": 11008, "heads": 16, "kv_heads": 2, "ids": 151936, "tied": True}


def computed(shapes: dict[str, Any], width: int = 2048) -> dict[str, Any]:
    """All that the page's formulas give."""
    names = {**RUNS, **shapes, "width": width, "responses": width // 2}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    return names


def table(head: str) -> dict[str, list[str]]:
    """The rows of the page's table whose first cell is `head`, by their first cells; the last of one name counts."""
    lines = PAGE[PAGE.index(f"| {head}") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    return {row[0]: row[1:] for row in rows}


def save_shape(folder: Path, shapes: dict[str, Any]) -> ModelOptions:
    """A model of 4 bits as mlx-lm lays it out, of holes for weights: its file takes no disk."""
    from mlx_lm.models import qwen2

    from true_kd import pocket

    folder.mkdir()
    config = {
        "model_type": "qwen2",
        "hidden_size": shapes["hidden"],
        "num_hidden_layers": shapes["layers"],
        "intermediate_size": shapes["inner"],
        "num_attention_heads": shapes["heads"],
        "num_key_value_heads": shapes["kv_heads"],
        "rms_norm_eps": 1e-6,
        "vocab_size": shapes["ids"],
        "tie_word_embeddings": shapes["tied"],
        "quantization": {"group_size": 64, "bits": 4},
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(pocket.__file__).parent / "teacher" / name).read_bytes())
    module = qwen2.Model(qwen2.ModelArgs.from_dict(config))
    module.set_dtype(mx.bfloat16)
    nn.quantize(module, 64, 4)
    names, header, end = {mx.uint32: "U32", mx.bfloat16: "BF16"}, {}, 0
    for name, array in tree_flatten(module.parameters()):
        offsets = [end, end + array.nbytes]
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        end += array.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    # As the hub's cache names it: by its digest, so that nobody reads gigabytes of holes for that.
    blob = folder / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    (folder / "model.safetensors").symlink_to(blob)
    with blob.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + end)
    return ModelOptions(model=str(folder))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModelOptions, ModelOptions]]:
    """Teacher and student of the page's shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
        yield save_shape(folder / "teacher", TEACHER), save_shape(folder / "student", STUDENT)


def in_gb(number: float) -> str:
    return f"{number / 1e9:.2f}"


def test_the_shapes_of_the_test_are_those_of_the_page() -> None:
    rows = table("| layers | hidden")
    for name, shapes in (("teacher", TEACHER), ("student", STUDENT)):
        said = [f"{value:,}" if type(value) is int else {True: "yes", False: "no"}[value] for value in shapes.values()]
        assert rows[name] == said


def test_the_tables_follow_from_the_formulas() -> None:
    found = computed(TEACHER)
    rows = table("teacher's phase")
    assert rows == {
        "teacher's phase": ["GB"],
        f"weights, {found['parameters']:,} parameters": [in_gb(found["weights"])],
        f"keys and values, {found['kv_per_token']:,} bytes a token, 16 sequences of 768": [in_gb(found["kv_cache"])],
        "logits that are held": [in_gb(found["logits"])],
        "together": [in_gb(found["capture"])],
    }
    long, short = computed(STUDENT), computed(STUDENT, width=512)
    rows = table("student's phase, one sequence")

    def both(name: str) -> list[str]:
        return [in_gb(found[name]) for found in (long, short)]

    assert rows[f"weights, {long['parameters']:,} parameters"] == both("weights")
    assert rows[f"adapter, {long['adapter']:,} parameters"] == both("adapter_bytes")
    assert rows["optimizer and gradients"] == both("optimizer")
    assert rows["activations"] == both("activations")
    layer = [in_gb(max(found["chunk"], found["backward"])) for found in (long, short)]
    assert rows["the chunk, or the layer that the backward pass is in"] == layer
    assert rows["the same with `training.grad_checkpoint`: activations"] == both("activations_recomputed")
    assert rows["together"] == both("training_recomputed")
    plain = re.search(r"\*\*together\*\* \| \*\*([\d.]+)\*\* \| \*\*([\d.]+)\*\* \|\n\| the same", PAGE)
    assert plain is not None
    assert [*plain.groups()] == both("training")


def test_the_formulas_are_what_the_code_reckons_with(models: tuple[ModelOptions, ModelOptions]) -> None:
    teacher = open_skeleton(models[0], "teacher", as_stored=True)
    found = computed(TEACHER)
    assert weight_bytes(teacher) == found["weights"]
    assert cache_bytes(teacher, 16, 768) == found["kv_cache"]
    student = open_skeleton(models[1], "student", as_stored=True)
    assert weight_bytes(student) == computed(STUDENT)["weights"]
    add_lora(student, LoraOptions())
    assert sum(array.size for array in trainable(student).values()) == computed(STUDENT)["adapter"]
    for recompute, name in ((False, "step"), (True, "step_recomputed")):
        memory = StepMemory.of(student, STUDENT["ids"], 208, recompute)
        for width in (2048, 512):
            found = computed(STUDENT, width)
            # Rows of responses and the layer's factors as the page has them, but for rounding.
            assert memory.bytes(1, width, width // 2) == pytest.approx(found[name], rel=0.001)


def test_what_fits_is_what_the_page_says(models: tuple[ModelOptions, ModelOptions]) -> None:
    config = KDConfig(teacher=models[0].model, student=models[1].model)
    rows = table("a Mac of")
    for fit in find_fits(config, (TEACHER["ids"], STUDENT["ids"]), 768, has_teacher=True)[:3]:
        batches = (fit.capture_batch, fit.training_batch, fit.training_batch_recomputed)
        assert rows[f"{fit.memory_gb} GB"] == [f"{fit.budget / 1e9:.1f}", *map(str, batches)]


def test_the_disk_is_as_the_page_says() -> None:
    guesses = [
        estimate_bytes(TYPICAL_ENTRIES[settings.draw_temperature], settings, 152_064, 400, 64)
        for settings in (TargetOptions(preset=name).settings for name in ("tiny", "default", "hot"))
    ]
    words = " ".join(PAGE.split())
    assert "a guess of {:.0f}, {:.0f} and {:.0f}.".format(*guesses) in words
    assert f"{2 * TEACHER['hidden']:,} for this teacher" in words
    found = computed(STUDENT)
    exact = 2 * TEACHER["hidden"] * RUNS["response_tokens"]
    assert f"take {found['cache'] / 1e6:.0f} MB with `default`, and {exact / 1e9:.1f} GB with `exact`" in words
    assert f"the adapter above: {in_gb(found['folder'])} GB" in words
