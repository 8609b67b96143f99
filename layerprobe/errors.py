"""The errors that users meet. Each is one line: what happened, with which values, and what to try.

The command line prints a `LayerprobeError` as that line and leaves with its `exit_code`;
every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import signal
import unicodedata
from collections.abc import Iterable


class LayerprobeError(Exception):
    """A known failure: a broken file, a missing download, a diverged run. Exit code 1."""

    exit_code = 1


class UsageError(LayerprobeError, ValueError):
    """The request itself does not fit: an impossible option, an unusable array. Exit code 2."""

    exit_code = 2


class BudgetError(UsageError):
    """The budget does not pay for what was asked."""


class UnknownNameError(UsageError, LookupError):
    """A model, task, block or option that does not exist, with suggestions. Exit code 2."""


class NotAvailableError(LayerprobeError):
    """Something that exists but is not here: a download while offline, a GPU, an optional package."""


class BrokenFileError(LayerprobeError):
    """A file that cannot be what it says it is: truncated, corrupt, of another schema."""


class PlanError(UsageError):
    """A freeze plan that does not fit the model, or a guarantee of a plan that does not hold."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it before they kill: handled like Ctrl-C, and left with exit code 143."""


def stopped_by(signum: int) -> KeyboardInterrupt:
    """The exception that a signal becomes."""
    return Terminated() if signum == signal.SIGTERM else KeyboardInterrupt()


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The tail of an error message: the nearest of `choices`, or nothing when none is near.

    >>> did_you_mean("lama-7b", ["llama-7b", "gpt2"])
    " Did you mean 'llama-7b'?"
    """
    close = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.6)
    if not close:
        return ""
    return " Did you mean " + " or ".join(f"'{match}'" for match in close) + "?"


_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had: Python's own, or torch's for a CPU or an accelerator."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def first_line(error: BaseException) -> str:
    """What an error says, on one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def printable(text: str) -> str:
    """`text` with its control characters, invisible marks and halves of letters written out.

    Names of files and tensors come from elsewhere; in a terminal they would move the cursor or hide other text.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    if text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode("ascii")
        if unicodedata.category(letter) in _INVISIBLE
        else letter
        for letter in text
    )


def shortened(text: str, limit: int = 300) -> str:
    """The beginning and the end of a long text; what to do about an error stands at its end."""
    if len(text) <= limit:
        return text
    tail = limit // 3
    return f"{text[: limit - tail - 3]} … {text[-tail:]}"
