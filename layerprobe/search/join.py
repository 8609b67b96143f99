"""A worker of a search that runs elsewhere: it trains what waits in the database, and decides nothing."""

from __future__ import annotations

import os
import time
from contextlib import closing
from typing import Any

from layerprobe.errors import NotAvailableError, UsageError
from layerprobe.progress import note
from layerprobe.search.run import prepare
from layerprobe.search.settings import make_settings
from layerprobe.search.trials import LOADING, Backoff, TrialStore, hide_password, storage_url
from layerprobe.search.workers import processes_on

WAIT_SECONDS = 300.0
"""How long a worker that came first waits for its search."""


def join_search(
    storage: str | os.PathLike[str],
    *,
    model: str | None = None,
    task: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    device: str | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> int:
    """Train waiting trials of the search in a database until it has its answer; how many this process trained.

    Parameters
    ----------
    storage
        As of `freeze_search`.
    model, task, data_dir
        Where they are on this machine; default: as in the search's own command. Another model or other data are
        refused.
    workers : int | None
        Processes; default: one a GPU, or a core of a CPU (at most 4).

    Raises
    ------
    NotAvailableError
        No search there, or none that came within five minutes.
    UsageError
        The search's model or task was made in memory, or is another one here.
    """
    from layerprobe.backbones import load_backbone
    from layerprobe.tasks import load_task

    with closing(TrialStore.join(storage)) as store:
        how = _wait_for_search(store, hide_password(storage_url(storage)), quiet=quiet)
    named = how["backbone"] | ({"name": model} if model else {}) | {"device": device}
    backbone = load_backbone(**named, offline=offline, trust_remote_code=trust_remote_code)
    there = {"name": task, "data_dir": data_dir}
    named = how["task"] | {key: value for key, value in there.items() if value}
    images = load_task(**named, offline=offline)
    runner = prepare(backbone, images, make_settings(how["preset"], **how["settings"]), storage)
    count = workers or processes_on(backbone)
    with closing(runner.store) as store:
        if not quiet:
            note(f"joined the search in {hide_password(runner.url)} with {count} processes")
        with runner.helpers(count - 1):
            return store.serve(runner.evaluator)


def _wait_for_search(store: TrialStore, shown: str, *, quiet: bool) -> dict[str, Any]:
    """How its backbone, task and settings are made."""
    began, pause = time.monotonic(), Backoff()
    how: dict[str, Any] | None = store.get(LOADING)
    if how is None and not quiet:
        note(f"no search has begun in {shown}; waiting for it")
    while how is None:
        if time.monotonic() - began > WAIT_SECONDS:
            raise NotAvailableError(
                f"no search has begun in {shown} within {WAIT_SECONDS / 60:.0f} minutes; start it with: "
                "layerprobe freeze-search --storage …"
            )
        pause.sleep()
        how = store.get(LOADING)
    if not how:
        raise UsageError(
            f"the search in {shown} is about a model or a task that was made in memory, which no other process has"
        )
    return how
