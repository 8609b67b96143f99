"""The Gram form of all-pairs CKA: tiles of the half-square, each made once for all layers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from layerprobe.metrics.similarity_pairs import TILE_COLUMNS, FloatArray, Progress, Terms
from layerprobe.metrics.similarity_rows import FLOAT64_UP_TO, CentredRows

PANEL_BYTES = 80 << 20
"""Memory for the rows of all layers that one strip of tiles keeps at hand."""
MAX_GROUPS = 64


def gram_terms(
    xs: list[CentredRows],
    ys: list[CentredRows] | None,
    order: NDArray[np.intp],
    device: str,
    progress: Progress,
) -> Terms:
    """HSIC₁ sums, by groups of images, from centred Gram tiles.

    The rows come in the random `order`; consecutive ones form units of `unit` rows, units form groups. For
    every pair of units the products of all layers' Gram blocks are one small batched product of at most
    `unit` terms, then summed. Diagonals of the Gram matrices are taken out before any product.
    """
    layers = xs + (ys or [])
    n, a = xs[0].n, len(xs)
    dtype = np.float64 if n <= FLOAT64_UP_TO else np.float32
    unit = unit_rows(n)
    padded = math.ceil(n / unit) * unit
    group_of_unit = group_ids(padded // unit)
    groups = int(group_of_unit[-1]) + 1
    cross = np.zeros((groups, groups, a, len(ys or xs)))
    own = None if ys is None else np.zeros((groups, groups, len(layers)))
    diagonals = np.zeros((len(layers), padded))
    strip = strip_rows(padded, sum(layer.d for layer in layers) * np.dtype(dtype).itemsize)
    rows = [np.empty((strip, layer.d), dtype) for layer in layers]
    columns = [np.empty((min(TILE_COLUMNS, padded), layer.d), dtype) for layer in layers]
    buffer = torch.empty(
        len(layers) * strip * columns[0].shape[0], dtype=getattr(torch, np.dtype(dtype).name), device=device
    )
    work = padded * (padded + TILE_COLUMNS) / 2
    for top in range(0, padded, strip):
        bottom = min(top + strip, padded)
        left = _load(layers, order, top, bottom, rows, device)
        for start in range(top, padded, TILE_COLUMNS):
            stop = min(start + TILE_COLUMNS, padded)
            on_diagonal = start < bottom
            if on_diagonal:
                height, right = stop - top, [part[start - top : stop - top] for part in left]
            else:
                height, right = bottom - top, _load(layers, order, start, stop, columns, device)
            width = stop - start
            tile = buffer[: len(layers) * height * width].view(len(layers), height, width)
            for index, (x, y) in enumerate(zip(left, right, strict=True)):
                torch.mm(x[:height], y.T, out=tile[index])
            if on_diagonal:
                diagonal = tile[:, start - top :].diagonal(dim1=1, dim2=2)
                diagonals[:, start:stop] = diagonal.cpu().numpy()
                diagonal.zero_()
            split = (start - top if on_diagonal else height) // unit
            row_groups = group_of_unit[top // unit : (top + height) // unit]
            column_groups = group_of_unit[start // unit : stop // unit]
            _add_blocks(
                cross, _products(tile, a, unit, self_comparison=ys is None), row_groups, column_groups, split
            )
            if own is not None:
                _add_blocks(own, _squares(tile, unit), row_groups, column_groups, split)
            progress(height * width / work)
    return _terms(n, unit, group_of_unit, diagonals, cross, own, a)


def unit_rows(n: int) -> int:
    """Rows per unit: a power of two ≤ 128 that leaves at least 30 units where there are as many images."""
    return 2 ** min(7, max(0, int(math.log2(n / 30)) if n >= 30 else 0))


def group_ids(units: int) -> NDArray[np.intp]:
    """Group of each unit: at most `MAX_GROUPS` groups of consecutive units, as equal as can be."""
    return (np.arange(units) * min(MAX_GROUPS, units)) // units


def strip_rows(padded: int, bytes_per_row: int) -> int:
    """Rows per strip: a multiple of the tile width, equal strips, within `PANEL_BYTES`."""
    most = max(TILE_COLUMNS, PANEL_BYTES // bytes_per_row // TILE_COLUMNS * TILE_COLUMNS)
    strips = math.ceil(padded / most)
    return min(padded, math.ceil(padded / strips / TILE_COLUMNS) * TILE_COLUMNS)


def _load(
    layers: list[CentredRows],
    order: NDArray[np.intp],
    start: int,
    stop: int,
    into: list[NDArray[Any]],
    device: str,
) -> list[torch.Tensor]:
    """Centred rows `start` to `stop` of every layer; beyond the last image rows are zero and add nothing."""
    index = order[start:stop]
    loaded = []
    for layer, panel in zip(layers, into, strict=True):
        layer.fill(index, panel[: len(index)])
        panel[len(index) : stop - start] = 0.0
        loaded.append(torch.from_numpy(panel[: stop - start]).to(device))
    return loaded


def _products(tile: torch.Tensor, a: int, unit: int, *, self_comparison: bool) -> FloatArray:
    """Per pair of units, the sum of products of every Gram block of X with every one of Y: (u, u', a, b)."""
    count, height, width = tile.shape
    runs = tile.view(count, height * width // unit, unit).transpose(0, 1)
    x, y = (runs, runs) if self_comparison else (runs[:, :a], runs[:, a:])
    products = torch.bmm(x, y.transpose(1, 2))
    blocks = products.view(height // unit, unit, width // unit, x.shape[1], y.shape[1])
    return blocks.sum(dim=1, dtype=torch.float64).cpu().numpy()


def _squares(tile: torch.Tensor, unit: int) -> FloatArray:
    """Per pair of units, the sum of squares of every Gram block: (u, u', layers)."""
    count, height, width = tile.shape
    norms = torch.linalg.vector_norm(tile.view(count, height // unit, unit, width // unit, unit), dim=-1)
    return norms.square_().sum(dim=2, dtype=torch.float64).permute(1, 2, 0).cpu().numpy()


def _add_blocks(
    total: FloatArray, blocks: FloatArray, rows: NDArray[np.intp], columns: NDArray[np.intp], split: int
) -> None:
    """Add unit blocks to their groups; those above `split` stand for their mirror images, too."""
    np.add.at(total, (rows[:, None], columns[None, :]), blocks)
    np.add.at(total, (columns[:, None], rows[None, :split]), blocks[:split].swapaxes(0, 1))


def _terms(
    n: int,
    unit: int,
    group_of_unit: NDArray[np.intp],
    diagonals: FloatArray,
    cross: FloatArray,
    own: FloatArray | None,
    a: int,
) -> Terms:
    groups = len(cross)
    group_of_row = np.repeat(group_of_unit, unit)[:n]
    share = np.bincount(group_of_row, minlength=groups) / n
    k = diagonals[:, :n]
    kx, ky = (k, k) if own is None else (k[:a], k[a:])
    self_x = np.einsum("ghaa->gha", cross) if own is None else own[:, :, :a]
    self_y = self_x if own is None else own[:, :, a:]

    def debiased(blocks: FloatArray, diagonal: FloatArray, traces: FloatArray) -> FloatArray:
        """Group shares of n(n−3)·HSIC₁ from off-diagonal sums, products of diagonals, and of traces."""
        shares = share.reshape(-1, *([1] * traces.ndim))
        return blocks.sum(axis=1) - 2.0 / (n - 2) * diagonal + shares * traces / ((n - 1) * (n - 2))

    def by_group(left: FloatArray, right: FloatArray, pattern: str) -> FloatArray:
        starts = np.searchsorted(group_of_row, np.arange(groups))
        ends = np.append(starts[1:], n)
        return np.stack(
            [np.einsum(pattern, left[:, s:e], right[:, s:e]) for s, e in zip(starts, ends, strict=True)]
        )

    part_cross = debiased(cross, by_group(kx, ky, "ar,br->ab"), np.outer(kx.sum(axis=1), ky.sum(axis=1)))
    part_x = debiased(self_x, by_group(kx, kx, "ar,ar->a"), kx.sum(axis=1) ** 2)
    part_y = debiased(self_y, by_group(ky, ky, "ar,ar->a"), ky.sum(axis=1) ** 2)

    def square(c: FloatArray, u: FloatArray, v: FloatArray) -> FloatArray:
        kernel = c * cross - u * self_x[:, :, :, None] - v * self_y[:, :, None, :]
        mean = kernel.sum(axis=1)
        kernel -= share[None, :, None, None] * mean[:, None] + share[:, None, None, None] * mean[None, :]
        kernel[np.arange(groups), np.arange(groups)] = 0.0
        return np.square(kernel).sum(axis=(0, 1)) / max(1.0 - float(np.square(share).sum()), 1e-12)

    scale = math.sqrt(groups / (groups - 1))
    return Terms(
        part_cross.sum(axis=0),
        part_x.sum(axis=0),
        part_y.sum(axis=0),
        part_cross,
        part_x,
        part_y,
        scale,
        square,
    )
