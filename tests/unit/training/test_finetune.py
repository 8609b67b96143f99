"""Training and scoring a plan: what is guaranteed, and that one backbone serves many plans."""

from __future__ import annotations

import json

import families
import numpy as np
import pytest
import torch

from layerprobe.backbones import load_backbone
from layerprobe.errors import UsageError
from layerprobe.files import tensor_digest
from layerprobe.metrics.probing.logistic import fit_logistic_path
from layerprobe.training import (
    BridgeConfig,
    FineTuneConfig,
    Outcome,
    TaskTensors,
    all_trainable,
    block_plan,
    train_and_score,
)
from layerprobe.training.classifier import Classifier
from layerprobe.training.finetune import PROBE_C, choose_rate, run_stage, start_from_probe


def digests(backbone):
    state = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    return {name: tensor_digest(tensor) for name, tensor in state.items()}


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "vit"])
def test_the_backbone_comes_back_bit_for_bit_and_the_value_repeats(family, make_backbone, task):
    backbone = make_backbone(family)
    tensors = TaskTensors.of(backbone, task)
    before = digests(backbone)
    flags = {name: p.requires_grad for name, p in backbone.named_parameters()}
    random_state = torch.get_rng_state()
    plan = block_plan(backbone, [1, 2])
    first, other, again = (
        train_and_score(
            backbone,
            tensors,
            p,
            bridge=BridgeConfig(lr=3e-3, seed=1, steps=3, batch_size=64),
            finetune=FineTuneConfig(lr=3e-3, seed=1, steps=4, batch_size=64),
            test=True,
        )
        for p in (plan, all_trainable(backbone), plan)
    )
    assert digests(backbone) == before
    assert {name: p.requires_grad for name, p in backbone.named_parameters()} == flags
    assert torch.equal(torch.get_rng_state(), random_state)
    assert first.reason is None
    assert np.array_equal(first.test_correct, again.test_correct)
    assert first.validation_accuracy == again.validation_accuracy
    assert first.n_validation == 32
    assert first.trainable_parameters < other.trainable_parameters
    assert first.train_flops < other.train_flops


def test_a_head_starts_as_the_probe_of_the_frozen_features(make_backbone, task):
    backbone = make_backbone("gpt2")
    tensors = TaskTensors.of(backbone, task)
    classifier = Classifier(backbone, tensors.n_classes + 1, seed=0)  # the last class has no image
    pixels, labels = tensors.pixels["train"], tensors.labels["train"]
    start_from_probe(classifier, pixels, labels)
    with torch.no_grad():
        features = backbone.eval().pool(backbone(pixels[np.arange(len(pixels))])).float().numpy()
        logits = classifier(pixels[np.arange(len(pixels))]).numpy()
    probe = fit_logistic_path(features, labels, [PROBE_C], tol=1e-3)[0]
    assert (probe.scale > 0.01 * probe.scale.max()).all(), "no column is dead here"
    expected = (features - probe.mean) / probe.scale @ probe.coef.T + probe.intercept
    assert np.allclose(logits[:, :-1], expected, atol=1e-3)
    assert (logits[:, -1] <= logits[:, :-1].max(1) + 1e-3).all()
    assert (logits.argmax(1) == labels).mean() > 0.5  # chance is 0.25


def test_a_column_that_hardly_varies_gets_no_huge_weight(make_backbone, task, monkeypatch):
    backbone = make_backbone("gpt2")
    tensors = TaskTensors.of(backbone, task)
    classifier = Classifier(backbone, tensors.n_classes, seed=0)
    pooling = backbone.pool

    def pool(hidden):
        found = pooling(hidden).clone()
        found[:, 0] *= 1e-7
        return found

    monkeypatch.setattr(backbone, "pool", pool)
    start_from_probe(classifier, tensors.pixels["train"], tensors.labels["train"])
    assert classifier.head.weight.abs().max() < 1e4


def test_few_steps_from_a_probe_beat_a_random_head(make_backbone, task):
    backbone = make_backbone("gpt2")
    tensors = TaskTensors.of(backbone, task)
    found = {
        head: train_and_score(
            backbone, tensors, block_plan(backbone, []), bridge=None,
            finetune=FineTuneConfig(lr=1e-4, steps=2, flip=False, head=head, batch_size=16), test=True,
        ).test_accuracy
        for head in ("random", "probe")
    }  # fmt: skip
    assert found["probe"] > found["random"]


def test_the_chain_learns_the_task(make_backbone, task):
    backbone = make_backbone("gpt2")
    tensors = TaskTensors.of(backbone, task)
    outcome = train_and_score(
        backbone,
        tensors,
        all_trainable(backbone),
        bridge=None,
        finetune=FineTuneConfig(lr=1e-2, steps=60, flip=False),  # a mirrored corner is another class
        test=True,
    )
    assert outcome.validation_accuracy > 0.8  # chance is 0.25
    assert outcome.test_accuracy > 0.8
    assert outcome.bridge_accuracy is None


def test_test_images_are_judged_only_when_asked(make_backbone, task):
    backbone = make_backbone("gpt2")
    tensors = TaskTensors.of(backbone, task, ("train", "validation"))
    outcome = train_and_score(
        backbone,
        tensors,
        all_trainable(backbone),
        bridge=BridgeConfig(steps=1, batch_size=64),
        finetune=FineTuneConfig(steps=1, batch_size=64),
    )
    assert outcome.test_accuracy is None and outcome.test_correct is None


def test_a_frozen_stem_lets_the_frozen_prefix_be_kept(make_backbone, task):
    """Kept or computed again, the frozen prefix gives the same training up to rounding of the last bits."""
    backbone = make_backbone("gpt2")
    tensors = TaskTensors.of(backbone, task)
    plan = block_plan(backbone, [3], stem="frozen")
    kept, computed = (
        train_and_score(
            backbone,
            tensors,
            plan,
            bridge=None,
            finetune=FineTuneConfig(lr=1e-2, steps=30, augment="none", cache_prefix=keep, batch_size=16),
        )
        for keep in (True, False)
    )
    assert kept.validation_accuracy == pytest.approx(computed.validation_accuracy, abs=0.07)
    assert kept.train_flops < computed.train_flops


def test_a_stage_trains_the_stem_first_and_counts_each_phase(make_backbone, task):
    backbone = make_backbone("gpt2")
    tensors = TaskTensors.of(backbone, task)
    config = BridgeConfig(steps=4, batch_size=16, random_classes=4, weight_decay=0.1)
    flops = []
    for stem_steps in (0, 2, 4):
        backbone = make_backbone("gpt2")
        before = digests(backbone.model)
        stage = run_stage(
            backbone, tensors, config.replace(stem_steps=stem_steps), plan=all_trainable(backbone)
        )
        flops.append(stage.flops)
        assert (digests(backbone.model) == before) == (stem_steps == 4)
    assert flops[2] < flops[1] < flops[0]


def test_candidate_rates_have_the_phases_of_the_run(make_backbone, task, monkeypatch):
    backbone = make_backbone("gpt2")
    tensors = TaskTensors.of(backbone, task)
    config = BridgeConfig(steps=40, stem_steps=10, lrs=(1e-3, 1e-2), lr_steps=4, random_classes=4)
    seen = []

    def look(backbone, tensors, trial, **options):
        seen.append((trial.steps, trial.stem_steps))
        return run_stage(backbone, tensors, trial, **options)

    monkeypatch.setattr("layerprobe.training.finetune.run_stage", look)
    choose_rate(backbone, tensors, tensors.random_labels(config), all_trainable(backbone), config, quiet=True)
    assert seen == [(4, 1), (4, 1)]


def test_a_stage_checkpoints_gradients_where_asked(make_backbone, task):
    backbone = make_backbone("gpt2")
    tensors = TaskTensors.of(backbone, task)
    block, seen = backbone.blocks[0], []
    block.register_forward_hook(lambda *_args: seen.append(block.gradient_checkpointing))
    config = FineTuneConfig(steps=1, batch_size=16, gradient_checkpointing=True)
    run_stage(backbone, tensors, config, plan=all_trainable(backbone))
    assert seen[0] and not block.gradient_checkpointing


def test_a_stage_trains_the_compiled_model_where_asked(make_backbone, task, monkeypatch):
    calls = []

    class Traced(torch.nn.Module):
        def __init__(self, classifier):
            super().__init__()
            self.classifier = classifier

        def forward(self, pixels):
            calls.append(self.classifier)
            return self.classifier(pixels)

    monkeypatch.setattr(torch, "compile", Traced)
    trained = []
    for compiled in (False, True):
        backbone = make_backbone("gpt2")
        config = FineTuneConfig(steps=3, batch_size=16, compile=compiled)
        stage = run_stage(backbone, TaskTensors.of(backbone, task), config, plan=block_plan(backbone, [1, 2]))
        assert isinstance(stage.classifier, Classifier)
        assert calls == ([stage.classifier] * 3 if compiled else [])
        trained.append(digests(backbone))
    assert trained[0] == trained[1]


def test_no_block_is_skipped_at_random(task):
    backbone = load_backbone(families.build("opt", layerdrop=0.9), patch_size=4).prepare(task)
    calls = []
    for block in backbone.blocks:
        block.register_forward_hook(lambda ran, *_args: calls.append(ran))
    config = FineTuneConfig(steps=3, batch_size=16)
    tensors = TaskTensors.of(backbone, task)
    calls.clear()
    run_stage(backbone, tensors, config, plan=block_plan(backbone, [2], outside="trainable"))
    assert len(calls) >= 9 and calls == [*backbone.blocks] * (len(calls) // 3)
    assert {m.layerdrop for m in backbone.model.modules() if hasattr(m, "layerdrop")} == {0.9}


def test_a_rate_far_too_high_is_a_reason_not_a_number(make_backbone, task):
    backbone = make_backbone("gpt2")
    tensors = TaskTensors.of(backbone, task)
    before = digests(backbone)
    outcome = train_and_score(
        backbone,
        tensors,
        all_trainable(backbone),
        bridge=None,
        finetune=FineTuneConfig(lr=1e4, steps=200, clip_norm=None, warmup=0.0),
    )
    assert outcome.validation_accuracy is None
    assert outcome.reason.startswith("diverged: step ")
    assert digests(backbone) == before


def test_an_outcome_survives_json():
    found = Outcome(validation_accuracy=0.5, train_seconds=2.0, call_seconds=3.0, steps=7, reason=None)
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert Outcome.from_dict(stored) == found


def test_plans_are_scored_in_one_process(make_backbone, task, monkeypatch):
    from types import SimpleNamespace

    from layerprobe.training import FineTuneConfig, TaskTensors, all_trainable, finetune

    monkeypatch.setattr(finetune, "make_accelerator", lambda *_args: SimpleNamespace(num_processes=2))
    backbone = make_backbone()
    with pytest.raises(UsageError, match="fine-tuning and plan values run in one process, not 2"):
        finetune.train_and_score(
            backbone,
            TaskTensors.of(backbone, task),
            all_trainable(backbone),
            bridge=None,
            finetune=FineTuneConfig(),
        )
