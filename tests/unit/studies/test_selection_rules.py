"""The neighbours' selection rules, against their formulas written otherwise and what they must be invariant to."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

FILE = Path(__file__).resolve().parents[3] / "benchmarks" / "selection_rules.py"


@pytest.fixture(scope="module")
def selectors() -> ModuleType:
    spec = importlib.util.spec_from_file_location("selection_rules", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def noise(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30)])
def test_spectrum_is_its_formula(selectors: ModuleType, shape: tuple[int, int]) -> None:
    weight = noise(*shape) + 3 * noise(shape[0], 1, 1) @ noise(1, shape[1], 2)
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    beta = min(shape) / max(shape)
    sigma = (np.percentile(values, 75) - np.percentile(values, 25)) / 1.349
    above = values > sigma * np.sqrt((1 + np.sqrt(beta)) ** 2)
    expected = values[above].sum() / values[~above].sum() / values[0]
    assert selectors.spectrum_snr(weight) == pytest.approx(expected)
    assert selectors.spectrum_snr(weight.T) == pytest.approx(expected)


def test_spectrum_without_noise_is_infinite(selectors: ModuleType) -> None:
    assert selectors.spectrum_snr(torch.eye(4)) == math.inf


def test_blocks_follow_the_mean_rank_of_their_matrices(selectors: ModuleType) -> None:
    weights = {(b, kind): noise(20, 40, 10 * b + i) for b in range(3) for i, kind in enumerate(("q", "up"))}
    scores = selectors.spectrum_blocks(weights, 4)
    ratios = {key: selectors.spectrum_snr(weight) for key, weight in weights.items()}
    for b in range(3):
        ranks = [sorted(ratios[a, kind] for a in range(3)).index(ratios[b, kind]) / 2 for kind in ("q", "up")]
        assert scores[b] == pytest.approx(np.mean(ranks))
    assert scores[3] == 0.0


def test_outlier_shares(selectors: ModuleType) -> None:
    weight = torch.ones(10, 10)
    assert selectors.outlier_share([weight]) == 0.0
    weight[0, 0] = 50.0
    assert selectors.outlier_share([weight, torch.ones(10, 10)]) == 1 / 200
    assert selectors.outlier_share([1e-3 * weight]) == selectors.outlier_share([weight]) == 0.01


def test_choices_of_a_size(selectors: ModuleType) -> None:
    for n_blocks in (5, 6, 12):
        for size in range(n_blocks + 1):
            assert len(set(selectors.evenly_spaced(n_blocks, size))) == size
    assert selectors.evenly_spaced(12, 3) == list(range(3, 12, 4))
    assert selectors.best_blocks([0.1, 0.7, 0.7, 0.2], 2) == [1, 2]
    assert selectors.best_blocks([0.7, 0.7, 0.7], 1) == [0]
