"""The standard baselines: which blocks, which norms, and the same ones every time."""

from __future__ import annotations

import pytest
from freeze_plan_examples import FAMILIES, N_BLOCKS, bare_model, baseline_plans, groups_of
from torch import nn

from layerprobe.plans import (
    norm_parameter_names,
    parameter_table,
    random_blocks,
    standard_blocks,
)


def test_the_blocks_of_each_baseline() -> None:
    blocks = standard_blocks(12, random_seeds=[3])
    assert blocks["all"] == tuple(range(12)) and blocks["none"] == ()
    assert blocks["first-5"] == (0, 1, 2, 3, 4) and blocks["last-5"] == (7, 8, 9, 10, 11)
    assert blocks["first-half"] == (0, 1, 2, 3, 4, 5) and blocks["last-half"] == (6, 7, 8, 9, 10, 11)
    assert len(blocks["random-3"]) == 6


def test_halves_of_an_odd_number_are_equally_large_and_leave_out_the_middle() -> None:
    blocks = standard_blocks(5, random_seeds=[])
    assert blocks["first-half"] == (0, 1) and blocks["last-half"] == (3, 4)


@pytest.mark.parametrize("n_blocks", [1, 3, 5])
def test_first_five_of_five_is_all_and_stands_there_once(n_blocks: int) -> None:
    assert "first-5" not in standard_blocks(n_blocks) and "last-5" not in standard_blocks(n_blocks)


def test_random_plans_repeat_by_seed_and_differ_between_seeds() -> None:
    draws = {random_blocks(24, seed) for seed in range(20)}
    assert len(draws) == 20
    assert random_blocks(24, 7) == random_blocks(24, 7)
    assert all(len(set(draw)) == 12 and list(draw) == sorted(draw) for draw in draws)


def test_random_plans_reach_every_block_equally_often() -> None:
    counts = [sum(block in random_blocks(6, seed) for seed in range(3000)) for block in range(6)]
    # Binomial with p = 1/2: mean 1500, standard deviation 27.4.
    assert all(abs(count - 1500) < 5 * 27.4 for count in counts)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_by_class_are_the_norm_modules_of_the_model(family: str) -> None:
    model = bare_model(family)
    names = set(norm_parameter_names(model))
    modules = [
        m for m in model.modules() if isinstance(m, nn.LayerNorm) or type(m).__name__ == "LlamaRMSNorm"
    ]
    assert sum(p.numel() for m in modules for p in m.parameters()) == sum(
        p.numel() for n, p in model.named_parameters() if n in names
    )
    assert len(modules) >= 2 * N_BLOCKS


@pytest.mark.parametrize("family", FAMILIES)
def test_plans_of_all_none_and_norms(family: str) -> None:
    model = bare_model(family)
    table, names = parameter_table(model), norm_parameter_names(model)
    plans = baseline_plans(table, groups_of(family, table), names, model_id=family)
    assert set(plans["norms"].trainable) == set(names)
    assert set(plans["norms"].block_states) == {"partial"} and not any(plans["norms"].blocks)
    embeddings = {n for n, g in groups_of(family, table).items() if g == "embeddings"}
    assert set(plans["all"].frozen) == embeddings and plans["none"].trainable == ()
