"""Weights as codes: what the bit patterns of a float format mean, and how a tensor's entries lie over them.

A code is the raw unsigned integer of 8 or 16 bits. Codes of 32-bit floats are grouped by their upper
16 bits, which gives 65,536 bins of at most 0.8 % relative width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

CODE_DTYPES = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")

BLOCK = 4096
"""Engines report the greatest magnitude of every block of so many entries; only few blocks are then looked at."""

_AT_ONCE = 1 << 16
"""Comparisons of few entries with many bounds are made at once, up to so many."""

_FLOAT8 = {
    "float8_e4m3fn": (4, 7, [0x7F, 0xFF]),
    "float8_e4m3fnuz": (4, 8, [0x80]),
    "float8_e5m2fnuz": (5, 16, [0x80]),
}
"""Exponent bits, exponent bias and NaN codes of the formats that numpy does not know."""


@dataclass(frozen=True, kw_only=True)
class CodeTable:
    """All finite codes of a format by ascending value: `codes[i]` covers the values `low[i]` to `high[i]`.

    `nan` and `inf` are masks over all codes; for float32 bins `inf` holds the bins of NaN as well.
    """

    n_codes: int
    codes: np.ndarray
    low: np.ndarray
    high: np.ndarray
    nan: np.ndarray
    inf: np.ndarray


@cache
def code_table(dtype: str) -> CodeTable:
    """The table of one of `CODE_DTYPES`; KeyError for another name."""
    values = code_values(dtype)
    codes = np.flatnonzero(np.isfinite(values))
    codes = codes[np.argsort(values[codes], kind="stable")]
    ascending = values[codes]
    return CodeTable(
        n_codes=len(values),
        codes=codes,
        low=ascending,
        high=ascending,
        nan=np.isnan(values),
        inf=np.isinf(values),
    )


@cache
def float32_bins() -> CodeTable:
    """The 65,536 bins of float32 by upper 16 bits. Bins that hold infinities and NaN are left out."""
    codes = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    with np.errstate(invalid="ignore"):
        near = codes.view(np.float32).astype(np.float64)
        far = (codes | np.uint32(0xFFFF)).view(np.float32).astype(np.float64)
    finite = np.isfinite(near) & np.isfinite(far)
    low, high = np.minimum(near, far), np.maximum(near, far)
    kept = np.flatnonzero(finite)
    # Ties exist only at zero (bins 0x0000 and 0x8000 touch there); negative first keeps `low` ascending.
    kept = kept[np.lexsort((high[kept], low[kept]))]
    return CodeTable(
        n_codes=1 << 16,
        codes=kept,
        low=low[kept],
        high=high[kept],
        nan=np.zeros(1 << 16, dtype=bool),
        inf=~finite,
    )


def decoded(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Raw codes (or float32 and float64 values) as a new float64 array; NaN and infinities stay."""
    return code_values(dtype)[raw] if dtype in CODE_DTYPES else raw.astype(np.float64)


@cache
def code_values(dtype: str) -> np.ndarray:
    """The float64 value of every code of one of `CODE_DTYPES`."""
    if dtype == "float16":
        return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    if dtype == "bfloat16":
        with np.errstate(invalid="ignore"):
            return (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if dtype == "float8_e5m2":
        return (np.arange(256, dtype=np.uint16) << np.uint16(8)).view(np.float16).astype(np.float64)
    exponent_bits, bias, nan = _FLOAT8[dtype]
    codes = np.arange(256)
    exponent = (codes >> (7 - exponent_bits)) & ((1 << exponent_bits) - 1)
    fraction = (codes & ((1 << (7 - exponent_bits)) - 1)) / (1 << (7 - exponent_bits))
    magnitude = np.where(
        exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - float(bias))
    )
    values = np.where(codes < 128, magnitude, -magnitude)
    values[nan] = np.nan
    return values


Refiner = Callable[[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]
"""From segment indices to (values ascending, counts) of each, all from one pass over the data."""

Test = Callable[[np.ndarray], np.ndarray]
"""A predicate on float64 values that changes at most once from −∞ to ∞."""


class Distribution:
    """A tensor's entries as sorted segments, refined only where a question needs it.

    A segment covers the values `low` to `high` and holds `count` > 0 entries. Of 8- and 16-bit tensors every
    segment is a single value and all answers follow at once. Of large float32 tensors the segments are bins; a
    threshold or an order statistic that falls inside a bin makes that bin exact by one more pass over the data.

    Parameters
    ----------
    low, high : np.ndarray
        float64 arrays, ascending; equal where a segment is one value.
    count : np.ndarray
        int64 array.
    refiner : Refiner | None
        Needed when any segment is wider than one value.
    """

    def __init__(
        self, low: np.ndarray, high: np.ndarray, count: np.ndarray, refiner: Refiner | None = None
    ) -> None:
        self.low = low
        self.high = high
        self.count = count
        self.cumulative = np.cumsum(count)
        self.n = int(self.cumulative[-1]) if count.size else 0
        self.exact = refiner is None
        self._refiner = refiner
        self._wide = low < high
        self._fine: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def of_sorted(cls, values: np.ndarray) -> Distribution:
        """From ascending finite float64 values."""
        first = np.ones(values.size, dtype=bool)
        first[1:] = values[1:] != values[:-1]
        starts = np.flatnonzero(first)
        distinct = values[starts]
        counts = np.diff(np.append(starts, values.size)).astype(np.int64)
        return cls(distinct, distinct, counts)

    def refine(self, segments: Iterable[int]) -> None:
        """Make these segments exact, all in one pass; those that are exact already cost nothing."""
        wanted = np.array(
            sorted({int(i) for i in segments if self._wide[i]} - self._fine.keys()), dtype=np.int64
        )
        if wanted.size and self._refiner is not None:
            self._fine.update(zip(wanted.tolist(), self._refiner(wanted), strict=True))

    def count_where(self, test: Test) -> int:
        """How many entries satisfy a predicate that is monotone in the value."""
        if self.exact:
            return int(self.count[test(self.low)].sum())
        at_low, at_high = test(self.low), test(self.high)
        unsure = np.flatnonzero(at_low != at_high)
        self.refine(unsure)
        total = int(self.count[at_low & at_high].sum())
        for index in unsure.tolist():
            values, counts = self._fine[index]
            total += int(counts[test(values)].sum())
        return total

    def count_far(self, center: float, bound: float, *, factor: float = 1.0, unit: float = 1.0) -> int:
        """How many entries have factor · |value − center| / unit > bound."""
        if self.exact:
            far = np.abs(factor * (self.low - center) / unit) > bound
            return int(self.count[far].sum())
        return self.count_where(lambda v: factor * (v - center) / unit > bound) + self.count_where(
            lambda v: factor * (center - v) / unit > bound
        )

    def count_all_far(self, bounds: Mapping[str, tuple[float, float]]) -> dict[str, int]:
        """`count_far` for every (center, bound) of a mapping."""
        if not self.exact or self.low.size * len(bounds) > _AT_ONCE or not bounds:
            return {rule: self.count_far(*bound) for rule, bound in bounds.items()}
        center, bound = np.array(list(bounds.values())).T
        far = np.abs(self.low[:, None] - center) > bound
        return dict(zip(bounds, (self.count @ far).tolist(), strict=True))

    def count_outside(self, low: float, high: float) -> int:
        """How many entries lie below `low` or above `high`."""
        return self.count_where(lambda v: v > high) + self.count_where(lambda v: v < low)

    def order(self, rank: int) -> float:
        """The `rank`-th smallest entry, from 0."""
        index = self.segment_of(rank)
        if self.exact or not self._wide[index]:
            return float(self.low[index])
        self.refine([index])
        values, counts = self._fine[index]
        inside = rank - int(self.cumulative[index] - self.count[index])
        return float(values[np.searchsorted(np.cumsum(counts), inside, side="right")])

    def segment_of(self, rank: int) -> int:
        """Index of the segment that holds the `rank`-th smallest entry."""
        return int(self.cumulative.searchsorted(rank, side="right"))

    def quantile(self, q: float) -> float:
        """Quantile by numpy's default ("linear") convention, down to its rounding."""
        position = q * (self.n - 1)
        below = int(np.floor(position))
        share = position - below
        a = self.order(below)
        b = self.order(min(below + 1, self.n - 1))
        return b - (b - a) * (1 - share) if share >= 0.5 else a + (b - a) * share

    def median(self) -> float:
        """The middle entry, or the mean of the two middle ones."""
        return (self.order((self.n - 1) // 2) + self.order(self.n // 2)) / 2

    def median_distance(self, center: float) -> float:
        """Median of |value − center|."""
        near, far = self.distances(center, center)
        if self.exact:
            order = np.argsort(near)
            cumulative = np.cumsum(self.count[order])
            first, second = np.searchsorted(cumulative, [(self.n - 1) // 2, self.n // 2], side="right")
            return float(near[order[first]] + near[order[second]]) / 2
        least, most = self.distance_bracket(near, far)
        inside = (far >= least) & (near <= most)
        self.refine(np.flatnonzero(inside & self._wide))
        below = int(self.count[far < least].sum())
        parts = [(near[inside & ~self._wide], self.count[inside & ~self._wide])]
        for index in np.flatnonzero(inside & self._wide).tolist():
            values, counts = self._fine[index]
            parts.append((np.abs(values - center), counts))
        distance = np.concatenate([part[0] for part in parts])
        counts = np.concatenate([part[1] for part in parts])
        order = np.argsort(distance)
        cumulative = np.cumsum(counts[order])
        ranks = [(self.n - 1) // 2 - below, self.n // 2 - below]
        first, second = np.searchsorted(cumulative, ranks, side="right")
        return float(distance[order[first]] + distance[order[second]]) / 2

    def distances(self, center_low: float, center_high: float) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest possible |value − center| per segment, center anywhere in the interval."""
        near = np.maximum(np.maximum(self.low - center_high, center_low - self.high), 0.0)
        far = np.maximum(self.high - center_low, center_high - self.low)
        return near, far

    def distance_bracket(self, near: np.ndarray, far: np.ndarray) -> tuple[float, float]:
        """An interval that holds the two middle distances."""
        least = _weighted_order(near, self.count, (self.n - 1) // 2)
        return least, _weighted_order(far, self.count, self.n // 2)

    def between(self, least: float, most: float) -> np.ndarray:
        """Indices of the wide segments that meet the interval."""
        return np.flatnonzero(self._wide & (self.high >= least) & (self.low <= most))


def _weighted_order(values: np.ndarray, counts: np.ndarray, rank: int) -> float:
    order = np.argsort(values)
    return float(values[order[np.searchsorted(np.cumsum(counts[order]), rank, side="right")]])
