"""Debiased CKA from minibatches that are seen once: for features that are never kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from layerprobe.errors import UsageError
from layerprobe.metrics.similarity.all_pairs import FloatArray, PairwiseCKA, finish_ratio, paired_layers
from layerprobe.metrics.similarity.gram import gram_terms


class MinibatchCKA:
    """Sums of HSIC₁ over batches, weighted by b(b−3), and their ratio at the end.

    Every batch is an unbiased look at the same quantities, so batches of any size mix, and the standard error
    comes from their spread. The value is that of the whole data set up to its own error, not to rounding:
    pairs of images in different batches are never compared.

    References
    ----------
    Nguyen, Raghu, Kornblith, ICLR 2021, arXiv 2010.15327, section 3 and appendix.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> running = MinibatchCKA()
    >>> for _ in range(3):
    ...     batch = rng.normal(size=(64, 8))
    ...     running.update([batch], [2 * batch])
    >>> running.result().values.round(6)
    array([[1.]])
    """

    def __init__(self, *, device: str = "cpu") -> None:
        self.device = device
        self.n = 0
        self._parts: list[tuple[FloatArray, FloatArray, FloatArray]] = []
        self._names: tuple[list[str], list[str]] | None = None

    def update(self, layers_x: Sequence[Any], layers_y: Sequence[Any] | None = None) -> None:
        """Add one batch: a list of b×d arrays for each model (the second left out compares a model with itself).

        Raises
        ------
        UsageError : fewer than 4 images in the batch, other layers than before, shapes that do not pair, or
            non-finite values.
        """
        xs, ys = paired_layers(layers_x, layers_y, rows_x=None, rows_y=None, names_x=None, names_y=None)
        names = ([layer.name for layer in xs], [layer.name for layer in ys or xs])
        if self._names is not None and names != self._names:
            raise UsageError(
                f"every batch must bring the same layers: {len(self._names[0])} and {len(self._names[1])} before, "
                f"{len(names[0])} and {len(names[1])} now"
            )
        self._names = names
        terms = gram_terms(xs, ys, np.arange(xs[0].n, dtype=np.intp), self.device, lambda share: None)
        # The layers arrive scaled by powers of two that differ from batch to batch; the sums must not.
        scale_x = np.array([0.0 if layer.constant else layer.scale**-2.0 for layer in xs])
        scale_y = np.array([0.0 if layer.constant else layer.scale**-2.0 for layer in ys or xs])
        self._parts.append(
            (
                terms.cross * scale_x[:, None] * scale_y[None, :],
                terms.self_x * scale_x**2,
                terms.self_y * scale_y**2,
            )
        )
        self.n += xs[0].n

    def result(self) -> PairwiseCKA:
        """Values over all batches so far; standard errors from the spread of the batches (NaN for one batch)."""
        if self._names is None:
            raise UsageError("no batch was added")
        cross, self_x, self_y = (np.stack(part) for part in zip(*self._parts, strict=True))
        batches = len(cross)
        values, c, u, v = finish_ratio(cross.sum(axis=0), self_x.sum(axis=0), self_y.sum(axis=0))
        influence = c * cross - u * self_x[:, :, None] - v * self_y[:, None, :]
        if batches > 1:
            influence *= math.sqrt(batches / (batches - 1))
            stderr = np.sqrt(np.square(influence).sum(axis=0))
        else:
            stderr = np.full_like(values, np.nan)
        flat_x, flat_y = (
            [f"{name} is constant over the images of every batch" if bad else None for name, bad in pairs]
            for pairs in (
                zip(self._names[0], self_x.sum(axis=0) <= 0.0, strict=True),
                zip(self._names[1], self_y.sum(axis=0) <= 0.0, strict=True),
            )
        )
        reasons = [[a or b for b in flat_y] for a in flat_x]
        return PairwiseCKA(values, stderr, reasons, influence, self.n, "minibatch")
