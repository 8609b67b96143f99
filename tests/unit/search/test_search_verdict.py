"""The verdict on plan, all and none, its sentence, the report's seeds, the pilot and the front."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from layerprobe.errors import UsageError
from layerprobe.metrics.inference import PooledArms
from layerprobe.search.baselines import Baseline, report_baselines
from layerprobe.search.budget import TrialBudget
from layerprobe.search.frames import on_front
from layerprobe.search.pilot import extrapolated, run_pilot
from layerprobe.search.settings import Settings, make_settings
from layerprobe.search.space import REPORT_REPEAT, Constraints, Space, Trial, mask_of, trial_seed
from layerprobe.search.verdict import decide, sentence
from layerprobe.training import Outcome

SPACE = Space((100, 100, 100))
ALL, ONE, NONE = mask_of([0, 1, 2], 3), mask_of([1], 3), mask_of([], 3)
ARMS = {"plan": ONE, "all": ALL, "none": NONE}
RULE = {"tolerance": 0.005, "margin": 0.03, "n_seeds": 5}


def pooled(
    plan: float, everything: float, none: float, *, noise: float = 0.004, seeds: int = 5
) -> PooledArms:
    rng = np.random.default_rng(0)
    means = {"plan": plan, "all": everything, "none": none}
    return PooledArms(
        {
            name: {s: mean + noise * rng.standard_normal() for s in range(seeds)}
            for name, mean in means.items()
        }
    )


@pytest.mark.parametrize(
    ("accuracies", "kind", "mask"),
    [
        ((0.90, 0.85, 0.60), "train these", ONE),
        ((0.90, 0.90, 0.60), "train these", ONE),
        ((0.80, 0.90, 0.60), "train all", ALL),
        ((0.60, 0.55, 0.70), "train none", NONE),
        ((0.70, 0.70, 0.70), "no difference", NONE),
    ],
)
def test_each_verdict_has_its_case(accuracies, kind, mask) -> None:
    verdict = decide(ARMS, pooled(*accuracies), SPACE, **RULE)
    assert (verdict.kind, verdict.mask) == (kind, mask)
    told = sentence(verdict, SPACE, test=None, n_seeds=5)
    if kind == "no difference":
        assert (
            0 < verdict.margin < 0.02
            and f"one larger than {100 * verdict.margin:.1f} points is excluded" in told
        )
    else:
        assert "points against" in told and verdict.margin is None


def test_the_margin_of_no_difference_is_that_of_two_one_sided_tests() -> None:
    arms = pooled(0.70, 0.71, 0.70, noise=0.02)
    verdict = decide(ARMS, arms, SPACE, **RULE)
    from scipy import stats

    bounds = []
    for first, second in (("plan", "all"), ("plan", "none"), ("all", "none")):
        e = arms.difference(first, second)
        bounds.append(abs(e.value) + stats.t.ppf(0.95, e.freedom) * e.stderr)
    # The further bound dominates the p-value; the nearer one is far away from the margin.
    assert verdict.margin == pytest.approx(max(bounds), rel=1e-3)


def test_constraints_bind_the_verdict_also_where_another_arm_is_better() -> None:
    space = Space((100, 100, 100), Constraints(min_frozen=1))
    verdict = decide(ARMS, pooled(0.8, 0.9, 0.6), space, **RULE)
    assert verdict.mask == ONE and verdict.kind == "train these"


def test_without_trainings_nothing_is_claimed() -> None:
    verdict = decide(ARMS, None, SPACE, **RULE)
    assert verdict.kind == "not judged" and "Too few" in sentence(verdict, SPACE, test=None, n_seeds=5)


def test_what_may_be_large_is_not_decided_and_the_answer_is_the_best_of_what_was_seen() -> None:
    loud = pooled(0.90, 0.90, 0.86, noise=0.02, seeds=3)
    verdict = decide(ARMS, loud, SPACE, **{**RULE, "n_seeds": 3})
    assert verdict.kind == "not decided" and verdict.mask != NONE and verdict.margin > 0.03
    assert "is neither shown nor excluded" in sentence(verdict, SPACE, test=None, n_seeds=3)


def test_the_objective_accuracy_recommends_the_best_mean_of_what_nothing_beats() -> None:
    close = pooled(0.7, 0.7, 0.7, noise=0.002)
    best = max(ARMS, key=lambda name: np.mean(list(close.values[name].values())))
    assert best != "none"
    assert decide(ARMS, close, SPACE, **RULE).mask == NONE
    assert decide(ARMS, close, SPACE, **{**RULE, "tolerance": 0.0}).mask == ARMS[best]


def test_an_arm_with_failed_trainings_is_named_and_not_recommended() -> None:
    values = dict(pooled(0.90, 0.85, 0.60).values)
    values["plan"] = {0: 0.90, 1: 0.90}
    verdict = decide(ARMS, PooledArms(values), SPACE, **RULE)
    assert verdict.failed == {"plan": 3} and verdict.mask == ALL
    assert "3 of 5 trainings of the plan failed" in sentence(verdict, SPACE, test=None, n_seeds=5)


def test_what_is_said_to_be_found_in_8_of_10_cases_is() -> None:
    """Claims are corrected for three pairs and count the test images."""
    rng = np.random.default_rng(3)
    n_seeds, n_images = 5, 1000

    def draw(gap: float):
        ease, shared = rng.random(n_images), 0.01 * rng.standard_normal(n_seeds)
        values, correct = {}, {}
        for name, level in {"plan": 0.8 + gap, "all": 0.8, "none": 0.8 + gap}.items():
            chance = level + shared + 0.008 * rng.standard_normal(n_seeds)
            # Four of five images are as hard for all arms, the fifth is each arm's own.
            own = np.where(np.arange(n_images) % 5, ease, rng.random(n_images))
            right = own[None, :] < chance[:, None]
            values[name], correct[name] = dict(enumerate(right.mean(1).tolist())), right.mean(0)
        return decide(ARMS, PooledArms(values, n_images=n_images, correct=correct), SPACE, **RULE)

    gap = float(np.median([draw(0.0).detectable for _ in range(150)]))
    found = [draw(gap).differences["plan", "all"].pvalue < 0.05 for _ in range(300)]
    assert 0.7 < np.mean(found) < 0.92


def report(values, *, noise: float, seeds: int = 3, **more):
    """The report on made-up test accuracies: name of the mask → mean."""
    trained: list[Trial] = []

    def train(trials):
        trained.extend(trials)
        found = {}
        for t in trials:
            draw = np.random.default_rng([t.repeat, *map(int, t.mask)]).standard_normal()
            accuracy = values[t.mask] + noise * draw
            found[t] = Outcome(
                validation_accuracy=accuracy, test_accuracy=accuracy, n_test=10**6, trainable_parameters=7
            )
        return found

    settings = Settings(lrs=(1e-3,), seeds=seeds, **more)
    budget = TrialBudget(space=SPACE, train_batch=train, settings=settings, total=50.0)
    budget.train([budget.trial(mask, 1e-3, seed) for mask in values for seed in range(2)])
    trained.clear()
    arms = [Baseline(name="all", mask=ALL), Baseline(name="none", mask=NONE)]
    return report_baselines(ONE, arms, budget, train, tolerance=0.005), trained


def test_seeds_are_added_until_the_intervals_are_as_narrow_as_asked_for() -> None:
    values = {ALL: 0.8, ONE: 0.82, NONE: 0.6}
    quiet, trained = report(values, noise=0.001)
    assert len(quiet.seeds) == 3 and len(trained) == 9
    assert all(trial.repeat >= REPORT_REPEAT for trial in trained)
    loud, _ = report(values, noise=0.02, half_width=0.015, max_seeds=20)
    assert 3 < len(loud.seeds) < 20
    assert all(e.high - e.low <= 0.03 or e.pvalue < 0.05 for e in loud.verdict.differences.values())
    capped, _ = report(values, noise=0.05, max_seeds=4)
    assert len(capped.seeds) == 4


def test_equal_plans_stand_once_in_the_verdict() -> None:
    found, _ = report({ALL: 0.8, ONE: 0.8, NONE: 0.6}, noise=0.002)
    assert set(found.verdict.differences) == {("plan", "all"), ("plan", "none"), ("all", "none")}
    assert found.line("plan").against["all"].value == pytest.approx(0.0, abs=0.01)
    assert found.line("all").against["all"] is None and found.noise == pytest.approx(0.002, rel=0.8)


def learning(plateau: float, tau: float, best_lr: float = 1e-3):
    """Accuracy rises to a plateau with the number of steps."""

    def train(trials):
        return {
            t: Outcome(
                validation_accuracy=plateau * (1 - np.exp(-1600 * t.fidelity / tau))
                - 0.05 * np.log10(t.lr / best_lr) ** 2,
                call_seconds=10 * t.fidelity,
            )
            for t in trials
        }

    return train


def test_the_pilot_takes_the_shortest_length_near_the_plateau() -> None:
    found = run_pilot(learning(0.9, 150), SPACE, make_settings())
    assert 1600 * found.length in (400, 800) and found.reached
    assert found.plateau == pytest.approx(0.9, abs=0.03)
    assert found.lrs == (3e-4, 1e-3, 3e-3) and found.seconds == pytest.approx(10 * found.length)
    slow = run_pilot(learning(0.9, 3000), SPACE, make_settings())
    assert slow.length == 1.0 and not slow.reached


def test_the_pilot_moves_the_grid_until_the_best_rate_is_inside() -> None:
    found = run_pilot(learning(0.9, 100, best_lr=2.7e-2), SPACE, make_settings())
    assert found.lrs[0] < 2.7e-2 < found.lrs[2] and len(found.lrs) == 3
    given = run_pilot(
        learning(0.9, 100, best_lr=2.7e-2), SPACE, make_settings(lrs=(1e-4, 1e-3), finetune_steps=50)
    )
    assert given.lrs == (1e-4, 1e-3) and given.length == 1.0


def test_a_pilot_that_only_fails_is_one_line() -> None:
    with pytest.raises(UsageError, match="training all blocks fails at the learning rates"):
        run_pilot(lambda ts: {t: Outcome(reason="diverged") for t in ts}, SPACE, make_settings())


def test_a_longer_run_that_fails_or_no_plateau_keeps_the_pilot_honest() -> None:
    def fails_when_long(trials):
        learnt = learning(0.9, 600)(trials)
        return {
            t: learnt[t] if t.fidelity < 1 else Outcome(reason="diverged", call_seconds=1.0) for t in trials
        }

    found = run_pilot(fails_when_long, SPACE, make_settings())
    assert found.length == 0.5 and all(np.isfinite(list(found.accuracies.values())))
    json.dumps(found.to_dict(), allow_nan=False)
    # Two lengths give no plateau: the longer one, and it is not said to be reached.
    short = run_pilot(learning(0.9, 1600), SPACE, make_settings(finetune_steps=400, find_length=True))
    assert short.length == 1.0 and not short.reached


def test_a_geometric_series_is_extrapolated_to_its_limit() -> None:
    accuracies = [0.8 - 0.4 * 0.5**k for k in range(4)]
    assert extrapolated(accuracies) == pytest.approx(0.8)
    assert extrapolated([0.5, 0.6, 0.55]) == 0.6 and extrapolated([0.2, 0.5, 0.9]) == 1.0


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


def test_seeds_depend_on_the_search_and_the_repeat_alone() -> None:
    assert trial_seed(0, 1) == trial_seed(0, 1)
    assert len({trial_seed(seed, repeat) for seed in range(20) for repeat in range(20)}) == 400
