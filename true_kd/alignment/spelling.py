"""What the tokens of a vocabulary spell: the bytes that each stands for in a text.

Two ways of writing tokens cover the models that mlx-lm runs: byte-level BPE (GPT-2, Qwen, Llama 3), which writes each
byte as a character of an alphabet of 256, and SentencePiece's (Llama 2, Mistral, Gemma), which writes a space as U+2581
and bytes that no other token covers as "<0xE6>". A token need not be valid UTF-8 by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from true_kd.errors import VocabularyError
from true_kd.models import ModelTokenizer
from true_kd.suggest import quote

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling:
    """The tokens of one tokenizer as bytes, and bytes as its tokens.

    Raises
    ------
    VocabularyError
        when the tokenizer writes its tokens in neither of the two ways.
    """

    def __init__(self, model: ModelTokenizer) -> None:
        self.model = model
        backend = getattr(model.tokenizer, "backend_tokenizer", None)
        layout = self.layout = json.loads(backend.to_str()) if backend is not None else {}
        self._bytewise = "ByteLevel" in _kinds(layout.get("decoder")) | _kinds(layout.get("pre_tokenizer"))
        pieces = not self._bytewise and (layout.get("model", {}).get("byte_fallback") or _SPACE in json.dumps(layout))
        if not (self._bytewise or pieces):
            raise VocabularyError(
                f"{quote(model.name)}: its tokenizer is neither byte-level BPE nor of SentencePiece's kind, expected "
                "one of the two to align texts by. Choose models of one family."
            )
        added = {token["id"]: token for token in layout["added_tokens"]}
        self.special = {index: token["content"] for index, token in added.items() if token["special"]}
        """Text of the tokens that no reply spells: turn marks, padding."""
        self.pieces: list[bytes | None] = [None] * model.size
        """What each id stands for; None for special tokens and for rows that only pad the output head."""
        for text, index in model.ids.items():
            if index >= model.size or index in self.special:
                continue
            self.pieces[index] = text.encode() if index in added else self._spell(text)
        self._model = backend.model
        self._unknown = layout["model"].get("unk_token")

    def _spell(self, token: str) -> bytes:
        if self._bytewise:
            return bytes(byte for character in token for byte in _ALPHABET.get(character, character.encode()))
        if match := _BYTE.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace(_SPACE, " ").encode()

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The id of each spelling: of several the one that the tokenizer itself writes."""
        found: dict[bytes, int] = {}
        for index, piece in enumerate(self.pieces):
            if not piece:
                continue
            if piece not in found or self.split(piece) == (index,):
                found[piece] = index
        return found

    @cached_property
    def adds_space(self) -> bool:
        """Whether a text gets a space in front of its first word, which decoding takes away again."""
        return self.join(self.model.tokenizer.encode("a", add_special_tokens=False)) == b" a"

    def join(self, tokens: Sequence[int]) -> bytes:
        """What tokens spell, special ones their name."""
        return b"".join(self.spelled(token) for token in tokens)

    def spelled(self, token: int) -> bytes:
        """What a token spells, a special one its name."""
        return self.pieces[token] or self.special.get(token, "").encode()

    @lru_cache(maxsize=2**18)  # noqa: B019 - as long as the spelling lives
    def split(self, text: bytes) -> tuple[int, ...]:
        """The tokens of a stretch in the middle of a text, one word or so; () where they do not spell it."""
        if self._bytewise:
            tokens = self._merge("".join(_LETTERS[byte] for byte in text))
        else:
            tokens = [token for part, is_text in _characters(text) for token in self._pieces_of(part, is_text)]
        return tuple(tokens) if self.join(tokens) == text else ()

    def _pieces_of(self, text: bytes, is_text: bool) -> list[int]:
        if is_text:
            return self._merge(text.decode().replace(" ", _SPACE))
        return [self._bytes[byte] for byte in text if byte in self._bytes]

    @cached_property
    def _bytes(self) -> dict[int, int]:
        """The tokens that stand for single bytes by their number, where the tokenizer has such."""
        ids = self.model.ids
        names = {byte: f"<0x{byte:02X}>" for byte in range(256)}
        return {byte: ids[name] for byte, name in names.items() if name in ids}

    def _merge(self, written: str) -> list[int]:
        return [token.id for token in self._model.tokenize(written)]

    def encode(self, text: bytes, continues: bool) -> list[int]:
        """The tokens of a whole reply; bytes that are no character become U+FFFD where the tokenizer has no bytes.

        `continues`: the reply goes on in the middle of a text, so that no space is added in front of it.
        """
        plain = text.decode("utf-8", errors="replace")
        if self.adds_space and continues:
            if not plain.startswith(" "):
                # A line break takes no space after it, and is taken off again.
                return self._without_first(plain)
            plain = plain[1:]
        return list(self.model.tokenizer.encode(plain, add_special_tokens=False))

    def _without_first(self, text: str) -> list[int]:
        tokens = list(self.model.tokenizer.encode(f"\n{text}", add_special_tokens=False))
        for count in range(1, len(tokens) + 1):
            if self.join(tokens[:count]).endswith(b"\n"):
                return tokens[count:]
        return tokens


def _kinds(part: Any) -> set[str]:
    """The types of the parts of a tokenizer's pipeline."""
    if isinstance(part, dict):
        return {str(part.get("type"))}.union(*(_kinds(value) for value in part.values()))
    if isinstance(part, list):
        return set().union(*(_kinds(value) for value in part))
    return set()


def _characters(text: bytes) -> list[tuple[bytes, bool]]:
    """Stretches of whole characters, and between them bytes that are none."""
    parts: list[tuple[bytes, bool]] = []
    while text:
        try:
            text.decode()
            parts.append((text, True))
            break
        except UnicodeDecodeError as error:
            if error.start:
                parts.append((text[: error.start], True))
            parts.append((text[error.start : error.end], False))
            text = text[error.end :]
    return parts


def _byte_letters() -> list[str]:
    """The character by which byte-level BPE writes each byte: itself where it prints, else one from 256 on."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte) if byte in prints else chr(next(rest)) for byte in range(256)]


_LETTERS = _byte_letters()
_ALPHABET = {letter: bytes([byte]) for byte, letter in enumerate(_LETTERS)}
