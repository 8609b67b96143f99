"""The sums of HSIC₁ for all pairs of layers, from which `pairwise_cka` is made, in one of two exact forms.

The Gram form walks over half of the n×n square in tiles; in a tile the centred Gram matrices of all layers are
made once and multiplied with one another, so that the cost is that of the Gram matrices alone. The feature form
multiplies d×d matrices and wins where n is much larger than d. Products run in float32 over at most 8,192 terms
and are summed in float64; up to 512 images everything is float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from layerprobe.metrics.similarity import FLOAT64_UP_TO, CentredRows, FloatArray, Progress, matmul

DIAGONAL_ROWS = 256
"""Rows per tile of the Gram form along the diagonal, where half a tile is wasted: the fewer the less waste,
the more the faster the matrix product."""
PANEL_BYTES = 80 << 20
"""Memory for the rows of all layers that one strip of tiles keeps at hand."""
TILE_ROWS = 512
"""Rows per tile beside the diagonal; the tile of all layers takes about two thirds of the panel's memory."""
MAX_GROUPS = 64
PIECE_ROWS = 8192
PIECE_BYTES = 16 << 20
ACCUMULATOR_BYTES = 48 << 20
SAMPLE_ROWS = 2048
"""Images whose influence is measured for the standard error; all of them would double the cost."""
KERNEL_ROWS = 256


@dataclass(frozen=True, kw_only=True)
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


def gram_terms(
    xs: list[CentredRows],
    ys: list[CentredRows] | None,
    order: NDArray[np.intp],
    device: str,
    progress: Progress,
) -> Terms:
    """HSIC₁ sums, by groups of images, from centred Gram tiles.

    The rows come in the random `order`; consecutive ones form units of `unit` rows (the last one padded with
    zeros), units form groups. For every pair of units the products of all layers' Gram blocks are one small
    batched product of at most `unit` terms. Diagonals of the Gram matrices are taken out before any product.
    """
    layers = xs + (ys or [])
    n, a = xs[0].n, len(xs)
    dtype = np.float64 if n <= FLOAT64_UP_TO else np.float32
    unit = _unit_rows(n)
    padded = math.ceil(n / unit) * unit
    # At most `MAX_GROUPS` groups of consecutive units, as equal as can be.
    groups = min(MAX_GROUPS, padded // unit)
    group_of_unit = (np.arange(padded // unit) * groups) // (padded // unit)
    cross = np.zeros((groups, groups, a, len(ys or xs)))
    own = None if ys is None else np.zeros((groups, groups, len(layers)))
    diagonals = np.zeros((len(layers), padded))
    strip = _strip_rows(padded, sum(layer.d for layer in layers) * np.dtype(dtype).itemsize)
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
        for start, stop in _tile_rows(left, right, padded):
            on_diagonal = start < right
            height, width = stop - start, (stop if on_diagonal else right) - left
            tile = buffer[: len(layers) * height * width].view(len(layers), height, width)
            seen_rows, seen_columns = min(stop, n) - start, min(left + width, n) - left
            # The upper right quarter of a diagonal square is the mirror image of the lower left one.
            half = min(DIAGONAL_ROWS // 2, seen_rows) // unit * unit if on_diagonal else 0
            tile[:, seen_rows:].zero_()
            tile[:, :, seen_columns:].zero_()
            for index, (layer, panel) in enumerate(zip(layers, columns, strict=True)):
                if on_diagonal:
                    rows = panel[start - left :][:seen_rows]
                else:
                    into = chunk.reshape(-1)[: seen_rows * layer.d].reshape(seen_rows, -1)
                    rows = _load(layer, order, start, into, device)
                _multiply(rows, panel[:seen_columns], tile[index], half)
            if on_diagonal:
                diagonal = tile[:, :, start - left :].diagonal(dim1=1, dim2=2)
                diagonals[:, start:stop] = diagonal.cpu().numpy()
                diagonal.zero_()
            row_groups = group_of_unit[start // unit : stop // unit]
            column_groups = group_of_unit[left // unit : (left + width) // unit]
            products, squares = _block_sums(tile, a, unit, own=own is not None)
            for first, last in itertools.pairwise((0, half // unit, len(row_groups))):
                mirrored = (start - left) // unit + first if on_diagonal else len(column_groups)
                rows_here = row_groups[first:last]
                _add_blocks(cross, products[first:last], rows_here, column_groups, mirrored)
                if own is not None and squares is not None:
                    _add_blocks(own, squares[first:last], rows_here, column_groups, mirrored)
            progress(height * width / work)
    return _terms(n, unit, group_of_unit, diagonals, cross, own, a)


def _tile_rows(left: int, right: int, padded: int) -> Iterator[tuple[int, int]]:
    """First and last row of each tile of the strip of columns `left` to `right`, from the diagonal down."""
    start = left
    while start < padded:
        stop = min(start + DIAGONAL_ROWS, right) if start < right else min(start + TILE_ROWS, padded)
        yield start, stop
        start = stop


def _unit_rows(n: int) -> int:
    """Rows per unit: a power of two ≤ 128 that leaves at least 30 units where there are as many images."""
    return 2 ** min(7, max(0, int(math.log2(n / 30)) if n >= 30 else 0))


def _strip_rows(padded: int, bytes_per_row: int) -> int:
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
    out = out[:height, :width]
    if not half or half == height:
        matmul(rows, columns.T, out)
        return
    square = width - height
    if square:
        matmul(rows, columns[:square].T, out[:, :square])
    matmul(rows[:half], columns[square : square + half].T, out[:half, square : square + half])
    matmul(rows[half:], columns[square:].T, out[half:, square:])
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

    return Terms(
        cross=part_cross.sum(axis=0),
        self_x=part_x.sum(axis=0),
        self_y=part_y.sum(axis=0),
        part_cross=part_cross,
        part_x=part_x,
        part_y=part_y,
        scale=math.sqrt(groups / (groups - 1)),
        square=square,
    )


class _Products:
    """‖XᵀY‖²_F of pairs of layers and, for a sample of rows, how much each row adds to it."""

    def __init__(self, layers: list[CentredRows], order: NDArray[np.intp], device: str) -> None:
        self.layers, self.order, self.device = layers, order, device
        n = layers[0].n
        self.dtype = np.dtype(np.float64 if n <= FLOAT64_UP_TO else np.float32)
        widest = max(layer.d for layer in layers)
        self.piece = min(n, PIECE_ROWS, max(256, PIECE_BYTES // (widest * self.dtype.itemsize)))
        self.sample = min(n, SAMPLE_ROWS)
        self._left = np.empty((self.piece, widest), self.dtype)
        self._right = np.empty((self.piece, widest), self.dtype)
        self.diagonals = np.zeros((len(layers), n))

        for index, piece in itertools.product(range(len(layers)), self._pieces(n)):
            norms = torch.linalg.vector_norm(self.rows(index, piece, self._left), dim=1).double()
            self.diagonals[index, piece] = norms.square().cpu().numpy()

    def _pieces(self, stop: int) -> list[slice]:
        return [slice(start, min(start + self.piece, stop)) for start in range(0, stop, self.piece)]

    def rows(self, index: int, piece: slice, buffer: NDArray[Any]) -> torch.Tensor:
        layer, count = self.layers[index], piece.stop - piece.start
        out = buffer.reshape(-1)[: count * layer.d].reshape(count, layer.d)
        layer.fill(self.order[piece], out)
        return torch.from_numpy(out).to(self.device)

    def against(self, left: int, rights: list[int]) -> list[tuple[float, FloatArray]]:
        """For each right layer: ‖XᵀY‖²_F, and xₐᵀ(XᵀY)yₐ for the sampled rows a."""
        found: list[tuple[float, FloatArray]] = []
        d = self.layers[left].d
        while rights:
            take, room = 0, ACCUMULATOR_BYTES
            while take < len(rights) and (take == 0 or room >= 8 * d * self.layers[rights[take]].d):
                room -= 8 * d * self.layers[rights[take]].d
                take += 1
            found += self._block(left, rights[:take])
            rights = rights[take:]
        return found

    def _block(self, left: int, rights: list[int]) -> list[tuple[float, FloatArray]]:
        d = self.layers[left].d
        totals = [
            torch.zeros(d, self.layers[right].d, dtype=torch.float64, device=self.device) for right in rights
        ]
        for piece in self._pieces(self.layers[0].n):
            x = self.rows(left, piece, self._left)
            for right, total in zip(rights, totals, strict=True):
                total += matmul(x.T, x if right == left else self.rows(right, piece, self._right))
        found = []
        for right, total in zip(rights, totals, strict=True):
            product = total.to(getattr(torch, self.dtype.name))
            shares = np.empty(self.sample)
            for piece in self._pieces(self.sample):
                x = self.rows(left, piece, self._left)
                y = x if right == left else self.rows(right, piece, self._right)
                shares[piece] = torch.linalg.vecdot(matmul(x, product), y).double().cpu().numpy()
            found.append((float(total.square_().sum()), shares))
        return found


def feature_terms(
    xs: list[CentredRows],
    ys: list[CentredRows] | None,
    order: NDArray[np.intp],
    device: str,
    progress: Progress,
) -> Terms:
    """HSIC₁ sums from d×d products; the shares of single images from a random sample of them."""
    layers = xs + (ys or [])
    n, a = xs[0].n, len(xs)
    products = _Products(layers, order, device)
    second = list(range(a)) if ys is None else list(range(a, len(layers)))
    norms = np.zeros((len(layers), len(layers)))
    shares = np.zeros((len(layers), len(layers), products.sample))
    wanted = {
        i: [j for j in second if ys is not None or j >= i] + ([] if ys is None else [i]) for i in range(a)
    }
    wanted |= {} if ys is None else {j: [j] for j in second}
    work = sum(layers[i].d * layers[j].d for i, js in wanted.items() for j in js)
    for i, js in wanted.items():
        for j, (norm, share_of_row) in zip(js, products.against(i, js), strict=True):
            norms[i, j] = norms[j, i] = norm
            shares[i, j] = shares[j, i] = share_of_row
        progress(sum(layers[i].d * layers[j].d for j in js) / work)

    k = products.diagonals
    traces = k.sum(axis=1)
    totals = norms - n / (n - 2) * (k @ k.T) + np.outer(traces, traces) / ((n - 1) * (n - 2))
    sampled = k[:, : products.sample]
    parts = shares - n / (n - 2) * sampled[:, None] * sampled[None, :]
    parts += (np.outer(traces, traces) / ((n - 1) * (n - 2) * n))[:, :, None]
    parts = parts.transpose(2, 0, 1)
    first = list(range(a))
    part_cross = parts[:, :a, second]
    part_x, part_y = parts[:, first, first], parts[:, second, second]

    count = min(n, KERNEL_ROWS, products.piece)
    grams = np.empty((len(layers), count, count))
    for index in range(len(layers)):
        rows = products.rows(index, slice(0, count), products._left)
        grams[index] = matmul(rows, rows.T).double().cpu().numpy()
    off_diagonal = ~np.eye(count, dtype=bool)

    def square(c: FloatArray, u: FloatArray, v: FloatArray) -> FloatArray:
        found = np.empty_like(c)
        for i in range(c.shape[0]):
            for j in range(c.shape[1]):
                x, y = grams[first[i]], grams[second[j]]
                kernel = c[i, j] * x * y - u[i, j] * x * x - v[i, j] * y * y
                share_of_row = (
                    c[i, j] * part_cross[:count, i, j]
                    - u[i, j] * part_x[:count, i]
                    - v[i, j] * part_y[:count, j]
                )
                kernel -= (share_of_row[:, None] + share_of_row[None, :]) / n
                found[i, j] = np.square(kernel[off_diagonal]).sum() * (n * (n - 1)) / (count * (count - 1))
        return found

    return Terms(
        cross=totals[:a][:, second],
        self_x=np.diagonal(totals)[first],
        self_y=np.diagonal(totals)[second],
        part_cross=part_cross,
        part_x=part_x,
        part_y=part_y,
        scale=math.sqrt(n / (products.sample - 1)),
        square=square,
    )
