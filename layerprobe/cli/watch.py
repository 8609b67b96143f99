"""`layerprobe watch`: how a search stands, from its run folder or its database, while it runs elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from layerprobe.cli import options
from layerprobe.cli.output import print_body
from layerprobe.errors import UsageError, printable
from layerprobe.progress import duration

if TYPE_CHECKING:
    from rich.console import RenderableType

    from layerprobe.search.status import SearchStatus

HALF = 10
"""Characters of a bar on either side of zero."""


def watch(
    run: Annotated[
        Path | None, Argument(metavar="RUN", help="The folder of a freeze-search.", show_default=False)
    ] = None,
    storage: Annotated[
        str | None, Option(help="The database that the search was given, instead of a folder.")
    ] = None,
    every: Annotated[float, Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, Option("--once", help="One look, as plain text.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show a search while it runs: what training each block brings, the best plan, the budget, the time left.

    Reads alone, from any machine that reaches the folder or the database; Ctrl-C leaves the search as it is.

    Example: layerprobe watch quickstart --once
    """
    if (run is None) == (storage is None):
        raise UsageError("name the folder of a search, or its database with --storage")
    from layerprobe.search.status import find_storage, search_status

    place = storage if run is None else find_storage(run)
    assert place is not None
    found = search_status(place)
    if as_json:
        print_body("watch", {"run": None if run is None else str(run)}, facts(found, run))
    elif once or not sys.stdout.isatty():
        sys.stdout.write("\n".join([*head(found, run), "", *bars(found)]).rstrip() + "\n")
    else:
        follow(place, run, every)


def follow(place: str, run: Path | None, every: float) -> None:
    """Look again and again, until the search is done or the user has seen enough."""
    from rich.live import Live

    from layerprobe.search.status import search_status

    try:
        with Live(screen(search_status(place), run), refresh_per_second=4) as live:
            while not finished(run):
                time.sleep(every)
                live.update(screen(search_status(place), run))
    except KeyboardInterrupt:
        sys.stderr.write("stopped watching; the search goes on\n")


def screen(found: SearchStatus, run: Path | None) -> RenderableType:
    """The status in colours: trained blocks green, gains that may be none dim."""
    from rich.text import Text

    text = Text("\n".join(head(found, run)), style="bold")
    text.append("\n\n")
    for line, gain in zip(bars(found), [None, *found.gains], strict=False):
        style = "dim"
        if gain is not None and gain.low is not None and gain.high is not None:
            style = "green" if gain.low > 0 else "red" if gain.high < 0 else ""
        text.append(f"{line}\n", style=style)
    return text


def head(found: SearchStatus, run: Path | None) -> list[str]:
    """How the search stands, a fact a line; at most 80 columns where names are of usual length."""
    from layerprobe.search.space import marks

    about = found.arguments
    lines = [printable(f"{about['model']} on {about['task']}, {about.get('strategy', 'search')}")]
    if found.pilot is None:
        return [*lines, f"pilot: {found.trainings} trainings done, {found.running} running"]
    assert found.spent is not None
    if found.budget:
        share = min(1.0, found.spent / found.budget)
        full = round(30 * share)
        left = "" if found.seconds_left is None else f", about {duration(found.seconds_left)} left"
        done = finished(run) or found.reported > 0
        lines.append(
            f"{'━' * full}{'╌' * (30 - full)} {found.spent:.1f} of {found.budget:.3g} full trainings"
            + ("" if done else left)
        )
    state = "finished" if finished(run) else f"{found.running} running on {found.workers} processes"
    failed = f", {found.failed} failed" if found.failed else ""
    lines.append(f"{found.trainings} trainings{failed}, {found.reported} of them for the report; {state}")
    if found.best is not None and found.accuracy is not None and found.accuracy.low is not None:
        strip = marks(found.best, found.space.n_parts)
        assert found.accuracy.value is not None and found.accuracy.high is not None
        lines.append(
            f"best so far {strip} ({found.space.describe(found.best)}): validation {100 * found.accuracy.value:.1f} %, "
            f"{100 * found.accuracy.low:.1f} to {100 * found.accuracy.high:.1f}"
        )
    return lines


def bars(found: SearchStatus) -> list[str]:
    """What training each block adds: number, 95 % interval and bar."""
    if not found.gains:
        return []
    values = [100 * (gain.value or 0.0) for gain in found.gains]
    most = max(0.1, *(abs(value) for value in values))
    names = _unit_names(found)
    wide = max(len(name) for name in ["block", *names]) + 1
    lines = [f"{'block':<{wide}}{'gain, points':>13}  {'95 % interval':<17}"]
    for name, gain, value in zip(names, found.gains, values, strict=True):
        length = round(HALF * abs(value) / most)
        left, right = ("" if value > 0 else "█" * length), ("█" * length if value > 0 else "")
        interval = f"{100 * (gain.low or 0.0):+.1f} to {100 * (gain.high or 0.0):+.1f}"
        lines.append(f"{name:<{wide}}{value:>+13.1f}  {interval:<17} {left:>{HALF}}│{right}".rstrip())
    return lines


def _unit_names(found: SearchStatus) -> list[str]:
    """`3` for a block, `3.attention` and `3.mlp` for its halves."""
    space = found.space
    parts = [f".{part}" for part in space.parts] or [""]
    return [f"{block}{part}" for block in range(space.n_blocks) for part in parts][: len(found.gains)]


def facts(found: SearchStatus, run: Path | None) -> dict[str, Any]:
    """The status as JSON."""
    return {
        "model": found.arguments["model"],
        "task": found.arguments["task"],
        "finished": finished(run),
        "budget": found.budget,
        "spent": found.spent,
        "trainings": found.trainings,
        "running": found.running,
        "seconds_left": found.seconds_left,
        "best": None if found.best is None else found.space.names(found.best),
        "accuracy": None if found.accuracy is None else found.accuracy.value,
        "rows": [
            {"block": name, "gain": gain.value, "low": gain.low, "high": gain.high}
            for name, gain in zip(_unit_names(found), found.gains, strict=True)
        ],
    }


def finished(run: Path | None) -> bool:
    """Whether the folder holds the search's answer."""
    return run is not None and (run / "search.json").is_file()
