"""Probes at growing numbers of labels (online code length, few-shot accuracy) and on random labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from layerprobe.errors import UsageError
from layerprobe.metrics.probing import Standardised
from layerprobe.metrics.probing.logistic import ProbeResult, fit_logistic_path, select_probe
from layerprobe.metrics.validation import C_GRID, check_features, check_grid, check_labels

SHOTS = (1, 2, 5, 10)
"""Training images per class of the few-shot curve."""


@dataclass(frozen=True, kw_only=True)
class CodeLength:
    """Code length of the labels given the features.

    Attributes
    ----------
    bits : float
        Length of the online code.
    compression : float
        n·log2 K, the length without features, over `bits`; 1 = no information in the features, higher = labels easier
        to predict.
    """

    bits: float
    compression: float


def online_code_length(
    X: np.ndarray,
    y: np.ndarray,
    n_classes: int,
    *,
    C: float = 1.0,
    first: int | None = None,
    seed: int = 0,
    tol: float = 1e-4,
    device: str = "cpu",
) -> CodeLength:
    """Description length of the labels by prequential coding with a linear probe.

    The rows are shuffled and coded in portions that double: the first with log2 K bits a label, each later one
    with the probe fitted on all before it. Predictions are mixed with the uniform distribution, as
    (t·p + 1)/(t + K) after t rows, so that an unseen class has a finite code length.

    Parameters
    ----------
    X : np.ndarray
        n×d features.
    y : np.ndarray
        Labels in 0 … n_classes−1.
    C : float
        Inverse regularisation strength of all probes.
    first : int | None
        Rows of the first portion; default n/128, at least K and 16.
    seed : int
        Of the shuffle.

    Returns
    -------
    CodeLength
        Cost: about twice one fit on all rows.

    Raises
    ------
    UsageError
        Unusable features, labels, C or first.

    References
    ----------
    Voita, Titov, Information-theoretic probing with minimum description length, 2020, arXiv 2003.12298,
    section 2.2.2 (theirs has portions of fixed percentages and no mixing).
    """
    rows = check_features(X, "X")
    labels, _ = check_labels(y, len(rows), "y", n_classes)
    check_grid([C])
    n = len(rows)
    start = max(n // 128, min(n_classes, n), 16) if first is None else first
    if start < 1:
        raise UsageError(f"the first portion needs at least one row, got {first}")
    order = np.random.default_rng(seed).permutation(n)
    rows, labels = rows[order], labels[order]
    ends = [min(start, n)]
    while ends[-1] < n:
        ends.append(min(2 * ends[-1], n))
    nats = ends[0] * np.log(n_classes)
    for seen, end in pairwise(ends):
        p = _predicted(rows[:end], labels[:end], seen, n_classes, C=C, tol=tol, device=device)
        nats -= np.log((seen * p + 1) / (seen + n_classes)).sum()
    bits, uniform = float(nats / np.log(2)), float(n * np.log2(n_classes))
    return CodeLength(bits=bits, compression=uniform / bits)


def _predicted(
    X: np.ndarray, y: np.ndarray, seen: int, n_classes: int, *, C: float, tol: float, device: str
) -> np.ndarray:
    """Probability that a probe fitted on the first `seen` rows gives each later label; 0 for an unseen class."""
    present, coded = np.unique(y[:seen], return_inverse=True)
    column = np.full(n_classes, -1)
    column[present] = np.arange(len(present))
    later = column[y[seen:]]
    known = later >= 0
    p = np.zeros(len(later))
    if len(present) == 1:
        p[known] = 1.0
        return p
    probe = fit_logistic_path(X[:seen], coded, [C], tol=tol, device=device)[0]
    p[known] = np.exp(probe.log_probabilities(X[seen:])[known, later[known]])
    return p


@dataclass(frozen=True)
class FewShot:
    """Test accuracy with `shots` training images per class, one value per draw of the images."""

    shots: int
    accuracies: np.ndarray


def few_shot_curve(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    n_classes: int,
    *,
    shots: Sequence[int] = SHOTS,
    draws: int = 3,
    seed: int = 0,
    Cs: Sequence[float] = C_GRID,
    tol: float = 1e-4,
    device: str = "cpu",
) -> list[FewShot]:
    """Probes on a few training images per class, several random draws each.

    The draw with more shots contains the one with fewer. C is chosen on the whole validation split; there is
    no refit.

    Returns
    -------
    list[FewShot]
        Of FewShot; a number of shots of which the rarest class cannot supply three times as many is left out: draws
        that share their images would hardly differ.
    """
    X, y = check_features(train[0], "the training features"), np.asarray(train[1])
    available = int(np.bincount(y, minlength=n_classes).min())
    curve = []
    for m in (m for m in shots if 3 * m <= available):
        accuracies = []
        for draw in range(draws):
            order = np.random.default_rng([seed, draw]).permutation(len(y))
            by_class = order[np.argsort(y[order], kind="stable")]
            starts = np.r_[0, np.cumsum(np.bincount(y, minlength=n_classes))[:-1]]
            chosen = by_class[(starts[:, None] + np.arange(m)).ravel()]
            few = (X[chosen], y[chosen])
            found = select_probe(
                few, validation, test, n_classes, Cs=Cs, refit="train", tol=tol, device=device
            )
            accuracies.append(found.test_accuracy)
        curve.append(FewShot(m, np.array(accuracies)))
    return curve


TYPES_PER_CLASS = 10
IMAGES_PER_TYPE = 5


def control_labels(
    surface: Sequence[np.ndarray], n_classes: int, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of a control task: one at random for every type of input, the same in train, validation and test.

    The type of a word is the word. That of an image is its cluster among the training images by what is seen at the
    surface (k-means; 10 types a class where there are 5 images for each). So a control task can be learnt from the
    input and says nothing about the real classes, and its labels hold for images that no probe has seen.

    Parameters
    ----------
    surface : Sequence[np.ndarray]
        Train, validation and test, n×d each: raw pixels, or the features nearest the input.
    n_classes : int
        K of the real task; labels are as many, and as even over the types.

    References
    ----------
    Hewitt, Liang, Designing and interpreting probes with control tasks, 2019, arXiv 1909.03368.
    """
    from sklearn.cluster import KMeans

    data = Standardised.of(np.asarray(surface[0], dtype=np.float64))
    train, *others = ((np.asarray(part, dtype=np.float64) - data.mean) / data.scale for part in surface)
    wanted = max(n_classes, min(TYPES_PER_CLASS * n_classes, len(train) // IMAGES_PER_TYPE))
    n_types = min(wanted, len(np.unique(train, axis=0)))
    types = KMeans(n_types, n_init=4, random_state=seed).fit(train)
    label = np.random.default_rng(seed).permutation(n_types) % n_classes
    return label[types.labels_], label[types.predict(others[0])], label[types.predict(others[1])]


def control_probe(parts: Sequence[np.ndarray], labels: Sequence[np.ndarray], **options: Any) -> ProbeResult:
    """The probe of a control task, as that of the real one: C chosen on validation, accuracy measured on test.

    Selectivity is the accuracy of the real task's probe minus this one's.

    Parameters
    ----------
    parts, labels : Sequence[np.ndarray]
        Features (n×d) and `control_labels` of train, validation and test.
    options
        Of `select_probe`.
    """
    sides = list(zip(parts, labels, strict=True))
    return select_probe(sides[0], sides[1], sides[2], int(labels[0].max()) + 1, **options)
