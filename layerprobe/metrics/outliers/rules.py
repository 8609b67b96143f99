"""What is counted as an outlier, the numbers of one tensor, and how the numbers of several tensors merge."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from layerprobe.errors import UsageError
from layerprobe.metrics.outliers.axes import AxisOutliers
from layerprobe.metrics.outliers.moments import Moments


@dataclass(frozen=True)
class OutlierRules:
    """What is counted. All thresholds are strict (>).

    Parameters
    ----------
    sigmas : k of |w − μ| > kσ.
    curve : further k, which show how the tail falls off; reported for roll-ups only.
    mad_z : thresholds of 0.6745·|w − median| / MAD (Iglewicz & Hoaglin 1993 use 3.5).
    tukey : fences beyond the quartiles, in interquartile ranges.
    absolute : t of |w| > t, in weight units.
    mean_multiples : M of |w| > M·mean|w|.
    quantiles : in [0, 1], numpy's "linear" convention.
    tail : share of the largest |w| that the Hill estimate of the tail index rests on.
    top : how many of the largest |w| are kept with their coordinates.
    order : False leaves out everything that rests on the order of the entries (median, MAD, quantiles, Tukey
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
    def sigma_only(cls, sigmas: tuple[float, ...] = (3.0, 6.0), **rules: Any) -> OutlierRules:
        """The counts beyond kσ and the moments alone: the quickest that answers the main question."""
        return cls(sigmas=sigmas, curve=(), mean_multiples=(), order=False, **rules)

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


@dataclass
class TensorOutliers:
    """The numbers of one tensor.

    `values` and `counts` hold only what is defined; `reasons` says why for everything else. `counted` has,
    per counting rule, the number of finite entries it was applied to.
    `top` lists (value, flat index) by falling magnitude, ties by index. `axes` has, for "row" and "column",
    what stands out or why that is undefined; it is empty where it was not asked for.
    """

    size: int
    moments: Moments
    nan: int = 0
    inf: int = 0
    zeros: int = 0
    mean_abs: float = math.nan
    values: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    top: list[tuple[float, int]] = field(default_factory=list)
    axes: dict[str, AxisOutliers | str] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Finite entries."""
        return self.moments.n


def merge_outliers(parts: Iterable[TensorOutliers]) -> TensorOutliers:
    """The roll-up of several tensors: entries are pooled, never ratios averaged.

    Counts add up, each entry judged within its own tensor; moments are those of all entries together;
    `max_sigma` is the greatest of the parts. Medians, quantiles and tail indices do not merge.
    """
    total = TensorOutliers(0, Moments())
    magnitude = 0.0
    for part in parts:
        total.size += part.size
        total.moments = total.moments.merge(part.moments)
        total.nan, total.inf, total.zeros = (
            total.nan + part.nan,
            total.inf + part.inf,
            total.zeros + part.zeros,
        )
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
    values |= {"mean": moments.mean, "std": moments.std}
    if math.isfinite(moments.kurtosis):
        values["kurtosis"] = moments.kurtosis
    elif values["minimum"] == values["maximum"]:
        reasons["kurtosis"] = "the tensor is constant"
    else:
        reasons["kurtosis"] = "its moments leave the range of float64"


def quantile_name(q: float) -> str:
    """The metric name of a quantile: `quantile_0.25`."""
    return f"quantile_{q:g}"
