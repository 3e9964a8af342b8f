"""What is written loads in mlx-lm as it was trained, and only whole adapters load here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map

from true_kd import adapters
from true_kd.adapters import checkpoint_folder, load_adapter, read_json, remove_checkpoints, save_adapter
from true_kd.errors import CacheError
from true_kd.files import digest_file
from true_kd.models import LoraOptions, ModelOptions, add_lora, open_model, trainable

SOME_TOKENS = mx.array([[5, 17, 99, 0, 42, 63], [1, 1, 2, 3, 5, 8]])
KINDS = {
    "lora": LoraOptions(rank=3),
    "dora": LoraOptions(type="dora", rank=3),
    "some keys": LoraOptions(rank=2, scale=5.0, keys=("self_attn.q_proj", "mlp.down_proj")),
    "the head": LoraOptions(rank=2, keys=("model.embed_tokens", "self_attn.v_proj")),
    "the last block": LoraOptions(rank=2, num_layers=1, dropout=0.1),
}


def opened(folder: Path, dequantize: str = "auto") -> nn.Module:
    return open_model(ModelOptions(model=str(folder), dequantize=dequantize), "student").module


def logits_of(module: nn.Module) -> mx.array:
    module.eval()
    return module(SOME_TOKENS)


def adapt(module: nn.Module, options: LoraOptions) -> nn.Module:
    """The model with an adapter that changes what it says."""
    plain = logits_of(module)
    mx.random.seed(8)
    add_lora(module, options)
    module.update(tree_map(lambda value: value + 0.05 * mx.random.normal(value.shape), module.trainable_parameters()))
    assert not mx.allclose(logits_of(module), plain, rtol=0.05, atol=0.05)
    return module


def save(folder: Path, module: nn.Module, options: LoraOptions, student: Path) -> Path:
    save_adapter(folder, trainable(module), options, str(student), {"temperature": 2.0, "seed": 0})
    return folder


@pytest.fixture
def saved(student_folder: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of the random student, on disk."""
    options = KINDS["lora"]
    return save(tmp_path / "adapter", adapt(opened(student_folder), options), options, student_folder)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_mlx_lm_loads_the_adapter_as_it_was_trained(student_folder: Path, tmp_path: Path, options: LoraOptions) -> None:
    from mlx_lm import load

    trained = adapt(opened(student_folder), options)
    save(tmp_path / "adapter", trained, options, student_folder)
    loaded, _ = load(str(student_folder), adapter_path=str(tmp_path / "adapter"))
    assert mx.allclose(logits_of(loaded), logits_of(trained), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_the_adapter_loads_here_as_it_was_trained(student_folder: Path, tmp_path: Path, options: LoraOptions) -> None:
    trained = adapt(opened(student_folder), options)
    save(tmp_path / "adapter", trained, options, student_folder)
    module = opened(student_folder)
    load_adapter(module, tmp_path / "adapter")
    assert mx.array_equal(logits_of(module), logits_of(trained))


@pytest.mark.parametrize("dequantize", ["never", "always"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_of_a_quantised_student_loads_on_it(
    quantised_folder: Path, tmp_path: Path, dequantize: str, kind: str
) -> None:
    from mlx_lm import load

    options = KINDS[kind]
    trained = adapt(opened(quantised_folder, dequantize), options)
    save(tmp_path / "adapter", trained, options, quantised_folder)
    loaded, _ = load(str(quantised_folder), adapter_path=str(tmp_path / "adapter"))
    tolerance = 1e-5 if dequantize == "never" else 1e-3
    assert mx.allclose(logits_of(loaded), logits_of(trained), rtol=tolerance, atol=tolerance)
    module = opened(quantised_folder, dequantize)
    load_adapter(module, tmp_path / "adapter")
    assert mx.array_equal(logits_of(module), logits_of(trained))


def test_the_config_names_what_mlx_lm_reads_and_what_was_distilled(saved: Path, student_folder: Path) -> None:
    config = json.loads((saved / adapters.CONFIG).read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == -1
    assert config["lora_parameters"] == {"rank": 3, "scale": 2.0, "dropout": 0.0}
    assert config["model"] == str(student_folder)
    ours = config["true_kd"]
    assert ours.pop("weights_sha256") == digest_file(saved / adapters.WEIGHTS)
    assert len(ours.pop("check")) == 64
    assert ours == {"temperature": 2.0, "seed": 0}


def test_saving_again_gives_the_same_bytes(saved: Path, student_folder: Path, tmp_path: Path) -> None:
    options = KINDS["lora"]
    again = save(tmp_path / "again", adapt(opened(student_folder), options), options, student_folder)
    for name in (adapters.WEIGHTS, adapters.CONFIG):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def drop_a_tensor(folder: Path) -> None:
    tensors = mx.load(str(folder / adapters.WEIGHTS))
    tensors.pop("model.layers.1.mlp.up_proj.lora_b")
    mx.save_safetensors(str(folder / adapters.WEIGHTS), tensors)


def add_a_tensor(folder: Path) -> None:
    tensors = mx.load(str(folder / adapters.WEIGHTS))
    mx.save_safetensors(str(folder / adapters.WEIGHTS), {**tensors, "step": mx.array(3)})


def change_the_rank(folder: Path) -> None:
    config = json.loads((folder / adapters.CONFIG).read_text())
    config["lora_parameters"]["rank"] = 4
    (folder / adapters.CONFIG).write_text(json.dumps(config))


def claim_dora(folder: Path) -> None:
    config = json.loads((folder / adapters.CONFIG).read_text())
    (folder / adapters.CONFIG).write_text(json.dumps({**config, "fine_tune_type": "dora"}))


def cut(folder: Path) -> None:
    weights = folder / adapters.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])


FAULTS = {
    "a missing tensor": drop_a_tensor,
    "one tensor too many": add_a_tensor,
    "another rank": change_the_rank,
    "lora called dora": claim_dora,
    "cut weights": cut,
    "empty weights": lambda folder: (folder / adapters.WEIGHTS).write_bytes(b""),
    "no weights": lambda folder: (folder / adapters.WEIGHTS).unlink(),
    "no config": lambda folder: (folder / adapters.CONFIG).unlink(),
    "a broken config": lambda folder: (folder / adapters.CONFIG).write_text("{"),
    "an empty config": lambda folder: (folder / adapters.CONFIG).write_text("{}"),
    "a config that is a list": lambda folder: (folder / adapters.CONFIG).write_text("[]"),
}


@pytest.mark.parametrize("spoil", FAULTS.values(), ids=FAULTS.keys())
def test_an_adapter_that_is_not_whole_is_refused(
    saved: Path, student_folder: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(saved)
    with pytest.raises(CacheError, match="Distil it again"):
        load_adapter(opened(student_folder), saved)


@pytest.fixture
def finished(saved: Path, student_folder: Path, tmp_path: Path) -> Path:
    """The same adapter with a run's config beside it, as a finished domain has it."""
    weights = mx.load(str(saved / adapters.WEIGHTS))
    settings = {"temperature": 2.0, "learning_rate": 1.25e-5, "domain": "naïve"}
    save_adapter(tmp_path / "finished", weights, KINDS["lora"], str(student_folder), settings, {"domains": ["a"]})
    return tmp_path / "finished"


def flipped(path: Path, places: Iterable[int], mask: int) -> Iterator[int]:
    """Change bits of one byte of a file after the other; it is whole again in the end."""
    content = path.read_bytes()
    for at in places:
        path.write_bytes(content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :])
        yield at
    path.write_bytes(content)


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_flipped_byte_of_a_config_is_noticed(finished: Path, student_folder: Path, mask: int) -> None:
    module, config = opened(student_folder), finished / adapters.CONFIG
    for _ in flipped(config, range(config.stat().st_size), mask):
        with pytest.raises(CacheError, match="Distil it again"):
            load_adapter(module, finished)
    load_adapter(module, finished)


@pytest.mark.parametrize("mask", [0x01, 0x80])
def test_flipped_bytes_of_weights_are_noticed(finished: Path, student_folder: Path, mask: int) -> None:
    module, weights = opened(student_folder), finished / adapters.WEIGHTS
    size = weights.stat().st_size
    for _ in flipped(weights, [*range(0, size, size // 100), size - 1], mask):
        with pytest.raises(CacheError, match=r"adapters.safetensors is not what its config says.*Distil it again"):
            load_adapter(module, finished)
    load_adapter(module, finished)


def test_weights_of_another_training_are_noticed(finished: Path, student_folder: Path) -> None:
    """They have the same names and shapes, and mlx-lm would take them."""
    weights = mx.load(str(finished / adapters.WEIGHTS))
    mx.save_safetensors(str(finished / adapters.WEIGHTS), {name: 2 * value for name, value in weights.items()})
    with pytest.raises(CacheError, match="is not what its config says"):
        load_adapter(opened(student_folder), finished)


def test_an_adapter_of_another_tool_bears_no_digests_and_is_taken(saved: Path, student_folder: Path) -> None:
    config = json.loads((saved / adapters.CONFIG).read_text())
    del config["true_kd"]
    (saved / adapters.CONFIG).write_text(json.dumps(config))
    module = opened(student_folder)
    plain = logits_of(module)
    load_adapter(module, saved)
    assert not mx.allclose(logits_of(module), plain, rtol=0.05, atol=0.05)


def test_an_adapter_whose_config_was_taken_by_another_tools_is_refused(finished: Path, student_folder: Path) -> None:
    config = json.loads((finished / adapters.CONFIG).read_text())
    del config["true_kd"]
    (finished / adapters.CONFIG).write_text(json.dumps(config))
    with pytest.raises(CacheError, match=r"adapter_config\.json is not what was written"):
        load_adapter(opened(student_folder), finished)


SAVE_WITHIN = """
import resource, sys
from pathlib import Path
import mlx.core as mx
from true_kd.adapters import WEIGHTS, save_adapter
from true_kd.files import CannotWrite
from true_kd.models import LoraOptions

folder, limit, domain = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
weights = {name: value + 1 for name, value in mx.load(str(folder / WEIGHTS)).items()}
mx.eval(weights)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    save_adapter(folder, weights, LoraOptions(rank=3), "student", {"domain": domain}, {"domains": ["b"]})
except CannotWrite as error:
    print(error)
"""
"""Saves another adapter where no file may be larger than a limit."""


@pytest.mark.parametrize("refused", [adapters.WEIGHTS, adapters.CONFIG])
def test_an_adapter_that_finds_no_room_leaves_the_old_one_as_it_was(
    finished: Path, student_folder: Path, refused: str
) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    size = len(before[adapters.WEIGHTS])
    limit, domain = (size - 1, "b") if refused == adapters.WEIGHTS else (size, "b" * size)
    command = [sys.executable, "-c", SAVE_WITHIN, str(finished), str(limit), domain]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{finished / refused}: cannot be written (File too large: " in done.stdout
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before
    load_adapter(opened(student_folder), finished)


@pytest.mark.parametrize("spoil", FAULTS.values(), ids=FAULTS.keys())
def test_an_adapter_that_bears_no_digests_and_is_not_whole_is_refused(
    saved: Path, student_folder: Path, spoil: Callable[[Path], None]
) -> None:
    config = json.loads((saved / adapters.CONFIG).read_text())
    del config["true_kd"]
    (saved / adapters.CONFIG).write_text(json.dumps(config))
    spoil(saved)
    with pytest.raises(CacheError, match="Distil it again"):
        load_adapter(opened(student_folder), saved)


def test_an_adapter_of_another_model_is_refused(saved: Path, teacher_folder: Path) -> None:
    with pytest.raises(CacheError, match="not an adapter of this student"):
        load_adapter(opened(teacher_folder), saved)


def test_old_checkpoints_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("checkpoint_5", "checkpoint_100", "checkpoint_best", "my notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    (tmp_path / adapters.WEIGHTS).write_text("")
    remove_checkpoints(tmp_path, after=0)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint_best", "my notes", adapters.WEIGHTS}


def test_removing_checkpoints_of_a_folder_that_is_not_there_is_nothing_to_do(tmp_path: Path) -> None:
    remove_checkpoints(tmp_path / "nowhere", after=0)
    assert checkpoint_folder(tmp_path, 50) == tmp_path / "checkpoint_50"


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe"])
def test_a_file_that_is_no_json_reads_as_none(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "file.json").write_bytes(content)
    assert read_json(tmp_path / "file.json") is None


def mlx_lm_command(*arguments: object) -> str:
    command = [sys.executable, "-m", "mlx_lm", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_mlx_lm_generate_takes_the_adapter(saved: Path, student_folder: Path) -> None:
    asked = ("--prompt", "hi", "--max-tokens", 5)
    adapted = mlx_lm_command("generate", "--model", student_folder, "--adapter-path", saved, *asked)
    assert "Generation: 5 tokens" in adapted


@pytest.mark.slow
def test_a_fused_student_says_what_the_adapted_one_does(saved: Path, student_folder: Path, tmp_path: Path) -> None:
    fused = tmp_path / "fused"
    mlx_lm_command("fuse", "--model", student_folder, "--adapter-path", saved, "--save-path", fused)
    adapted = opened(student_folder)
    load_adapter(adapted, saved)
    assert mx.allclose(logits_of(opened(fused)), logits_of(adapted), rtol=1e-3, atol=1e-3)
