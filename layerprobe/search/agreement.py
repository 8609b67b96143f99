"""Is a transfer score's agreement with measured transfer more than chance? Permutations on a table of every plan."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from layerprobe.search.replay import ExhaustiveTable, Truth, score_agreement
from layerprobe.search.space import Mask

MAX_PERMUTATIONS = 720


class Agreement(NamedTuple):
    """Kendall τ of one score with measured transfer, within equal numbers of trained blocks, in [−1, 1].

    `per_seed` is τ with each unseen seed alone; `pvalue` is two-sided, `n_permutations` behind it.
    """

    tau: float
    per_seed: tuple[float, ...]
    pvalue: float
    n_permutations: int


def permutation_agreement(table: ExhaustiveTable, truth: Truth, *, seed: int = 0) -> dict[str, Agreement]:
    """τ within equal counts of every score of `table`, against assigning the scores to the blocks at random.

    A plan's score is the sum over its trained blocks. Under the null the L block values are exchangeable: all L!
    orders are tried, or `MAX_PERMUTATIONS` random ones where there are more. Ties in τ count against the score.

    Parameters
    ----------
    table : every plan of a model and task; its `scores` are judged. truth : `Truth.of(table)`.
    seed : of the random orders, used for more than six blocks.

    Returns
    -------
    score name → Agreement. τ is NaN where all plans of equal count have equal scores.

    References
    ----------
    PROTOCOL.md, section 6; Kendall, A new measure of rank correlation, Biometrika 30 (1938).
    """
    orders = _orders(table.space.n_blocks, seed)
    found = {}
    seeds = _per_seed(table, truth)
    for name, (value, _) in table.scores.items():
        spread = np.zeros_like(value)
        shuffled = {f"{index}": (value[list(order)], spread) for index, order in enumerate(orders)}
        null = [
            row["tau_within"]
            for row in score_agreement(replace(table, scores=shuffled), truth)
            if row["score"] in shuffled
        ]
        own = replace(table, scores={"own": (value, spread)})
        tau, *alone = (
            next(row["tau_within"] for row in score_agreement(own, one) if row["score"] == "own")
            for one in (truth, *seeds)
        )
        if math.isnan(tau):
            found[name] = Agreement(tau, tuple(alone), math.nan, len(orders))
            continue
        extreme = int((np.abs(null) >= abs(tau) - 1e-12).sum())
        found[name] = Agreement(tau, tuple(alone), extreme / len(orders), len(orders))
    return found


def _orders(n_blocks: int, seed: int) -> list[tuple[int, ...]]:
    if math.factorial(n_blocks) <= MAX_PERMUTATIONS:
        return list(itertools.permutations(range(n_blocks)))
    rng = np.random.default_rng(seed)
    drawn = [tuple(rng.permutation(n_blocks).tolist()) for _ in range(MAX_PERMUTATIONS - 1)]
    # The observed order belongs to the null, so that p is never 0.
    return [tuple(range(n_blocks)), *drawn]


def _per_seed(table: ExhaustiveTable, truth: Truth) -> list[Truth]:
    tests: dict[Mask, np.ndarray] = {mask: table.test(mask) for mask in table.masks}
    n_seeds = min(len(values) for values in tests.values())
    return [
        replace(truth, test={mask: float(values[index]) for mask, values in tests.items()})
        for index in range(n_seeds)
    ]
