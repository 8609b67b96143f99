"""Evaluation: intervals, choice of the learning rate, arms, and finished work found again."""

from __future__ import annotations

import sys

import pytest

from layerprobe.errors import UnknownNameError, UsageError
from layerprobe.metrics.intervals import wilson_interval
from layerprobe.training import (
    BridgeConfig,
    FineTuneConfig,
    block_plan,
    bridge_train,
    evaluate,
    evaluate_arms,
)
from layerprobe.training.classifier import digest
from layerprobe.training.evaluation import Evaluation, Trial

QUICK = FineTuneConfig(steps=3, batch_size=16, lrs=(1e-3,), flip=False)
ABOUT = {"model": "tiny", "revision": None, "task": "corners"}


def trial(arm, seed, test, *, lr=1e-3, validation=0.5):
    return Trial(arm, lr, seed, validation, test, 100, 100, 10, 1e9, 1.0)


def test_one_seed_has_a_wilson_interval_and_several_a_t_interval():
    one = Evaluation("finetune", [trial("model", 0, 0.6)], {"model": 1e-3}, ABOUT)
    assert one.interval("model")[1:3] == pytest.approx(wilson_interval(60, 100))
    assert "Wilson" in one.interval("model")[3]
    three = Evaluation(
        "finetune", [trial("model", s, v) for s, v in enumerate((0.5, 0.6, 0.7))], {"model": 1e-3}, ABOUT
    )
    mean, low, high, kind = three.interval("model")
    # s.d. 0.1 over 3 seeds; t(0.975, 2 d.f.) = 4.302653
    assert (mean, high - mean, mean - low) == pytest.approx(
        (0.6, 4.302653 * 0.1 / 3**0.5, 4.302653 * 0.1 / 3**0.5)
    )
    assert kind == "t 95% over 3 seeds"


def test_differences_pair_common_seeds_and_say_what_they_answer():
    trials = [trial("language", s, v) for s, v in enumerate((0.50, 0.60, 0.71))]
    trials += [trial("random", s, v) for s, v in enumerate((0.40, 0.50, 0.60))]
    record = Evaluation("finetune", trials, {"language": 1e-3, "random": 1e-3}, ABOUT)
    (row,) = record.differences()
    assert (row["arm"], row["versus"], row["n"]) == ("language", "random", 3)
    assert row["value"] == pytest.approx(0.31 / 3)
    assert row["low"] > 0
    assert "Does language pretraining help? yes: language − random = +10.33 points" in record.summary()
    frame = record.to_frame()
    assert frame.query("metric == 'test_accuracy_difference'")["value"].item() == pytest.approx(0.31 / 3)


def test_rejected_learning_rates_are_never_judged_on_test_in_the_table():
    trials = [
        trial("model", 0, 0.9, lr=1e-2, validation=0.1),
        trial("model", 0, 0.6, lr=1e-3, validation=0.5),
    ]
    frame = Evaluation("finetune", trials, {"model": 1e-3}, ABOUT).to_frame()
    assert set(frame.query("metric == 'test_accuracy'")["lr"]) == {1e-3}
    assert len(frame.query("metric == 'validation_accuracy'")) == 2


def test_an_arm_that_diverged_is_a_row_with_a_reason():
    bad = Trial("model", 1.0, 0, None, None, 100, 100, 10, 0.0, 0.0, reason="diverged: step 3")
    record = Evaluation("finetune", [bad], {"model": 1.0}, ABOUT)
    row = record.to_frame().query("metric == 'test_accuracy_mean'").iloc[0]
    assert row["reason"] == "diverged: step 3"
    assert row["value"] is None or row["value"] != row["value"]
    record.to_json()


def test_each_rate_is_tried_and_the_best_on_validation_is_taken(make_backbone, task):
    config = QUICK.replace(steps=40, lrs=(1e-7, 1e-2))
    record = evaluate(make_backbone("gpt2"), task, config=config, seeds=(0, 1))
    assert record.chosen == {"model": 1e-2}
    assert sorted(record.accuracies("model")) == [0, 1]
    assert len(record.trials) == 3
    assert min(record.accuracies("model").values()) > 0.5  # chance is 0.25


def test_a_bridge_run_is_fine_tuned_under_its_own_plan_and_left_as_it_was(make_backbone, task):
    backbone = make_backbone("gpt2")
    run = bridge_train(
        backbone,
        task,
        plan=block_plan(backbone, [1]),
        config=BridgeConfig(steps=2, batch_size=16, random_classes=4),
    )
    before = {n: digest(p) for n, p in backbone.named_parameters()}
    record = evaluate(run, task, config=QUICK)
    assert record.trials[0].trainable_parameters == run.plan.counts["trainable_parameters"]
    assert {n: digest(p) for n, p in backbone.named_parameters()} == before


def test_few_shots_use_so_many_images_per_class(make_backbone, task):
    record = evaluate(
        make_backbone("gpt2"), task, mode="fewshot", config=QUICK.replace(shots=2, batch_size=4)
    )
    assert record.mode == "fewshot"
    assert record.trials[0].test_accuracy is not None


def test_a_probe_reads_what_the_frozen_output_says(make_backbone, task):
    backbone = make_backbone("gpt2")
    before = {n: digest(p) for n, p in backbone.named_parameters()}
    record = evaluate(backbone, task, mode="probe")
    assert record.accuracies("model")[0] > 0.45  # chance is 0.25
    assert record.chosen == {"model": None}
    assert {n: digest(p) for n, p in backbone.named_parameters()} == before


def test_arms_share_seeds_and_finished_trainings_are_kept(make_backbone, task, tmp_path, monkeypatch):
    calls = []

    def load(init, seed):
        calls.append((init, seed))
        return make_backbone("gpt2", init=init, seed=seed)

    options = {
        "plan": block_plan(make_backbone("gpt2"), [3]),
        "bridge": BridgeConfig(steps=2, batch_size=16, random_classes=4),
        "finetune": QUICK,
        "seeds": (0, 1),
        "output": tmp_path / "arms",
    }
    arms = ["language", "bridge", "full-bridge", "random", "none"]
    record = evaluate_arms(load, task, arms, **options)
    assert record.arms == arms
    assert all(sorted(record.accuracies(arm)) == [0, 1] for arm in arms)
    assert {"random"} == {init for init, _ in calls if init != "pretrained"}
    none, bridge, full = (record.of(arm)[0].trainable_parameters for arm in ("none", "bridge", "full-bridge"))
    assert 0 == none < bridge < full
    asked = {(row["arm"], row["versus"]) for row in record.differences()}
    assert asked >= {("language", "random"), ("full-bridge", "language"), ("bridge", "full-bridge")}

    module = sys.modules["layerprobe.training.evaluate"]
    monkeypatch.setattr(module, "train_and_score", None)  # nothing may be trained again
    again = evaluate_arms(load, task, arms, **options)
    assert [t.test_accuracy for t in again.trials] == [t.test_accuracy for t in record.trials]
    with pytest.raises(UsageError, match="holds an evaluation with other settings"):
        evaluate_arms(load, task, arms, **{**options, "finetune": QUICK.replace(steps=4)})


def test_an_arm_that_needs_a_plan(make_backbone, task):
    with pytest.raises(UsageError, match="the arm 'bridge' trains a freeze plan; give one with --plan"):
        evaluate_arms(lambda init, seed: make_backbone(), task, ["bridge"])


def test_an_unknown_arm_and_mode(make_backbone, task):
    with pytest.raises(UnknownNameError, match=r"unknown arm .langage.\. Did you mean .language."):
        evaluate_arms(lambda init, seed: make_backbone(), task, ["langage"])
    with pytest.raises(UnknownNameError, match="unknown mode 'prob'"):
        evaluate(make_backbone(), task, mode="prob")


def test_figures_draw_every_arm(tmp_path):
    from matplotlib.figure import Figure

    from layerprobe.plotting.bridge import plot_accuracy_against

    trials = [trial(arm, s, 0.5 + 0.01 * s) for arm in ("language", "random") for s in range(3)]
    record = Evaluation("finetune", trials, {"language": 1e-3, "random": 1e-3}, ABOUT)
    for x in ("train_flops", "train_seconds", "trainable_parameters"):
        ax = plot_accuracy_against(record.to_frame(), x, ax=Figure().subplots())
        assert {t.get_text() for t in ax.get_legend().get_texts()} == {"language", "random"}
