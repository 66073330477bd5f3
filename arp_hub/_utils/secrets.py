"""Tokens have no place in messages, cards and metrics."""

from __future__ import annotations

import re

_SECRET = re.compile(r"""hf_[A-Za-z0-9]{8,}|(?<=--token[ =])[^\s"']+|(?<=Bearer )[^\s"']+""")


def redact(text: str) -> str:
    """The text with everything that looks like a token taken out.

    Example:
        >>> redact("arp-hub push out me/name --token hf_abcdefghijkl")
        'arp-hub push out me/name --token ***'
    """
    return _SECRET.sub("***", text)


def holds_secret(text: str) -> bool:
    """Whether a text holds what looks like a token."""
    return redact(text) != text
