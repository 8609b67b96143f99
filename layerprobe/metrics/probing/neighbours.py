"""k nearest neighbours on features: what is close without any weights being fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from layerprobe.errors import UsageError
from layerprobe.metrics.intervals import Interval, wilson_interval
from layerprobe.metrics.probing.data import Standardised
from layerprobe.metrics.validation import check_features, check_labels

K_GRID = (1, 5, 10, 20, 50)
"""Numbers of neighbours tried by default."""

_BLOCK = 2048  # rows compared with the whole training split at a time


@dataclass(frozen=True)
class NeighbourResult:
    """k nearest neighbours with k chosen on validation, measured once on test."""

    k: int
    val_accuracy: np.ndarray
    test_accuracy: float
    interval: Interval


def knn_predict(
    train: tuple[np.ndarray, np.ndarray],
    X: np.ndarray,
    n_classes: int,
    ks: Sequence[int] = K_GRID,
    *,
    device: str = "cpu",
) -> np.ndarray:
    """Classes by majority among the k most similar training rows, for several k.

    Similarity is the cosine between features standardised by the training split; of equally frequent
    classes the one with the larger sum of similarities wins.

    Parameters
    ----------
    train : (features n×d, labels). X : m×d. ks : neighbours, each at most n.

    Returns
    -------
    len(ks)×m int64. Cost m·n·d; memory 2048·n.

    Raises
    ------
    UsageError : non-finite features, unusable labels, a k outside 1 … n.
    """
    rows = check_features(train[0], "the training features")
    labels, _ = check_labels(train[1], len(rows), "labels", n_classes)
    queries = check_features(X, "X")
    if not ks or min(ks) < 1 or max(ks) > len(rows):
        raise UsageError(f"the number of neighbours lies between 1 and {len(rows)}; got {list(ks)}")
    place = torch.device(device)
    data = Standardised.of(rows)
    bank = torch.cat([_unit(block) for _, block in data.blocks(place)])
    classes = torch.from_numpy(labels).to(place)
    found = np.empty((len(ks), len(queries)), dtype=np.int64)
    parts = [_unit(block) for _, block in data.like(queries).blocks(place)]
    start = 0
    for part in torch.cat(parts).split(_BLOCK):
        near, index = (part @ bank.T).topk(max(ks), dim=1)
        voters = classes[index]
        # Similarities below 1e-3 of a vote only order equal counts.
        weight = 1 + 1e-3 * (near + 1) / (2 * max(ks))
        for i, k in enumerate(ks):
            votes = torch.zeros(len(part), n_classes, dtype=weight.dtype, device=place)
            votes.scatter_add_(1, voters[:, :k], weight[:, :k])
            found[i, start : start + len(part)] = votes.argmax(1).cpu().numpy()
        start += len(part)
    return found


def select_knn(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    n_classes: int,
    *,
    ks: Sequence[int] = K_GRID,
    device: str = "cpu",
) -> NeighbourResult:
    """Choose k by validation accuracy (the largest of equals), measure once on test. k above n is left out."""
    usable = [k for k in ks if k <= len(train[1])]
    scores = (knn_predict(train, validation[0], n_classes, usable, device=device) == validation[1]).mean(1)
    best = int(len(usable) - 1 - scores[::-1].argmax())
    hits = int((knn_predict(train, test[0], n_classes, [usable[best]], device=device)[0] == test[1]).sum())
    n = len(test[1])
    return NeighbourResult(usable[best], scores, hits / n, wilson_interval(hits, n))


def _unit(block: torch.Tensor) -> torch.Tensor:
    return (block / block.norm(dim=1, keepdim=True).clamp(min=1e-300)).float()
