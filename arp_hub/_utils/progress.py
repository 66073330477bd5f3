"""Progress of long work: a bar in a terminal or a notebook, and one line for each stage anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import autonotebook, std
from tqdm.auto import tqdm

Item = TypeVar("Item")


def counted(items: Collection[Item], title: str, shown: bool = True) -> Iterator[Item]:
    """The items, counted while they are worked on.

    Args:
        items: What is worked on, one after the other.
        title: What is done with them.
        shown: Whether to show anything.
    """
    if not shown:
        yield from items
        return
    with stage(title, len(items)) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def stage(title: str, total: int | None = None, shown: bool = True) -> Iterator[Callable[..., object]]:
    """A stage of the work: a bar that counts to ``total``, or a line with the elapsed time at its end.

    Args:
        title: What is done.
        total: Number of steps. None: the work shows bars of its own, so that only the line is shown.
        shown: Whether to show anything.

    Yields:
        A function to call after each step, or with a number of steps.
    """
    if shown and total is not None and watched():
        with tqdm(total=total, desc=title, leave=False) as bar:
            yield bar.update
        return
    start = time.monotonic()
    yield lambda steps=1: None
    if shown and not watched():
        count = "" if total is None else f"{total} in "
        print(f"{title}: {count}{time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def watched() -> bool:
    """Whether stderr is a terminal, or this is a notebook, so that a bar makes sense."""
    return sys.stderr.isatty() or autonotebook.tqdm is not std.tqdm
