"""Agreement of transfer scores with measured transfer on tables of every plan, and whether it is more than chance."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from replay import ExhaustiveTable, Truth
from scipy import stats

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
    Kendall, A new measure of rank correlation, Biometrika 30 (1938).
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
        extreme = int((np.abs(null) >= abs(tau) - 1e-12).sum())
        pvalue = math.nan if math.isnan(tau) else extreme / len(orders)
        found[name] = Agreement(tau=tau, per_seed=tuple(alone), pvalue=pvalue, n_permutations=len(orders))
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


def score_agreement(table: ExhaustiveTable, truth: Truth) -> list[dict[str, Any]]:
    """Kendall τ of every score with the truth: overall, and within equal numbers of trained blocks.

    A plan's score is the sum over its trained blocks. `count` is the baseline that merely counts them;
    `noise ceiling` is one unseen seed's truth against the mean of the others.
    """
    masks = table.masks
    test = np.array([truth.test[mask] for mask in masks])
    sizes = np.array([sum(mask) for mask in masks])
    flags = np.array(masks, dtype=float)
    predictors: dict[str, list[np.ndarray]] = {"count": [sizes.astype(float)]}
    predictors |= {name: [flags @ value] for name, (value, _) in table.scores.items()}
    rows = [
        {
            "pair": table.name,
            "score": name,
            "tau": _tau(values[0], test),
            "tau_within": _within(values[0], test, sizes),
        }
        for name, values in predictors.items()
    ]
    per_seed = np.array([table.test(mask) for mask in masks])
    if per_seed.shape[1] > 1:
        overall, within = [], []
        for seed in range(per_seed.shape[1]):
            others = np.delete(per_seed, seed, axis=1).mean(axis=1)
            overall.append(_tau(per_seed[:, seed], others))
            within.append(_within(per_seed[:, seed], others, sizes))
        rows.append(
            {
                "pair": table.name,
                "score": "noise ceiling",
                "tau": float(np.mean(overall)),
                "tau_within": float(np.nanmean(within)),
            }
        )
    return rows


def _within(predicted: np.ndarray, truth: np.ndarray, sizes: np.ndarray) -> float:
    """Kendall τ-b over the pairs of plans with equally many trained blocks; NaN where one side is all ties."""
    pairs = [(i, j) for i, j in itertools.combinations(range(len(sizes)), 2) if sizes[i] == sizes[j]]
    if not pairs:
        return math.nan
    first, second = np.array(pairs).T
    ours = np.sign(predicted[first] - predicted[second])
    theirs = np.sign(truth[first] - truth[second])
    untied = math.sqrt(float((ours != 0).sum()) * float((theirs != 0).sum()))
    return float(ours @ theirs) / untied if untied else math.nan


def _tau(a: np.ndarray, b: np.ndarray) -> float:
    return float(stats.kendalltau(a, b).statistic)
