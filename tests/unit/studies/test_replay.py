"""Replays on a made-up table, and the measures of a search against independent counts."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import selection_table
from agreement import score_agreement
from replay import (
    ExhaustiveTable,
    Reliability,
    Truth,
    judging_trials,
    replay,
    selection_trials,
    whole_table,
)
from selection_rules import best_blocks

from layerprobe.errors import BrokenFileError, UsageError
from layerprobe.search.space import REPORT_REPEAT, Space, Trial, mask_of, strip
from layerprobe.training import Outcome

LRS = (1e-3, 3e-3)
GAINS = np.array([0.0, 0.15, 0.0, 0.03])


def accuracy(trial: Trial, noise: float) -> float:
    seed = [trial.repeat, *map(int, trial.mask), round(1e4 * trial.lr)]
    value = 0.3 + float(GAINS @ np.array(trial.mask, float)) - 0.05 * (trial.lr == 3e-3)
    return value + noise * np.random.default_rng(seed).standard_normal()


def make_table(noise: float = 0.005) -> ExhaustiveTable:
    space = Space((100,) * 4)
    table = ExhaustiveTable(name="made-up", space=space, lrs=LRS, seeds=3, outcomes={})
    for trial in selection_trials(space, LRS, 3):
        table.outcomes[trial] = Outcome(validation_accuracy=accuracy(trial, noise), train_seconds=1.0)
    for trial in judging_trials(space, table.own_lr, 3):
        table.outcomes[trial] = Outcome(
            validation_accuracy=accuracy(trial, noise), test_accuracy=accuracy(trial, noise)
        )
    table.scores = {"good": (GAINS, np.full(4, 0.01)), "wrong": (-GAINS, np.full(4, 0.01))}
    return table


def test_the_truth_of_a_table_is_what_its_rows_say() -> None:
    table = make_table(noise=0.0)
    truth = Truth.of(table)
    assert truth.optimum == mask_of([1, 3], 4) and truth.sufficient == 2
    assert truth.test[mask_of([1], 4)] == pytest.approx(0.45)
    assert table.own_lr(mask_of([1], 4)) == 1e-3
    assert len(table.test(mask_of([1], 4))) == 3


def test_exhaustive_cost_counts_every_rate_once_and_the_other_seeds() -> None:
    table = make_table()
    expected = sum((2 + 2) * (2 + sum(mask) / 4) / 3 for mask in itertools.product([0, 1], repeat=4))
    assert table.exhaustive_cost() == pytest.approx(expected)


def test_the_whole_table_answers_by_the_frugal_rule() -> None:
    table = make_table(noise=0.0)
    truth = Truth.of(table)
    found = whole_table(table, truth)
    assert found["plan"] == ".#.#" and found["regret"] == 0 and found["excess_blocks"] == 0
    assert found["cost_share"] == 1.0 and found["lr"] == found["own_lr"]
    for lr, repeat in itertools.product(LRS, range(3)):
        table.outcomes[Trial(mask=mask_of([1, 3], 4), lr=lr, repeat=repeat)] = Outcome(
            validation_accuracy=None
        )
    assert whole_table(table, Truth.of(table))["plan"] != ".#.#", "a plan whose runs fail is no answer"


@pytest.mark.parametrize("strategy", ["bayes", "random", "tpe", "greedy"])
def test_replays_are_cheap_and_find_the_block_that_matters(strategy: str) -> None:
    table = make_table()
    truth = Truth.of(table)
    found = replay(table, truth, strategy, 0.6 * table.exhaustive_cost(), seed=0)
    assert found["plan"][1] == "#" and found["regret"] < 6
    assert found["spent"] <= 0.6 * table.exhaustive_cost() + 1e-9


def test_replays_start_at_different_repeats_of_the_table() -> None:
    table = make_table()
    mask, lr = table.space.all, table.lrs[0]
    for seed in range(2 * table.seeds):
        found = table.budget(99.0, seed=seed).train(
            [Trial(mask=mask, lr=lr, repeat=repeat) for repeat in range(table.seeds)]
        )
        assert list(found.values()) == np.roll(table.validation(mask, lr), -seed).tolist()


def test_measures_of_a_replay_agree_with_plain_counting() -> None:
    table = make_table()
    truth = Truth.of(table)
    found = replay(table, truth, "bayes", 30.0, seed=1)
    answer = tuple(mark == "#" for mark in found["plan"])
    assert found["regret"] == pytest.approx(100 * (truth.test[truth.optimum] - truth.test[answer]))
    assert found["excess_blocks"] == sum(answer) - truth.sufficient


def test_reliability_tells_effects_from_noise() -> None:
    found = Reliability.of(make_table(noise=0.005))
    assert found.noise == pytest.approx(0.005, rel=0.35)
    flags = np.array(list(itertools.product([0, 1], repeat=4)), float)
    worth, sizes = flags @ GAINS, flags.sum(1)
    level = np.array([worth[sizes == size].mean() for size in sizes])
    assert found.snr_size == pytest.approx(level.std() / found.noise, rel=0.05)
    assert found.snr_blocks == pytest.approx((worth - level).std() / found.noise, rel=0.05)
    assert found.within > 0.98


def test_reliability_of_pure_noise_is_near_zero() -> None:
    table = make_table(noise=0.005)
    rng = np.random.default_rng(0)
    for trial, outcome in table.outcomes.items():
        value = 0.5 + 0.01 * float(rng.standard_normal())
        table.outcomes[trial] = replace(outcome, test_accuracy=value)
    found = Reliability.of(table)
    assert found.snr_size < 1 and found.snr_blocks < 1 and found.within < 0.5


def test_scores_are_judged_within_equal_sizes_beside_count_and_ceiling() -> None:
    table = make_table(noise=0.002)
    rows = {row["score"]: row for row in score_agreement(table, Truth.of(table))}
    assert set(rows) == {"count", "good", "wrong", "noise ceiling"}
    assert np.isnan(rows["count"]["tau_within"]), "a count says nothing within equal counts"
    assert rows["good"]["tau_within"] > 0.8 and rows["wrong"]["tau_within"] < -0.8
    assert rows["noise ceiling"]["tau"] > 0.6


def test_tables_come_back_from_disk_and_holes_are_named(tmp_path: Path) -> None:
    table = make_table()
    rows = [
        {
            "plan": strip(t.mask),
            "lr": t.lr,
            "repeat": t.repeat,
            "validation_accuracy": o.validation_accuracy,
            "test_accuracy": o.test_accuracy,
            "seconds": o.train_seconds,
        }
        for t, o in table.outcomes.items()
    ]
    about = {"name": "made-up", "block_params": [100] * 4, "lrs": list(LRS), "seeds": 3}
    about["scores"] = {name: [v.tolist(), s.tolist()] for name, (v, s) in table.scores.items()}
    (tmp_path / "table.json").write_text(json.dumps(about))
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "table.csv.gz", index=False)
    back = ExhaustiveTable.load(tmp_path)
    assert back.outcomes == table.outcomes and back.space == table.space
    frame[frame["repeat"] != 2].to_csv(tmp_path / "table.csv.gz", index=False)
    with pytest.raises(BrokenFileError, match=r"lacks 32 trials"):
        ExhaustiveTable.load(tmp_path)


def test_a_table_without_its_judging_runs_is_incomplete(tmp_path: Path) -> None:
    table = make_table()
    rows = [
        {
            "plan": strip(t.mask), "lr": t.lr, "repeat": t.repeat,
            "validation_accuracy": o.validation_accuracy, "test_accuracy": o.test_accuracy, "seconds": o.train_seconds,
        }
        for t, o in table.outcomes.items() if t.repeat < REPORT_REPEAT + 2
    ]  # fmt: skip
    about = {
        "name": "made-up",
        "block_params": [100] * 4,
        "lrs": list(LRS),
        "seeds": 3,
        "scores": {},
    }
    (tmp_path / "table.json").write_text(json.dumps(about))
    pd.DataFrame(rows).to_csv(tmp_path / "table.csv.gz", index=False)
    with pytest.raises(BrokenFileError, match=r"lacks 16 trials"):
        ExhaustiveTable.load(tmp_path)


def test_a_plan_whose_judging_run_failed_ranks_last() -> None:
    table = make_table()
    mask = mask_of([1, 3], 4)
    table.outcomes[Trial(mask=mask, lr=table.own_lr(mask), repeat=REPORT_REPEAT)] = Outcome(
        validation_accuracy=None, reason="diverged"
    )
    assert Truth.of(table).test[mask] == -np.inf


def test_within_equal_counts_tied_scores_are_no_agreement() -> None:
    table = make_table(noise=0.0)
    table.scores = {"one": (np.array([0.0, 1.0, 0.0, 0.0]), np.zeros(4))}
    rows = {row["score"]: row["tau_within"] for row in score_agreement(table, Truth.of(table))}
    masks = table.masks
    signs = [
        (int(a[1]) - int(b[1]), np.sign(round(float(GAINS @ np.array(a, float) - GAINS @ np.array(b, float)), 9)))
        for a, b in itertools.combinations(masks, 2) if sum(a) == sum(b)
    ]  # fmt: skip
    ours, theirs = np.array(signs).T
    assert rows["one"] == pytest.approx(ours @ theirs / np.sqrt((ours != 0).sum() * (theirs != 0).sum()))
    assert rows["one"] < 0.9


def test_a_trial_outside_the_table_is_refused() -> None:
    with pytest.raises(UsageError, match="does not hold"):
        make_table().value([Trial(mask=mask_of([1], 4), lr=7.0)])
    assert REPORT_REPEAT > 100


def test_regret_of_rules_that_choose_without_training() -> None:
    table = make_table(noise=0.0)
    rules = {
        "good": lambda k: best_blocks(GAINS.tolist(), k),
        "first k": lambda k: list(range(k)),
        "same": lambda k: list(range(k)),
    }
    choices = pd.DataFrame(selection_table.judged(table, rules))
    found = selection_table.over_sizes(choices).set_index("rule")
    # Best of one, two and three blocks against the first ones, and against the mean of all plans of the size.
    assert found.loc["good", "regret"] == pytest.approx(0)
    assert found.loc["first k", "regret"] == pytest.approx(100 * (0.15 + 0.03 + 0.03) / 3, abs=1e-2)
    assert found.loc["good", "chance_regret"] == pytest.approx(100 * (0.105 + 0.09 + 0.045) / 3, abs=1e-2)
    assert selection_table.alike(choices) == " first k and same choose the same plans on every table."
