"""Valuing a plan: the chain's guarantees, and that one backbone serves many plans."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerprobe.training import FineTuneConfig, TaskTensors, all_trainable, block_plan, value_plan
from layerprobe.training.classifier import digest


def digests(backbone):
    state = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    return {name: digest(tensor) for name, tensor in state.items()}


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "vit"])
def test_the_backbone_comes_back_bit_for_bit_and_the_value_repeats(family, make_backbone, task):
    backbone = make_backbone(family)
    tensors = TaskTensors.of(backbone, task)
    before = digests(backbone)
    flags = {name: p.requires_grad for name, p in backbone.named_parameters()}
    random_state = torch.get_rng_state()
    plan = block_plan(backbone, [1, 2])
    first, other, again = (
        value_plan(backbone, tensors, p, lr=3e-3, seed=1, bridge_steps=3, finetune_steps=4, test=True)
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


def test_the_chain_learns_the_task(make_backbone, task):
    backbone = make_backbone("gpt2")
    tensors = TaskTensors.of(backbone, task)
    outcome = value_plan(
        backbone,
        tensors,
        all_trainable(backbone),
        lr=1e-2,
        seed=0,
        bridge_steps=0,
        finetune_steps=60,
        finetune=FineTuneConfig(flip=False),  # a mirrored corner is another class
        test=True,
    )
    assert outcome.validation_accuracy > 0.8  # chance is 0.25
    assert outcome.test_accuracy > 0.8
    assert outcome.bridge_accuracy is None


def test_test_images_are_judged_only_when_asked(make_backbone, task):
    backbone = make_backbone("gpt2")
    tensors = TaskTensors.of(backbone, task, ("train", "validation"))
    outcome = value_plan(
        backbone, tensors, all_trainable(backbone), lr=1e-3, seed=0, bridge_steps=1, finetune_steps=1
    )
    assert outcome.test_accuracy is None and outcome.test_correct is None


def test_a_frozen_stem_lets_the_frozen_prefix_be_kept(make_backbone, task):
    """Kept or computed again, the frozen prefix gives the same training up to rounding of the last bits."""
    backbone = make_backbone("gpt2")
    tensors = TaskTensors.of(backbone, task)
    plan = block_plan(backbone, [3], stem="frozen")
    kept, computed = (
        value_plan(
            backbone,
            tensors,
            plan,
            lr=1e-2,
            seed=0,
            bridge_steps=0,
            finetune_steps=30,
            finetune=FineTuneConfig(augment="none", cache_prefix=keep, batch_size=16),
        )
        for keep in (True, False)
    )
    assert kept.validation_accuracy == pytest.approx(computed.validation_accuracy, abs=0.07)
    assert kept.train_flops < computed.train_flops


def test_a_rate_far_too_high_is_a_reason_not_a_number(make_backbone, task):
    backbone = make_backbone("gpt2")
    tensors = TaskTensors.of(backbone, task)
    before = digests(backbone)
    outcome = value_plan(
        backbone,
        tensors,
        all_trainable(backbone),
        lr=1e4,
        seed=0,
        bridge_steps=0,
        finetune_steps=200,
        finetune=FineTuneConfig(clip_norm=None, warmup=0.0),
    )
    assert outcome.validation_accuracy is None
    assert outcome.reason.startswith("diverged: step ")
    assert digests(backbone) == before
