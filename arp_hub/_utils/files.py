"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # mypy takes the name for a module's


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
        _flush_entry(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a text (as UTF-8) or binary file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def read_text(path: Path, largest: int = 2**26, errors: str = "strict") -> str:
    """Read a text file (UTF-8) of at most ``largest`` bytes.

    Args:
        path: The file.
        largest: Most bytes that it may have.
        errors: What happens to bytes that are not UTF-8, as for ``open``.

    Raises:
        OSError: If it is missing, no regular file (a pipe would block), or too large.
        UnicodeDecodeError: If it is not text, unless ``errors`` says otherwise.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path.name} is missing")
    if not path.is_file():
        raise OSError(f"{path.name} is not a regular file")
    if (size := path.stat().st_size) > largest:
        raise OSError(f"{path.name} has {size:,} bytes, {largest:,} are allowed")
    return path.read_text(encoding="utf-8", errors=errors)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file while the block runs. The system releases it when the process ends, even by a crash.

    A file that a crash left behind does not block. Nothing is locked on Windows, or on disks without locks. Folders
    that this call created are removed if the block leaves nothing in them but the lock file.

    Raises:
        BlockingIOError: If another process holds the lock. Its message is the content of the file.
    """
    created = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _lock(path)
    try:
        yield
    finally:
        with suppress(OSError):  # somebody else may have removed it
            if created and [entry.name for entry in path.parent.iterdir()] == [path.name]:
                path.unlink()
                for folder in created:
                    folder.rmdir()
        os.close(handle)


def _lock(path: Path) -> int:
    """Open a file and lock it for this process. Child processes do not inherit the lock."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.read(handle, 200).decode(errors="replace").strip()
                os.close(handle)
                raise BlockingIOError(holder or "a process that has just started") from error
        if path.exists() and path.stat().st_ino == os.fstat(handle).st_ino:  # else its holder has just removed it
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {platform.node()}\n".encode())
            return handle
        os.close(handle)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_entry(path: Path) -> None:
    """Flush the name of a file or folder that is in place. A failure is no error, because the content is complete."""
    with suppress(OSError):
        flush(path.parent)


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
        _flush_entry(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Delete temporary folders of killed processes. Call it only from the one process that writes ``folder``.

    If a process was killed while it moved the old folder out of the way, the old folder is put back.
    """
    folder = folder.resolve()
    name = glob.escape(folder.name)
    for old in folder.parent.glob(f".{name}.????????.old"):
        if not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    for left in folder.parent.glob(f".{name}.????????.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def _put(new: Path, folder: Path) -> None:
    """Move ``new`` to ``folder``. The old folder, if any, is deleted or moves to ``new``."""
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
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step, so that both names exist at all times. Returns False except on Linux."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def cache_folder() -> Path:
    """Where measurements and indexes are kept: ``ARP_HUB_CACHE``, or ``arp_hub`` in the user's cache folder."""
    if own := os.environ.get("ARP_HUB_CACHE"):
        return Path(own).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arp_hub"
    except RuntimeError:  # a container's user without a home folder
        return Path(tempfile.gettempdir()) / "arp_hub"
