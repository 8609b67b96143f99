"""Progress on stderr: one bar with the time left on a terminal, a short line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import Any

from tqdm import tqdm

from layerprobe.errors import BrokenFileError, LayerprobeError, printable, shortened
from layerprobe.provenance import without_secrets

BAR_SECONDS = 2.0
"""What takes less shows no bar."""
LINE_SECONDS = 30.0
"""Between two lines where stderr is no terminal."""


def progress_bar(*args: Any, unit: str, quiet: bool = False, **kwargs: Any) -> tqdm[Any]:
    """A tqdm bar on stderr; short lines where stderr is no terminal, nothing where `quiet` is set.

    Arguments are tqdm's; `unit` is required, because a bare number of iterations says nothing.
    """
    kwargs.setdefault("leave", False)
    if sys.stderr.isatty():
        kwargs = {"delay": BAR_SECONDS, "dynamic_ncols": True, **kwargs}
        return tqdm(*args, unit=unit, file=sys.stderr, disable=quiet, **kwargs)
    pace = {"delay": LINE_SECONDS, "mininterval": LINE_SECONDS, "maxinterval": 2 * LINE_SECONDS}
    return _Lines(*args, unit=unit, file=sys.stderr, disable=quiet, **kwargs, **pace)


class _Lines(tqdm):
    """A line where tqdm would draw its bar anew."""

    disable: bool = True  # until tqdm has set the bar up: an interrupt may come before

    def close(self) -> None:
        """Without the carriage return by which tqdm takes its bar away."""
        if not self.disable:
            self.disable = True
            self._decr_instances(self)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        state = self.format_dict
        # A changed description asks for a new bar, too, and so does every remark.
        if msg != "" and state["elapsed"] - getattr(self, "told", 0.0) >= LINE_SECONDS:
            self.told = state["elapsed"]
            left = ""
            if state["total"] and state["n"] > state["initial"]:
                rest = (
                    max(0.0, state["total"] - state["n"]) * state["elapsed"] / (state["n"] - state["initial"])
                )
                left = f", about {duration(rest)} left"
            of = f" of {state['total']:,g}" if state["total"] else ""
            name = state["prefix"].rstrip(": ")
            done = f"{state['n']:,.1f}".removesuffix(".0")
            line = f"{name + ': ' if name else ''}{done}{of} {state['unit']}{left}"
            if not _quiet:
                sys.stderr.write(f"{line_for_people(line)}\n")
        return True


def duration(seconds: float) -> str:
    """
    >>> duration(42), duration(150), duration(9000)
    ('42 s', '2.5 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Stages:
    """The one bar of a command of several stages, such as a search: each has its own total."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None
        self._stage = ""

    def show(self, stage: str, done: float, total: float, *, unit: str, about: str = "") -> None:
        """Set the bar; another `stage` or `total` begins it anew."""
        if self._bar is None or (stage, total) != (self._stage, self._bar.total):
            self.close()
            self._stage = stage
            form = "{desc} {bar} {n:.3g} of {total:.3g} {unit}, {remaining} left{postfix}"
            how = {"bar_format": form, "smoothing": 0.0, "delay": 0.0} if sys.stderr.isatty() else {}
            self._bar = progress_bar(
                total=total, initial=done, unit=unit, desc=stage, quiet=self._quiet, **how
            )
        self._bar.set_postfix_str(about, refresh=False)
        self._bar.update(done - self._bar.n)
        if sys.stderr.isatty():
            self._bar.refresh()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


_quiet = False


def silence_notes(quiet: bool) -> None:
    """Print no remarks from now on (`--quiet`), or print them again."""
    global _quiet
    _quiet = quiet


def note(message: str) -> None:
    """One remark on stderr; never mixed with results, which go to stdout."""
    if not _quiet:
        text = wrapped(line_for_people(message))
        if sys.stderr.isatty():
            tqdm.write(text, file=sys.stderr)  # above the bars
        else:
            sys.stderr.write(f"{text}\n")


def wrapped(text: str) -> str:
    """`text` with lines broken between words where stderr is a terminal; as it is elsewhere."""
    if not sys.stderr.isatty():
        return text
    width = max(40, shutil.get_terminal_size().columns)
    lines = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(map(lines.fill, text.split("\n")))


def error_line(error: LayerprobeError) -> str:
    """What a known error says, on one line; what was found in a file takes no more than 300 characters."""
    limit = 300 if isinstance(error, BrokenFileError) else 2000
    return line_for_people(" ".join(str(error).split("\n")), limit)


def line_for_people(message: str, limit: int = 2000) -> str:
    """A message as it may reach a terminal: without secrets, without control characters, of bounded length."""
    lines = without_secrets(message).splitlines()
    return shortened("\n".join(map(printable, lines)), limit)
