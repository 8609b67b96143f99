"""The default: learning rates compared at full length, then a model proposes (plan, rate), then finals decide."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from layerprobe.search.bench import Bench, accuracy_of
from layerprobe.search.space import Mask, Space, Trial, mask_of, structured_masks
from layerprobe.search.strategies.base import coarse_to_fine, frontier
from layerprobe.search.surrogate import PlanModel, Scores, order_by_scores

POOL = 256
"""Plans considered at all; every plan where there are no more than this many."""

SPREAD = 5
"""Sizes at which one full-length trial comes before the model chooses freely."""

BATCH = 4
"""Full-length trials between two looks at the model; part of the search's definition, not of the hardware."""


class Racing:
    """Score-guided racing.

    1. Pool: every allowed plan where there are at most `POOL`, else simple families plus plans that the scores and
       their uncertainty propose. In the first case the scores enter the model alone, as far as trainings bear them
       out; they are not shown to help there (results/freeze_search).
    2. Anchors: the largest and the smallest plan at every learning rate, at full length. How the best rate moves
       with the number of trained blocks shows there; short runs favour other rates, and other plans, and stand in
       only where the budget does not pay for full ones.
    3. Where the pool does not hold every plan, half of what is left to explore goes into short schedules that
       anneal fully, over a spread of sizes: they cover more blocks than a few long runs can.
    4. A model over plans and rates (`PlanModel`) reads all that and picks full-length trials, each at the rate that
       may suit the plan: one at each of a few sizes, then in small batches the plan that may be best, and for each
       size the plan that may be good enough.
    5. The model's shortlist goes into the finals on common seeds, at the model's rates, and the one-standard-error
       rule follows as for every strategy (`run_strategy`).
    """

    name = "racing"
    _fitted: tuple[dict[Trial, float], PlanModel] | None = None
    """The last model and what it was fitted to: finalists ask for it one by one."""

    def explore(self, bench: Bench) -> None:
        self._pool = pool = candidate_pool(bench.space, bench.scores, bench.rng)
        ends = list(dict.fromkeys([max(pool, key=sum), min(pool, key=sum)]))
        anchors = [Trial(mask, lr) for mask in ends for lr in bench.lrs]
        if bench.price(anchors) > bench.left + 1e-9:
            # Half of the grid at full length compares no rates; the whole of it in short runs does.
            anchors = [replace(trial, fidelity=bench.fidelity) for trial in anchors]
        bench.value(anchors)
        if bench.space.count_upper() > len(pool):
            self._short_rung(bench)
        bench.value(self._proposals(bench, spread=True))
        while True:
            wanted = self._proposals(bench)
            if not wanted or len(bench.value(wanted)) < len(wanted):
                return

    def shortlist(self, bench: Bench, n: int) -> list[Mask]:
        """The model's best plan, then the smallest that may be as good, then the rest of the frontier.

        Plans of the whole pool, tried or not: the finals try them.
        """
        model = self._model(bench)
        if model is None:
            return frontier(bench, n)
        mean, deviation, _ = self._at_best_lr(bench, model, self._pool)
        values = dict(zip(self._pool, mean.tolist(), strict=True))
        order = frontier(bench, len(self._pool), estimate=values)
        if bench.objective == "accuracy":
            return order[:n]
        if not order:  # nothing that the model would train; what was valued may know better
            return frontier(bench, n)
        best = order[0]
        tolerance = model.noise / math.sqrt(bench.seeds)
        sure = dict(zip(self._pool, deviation.tolist(), strict=True))
        plausible = [
            mask
            for _, mask in sorted(self._champions(self._pool, values).items())
            if sum(mask) < sum(best) and values[mask] + sure[mask] >= values[best] - tolerance
        ]
        return list(dict.fromkeys([best, *plausible, *order]))[:n]

    def rate(self, bench: Bench, mask: Mask) -> float:
        """The plan's learning rate by the model, which knows what suits its relatives."""
        model = self._model(bench)
        if model is None:
            return bench.best_lr(mask)
        return self._at_best_lr(bench, model, [mask])[2][0]

    def _short_rung(self, bench: Bench) -> None:
        price = bench.price([Trial(mask, lr, 0, bench.fidelity) for mask in self._pool for lr in bench.lrs])
        n_short = int(np.clip(0.5 * bench.left * len(self._pool) / price, 1, len(self._pool)))
        spread = spread_of_sizes(self._pool, n_short, bench.scores, bench.rng)
        bench.value([Trial(mask, lr, 0, bench.fidelity) for mask in spread for lr in bench.lrs])

    def _proposals(self, bench: Bench, *, spread: bool = False) -> list[Trial]:
        """Untried full-length trials by what the model hopes of them: at a spread of sizes, or the next batch."""
        model = self._model(bench)
        if model is None:
            return []
        mean, deviation = self._predict(bench, model, self._pool)
        target = float(mean.max()) - model.noise / math.sqrt(bench.seeds)
        upper = mean + deviation
        for row, mask in enumerate(self._pool):
            for column, lr in enumerate(bench.lrs):
                if Trial(mask, lr) in bench.history:
                    upper[row, column] = -math.inf
        hope = dict(zip(self._pool, upper.max(axis=1).tolist(), strict=True))
        rates = dict(zip(self._pool, upper.argmax(axis=1).tolist(), strict=True))
        open_masks = [mask for mask in self._pool if math.isfinite(hope[mask])]
        if not open_masks:
            return []
        champions = self._champions(open_masks, hope)
        if spread:
            chosen = [champions[size] for size in coarse_to_fine(sorted(champions))[:SPREAD]]
        elif bench.objective == "accuracy":
            chosen = sorted(open_masks, key=lambda mask: -hope[mask])[:BATCH]
        else:
            hopeful = max(open_masks, key=lambda mask: (hope[mask], -sum(mask)))
            good_enough = [mask for _, mask in sorted(champions.items()) if hope[mask] >= target]
            chosen = list(dict.fromkeys([hopeful, *good_enough]))[:BATCH]
        return [Trial(mask, bench.lrs[rates[mask]]) for mask in chosen]

    def _model(self, bench: Bench) -> PlanModel | None:
        known = {
            trial: accuracy_of(outcome)
            for trial, outcome in bench.history.items()
            if math.isfinite(accuracy_of(outcome)) and trial.is_plan
        }
        if len(known) < 2:
            return None
        if self._fitted is None or self._fitted[0] != known:
            model = PlanModel(bench.space.n_blocks, bench.lrs, bench.scores)
            self._fitted = known, model.fit(list(known), list(known.values()))
        return self._fitted[1]

    def _predict(self, bench: Bench, model: PlanModel, masks: list[Mask]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation at full length, plan by rate; −inf where the plan cannot be trained.

        The model knows finite accuracies alone, and would go on hoping for a rate that fails; trainings diverge
        at large rates, so those above it fall with it, up to one that this plan was trained at.
        """
        mean, deviation = (
            values.reshape(len(masks), len(bench.lrs))
            for values in model.predict([Trial(mask, lr) for mask in masks for lr in bench.lrs])
        )
        for row, mask in enumerate(masks):
            if failed := bench.failed_rates(mask):
                trained = max((lr for lr in bench.full(mask) if lr not in failed), default=0.0)
                lost = [lr in failed or lr > max(min(failed), trained) for lr in bench.lrs]
                mean[row, lost] = -math.inf
        return mean, deviation

    def _at_best_lr(
        self, bench: Bench, model: PlanModel, masks: list[Mask]
    ) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """Mean, deviation and rate of each plan at the rate with the best mean."""
        mean, deviation = self._predict(bench, model, masks)
        chosen, rows = mean.argmax(axis=1), np.arange(len(masks))
        return mean[rows, chosen], deviation[rows, chosen], [bench.lrs[index] for index in chosen]

    @staticmethod
    def _champions(masks: list[Mask], value: dict[Mask, float]) -> dict[int, Mask]:
        champions: dict[int, Mask] = {}
        for mask in masks:
            size = sum(mask)
            if size not in champions or value[mask] > value[champions[size]]:
                champions[size] = mask
        return champions


def candidate_pool(space: Space, scores: Scores, rng: np.random.Generator) -> list[Mask]:
    """Every allowed plan when there are at most `POOL`; else families, score proposals and random plans."""
    if space.count_upper() <= POOL:
        return list(space.masks())
    pool = dict.fromkeys([*structured_masks(space, "prefix"), *structured_masks(space, "suffix")][:POOL])
    attempts = 0
    while len(pool) < POOL and attempts < 20 * POOL:
        attempts += 1
        if attempts % 3 == 0:
            pool.setdefault(space.random_mask(rng))
        else:
            size = int(rng.integers(1, space.n_blocks))
            order = order_by_scores(scores, space.n_blocks, rng)
            # With the order, so that constraints cost the blocks that the score wants least.
            pool.setdefault(space.repair(mask_of(order[:size], space.n_blocks), order))
    return list(pool)


def spread_of_sizes(pool: list[Mask], n: int, scores: Scores, rng: np.random.Generator) -> list[Mask]:
    """`n` plans of the pool: everything and nothing first, then sizes in turn, score proposals foremost."""
    by_size: dict[int, list[Mask]] = {}
    for mask in pool:
        by_size.setdefault(sum(mask), []).append(mask)
    n_blocks = len(pool[0])
    for size, masks in by_size.items():
        wished = [mask_of(order_by_scores(scores, n_blocks, rng)[:size], n_blocks) for _ in range(2)]
        rest = [masks[index] for index in rng.permutation(len(masks))]
        by_size[size] = [mask for mask in dict.fromkeys([*wished, *rest]) if mask in set(masks)]
    order = coarse_to_fine(sorted(by_size))
    chosen: list[Mask] = []
    depth = 0
    while len(chosen) < min(n, len(pool)):
        for size in order:
            if depth < len(by_size[size]):
                chosen.append(by_size[size][depth])
        depth += 1
    return chosen[:n]
