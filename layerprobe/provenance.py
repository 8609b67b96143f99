"""What a number rests on: versions, machine, arguments, time. A plain dict beside every result."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = (
    "layerprobe", "torch", "transformers", "numpy", "scipy", "scikit-learn", "pandas", "datasets", "accelerate",
    "captum", "optuna", "numba",
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Installed versions from package metadata, so that nothing is imported; None if absent."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """The hardware as far as it is cheap to tell: processor, usable cores, memory, accelerator if torch is up."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    try:
        facts["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        facts["memory_bytes"] = None
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["torch_threads"] = torch.get_num_threads()
        facts["accelerators"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def provenance(command: str, arguments: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """One dict that lets a reader repeat the result: command, arguments as resolved, versions, machine.

    `facts` are what only the caller knows: model revision, split hash, definitions used.
    """
    return {
        "command": command,
        "arguments": dict(arguments),
        "command_line": command_line(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(),
        **facts,
    }


def command_line() -> str | None:
    """The line the user typed, or None when layerprobe runs as a library."""
    program = Path(sys.argv[0]) if sys.argv else Path()
    as_module = (program.parent.name, program.name) == ("layerprobe", "__main__.py")
    if not as_module and program.name != "layerprobe":
        return None
    return shlex.join(["layerprobe", *sys.argv[1:]])


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
