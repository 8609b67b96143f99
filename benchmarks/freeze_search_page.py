"""What replays on tables of every plan say of the search: measures against their bars, figure and page.

Used by `freeze_search.py replay`; nothing here trains or replays. Averages are over tables first, so that every
table has the same weight, and intervals are t intervals over tables: replays of one table are no independent cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from replay import WHOLE_TABLE, ExhaustiveTable, Reliability, Truth

from layerprobe.cli.output import save_figure
from layerprobe.files import read_json, write_json, write_text
from layerprobe.metrics.intervals import mean_interval
from layerprobe.provenance import machine, versions
from layerprobe.search.space import strip
from layerprobe.tables import write_frame

SHARE = 0.2
"""The share of the exhaustive cost at which strategies are judged."""

REGRET_BAR, FRUGAL_BAR, CHEAPER_BAR = 0.5, 0.8, 2.0
"""Accuracy points; share of replays with at most one block too many; times cheaper than others at equal regret."""
STOP_SHARE, STOP_BAR = 0.5, 0.8
"""On a table without differences the search stops before this share of the budget, in this share of replays."""
DEFAULT = "bayes"
COLOURS = {"bayes": "#D55E00", "random": "#0072B2", "greedy": "#009E73", "tpe": "#CC79A7"}
MARKS = dict(zip(COLOURS, "osD^", strict=True))


def over_tables(part: pd.DataFrame, column: str) -> tuple[float, float, float]:
    """Mean over tables of the mean over replays, with its 95 % t interval (NaN ends for a single table)."""
    means = part.groupby("pair")[column].mean().astype(float).tolist()
    if len(means) < 2:
        return means[0], math.nan, math.nan
    found = mean_interval(means)
    return found.value, found.low, found.high


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a strategy and budget (`share` of the exhaustive cost), averaged over tables."""
    rows = []
    for (strategy, share), part in frame.groupby(["strategy", "share"], sort=False):
        regret, low, high = over_tables(part, "regret")
        rows.append(
            {
                "strategy": strategy,
                "share": share,
                "cost_share": over_tables(part, "cost_share")[0],
                "regret": regret,
                "regret_low": low,
                "regret_high": high,
                "worst_table_regret": part.groupby("pair")["regret"].mean().max(),
                "stderr": over_tables(part, "stderr")[0],
                "below_all_by_1se": (part["below_all"] > part["stderr"]).mean(),
                "excess_blocks": over_tables(part, "excess_blocks")[0],
                "at_most_one_more": (part["excess_blocks"] <= 1).mean(),
                "other_lr": (part["lr"] != part["own_lr"]).mean(),
                "lr_loss": over_tables(part, "lr_loss")[0],
                "n_tables": part["pair"].nunique(),
                "n_replays": len(part),
            }
        )
    return pd.DataFrame(rows)


def times_cheaper(frame: pd.DataFrame, other: str) -> tuple[float, float, float, bool]:
    """Cost at which `other` first reaches the default's mean regret at `SHARE`, over the default's cost there.

    Returns
    -------
    ratio, its least and greatest value with one table left out, and whether `other` got there at all: where it did
    not, its greatest cost stands in, so that the ratio is a lower bound.
    """
    cells = frame.groupby(["strategy", "share", "pair"])[["regret", "cost_share"]].mean().unstack("pair")
    own_regret, own_cost = cells.loc[DEFAULT, SHARE].to_numpy().reshape(2, -1)
    # Budgets that pay for the strategy on every table; one row a budget, one column a table.
    regret, cost = np.moveaxis(cells.loc[other].dropna().to_numpy().reshape(-1, 2, len(own_cost)), 1, 0)

    def ratio(drawn: np.ndarray) -> tuple[float, bool]:
        costs = cost[:, drawn].mean(axis=1)
        reached = costs[regret[:, drawn].mean(axis=1) <= own_regret[drawn].mean() + 1e-9]
        cheapest = reached.min() if len(reached) else costs.max()
        return float(cheapest / own_cost[drawn].mean()), len(reached) > 0

    everything = np.arange(len(own_cost))
    value, got_there = ratio(everything)
    left_out = everything if len(everything) > 1 else []
    without_one = [ratio(np.delete(everything, one))[0] for one in left_out] or [value]
    return value, min(without_one), max(without_one), got_there


def judged(value: float, worst: float, bar: float, *, at_most: bool) -> str:
    """Whether a bar is reached, and whether the bad end of the interval reaches it too."""
    sign = 1 if at_most else -1
    if not sign * value <= sign * bar:
        return "no"
    return "yes" if sign * worst <= sign * bar else "yes, not surely"


def bars(frame: pd.DataFrame, summary: pd.DataFrame) -> list[dict[str, Any]]:
    """What the default should reach, what it reached, and whether that is enough; bars without replays are left out."""
    at = summary[(summary["strategy"] == DEFAULT) & (summary["share"] == SHARE)]
    if at.empty:
        return []
    own = at.iloc[0]
    part = frame[(frame["strategy"] == DEFAULT) & (frame["share"] == SHARE)]
    n = int(own["n_replays"])
    answers = int(part.groupby("pair")["plan"].nunique().sum())
    basis = f"{own['n_tables']:.0f} tables, {n} replays with {answers} different answers"
    frugal = int((part["excess_blocks"] <= 1).sum())
    shares = (part["excess_blocks"] <= 1).groupby(part["pair"]).mean()
    regret_bar = max(REGRET_BAR, own["stderr"])
    found = [
        {
            "measure": f"regret at {100 * SHARE:.0f} % of the exhaustive cost, points",
            "bar": f"at most {REGRET_BAR}, or at most one standard error ({own['stderr']:.2f})",
            "measured": f"{own['regret']:+.2f}",
            "interval and basis": (
                f"{own['regret_low']:+.2f} to {own['regret_high']:+.2f} (95 % t over tables); {basis}"
            ),
            "reached": judged(own["regret"], own["regret_high"], regret_bar, at_most=True),
        },
    ]
    for other in ("random", "greedy"):
        if other not in set(frame["strategy"]):
            continue
        value, least, most, got_there = times_cheaper(frame, other)
        found.append(
            {
                "measure": f"times cheaper than {other} at equal regret",
                "bar": f"at least {CHEAPER_BAR:g}",
                "measured": f"{value:.1f}" if got_there else f"more than {value:.1f}",
                "interval and basis": f"{least:.1f} to {most:.1f} (each table left out once); {basis}",
                "reached": judged(value, least, CHEAPER_BAR, at_most=False),
            }
        )
    found.append(
        {
            "measure": "replays with at most one trained block more than the smallest sufficient plan",
            "bar": f"at least {100 * FRUGAL_BAR:.0f} %",
            "measured": f"{frugal} of {n}, {100 * frugal / n:.0f} %",
            "interval and basis": f"{100 * shares.min():.0f} to {100 * shares.max():.0f} % (by table); {basis}",
            "reached": judged(frugal / n, shares.min(), FRUGAL_BAR, at_most=False),
        }
    )
    nulls = frame[frame["null"] & (frame["strategy"] == DEFAULT) & (frame["share"] == 1.0)]
    if len(nulls):
        early = int((nulls["spent"] <= STOP_SHARE * nulls["budget"]).sum())
        found.append(
            {
                "measure": f"without differences: stops before {100 * STOP_SHARE:.0f} % of the exhaustive cost",
                "bar": f"in at least {100 * STOP_BAR:.0f} % of replays",
                "measured": f"{early} of {len(nulls)}, {100 * early / len(nulls):.0f} %",
                "interval and basis": ", ".join(nulls["pair"].unique()),
                "reached": "yes" if early >= STOP_BAR * len(nulls) else "no",
            }
        )
    return found


def with_unseen(
    verdicts: list[dict[str, Any]], frame: pd.DataFrame, seen: Sequence[str]
) -> list[dict[str, Any]]:
    """The bars with what they measure on the tables outside `seen` alone."""
    rest = frame[~frame["pair"].isin(seen)]
    if not seen or rest.empty:
        return verdicts
    alone = {row["measure"]: row for row in bars(rest, summarise(rest))}
    column = f"on unseen tables ({', '.join(rest['pair'].unique())})"
    return [
        {
            **row,
            column: f"{one['measured']} ({one['reached']})" if (one := alone.get(row["measure"])) else "-",
        }
        for row in verdicts
    ]


def agreement_rows(agreement: pd.DataFrame) -> list[str]:
    """Kendall τ of each score over tables, overall and within equal counts."""
    lines = [
        "| score | τ overall | 95 % interval | τ within equal counts | 95 % interval | tables |",
        "| --- | ---: | --- | ---: | --- | ---: |",
    ]
    order = agreement.groupby("score")["tau_within"].mean().sort_values(ascending=False, na_position="last")
    for score in order.index:
        part = agreement[agreement["score"] == score]
        cells = [_with_interval(part[column].dropna().tolist()) for column in ("tau", "tau_within")]
        lines.append(f"| {score} | {cells[0]} | {cells[1]} | {part['pair'].nunique()} |")
    return lines


def _with_interval(values: Sequence[float]) -> str:
    if not values:
        return "undefined | –"
    if len(values) < 2:
        return f"{values[0]:+.2f} | single measurement"
    found = mean_interval(values)
    return f"{found.value:+.2f} | {found.low:+.2f} to {found.high:+.2f}"


def figure(summary: pd.DataFrame) -> Any:
    """Regret, and blocks beyond the smallest sufficient plan, against what the search cost."""
    import matplotlib.pyplot as plt

    chart, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained")
    for strategy, part in summary[summary["strategy"] != WHOLE_TABLE].groupby("strategy", sort=False):
        part = part.sort_values("cost_share")
        colour, mark = COLOURS.get(str(strategy), "#882255"), MARKS.get(str(strategy), "x")
        width = 2.4 if strategy == DEFAULT else 1.2
        x = 100 * part["cost_share"]
        if strategy == DEFAULT:
            left.fill_between(x, part["regret_low"], part["regret_high"], color=colour, alpha=0.15, lw=0)
        style = {
            "color": colour,
            "marker": mark,
            "lw": width,
            "ms": 5,
            "zorder": 3 if strategy == DEFAULT else 2,
        }
        left.plot(x, part["regret"], label=strategy, **style)
        right.plot(x, part["excess_blocks"], **style)
    stderr = float(summary["stderr"].mean())
    left.axhline(stderr, color="#555555", ls=":", lw=1.2, label="one standard error")
    for ax in (left, right):
        ax.axhline(0, color="#555555", ls="--", lw=1, label="best of every plan" if ax is left else None)
        ax.set_xlabel("cost, % of trying every plan")
        ax.set_xlim(0, None)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    left.set_ylabel("regret on test, accuracy points")
    right.set_ylabel("trained blocks beyond\nthe smallest sufficient plan")
    chart.legend(loc="outside right center", frameon=False, fontsize="small")
    return chart


def publish(
    tables: list[ExhaustiveTable],
    truths: dict[str, Truth],
    folders: list[Path],
    frame: pd.DataFrame,
    agreement: pd.DataFrame,
    output: Path,
    command: str,
    seen: Sequence[str] = (),
) -> None:
    """Write the page, its tables and its figure into `output`.

    `command` is what the page says to type; `seen` are tables that had been looked at when the default strategy was
    last changed, so that the others are judged apart, too.
    """
    summary = summarise(frame)
    verdicts = with_unseen(bars(frame, summary), frame, seen)
    write_frame(frame, output / "replays.csv")
    write_frame(summary, output / "summary.csv")
    write_frame(agreement, output / "scores.csv")
    save_figure(lambda: figure(summary), output / "regret.png")
    facts = {"tables": [table.name for table in tables], "command": command, "bars": verdicts}
    write_json(output / "about.json", {**facts, "versions": versions(), "machine": machine()})
    text = page(tables, truths, folders, frame, summary, agreement, verdicts, command, seen)
    write_text(output / "README.md", text)


INTRO = """
This page is made by that command from the numbers. A strategy sees validation accuracy alone. The optimum is the plan
with the best mean validation accuracy over the selection seeds, of all plans; it and every answer are judged on test
images with as many seeds that selected nothing. *Regret* is the optimum's test accuracy minus the answer's, so it may
be negative; *one standard error* is that of one plan's mean over those seeds, pooled over plans; cost counts full
trainings, and the exhaustive cost is every plan at every rate once, then the other seeds. A table holds few
selection seeds; a real search spends what is left on further ones. *Sufficient* is the smallest
number of trained blocks whose best plan is within one standard error of the optimum on validation. "Yes, not surely":
the mean reaches the bar, the bad end of the interval does not.

Replays differ in the strategy's own seed and in which of the table's selection seeds comes first.

A plan is judged at the learning rate that the whole table gives it, the one with the best mean over the selection
seeds. A strategy that saw fewer runs may have chosen another, at which a real search would have trained; the last two
columns of the second table say how often, and what that costs on validation.
"""
SEEN = """
The default strategy was last changed after a look at {seen}. Tables that had not been looked at then are the honest
test, and have a column of their own.
"""
UNSEEN = """
The default strategy was not changed after a look at any of these tables.
"""
REFERENCE = """
*Whole table* is no strategy but a reference: the same rule with every plan on every selection seed before it, at the
whole cost. What it misses, the table does not hold.
"""
FIGURE = """
![Regret and excess blocks against cost](regret.png)

*Mean over tables; band: 95 % t interval over tables of the default strategy.*
"""
TABLES = """
## Tables

Test accuracy in %, mean over unseen seeds ± one standard error (pooled over plans). `#` trains, `.` is frozen,
input to output. *Noise*: standard deviation of one training around plan and seed, in points. *SNR of size, of blocks*:
standard deviation over plans of the effect of the number of trained blocks, and of the blocks' additive effects within
plans of one size, corrected for noise, over the noise. *Reliability*: share of the variance between plans of one size
that is not noise; below 0.3 a table cannot tell them apart. bayes: mean over its replays. Trained for: processor
seconds added up.

| table | images (train, validation, test) | best plan | its test | all blocks | none | sufficient | noise | \
SNR of size | SNR of blocks | reliability | bayes: regret | bayes: blocks beyond | trained for |
| --- | --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""
SCORES = """
## Scores

Kendall τ between a plan's score (the sum over its trained blocks) and its test accuracy: over all plans, where
counting blocks is already worth `count`, and within plans of equally many blocks, where it is worth nothing. The
noise ceiling is one unseen seed against the mean of the others; a score is judged against the mean of all of them, so
that it may lie above. Mean over tables with 95 % t intervals; the tests are
in [score_truth](../score_truth/README.md).
"""
FILES = """
Files: `tables/` (every training), `replays.csv` (one row a replay), `summary.csv` (one row a strategy and budget),
`scores.csv`, `about.json` (versions, hardware, the bars as data).
"""


def page(
    tables: list[ExhaustiveTable],
    truths: dict[str, Truth],
    folders: list[Path],
    frame: pd.DataFrame,
    summary: pd.DataFrame,
    agreement: pd.DataFrame,
    verdicts: list[dict[str, Any]],
    command: str,
    seen: Sequence[str],
) -> str:
    """The page in Markdown: the bars first, then what lies behind them."""
    n_runs = int(frame.groupby(["pair", "strategy", "share"]).size().max())
    missed = [row["measure"] for row in verdicts if row["reached"] == "no"]
    abouts = [read_json(folder / "table.json", what="exhaustive table") for folder in folders]
    lines = [
        "# Does the freeze search find the right plan?",
        "",
        f"Judged on {len(tables)} tables in which every plan was really trained, with {n_runs} seeds of each strategy: "
        f"{len(verdicts) - len(missed)} of {len(verdicts)} bars are reached"
        + ("; missed: " + "; ".join(missed) if missed else "")
        + ".",
        "",
        ceiling_sentence(agreement),
        "",
        "```console",
        f"$ {command}",
        "```",
        INTRO,
        SEEN.format(seen=", ".join(seen)) if seen else UNSEEN,
        f"| {' | '.join(verdicts[0])} |" if verdicts else "",
        "| --- " * len(verdicts[0]) + "|" if verdicts else "",
    ]
    for row in verdicts:
        lines.append(f"| {' | '.join(row.values())} |")
    lines += [FIGURE, *strategy_rows(summary), TABLES.rstrip("\n")]
    own = frame[(frame["strategy"] == DEFAULT) & (frame["share"] == SHARE)]
    for table, about in zip(tables, abouts, strict=True):
        truth, part, known = truths[table.name], own[own["pair"] == table.name], Reliability.of(table)
        cells = [
            table.name,
            ", ".join(f"{about['counts'][key]:,}" for key in ("train", "validation", "test")),
            f"`{strip(truth.optimum)}`",
            *(
                f"{100 * truth.test[mask]:.1f} ± {100 * truth.stderr:.1f}"
                for mask in (truth.optimum, table.space.all, table.space.none)
            ),
            str(truth.sufficient),
            f"{100 * known.noise:.1f}",
            f"{known.snr_size:.1f}",
            f"{known.snr_blocks:.1f}",
            f"{known.within:.2f}",
            f"{part['regret'].mean():+.2f}",
            f"{part['excess_blocks'].mean():+.2f}",
            f"{about['seconds'] / 60:.0f} min",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Each was made by one resumable command (`--dry-run` states its cost):", ""]
    lines += [f"- `{about['command']}`" for about in abouts]
    return "\n".join([*lines, SCORES, *agreement_rows(agreement), FILES])


def ceiling_sentence(agreement: pd.DataFrame) -> str:
    """How much there is to find in the tables at all."""
    values = agreement.loc[agreement["score"] == "noise ceiling", "tau_within"].dropna().tolist()
    mean, interval = _with_interval(values).split(" | ")
    return (
        f"How much there is to find: within plans of one size the order by one seed agrees with the mean of the others "
        f"by τ = {mean} ({interval}, {len(values)} tables). Near 0 the plans of a size hardly differ, or the noise of "
        "trainings hides it, and then no strategy can do much better than another."
    )


def strategy_rows(summary: pd.DataFrame) -> list[str]:
    """Every strategy at the budget at which the default is judged."""
    heads = ["strategy", "regret, points", "95 % interval over tables", "blocks beyond sufficient"]
    heads += ["at most one more", "worse than all by 1 standard error", "replays"]
    heads += ["another rate", "its cost, points"]
    lines = [
        f"## Strategies at {100 * SHARE:.0f} % of the exhaustive cost",
        "",
        f"| {' | '.join(heads)} |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    everything = summary["strategy"] == WHOLE_TABLE
    for _, row in summary[(summary["share"] == SHARE) | everything].sort_values("share").iterrows():
        cells = [
            row["strategy"],
            f"{row['regret']:+.2f}",
            f"{row['regret_low']:+.2f} to {row['regret_high']:+.2f}",
            f"{row['excess_blocks']:+.2f}",
            f"{100 * row['at_most_one_more']:.0f} %",
            f"{100 * row['below_all_by_1se']:.0f} %",
            str(row["n_replays"]),
            f"{100 * row['other_lr']:.0f} %",
            f"{row['lr_loss']:+.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, REFERENCE] if everything.any() else lines
