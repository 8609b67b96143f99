"""Auto-RGN: the rates of the blocks follow their relative gradient norms, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from layerprobe.training import BridgeConfig, FineTuneConfig, TaskTensors, all_trainable, train_and_score
from layerprobe.training.classifier import Classifier
from layerprobe.training.data import Order
from layerprobe.training.guard import Guard
from layerprobe.training.loop import make_optimizer
from layerprobe.training.relative import RelativeRates


def test_shares_are_ratios_of_norms_over_the_largest_one() -> None:
    def parameter(weight: float, gradient: float, n: int) -> torch.nn.Parameter:
        made = torch.nn.Parameter(torch.full((n,), weight))
        made.grad = torch.full((n,), gradient)
        return made

    groups = [
        {"block": "block.0", "params": [parameter(2.0, 1.0, 4), parameter(2.0, 1.0, 12)]},
        {"block": "block.1", "params": [parameter(1.0, 2.0, 9)]},
        {"block": "", "params": [parameter(1.0, 100.0, 2)]},
        {"block": "block.0", "params": [parameter(2.0, 1.0, 5)]},
    ]
    rates = RelativeRates(torch.optim.SGD(groups, lr=9.0))
    rates.measure()
    assert rates.shares == pytest.approx({"block.0": 0.25, "block.1": 1.0})
    rates.apply(0.1)
    assert [group["lr"] for group in rates._groups] == pytest.approx([0.025, 0.1, 0.1, 0.025])


def test_every_block_has_groups_of_its_own_and_all_parameters_are_held_once(make_backbone) -> None:
    backbone = make_backbone("gpt2")
    classifier = Classifier(backbone, 4, seed=0)
    Guard(all_trainable(backbone), classifier)
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


@pytest.mark.parametrize(("n", "size"), [(10, 4), (8, 4), (3, 8), (12, 12)])
def test_the_first_step_of_an_epoch_is_the_one_with_its_first_image(n: int, size: int) -> None:
    order = Order(n, (n, 3, 8, 8), BridgeConfig(batch_size=size), flip=False)
    for step in range(12):
        expected = any(place % n == 0 for place in range(step * size, (step + 1) * size))
        assert order.begins_epoch(step) == expected


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
