"""Names of processes, by which others on the same machine find out whether they still run."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path


def this_worker() -> str:
    """host:pid:start of this process; together they name a process that can be looked for."""
    return f"{_host()}:{os.getpid()}:{_start_time(os.getpid())}"


def is_dead(worker: str) -> bool:
    """Whether a worker was a process on this host that no longer runs; unknown workers count as alive."""
    host, _, rest = worker.rpartition(":")[0].rpartition(":")
    if host != _host() or not rest.isdigit():
        return False
    started = worker.rpartition(":")[2]
    return _start_time(int(rest)) != started


def _host() -> str:
    """Where a process id means something: names of hosts repeat, and containers of one host number for themselves."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:8])
    with suppress(OSError):
        parts.append("".join(filter(str.isdigit, str(Path("/proc/self/ns/pid").readlink()))))
    return "/".join(parts)


def _start_time(pid: int) -> str:
    """Kernel start time of a process, '' where none runs, so that a reused pid is not taken for it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass
        return "running"
    fields = text.rpartition(")")[2].split()
    # A zombie has ended, though its parent has not yet asked how.
    return "" if fields[0] in ("Z", "X") else fields[19]
