"""Outlier parameters: how many entries of a weight tensor lie far from the rest, counted exactly.

For a tensor with N finite entries, mean μ and population deviation σ in float64 the ratio at k is
#{|w − μ| > kσ} / N; a Gaussian has 0.270 % at k = 3 and 2·10⁻⁷ % at k = 6. Non-finite entries are
counted apart and enter nothing else. `OutlierRules` says what is counted; `TensorOutliers` holds everything
about one tensor, made by `summary.summarize` (raw chunks, streamed) or `summary.outlier_statistics` (an array).

References
----------
|w| > M·mean|w| is the weight-only form of OWL (Yin et al. 2023, arXiv 2310.05175); single extreme entries: Yu et
al. 2024, "The super weight in large language models", arXiv 2411.07191.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from struct import calcsize, iter_unpack, pack, unpack_from
from typing import Any, overload

import numpy as np

from layerprobe.errors import UsageError
from layerprobe.metrics.outliers.codes import Distribution
from layerprobe.metrics.outliers.moments import AxisOutliers, Moments


@dataclass(frozen=True, kw_only=True)
class OutlierRules:
    """What is counted. All thresholds are strict (>).

    Parameters
    ----------
    sigmas : tuple[float, ...]
        k of |w − μ| > kσ.
    curve : tuple[float, ...]
        Further k, which show how the tail falls off; reported for roll-ups only.
    mad_z : tuple[float, ...]
        Thresholds of 0.6745·|w − median| / MAD (Iglewicz & Hoaglin 1993 use 3.5).
    tukey : tuple[float, ...]
        Fences beyond the quartiles, in interquartile ranges.
    absolute : tuple[float, ...]
        t of |w| > t, in weight units.
    mean_multiples : tuple[float, ...]
        M of |w| > M·mean|w|.
    quantiles : tuple[float, ...]
        In [0, 1], numpy's "linear" convention.
    tail : float
        Share of the largest |w| that the Hill estimate of the tail index rests on.
    top : int
        How many of the largest |w| are kept with their coordinates.
    order : bool
        False leaves out everything that rests on the order of the entries (median, MAD, quantiles, Tukey
        fences, tail index), which is quicker for float32.
    """

    sigmas: tuple[float, ...] = (3.0, 6.0)
    curve: tuple[float, ...] = (2.0, 4.0, 5.0, 8.0, 12.0, 20.0)
    mad_z: tuple[float, ...] = (3.5,)
    tukey: tuple[float, ...] = (1.5, 3.0)
    absolute: tuple[float, ...] = ()
    mean_multiples: tuple[float, ...] = (5.0,)
    quantiles: tuple[float, ...] = (0.001, 0.25, 0.75, 0.999)
    tail: float = 0.001
    top: int = 3
    order: bool = True

    def __post_init__(self) -> None:
        for name in ("sigmas", "curve", "mad_z", "tukey", "absolute", "mean_multiples"):
            for value in getattr(self, name):
                if not (math.isfinite(value) and value >= 0):
                    raise UsageError(f"{name} must be finite and not negative, got {value}")
        if not all(0 <= q <= 1 for q in self.quantiles):
            raise UsageError(f"quantiles lie in [0, 1], got {self.quantiles}")
        if not 0 < self.tail < 1:
            raise UsageError(f"tail is a share between 0 and 1, got {self.tail}")
        if self.top < 0:
            raise UsageError(f"top cannot be negative, got {self.top}")

    @classmethod
    def sigma_only(
        cls, sigmas: tuple[float, ...] = (3.0, 6.0), *, absolute: tuple[float, ...] = (), top: int = 3
    ) -> OutlierRules:
        """The counts beyond kσ (and `absolute`) and the moments alone: the quickest that answers the main question."""
        return cls(sigmas=sigmas, absolute=absolute, top=top, curve=(), mean_multiples=(), order=False)

    @property
    def all_sigmas(self) -> tuple[float, ...]:
        """`sigmas` and `curve` together, ascending."""
        return tuple(sorted({*self.sigmas, *self.curve}))

    def definitions(self) -> dict[str, str]:
        """Rule name → definition, for every counting rule; the names are those of `TensorOutliers.counts`."""
        found = {f"{k:g}sigma": f"|w - mean| > {k:g} * std of the tensor" for k in self.all_sigmas}
        if self.order:
            found |= {f"madz{z:g}": f"0.6745 * |w - median| / MAD > {z:g}" for z in self.mad_z}
        found |= {
            f"tukey{f:g}": f"beyond the quartiles by more than {f:g} interquartile ranges" for f in self.tukey
        }
        found |= {f"abs{t:g}": f"|w| > {t:g}" for t in self.absolute}
        found |= {f"mean{m:g}": f"|w| > {m:g} * mean|w|" for m in self.mean_multiples}
        return found


@dataclass(kw_only=True, slots=True)
class TensorOutliers:
    """The numbers of one tensor.

    `values` and `counts` hold only what is defined; `reasons` says why for everything else. `counted` has,
    per counting rule, the number of finite entries it was applied to.
    `top` lists (value, flat index) by falling magnitude, ties by index. `axes` has, for "row" and "column",
    what stands out or why that is undefined; it is empty where it was not asked for.
    """

    size: int = 0
    moments: Moments = field(default_factory=Moments)
    nan: int = 0
    inf: int = 0
    zeros: int = 0
    mean_abs: float = math.nan
    values: MutableMapping[str, float] = field(default_factory=dict)
    counts: MutableMapping[str, int] = field(default_factory=dict)
    counted: MutableMapping[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    top: Sequence[tuple[float, int]] = field(default_factory=list)
    axes: MutableMapping[str, AxisOutliers | str] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Finite entries."""
        return self.moments.n

    def compact(self) -> TensorOutliers:
        """The same numbers in a third of the memory, for checkpoints of very many tensors."""
        whole = "I" if self.size < 1 << 32 else "Q"
        self.values, self.counts = Columns.of(self.values, "d"), Columns.of(self.counts, whole)
        counted = set(self.counted.values())  # as a rule one number, the same in all tensors of one shape
        one = len(counted) == 1
        self.counted = (
            _columns(tuple(self.counted), counted.pop()) if one else Columns.of(self.counted, whole)
        )
        self.axes = (
            Columns(_positions(tuple(self.axes)), "", tuple(self.axes.values())) if self.axes else _NONE
        )
        self.reasons = _shared(tuple(self.reasons.items()))
        self.top = Pairs(self.top)
        return self


class Columns(MutableMapping[str, Any]):
    """A mapping from names, which are shared by all that have the same ones, to packed numbers (or to objects)."""

    __slots__ = ("_kind", "_names", "_values")

    def __init__(self, names: dict[str, int], kind: str, values: bytes | tuple[Any, ...]) -> None:
        self._names, self._kind, self._values = names, kind, values

    @classmethod
    def of(cls, values: Mapping[str, float], kind: str) -> Columns:
        """Of floats ("d") or whole numbers ("I" below 2³², "Q")."""
        return cls(_positions(tuple(values)), kind, array(kind, values.values()).tobytes())

    def __getitem__(self, name: str) -> object:
        at = self._names[name]
        if isinstance(self._values, tuple):
            return self._values[at]
        return unpack_from(self._kind, self._values, calcsize(self._kind) * at)[0]

    def __setitem__(self, name: str, value: float) -> None:
        raise TypeError("packed numbers are not changed")

    __delitem__ = __setitem__  # type: ignore[assignment]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __repr__(self) -> str:
        return repr(dict(self))


_NONE = Columns({}, "", ())


class Pairs(Sequence[tuple[float, int]]):
    """Values and their places, packed; equal to the list of them."""

    __slots__ = ("_packed",)

    def __init__(self, pairs: Iterable[tuple[float, int]]) -> None:
        self._packed = b"".join(pack("dq", value, index) for value, index in pairs)

    @overload
    def __getitem__(self, at: int) -> tuple[float, int]: ...
    @overload
    def __getitem__(self, at: slice) -> list[tuple[float, int]]: ...
    def __getitem__(self, at: int | slice) -> tuple[float, int] | list[tuple[float, int]]:
        return list(self)[at]

    def __iter__(self) -> Iterator[tuple[float, int]]:
        yield from iter_unpack("dq", self._packed)

    def __len__(self) -> int:
        return len(self._packed) // 16

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))


@cache
def _positions(names: tuple[str, ...]) -> dict[str, int]:
    return {name: index for index, name in enumerate(names)}


@cache
def _columns(names: tuple[str, ...], number: int) -> Columns:
    return Columns.of(dict.fromkeys(names, number), "Q")


@cache
def _shared(items: tuple[tuple[str, str], ...]) -> dict[str, str]:
    return dict(items)


def merge_outliers(parts: Iterable[TensorOutliers]) -> TensorOutliers:
    """The roll-up of several tensors: entries are pooled, never ratios averaged.

    Counts add up, each entry judged within its own tensor; moments are those of all entries together;
    `max_sigma` is the greatest of the parts. Medians, quantiles and tail indices do not merge.
    """
    total = TensorOutliers()
    magnitude = 0.0
    for part in parts:
        total.size += part.size
        total.moments = total.moments.merge(part.moments)
        total.nan += part.nan
        total.inf += part.inf
        total.zeros += part.zeros
        if part.n:
            magnitude += part.mean_abs * part.n
        for rule, count in part.counts.items():
            total.counts[rule] = total.counts.get(rule, 0) + count
            total.counted[rule] = total.counted.get(rule, 0) + part.counted.get(rule, 0)
        for name, better in (("max_sigma", max), ("minimum", min), ("maximum", max)):
            if name in part.values:
                total.values[name] = better(part.values[name], total.values.get(name, part.values[name]))
        for rule, reason in part.reasons.items():
            total.reasons.setdefault(rule, reason)
    if total.n:
        total.mean_abs = magnitude / total.n
        moment_values(total)
        total.values["zero_ratio"] = total.zeros / total.n
        if not math.isnan(total.mean_abs):
            total.values["mean_abs"] = total.mean_abs
    defined = {*total.values, *total.counts}
    total.reasons = {name: why for name, why in total.reasons.items() if name not in defined}
    total.reasons |= dict.fromkeys(("median", "mad"), "order statistics of several tensors do not merge")
    return total


def moment_values(result: TensorOutliers) -> None:
    """Enter mean, std and kurtosis into `values`, or into `reasons` why not."""
    moments, values, reasons = result.moments, result.values, result.reasons
    if not (math.isfinite(moments.mean) and math.isfinite(moments.std)):
        reasons.update(dict.fromkeys(("mean", "std", "kurtosis"), "overflows float64"))
        return
    values.update({"mean": moments.mean, "std": moments.std})
    if math.isfinite(moments.kurtosis):
        values["kurtosis"] = moments.kurtosis
    elif values["minimum"] == values["maximum"]:
        reasons["kurtosis"] = "the tensor is constant"
    else:
        reasons["kurtosis"] = "its moments leave the range of float64"


def measure_nothing(result: TensorOutliers, rules: OutlierRules) -> None:
    """Enter why a tensor without finite entries has no values, and counts of 0."""
    why = "the tensor is empty" if result.size == 0 else "no finite entries"
    names = ["mean", "std", "kurtosis", "max_sigma", "minimum", "maximum", "mean_abs", "zero_ratio"]
    if rules.order:
        names += ["median", "mad", "tail_index", *(quantile_name(q) for q in rules.quantiles)]
    result.reasons.update(dict.fromkeys(names, why))
    result.counts.update(dict.fromkeys(rules.definitions(), 0))
    result.counted = dict.fromkeys(result.counts, 0)


def measure(result: TensorOutliers, d: Distribution, rules: OutlierRules) -> None:
    """Enter values and counts of everything that `rules` ask for; `result` holds sizes and moments already."""
    if d.n == 0:
        measure_nothing(result, rules)
        return
    measure_moments(result, d.order(0), d.order(d.n - 1))
    result.counts.update(d.count_all_far(thresholds(result, rules)))
    if rules.order:
        _measure_order(result, d, rules)
    result.counted = dict.fromkeys(result.counts, d.n)


def measure_moments(result: TensorOutliers, least: float, most: float) -> None:
    """Enter the values that need no order statistics but the extremes."""
    values = result.values
    values.update({"minimum": least, "maximum": most, "zero_ratio": result.zeros / result.n})
    if not math.isnan(result.mean_abs):
        values["mean_abs"] = result.mean_abs
    mean, std = result.moments.mean, result.moments.std
    moment_values(result)
    if math.isfinite(mean) and 0 < std < math.inf:
        values["max_sigma"] = max(most - mean, mean - least) / std
    else:
        result.reasons["max_sigma"] = result.reasons["kurtosis"]


def thresholds(result: TensorOutliers, rules: OutlierRules) -> dict[str, tuple[float, float]]:
    """Rule → (center, bound) of |w − center| > bound, for the rules that need no order statistics."""
    found: dict[str, tuple[float, float]] = {}
    for k in rules.all_sigmas:
        if "std" in result.values:
            found[f"{k:g}sigma"] = (result.moments.mean, k * result.moments.std)
        else:
            result.reasons[f"{k:g}sigma"] = "overflows float64"
    found |= {f"abs{t:g}": (0.0, t) for t in rules.absolute}
    found |= {f"mean{m:g}": (0.0, m * result.mean_abs) for m in rules.mean_multiples}
    return found


def _measure_order(result: TensorOutliers, d: Distribution, rules: OutlierRules) -> None:
    counts = result.counts
    median = d.median()
    mad = d.median_distance(median)
    result.values.update({"median": median, "mad": mad})
    result.values.update({quantile_name(q): d.quantile(q) for q in rules.quantiles})
    for z in rules.mad_z:
        if mad > 0:
            counts[f"madz{z:g}"] = d.count_far(median, z, factor=0.6745, unit=mad)
        else:
            result.reasons[f"madz{z:g}"] = "the MAD is 0: at least half of the entries are equal"
    if rules.tukey:
        q1, q3 = d.quantile(0.25), d.quantile(0.75)
        for fence in rules.tukey:
            counts[f"tukey{fence:g}"] = d.count_outside(q1 - fence * (q3 - q1), q3 + fence * (q3 - q1))
    _hill(result, d, rules.tail)


def _hill(result: TensorOutliers, d: Distribution, tail: float) -> None:
    m = math.floor(tail * d.n)
    if m < 10:
        result.reasons["tail_index"] = f"the tail of {tail:g} holds {m} entries; at least 10 are needed"
        return
    magnitude = np.sqrt(np.abs(d.low)) * np.sqrt(np.abs(d.high))
    order = np.argsort(-magnitude)
    magnitude, counts = magnitude[order], d.count[order]
    reach = np.cumsum(counts)
    last = int(np.searchsorted(reach, m, side="right"))
    threshold = magnitude[last] if last < magnitude.size else magnitude[-1]
    taken = np.minimum(counts, np.maximum(m - (reach - counts), 0))
    if threshold <= 0:
        result.reasons["tail_index"] = f"the tail of {tail:g} reaches down to 0"
        return
    used = taken > 0
    spread = float((taken[used] * np.log(magnitude[used] / threshold)).sum())
    if spread > 0:
        result.values["tail_index"] = m / spread
    else:
        result.reasons["tail_index"] = "the entries of the tail are equal"


def quantile_name(q: float) -> str:
    """The metric name of a quantile: `quantile_0.25`."""
    return f"quantile_{q:g}"
