"""Progress on stderr: one bar, with units, hidden when nobody watches."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from layerprobe.errors import BrokenFileError, LayerprobeError, printable, shortened
from layerprobe.provenance import without_secrets


def progress_bar(*args: Any, unit: str, quiet: bool = False, **kwargs: Any) -> tqdm[Any]:
    """A tqdm bar on stderr, silent when stderr is no terminal or `quiet` is set.

    Arguments are tqdm's; `unit` is required, because a bare number of iterations says nothing.
    """
    kwargs.setdefault("leave", False)
    kwargs.setdefault("dynamic_ncols", True)
    return tqdm(*args, unit=unit, file=sys.stderr, disable=quiet or not sys.stderr.isatty(), **kwargs)


_quiet = False


def silence_notes(quiet: bool) -> None:
    """Print no remarks from now on (`--quiet`), or print them again."""
    global _quiet
    _quiet = quiet


def note(message: str) -> None:
    """One remark on stderr; never mixed with results, which go to stdout."""
    if not _quiet:
        tqdm.write(line_for_people(message), file=sys.stderr)


def error_line(error: LayerprobeError) -> str:
    """What a known error says, on one line; what was found in a file takes no more than 300 characters."""
    limit = 300 if isinstance(error, BrokenFileError) else 2000
    return line_for_people(" ".join(str(error).split("\n")), limit)


def line_for_people(message: str, limit: int = 2000) -> str:
    """A message as it may reach a terminal: without secrets, without control characters, of bounded length."""
    lines = without_secrets(message).splitlines()
    return shortened("\n".join(map(printable, lines)), limit)
