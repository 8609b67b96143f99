"""Dropout, cost and snapshots of a classifier."""

from __future__ import annotations

import pytest
import torch

from layerprobe.errors import PlanError
from layerprobe.training import all_trainable, block_plan
from layerprobe.training.classifier import Classifier, Snapshot, set_training, training_flops
from layerprobe.training.freeze_check import FrozenCheck


def test_dropout_acts_only_where_something_trains(make_backbone):
    backbone = make_backbone("gpt2")
    classifier = Classifier(backbone, 4, seed=0)
    FrozenCheck(block_plan(backbone, [2]), classifier)
    set_training(classifier)
    acting = {
        name for name, m in backbone.model.named_modules() if isinstance(m, torch.nn.Dropout) and m.training
    }
    assert all(not name.startswith(("h.0.", "h.1.", "h.3.")) for name in acting)
    assert any(name.startswith("h.2.") for name in acting)


def test_cost_is_six_operations_per_weight_and_token_where_all_trains(make_backbone):
    backbone = make_backbone("llama")
    entries = [sum(p.numel() for p in block.parameters() if p.ndim == 2) for block in backbone.blocks]
    tokens, width, shape = 4, 16, (64, 3, 8, 8)

    def cost(plan, **options):
        classifier = Classifier(backbone, 4, seed=0)
        FrozenCheck(plan, classifier)
        return training_flops(classifier, shape, 10, **options)

    attention = 4 * tokens**2 * width
    everything = 10 * sum(6 * tokens * n + 3 * attention for n in entries)
    assert cost(all_trainable(backbone)) == everything
    # The stem trains: gradients pass through every block, weights' gradients are spared in three of four.
    assert cost(block_plan(backbone, [3])) == everything - 10 * 2 * tokens * sum(entries[:3])
    # Stem frozen, last block trained: three blocks forward only; in the last, no gradient of its input.
    frozen = 10 * (
        sum(2 * tokens * n + attention for n in entries[:3]) + 4 * tokens * entries[3] + 3 * attention
    )
    assert cost(block_plan(backbone, [3], stem="frozen")) == frozen
    kept = 10 * (4 * tokens * entries[3] + 3 * attention)
    assert cost(block_plan(backbone, [3], stem="frozen"), cached_depth=3) == kept


def test_cost_counts_the_experts_that_a_token_is_sent_to(mixture_of_experts):
    classifier = Classifier(mixture_of_experts, 4, seed=0)
    FrozenCheck(all_trainable(mixture_of_experts), classifier)
    attention, router, experts = 2 * 32 * 32 + 2 * 32 * 16, 4 * 32, 2 * 3 * 32 * 64
    block = 6 * 4 * (attention + router + experts) + 3 * 4 * 4**2 * 32
    assert training_flops(classifier, (64, 3, 8, 8), 10) == 10 * 3 * block


def test_a_snapshot_restores_also_after_an_exception_and_sees_what_it_cannot(make_backbone):
    backbone = make_backbone("gpt2")
    before = backbone.model.wpe.weight.detach().clone()
    with pytest.raises(RuntimeError, match="stop"), Snapshot(backbone), torch.no_grad():
        backbone.model.wpe.weight.fill_(float("nan"))
        raise RuntimeError("stop")
    assert torch.equal(backbone.model.wpe.weight, before)
    snapshot = Snapshot(backbone)
    backbone.model.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(PlanError, match="cannot be restored: it gained or lost 1 tensors"):
        snapshot.restore()
