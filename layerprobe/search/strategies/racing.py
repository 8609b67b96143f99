"""The default: scores propose, short annealed rungs thin out, full-length runs decide."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from layerprobe.search.bench import Bench, accuracy_of
from layerprobe.search.space import Mask, Space, Trial, structured_masks
from layerprobe.search.strategies.base import frontier
from layerprobe.search.surrogate import PlanModel, Scores, draw_by_scores
from layerprobe.search.verdict import Finalist

POOL = 256
"""Plans considered at all; every plan where there are no more than this many."""

ANCHORS = 5
"""Sizes at which a full-length trial shows how far the short runs are to be believed."""

BATCH = 4
"""Full-length trials between two looks at the model; part of the search's definition, not of the hardware."""


class Racing:
    """Score-guided racing.

    1. Pool: every allowed plan, or simple families plus plans that the scores and their uncertainty propose.
    2. Rung 0 (half of the exploring budget): a spread of sizes at every learning rate, short schedules that
       anneal fully.
    3. Anchors: one full-length trial at each of a few sizes, from all to none. Short runs favour plans that
       learn fast, which are seldom the small ones, and by how much shows only at full length.
    4. A model over plans (`PlanModel`) reads those and picks full-length trials in small batches: the plan
       that may be best, and for each size from the smallest upwards the plan that may be good enough.
    5. Finals on common seeds and the one-standard-error rule follow for every strategy (`run_strategy`).
    """

    name = "racing"

    def explore(self, bench: Bench) -> None:
        pool = candidate_pool(bench.space, bench.scores, bench.rng)
        short = [Trial(mask, lr, 0, bench.fidelity) for mask in pool for lr in bench.lrs]
        share = 0.5 * bench.left
        per_mask = bench.price(short) / len(pool)
        n_short = int(np.clip(share / per_mask, 1, len(pool)))
        self._pool = pool
        spread = spread_of_sizes(pool, n_short, bench.scores, bench.rng)
        bench.value([Trial(mask, lr, 0, bench.fidelity) for mask in spread for lr in bench.lrs])
        bench.value(self._anchors(bench))
        while True:
            wanted = self._next_batch(bench)
            if not wanted or len(bench.value(wanted)) < len(wanted):
                return

    def shortlist(self, bench: Bench, n: int) -> list[Mask]:
        """The model's best plan, then the smallest that may be as good, then the rest of the frontier."""
        tried = [mask for mask in bench.valued_masks() if bench.full(mask)] or bench.valued_masks()
        model = self._model(bench)
        if model is None:
            return frontier(bench, n)
        mean, deviation = self._at_best_lr(bench, model, tried)
        values = dict(zip(tried, mean.tolist(), strict=True))
        order = frontier(bench, len(tried), estimate=values)
        if bench.objective == "accuracy":
            return order[:n]
        best = order[0]
        tolerance = model.noise / math.sqrt(bench.seeds)
        sure = dict(zip(tried, deviation.tolist(), strict=True))
        champions = self._champions(tried, values)
        plausible = [
            mask
            for _, mask in sorted(champions.items())
            if sum(mask) < sum(best) and values[mask] + sure[mask] >= values[best] - tolerance
        ]
        return list(dict.fromkeys([best, *plausible, *order]))[:n]

    def judge(self, bench: Bench, finalists: list[Finalist]) -> list[Finalist]:
        """Finalists with the model's estimate at their own learning rates, after all runs."""
        model = self._model(bench)
        if model is None or not finalists:
            return finalists
        mean, deviation = model.predict([Trial(finalist.mask, finalist.lr) for finalist in finalists])
        return [
            replace(finalist, shrunk=float(value), stderr=float(spread))
            for finalist, value, spread in zip(finalists, mean, deviation, strict=True)
        ]

    def _anchors(self, bench: Bench) -> list[Trial]:
        """The plan of each anchor size that the short runs hold for the best, at full length."""
        model = self._model(bench)
        if model is None:
            return []
        mean, _ = self._at_best_lr(bench, model, self._pool)
        champions = self._champions(self._pool, dict(zip(self._pool, mean.tolist(), strict=True)))
        sizes = coarse_to_fine(sorted(champions))[:ANCHORS]
        return [Trial(champions[size], self._rates[champions[size]]) for size in sizes]

    def _next_batch(self, bench: Bench) -> list[Trial]:
        model = self._model(bench)
        if model is None:
            return []
        mean, deviation = self._at_best_lr(bench, model, self._pool)
        rates = self._rates
        upper = dict(zip(self._pool, (mean + deviation).tolist(), strict=True))
        open_masks = [mask for mask in self._pool if Trial(mask, rates[mask]) not in bench.history]
        if not open_masks:
            return []
        target = float(mean.max()) - model.noise / math.sqrt(bench.seeds)
        hopeful = max(open_masks, key=lambda mask: (upper[mask], -sum(mask)))
        champions = self._champions(open_masks, upper)
        good_enough = [mask for _, mask in sorted(champions.items()) if upper[mask] >= target]
        chosen = list(dict.fromkeys([hopeful, *good_enough]))
        if bench.objective == "accuracy":
            chosen = sorted(open_masks, key=lambda mask: -upper[mask])
        return [Trial(mask, rates[mask]) for mask in chosen[:BATCH]]

    def _model(self, bench: Bench) -> PlanModel | None:
        known = {
            trial: accuracy_of(outcome)
            for trial, outcome in bench.history.items()
            if math.isfinite(accuracy_of(outcome)) and trial.is_plan
        }
        if len(known) < 2:
            return None
        model = PlanModel(bench.space.n_blocks, bench.lrs, bench.scores)
        return model.fit(list(known), list(known.values()))

    def _at_best_lr(self, bench: Bench, model: PlanModel, masks: list[Mask]) -> tuple[np.ndarray, np.ndarray]:
        mean, deviation = model.predict([Trial(mask, lr) for mask in masks for lr in bench.lrs])
        table = mean.reshape(len(masks), len(bench.lrs))
        for row, mask in enumerate(masks):
            for rate in bench.failed_rates(mask):
                # The model knows finite accuracies alone, and would go on hoping for this one.
                table[row, bench.lrs.index(rate)] = -math.inf
        chosen = table.argmax(axis=1)
        rows = np.arange(len(masks))
        self._rates = {mask: bench.lrs[rate] for mask, rate in zip(masks, chosen, strict=True)}
        return table[rows, chosen], deviation.reshape(table.shape)[rows, chosen]

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
            pool.setdefault(space.repair(draw_by_scores(scores, space.n_blocks, size, rng)))
    return list(pool)


def spread_of_sizes(pool: list[Mask], n: int, scores: Scores, rng: np.random.Generator) -> list[Mask]:
    """`n` plans of the pool: everything and nothing first, then sizes in turn, score proposals foremost."""
    by_size: dict[int, list[Mask]] = {}
    for mask in pool:
        by_size.setdefault(sum(mask), []).append(mask)
    n_blocks = len(pool[0])
    for size, masks in by_size.items():
        wished = [draw_by_scores(scores, n_blocks, size, rng) for _ in range(2)]
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


def coarse_to_fine(sizes: list[int]) -> list[int]:
    """The ends first, then middles of ever smaller gaps, so that any leading part is spread out.

    >>> coarse_to_fine([0, 1, 2, 3, 4])
    [4, 0, 2, 1, 3]
    """
    order = [sizes[-1], sizes[0]]
    gaps = [(0, len(sizes) - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(sizes[middle])
            gaps += [(low, middle), (middle, high)]
    return list(dict.fromkeys(order))
