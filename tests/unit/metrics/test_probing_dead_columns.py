"""Columns that a trained norm switched off (MiniLM has one with weight 1e-33) must not blow up a probe."""

from __future__ import annotations

import numpy as np

from layerprobe.metrics.probing.logistic import fit_logistic_path


def test_a_dead_column_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    X = rng.normal(size=(120, 6)) + 2 * np.eye(6)[labels]
    dead = np.c_[X, 1e-33 * rng.normal(size=120)]
    for with_dead, without in zip(fit_logistic_path(dead, labels), fit_logistic_path(X, labels), strict=True):
        folded = with_dead.coef / with_dead.scale
        assert np.abs(folded).max() < 1e6
        assert np.abs(folded[:, 6]).max() < 1e-30
        assert np.allclose(with_dead.coef[:, :6], without.coef, atol=1e-3)
