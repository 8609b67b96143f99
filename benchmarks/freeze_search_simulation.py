"""The freeze search on made-up landscapes: regret, early stops, coverage of the verdict's intervals, and power.

    python benchmarks/freeze_search_simulation.py -o results/freeze_search_simulation   # an hour, mostly 24 blocks

No training: the expected accuracy of every plan is known, so that answers can be judged exactly. One training varies
by one point around its plan and seed, and seeds by another point. The landscapes are not drawn from the prior of the
search: one block that matters while the others harm a little, two that need each other, graded effects, effects by
depth, a rough landscape without additive structure, a flat one.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from layerprobe.errors import BudgetError
from layerprobe.files import write_json, write_text
from layerprobe.metrics.inference import PooledArms
from layerprobe.metrics.intervals import wilson_interval
from layerprobe.provenance import machine, versions
from layerprobe.search.budget import TrialBudget
from layerprobe.search.settings import Settings
from layerprobe.search.space import Mask, Space, Trial
from layerprobe.search.strategies import make_strategy, run_strategy
from layerprobe.search.verdict import LEVEL, Verdict, decide
from layerprobe.tables import render_table, write_frame
from layerprobe.training import Outcome

POINT = 0.01
LRS = (1e-3, 3e-3, 1e-2)
KINDS = ("one block", "two blocks", "graded", "depth", "rough", "flat")
SIZES = (6, 12, 24)
STRATEGIES = ("bayes", "random", "greedy")
BUDGETS = (12.0, 20.0, 40.0)
STOP_BUDGET = 60.0
"""Full trainings that a search on a flat landscape could spend."""


class Landscape:
    """Expected accuracy of every (plan, learning rate), seed effects, and noise that depends on the trial alone."""

    def __init__(self, kind: str, n_blocks: int, seed: int) -> None:
        draw = np.random.default_rng([seed, n_blocks, KINDS.index(kind)])
        self.kind, self.n_blocks, self.seed = kind, n_blocks, seed
        self.gains = np.zeros(n_blocks)
        self.pair: tuple[int, int] | None = None
        first, second = draw.permutation(n_blocks)[:2]
        if kind == "one block":
            self.gains[:] = -0.4 * 6 / n_blocks
            self.gains[first] = 6.0
        elif kind == "two blocks":
            self.gains[:] = -0.4 * 6 / n_blocks
            self.gains[[first, second]] = 2.5
            self.pair = int(first), int(second)
        elif kind == "graded":
            self.gains = draw.normal(0.0, 1.5 * (6 / n_blocks) ** 0.5, n_blocks)
        elif kind == "depth":
            self.gains = 1.5 * np.linspace(1, -1, n_blocks) * draw.choice([-1, 1]) * (6 / n_blocks) ** 0.5
        elif kind == "rough":
            self.gains = draw.normal(0.0, 0.5, n_blocks)
        self.best_rate = draw.uniform(0, len(LRS) - 1), draw.uniform(-1, 0)

    def value(self, mask: Mask, lr: float) -> float:
        flags = np.array(mask, dtype=float)
        points = float(flags @ self.gains)
        if self.pair is not None:
            points += 3.0 * float(flags[self.pair[0]] * flags[self.pair[1]])
        if self.kind == "rough":
            points += 1.5 * float(np.random.default_rng([self.seed, 7, *map(int, mask)]).standard_normal())
        base, tilt = self.best_rate
        points -= 0.6 * (LRS.index(lr) - (base + tilt * flags.mean())) ** 2
        return 0.4 + POINT * points

    def best(self, mask: Mask) -> float:
        return max(self.value(mask, lr) for lr in LRS)

    def accuracy(self, trial: Trial) -> float:
        seed_effect = np.random.default_rng([self.seed, 1, trial.repeat]).standard_normal()
        draw = np.random.default_rng([self.seed, 2, trial.repeat, LRS.index(trial.lr), *map(int, trial.mask)])
        return self.value(trial.mask, trial.lr) + POINT * float(seed_effect + draw.standard_normal())

    def train(self, trials: Sequence[Trial]) -> Mapping[Trial, Outcome]:
        return {trial: Outcome(validation_accuracy=self.accuracy(trial)) for trial in trials}

    def optimum(self) -> tuple[float, int]:
        """Largest expected accuracy, and the blocks of the smallest plan within half a point of it."""
        if self.n_blocks <= 12:
            masks = list(Space((1,) * self.n_blocks).masks())
        else:  # hill climbing from many starts; all but the rough landscape have one summit
            masks = [self._climb(start) for start in range(20)]
        values = np.array([self.best(mask) for mask in masks])
        near = values >= values.max() - 0.5 * POINT
        return float(values.max()), min(sum(mask) for mask, ok in zip(masks, near, strict=True) if ok)

    def _climb(self, start: int) -> Mask:
        mask = tuple((np.random.default_rng([self.seed, 3, start]).random(self.n_blocks) < 0.5).tolist())
        while True:
            steps = [tuple(f ^ (i == b) for i, f in enumerate(mask)) for b in range(self.n_blocks)]
            better = max(steps, key=self.best)
            if self.best(better) <= self.best(mask):
                return mask
            mask = better


def search(world: Landscape, strategy: str, total: float, seed: int) -> dict[str, Any]:
    """One search and what its answer is worth, in points."""
    budget = TrialBudget(
        space=Space((100,) * world.n_blocks),
        train_batch=world.train,
        settings=Settings(lrs=LRS, seed=seed),
        total=total,
    )
    mask, lr = run_strategy(make_strategy(strategy), budget)
    top, sufficient = world.optimum()
    return {
        "landscape": world.kind,
        "blocks": world.n_blocks,
        "strategy": strategy,
        "budget": total,
        "seed": seed,
        "spent": budget.spent,
        "trainings": len(budget.history),
        "regret": (top - world.best(mask)) / POINT,
        "excess_blocks": sum(mask) - sufficient,
        "settled": budget.left >= 2.0,
        "lr": lr,
    }


NOISES = {
    "equal noise": ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    "none hardly varies": ((1.0, 1.0, 0.1), (1.0, 1.0, 0.0)),
    "all is louder": ((0.5, 1.5, 0.5), (1.0, 1.0, 1.0)),
    "none has other seed effects": ((0.3, 0.3, 0.3), (1.0, 1.0, 0.0)),
}
"""Points by which one training of plan, all and none varies, and its share of the seed effect of one point."""
ARMS = {"plan": (True, False), "all": (True, True), "none": (False, False)}


def report(gap: float, noise: str, seeds: int, images: int, draw: np.random.Generator) -> Verdict:
    """One report: plan and none are `gap` better than all; one image in five is an arm's own, the others are alike."""
    levels, shares = NOISES[noise]
    ease, effects = draw.random(images), POINT * draw.standard_normal(seeds)
    values: dict[str, dict[int, float]] = {}
    correct: dict[str, np.ndarray] = {}
    for arm, level, share in zip(ARMS, levels, shares, strict=True):
        chance = 0.8 + gap * (arm != "all") + share * effects + POINT * level * draw.standard_normal(seeds)
        own = np.where(np.arange(images) % 5, ease, draw.random(images))
        right = own[None, :] < np.clip(chance, 0, 1)[:, None]
        values[arm] = dict(enumerate(right.mean(1).tolist()))
        correct[arm] = right.mean(0)
    pooled = PooledArms(values, n_images=images, correct=correct)
    return decide(ARMS, pooled, Space((1, 1)), tolerance=0.005, margin=0.03, n_seeds=seeds)


def intervals(n: int, seeds: int, noise: str, images: int = 1000) -> dict[str, Any]:
    """How often the intervals of a report hold the truth, and how often a difference becomes a claim that reports
    without differences say they would find in 8 of 10 cases."""
    before = [report(0.0, noise, seeds, images, np.random.default_rng([run, 98])) for run in range(n // 10)]
    gap = float(np.median([verdict.detectable for verdict in before if verdict.detectable is not None]))
    covered, claimed = dict.fromkeys(combinations(ARMS, 2), 0), 0
    for run in range(n):
        found = report(gap, noise, seeds, images, np.random.default_rng([run, 99])).differences
        for (first, second), e in found.items():
            truth = gap * ((first != "all") - (second != "all"))
            covered[first, second] += e.low is not None and e.high is not None and e.low <= truth <= e.high
        claimed += (found["plan", "all"].pvalue or 1.0) < LEVEL
    shares = [count / n for count in covered.values()]
    about = {"n": n, "seeds": seeds, "noise": noise, "difference": 100 * gap, "power": claimed / n}
    return about | {"covered": min(shares), "covered_most": max(shares)}


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    keys = ["landscape", "blocks", "budget", "strategy"]
    found = frame.groupby(keys, sort=False).agg(
        regret=("regret", "mean"),
        stderr=("regret", "sem"),
        at_most_one_more=("excess_blocks", lambda excess: float((excess <= 1).mean())),
        trainings=("trainings", "mean"),
        n=("seed", "size"),
    )
    return found.reset_index()


def page(summary: pd.DataFrame, flat: pd.DataFrame, reports: list[dict[str, Any]], command: str) -> str:
    cells = summary[summary["landscape"] != "flat"].set_index(["blocks", "landscape", "budget", "strategy"])
    rows = [
        {"blocks": blocks, "landscape": kind, "budget": f"{budget:g}"}
        | {row.strategy: f"{row.regret:.2f} ± {row.stderr:.2f}" for row in part.reset_index().itertuples()}
        for (blocks, kind, budget), part in cells.groupby(level=[0, 1, 2], sort=False)
    ]
    early = flat[flat["spent"] <= STOP_BUDGET / 2]
    low, high = wilson_interval(len(early), len(flat))
    frugal = summary[(summary["strategy"] == "bayes") & (summary["landscape"] != "flat")]
    lines = [
        "# The freeze search on made-up landscapes",
        "",
        f"Made by `{command}`. Regret in points of accuracy: expected accuracy of the best plan minus that of the "
        "answer, each at its best rate; one training varies by one point. Budgets in full trainings; mean over "
        f"{int(summary['n'].min())} landscapes each, "
        "± one standard error; n = that number of landscapes.",
        "",
        render_table(rows, "markdown"),
        "",
        f"- Flat landscape: {len(early)} of {len(flat)} searches stop before half of a budget of {STOP_BUDGET:g} "
        f"({100 * len(early) / len(flat):.0f} %, 95 % interval {100 * low:.0f} to {100 * high:.0f}).",
        f"- At most one block more than the smallest plan within half a point: "
        f"{100 * frugal['at_most_one_more'].mean():.0f} % of searches.",
        "",
        f"Reports on plan, all and none ({reports[0]['n']:,} each, 1,000 test images), where the ways of training are "
        "equally noisy and where they are not. *Covered*: how often the 95 % interval of a difference holds the truth, "
        "least and most over the three pairs. *Found*: how often the difference that a report says it would find in 8 "
        "of 10 cases is a claim.",
        "",
        render_table(
            [
                {
                    "noise": r["noise"],
                    "seeds": r["seeds"],
                    "covered, %": f"{100 * r['covered']:.1f} to {100 * r['covered_most']:.1f}",
                    "difference, points": f"{r['difference']:.1f}",
                    "found, %": f"{100 * r['power']:.0f}",
                }
                for r in reports
            ],
            "markdown",
        ),
        "",
        "Files: `searches.csv` (one row a search), `summary.csv`, `about.json`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="landscapes of each kind and size")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of blocks")
    parser.add_argument("--reports", type=int, default=2000)
    parser.add_argument("--searches", help="searches.csv of an earlier call, instead of searching again")
    parser.add_argument("--output", "-o", default=None)
    arguments = parser.parse_args()
    frame = pd.read_csv(arguments.searches) if arguments.searches else searches(arguments)
    summary, flat = summarise(frame), frame[frame["landscape"] == "flat"]
    reports = [intervals(arguments.reports, n, noise) for noise in NOISES for n in (3, 5, 8)]
    command = shlex.join(["python", *sys.argv])
    text = page(summary, flat, reports, command)
    print(text)
    if arguments.output is not None:
        folder = Path(arguments.output)
        write_frame(frame, folder / "searches.csv")
        write_frame(summary, folder / "summary.csv")
        write_json(
            folder / "about.json",
            {"command": command, "reports": reports, "versions": versions(), "machine": machine()},
        )
        write_text(folder / "README.md", text)


def searches(arguments: argparse.Namespace) -> pd.DataFrame:
    """One row a search."""
    rows = []
    for n_blocks in arguments.sizes:
        for kind in KINDS:
            budgets = (STOP_BUDGET,) if kind == "flat" else BUDGETS
            for total in budgets:
                for strategy in STRATEGIES if kind != "flat" else ("bayes",):
                    for seed in range(arguments.runs):
                        try:
                            rows.append(search(Landscape(kind, n_blocks, seed), strategy, total, seed))
                        except BudgetError:
                            break
            print(f"{n_blocks} blocks, {kind}: done", file=sys.stderr, flush=True)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
