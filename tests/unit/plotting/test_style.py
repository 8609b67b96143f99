"""Lines with known intervals, gaps, and the names of layers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from layerprobe.plotting.style import draw_line, layer_names, only_name


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
