"""Outlier parameters: how many entries of a weight tensor lie far from the rest, counted exactly.

For a tensor with N finite entries, mean μ and population deviation σ in float64 the ratio at k is
#{|w − μ| > kσ} / N; a Gaussian has 0.270 % at k = 3 and 2·10⁻⁷ % at k = 6. Non-finite entries are
counted apart and enter nothing else. Everything is in one `TensorOutliers`, from `summarize` (raw chunks,
streamed, in `outlier_summary`) or `outlier_statistics` (an array).

References
----------
Counting beyond kσ and by other rules: definitions in `definitions`. |w| > M·mean|w| is the weight-only form of
OWL (Yin et al. 2023, arXiv 2310.05175); single extreme entries: Yu et al. 2024, "The super weight in
large language models", arXiv 2411.07191.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from layerprobe.errors import UsageError
from layerprobe.metrics.outliers.codes import CODE_DTYPES
from layerprobe.metrics.outliers.counting import make_engine
from layerprobe.metrics.outliers.rules import OutlierRules, TensorOutliers, merge_outliers, quantile_name
from layerprobe.metrics.outliers.summary import summarize

__all__ = [
    "OutlierRules",
    "TensorOutliers",
    "merge_outliers",
    "outlier_ratio",
    "outlier_statistics",
    "quantile_name",
    "summarize",
]


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

    return summarize(passes, dtype, raw.shape, rules=rules, engine=make_engine(engine))


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
