"""What benchmarks on one thread share. It is imported before numpy and torch, whose libraries ask at their start."""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"

import importlib.metadata
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def processor_time(call: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds of a call, and what it returned."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def version_of(package: str) -> str | None:
    """The version of a peer; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def circumstances(*peers: str) -> dict[str, Any]:
    """Command, versions and machine of this run, for its result."""
    from layerprobe.provenance import machine, versions

    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {**versions(), **{peer: version_of(peer) for peer in peers}},
        "machine": machine(),
    }
