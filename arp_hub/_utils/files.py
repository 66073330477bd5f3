"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path to write; the file moves to ``path`` when the block ends without an error.

    File and folder are flushed to the disk, so that a power failure leaves the old file or the whole new one.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a text (as UTF-8) or binary file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to fill. It replaces ``folder`` when the block ends without an error.

    The new folder is created beside the old one, which stays unchanged until the new one is finished.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    new.mkdir()
    try:
        yield new
        for path in (*new.rglob("*"), new):
            flush(path)
        _put(new, folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Delete temporary folders of killed processes. Call it only from the one process that writes ``folder``."""
    folder = folder.resolve()
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.????????.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def _put(new: Path, folder: Path) -> None:
    """Move ``new`` to ``folder``, and the old folder, if any, to ``new``."""
    if not folder.exists():
        new.rename(folder)
    elif not _exchange(new, folder):
        old = new.with_suffix(".old")
        folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        old.rename(new)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step, so that both names exist at all times. Returns False except on Linux."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0
