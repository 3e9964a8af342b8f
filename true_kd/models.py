"""The one seam to mlx-lm's models: opening them, splitting body from head, adding LoRA, generating.

Nothing else in true_kd imports `mlx_lm`. No code from a model folder is ever run: `trust_remote_code` is passed as
False everywhere, and only safetensors are read.
"""

from __future__ import annotations

import contextlib
import gc
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from pydantic import Field

from true_kd import pocket
from true_kd.backend import device_name
from true_kd.errors import InputError, ModelError
from true_kd.files import digest_file, digest_json
from true_kd.options import Options, PositiveInt


class ModelOptions(Options):
    """Which model, and how it is held in memory."""

    model: str = Field(min_length=1)
    """A hub id, a local folder, or an embedded model such as `pocket:teacher`."""
    revision: str | None = None
    """A branch, tag or commit of the hub repository."""
    dequantize: Literal["auto", "yes", "no"] = "auto"
    """Unpack quantised weights on load. `auto` does so on a CPU, where 4-bit arithmetic is some 35 times slower."""


class LoraOptions(Options):
    """The adapter, in mlx-lm's terms."""

    type: Literal["lora", "dora"] = "lora"
    """Low-rank update, or its magnitude-and-direction variant DoRA."""
    rank: PositiveInt = 16
    """Rank of the update."""
    scale: float = Field(default=2.0, gt=0.0)
    """Multiplies the update; what other tools call lora_alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input while training."""
    num_layers: int = Field(default=-1, ge=-1)
    """How many layers get an adapter, counted from the last; -1 for all."""
    keys: tuple[str, ...] | None = None
    """Layers inside a block to adapt, such as self_attn.q_proj; null for every linear layer."""


class SamplingOptions(Options):
    """How text is drawn from a model."""

    sampling_temperature: float = Field(default=0.7, ge=0.0, le=5.0)
    """Randomness of the drawn text; 0 takes the most likely token each time. Not the loss's temperature."""
    top_p: float = Field(default=0.95, gt=0.0, le=1.0)
    """Draw from the smallest set of tokens with this much probability."""
    max_tokens: PositiveInt = 512
    """Longest reply, in tokens."""
    batch_size: PositiveInt = 16
    """Replies written at a time."""


@dataclass
class LanguageModel:
    """An opened model with its tokenizer."""

    module: nn.Module
    tokenizer: Any
    name: str
    digest: str
    """See `ModelFiles.digest`."""
    vocab_size: int
    """Rows of the output head, padding included."""

    @property
    def stop_ids(self) -> list[int]:
        """Token ids that end a reply."""
        return sorted(self.tokenizer.eos_token_ids)


def locate(options: ModelOptions, seam: str) -> Path:
    """The local folder of a model, downloaded from the hub where need be.

    Raises
    ------
    ModelError
        when there is no such folder or repository, or the hub cannot be reached; `seam` (teacher, student) names it.
    """
    path = pocket.locate(options.model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{seam} {options.model}: no config.json in this folder, expected an mlx-lm model.")
        return path
    looks_local = options.model.startswith((".", "/", "~", pocket.PREFIX)) or options.model.count("/") != 1
    if looks_local or path.exists():
        raise ModelError(
            f"{seam} {options.model}: no such folder, expected an mlx-lm model folder or a hub id like "
            "mlx-community/Qwen2.5-3B-Instruct-4bit. Check the path."
        )
    return _download(options, seam)


def _download(options: ModelOptions, seam: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(options.model, revision=options.revision, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{seam} {options.model}: not in the local hub cache, and the hub cannot be reached. "
            "Go online once, or give a local folder."
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{seam} {options.model}: the hub refused it ({reason}). Check the id and the revision; for a gated "
            "model, run `hf auth login`."
        ) from error


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder, read without opening its weights."""

    path: Path
    weights: list[Path]
    digest: str
    """SHA-256 over the digests of every file that changes what the model says or how it is spoken to."""
    stored_bytes: int
    """Size of the weights."""


def describe(options: ModelOptions, seam: str) -> ModelFiles:
    """Find a model and take its digest.

    Raises
    ------
    ModelError
        when there is no such model, or it has no safetensors weights.
    """
    path = locate(options, seam)
    weights = sorted(path.glob("model*.safetensors"))
    if not weights:
        raise ModelError(f"{seam} {options.model}: no model*.safetensors in {path}, expected safetensors weights.")
    texts = [path / name for name in _TEXT_FILES if (path / name).is_file()]
    digests = {file.name: _content_digest(file) for file in [*texts, *weights]}
    return ModelFiles(path, weights, digest_json(digests), sum(file.stat().st_size for file in weights))


_TEXT_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def _content_digest(file: Path) -> str:
    # The hub cache names a large file's blob by its SHA-256: no need to read gigabytes again.
    blob = file.resolve()
    if blob.parent.name == "blobs" and len(blob.name) == 64:
        return blob.name
    return digest_file(file)


@dataclass(frozen=True)
class Tokens:
    """What token ids mean to a model."""

    ids: dict[str, int]
    """Token text, as the tokenizer spells it, to id."""
    size: int
    """Rows of the output head, padding included."""


def open_tokenizer(options: ModelOptions, seam: str) -> Tokens:
    """Read a model's vocabulary without opening its weights."""
    path = locate(options, seam)
    with _loading(options, seam):
        utils = _mlx_lm_utils()
        config = utils.load_config(path)
        tokenizer = utils.load_tokenizer(path, {"trust_remote_code": False})
        return Tokens(dict(tokenizer.get_vocab()), _vocab_size(config))


def open_model(options: ModelOptions, seam: str) -> LanguageModel:
    """Load a model and its tokenizer, in evaluation mode; float32 on a CPU, as stored elsewhere.

    Raises
    ------
    ModelError
        when the folder does not hold a model that mlx-lm can load without running code from it.
    """
    files = describe(options, seam)
    utils = _mlx_lm_utils()
    with _loading(options, seam):
        module, config = utils.load_model(files.path, trust_remote_code=False)
        tokenizer = utils.load_tokenizer(
            files.path, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id", None)
        )
    on_cpu = device_name() == "cpu"
    if "quantization" in config and (options.dequantize == "yes" or (options.dequantize == "auto" and on_cpu)):
        module = utils.dequantize_model(module)
    if on_cpu:
        module.set_dtype(mx.float32)
    module.eval()
    mx.eval(module.parameters())
    return LanguageModel(
        module=module,
        tokenizer=tokenizer,
        name=options.model,
        digest=files.digest,
        vocab_size=_vocab_size(config),
    )


@contextlib.contextmanager
def _loading(options: ModelOptions, seam: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, RuntimeError, OSError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{seam} {options.model}: mlx-lm cannot load it ({reason}). Choose another model.") from error


def _vocab_size(config: dict[str, Any]) -> int:
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])


def release_memory() -> None:
    """Give back what freed models held. The caller drops its own references first."""
    gc.collect()
    mx.clear_cache()


@contextlib.contextmanager
def _file_limits_kept() -> Iterator[None]:
    # `import mlx_lm.utils` lowers the limit of open files to 2048/4096, and raises where the hard limit is smaller.
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    set_limit = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = set_limit
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _mlx_lm_utils() -> Any:
    with _file_limits_kept():
        import mlx_lm.utils
    return mlx_lm.utils


# Body and head ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """A model as a body (tokens to hidden states) and an output head (hidden states to logits)."""

    body: Callable[[mx.array], mx.array]
    head: Callable[[mx.array], mx.array]
    fast: bool
    """False where the model could not be taken apart: then `body` gives the logits and `head` passes them on."""


def split_head(module: nn.Module) -> Split:
    """Take a model apart at its output head, proved on a few tokens to give the model's own logits.

    A model whose head does more than one linear map (soft-capping, scaling) is not taken apart: the proof fails, and
    the split passes whole logits through, which is right but slower and larger.
    """
    inner = getattr(module, "model", None)
    if inner is None or not callable(inner):
        return Split(module, lambda logits: logits, fast=False)
    head = getattr(module, "lm_head", None)
    if head is None and hasattr(inner, "embed_tokens"):
        head = inner.embed_tokens.as_linear
    if head is None:
        return Split(module, lambda logits: logits, fast=False)
    training = module.training
    module.eval()
    probe = mx.array([[1, 2, 3, 4]])
    expected = module(probe).astype(mx.float32)
    try:
        found = head(inner(probe)).astype(mx.float32)
        agrees = found.shape == expected.shape and mx.allclose(found, expected, rtol=1e-3, atol=1e-3).item()
    except (ValueError, TypeError):
        agrees = False
    if training:
        module.train()
    if not agrees:
        return Split(module, lambda logits: logits, fast=False)
    return Split(inner, head, fast=True)


# LoRA ---------------------------------------------------------------------------------------------------------------


def add_lora(module: nn.Module, options: LoraOptions) -> None:
    """Freeze the model and put adapters on it, through mlx-lm so that its files load there unchanged.

    Raises
    ------
    InputError
        when no layer bears one of `keys`, or a layer cannot be adapted this way.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    module.freeze()
    try:
        linear_to_lora_layers(module, options.num_layers, lora_parameters(options), use_dora=options.type == "dora")
    except ValueError as error:
        raise InputError(f"lora: this student cannot be adapted ({error}). Change lora.keys or lora.type.") from error
    if not tree_flatten(module.trainable_parameters()):
        names = sorted({name for name, layer in module.layers[-1].named_modules() if hasattr(layer, "weight")})
        raise InputError(
            f"lora.keys: no layer of the student is called {', '.join(options.keys or ())}. "
            f"Expected some of: {', '.join(names)}."
        )


def lora_parameters(options: LoraOptions) -> dict[str, Any]:
    """The `lora_parameters` of mlx-lm's adapter_config.json."""
    parameters: dict[str, Any] = {"rank": options.rank, "scale": options.scale, "dropout": options.dropout}
    if options.keys is not None:
        parameters["keys"] = list(options.keys)
    return parameters


def trainable(module: nn.Module) -> dict[str, mx.array]:
    """Trainable parameters by dotted name, as adapters.safetensors stores them."""
    return dict(tree_flatten(module.trainable_parameters()))


def parameter_count(module: nn.Module) -> int:
    """Number of parameters, quantised weights counted unpacked."""
    from mlx_lm.utils import get_total_parameters

    return int(get_total_parameters(module))


# Text ---------------------------------------------------------------------------------------------------------------


@dataclass
class Reply:
    """A reply in the making. `tokens` ends with the stop token when `finished` is `stop`."""

    tokens: list[int] = field(default_factory=list)
    finished: Literal["", "stop", "length"] = ""


@dataclass(frozen=True)
class DecodingStep:
    """One token for each reply still being written. `logits` are log-probabilities before sampling, each [vocab]."""

    index: list[int]
    tokens: list[int]
    logits: list[mx.array]


def generate_replies(
    model: LanguageModel, prompts: Sequence[Sequence[int]], options: SamplingOptions, seeds: Sequence[int]
) -> Iterator[tuple[DecodingStep, list[Reply]]]:
    """Write a reply to each prompt (token ids), batched; yields after every decoding step.

    `seeds` holds one seed a prompt: each reply has a random stream of its own, so that what is drawn for a prompt
    does not depend on its neighbours in the batch.
    """
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(
        model.module,
        stop_tokens=[[stop] for stop in model.stop_ids],
        completion_batch_size=options.batch_size,
        prefill_batch_size=min(options.batch_size, 8),
    )
    samplers = [_keyed_sampler(options, seed) for seed in seeds] if options.sampling_temperature > 0 else None
    handles = generator.insert(
        [list(prompt) for prompt in prompts], [options.max_tokens] * len(prompts), samplers=samplers
    )
    order = {handle: index for index, handle in enumerate(handles)}
    replies = [Reply() for _ in prompts]
    try:
        while responses := generator.next_generated():
            step = DecodingStep(
                [order[response.uid] for response in responses],
                [response.token for response in responses],
                [response.logprobs for response in responses],
            )
            for response in responses:
                reply = replies[order[response.uid]]
                reply.tokens.append(response.token)
                reply.finished = response.finish_reason or ""
            yield step, replies
    finally:
        generator.close()


def _keyed_sampler(options: SamplingOptions, seed: int) -> Callable[[mx.array], mx.array]:
    state = {"key": mx.random.key(seed)}

    def sample(logprobs: mx.array) -> mx.array:
        state["key"], key = mx.random.split(state["key"])
        return mx.random.categorical(_nucleus(logprobs, options.top_p) / options.sampling_temperature, key=key)

    return sample


def _nucleus(logprobs: mx.array, top_p: float) -> mx.array:
    if top_p >= 1.0:
        return logprobs
    from mlx_lm.sample_utils import apply_top_p

    return apply_top_p(logprobs, top_p)


def seed_of(text: str) -> int:
    """A 32-bit seed that depends on nothing but `text`."""
    return int(digest_json(text)[:8], 16)


def uniforms_of(text: str, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) that depend on nothing but `text`; longer draws begin with shorter ones."""
    return np.random.default_rng(int(digest_json(text)[:16], 16)).random(count, dtype=np.float32)
