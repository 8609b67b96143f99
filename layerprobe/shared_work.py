"""Pieces of one computation, shared by the processes of a launch: each takes what nobody works on."""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from layerprobe.errors import UsageError
from layerprobe.files import atomic_write
from layerprobe.locks import n_processes, open_lock, process_number
from layerprobe.progress import progress_bar

Result = TypeVar("Result")


class SharedWork:
    """Every process asks for the same results in the same order, and gets them all.

    A piece's result is a pickle in `folder`, made for this launch, which all processes see. Its lock dies with the
    process that holds it, so that another one takes the piece. A folder that others may write into raises UsageError:
    a pickle runs code when it is read.
    """

    def __init__(self, folder: Path) -> None:
        about = folder.stat()
        if about.st_uid != os.getuid() or about.st_mode & 0o022:
            raise UsageError(f"others may write into {folder}, so results are not shared through it")
        self.folder = folder
        self._asked = 0

    def results(
        self, n: int, compute: Callable[[int], Result], *, unit: str, what: str, quiet: bool = False
    ) -> list[Result]:
        """`compute` of 0 … n − 1, each by one process; `unit` and `what` are for the progress bar."""
        self._asked += 1
        files = [self.folder / f"{self._asked}-{number}" for number in range(n)]
        start = process_number() * n // n_processes()
        left = [*range(start, n), *range(start)]
        with progress_bar(total=n, unit=unit, desc=what, quiet=quiet) as bar:
            for wait in (False, True):
                for number in tuple(left):
                    if self._settled(files[number], number, compute, wait):
                        left.remove(number)
                        bar.update()
        return [pickle.loads(file.read_bytes()) for file in files]

    @staticmethod
    def _settled(file: Path, number: int, compute: Callable[[int], Result], wait: bool) -> bool:
        """Whether the piece is there: found, or computed now; another process's is waited for or left."""
        if file.exists():
            return True
        with os.fdopen(open_lock(file.with_suffix(".lock")), "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return False
            if not file.exists():
                found = pickle.dumps(compute(number))
                with atomic_write(file) as aside:
                    aside.write_bytes(found)
        return True
