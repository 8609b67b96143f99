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
from layerprobe.search.verdict import Finalist, choose
from layerprobe.training import Outcome

WHOLE_TABLE = "whole table"
"""Name of the answer that sees everything, among the strategies."""

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
            settings=Settings(lrs=self.lrs, seeds=self.seeds, seed=seed),
            total=total,
            scores=self.scores if use_scores else {},
            max_repeats=self.seeds,
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
            frame = pd.read_csv(source / "table.csv.gz")
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
    dict: strategy, pair, seed, budget, plan, `regret` and `below_all` in accuracy points (positive = worse
    than the exhaustive optimum, than training everything; on test, unseen seeds), `stderr` in points,
    `lr` that the strategy chose, `own_lr` at which the table judges the plan, and `lr_loss`, what the
    difference costs on validation in points (a search would have trained at the former), `cost_share` of the
    exhaustive cost, `excess_blocks` beyond the smallest sufficient plan, `place` and `of` within plans of its
    size by test accuracy.
    """
    trials = table.budget(budget, seed=seed, use_scores=use_scores)
    chosen = choose(run_strategy(make_strategy(strategy), trials), table.space)
    return {
        "pair": table.name,
        "strategy": strategy,
        "seed": seed,
        "budget": budget,
        "spent": trials.spent,
        "cost_share": trials.spent / table.exhaustive_cost(),
        **_measures(table, truth, chosen),
    }


def whole_table(table: ExhaustiveTable, truth: Truth) -> dict[str, Any]:
    """What the one-standard-error rule answers when it sees every plan on every seed, measured like a `replay`.

    No search can be expected to do better than by luck: what this one misses, the table itself does not hold.
    """
    everyone = [Finalist(mask, table.own_lr(mask), tuple(table.validation(mask))) for mask in table.masks]
    return {
        "pair": table.name,
        "strategy": WHOLE_TABLE,
        "seed": 0,
        "budget": table.exhaustive_cost(),
        "spent": table.exhaustive_cost(),
        "cost_share": 1.0,
        **_measures(table, truth, choose(everyone, table.space)),
    }


def _measures(table: ExhaustiveTable, truth: Truth, chosen: Finalist) -> dict[str, Any]:
    """The quality of an answer; columns as `replay` says."""
    answer, own = chosen.mask, table.own_lr(chosen.mask)
    size = sum(answer)
    return {
        "plan": strip(answer),
        "regret": 100 * (truth.test[truth.optimum] - truth.test[answer]),
        "below_all": 100 * (truth.test[table.space.all] - truth.test[answer]),
        "stderr": 100 * truth.stderr,
        "lr": chosen.lr,
        "own_lr": own,
        "lr_loss": 100 * (table.validation(answer).mean() - table.validation(answer, chosen.lr).mean()),
        "excess_blocks": size - truth.sufficient,
        "place": place_of(truth, answer),
        "of": sum(sum(mask) == size for mask in truth.test),
    }


def upper_third_test(picks: Sequence[tuple[Truth, Sequence[Mask]]]) -> tuple[int, int, float]:
    """Plans in the upper third of all plans of their size, against chance, exactly.

    Replays of one table with several seeds often pick the same plan, so they are no independent cases. The null
    is therefore about the table: within a size, which plans make up the upper third is drawn at random, while the
    picks stay as they are. A plan picked seven times is seven hits or none.

    Parameters
    ----------
    picks : per table its truth and the picked plans, one per replay. Sizes with fewer than three plans have no
        upper third and are left out.

    Returns
    -------
    hits, cases, and the probability of at least so many hits by chance.
    """
    hits = cases = 0
    distribution = np.array([1.0])
    for truth, masks in picks:
        by_size: dict[int, list[Mask]] = {}
        for mask in masks:
            by_size.setdefault(sum(mask), []).append(mask)
        for size, picked in by_size.items():
            peers = [mask for mask in truth.test if sum(mask) == size]
            if len(peers) < 3:
                continue
            upper = {mask for mask in peers if place_of(truth, mask) <= len(peers) // 3}
            hits += sum(mask in upper for mask in picked)
            cases += len(picked)
            weights = [picked.count(mask) for mask in dict.fromkeys(picked)]
            distribution = np.convolve(distribution, _drawn_weight(weights, len(peers), len(upper)))
    return hits, cases, min(1.0, float(distribution[hits:].sum())) if cases else 1.0


def place_of(truth: Truth, mask: Mask) -> int:
    """Place of a plan among plans of its size by test accuracy, from 1; ties share the better place."""
    return 1 + sum(truth.test[other] > truth.test[mask] for other in truth.test if sum(other) == sum(mask))


def _drawn_weight(weights: Sequence[int], n: int, k: int) -> np.ndarray:
    """Distribution of the summed weight of `k` things drawn from `n` without replacement; the others weigh 0."""
    ways = np.zeros((len(weights) + 1, sum(weights) + 1))
    ways[0, 0] = 1.0
    for weight in weights:
        ways[1:, weight:] += ways[:-1, : ways.shape[1] - weight].copy()
    rest = n - len(weights)
    choices = [math.comb(rest, k - drawn) if 0 <= k - drawn <= rest else 0 for drawn in range(len(ways))]
    return np.asarray(np.array(choices) @ ways / math.comb(n, k))


def _pooled(groups: Sequence[np.ndarray]) -> float:
    """Standard error of one group's mean, with the spread pooled over groups; 0 with one value each."""
    usable = [group[np.isfinite(group)] for group in groups]
    usable = [group for group in usable if len(group) > 1]
    if not usable:
        return 0.0
    variance = sum(float(((g - g.mean()) ** 2).sum()) for g in usable) / sum(len(g) - 1 for g in usable)
    return math.sqrt(variance / min(len(group) for group in usable))
