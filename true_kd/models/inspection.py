"""Looks at a model's files before a library opens any of them: a stranger may have written them.

MLX believes the header of a safetensors file, and transformers follows whatever path a config names. So what they are
given is plain files of bounded size, weights whose header holds as the safetensors library reads it, and a config
whose numbers fit the weights. No file is opened because another one names it.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from true_kd.models.stand_in import TEXT_FILES, TOKENIZERS
from true_kd.suggest import quote

_LONGEST_HEADER = 2**25
"""Bytes; 60,000 tensors, as many as the largest mixtures of experts have, take 8 MB."""
_MOST_DIMENSIONS = 8
_LARGEST = 2**31
"""MLX keeps sizes in 32 bits, and lets larger ones wrap around."""
_DTYPES = frozenset(
    ["BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F8_E4M3", "F8_E8M0", "F16", "BF16", "F32", "C64"]
)
"""Those that MLX reads."""


def check_safetensors(path: Path) -> dict[str, tuple[int, ...]]:
    """Prove that a safetensors file is whole before MLX sees it, which takes files that the reference refuses.

    Returns the shape of each tensor. Only the header is read: payloads are the business of a digest.

    Raises
    ------
    ValueError
        with the reason, when the file is no safetensors file or not one that MLX should see.
    OSError
        when it is not there.
    """
    size = plain_size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"cut short: {size:,} bytes, expected a header and tensors")
        if length > _LONGEST_HEADER:
            raise ValueError(f"a header of {length:,} bytes, expected {_LONGEST_HEADER:,} at most")
        header = file.read(length)
    try:
        with safe_open(path, framework="np"):
            pass
        entries = json.loads(header, object_pairs_hook=_without_twins)
    except (SafetensorError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"no safetensors file ({_brief(error)})") from error
    entries.pop("__metadata__", None)
    shapes = {}
    for name, entry in entries.items():
        shape = tuple(entry["shape"])
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"tensor {quote(name)} of type {quote(entry['dtype'])}, expected one that MLX reads")
        if len(shape) > _MOST_DIMENSIONS or any(length >= _LARGEST for length in shape):
            raise ValueError(f"tensor {quote(name)} of an absurd shape, expected sizes below 2^31")
        shapes[name] = shape
    return shapes


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a header that names something twice")
    return found


def plain_size(path: Path) -> int:
    """Bytes of a plain file, or of what a link to one leads to; a pipe or a device would be read for ever.

    Raises
    ------
    ValueError
        when it is something else.
    OSError
        when it is not there.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is a folder, a pipe or a device, expected a file")
    return status.st_size


_SUFFIXES = (".json", ".safetensors", ".txt", ".jinja", ".model", ".tiktoken")
_LONGEST = {".jinja": 2**20, ".json": 2**24}
_LONG_TEXTS = (*TOKENIZERS, "merges.txt", "vocab.txt", "tekken.json")
_LONGEST_TEXT = 2**27
"""Bytes of the files of a tokenizer, of which the largest have some 40 MB."""
_READ = (*TEXT_FILES, "vocab.txt", "tekken.json", "preprocessor_config.json", "processor_config.json")
"""Names of files other than weights that mlx-lm or transformers open of their own accord."""
_TEMPLATES = "additional_chat_templates"


def check_folder(folder: Path) -> None:
    """Prove that the files of a model's folder are plain, of its own, of bounded size, and lead nowhere else.

    Raises
    ------
    ValueError
        with the reason.
    """
    for path in _entries(folder):
        size = plain_size(path)
        if path.name not in _READ and path.parent == folder:
            continue
        longest = _LONGEST_TEXT if path.name in _LONG_TEXTS else _LONGEST.get(path.suffix, _LONGEST_TEXT)
        if size > longest:
            raise ValueError(f"{path.name} has {size:,} bytes, expected {longest:,} at most")
        if not _is_of_a_model(path, folder):
            raise ValueError(f"{path.name} is a link out of the folder and not to a model's file, expected a file")


def _entries(folder: Path) -> Iterator[Path]:
    """What might be opened; a broken link is not there for anybody."""
    for place in (folder, folder / _TEMPLATES):
        if place.is_dir():
            yield from (path for path in sorted(place.iterdir()) if path.suffix in _SUFFIXES and path.exists())


def _is_of_a_model(path: Path, folder: Path) -> bool:
    """Whether a file, if a link, leads to one of this model's, of another model, or to the hub's cache.

    What a model's texts say travels with the cache of a teacher: it must not be a file that is somebody's secret.
    """
    real, home = path.resolve(), folder.resolve()
    if home in real.parents:
        return True
    if real.parent.name == "blobs" and real.parent.parent in home.parents:
        return True
    beside = real.parent
    return (beside / "config.json").is_file() and any(
        path.is_file() for path in (*(beside / name for name in TOKENIZERS), *beside.glob("model*.safetensors"))
    )


def read_json(path: Path) -> Any:
    """The content of a JSON file of a model.

    Raises
    ------
    ValueError
        when it is too large, or no JSON.
    """
    if plain_size(path) > _LONGEST_TEXT:
        raise ValueError(f"{path.name} is too large")
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON ({_brief(error)})") from error


def check_configs(folder: Path) -> None:
    """Prove that no config in a model's folder makes a library open another file, import code, or build without end.

    Raises
    ------
    ValueError
        with the key that would.
    """
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            _check_names(name, read_json(folder / name))
    if (folder / "config.json").exists():
        _check_limits(read_json(folder / "config.json"), _MANY, _LARGEST)


def _check_names(name: str, config: Any) -> None:
    if not isinstance(config, dict):
        raise ValueError(f"{name} holds no object")
    for key in ("configuration_files", "fast_tokenizer_files"):
        files = config.get(key) or []
        if not isinstance(files, list) or not all(isinstance(file, str) and _is_plain(file) for file in files):
            raise ValueError(f"{name} names other files under {key}, expected plain names")
    for key in ("model_type", "chat_template_type", "tool_parser_type"):
        if (kind := config.get(key)) is not None and not (isinstance(kind, str) and re.fullmatch(r"[\w.-]+", kind)):
            raise ValueError(f"{name} has a {key} that is no name")
    if config.get("model_file") is not None:
        file = quote(str(config["model_file"]))
        raise ValueError(f"{name} asks to run the code in {file}, which true-kd never does")


def _is_plain(file: str) -> bool:
    return re.fullmatch(r"[\w.-]+\.json", file) is not None


def path_keys(folder: Path) -> list[str]:
    """Keys of a tokenizer's config under which transformers would look for paths; stale ones are common.

    Raises ValueError as `read_json` does.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    return sorted(key for key in config if key.endswith("_file"))


_COUNTS = re.compile(r"(^|_)(layers?|blocks|depth|experts)$")
_SIZES = re.compile(r"(?<!group)(_(size|dim|heads?|width|embd|inner)|d_model)$")
_FEW = 512
"""A count that is built in a moment, whatever the weights hold."""
_NARROW = 2**24
_MANY = 2**14
"""More layers or experts than any model has: transformers makes lists of them to open a tokenizer."""


def check_numbers(config: Mapping[str, Any], shapes: Collection[tuple[int, ...]]) -> None:
    """Prove that a config describes no more layers, experts and features than there are weights for.

    A library builds them all before it compares them with the weights.

    Raises
    ------
    ValueError
        with the number that does not fit.
    """
    elements = sum(math.prod(shape) for shape in shapes)
    # A layer has a tensor of its own; experts may share one.
    experts = max((max(shape) for shape in shapes if len(shape) > 2), default=0)
    _check_limits(config, min(_MANY, max(_FEW, len(shapes), experts)), max(_NARROW, 32 * elements))


def _check_limits(config: Any, most: int, widest: int) -> None:
    for key, value in _numbers(config):
        for pattern, limit in ((_COUNTS, most), (_SIZES, widest)):
            if pattern.search(key) and value > limit:
                shown = f"{value:,}" if value < 10**18 else "a number of astronomic size"
                raise ValueError(f"config.json has {quote(key)} = {shown}, expected at most {limit:,}")


def _numbers(config: Any, depth: int = 0) -> Iterator[tuple[str, int]]:
    if isinstance(config, Mapping) and depth < 8:
        for key, value in config.items():
            if type(value) is int:
                yield str(key), value
            else:
                yield from _numbers(value, depth + 1)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def check_weights(folder: Path) -> None:
    """Prove that the weights in a model's folder are whole and that its config fits them; see `check_safetensors`.

    All of `model*.safetensors` is meant, as for mlx-lm: an index that names others is nobody's to follow.

    Raises
    ------
    ValueError
        with the file and the reason.
    """
    shapes: list[tuple[int, ...]] = []
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            shapes += check_safetensors(path).values()
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
    config = read_json(folder / "config.json")
    check_numbers(config if isinstance(config, Mapping) else {}, shapes)


CARD = "README.md"
"""A model's card, which says what the model was made from, and under what terms it stands."""
_LONGEST_CARD = 2**20
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_card(folder: Path) -> Mapping[str, Any]:
    """The front matter of the card in a model's folder; empty where there is none that can be read."""
    try:
        if plain_size(folder / CARD) > _LONGEST_CARD:
            return {}
        opening = re.match(r"\s*---\s*\n(.*?)\n---", (folder / CARD).read_text(encoding="utf-8"), re.DOTALL)
        facts = yaml.safe_load(opening[1]) if opening else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return facts if isinstance(facts, dict) else {}


def card_base(folder: Path) -> str | None:
    """The hub id that a model's card names as the one model it was made from; None where it names none, or several."""
    named = read_card(folder).get("base_model")
    if isinstance(named, list) and len(named) == 1:
        named = named[0]
    return named if isinstance(named, str) and _HUB_ID.fullmatch(named) else None


def is_hub_blob(path: Path) -> bool:
    """Whether a file lies in the hub's cache under its SHA-256, which then need not be taken again."""
    if path.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{64}", path.name):
        return False
    from huggingface_hub import constants

    return Path(os.path.realpath(constants.HF_HUB_CACHE)) in path.parents
