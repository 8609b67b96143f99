"""Searches replayed on stored tables of every plan, and how good a search was.

A table holds, for every mask: runs on the selection repeats at every learning rate, and runs on unseen repeats,
with test accuracy, at the mask's own rate.
Replaying costs no training, so strategies are compared in seconds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from layerprobe.errors import BrokenFileError, UsageError
from layerprobe.files import read_json
from layerprobe.search.budget import TrialBudget
from layerprobe.search.settings import Settings
from layerprobe.search.space import REPORT_REPEAT, Mask, Space, Trial, parse_strip, strip
from layerprobe.search.strategies import make_strategy, run_strategy
from layerprobe.training import Outcome

WHOLE_TABLE = "whole table"
"""Name of the answer that sees everything, among the strategies."""
NULL_SNR = 0.3
"""A table with a smaller signal-to-noise ratio of size and of blocks counts as one without differences."""

COLUMNS = ("plan", "lr", "repeat", "validation_accuracy", "test_accuracy", "seconds")


@dataclass(kw_only=True)
class ExhaustiveTable:
    """Every plan of one (model, task) pair, really trained.

    Attributes
    ----------
    name : of the pair. space : its plans. lrs, seeds : how it was made; `seeds` selection repeats.
    outcomes : trial → outcome. scores : per-block scores, name → (value, standard error).
    """

    name: str
    space: Space
    lrs: tuple[float, ...]
    seeds: int
    outcomes: dict[Trial, Outcome]
    scores: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def masks(self) -> list[Mask]:
        return list(self.space.masks())

    def own_lr(self, mask: Mask) -> float:
        """The mask's learning rate: best mean validation accuracy over the selection repeats that have every rate."""
        compared = [
            [self._accuracy(Trial(mask=mask, lr=lr, repeat=repeat)) for lr in self.lrs]
            for repeat in range(self.seeds)
            if all(Trial(mask=mask, lr=lr, repeat=repeat) in self.outcomes for lr in self.lrs)
        ]
        means = np.mean(compared, axis=0)
        return self.lrs[min(range(len(self.lrs)), key=lambda i: (-means[i], self.lrs[i]))]

    def validation(self, mask: Mask, lr: float | None = None) -> np.ndarray:
        """Validation accuracy per selection repeat, at the mask's own rate or another."""
        lr = self.own_lr(mask) if lr is None else lr
        return np.array(
            [self._accuracy(Trial(mask=mask, lr=lr, repeat=repeat)) for repeat in range(self.seeds)]
        )

    def test(self, mask: Mask) -> np.ndarray:
        """Test accuracy per unseen repeat, at the mask's own rate."""
        lr = self.own_lr(mask)
        found: list[float | None] = []
        while (trial := Trial(mask=mask, lr=lr, repeat=REPORT_REPEAT + len(found))) in self.outcomes:
            found.append(self.outcomes[trial].test_accuracy)
        return np.array(found, dtype=float)

    def exhaustive_cost(self) -> float:
        """Full trainings of an exhaustive search by the same rules: every rate once, then the other seeds."""
        per_mask = len(self.lrs) + self.seeds - 1
        return sum(per_mask * self.space.cost(Trial(mask=mask, lr=self.lrs[0])) for mask in self.masks)

    def value(self, trials: Sequence[Trial]) -> Mapping[Trial, Outcome]:
        """Answers from the table; UsageError for a trial that it does not hold."""
        missing = [trial for trial in trials if trial not in self.outcomes]
        if missing:
            raise UsageError(f"table {self.name} does not hold {missing[0].key} ({len(missing)} missing)")
        return {trial: self.outcomes[trial] for trial in trials}

    def budget(self, total: float, *, seed: int, use_scores: bool = True) -> TrialBudget:
        """A budget whose trials are looked up in this table.

        The search's first repeat is the table's repeat `seed` modulo their number, and so on around: what a search
        sees first decides much, also for a strategy that draws nothing at random.
        """

        def value(trials: Sequence[Trial]) -> Mapping[Trial, Outcome]:
            stored = {trial: self._turned(trial, seed) for trial in trials}
            answers = self.value(list(stored.values()))
            return {trial: answers[source] for trial, source in stored.items()}

        return TrialBudget(
            space=self.space,
            train_batch=value,
            settings=Settings(lrs=self.lrs, seed=seed),
            total=total,
            n_seeds=self.seeds,
            scores=self.scores if use_scores else {},
        )

    def _turned(self, trial: Trial, by: int) -> Trial:
        """The stored trial behind a replay's."""
        return replace(trial, repeat=(trial.repeat + by) % self.seeds)

    def _accuracy(self, trial: Trial) -> float:
        return self.outcomes[trial].ranked_accuracy

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ExhaustiveTable:
        """Read `table.csv.gz` and `table.json` of a folder.

        Raises
        ------
        BrokenFileError : missing, damaged, or incomplete.
        """
        source = Path(folder)
        about = read_json(source / "table.json", what="exhaustive table")
        try:
            frame = pd.read_csv(source / "table.csv.gz", float_precision="round_trip")
            table = cls(
                name=about["name"],
                space=Space(tuple(about["block_params"])),
                lrs=tuple(about["lrs"]),
                seeds=int(about["seeds"]),
                outcomes={
                    Trial(
                        mask=parse_strip(r.plan),
                        lr=float(r.lr),
                        repeat=int(r.repeat),
                    ): Outcome(
                        validation_accuracy=None
                        if math.isnan(r.validation_accuracy)
                        else float(r.validation_accuracy),
                        test_accuracy=None if math.isnan(r.test_accuracy) else float(r.test_accuracy),
                        train_seconds=float(r.seconds),
                    )
                    for r in frame[list(COLUMNS)].itertuples(index=False)
                },
                scores={
                    name: (np.array(value, dtype=float), np.array(stderr, dtype=float))
                    for name, (value, stderr) in about["scores"].items()
                },
            )
        except (OSError, EOFError, KeyError, ValueError, TypeError) as error:
            raise BrokenFileError(f"cannot read the exhaustive table in {source}: {error}") from error
        needed = selection_trials(table.space, table.lrs, table.seeds)
        missing = [trial.key for trial in needed if trial not in table.outcomes]
        if not missing:  # a mask's own rate is known
            judging = judging_trials(table.space, table.own_lr, table.seeds)
            missing = [trial.key for trial in judging if trial not in table.outcomes]
        if missing:
            raise BrokenFileError(f"the table in {source} lacks {len(missing)} trials (first: {missing[0]})")
        return table


def selection_trials(space: Space, lrs: Sequence[float], seeds: int) -> list[Trial]:
    """What a table trains before it knows each mask's own rate: every rate and repeat."""
    masks = list(space.masks())
    return [Trial(mask=mask, lr=lr, repeat=repeat) for repeat in range(seeds) for mask in masks for lr in lrs]


def judging_trials(space: Space, own_lr: Callable[[Mask], float], seeds: int) -> list[Trial]:
    """What a table trains to judge by: unseen repeats with test accuracy, at each mask's own rate."""
    return [
        Trial(mask=mask, lr=own_lr(mask), repeat=REPORT_REPEAT + seed)
        for seed in range(seeds)
        for mask in space.masks()
    ]


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a table says is right. Accuracies are shares; `stderr` is that of one plan's mean test accuracy."""

    validation: dict[Mask, float]
    test: dict[Mask, float]
    optimum: Mask
    stderr: float
    sufficient: int
    """Smallest number of trained blocks whose best plan is within one standard error of the optimum."""

    @classmethod
    def of(cls, table: ExhaustiveTable) -> Truth:
        validation = {mask: float(table.validation(mask).mean()) for mask in table.masks}
        # A plan of which a run failed is worth nothing, in validation as in test: it ranks last.
        test = {mask: float(np.mean(np.nan_to_num(table.test(mask), nan=-np.inf))) for mask in table.masks}
        optimum = max(validation, key=lambda mask: (validation[mask], -table.space.params(mask)))
        bar = validation[optimum] - _pooled([table.validation(mask) for mask in table.masks])
        sufficient = min(sum(mask) for mask, value in validation.items() if value >= bar)
        return cls(
            validation=validation,
            test=test,
            optimum=optimum,
            stderr=_pooled([table.test(mask) for mask in table.masks]),
            sufficient=sufficient,
        )


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """How much a table says about its plans, from the judging seeds.

    Attributes
    ----------
    noise : standard deviation of one training's test accuracy around its plan and seed, a share.
    snr_size, snr_blocks : standard deviation over plans of the effect of the number of trained blocks, and of an
        additive effect of the blocks within plans of one size, each corrected for noise, over `noise`.
    within : share of the variance between plans of one size that is not noise, in [0, 1] (of their means over seeds).
    """

    noise: float
    snr_size: float
    snr_blocks: float
    within: float

    @property
    def null(self) -> bool:
        """Whether the plans of the table hardly differ: neither their size nor their blocks stand out of the noise."""
        return max(self.snr_size, self.snr_blocks) < NULL_SNR

    @classmethod
    def of(cls, table: ExhaustiveTable) -> Reliability:
        rows = np.array([table.test(mask) for mask in table.masks])
        kept = np.isfinite(rows).all(axis=1)
        rows, masks = rows[kept], np.array(table.masks, dtype=float)[kept]
        n_plans, n_seeds = rows.shape
        means = rows.mean(axis=1)
        residual = rows - means[:, None] - rows.mean(axis=0) + rows.mean()
        variance = float((residual**2).sum()) / ((n_plans - 1) * (n_seeds - 1))
        of_mean = variance / n_seeds
        sizes = masks.sum(axis=1)
        by_size = np.array([sizes == size for size in np.unique(sizes)], dtype=float)
        by_size /= by_size.sum(axis=1, keepdims=True)
        level = (by_size > 0).T @ (by_size @ means)
        within = means - level
        centred = masks - (by_size > 0).T @ (by_size @ masks)
        fitted = centred @ np.linalg.pinv(centred) @ within
        n_sizes, n_free = len(by_size), int(np.linalg.matrix_rank(centred))

        def true_variance(effect: np.ndarray, freedom: int) -> float:
            return max(0.0, float((effect**2).sum()) - freedom * of_mean) / n_plans

        between = float((within**2).sum()) / max(1, n_plans - n_sizes)
        noise = math.sqrt(variance)
        return cls(
            noise=noise,
            snr_size=math.sqrt(true_variance(level - means.mean(), n_sizes - 1)) / noise,
            snr_blocks=math.sqrt(true_variance(fitted, n_free)) / noise,
            within=max(0.0, 1.0 - of_mean / between) if between > 0 else 0.0,
        )


def replay(
    table: ExhaustiveTable,
    truth: Truth,
    strategy: str,
    budget: float,
    *,
    seed: int,
    use_scores: bool = True,
) -> dict[str, Any]:
    """Run one strategy on a table and measure what it found.

    Returns
    -------
    dict: strategy, pair, seed, budget, `spent`, `plan`, `regret` and `below_all` in accuracy points (positive = worse
    than the exhaustive optimum, than training everything; on test, unseen seeds), `stderr` in points,
    `lr` that the strategy chose, `own_lr` at which the table judges the plan, and `lr_loss`, what the
    difference costs on validation in points (a search would have trained at the former), `cost_share` of the
    exhaustive cost, `excess_blocks` beyond the smallest sufficient plan.
    """
    trials = table.budget(budget, seed=seed, use_scores=use_scores)
    mask, lr = run_strategy(make_strategy(strategy), trials)
    return {
        "pair": table.name,
        "strategy": strategy,
        "seed": seed,
        "budget": budget,
        "spent": trials.spent,
        "cost_share": trials.spent / table.exhaustive_cost(),
        **_measures(table, truth, mask, lr),
    }


def whole_table(table: ExhaustiveTable, truth: Truth) -> dict[str, Any]:
    """What the one-standard-error rule answers when it sees every plan on every seed, measured like a `replay`.

    No search can be expected to do better than by luck: what this one misses, the table itself does not hold.
    """
    answer = frugal_plan(table, table.masks)
    return {
        "pair": table.name,
        "strategy": WHOLE_TABLE,
        "seed": 0,
        "budget": table.exhaustive_cost(),
        "spent": table.exhaustive_cost(),
        "cost_share": 1.0,
        **_measures(table, truth, answer, table.own_lr(answer)),
    }


def frugal_plan(table: ExhaustiveTable, masks: Sequence[Mask], *, tolerant: bool = True) -> Mask:
    """The plan with the fewest trained parameters within one standard error of the best mean validation accuracy.

    `tolerant=False`: the best alone.

    References
    ----------
    Breiman, Friedman, Olshen, Stone, Classification and Regression Trees, 1984, section 3.4.3.
    """
    values = {mask: table.validation(mask) for mask in masks}
    means = {mask: float(value.mean()) for mask, value in values.items()}
    bar = max(means.values()) - (_pooled(list(values.values())) if tolerant else 0.0)
    near = [mask for mask in masks if means[mask] >= bar]
    return min(near, key=lambda mask: (table.space.params(mask), -means[mask]))


def _measures(table: ExhaustiveTable, truth: Truth, answer: Mask, lr: float) -> dict[str, Any]:
    """The quality of an answer; columns as `replay` says."""
    own = table.own_lr(answer)
    return {
        "plan": strip(answer),
        "regret": 100 * (truth.test[truth.optimum] - truth.test[answer]),
        "below_all": 100 * (truth.test[table.space.all] - truth.test[answer]),
        "stderr": 100 * truth.stderr,
        "lr": lr,
        "own_lr": own,
        "lr_loss": 100 * (table.validation(answer).mean() - table.validation(answer, lr).mean()),
        "excess_blocks": sum(answer) - truth.sufficient,
    }


def _pooled(groups: Sequence[np.ndarray]) -> float:
    """Standard error of one group's mean, with the spread pooled over groups; 0 with one value each."""
    usable = [group[np.isfinite(group)] for group in groups]
    usable = [group for group in usable if len(group) > 1]
    if not usable:
        return 0.0
    variance = sum(float(((g - g.mean()) ** 2).sum()) for g in usable) / sum(len(g) - 1 for g in usable)
    return math.sqrt(variance / min(len(group) for group in usable))
