"""Batches, augmentation and labels: functions of seed and position, uniform, and blind to what the images show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import mutual_info_score

from layerprobe.tasks import load_task
from layerprobe.tasks.random_labels import random_labels
from layerprobe.training import BridgeConfig
from layerprobe.training.config import TrainConfig
from layerprobe.training.data import Batch, BatchSampler, augmented


def test_every_image_comes_once_per_epoch_also_across_batch_borders():
    order = BatchSampler(10, (10, 3, 8, 8), TrainConfig(batch_size=4), flip=True)
    seen = np.concatenate([order.batch(step).indices for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:])


def test_a_batch_larger_than_the_data_takes_whole_epochs():
    batch = BatchSampler(3, (3, 3, 8, 8), TrainConfig(batch_size=7), flip=True).batch(0)
    assert np.bincount(batch.indices).tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3])


def test_a_step_is_the_same_whether_or_not_the_steps_before_it_were_taken():
    config = TrainConfig(batch_size=4, seed=3)
    walked = BatchSampler(10, (10, 3, 8, 8), config, flip=True)
    for step in range(8):
        late = walked.batch(step)
    straight = BatchSampler(10, (10, 3, 8, 8), config, flip=True).batch(7)
    for field in ("indices", "shifts", "flips"):
        assert np.array_equal(getattr(late, field), getattr(straight, field))


def test_views_shift_and_mirror_as_they_say():
    pixels = torch.arange(2 * 1 * 3 * 4, dtype=torch.float32).view(2, 1, 3, 4)
    batch = Batch(np.array([0, 1]), np.array([[1, 0], [0, -1]]), np.array([False, True]))
    seen = augmented(pixels, batch)
    down = torch.cat([pixels[0, 0, :1], pixels[0, 0, :2]])  # one row down, the top one repeated
    assert torch.equal(seen[0, 0], down)
    # Mirrored after the shift: output column j shows source column W−1−(j+1), kept inside the image.
    expected = pixels[1, 0][:, [2, 1, 0, 0]]
    assert torch.equal(seen[1, 0], expected)


def test_grey_images_are_never_mirrored_unless_asked():
    grey = BatchSampler(50, (50, 3, 8, 8), TrainConfig(batch_size=50), flip=False).batch(0)
    asked = BatchSampler(50, (50, 3, 8, 8), TrainConfig(batch_size=50, flip=True), flip=False).batch(0)
    plain = BatchSampler(50, (50, 3, 8, 8), TrainConfig(batch_size=50, augment="none"), flip=True).batch(0)
    assert not grey.flips.any() and grey.shifts.any()
    assert 10 < asked.flips.sum() < 40
    assert not plain.flips.any() and not plain.shifts.any()


@pytest.mark.parametrize("n_labels", [2, 10, 100])
def test_random_labels_of_real_images_are_uniform_and_say_nothing_about_their_classes(n_labels):
    train = load_task("digits", offline=True).train
    labels = random_labels(train.ids, n_labels, seed=0)
    assert stats.chisquare(np.bincount(labels, minlength=n_labels)).pvalue > 1e-3
    draw = np.random.default_rng(0)
    found = mutual_info_score(train.labels, labels)
    null = [mutual_info_score(train.labels, draw.permutation(labels)) for _ in range(300)]
    assert (np.array(null) >= found).mean() > 0.01


@pytest.mark.parametrize(("n", "size"), [(10, 4), (8, 4), (3, 8), (12, 12)])
def test_the_first_step_of_an_epoch_is_the_one_with_its_first_image(n: int, size: int) -> None:
    order = BatchSampler(n, (n, 3, 8, 8), BridgeConfig(batch_size=size), flip=False)
    for step in range(12):
        expected = any(place % n == 0 for place in range(step * size, (step + 1) * size))
        assert order.begins_epoch(step) == expected
