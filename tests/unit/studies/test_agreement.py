"""Agreement of scores with measured transfer, on tables whose truth is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from agreement import permutation_agreement
from replay import ExhaustiveTable, Truth

from layerprobe.search.space import REPORT_REPEAT, Space, Trial
from layerprobe.training import Outcome

WORTH = np.array([0.01, 0.05, 0.02, 0.09])


def table(scores: dict[str, np.ndarray], noise: float = 0.0) -> ExhaustiveTable:
    space = Space((10, 10, 10, 10))
    rng = np.random.default_rng(0)
    outcomes = {}
    for mask in space.masks():
        accuracy = 0.3 + float(np.array(mask) @ WORTH)
        outcomes[Trial(mask=mask, lr=1e-3)] = Outcome(validation_accuracy=accuracy)
        for seed in range(3):
            test = accuracy + noise * float(rng.standard_normal())
            outcomes[Trial(mask=mask, lr=1e-3, repeat=REPORT_REPEAT + seed)] = Outcome(
                validation_accuracy=accuracy, test_accuracy=test
            )
    arrays = {name: (value.astype(float), np.zeros(4)) for name, value in scores.items()}
    return ExhaustiveTable(name="made", space=space, lrs=(1e-3,), seeds=1, outcomes=outcomes, scores=arrays)


def test_the_truth_itself_agrees_fully_and_its_reverse_disagrees() -> None:
    made = table({"truth": WORTH, "reverse": -WORTH})
    found = permutation_agreement(made, Truth.of(made))
    assert found["truth"].tau == 1.0
    assert found["reverse"].tau == -1.0
    assert found["truth"].per_seed == (1.0, 1.0, 1.0)


def test_p_is_the_share_of_orders_that_reach_as_far() -> None:
    """All 24 orders of four blocks; as far in either direction."""
    made = table({"score": WORTH})
    truth = Truth.of(made)
    found = permutation_agreement(made, truth)["score"]
    orders = list(itertools.permutations(range(4)))
    assert found.n_permutations == len(orders)
    reach = [permutation_agreement(table({"s": WORTH[list(o)]}), truth)["s"].tau for o in orders]
    assert found.pvalue == pytest.approx(np.mean([abs(tau) >= 1.0 - 1e-12 for tau in reach]))
    assert 0 < found.pvalue < 0.15


def test_a_constant_score_says_nothing() -> None:
    made = table({"flat": np.ones(4)})
    found = permutation_agreement(made, Truth.of(made))["flat"]
    assert math.isnan(found.tau)
    assert math.isnan(found.pvalue)


def test_seeds_disagree_where_the_truth_is_noisy() -> None:
    made = table({"truth": WORTH}, noise=0.1)
    found = permutation_agreement(made, Truth.of(made))["truth"]
    assert len(set(found.per_seed)) > 1
    assert all(-1 <= tau <= 1 for tau in found.per_seed)
