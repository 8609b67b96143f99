"""The record of an evaluation: intervals, paired differences, and what its table shows."""

from __future__ import annotations

import dataclasses

import pytest

from layerprobe.metrics.intervals import wilson_interval
from layerprobe.training.arms import ArmRun, Evaluation

ABOUT = {"model": "tiny", "revision": None, "task": "corners"}


def trial(arm, seed, test, *, lr=1e-3, validation=0.5, reason=None, n=100):
    return ArmRun(
        arm=arm,
        lr=lr,
        seed=seed,
        validation_accuracy=validation,
        test_accuracy=test,
        n_validation=100,
        n_test=n,
        trainable_parameters=10,
        train_flops=1e9,
        train_seconds=1.0,
        reason=reason,
    )


def record_of(trials, *, lr=1e-3):
    chosen = dict.fromkeys((t.arm for t in trials), lr)
    return Evaluation(mode="finetune", trials=trials, chosen=chosen, about=ABOUT)


def test_one_seed_has_a_wilson_interval_and_several_a_t_interval():
    one = record_of([trial("model", 0, 0.6)])
    found = one.interval("model")
    assert (found.low, found.high) == pytest.approx(wilson_interval(60, 100))
    assert one.interval_kind("model") == "Wilson 95 % over 100 images, 1 seed"
    three = record_of([trial("model", s, v, n=10**6) for s, v in enumerate((0.5, 0.6, 0.7))])
    found = three.interval("model")
    # s.d. 0.1 over 3 seeds; t(0.975, 2 d.f.) = 4.302653
    half = 4.302653 * 0.1 / 3**0.5
    assert found.value == pytest.approx(0.6)
    assert 0.85 * 2 * half < found.high - found.low < 2 * half and 0 < found.low < found.high < 1
    assert three.interval_kind("model") == "95 % over 3 seeds and 1,000,000 images"


def test_equal_seeds_leave_the_images_and_are_no_claim():
    trials = [trial("language", s, 0.605) for s in range(2)] + [trial("random", s, 0.6) for s in range(2)]
    (row,) = record_of(trials).differences()
    assert row["low"] < 0 < row["high"] and row["pvalue"] > 0.5
    perfect = record_of([trial("model", s, 1.0) for s in range(3)]).interval("model")
    assert perfect.high == 1.0 and perfect.low < 0.98


def test_differences_pair_common_seeds_and_say_what_they_answer():
    trials = [trial("language", s, v, n=10_000) for s, v in enumerate((0.50, 0.60, 0.71))]
    trials += [trial("random", s, v, n=10_000) for s, v in enumerate((0.40, 0.50, 0.60))]
    record = record_of(trials)
    (row,) = record.differences()
    assert (row["arm"], row["versus"], row["n"]) == ("language", "random", 3)
    assert row["value"] == pytest.approx(0.31 / 3)
    assert row["low"] > 0
    assert "Does language pretraining help? yes: language − random = +10.3 points" in record.summary()
    frame = record.to_frame()
    assert frame.query("metric == 'test_accuracy_difference'")["value"].item() == pytest.approx(0.31 / 3)


def test_rejected_learning_rates_are_never_judged_on_test_in_the_table():
    trials = [
        trial("model", 0, 0.9, lr=1e-2, validation=0.1),
        trial("model", 0, 0.6, lr=1e-3, validation=0.5),
    ]
    frame = record_of(trials).to_frame()
    assert set(frame.query("metric == 'test_accuracy'")["lr"]) == {1e-3}
    assert len(frame.query("metric == 'validation_accuracy'")) == 2


def test_an_arm_that_diverged_is_a_row_with_a_reason():
    bad = trial("model", 0, None, lr=1.0, validation=None, reason="diverged: step 3")
    record = record_of([bad], lr=1.0)
    row = record.to_frame().query("metric == 'test_accuracy_mean'").iloc[0]
    assert row["reason"] == "diverged: step 3"
    assert row["value"] is None or row["value"] != row["value"]
    record.to_json()


def test_figures_draw_every_arm(tmp_path):
    from matplotlib.figure import Figure

    from layerprobe.plotting.bridge import plot_accuracy_against

    trials = [trial(arm, s, 0.5 + 0.01 * s) for arm in ("language", "random") for s in range(3)]
    record = record_of(trials)
    for x in ("train_flops", "train_seconds", "trainable_parameters"):
        ax = plot_accuracy_against(record.to_frame(), x, ax=Figure().subplots())
        assert {t.get_text() for t in ax.texts} == {"language", "random"}


def test_nothing_is_claimed_of_a_bridge_that_recalls_few_labels():
    values = {"full-bridge": (0.70, 0.71, 0.72), "language": (0.50, 0.51, 0.52)}
    for recall, words in (
        (0.95, "help? yes"),
        (0.12, "no claim, since the bridge of full-bridge recalls 12 % of"),
    ):
        trials = [
            dataclasses.replace(
                trial(arm, s, v, n=10_000), bridge_accuracy=recall if "bridge" in arm else None
            )
            for arm, each in values.items()
            for s, v in enumerate(each)
        ]
        assert words in record_of(trials).summary()
