"""An export is the adapter: by our own check, by PEFT and llama.cpp where they are installed, or it is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import base_gguf
import families
import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from safetensors.numpy import load_file, save_file
from test_adapters import adapt, opened, save
from test_finding import lay_run

import true_kd.exporting.gguf as to_gguf
import true_kd.exporting.peft as to_peft
from true_kd import adapters, exporting
from true_kd.cli import exporting as command
from true_kd.errors import CacheError, InputError, LockedError
from true_kd.exporting import CannotExport, Exported, NotTheSame, Request
from true_kd.exporting.checking import hear_original
from true_kd.exporting.folders import new_folder
from true_kd.exporting.ollama import frame_of
from true_kd.exporting.reading import read_adapter
from true_kd.files import TEMPORARY
from true_kd.finding import FoundAdapter, find_folder
from true_kd.models import LoraOptions, ModelOptions, add_lora, card_base, open_tokenizer
from true_kd.prompts import from_strings

PROMPTS = from_strings(["say hello to the cat", "the mat"])
TOKENS = [5, 17, 99, 4, 42, 63, 200, 1, 7]
LORA = LoraOptions(rank=3, scale=4.0)
HEAD = LoraOptions(rank=2, keys=("lm_head", "self_attn.q_proj"))
TABLE = LoraOptions(rank=2, keys=("model.embed_tokens", "self_attn.k_proj"))
LAST = LoraOptions(rank=2, num_layers=1)
DORA = LoraOptions(type="dora", rank=3)

SHAPES = {
    "llama tied": ("llama tied", LORA),
    "llama untied": ("llama untied", LORA),
    "llama, head": ("llama untied", HEAD),
    "llama, embedding": ("llama untied", TABLE),
    "mistral": ("mistral", LORA),
    "qwen2 tied": ("qwen2 tied", LORA),
    "qwen2 untied": ("qwen2 untied", LAST),
    "qwen3 tied": ("qwen3 tied", LORA),
    "qwen3 untied": ("qwen3 untied", HEAD),
    "gemma": ("gemma", LORA),
    "gemma2": ("gemma2", LORA),
    "gemma3 text": ("gemma3 text", LORA),
}
"""Family and adapter of what is compared in full."""


def save_family(folder: Path, tokenizer_folder: Path, name: str) -> Path:
    """A random model of a family, as a folder; mistral is llama by another name."""
    family = families.FAMILIES["llama untied" if name == "mistral" else name]
    module = families.build("llama untied" if name == "mistral" else name, stretch=1.0)
    kind = "mistral" if name == "mistral" else family.kind
    folder.mkdir(parents=True)
    config = {"model_type": kind, **families.SIZES, **family.config, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(module.parameters())))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_folder / file, folder / file)
    return folder


@dataclass(frozen=True)
class Laid:
    """An adapter on disk."""

    found: FoundAdapter
    student: Path

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.student / "config.json").read_text())


Lay = Callable[..., Laid]


@pytest.fixture(scope="module")
def lay(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Lay:
    """Makes an adapter of a family's model; the same one for the same arguments."""
    root = tmp_path_factory.mktemp("laid")
    made: dict[Any, Laid] = {}

    def call(name: str, options: LoraOptions = LORA) -> Laid:
        key = (name, options)
        if key not in made:
            student = root / name.replace(" ", "-")
            if not student.exists():
                save_family(student, tokenizer_folder, name)
            folder = save(root / f"adapter{len(made)}", adapt(opened(student), options), options, student)
            made[key] = Laid(find_folder(str(folder)), student)
        return made[key]

    return call


def export(found: FoundAdapter, target: str, output: Path | None = None, **options: Any) -> Exported:
    """Export to the end."""
    options = {"prompts": PROMPTS, **options}
    stages = exporting.export(found, Request(target, None if output is None else str(output), **options))
    while True:
        try:
            next(stages)
        except StopIteration as end:
            return end.value


def refused(kind: type[Exception], found: FoundAdapter, target: str, output: Path, **options: Any) -> str:
    """The one line in which an export is refused; nothing of it is left."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(kind) as caught:
        export(found, target, output, **options)
    [line] = str(caught.value).splitlines()
    assert sorted(output.parent.iterdir()) == before
    return line


def left_over(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith((TEMPORARY, ".lock"))]


# The numbers.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", ["peft", "gguf"])
def test_what_was_written_is_read_back_and_says_the_same(lay: Lay, tmp_path: Path, shape: str, target: str) -> None:
    done = export(lay(*SHAPES[shape]).found, target, tmp_path / "out")
    assert done.measured.difference <= (to_peft if target == "peft" else to_gguf).TOLERANCE
    assert done.measured.effect > 0.1
    assert done.measured.is_telling
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("name", ["llama untied", "qwen3 tied"])
def test_dora_goes_to_peft(lay: Lay, tmp_path: Path, name: str) -> None:
    done = export(lay(name, DORA).found, "peft", tmp_path / "out")
    assert done.measured.difference <= to_peft.TOLERANCE * 10 < done.measured.effect
    assert json.loads((done.folder / "adapter_config.json").read_text())["use_dora"] is True


def test_layers_that_were_not_trained_are_not_adapted_in_peft(lay: Lay, tmp_path: Path) -> None:
    done = export(lay("qwen2 untied", LAST).found, "peft", tmp_path / "out")
    targets = json.loads((done.folder / "adapter_config.json").read_text())["target_modules"]
    assert targets
    assert all(name.startswith("model.layers.1.") for name in targets)


def test_the_scale_is_in_every_format(lay: Lay, tmp_path: Path) -> None:
    found = lay("llama untied").found
    peft, llama, mlx = (export(found, target, tmp_path / target).folder for target in ("peft", "gguf", "mlx"))
    assert json.loads((peft / "adapter_config.json").read_text())["lora_alpha"] == 12
    [path] = llama.glob("*.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if "." in name}
    assert fields["adapter.lora.alpha"] == 12.0
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == (
        "adapter",
        "lora",
        "llama",
    )
    parameters = json.loads((mlx / "adapter_config.json").read_text())["lora_parameters"]
    assert (parameters["alpha"], parameters["scale"], parameters["rank"]) == (12, 4.0, 3)


@pytest.mark.parametrize("name", ["llama untied", "qwen3 tied"])
def test_rows_that_llama_cpp_rotates_are_neighbours_in_llama_and_nowhere_else(
    lay: Lay, tmp_path: Path, name: str
) -> None:
    laid = lay(name)
    [path] = export(laid.found, "gguf", tmp_path / "out").folder.glob("*.gguf")
    written = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    tensors = load_file(laid.found.folder / adapters.WEIGHTS)
    for ours, theirs, heads in (("self_attn.q_proj", "attn_q", 2), ("self_attn.k_proj", "attn_k", 1)):
        up = tensors[f"model.layers.1.{ours}.lora_b"].T
        expected = base_gguf.neighbours(up, heads) if name == "llama untied" else up
        assert not np.array_equal(base_gguf.neighbours(up, heads), up)
        assert np.array_equal(written[f"blk.1.{theirs}.weight.lora_b"], expected)
        assert np.array_equal(written[f"blk.1.{theirs}.weight.lora_a"], tensors[f"model.layers.1.{ours}.lora_a"].T)


def test_peft_has_both_matrices_transposed_under_the_names_of_its_wrapper(lay: Lay, tmp_path: Path) -> None:
    laid = lay("llama untied", DORA)
    written = load_file(export(laid.found, "peft", tmp_path / "out").folder / to_peft.WEIGHTS)
    ours = load_file(laid.found.folder / adapters.WEIGHTS)
    assert len(written) == len(ours)
    layer = "model.layers.0.mlp.up_proj"
    assert written[f"base_model.model.{layer}.lora_A.weight"].shape == (3, 32)
    assert written[f"base_model.model.{layer}.lora_B.weight"].shape == (64, 3)
    assert np.array_equal(written[f"base_model.model.{layer}.lora_B.weight"], ours[f"{layer}.lora_b"].T)
    assert np.array_equal(written[f"base_model.model.{layer}.lora_magnitude_vector"], ours[f"{layer}.m"])


# What goes wrong in silence elsewhere.


def rewrite_gguf(path: Path, change: Callable[[str, np.ndarray], np.ndarray], with_alpha: bool = True) -> None:
    """Write a LoRA file again, changed."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if "." in name}
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    writer = gguf.GGUFWriter(path, fields["general.architecture"])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    if with_alpha:
        writer.add_float32("adapter.lora.alpha", fields["adapter.lora.alpha"])
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(change(name, values)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def unpermuted(name: str, values: np.ndarray) -> np.ndarray:
    """Query and key rows in the order of the hub, which llama.cpp takes without a word."""
    heads = {"attn_q": 2, "attn_k": 1}.get(name.split(".")[-3] if name.count(".") >= 3 else "", 0)
    if not heads or not name.endswith("lora_b"):
        return values
    size = values.shape[0] // heads
    return values.reshape(heads, size // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)


def forget_alpha(path: Path) -> None:
    rewrite_gguf(path, lambda name, values: values, with_alpha=False)


def forget_the_order(path: Path) -> None:
    rewrite_gguf(path, unpermuted)


def swap_two_layers(path: Path) -> None:
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    other = {"blk.0": "blk.1", "blk.1": "blk.0"}
    rewrite_gguf(path, lambda name, values: tensors[other[name[:5]] + name[5:]])


@pytest.mark.parametrize("spoil", [forget_alpha, forget_the_order, swap_two_layers])
def test_a_gguf_that_llama_cpp_would_take_and_misapply_is_found(
    lay: Lay, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    adapter = read_adapter(lay("llama untied").found)
    original, plain = hear_original(adapter, PROMPTS)
    to_gguf.write(adapter, tmp_path, Request("gguf"), None)
    spoil(tmp_path / to_gguf.file_name(adapter))
    measured = to_gguf.measure(adapter, tmp_path, original, plain.module)
    assert not measured.holds
    assert measured.difference > 10 * measured.limit


def forget_lora_alpha(folder: Path) -> None:
    config = json.loads((folder / to_peft.CONFIG).read_text())
    (folder / to_peft.CONFIG).write_text(json.dumps({**config, "lora_alpha": config["r"]}))


def change_one_number(folder: Path) -> None:
    tensors = load_file(folder / to_peft.WEIGHTS)
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    tensors[name] = tensors[name].copy()
    tensors[name][0, 0] += 1.0
    save_file(tensors, folder / to_peft.WEIGHTS)


@pytest.mark.parametrize("spoil", [forget_lora_alpha, change_one_number])
def test_a_peft_folder_that_means_another_adapter_is_found(
    lay: Lay, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    adapter = read_adapter(lay("qwen3 tied").found)
    original, plain = hear_original(adapter, PROMPTS)
    to_peft.write(adapter, tmp_path, Request("peft"), "some/base")
    spoil(tmp_path)
    measured = to_peft.measure(adapter, tmp_path, original, plain.module)
    assert not measured.holds
    assert measured.difference > 10 * measured.limit


# The tools themselves.


def logits_in_mlx(laid: Laid, adapted: bool) -> np.ndarray:
    module = opened(laid.student)
    if adapted:
        adapters.load_adapter(module, laid.found.folder)
    return np.array(module(mx.array([TOKENS])))[0]


HF_CONFIG: dict[str, dict[str, Any]] = {
    "phi3": {"pad_token_id": 0},
    "smollm3": {"pad_token_id": 0},
    "gemma3_text": {
        "tie_word_embeddings": False,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
}
"""What transformers must be told besides to build the same model."""

OTHERS = (
    "phi",
    "phi3",
    "olmo2",
    "granite tied",
    "smollm3",
    "starcoder2",
    "stablelm",
    "cohere",
)
PEFT_SHAPES = {
    **SHAPES,
    "llama, dora": ("llama untied", DORA),
    "qwen2, dora": ("qwen2 tied", DORA),
    **{name: (name, LORA) for name in OTHERS},
}


def test_every_family_that_peft_gets_is_compared_with_it() -> None:
    kinds = {"mistral" if name == "mistral" else families.FAMILIES[name].kind for name, _ in PEFT_SHAPES.values()}
    assert kinds == to_peft.FAMILIES
    assert {"mistral" if name == "mistral" else families.FAMILIES[name].kind for name, _ in SHAPES.values()} == set(
        to_gguf.ARCHITECTURES
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", PEFT_SHAPES)
def test_peft_itself_says_what_mlx_says(lay: Lay, tmp_path: Path, shape: str) -> None:
    torch = pytest.importorskip("torch", reason="PEFT needs torch, which `pip install 'true-kd[parity]'` brings")
    peft = pytest.importorskip("peft", reason="`pip install 'true-kd[parity]'` brings it")
    from transformers import AutoConfig, AutoModelForCausalLM

    laid = lay(*PEFT_SHAPES[shape])
    kind = laid.config["model_type"]
    folder = export(laid.found, "peft", tmp_path / "out").folder
    config = {**laid.config, **HF_CONFIG.get(kind, {}), "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config), dtype=torch.float32
    )
    state = {name: torch.tensor(values) for name, values in load_file(laid.student / "model.safetensors").items()}
    lacking = model.load_state_dict(state, strict=False)
    assert lacking.unexpected_keys == []
    assert [name for name in lacking.missing_keys if name != "lm_head.weight"] == []
    model.tie_weights()

    def said(module: Any) -> np.ndarray:
        with torch.no_grad():
            return module.eval()(torch.tensor([TOKENS])).logits[0].numpy()

    base = logits_in_mlx(laid, adapted=False)
    apart = float(np.abs(said(model) - base).max())
    adapted = said(peft.PeftModel.from_pretrained(model, str(folder)))
    wanted = logits_in_mlx(laid, adapted=True)
    effect, difference = float(np.abs(wanted - base).max()), float(np.abs(adapted - wanted).max())
    print(f"PEFT {shape}: base {apart:.1e}, adapter {difference:.1e}, effect {effect:.2g}")
    assert effect > 0.1
    # Where transformers and mlx-lm differ in the base already (an activation function), the adapter adds nothing.
    assert difference <= (1e-5 if apart <= 1e-5 else 3 * apart)
    assert apart < 5e-3


LLAMA_CPP_SHAPES = tuple(SHAPES)


@pytest.fixture(scope="module")
def llama_cpp() -> None:
    """llama.cpp, where it is installed."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: `make test` says why it was not built")


def base_of(laid: Laid, folder: Path) -> Path:
    weights = load_file(laid.student / "model.safetensors")
    return base_gguf.write_base(folder / "base.gguf", laid.config, weights)


@pytest.mark.slow
@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize("shape", LLAMA_CPP_SHAPES)
def test_llama_cpp_itself_says_what_mlx_says(lay: Lay, tmp_path: Path, shape: str) -> None:
    laid = lay(*SHAPES[shape])
    [adapter] = export(laid.found, "gguf", tmp_path / "out").folder.glob("*.gguf")
    base = base_of(laid, tmp_path)
    # Beyond 4 tokens gemma3's window would tell layers apart, which this base does not.
    tokens = TOKENS[:4] if shape == "gemma3 text" else TOKENS
    plain, wanted = (logits_in_mlx(laid, adapted)[: len(tokens)] for adapted in (False, True))
    apart = float(np.abs(base_gguf.llama_cpp_logits(base, tokens) - plain).max())
    difference = float(np.abs(base_gguf.llama_cpp_logits(base, tokens, adapter) - wanted).max())
    effect, largest = float(np.abs(wanted - plain).max()), float(np.abs(wanted).max())
    print(f"llama.cpp {shape}: base {apart:.1e}, adapter {difference:.1e}, effect {effect:.2g}, largest {largest:.2g}")
    assert effect > 0.1
    assert difference <= 1e-3 * max(1.0, largest)


@pytest.mark.slow
@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize("spoil", [forget_alpha, forget_the_order])
def test_llama_cpp_takes_without_a_word_what_our_check_finds(
    lay: Lay, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    laid = lay("llama untied")
    [adapter] = export(laid.found, "gguf", tmp_path / "out").folder.glob("*.gguf")
    spoil(adapter)
    difference = np.abs(
        base_gguf.llama_cpp_logits(base_of(laid, tmp_path), TOKENS, adapter) - logits_in_mlx(laid, adapted=True)
    ).max()
    print(f"llama.cpp {spoil.__name__}: {difference:.1e}")
    assert difference > 0.02


# What cannot be right.


@pytest.mark.parametrize("target", ["peft", "gguf"])
def test_lora_on_tied_embeddings_is_refused(lay: Lay, tmp_path: Path, target: str) -> None:
    line = refused(CannotExport, lay("qwen2 tied", TABLE).found, target, tmp_path / "out")
    assert line.startswith(f"--to {target}: model.embed_tokens is also the student's output head")
    assert "--to fused" in line


@pytest.mark.parametrize("target", ["peft", "gguf"])
def test_experts_are_refused(lay: Lay, tmp_path: Path, target: str) -> None:
    line = refused(CannotExport, lay("mixtral", LORA).found, target, tmp_path / "out")
    assert "is a layer of experts" in line


def test_dora_has_no_gguf(lay: Lay, tmp_path: Path) -> None:
    line = refused(CannotExport, lay("qwen3 tied", DORA).found, "gguf", tmp_path / "out")
    assert line.startswith("--to gguf: a DoRA adapter, and GGUF has no place for its magnitudes")


@pytest.mark.parametrize(("target", "name"), [("gguf", "phi"), ("gguf", "olmo2"), ("peft", "gpt_bigcode")])
def test_a_family_that_was_not_compared_is_refused_by_name(lay: Lay, tmp_path: Path, target: str, name: str) -> None:
    line = refused(CannotExport, lay(name).found, target, tmp_path / "out")
    assert f"students of type '{name}' have not been compared with it" in line


def test_a_full_fine_tune_is_no_adapter(lay: Lay, tmp_path: Path) -> None:
    laid = lay("llama untied")
    folder = tmp_path / "full"
    folder.mkdir()
    shutil.copyfile(laid.student / "model.safetensors", folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full", "model": str(laid.student)}))
    with pytest.raises(InputError, match="fine_tune_type 'full', expected lora or dora"):
        export(find_folder(str(folder)), "fused", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json"])
def test_a_changed_adapter_is_not_exported(lay: Lay, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(lay("llama untied").found.folder, folder)
    content = bytearray((folder / name).read_bytes())
    content[-7] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises((CacheError, InputError)) as caught:
        export(find_folder(str(folder), student=str(lay("llama untied").student)), "peft", tmp_path / "out")
    assert caught.value.exit_code == 5
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_student_is_refused(lay: Lay, tmp_path: Path) -> None:
    other = find_folder(str(lay("llama untied", HEAD).found.folder), student=str(lay("llama tied").student))
    line = refused(CacheError, other, "peft", tmp_path / "out")
    assert "lm_head is not of this student" in line


# The base of a quantised student.


@pytest.fixture
def quantised(quantised_folder: Path, tmp_path: Path) -> FoundAdapter:
    """An adapter of a student in 4 bits, which no card tells the origin of."""
    student = tmp_path / "student-4bit"
    shutil.copytree(quantised_folder, student)
    return find_folder(str(save(tmp_path / "adapter", adapt(opened(student), LORA), LORA, student)))


def test_peft_needs_the_student_before_it_was_quantised(quantised: FoundAdapter, tmp_path: Path) -> None:
    line = refused(InputError, quantised, "peft", tmp_path / "out")
    assert "Give --base-model ID" in line
    done = export(quantised, "peft", tmp_path / "out", base_model="Qwen/Qwen3-0.6B")
    assert json.loads((done.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "Qwen/Qwen3-0.6B"
    assert "trained on a quantised student" in done.notes[0]


@pytest.mark.parametrize(
    ("card", "base"),
    [
        ("---\nbase_model: Qwen/Qwen3-0.6B\ntags: [mlx]\n---\n# x\n", "Qwen/Qwen3-0.6B"),
        ("---\nbase_model:\n- Qwen/Qwen3-0.6B\n---\n", "Qwen/Qwen3-0.6B"),
        ("---\nbase_model: [a/b, c/d]\n---\n", None),
        ("---\nbase_model: ../../etc/passwd\n---\n", None),
        ("---\nbase_model: [\n---\n", None),
        ("# no facts\n", None),
        ("", None),
    ],
)
def test_the_model_card_says_what_a_student_was_made_from(tmp_path: Path, card: str, base: str | None) -> None:
    (tmp_path / "README.md").write_text(card)
    assert card_base(tmp_path) == base


def test_the_card_of_a_quantised_student_is_believed_and_named(quantised: FoundAdapter, tmp_path: Path) -> None:
    card = "---\nbase_model: Qwen/Qwen3-0.6B\n---\n"
    (Path(quantised.config.student.model) / "README.md").write_text(card)
    done = export(quantised, "peft", tmp_path / "out")
    assert done.base_model == "Qwen/Qwen3-0.6B"
    assert "the model card of the student" in done.notes[0]


# Copies and fused models.


@pytest.mark.parametrize("options", [LORA, DORA, HEAD], ids=["lora", "dora", "head"])
def test_the_copy_for_mlx_lm_is_the_adapter(lay: Lay, tmp_path: Path, options: LoraOptions) -> None:
    from mlx_lm import load

    laid = lay("llama untied", options)
    done = export(laid.found, "mlx", tmp_path / "out")
    assert done.measured.difference == 0.0 < done.measured.effect
    assert (done.folder / adapters.WEIGHTS).read_bytes() == (laid.found.folder / adapters.WEIGHTS).read_bytes()
    adapters.check_adapter(done.folder)
    module, _ = load(str(laid.student), adapter_path=str(done.folder))
    assert np.array_equal(np.array(module(mx.array([TOKENS])))[0], logits_in_mlx(laid, adapted=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama untied", LORA),
        ("qwen3 tied", DORA),
        ("qwen2 tied", TABLE),
        ("mixtral", LORA),
    ],
)
def test_a_fused_model_is_opened_by_mlx_lm_and_says_the_same(
    lay: Lay, tmp_path: Path, name: str, options: LoraOptions
) -> None:
    from mlx_lm import load

    laid = lay(name, options)
    done = export(laid.found, "fused", tmp_path / "out")
    assert done.measured.difference < 1e-6 < 1e-3 < done.measured.effect
    module, tokenizer = load(str(done.folder))
    wanted = logits_in_mlx(laid, adapted=True)
    assert np.abs(np.array(module(mx.array([TOKENS])))[0] - wanted).max() < 1e-4 * max(1.0, np.abs(wanted).max())
    assert not [name for name, _ in tree_flatten(module.parameters()) if "lora" in name]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "cat"}]) == open_tokenizer(
        ModelOptions(model=str(laid.student)), "student"
    ).tokenizer.apply_chat_template([{"role": "user", "content": "cat"}])


def test_a_quantised_student_is_unpacked_when_it_is_fused(quantised: FoundAdapter, tmp_path: Path) -> None:
    done = export(quantised, "fused", tmp_path / "out")
    config = json.loads((done.folder / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & set(config)
    assert done.measured.difference < 0.01 * done.measured.effect
    assert not [name for name in load_file(done.folder / "model.safetensors") if name.endswith("scales")]


def small(options: LoraOptions, student: Path, folder: Path) -> FoundAdapter:
    """An adapter that changes weights by far less than a step of 4 bits."""
    module = adapt(opened(student), options)
    module.update(tree_map(lambda value: 0.3 * value, module.trainable_parameters()))
    return find_folder(str(save(folder, module, options, student)))


def test_quantising_again_loses_a_small_adapter_and_is_not_kept(quantised_folder: Path, tmp_path: Path) -> None:
    found = small(LORA, quantised_folder, tmp_path / "adapter")
    line = refused(NotTheSame, found, "fused", tmp_path / "out", keep_bits=True)
    assert line.startswith("--to fused: KL(adapter || fused) is ")
    assert line.endswith("Nothing was written. Leave out --quantize.")
    done = export(found, "fused", tmp_path / "out", keep_bits=True, force=True)
    assert not done.measured.holds
    assert "kept because of --force" in done.notes[0]
    assert json.loads((done.folder / "config.json").read_text())["quantization"]["bits"] == 4
    unpacked = export(found, "fused", tmp_path / "unpacked")
    assert unpacked.measured.difference < 0.01 * done.measured.difference


def test_a_bfloat16_student_is_fused_in_bfloat16(lay: Lay, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(lay("qwen3 tied").student, student)
    path = str(student / "model.safetensors")
    halves = {name: value.astype(mx.bfloat16) for name, value in mx.load(path).items()}
    mx.eval(halves)
    mx.save_safetensors(path, halves)
    found = find_folder(str(save(tmp_path / "adapter", adapt(opened(student), LORA), LORA, student)))
    done = export(found, "fused", tmp_path / "out")
    dtypes = {value.dtype for value in mx.load(str(done.folder / "model.safetensors")).values()}
    assert dtypes == {mx.bfloat16}
    assert done.measured.difference < 0.01 * done.measured.effect


def test_bits_are_kept_only_where_there_are_some(lay: Lay, tmp_path: Path) -> None:
    found = lay("llama untied").found
    line = refused(CannotExport, found, "fused", tmp_path / "out", keep_bits=True)
    assert "the student is not quantised" in line
    line = refused(InputError, found, "peft", tmp_path / "out", keep_bits=True)
    assert line.startswith("--quantize: given with --to peft")


def test_an_adapter_that_does_nothing_is_said_to(lay: Lay, tmp_path: Path) -> None:
    laid = lay("llama untied")
    module = opened(laid.student)
    add_lora(module, LORA)
    found = find_folder(str(save(tmp_path / "adapter", module, LORA, laid.student)))
    done = export(found, "peft", tmp_path / "out")
    assert done.measured.effect == 0.0
    assert "changes next to nothing" in done.notes[-1]


# The folder.


def test_an_earlier_export_is_replaced_by_force_alone(lay: Lay, tmp_path: Path) -> None:
    found, out = lay("llama untied").found, tmp_path / "out"
    export(found, "peft", out)
    line = refused(InputError, found, "mlx", out)
    assert line.endswith("Give --force to replace it.")
    export(found, "mlx", out, force=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
        exporting.RECORD,
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_others_is_not_replaced_by_force_either(lay: Lay, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    line = refused(InputError, lay("llama untied").found, "mlx", tmp_path / "out", force=True)
    assert "holds 1 entries and is no earlier export" in line
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years"


def test_a_link_is_not_followed(lay: Lay, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    refused(InputError, lay("llama untied").found, "mlx", tmp_path / "out")
    assert list((tmp_path / "real").iterdir()) == []


def test_what_a_kill_left_goes_and_what_fails_leaves_nothing(tmp_path: Path) -> None:
    left = tmp_path / "deep" / f"{TEMPORARY}export-out"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    with new_folder(tmp_path / "deep" / "out", False) as folder:
        assert not (folder / "half").exists()
        (folder / "whole").write_text("whole")
    assert [path.name for path in (tmp_path / "deep").rglob("*")] == ["out", "whole"]

    def fail() -> None:
        with new_folder(tmp_path / "new" / "out", False) as folder:
            (folder / "half").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]


def test_two_do_not_write_one_export(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", False), pytest.raises(LockedError), new_folder(tmp_path / "out", False):
        pass


def test_the_record_says_what_was_exported_and_how_it_was_checked(lay: Lay, tmp_path: Path) -> None:
    done = export(lay("qwen3 tied").found, "gguf", tmp_path / "out")
    record = json.loads((done.folder / exporting.RECORD).read_text())
    assert record["target"] == "gguf"
    assert record["check"]["difference"] == done.measured.difference
    assert record["check"]["prompts"] == "given prompts"
    assert len(record["adapter_sha256"]) == 64


# Ollama.

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Kit.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "<|end|>{% for message in messages %}[{{ message.role }}]\n\n{{ message.content }}<|pad|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
INSTRUCTIONS = (
    "{% if messages[0].role == 'system' %}{% set said = messages[0].content %}{% endif %}"
    "{% for message in messages %}{% if message.role == 'user' %}[INST]"
    "{% if loop.last and said %}{{ said }}\n\n{% endif %}{{ message.content }}[/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content }}</s>{% endif %}{% endfor %}"
)


def tokenizer_of(folder: Path, tokenizer_folder: Path, template: str, **config: Any):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", **families.SIZES, "eos_token_id": 1}))
    shutil.copyfile(tokenizer_folder / "tokenizer.json", folder / "tokenizer.json")
    settings = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template, **config}))
    mx.save_safetensors(str(folder / "model.safetensors"), {"x": mx.zeros((1,))})
    return open_tokenizer(ModelOptions(model=str(folder)), "student")


def test_a_chat_template_is_taken_apart_with_the_system_message_it_brings(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    frame = frame_of(tokenizer_of(tmp_path / "model", tokenizer_folder, CHATML))
    assert frame is not None
    assert frame.default_system == "You are Kit."
    assert frame.opening == "<|im_start|>assistant\n"
    assert frame.to_go() == (
        "{{- range .Messages }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )


def test_a_template_that_cannot_be_said_so_is_not_guessed(tmp_path: Path, tokenizer_folder: Path) -> None:
    for number, template in enumerate((INSTRUCTIONS, HEADERS, CHATML.replace("You are Kit.", "{{ date_string }}"))):
        assert frame_of(tokenizer_of(tmp_path / str(number), tokenizer_folder, template)) is None


def test_the_token_that_begins_all_text_is_left_to_ollama(tmp_path: Path, tokenizer_folder: Path) -> None:
    frame = frame_of(tokenizer_of(tmp_path / "model", tokenizer_folder, HEADERS, bos_token="<|end|>"))
    assert frame is not None
    assert (frame.before["system"], frame.before["user"]) == ("[system]\n\n", "[user]\n\n")
    assert (frame.default_system, frame.opening) == (None, "[assistant]\n\n")


def test_the_modelfile_has_template_stops_and_the_system_message_of_the_domain(lay: Lay, tmp_path: Path) -> None:
    done = export(lay("qwen3 tied").found, "ollama", tmp_path / "out", system='Say "meow".')
    assert (done.folder / "Modelfile").read_text() == (
        'FROM .\nTEMPLATE """{{- range .Messages }}{{ if eq .Role "system" }}<|system|>{{ .Content }}<|end|>\n'
        '{{ else if eq .Role "user" }}<|user|>{{ .Content }}<|end|>\n'
        '{{ else if eq .Role "assistant" }}<|assistant|>{{ .Content }}<|end|>\n'
        '{{ end }}{{ end }}<|assistant|>"""\n'
        'PARAMETER stop "<|end|>"\n'
        'SYSTEM """Say "meow"."""\n'
    )
    assert (done.folder / "model.safetensors").is_file()


# The command line.


def test_the_command_offers_every_target() -> None:
    assert command.TARGETS_SHOWN == exporting.TARGETS


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_folder: Path, student_folder: Path) -> Path:
    """The current folder, with the adapter of the domain cats and its prompts."""
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "prompts" / "cats"
    prompts.mkdir(parents=True)
    (prompts / "train.txt").write_text("the cat sat\nthe mat\n")
    (prompts / "valid.jsonl").write_text('{"prompt": "say hello", "completion": "hello to the world"}\n')
    lay_run(tmp_path / "adapters_kd", "cats", teacher_folder, student_folder)
    return tmp_path


def test_the_command_says_where_and_how_far(project: Path, cli: Callable[..., Any]) -> None:
    ended = cli("export", "--domain", "cats", "--to", "gguf")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("exports/cats-gguf: 2 files, ")
    assert "largest difference of logits: " in ended.out
    assert "valid prompts of cats" in ended.out
    assert "use: llama-cli -m STUDENT.gguf --lora exports/cats-gguf/cats-lora.gguf" in ended.out
    assert "\x1b" not in ended.out
    assert sorted(path.name for path in (project / "exports" / "cats-gguf").iterdir()) == [
        "cats-lora.gguf",
        exporting.RECORD,
    ]


def test_json_holds_every_measure(project: Path, cli: Callable[..., Any]) -> None:
    ended = cli("export", "--domain", "cats", "--to", "peft", "--base-model", "cats/base", "--json")
    assert (ended.code, ended.err) == (0, "")
    facts = json.loads(ended.out)
    assert facts["folder"] == "exports/cats-peft"
    assert facts["check"]["holds"] is True
    assert facts["check"]["effect"] > 0.01
    assert facts["base_model"] == "cats/base"
    assert facts["files"].keys() == {"adapter_config.json", "adapter_model.safetensors", exporting.RECORD}


def test_lm_studio_gets_its_layout_where_it_is(
    project: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(project / "home"))
    (project / "home").mkdir()
    ended = cli("export", "--domain", "cats", "--to", "lmstudio")
    assert ended.code == 2
    assert "no ~/.lmstudio here" in ended.err
    assert list((project / "home").iterdir()) == []
    (project / "home" / ".lmstudio").mkdir()
    assert cli("export", "--domain", "cats", "--to", "lmstudio").code == 0
    [model] = (project / "home" / ".lmstudio" / "models" / "true-kd").iterdir()
    assert model.name.endswith("-cats")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in model.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--domain", "cats", "--to", "pfet"), "did you mean 'peft'?"),
        (("--domain", "cats"), "Missing option '--to'"),
        (("--domain", "cast", "--to", "peft"), "did you mean 'cats'?"),
        (("--to", "peft"), "expected --domain NAME (cats)"),
        (("--domain", "cats", "--to", "peft", "--output", ""), "--output '': empty"),
        (("--domain", "cats", "--to", "peft", "--output", "."), "is the current folder"),
        (("--domain", "cats", "--to", "peft", "--output", "prompts"), "is no earlier export"),
        (("--domain", "cats", "--to", "peft", "--base-model", " "), "--base-model '': empty"),
        (("--domain", "cats", "--to", "mlx", "--base-model", "a/b"), "--base-model: given with --to mlx"),
        (("--domain", "cats", "--to", "gguf", "--quantize"), "--quantize: given with --to gguf"),
        (("--domain", "cats", "--to", "ollama", "--quantize"), "Ollama does not read the bits of MLX"),
        (("--domain", "cats", "--to", "mlx", "--prompts-file", "none.txt"), "none.txt"),
    ],
)
def test_mistakes_are_answered_in_a_line_before_anything_is_written(
    project: Path, cli: Callable[..., Any], arguments: tuple[str, ...], said: str
) -> None:
    before = sorted(project.rglob("*"))
    ended = cli("export", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert sorted(project.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_place_that_cannot_be_written_is_the_machine_s_fault(project: Path, cli: Callable[..., Any]) -> None:
    (project / "closed").mkdir(mode=0o500)
    ended = cli("export", "--domain", "cats", "--to", "mlx", "--output", "closed/out")
    assert ended.code == 4
    assert "cannot be written" in ended.err
