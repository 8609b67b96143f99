"""Lines with known intervals, gaps, and the names of layers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from layerprobe.plotting import style as look
from layerprobe.plotting.layer_scores import patch_maps_figure
from layerprobe.plotting.style import (
    BLUE,
    ORANGE,
    OTHER_COLOUR,
    draw_line,
    layer_names,
    name_lines,
    only_name,
    show_chance,
    training_colour,
    whole_numbers,
)


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_values_are_drawn_as_given_and_a_missing_one_leaves_a_gap(scale: str) -> None:
    ax = Figure().subplots()
    ax.set_yscale(scale)
    y = np.array([3.0, np.nan, 5.0, 9.0])
    # The second value lies outside its own interval; it is drawn where it is.
    draw_line(ax, [0, 1, 2, 3], y, [2.0, np.nan, 5.5, np.nan], [4.0, np.nan, 6.0, np.nan], label="a")
    (line,) = ax.lines
    np.testing.assert_allclose(line.get_ydata(), y)
    assert line.get_label() == "a"
    band = np.concatenate([path.vertices for path in ax.collections[0].get_paths()])
    assert band[band[:, 0] == 0, 1].min() == pytest.approx(2)
    assert band[band[:, 0] == 0, 1].max() == pytest.approx(4)
    assert not (band[:, 0] == 1).any()


def test_bars_along_y() -> None:
    ax = Figure().subplots()
    draw_line(ax, [0.5], [2], [0.25], [1.0], bars=True, orient="y", linestyle="")
    assert ax.lines[0].get_xdata() == pytest.approx([0.5])
    (bars,) = ax.collections
    np.testing.assert_allclose(bars.get_segments()[0], [[0.25, 2], [1.0, 2]])


def test_layers_are_named_by_block_and_unusual_site() -> None:
    frame = pd.DataFrame(
        {"block": [None, 0, 1, 1], "site": ["embed", "resid_post", None, "mlp_out"], "model": "a/b"}
    )
    assert layer_names(frame) == ["embed", "0", "1", "1 mlp_out"]
    assert layer_names(frame.iloc[:0]) == []
    assert only_name(frame, "model") == "b"
    assert only_name(frame, "block", "several") == "several"


def test_up_to_four_lines_are_named_where_they_end_and_names_do_not_overlap() -> None:
    ax = Figure(figsize=(4, 3)).subplots()
    for index in range(4):
        ax.plot([0, 1], [0.0, 1.0 + 0.001 * index], label=f"line {index}")
    name_lines(ax)
    assert ax.get_legend() is None
    assert [text.get_text() for text in ax.texts] == [f"line {index}" for index in range(4)]
    heights = [text.get_position()[1] for text in ax.texts]
    assert np.diff(heights).min() * 3 * 72 * 0.7 > 9  # about a line of text of size 10 apart
    assert max(heights) <= 1.0 + 1e-9
    ax.plot([0, 1], [0, 1], label="a fifth")
    name_lines(ax)
    assert len(ax.get_legend().get_texts()) == 5


def test_chance_is_a_line_or_is_said() -> None:
    ax = Figure().subplots()
    ax.set_ylim(0, 100)
    show_chance(ax, 10.0)
    assert ax.texts[0].get_text() == "chance 10 %" and len(ax.lines) == 1
    narrow = Figure().subplots()
    narrow.set_ylim(93, 97)
    show_chance(narrow, 10.0)
    assert narrow.texts[0].get_text() == "↓ chance 10 %" and not narrow.lines
    assert narrow.get_ylim() == (93, 97)


def test_blocks_and_steps_have_no_halves() -> None:
    ax = Figure(figsize=(3, 2)).subplots()
    ax.plot([0, 5], [0, 1])
    whole_numbers(ax)
    assert all(float(tick).is_integer() for tick in ax.get_xticks())


def test_one_colour_a_kind_of_training() -> None:
    assert training_colour("plan") == training_colour("partial") == ORANGE
    assert training_colour("all") == training_colour("language") == BLUE
    assert training_colour("first-half") == OTHER_COLOUR


def test_maps_have_a_colour_key() -> None:
    cells = [{"row": r, "column": c, "value": r - c} for r in range(2) for c in range(2)]
    about = {"image": "a", "label": 0, "prediction": 1}
    rows = [{**cell, **about, "block": block} for block in (None, 0) for cell in cells]
    figure = patch_maps_figure(pd.DataFrame(rows), {})
    words = [text.get_text() for ax in figure.axes for text in ax.get_xticklabels()]
    assert {"against the prediction", "for the prediction"} <= set(words)


def test_powers_of_ten_are_numbers_where_no_formula_is_drawn() -> None:
    with plt.rc_context({"text.parse_math": False}):
        ax = look.new_axes(4, 3)
        ax.plot([1e-4, 1], [1, 100])
        look.log_axis(ax, "x")
        look.log_axis(ax, "y")
        look.figure_of(ax).canvas.draw()
        shown = [label.get_text() for label in (*ax.get_xticklabels(), *ax.get_yticklabels())]
    assert {"0.001", "0.1", "10"} <= set(shown) and not any("$" in text for text in shown)


def test_the_name_of_a_line_that_leaves_the_axes_stays_beside_them() -> None:
    ax = look.new_axes(4, 3)
    ax.plot([0, 1], [1, 1e-30], label="Gaussian")
    look.log_axis(ax, "y")
    ax.set_ylim(1e-6, 1)
    look.name_lines(ax)
    assert [text.get_position()[1] for text in ax.texts] == [0.0]


def test_panels_share_one_legend() -> None:
    figure, axes = look.new_panels(1, 2, 6, 3)
    for ax in axes:
        ax.plot([0, 1], [0, 1], label="a")
    look.name_panels(figure, axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a"]
