"""The Gram form of all-pairs CKA: tiles of the half-square, each made once for all layers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from layerprobe.metrics.similarity.all_pairs import DIAGONAL_ROWS, FloatArray, Progress, Terms
from layerprobe.metrics.similarity.rows import FLOAT64_UP_TO, CentredRows

PANEL_BYTES = 80 << 20
"""Memory for the rows of all layers that one strip of tiles keeps at hand."""
TILE_ROWS = 512
"""Rows per tile beside the diagonal; the tile of all layers takes about two thirds of the panel's memory."""
MAX_GROUPS = 64


def gram_terms(
    xs: list[CentredRows],
    ys: list[CentredRows] | None,
    order: NDArray[np.intp],
    device: str,
    progress: Progress,
) -> Terms:
    """HSIC₁ sums, by groups of images, from centred Gram tiles.

    The rows come in the random `order`; consecutive ones form units of `unit` rows (the last one padded with
    zeros), units form groups. For
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
    panels = [np.empty((strip, layer.d), dtype) for layer in layers]
    chunk = np.empty((min(TILE_ROWS, padded), max(layer.d for layer in layers)), dtype)
    buffer = torch.from_numpy(np.empty(len(layers) * len(chunk) * strip, dtype)).to(device)
    work = padded * (padded + DIAGONAL_ROWS) / 2
    for left in range(0, padded, strip):
        right = min(left + strip, padded)
        columns = [
            _load(layer, order, left, panel[: min(right, n) - left], device)
            for layer, panel in zip(layers, panels, strict=True)
        ]
        start = left
        while start < padded:
            on_diagonal = start < right
            stop = min(start + DIAGONAL_ROWS, right) if on_diagonal else min(start + TILE_ROWS, padded)
            height, width = stop - start, (stop if on_diagonal else right) - left
            tile = buffer[: len(layers) * height * width].view(len(layers), height, width)
            seen_rows, seen_columns = min(stop, n) - start, min(left + width, n) - left
            # The upper right quarter of a diagonal square is the mirror image of the lower left one.
            half = min(DIAGONAL_ROWS // 2, seen_rows) // unit * unit
            tile[:, seen_rows:].zero_()
            tile[:, :, seen_columns:].zero_()
            for index, (layer, panel) in enumerate(zip(layers, columns, strict=True)):
                if on_diagonal:
                    rows = panel[start - left :][:seen_rows]
                else:
                    into = chunk.reshape(-1)[: seen_rows * layer.d].reshape(seen_rows, -1)
                    rows = _load(layer, order, start, into, device)
                _multiply(rows, panel[:seen_columns], tile[index], half if on_diagonal else 0)
            if on_diagonal:
                diagonal = tile[:, :, start - left :].diagonal(dim1=1, dim2=2)
                diagonals[:, start:stop] = diagonal.cpu().numpy()
                diagonal.zero_()
            row_groups = group_of_unit[start // unit : stop // unit]
            column_groups = group_of_unit[left // unit : (left + width) // unit]
            products, squares = _block_sums(tile, a, unit, own=own is not None)
            cuts = (0, half // unit, len(row_groups)) if on_diagonal else (0, len(row_groups))
            for first, last in itertools.pairwise(cuts):
                mirrored = (start - left) // unit + first if on_diagonal else len(column_groups)
                rows_here = row_groups[first:last]
                _add_blocks(cross, products[first:last], rows_here, column_groups, mirrored)
                if own is not None and squares is not None:
                    _add_blocks(own, squares[first:last], rows_here, column_groups, mirrored)
            progress(height * width / work)
            start = stop
    return _terms(n, unit, group_of_unit, diagonals, cross, own, a)


def unit_rows(n: int) -> int:
    """Rows per unit: a power of two ≤ 128 that leaves at least 30 units where there are as many images."""
    return 2 ** min(7, max(0, int(math.log2(n / 30)) if n >= 30 else 0))


def group_ids(units: int) -> NDArray[np.intp]:
    """Group of each unit: at most `MAX_GROUPS` groups of consecutive units, as equal as can be."""
    return (np.arange(units) * min(MAX_GROUPS, units)) // units


def strip_rows(padded: int, bytes_per_row: int) -> int:
    """Rows per strip: a multiple of the diagonal's rows, equal strips, within `PANEL_BYTES`."""
    most = max(DIAGONAL_ROWS, PANEL_BYTES // bytes_per_row // DIAGONAL_ROWS * DIAGONAL_ROWS)
    strips = math.ceil(padded / most)
    return min(padded, math.ceil(padded / strips / DIAGONAL_ROWS) * DIAGONAL_ROWS)


def _load(
    layer: CentredRows, order: NDArray[np.intp], start: int, into: NDArray[Any], device: str
) -> torch.Tensor:
    """As many centred rows from `start` on as `into` holds."""
    layer.fill(order[start : start + len(into)], into)
    return torch.from_numpy(into).to(device)


def _multiply(rows: torch.Tensor, columns: torch.Tensor, out: torch.Tensor, half: int) -> None:
    """out = rows · columnsᵀ; with `half`, the first rows leave out the last columns, their mirror image."""
    height, width = len(rows), len(columns)
    if not half or half == height:
        torch.mm(rows, columns.T, out=out[:height, :width])
        return
    square = width - height
    if square:
        torch.mm(rows, columns[:square].T, out=out[:height, :square])
    torch.mm(rows[:half], columns[square : square + half].T, out=out[:half, square : square + half])
    torch.mm(rows[half:], columns[square:].T, out=out[half:height, square:width])
    out[:half, square + half :].zero_()


def _block_sums(tile: torch.Tensor, a: int, unit: int, *, own: bool) -> tuple[FloatArray, FloatArray | None]:
    """Per pair of units, sums of products of every Gram block of X with every one of Y, and sums of squares.

    (u, u', a, b), and (u, u', layers) if `own`; otherwise X is Y. A few rows at a time, so that what one
    operation reads the next still finds in the cache. Float32 sums run over at most 16 × `unit` terms.
    """
    count, height, width = tile.shape
    b = count - a if own else a
    products = np.zeros((height // unit, width // unit, a, b))
    squares = np.zeros((height // unit, width // unit, count)) if own else None
    step = min(16, unit)
    for start in range(0, height, step):
        runs = tile[:, start : start + step].view(count, step * width // unit, unit)
        by_run = runs.transpose(0, 1)
        x, y = (by_run[:, :a], by_run[:, a:]) if own else (by_run, by_run)
        found = torch.bmm(x, y.transpose(1, 2)).view(step, width // unit, a, b).sum(dim=0)
        products[start // unit] += found.cpu().numpy()
        if squares is not None:
            norms = (
                torch.linalg.vector_norm(runs, dim=-1).square_().view(count, step, width // unit).sum(dim=1)
            )
            squares[start // unit] += norms.T.cpu().numpy()
    return products, squares


def _add_blocks(
    total: FloatArray, blocks: FloatArray, rows: NDArray[np.intp], columns: NDArray[np.intp], mirrored: int
) -> None:
    """Add unit blocks to their groups; the first `mirrored` columns stand for their mirror images, too."""
    np.add.at(total, (rows[:, None], columns[None, :]), blocks)
    np.add.at(total, (columns[:mirrored, None], rows[None, :]), blocks[:, :mirrored].swapaxes(0, 1))


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
