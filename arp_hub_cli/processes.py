"""Commands that several processes run together, as ``torch.distributed.run`` and ``accelerate launch`` start them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path

SHARING = ("plan", "compress")
"""Commands that share their work among processes."""
_PATIENCE = timedelta(days=1)
"""How long processes wait for each other: the first one measures accuracy alone, which takes hours on large data."""


def is_first() -> bool:
    """Whether this process is the only one or the first one, which measures and writes."""
    return _count() == 1 or int(os.environ["RANK"]) == 0


@contextmanager
def joined(command: str, device: str | None) -> Iterator[None]:
    """Join the processes that run a command together. Only the first one prints. Does nothing in a single process.

    Args:
        command: Name of the command.
        device: What ``--device`` names.

    Raises:
        ArpHubError: If the command runs in one process, or all processes would take one GPU.
    """
    if (count := _count()) == 1:
        yield
        return
    from arp_hub.errors import ArpHubError  # here, because `arp_hub` imports torch, which help does not need

    if command not in SHARING:
        raise ArpHubError(
            f"'arp-hub {command}' runs in one process, and {count} were started: start it without "
            "`accelerate launch` or `torch.distributed.run`"
        )
    if device is not None and ":" in device:
        raise ArpHubError(f"--device {device}: {count} processes would share it; leave --device out, or give cpu")
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=_PATIENCE)
    try:
        if state.process_index == 0:
            yield
        else:
            with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield
    finally:
        state.destroy_process_group()  # its threads must end before Python does


def prints_its_end() -> bool:
    """Whether this process prints why it ends: one of those that run a command together."""
    if _count() == 1:
        return True
    from arp_hub.processes import first_to_end  # here, because `arp_hub` imports torch

    return first_to_end()


def _count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ and "RANK" in os.environ else 1
