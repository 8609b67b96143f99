"""Which transfer scores predict measured transfer, within equal numbers of trained blocks?

    python analyses/score_truth.py --quick                     # about a minute: eight plans of MiniLM on digits
    python analyses/score_truth.py --data ../shared            # about 4 minutes; reads results/freeze_search/tables
    python analyses/score_truth.py --tables runs/my-table      # a table of `benchmarks/freeze_search.py make-table`

The truth is a table in which every plan was really trained, judged on unseen seeds. A plan's score is the sum over
its trained blocks; Kendall's τ is taken within plans of equally many trained blocks, where counting says nothing.
Beside each score stands the noise ceiling: one seed's truth against the mean of the others. With --data all scores are
computed; without it those that the table brings (trainable ones).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from study import Answer, Setup, Size, is_vision, mean_row, publish, run, setup, short
from trainings import (
    TABLES,
    ExhaustiveTable,
    Trainings,
    Truth,
    permutation_agreement,
    score_agreement,
    table_folders,
)

from layerprobe.backbones import load_backbone
from layerprobe.errors import NotAvailableError, UnknownNameError
from layerprobe.files import read_json
from layerprobe.metrics.intervals import mean_interval
from layerprobe.plotting import style as look
from layerprobe.plotting.layer_scores import FAMILY_COLOURS
from layerprobe.search.evaluator import by_block, layer_scores
from layerprobe.tables import tidy
from layerprobe.tasks import load_task

QUICK = Size(("minilm",), ("digits",), 200, 4)
FULL = Size((), (), None, None)
QUICK_FROZEN = (3, 4, 5)
"""Blocks that no plan of the quick table trains: eight plans instead of 64."""

QUICK_TRAINING = {"lrs": (3e-4,), "seeds": 2, "batch_size": 16, "bridge_steps": 4, "finetune_steps": 12}
QUICK_UNSEEN = 2
TRAINABLE = ("rgn", "gradient_snr", "taylor", "fisher")
CEILING = "noise ceiling"
TOLERANCE = 1.2
"""Of τ, between two machines: the quick table has six pairs of plans, so one short training moves τ by a third."""


def main(argv: Sequence[str] | None = None) -> None:
    of_tables = f"comma-separated folders of tables; default all in {TABLES}"
    s = setup("score_truth", __doc__, QUICK, FULL, argv, tables=of_tables)
    tables = [quick_table(s)] if s.quick else [stored(s, folder) for folder in table_folders(s)]
    rows: list[dict[str, Any]] = []
    for table, n_test in tables:
        rows += measured(table, n_test)
    frame = tidy(rows)
    answers = claims(frame)
    frame = tidy([*rows, *over_tables(frame)])
    publish(
        s,
        rows=frame,
        answers=answers,
        headline=headline(frame, answers),
        setting=(
            "Tables (plans, unseen seeds, test images): "
            + "; ".join(f"{t.name} ({len(t.masks)}, {len(t.test(t.space.none))}, {n:,})" for t, n in tables)
            + ". p per table: exact permutation of the scores over the blocks, two-sided. "
            "Over three or more tables the interval is a t interval over tables, else over the unseen seeds, and the "
            "largest p of the tables counts. Readable scores are those of a block's output; a negative τ means: train "
            "what is not readable yet. Intervals are not corrected for the number of scores."
        ),
        sections={"By table": by_table(frame)},
        figures={
            "score_truth.png": (
                lambda: figure(frame),
                "Kendall τ with measured transfer within equal counts: each table (small) and their mean with its 95 % "
                "interval",
            )
        },
        facts={"tolerance": TOLERANCE},
    )


def stored(s: Setup, folder: Path) -> tuple[ExhaustiveTable, int]:
    """A table from disk; with its model and images at hand, with every score that the library has."""
    table = ExhaustiveTable.load(folder)
    about = read_json(folder / "table.json", what="exhaustive table")
    n_test = int(about["counts"]["test"])
    model, task = s.path(about["model"], "models"), s.path(about["task"], "data")

    def make() -> dict[str, list[float]]:
        images = load_task(task, limit=about["counts"]["train"], seed=0)
        options = {} if is_vision(model) else {"patch_size": about["patch_size"], "stem": about["stem"]}
        backbone = load_backbone(model, seed=0, device=s.arguments.device, **options).prepare(images)
        return score_columns(
            by_block(layer_scores(backbone, images, seed=0, quiet=True), table.space.n_blocks)
        )

    made_from = {key: about[key] for key in ("split_hash", "model", "stem", "patch_size")}
    try:
        scores = s.kept(f"scores {table.name}", make, **made_from)
    except (NotAvailableError, UnknownNameError):
        return table, n_test  # no such model or images here: the table's own scores remain
    return with_scores(table, scores), n_test


def score_columns(wide: pd.DataFrame) -> dict[str, list[float]]:
    """Score → one finite value per block; scores that are undefined somewhere are left out."""
    found = {}
    for name in wide.columns:
        values = wide[name].astype(float).to_numpy()
        if np.isfinite(values).all() and np.ptp(values) > 0:
            found[str(name).removeprefix("transfer_")] = values.tolist()
    return found


def with_scores(table: ExhaustiveTable, scores: dict[str, list[float]]) -> ExhaustiveTable:
    arrays = {name: (np.array(value), np.zeros(len(value))) for name, value in scores.items()}
    return dataclasses.replace(table, scores=arrays)


def quick_table(s: Setup) -> tuple[ExhaustiveTable, int]:
    """Every plan over the first three blocks of MiniLM, trained briefly."""
    task = s.task(s.tasks[0])
    backbone = s.load(s.models[0], task)
    frozen = tuple(b for b in QUICK_FROZEN if b < backbone.n_blocks)
    label = f"{short(s.models[0])}-{short(s.tasks[0])}"
    runs = Trainings(s, label, backbone, task, must_freeze=frozen, **QUICK_TRAINING)
    table = runs.plans(list(runs.space.masks()), unseen=QUICK_UNSEEN)
    frame = layer_scores(backbone, task, seed=0, quiet=True)
    return with_scores(table, score_columns(by_block(frame, backbone.n_blocks))), len(task.test)


def measured(table: ExhaustiveTable, n_test: int) -> list[dict[str, Any]]:
    """One row a score: τ within equal counts, its p, and τ with each seed; and the two baselines."""
    truth = Truth.of(table)
    n_seeds = len(table.test(table.space.none))
    about = {"pair": table.name, "n": len(table.masks), "n_test": n_test, "n_seeds": n_seeds}
    rows: list[dict[str, Any]] = []
    for name, found in permutation_agreement(table, truth).items():
        family = "trainable" if name in TRAINABLE else "readable"
        reason = None if np.isfinite(found.tau) else "plans of equal count have equal scores"
        row = {**about, "score": name, "family": family, "metric": "kendall_within"}
        rows.append({**row, "value": found.tau, "pvalue": found.pvalue, "reason": reason})
        for seed, value in enumerate(found.per_seed):
            rows.append({**row, "metric": "kendall_within_seed", "value": value, "seed": 1000 + seed})
    for row in score_agreement(table, truth):
        if row["score"] in ("count", CEILING):
            known = {**about, "score": row["score"], "family": "baseline"}
            rows.append({**known, "metric": "kendall_overall", "value": row["tau"]})
            if row["score"] == CEILING:
                rows.append({**known, "metric": "kendall_within", "value": row["tau_within"]})
    return rows


def spread(frame: pd.DataFrame, score: str) -> tuple[list[float], str]:
    """The values behind a score's interval, and what they vary over.

    With one or two tables that is seeds: they tell how sure τ is on these tables, while chance, that blocks have their
    scores by accident, is the business of the permutation p.
    """
    rows = frame[(frame["score"] == score) & frame["value"].notna()]
    tables = rows[rows["metric"] == "kendall_within"]
    if frame["pair"].nunique() >= 3:
        return tables["value"].astype(float).tolist(), f"95 % t interval over {len(tables)} tables"
    seeds = rows[rows["metric"] == "kendall_within_seed"].groupby("seed")["value"].mean()
    return seeds.astype(float).tolist(), f"95 % t interval over {len(seeds)} unseen seeds"


def scores_of(frame: pd.DataFrame) -> list[str]:
    own = frame[
        (frame["metric"] == "kendall_within") & (frame["family"] != "baseline") & frame["value"].notna()
    ]
    order = own.groupby("score")["value"].mean().astype(float).abs().sort_values(ascending=False)
    return [str(name) for name in order.index]


def claims(frame: pd.DataFrame) -> list[Answer]:
    answers = []
    pairs = list(dict.fromkeys(frame["pair"]))
    for score in scores_of(frame):
        values, kind = spread(frame, score)
        if len(values) < 2:
            continue
        found = mean_interval(values)
        rows = frame[(frame["score"] == score) & (frame["metric"] == "kendall_within")]
        # Over seeds a meaningless score has a stable τ too: there, every table must be beyond chance by itself.
        p = float(rows["pvalue"].max()) if frame["pair"].nunique() < 3 else None
        answers.append(
            Answer(
                "score",
                f"τ of {score} ({rows['family'].iloc[0]})",
                *(found.value, found.low, found.high, kind),
                n=int(rows["n"].sum()),
                counted=f"plans in {len(rows)} tables" if len(rows) > 1 else "plans",
                n_seeds=int(rows["n_seeds"].min()),
                model=", ".join(pairs),
                task="",
                unit="",
                pvalue=p,
            )
        )
    return answers


def over_tables(frame: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for score in [*scores_of(frame), CEILING]:
        values, kind = spread(frame, score)
        family = frame.loc[frame["score"] == score, "family"].iloc[0]
        about = {"score": score, "family": family, "metric": "kendall_within_mean", "interval": kind}
        if len(values) > 1:
            rows.append(mean_row(values, **about, n=len(values)))
        elif score == CEILING:
            only = frame[(frame["score"] == score) & (frame["metric"] == "kendall_within")]["value"]
            rows.append(
                {**about, "value": float(only.astype(float).mean()), "interval": None, "n": len(only)}
            )
    return rows


def headline(frame: pd.DataFrame, answers: list[Answer]) -> str:
    ceiling = frame[(frame["metric"] == "kendall_within_mean") & (frame["score"] == CEILING)]["value"]
    top = float(ceiling.iloc[0]) if len(ceiling) else float("nan")
    shown = [a for a in answers if a.shown]
    count = f"{len(shown)} of {len(answers)} scores"
    text = f"{count} are shown to follow measured transfer within equal counts, or its reverse"
    if not answers:
        return "No score is defined on these tables."
    best = max(answers, key=lambda a: abs(a.value))
    return (
        f"{text} (intervals uncorrected: of {len(answers)} true zeros about {0.05 * len(answers):.1f} would be called "
        f"either); noise ceiling τ = {top:.2f}. Largest in size: {best.sentence}: {best.verdict}."
    )


def by_table(frame: pd.DataFrame) -> list[str]:
    within = frame[(frame["metric"] == "kendall_within") & frame["pair"].notna()]
    pairs = list(dict.fromkeys(within["pair"]))
    lines = [
        "τ within equal counts (exact permutation p).",
        "",
        "| score | family | " + " | ".join(pairs) + " |",
    ]
    lines.append("| --- | --- |" + " --- |" * len(pairs))
    for score in [*scores_of(frame), CEILING]:
        cells = []
        rows = within[within["score"] == score]
        for pair in pairs:
            found = rows[rows["pair"] == pair]
            if found.empty or pd.isna(found["value"].iloc[0]):
                cells.append("undefined")
                continue
            p = found["pvalue"].iloc[0]
            cells.append(f"{found['value'].iloc[0]:+.2f}" + ("" if pd.isna(p) else f" ({p:.2g})"))
        lines.append(f"| {score} | {rows['family'].iloc[0]} | " + " | ".join(cells) + " |")
    return lines


def figure(frame: pd.DataFrame) -> Any:
    means = frame[frame["metric"] == "kendall_within_mean"]
    names = list(means["score"])
    colours = {**FAMILY_COLOURS, "baseline": look.BLACK}
    ax = look.new_axes(look.PRINT_WIDTH, 1.4 + 0.36 * len(names))
    single = frame[frame["metric"] == "kendall_within"]
    for place, (_, row) in enumerate(means.iterrows()):
        colour = colours[row["family"]]
        dots = single[single["score"] == row["score"]]["value"].astype(float)
        ax.plot(dots, [place + 0.22] * len(dots), "|", color=colour, ms=9, alpha=0.7)
        known = pd.notna(row["low"])
        reach = [[row["value"] - row["low"]], [row["high"] - row["value"]]] if known else None
        ax.errorbar(
            [row["value"]],
            [place],
            xerr=reach,
            fmt="s" if row["family"] == "readable" else "o",
            color=colour,
            capsize=3,
        )
    look.reference_line(ax, 0, vertical=True)
    ax.set_yticks(
        range(len(names)),
        [f"{n} ({f})" if f != "baseline" else n for n, f in zip(names, means["family"], strict=True)],
    )
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(-1, 1)
    kinds = list(means["interval"].dropna().unique())
    ax.set_xlabel(
        "Kendall τ within equal counts (chance: 0; τ ends at ±1, and so do the bars)\n"
        f"bar: {kinds[0] if kinds else 'none'}; strokes: single tables"
    )
    return ax


if __name__ == "__main__":
    run(main)
