"""Replays on a made-up table, and the measures of a search against independent counts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from agreement import score_agreement
from replay import (
    ExhaustiveTable,
    Truth,
    judging_trials,
    place_of,
    replay,
    selection_trials,
    upper_third_test,
    whole_table,
)

from layerprobe.errors import BrokenFileError, UsageError
from layerprobe.search.space import REPORT_REPEAT, Space, Trial, mask_of, strip
from layerprobe.training import Outcome

LRS = (1e-3, 3e-3)
GAINS = np.array([0.0, 0.15, 0.0, 0.03])


def accuracy(trial: Trial, noise: float) -> float:
    seed = [trial.repeat, *map(int, trial.mask), round(1e4 * trial.lr), int(4 * trial.fidelity)]
    value = 0.3 + float(GAINS @ np.array(trial.mask, float)) - 0.05 * (trial.lr == 3e-3)
    return value - 0.1 * (1 - trial.fidelity) + noise * np.random.default_rng(seed).standard_normal()


def make_table(noise: float = 0.005) -> ExhaustiveTable:
    space = Space((100,) * 4)
    table = ExhaustiveTable(name="made-up", space=space, lrs=LRS, seeds=3, fidelity=0.25, outcomes={})
    for trial in selection_trials(space, LRS, 3, 0.25):
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
    assert whole_table(table, truth)["plan"] != ".#.#", "a plan whose runs fail is no answer"


@pytest.mark.parametrize("strategy", ["racing", "random", "tpe", "nsga2", "greedy"])
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
        short = Trial(mask=mask, lr=lr, repeat=0, fidelity=table.fidelity)
        assert table.budget(99.0, seed=seed).train([short]) == {
            short: table.outcomes[short].validation_accuracy
        }


def test_measures_of_a_replay_agree_with_plain_counting() -> None:
    table = make_table()
    truth = Truth.of(table)
    found = replay(table, truth, "racing", 30.0, seed=1)
    answer = tuple(mark == "#" for mark in found["plan"])
    peers = [mask for mask in table.masks if sum(mask) == sum(answer)]
    tests = sorted((truth.test[mask] for mask in peers), reverse=True)
    assert found["place"] == tests.index(truth.test[answer]) + 1 and found["of"] == len(peers)
    assert found["regret"] == pytest.approx(100 * (truth.test[truth.optimum] - truth.test[answer]))
    assert found["excess_blocks"] == sum(answer) - truth.sufficient


def test_upper_third_against_enumeration() -> None:
    table = make_table()
    truth = Truth.of(table)
    one, two = [[m for m in table.masks if sum(m) == size] for size in (1, 2)]
    picked = [one[0], one[0], one[2], two[1], two[4], two[4], table.space.all]
    ranked = [sorted(peers, key=lambda m: -truth.test[m])[: len(peers) // 3] for peers in (one, two)]
    expected_hits = sum(mask in [*ranked[0], *ranked[1]] for mask in picked)
    outcomes = [
        sum(mask in (*first, *second) for mask in picked)
        for first in itertools.combinations(one, 1)
        for second in itertools.combinations(two, 2)
    ]
    hits, cases, p = upper_third_test([(truth, picked)])
    assert (hits, cases) == (expected_hits, 6), "one plan of all blocks has no upper third"
    assert p == pytest.approx(np.mean(np.array(outcomes) >= hits))
    twice = upper_third_test([(truth, picked), (truth, picked)])
    pairs = np.add.outer(outcomes, outcomes)
    assert twice == (2 * hits, 12, pytest.approx(np.mean(pairs >= 2 * hits)))


def test_the_same_pick_many_times_is_no_stronger_evidence() -> None:
    table = make_table()
    truth = Truth.of(table)
    best = max((m for m in table.masks if sum(m) == 2), key=lambda m: truth.test[m])
    assert upper_third_test([(truth, [best] * 10)]) == (10, 10, pytest.approx(2 / 6))
    assert upper_third_test([(truth, [])]) == (0, 0, 1.0)


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
            "fidelity": t.fidelity,
            "validation_accuracy": o.validation_accuracy,
            "test_accuracy": o.test_accuracy,
            "seconds": o.train_seconds,
        }
        for t, o in table.outcomes.items()
    ]
    about = {"name": "made-up", "block_params": [100] * 4, "lrs": list(LRS), "seeds": 3, "fidelity": 0.25}
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
            "plan": strip(t.mask), "lr": t.lr, "repeat": t.repeat, "fidelity": t.fidelity,
            "validation_accuracy": o.validation_accuracy, "test_accuracy": o.test_accuracy, "seconds": o.train_seconds,
        }
        for t, o in table.outcomes.items() if t.repeat < REPORT_REPEAT + 2
    ]  # fmt: skip
    about = {
        "name": "made-up",
        "block_params": [100] * 4,
        "lrs": list(LRS),
        "seeds": 3,
        "fidelity": 0.25,
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
    truth = Truth.of(table)
    assert place_of(truth, mask) == 6
    assert upper_third_test([(truth, [mask])])[0] == 0


def test_the_rate_that_a_strategy_chose_is_compared_with_the_tables_own() -> None:
    table = make_table(noise=0.0)
    for trial, outcome in table.outcomes.items():
        if trial.fidelity < 1 and trial.lr == 3e-3:  # on short runs the wrong rate looks better
            table.outcomes[trial] = Outcome(validation_accuracy=outcome.validation_accuracy + 0.2)
    found = replay(table, Truth.of(table), "prefix", 8.0, seed=0)
    assert (found["lr"], found["own_lr"]) == (3e-3, 1e-3)
    assert found["lr_loss"] == pytest.approx(5.0)


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
