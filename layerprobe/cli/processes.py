"""A command on several processes: those that a launcher started, or copies that it starts itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from layerprobe.files import cache_root, cannot_write
from layerprobe.locks import n_processes, process_number, usable_cores, use_threads
from layerprobe.progress import note
from layerprobe.shared_work import SharedWork

SECONDS_TO_END = 30.0
"""After this process is done, the others have nothing left to compute."""


SHARED_FOLDER = "LAYERPROBE_SHARED_WORK"
"""Environment variable: where copies of a command leave results for one another."""

SMALL = 1_000_000
"""Parameters of a model below which a second thread costs more than it brings."""


@contextlib.contextmanager
def copies(workers: int) -> Iterator[None]:
    """Run this very command in `workers` processes, this one included, which share the cores.

    The others get the environment that `torchrun` would give them and print nothing. One that dies costs its time
    alone: the others do its work. Where a launcher started this process, it starts none.
    """
    if workers == 1 or "WORLD_SIZE" in os.environ:
        yield
        return
    shared = {"WORLD_SIZE": str(workers), "LOCAL_WORLD_SIZE": str(workers), "RANK": "0", "LOCAL_RANK": "0"}
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, usable_cores() // workers)))
    shared[SHARED_FOLDER] = tempfile.mkdtemp(prefix="layerprobe-")
    os.environ.update(shared)
    if "torch" in sys.modules:  # which has read the number of threads already
        use_threads(int(shared["OMP_NUM_THREADS"]))
    command = [sys.executable, "-m", "layerprobe", *sys.argv[1:]]
    others = [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for number in range(1, workers)
    ]
    try:
        yield
        failed = [other.wait(SECONDS_TO_END) for other in others]
        if any(failed):
            note(f"{sum(map(bool, failed))} of {workers} processes stopped early; the others did their work")
    except subprocess.TimeoutExpired:
        note("a process that had nothing left to do was stopped")
    finally:
        for other in others:
            if other.poll() is None:
                other.terminate()
        shutil.rmtree(shared[SHARED_FOLDER], ignore_errors=True)


@contextlib.contextmanager
def sharing_work() -> Iterator[SharedWork | None]:
    """What the processes of this launch share their work through; None where there is one process."""
    if n_processes() == 1:
        yield None
        return
    if SHARED_FOLDER in os.environ:
        yield SharedWork(Path(os.environ[SHARED_FOLDER]))
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    folder = [_new_folder() if process_number() == 0 else ""]
    try:
        dist.broadcast_object_list(folder)
        yield SharedWork(Path(folder[0]))
        dist.barrier()
    finally:
        dist.destroy_process_group()
        if process_number() == 0:
            shutil.rmtree(folder[0], ignore_errors=True)


def _new_folder() -> str:
    """A folder of the cache, which all machines of a launch see, that nobody else may write into."""
    root = cache_root() / "shared"
    try:
        root.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(dir=root)
    except OSError as error:
        raise cannot_write(root, error) from error


def choose_threads(threads: int | None, n_parameters: int) -> None:
    """Set the number of threads: as many as were asked for, else one where the model is too small to share out.

    Results are the same to the last bit with the same number of threads, so how busy the cores are decides nothing; it
    is said.
    """
    import torch

    if threads is None and n_parameters < SMALL and "OMP_NUM_THREADS" not in os.environ:
        threads = 1
    if threads is not None:
        use_threads(threads)
        return
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if torch.get_num_threads() > 1 and busy > usable_cores():
        note(
            f"{usable_cores()} cores have {busy:.0f} processes to run, and this one computes with "
            f"{torch.get_num_threads()} threads; --threads 1 may be faster"
        )
