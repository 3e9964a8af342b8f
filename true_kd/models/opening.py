"""Finds models, takes their digests and opens them.

No code from a model folder is ever run: `trust_remote_code` is passed as False everywhere, only safetensors are read,
and no library opens a file that `inspection` has not looked at.
"""

from __future__ import annotations

import contextlib
import gc
import re
import resource
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from pydantic import Field

from true_kd import pocket
from true_kd.backend import device_name
from true_kd.errors import ModelError, TrueKDError
from true_kd.files import digest_file, digest_json, expand
from true_kd.models.inspection import (
    CARD,
    check_configs,
    check_folder,
    check_weights,
    is_hub_blob,
    path_keys,
    plain_size,
    read_json,
)
from true_kd.models.lora import attach_adapter
from true_kd.models.stand_in import STAND_IN, TEXT_FILES, TOKENIZERS, read_stand_in, write_stand_in
from true_kd.options import Options
from true_kd.suggest import printable, quote, redact


class ModelOptions(Options):
    """Which model, and how it is held in memory."""

    model: str = Field(min_length=1)
    """A hub id, a local folder, or an embedded model such as `pocket:teacher`. For a teacher also `cache:KEY`: as that
    cache knows it, without its weights."""
    revision: str | None = None
    """A branch, tag or commit of the hub repository."""
    adapter: str | None = Field(default=None, min_length=1)
    """An mlx-lm adapter folder that is put on the teacher: what it was fine-tuned to say is what is distilled."""
    dequantize: Literal["auto", "always", "never"] = "auto"
    """Unpack quantised weights on load. `auto` does so on a CPU, where 4-bit arithmetic is some 35 times slower."""


@dataclass(frozen=True)
class ModelTokenizer:
    """How a model reads and writes text; open without its weights."""

    name: str
    tokenizer: Any
    """mlx-lm's wrapper of the tokenizer."""
    size: int
    """Rows of the output head, padding included."""
    digest: str
    """See `ModelFiles.digest`."""

    @property
    def ids(self) -> dict[str, int]:
        """Token text, as the tokenizer spells it, to id."""
        return dict(self.tokenizer.get_vocab())

    @property
    def stop_ids(self) -> list[int]:
        """Token ids that end a reply."""
        return sorted(self.tokenizer.eos_token_ids)


@dataclass(frozen=True)
class LanguageModel(ModelTokenizer):
    """An opened model with its tokenizer."""

    module: nn.Module


class NotDownloaded(ModelError):
    """A model of the hub is not on this disk, and was not to be downloaded."""

    def __init__(self, options: ModelOptions, seam: str) -> None:
        super().__init__(
            f"{seam} {quote(options.model)}: not downloaded yet, expected it in the hub's cache. A run downloads it, "
            f"or `hf download {redact(printable(options.model))}`."
        )


def locate(options: ModelOptions, seam: str, download: bool = True) -> Path:
    """The local folder of a model, downloaded from the hub where need be; or a teacher's stand-in, which is a file.

    Without `download` nothing is, and nobody is asked.

    Raises
    ------
    ModelError
        when there is no such folder or repository, or the hub cannot be reached; `seam` (teacher, student) names it.
    NotDownloaded
        when it would have to be downloaded.
    """
    path = pocket.locate(options.model, seam)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{seam} {quote(options.model)}: no config.json in this folder, expected an mlx-lm model.")
        return path
    if seam == "teacher" and path.name == STAND_IN and path.is_file():
        return path
    looks_local = options.model.startswith((".", "/", "~", pocket.PREFIX)) or options.model.count("/") != 1
    if looks_local or path.exists():
        raise ModelError(
            f"{seam} {quote(options.model)}: no such folder, expected an mlx-lm model folder or a hub id like "
            "mlx-community/Qwen2.5-3B-Instruct-4bit. Check the path."
        )
    return _from_hub(options, seam, download)


def _from_hub(options: ModelOptions, seam: str, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]
    # What it was made from and under what terms it stands, for whoever shares what is made from it.
    patterns += [CARD, "LICENSE*"]
    try:
        folder = Path(
            snapshot_download(
                options.model, revision=options.revision, allow_patterns=patterns, local_files_only=not download
            )
        )
        # What a download that was broken off has left.
        if not download and not (any(folder.glob("model*.safetensors")) and (folder / "config.json").is_file()):
            raise NotDownloaded(options, seam)
        return folder
    except LocalEntryNotFoundError as error:
        if not download:
            raise NotDownloaded(options, seam) from error
        raise ModelError(
            f"{seam} {quote(options.model)}: not in the local hub cache, and the hub cannot be reached. "
            "Go online once, or give a local folder."
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = redact(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        raise ModelError(
            f"{seam} {quote(options.model)}: the hub refused it ({reason}). Check the id and the revision; for a gated "
            "model, run `hf auth login`."
        ) from error


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder, or its stand-in, read without opening its weights."""

    path: Path
    weights: list[Path]
    """None of them for a stand-in."""
    digests: Mapping[str, str]
    """SHA-256 of every file that changes what the model says or how it is spoken to, by name."""

    @property
    def digest(self) -> str:
        """SHA-256 over `digests`."""
        return digest_json(dict(self.digests))


def describe(options: ModelOptions, seam: str) -> ModelFiles:
    """Find a model and take its digest.

    Raises
    ------
    ModelError
        when there is no such model, it has no safetensors weights, or it is a stand-in that cannot be read.
    """
    path = locate(options, seam)
    if path.is_file():
        return _describe_stand_in(path, options)
    with _loading(options, seam, "true-kd"):
        check_folder(path)
    weights = sorted(path.glob("model*.safetensors"))
    if not weights:
        raise ModelError(
            f"{seam} {quote(options.model)}: no model*.safetensors in {path}, expected safetensors weights."
        )
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise ModelError(
            f"{seam} {quote(options.model)}: no tokenizer in {path}, expected one of {', '.join(TOKENIZERS)}."
        )
    texts = [path / name for name in TEXT_FILES if (path / name).is_file()]
    digests = {file.name: _content_digest(file) for file in [*texts, *weights]}
    if options.adapter is not None:
        digests["adapter"] = _describe_adapter(options, seam)
    return ModelFiles(path, weights, digests)


def _describe_stand_in(path: Path, options: ModelOptions) -> ModelFiles:
    if options.adapter is not None:
        raise ModelError(
            f"teacher.adapter {quote(options.adapter)}: given with a teacher that only a cache knows, expected none: "
            "the one it was captured with is part of it. Leave it out."
        )
    try:
        return ModelFiles(path, [], read_stand_in(path).digests)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"teacher {quote(options.model)}: {error}, expected the {STAND_IN} of a cache. Import it again."
        ) from error


def save_stand_in(options: ModelOptions, digest: str, path: Path) -> None:
    """Write the stand-in of a teacher of that digest; as a model's name, its path stands for all but the weights.

    Raises
    ------
    ModelError
        when a file is not what its digest says, or has changed since the digest was taken.
    """
    files = describe(options, "teacher")
    texts = {name: (files.path / name).read_bytes() for name in TEXT_FILES if name in files.digests}
    write_stand_in(path, texts, {name: found for name, found in files.digests.items() if name not in texts})
    if read_stand_in(path).digest != digest:
        raise ModelError(
            f"teacher {quote(options.model)}: a file in {files.path} has changed or is damaged, expected that of its "
            "digest. Run again, or download it again."
        )


def _describe_adapter(options: ModelOptions, seam: str) -> str:
    """The digest of an adapter: of its weights, and of the part of its config that says how they are used."""
    if seam != "teacher":
        raise ModelError(
            f"{seam}.adapter: given, expected a plain model that gets a new adapter. Fuse the old one with "
            "mlx_lm.fuse, and name the fused folder."
        )
    folder = expand(options.adapter or "", f"{seam}.adapter")
    try:
        config = read_json(folder / _ADAPTER_CONFIG)
        plain_size(folder / _ADAPTER_WEIGHTS)
        used = {name: config.get(name) for name in ("fine_tune_type", "num_layers", "lora_parameters")}
        return digest_json([used, _content_digest(folder / _ADAPTER_WEIGHTS)])
    except (OSError, ValueError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError(
            f"{seam}.adapter {quote(str(folder))}: cannot be read ({reason}), expected {_ADAPTER_CONFIG} and "
            f"{_ADAPTER_WEIGHTS} of an mlx-lm adapter. Check the path."
        ) from error


_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapters.safetensors"


def _content_digest(file: Path) -> str:
    # The hub cache names a large file's blob by its SHA-256: no need to read gigabytes again.
    blob = file.resolve()
    if is_hub_blob(blob):
        return blob.name
    status = file.stat()
    known = (file, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if known not in _DIGESTS:
        _DIGESTS[known] = digest_file(file)
    return _DIGESTS[known]


_DIGESTS: dict[tuple[Path, int, int, int], str] = {}
"""Digests of files of a size and certain times: a run asks for those of its models many times."""


def known_digests() -> dict[tuple[Path, int, int, int], str]:
    """The digests that were taken, for another process of the same run."""
    return dict(_DIGESTS)


def take_over_digests(known: Mapping[tuple[Path, int, int, int], str]) -> None:
    """Believe what another process of this run has found: gigabytes are not read again."""
    _DIGESTS.update(known)


def open_tokenizer(options: ModelOptions, seam: str) -> ModelTokenizer:
    """Open a model's tokenizer without its weights.

    Raises
    ------
    ModelError
        when there is no such model, or its tokenizer cannot be loaded without running code from its folder.
    """
    files = describe(options, seam)
    utils = _mlx_lm_utils()
    with _loading(options, seam), _unpacked(files.path) as folder:
        check_configs(folder)
        config = utils.load_config(folder)
        # What stands under a key of the caller's is not taken from the file.
        no_paths = dict.fromkeys(path_keys(folder))
        text_config = config.get("text_config")
        size = config.get("vocab_size") or (text_config.get("vocab_size") if isinstance(text_config, dict) else None)
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"config.json has {'no' if size is None else 'an odd'} vocab_size")
        with _loading(options, seam, what="its tokenizer"):
            tokenizer = utils.load_tokenizer(
                folder, {**no_paths, "trust_remote_code": False}, eos_token_ids=config.get("eos_token_id", None)
            )
    return ModelTokenizer(options.model, tokenizer, size, files.digest)


def open_tokenizer_here(options: ModelOptions, seam: str) -> ModelTokenizer:
    """The tokenizer of a model that is on this disk: nothing is downloaded, and the hub is not asked for a newer one.

    Raises
    ------
    NotDownloaded
        when it is not here.
    ModelError
        as `open_tokenizer` does.
    """
    here = options.model_copy(update={"model": str(locate(options, seam, download=False))})
    return replace(open_tokenizer(here, seam), name=options.model)


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """The folder of a model; for a stand-in one that is gone afterwards."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="true-kd-") as folder:
        read_stand_in(path).unpack(Path(folder))
        yield Path(folder)


def open_model(options: ModelOptions, seam: str) -> LanguageModel:
    """Open a model and its tokenizer, in evaluation mode; float32 on a CPU, elsewhere as stored.

    On a GPU a student that is stored in float32 computes in bfloat16; adapters and their optimizer stay in float32.

    Raises
    ------
    ModelError
        when the folder does not hold a model that mlx-lm can load without running code from it, or the model is a
        stand-in.
    """
    if not describe(options, seam).weights:
        raise ModelError(
            f"{seam} {quote(options.model)}: its weights are not here, expected them to be opened. Do this where they "
            "are, and import the cache again."
        )
    text = open_tokenizer(options, seam)
    on_cpu = device_name() == "cpu"
    module = _load(options, seam, lazy=False, on_cpu=on_cpu)
    if options.adapter is not None:
        _put_on(module, options, seam)
        if on_cpu:
            module.set_dtype(mx.float32)
    module.eval()
    mx.eval(module.parameters())
    with _loading(options, seam):
        # Nothing is computed: a config that no layer can be called with shows in the graph.
        module(mx.array([[0]]))
    return LanguageModel(text.name, text.tokenizer, text.size, text.digest, module)


def _load(options: ModelOptions, seam: str, lazy: bool, on_cpu: bool) -> nn.Module:
    """The model in the types that it computes in; `lazy` leaves its weights unread until they are asked for."""
    utils = _mlx_lm_utils()
    with _loading(options, seam):
        folder = locate(options, seam)
        check_configs(folder)
        check_weights(folder)
        module, config = utils.load_model(folder, lazy=lazy, trust_remote_code=False)
    if "quantization" in config and (options.dequantize == "always" or (options.dequantize == "auto" and on_cpu)):
        module = utils.dequantize_model(module)
    if on_cpu:
        module.set_dtype(mx.float32)
    elif seam == "student":
        _halve(module)
    return module


def _halve(module: nn.Module) -> None:
    """Have a model of float32 alone compute in bfloat16, but for what its family keeps in float32."""
    floats = [leaf for _, leaf in tree_flatten(module.parameters()) if mx.issubdtype(leaf.dtype, mx.floating)]
    if all(leaf.dtype == mx.float32 for leaf in floats):
        wanted = getattr(module, "cast_predicate", lambda _: True)
        module.update(
            tree_map_with_path(
                lambda path, leaf: leaf.astype(mx.bfloat16) if leaf.dtype == mx.float32 and wanted(path) else leaf,
                module.parameters(),
            )
        )


def _put_on(module: nn.Module, options: ModelOptions, seam: str) -> None:
    with _loading(options, seam):
        found, taken = attach_adapter(module, expand(options.adapter or "", f"{seam}.adapter"), _ADAPTER_WEIGHTS)
    if found != taken:
        raise ModelError(
            f"{seam}.adapter {quote(options.adapter or '')}: {len(found)} tensors, expected the {len(taken)} that its "
            f"config puts on {quote(options.model)}. Choose the adapter of this model."
        )


def open_skeleton(options: ModelOptions, seam: str, as_stored: bool = False) -> nn.Module:
    """A model whose weights are not read: its layers, their names and shapes, and the types that they are computed in.

    `as_stored`: in those that a GPU computes in, wherever this runs.
    """
    describe(options, seam)
    return _load(options, seam, lazy=True, on_cpu=device_name() == "cpu" and not as_stored)


def open_stored(options: ModelOptions, seam: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model as it is stored, of which weights are read where they are needed, and its config as mlx-lm has it."""
    folder = describe(options, seam).path
    with _loading(options, seam):
        check_configs(folder)
        check_weights(folder)
        return _mlx_lm_utils().load_model(folder, lazy=True, trust_remote_code=False)


@contextlib.contextmanager
def _loading(options: ModelOptions, seam: str, who: str = "mlx-lm", what: str = "it") -> Iterator[None]:
    fault = None
    try:
        yield
    except TrueKDError:
        raise
    except Exception as error:  # noqa: BLE001 - a stranger's files may be wrong in any way
        fault = error
    if fault is not None:
        raise ModelError(
            f"{seam} {quote(options.model)}: {who} cannot load {what} ({_reason(fault)}). Choose another model."
        ) from fault


def _reason(error: BaseException) -> str:
    """What a library found wrong with a stranger's files, without what only a reader of its code understands."""
    text = redact(" ".join(str(error).split()))
    if missing := re.search(r"missing \d+ required \w+ arguments?: (.*)", text):
        text = f"config.json lacks {missing[1]}"
    elif isinstance(error, KeyError):
        text = f"{text} is missing"
    elif isinstance(error, UnicodeDecodeError):
        text = "a file of text is not UTF-8"
    elif isinstance(error, RecursionError):
        text = "a file is nested too deeply"
    text = re.sub(r"\b\w*(Error|Exception): |<class '(\w+)'>", lambda found: found[2] or "", text)
    return printable(text.replace("NoneType", "null"))[:200].rstrip(".") or "its files do not fit together"


def release_memory() -> None:
    """Give back what freed models held. The caller drops its own references first."""
    gc.collect()
    mx.clear_cache()


@contextlib.contextmanager
def file_limits_kept() -> Iterator[None]:
    """For imports of `mlx_lm.utils`, which lowers the limit of open files to 2048/4096, or raises where it cannot."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    set_limit = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = set_limit
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _mlx_lm_utils() -> Any:
    with file_limits_kept():
        import mlx_lm.utils
    return mlx_lm.utils
