"""Processes that share a search: more of them on this machine, and the names by which they are found out when dead."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from layerprobe.locks import usable_cores, use_threads

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone

ORPHAN_SECONDS = 2.0
"""How often a helper process looks for the process that started it."""

MOST_PROCESSES = 4

Serve = Callable[[Callable[[], bool]], None]
"""Works while the given function says so; must survive pickling."""


def processes_on(backbone: Backbone) -> int:
    """Processes of a search that names no number: one a GPU; on a CPU small models train faster side by side."""
    if backbone.run_device.type == "cpu":
        return min(MOST_PROCESSES, usable_cores())
    return max(1, gpus_of(backbone))


def gpus_of(backbone: Backbone) -> int:
    """GPUs over which the processes of a search are spread; 0 where the user named one of them."""
    asked = (backbone.loaded_with or {}).get("device", "in memory")
    spread = backbone.run_device.type == "cuda" and asked in (None, "cuda")
    return torch.cuda.device_count() if spread else 0


def gpu_of(number: int, gpus: int) -> dict[str, str]:
    """The environment in which process `number` sees one GPU alone, which is then its first."""
    if gpus < 2:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = visible if len(visible) == gpus else [str(index) for index in range(gpus)]
    return {"CUDA_VISIBLE_DEVICES": names[number % gpus]}


@contextmanager
def helpers(count: int, serve: Serve, *, gpus: int = 0) -> Iterator[None]:
    """Run `serve` in `count` processes beside the caller; each gets its own copy, and the next of `gpus` GPUs.

    They stop when the block ends, and by themselves when the caller is gone.
    """
    if count < 1:
        yield
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    # As bytes: left to multiprocessing, torch would put the weights into memory shared by all processes.
    packed = pickle.dumps(serve)
    threads = max(1, usable_cores() // (count + 1))
    processes = [
        context.Process(target=_help, args=(packed, stop, os.getpid(), threads), daemon=True)
        for _ in range(count)
    ]
    with _threads_of(threads):
        for number, process in enumerate(processes, 1):
            with _environment(gpu_of(number, gpus)):
                process.start()
        try:
            yield
        finally:
            stop.set()
            for process in processes:
                process.join(timeout=2)
                if process.is_alive():
                    # Everything asked for is answered; what a helper still trains, nobody waits for.
                    process.terminate()
                    process.join(timeout=10)
                    process.kill()
                    process.join()


@contextmanager
def _environment(added: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
        os.environ.update(before)


def _help(packed: bytes, stop: Event, parent: int, threads: int) -> None:
    # Being told to end is like Ctrl-C: the running trial goes back into the queue.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        # Packed by the parent process itself and handed over in memory: nothing that came from outside.
        serve: Serve = pickle.loads(packed)
        use_threads(threads)
        serve(lambda: not stop.is_set() and os.getppid() == parent)
    except KeyboardInterrupt:
        return


def _end_with(parent: int) -> None:
    """Leave when the parent is gone, in the middle of a training as well: nobody waits for it."""
    while os.getppid() == parent:
        time.sleep(ORPHAN_SECONDS)
    os._exit(1)


@contextmanager
def _threads_of(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    use_threads(count)
    try:
        yield
    finally:
        use_threads(before)


def this_worker() -> str:
    """host:pid:start of this process; together they name a process that can be looked for."""
    return f"{_host()}:{os.getpid()}:{_start_time(os.getpid())}"


def is_dead(worker: str) -> bool:
    """Whether a worker was a process on this host that no longer runs; unknown workers count as alive."""
    host, pid, started = worker.rsplit(":", 2) if worker.count(":") > 1 else ("", "", "")
    return host == _host() and pid.isdigit() and _start_time(int(pid)) != started


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
