"""Labels without meaning, the same wherever and whenever a sample is seen."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from layerprobe.errors import UsageError
from layerprobe.tasks.split import keyed_hash


def random_labels(ids: Iterable[str], n_labels: int, seed: int) -> np.ndarray:
    """A label per sample that depends on the seed and on the sample's id alone.

    Order, batches, workers and other samples play no part: a keyed BLAKE2b hash of the id, modulo
    `n_labels`. (The modulo of a 64-bit number favours no label by more than `n_labels`·2⁻⁶⁴.)

    Parameters
    ----------
    ids : Iterable[str]
        Stable sample ids, such as `ImageSplit.ids`.
    n_labels : int
        Number of classes, at least 2.
    seed : int
        Any integer; different seeds give unrelated labels.

    Returns
    -------
    np.ndarray
        int64 array, one label in [0, n_labels) per id.

    Raises
    ------
    UsageError
        Fewer than two labels.

    Examples
    --------
    >>> random_labels(["a", "b"], 10, 0).tolist() == random_labels(["b", "a"], 10, 0).tolist()[::-1]
    True
    """
    if n_labels < 2:
        raise UsageError(f"random labels need at least 2 classes, got {n_labels}")
    seed = operator.index(seed)
    hashes = (keyed_hash("random-labels", seed, str(sample)) for sample in ids)
    return np.fromiter((value % n_labels for value in hashes), dtype=np.int64)


def complementary_labels(ids: Iterable[str], labels: ArrayLike, n_classes: int, seed: int) -> np.ndarray:
    """A random label per sample that is never the true one: it tells what an image is not.

    A leak about the true class, which `random_labels` avoids; for measuring what that leak is worth.

    Parameters
    ----------
    labels : ArrayLike
        n true classes in [0, n_classes).

    Returns
    -------
    np.ndarray
        int64 array, one label in [0, n_classes) per id, each of the other classes equally likely.
    """
    shift = 1 + random_labels(ids, n_classes - 1, seed) if n_classes > 2 else 1
    return (np.asarray(labels, dtype=np.int64) + shift) % n_classes
