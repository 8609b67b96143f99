"""Debiased CKA: theorems, an independent formula, and agreement of every form with float64."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerprobe.errors import UsageError
from layerprobe.metrics.similarity import FLOAT64_UP_TO, SCAN_ROWS, hsic, paired_layers
from layerprobe.metrics.similarity.all_pairs import pairwise_cka
from layerprobe.metrics.similarity.measures import (
    BiasedEstimateWarning,
    debiased_hsic,
    debiased_linear_cka,
    linear_cka,
)


def related(n: int, d: int, e: int, *, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two feature sets that have `share` of their spread from eight common directions."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, 8))
    x = share * common @ rng.normal(size=(8, d)) + rng.normal(size=(n, d))
    y = share * common @ rng.normal(size=(8, e)) + rng.normal(size=(n, e))
    return x, y


def hsic_by_enumeration(K: np.ndarray, L: np.ndarray) -> float:
    """HSIC's unbiased estimate straight from its definition: a mean over all ordered quadruples."""
    quadruples = list(itertools.permutations(range(len(K)), 4))
    total = 0.0
    for i, j, q, r in quadruples:
        total += K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])
    return total / len(quadruples)


def rotation(d: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


SETS = st.tuples(
    st.integers(5, 60), st.integers(1, 12), st.integers(1, 12), st.floats(0.1, 1.0), st.integers(0, 999)
)


def test_hsic_equals_its_definition_over_quadruples() -> None:
    x, y = related(7, 3, 4, share=0.5)
    assert debiased_hsic(x @ x.T, y @ y.T) == pytest.approx(hsic_by_enumeration(x @ x.T, y @ y.T), rel=1e-12)


@given(SETS)
@settings(max_examples=40, deadline=None)
def test_debiased_cka_is_the_ratio_of_hsics(case) -> None:
    n, d, e, share, seed = case
    x, y = related(n, d, e, share=share, seed=seed)
    k, m = x @ x.T, y @ y.T
    expected = debiased_hsic(k, m) / np.sqrt(debiased_hsic(k, k) * debiased_hsic(m, m))
    assert debiased_linear_cka(x, y) == pytest.approx(expected, abs=1e-9)
    assert debiased_linear_cka(y, x) == pytest.approx(expected, abs=1e-9)
    assert abs(expected) <= 1 + 1e-9


@given(SETS)
@settings(max_examples=40, deadline=None)
def test_rotation_scale_and_shift_change_nothing_and_a_copy_scores_one(case) -> None:
    n, d, e, share, seed = case
    x, y = related(n, d, e, share=share, seed=seed)
    moved = 1e-4 * x @ rotation(d, seed) + np.linspace(-50, 50, d)
    assert debiased_linear_cka(moved, y) == pytest.approx(debiased_linear_cka(x, y), abs=1e-7)
    assert debiased_linear_cka(moved, x) == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("transform", [lambda x: x * np.linspace(0.2, 5, x.shape[1]), np.tanh])
def test_other_transforms_do_change_it(transform) -> None:
    x, _ = related(200, 6, 6, share=1.0)
    assert debiased_linear_cka(x, transform(3 * x)) < 0.99


def test_independent_features_score_zero_on_average_where_the_biased_form_scores_three_quarters() -> None:
    rng = np.random.default_rng(0)
    draws = [(rng.normal(size=(256, 768)), rng.normal(size=(256, 768))) for _ in range(12)]
    values = np.array([debiased_linear_cka(x, y) for x, y in draws])
    assert abs(values.mean()) <= 3 * values.std(ddof=1) / np.sqrt(len(values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BiasedEstimateWarning)
        assert linear_cka(*draws[0]) == pytest.approx(0.75, abs=0.01)


def test_the_debiased_mean_over_many_small_draws_is_within_three_standard_errors_of_zero() -> None:
    rng = np.random.default_rng(1)
    values = np.array(
        [debiased_linear_cka(rng.normal(size=(20, 5)), rng.normal(size=(20, 30))) for _ in range(2000)]
    )
    assert abs(values.mean()) <= 3 * values.std(ddof=1) / np.sqrt(len(values))
    assert values.min() < 0


def test_the_biased_form_warns_exactly_where_images_are_few() -> None:
    x, y = related(300, 5, 29, share=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_cka(x, y)
        with pytest.raises(BiasedEstimateWarning, match=r"299 images and 30 features"):
            linear_cka(x[:299], np.c_[y, y[:, :1]][:299])


def test_biased_cka_is_the_normalised_inner_product_of_centred_grams() -> None:
    x, y = related(50, 4, 5, share=1.0)
    centre = np.eye(50) - 1 / 50
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    assert linear_cka(x, y) == pytest.approx(np.sum(k * m) / np.linalg.norm(k) / np.linalg.norm(m), rel=1e-12)


# -- all pairs at once ------------------------------------------------------------------------------------


def awkward_layers(n: int, widths: list[int], seed: int) -> list[np.ndarray]:
    """float32 layers of unequal width: some columns carry 300 σ, one layer is scaled by 1e-3, one by 1e4."""
    rng = np.random.default_rng(seed)
    common = np.random.default_rng(99).normal(size=(n, 8))
    layers = []
    for index, d in enumerate(widths):
        x = 0.3 * index * common @ rng.normal(size=(8, d)) + rng.normal(size=(n, d))
        x[:, : max(1, d // 8)] += 300 * x.std()
        layers.append((x * [1.0, 1e-3, 1e4][index % 3]).astype(np.float32))
    return layers


def reference(xs: list[np.ndarray], ys: list[np.ndarray]) -> np.ndarray:
    return np.array([[debiased_linear_cka(x, y) for y in ys] for x in xs])


@pytest.mark.parametrize("method", ["gram", "features"])
@pytest.mark.parametrize("n", [4, 5, 31, 100, 512, 513, 1100, 2051])
def test_all_pairs_agree_with_float64_to_a_millionth(method: str, n: int) -> None:
    xs, ys = awkward_layers(n, [17, 40, 5], seed=1), awkward_layers(n, [9, 64], seed=2)
    both = pairwise_cka(xs, ys, method=method)
    assert both.method == method
    np.testing.assert_allclose(both.values, reference(xs, ys), atol=1e-6)
    alone = pairwise_cka(xs, method=method)
    np.testing.assert_allclose(alone.values, reference(xs, xs), atol=1e-6)
    np.testing.assert_allclose(np.diag(alone.values), 1.0, atol=1e-7)
    np.testing.assert_allclose(np.diag(alone.stderr), 0.0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_scale_under_or_overflows(scale: float, dtype: type) -> None:
    x, y = related(600, 20, 30, share=0.4)
    expected = debiased_linear_cka(x, y)
    found = pairwise_cka([(x * scale).astype(dtype)], [y.astype(dtype)]).values[0, 0]
    assert found == pytest.approx(expected, abs=1e-6)
    assert debiased_linear_cka(x * scale, y) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("offset", [0.0, 300.0, 3e4])
@pytest.mark.parametrize("method", ["gram", "features"])
def test_offsets_of_many_deviations_lose_nothing_in_realistic_widths(method: str, offset: float) -> None:
    rng = np.random.default_rng(3)
    common = rng.normal(size=(1500, 16))
    layers = []
    for share in (0.0, 0.2):
        x = share * common @ rng.normal(size=(16, 384)) + rng.normal(size=(1500, 384))
        x[:, rng.choice(384, 5, replace=False)] += offset
        layers.append((1e-3 * x).astype(np.float32))
    found = pairwise_cka(layers, method=method).values
    np.testing.assert_allclose(found, reference(layers, layers), atol=1e-6)


def test_memory_mapped_half_precision_strided_and_torch_inputs_give_the_same(tmp_path) -> None:
    import torch

    x, y = (part.astype(np.float16) for part in related(700, 24, 16, share=0.6))
    expected = debiased_linear_cka(x, y)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y.astype(np.float32))
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "xy"]
    for a, b in (
        (x, y),
        mapped,
        (np.asfortranarray(x.astype(np.float32)), np.repeat(y, 2, axis=1)[:, ::2]),
        (torch.from_numpy(x), torch.from_numpy(y.astype(np.float32)).requires_grad_()),
    ):
        assert pairwise_cka([a], [b]).values[0, 0] == pytest.approx(expected, abs=1e-6)
    bfloat = torch.from_numpy(x.astype(np.float32)).bfloat16()
    rounded = debiased_linear_cka(bfloat.float().numpy(), y)
    assert pairwise_cka([bfloat], [y]).values[0, 0] == pytest.approx(rounded, abs=1e-6)


def test_strips_and_tiles_of_any_size_give_the_same(monkeypatch) -> None:
    xs, ys = awkward_layers(1400, [33, 20], seed=4), awkward_layers(1400, [12], seed=5)
    whole = pairwise_cka(xs, ys, method="gram")
    monkeypatch.setattr(hsic, "PANEL_BYTES", 1)
    pieces = pairwise_cka(xs, ys, method="gram")
    np.testing.assert_allclose(pieces.values, whole.values, atol=1e-7)
    np.testing.assert_allclose(pieces.stderr, whole.stderr, atol=1e-6)


def test_pieces_of_the_feature_form_give_the_same(monkeypatch) -> None:
    xs, ys = awkward_layers(1400, [33, 20], seed=4), awkward_layers(1400, [12, 50], seed=5)
    whole = pairwise_cka(xs, ys, method="features")
    monkeypatch.setattr(hsic, "PIECE_BYTES", 1)
    monkeypatch.setattr(hsic, "ACCUMULATOR_BYTES", 1)
    pieces = pairwise_cka(xs, ys, method="features")
    np.testing.assert_allclose(pieces.values, whole.values, atol=1e-7)
    np.testing.assert_allclose(pieces.stderr, whole.stderr, rtol=1e-4, atol=1e-6)


def test_rows_in_another_order_are_paired_by_the_given_order() -> None:
    x, y = related(900, 10, 12, share=0.5)
    shuffle = np.random.default_rng(0).permutation(900)
    expected = debiased_linear_cka(x, y)
    found = pairwise_cka([x], [y[shuffle]], rows_y=np.argsort(shuffle)).values[0, 0]
    assert found == pytest.approx(expected, abs=1e-6)
    assert abs(pairwise_cka([x], [y[shuffle]]).values[0, 0]) < 0.1 < expected


def test_auto_takes_the_form_with_fewer_multiplications() -> None:
    wide = [np.random.default_rng(0).normal(size=(100, 300))]
    narrow = [np.random.default_rng(0).normal(size=(3000, 3))]
    for layers, method in ((wide, "gram"), (narrow, "features")):
        xs, _ = paired_layers(layers, None)
        assert (hsic.gram_cost(xs, None) < hsic.feature_cost(xs, None)) == (method == "gram")
        assert pairwise_cka(layers).method == method


# -- bad input --------------------------------------------------------------------------------------------


def test_constant_layers_are_undefined_with_a_reason() -> None:
    x, y = related(600, 6, 6, share=0.5)
    for constant in (np.full((600, 5), 0.1, np.float32), np.full((600, 5), 1e7 / 3)):
        found = pairwise_cka([x, constant], [y], names_x=["block.0", "block.1"])
        assert found.reasons == [[None], ["block.1 is constant over the images"]]
        assert (
            np.isfinite(found.values[0, 0]) and np.isnan(found.values[1, 0]) and np.isnan(found.stderr[1, 0])
        )
        with pytest.raises(UsageError, match="X is constant over the images"):
            debiased_linear_cka(constant, y)


def test_equidistant_images_are_undefined_with_a_reason() -> None:
    found = pairwise_cka([np.eye(5)], [np.random.default_rng(0).normal(size=(5, 3))], names_x=["block.0"])
    assert found.reasons == [["all 5 images are equally far apart in block.0; use more images"]]
    with pytest.raises(UsageError, match="equally far apart"):
        debiased_linear_cka(np.eye(5), np.eye(5))


@pytest.mark.parametrize("n", [100, 700])
def test_non_finite_values_are_counted_and_located(n: int) -> None:
    x, y = (part.astype(np.float32) for part in related(n, 6, 6, share=0.5))
    x[18, 2] = np.nan
    x[70, :2] = np.inf
    message = r"block\.12\.mlp_out holds 3 non-finite values \(first: image 18\)"
    with pytest.raises(UsageError, match=message):
        pairwise_cka([x], [y], names_x=["block.12.mlp_out"])
    with pytest.raises(UsageError, match=r"X holds 3 non-finite values \(first: image 18\)"):
        debiased_linear_cka(x, y)


def test_shapes_that_do_not_pair_are_refused() -> None:
    x = np.zeros((5, 2))
    with pytest.raises(UsageError, match=r"X is 5×2, Y is 6×2"):
        debiased_linear_cka(x, np.zeros((6, 2)))
    with pytest.raises(UsageError, match=r"layer 0 of A is 5×2, layer 0 of B is 6×2"):
        pairwise_cka([x], [np.zeros((6, 2))])
    with pytest.raises(UsageError, match=r"layer 0 of A is 5×2, layer 1 of A is 4×2"):
        pairwise_cka([x, x[:4]])
    with pytest.raises(UsageError, match="at least 4 images; got 3"):
        pairwise_cka([x[:3]])
    with pytest.raises(UsageError, match="at least 4 images; got 3"):
        debiased_linear_cka(x[:3], x[:3])
    with pytest.raises(UsageError, match=r"n×d features, one row per image, got shape \(5, 2, 2\)"):
        pairwise_cka([np.zeros((5, 2, 2))])
    with pytest.raises(UsageError, match="no layers"):
        pairwise_cka([])
    with pytest.raises(UsageError, match="unknown method 'grams'"):
        pairwise_cka([x], method="grams")


def test_a_piece_of_the_scan_is_smaller_than_the_tests_above() -> None:
    """The streaming paths are only tested if the arrays above are longer than one piece."""
    assert SCAN_ROWS < 1100 and FLOAT64_UP_TO < 1100
