"""Strategies on made-up accuracy landscapes, where the right answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from layerprobe.errors import UnknownNameError, UsageError
from layerprobe.search.budget import TrialBudget
from layerprobe.search.posterior import Comparison, Posterior, best_plan, candidate_masks
from layerprobe.search.settings import Settings
from layerprobe.search.space import Constraints, Mask, Space, Trial, mask_of
from layerprobe.search.strategies import STRATEGIES, make_strategy, run_strategy
from layerprobe.training import Outcome

LRS = (1e-4, 3e-4, 1e-3)


class Landscape:
    """Accuracy = base + what each trained block adds, a best learning rate, seed noise."""

    def __init__(self, gains: list[float], *, noise: float = 0.0, best_lr: float = 3e-4) -> None:
        self.gains, self.noise, self.best_lr = np.array(gains), noise, best_lr
        self.trained: list[Trial] = []

    def truth(self, trial: Trial) -> float:
        gain = float(self.gains @ np.array(trial.mask, dtype=float))
        off = math.log10(trial.lr / self.best_lr)
        return 0.4 + gain - 0.05 * off**2

    def __call__(self, trials: list[Trial]) -> dict[Trial, Outcome]:
        self.trained += trials
        out = {}
        for trial in trials:
            seed = [trial.repeat, *map(int, trial.mask), round(1e6 * trial.lr)]
            draw = np.random.default_rng(seed).standard_normal()
            out[trial] = Outcome(validation_accuracy=float(self.truth(trial) + self.noise * draw))
        return out


def make_budget(landscape, *, n_blocks: int = 5, total: float = 36.0, **more) -> TrialBudget:
    settings = {"lrs": LRS, "seeds": 3}
    settings |= {
        name: more.pop(name) for name in ("lrs", "seeds", "seed", "objective", "margin") if name in more
    }
    space = Space((1000,) * n_blocks, more.pop("constraints", Constraints()))
    return TrialBudget(space=space, train_batch=landscape, settings=Settings(**settings), total=total, **more)


def answer(name: str, landscape, **more) -> tuple[Mask, TrialBudget]:
    budget = make_budget(landscape, **more)
    return run_strategy(make_strategy(name), budget)[0], budget


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_one_decisive_block_is_found_and_nothing_else_trained(name: str) -> None:
    total = 200.0 if name == "exhaustive" else 60.0
    mask, budget = answer(name, Landscape([0.0, 0.0, 0.3, 0.0, 0.0], noise=0.002), total=total)
    assert mask == mask_of([2], 5)
    assert budget.spent <= total + 1e-9


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_every_strategy_stays_within_its_budget_and_counts_each_trial_once(name: str) -> None:
    landscape = Landscape([0.05, 0.1, 0.0, 0.05, 0.02], noise=0.01)
    total = 200.0 if name == "exhaustive" else 20.0
    _, budget = answer(name, landscape, total=total)
    assert len(landscape.trained) == len(set(landscape.trained)) == len(budget.history)
    assert budget.spent == pytest.approx(sum(budget.space.cost(trial) for trial in landscape.trained))
    assert budget.spent <= total + 1e-9


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_replaying_a_strategy_trains_the_same_trials_in_the_same_order(name: str) -> None:
    total = 200.0 if name == "exhaustive" else 30.0
    first, second = (Landscape([0.05, 0.1, 0.0, 0.05, 0.02], noise=0.02) for _ in range(2))
    masks = [answer(name, landscape, total=total, seed=7)[0] for landscape in (first, second)]
    assert masks[0] == masks[1]
    assert first.trained == second.trained


@pytest.mark.parametrize("name", ["random", "tpe", "greedy"])
def test_constraints_hold_for_every_plan_that_is_trained(name: str) -> None:
    limits = Constraints(min_frozen=2, max_trainable_params=3000, must_freeze=(0,), must_train=(4,))
    landscape = Landscape([0.3, 0.1, 0.1, 0.0, 0.0], noise=0.01)
    mask, budget = answer(name, landscape, total=30.0, constraints=limits)
    assert all(budget.space.allows(trial.mask) for trial in landscape.trained)
    assert mask[4] and not mask[0] and sum(mask) <= 3


def test_under_constraints_only_the_references_break_them() -> None:
    limits = Constraints(min_frozen=2, must_freeze=(0,), must_train=(4,))
    landscape = Landscape([0.3, 0.1, 0.1, 0.0, 0.0], noise=0.01)
    mask, budget = answer("bayes", landscape, total=40.0, constraints=limits)
    space = budget.space
    assert all(space.allows(t.mask) or t.mask in (space.all, space.none) for t in landscape.trained)
    assert mask[4] and not mask[0] and sum(mask) <= 3


def test_all_blocks_are_the_answer_when_each_of_them_counts() -> None:
    assert answer("bayes", Landscape([0.1] * 5, noise=0.003))[0] == (True,) * 5


def test_next_to_nothing_is_trained_when_nothing_helps_and_the_search_stops_early() -> None:
    found = [answer("bayes", Landscape([0.0] * 5, noise=0.01), seed=seed, margin=0.02) for seed in range(4)]
    assert max(sum(mask) for mask, _ in found) <= 1
    assert np.mean([budget.spent < 0.75 * budget.total for _, budget in found]) >= 0.75


def test_accuracy_objective_takes_the_best_plan_and_not_the_smallest() -> None:
    gains = [0.2, 0.002, 0.002, 0.002, 0.002]
    frugal, _ = answer("bayes", Landscape(gains, noise=0.02), total=60.0)
    eager, _ = answer("bayes", Landscape(gains), total=60.0, objective="accuracy", margin=1e-3)
    assert frugal[0] and sum(frugal) <= 3
    assert sum(eager) > sum(frugal)


def test_each_plan_gets_its_own_learning_rate() -> None:
    class Split(Landscape):
        def truth(self, trial: Trial) -> float:
            self.best_lr = 1e-4 if sum(trial.mask) > 2 else 1e-3
            return super().truth(trial)

    budget = make_budget(Split([0.02] * 5, noise=0.002), total=60.0)
    run_strategy(make_strategy("bayes"), budget)
    rates = budget.posterior().best_rates([budget.space.all, budget.space.none])
    assert rates == {budget.space.all: 1e-4, budget.space.none: 1e-3}


def test_failed_runs_are_no_candidates() -> None:
    class Broken(Landscape):
        def __call__(self, trials):
            ok = super().__call__([t for t in trials if not t.mask[1]])
            return {t: ok.get(t, Outcome(validation_accuracy=None, reason="diverged")) for t in trials}

    mask, _ = answer("bayes", Broken([0.05, 0.5, 0.0, 0.0, 0.0], noise=0.002))
    assert not mask[1]


def test_a_plan_whose_every_training_failed_is_no_answer_though_all_others_are_alike() -> None:
    space = Space((100,) * 3)
    masks = {True: 0.95, False: -np.inf}
    trials = [Trial(mask=(on,) * 3, lr=1e-3, repeat=seed) for on in masks for seed in range(4)]
    posterior = Posterior(
        space=space, lrs=(1e-3,), trials=trials, accuracies=[masks[t.mask[0]] for t in trials]
    )
    assert posterior.failed == {space.none}
    assert best_plan(posterior, list(space.masks()), 0.01) != space.none


def test_where_everything_fails_the_error_says_why() -> None:
    def fails(trials):
        return {t: Outcome(validation_accuracy=None, reason="diverged at step 7") for t in trials}

    with pytest.raises(UsageError, match=r"no training came through.*failures: diverged at step 7"):
        run_strategy(make_strategy("bayes"), make_budget(fails))


def test_a_budget_too_small_for_the_references_is_one_clear_line() -> None:
    with pytest.raises(
        UsageError, match=r"budget 2 is too small: training all blocks and none at 3 learning"
    ):
        run_strategy(make_strategy("bayes"), make_budget(Landscape([0.0] * 5), total=2.0))


def test_exhaustive_says_what_it_would_need_and_runs_with_that() -> None:
    with pytest.raises(
        UsageError, match=r"exhaustive search needs .* full trainings, the budget is 20"
    ) as told:
        run_strategy(make_strategy("exhaustive"), make_budget(Landscape([0.0] * 5), total=20.0))
    needed = float(str(told.value).split("needs ")[1].split()[0])
    budget = make_budget(Landscape([0.0] * 5), total=needed + 0.1)  # four digits are said
    run_strategy(make_strategy("exhaustive"), budget)
    assert len({trial.mask for trial in budget.history}) == 32


def test_unknown_strategy_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'greedy'"):
        make_strategy("gredy")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"must_freeze": (1,), "must_train": (1,)}, "block 1 is in both must-freeze and must-train"),
        ({"min_frozen": 4, "must_train": (0, 1)}, "2 blocks must train, but min-frozen 4"),
        ({"min_frozen": 9}, "min-frozen is 9, but the backbone has 5 blocks"),
        ({"max_trainable_params": 10, "must_train": (0,)}, "more than max-trainable-params 10"),
    ],
)
def test_contradicting_constraints_are_named(limits: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Space((1000,) * 5, Constraints(**limits))


def test_space_counts_what_combinatorics_says() -> None:
    assert len(list(Space((1,) * 6).masks())) == 64
    limited = Space((1,) * 6, Constraints(min_frozen=4))
    assert len(list(limited.masks())) == 1 + 6 + 15


def test_cost_is_one_for_everything_and_two_thirds_for_nothing() -> None:
    space = Space((3, 1))
    assert space.cost(Trial(mask=(True, True), lr=1e-3)) == 1.0
    assert space.cost(Trial(mask=(False, False), lr=1e-3)) == pytest.approx(2 / 3)
    assert space.cost(Trial(mask=(True, False), lr=1e-3)) == pytest.approx(2.75 / 3)


def test_the_posterior_recovers_gains_from_few_noisy_runs_and_knows_how_well() -> None:
    landscape = Landscape([0.1, 0.0, 0.2, 0.0, 0.05], noise=0.01)
    rng = np.random.default_rng(0)
    masks = [tuple(bool(b) for b in rng.integers(0, 2, 5)) for _ in range(12)]
    trials = [Trial(mask=mask, lr=lr) for mask in dict.fromkeys(masks) for lr in LRS]
    values = [outcome.validation_accuracy for outcome in landscape(trials).values()]
    posterior = Posterior(Space((1,) * 5), LRS, trials, values)
    wanted = [Trial(mask=mask, lr=3e-4) for mask in Space((1,) * 5).masks()]
    mean, covariance = posterior.predict(wanted)
    deviation = np.sqrt(np.diag(covariance))
    truth = np.array([landscape.truth(trial) for trial in wanted])
    assert np.corrcoef(mean, truth)[0, 1] > 0.97
    assert np.abs(mean - truth).mean() < 0.02
    assert np.mean(np.abs(mean - truth) <= 3 * deviation + 0.005) > 0.9
    assert posterior.noise == pytest.approx(0.01, rel=0.6)
    gains = posterior.unit_gains(rng)
    assert [gain.value for gain in gains] == pytest.approx(landscape.gains, abs=0.02)
    assert sum(g.low <= t <= g.high for g, t in zip(gains, landscape.gains, strict=True)) >= 4


def test_a_common_seed_effect_is_not_taken_for_an_effect_of_plans() -> None:
    space, rng = Space((1,) * 4), np.random.default_rng(1)
    shift = {0: 0.0, 1: 0.1, 2: -0.1}
    trials = [Trial(mask=mask, lr=1e-3, repeat=i % 3) for i, mask in enumerate(space.masks())]
    values = [0.5 + 0.05 * t.mask[2] + shift[t.repeat] + 0.005 * rng.standard_normal() for t in trials]
    gains = Posterior(space, (1e-3,), trials, values).unit_gains(rng)
    assert max(range(4), key=lambda block: gains[block].value) == 2
    assert gains[2].value == pytest.approx(0.05, abs=0.03)


def test_deep_backbones_are_searched_among_neighbours_of_the_promising() -> None:
    gains = np.zeros(24)
    gains[[3, 17]] = 0.1
    landscape = Landscape(list(gains), noise=0.005)
    mask, budget = answer("bayes", landscape, n_blocks=24, total=60.0, lrs=(3e-4,))
    assert mask[3] and mask[17] and sum(mask) <= 12
    assert len(candidate_masks(budget.space, budget.posterior(), budget.rng)) <= 400


def test_draws_settle_on_a_plan_that_is_far_ahead() -> None:
    space = Space((1, 1))
    trials = [Trial(mask=m, lr=1e-3, repeat=r) for m in space.masks() for r in range(3)]
    values = [0.5 + 0.3 * t.mask[0] + 0.001 * t.repeat for t in trials]
    posterior = Posterior(space, (1e-3,), trials, values)
    comparison = Comparison(posterior, list(space.masks()), np.random.default_rng(0))
    assert comparison.settled(0.05) > 0.95
    assert best_plan(posterior, list(space.masks()), 0.01) == (True, False)


@pytest.mark.parametrize(("gain", "alike"), [(0.0, True), (0.05, False)])
def test_the_posterior_tells_whether_plans_differ_at_all(gain: float, alike: bool) -> None:
    landscape = Landscape([gain, 0.0, 0.0, 0.0, gain], noise=0.01)
    budget = make_budget(landscape, total=40.0)
    masks = list(budget.space.masks())
    budget.train([budget.trial(mask, LRS[index % 3], index % 4) for index, mask in enumerate(masks)])
    found = budget.posterior().alike
    assert found > 0.2 if alike else found < 0.02


def test_a_flat_landscape_is_left_early() -> None:
    spent = []
    for seed in range(5):
        mask, budget = answer("bayes", Landscape([0.0] * 5, noise=0.01), seed=seed, total=60.0)
        spent.append(budget.spent)
        assert sum(mask) <= 1
    assert sorted(spent)[2] <= 30
