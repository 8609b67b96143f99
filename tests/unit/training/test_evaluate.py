"""Evaluation: choice of the learning rate, arms, and finished work found again."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import layerprobe as lp
import layerprobe.training.bridge as bridge_module
from layerprobe.errors import UnknownNameError, UsageError
from layerprobe.files import tensor_digest
from layerprobe.search.settings import identify, make_settings
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


@pytest.mark.parametrize("family", ["gpt2", "vit"])
def test_nothing_stored_of_the_untrained_backbone_is_taken_for_the_trained_one(
    model_folder, tmp_path, family
):
    task, options = lp.load_task("digits", limit=60), {} if family == "vit" else {"patch_size": 4}
    backbone = lp.load_backbone(str(model_folder(family)), device="cpu", **options).prepare(task)
    output, settings = tmp_path / "out", make_settings()
    plan = block_plan(backbone, [1], stem="frozen")
    bridge = BridgeConfig(steps=2, batch_size=16, random_classes=4, lr=1e-2)
    evaluate(backbone, task, config=QUICK, output=output)
    features = lp.extract_features(backbone, task, split="test", quiet=True)
    searched, revision = identify(backbone, task, settings), backbone.source.revision
    nothing_moved = bridge_train(backbone, task, plan=block_plan(backbone, [], stem="frozen"), config=bridge)
    assert nothing_moved.backbone.source.revision == revision
    run = bridge_train(backbone, task, plan=plan, config=bridge)
    assert run.about["revision"] == revision  # where the training began
    assert backbone.source.revision.startswith(f"{revision}+trained-") and backbone.loaded_with is None
    with pytest.raises(UsageError, match="an evaluation with other settings"):
        evaluate(
            run, task, plan=block_plan(backbone, range(4), outside="trainable"), config=QUICK, output=output
        )
    found = lp.extract_features(backbone, task, split="test", quiet=True)
    fresh = lp.extract_features(backbone, task, split="test", quiet=True, cache_dir=tmp_path / "fresh")
    last = list(found)[-1]
    assert np.array_equal(found[last], fresh[last]) and not np.array_equal(found[last], features[last])
    assert identify(backbone, task, settings)["revision"] != searched["revision"]
    scores = lp.transfer_scores(backbone, task, families=["readable"], n_replicates=0, quiet=True).to_frame()
    assert set(scores["revision"]) == {backbone.source.revision}
    with pytest.raises(UsageError, match="this one was trained in place since it was loaded"):
        bridge_train(
            backbone, task, plan=plan, config=bridge.replace(save="trained"), output=tmp_path / "run"
        )
    once = backbone.source.revision
    bridge_train(backbone, task, plan=plan, config=bridge)
    assert backbone.source.revision != once and backbone.source.revision.count("+trained-") == 1


def test_a_training_that_was_broken_off_renames_the_backbone(make_backbone, task, monkeypatch):
    backbone = make_backbone("gpt2")
    before = backbone.source.revision
    monkeypatch.setattr(bridge_module._Training, "_finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bridge_train(backbone, task, config=BridgeConfig(steps=1, batch_size=16, random_classes=4))
    assert backbone.source.revision.startswith(f"{before}+trained-")


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
