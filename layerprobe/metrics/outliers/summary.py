"""All outlier quantities of one tensor from its raw chunks: by histogram, sorting or bins, always exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from layerprobe.metrics.outliers.axes import AxisSpread
from layerprobe.metrics.outliers.codes import CODE_DTYPES, code_table, float32_bins
from layerprobe.metrics.outliers.counting import Engine, make_engine
from layerprobe.metrics.outliers.distribution import Distribution
from layerprobe.metrics.outliers.moments import Moments, chunk_moments
from layerprobe.metrics.outliers.rules import OutlierRules, TensorOutliers, moment_values, quantile_name
from layerprobe.metrics.outliers.top import TopEntries

SORT_BELOW = 1 << 20
"""float32 tensors with fewer entries are sorted; larger ones are binned by their upper 16 bits."""

_REFINE_AT_ONCE = 64
_MOMENT_METRICS = ("mean", "std", "kurtosis", "max_sigma")

Passes = Callable[[], Iterator[np.ndarray]]
"""Called once per pass; yields 1-D raw chunks: uint8/uint16 codes, float32 or float64 values."""


def summarize(
    passes: Passes,
    dtype: str,
    shape: tuple[int, ...],
    *,
    rules: OutlierRules | None = None,
    engine: Engine | None = None,
    axes: bool = False,
) -> TensorOutliers:
    """All quantities of one tensor whose raw chunks `passes` yields, as often as it is called.

    8- and 16-bit formats and small tensors take one pass; float32 of a million entries or more takes two
    (at most three). Memory: one chunk and a few tables; float64 tensors are held whole.

    Parameters
    ----------
    passes : callable → iterator of 1-D arrays in the tensor's row-major order.
    dtype : "float64", "float32", or one of `layerprobe.metrics.outliers.codes.CODE_DTYPES`.
    shape : of the tensor.
    axes : also measure rows and columns of matrices; more costly than all the rest together.
    """
    rules = rules or OutlierRules()
    size = math.prod(shape)
    spread = AxisSpread(shape, dtype) if axes and len(shape) >= 2 and size else None
    if spread is not None:
        passes = _watched(passes, spread)
    if not rules.order and dtype == "float32" and size >= SORT_BELOW:
        result = _from_comparisons(passes, size, rules)
        result.axes = spread.outliers() if spread is not None else {}
        return result
    if not needs_engine(dtype, size):
        result, distribution = _from_sorting(passes, dtype, size, rules)
    elif dtype in CODE_DTYPES:
        result, distribution = _from_codes(passes, dtype, size, rules, engine or make_engine())
    else:
        result, distribution = _from_bins(passes, size, rules, engine or make_engine())
    with np.errstate(over="ignore", invalid="ignore"):
        _measure(result, distribution, rules)
    result.axes = spread.outliers() if spread is not None else {}
    return result


def _watched(passes: Passes, spread: AxisSpread) -> Passes:
    """The same passes; the first one also feeds `spread`."""
    fresh = True

    def again() -> Iterator[np.ndarray]:
        nonlocal fresh
        first, fresh = fresh, False
        start = 0
        for chunk in passes():
            if first:
                spread.update(chunk, start)
                start += chunk.size
            yield chunk

    return again


def needs_engine(dtype: str, size: int) -> bool:
    """Whether a tensor is counted by an engine; the others are sorted with numpy alone."""
    return dtype in CODE_DTYPES or (dtype == "float32" and size >= SORT_BELOW)


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
    counts = engine.in_code_order(counts)
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


def _from_comparisons(passes: Passes, size: int, rules: OutlierRules) -> TensorOutliers:
    """float32 without order statistics: moments in one pass, comparisons with the thresholds in a second."""
    top = TopEntries(rules.top, "float32")
    result = TensorOutliers(size, Moments())
    magnitude, start, least, most = 0.0, 0, math.inf, -math.inf
    for chunk in passes():
        here = (float(chunk.min()), float(chunk.max()))
        all_finite = math.isfinite(here[0]) and math.isfinite(here[1])
        moments, absolute = chunk_moments(chunk, all_finite, absolute=bool(rules.mean_multiples))
        result.moments, magnitude = result.moments.merge(moments), magnitude + absolute
        result.zeros += int(np.count_nonzero(chunk == 0))
        if moments.n < chunk.size:
            result.nan += int(np.isnan(chunk).sum())
        if moments.n:
            if not all_finite:
                finite = chunk[np.isfinite(chunk)]
                here = (float(finite.min()), float(finite.max()))
            least, most = min(least, here[0]), max(most, here[1])
            if max(-here[0], here[1]) > top.worst:
                top.update(chunk, start)
        start += chunk.size
    result.inf = size - result.n - result.nan
    result.top = top.entries()
    if result.n == 0:
        _nothing_to_measure(result, rules)
        return result
    if least == most:
        result.moments = Moments(result.n, least)
    if rules.mean_multiples:
        result.mean_abs = magnitude / result.n
    _measure_moments(result, least, most)
    thresholds = _thresholds(result, rules)
    if not thresholds:
        return result
    result.counts = dict.fromkeys(thresholds, 0)
    # What lies between the innermost bounds satisfies no rule; one step of float32 covers the rounding.
    inner_low = np.nextafter(np.float32(max(c - b for c, b in thresholds.values())), np.float32(math.inf))
    inner_high = np.nextafter(np.float32(min(c + b for c, b in thresholds.values())), np.float32(-math.inf))
    for chunk in passes():
        picked = chunk[(chunk <= inner_low) | (chunk >= inner_high)].astype(np.float64)
        picked = picked[np.isfinite(picked)]
        for rule, (center, bound) in thresholds.items():
            result.counts[rule] += int((picked - center > bound).sum() + (center - picked > bound).sum())
    result.counted = dict.fromkeys(result.counts, result.n)
    return result


def _nothing_to_measure(result: TensorOutliers, rules: OutlierRules) -> None:
    why = "the tensor is empty" if result.size == 0 else "no finite entries"
    names = [*_MOMENT_METRICS, "minimum", "maximum", "mean_abs", "zero_ratio"]
    if rules.order:
        names += ["median", "mad", "tail_index", *(quantile_name(q) for q in rules.quantiles)]
    result.reasons.update(dict.fromkeys(names, why))
    result.counts.update(dict.fromkeys(rules.definitions(), 0))
    result.counted = dict.fromkeys(result.counts, 0)


def _measure(result: TensorOutliers, d: Distribution, rules: OutlierRules) -> None:
    if d.n == 0:
        _nothing_to_measure(result, rules)
        return
    _measure_moments(result, d.order(0), d.order(d.n - 1))
    for rule, (center, bound) in _thresholds(result, rules).items():
        result.counts[rule] = _beyond(
            d, lambda v, c=center, b=bound: v - c > b, lambda v, c=center, b=bound: c - v > b
        )
    if rules.order:
        _measure_order(result, d, rules)
    result.counted = dict.fromkeys(result.counts, d.n)


def _measure_moments(result: TensorOutliers, least: float, most: float) -> None:
    values = result.values
    values |= {
        "minimum": least,
        "maximum": most,
        "zero_ratio": result.zeros / result.n,
    }
    if not math.isnan(result.mean_abs):
        values["mean_abs"] = result.mean_abs
    mean, std = result.moments.mean, result.moments.std
    moment_values(result)
    if math.isfinite(mean) and 0 < std < math.inf:
        values["max_sigma"] = max(most - mean, mean - least) / std
    else:
        result.reasons["max_sigma"] = result.reasons["kurtosis"]


def _thresholds(result: TensorOutliers, rules: OutlierRules) -> dict[str, tuple[float, float]]:
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
    result.values |= {"median": median, "mad": mad}
    result.values |= {quantile_name(q): d.quantile(q) for q in rules.quantiles}
    for z in rules.mad_z:
        if mad > 0:
            counts[f"madz{z:g}"] = _beyond(
                d,
                lambda v, z=z: 0.6745 * (v - median) / mad > z,
                lambda v, z=z: 0.6745 * (median - v) / mad > z,
            )
        else:
            result.reasons[f"madz{z:g}"] = "the MAD is 0: at least half of the entries are equal"
    if rules.tukey:
        q1, q3 = d.quantile(0.25), d.quantile(0.75)
        for fence in rules.tukey:
            upper, lower = q3 + fence * (q3 - q1), q1 - fence * (q3 - q1)
            counts[f"tukey{fence:g}"] = _beyond(d, lambda v, b=upper: v > b, lambda v, b=lower: v < b)
    _hill(result, d, rules.tail)


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
