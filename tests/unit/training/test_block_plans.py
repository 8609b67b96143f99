"""Plans by blocks and their halves: what cannot take an adapter."""

from __future__ import annotations

import pytest

from layerprobe.errors import PlanError
from layerprobe.training import unit_plan


def test_adapters_on_stacked_experts_are_refused(mixture_of_experts):
    with pytest.raises(PlanError, match=r"layers\.0\.mlp\.experts\.gate_up_proj is a stack of experts"):
        unit_plan(mixture_of_experts, ["0.mlp"], rank=2)
    placed = unit_plan(mixture_of_experts, ["0.attention"], rank=2).adapters
    assert sorted(name.rpartition(".")[2] for name in placed) == ["k_proj", "o_proj", "q_proj", "v_proj"]
