"""SIGTERM: schedulers send it some time before they take a machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 75
"""The system's code for "try again later"."""


class Preempted(Exception):  # nothing went wrong
    """Training stopped on SIGTERM, with its state saved."""


@contextmanager
def listening() -> Iterator[Callable[[], bool]]:
    """While the block runs, SIGTERM does not end the process; the function it gets tells whether one has come."""
    heard = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may listen
        yield heard.is_set
        return

    def note(number: int, frame: FrameType | None) -> None:
        heard.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield heard.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
