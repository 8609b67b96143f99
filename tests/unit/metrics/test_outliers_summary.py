"""Outlier statistics against brute force in float64, for every dtype and both engines."""

from __future__ import annotations

import importlib.util
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerprobe.errors import NotAvailableError, UnknownNameError, UsageError
from layerprobe.metrics.outliers import OutlierRules, merge_outliers, quantile_name
from layerprobe.metrics.outliers import summary as module
from layerprobe.metrics.outliers.counting import make_engine
from layerprobe.metrics.outliers.summary import outlier_ratio, outlier_statistics

ENGINES = ["torch", *(["numba"] if importlib.util.find_spec("numba") else [])]
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]
RULES = OutlierRules(sigmas=(1.0, 3.0, 6.0), absolute=(0.1, 1.0), mean_multiples=(2.0, 5.0), mad_z=(2.0, 3.5))


def brute_force(values: np.ndarray, rules: OutlierRules) -> tuple[dict[str, float], dict[str, int]]:
    """Everything the slow and obvious way, from finite float64 values."""
    x = values
    mean, std = x.mean(), x.std()
    median = np.median(x)
    mad = np.median(np.abs(x - median))
    q1, q3 = np.quantile(x, [0.25, 0.75])
    counts = {f"{k:g}sigma": (np.abs(x - mean) > k * std).sum() for k in rules.all_sigmas}
    if mad > 0:
        counts |= {f"madz{z:g}": (0.6745 * np.abs(x - median) / mad > z).sum() for z in rules.mad_z}
    for fence in rules.tukey:
        beyond = (x > q3 + fence * (q3 - q1)) | (x < q1 - fence * (q3 - q1))
        counts[f"tukey{fence:g}"] = beyond.sum()
    counts |= {f"abs{t:g}": (np.abs(x) > t).sum() for t in rules.absolute}
    counts |= {f"mean{m:g}": (np.abs(x) > m * np.abs(x).mean()).sum() for m in rules.mean_multiples}
    found = {
        "mean": mean,
        "std": std,
        "median": median,
        "mad": mad,
        "minimum": x.min(),
        "maximum": x.max(),
        "mean_abs": np.abs(x).mean(),
        "zero_ratio": (x == 0).mean(),
    }
    if std > 0:
        found["kurtosis"] = (((x - mean) / std) ** 4).mean()
        found["max_sigma"] = np.abs(x - mean).max() / std
    found |= {quantile_name(q): np.quantile(x, q) for q in rules.quantiles}
    return found, {rule: int(count) for rule, count in counts.items()}


def check(tensor: torch.Tensor, engine: str, rules: OutlierRules = RULES, *, chunk: int = 1 << 19) -> None:
    found = outlier_statistics(tensor, rules=rules, engine=engine, chunk=chunk)
    wide = tensor.to(torch.float64).numpy().ravel()
    finite = wide[np.isfinite(wide)]
    assert (found.n, found.nan, found.inf) == (finite.size, np.isnan(wide).sum(), np.isinf(wide).sum())
    values, counts = brute_force(finite, rules)
    assert {rule: found.counts.get(rule) for rule in counts} == counts
    scale = max(abs(values["mean"]), values["std"])
    for name, expected in values.items():
        # A mean near zero is a difference of large sums: its error is measured against the spread.
        tolerance = 1e-9 * (scale if name == "mean" else abs(expected)) + 1e-300
        assert found.values[name] == pytest.approx(expected, rel=1e-9, abs=tolerance), name
    for name in ("median", "mad", "minimum", "maximum", *(quantile_name(q) for q in rules.quantiles)):
        assert found.values[name] == values[name], name
    order = np.argsort(-np.abs(np.where(np.isfinite(wide), wide, 0)), kind="stable")[: rules.top]
    order = [i for i in order if np.isfinite(wide[i])]
    assert found.top == [(wide[i], i) for i in order]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_equals_brute_force(dtype: torch.dtype, engine: str) -> None:
    rng = np.random.default_rng(0)
    heavy = torch.from_numpy(rng.standard_t(3, size=(300, 211)) * 0.1).to(dtype)
    heavy[5, 7], heavy[9, 9] = float("nan"), 0.0
    check(heavy, engine, chunk=4096)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "shape", ["normal", "heavy", "shifted", "few values", "one bin", "spiked", "with nan"]
)
def test_large_float32_is_exact_through_bins(
    engine: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SORT_BELOW", 1)
    rng = np.random.default_rng(1)
    n = 200_001
    x = {
        "normal": lambda: rng.normal(0, 0.02, n),
        "heavy": lambda: rng.standard_cauchy(n),
        "shifted": lambda: rng.normal(1.0, 1e-3, n),
        "few values": lambda: rng.integers(-3, 4, n),
        "one bin": lambda: 1.0 + rng.random(n) * 1e-3,
        "spiked": lambda: np.where(rng.random(n) < 0.7, 0.0, rng.normal(size=n)),
        "with nan": lambda: np.where(
            rng.random(n) < 0.1, rng.choice([np.nan, np.inf, -np.inf], n), rng.normal(size=n)
        ),
    }[shape]()
    check(torch.from_numpy(np.asarray(x, np.float32)), engine, chunk=30_011)


@pytest.mark.parametrize("engine", ENGINES)
def test_large_float32_takes_two_passes(engine: str) -> None:
    x = np.random.default_rng(2).normal(size=2_000_000).astype(np.float32)
    calls = []

    def passes():
        calls.append(1)
        yield from np.split(x, 4)

    module.summarize(passes, "float32", x.shape, engine=make_engine(engine))
    assert len(calls) == 2


def nearly_tied(values: np.ndarray, rules: OutlierRules) -> bool:
    """Whether an entry lies so near a threshold that float64 cannot tell on which side (exact arithmetic)."""
    exact = [Fraction(v) for v in values.tolist()]
    n = len(exact)
    mean = sum(exact) / n
    variance = sum((v - mean) ** 2 for v in exact) / n
    mean_abs = sum(abs(v) for v in exact) / n
    tiny = Fraction(1, 10**9)
    squares = [((v - mean) ** 2, Fraction(k) ** 2 * variance) for v in exact for k in rules.all_sigmas]
    squares += [(v**2, (Fraction(m) * mean_abs) ** 2) for v in exact for m in rules.mean_multiples]
    q1, q3 = np.quantile(values, [0.25, 0.75])
    median = np.median(values)
    mad = np.median(np.abs(values - median))
    for fence in rules.tukey:
        squares += [((v - Fraction(q3)) ** 2, (Fraction(fence) * Fraction(q3 - q1)) ** 2) for v in exact]
        squares += [((v - Fraction(q1)) ** 2, (Fraction(fence) * Fraction(q3 - q1)) ** 2) for v in exact]
    squares += [
        ((v - Fraction(median)) ** 2, (Fraction(z) * Fraction(mad) / Fraction(0.6745)) ** 2)
        for v in exact
        for z in rules.mad_z
    ]
    return any(abs(a - b) <= tiny * max(a, b) and max(a, b) > 0 for a, b in squares)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), engine=st.sampled_from(ENGINES), binned=st.booleans())
def test_any_tensor_equals_brute_force(
    data: st.DataObject, dtype: torch.dtype, engine: str, binned: bool
) -> None:
    entries = data.draw(
        st.lists(
            st.one_of(
                st.floats(width=32, allow_nan=True, allow_infinity=True, min_value=None, max_value=None),
                st.sampled_from([0.0, -0.0, 1.0, 0.1, -2.5, float("nan"), float("inf"), 1e-40]),
                st.floats(-3, 3, width=32),
            ),
            max_size=60,
        )
    )
    tensor = torch.tensor(entries, dtype=torch.float32).to(dtype)
    wide = tensor.to(torch.float64).numpy()
    finite = wide[np.isfinite(wide)]
    with pytest.MonkeyPatch.context() as patch:
        if binned:
            patch.setattr(module, "SORT_BELOW", 0)
        found = outlier_statistics(tensor, rules=RULES, engine=engine, chunk=7)
        assert (found.size, found.n) == (wide.size, finite.size)
        assert (found.nan, found.inf) == (np.isnan(wide).sum(), np.isinf(wide).sum())
        if finite.size == 0:
            assert set(found.counts.values()) <= {0}
            assert found.reasons["mean"] in ("no finite entries", "the tensor is empty")
            return
        if finite.min() == finite.max():
            assert found.values["std"] == 0
            assert found.reasons["kurtosis"] == "the tensor is constant"
            assert found.counts["3sigma"] == 0
            return
        values, counts = brute_force(finite, RULES)
        for name in ("median", "mad", "minimum", "maximum"):
            assert found.values[name] == values[name]
        scale = np.abs(finite).max()
        assert found.values["mean"] == pytest.approx(values["mean"], abs=1e-12 * scale)
        assert found.values["std"] == pytest.approx(values["std"], rel=1e-9)
        if not nearly_tied(finite, RULES):
            assert {rule: found.counts.get(rule) for rule in counts} == counts


def test_both_engines_give_the_same_numbers() -> None:
    if len(ENGINES) < 2:
        pytest.skip("needs numba (the extra 'fast')")
    rng = np.random.default_rng(3)
    for dtype in DTYPES:
        tensor = torch.from_numpy(rng.standard_t(4, 1_200_000)).to(dtype)
        one, other = (outlier_statistics(tensor, engine=engine) for engine in ENGINES)
        assert (one.counts, one.top, one.nan, one.zeros) == (other.counts, other.top, other.nan, other.zeros)
        assert one.values == pytest.approx(other.values, rel=1e-12, abs=1e-13)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 400), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_merging_pools_entries_and_adds_counts(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(i, 1 + i, size).astype(np.float32) for i, size in enumerate(sizes)]
    found = [outlier_statistics(part) for part in parts]
    merged = merge_outliers(found)
    for rule in OutlierRules().definitions():
        assert merged.counts.get(rule, 0) == sum(part.counts.get(rule, 0) for part in found)
    together = np.concatenate(parts).astype(np.float64)
    assert merged.n == together.size
    if together.size > 1:
        values, _ = brute_force(together, OutlierRules())
        for name in ("mean", "std", "kurtosis", "mean_abs", "minimum", "maximum", "zero_ratio"):
            assert merged.values[name] == pytest.approx(values[name], rel=1e-9, abs=1e-12)


def test_the_ratio_does_not_change_under_shift_and_scale() -> None:
    x = np.random.default_rng(4).standard_t(3, 5000)
    for k in (1.0, 3.0, 6.0):
        assert outlier_ratio(x, n_sigma=k) == outlier_ratio(-8 * x + 16, n_sigma=k)


def test_a_gaussian_has_the_gaussian_share() -> None:
    x = np.random.default_rng(5).normal(size=4_000_000)
    found = outlier_statistics(x.astype(np.float32))
    assert found.counts["3sigma"] / found.n == pytest.approx(0.0026998, abs=5 * (0.0027 / found.n) ** 0.5)
    assert found.values["kurtosis"] == pytest.approx(3, abs=0.02)
    assert found.values["mad"] / found.values["std"] == pytest.approx(0.6745, abs=0.002)


def test_the_hill_index_finds_a_pareto_exponent() -> None:
    x = np.random.default_rng(6).pareto(2.5, 2_000_000) + 1
    for values in (x, x.astype(np.float32)):
        found = outlier_statistics(values, rules=OutlierRules(tail=0.01))
        assert found.values["tail_index"] == pytest.approx(2.5, rel=0.03)


def test_a_ratio_of_an_unusable_array_is_an_error_that_says_why() -> None:
    with pytest.raises(UsageError, match="constant"):
        outlier_ratio([1.0, 1.0])
    with pytest.raises(UsageError, match="finite"):
        outlier_ratio([1.0, float("nan")])
    with pytest.raises(UsageError, match="floating-point"):
        outlier_statistics(np.arange(4))
    assert outlier_ratio([0.0] * 99 + [50.0]) == 0.01


def test_rules_refuse_what_cannot_be_counted() -> None:
    for bad in (
        {"sigmas": (-1.0,)},
        {"quantiles": (1.5,)},
        {"tail": 0.0},
        {"top": -1},
        {"absolute": (float("nan"),)},
    ):
        with pytest.raises(UsageError):
            OutlierRules(**bad)


def test_an_unknown_or_absent_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'numba'"):
        make_engine("numbaa")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert make_engine("auto").name == "torch"
    with pytest.raises(NotAvailableError, match=r"layerprobe\[fast\]"):
        make_engine("numba")
