"""The table of a plan and its strip of blocks on a terminal."""

from __future__ import annotations

from freeze_plan_examples import example_plan

from layerprobe.plans.table import PlanTable, block_strip


def test_the_table_adds_up() -> None:
    plan = example_plan("vit", [3], norms="trainable")
    frame = plan.to_frame()
    assert frame["value"].sum() == plan.counts["trainable_parameters"]
    assert frame["n"].sum() == sum(plan.counts[f"{side}_parameters"] for side in ("trainable", "frozen"))
    rows = PlanTable(plan).table()
    assert [row["part"] for row in rows] == [
        "blocks 3",
        "blocks 0, 1, 2 and 4 to 11",
        "embeddings",
        "positions",
        "norm",
        "stem",
        "head",
    ]
    assert sum(row["trained"] or 0 for row in rows) == plan.counts["trainable_parameters"]


def test_a_long_strip_is_wrapped() -> None:
    strip = block_strip(example_plan("gpt2", [0, 11]), width=18)
    assert strip.splitlines() == [
        "  0  1  2  3  4  5",
        "  ■  ·  ·  ·  ·  ·",
        "  6  7  8  9 10 11",
        "  ·  ·  ·  ·  ·  ■",
    ]
