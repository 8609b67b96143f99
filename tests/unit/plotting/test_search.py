"""Figures of a search and of plans: the ranking of arms; strips of blocks, one row a plan, in the order given."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from layerprobe.errors import UsageError
from layerprobe.plotting.search import STATE_COLOURS, plot_plan, plot_ranking


def arms() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "arm": ["plan", "all", "none"],
            "test_accuracy": [0.5, 0.4, None],
            "low": [0.4, 0.3, None],
            "high": [0.6, 0.5, None],
            "trainable_parameters": [1e6, 2e6, 0],
            "n_seeds": [3, 3, 0],
        }
    )


def test_arms_by_accuracy_and_chance_by_name() -> None:
    ax = plot_ranking(arms(), chance=0.1)
    figure = ax.get_figure()
    figure.canvas.draw()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["all  (2 M)", "plan  (1 M)"]
    (chance,) = ax.texts
    assert chance.get_text() == "chance 10 %"
    # matplotlib leaves out an annotation whose point lies outside the axes; then there is no box.
    box = chance.get_tightbbox(figure.canvas.get_renderer())
    assert box is not None
    assert ax.get_tightbbox().contains(*box.min)
    plt.close(figure)


def test_no_arm_no_ranking() -> None:
    with pytest.raises(UsageError, match="no arm has a test accuracy"):
        plot_ranking(arms().assign(test_accuracy=None))


def plan_rows(name: str, states: list[str]) -> pd.DataFrame:
    """Blocks of 100 parameters each and an embedding of 50 that stays frozen, as `plan_frame` lists them."""
    trained = {"frozen": 0, "partial": 10, "trainable": 100}
    blocks = [{"block": i, "state": s, "value": trained[s], "n": 100} for i, s in enumerate(states)]
    rows = [{"block": None, "state": "frozen", "value": 0, "n": 50}, *blocks]
    return pd.DataFrame(rows).assign(plan=name)


def test_cells_have_the_colour_of_their_state() -> None:
    states = ["trainable", "frozen", "partial", "frozen"]
    ax = plot_plan(plan_rows("plan", states))
    cells = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    seen = [to_hex(cell.get_facecolor()).upper() for cell in sorted(cells, key=lambda c: c.get_x())]
    assert seen == [STATE_COLOURS[state] for state in states]
    assert {text.get_text() for text in ax.get_legend().get_texts()} == set(states)
    plt.close(ax.figure)


def test_several_plans_keep_their_order_and_the_callers_axes() -> None:
    frame = pd.concat(
        [plan_rows("zeta", ["trainable", "frozen"]), plan_rows("alpha", ["trainable", "trainable"])]
    )
    ax = plt.subplots()[1]
    assert plot_plan(frame, ax=ax) is ax
    assert [label.get_text() for label in ax.get_yticklabels()] == ["zeta", "alpha"]
    assert [text.get_text() for text in ax.texts] == ["40.0 %", "80.0 %"]
    plt.close(ax.figure)


def test_nothing_to_draw_is_an_error() -> None:
    frame = plan_rows("plan", ["trainable"])
    with pytest.raises(UsageError, match="no block to draw"):
        plot_plan(frame[frame["block"].isna()])
