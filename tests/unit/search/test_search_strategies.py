"""Strategies on made-up accuracy landscapes, where the right answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from layerprobe.errors import UnknownNameError, UsageError
from layerprobe.search.baselines import report_baselines, standard_baselines
from layerprobe.search.budget import TrialBudget
from layerprobe.search.settings import Settings
from layerprobe.search.space import Constraints, Mask, Space, Trial, mask_of, structured_masks
from layerprobe.search.strategies import STRATEGIES, make_strategy, run_strategy
from layerprobe.search.strategies.base import coarse_to_fine, finalist_count, frontier
from layerprobe.search.strategies.racing import PlanModel, candidate_pool, spread_of_sizes
from layerprobe.search.verdict import Finalist, choose, contenders
from layerprobe.training import Outcome

LRS = (1e-4, 3e-4, 1e-3)


class Landscape:
    """Accuracy = base + what each trained block adds, a best learning rate, shorter runs lower, seed noise."""

    def __init__(self, gains: list[float], *, noise: float = 0.0, best_lr: float = 3e-4) -> None:
        self.gains, self.noise, self.best_lr = np.array(gains), noise, best_lr
        self.trained: list[Trial] = []

    def truth(self, trial: Trial) -> float:
        gain = float(self.gains @ np.array(trial.mask, dtype=float))
        off = math.log10(trial.lr / self.best_lr)
        return 0.4 + gain - 0.05 * off**2 - 0.1 * (1 - trial.fidelity)

    def __call__(self, trials: list[Trial]) -> dict[Trial, Outcome]:
        self.trained += trials
        out = {}
        for trial in trials:
            seed = [trial.repeat, *map(int, trial.mask), int(trial.fidelity * 8), round(1e6 * trial.lr)]
            draw = np.random.default_rng(seed).standard_normal()
            out[trial] = Outcome(validation_accuracy=float(self.truth(trial) + self.noise * draw))
        return out


def make_budget(landscape, *, n_blocks: int = 5, total: float = 36.0, **more) -> TrialBudget:
    settings = {"lrs": LRS, "seeds": 3}
    settings |= {name: more.pop(name) for name in ("lrs", "seeds", "seed", "objective") if name in more}
    space = Space((1000,) * n_blocks, more.pop("constraints", Constraints()))
    return TrialBudget(space=space, train_batch=landscape, settings=Settings(**settings), total=total, **more)


def answer(name: str, landscape, **more) -> tuple[Mask, TrialBudget]:
    budget = make_budget(landscape, **more)
    finalists = run_strategy(make_strategy(name), budget)
    return choose(finalists, budget.space, objective=budget.settings.objective).mask, budget


@pytest.mark.parametrize("name", [n for n in STRATEGIES if n not in ("prefix", "suffix")])
def test_one_decisive_block_is_found_and_nothing_else_trained(name: str) -> None:
    total = 200.0 if name == "exhaustive" else 60.0
    mask, budget = answer(name, Landscape([0.0, 0.0, 0.3, 0.0, 0.0]), total=total)
    assert mask == mask_of([2], 5)
    assert budget.spent <= total + 1e-9


@pytest.mark.parametrize(
    ("name", "gains", "blocks"),
    [("prefix", [0.1, 0.1, 0, 0, 0], [0, 1]), ("suffix", [0, 0, 0, 0.1, 0.1], [3, 4])],
)
def test_families_find_their_own_kind(name: str, gains: list[float], blocks: list[int]) -> None:
    mask, _ = answer(name, Landscape(gains), total=60.0)
    assert mask == mask_of(blocks, 5)


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
    total = 200.0 if name == "exhaustive" else 24.0
    first, second = (Landscape([0.05, 0.1, 0.0, 0.05, 0.02], noise=0.02) for _ in range(2))
    masks = [answer(name, landscape, total=total, seed=7)[0] for landscape in (first, second)]
    assert masks[0] == masks[1]
    assert first.trained == second.trained


@pytest.mark.parametrize("name", ["racing", "random", "tpe", "nsga2", "greedy", "contiguous"])
def test_constraints_hold_for_every_plan_that_is_trained(name: str) -> None:
    limits = Constraints(min_frozen=2, max_trainable_params=3000, must_freeze=(0,), must_train=(4,))
    landscape = Landscape([0.3, 0.1, 0.1, 0.0, 0.0], noise=0.01)
    mask, budget = answer(name, landscape, total=30.0, constraints=limits)
    assert all(budget.space.allows(trial.mask) for trial in landscape.trained)
    assert mask[4] and not mask[0] and sum(mask) <= 3


def test_all_blocks_are_the_answer_when_each_of_them_counts() -> None:
    mask, _ = answer("racing", Landscape([0.1] * 5, noise=0.003))
    assert mask == (True,) * 5


def test_next_to_nothing_is_trained_when_nothing_helps() -> None:
    assert answer("racing", Landscape([0.0] * 5))[0] == (False,) * 5
    sizes = [sum(answer("racing", Landscape([0.0] * 5, noise=0.01), seed=seed)[0]) for seed in range(4)]
    assert max(sizes) <= 1


def test_accuracy_objective_takes_the_best_plan_and_not_the_smallest() -> None:
    gains = [0.2, 0.001, 0.001, 0.001, 0.001]
    frugal, _ = answer("racing", Landscape(gains, noise=0.02), total=60.0)
    eager, _ = answer("racing", Landscape(gains), total=60.0, objective="accuracy")
    assert frugal[0] and sum(frugal) <= 3, (
        "four blocks add a thousandth each, one seed's noise is twenty times that"
    )
    assert sum(eager) > sum(frugal)


def test_each_plan_gets_its_own_learning_rate() -> None:
    class Split(Landscape):
        def truth(self, trial: Trial) -> float:
            self.best_lr = 1e-4 if sum(trial.mask) > 2 else 1e-3
            return super().truth(trial)

    budget = make_budget(Split([0.1] * 5), total=60.0)
    finalists = run_strategy(make_strategy("racing"), budget)
    rates = {sum(finalist.mask): finalist.lr for finalist in finalists}
    assert rates[5] == 1e-4
    assert all(lr == 1e-3 for size, lr in rates.items() if size <= 1)


def test_rates_are_compared_at_full_length() -> None:
    class Hasty(Landscape):
        """Short runs like the large rate, long ones the small, and the more so the more they train."""

        def truth(self, trial: Trial) -> float:
            self.best_lr = 1e-3 if trial.fidelity < 1 else 3e-4 if sum(trial.mask) < 3 else 1e-4
            return super().truth(trial)

    budget = make_budget(Hasty([0.02] * 5, noise=0.002), total=26.0)
    finalists = run_strategy(make_strategy("racing"), budget)
    ends = [Trial(mask=mask, lr=lr) for mask in (budget.space.all, budget.space.none) for lr in LRS]
    assert all(trial in budget.history for trial in ends), "both ends of the sizes at every rate"
    assert {finalist.lr for finalist in finalists if sum(finalist.mask) >= 4} == {1e-4}
    assert all(finalist.lr < 1e-3 for finalist in finalists)


def test_the_whole_budget_is_spent_where_there_is_something_left_to_try() -> None:
    for seed in range(3):
        budget = make_budget(
            Landscape([0.02, 0.0, 0.02, 0.0, 0.0], noise=0.01), total=24.0, seed=seed, max_repeats=3
        )
        run_strategy(make_strategy("racing"), budget)
        assert budget.total - budget.spent < 2.0, "less than one more plan's seeds"


def test_racing_uses_good_scores_and_survives_misleading_ones() -> None:
    gains = [0.0] * 11 + [0.25]
    good = np.array(gains) * 4
    found = {}
    for label, value in {"good": good, "misleading": good[::-1].copy()}.items():
        scores = {"score": (value, np.full(12, 0.1))}
        found[label], _ = answer(
            "racing", Landscape(gains, noise=0.01), n_blocks=12, total=40.0, scores=scores
        )
    assert found["good"][11] and sum(found["good"]) <= 3
    assert found["misleading"][11] and sum(found["misleading"]) <= 6


def test_failed_runs_are_no_candidates() -> None:
    class Broken(Landscape):
        def __call__(self, trials):
            ok = super().__call__([t for t in trials if not t.mask[1]])
            return {t: ok.get(t, Outcome(validation_accuracy=None, reason="diverged")) for t in trials}

    mask, _ = answer("racing", Broken([0.05, 0.5, 0.0, 0.0, 0.0], noise=0.002))
    assert not mask[1]


@pytest.mark.parametrize("total", [12.0, 36.0])
def test_a_rate_that_diverges_at_full_length_is_left_for_another(total: float) -> None:
    class Brittle(Landscape):
        def __call__(self, trials):
            found = super().__call__(trials)
            bad = [t for t in trials if t.lr == self.best_lr and t.fidelity == 1.0]
            return found | {t: Outcome(validation_accuracy=None, reason="diverged") for t in bad}

    landscape = Brittle([0.0, 0.1, 0.0, 0.0, 0.0], noise=0.002)
    budget = make_budget(landscape, total=total)
    finalists = run_strategy(make_strategy("racing"), budget)
    winner = choose(finalists, budget.space)
    assert winner.lr != landscape.best_lr and math.isfinite(winner.mean)


def test_short_runs_that_favour_large_plans_are_found_out_at_full_length() -> None:
    class Slow(Landscape):
        """Every block costs a little, but in short runs the small plans have not caught up yet."""

        def truth(self, trial: Trial) -> float:
            return super().truth(trial) - 0.1 * (1 - trial.fidelity) * (1 - sum(trial.mask) / 5)

    sizes = []
    for seed in range(5):
        mask, budget = answer("racing", Slow([-0.004] * 5, noise=0.002), total=26.0, seed=seed)
        anchored = {sum(trial.mask) for trial in budget.history if trial.fidelity == 1.0}
        assert {5, 0, 2} <= anchored, "a spread of sizes at full length"
        sizes.append(sum(mask))
    assert max(sizes) <= 1


def test_a_rate_counts_as_compared_only_where_all_rates_were_valued_at_one_length() -> None:
    budget = make_budget(Landscape([0.1] * 5))
    mask = mask_of([1], 5)
    budget.train(
        [
            Trial(mask=mask, lr=1e-4),
            Trial(mask=mask, lr=3e-4, repeat=0, fidelity=0.25),
            Trial(mask=mask, lr=1e-3, repeat=0, fidelity=0.25),
        ]
    )
    assert budget.compared_lr(mask) is None and budget.best_lr(mask) == 1e-4
    budget.train([Trial(mask=mask, lr=1e-4, repeat=0, fidelity=0.25)])
    assert budget.compared_lr(mask) == 3e-4


def test_training_everything_gets_its_rate_at_full_length() -> None:
    def value(trials):
        """Short runs favour 1e-4, long ones 1e-3."""
        right = {t: t.lr == (1e-3 if t.fidelity == 1.0 else 1e-4) for t in trials}
        return {t: Outcome(validation_accuracy=0.6 if right[t] else 0.5, test_accuracy=0.5) for t in trials}

    budget = make_budget(value, n_blocks=2, total=10.0, lrs=(1e-4, 1e-3))
    space = budget.space
    first, both = (True, False), (True, True)
    arms = standard_baselines(space, scores={"rgn": (np.ones(2), np.zeros(2))})
    found = {r.baseline.name: r.lr for r in report_baselines(first, 1e-4, arms, budget, value)}
    assert found["all"] == found["rgn-half"] == 1e-3, "the rule names all blocks here: one plan, one rate"
    assert found["none"] == 1e-4
    same = report_baselines(both, 1e-4, standard_baselines(space), budget, value)
    assert {r.lr for r in same if r.baseline.mask == both} == {1e-4}, (
        "the plan's own rate, where it is the plan"
    )


def test_two_finalists_wherever_the_budget_pays_for_them() -> None:
    assert [finalist_count(budget, 1.0, 3.0) for budget in (5.0, 7.0, 12.0, 24.0, 99.0)] == [1, 2, 2, 4, 6]


def test_a_budget_too_small_for_one_plan_is_one_clear_line() -> None:
    with pytest.raises(UsageError, match=r"budget 2 is too small: one plan needs .* full trainings"):
        run_strategy(make_strategy("racing"), make_budget(Landscape([0.0] * 5), total=2.0))


def test_exhaustive_says_what_it_would_need_and_runs_with_that() -> None:
    with pytest.raises(
        UsageError, match=r"exhaustive search needs .* full trainings, the budget is 20"
    ) as told:
        run_strategy(make_strategy("exhaustive"), make_budget(Landscape([0.0] * 5), total=20.0))
    needed = float(str(told.value).split("needs ")[1].split()[0])
    budget = make_budget(Landscape([0.0] * 5), total=needed + 0.1)  # four digits are said
    run_strategy(make_strategy("exhaustive"), budget)
    assert len({trial.mask for trial in budget.history}) == 32


def test_a_deep_family_is_spread_over_its_sizes() -> None:
    budget = make_budget(Landscape([0.0] * 32), n_blocks=32, total=20.0)
    run_strategy(make_strategy("prefix"), budget)
    sizes = {sum(trial.mask) for trial in budget.history}
    assert {0, 8, 16, 24, 32} <= sizes and len(sizes) < 33


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
    assert len(structured_masks(Space((1,) * 6), "contiguous")) == 1 + 6 * 7 // 2


def test_cost_is_one_for_everything_and_two_thirds_for_nothing() -> None:
    space = Space((3, 1))
    assert space.cost(Trial(mask=(True, True), lr=1e-3)) == 1.0
    assert space.cost(Trial(mask=(False, False), lr=1e-3)) == pytest.approx(2 / 3)
    assert space.cost(Trial(mask=(True, False), lr=1e-3, fidelity=0.5)) == pytest.approx(0.5 * 2.75 / 3)


def test_model_recovers_additive_gains_from_few_noisy_runs() -> None:
    landscape = Landscape([0.1, 0.0, 0.2, 0.0, 0.05], noise=0.01)
    rng = np.random.default_rng(0)
    masks = [tuple(bool(b) for b in rng.integers(0, 2, 5)) for _ in range(12)]
    trials = [Trial(mask=mask, lr=lr, repeat=0, fidelity=0.25) for mask in dict.fromkeys(masks) for lr in LRS]
    trials += [Trial(mask=(True,) * 5, lr=3e-4), Trial(mask=(False,) * 5, lr=3e-4)]
    values = [outcome.validation_accuracy for outcome in landscape(trials).values()]
    wanted = [Trial(mask=mask, lr=3e-4) for mask in Space((1,) * 5).masks()]
    mean, deviation = PlanModel(5, LRS).fit(trials, values).predict(wanted)
    truth = np.array([landscape.truth(trial) for trial in wanted])
    assert np.corrcoef(mean, truth)[0, 1] > 0.95
    assert np.abs(mean - truth).mean() < 0.03
    assert np.mean(np.abs(mean - truth) <= 3 * deviation + 0.01) > 0.9


def test_frontier_puts_the_best_first_and_keeps_one_plan_per_size() -> None:
    budget = make_budget(Landscape([0.1, 0.05, 0.0, 0.0, 0.0]))
    values = {
        mask_of(blocks, 5): value for blocks, value in (((0,), 0.5), ((1,), 0.45), ((0, 1), 0.55), ((), 0.4))
    }
    assert frontier(budget, 3, estimate=values) == [mask_of([0, 1], 5), mask_of([0], 5), mask_of([], 5)]


def test_large_backbones_get_a_limited_pool_over_all_sizes() -> None:
    space = Space((1,) * 24)
    rng = np.random.default_rng(0)
    pool = candidate_pool(space, {}, rng)
    assert len(pool) == len(set(pool)) == 256
    spread = spread_of_sizes(pool, 8, {}, rng)
    assert {sum(mask) for mask in spread[:3]} == {24, 0, 12}
    assert sorted(coarse_to_fine(list(range(10)))) == list(range(10))


@pytest.mark.parametrize("total", [4.0, 7.0, 9.0, 11.0])
def test_a_small_budget_compares_all_rates_rather_than_the_smallest_at_full_length(total: float) -> None:
    landscape = Landscape([0.0, 0.1, 0.0, 0.0, 0.0], best_lr=1e-3)
    mask, budget = answer("racing", landscape, total=total)
    assert {trial.lr for trial in landscape.trained if trial.mask == budget.space.all} == set(LRS)
    assert budget.spent <= total + 1e-9
    finals = {trial.lr for trial in landscape.trained if trial.mask == mask and trial.repeat == 2}
    assert finals == {1e-3}


def test_a_rate_that_always_fails_does_not_end_a_search_in_an_error() -> None:
    def smallest_fails(trials: list[Trial]) -> dict[Trial, Outcome]:
        return {
            trial: Outcome(validation_accuracy=None if trial.lr == LRS[0] else 0.5, reason="diverged")
            for trial in trials
        }

    budget = make_budget(smallest_fails, n_blocks=4, total=20.0, lrs=LRS[:2], seeds=2)
    found = choose(run_strategy(make_strategy("racing"), budget), budget.space)
    assert found.lr == LRS[1] and found.mean == 0.5


def test_under_constraints_the_pool_keeps_the_blocks_that_the_scores_want() -> None:
    space = Space((1,) * 24, Constraints(min_frozen=12))
    late = {"rgn": (np.arange(24.0), np.full(24, 1e-9))}
    pool = candidate_pool(space, late, np.random.default_rng(0))
    assert all(sum(mask) <= 12 for mask in pool)
    # Of 13 to 23 wanted blocks the 12 best stay, not the 12 that come first.
    assert mask_of(range(12, 24), 24) in pool
    assert not any(mask_of(range(24 - size, 36 - size), 24) in pool for size in range(13, 24))


def test_finalists_that_fall_behind_stay_in_the_report_and_out_of_the_race() -> None:
    landscape = Landscape([0.0, 0.0, 0.2, 0.0, 0.0], noise=0.005)
    budget = make_budget(landscape, total=60.0)
    finalists = run_strategy(make_strategy("prefix"), budget)
    seeds = {finalist.mask: len(finalist.accuracies) for finalist in finalists}
    racing, behind = contenders(finalists), [f for f in finalists if f not in contenders(finalists)]
    assert len(racing) >= 2 and behind and len(racing) + len(behind) == len(finalists)
    assert max(seeds[f.mask] for f in behind) < min(seeds[f.mask] for f in racing)
    assert max(f.mean for f in behind) < max(f.mean for f in racing)
    # A mean over fewer seeds is no competitor, however lucky.
    lucky = Finalist(behind[0].mask, behind[0].lr, (0.99,))
    assert choose([*racing, lucky], budget.space) == choose(racing, budget.space)
