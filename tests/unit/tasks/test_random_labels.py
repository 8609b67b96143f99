"""Random labels depend on seed and id alone, and are uniform."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from scipy import stats

from layerprobe.errors import UsageError
from layerprobe.tasks.random_labels import complementary_labels, random_labels

IDS = np.array([f"image-{number}" for number in range(20_000)])


def test_order_and_company_play_no_part() -> None:
    labels = random_labels(IDS, 10, seed=3)
    order = np.random.default_rng(0).permutation(len(IDS))
    assert np.array_equal(random_labels(IDS[order], 10, seed=3), labels[order])
    assert np.array_equal(random_labels(IDS[100:200], 10, seed=3), labels[100:200])


@pytest.mark.parametrize("n_labels", [2, 7, 100, 1000])
@pytest.mark.parametrize("seed", [0, 1])
def test_labels_are_uniform(n_labels: int, seed: int) -> None:
    labels = random_labels(IDS, n_labels, seed)
    assert labels.dtype == np.int64
    counts = np.bincount(labels, minlength=n_labels)
    assert len(counts) == n_labels
    assert stats.chisquare(counts).pvalue > 1e-4


def test_labels_of_two_seeds_are_independent() -> None:
    table = np.zeros((10, 10))
    np.add.at(table, (random_labels(IDS, 10, 0), random_labels(IDS, 10, 1)), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_the_definition_stays_what_stored_checkpoints_rely_on() -> None:
    digest = hashlib.blake2b(b"image-0", key=b"random-labels/5", digest_size=8).digest()
    assert random_labels(["image-0"], 1000, 5)[0] == int.from_bytes(digest, "little") % 1000


def test_one_label_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 2 classes, got 1"):
        random_labels(IDS, 1, 0)


def test_complementary_labels_are_never_the_true_class_and_favour_no_other():
    ids = [f"image-{i}" for i in range(6000)]
    truth = np.arange(6000) % 4
    found = complementary_labels(ids, truth, 4, 0)
    assert not (found == truth).any()
    assert set(np.unique(found)) == {0, 1, 2, 3}
    shares = np.bincount((found - truth) % 4, minlength=4)[1:] / len(ids)
    assert abs(shares - 1 / 3).max() < 0.03
    assert (complementary_labels(ids[::-1], truth[::-1], 4, 0)[::-1] == found).all()
    assert (complementary_labels(["a", "b"], [0, 1], 2, 0) == [1, 0]).all()
