"""A file layer that fails: a child process that dies, or meets a full disk, at its n-th write, rename or sync.

Where a whole run for each place takes too long, `every_state` copies what lies on the disk at each place of one run.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NoReturn

WATCHED = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
KILLED, FAILED = 97, 98


class Faults:
    """Counts what changes files below `root`, and acts before the n-th of it.

    A `kill` ends the process there; `loss` is a kill after which files that were not synced have lost their second
    half, as after a loss of power; `full` makes that operation fail as on a full disk, and every one after it. `stop`
    stops the process before every operation, after writing the names of files that were not synced to `report`.
    """

    def __init__(self, root: Path, at: int, action: str, report: int = -1) -> None:
        self.root, self.at, self.action, self.report = os.fspath(root.resolve()), at, action, report
        self.count = 0
        self.unsynced: set[str] = set()
        self.inside = False
        self.turn = threading.Lock()

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
        if self.action == "stop":
            with self.turn:  # a heartbeat writes in a thread of its own
                os.write(self.report, json.dumps(sorted(self.unsynced)).encode())
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        elif self.action == "full" and self.count >= self.at:
            raise OSError(errno.ENOSPC, "No space left on device", os.fspath(path))
        elif self.count == self.at:
            self.inside = True
            if self.action == "loss":
                for name in filter(os.path.isfile, self.unsynced):
                    os.truncate(name, Path(name).stat().st_size // 2)
            os._exit(KILLED)


def run_with_fault(work: Callable[[], object], root: Path, at: int, action: str = "kill") -> int:
    """Run `work` in a child that meets the fault; its exit code: 0, `KILLED`, or `FAILED` for a LayerprobeError."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _work_and_leave(work, Faults(root, at, action))


def _work_and_leave(work: Callable[[], object], faults: Faults) -> NoReturn:
    from layerprobe.errors import LayerprobeError

    code = 1
    try:
        faults.install()
        work()
        code = 0
    except LayerprobeError as error:
        os.write(2, f"error: {error}\n".encode())
        code = FAILED
    except SystemExit as leave:
        code = int(leave.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def every_state(work: Callable[[], object], root: Path, kept: Path, places: list[str]) -> Iterator[Path]:
    """What a kill before each operation of `work` leaves in `root`: copies in `kept`, each state once.

    The process stands still while its folder is copied. Where files are not synced, a second copy has lost their second
    half. `places` takes the digest of the state of each place. SQLite's file counts as it is once its journal has been
    rolled back; its copy keeps the journal. Whoever stops asking kills the process where it stands.
    """
    reports, report = os.pipe()
    child = os.fork()
    if not child:
        _work_and_leave(work, Faults(root, 0, "stop", report))
    seen: set[str] = set()
    status = 0
    try:
        while os.WIFSTOPPED(status := os.waitpid(child, os.WUNTRACED)[1]):
            unsynced = [path for path in map(Path, json.loads(os.read(reports, 1 << 20))) if path.is_file()]
            for lost in (False, True) if unsynced else (False,):
                state = kept / f"{len(places)}-{lost}"
                shutil.copytree(root, state)
                for path in unsynced if lost else ():
                    os.truncate(state / path.relative_to(root.resolve()), path.stat().st_size // 2)
                places.append(_digest(state, kept / "settled"))
                if places[-1] in seen:
                    shutil.rmtree(state)
                else:
                    seen.add(places[-1])
                    yield state
            os.kill(child, signal.SIGCONT)
        assert status == 0, f"exit code {os.waitstatus_to_exitcode(status)}"
    finally:
        if os.WIFSTOPPED(status):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(reports)
        os.close(report)


def _digest(folder: Path, scratch: Path) -> str:
    """Of names and contents of all files, SQLite's journals rolled back."""
    if any(path.stat().st_size for path in folder.rglob("*-journal")):
        shutil.copytree(folder, scratch)
        for journal in scratch.rglob("*-journal"):
            with closing(sqlite3.connect(str(journal).removesuffix("-journal"))) as database:
                database.execute("SELECT count(*) FROM sqlite_master").fetchall()
            journal.unlink(missing_ok=True)  # which stays where it holds nothing to roll back
        found = _digest(scratch, scratch)
        shutil.rmtree(scratch)
        return found
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if not path.name.endswith("-journal")):
        digest.update(f"{path.relative_to(folder)}\n".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


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
