"""`layerprobe ls`: the names that other commands understand."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from typer import Option, Typer

from layerprobe.cli import options
from layerprobe.cli.output import print_body
from layerprobe.cli.terminal import print_table

app = Typer(no_args_is_help=True, help="List models, tasks, and features on disk.")


@app.command("models")
def models(as_json: options.Json = False) -> None:
    """List the model aliases. Any hub id or local folder works as well.

    Example: layerprobe ls models
    """
    from layerprobe.backbones.catalog import MODELS

    rows = [
        {"alias": alias, "hub id": entry.hub_id, "pretrained on": entry.pretrained_on, "about": entry.about}
        for alias, entry in MODELS.items()
    ]
    _show("ls-models", rows, as_json)


@app.command("tasks")
def tasks(as_json: options.Json = False) -> None:
    """List the task aliases. Any image-classification data set on the hub or in a folder works as well.

    Example: layerprobe ls tasks
    """
    from layerprobe.tasks.catalog import TASKS

    rows = [
        {"alias": alias, "hub id": entry.task_id, "classes": entry.n_classes, "about": entry.note}
        for alias, entry in TASKS.items()
    ]
    _show("ls-tasks", rows, as_json)


@app.command("features")
def features(
    prune: Annotated[list[str] | None, Option(help="Delete this store; may be given several times.")] = None,
    prune_all: Annotated[bool, Option("--prune-all", help="Delete every store.")] = False,
    cache_dir: Annotated[str | None, Option(help="Folder of the feature store.")] = None,
    as_json: options.Json = False,
) -> None:
    """List the feature stores on disk, or delete some.

    Example: layerprobe ls features
    """
    from layerprobe.hooks.feature_store import features_root, list_stores, prune_stores

    root = features_root(cache_dir)
    rows = list_stores(root)
    doomed = [row["folder"] for row in rows] if prune_all else list(prune or [])
    if doomed:
        freed = prune_stores(root, doomed)
        sys.stderr.write(f"deleted {len(doomed)} stores, {freed / 2**20:.1f} MiB\n")
        rows = list_stores(root)
    _show("ls-features", rows, as_json)


def _show(command: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_body(command, {}, {"rows": rows})
    elif rows:
        print_table(rows)
    else:
        sys.stdout.write("nothing there yet\n")
