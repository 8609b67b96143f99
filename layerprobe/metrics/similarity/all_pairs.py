"""Debiased linear CKA of all layers of one model with all layers of another: exact, fast, in flat memory.

`pairwise_cka` takes whole arrays; `MinibatchCKA` takes batches that are seen once and never kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerprobe.errors import UsageError
from layerprobe.metrics.similarity import CentredRows, FloatArray, Progress, paired_layers
from layerprobe.metrics.similarity.hsic import Terms, feature_cost, feature_terms, gram_cost, gram_terms

METHODS = ("auto", "gram", "features")


@dataclass(frozen=True, kw_only=True)
class PairwiseCKA:
    """Values and what is known of their uncertainty; made by `pairwise_cka`.

    Attributes
    ----------
    values, stderr : FloatArray
        Layers of X × layers of Y; NaN where undefined.
    reasons : list[list[str | None]]
        Per cell, why it is undefined, or None.
    influence : FloatArray
        Groups of images × layers of X × layers of Y: how each group moves each cell. Its sum of squares over
        groups is the delete-a-group variance before the small-sample correction.
    n : int
        Images.
    method : str
        "gram", "features" or "minibatch".
    """

    values: FloatArray
    stderr: FloatArray
    reasons: list[list[str | None]]
    influence: FloatArray
    n: int
    method: str

    def quantile(self, confidence: float = 0.95) -> float:
        """Two-sided Student quantile with as many degrees of freedom as there are groups, less one."""
        from scipy.stats import t

        if not 0.0 < confidence < 1.0:
            raise UsageError(f"confidence lies between 0 and 1, got {confidence}")
        return float(t.ppf(0.5 + confidence / 2, max(len(self.influence) - 1, 1)))

    def difference_stderr(self, cell: tuple[int, int], other: tuple[int, int]) -> float:
        """Standard error of the difference of two cells, whose errors are correlated (on the safe side
        where both are near 0)."""
        difference = self.influence[:, cell[0], cell[1]] - self.influence[:, other[0], other[1]]
        return float(np.sqrt(np.square(difference).sum()))


def pairwise_cka(
    layers_x: Sequence[Any],
    layers_y: Sequence[Any] | None = None,
    *,
    rows_x: NDArray[np.intp] | None = None,
    rows_y: NDArray[np.intp] | None = None,
    names_x: Sequence[str] | None = None,
    names_y: Sequence[str] | None = None,
    method: str = "auto",
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> PairwiseCKA:
    """Debiased linear CKA of every pair of layers, with a standard error each.

    Parameters
    ----------
    layers_x, layers_y
        Sequences of n×d arrays, memory-mapped ones included; widths may differ. `layers_y=None` compares
        `layers_x` with itself, at half the cost.
    rows_x, rows_y : NDArray[np.intp] | None
        Row orders that pair the images, where they are not stored in the same order.
    names_x, names_y : Sequence[str] | None
        What errors call the layers.
    method : str
        "gram", "features", or "auto" for the one with fewer multiplications.
    seed : int
        Assigns images to groups for the standard errors; values depend on it only by rounding.
    device : str
        Where the products run ("cpu", "cuda").
    progress : Progress | None
        Called with the share of the work done since the last call.

    Returns
    -------
    PairwiseCKA
        Undefined cells (a constant layer) are NaN with a reason.

    Raises
    ------
    UsageError
        Shapes that do not pair, fewer than 4 images, non-finite values, an unknown method.

    References
    ----------
    Nguyen, Raghu, Kornblith, ICLR 2021, arXiv 2010.15327; Song et al., ICML 2007 (HSIC₁). The standard error
    is a delete-a-group jackknife of the linearised ratio, less the quadratic part that a jackknife counts
    twice: Efron, Stein, "The jackknife estimate of variance", Annals of Statistics 9(3), 1981.
    """
    if method not in METHODS:
        raise UsageError(f"unknown method '{method}' for CKA; choose one of {', '.join(METHODS)}")
    xs, ys = paired_layers(layers_x, layers_y, rows_x=rows_x, rows_y=rows_y, names_x=names_x, names_y=names_y)
    if method == "auto":
        method = "gram" if gram_cost(xs, ys) <= feature_cost(xs, ys) else "features"
    order = np.random.default_rng(seed).permutation(xs[0].n).astype(np.intp)
    form = gram_terms if method == "gram" else feature_terms
    terms = form(xs, ys, order, device, progress or (lambda share: None))
    return _finish(terms, xs, xs if ys is None else ys, method)


class MinibatchCKA:
    """Sums of HSIC₁ over batches, weighted by b(b−3), and their ratio at the end.

    Every batch gives unbiased estimates of the same quantities, so batches of any size mix, and the standard
    error comes from their spread. Pairs of images in different batches are never compared.

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
        UsageError
            Fewer than 4 images in the batch, other layers than before, shapes that do not pair, or non-finite
            values.
        """
        xs, ys = paired_layers(layers_x, layers_y)
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
        values, c, u, v = _ratio(cross.sum(axis=0), self_x.sum(axis=0), self_y.sum(axis=0))
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
        return PairwiseCKA(
            values=values, stderr=stderr, reasons=reasons, influence=influence, n=self.n, method="minibatch"
        )


def _finish(terms: Terms, xs: list[CentredRows], ys: list[CentredRows], method: str) -> PairwiseCKA:
    """Ratio, influence of each group through the ratio's derivative, and the standard error."""
    self_x, self_y = _positive(terms.self_x, xs), _positive(terms.self_y, ys)
    values, c, u, v = _ratio(terms.cross, self_x, self_y)
    influence = (
        2.0
        * terms.scale
        * (c * terms.part_cross - u * terms.part_x[:, :, None] - v * terms.part_y[:, None, :])
    )
    quadratic = 2.0 * terms.square(c, u, v)
    # No variance is below its quadratic part, but the positive part of a noisy difference is biased upwards
    # (by 15 % for independent features at n = 100), so the lower bound is three quarters of that part.
    variance = np.maximum(np.square(influence).sum(axis=0) - quadratic, 0.75 * quadratic)
    return PairwiseCKA(
        values=values,
        stderr=np.sqrt(variance),
        reasons=_reasons(xs, ys, self_x, self_y),
        influence=influence,
        n=xs[0].n,
        method=method,
    )


def _ratio(
    cross: FloatArray, self_x: FloatArray, self_y: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """CKA and its derivative: d CKA = c·d cross − u·d self_x − v·d self_y; NaN where a self term is not positive."""
    self_x, self_y = (np.where(own > 0.0, own, np.nan) for own in (self_x, self_y))
    root = np.sqrt(self_x[:, None] * self_y[None, :])
    values = cross / root
    return values, 1.0 / root, values / (2.0 * self_x[:, None]), values / (2.0 * self_y[None, :])


def _positive(self_terms: FloatArray, layers: list[CentredRows]) -> FloatArray:
    """Self-similarities, NaN where CKA cannot be normalised by them."""
    usable = np.array([not layer.constant for layer in layers]) & (self_terms > 1e-12)
    return np.where(usable, self_terms, np.nan)


def _reasons(
    xs: list[CentredRows], ys: list[CentredRows], self_x: FloatArray, self_y: FloatArray
) -> list[list[str | None]]:
    def reason(layer: CentredRows, value: float) -> str | None:
        if layer.constant:
            return f"{layer.name} is constant over the images"
        if np.isnan(value):
            return f"all {layer.n} images are equally far apart in {layer.name}; use more images"
        return None

    first = [reason(layer, value) for layer, value in zip(xs, self_x, strict=True)]
    second = [reason(layer, value) for layer, value in zip(ys, self_y, strict=True)]
    return [[a or b for b in second] for a in first]
