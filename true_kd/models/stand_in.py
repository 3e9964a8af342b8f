"""A model's stand-in: all that says how it is spoken to and who it is, in one file; everything but its weights.

It travels with the cache of a teacher's replies. Nothing in it is believed: it holds files of known names, to be
unpacked by whoever reads them, and digests, and has the digest of the model that it stands in for or is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from true_kd.files import digest_json

STAND_IN = "teacher.safetensors"
"""Name of the file."""

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")
"""Files of which a model has one at least."""

TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""The files beside its weights that change what a model says, or how it is spoken to."""

_MOST_PACKED = 2**27
_MOST = 2**28
"""Bytes of all files, where the largest tokenizers have some 40 MB."""


@dataclass(frozen=True)
class StandIn:
    """What a stand-in holds."""

    texts: Mapping[str, bytes]
    """Contents of those of TEXT_FILES that the model has, by name."""
    digests: Mapping[str, str]
    """SHA-256 of these, of each file of weights, and of the `adapter` if there is one."""

    @property
    def digest(self) -> str:
        """That of the model: see `ModelFiles.digest`."""
        return digest_json(dict(self.digests))

    def unpack(self, folder: Path) -> None:
        """Write the files into a folder."""
        for name, text in self.texts.items():
            (folder / name).write_bytes(text)


def write_stand_in(path: Path, texts: Mapping[str, bytes], others: Mapping[str, str]) -> None:
    """Write the file; `others` are the digests of what is not among `texts`."""
    tensors = {name: np.frombuffer(zlib.compress(text), dtype=np.uint8) for name, text in texts.items()}
    path.write_bytes(save(tensors, metadata={"digests": json.dumps(dict(others))}))


def read_stand_in(path: Path) -> StandIn:
    """Read a file that a stranger may have written.

    Raises
    ------
    ValueError, OSError
        when it is not what `write_stand_in` writes, or larger than any model's files are.
    """
    if path.stat().st_size > _MOST_PACKED:
        raise ValueError("larger than 128 MiB")
    texts: dict[str, bytes] = {}
    left = _MOST
    try:
        with safe_open(path, framework="np") as opened:
            others = json.loads((opened.metadata() or {})["digests"])
            for name in sorted(opened.keys()):
                if name not in TEXT_FILES:
                    raise ValueError(f"holds {name[:40]!r}, which is no text file of a model")
                texts[name] = _inflate(opened.get_tensor(name), left)
                left -= len(texts[name])
    except (SafetensorError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        raise ValueError(f"not a teacher without its weights ({type(error).__name__})") from error
    if "config.json" not in texts or not any(name in texts for name in TOKENIZERS):
        raise ValueError("without config or tokenizer")
    if not isinstance(others, dict) or not others or not all(map(_is_digest, others.items())):
        raise ValueError("without the digests of weights")
    return StandIn(texts, {**others, **{name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}})


def _inflate(packed: np.ndarray, most: int) -> bytes:
    if packed.dtype != np.uint8 or packed.ndim != 1:
        raise ValueError("not bytes")
    stream = zlib.decompressobj()
    text = stream.decompress(packed.tobytes(), most + 1)
    if len(text) > most:
        raise ValueError("larger than 256 MiB when unpacked")
    if not stream.eof or stream.unused_data:
        raise ValueError("cut short, or too long")
    return text


def _is_digest(item: tuple[str, object]) -> bool:
    name, digest = item
    named = name == "adapter" or re.fullmatch(r"model[^/]*\.safetensors", name)
    return bool(named) and isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) is not None
