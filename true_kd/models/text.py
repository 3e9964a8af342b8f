"""The text that each token of a reply adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def token_pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """What each token id adds to the text; joined they are the text.

    A character that several tokens share comes with the last of them, and the others add nothing.
    """
    pieces, text = [], ""
    for end in range(1, len(tokens) + 1):
        # Of the whole beginning each time: a token by itself may lose its space. Replies shown are short.
        longer = tokenizer.decode(list(tokens[:end]))
        if longer.endswith(_PART) and end < len(tokens):
            pieces.append("")
            continue
        pieces.append(longer[len(text) :])
        text = longer
    return pieces


_PART = "\N{REPLACEMENT CHARACTER}"
"""Stands for a character of which bytes are missing."""
