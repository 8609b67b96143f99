"""A part of a stored tensor: which of its entries, and in which stretches of the file they lie."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Range = tuple[int, int]
"""First and last + 1 along one axis."""


@dataclass(frozen=True)
class View:
    """The tensor's entries laid out as `axes`, of which `ranges` (one an axis) are kept.

    Every way in which models fuse matrices is one of these: thirds of the rows, one head in three, every second
    column, one expert of a stack.
    """

    axes: tuple[int, ...]
    ranges: tuple[Range, ...]

    @property
    def size(self) -> int:
        """Number of entries kept."""
        return math.prod(stop - start for start, stop in self.ranges)

    def spans(self, limit: int) -> Iterator[tuple[int, int, View]]:
        """(first entry, number of entries, what to keep of them) for stretches of at most `limit` entries.

        They come in the order of the file and hold every entry kept.
        """
        (start, stop), rest = self.ranges[0], self.ranges[1:]
        inner = math.prod(self.axes[1:])
        if rest and (stop - start == 1 or inner > limit):
            for index in range(start, stop):
                for first, count, kept in View(self.axes[1:], rest).spans(limit):
                    yield index * inner + first, count, kept
            return
        step = max(1, limit // (inner or 1))
        for first in range(start, stop, step):
            n = min(step, stop - first)
            yield first * inner, n * inner, View((n, *self.axes[1:]), ((0, n), *rest))

    def take(self, entries: np.ndarray) -> np.ndarray:
        """What is kept of these entries, flat."""
        kept = entries.reshape(self.axes)[tuple(slice(*bounds) for bounds in self.ranges)]
        return np.ascontiguousarray(kept).reshape(-1)
