"""Figures of a search."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from layerprobe.errors import UsageError
from layerprobe.plotting.search import plot_ranking


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
    assert chance.get_text() == "chance"
    # matplotlib leaves out an annotation whose point lies outside the axes; then there is no box.
    box = chance.get_tightbbox(figure.canvas.get_renderer())
    assert box is not None
    assert ax.get_tightbbox().contains(*box.min)
    plt.close(figure)


def test_no_arm_no_ranking() -> None:
    with pytest.raises(UsageError, match="no arm has a test accuracy"):
        plot_ranking(arms().assign(test_accuracy=None))
