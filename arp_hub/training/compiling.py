"""``torch.compile`` in training steps: its backends, and its failures as one error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import ArpHubError


def check_backend(name: str) -> None:
    """Refuse a backend that torch does not have here.

    Raises:
        ArpHubError: With the backends to choose from.
    """
    if name not in torch.compiler.list_backends(exclude_tags=()):  # with those for debugging
        here = ", ".join(torch.compiler.list_backends())
        raise ArpHubError(f"torchcompile: torch has no backend '{name}' here: choose from {here}")


@contextmanager
def compiling(backend: str) -> Iterator[None]:
    """Report a failed compilation inside the block as an error that names ``torchcompile``.

    Args:
        backend: The backend, or empty if nothing is compiled.

    Raises:
        ArpHubError: If the model cannot be compiled.
    """
    if not backend:
        yield
        return
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArpHubError(
            f"torchcompile={backend}: the model cannot be compiled ({type(error).__name__}: {reason:.200}): leave "
            "torchcompile out, or choose another backend"
        ) from error
