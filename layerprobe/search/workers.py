"""More processes on this machine: each trains waiting trials until the search that started them is over."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from layerprobe.search.study import Ledger, Work


@contextmanager
def helpers(count: int, url: str, arguments: Mapping[str, Any], work: Work) -> Iterator[None]:
    """Run `count` helper processes beside the caller; each gets its own copy of `work`.

    They stop when the block ends, and by themselves when the caller is gone.
    """
    if count < 1:
        yield
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    # As bytes: left to multiprocessing, torch would put the weights into memory shared by all processes.
    packed = pickle.dumps(work)
    processes = [
        context.Process(
            target=_help,
            args=(url, dict(arguments), packed, stop, os.getpid(), _threads(count + 1)),
            daemon=True,
        )
        for _ in range(count)
    ]
    with _threads_of(_threads(count + 1)):
        for process in processes:
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
                    process.join()


def _help(url: str, arguments: dict[str, Any], packed: bytes, stop: Any, parent: int, threads: int) -> None:
    # Being told to end is like Ctrl-C: the running trial goes back into the queue.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # Packed by the parent process itself and handed over in memory: nothing that came from outside.
        work: Work = pickle.loads(packed)
        with _threads_of(threads):
            Ledger.open(url, arguments).help(work, lambda: not stop.is_set() and os.getppid() == parent)
    except KeyboardInterrupt:
        return


def _threads(processes: int) -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, usable // processes)


@contextmanager
def _threads_of(count: int) -> Iterator[None]:
    torch = sys.modules.get("torch")
    if torch is None:  # work that brings no torch along is not made to wait for it
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
