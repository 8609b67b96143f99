"""The feature form of all-pairs CKA: d×d products, for many more images than features."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from layerprobe.metrics.similarity.all_pairs import FloatArray, Progress, Terms
from layerprobe.metrics.similarity.rows import FLOAT64_UP_TO, CentredRows

PIECE_ROWS = 8192
PIECE_BYTES = 16 << 20
ACCUMULATOR_BYTES = 48 << 20
SAMPLE_ROWS = 2048
"""Images whose influence is measured for the standard error; all of them would double the cost."""
KERNEL_ROWS = 256


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

    def rows(self, index: int, start: int, stop: int, buffer: NDArray[np.generic]) -> torch.Tensor:
        layer = self.layers[index]
        out = buffer.reshape(-1)[: (stop - start) * layer.d].reshape(stop - start, layer.d)
        layer.fill(self.order[start:stop], out)
        return torch.from_numpy(out).to(self.device)

    def diagonal(self, index: int) -> None:
        for start in range(0, self.layers[0].n, self.piece):
            stop = min(start + self.piece, self.layers[0].n)
            rows = self.rows(index, start, stop, self._left)
            norms = torch.linalg.vector_norm(rows, dim=1).double()
            self.diagonals[index, start:stop] = norms.square().cpu().numpy()

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
        n, d = self.layers[0].n, self.layers[left].d
        totals = [
            torch.zeros(d, self.layers[right].d, dtype=torch.float64, device=self.device) for right in rights
        ]
        for start in range(0, n, self.piece):
            stop = min(start + self.piece, n)
            x = self.rows(left, start, stop, self._left)
            for right, total in zip(rights, totals, strict=True):
                y = x if right == left else self.rows(right, start, stop, self._right)
                total += x.T @ y
        found = []
        for right, total in zip(rights, totals, strict=True):
            product = total.to(getattr(torch, self.dtype.name))
            pulls = np.empty(self.sample)
            for start in range(0, self.sample, self.piece):
                stop = min(start + self.piece, self.sample)
                x = self.rows(left, start, stop, self._left)
                y = x if right == left else self.rows(right, start, stop, self._right)
                pulls[start:stop] = torch.linalg.vecdot(x @ product, y).double().cpu().numpy()
            found.append((float(total.square_().sum()), pulls))
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
    for index in range(len(layers)):
        products.diagonal(index)
    second = list(range(a)) if ys is None else list(range(a, len(layers)))
    norms = np.zeros((len(layers), len(layers)))
    pulls = np.zeros((len(layers), len(layers), products.sample))
    wanted = {
        i: [j for j in second if ys is not None or j >= i] + ([] if ys is None else [i]) for i in range(a)
    }
    wanted |= {} if ys is None else {j: [j] for j in second}
    work = sum(layers[i].d * layers[j].d for i, js in wanted.items() for j in js)
    for i, js in wanted.items():
        for j, (norm, pull) in zip(js, products.against(i, js), strict=True):
            norms[i, j] = norms[j, i] = norm
            pulls[i, j] = pulls[j, i] = pull
        progress(sum(layers[i].d * layers[j].d for j in js) / work)

    k = products.diagonals
    traces = k.sum(axis=1)
    totals = norms - n / (n - 2) * (k @ k.T) + np.outer(traces, traces) / ((n - 1) * (n - 2))
    sampled = k[:, : products.sample]
    parts = pulls - n / (n - 2) * sampled[:, None] * sampled[None, :]
    parts += (np.outer(traces, traces) / ((n - 1) * (n - 2) * n))[:, :, None]
    parts = parts.transpose(2, 0, 1)
    first = list(range(a))
    part_cross = parts[:, :a, second]
    part_x, part_y = parts[:, first, first], parts[:, second, second]

    count = min(n, KERNEL_ROWS, products.piece)
    grams = np.empty((len(layers), count, count))
    for index in range(len(layers)):
        rows = products.rows(index, 0, count, products._left)
        grams[index] = (rows @ rows.T).double().cpu().numpy()
    off_diagonal = ~np.eye(count, dtype=bool)

    def square(c: FloatArray, u: FloatArray, v: FloatArray) -> FloatArray:
        found = np.empty_like(c)
        for i in range(c.shape[0]):
            for j in range(c.shape[1]):
                x, y = grams[first[i]], grams[second[j]]
                kernel = c[i, j] * x * y - u[i, j] * x * x - v[i, j] * y * y
                pull = (
                    c[i, j] * part_cross[:count, i, j]
                    - u[i, j] * part_x[:count, i]
                    - v[i, j] * part_y[:count, j]
                )
                kernel -= (pull[:, None] + pull[None, :]) / n
                found[i, j] = np.square(kernel[off_diagonal]).sum() * (n * (n - 1)) / (count * (count - 1))
        return found

    return Terms(
        totals[:a][:, second],
        np.diagonal(totals)[first],
        np.diagonal(totals)[second],
        part_cross,
        part_x,
        part_y,
        math.sqrt(n / (products.sample - 1)),
        square,
    )
