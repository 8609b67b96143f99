"""The strip of blocks: one cell a block in the colour of its state, one row a plan, in the order given."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from freeze_plan_examples import example_plan
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from layerprobe.errors import UsageError
from layerprobe.plans.table import PlanTable, block_strip, plan_frame
from layerprobe.plotting.plans import COLOURS, plot_plan


def test_cells_have_the_colour_of_their_state() -> None:
    plan = example_plan("gpt2", [0, 11], also_trainable=["h.5.ln_1.bias"])
    ax = plot_plan(plan_frame(plan))
    cells = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    seen = [to_hex(cell.get_facecolor()).upper() for cell in sorted(cells, key=lambda c: c.get_x())]
    assert seen == [COLOURS[state] for state in plan.block_states]
    plt.close(ax.figure)


def test_several_plans_keep_their_order_and_the_callers_axes() -> None:
    names = ["zeta", "alpha"]
    frame = pd.concat([example_plan("gpt2", [i]).to_frame(name=name) for i, name in enumerate(names)])
    ax = plt.subplots()[1]
    assert plot_plan(frame, ax=ax) is ax
    assert [label.get_text() for label in ax.get_yticklabels()] == names
    shares = [text.get_text() for text in ax.texts]
    counts = example_plan("gpt2", [0]).counts
    expected = counts["trainable_parameters"] / (counts["trainable_parameters"] + counts["frozen_parameters"])
    assert shares == [f"{expected:.1%}"] * 2
    plt.close(ax.figure)


def test_nothing_to_draw_is_an_error() -> None:
    frame = plan_frame(example_plan("gpt2", [0]))
    with pytest.raises(UsageError, match="no block to draw"):
        plot_plan(frame[frame["block"].isna()])


def test_the_table_adds_up() -> None:
    plan = example_plan("vit", [3], norms="trainable")
    frame = plan.to_frame()
    assert frame["value"].sum() == plan.counts["trainable_parameters"]
    assert frame["n"].sum() == sum(plan.counts[f"{side}_parameters"] for side in ("trainable", "frozen"))
    rows = PlanTable(plan).table()
    assert [row["part"] for row in rows] == [
        "blocks 3",
        "blocks 0:3,4:12",
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
