"""Tiny models of random weights and a domain of prompts, made once per test run; no network, no shipped data."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# A test process a core, each with one thread: more of them wait for each other more than they compute. Read by OpenBLAS
# when it is loaded, which importing true_kd does; what the tests start inherits it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import true_kd  # noqa: F401  (before mlx: see true_kd.blas)

# The annotated shapes and dtypes are checked wherever these modules are called; so before anything imports them.
install_import_hook(
    ["true_kd.losses", "true_kd.targets", "true_kd.batching", "true_kd.examples"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


pytest.register_assert_rewrite("helpers")

# A shell ignores these for what it starts in the background, and nohup does so: whatever the tests start would inherit
# that, and never be stopped.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}\n{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache folder of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRUE_KD_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small byte-level BPE tokenizer and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and said hello to the world"] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def save_random_model(folder: Path, tokenizer_folder: Path, seed: int, **sizes: int) -> Path:
    """A Qwen3-shaped model of random weights."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "qwen3",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        **sizes,
    }
    mx.random.seed(seed)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    weights = {name: 3.0 * value if value.ndim == 2 else value for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer_folder / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A random teacher."""
    return save_random_model(tmp_path_factory.mktemp("teacher"), tokenizer_folder, seed=1, hidden_size=48)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A random student of the teacher's vocabulary."""
    return save_random_model(tmp_path_factory.mktemp("student"), tokenizer_folder, seed=2)


@pytest.fixture(autouse=True, scope="module")
def fast_collection() -> Iterator[None]:
    """What tests import is set aside: a run collects garbage four times, and would look through it each time."""
    import true_kd.models.opening

    true_kd.models.opening._mlx_lm_utils()
    gc.freeze()
    yield
    gc.unfreeze()


@dataclass(frozen=True)
class Ended:
    """How a call of the command line ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def cli() -> Callable[..., Ended]:
    """Calls `true-kd` in this process, stdout and stderr no terminals; the exception of a bug passes through."""

    def call(*arguments: str) -> Ended:
        from true_kd.__main__ import main

        out, err = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setattr("sys.argv", ["true-kd", *arguments])
            for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
                patch.delenv(name, raising=False)
            patch.setenv("TRANSFORMERS_VERBOSITY", "error")
            with pytest.raises(SystemExit) as stop:
                main()
        return Ended(stop.value.code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def quantised_folder(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random student in 4 bits, as `mlx_lm convert -q` lays it out."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    folder = tmp_path_factory.mktemp("quantised")
    module, config = quantize_model(*load_model(student_folder), 32, 4)
    save_model(folder, module)
    save_config(config, folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((student_folder / name).read_bytes())
    return folder


@pytest.fixture
def teacher(teacher_folder: Path):
    """The random teacher, opened."""
    from true_kd.models import ModelOptions, open_model

    return open_model(ModelOptions(model=str(teacher_folder)), "teacher")


@pytest.fixture
def student(student_folder: Path):
    """The random student, opened: each test its own, to train as it likes."""
    from true_kd.models import ModelOptions, open_model

    return open_model(ModelOptions(model=str(student_folder)), "student")
