"""How far a training moved the weights, against changes of known size."""

from __future__ import annotations

import pytest
import torch

from layerprobe.training import all_trainable
from layerprobe.training.bridge_run import drift_rows, initial_weights


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


def test_drift_looks_into_stacked_experts(mixture_of_experts):
    all_trainable(mixture_of_experts).apply(mixture_of_experts.model)
    before = initial_weights(mixture_of_experts)
    experts = mixture_of_experts.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.down_proj[1] += torch.outer(torch.randn(64), torch.randn(32))
        experts.down_proj_bias += 1.0
    rows = {(row["block"], row["metric"]): row for row in drift_rows(mixture_of_experts, before)}
    assert rows[0, "update_rank"]["n"] == 1
    assert rows[0, "update_rank"]["value"] == pytest.approx(1.0, abs=1e-3)
    entries = 2 * 32 * 32 + 2 * 32 * 16 + 4 * 32 + 4 * 3 * 32 * 64
    assert rows[0, "outlier_ratio_6sigma_after"]["n"] == entries
