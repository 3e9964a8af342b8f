"""The seam to mlx-lm: adapters leave the rest of a model alone, and no model folder runs code."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import save_file

from true_kd.backend import device_name
from true_kd.errors import InputError, ModelError
from true_kd.models import (
    LanguageModel,
    LoraOptions,
    ModelOptions,
    add_lora,
    describe,
    open_model,
    open_tokenizer,
    parameter_count,
    save_stand_in,
    trainable,
)
from true_kd.suggest import quote

SOME_TOKENS = mx.array([[5, 17, 99, 0, 42, 63], [1, 1, 2, 3, 5, 8]])


def copy_model(folder: Path, to: Path, **config: object) -> Path:
    shutil.copytree(folder, to)
    read = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**read, **config}))
    return to


def logits_of(module: nn.Module, tokens: mx.array = SOME_TOKENS) -> mx.array:
    return module(tokens).astype(mx.float32)


# Adapters


@pytest.mark.parametrize(("kind", "leaves"), [("lora", {"lora_a", "lora_b"}), ("dora", {"lora_a", "lora_b", "m"})])
def test_only_the_adapter_is_trainable(student: LanguageModel, kind: str, leaves: set[str]) -> None:
    before = dict(tree_flatten(student.module.parameters()))
    add_lora(student.module, LoraOptions(type=kind, rank=3))
    assert {name.rpartition(".")[2] for name in trainable(student.module)} == leaves
    layers = {name.rpartition(".")[0] for name in trainable(student.module)}
    assert len(layers) == 2 * 7, "two blocks of q, k, v, o, gate, up and down"
    after = {name.replace(".linear.", "."): value for name, value in tree_flatten(student.module.parameters())}
    for name, value in before.items():
        assert mx.array_equal(after[name], value), name


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_fresh_adapter_changes_nothing(student: LanguageModel, kind: str) -> None:
    before = logits_of(student.module)
    add_lora(student.module, LoraOptions(type=kind, rank=2))
    assert mx.allclose(logits_of(student.module), before, rtol=1e-4, atol=1e-4)


def test_the_rank_is_that_of_the_options(student: LanguageModel) -> None:
    add_lora(student.module, LoraOptions(rank=5))
    assert {value.shape[1] for name, value in trainable(student.module).items() if name.endswith("lora_a")} == {5}


def test_keys_choose_the_layers(student: LanguageModel) -> None:
    add_lora(student.module, LoraOptions(rank=2, keys=("self_attn.q_proj",)))
    assert {name.rpartition(".")[0] for name in trainable(student.module)} == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    }


@pytest.mark.parametrize("count", [1, 2, 5])
def test_layers_are_counted_from_the_last(student: LanguageModel, count: int) -> None:
    add_lora(student.module, LoraOptions(rank=2, num_layers=count))
    blocks = {int(name.split(".")[2]) for name in trainable(student.module)}
    assert blocks == set(range(2)[-count:])


def test_no_layers_does_not_mean_all_layers() -> None:
    with pytest.raises(ValueError, match="num_layers"):
        LoraOptions(num_layers=0)


def test_keys_that_no_layer_bears_are_refused_with_those_there_are(student: LanguageModel) -> None:
    with pytest.raises(InputError, match=r"q_prj") as refusal:
        add_lora(student.module, LoraOptions(keys=("self_attn.q_prj",)))
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_one_mistyped_key_among_right_ones_is_refused(student: LanguageModel) -> None:
    with pytest.raises(InputError, match="q_prj"):
        add_lora(student.module, LoraOptions(keys=("self_attn.v_proj", "self_attn.q_prj")))


def test_a_layer_that_cannot_be_adapted_is_refused(student: LanguageModel) -> None:
    with pytest.raises(InputError, match=r"lora\.keys"):
        add_lora(student.module, LoraOptions(keys=("input_layernorm",)))


# Opening


def refusal_of(name: object, seam: str = "teacher", **options: object) -> str:
    """The one line with which a model is refused, by whatever opens it first."""
    chosen = ModelOptions(model=str(name), **options)
    with pytest.raises(ModelError) as refused:
        open_model(chosen, seam)
    text = str(refused.value)
    assert "\n" not in text
    assert text.startswith(f"{seam} {quote(str(name))}: ")
    return text


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "nowhere", "pocket:nobody"])
def test_a_folder_that_is_not_there_is_refused(name: str) -> None:
    assert "no such folder" in refusal_of(name, "student")


def test_a_hub_id_that_cannot_be_reached_is_refused(tmp_path: Path) -> None:
    assert "cannot be reached" in refusal_of("true-kd-tests/there-is-no-such-model")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "no such folder" in refusal_of(tmp_path / "file")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    assert "config.json" in refusal_of(tmp_path)


def test_a_folder_without_weights_is_refused(student_folder: Path, tmp_path: Path) -> None:
    folder = copy_model(student_folder, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model.bin")
    assert "safetensors" in refusal_of(folder)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_broken_weights_are_refused(student_folder: Path, tmp_path: Path, keep: int) -> None:
    folder = copy_model(student_folder, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "cannot load" in refusal_of(folder)


def test_missing_tensors_are_refused(student_folder: Path, tmp_path: Path) -> None:
    folder = copy_model(student_folder, tmp_path / "model")
    weights = mx.load(str(folder / "model.safetensors"))
    weights.pop("model.norm.weight")
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    assert "model.norm.weight" in refusal_of(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"model_type": "nobody"}', '{"model_type": "qwen3"}'])
def test_a_config_that_describes_no_model_is_refused(student_folder: Path, tmp_path: Path, text: str) -> None:
    folder = copy_model(student_folder, tmp_path / "model")
    (folder / "config.json").write_text(text)
    assert "cannot load" in refusal_of(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "nobody"}}'])
def test_a_broken_tokenizer_is_refused(student_folder: Path, tmp_path: Path, text: str) -> None:
    folder = copy_model(student_folder, tmp_path / "model")
    (folder / "tokenizer.json").write_text(text)
    assert "cannot load" in refusal_of(folder)


def with_canary(folder: Path, file: str) -> Path:
    """Python code in a model folder that leaves a trace when it is run."""
    trace = folder / "it was run"
    (folder / file).write_text(f"open({str(trace)!r}, 'w').close()\nclass Model: pass\nclass ModelArgs: pass\n")
    return trace


def test_code_beside_the_weights_is_never_run(student_folder: Path, tmp_path: Path) -> None:
    folder = copy_model(student_folder, tmp_path / "model", model_file="evil.py")
    trace = with_canary(folder, "evil.py")
    assert "evil.py" in refusal_of(folder)
    assert not trace.exists()


@pytest.mark.parametrize("opening", [open_model, open_tokenizer])
def test_the_code_of_a_tokenizer_is_never_run(
    student_folder: Path, tmp_path: Path, opening: Callable[..., object]
) -> None:
    folder = copy_model(
        student_folder, tmp_path / "model", auto_map={"AutoTokenizer": ["evil.Model", None], "AutoConfig": "evil.Model"}
    )
    trace = with_canary(folder, "evil.py")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Model", "auto_map": {"AutoTokenizer": ["evil.Model", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    # Refused, or opened as what its files say without that code: either will do.
    with contextlib.suppress(ModelError):
        opening(ModelOptions(model=str(folder)), "teacher")
    assert not trace.exists()


@pytest.mark.slow
def test_opening_a_model_leaves_the_limit_of_open_files_alone(student_folder: Path) -> None:
    script = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 3000))
from true_kd.models import ModelOptions, open_model
open_model(ModelOptions(model={str(student_folder)!r}), "student")
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.strip() == "(1000, 3000)", found.stderr


def test_an_opened_model_is_ready_to_be_asked(student: LanguageModel, student_folder: Path) -> None:
    assert student.size == 320
    assert student.stop_ids == [1]
    assert student.name == str(student_folder)
    assert not student.module.training
    assert student.tokenizer.decode(student.tokenizer.encode("the cat sat")) == "the cat sat"


def test_half_precision_weights_are_widened_on_a_cpu(student_folder: Path, tmp_path: Path) -> None:
    folder = copy_model(student_folder, tmp_path / "model")
    weights = mx.load(str(folder / "model.safetensors"))
    halved = {name: value.astype(mx.bfloat16) for name, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), halved)
    opened = open_model(ModelOptions(model=str(folder)), "student")
    expected = mx.float32 if device_name() == "cpu" else mx.bfloat16
    assert {value.dtype for _, value in tree_flatten(opened.module.parameters())} == {expected}


def test_a_tokenizer_is_read_without_the_weights(student_folder: Path, tmp_path: Path) -> None:
    folder = copy_model(student_folder, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"")
    tokens = open_tokenizer(ModelOptions(model=str(folder)), "student")
    assert tokens.size == 320
    assert tokens.ids == json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]


# Quantised models


def open_quantised(folder: Path, dequantize: str) -> LanguageModel:
    return open_model(ModelOptions(model=str(folder), dequantize=dequantize), "student")


def is_quantised(module: nn.Module) -> bool:
    return any(isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding)) for layer in module.modules())


def test_quantised_weights_are_unpacked_when_asked(quantised_folder: Path) -> None:
    packed, unpacked = (open_quantised(quantised_folder, choice).module for choice in ("never", "always"))
    assert is_quantised(packed)
    assert not is_quantised(unpacked)
    assert mx.allclose(logits_of(packed), logits_of(unpacked), rtol=1e-3, atol=1e-3)


def test_quantised_weights_are_unpacked_by_default_on_a_cpu_only(quantised_folder: Path) -> None:
    assert is_quantised(open_quantised(quantised_folder, "auto").module) is (device_name() != "cpu")


def test_quantised_weights_count_unpacked(quantised_folder: Path, student: LanguageModel) -> None:
    counts = {parameter_count(open_quantised(quantised_folder, choice).module) for choice in ("never", "always")}
    assert counts == {parameter_count(student.module)}


# Digests


def digest_of(folder: Path) -> str:
    return describe(ModelOptions(model=str(folder)), "teacher").digest


def test_the_digest_does_not_know_the_folder(student_folder: Path, tmp_path: Path) -> None:
    assert digest_of(copy_model(student_folder, tmp_path / "a copy")) == digest_of(student_folder)


def test_the_digest_is_that_of_the_opened_model(student_folder: Path, student: LanguageModel) -> None:
    assert student.digest == digest_of(student_folder)


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ],
)
def test_the_digest_changes_with_one_byte_of(student_folder: Path, tmp_path: Path, file: str) -> None:
    folder = copy_model(student_folder, tmp_path / "model")
    path = folder / file
    if not path.exists():
        path.write_bytes(b'{"eos_token_id": 7}')
    before = digest_of(folder)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert digest_of(folder) != before


def test_the_digest_changes_with_a_second_file_of_weights(student_folder: Path, tmp_path: Path) -> None:
    folder = copy_model(student_folder, tmp_path / "model")
    mx.save_safetensors(str(folder / "model-00002.safetensors"), {"model.norm.weight": mx.zeros(32)})
    assert digest_of(folder) != digest_of(student_folder)


def test_the_digest_ignores_what_no_one_reads(student_folder: Path, tmp_path: Path) -> None:
    folder = copy_model(student_folder, tmp_path / "model")
    (folder / "README.md").write_text("a model card")
    assert digest_of(folder) == digest_of(student_folder)


def test_the_digest_takes_the_hub_cache_at_its_word(
    student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub names a blob by its SHA-256, so a snapshot of links and a folder of files are one model."""
    import hashlib

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for file in student_folder.iterdir():
        content = file.read_bytes()
        name = hashlib.sha256(content).hexdigest()
        (blobs / name).write_bytes(content)
        (snapshot / file.name).symlink_to(blobs / name)
    assert digest_of(snapshot) == digest_of(student_folder)


# Stand-ins.


def stand_in_of(folder: Path, to: Path, **options: object) -> ModelOptions:
    """The options of a model's stand-in."""
    to.mkdir(exist_ok=True)
    whole = ModelOptions(model=str(folder), **options)
    save_stand_in(whole, describe(whole, "teacher").digest, to / "teacher.safetensors")
    return ModelOptions(model=str(to / "teacher.safetensors"))


def test_a_stand_in_is_its_model_but_for_the_weights(student_folder: Path, tmp_path: Path) -> None:
    folder = copy_model(student_folder, tmp_path / "model", quantization=None)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    (folder / "merges.txt").touch()
    whole = ModelOptions(model=str(folder))
    expected, before = open_tokenizer(whole, "teacher"), describe(whole, "teacher")
    options = stand_in_of(folder, tmp_path / "cache")
    shutil.rmtree(folder)
    found, after = open_tokenizer(options, "teacher"), describe(options, "teacher")
    assert (after.digest, after.digests, after.weights) == (before.digest, before.digests, [])
    assert (found.digest, found.size, found.ids, found.stop_ids) == (
        expected.digest,
        expected.size,
        expected.ids,
        expected.stop_ids,
    )
    asked = [{"role": "user", "content": "the cat"}]
    for tokenizer in (expected.tokenizer, found.tokenizer):
        assert tokenizer.apply_chat_template(asked, tokenize=False) == "the cat!"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["teacher.safetensors"]
    with pytest.raises(ModelError, match="its weights are not here"):
        open_model(options, "teacher")


def test_a_stand_in_is_the_same_to_the_byte_each_time(student_folder: Path, tmp_path: Path) -> None:
    one, other = (Path(stand_in_of(student_folder, tmp_path / name).model) for name in "ab")
    assert one.read_bytes() == other.read_bytes()
    assert one.stat().st_size < (student_folder / "tokenizer.json").stat().st_size


def test_the_adapter_of_a_teacher_is_part_of_its_stand_in(student_folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapters.safetensors").write_bytes(b"weights")
    options = stand_in_of(student_folder, tmp_path / "cache", adapter=str(adapter))
    adapted = ModelOptions(model=str(student_folder), adapter=str(adapter))
    assert describe(options, "teacher").digest == describe(adapted, "teacher").digest != digest_of(student_folder)
    with pytest.raises(ModelError, match="Leave it out"):
        describe(options.model_copy(update={"adapter": str(adapter)}), "teacher")


def test_only_a_teacher_can_do_without_weights(student_folder: Path, tmp_path: Path) -> None:
    options = stand_in_of(student_folder, tmp_path / "cache")
    with pytest.raises(ModelError, match="no such folder"):
        describe(options, "student")


def test_a_file_that_is_not_what_its_digest_says_gets_no_stand_in(
    student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = copy_model(student_folder, tmp_path / "model")
    (tmp_path / "blobs").mkdir()
    (folder / "tokenizer.json").rename(tmp_path / "blobs" / ("0" * 64))
    (folder / "tokenizer.json").symlink_to(tmp_path / "blobs" / ("0" * 64))
    with pytest.raises(ModelError, match="has changed or is damaged"):
        stand_in_of(folder, tmp_path / "cache")


def packed(text: bytes) -> np.ndarray:
    """A file as a stand-in holds it."""
    return np.frombuffer(zlib.compress(text), dtype=np.uint8)


CONFIG_AND_TOKENIZER = {"config.json": packed(b"{}"), "tokenizer.json": packed(b"{}")}
WEIGHTS = {"model.safetensors": "a" * 64}
HOSTILE: dict[str, tuple[dict[str, np.ndarray], object]] = {
    "a way up": ({**CONFIG_AND_TOKENIZER, "../x": packed(b"")}, WEIGHTS),
    "a whole path": ({**CONFIG_AND_TOKENIZER, "/tmp/x": packed(b"")}, WEIGHTS),
    "code": ({**CONFIG_AND_TOKENIZER, "tokenizer.py": packed(b"")}, WEIGHTS),
    "weights": ({**CONFIG_AND_TOKENIZER, "model.safetensors": packed(b"")}, WEIGHTS),
    "a control code": ({**CONFIG_AND_TOKENIZER, "\x1b[2J": packed(b"")}, WEIGHTS),
    "no config": ({"tokenizer.json": packed(b"{}")}, WEIGHTS),
    "no tokenizer": ({"config.json": packed(b"{}")}, WEIGHTS),
    "a flood": ({**CONFIG_AND_TOKENIZER, "vocab.json": packed(bytes(2**28))}, WEIGHTS),
    "not packed": ({**CONFIG_AND_TOKENIZER, "vocab.json": np.zeros(9, dtype=np.uint8)}, WEIGHTS),
    "half": ({**CONFIG_AND_TOKENIZER, "vocab.json": packed(b"abcdef")[:-3]}, WEIGHTS),
    "more": ({**CONFIG_AND_TOKENIZER, "vocab.json": np.append(packed(b""), np.uint8(0))}, WEIGHTS),
    "numbers": ({**CONFIG_AND_TOKENIZER, "vocab.json": np.zeros(4, dtype=np.float32)}, WEIGHTS),
    "no digests": (CONFIG_AND_TOKENIZER, {}),
    "a list of digests": (CONFIG_AND_TOKENIZER, ["a" * 64]),
    "a digest of nothing": (CONFIG_AND_TOKENIZER, {"config.json": "a" * 64}),
    "a short digest": (CONFIG_AND_TOKENIZER, {"model.safetensors": "a" * 63}),
    "a number for a digest": (CONFIG_AND_TOKENIZER, {"model.safetensors": 7}),
}


def test_a_model_that_has_changed_since_gets_no_stand_in(student_folder: Path, tmp_path: Path) -> None:
    options = ModelOptions(model=str(student_folder))
    with pytest.raises(ModelError, match="has changed or is damaged"):
        save_stand_in(options, "0" * 64, tmp_path / "teacher.safetensors")


@pytest.mark.parametrize(("tensors", "digests"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_stand_in_is_refused(tensors: dict[str, np.ndarray], digests: object, tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    save_file(tensors, path, metadata={"digests": json.dumps(digests)})
    line = refusal_of(path)
    assert "Import it again" in line
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("written", [b"", b"\xff" * 100, b"\x02" + bytes(7) + b"{}", b"\x10" + bytes(7) + b"[" * 16])
def test_what_is_no_stand_in_is_refused(written: bytes, tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(written)
    assert "Import it again" in refusal_of(path)
    with path.open("wb") as huge:
        huge.truncate(2**27 + 1)
    assert "larger than 128 MiB" in refusal_of(path)
