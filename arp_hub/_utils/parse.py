"""Parse JSON and YAML from anybody. Whatever is wrong with a text raises `ValueError`, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from .files import read_text


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: If it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path, largest: int = 2**26) -> Any:
    """Parse a JSON file of at most ``largest`` bytes.

    Raises:
        OSError: If it is missing, no regular file, or too large.
        ValueError: If it is not JSON in UTF-8, or nested too deeply.
    """
    return parse_json(read_text(path, largest))


def parse_yaml(text: str) -> Any:
    """Parse YAML with plain values only.

    Raises:
        ValueError: If it is not YAML, nested too deeply, or a value is not of the type that it claims.
    """
    try:
        return yaml.safe_load(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem or error}") from error
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # PyYAML raises the last four for tags and numbers that do not fit, such as `!!bool maybe`
        raise ValueError(str(error)) from error


def shown(value: Any, limit: int = 80) -> str:
    """A value for an error message, cut to a readable length."""
    if isinstance(value, int) and value.bit_length() > 200:  # Python takes very long to write it out
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__} that is nested too deeply or too large to show"
    return text if len(text) <= limit else text[: limit - 1] + "…"
