"""SIGTERM: schedulers send it some time before they take a machine away."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 75
"""The system's code for "try again later"."""


class Preempted(Exception):  # nothing went wrong
    """A run stopped on SIGTERM. The message says where, and how to go on."""


class Sigterm:
    """SIGTERM as a run sees it: it raises `Preempted`, except inside `noted`, where it is only noted."""

    def __init__(self) -> None:
        self.heard = False
        self._later = False
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM while the block runs. Any other error that it causes there becomes `Preempted` too."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may listen
            yield
            return
        before = signal.signal(signal.SIGTERM, self._handle)
        try:
            yield
        except Preempted:
            raise
        except Exception as error:
            if not self.heard:
                raise
            raise self._stop() from error  # such as a lost connection to a process that has stopped already
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Only note SIGTERM while the block runs: the block looks at ``heard`` where it can stop."""
        self.check()
        self._later = True
        try:
            yield
        finally:
            self._later = False
        self.check()

    def check(self) -> None:
        """Stop here if SIGTERM has come.

        Raises:
            Preempted: If it has.
        """
        if self.heard:
            raise self._stop()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a child that was forked a moment ago
            os._exit(128 + number)
        first, self.heard = not self.heard, True
        if first and not self._later:  # a second signal must not interrupt the clean-up of the first
            raise self._stop()

    def _stop(self) -> Preempted:
        return Preempted("stopped by SIGTERM: go on from the last checkpoint with --resume auto")


def outlast_sigterm(worker: int) -> None:
    """Let a loader worker end by SIGTERM of its parent only, which needs more batches to end its step on a scheduler's.

    Args:
        worker: The number of the worker, which torch gives.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS and Windows
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
