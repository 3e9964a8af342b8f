"""How messages speak of what the user wrote: the nearest known word, and the user's own text on one safe line.

Text of a file or a command line never reaches a message unquoted, so a control character or ten megabytes of it
cannot spoil a terminal or a log.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable

_SHOWN = 60
_LOOKED_AT = 2**16

# "mdl" is 0.75 like "model"; "conversations" is 0.61 like "completion", and 0.6 is the default of difflib.
_LIKE = 0.7


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `word`, whatever its case, or None when none is near."""
    if len(word) > _SHOWN:
        return None
    by_lower: dict[str, str] = {}
    for candidate in candidates:
        by_lower.setdefault(candidate.lower(), candidate)
    found = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=_LIKE)
    return by_lower[found[0]] if found else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the candidate nearest to `word`, or `""` when none is near."""
    found = nearest(word, candidates)
    return f"; did you mean '{found}'?" if found is not None else ""


def percent(share: float) -> str:
    """A share in whole per cent, and never "-0%"."""
    text = f"{share:.0%}"
    return "0%" if text == "-0%" else text


def in_bytes(count: int) -> str:
    """A number of bytes as text: "1.3 MB", of decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


_USER_INFO = re.compile(r"(?<=://)[^/\s'\"]+(?=@)")
# Each of them linear: what is looked at can be long, and hostile.
_NAMED = re.compile(r"(?i)((?:token|password|passwd|secret|signature|api_?key|access_?key)=)[^&\s'\"]{6,}")
_TOKEN = re.compile(r"\b(hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[abps]-|AKIA|ASIA|AIza)[A-Za-z0-9_-]{12,}")


def redact(text: str) -> str:
    """`text` without what looks like a secret: the user of an address, `token=...`, and access tokens by their form."""
    text = _USER_INFO.sub("***", text)
    text = _NAMED.sub(r"\1***", text)
    return _TOKEN.sub(r"\1***", text)


def quote(text: str) -> str:
    """`text` in quotes on one line: no secrets, control and surrogate codes escaped, cut after 60 characters."""
    text = redact(text[:_LOOKED_AT])
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")


def printable(text: str) -> str:
    """`text` without power over the terminal: control characters are written out, line ends and tabs stay."""
    return "".join(
        letter if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cs") else repr(letter)[1:-1]
        for letter in text
    )
