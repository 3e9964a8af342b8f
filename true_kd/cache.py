"""Teacher targets on disk: content-addressed, verified, shared by domains and runs.

A cache is a folder per teacher identity (weights, tokenizer, sampling, format; see `CacheIdentity`). It holds shards
of replies as safetensors, and a manifest with one line a shard: its file, its SHA-256 and the keys of the replies in
it. A key is the digest of the tokens the teacher was given, so an edited prompt misses and every other one hits. A
shard exists only when its manifest line is whole; a shard whose bytes do not match its digest is as if absent, and
its replies are captured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from true_kd.errors import CacheError
from true_kd.files import digest_file, digest_json, expand, make_folder, sync_folder, write_atomic, write_json
from true_kd.targets import TeacherTargets

FORMAT = 1
"""Version of what the files mean; part of the identity, so that old files are never misread."""

VARIABLE = "TRUE_KD_CACHE"
"""Environment variable: the folder that holds all caches."""


@dataclass(frozen=True)
class CachedReply:
    """What the teacher said to one prompt, and its distribution at each token of it."""

    tokens: np.ndarray
    """int32 [N], the stop token included when the reply ended by itself."""
    finished: str
    """`stop`, `length` (cut at max_tokens) or `given` (the data's own completion)."""
    targets: TeacherTargets


@dataclass(frozen=True)
class CacheIdentity:
    """Everything that changes the targets, and nothing else."""

    facts: Mapping[str, Any]

    @property
    def key(self) -> str:
        """SHA-256 of the facts and the format version."""
        return digest_json({"format": FORMAT, **self.facts})


def reply_key(prompt: Iterable[int], response: Iterable[int] | None) -> str:
    """The key of a reply: the digest of the tokens that the teacher is given."""
    return digest_json([list(prompt), None if response is None else list(response)])


def default_root() -> Path:
    """`$TRUE_KD_CACHE`, or `true-kd` in the platform's cache folder."""
    if chosen := os.environ.get(VARIABLE):
        return expand(chosen, f"${VARIABLE}")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "true-kd"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "true-kd"


class TargetCache:
    """The cached replies of one teacher identity. Opening it reads the manifest; shards are read when asked for."""

    def __init__(self, root: Path, identity: CacheIdentity) -> None:
        self.identity = identity
        self.folder = root / identity.key[:16]
        self._shards = self._read_manifest()
        self._where = {key: shard for shard, (_, keys) in self._shards.items() for key in keys}
        self._whole: dict[str, bool] = {}

    def __contains__(self, key: str) -> bool:
        shard = self._where.get(key)
        return shard is not None and self._is_whole(shard)

    def read(self, keys: Iterable[str]) -> dict[str, CachedReply]:
        """The replies of `keys`, each of which must be present.

        Raises
        ------
        CacheError
            when a shard was damaged or removed since it was found whole.
        """
        wanted: dict[str, list[str]] = {}
        for key in keys:
            wanted.setdefault(self._where[key], []).append(key)
        found: dict[str, CachedReply] = {}
        for shard, members in wanted.items():
            replies = self._read_shard(shard)
            found.update({key: replies[key] for key in members})
        return found

    def add(self, replies: Mapping[str, CachedReply]) -> None:
        """Write replies as one shard; they are in the cache when this returns, or not at all."""
        payload = _pack(replies)
        name = f"{digest_json(sorted(replies))[:16]}.safetensors"
        path = self.folder / name
        make_folder(self.folder)
        with FileLock(self.folder / ".lock"):
            if not (self.folder / "identity.json").exists():
                write_json(self.folder / "identity.json", {"format": FORMAT, **self.identity.facts})
            write_atomic(path, lambda temporary: temporary.write_bytes(payload))
            line = json.dumps({"shard": name, "sha256": digest_file(path), "keys": list(replies)})
            with (self.folder / "manifest.jsonl").open("a+b") as manifest:
                # A kill may have left half a line; a line of its own keeps it from spoiling this one.
                if manifest.tell() and not _ends_line(manifest):
                    manifest.write(b"\n")
                manifest.write(line.encode() + b"\n")
                manifest.flush()
                os.fsync(manifest.fileno())
            sync_folder(self.folder)
        self._shards[name] = (json.loads(line)["sha256"], list(replies))
        self._where.update(dict.fromkeys(replies, name))
        self._whole[name] = True

    def size(self, keys: Iterable[str]) -> int:
        """Bytes of the shards that hold `keys`, whole files."""
        shards = {self._where[key] for key in keys}
        return sum((self.folder / shard).stat().st_size for shard in shards)

    def _read_manifest(self) -> dict[str, tuple[str, list[str]]]:
        path = self.folder / "manifest.jsonl"
        shards: dict[str, tuple[str, list[str]]] = {}
        for line in path.read_bytes().splitlines() if path.exists() else ():
            try:
                record = json.loads(line)
                name, digest, keys = str(record["shard"]), str(record["sha256"]), [str(key) for key in record["keys"]]
            except (ValueError, KeyError, TypeError):
                continue
            # Of two lines with one reply the later counts, also where the first shard was written again.
            shards.pop(name, None)
            shards[name] = (digest, keys)
        return {name: shard for name, shard in shards.items() if Path(name).name == name}

    def _is_whole(self, shard: str) -> bool:
        if shard not in self._whole:
            path = self.folder / shard
            self._whole[shard] = path.is_file() and digest_file(path) == self._shards[shard][0]
        return self._whole[shard]

    def _read_shard(self, shard: str) -> dict[str, CachedReply]:
        path = self.folder / shard
        digest, keys = self._shards[shard]
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != digest:
                raise ValueError("its digest is not the manifest's")
            return _unpack(load_safetensors(content), keys)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CacheError(f"{path}: damaged or gone ({error}). Run again: it will be captured anew.") from error


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _pack(replies: Mapping[str, CachedReply]) -> bytes:
    """Arrays of all replies end to end, with their lengths; keys live in the manifest."""
    items = list(replies.values())
    tensors = {
        "tokens": np.concatenate([item.tokens for item in items]).astype(np.int32),
        "token_counts": np.array([len(item.tokens) for item in items], dtype=np.int32),
        "finished": np.array([_FINISHED.index(item.finished) for item in items], dtype=np.uint8),
        "entry_counts": np.concatenate([np.diff(item.targets.offsets) for item in items]).astype(np.int32),
        "draw_temperature": np.array([items[0].targets.draw_temperature], dtype=np.float64),
    }
    for name in ("ids", "logprobs", "draws", "draw_mass", "log_partition"):
        tensors[name] = np.concatenate([item.targets.arrays()[name] for item in items])
    return save_safetensors(tensors)


def _unpack(tensors: Mapping[str, np.ndarray], keys: list[str]) -> dict[str, CachedReply]:
    ends = np.cumsum(tensors["token_counts"])
    entry_ends = np.concatenate([[0], np.cumsum(tensors["entry_counts"])])
    replies = {}
    for key, stop, count, finished in zip(keys, ends, tensors["token_counts"], tensors["finished"], strict=True):
        rows = slice(stop - count, stop)
        entries = slice(entry_ends[stop - count], entry_ends[stop])
        targets = TeacherTargets(
            offsets=(entry_ends[stop - count : stop + 1] - entry_ends[stop - count]).astype(np.int32),
            ids=tensors["ids"][entries],
            logprobs=tensors["logprobs"][entries],
            draws=tensors["draws"][entries],
            draw_mass=tensors["draw_mass"][rows],
            log_partition=tensors["log_partition"][rows],
            draw_temperature=float(tensors["draw_temperature"][0]),
        )
        replies[key] = CachedReply(tensors["tokens"][rows], _FINISHED[int(finished)], targets)
    return replies


_FINISHED = ("stop", "length", "given")
