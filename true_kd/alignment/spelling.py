"""What the tokens of a vocabulary spell: the bytes that each stands for in a text.

Two ways of writing tokens cover the models that mlx-lm runs: byte-level BPE (GPT-2, Qwen, Llama 3), which writes each
byte as a character of an alphabet of 256, and SentencePiece's (Llama 2, Mistral, Gemma), which writes a space as U+2581
and bytes that no other token covers as "<0xE6>". A token need not be valid UTF-8 by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
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
        steps = json.dumps([layout.get("normalizer"), layout.get("pre_tokenizer")], ensure_ascii=False)
        pieces = not self._bytewise and (layout.get("model", {}).get("byte_fallback") or _SPACE in steps)
        if not (self._bytewise or pieces):
            raise VocabularyError(
                f"{quote(model.name)}: its tokenizer is neither byte-level BPE nor of SentencePiece's kind, expected "
                "one of the two to align texts by. Choose models of one family."
            )
        added = {token["id"]: token for token in layout["added_tokens"]}
        self._added_ids = added.keys()
        self.stop = frozenset(model.stop_ids)
        """Tokens that end a reply."""
        self.special = {index: token["content"] for index, token in added.items() if token["special"]}
        """Text of the tokens that no reply spells: turn marks, padding."""
        self._token_ids = model.ids
        self._model = backend.model
        # One that adds a space cuts the middle of a text as if it were its beginning.
        self._words = None if '"add_prefix_space": true' in steps else backend.pre_tokenizer
        plain = sorted((token["content"].encode() for token in added.values() if not token["special"]), key=len)
        self._added = re.compile(b"(" + b"|".join(map(re.escape, reversed(plain))) + b")") if plain else None

    @cached_property
    def pieces(self) -> list[bytes | None]:
        """What each id stands for; None for special tokens and for rows that only pad the output head."""
        found: list[bytes | None] = [None] * self.model.size
        for text, index in self._token_ids.items():
            if index >= self.model.size or index in self.special:
                continue
            found[index] = text.encode() if self._bytewise and index in self._added_ids else self._spell(text)
        return found

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
        """What a token spells, a special one its name; nothing where the output head has no row for it."""
        piece = self.pieces[token] if token < len(self.pieces) else b""
        return self.special.get(token, "").encode() if piece is None else piece

    def written(self, token: int) -> bytes:
        """What a token adds to a reply: one that ends it, nothing."""
        return b"" if token in self.stop else self.spelled(token)

    def known(self, tokens: Iterable[int]) -> list[int]:
        """The tokens that the output head has a row for: a tokenizer may know more than its model."""
        return [token for token in tokens if token < self.model.size]

    @lru_cache(maxsize=2**18)  # noqa: B019 - a process opens few tokenizers
    def split(self, text: bytes) -> tuple[int, ...]:
        """The tokens of a stretch in the middle of a text, one word or so; () where they do not spell it."""
        tokens: list[int] = []
        # Every other part is an added token.
        for at, part in enumerate(self._added.split(text) if self._added else [text]):
            tokens += [self._token_ids[part.decode()]] if at % 2 else self._split_plain(part)
        is_known = max(tokens, default=0) < self.model.size
        return tuple(tokens) if is_known and self.join(tokens) == text else ()

    @cached_property
    def _merges(self) -> tuple[dict[int, list[tuple[int, int]]], dict[int, list[tuple[int, int, int]]]]:
        """Of BPE's merges those that a token is the left part of (rank, right part), and those that make it (rank, left
        part, right part)."""
        starting: dict[int, list[tuple[int, int]]] = {}
        making: dict[int, list[tuple[int, int, int]]] = {}
        known = self._token_ids
        for rank, merge in enumerate(self.layout["model"].get("merges") or ()):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            if (made := known.get(left + right)) is not None and left in known and right in known:
                starting.setdefault(known[left], []).append((rank, known[right]))
                making.setdefault(made, []).append((rank, known[left], known[right]))
        return starting, making

    @lru_cache(maxsize=2**18)  # noqa: B019 - a process opens few tokenizers
    def breaking(self, token: int) -> frozenset[bytes]:
        """What draws the end of a token into another where it follows: BPE merges the two before it makes the token."""
        starting, making = self._merges
        found: set[bytes] = set()
        for made, _, right in making.get(token, ()):
            found.update(self.spelled(other) for rank, other in starting.get(right, ()) if rank < made)
            found |= self.breaking(right)
        return frozenset(found)

    def _split_plain(self, text: bytes) -> list[int]:
        parts = _characters(text)
        if not self._bytewise:
            return [token for part, is_text in parts for token in self._pieces_of(part, is_text)]
        # A part of a character may be that of a symbol or of a letter.
        kinds = "" if self._words is None else "\ufffd" if all(is_text for _, is_text in parts) else "\ufffd\u00e9"
        tries = [[token for word in self._words_of(parts, kind) for token in self._merge(word)] for kind in kinds]
        return min(tries, key=len) if tries else self._merge(_write(text))

    def _words_of(self, parts: Sequence[tuple[bytes, bool]], kind: str) -> list[str]:
        """The stretches that no token goes beyond, in the letters of the alphabet; `kind` stands for parts of
        characters."""
        characters: list[bytes] = []
        seen = ""
        for part, is_text in parts:
            characters += [character.encode() for character in part.decode()] if is_text else [part]
            seen += part.decode() if is_text else kind
        spans = [span for _, span in self._words.pre_tokenize_str(seen)]
        if len(spans) < 2 or sum(stop - start for start, stop in spans) != len(seen):
            return [_write(b"".join(characters))]
        return [_write(b"".join(characters[start:stop])) for start, stop in spans]

    def _pieces_of(self, text: bytes, is_text: bool) -> list[int]:
        if is_text:
            return self._merge(text.decode().replace(" ", _SPACE))
        ids = (self._token_ids.get(f"<0x{byte:02X}>") for byte in text)
        return [index for index in ids if index is not None]

    def _merge(self, written: str) -> list[int]:
        return [token.id for token in self._model.tokenize(written)]

    def encode(self, text: bytes, continues: bool) -> list[int]:
        """The tokens of a whole reply; bytes that are no character become U+FFFD.

        `continues`: the reply goes on in the middle of a text, so that no space is added in front of it.
        """
        plain = text.decode("utf-8", errors="replace")
        if not (self.adds_space and continues):
            return self._encode(plain)
        # Some add a space in front of a space too, others do not.
        tries = [self._encode(plain[1:]), self._encode(plain)] if plain.startswith(" ") else self._encode_after(plain)
        for tokens in tries:
            if indent(self.join(tokens)) == indent(plain.encode()):
                return tokens
        return list(self.split(plain.encode())) or self._encode(plain)

    def _encode(self, text: str) -> list[int]:
        return list(self.model.tokenizer.encode(text, add_special_tokens=False))

    def _encode_after(self, text: str) -> Iterator[list[int]]:
        """The tokens of a text behind a mark that takes no space after it, and that none of them reaches into."""
        for mark in ("\n", "\t", "|", "0"):
            tokens = self._encode(mark + text)
            for count in range(1, len(tokens) + 1):
                if self.join(tokens[:count]) in (mark.encode(), b" " + mark.encode()):
                    yield tokens[count:]
                    break


def indent(text: bytes) -> int:
    """How many spaces a text begins with."""
    return len(text) - len(text.lstrip(b" "))


def _kinds(part: Any) -> set[str]:
    """The types of the parts of a tokenizer's pipeline."""
    if isinstance(part, dict):
        return {str(part.get("type"))}.union(*(_kinds(value) for value in part.values()))
    if isinstance(part, list):
        return set().union(*(_kinds(value) for value in part))
    return set()


def _write(text: bytes) -> str:
    """Bytes in the letters of the alphabet."""
    return "".join(_LETTERS[byte] for byte in text)


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
