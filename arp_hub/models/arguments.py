"""Arguments of models as words, ``img_size=112 pad_type=same``, as timm's scripts take them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .._utils.parse import shown
from ..errors import ArpHubError
from ._untrusted import check_arguments

_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


def read_arguments(words: Iterable[str], option: str = "model_kwargs") -> dict[str, Any]:
    """Arguments from words ``NAME=VALUE``: a value is a Python literal, or else text.

    Args:
        words: The words.
        option: The name under which messages show them.

    Raises:
        ArpHubError: If a word is no ``NAME=VALUE``, or a name is given twice.

    Example:
        >>> read_arguments(["img_size=112", "pad_type=same", "window_size=(7,7)"])
        {'img_size': 112, 'pad_type': 'same', 'window_size': [7, 7]}
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise ArpHubError(f"{option} takes NAME=VALUE, such as img_size=112, got {word!r:.100}")
        if name in found:
            raise ArpHubError(f"{option} names '{name}' twice: {found[name]!r:.40} and {text:.40}")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found[name] = text
    return plain_arguments(found, option)


def plain_arguments(given: Mapping[str, Any], option: str = "model_kwargs") -> dict[str, Any]:
    """The arguments as a saved model's ``config.json`` holds them, without those that are None, as timm drops them.

    Raises:
        ArpHubError: If JSON cannot hold a value, or a saved model may not have the argument.
    """
    for name, value in given.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ArpHubError(
                f"{option} {name}={shown(value, 60)} cannot be kept with the model: give numbers, text or lists "
                f"({error})"
            ) from None
    check_arguments(given, f"{option} must not hold")
    return {name: json.loads(json.dumps(value)) for name, value in given.items() if value is not None}


def unknown_argument(error: BaseException, given: Mapping[str, Any]) -> str | None:
    """The argument of ``given`` that a model does not take, if that is what the error says."""
    found = _UNEXPECTED.search(str(error)) if isinstance(error, TypeError) else None
    return found[1] if found and found[1] in given else None
