"""What a number rests on: versions, machine, arguments, time. A plain dict beside every result."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from layerprobe.locks import usable_cores

T = TypeVar("T")

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
        "cores": usable_cores(),
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
    return without_secrets(
        {
            "command": command,
            "arguments": dict(arguments),
            "command_line": command_line(),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "machine": machine(),
            **facts,
        }
    )


def command_line() -> str | None:
    """The line the user typed, or None when layerprobe runs as a library."""
    program = Path(sys.argv[0]) if sys.argv else Path()
    as_module = (program.parent.name, program.name) == ("layerprobe", "__main__.py")
    if not as_module and program.name != "layerprobe":
        return None
    return shlex.join(["layerprobe", *without_secrets(sys.argv[1:])])


HIDDEN = "***"
_SECRET_VARIABLES = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|API_KEY)$")
_LONG_ENOUGH = 6
"""Characters from which on the value of such a variable is a secret, and not a word that stands everywhere."""
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]+:/{1,2})(.*)@", re.IGNORECASE)
"""Up to the last @ of the line: a password may hold any character, and better too much is hidden than too little."""
_SETTING = re.compile(
    r"\b((?:[\w-]*(?:password|passwd|secret|token|api_?key)|pwd)\s*=\s*)([^\s&;,'\"]+|'[^']*'|\"[^\"]*\")",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"\b(hf|api_org|ghp|sk|wandb)_[A-Za-z0-9]{16,}")


def without_secrets(value: T) -> T:
    """`value` (text, or lists and dicts of it) as it may be kept and shown.

    URLs lose their password, `password=…` and the like their value; so do tokens of the hub, and what the environment
    calls a token, a password or a secret. What is recorded of a command's arguments, printed or logged goes through
    here.

    >>> without_secrets("postgresql://me:secret@host/db?password=x")
    'postgresql://me@host/db?password=***'
    """
    shown: object = value
    if isinstance(value, str):
        shown = _hide(value)
    elif isinstance(value, Mapping):
        shown = {key: without_secrets(item) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        shown = [without_secrets(item) for item in value]
    return cast(T, shown)


def _hide(text: str) -> str:
    for name, secret in os.environ.items():
        if len(secret) >= _LONG_ENOUGH and secret in text and _SECRET_VARIABLES.search(name):
            text = text.replace(secret, HIDDEN)
    if ":/" in text:  # one slash is left of two where an address was taken for a path
        text = _USER.sub(_without_password, text)
    if "=" in text:
        text = _SETTING.sub(rf"\1{HIDDEN}", text)
    return _TOKEN.sub(rf"\1_{HIDDEN}", text)


def _without_password(match: re.Match[str]) -> str:
    scheme, user = match[1], match[2].partition(":")[0]
    # Of web addresses, a token may stand where the user does.
    return f"{scheme}{HIDDEN}@" if scheme.lower().startswith("http") else f"{scheme}{user}@"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
