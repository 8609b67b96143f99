"""Evaluation: choice of the learning rate, arms, and finished work found again."""

from __future__ import annotations

import sys

import pytest

from layerprobe.errors import UnknownNameError, UsageError
from layerprobe.files import tensor_digest
from layerprobe.training import (
    BridgeConfig,
    FineTuneConfig,
    block_plan,
    bridge_train,
    evaluate,
    evaluate_arms,
)

QUICK = FineTuneConfig(steps=3, batch_size=16, lrs=(1e-3,), flip=False)


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
    before = {n: tensor_digest(p) for n, p in backbone.named_parameters()}
    record = evaluate(run, task, config=QUICK)
    assert record.trials[0].trainable_parameters == run.plan.counts["trainable_parameters"]
    assert {n: tensor_digest(p) for n, p in backbone.named_parameters()} == before


def test_few_shots_use_so_many_images_per_class(make_backbone, task):
    record = evaluate(
        make_backbone("gpt2"), task, mode="fewshot", config=QUICK.replace(shots=2, batch_size=4)
    )
    assert record.mode == "fewshot"
    assert record.trials[0].test_accuracy is not None


def test_a_probe_reads_what_the_frozen_output_says(make_backbone, task):
    backbone = make_backbone("gpt2")
    before = {n: tensor_digest(p) for n, p in backbone.named_parameters()}
    record = evaluate(backbone, task, mode="probe")
    assert record.accuracies("model")[0] > 0.45  # chance is 0.25
    assert record.chosen == {"model": None}
    assert {n: tensor_digest(p) for n, p in backbone.named_parameters()} == before


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

    module = sys.modules["layerprobe.training.evaluation"]
    monkeypatch.setattr(module, "train_and_score", None)  # nothing may be trained again
    again = evaluate_arms(load, task, arms, **options)
    assert [t.test_accuracy for t in again.trials] == [t.test_accuracy for t in record.trials]
    assert again.differences() == record.differences()
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
