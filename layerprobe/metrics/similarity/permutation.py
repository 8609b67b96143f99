"""What debiased CKA would be if the images of one model were shuffled: a permutation null for every cell.

A shuffle leaves a centred Gram matrix centred, so only the numerator ⟨K, PLPᵀ⟩ changes. The shuffles are the
n cyclic shifts of the images in a random order. Shifting moves every diagonal of L along the same diagonal of
K, so the numerators of all shifts are sums of circular correlations: one Fourier transform per diagonal and
layer, and one small product per frequency for all pairs of layers. The shifts form a group, so the test is exact
for one random order. Where more permutations are asked for than there are shifts, the images of Y are shuffled
before they are shifted, each time anew: a random coset of a random such group, so that the test stays exact. Where
as many are asked for as there are, n! in all, each is taken once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from layerprobe.errors import UsageError
from layerprobe.metrics.similarity import CentredRows, FloatArray, Progress, matmul, paired_layers

MAX_IMAGES = 4096
"""More images than this are sampled: the null's shape no longer depends on n, its spread does so in a known way."""
ROUNDING = 1e-5
"""Relative: a permutation that misses a value by as little reaches it. With few images many are exact ties."""
BAND_BYTES = 96 << 20
"""Memory for the diagonals of all layers that are transformed together (twice that with the transforms)."""


@dataclass(frozen=True)
class PermutationNull:
    """Debiased CKA under permutations of the images.

    Attributes
    ----------
    samples : NDArray[np.float32]
        Permutations but the observed one × layers of X × layers of Y; NaN where a layer is constant.
    n : int
        Images of the comparison.
    n_used : int
        Images that were permuted, fewer than `n` above `MAX_IMAGES`; the samples are then rescaled to `n` by
        their standard deviation's known dependence on n.
    """

    samples: NDArray[np.float32]
    n: int
    n_used: int

    @property
    def n_permutations(self) -> int:
        return len(self.samples)

    def pvalue(self, values: FloatArray) -> FloatArray:
        """Per cell, the share of permutations (the observed one among them) that reach `values`: 1/n! or more."""
        reached = (self.samples >= _reachable(values)).sum(axis=0)
        return np.where(np.isnan(values), np.nan, (1.0 + reached) / (1.0 + len(self.samples)))

    def pvalue_max(self, values: FloatArray) -> FloatArray:
        """Per cell, the share of permutations in which *any* cell reaches `values`: corrected for the search."""
        filled = np.where(np.isnan(self.samples), -np.inf, self.samples)
        largest = np.sort(filled.max(axis=(1, 2)))
        reached = len(largest) - np.searchsorted(largest, _reachable(values), side="left")
        return np.where(np.isnan(values), np.nan, (1.0 + reached) / (1.0 + len(largest)))


def _reachable(values: FloatArray) -> NDArray[np.float32]:
    """`values`, lowered by what rounding may take from an equal one."""
    return (values - ROUNDING * np.abs(values)).astype(np.float32)


def permutation_null(
    layers_x: Sequence[Any],
    layers_y: Sequence[Any] | None = None,
    *,
    rows_x: NDArray[np.intp] | None = None,
    rows_y: NDArray[np.intp] | None = None,
    names_x: Sequence[str] | None = None,
    names_y: Sequence[str] | None = None,
    n_permutations: int = 1000,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> PermutationNull:
    """Debiased CKA of all pairs of layers under at least `n_permutations` shuffles of the images, or all there are.

    Parameters
    ----------
    layers_x, layers_y, rows_x, rows_y, names_x, names_y, device, progress
        As in `pairwise_cka`.
    n_permutations : int
        At least this many, or all n! − 1 where there are fewer; all shifts of an order are used, which may be more.
    seed : int
        Of the random orders.

    Raises
    ------
    UsageError
        Shapes that do not pair, fewer than 4 images, non-finite values, no permutations.

    References
    ----------
    Hemerik, Goeman, "Exact testing with random permutations", TEST 27, 2018 (tests over a subgroup).
    Westfall, Young, "Resampling-based multiple testing", 1993 (the maximum over cells).
    """
    if n_permutations < 1:
        raise UsageError(f"permutations must be at least 1, got {n_permutations}")
    xs, ys = paired_layers(layers_x, layers_y, rows_x=rows_x, rows_y=rows_y, names_x=names_x, names_y=names_y)
    n = xs[0].n
    used = min(n, MAX_IMAGES)
    # The observed permutation is one of them. Every permutation is a shift behind one that keeps the first image.
    there_are = math.factorial(used - 1)
    rounds = min(there_are, math.ceil((n_permutations + 1) / used))
    generator = np.random.default_rng(seed)
    order = generator.permutation(n)[:used].astype(np.intp)
    report = (lambda share: None) if progress is None else (lambda share: progress(share / rounds))
    found = [_all_shifts(xs, ys, order, order, device, report)[1:]]
    if rounds == there_are:
        for rest in itertools.islice(itertools.permutations(order[1:]), 1, None):
            shuffled = np.array([order[0], *rest], np.intp)
            found.append(_all_shifts(xs, ys, order, shuffled, device, report))
    else:
        for _ in range(rounds - 1):
            order = generator.permutation(n)[:used].astype(np.intp)
            found.append(_all_shifts(xs, ys, order, generator.permutation(order), device, report))
    scale = math.sqrt(used * (used - 3) / (n * (n - 3)))
    return PermutationNull((np.concatenate(found) * scale).astype(np.float32), n, used)


def _all_shifts(
    xs: list[CentredRows],
    ys: list[CentredRows] | None,
    order: NDArray[np.intp],
    order_y: NDArray[np.intp],
    device: str,
    progress: Progress,
) -> FloatArray:
    """Debiased CKA for every cyclic shift of the images of Y, in `order_y`, along those of X, in `order`.

    Shifts × a × b, the first as the orders are. `ys` None: the layers of X.
    """
    if ys is None and order_y is not order:
        ys = xs
    layers = xs + (ys or [])
    n, a = len(order), len(xs)
    half = n // 2
    panels = [_rows(layer, order).to(device) for layer in xs]
    panels += [_rows(layer, order_y).to(device) for layer in ys or []]
    width = max(1, min(128, half, BAND_BYTES // (8 * len(layers) * n)))
    spectrum = torch.zeros(n // 2 + 1, a, len(ys or xs), dtype=torch.complex128, device=device)
    squares = torch.zeros(len(layers), dtype=torch.float64, device=device)
    for first in range(1, half + 1, width):
        count = min(width, half + 1 - first)
        band = torch.empty(len(layers), count, n, dtype=torch.float32, device=device)
        for index, panel in enumerate(panels):
            _diagonals(panel, first, count, out=band[index])
        # Each diagonal stands for its mirror image, too, except the middle one of an even number.
        weight = torch.full((count,), 2.0, device=device)
        if n % 2 == 0 and first + count - 1 == half:
            weight[-1] = 1.0
        squares += (torch.linalg.vector_norm(band, dim=2).double().square() * weight).sum(dim=1)
        waves = torch.fft.rfft(band, dim=2).permute(2, 0, 1).contiguous()
        x, y = (waves, waves) if ys is None else (waves[:, :a], waves[:, a:])
        spectrum += torch.bmm(x.conj() * weight, y.transpose(1, 2))
        progress(count / half)
    sums = torch.fft.irfft(spectrum, n=n, dim=0).cpu().numpy()

    k = np.stack(
        [np.square(torch.linalg.vector_norm(panel, dim=1).double().cpu().numpy()) for panel in panels]
    )
    waves_k = np.fft.rfft(k, axis=1)
    kx, ky = (waves_k, waves_k) if ys is None else (waves_k[:a], waves_k[a:])
    diagonal = np.fft.irfft(np.einsum("af,bf->fab", kx.conj(), ky), n=n, axis=0)
    traces = k.sum(axis=1)
    tx, ty = (traces, traces) if ys is None else (traces[:a], traces[a:])
    numerator = sums - 2.0 / (n - 2) * diagonal + np.outer(tx, ty) / ((n - 1) * (n - 2))
    own = squares.cpu().numpy() - 2.0 / (n - 2) * np.square(k).sum(axis=1) + traces**2 / ((n - 1) * (n - 2))
    usable = np.array([not layer.constant for layer in layers]) & (own > 1e-12)
    own = np.where(usable, own, np.nan)
    own_x, own_y = (own, own) if ys is None else (own[:a], own[a:])
    return numerator / np.sqrt(own_x[:, None] * own_y[None, :])


def _rows(layer: CentredRows, order: NDArray[np.intp]) -> torch.Tensor:
    """The rows in `order`, in float32, centred on their own mean where they are a subset."""
    n = len(order)
    panel = np.empty((n, layer.d), np.float32)
    layer.fill(order, panel)
    if n < layer.n:
        panel -= panel.mean(axis=0, dtype=np.float64).astype(np.float32)
    return torch.from_numpy(panel)


def _diagonals(panel: torch.Tensor, first: int, count: int, *, out: torch.Tensor) -> None:
    """Diagonals `first` to `first + count − 1` (cyclic) of the Gram matrix of `panel`, as rows of `out`."""
    n = len(panel)
    step = min(n, max(count, 64))
    for start in range(0, n, step):
        rows = panel[start : start + step]
        index = torch.arange(start + first, start + first + len(rows) + count - 1, device=panel.device) % n
        block = matmul(rows, panel[index].T)
        height, span = block.shape
        view = block.as_strided((count, height), (1, span + 1))
        out[:, start : start + height] = view
