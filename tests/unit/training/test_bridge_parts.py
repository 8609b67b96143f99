"""The trainer's parts against independent formulas: optimizer, dropout, kept prefix, cost, drift, guard, shards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerprobe.errors import PlanError, UsageError
from layerprobe.training import TaskTensors, all_trainable, block_plan
from layerprobe.training.bridge_run import drift_rows, initial_weights
from layerprobe.training.classifier import Classifier, Snapshot, set_training, training_flops
from layerprobe.training.config import BridgeConfig, FineTuneConfig
from layerprobe.training.freeze_check import FrozenCheck
from layerprobe.training.loop import make_optimizer, make_prefix

FAMILIES = ["gpt2", "llama", "bert", "vit"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_optimizer_holds_stem_head_and_exactly_the_plan(family, make_backbone):
    backbone = make_backbone(family)
    plan = block_plan(backbone, [1])
    classifier = Classifier(backbone, 4, seed=0)
    FrozenCheck(plan, classifier)
    optimizer = make_optimizer(classifier, FineTuneConfig(weight_decay=0.3))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, p in classifier.named_parameters() if id(p) in held}
    wanted = {f"backbone.model.{name}" for name in plan.trainable} | {"head.weight", "head.bias"}
    if backbone.stem is not None:
        wanted |= {f"backbone.stem.{name}" for name, _ in backbone.stem.named_parameters()}
    assert names == wanted
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decay[id(p)] for p in classifier.parameters() if id(p) in held and p.ndim == 1} == {0.0}
    assert {decay[id(p)] for p in backbone.blocks[1].parameters() if p.ndim == 2} == {0.3}


def test_positions_and_norms_are_not_decayed(make_backbone):
    backbone = make_backbone("gpt2")
    classifier = Classifier(backbone, 4, seed=0)
    FrozenCheck(all_trainable(backbone), classifier)
    decayed, kept = make_optimizer(classifier, FineTuneConfig()).param_groups
    assert kept["weight_decay"] == 0
    assert any(p is backbone.model.wpe.weight for p in kept["params"])
    assert any(p is backbone.model.ln_f.weight for p in kept["params"])
    assert any(p is backbone.model.wte.weight for p in decayed["params"])


def test_nothing_to_train_is_said(make_backbone):
    classifier = Classifier(make_backbone(), 4, seed=0).requires_grad_(False)
    with pytest.raises(UsageError, match="nothing to train"):
        make_optimizer(classifier, FineTuneConfig())


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first_trained", [2, 4])
def test_a_kept_prefix_gives_the_logits_of_the_whole_model(family, first_trained, make_backbone, task):
    backbone = make_backbone(family)
    classifier = Classifier(backbone, 4, seed=0)
    FrozenCheck(block_plan(backbone, range(first_trained, 4), stem="frozen"), classifier)
    pixels = TaskTensors.of(backbone, task, ("train",)).pixels["train"]
    prefix = make_prefix(classifier, pixels, BridgeConfig(augment="none", micro_batch=16))
    assert prefix.depth == first_trained
    classifier.eval()
    rows = np.array([5, 0, 63, 17])
    whole = classifier(pixels[rows])
    ran = []
    inner = next(
        m for m in backbone.blocks[0].modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.Linear)
    )
    handle = inner.register_forward_hook(lambda *_args: ran.append(inner))
    with prefix.used(rows):
        short = classifier(torch.zeros_like(pixels[rows]))  # what the images show no longer matters
    handle.remove()
    torch.testing.assert_close(short, whole)
    assert not ran
    assert all("forward" not in vars(block) for block in backbone.blocks)
    torch.testing.assert_close(classifier(pixels[rows]), whole)


def test_a_prefix_is_kept_only_where_nothing_before_it_changes(make_backbone, task):
    backbone = make_backbone("gpt2")
    pixels = TaskTensors.of(backbone, task, ("train",)).pixels["train"]
    still = BridgeConfig(augment="none")

    def prefix(plan, config):
        classifier = Classifier(backbone, 4, seed=0)
        FrozenCheck(plan, classifier)
        return make_prefix(classifier, pixels, config)

    assert prefix(block_plan(backbone, [3], stem="frozen"), still).depth == 3
    assert prefix(block_plan(backbone, [3]), still) is None  # the stem trains
    assert prefix(block_plan(backbone, [0], stem="frozen"), still) is None
    assert prefix(block_plan(backbone, [3], stem="frozen"), BridgeConfig()) is None  # images change
    assert prefix(block_plan(backbone, [3], stem="frozen"), still.replace(cache_prefix=False)) is None


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


def test_drift_of_a_known_change(make_backbone):
    backbone = make_backbone("gpt2")
    all_trainable(backbone).apply(backbone.model)
    before = initial_weights(backbone)
    weight = backbone.model.h[1].mlp.c_fc.weight
    left, right = torch.randn(weight.shape[0]), torch.randn(weight.shape[1])
    with torch.no_grad():
        weight += 0.01 * torch.outer(left, right)  # a change of rank one
        for parameter in backbone.model.h[2].parameters():
            parameter *= 1.5
    rows = {(row["block"], row["metric"]): row["value"] for row in drift_rows(backbone, before)}
    norm = (
        sum(float(before[f"h.1.{n}"].square().sum()) for n, _ in backbone.model.h[1].named_parameters())
        ** 0.5
    )
    moved = 0.01 * float(left.norm() * right.norm())
    assert rows[1, "weight_change"] == pytest.approx(moved / norm, rel=1e-4)
    assert rows[1, "update_rank"] == pytest.approx(1.0, abs=1e-3)
    assert rows[0, "weight_change"] == 0
    assert rows[0, "update_rank"] is None
    assert rows[2, "weight_change"] == pytest.approx(0.5)
    assert rows[2, "spectral_norm_ratio"] == pytest.approx(1.5)
    assert rows[2, "outlier_ratio_6sigma_before"] == rows[2, "outlier_ratio_6sigma_after"]


def test_the_guard_sees_a_frozen_stem_or_head_that_moved(make_backbone):
    backbone = make_backbone("gpt2")
    classifier = Classifier(backbone, 4, seed=0)
    guard = FrozenCheck(block_plan(backbone, [0], stem="frozen"), classifier)
    guard.verify(after="0 steps")
    with torch.no_grad():
        backbone.stem.projection.bias += 1
    with pytest.raises(
        PlanError, match=r"frozen, but changed after 3 steps: 1 tensors of stem and head \(stem\."
    ):
        guard.verify(after="3 steps")


def test_a_snapshot_restores_also_after_an_exception_and_sees_what_it_cannot(make_backbone):
    backbone = make_backbone("gpt2")
    before = backbone.model.wpe.weight.detach().clone()
    with pytest.raises(RuntimeError, match="stop"), Snapshot.restored(backbone), torch.no_grad():
        backbone.model.wpe.weight.fill_(float("nan"))
        raise RuntimeError("stop")
    assert torch.equal(backbone.model.wpe.weight, before)
    snapshot = Snapshot(backbone)
    backbone.model.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(PlanError, match="cannot be restored: it gained or lost 1 tensors"):
        snapshot.restore(backbone)


def test_spreading_needs_processes(make_backbone):
    from layerprobe.training.checkpoints import shard

    with pytest.raises(UsageError, match="start them with: accelerate launch"):
        shard(Classifier(make_backbone(), 4, seed=0), torch.device("cpu"))
