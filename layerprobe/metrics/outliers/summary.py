"""All outlier quantities of one tensor from its raw chunks: by histogram, sorting or bins, always exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from layerprobe.errors import UsageError
from layerprobe.files import dtype_name
from layerprobe.metrics.outliers import (
    OutlierRules,
    TensorOutliers,
    measure,
    measure_moments,
    measure_nothing,
    thresholds,
)
from layerprobe.metrics.outliers.codes import CODE_DTYPES, Distribution, code_table, decoded, float32_bins
from layerprobe.metrics.outliers.counting import Engine, TopEntries, make_engine
from layerprobe.metrics.outliers.moments import AxisSpread, Moments, chunk_moments

if TYPE_CHECKING:
    import torch

SORT_BELOW = 1 << 20
"""float32 tensors with fewer entries are sorted; larger ones are binned by their upper 16 bits."""

COUNT_FROM = 1 << 12
"""8- and 16-bit tensors with fewer entries are sorted, too: a table of all codes would cost more."""

_REFINE_AT_ONCE = 64

Passes = Callable[[], Iterator[np.ndarray]]
"""Called once per pass; yields 1-D raw chunks: uint8/uint16 codes, float32 or float64 values."""


def outlier_statistics(
    weight: ArrayLike | torch.Tensor,
    *,
    rules: OutlierRules | None = None,
    engine: str = "auto",
    chunk: int = 1 << 19,
) -> TensorOutliers:
    """All quantities of an array or torch tensor in its own precision (bfloat16 and float8 included).

    Raises
    ------
    UsageError
        Integers, complex numbers, or a float format that is not known.
    """
    raw, dtype = _raw_codes(weight)
    flat = raw.reshape(-1)

    def passes() -> Iterator[np.ndarray]:
        for start in range(0, flat.size, chunk):
            yield flat[start : start + chunk]

    return summarize(passes, dtype, raw.shape, rules=rules, engine=make_engine(engine))


def outlier_ratio(weight: ArrayLike | torch.Tensor, *, n_sigma: float = 6.0) -> float:
    """Share of entries lying more than `n_sigma` deviations from the tensor's mean.

    Mean and (population) deviation run over the whole tensor; another population is another function.

    Parameters
    ----------
    weight : ArrayLike | torch.Tensor
        Array or tensor, any shape. Computed in float64 whatever dtype arrives.
    n_sigma : float
        Float >= 0, in standard deviations.

    Returns
    -------
    float
        In [0, 1]; 0 = none, higher = heavier tails.

    Raises
    ------
    UsageError (a ValueError) : empty, non-finite or constant `weight`.

    Examples
    --------
    >>> outlier_ratio([0.0] * 99 + [50.0])
    0.01
    """
    found = outlier_statistics(weight, rules=OutlierRules.sigma_only((n_sigma,), top=0))
    if found.n == 0 or found.nan or found.inf:
        raise UsageError(f"outlier_ratio needs finite entries; got {found.size}, of them {found.n} finite")
    if "max_sigma" not in found.values:
        raise UsageError(f"outlier_ratio is undefined: {found.reasons['max_sigma']}")
    return found.counts[f"{n_sigma:g}sigma"] / found.n


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
    passes : Passes
        Callable → iterator of 1-D arrays in the tensor's row-major order.
    dtype : str
        "float64", "float32", or one of `layerprobe.metrics.outliers.codes.CODE_DTYPES`.
    shape : tuple[int, ...]
        Of the tensor.
    axes : bool
        Also measure rows and columns of matrices; more costly than all the rest together.
    """
    rules = rules or OutlierRules()
    size = math.prod(shape)
    spread = AxisSpread(shape, dtype) if axes and len(shape) >= 2 and size else None
    if spread is not None:
        passes = _also_into(spread, passes)
    if not rules.order and dtype == "float32" and size >= SORT_BELOW:
        result = _from_comparisons(passes, size, rules)
    else:
        if not needs_engine(dtype, size):
            result, distribution = _from_sorting(passes, dtype, size, rules)
        elif dtype in CODE_DTYPES:
            result, distribution = _from_codes(passes, dtype, size, rules, engine or make_engine())
        else:
            result, distribution = _from_bins(passes, size, rules, engine or make_engine())
        with np.errstate(over="ignore", invalid="ignore"):
            measure(result, distribution, rules)
    if spread is not None:
        result.axes = spread.outliers()
    return result


def _also_into(spread: AxisSpread, passes: Passes) -> Passes:
    """The same passes; the first one also feeds `spread`."""
    fresh = True

    def again() -> Iterator[np.ndarray]:
        nonlocal fresh
        first, fresh = fresh, False
        for chunk in passes():
            if first:
                spread.update(chunk)
            yield chunk

    return again


def needs_engine(dtype: str, size: int) -> bool:
    """Whether a tensor is counted by an engine; the others are sorted with numpy alone."""
    return size >= (COUNT_FROM if dtype in CODE_DTYPES else SORT_BELOW) and dtype != "float64"


def _from_codes(
    passes: Passes, dtype: str, size: int, rules: OutlierRules, engine: Engine
) -> tuple[TensorOutliers, Distribution]:
    table = code_table(dtype)
    counts = np.zeros(table.n_codes, np.int64)
    top = TopEntries(rules.top, dtype)
    for chunk in passes():
        top.update(chunk, engine.codes(chunk, counts))
    counts = engine.in_code_order(counts)
    finite = counts[table.codes]
    present = np.flatnonzero(finite)
    values, found = table.low[present], finite[present]
    result = TensorOutliers(
        size=size,
        moments=Moments.of_counts(values, found),
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
    coded = dtype in CODE_DTYPES
    raw = np.empty(size, np.float64 if coded else np.dtype(dtype))
    top = TopEntries(rules.top, "float64" if coded else dtype)
    start = 0
    for chunk in passes():
        entries = decoded(chunk, dtype) if coded else chunk
        raw[start : start + chunk.size] = entries
        top.update(entries)
        start += chunk.size
    nan = inf = 0
    finite = np.isfinite(raw)
    if not finite.all():
        nan, inf = int(np.isnan(raw).sum()), int(np.isinf(raw).sum())
        raw = raw[finite]
    raw.sort()
    values = raw.astype(np.float64)
    result = TensorOutliers(
        size=size, nan=nan, inf=inf, zeros=int(values.size - np.count_nonzero(values)), top=top.entries()
    )
    if values.size:
        constant = values[0] == values[-1]
        with np.errstate(over="ignore", invalid="ignore"):
            result.mean_abs = float(np.abs(values).mean())
            result.moments = (
                Moments(n=values.size, mean=float(values[0]))
                if constant
                else Moments.of_values(values.copy())
            )
    return result, Distribution.of_sorted(values)


def _from_bins(
    passes: Passes, size: int, rules: OutlierRules, engine: Engine
) -> tuple[TensorOutliers, Distribution]:
    table = float32_bins()
    counts = np.zeros(1 << 16, np.int64)
    top = TopEntries(rules.top, "float32")
    moments, magnitude, nan = Moments(), 0.0, 0
    for chunk in passes():
        maxima, part, absolute = engine.float32(chunk, counts)
        if part.n < chunk.size:
            nan += int(np.isnan(chunk).sum())
        moments, magnitude = moments.merge(part), magnitude + absolute
        top.update(chunk, maxima)
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
    result = TensorOutliers(
        size=size, moments=moments, nan=nan, inf=size - moments.n - nan, top=top.entries()
    )
    if result.n:
        result.mean_abs = magnitude / result.n
        distribution.refine(_bins_in_question(distribution, result, rules))
        result.zeros = distribution.count_where(lambda v: v <= 0) - distribution.count_where(lambda v: v < 0)
        least, most = distribution.order(0), distribution.order(result.n - 1)
        if least == most:
            result.moments = Moments(n=result.n, mean=least)
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
    result = TensorOutliers(size=size)
    magnitude, least, most = 0.0, math.inf, -math.inf
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
        top.update(chunk, greatest=max(-here[0], here[1]) if moments.n else -1.0)
    result.inf = size - result.n - result.nan
    result.top = top.entries()
    if result.n == 0:
        measure_nothing(result, rules)
        return result
    if least == most:
        result.moments = Moments(n=result.n, mean=least)
    if rules.mean_multiples:
        result.mean_abs = magnitude / result.n
    measure_moments(result, least, most)
    bounds = thresholds(result, rules)
    if not bounds:
        return result
    result.counts = dict.fromkeys(bounds, 0)
    # What lies between the innermost bounds satisfies no rule; one step of float32 covers the rounding.
    inner_low = np.nextafter(np.float32(max(c - b for c, b in bounds.values())), np.float32(math.inf))
    inner_high = np.nextafter(np.float32(min(c + b for c, b in bounds.values())), np.float32(-math.inf))
    for chunk in passes():
        picked = chunk[(chunk <= inner_low) | (chunk >= inner_high)].astype(np.float64)
        picked = picked[np.isfinite(picked)]
        for rule, (center, bound) in bounds.items():
            result.counts[rule] += int((picked - center > bound).sum() + (center - picked > bound).sum())
    result.counted = dict.fromkeys(result.counts, result.n)
    return result


def _raw_codes(weight: ArrayLike | torch.Tensor) -> tuple[np.ndarray, str]:
    if hasattr(weight, "detach"):
        import torch

        tensor = weight.detach().cpu().contiguous()
        dtype = dtype_name(tensor.dtype)
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
