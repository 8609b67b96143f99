"""Plans for every family the backbones know, with the layout that the backbones find."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES, build
from freeze_plan_examples import baseline_plans, trained_names

from layerprobe.backbones.layout import find_layout, image_or_text_tower
from layerprobe.plans import FreezePlan, parameter_table
from layerprobe.plans.match import block_modules


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_frozen_by_plan(family: str, tmp_path: Path) -> None:
    full = build(family)
    base = image_or_text_tower(full)
    layout = find_layout(base, base.config)
    table = parameter_table(base)
    plans = baseline_plans(table, layout.parameter_groups, layout.norm_names, model_id=family, first=1)
    assert block_modules(plans["all"]) == list(layout.block_names)
    assert set(plans["norms"].trainable) == set(layout.norm_names)
    for name in ("norms", "first-1", "random-0"):
        plan = FreezePlan.load(plans[name].save(tmp_path / "plan.json"))
        assert plan == plans[name]
        done = plan.apply(full, outside="frozen", remember=False)
        tied = {alias for alias, original in done.tied.items() if original in plan.trainable}
        assert trained_names(full) == {done.prefix + n for n in plan.trainable} | tied
