"""Small tokenizers of every kind that `true_kd.alignment` reads, trained on a few lines, and real ones where there are.

`OWN` names those that are trained here, `ALL` also the folders in TRUE_KD_TOKENIZERS; `opened` opens one.
"""

from __future__ import annotations

import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import TEMPLATE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from true_kd.alignment.spelling import Spelling
from true_kd.models import ModelTokenizer

CORPUS = [
    "the cat sat on the mat and said hello to the world, hello there",
    "The world's cats can't say hello; they'll sit on mats: 12 cats, 345 mats!",
    "def add(one, two):\n    return one + two\n\n\nfor cat in cats:\n\tprint(cat)  # said\n\t\tpass",
    "die Katze saß auf der Matte und sagte: schöne Grüße, où est-il, ça va, naïve café",
    "кошка сидела на ковре и сказала привет миру",
    "猫は マット の上に 座って こんにちは と 言った。猫猫",
    "cats 🐈🐈 say 👋🏽 hello 👩‍👩‍👧 … “yes” — no",
    "a  b   c    d     e\n\n  x\n    y\n        z\n",
] * 12
SPECIAL = ["<unk>", "<s>", "</s>", "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RARE = dict.fromkeys(map(ord, "ßüé🐈👋🏽👩…“”猫座言"))
"""Characters that SentencePiece's kind is not trained on."""
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

OWN = (
    "gpt2",
    "qwen",
    "unsplit",
    "prefixed",
    "letters",
    "llama",
    "mistral",
    "phrases",
    "first",
    "gemma",
)
"""`gpt2` and `qwen` are byte-level with the regexes of those, `qwen` with NFC; `unsplit` is without one, and its tokens
run over words; `prefixed` adds a space; `letters` has single bytes only. `llama` prepends a space and replaces, with
bytes; `mistral`, `first` and `gemma` are Metaspace: always, first and never a space in front; `phrases` is without
bytes, and its tokens run over words and line breaks."""
ADDED = {"qwen": ["<tool_call>", "</tool_call>"], "gpt2": ["        "], "gemma": ["▁▁", "▁▁▁", "\n\n", "<table>"]}
"""Added tokens that are not special."""
TEMPLATED = {"qwen", "llama", "mistral", "gemma"}
OPENED = {"llama", "gemma", "gpt2"}
"""Those that begin a text with a token that opens it."""
END = 4
"""The id of "<|end|>" in all of `OWN`, which ends a reply."""

_REAL = os.environ.get("TRUE_KD_TOKENIZERS", "")
REAL = sorted(f"{path.name}*" for path in Path(_REAL).iterdir() if path.is_dir()) if _REAL else []
"""Real tokenizers, by the names of their folders and a star."""
NO_REAL = pytest.param("real", marks=pytest.mark.skip(reason="TRUE_KD_TOKENIZERS names no folder of real tokenizers"))
ALL = [*OWN, *(REAL or [NO_REAL])]


def _bytewise(name: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    regexes = {"gpt2": GPT2_REGEX, "qwen": QWEN_REGEX, "prefixed": GPT2_REGEX}
    steps = []
    if name in regexes and name != "prefixed":
        steps.append(pre_tokenizers.Split(Regex(regexes[name]), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=name == "prefixed", use_regex=name == "prefixed"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if name == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    sizes = {"gpt2": 560, "qwen": 460, "unsplit": 420, "prefixed": 400, "letters": 256 + len(SPECIAL)}
    trainer = trainers.BpeTrainer(
        vocab_size=sizes[name],
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _pieced(name: str) -> Tokenizer:
    """SentencePiece's kind."""
    has_bytes = name != "phrases"
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=has_bytes))
    spaced = {"mistral": "always", "first": "first", "gemma": "never", "phrases": "first"}
    if name == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", spaced[name], split=name == "mistral")
    strip = [] if name == "gemma" else [decoders.Strip(" ", 1, 0)]
    fallback = [decoders.ByteFallback()] if has_bytes else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *fallback, decoders.Fuse(), *strip])
    trainer = trainers.BpeTrainer(
        vocab_size=700 if has_bytes else 420,
        special_tokens=[*SPECIAL, *(BYTES if has_bytes else [])],
        max_token_length=12 if name in ("phrases", "gemma") else 6,
        show_progress=False,
    )
    tokenizer.train_from_iterator([line.translate(RARE) for line in CORPUS], trainer)
    layout = json.loads(tokenizer.to_str())
    # The trainer takes the bytes for special tokens, which real ones are not.
    layout["added_tokens"] = [token for token in layout["added_tokens"] if token["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(layout))


def save(name: str, folder: Path) -> Path:
    """Write one of `OWN` as transformers reads it."""
    tokenizer = _bytewise(name) if name in OWN[:5] else _pieced(name)
    if name in OPENED:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ADDED.get(name, [])])
    return _save(tokenizer, name, folder)


def _save(tokenizer: Tokenizer, name: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        **({"chat_template": TEMPLATE} if name in TEMPLATED else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@cache
def folder_of(name: str) -> Path:
    """Where a tokenizer lies; a trained one for as long as this process runs."""
    if name.endswith("*"):
        return Path(_REAL) / name[:-1]
    holder = tempfile.TemporaryDirectory()
    _HOLDERS.append(holder)
    return save(name, Path(holder.name))


_HOLDERS: list[tempfile.TemporaryDirectory[str]] = []


@cache
def opened(name: str, template: bool | None = None) -> ModelTokenizer:
    """A tokenizer as a model's; `template` says whether it has a chat template, None as it comes."""
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(folder_of(name))
    if template is not None:
        tokenizer.chat_template = TEMPLATE if template else None
        tokenizer.has_chat_template = template
    return ModelTokenizer(name, tokenizer, len(tokenizer.get_vocab()) + 7, "")


@cache
def spelled(name: str) -> Spelling:
    """What its tokens spell."""
    return Spelling(opened(name))


@cache
def merging(*merges: str) -> ModelTokenizer:
    """A byte-level tokenizer of given merges, as "a b"; `END` ends its replies."""
    from mlx_lm.utils import load_tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(merge.replace("_", "\u0120").split()) for merge in merges]
    tokens = [*SPECIAL, *letters, *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    with tempfile.TemporaryDirectory() as holder:
        loaded = load_tokenizer(_save(tokenizer, "merging", Path(holder)))
    return ModelTokenizer("merging", loaded, len(tokens), "")
