"""Code length, few-shot curves and random labels."""

from __future__ import annotations

import numpy as np
import pytest

from layerprobe.errors import UsageError
from layerprobe.metrics.probing.curves import (
    control_labels,
    control_probe,
    few_shot_curve,
    online_code_length,
)
from layerprobe.metrics.probing.logistic import fit_logistic_path


def clusters(n: int, d: int, k: int, *, spread: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(k, d))
    y = np.r_[np.arange(k), rng.integers(0, k, n - k)]
    return centres[y] + spread * rng.normal(size=(n, d)), y


def test_code_length_is_the_sum_of_what_each_portion_costs() -> None:
    X, y = clusters(130, 5, 4)
    code = online_code_length(X, y, 4, C=0.3, first=40, seed=3)
    order = np.random.default_rng(3).permutation(130)
    X, y = X[order], y[order]
    bits = 40 * 2.0
    for seen, end in ((40, 80), (80, 130)):
        probe = fit_logistic_path(X[:seen], y[:seen], [0.3])[0]
        p = np.exp(probe.log_probabilities(X[seen:end]))[np.arange(end - seen), y[seen:end]]
        bits -= np.log2((seen * p + 1) / (seen + 4)).sum()
    assert code.bits == pytest.approx(bits, rel=1e-9)
    assert code.compression == pytest.approx(260 / bits)


def test_labels_that_the_features_do_not_hold_cannot_be_compressed() -> None:
    X, y = clusters(400, 5, 4)
    noise = np.random.default_rng(0).integers(0, 4, 400)
    assert online_code_length(X, y, 4, C=1.0).compression > 1.5
    assert online_code_length(X, noise, 4, C=0.01).compression < 1.02


def test_code_length_with_a_class_that_comes_late() -> None:
    X, y = clusters(64, 4, 3)
    code = online_code_length(X, np.where(np.arange(64) == 5, 2, np.minimum(y, 1)), 3, first=4)
    assert np.isfinite(code.bits)


def test_few_shot_accuracy_grows_and_leaves_out_what_is_not_there() -> None:
    train, validation, test = (clusters(400, 12, 4, spread=1.5, seed=seed) for seed in range(3))
    curve = few_shot_curve(train, validation, test, 4, shots=(1, 4, 16, 60, 1000), draws=3, Cs=(1e-2, 1.0))
    assert [point.shots for point in curve] == [1, 4, 16]
    means = [point.accuracies.mean() for point in curve]
    assert means[0] < means[1] < means[2]
    assert all(len(point.accuracies) == 3 for point in curve)


def test_a_control_task_is_measured_on_images_that_were_not_trained_on() -> None:
    """Types that the features show can be learnt, types that they do not show stay at chance; C is the task's own."""
    rng = np.random.default_rng(0)
    centres = 20 * rng.normal(size=(30, 6))
    surface = [centres[rng.integers(0, 30, n)] + rng.normal(size=(n, 6)) for n in (300, 100, 400)]
    labels = control_labels(surface, 3, seed=1)
    assert [len(part) for part in labels] == [300, 100, 400] and set(labels[0]) == {0, 1, 2}
    assert all(np.array_equal(a, b) for a, b in zip(labels, control_labels(surface, 3, seed=1), strict=True))
    seen = [np.eye(30)[np.abs(part[:, None] - centres).sum(2).argmin(1)] for part in surface]
    assert control_probe(seen, labels).test_accuracy > 0.9
    noise = [rng.normal(size=(len(part), 400)) for part in surface]
    blind = control_probe(noise, labels)
    assert blind.train_accuracy.max() > 0.99  # learnt by heart, which says nothing
    assert blind.test_accuracy < 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: online_code_length(np.eye(4), [0, 1, 0, 1], 2, C=-1), "C values are positive"),
        (lambda: online_code_length(np.eye(4), [0, 1, 0, 1], 2, first=0), "at least one row"),
    ],
)
def test_bad_input_is_one_line(call, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
