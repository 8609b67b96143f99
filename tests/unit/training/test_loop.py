"""The loop's parts: optimizer groups, rates per block, and the frozen prefix against the whole model."""

from __future__ import annotations

import families
import numpy as np
import pytest
import torch

from layerprobe.backbones import load_backbone
from layerprobe.errors import UsageError
from layerprobe.training import (
    BridgeConfig,
    FineTuneConfig,
    TaskTensors,
    all_trainable,
    block_plan,
    train_and_score,
)
from layerprobe.training.classifier import Classifier
from layerprobe.training.freeze_check import FrozenCheck
from layerprobe.training.loop import BlockRates, make_optimizer, make_prefix

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


def test_stacked_biases_are_not_decayed(mixture_of_experts):
    classifier = Classifier(mixture_of_experts, 4, seed=0)
    FrozenCheck(all_trainable(mixture_of_experts), classifier)
    decayed, kept = make_optimizer(classifier, FineTuneConfig()).param_groups
    experts = mixture_of_experts.model.layers[0].mlp.experts
    assert any(p is experts.down_proj_bias for p in kept["params"])
    assert any(p is experts.down_proj for p in decayed["params"])


def test_nothing_to_train_is_said(make_backbone):
    classifier = Classifier(make_backbone(), 4, seed=0).requires_grad_(False)
    with pytest.raises(UsageError, match="nothing to train"):
        make_optimizer(classifier, FineTuneConfig())


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
    # The outer norm trains, so the embeddings' dropout draws anew at every step.
    last = block_plan(backbone, [3], stem="frozen", also_trainable=["ln_f.weight", "ln_f.bias"])
    assert prefix(last, still) is None
    backbone.model.drop.p = 0.0
    assert prefix(last, still).depth == 3


def test_no_prefix_is_kept_where_later_blocks_need_more_of_it(task):
    backbone = load_backbone(families.build("t5"), patch_size=4).prepare(task)
    classifier = Classifier(backbone, 4, seed=0)
    FrozenCheck(block_plan(backbone, [2], stem="frozen"), classifier)
    pixels = TaskTensors.of(backbone, task, ("train",)).pixels["train"]
    assert make_prefix(classifier, pixels, BridgeConfig(augment="none")) is None


def test_shares_are_ratios_of_norms_over_the_largest_one() -> None:
    def parameter(weight: float, gradient: float, n: int) -> torch.nn.Parameter:
        made = torch.nn.Parameter(torch.full((n,), weight))
        made.grad = torch.full((n,), gradient)
        return made

    groups = [
        {
            "rate_multiple": 1.0,
            "block": "block.0",
            "params": [parameter(2.0, 1.0, 4), parameter(2.0, 1.0, 12)],
        },
        {"rate_multiple": 1.0, "block": "block.1", "params": [parameter(1.0, 2.0, 9)]},
        {"rate_multiple": 1.0, "block": "", "params": [parameter(1.0, 100.0, 2)]},
        {"rate_multiple": 1.0, "block": "block.0", "params": [parameter(2.0, 1.0, 5)]},
    ]
    rates = BlockRates(torch.optim.SGD(groups, lr=9.0))
    rates.measure()
    assert rates.shares == pytest.approx({"block.0": 0.25, "block.1": 1.0})
    rates.apply(0.1)
    assert [group["lr"] for group in rates._groups] == pytest.approx([0.025, 0.1, 0.1, 0.025])


def test_every_block_has_groups_of_its_own_and_all_parameters_are_held_once(make_backbone) -> None:
    backbone = make_backbone("gpt2")
    classifier = Classifier(backbone, 4, seed=0)
    FrozenCheck(all_trainable(backbone), classifier)
    plain, split = (
        make_optimizer(classifier, FineTuneConfig(), by_block=by_block).param_groups
        for by_block in (False, True)
    )
    assert [group["block"] for group in plain] == ["", ""]
    assert {group["block"] for group in split} == {"", *(f"block.{i}" for i in range(backbone.n_blocks))}
    decays = [
        {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        for groups in (plain, split)
    ]
    assert decays[0] == decays[1] and len(decays[0]) == sum(len(group["params"]) for group in split)


def test_a_chain_with_these_rates_is_another_training_and_hands_the_backbone_back(
    make_backbone, task
) -> None:
    backbone = make_backbone("gpt2")
    tensors = TaskTensors.of(backbone, task)
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    shared = {"lr": 3e-3, "steps": 6, "batch_size": 64}
    settings = {"bridge": BridgeConfig(**shared), "finetune": FineTuneConfig(**shared), "test": True}
    plan = all_trainable(backbone)
    runs = [train_and_score(backbone, tensors, plan, **settings, auto_rgn=on) for on in (False, True, True)]
    assert all(torch.equal(p, before[name]) for name, p in backbone.named_parameters())
    assert runs[1].bridge_accuracy == runs[2].bridge_accuracy
    assert (runs[1].test_correct == runs[2].test_correct).all()
    assert runs[1].train_flops == runs[0].train_flops and runs[1].reason is None


def test_stem_and_head_learn_at_their_multiples_of_the_rate(make_backbone):
    classifier = Classifier(make_backbone(), 4, seed=0)
    config = FineTuneConfig(lr=1e-3, stem_lr=3.0, head_lr=10.0)
    multiples = {
        id(p): group["rate_multiple"]
        for group in make_optimizer(classifier, config).param_groups
        for p in group["params"]
    }
    assert {multiples[id(p)] for p in classifier.head.parameters()} == {10.0}
    assert {multiples[id(p)] for p in classifier.backbone.stem.parameters()} == {3.0}
    assert {multiples[id(p)] for block in classifier.backbone.blocks for p in block.parameters()} == {1.0}
