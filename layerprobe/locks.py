"""Several processes: which of a launch this is, and a lock of a run folder that dies with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from layerprobe.errors import UsageError, printable
from layerprobe.files import cannot_write

LOCK_FILE = ".layerprobe.lock"

_held: set[Path] = set()
"""Folders that this process has locked: who holds a folder may lock it again, within a function that is called."""


def n_processes() -> int:
    """Processes of this launch, as `torchrun` and `accelerate launch` tell them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_number() -> int:
    """The number of this process within its launch, from 0."""
    return int(os.environ.get("RANK", "0"))


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def use_threads(count: int) -> None:
    """Compute with `count` threads from now on: torch, and the BLAS that NumPy has loaded."""
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(count)
    threadpool_limits(count, user_api="blas")


def open_lock(path: Path) -> int:
    """A lock file, opened and not yet locked; made where it is not there. OSError for a link.

    For reading, too: to write into a pipe of that name, one would wait for its reader.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)


@contextlib.contextmanager
def folder_lock(folder: Path | None, command: str, *, wait: bool = False) -> Iterator[None]:
    """Keep `folder` for this process while the context is open; where there is none, nothing is locked.

    Of several processes of one training (`accelerate launch`) the first locks for all. Over NFS the lock holds between
    machines where the server keeps locks; a file system without locks is used without.

    Where another process works in the folder, UsageError says which, by the `command` it gave; or it is waited for.
    """
    if folder is None or process_number() > 0 or folder.resolve() in _held:
        yield
        return
    place, path = folder.resolve(), folder.resolve() / LOCK_FILE
    try:
        place.mkdir(parents=True, exist_ok=True)
        handle = _acquire(path, wait)
    except OSError as error:
        raise cannot_write(path, error) from error
    if handle is None:
        raise UsageError(f"{folder} is in use by {_holder(path)}; wait for it, or choose another folder")
    _held.add(place)
    try:
        os.truncate(handle, 0)
        os.write(handle, f"{command}, process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        _held.discard(place)
        # While it is still locked: whoever waited for this file looks for a new one.
        path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path, wait: bool) -> int | None:
    """The open and locked file, or None where another process has it."""
    while True:
        handle = open_lock(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(handle)
                return None
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                os.close(handle)
                raise
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(handle).st_ino:
                return handle
        os.close(handle)  # its holder has removed it meanwhile


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        if text := path.read_text(encoding="utf-8")[:200].strip():
            return printable(text)
    return "another process"
