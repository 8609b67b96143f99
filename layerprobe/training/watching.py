"""Those who watch a run: Ctrl-C, and accelerate's trackers."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerprobe.errors import NotAvailableError, UsageError


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Within: the first Ctrl-C is noted and acted on between two steps, the second is immediate."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note_it(signum: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(signum)

    before = signal.signal(signal.SIGINT, note_it)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def tracking(names: tuple[str, ...], folder: Path | None) -> dict[str, Any]:
    """Accelerate's arguments for trackers; one that is missing is an error, not a silence."""
    if not names:
        return {}
    from accelerate.tracking import get_available_trackers

    here = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    if missing := [name for name in names if name not in here]:
        raise NotAvailableError(
            f"tracker '{missing[0]}' is not installed; installed: {', '.join(here) or 'none'} "
            "(history.csv is written in any case)"
        )
    if folder is None:
        raise UsageError("trackers write into the run folder; name one with -o")
    return {"log_with": list(names), "project_dir": folder}


def flat_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them: numbers, truth values and text."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}
