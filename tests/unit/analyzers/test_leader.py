"""A leading layer is named as one only where its paired intervals over all others are above 0."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from layerprobe.analyzers.leader import add_gaps, best_row, gaps_to_best, lead_in_words
from layerprobe.records import Estimate, Repeated


def repeated(values: np.ndarray) -> list[Repeated]:
    return [Repeated(value=v.mean(), repeats=v, scale=len(v) ** -0.5) for v in values]


def said(found: list[Estimate], *, lower: bool = False, reason: str | None = None) -> str:
    rows = [
        {"block": i, "metric": "m", "value": e.value, "reason": reason, "found": e}
        for i, e in enumerate(found)
    ]
    lower_is_better = {"m"} if lower else set()
    add_gaps(rows, lower_is_better=lower_is_better)
    frame = pd.DataFrame(rows)
    top = best_row(frame, lower_is_better=lower_is_better)
    return f"{top['block']}{lead_in_words(frame, top, lambda row: f'block {row.block}')}"


def test_gaps_have_the_interval_of_the_paired_differences() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(size=(3, 12)) + 5 * draw.normal(size=12) + np.array([[0.0], [3.0], [1.0]])
    rows = gaps_to_best(repeated(values))
    assert rows[1] == {"gap_to_best": 0.0, "gap_low": None, "gap_high": None}
    for row, other in ((rows[0], values[0]), (rows[2], values[2])):
        expected = stats.ttest_rel(values[1], other).confidence_interval(0.95)
        assert (row["gap_low"], row["gap_high"]) == pytest.approx((expected.low, expected.high))
    reversed_ = gaps_to_best(repeated(-values), higher=False)
    assert reversed_ == rows


def test_a_lead_is_told_with_its_interval_or_not_told() -> None:
    draw = np.random.default_rng(1)
    noise, common = 0.1 * draw.normal(size=(4, 30)), 9 * draw.normal(size=30)
    apart = repeated(noise + common + np.array([[0.0], [1.0], [2.0], [0.0]]))
    assert said(apart).startswith("2, 0.99 ahead of block 1 (95 % interval 0.9")
    close = repeated(noise + common + np.array([[1.99], [1.0], [2.0], [1.98]]))
    assert "here, not told apart from block" in said(close) and "and 1 more (lead 0.0" in said(close)
    assert said(apart, lower=True).startswith(("0 here, not told apart", "3 here, not told apart"))


def test_a_lead_without_paired_values_is_not_known() -> None:
    found = [Estimate(value=1.0), Estimate(value=2.0), Estimate(value=None)]
    assert said(found[:2]) == "1 here; whether it leads is not known"
    assert said(found[:2], reason="too few images") == "1 here; whether it leads is not known: too few images"
    assert said(found[:1]) == "0"
    assert gaps_to_best(found)[2]["gap_to_best"] is None
    same = np.ones((2, 5))
    assert gaps_to_best(repeated(same))[1] == {"gap_to_best": 0.0, "gap_low": None, "gap_high": None}
