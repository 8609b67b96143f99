"""The choice among finalists, the sentence, the front, and the measured gain of a block."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from layerprobe.errors import UsageError
from layerprobe.search.budget import TrialBudget, measured_gain
from layerprobe.search.frames import on_front, pareto_frame
from layerprobe.search.settings import Settings
from layerprobe.search.space import Space, Trial, mask_of, trial_seed
from layerprobe.search.verdict import (
    Difference,
    Finalist,
    choose,
    compare,
    pooled_stderr,
    verdict_kind,
    verdict_sentence,
)
from layerprobe.training import Outcome

SPACE = Space((100, 100, 100))
ALL, ONE, NONE = mask_of([0, 1, 2], 3), mask_of([1], 3), mask_of([], 3)


def budget_with(history: dict[Trial, Outcome]) -> TrialBudget:
    settings = Settings(lrs=(1e-3, 3e-3), seeds=2)
    return TrialBudget(
        space=SPACE, train_batch=lambda trials: {}, settings=settings, total=10.0, history=history
    )


def finalists(**accuracies: tuple[float, ...]) -> list[Finalist]:
    masks = {"all": ALL, "one": ONE, "none": NONE}
    return [Finalist(masks[name], 1e-3, values) for name, values in accuracies.items()]


def test_pooled_error_is_the_within_plan_spread_over_root_n() -> None:
    group = finalists(all=(0.5, 0.6, 0.7), one=(0.1, 0.2, 0.3))
    assert pooled_stderr(group) == pytest.approx(0.1 / math.sqrt(3))
    assert pooled_stderr(finalists(all=(0.5,))) == 0.0


def test_one_standard_error_rule_takes_the_smallest_plan_that_is_near_enough() -> None:
    near = finalists(all=(0.70, 0.74, 0.72), one=(0.69, 0.73, 0.71), none=(0.50, 0.54, 0.52))
    assert choose(near, SPACE).mask == ONE
    assert choose(near, SPACE, objective="accuracy").mask == ALL
    far = finalists(all=(0.70, 0.702, 0.701), one=(0.60, 0.602, 0.601))
    assert choose(far, SPACE).mask == ALL


def test_ties_go_to_fewer_parameters_whatever_the_objective() -> None:
    tied = finalists(all=(0.5, 0.6), one=(0.5, 0.6))
    assert choose(tied, SPACE).mask == choose(tied, SPACE, objective="accuracy").mask == ONE


def test_failed_finalists_are_never_chosen_and_all_failed_is_said() -> None:
    assert choose(finalists(all=(0.5, 0.5), one=(0.9, -math.inf)), SPACE).mask == ALL
    with pytest.raises(UsageError, match="at least one run on the common seeds failed"):
        choose(finalists(one=(-math.inf, -math.inf)), SPACE)


def test_the_sentence_follows_the_interval() -> None:
    better = compare([0.80, 0.82, 0.81], [0.70, 0.71, 0.72])
    worse = compare([0.70, 0.71, 0.72], [0.80, 0.82, 0.81])
    same = compare([0.70, 0.75, 0.71], [0.72, 0.70, 0.74])
    assert [verdict_kind(ONE, c) for c in (better, worse, same, None)] == [
        "better", "worse", "no difference found", "not compared",
    ]  # fmt: skip
    text = verdict_sentence(ONE, SPACE, better, test_mean=0.81)
    assert text.startswith("Train block 1, freeze the rest (33 % of the blocks' parameters train).")
    assert "beats training everything by +10.0 points" in text and "3 unseen seeds" in text
    assert "loses to training everything" in verdict_sentence(ONE, SPACE, worse)
    assert "No difference found to training everything" in verdict_sentence(ONE, SPACE, same)
    assert verdict_sentence(ALL, SPACE, None).startswith("Train everything: no smaller plan")
    assert verdict_sentence(NONE, SPACE, same).startswith("Train the stem and head alone")


def test_two_seeds_or_a_spread_of_zero_claim_nothing() -> None:
    two = compare([0.52, 0.63], [0.50, 0.61])
    same_step = compare([0.52, 0.63, 0.55], [0.50, 0.61, 0.53])
    assert verdict_kind(ONE, two) == verdict_kind(ONE, same_step) == "no difference found"
    assert verdict_sentence(ONE, SPACE, two).endswith("2 paired seeds are too few for a claim.")
    assert "No difference found" in verdict_sentence(ONE, SPACE, same_step)


def test_equal_steps_of_whole_images_claim_nothing_whatever_their_rounding() -> None:
    rng = np.random.default_rng(0)
    for n in (100, 360, 1000):
        for _ in range(300):
            right = rng.integers(0, n - 5, 3)
            step = compare(((right + 3) / n).tolist(), (right / n).tolist())
            assert verdict_kind(ONE, step) == "no difference found"


def test_seeds_on_which_a_run_failed_are_named_and_claim_nothing() -> None:
    plan, everything = (0.80, None, 0.82, 0.81), (0.70, 0.75, 0.71, 0.72)
    assert verdict_kind(ONE, compare(plan[:1] + plan[2:], everything[:1] + everything[2:])) == "better"
    found = compare(plan, everything)
    assert (found.estimate.n, found.failed) == (3, 1) and verdict_kind(ONE, found) == "no difference found"
    assert "on 1 of 4 unseen seeds a run failed" in verdict_sentence(ONE, SPACE, found)
    assert verdict_kind(ONE, compare((0.8, None, None), everything)) == "not compared"


def test_the_front_shows_finalists_as_the_finals_saw_them() -> None:
    history = {
        Trial(mask=mask, lr=lr): Outcome(validation_accuracy=0.5 + 0.1 * (lr == 3e-3))
        for mask in (ALL, ONE)
        for lr in (1e-3, 3e-3)
    }
    budget = budget_with(history)
    frame = pareto_frame(budget, ONE, [Finalist(ONE, 1e-3, (0.50, 0.52))]).set_index("plan")
    one, everything = frame.loc[".#."], frame.loc["###"]
    assert (one["lr"], one["n_seeds"], one["chosen"]) == (1e-3, 2, True)
    assert one["validation_accuracy"] == pytest.approx(0.51)
    assert (everything["lr"], everything["n_seeds"], everything["validation_accuracy"]) == (3e-3, 1, 0.6)


def test_one_finalist_is_said_to_be_one() -> None:
    assert "only one finalist" in verdict_sentence(ALL, SPACE, None, n_finalists=1)


def test_probability_is_about_the_paired_seeds() -> None:
    up = compare([0.52, 0.63, 0.71], [0.50, 0.60, 0.70])
    down = compare([0.50, 0.60, 0.70], [0.52, 0.63, 0.71])
    assert up.estimate.probability > 0.9
    assert up.estimate.probability == pytest.approx(1 - down.estimate.probability)
    assert isinstance(up, Difference) and up.estimate.n == 3


def test_nothing_on_the_front_is_beaten() -> None:
    rng = np.random.default_rng(0)
    points = pd.DataFrame({"accuracy": rng.random(32), "cost": rng.integers(0, 6, 32).astype(float)})
    front = points[on_front(points["accuracy"], points["cost"])]
    for _, (accuracy, cost) in front.iterrows():
        better = (points["accuracy"] >= accuracy) & (points["cost"] < cost)
        assert not (better | ((points["accuracy"] > accuracy) & (points["cost"] <= cost))).any()
    assert points["accuracy"].idxmax() in front.index
    for _, (accuracy, cost) in points.drop(front.index).iterrows():
        assert ((front["accuracy"] >= accuracy) & (front["cost"] <= cost)).any()
    equal = pd.Series([0.5, 0.5])
    assert list(on_front(equal, equal)) == [True, False], "of equal points the first stays"


def test_measured_gain_is_the_gain_and_says_when_it_knows_too_little() -> None:
    gains = np.array([0.1, 0.0, -0.05])
    history = {
        Trial(mask=mask, lr=lr, repeat=repeat): Outcome(
            validation_accuracy=0.5 + float(gains @ np.array(mask, float)) + 0.01 * repeat
        )
        for mask in SPACE.masks()
        for lr in (1e-3, 3e-3)
        for repeat in range(2)
    }
    budget = budget_with(history)
    found, stderr = measured_gain(budget)
    assert found == pytest.approx(gains, abs=2e-3)
    assert (stderr < 0.01).all()
    little = budget_with(dict(list(history.items())[:3]))
    assert np.isnan(measured_gain(little)[0]).all()


def test_blocks_that_gain_nothing_are_said_to_gain_nothing() -> None:
    masks = list(SPACE.masks())
    trials = [
        Trial(mask=masks[i % 8], lr=1e-3 if i % 3 else 3e-3, repeat=i % 2, fidelity=1.0 if i % 5 else 0.4)
        for i in range(19)
    ]
    history = {trial: Outcome(validation_accuracy=0.9) for trial in trials}
    gain, _ = measured_gain(budget_with(history))
    assert gain == pytest.approx(np.zeros(3), abs=1e-9)


def test_seeds_depend_on_the_search_and_the_repeat_alone() -> None:
    assert trial_seed(0, 1) == trial_seed(0, 1)
    assert len({trial_seed(seed, repeat) for seed in range(20) for repeat in range(20)}) == 400
