"""The check that frozen tensors did not move, beyond what the bridge's own tests show."""

from __future__ import annotations

import pytest
import torch

from layerprobe.errors import PlanError, UsageError
from layerprobe.training import BridgeConfig, block_plan
from layerprobe.training.classifier import Classifier
from layerprobe.training.freeze_check import FrozenCheck, Phases


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


def test_phases_are_for_one_process():
    with pytest.raises(UsageError, match="stem_steps needs one process, not 2"):
        Phases(None, None, None, None, BridgeConfig(stem_steps=1), 2)
    Phases(None, None, None, None, BridgeConfig(), 2)
