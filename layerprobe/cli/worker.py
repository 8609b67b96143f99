"""`layerprobe worker`: help a search that runs elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Option

from layerprobe.cli import options
from layerprobe.cli.output import Output, print_body
from layerprobe.progress import note, silence_notes
from layerprobe.provenance import without_secrets


def worker(
    storage: Annotated[
        str,
        Option("--storage", help="Database of the search: postgresql://…, or the study.db of its folder."),
    ],
    model: Annotated[
        str | None, Option("--model", "-m", help="Where the model is here; default: as the search was told.")
    ] = None,
    task: Annotated[
        str | None, Option("--task", "-t", help="Where the images are here; default: as the search was told.")
    ] = None,
    data_dir: Annotated[
        Path | None, Option("--data-dir", help="Folder that holds the task's files here.")
    ] = None,
    workers: Annotated[
        int | None,
        Option("--workers", min=1, help="Processes; default: one a GPU, or a core of a CPU (at most 4)."),
    ] = None,
    device: Annotated[
        str | None, Option("--device", help="cpu, cuda, cuda:1, mps; default: the best.")
    ] = None,
    offline: options.Offline = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Say which search it would join, and ask nothing.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Join a freeze-search that runs on another machine: train plans for it until it has its answer.

    Model, task and settings are read from the database. SIGTERM or Ctrl-C ends it; its training goes to another.

    Example: layerprobe worker --storage postgresql://user@host/plans
    """
    silence_notes(quiet)
    if dry_run:
        facts = {"storage": without_secrets(storage), "processes": workers or "one a GPU, or a core of a CPU"}
        Output("worker", as_json=as_json, quiet=quiet).show_facts(facts)
        return
    note(f"worker: trains plans for the search in {without_secrets(storage)} until it has its answer")
    from layerprobe.search.join import join_search

    trained = join_search(
        storage,
        model=model,
        task=task,
        data_dir=data_dir,
        workers=workers,
        device=device,
        offline=offline,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
    )
    if as_json:
        print_body("worker", {}, {"rows": [{"metric": "trainings", "value": trained}]})
    else:
        sys.stdout.write(f"the search has its answer; this process trained {trained} plans\n")
