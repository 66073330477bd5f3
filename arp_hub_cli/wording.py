"""Messages of the library in the words of the command line: ``--keep-params 0.2`` for ``keep_params=0.2``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MANY_WORDS = "--model-kwargs"
"""The option that takes all words ``NAME=VALUE`` after it."""
_VALUE = r"'[^']*'|\"[^\"]*\"|\([^()]*\)|\[[^\[\]]*\]|[^\s,;:()]*[^\s,;:().]"
_OTHER_NAMES = {"calibration": "data"}
"""Arguments of Python whose option has another name."""
_OF_MODELS = ("img_size", "in_chans")
"""Arguments of models, which --model-kwargs takes as they are."""
_QUOTED = re.compile(r"\b[A-Z]\w*(?:Error|Exception): ")
"""The name of an exception, before the words of another library or of the Hub."""


def in_options(message: str, params: Sequence[Any]) -> str:
    """A message about arguments of Python, in the options of a command.

    Args:
        message: Such as ``keep_params=0.2 cannot be met: ... a smaller rank_multiple``.
        params: The parameters of the command, as click lists them.

    Returns:
        Such as ``--keep-params 0.2 cannot be met: ... a smaller --rank-multiple``. Names that are no options of the
        command, and words without an underscore that have no value, stay. So does what another library says.
    """
    if quoted := _QUOTED.search(message):
        return in_options(message[: quoted.start()], params) + message[quoted.start() :]
    options = _options(params)
    if not options:
        return message
    names = "|".join(sorted(map(re.escape, options), key=len, reverse=True))
    # After --model-kwargs, NAME=VALUE is what the user types. A quoted or dotted name is the user's own.
    start = r"(?<!--model-kwargs )(?<![\w.'\"/=-])"
    if "model_kwargs" in options:
        message = re.sub(rf"{start}({'|'.join(_OF_MODELS)})=", rf"{MANY_WORDS} \1=", message)
    message = re.sub(rf"{start}`?({names})=({_VALUE})?`?", lambda found: _with_value(options, found), message)
    return re.sub(rf"{start}`?({names})`?(?![\w'\"/=(]|\.\w)", lambda found: _alone(options, found), message)


def _options(params: Sequence[Any]) -> Mapping[str, str]:
    """The option for each name that Python may use: the parameter's own, the option's, and other names."""
    options: dict[str, str] = {}
    for param in params:
        if param.param_type_name == "option":
            option = next((opt for opt in param.opts if opt.startswith("--")), param.opts[0])
            options |= {param.name: option, option.lstrip("-").replace("-", "_"): option}
    return options | {name: options[own] for name, own in _OTHER_NAMES.items() if own in options}


def _with_value(options: Mapping[str, str], found: re.Match[str]) -> str:
    name, value = found.groups()
    if value in ("True", None):
        return options[name]
    if value[0] in "([":
        value = value[1:-1].replace(",", "")
    return f"{options[name]} {value}"


def _alone(options: Mapping[str, str], found: re.Match[str]) -> str:
    name = found[1]
    return options[name] if "_" in name or found[0].startswith("`") else found[0]
