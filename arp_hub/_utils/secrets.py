"""Make text safe to show: without tokens and terminal control characters."""

from __future__ import annotations

import re
import unicodedata

_SECRET = re.compile(
    r"""
    (?<!\w)hf_(?:oauth|jwt|org|app)_[\w.~+/=-]+        # tokens with their kind as a prefix
    | (?<![\w/])hf_(?=[a-z0-9]*[A-Z])[A-Za-z0-9]{5,}   # names of models and settings are in lower case
    | (?<!\w)hf_[A-Za-z0-9]{30,}                       # a whole user token, also inside an address
    | (?<![\w/])api_org_[A-Za-z0-9]{8,}
    | (?i:(?<=--token[ =])|(?<=bearer[ ])|(?<=hf_token=))[^\s"',]+
    """,
    re.X,
)
_known: set[str] = set()


def remember(token: str) -> None:
    """Make `redact` replace this token, too, whatever its form."""
    if len(token) >= 4:
        _known.add(token)


def redact(text: str) -> str:
    """Replace remembered tokens, and whatever looks like a token, by ``***``.

    Example:
        >>> redact("arp-hub push out me/name --token hf_abcdefghijkl")
        'arp-hub push out me/name --token ***'
        >>> redact("me/hf_resnet20small")
        'me/hf_resnet20small'
    """
    for token in _known:
        text = text.replace(token, "***")
    return _SECRET.sub("***", text)


def holds_secret(text: str) -> bool:
    """Whether a text contains what looks like a token."""
    return redact(text) != text


def printable(text: str) -> str:
    r"""Escape control characters, direction marks and lone surrogates.

    Example:
        >>> printable("layer\x1b[31m")
        'layer\\x1b[31m'
    """
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else ascii(c)[1:-1] for c in text)
