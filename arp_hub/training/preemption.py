"""SIGTERM, which schedulers send shortly before they take a machine away: how a run and its workers stop on it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator

EXIT_CODE = 75
"""Exit code of a preempted run: the system's EX_TEMPFAIL, "try again later"."""


class Preempted(Exception):  # not an ArpHubError, because nothing went wrong
    """A run stopped on SIGTERM. The message says at which step, and how to resume."""


class Sigterm:
    """The SIGTERM handler of a run. It raises `Preempted`; inside `noted` it only sets ``heard``."""

    def __init__(self) -> None:
        self.heard = False
        self._later = False
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM while the block runs. Errors that follow from it become `Preempted` too."""
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
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
            raise self._stop() from error  # for example, another process stopped first and closed its connection
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Only set ``heard`` on SIGTERM while the block runs. The block stops itself where its state is complete."""
        self.check()
        self._later = True
        try:
            yield
        finally:
            self._later = False
        self.check()

    def heard_by_any(self, accelerator: Accelerator) -> bool:
        """Whether any process has received SIGTERM, so that all stop at the same step. All must call it."""
        if accelerator.num_processes == 1:
            return self.heard
        heard = torch.tensor(float(self.heard), device=accelerator.device)
        return bool(accelerator.reduce(heard, "sum") > 0)

    def check(self) -> None:
        """Stop here if SIGTERM has come.

        Raises:
            Preempted: If it has.
        """
        if self.heard:
            raise self._stop()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child inherits the handler
            os._exit(128 + number)
        first, self.heard = not self.heard, True
        if first and not self._later:  # a second signal must not interrupt the clean-up of the first
            raise self._stop()

    def _stop(self) -> Preempted:
        return Preempted("stopped by SIGTERM: continue from the last checkpoint with --resume auto")


def outlast_sigterm(worker: int) -> None:
    """Make a loader worker ignore SIGTERM from anyone but its parent, which needs batches to complete its step.

    Args:
        worker: The number of the worker, as torch passes it.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS and Windows
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
