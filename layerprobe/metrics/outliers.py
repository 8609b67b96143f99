"""Outlier parameters: how many entries of a weight tensor lie far from the rest, counted exactly.

For a tensor with N finite entries, mean μ and population deviation σ in float64 the ratio at k is
#{|w − μ| > kσ} / N; a Gaussian has 0.270 % at k = 3 and 2·10⁻⁷ % at k = 6. Non-finite entries are
counted apart and enter nothing else. Everything is in one `TensorOutliers`, from `summarize` (raw chunks,
streamed) or `outlier_statistics` (an array).

References
----------
Counting beyond kσ and by other rules: definitions in `definitions`. |w| > M·mean|w| is the weight-only form of
OWL (Yin et al. 2023, arXiv 2310.05175); single extreme entries: Yu et al. 2024, "The super weight in
large language models", arXiv 2411.07191.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from layerprobe.errors import UsageError
from layerprobe.metrics.outlier_codes import CODE_DTYPES, code_table, float32_bins
from layerprobe.metrics.outlier_counting import Engine, make_engine
from layerprobe.metrics.outlier_distribution import Distribution
from layerprobe.metrics.outlier_moments import Moments
from layerprobe.metrics.outlier_top import TopEntries

SORT_BELOW = 1 << 20
"""float32 tensors with fewer entries are sorted; larger ones are binned by their upper 16 bits."""

_REFINE_AT_ONCE = 64

Passes = Callable[[], Iterator[np.ndarray]]
"""Called once per pass; yields 1-D raw chunks: uint8/uint16 codes, float32 or float64 values."""


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

    @property
    def all_sigmas(self) -> tuple[float, ...]:
        """`sigmas` and `curve` together, ascending."""
        return tuple(sorted({*self.sigmas, *self.curve}))

    def definitions(self) -> dict[str, str]:
        """Rule name → definition, for every counting rule; the names are those of `TensorOutliers.counts`."""
        found = {f"{k:g}sigma": f"|w - mean| > {k:g} * std of the tensor" for k in self.all_sigmas}
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
    `top` lists (value, flat index) by falling magnitude, ties by index.
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

    @property
    def n(self) -> int:
        """Finite entries."""
        return self.moments.n


def summarize(
    passes: Passes, dtype: str, size: int, *, rules: OutlierRules | None = None, engine: Engine | None = None
) -> TensorOutliers:
    """All quantities of one tensor whose raw chunks `passes` yields, as often as it is called.

    8- and 16-bit formats and small tensors take one pass; float32 of a million entries or more takes two
    (at most three). Memory: one chunk and a few tables; float64 tensors are held whole.

    Parameters
    ----------
    passes : callable → iterator of 1-D arrays in the tensor's row-major order.
    dtype : "float64", "float32", or one of `layerprobe.metrics.outlier_codes.CODE_DTYPES`.
    size : number of entries.
    """
    rules = rules or OutlierRules()
    if not needs_engine(dtype, size):
        result, distribution = _from_sorting(passes, dtype, size, rules)
    elif dtype in CODE_DTYPES:
        result, distribution = _from_codes(passes, dtype, size, rules, engine or make_engine())
    else:
        result, distribution = _from_bins(passes, size, rules, engine or make_engine())
    with np.errstate(over="ignore", invalid="ignore"):
        _measure(result, distribution, rules)
    return result


def needs_engine(dtype: str, size: int) -> bool:
    """Whether a tensor is counted by an engine; the others are sorted with numpy alone."""
    return dtype in CODE_DTYPES or (dtype == "float32" and size >= SORT_BELOW)


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
        _moment_values(total)
        total.values |= {"mean_abs": total.mean_abs, "zero_ratio": total.zeros / total.n}
    defined = {*total.values, *total.counts}
    total.reasons = {name: why for name, why in total.reasons.items() if name not in defined}
    total.reasons |= dict.fromkeys(("median", "mad"), "order statistics of several tensors do not merge")
    return total


def _from_codes(
    passes: Passes, dtype: str, size: int, rules: OutlierRules, engine: Engine
) -> tuple[TensorOutliers, Distribution]:
    table = code_table(dtype)
    counts = np.zeros(table.n_codes, np.int64)
    top = TopEntries(rules.top, dtype)
    start = 0
    for chunk in passes():
        top.update(chunk, start, engine.codes(chunk, counts))
        start += chunk.size
    counts = engine.in_code_order(counts)
    finite = counts[table.codes]
    present = np.flatnonzero(finite)
    values, found = table.low[present], finite[present]
    result = TensorOutliers(
        size,
        Moments.of_counts(values, found),
        nan=int(counts[table.nan].sum()),
        inf=int(counts[table.inf].sum()),
        zeros=int(found[values == 0].sum()),
        top=top.entries(),
    )
    if result.n:
        result.mean_abs = float((np.abs(values) * found).sum() / result.n)
    return result, Distribution(values, values, found)


def _from_sorting(
    passes: Passes, dtype: str, size: int, rules: OutlierRules
) -> tuple[TensorOutliers, Distribution]:
    raw = np.empty(size, np.dtype(dtype))
    top = TopEntries(rules.top, dtype)
    start = 0
    for chunk in passes():
        raw[start : start + chunk.size] = chunk
        top.update(chunk, start)
        start += chunk.size
    nan, inf = int(np.isnan(raw).sum()), int(np.isinf(raw).sum())
    if nan or inf:
        raw = raw[np.isfinite(raw)]
    raw.sort()
    values = raw.astype(np.float64)
    result = TensorOutliers(
        size,
        Moments(values.size, float(values[0])) if values.size and values[0] == values[-1] else Moments(),
        nan=nan,
        inf=inf,
        zeros=int(values.size - np.count_nonzero(values)),
        top=top.entries(),
    )
    distribution = Distribution.of_sorted(values)
    if values.size:
        with np.errstate(over="ignore", invalid="ignore"):
            result.mean_abs = float(np.abs(values).mean())
            if result.n == 0:
                result.moments = Moments.of_values(values.copy())
    return result, distribution


def _from_bins(
    passes: Passes, size: int, rules: OutlierRules, engine: Engine
) -> tuple[TensorOutliers, Distribution]:
    table = float32_bins()
    counts = np.zeros(1 << 16, np.int64)
    top = TopEntries(rules.top, "float32")
    moments, magnitude, start, nan = Moments(), 0.0, 0, 0
    for chunk in passes():
        maxima, part, absolute = engine.float32(chunk, counts)
        if part.n < chunk.size:
            nan += int(np.isnan(chunk).sum())
        moments, magnitude = moments.merge(part), magnitude + absolute
        top.update(chunk, start, maxima)
        start += chunk.size
    finite = counts[table.codes]
    present = np.flatnonzero(finite)
    codes = table.codes[present]

    def refine(segments: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        refined: list[tuple[np.ndarray, np.ndarray]] = []
        for first in range(0, segments.size, _REFINE_AT_ONCE):
            refined += _refined_bins(passes, codes[segments[first : first + _REFINE_AT_ONCE]], engine)
        return refined

    distribution = Distribution(table.low[present], table.high[present], finite[present], refine)
    result = TensorOutliers(size, moments, nan=nan, inf=size - moments.n - nan, top=top.entries())
    if result.n:
        result.mean_abs = magnitude / result.n
        distribution.refine(_bins_in_question(distribution, result, rules))
        result.zeros = distribution.count_where(lambda v: v <= 0) - distribution.count_where(lambda v: v < 0)
        least, most = distribution.order(0), distribution.order(result.n - 1)
        if least == most:
            result.moments = Moments(result.n, least)
    return result, distribution


def _refined_bins(passes: Passes, codes: np.ndarray, engine: Engine) -> list[tuple[np.ndarray, np.ndarray]]:
    slot = np.full(1 << 16, -1, np.int8)
    slot[codes] = np.arange(codes.size)
    low = np.zeros((codes.size, 1 << 16), np.uint32)
    for chunk in passes():
        engine.low_halves(chunk, slot, low)
    engine.flush(low)
    refined = []
    for code, row in zip(codes.tolist(), low, strict=True):
        present = np.flatnonzero(row)
        values = (np.uint32(code << 16) | present.astype(np.uint32)).view(np.float32)
        counts = row[present]
        if code & 0x8000:
            values, counts = values[::-1], counts[::-1]
        refined.append((values.astype(np.float64), counts.astype(np.int64)))
    return refined


def _bins_in_question(d: Distribution, result: TensorOutliers, rules: OutlierRules) -> list[int]:
    """The bins that the answers can fall into, so that one pass makes all of them exact.

    Where a threshold rests on an order statistic that is itself known only to its bin, the threshold is
    an interval and all bins that meet it are taken.
    """
    n = d.n
    ranks = {0, n - 1, (n - 1) // 2, n // 2}
    for q in {0.25, 0.75, *rules.quantiles}:
        below = math.floor(q * (n - 1))
        ranks |= {below, min(below + 1, n - 1)}
    bins = {d.segment_of(rank) for rank in ranks}

    def span(q_low: int, q_high: int) -> tuple[float, float]:
        return float(d.low[d.segment_of(q_low)]), float(d.high[d.segment_of(q_high)])

    def want(least: float, most: float) -> None:
        bins.update(d.between(least, most).tolist())

    want(0.0, 0.0)
    mean, std = result.moments.mean, result.moments.std
    for k in rules.all_sigmas:
        want(mean + k * std, mean + k * std)
        want(mean - k * std, mean - k * std)
    for t in (*rules.absolute, *(m * result.mean_abs for m in rules.mean_multiples)):
        want(t, t)
        want(-t, -t)
    median = span((n - 1) // 2, n // 2)
    near, far = d.distances(*median)
    mad = d.distance_bracket(near, far)
    bins.update(np.flatnonzero((far >= mad[0]) & (near <= mad[1])).tolist())
    for z in rules.mad_z:
        factor = z / 0.6745
        want(median[0] + factor * mad[0], median[1] + factor * mad[1])
        want(median[0] - factor * mad[1], median[1] - factor * mad[0])
    first, third = math.floor(0.25 * (n - 1)), math.floor(0.75 * (n - 1))
    q1, q3 = span(first, min(first + 1, n - 1)), span(third, min(third + 1, n - 1))
    for fence in rules.tukey:
        least, most = max(q3[0] - q1[1], 0.0), q3[1] - q1[0]
        want(q3[0] + fence * least, q3[1] + fence * most)
        want(q1[0] - fence * most, q1[1] - fence * least)
    return sorted(bins)


def _measure(result: TensorOutliers, d: Distribution, rules: OutlierRules) -> None:
    moments, values, counts, reasons = result.moments, result.values, result.counts, result.reasons
    if d.n == 0:
        why = "the tensor is empty" if result.size == 0 else "no finite entries"
        for name in (*_MOMENT_METRICS, *_ORDER_METRICS, *(quantile_name(q) for q in rules.quantiles)):
            reasons[name] = why
        reasons["zero_ratio"] = reasons["mean_abs"] = reasons["tail_index"] = why
        counts.update(dict.fromkeys(rules.definitions(), 0))
        result.counted = dict.fromkeys(counts, 0)
        return
    least, most = d.order(0), d.order(d.n - 1)
    values |= {
        "minimum": least,
        "maximum": most,
        "mean_abs": result.mean_abs,
        "zero_ratio": result.zeros / d.n,
    }
    mean, std = moments.mean, moments.std
    _moment_values(result)
    if math.isfinite(mean) and 0 < std < math.inf:
        values["max_sigma"] = max(most - mean, mean - least) / std
    else:
        reasons["max_sigma"] = reasons["kurtosis"]
    median = d.median()
    mad = d.median_distance(median)
    values |= {"median": median, "mad": mad}
    values |= {quantile_name(q): d.quantile(q) for q in rules.quantiles}
    for k in rules.all_sigmas:
        if "std" in values:
            bound = k * std
            counts[f"{k:g}sigma"] = _beyond(
                d, lambda v, b=bound: v - mean > b, lambda v, b=bound: mean - v > b
            )
        else:
            reasons[f"{k:g}sigma"] = "overflows float64"
    for z in rules.mad_z:
        if mad > 0:
            counts[f"madz{z:g}"] = _beyond(
                d,
                lambda v, z=z: 0.6745 * (v - median) / mad > z,
                lambda v, z=z: 0.6745 * (median - v) / mad > z,
            )
        else:
            reasons[f"madz{z:g}"] = "the MAD is 0: more than half of the entries are equal"
    if rules.tukey:
        q1, q3 = d.quantile(0.25), d.quantile(0.75)
        for fence in rules.tukey:
            upper, lower = q3 + fence * (q3 - q1), q1 - fence * (q3 - q1)
            counts[f"tukey{fence:g}"] = _beyond(d, lambda v, b=upper: v > b, lambda v, b=lower: v < b)
    for t in rules.absolute:
        counts[f"abs{t:g}"] = _beyond(d, lambda v, b=t: v > b, lambda v, b=t: v < -b)
    for m in rules.mean_multiples:
        bound = m * result.mean_abs
        counts[f"mean{m:g}"] = _beyond(d, lambda v, b=bound: v > b, lambda v, b=bound: v < -b)
    result.counted = dict.fromkeys(counts, d.n)
    _hill(result, d, rules.tail)


def _moment_values(result: TensorOutliers) -> None:
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


def _beyond(d: Distribution, above: Any, below: Any) -> int:
    return d.count_where(above) + d.count_where(below)


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


_MOMENT_METRICS = ("mean", "std", "kurtosis", "max_sigma")
_ORDER_METRICS = ("median", "mad", "minimum", "maximum")


def outlier_statistics(
    weight: Any, *, rules: OutlierRules | None = None, engine: str = "auto", chunk: int = 1 << 19
) -> TensorOutliers:
    """All quantities of an array or torch tensor in its own precision (bfloat16 and float8 included).

    Raises
    ------
    UsageError : integers, complex numbers, or a float format that is not known.
    """
    raw, dtype = _raw_array(weight)
    flat = raw.reshape(-1)

    def passes() -> Iterator[np.ndarray]:
        for start in range(0, flat.size, chunk):
            yield flat[start : start + chunk]

    return summarize(passes, dtype, flat.size, rules=rules, engine=make_engine(engine))


def outlier_ratio(weight: Any, *, n_sigma: float = 6.0) -> float:
    """Share of entries lying more than `n_sigma` deviations from the tensor's mean.

    Mean and (population) deviation run over the whole tensor; another population is another function.

    Parameters
    ----------
    weight : array or tensor, any shape. Computed in float64 whatever dtype arrives.
    n_sigma : float >= 0, in standard deviations.

    Returns
    -------
    float in [0, 1]; 0 = none, higher = heavier tails.

    Raises
    ------
    UsageError (a ValueError) : empty, non-finite or constant `weight`.

    Examples
    --------
    >>> outlier_ratio([0.0] * 99 + [50.0])
    0.01
    """
    found = outlier_statistics(weight, rules=OutlierRules(sigmas=(n_sigma,), top=0), engine="auto")
    if found.n == 0 or found.nan or found.inf:
        raise UsageError(f"outlier_ratio needs finite entries; got {found.size}, of them {found.n} finite")
    if "max_sigma" not in found.values:
        raise UsageError(f"outlier_ratio is undefined: {found.reasons['max_sigma']}")
    return found.counts[f"{n_sigma:g}sigma"] / found.n


def _raw_array(weight: Any) -> tuple[np.ndarray, str]:
    if hasattr(weight, "detach"):
        import torch

        tensor = weight.detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype in CODE_DTYPES:
            return tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.uint16).numpy(), dtype
        weight = tensor.numpy()
    array = np.asarray(weight)
    if array.dtype == np.float16:
        return np.ascontiguousarray(array).view(np.uint16), "float16"
    if array.dtype.kind in "iub" and not hasattr(weight, "detach") and not isinstance(weight, np.ndarray):
        array = array.astype(np.float64)
    if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8):
        raise UsageError(f"outlier statistics need floating-point weights, got {array.dtype}")
    return np.ascontiguousarray(array), array.dtype.name
