"""Calls to the Hub: retries for transient failures, and error messages without tokens."""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from safetensors import SafetensorError

from .._utils.secrets import holds_secret, printable, redact
from ..errors import ArpHubError

_logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass
class Patience:
    """How long a call to a Hub may take, in seconds.

    Attributes:
        attempts: Number of attempts in all.
        first_wait: Wait before the second attempt; each further wait is twice as long.
        longest_wait: Longest wait, also of those that a Hub asks for.
        total: Time after which no new attempt starts. The client retries some calls itself, so one can take as long.
        silence: Time without a byte after which an answer counts as lost. The client alone would wait for ever.
        connect: Time to reach the Hub, so that a command without a network ends within five seconds.
    """

    attempts: int = 4
    first_wait: float = 1.0
    longest_wait: float = 8.0
    total: float = 30.0
    silence: float = 60.0
    connect: float = 4.0


PATIENCE = Patience()
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_HTTP_ERROR: type[BaseException] = HfHubHTTPError.__bases__[0]
"""Base class of the HTTP library's errors: the client passes them on. The library depends on the client's version."""
FAILURES = (OSError, RuntimeError, ValueError, SafetensorError, _HTTP_ERROR)
"""What the client raises when the Hub, the network or a disk is at fault."""
ODD_ANSWERS = (AttributeError, LookupError, TypeError)
"""What the client raises when an answer is valid JSON but lacks entries that it needs."""


class HubFailure(ArpHubError):
    """A call to the Hub that still failed after its retries.

    Attributes:
        status: The HTTP status, or None if there was no answer.
        transient: Whether the same call may succeed later.
    """

    def __init__(self, message: str, status: int | None = None, transient: bool = False) -> None:
        super().__init__(message)
        self.status, self.transient = status, transient


def call(what: str, function: Callable[..., Result], *args: Any, again: bool = True, **kwargs: Any) -> Result:
    """Call the Hub's client. Transient failures are retried up to `Patience.attempts` times, with a warning each time.

    Args:
        what: The action, for messages: "cannot {what}".
        function: A function of the client.
        *args: Its arguments.
        again: Whether the call may be repeated safely even if the first attempt reached the Hub.
        **kwargs: Its keyword arguments.

    Raises:
        HubFailure: If the call fails. The message gives the reason and the way out.
    """
    began, wait = time.monotonic(), PATIENCE.first_wait
    for attempt in range(1, PATIENCE.attempts + 1):
        try:
            with bounded_waits():
                return function(*args, **kwargs)
        except ArpHubError:
            raise
        except (*FAILURES, *ODD_ANSWERS) as failed:
            error = _root(failed)
            last = attempt == PATIENCE.attempts or time.monotonic() - began > PATIENCE.total
            if not again or last or not is_transient(error):
                tries = f" ({attempt} attempts)" if attempt > 1 else ""
                failure = HubFailure(f"cannot {what}: {explain(error)}{tries}", _status(error), is_transient(error))
                raise failure from (None if holds_secret(str(error)) else error)
            _logger.warning("cannot %s yet: %s; attempt %d of %d", what, explain(error), attempt + 1, PATIENCE.attempts)
        time.sleep(wait)
        wait = min(2 * wait, PATIENCE.longest_wait)
    raise AssertionError  # the last attempt returns or raises


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later."""
    error = _root(error)
    if (status := _status(error)) is not None:
        return status in _TRANSIENT
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return False
    return isinstance(error, (_HTTP_ERROR, ConnectionError, TimeoutError, json.JSONDecodeError))


def explain(error: BaseException) -> str:
    """Describe a failure without tokens: the reason, then the way out."""
    return printable(redact(" ".join(_explain(_root(error)).split())))


@contextmanager
def bounded_waits() -> Iterator[None]:
    """While the block runs, limit how long the client waits on a silent connection or at the Hub's request."""
    session: Any = get_session()
    before, hooks = session.timeout, session.event_hooks
    session.timeout = PATIENCE.silence
    session.event_hooks = {**hooks, "response": [*hooks.get("response", ()), _cap_wait]}
    try:
        yield
    finally:
        session.timeout, session.event_hooks = before, hooks


def _cap_wait(response: Any) -> None:
    """Shorten the wait that an answer asks for: the client would obey even a ``Retry-After`` of days."""
    headers = response.headers
    asked = headers.get("retry-after", "").strip()
    if asked.isdecimal() and (len(asked) > 18 or int(asked) > PATIENCE.longest_wait):  # int() refuses endless numbers
        headers["retry-after"] = str(int(PATIENCE.longest_wait))
    if any(
        int(seconds) > PATIENCE.longest_wait
        for seconds in re.findall(r"t\s*=\s*(\d{1,18})", headers.get("ratelimit", ""))
    ):
        del headers["ratelimit"]


@contextmanager
def cache_if_offline() -> Iterator[BaseException | None]:
    """While the block runs, use only the client's cache if no connection to the Hub can be made.

    Without this, the client would try each file six times over half a minute. A slow Hub that accepts connections is
    not affected.

    Yields:
        Why the Hub cannot be reached, or None if it can.
    """
    failed: BaseException | None = None
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE.connect)
        except _HTTP_ERROR as error:
            failed = error if type(error).__name__ in ("ConnectError", "ConnectTimeout") else None
    if failed is None:
        yield None
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield failed
    finally:
        constants.HF_HUB_OFFLINE = False


def uses_xet() -> bool:
    """Whether the client uploads large files through Xet."""
    return not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None


@contextmanager
def plain_uploads() -> Iterator[None]:
    """While the block runs, the client uploads through plain LFS instead of Xet."""
    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def _root(error: BaseException) -> BaseException:
    """The cause of the client's generic "error while uploading"."""
    cause = error.__cause__
    return _root(cause) if isinstance(error, RuntimeError) and isinstance(cause, FAILURES) else error


def _is_disk_full(error: BaseException) -> bool:
    codes = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    if isinstance(error, SafetensorError):  # the system's error code is only in its text
        return any(f"(os error {code})" in str(error) for code in codes)
    return isinstance(error, OSError) and error.errno in codes


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _explain(error: BaseException) -> str:
    status = _status(error)
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision: choose one of its branches or tags"
    if isinstance(error, GatedRepoError):
        return (
            "the repository is gated: accept its terms on its page on the Hub, then log in with a token that may read "
            "gated repositories"
        )
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private: check the name, or log in with `hf auth login`"
    if status in _ANSWERS:
        return f"{_ANSWERS[status]} ({status})"
    if status is not None:
        return f"the Hub answered {status}{': try again later' if status in _TRANSIENT else f': {error}'}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to reach the Hub"
    if isinstance(error, LocalEntryNotFoundError):
        return (
            "the Hub cannot be reached, and the cache does not hold all of this revision: connect, or name a tag that "
            "was downloaded before (`arp_hub.download` fetches all of it)"
        )
    if isinstance(error, HFValidationError):
        return f"{error}: names look like user/name"
    if isinstance(error, ODD_ANSWERS):
        return (
            f"the answer of {constants.ENDPOINT} is not what the Hub's client expects ({type(error).__name__}: {error})"
        )
    if _is_disk_full(error):
        return f"{error}: make room on that disk"
    if is_transient(error):
        return f"no answer from {constants.ENDPOINT} ({type(error).__name__}: {error}): check the network"
    return f"{type(error).__name__}: {error}"


_ANSWERS = {
    401: "the Hub does not know this token: log in with `hf auth login`, set HF_TOKEN or pass token=",
    403: "this token may not write there: use one with write access (https://huggingface.co/settings/tokens)",
    409: "it already exists",
    412: "somebody else changed the repository during the push: look at the changes, then push again",
    413: "the files are too large for the Hub",
    429: "too many requests: wait some minutes",
}
