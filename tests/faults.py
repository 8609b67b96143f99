"""A file layer that fails: a child process that dies, or meets a full disk, at its n-th write, rename or sync."""

from __future__ import annotations

import errno
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

WATCHED = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
KILLED, FAILED = 97, 98


class Faults:
    """Counts what changes files below `root`, and acts before the n-th of it.

    A `kill` ends the process there; `loss` is a kill after which files that were not synced have lost their second
    half, as after a loss of power; `full` makes that operation fail as on a full disk, and every one after it.
    """

    def __init__(self, root: Path, at: int, action: str) -> None:
        self.root, self.at, self.action = os.fspath(root.resolve()), at, action
        self.count = 0
        self.unsynced: set[str] = set()
        self.inside = False

    def install(self) -> None:
        sync = os.fsync

        def watched_sync(handle: int) -> None:
            path = os.fspath(Path(f"/proc/self/fd/{handle}").readlink())
            self.meet(path)
            sync(handle)
            self.unsynced.discard(path)

        os.fsync = watched_sync
        sys.addaudithook(self.hook)
        if "sqlalchemy" in sys.modules:
            from sqlalchemy import event
            from sqlalchemy.engine import Engine

            # SQLite writes from C, where no hook sees it; a transaction is there as a whole, or not at all.
            event.listen(Engine, "before_cursor_execute", self.statement)
            event.listen(Engine, "commit", lambda connection: self.change_database())

    def statement(self, _connection: object, _cursor: object, text: str, *_rest: object) -> None:
        if text.lstrip().upper().startswith(("INSERT", "UPDATE", "DELETE", "CREATE")):
            self.change_database()

    def change_database(self) -> None:
        try:
            self.meet(self.root)
        except OSError:  # in SQLite's words
            from sqlalchemy.exc import OperationalError

            raise OperationalError(None, None, Exception("database or disk is full")) from None

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.inside:
            return
        if event == "open":
            path, _, flags = arguments
            if (
                isinstance(flags, int)
                and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                and self.watches(path)
            ):
                self.meet(path)
                self.unsynced.add(os.fspath(path))
        elif event in WATCHED and self.watches(arguments[0]):
            self.meet(arguments[0])
            if event == "os.rename" and os.fspath(arguments[0]) in self.unsynced:
                self.unsynced.discard(os.fspath(arguments[0]))
                self.unsynced.add(os.fspath(arguments[1]))

    def watches(self, path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.root)

    def meet(self, path: object) -> None:
        self.count += 1
        if self.action == "full" and self.count >= self.at:
            raise OSError(errno.ENOSPC, "No space left on device", os.fspath(path))
        if self.count == self.at:
            self.inside = True
            if self.action == "loss":
                for name in filter(os.path.isfile, self.unsynced):
                    os.truncate(name, Path(name).stat().st_size // 2)
            os._exit(KILLED)


def run_with_fault(work: Callable[[], object], root: Path, at: int, action: str = "kill") -> int:
    """Run `work` in a child that meets the fault; its exit code: 0, `KILLED`, or `FAILED` for a LayerprobeError."""
    from layerprobe.errors import LayerprobeError

    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        Faults(root, at, action).install()
        work()
        code = 0
    except LayerprobeError as error:
        os.write(2, f"error: {error}\n".encode())
        code = FAILED
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def every_fault(
    work: Callable[[Path], object], make_root: Callable[[int], Path], action: str = "kill"
) -> Iterator[Path]:
    """One folder after another in which `work` met the fault one operation later, until it meets none."""
    for at in itertools.count(1):
        root = make_root(at)
        code = run_with_fault(lambda root=root: work(root), root, at, action)
        assert code in (0, KILLED, FAILED), f"operation {at}: exit code {code}"
        if code == 0:
            assert at > 1, "nothing was written"
            return
        yield root
