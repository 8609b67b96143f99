"""Quality of the freeze search on tables of every plan: made once by training, replayed in seconds.

    python benchmarks/freeze_search.py make-table --model MODEL --task TASK --name NAME --workers 2
    python benchmarks/freeze_search.py replay results/freeze_search/tables/* -o results/freeze_search

`make-table` trains every mask at every learning rate on seeds for the search to look at, and at each mask's own
rate on as many unseen seeds, with test accuracy, to judge by. It is resumable: finished trainings are
kept in an SQLite file under runs/ and never repeated. `--dry-run` states the cost.

`replay` runs strategies on stored tables, prints the measures and, with `-o`, writes
the page. The default strategy has no setting that was tuned on these tables; one that is must be judged with the
table that it is judged on left out.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
from agreement import score_agreement
from freeze_search_page import SHARE, bars, publish, summarise
from replay import (
    WHOLE_TABLE,
    ExhaustiveTable,
    Reliability,
    Truth,
    judging_trials,
    replay,
    selection_trials,
    whole_table,
)

from layerprobe.errors import BudgetError, LayerprobeError
from layerprobe.files import write_json
from layerprobe.provenance import machine, versions
from layerprobe.search.space import REPORT_REPEAT, Trial, strip

TABLES = Path("results/freeze_search/tables")
WORK = Path("runs")
"""Finished trainings of unfinished tables; not part of the repository."""

LRS = (3e-4, 1e-3, 3e-3)
SHARES = (0.05, 0.1, SHARE, 0.3, 0.4, 0.6, 0.8, 1.0)
"""Budgets of the replays, as shares of the exhaustive cost."""


def make_table(arguments: argparse.Namespace) -> None:
    """Train every plan of one pair; continue where an earlier call stopped."""
    import torch

    from layerprobe.backbones import load_backbone
    from layerprobe.search.evaluator import proposals
    from layerprobe.search.run import prepare
    from layerprobe.search.settings import make_settings
    from layerprobe.tasks import load_task

    if arguments.workers > 1:
        torch.set_num_threads(1)
    task = load_task(arguments.task, limit=arguments.limit, seed=0)
    load = {"patch_size": arguments.patch_size, "stem": arguments.stem} if arguments.patch_size else {}
    backbone = load_backbone(arguments.model, seed=0, device=arguments.device, **load)
    settings = make_settings(
        lrs=tuple(arguments.lrs),
        seeds=arguments.seeds,
        bridge_steps=arguments.bridge_steps,
        finetune_steps=arguments.steps,
        batch_size=arguments.batch_size,
        random_classes=arguments.random_classes,
        head=arguments.head,
        head_lr=arguments.head_lr,
        shots=arguments.shots,
        budget=1.0,
        strategy="exhaustive",
    )
    runner = prepare(backbone, task, settings, WORK / f"table-{arguments.name}.db", exhaustive_table=True)
    space = runner.space
    selection = selection_trials(space, settings.lrs, settings.seeds)
    cost = sum(space.cost(trial) for trial in selection)
    judging = sum(settings.seeds * space.cost(Trial(mask=mask, lr=1.0)) for mask in space.masks())
    print(
        f"{space.count_upper()} plans, {len(selection)} trainings to select by and "
        f"{space.count_upper() * settings.seeds} to judge by: {cost + judging:.0f} full trainings of "
        f"{arguments.bridge_steps} + {arguments.steps} steps",
        file=sys.stderr,
    )
    if arguments.dry_run:
        return
    folder = TABLES / arguments.name
    folder.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    began = time.time()

    def watch(finished: int, total: int) -> None:
        seconds = time.time() - began
        print(f"{finished} of {total} trainings finished, {seconds:.0f} s", file=sys.stderr, flush=True)

    with closing(runner.store), runner.helpers(arguments.workers - 1):
        scores = runner.scores()
        found = runner.outcomes(selection, watch)
        table = ExhaustiveTable(
            name=arguments.name, space=space, lrs=settings.lrs, seeds=settings.seeds, outcomes=dict(found)
        )
        found |= runner.outcomes(judging_trials(space, table.own_lr, settings.seeds), watch)
    rows = [
        {
            "plan": strip(trial.mask),
            "lr": trial.lr,
            "repeat": trial.repeat,
            "validation_accuracy": outcome.validation_accuracy,
            "test_accuracy": outcome.test_accuracy,
            "seconds": round(outcome.train_seconds, 3),
        }
        for trial, outcome in found.items()
    ]
    pd.DataFrame(rows).to_csv(
        folder / "table.csv.gz", index=False, compression={"method": "gzip", "mtime": 0}
    )
    write_json(
        folder / "table.json",
        {
            "name": arguments.name,
            "command": shlex.join(["python", *sys.argv]),
            "model": backbone.source.name.split("/")[-1],
            "task": task.name.split("/")[-1],
            "split_hash": task.split_hash,
            "counts": {name: len(split) for name, split in task.splits.items()},
            "patch_size": arguments.patch_size,
            "stem": arguments.stem,
            "block_params": list(space.unit_params),
            "lrs": list(settings.lrs),
            "seeds": settings.seeds,
            "bridge_steps": arguments.bridge_steps,
            "finetune_steps": arguments.steps,
            "batch_size": arguments.batch_size,
            "head": arguments.head,
            "head_lr": arguments.head_lr,
            "shots": arguments.shots,
            "first_unseen_repeat": REPORT_REPEAT,
            "seconds": round(sum(outcome.call_seconds for outcome in found.values())),
            "scores": {
                name: [value.tolist(), np.nan_to_num(stderr).tolist()]
                for name, (value, stderr) in proposals(scores, space.n_blocks).items()
            },
            "versions": versions(),
            "machine": machine(),
        },
    )
    print(folder)


def replay_tables(arguments: argparse.Namespace) -> None:
    """Replay strategies on stored tables and print the measures."""
    tables = [ExhaustiveTable.load(folder) for folder in arguments.tables]
    truths = {table.name: Truth.of(table) for table in tables}
    rows = []
    for table in tables:
        cost, null = table.exhaustive_cost(), Reliability.of(table).null
        for strategy in arguments.strategies:
            for share in arguments.shares:
                for seed in range(arguments.runs):
                    try:
                        rows.append(
                            {"share": share, "null": null}
                            | replay(table, truths[table.name], strategy, share * cost, seed=seed)
                        )
                    except BudgetError:  # of this table and share, whatever the seed: no row
                        break
        rows.append({"share": 1.0, "null": null} | whole_table(table, truths[table.name]))
    if not any(row["strategy"] != WHOLE_TABLE for row in rows):
        raise BudgetError(
            f"no strategy can start on {arguments.shares} of the exhaustive cost; give larger --shares"
        )
    frame = pd.DataFrame(rows)
    agreement = pd.DataFrame([row for table in tables for row in score_agreement(table, truths[table.name])])
    summary = summarise(frame)
    for table in tables:
        truth = truths[table.name]
        print(
            f"{table.name}: optimum {strip(truth.optimum)} (test {100 * truth.test[truth.optimum]:.1f} %), "
            f"all-trainable {100 * truth.test[table.space.all]:.1f} %, none "
            f"{100 * truth.test[table.space.none]:.1f} %, standard error {100 * truth.stderr:.2f}, "
            f"smallest sufficient plan: {truth.sufficient} blocks"
        )
    with pd.option_context("display.width", 200, "display.max_columns", 30, "display.max_rows", 200):
        print(summary.to_string(index=False, float_format=lambda v: f"{v:.3g}"))
        print(agreement.to_string(index=False, float_format=lambda v: f"{v:.2f}"))
        print(pd.DataFrame(bars(frame, summary)).to_string(index=False))
    if arguments.output is not None:
        command = shlex.join(["python", *sys.argv])
        publish(
            tables,
            truths,
            arguments.tables,
            frame,
            agreement,
            Path(arguments.output),
            command,
            arguments.seen,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("make-table", help="train every plan of one (model, task) pair")
    make.add_argument("--model", required=True)
    make.add_argument("--task", required=True)
    make.add_argument("--name", required=True, help="folder under results/freeze_search/tables")
    make.add_argument("--limit", type=int, default=None)
    make.add_argument(
        "--shots", type=int, default=None, help="training images a class, drawn anew by every seed"
    )
    make.add_argument("--patch-size", type=int, default=None)
    make.add_argument("--stem", default="pca")
    make.add_argument("--bridge-steps", type=int, default=0)
    make.add_argument("--random-classes", type=int, default=10)
    make.add_argument("--steps", type=int, required=True)
    make.add_argument("--batch-size", type=int, default=32)
    make.add_argument("--head", default="probe", help="start of the head: probe or random")
    make.add_argument("--head-lr", type=float, default=1.0, help="multiple of the learning rate")
    make.add_argument(
        "--seeds", type=int, default=3, help="to select by, and as many unseen ones to judge by"
    )
    make.add_argument("--lrs", type=float, nargs="+", default=LRS)
    make.add_argument("--workers", type=int, default=1)
    make.add_argument("--device", default="cpu")
    make.add_argument("--dry-run", action="store_true")
    make.set_defaults(run=make_table)
    again = commands.add_parser("replay", help="compare strategies on stored tables")
    again.add_argument("tables", nargs="+", type=Path)
    again.add_argument("--strategies", nargs="+", default=["bayes", "random", "greedy", "tpe"])
    again.add_argument("--shares", type=float, nargs="+", default=SHARES)
    again.add_argument(
        "--seen",
        nargs="*",
        default=[],
        help="tables that had been looked at when the default strategy was last changed; the others are judged apart",
    )
    again.add_argument("--runs", type=int, default=10, help="seeds of each strategy")
    again.add_argument("--output", "-o", default=None)
    again.set_defaults(run=replay_tables)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except LayerprobeError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; finished trainings are kept")


if __name__ == "__main__":
    main()
