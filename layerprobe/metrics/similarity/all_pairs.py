"""Debiased linear CKA of all layers of one model with all layers of another: exact, fast, in flat memory.

Two exact forms, and the cheaper one is chosen. The Gram form (`similarity_gram`) walks over half of the n×n
square in tiles; in a tile the centred Gram matrices of all layers are made once and multiplied with one
another, so that the cost is that of the Gram matrices alone. The feature form (`similarity_features`)
multiplies d×d matrices and wins where n is much larger than d. Products run in float32 over at most 8,192
terms and are summed in float64; up to 512 images everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerprobe.errors import UsageError
from layerprobe.metrics.similarity.rows import CentredRows, centred_layers

FloatArray = NDArray[np.float64]
Progress = Callable[[float], None]

DIAGONAL_ROWS = 256
"""Rows per tile of the Gram form along the diagonal, where half a tile is wasted: the fewer the less waste,
the more the faster the matrix product."""
METHODS = ("auto", "gram", "features")


@dataclass(frozen=True)
class PairwiseCKA:
    """Values and what is known of their uncertainty; made by `pairwise_cka`.

    Attributes
    ----------
    values, stderr : layers of X × layers of Y; NaN where undefined.
    reasons : per cell, why it is undefined, or None.
    influence : groups of images × layers of X × layers of Y: how each group pulls each cell. Its sum of
        squares over groups is the delete-a-group variance before the small-sample correction.
    n : images. method : "gram" or "features".
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


@dataclass(frozen=True)
class Terms:
    """What both forms deliver. `cross`, `self_x`, `self_y` are n(n−3)·HSIC₁; the `part_*` are the shares of
    groups of images in them (groups × …); `square(c, u, v)` is the sum over pairs of different images or
    groups of the squared, doubly centred kernel c·cross − u·self_x − v·self_y, all (layers of X × of Y)."""

    cross: FloatArray
    self_x: FloatArray
    self_y: FloatArray
    part_cross: FloatArray
    part_x: FloatArray
    part_y: FloatArray
    scale: float
    square: Callable[[FloatArray, FloatArray, FloatArray], FloatArray]


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
    layers_x, layers_y : sequences of n×d arrays, memory-mapped ones included; widths may differ.
        `layers_y=None` compares `layers_x` with itself, at half the cost.
    rows_x, rows_y : row orders that pair the images, where they are not stored in the same order.
    names_x, names_y : what errors call the layers.
    method : "gram", "features", or "auto" for the one with fewer multiplications.
    seed : deals the images into groups for the standard errors; values depend on it only by rounding.
    device : where the products run ("cpu", "cuda").
    progress : called with the share of the work done since the last call.

    Returns
    -------
    PairwiseCKA. Undefined cells (a constant layer) are NaN with a reason.

    Raises
    ------
    UsageError : shapes that do not pair, fewer than 4 images, non-finite values, an unknown method.

    References
    ----------
    Nguyen, Raghu, Kornblith, ICLR 2021, arXiv 2010.15327; Song et al., ICML 2007 (HSIC₁). The standard error
    is a delete-a-group jackknife of the linearised ratio, less the quadratic part that a jackknife counts
    twice: Efron, Stein, "The jackknife estimate of variance", Annals of Statistics 9(3), 1981.
    """
    from layerprobe.metrics.similarity.features import feature_terms
    from layerprobe.metrics.similarity.gram import gram_terms

    if method not in METHODS:
        raise UsageError(f"unknown method '{method}' for CKA; choose one of {', '.join(METHODS)}")
    xs, ys = paired_layers(layers_x, layers_y, rows_x=rows_x, rows_y=rows_y, names_x=names_x, names_y=names_y)
    if method == "auto":
        method = "gram" if gram_cost(xs, ys) <= feature_cost(xs, ys) else "features"
    order = np.random.default_rng(seed).permutation(xs[0].n).astype(np.intp)
    form = gram_terms if method == "gram" else feature_terms
    terms = form(xs, ys, order, device, progress or (lambda share: None))
    return _finish(terms, xs, xs if ys is None else ys, method)


def paired_layers(
    layers_x: Sequence[Any],
    layers_y: Sequence[Any] | None,
    *,
    rows_x: NDArray[np.intp] | None,
    rows_y: NDArray[np.intp] | None,
    names_x: Sequence[str] | None,
    names_y: Sequence[str] | None,
) -> tuple[list[CentredRows], list[CentredRows] | None]:
    """Both models' layers, checked against one another; the second is None for a self-comparison."""
    xs = centred_layers(layers_x, names_x or [f"layer {i} of A" for i in range(len(layers_x))], rows_x)
    if layers_y is None:
        return xs, None
    ys = centred_layers(layers_y, names_y or [f"layer {i} of B" for i in range(len(layers_y))], rows_y)
    if ys[0].n != xs[0].n:
        raise UsageError(
            f"similarity pairs rows image by image: {xs[0].name} is {xs[0].n}×{xs[0].d}, "
            f"{ys[0].name} is {ys[0].n}×{ys[0].d}"
        )
    return xs, ys


def gram_cost(xs: list[CentredRows], ys: list[CentredRows] | None) -> float:
    """Multiplications of the Gram form."""
    n = xs[0].n
    layers = xs if ys is None else xs + ys
    return n * (n + DIAGONAL_ROWS) / 2 * (sum(layer.d for layer in layers) + len(xs) * len(ys or xs))


def feature_cost(xs: list[CentredRows], ys: list[CentredRows] | None) -> float:
    """Multiplications of the feature form."""
    n = xs[0].n
    if ys is None:
        return float(n * sum(a.d * b.d for i, a in enumerate(xs) for b in xs[i:]))
    return float(n * (sum(a.d * b.d for a in xs for b in ys) + sum(layer.d**2 for layer in xs + ys)))


def _finish(terms: Terms, xs: list[CentredRows], ys: list[CentredRows], method: str) -> PairwiseCKA:
    """Ratio, influence of each group through the ratio's derivative, and the standard error."""
    n = xs[0].n
    self_x, self_y = _positive(terms.self_x, xs), _positive(terms.self_y, ys)
    values, c, u, v = finish_ratio(terms.cross, self_x, self_y)
    influence = (
        2.0
        * terms.scale
        * (c * terms.part_cross - u * terms.part_x[:, :, None] - v * terms.part_y[:, None, :])
    )
    quadratic = 2.0 * terms.square(c, u, v)
    # No variance is below its quadratic part, but the positive part of a noisy difference is biased upwards
    # (by 15 % for independent features at n = 100), so only three quarters of that part are insisted on.
    variance = np.maximum(np.square(influence).sum(axis=0) - quadratic, 0.75 * quadratic)
    return PairwiseCKA(values, np.sqrt(variance), _reasons(xs, ys, self_x, self_y), influence, n, method)


def finish_ratio(
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
