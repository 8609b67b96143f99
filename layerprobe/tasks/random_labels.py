"""Labels without meaning, the same wherever and whenever a sample is seen."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import numpy as np

from layerprobe.errors import UsageError
from layerprobe.tasks.split import keyed_hash


def random_labels(ids: Iterable[str], n_labels: int, seed: int) -> np.ndarray:
    """A label per sample that depends on the seed and on the sample's id alone.

    Order, batches, workers and other samples play no part: a keyed BLAKE2b hash of the id, modulo
    `n_labels`. (The modulo of a 64-bit number favours no label by more than `n_labels`·2⁻⁶⁴.)

    Parameters
    ----------
    ids : stable sample ids, such as `ImageSplit.ids`.
    n_labels : number of classes, at least 2.
    seed : any integer; different seeds give unrelated labels.

    Returns
    -------
    int64 array, one label in [0, n_labels) per id.

    Raises
    ------
    UsageError : fewer than two labels.

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
